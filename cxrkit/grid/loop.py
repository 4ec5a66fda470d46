"""The runner: takes the runs of a plan one after the other, whatever engine executes them, until none is left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cxrkit.errors import DataError
from cxrkit.grid.engines import Engine, LocalEngine, SerialEngine
from cxrkit.grid.execute import Job, Outcome
from cxrkit.grid.planning import Task, check_names, plan
from cxrkit.grid.state import states, status
from cxrkit.grid.store import Claim, Runner, Store, disk_full
from cxrkit.study import run_key
from cxrkit.study.import_closure import writes_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Event", "retry", "run"]

_SAFE = "what was finished is safe, the same command goes on"
_LOST = "the worker that made it died"
_REPEATED = {"killed", "start", "cancelled", "lost"}  # not the run's own doing: it is tried again


@dataclass(frozen=True)
class Event:
    """News of a runner, for `report`: begin (with all `tasks`), start, done, failed, repeat, elsewhere, blocked, end.

    `message` says why.
    """

    kind: str
    task: Task | None = None
    seconds: float = 0.0
    message: str = ""
    tasks: tuple[Task, ...] = ()


Report = Callable[[Event], None]


def run(
    file: str | Path,
    workers: int = 1,
    report: Report | None = None,
    *,
    profile: str | None = None,
    engine: Engine | Literal["local", "serial"] = "local",
    retry: bool = False,
    tries: int = 3,
    time_limit: float | None = None,
    memory_limit: int | None = None,
) -> pd.DataFrame:
    """Execute what isn't done; returns `status` at the end.

    Every notebook runs in a kernel of its own through papermill: `engine="local"` with `workers` processes that share
    out the machine's cores and graphics cards, `"serial"` in this process, or any other `Engine`. A run that fails
    keeps its executed notebook, traceback and log under `results/failed/`; it isn't tried again unless `retry`, and
    those that need it stay blocked; the others go on. A run whose kernel or worker was killed comes again, `tries`
    times in all. Killed at any moment, the same call goes on where it was. Several runners may work on the same folder:
    each run is made by one of them. `time_limit` (seconds) and `memory_limit` (bytes) replace those of the file.

    Raises ParameterError for a plan that isn't right, DataError when the disk is full; what was finished is safe.
    """
    tasks = plan(file, profile)
    now = {state.task.key: state.name for state in states(tasks)}
    skipped = {"done"} if retry else {"done", "failed", "blocked"}
    todo = [task for task in tasks if now[task.key] not in skipped]
    check_names(todo)
    limits = {name: value for name, value in (("time_limit", time_limit), ("memory_limit", memory_limit)) if value}
    todo = [dataclasses.replace(task, **limits) for task in todo]
    if todo:
        if isinstance(engine, str):
            engine = SerialEngine() if engine == "serial" else LocalEngine(workers)
        stores = {task.results: Store(task.results) for task in todo}
        try:
            with contextlib.ExitStack() as stack:
                runner = stack.enter_context(Runner(list(stores.values())))
                loop = _Loop(todo, engine, stores, runner, report or (lambda event: None), tries)
                stack.callback(loop.abandon)
                stack.enter_context(engine)  # left first: no kernel runs any more when its claim is given up
                loop.go()
        except OSError as error:
            if not disk_full(error):
                raise
            raise DataError(f"the disk is full ({error}); {_SAFE}") from error
    return status(file, profile)


def retry(file: str | Path, workers: int = 1, report: Report | None = None, **options) -> pd.DataFrame:
    """`run`, the failed ones included."""
    return run(file, workers, report, retry=True, **options)


@dataclass(frozen=True)
class _Attempt:
    task: Task
    claim: Claim
    job: Job


class _Loop:
    def __init__(
        self, tasks: list[Task], engine: Engine, stores: dict[Path, Store], runner: Runner, report: Report, tries: int
    ):
        self.engine, self.stores, self.runner = engine, stores, runner
        self.report, self.tries = report, tries
        self.open = {task.key: task for task in tasks}
        self.running: dict[str, _Attempt] = {}  # by the name of the attempt
        self.ended: dict[str, str] = {}  # key: done, failed or blocked
        self.elsewhere: set[str] = set()
        self.losses: Counter[str] = Counter()
        self.attempts = {task.key: self._count(task) for task in tasks}

    def go(self) -> None:
        """Work until nothing is left that could be done."""
        self.report(Event("begin", tasks=tuple(self.open.values())))
        self._tidy()
        while self.running or self.open:
            self._start()
            for name, outcome in self.engine.finished(0.5):
                if name in self.running:
                    self._finish(self.running.pop(name), outcome or Outcome("failed", "lost", _LOST))
        self.report(Event("end"))

    def abandon(self) -> None:
        """Give up the runs that were being made; they are open again."""
        for attempt in self.running.values():
            shutil.rmtree(attempt.job.work, ignore_errors=True)
            attempt.claim.release()

    def _tidy(self) -> None:
        """Take away what dead runners left: taking their runs does, and giving them free again."""
        for store in self.stores.values():
            for key in {path.name.rpartition(".")[0] for path in (*store.work.iterdir(), *store.claims.iterdir())}:
                if claim := store.claim(key, self.runner):
                    claim.release()
            store.forget_runners()

    def _start(self) -> None:
        """Start what can be, block what can't be any more; the rest waits for its turn or for another runner."""
        made = {attempt.task.key for attempt in self.running.values()}
        for task in list(self.open.values()):
            failed = [key for key in task.after if self.ended.get(key) in ("failed", "blocked")]
            if failed:
                self._end(task, "blocked", message=f"needs {failed[0]}, which failed")
            elif not any(key in self.open or key in made for key in task.after):
                if len(self.running) >= self.engine.capacity:
                    return
                self._try(task)

    def _try(self, task: Task) -> None:
        """Take a run and start it, unless another runner has it or has already come to its end."""
        store = self.stores[task.results]
        claim = store.claim(task.key, self.runner)
        if claim is None:
            if task.key not in self.elsewhere:
                self.report(Event("elsewhere", task))
            self.elsewhere.add(task.key)
            return
        self.elsewhere.discard(task.key)
        if task.done:
            claim.release()
            self._end(task, "done")
        elif self._count(task) > self.attempts[task.key]:
            claim.release()
            self._end(task, "failed", message=store.failure(task.key)["message"])
        else:
            try:
                job = self._job(task)
                os.mkdir(job.work)
            except OSError:
                claim.release()
                raise
            del self.open[task.key]
            self.running[job.id] = _Attempt(task, claim, job)
            self.engine.submit(job)
            self.report(Event("start", task))

    def _job(self, task: Task) -> Job:
        from cxrkit.study import runs

        store, name = self.stores[task.results], f"{task.key}.{uuid.uuid4().hex[:8]}"
        return Job(
            id=name,
            key=task.key,
            notebook=str(task.notebook),
            values=task.parameters.model_dump(mode="json"),
            card=runs.card_of(task.parameters) | {"key": task.key},
            results=str(store.results),
            work=str(store.work / name),
            project=str(run_key.project_folder()),
            environment={"CXRKIT_RESULTS": str(run_key.results_folder())} if "CXRKIT_RESULTS" in os.environ else {},
            heartbeat=str(store.runners / self.runner.name),
            own_run=writes_run(run_key.notebook_of(task.parameters)),
            time_limit=task.time_limit,
            memory_limit=task.memory_limit,
        )

    def _finish(self, attempt: _Attempt, outcome: Outcome) -> None:
        task, store, seconds = attempt.task, self.stores[attempt.task.results], outcome.seconds
        if outcome.state == "done" and not task.done:
            outcome = Outcome("failed", "error", "its run isn't whole", seconds=seconds)
        about = {"key": task.key, "step": task.step, "why": outcome.why, "seconds": round(seconds, 2)}
        store.journal(event=outcome.state, kind=task.notebook.stem, **about)
        try:
            if outcome.state == "done":
                store.forget_failure(task.key)
                self._end(task, "done", seconds)
            elif outcome.why == "disk":
                raise DataError(f"{outcome.message}; {_SAFE}")
            elif outcome.why in _REPEATED and self.losses[task.key] + 1 < self.tries:
                self.losses[task.key] += 1
                self.open = {task.key: task} | self.open
                self.report(Event("repeat", task, seconds, outcome.message))
            else:
                about |= {"notebook": task.notebook.name, "parameters": task.parameters.model_dump(mode="json")}
                about["message"] = outcome.message
                store.record_failure(task.key, Path(attempt.job.work), about, outcome.traceback)
                self._end(task, "failed", seconds, outcome.message)
        finally:
            shutil.rmtree(attempt.job.work, ignore_errors=True)
            attempt.claim.release()

    def _end(self, task: Task, kind: str, seconds: float = 0.0, message: str = "") -> None:
        self.open.pop(task.key, None)
        self.ended[task.key] = kind
        self.report(Event(kind, task, seconds, message))

    def _count(self, task: Task) -> int:
        return (self.stores[task.results].failure(task.key) or {}).get("attempts", 0)
