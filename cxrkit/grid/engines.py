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

from cxrkit.grid.execute import Job, Outcome, cores, end_all, execute, gpus
from cxrkit.grid.store import end_kernel

__all__ = ["Engine", "LocalEngine", "SerialEngine"]

# How jobs ended, by `Job.id`; None: the worker was lost with it.
Ended = list[tuple[str, Outcome | None]]


class Engine(Protocol):
    """A context in which jobs are made, at most `capacity` at a time; leaving it ends all that it started."""

    capacity: int

    def submit(self, job: Job) -> None: ...

    def finished(self, timeout: float) -> Ended:
        """The jobs that have ended; waits up to `timeout` seconds for the first."""


class SerialEngine:
    """One run at a time, in this process."""

    capacity = 1

    def __init__(self):
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
        return [(job.id, execute(job))]


class _Worker:
    """A process that makes one run after the other; it ends, with its kernel, when this side of its pipe closes."""

    def __init__(self, threads: int, gpu: str | None):
        self.share = {"threads": threads, "gpu": gpu}
        self.process: subprocess.Popen | None = None
        self.job: Job | None = None

    def make(self, job: Job) -> Outcome | None:
        """How a job ended; None where the worker died, which the next job replaces."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "cxrkit.grid.worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # A session of its own: Ctrl-C in the terminal is the runner's to answer.
            self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        self.job, answer = job, b""
        with contextlib.suppress(OSError, ValueError):
            order = json.dumps(dataclasses.asdict(job) | self.share)
            self.process.stdin.write(order.encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if answer.endswith(b"\n"):
            return Outcome(**json.loads(answer))
        self.end(0.5)
        return None

    def close(self) -> None:
        if self.process:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def end(self, grace: float) -> None:
        """Close its pipe, and kill it where that doesn't do, with the kernel that it leaves."""
        self.close()
        if self.process:
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.job:
            end_kernel(Path(self.job.work))


class LocalEngine:
    """Processes of this machine, each of which imports papermill once and then makes run after run.

    The machine's cores are shared out among them, and its graphics cards are dealt round.
    """

    def __init__(self, workers: int = 1):
        self.capacity = max(1, workers)
        threads, cards = max(1, cores() // self.capacity), gpus() or [None]
        self.workers = [_Worker(threads, cards[slot % len(cards)]) for slot in range(self.capacity)]
        self._idle = list(self.workers)
        self._ended: queue.Queue[tuple[str, Outcome | None]] = queue.Queue()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.close()
        for worker in self.workers:
            worker.end(5.0)

    def submit(self, job: Job) -> None:
        threading.Thread(target=self._make, args=(self._idle.pop(), job), daemon=True).start()

    def _make(self, worker: _Worker, job: Job) -> None:
        outcome = worker.make(job)
        self._idle.append(worker)
        self._ended.put((job.id, outcome))

    def finished(self, timeout: float) -> Ended:
        with contextlib.suppress(queue.Empty):
            return [self._ended.get(timeout=timeout)]
        return []
