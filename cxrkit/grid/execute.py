"""One run, where the worker is: start a kernel, let papermill run the notebook in it, watch it, report how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cxrkit.errors import CxrkitError
from cxrkit.files import replace_file
from cxrkit.grid import processes
from cxrkit.grid.store import KERNEL_FOLDER, LEASE, disk_full

__all__ = ["ALLOCATOR", "Job", "Outcome", "cores", "end_all", "execute", "gpus"]

_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS", "RAYON")
# Linux' allocator gives large blocks back after each use and asks for them anew, a tenth of a training's time on a CPU.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SENT = {1, 2, 9, 15}  # signals to hang up, interrupt, kill, end: sent by someone; others are the kernel's own crash
_LOOK = 0.1  # seconds between two looks at a kernel


@dataclass(frozen=True)
class Job:
    """One attempt at one run; plain data. Paths are absolute, on a folder that runner and worker share."""

    id: str
    key: str
    notebook: str
    values: dict[str, Any]
    card: dict[str, Any]
    results: str
    work: str  # a folder of the runner's; the attempt is wanted as long as it is there
    project: str  # the kernel's current folder
    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 0  # of the CPU; 0: the machine's choice
    gpu: str | None = None  # as CUDA_VISIBLE_DEVICES names it; None: the machine's choice
    heartbeat: str = ""  # a file that the runner touches; empty: none
    own_run: bool = False  # the notebook writes its run itself
    time_limit: float | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `state` is done or failed, `why` one of error, time, memory, killed, disk, start,
    cancelled, and `seconds` the length of the whole attempt."""

    state: str
    why: str = ""
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0


def execute(job: Job) -> Outcome:
    """Run the notebook of a job in a kernel of its own, and store its run; returns how that ended.

    The same for every engine. Neither the folder nor the environment of this process are changed, so several may run in
    its threads. The kernel is gone on return. The executed notebook and the log (what the kernel printed) stay in
    `job.work`; a notebook that writes no run of its own gets one that holds the executed notebook and the files that it
    put into the folder named by CXRKIT_OUTPUT.
    """
    started, kernel = time.monotonic(), _Kernel(job)
    try:
        _make(job, kernel)
        outcome = Outcome("done")
    except Exception as error:
        outcome = _failure(error, kernel)
    return dataclasses.replace(outcome, seconds=time.monotonic() - started)


def _make(job: Job, kernel: _Kernel) -> None:
    import papermill

    work, place = Path(job.work), Path(job.results) / job.key
    before = _written(place)
    (work / "output").mkdir()  # fails where the runner has given the attempt up, or it was begun before
    with open(work / "log.txt", "a", encoding="utf-8", buffering=1) as log, kernel.started(log) as manager:
        papermill.execute_notebook(
            job.notebook,
            str(work / "notebook.ipynb"),
            parameters=job.values,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            autosave_cell_every=30,
            start_timeout=120,
            stdout_file=log,
            stderr_file=log,
            km=manager,
        )
    if kernel.reason:
        raise RuntimeError(kernel.reason[1])
    if _written(place) not in (None, before):
        notebooks = Path(job.results) / "notebooks"
        notebooks.mkdir(exist_ok=True)
        os.replace(work / "notebook.ipynb", notebooks / f"{job.key}.ipynb")
    elif job.own_run:
        raise CxrkitError(
            f"the notebook ended without its run {job.key}; either it writes none, or the package, the notebook or its "
            "data changed while it ran"
        )
    else:
        _store(job, work)


def _written(place: Path) -> tuple[int, int] | None:
    """What tells one writing of a run from another; None where there is none."""
    try:
        card = (place / "run.json").stat()
    except OSError:
        return None
    return card.st_ino, card.st_mtime_ns


def _store(job: Job, work: Path) -> None:
    from cxrkit.study import runs

    with runs.writing_card(Path(job.results), job.card, job.values) as writer:
        for file in sorted((work / "output").iterdir()):
            os.replace(file, writer.folder / file.name)
        os.replace(work / "notebook.ipynb", writer.folder / "notebook.ipynb")


def _environment(job: Job) -> dict[str, str]:
    searched = [str(Path(job.project, "notebooks")), os.environ.get("PYTHONPATH", "")]  # the project's own modules
    chosen = {"CXRKIT_OUTPUT": str(Path(job.work) / "output"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    chosen["PYTHONPATH"] = os.pathsep.join(filter(None, searched))
    if job.threads:
        chosen |= {f"{name}_NUM_THREADS": str(job.threads) for name in _THREADS}
    if job.gpu is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = job.gpu
    return ALLOCATOR | os.environ | chosen | job.environment


class _Kernel:
    """The kernel of one attempt, ended at a limit or when the attempt isn't wanted any more; `reason` says why."""

    def __init__(self, job: Job):
        self.job, self.began = job, time.monotonic()
        self.reason: tuple[str, str] | None = None
        self.process: Any = None
        self.leader: dict[str, Any] = {}
        self._beat = (0, self.began)
        self._over = threading.Event()

    @contextlib.contextmanager
    def started(self, log: TextIO):
        """The manager of the running kernel, for papermill; the kernel and its children are gone afterwards."""
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager
        from jupyter_core.utils import run_sync

        with tempfile.TemporaryDirectory(prefix=KERNEL_FOLDER, ignore_cleanup_errors=True) as folder:
            command = [sys.executable, "-m", "cxrkit.grid.kernel", str(os.getpid()), "-f", "{connection_file}"]
            manager = AsyncKernelManager(connection_file=os.path.join(folder, "kernel.json"), kernel_name="python3")
            manager._kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python")
            if os.name == "posix":  # sockets in a folder of one's own, rather than ports that others may take meanwhile
                manager.transport, manager.ip = "ipc", os.path.join(folder, "k")
            environment, watch = _environment(self.job), threading.Thread(target=self._watch, daemon=True)
            run_sync(manager.start_kernel)(cwd=self.job.project, env=environment, stdout=log, stderr=log)
            client = manager.client()
            manager.client = lambda **options: client  # papermill opens its channels, and leaves them open
            try:
                self.process = manager.provisioner.process
                self.leader = processes.identity(self.process.pid) | {"folder": folder}
                _live[self.job.id] = self
                replace_file(Path(self.job.work, "kernel.json"), json.dumps(self.leader))  # for those who clean up
                watch.start()
                yield manager
            finally:
                self._over.set()
                if self.process.poll() is None and not self.reason:
                    manager.shutdown_wait_time = 2.0
                    run_sync(manager.request_shutdown)()
                    run_sync(manager.finish_shutdown)()
                self.end()
                client.stop_channels()
                run_sync(manager.cleanup_resources)()

    def end(self) -> None:
        """Kill the kernel and its children, whatever state they are in."""
        processes.end_group(self.leader)
        with contextlib.suppress(Exception):
            self.process.wait(5)
        _live.pop(self.job.id, None)

    def _watch(self) -> None:
        job, seen = self.job, 0.0
        while not self._over.wait(_LOOK) and not self.reason:
            now = time.monotonic()
            if job.memory_limit and (used := processes.memory_of(self.process.pid)) > job.memory_limit:
                told = f"out of memory: the run held {_size(used)}, its limit is {_size(job.memory_limit)}"
                self.reason = ("memory", told)
            elif job.time_limit and now - self.began > job.time_limit:
                self.reason = ("time", f"stopped at its time limit of {job.time_limit:g} s")
            elif now - seen > 1:
                seen = now
                self.reason = None if self._wanted() else ("cancelled", "its runner is gone")
        if self.reason:
            processes.end_group(self.leader)

    def _wanted(self) -> bool:
        """Whether the runner still lives and holds the run: it removes the folder of an attempt that is over.

        Its file must change within half the lease, by this machine's clock alone: a runner that takes over must not
        meet this kernel.
        """
        try:
            os.stat(self.job.work)
            if self.job.heartbeat and (beat := os.stat(self.job.heartbeat).st_mtime_ns) != self._beat[0]:
                self._beat = (beat, time.monotonic())
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False  # else the shared folder doesn't answer; it may again
        return not self.job.heartbeat or time.monotonic() - self._beat[1] < LEASE / 2


_live: dict[str, _Kernel] = {}


def end_all(names: Collection[str] | None = None) -> None:
    """Kill the kernels that this process has started, or those of the attempts of these names."""
    for kernel in [kernel for name, kernel in list(_live.items()) if names is None or name in names]:
        kernel.end()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The graphics cards that may be used here, as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's tool."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [card.strip() for card in chosen.split(",") if card.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.split() if told.returncode == 0 else []


def _failure(error: Exception, kernel: _Kernel) -> Outcome:
    if kernel.reason:
        return Outcome("failed", *kernel.reason)
    name, status = type(error).__name__, kernel.process.poll() if kernel.process else None
    if name == "PapermillExecutionError":
        trace = _ANSI.sub("", "\n".join(error.traceback)) or str(error)
        message = _ANSI.sub("", f"{error.ename}: {error.evalue}").split("\n")[0]
        full = any(text in message for text in ("No space left on device", "Disk quota exceeded"))
        return Outcome("failed", "disk" if full else "error", f"cell {error.exec_count}: {message}", trace)
    if disk_full(error):
        return Outcome("failed", "disk", f"the disk is full: {error}")
    if isinstance(error, CxrkitError):
        return Outcome("failed", "error", str(error))
    trace = "".join(traceback.format_exception(error))
    if status is None or not (name == "DeadKernelError" or "Kernel died" in str(error)):
        return Outcome("failed", "start" if status is None else "error", f"{name}: {error}", trace)
    if -status in _SENT:
        hint = "; the system does this when memory runs out" if status == -signal.SIGKILL else ""
        return Outcome("failed", "killed", f"the kernel was killed (signal {-status}){hint}", trace)
    how = f"ended by itself with status {status}" if status >= 0 else f"crashed (signal {-status})"
    return Outcome("failed", "error", f"the kernel {how}", trace)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
