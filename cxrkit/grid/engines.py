"""Where runs execute: in this process, or in processes of this machine that live as long as the grid does.

Every engine calls the same `execute`; the loop treats them all alike. A third, for clusters, is in `engines_dask`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from cxrkit.grid.execute import Job, Outcome, Settings, end_all, execute
from cxrkit.grid.store import end_kernel

__all__ = ["Engine", "LocalEngine", "SerialEngine", "gpus"]

_GOODBYE = 5.0


class Engine(Protocol):
    """Takes jobs, and tells how they ended. `capacity` is how many it can run at a time, now."""

    capacity: int

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None:
        """End all that it started."""

    def submit(self, job: Job) -> None: ...

    def finished(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        """The jobs that have ended, by `job.id`; waits up to `timeout` seconds for the first. None: lost."""

    def cancel(self) -> None:
        """Stop everything that runs; its kernels are gone on return."""


class SerialEngine:
    """One run at a time, in this process."""

    capacity = 1

    def __init__(self, settings: Settings):
        self.settings = settings
        self._waiting: deque[Job] = deque()

    def __enter__(self) -> SerialEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def finished(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        if not self._waiting:
            time.sleep(timeout)
            return []
        job = self._waiting.popleft()
        return [(job.id, execute(job, self.settings))]

    def cancel(self) -> None:
        self._waiting.clear()
        end_all()


class _Worker:
    """A process that runs one job after the other; it ends, with its kernel, when this side of its pipe closes."""

    def __init__(self, slot: int, events: queue.Queue):
        self.slot, self.job = slot, None
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        # A session of its own: Ctrl-C in the terminal is the runner's to answer.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cxrkit.grid.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(events,), name=f"grid worker {slot}", daemon=True).start()

    def _listen(self, events: queue.Queue) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                if not line.endswith(b"\n"):
                    break  # it was killed while it wrote
                told = json.loads(line)
                events.put((self, told["id"], Outcome(**told["outcome"])))
        events.put((self, None, None))

    def send(self, job: Job, settings: Settings) -> None:
        self.job = job
        order = {"job": dataclasses.asdict(job), "settings": dataclasses.asdict(settings)}
        with contextlib.suppress(OSError):  # it has just died, which `_listen` tells
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def lost(self) -> Outcome | None:
        """What to say of the job that it died with: None where it was killed, else what it complained of."""
        if (self.process.returncode or 0) <= 0:
            return None
        self.complaints.seek(0)
        told = self.complaints.read().decode(errors="replace")
        last = told.strip().rpartition("\n")[2]
        return Outcome("failed", "start", f"the worker ended with status {self.process.returncode}: {last}", told)

    def end(self, grace: float = _GOODBYE) -> None:
        """Close its pipe, and kill it where that doesn't do."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.job is not None:
            end_kernel(Path(self.job.work))


class LocalEngine:
    """Processes of this machine, started once: each imports papermill and then makes run after run.

    The machine's cores are shared out among them unless `settings.threads` says otherwise, and its graphics cards are
    dealt round. A worker that dies is replaced when the next job needs it.
    """

    def __init__(self, settings: Settings, workers: int = 1):
        self.capacity = max(1, workers)
        threads = settings.threads or max(1, len(_cores()) // self.capacity)
        cards = [settings.gpu] if settings.gpu is not None else gpus()
        self._settings = [
            dataclasses.replace(settings, threads=threads, gpu=cards[slot % len(cards)] if cards else None)
            for slot in range(self.capacity)
        ]
        self._workers: dict[int, _Worker] = {}
        self._events: queue.Queue = queue.Queue()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        busy = {slot for slot, worker in self._workers.items() if worker.job is not None}
        slot = next(slot for slot in range(self.capacity) if slot not in busy)
        if slot not in self._workers:
            self._workers[slot] = _Worker(slot, self._events)
        self._workers[slot].send(job, self._settings[slot])

    def finished(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        ended: list[tuple[str, Outcome | None]] = []
        over = time.monotonic() + timeout
        while True:
            try:
                worker, name, outcome = self._events.get(timeout=0 if ended else max(0.0, over - time.monotonic()))
            except queue.Empty:
                return ended
            if name is not None:
                worker.job = None
                ended.append((name, outcome))
            elif self._workers.get(worker.slot) is worker:
                del self._workers[worker.slot]
                worker.end(0.5)
                if worker.job is not None:
                    ended.append((worker.job.id, worker.lost()))

    def cancel(self) -> None:
        workers = list(self._workers.values())
        self._workers.clear()
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        for worker in workers:
            worker.end()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def gpus() -> list[str]:
    """The graphics cards that may be used here, as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's tool."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [card.strip() for card in chosen.split(",") if card.strip()]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        told = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.decode().split() if told.returncode == 0 else []
