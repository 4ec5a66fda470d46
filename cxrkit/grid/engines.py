"""Where runs execute on this machine: in this process, or in processes that live as long as the grid does.

Every engine calls the same `execute`; the loop treats them all alike. A third, for clusters, is in `cluster`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Protocol

from cxrkit.grid.execute import Job, Outcome, Settings, cores, end_all, execute, gpus
from cxrkit.grid.store import end_kernel

__all__ = ["Engine", "LocalEngine", "SerialEngine"]

# How jobs ended, by `Job.id`; None: the worker was lost with it.
Ended = list[tuple[str, Outcome | None]]


class Engine(Protocol):
    """Takes jobs, and tells how they ended. `capacity` is how many it can run at a time, now."""

    capacity: int

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None:
        """End all that it started."""

    def submit(self, job: Job) -> None:
        """Start a job; never more than `capacity` at a time."""

    def finished(self, timeout: float) -> Ended:
        """The jobs that have ended; waits up to `timeout` seconds for the first."""


class SerialEngine:
    """One run at a time, in this process."""

    capacity = 1

    def __init__(self, settings: Settings):
        self.settings = settings
        self._jobs: list[Job] = []

    def __enter__(self) -> SerialEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        end_all()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def finished(self, timeout: float) -> Ended:
        if not self._jobs:
            threading.Event().wait(timeout)
            return []
        job = self._jobs.pop()
        return [(job.id, execute(job, self.settings))]


class _Worker:
    """A process that makes one run after the other; it ends, with its kernel, when this side of its pipe closes."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.job: Job | None = None
        command = [sys.executable, "-m", "cxrkit.grid.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # A session of its own: Ctrl-C in the terminal is the runner's to answer.
        self.process = subprocess.Popen(command, **pipes, start_new_session=True)

    def make(self, job: Job) -> Outcome | None:
        """How a job ended; None where the worker died."""
        answer = b""
        with contextlib.suppress(OSError, ValueError):
            order = json.dumps([dataclasses.asdict(job), dataclasses.asdict(self.settings)])
            self.process.stdin.write(order.encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if answer.endswith(b"\n"):
            return Outcome(**json.loads(answer))
        self.end(0.5)
        return None

    def end(self, grace: float) -> None:
        """Close its pipe, and kill it where that doesn't do, with the kernel that it leaves."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if job := self.job:
            end_kernel(Path(job.work))


class LocalEngine:
    """Processes of this machine, each of which imports papermill once and then makes run after run.

    The machine's cores are shared out among them unless `settings.threads` says otherwise, and its graphics cards are
    dealt round. A worker that dies is replaced when the next job needs it.
    """

    def __init__(self, settings: Settings, workers: int = 1):
        self.capacity = max(1, workers)
        threads = settings.threads or max(1, cores() // self.capacity)
        cards = [settings.gpu] if settings.gpu is not None else gpus() or [None]
        self._settings = [
            dataclasses.replace(settings, threads=threads, gpu=cards[slot % len(cards)])
            for slot in range(self.capacity)
        ]
        self._workers: dict[int, _Worker] = {}
        self._ended: queue.Queue[tuple[str, Outcome | None]] = queue.Queue()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        for worker in workers:
            worker.end(5.0)
        self._workers.clear()

    def submit(self, job: Job) -> None:
        busy = {slot for slot, worker in self._workers.items() if worker.job}
        slot = next(slot for slot in range(self.capacity) if slot not in busy)
        if slot not in self._workers or self._workers[slot].process.poll() is not None:
            self._workers[slot] = _Worker(self._settings[slot])
        self._workers[slot].job = job
        threading.Thread(target=self._make, args=(self._workers[slot], job), daemon=True).start()

    def _make(self, worker: _Worker, job: Job) -> None:
        outcome = worker.make(job)
        worker.job = None
        self._ended.put((job.id, outcome))

    def finished(self, timeout: float) -> Ended:
        with contextlib.suppress(queue.Empty):
            return [self._ended.get(timeout=timeout)]
        return []
