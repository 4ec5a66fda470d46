"""Where runs execute: on the workers of a dask.distributed cluster, on any number of machines with one shared folder.

This engine decides itself which worker takes which run, so that it knows what was lost with a worker, and shares out
each machine's cores and graphics cards. Whoever reaches a scheduler's port can run code as its owner: keep it inside a
network that you trust, or use `tls://` addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import queue
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.grid import execute as executing
from cxrkit.grid.execute import Job, Outcome, Settings

__all__ = ["DaskEngine", "check_address", "connect"]

_ANSWER = 5.0  # seconds that a scheduler has to answer
_GONE = 15.0  # seconds after which a scheduler that has stopped answering counts as gone
_LOOK = 1.0  # seconds between two looks at which workers there are
_PACKAGES = ("distributed", "papermill", "numpy", "pandas", "torch")
_ADDRESS = re.compile(r"^(?:(?P<protocol>[a-z]+)://)?(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})$")


def check_address(address: str) -> str:
    """A scheduler's address as dask writes it, from `HOST:PORT`, `tcp://HOST:PORT`, `tls://HOST:PORT`, or the JSON file
    that `dask scheduler --scheduler-file` writes. Raises ParameterError."""
    if address.endswith(".json"):
        try:
            address = str(json.loads(Path(address).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ParameterError(f"scheduler {address!r}: not a file that `dask scheduler` has written") from None
    match = _ADDRESS.match(address)
    if match is None or not 0 < int(match["port"]) < 65536 or match["protocol"] not in (None, "tcp", "tls"):
        raise ParameterError(f"scheduler {address!r}: expected tcp://HOST:PORT, tls://HOST:PORT, or a scheduler file")
    return address if match["protocol"] else f"tcp://{address}"


def connect(address: str, settings: Settings) -> DaskEngine:
    """The engine for a scheduler that already runs; connects when it is entered. Raises ParameterError for what is no
    address."""
    return DaskEngine(check_address(address), settings=settings)


@dataclasses.dataclass
class _Worker:
    """A dask worker that runs may be given to; `slots` as many at a time as it has threads."""

    id: str
    address: str
    slots: int
    place: str  # the machine, or the part of it, whose cores and cards its workers share
    cores: int
    cards: list[str]
    busy: dict[int, str] = dataclasses.field(default_factory=dict)  # slot -> job


class DaskEngine:
    """Runs on the workers of a cluster, each as many at a time as it has threads.

    Each worker must have this package's code and the same versions of what results depend on; `__enter__` refuses a
    cluster where one differs, and a worker that joins later and differs gets nothing to do. A worker that dies is
    noticed within about a second, and its runs are reported as lost. `settings.threads` and `settings.gpu` hold
    for every run where they are set; else a machine's cores are shared out among its workers' threads, and its cards
    are dealt round.
    """

    def __init__(self, address: str | None = None, client: Any = None, settings: Settings | None = None):
        if settings is None or (address is None) == (client is None):
            raise ParameterError("a DaskEngine needs settings, and either an address or a client")
        self.address, self.client, self.settings = address, client, settings
        self._own_client = client is None
        self._workers: dict[str, _Worker] = {}
        self._refused: dict[str, str] = {}
        self._backlog: deque[Job] = deque()
        self._placed: dict[str, tuple[Any, _Worker, int]] = {}
        self._events: queue.Queue[str] = queue.Queue()
        self._looked = self._answered = 0.0

    def __enter__(self) -> DaskEngine:
        if self._own_client:
            self.client = _client(self.address)
        try:
            self._answered = time.monotonic()
            self._look()
            if self._refused:
                raise CxrkitError("\n  ".join(["workers differ from this machine:", *self._refused.values()]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
        if self._own_client and self.client is not None:
            with contextlib.suppress(Exception):
                self.client.close(timeout=_ANSWER)

    @property
    def capacity(self) -> int:
        return sum(worker.slots for worker in self._workers.values())

    def submit(self, job: Job) -> None:
        self._backlog.append(job)
        self._place()

    def finished(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        over = time.monotonic() + timeout
        while True:
            ended = self._lost() + self._told(max(0.0, min(_LOOK, over - time.monotonic())))
            self._place()
            if ended or time.monotonic() >= over:
                return ended

    def cancel(self) -> None:
        """Forget what waits, stop what runs. A kernel that can't be reached ends by itself: its claim is gone."""
        names = list(self._placed)
        addresses = sorted({worker.address for _, worker, _ in self._placed.values()})
        futures = [future for future, _, _ in self._placed.values()]
        self._backlog.clear()
        self._placed.clear()
        for worker in self._workers.values():
            worker.busy.clear()
        if futures and self.client is not None and self.client.status == "running":
            with contextlib.suppress(Exception):
                self.client.cancel(futures, force=True)
            self._ask(_stop, names, workers=addresses)

    def _told(self, timeout: float) -> list[tuple[str, Outcome | None]]:
        """What futures say, waiting up to `timeout` for the first."""
        ended = []
        with contextlib.suppress(queue.Empty):
            name = self._events.get(timeout=timeout)
            while True:
                if name in self._placed:
                    ended.append((name, self._take(name)))
                name = self._events.get_nowait()
        return ended

    def _lost(self) -> list[tuple[str, Outcome | None]]:
        """The runs of workers that are gone; looks at the cluster about once a second."""
        if time.monotonic() - self._looked >= _LOOK:
            self._look()
        gone = [name for name, (_, worker, _) in self._placed.items() if worker.id not in self._workers]
        for name in gone:
            future, _, _ = self._placed.pop(name)
            with contextlib.suppress(Exception):
                future.cancel(force=True)
        return [(name, None) for name in gone]

    def _take(self, name: str) -> Outcome | None:
        future, worker, slot = self._placed.pop(name)
        worker.busy.pop(slot, None)
        try:  # what a worker was killed with would be waited for without end: its run is tied to it
            if future.status == "finished":
                return future.result(timeout=_ANSWER)
            error = future.exception(timeout=_ANSWER) if future.status == "error" else None
        except TimeoutError:
            return None
        if error is None:
            return None
        if type(error).__name__ in ("KilledWorker", "CancelledError", "CommClosedError"):
            return None
        return Outcome("failed", "start", f"the worker {worker.address} failed: {type(error).__name__}: {error}")

    def _place(self) -> None:
        while self._backlog:
            free = [worker for worker in self._workers.values() if len(worker.busy) < worker.slots]
            if not free:
                return
            worker = min(free, key=lambda w: (len(w.busy) / w.slots, w.address))
            slot = next(slot for slot in range(worker.slots) if slot not in worker.busy)
            job = self._backlog.popleft()
            future = self.client.submit(
                _attempt, job, self._settings(worker, slot), key=job.id, pure=False, workers=[worker.address]
            )
            worker.busy[slot] = job.id
            self._placed[job.id] = (future, worker, slot)
            future.add_done_callback(functools.partial(_announce, self._events, job.id))

    def _settings(self, worker: _Worker, slot: int) -> Settings:
        near = sorted((w for w in self._workers.values() if w.place == worker.place), key=lambda w: w.address)
        threads = self.settings.threads or max(1, worker.cores // sum(w.slots for w in near))
        gpu = self.settings.gpu
        if gpu is None and worker.cards:
            before = sum(w.slots for w in near[: near.index(worker)])
            gpu = worker.cards[(before + slot) % len(worker.cards)]
        return dataclasses.replace(self.settings, threads=threads, gpu=gpu)

    def _look(self) -> None:
        """Which workers there are now. Raises CxrkitError where the scheduler is gone or no worker fits."""
        self._looked = time.monotonic()
        try:
            if self.client.status != "running":
                raise OSError
            # Not client.scheduler_info: what it returns may just have been replaced by a card without workers.
            card = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER)
            found = card["workers"]
        except Exception:
            if time.monotonic() - self._answered > _GONE or self.client.status == "closed":
                raise CxrkitError(
                    f"the scheduler {self.address or ''} doesn't answer any more; what was done is kept, and the same "
                    "command goes on when there is a scheduler again"
                ) from None
            return
        self._answered = time.monotonic()
        usable = {info["id"]: (address, info) for address, info in found.items() if info.get("status") != "closed"}
        self._workers = {name: worker for name, worker in self._workers.items() if name in usable}
        new = {
            address: info for name, (address, info) in usable.items() if name not in (*self._workers, *self._refused)
        }
        if new:
            self._admit(new)
        if self._refused.keys() & usable.keys() and not self._workers:
            raise CxrkitError("\n  ".join(["no worker can be used:", *self._refused.values()]))

    def _admit(self, new: dict[str, dict[str, Any]]) -> None:
        wanted = _versions()
        for address, told in self._ask(_about, self.settings.project, workers=list(new)).items():
            info = new[address]
            if problem := _problem(told, wanted):
                self._refused[info["id"]] = f"worker {address}: {problem}"
            elif isinstance(told, dict):
                place = (told["place"], told["cores"], told["cards"])
                self._workers[info["id"]] = _Worker(info["id"], address, max(1, info["nthreads"]), *place)

    def _ask(self, function: Callable, *arguments: Any, workers: list[str]) -> dict[str, Any]:
        """What a function returns, or raises, on each of some workers; nothing of those that don't answer in time."""
        with contextlib.suppress(Exception):
            return self.client.sync(
                self.client._run, function, *arguments, workers=workers, on_error="return", callback_timeout=6 * _ANSWER
            )
        return {}


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise CxrkitError("--scheduler needs the package 'distributed'; pip install 'dask[distributed]'") from None
    try:
        _greet(address)
        return Client(address, timeout=_ANSWER, set_as_default=False, name="cxrkit-grid")
    except Exception as error:
        raise CxrkitError(
            f"no scheduler answers at {address} ({error}); start one with `dask scheduler`, and its workers with "
            "`dask worker ADDRESS` in the project's folder"
        ) from None


def _greet(address: str) -> None:
    """Raise OSError unless what listens there speaks first, as dask does: a Client waits for ever for what is mute."""
    protocol, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as link:
        if protocol == "tcp" and int.from_bytes(link.recv(8, socket.MSG_WAITALL), "little") not in range(1, 2**20):
            raise OSError("what listens there is no dask scheduler")


def _announce(events: queue.Queue[str], name: str, future: Any) -> None:
    events.put(name)


def _problem(told: Any, wanted: dict[str, str]) -> str | None:
    """What is wrong with what a worker told about itself; None for nothing."""
    if told is None or isinstance(told, OSError):
        return None  # it went away meanwhile, or is asked again at the next look
    if isinstance(told, CxrkitError):
        return str(told)
    if not isinstance(told, dict):
        return f"can't load this version of cxrkit ({type(told).__name__}: {told}); start it from the same environment"
    differing = [name for name in wanted if told["versions"].get(name) != wanted[name]]
    if not differing:
        return None
    parts = [
        f"{name} {told['versions'].get(name) or 'is missing'} where this machine has {wanted[name]}"
        for name in differing
    ]
    return ", ".join(parts)


@functools.cache
def _versions() -> dict[str, str]:
    """What must be the same wherever runs of one grid are made."""
    from cxrkit.study.run_key import fingerprint

    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions | {"cxrkit's code": fingerprint("")}


def _about(project: str) -> dict[str, Any]:
    """On a worker: versions, and the cores and cards that it shares with others of the same machine or job."""
    from cxrkit.grid.engines import gpus

    if not Path(project, "notebooks").is_dir():
        raise CxrkitError(f"sees no project in {project!r}; project and results must lie on a shared folder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = os.environ.get("SLURM_JOB_ID", "")
    if job:
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
    place = f"{executing.processes.machine()}|{job}"
    return {"versions": _versions(), "place": place, "cores": cores, "cards": gpus()}


def _attempt(job: Job, settings: Settings) -> Outcome | None:
    """On a worker: one attempt. None where it was begun before: dask repeats what was lost, the grid decides if."""
    if Path(job.work).exists():
        return None
    if job.claim and not Path(job.claim).exists():
        return Outcome("failed", "start", f"this worker doesn't see {job.claim}; results must lie on a shared folder")
    return executing.execute(job, settings)


def _stop(names: list[str]) -> None:
    """On a worker: end the kernels of these attempts; others in the same worker may be another runner's."""
    for watch in [executing._live.get(name) for name in names]:
        if watch is not None:
            watch.end()
