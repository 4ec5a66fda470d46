"""Where runs execute: in this process, or in processes of this machine that live as long as the grid does.

Every engine calls the same `execute`; the loop treats them all alike. A third, for clusters, is in `cluster`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from cxrkit.grid.execute import Job, Outcome, Settings, cores, end_all, execute, gpus
from cxrkit.grid.store import end_kernel

__all__ = ["Engine", "LocalEngine", "SerialEngine"]

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
    """A process that makes one run after the other; it ends, with its kernel, when this side of its pipe closes."""

    def __init__(self):
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        command = [sys.executable, "-m", "cxrkit.grid.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.complaints}
        # A session of its own: Ctrl-C in the terminal is the runner's to answer.
        self.process = subprocess.Popen(command, **pipes, start_new_session=True)

    def make(self, job: Job, settings: Settings) -> Outcome | None:
        """How a job ended; None where the worker was killed."""
        order, answer = {"job": dataclasses.asdict(job), "settings": dataclasses.asdict(settings)}, b""
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if answer.endswith(b"\n"):
            return Outcome(**json.loads(answer))
        self.end(0.5)
        end_kernel(Path(job.work))
        if self.process.returncode <= 0:
            return None
        self.complaints.seek(0)
        told = self.complaints.read().decode(errors="replace")
        last = told.strip().rpartition("\n")[2]
        return Outcome("failed", "start", f"the worker ended with status {self.process.returncode}: {last}", told)

    def end(self, grace: float) -> None:
        """Close its pipe, and kill it where that doesn't do."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalEngine:
    """Processes of this machine, started once: each imports papermill and then makes run after run.

    The machine's cores are shared out among them unless `settings.threads` says otherwise, and its graphics cards are
    dealt round. A worker that dies is replaced when the next job needs it.
    """

    def __init__(self, settings: Settings, workers: int = 1):
        self.capacity = max(1, workers)
        threads = settings.threads or max(1, cores() // self.capacity)
        cards = [settings.gpu] if settings.gpu is not None else gpus()
        self._settings = [
            dataclasses.replace(settings, threads=threads, gpu=cards[slot % len(cards)] if cards else None)
            for slot in range(self.capacity)
        ]
        self._workers: dict[int, _Worker] = {}
        self._jobs: dict[int, Job] = {}
        self._ended: queue.Queue[tuple[int, Job, Outcome | None]] = queue.Queue()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        slot = next(slot for slot in range(self.capacity) if slot not in self._jobs)
        self._jobs[slot] = job
        if slot not in self._workers or self._workers[slot].process.poll() is not None:
            self._workers[slot] = _Worker()
        work = (slot, job, self._workers[slot])
        threading.Thread(target=self._make, args=work, name=f"grid worker {slot}", daemon=True).start()

    def _make(self, slot: int, job: Job, worker: _Worker) -> None:
        self._ended.put((slot, job, worker.make(job, self._settings[slot])))

    def finished(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        ended: list[tuple[str, Outcome | None]] = []
        with contextlib.suppress(queue.Empty):
            slot, job, outcome = self._ended.get(timeout=timeout)
            while True:
                if self._jobs.get(slot) is job:  # else it was cancelled
                    del self._jobs[slot]
                    ended.append((job.id, outcome))
                slot, job, outcome = self._ended.get_nowait()
        return ended

    def cancel(self) -> None:
        jobs, workers = list(self._jobs.values()), list(self._workers.values())
        self._jobs.clear()
        self._workers.clear()
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        for worker in workers:
            worker.end(_GOODBYE)
        for job in jobs:
            end_kernel(Path(job.work))
