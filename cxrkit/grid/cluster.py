"""Where runs execute: on the workers of a dask cluster, whose scheduler runs already or whose workers are SLURM's jobs.

All machines share the project's folder. This engine decides itself which worker takes which run, so that it knows what
was lost with a worker, and shares out each machine's cores and graphics cards. Anyone who reaches a scheduler's port
can run code as its owner: keep it inside a network that you trust, or use `tls://` addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.grid import execute as executing
from cxrkit.grid import processes
from cxrkit.grid.engines import Ended
from cxrkit.grid.execute import Job, Outcome
from cxrkit.grid.slurm import SlurmJobs
from cxrkit.project import project_folder
from cxrkit.study.import_closure import fingerprint

__all__ = ["DaskEngine", "address_of"]

_ANSWER = 5.0  # seconds that a scheduler or worker has to answer
_GONE = 15.0  # seconds after which a scheduler that has stopped answering counts as gone
_GRACE = 60.0  # seconds in which a submitted job must be seen in its queue
_LOOK = 1.0  # seconds between two looks at which workers there are
_PACKAGES = ("distributed", "papermill", "numpy", "pandas", "torch")


def address_of(scheduler: str) -> str:
    """A scheduler's address, from `HOST:PORT`, `tcp://HOST:PORT`, `tls://HOST:PORT`, or the JSON file that `dask
    scheduler --scheduler-file` writes. Raises ParameterError."""
    address = scheduler
    if scheduler.endswith(".json"):
        try:
            address = str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ParameterError(f"scheduler {scheduler!r}: not a file that `dask scheduler` has written") from None
    if not re.fullmatch(r"((tcp|tls)://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", address, re.ASCII):
        raise ParameterError(f"scheduler {scheduler!r}: expected tcp://HOST:PORT, tls://HOST:PORT, or a scheduler file")
    return address if "://" in address else f"tcp://{address}"


@dataclasses.dataclass(eq=False)
class _Worker:
    """A dask worker that runs may be given to; `slots` as many at a time as it has threads."""

    address: str
    slots: int
    place: str  # the machine, or the part of it, whose cores and cards its workers share
    cores: int
    cards: list[str]


@dataclasses.dataclass(eq=False)
class _Placed:
    """A job that a worker has."""

    future: Any
    worker: _Worker
    slot: int


class DaskEngine:
    """Runs on the workers of a cluster, each as many at a time as it has threads.

    `scheduler`: address of one that runs already; or `jobs` of SLURM, which are given back at the end. Each worker must
    have this package's code and the same versions of what results depend on: `__enter__` refuses a cluster where one
    differs, and a worker that joins later and differs gets nothing to do. A worker that dies is noticed within about a
    second, and its runs are reported as lost. A machine's cores are shared out among its workers' threads, and its
    cards are dealt round.
    """

    def __init__(self, scheduler: str = "", jobs: SlurmJobs | None = None, client: Any = None):
        self.scheduler, self.jobs, self.client = scheduler, jobs, client
        self._cluster: Any = None
        self._workers: dict[str, _Worker] = {}  # by dask's id of the process
        self._refused: dict[str, str] = {}
        self._placed: dict[str, _Placed] = {}  # by job
        self._looked = self._answered = self._seen = 0.0

    def __enter__(self) -> DaskEngine:
        try:
            if self.jobs:
                self._cluster = self.jobs.start()
            if self.client is None:
                self.client = _client(self._cluster or self.scheduler)
            self._answered = self._seen = time.monotonic()
            self._look()
            if self._refused:
                raise CxrkitError("\n  ".join(["workers differ from this machine:", *self._refused.values()]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop what runs. A kernel that can't be reached ends by itself: the folder of its attempt goes next."""
        if self._placed and self.client.status == "running":
            addresses = sorted({one.worker.address for one in self._placed.values()})
            with contextlib.suppress(Exception):
                self.client.cancel([one.future for one in self._placed.values()], force=True)
            self._ask(executing.end_all, list(self._placed), workers=addresses)
        self._placed.clear()
        for part in (self.client, self._cluster):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close(timeout=2 * _ANSWER)

    @property
    def capacity(self) -> int:
        return sum(worker.slots for worker in self._workers.values())

    def submit(self, job: Job) -> None:
        busy = [(one.worker.address, one.slot) for one in self._placed.values()]
        free = [(w, slot) for w in self._workers.values() for slot in range(w.slots) if (w.address, slot) not in busy]
        worker, slot = min(free, key=lambda one: (one[1] / one[0].slots, one[0].address))
        job = dataclasses.replace(job, **self._share(worker, slot))
        future = self.client.submit(_attempt, job, key=job.id, pure=False, workers=[worker.address])
        self._placed[job.id] = _Placed(future, worker, slot)

    def finished(self, timeout: float) -> Ended:
        end = time.monotonic() + timeout
        while True:
            if time.monotonic() - self._looked >= _LOOK:
                self._look()
            there = self._workers.values()
            over = [n for n, one in self._placed.items() if one.future.status != "pending" or one.worker not in there]
            ended = [(name, self._result(self._placed.pop(name))) for name in over]
            if ended or time.monotonic() >= end:
                return ended
            time.sleep(0.05)

    def _result(self, one: _Placed) -> Outcome | None:
        """How a job ended; None where it was lost with its worker."""
        try:
            if one.future.status in ("finished", "error"):
                # With a limit: a result that went with its worker would be waited for without end.
                return one.future.result(timeout=_ANSWER)
            one.future.cancel(force=True)  # dask would repeat it
        except Exception as error:
            name = type(error).__name__
            if name not in ("KilledWorker", "CommClosedError", "TimeoutError"):
                return Outcome("failed", "start", f"the worker {one.worker.address} failed: {name}: {error}")
        return None

    def _share(self, worker: _Worker, slot: int) -> dict[str, Any]:
        near = sorted((w for w in self._workers.values() if w.place == worker.place), key=lambda w: w.address)
        threads, before = worker.cores // sum(w.slots for w in near), sum(w.slots for w in near[: near.index(worker)])
        gpu = worker.cards[(before + slot) % len(worker.cards)] if worker.cards else None
        return {"threads": max(1, threads), "gpu": gpu}

    def _look(self) -> None:
        """Bring the list of workers up to date. Raises CxrkitError where the scheduler is gone or no worker fits."""
        self._looked = time.monotonic()
        try:
            if self.client.status != "running":
                raise OSError
            # Not client.scheduler_info: what it returns may just have been replaced by a card without workers.
            card = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER)
        except Exception:
            if time.monotonic() - self._answered > _GONE or self.client.status == "closed":
                raise CxrkitError(
                    f"the scheduler {self.scheduler} doesn't answer any more; what was done is stored, and the same "
                    "command goes on when there is a scheduler again"
                ) from None
            return
        self._answered = time.monotonic()
        found = {info["id"]: (address, info) for address, info in card["workers"].items() if info["status"] != "closed"}
        self._workers = {name: worker for name, worker in self._workers.items() if name in found}
        new = {address: info for name, (address, info) in found.items() if name not in self._workers | self._refused}
        asked = (str(project_folder()), _versions())
        for address, told in self._ask(_about, *asked, workers=list(new)).items() if new else ():
            name, slots = new[address]["id"], max(1, new[address]["nthreads"])
            if isinstance(told, dict):
                self._workers[name] = _Worker(address, slots, **told)
            elif isinstance(told, CxrkitError):
                self._refused[name] = f"worker {address}: {told}"
            elif told is not None and not isinstance(told, OSError):  # else it went away, or is asked at the next look
                self._refused[name] = (
                    f"worker {address}: can't load this version of cxrkit ({type(told).__name__}: {told}); start it "
                    "from the same environment"
                )
        if self._refused.keys() & found.keys() and not self._workers:
            raise CxrkitError("\n  ".join(["no worker can be used:", *self._refused.values()]))
        if self._workers or self._cluster is None:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _GRACE:
            self._seen = time.monotonic()
            self.jobs.check(self._cluster)

    def _ask(self, function: Callable, *arguments: Any, workers: list[str]) -> dict[str, Any]:
        """Result of a function, or what it raises, on each of some workers; of those that answer in time."""
        options = {"workers": workers, "on_error": "return", "callback_timeout": 6 * _ANSWER}
        with contextlib.suppress(Exception):
            return self.client.sync(self.client._run, function, *arguments, **options)
        return {}


def _client(place: Any) -> Any:
    from distributed import Client

    try:
        if isinstance(place, str):
            _greet(place)
        return Client(place, timeout=_ANSWER, set_as_default=False, name="cxrkit-grid")
    except Exception as error:
        raise CxrkitError(
            f"no scheduler answers at {place} ({error}); start one with `dask scheduler`, and its workers with "
            "`dask worker ADDRESS` in the project's folder"
        ) from None


def _greet(address: str) -> None:
    """Raise OSError unless what listens there speaks first, as dask does: a Client waits for ever for what is mute."""
    protocol, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as link:
        if protocol == "tcp" and int.from_bytes(link.recv(8, socket.MSG_WAITALL), "little") not in range(1, 2**20):
            raise OSError("what listens there is no dask scheduler")


@functools.cache
def _versions() -> dict[str, str]:
    """The versions that must be the same wherever runs of one grid are made."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "cxrkit's code": fingerprint("")}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _about(project: str, versions: dict[str, str]) -> dict[str, Any]:
    """On a worker: the cores and cards that it shares with others of the same machine or job. Raises CxrkitError where
    it can't make the runner's runs."""
    if not Path(project, "notebooks").is_dir():
        raise CxrkitError(f"sees no project in {project!r}; project and results must lie on a shared folder")
    own = _versions()
    wrong = [name for name, version in versions.items() if own.get(name) != version]
    if wrong:
        told = [f"{name} {own.get(name) or 'is missing'} where this machine has {versions[name]}" for name in wrong]
        raise CxrkitError(", ".join(told))
    job, cores = os.environ.get("SLURM_JOB_ID", ""), executing.cores()
    if job:
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
    return {"place": f"{processes.machine()}|{job}", "cores": cores, "cards": executing.gpus()}


def _attempt(job: Job) -> Outcome | None:
    """On a worker: one attempt. None where it was begun before: dask repeats what was lost, the grid decides if."""
    if not Path(job.work).exists():
        return Outcome("failed", "start", f"this worker doesn't see {job.work}; results must lie on a shared folder")
    if Path(job.work, "output").exists():
        return None
    return executing.execute(job)
