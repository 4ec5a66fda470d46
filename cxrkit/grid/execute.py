"""One run, where the worker is: start a kernel, let papermill run the notebook in it, watch over it, tell the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxrkit.errors import CxrkitError
from cxrkit.grid import processes
from cxrkit.grid.store import LEASE, disk_full

__all__ = ["ALLOCATOR", "Job", "Outcome", "Settings", "cores", "end_all", "execute", "gpus"]

_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM", "BLIS", "RAYON")
# Linux' allocator gives large blocks back after each use and asks for them anew, a tenth of a training's time on a CPU.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_FULL = ("No space left on device", "Disk quota exceeded")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SENT = {1, 2, 9, 15}  # signals to hang up, interrupt, kill, end: by someone; others are the kernel's own crash


@dataclass(frozen=True)
class Job:
    """One attempt at one run; plain data. Paths are absolute, on a folder that runner and worker share."""

    id: str
    key: str
    notebook: str
    values: dict[str, Any]
    card: dict[str, Any]
    results: str
    work: str  # made by `execute`: the executed notebook and the log, as far as they got
    claim: str = ""  # a file that is there as long as the attempt is wanted; empty: always
    heartbeat: str = ""  # a file that the runner touches; empty: none
    own_run: bool = False  # the notebook writes its run itself
    time_limit: float | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Settings:
    """The place where runs execute: project, CPU threads of a run (0: the machine's choice), graphics card."""

    project: str
    threads: int = 0
    gpu: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    `state` is done or failed; `why` one of error, time, memory, killed, disk, start, cancelled. `seconds` is the whole
    attempt, `memory` the peak in bytes of the kernel with its children, where it was watched.
    """

    state: str
    why: str = ""
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    memory: int = 0


def execute(job: Job, settings: Settings) -> Outcome:
    """Run the notebook of a job in a kernel of its own, and keep its run.

    The same for every engine. Neither the folder nor the environment of this process are changed, so several may run in
    its threads. Whatever happens, the kernel is gone on return and the outcome says why. The executed notebook and the
    log (what the kernel printed) stay in `job.work`; a notebook that writes no run of its own gets one that holds the
    executed notebook and the files that it put into the folder named by CXRKIT_OUTPUT.
    """
    started = time.monotonic()
    watch = _Watch(job, started)
    try:
        _make(job, settings, watch)
        outcome = Outcome("done")
    except Exception as error:
        outcome = _failure(error, watch)
    except BaseException:  # Ctrl-C: the caller's to handle, but no kernel is left
        watch.end()
        raise
    finally:
        watch.stop()
    return Outcome(
        outcome.state, outcome.why, outcome.message, outcome.traceback, time.monotonic() - started, watch.peak
    )


def _make(job: Job, settings: Settings, watch: _Watch) -> None:
    import papermill
    from papermill.engines import papermill_engines

    from cxrkit.grid.engine import KernelEngine

    work, place = Path(job.work), Path(job.results) / job.key
    before = _written(place)
    work.mkdir(parents=True)
    (work / "output").mkdir()
    papermill_engines.register("cxrkit", KernelEngine)
    with open(work / "log.txt", "a", encoding="utf-8", buffering=1) as log:
        papermill.execute_notebook(
            job.notebook,
            str(work / "notebook.ipynb"),
            parameters=job.values,
            engine_name="cxrkit",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            autosave_cell_every=30,
            stdout_file=log,
            stderr_file=log,
            start_kernel={"cwd": settings.project, "env": _environment(job, settings), "stdout": log, "stderr": log},
            watch=watch,
        )
    watch.stop()
    if watch.reason:
        raise RuntimeError(watch.reason[1])
    if _written(place) not in (None, before):
        kept = Path(job.results) / "notebooks" / f"{job.key}.ipynb"
        kept.parent.mkdir(exist_ok=True)
        os.replace(work / "notebook.ipynb", kept)
    elif job.own_run:
        raise CxrkitError(
            f"the notebook ended without its run {job.key}; either it writes none, or the package, the notebook or its "
            "data changed while it ran"
        )
    else:
        _keep(job, work)


def _written(place: Path) -> tuple[int, int] | None:
    """What tells one writing of a run from another; None where there is none."""
    try:
        card = (place / "run.json").stat()
    except OSError:
        return None
    return card.st_ino, card.st_mtime_ns


def _keep(job: Job, work: Path) -> None:
    from cxrkit.study import runs

    with runs.writing_card(Path(job.results), job.card, job.values) as writer:
        for file in sorted((work / "output").iterdir()):
            os.replace(file, writer.folder / file.name)
        os.replace(work / "notebook.ipynb", writer.folder / "notebook.ipynb")


def _environment(job: Job, settings: Settings) -> dict[str, str]:
    searched = [str(Path(settings.project, "notebooks")), os.environ.get("PYTHONPATH", "")]  # the project's own modules
    chosen = {"CXRKIT_OUTPUT": str(Path(job.work) / "output"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    chosen["PYTHONPATH"] = os.pathsep.join(filter(None, searched))
    if settings.threads:
        chosen |= {f"{name}_NUM_THREADS": str(settings.threads) for name in _THREADS}
    if settings.gpu is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = settings.gpu
    return ALLOCATOR | os.environ | chosen | settings.environment


class _Watch:
    """Looks after one kernel: ends it at a limit, or when the attempt isn't wanted any more, and remembers why."""

    def __init__(self, job: Job, started: float):
        self.job, self.started = job, started
        self.reason: tuple[str, str] | None = None
        self.peak = 0
        self.status: int | None = None  # of the ended kernel, as Popen gives it
        self._process: Any = None
        self._leader: dict[str, Any] | None = None
        self._beat = (0, started)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, process: Any, folder: str) -> None:
        """Called the moment the kernel is started; `folder` holds its connection file."""
        self._process, self._leader = process, processes.identity(process.pid)
        _live[self.job.id] = self
        # Read by whoever finds the attempt without its worker: whole or not at all, or the kernel would be left alone.
        hidden, place = Path(self.job.work, ".kernel.json"), Path(self.job.work, "kernel.json")
        hidden.write_text(json.dumps(self._leader | {"folder": folder}), encoding="utf-8")
        os.replace(hidden, place)
        self._thread = threading.Thread(target=self._look, name=f"watch {self.job.key}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def end(self) -> None:
        """Kill the kernel and its children, whatever state they are in."""
        if self._process is not None:
            processes.end_group(self._leader)
            with contextlib.suppress(Exception):
                self.status = self._process.wait(5)
        _live.pop(self.job.id, None)

    def _look(self) -> None:
        limit = self.job.memory_limit
        seen = 0.0
        while not self._over.wait(0.1 if limit else 0.25):
            if self._process.poll() is not None:
                return
            now = time.monotonic()
            if limit or now - seen > 1:
                self.peak = max(self.peak, used := processes.memory_of(self._process.pid))
                if limit and used > limit:
                    told = f"out of memory: the run held {_size(used)}, its limit is {_size(limit)}"
                    return self._kill("memory", told)
            if self.job.time_limit and now - self.started > self.job.time_limit:
                return self._kill("time", f"stopped at its time limit of {self.job.time_limit:g} s")
            if now - seen > 1 and not self._wanted():
                return self._kill("cancelled", "its runner is gone")
            seen = now if now - seen > 1 else seen

    def _wanted(self) -> bool:
        """Whether the runner still lives and holds the run.

        Its file must change within half the lease, by this machine's clock alone: whoever takes over must not meet
        this kernel.
        """
        try:
            if self.job.claim:
                path, _, number = self.job.claim.rpartition(".")
                if not os.path.exists(self.job.claim) or os.path.exists(f"{path}.{int(number) + 1}"):
                    return False
            if self.job.heartbeat and (beat := os.stat(self.job.heartbeat).st_mtime_ns) != self._beat[0]:
                self._beat = (beat, time.monotonic())
        except FileNotFoundError:
            return False
        except OSError:
            pass  # the shared folder doesn't answer; it may again
        return not self.job.heartbeat or time.monotonic() - self._beat[1] < LEASE / 2

    def _kill(self, why: str, message: str) -> None:
        self.reason = (why, message)
        processes.end_group(self._leader)


_live: dict[str, _Watch] = {}


def end_all(names: Collection[str] | None = None) -> None:
    """Kill the kernels that this process has started, or those of the attempts of these names."""
    for watch in [watch for name, watch in list(_live.items()) if names is None or name in names]:
        watch.end()


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


def _failure(error: Exception, watch: _Watch) -> Outcome:
    watch.stop()
    watch.end()
    if watch.reason:
        return Outcome("failed", *watch.reason)
    name, status = type(error).__name__, watch.status
    if name == "PapermillExecutionError":
        trace = _ANSI.sub("", "\n".join(error.traceback)) or str(error)
        message = _ANSI.sub("", f"{error.ename}: {error.evalue}").split("\n")[0]
        full = any(text in message for text in _FULL)
        return Outcome("failed", "disk" if full else "error", f"cell {error.exec_count}: {message}", trace)
    if disk_full(error):
        return Outcome("failed", "disk", f"the disk is full: {error}")
    if isinstance(error, CxrkitError):
        return Outcome("failed", "error", str(error))
    trace = "".join(traceback.format_exception(error))
    if status is None or not (name == "DeadKernelError" or "Kernel died" in str(error)):
        return Outcome("failed", "start" if status is None else "error", f"{name}: {error}", trace)
    if status >= 0:
        return Outcome("failed", "error", f"the kernel ended by itself with status {status}", trace)
    if -status not in _SENT:
        return Outcome("failed", "error", f"the kernel crashed (signal {-status})", trace)
    used = f", having held {_size(watch.peak)}" if watch.peak else ""
    hint = "; the system does this when memory runs out" if status == -signal.SIGKILL else ""
    return Outcome("failed", "killed", f"the kernel was killed (signal {-status}){used}{hint}", trace)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
