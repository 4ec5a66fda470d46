"""What has become of a grid's runs: done, running, failed, stale, blocked or open; what is left over, and how long the
rest will take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cxrkit
from cxrkit.errors import CxrkitError, DataError
from cxrkit.grid.planning import Task, plan
from cxrkit.grid.store import Store, end_kernel
from cxrkit.study import run_key
from cxrkit.study.notebook import parameter_names, parameters_for

if TYPE_CHECKING:
    import pandas as pd

    from cxrkit.study.runs import Run

__all__ = [
    "STATES",
    "Leftover",
    "State",
    "clean",
    "estimate",
    "leftovers",
    "remove",
    "show",
    "states",
    "status",
    "whole",
    "why",
]

STATES = ("done", "running", "failed", "stale", "blocked", "open")
_RUNS = ("run", "runs")  # parameters that name runs
_OLD = 3600.0  # seconds after which a hidden folder that no one claims is no one's


@dataclass(frozen=True)
class State:
    """A run and what has become of it; `detail` says who makes it since when, why it failed, what made it stale, or
    what it waits for."""

    task: Task
    name: str
    detail: str = ""


def status(file: str | Path, profile: str | None = None) -> pd.DataFrame:
    """The runs of a grid and their state: key, step, notebook, state, detail."""
    import pandas as pd

    rows = [(s.task.key, s.task.step, s.task.notebook.stem, s.name, s.detail) for s in states(plan(file, profile))]
    return pd.DataFrame(rows, columns=["key", "step", "notebook", "state", "detail"])


def states(tasks: list[Task]) -> list[State]:
    """The state of each run. Folders are listed, not opened: a run appears under its name only when it is whole."""
    views = {results: _View(results) for results in dict.fromkeys(task.parameters.results for task in tasks)}
    found: dict[str, State] = {}
    for task in tasks:
        name, detail = views[task.parameters.results].of(task)
        if name in ("open", "stale"):
            hold = next((key for key in task.after if key in found and found[key].name in ("failed", "blocked")), None)
            name, detail = ("blocked", f"needs {hold}, which failed") if hold else (name, detail)
        found[task.key] = State(task, name, detail)
    return [found[task.key] for task in tasks]


class _View:
    """One results folder as it is now."""

    def __init__(self, results: str):
        self.store = Store(run_key.results_folder(results))
        self.names, self.failed, self.held = self.store.names(), self.store.failed_names(), self.store.held()
        self.others: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            if identity := run_key.identity_of(name):
                self.others[identity].append(name)

    def of(self, task: Task) -> tuple[str, str]:
        key = task.key
        if key in self.names and whole(os.path.join(self.store.results, key)):
            return "done", ""
        if key in self.held:
            holder = self.held[key].holder
            return "running", f"on {holder['host']} (process {holder['pid']}) since {holder['since']}"
        if key in self.failed:
            record = self.store.failure(key) or {}
            count = record.get("attempts", 1)
            return "failed", f"{record.get('message', '')}" + (f" ({count} attempts)" if count > 1 else "")
        others = [name for name in self.others.get(run_key.identity_of(key) or "", []) if name != key]
        if others:
            return "stale", self._difference(task, max(others, key=lambda name: _changed(self.store.results / name)))
        return "open", ""

    def _difference(self, task: Task, other: str) -> str:
        try:
            then = json.loads((self.store.results / other / "run.json").read_text(encoding="utf-8"))["origin"]
        except (OSError, ValueError, KeyError):
            return f"{other} was made by other code"
        now = run_key.origin(task.parameters)
        differing = [
            name for name in ("version", "code", "notebook", "data", "runs") if then.get(name) != now.get(name)
        ]
        return f"{other} was made by other {' and '.join(differing)}"


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def whole(place: str | Path) -> bool:
    """Whether a run's folder holds all its files.

    The card is written last, so a folder that has not changed since is as it was; only one that has is read.
    """
    try:
        if os.stat(os.path.join(place, "run.json")).st_mtime_ns >= os.stat(place).st_mtime_ns:
            return True
    except OSError:
        return False
    from cxrkit.study import runs

    try:
        runs.Run(place)
    except (CxrkitError, OSError):
        return False
    return True


def estimate(tasks: Iterable[Task]) -> list[float | None]:
    """Expected seconds of each run: the median of earlier ones of its step, else of its notebook; None without any."""
    taken: dict[tuple, list[float]] = defaultdict(list)
    tasks = list(tasks)
    for results in {task.parameters.results for task in tasks}:
        for event in Store(run_key.results_folder(results)).events():
            if event.get("event") == "done" and isinstance(event.get("seconds"), int | float):
                for step in (event.get("step"), None):
                    taken[results, event.get("kind"), step].append(float(event["seconds"]))
    names = [(task.parameters.results, task.notebook.stem, task.step) for task in tasks]
    earlier = [taken.get(name) or taken.get((*name[:2], None)) for name in names]
    return [statistics.median(seconds[-100:]) if seconds else None for seconds in earlier]


def show(key: str, results: str | Path = "results") -> dict[str, Any]:
    """All that is known of one run, by its key or the beginning of it: state, where it lies, parameters, and for one
    that runs or has failed its log and traceback. Raises DataError when no run, or more than one, is called so."""
    store = Store(run_key.results_folder(results))
    held, failed = store.held(), store.failed_names()
    name = _called(key, store, set(held) | failed)
    if name in held:
        holder = held[name].holder
        work = next(iter(store.work.glob(f"{name}.*")), store.work / name)
        told = {"state": "running", "where": str(work), "by": f"{holder['host']}, process {holder['pid']}"}
        return {"key": name} | told | {"since": holder["since"]} | _read(work)
    if name in failed:
        place = store.failed / name
        return {"key": name, "state": "failed", "where": str(place)} | (store.failure(name) or {}) | _read(place)
    place = store.results / name
    told = {"key": name, "state": "done" if whole(place) else "cut off", "where": str(place)}
    with contextlib.suppress(OSError, ValueError):
        told["finished"] = json.loads((place / "run.json").read_text(encoding="utf-8"))["finished"]
        told["parameters"] = json.loads((place / "parameters.json").read_text(encoding="utf-8"))
    return told


def _called(key: str, store: Store, others: set[str]) -> str:
    known = sorted({name for name in store.names() if run_key.identity_of(name)} | others)
    found = [name for name in known if name == key] or [name for name in known if name.startswith(key)]
    if len(found) != 1:
        told = ", ".join((found or known)[:8]) or "none"
        raise DataError(f"{len(found) or 'no'} runs called {key!r} in {store.results}; there: {told}")
    return found[0]


def why(key: str, results: str | Path = "results", file: str | Path | None = None) -> list[str]:
    """Reasons why a run would be made again today, a line each: parameter, file, module or version of the package; none
    for a run that is as it would be.

    `key`: a run's, the beginning of one, or that of the run that takes its place. `file`: a grid that may hold the run
    with other parameters. Raises DataError when no run, or more than one, is called so.
    """
    from cxrkit.study import runs

    store = Store(run_key.results_folder(results))
    twins = [name for name in store.names() if run_key.identity_of(name) == run_key.identity_of(key) is not None]
    if key in twins or not twins:
        name = _called(key, store, set())
    else:  # not made yet: those of the same parameters are older
        name = max(twins, key=lambda name: _changed(store.results / name))
    run = runs.Run(store.results / name)
    stored = run.json("parameters.json").keys() | {"results"}
    names = parameter_names(parameters_for(run_key.notebook_of(run.parameters)))
    reasons = [f"parameter {one}: {'gone' if one in stored else 'new'}" for one in sorted(names ^ stored)]
    reasons += _other_parameters(run, plan(file)) if file else []
    if (version := run.card["origin"].get("version")) != cxrkit.__version__:
        reasons.append(f"cxrkit: {version} then, {cxrkit.__version__} now")
    then, today = run.card.get("made_from"), run_key.made_from(run.parameters)
    if then is None:  # a run of an earlier version of the package
        then, today = run.card["origin"], run_key.origin(run.parameters) | {"version": version}
    for source in sorted(then.keys() | today.keys()):
        if then.get(source) != today.get(source):
            how = "new" if source not in then else "gone" if source not in today else "changed"
            reasons.append(f"{source}: {how}")
    for needed in run_key.needed(run.parameters):
        if needed in store.names():
            reasons += [f"run {needed}, which it needs: {reason}" for reason in why(needed, results)]
    return reasons


def _other_parameters(run: Run, tasks: list[Task]) -> list[str]:
    """How a run's parameters differ from those of the run of a grid that comes nearest to it."""
    own = run.parameters.identity()
    ours = [task for task in tasks if run_key.notebook_of(task.parameters) == run_key.notebook_of(run.parameters)]
    differing = []
    for values in (task.parameters.identity() for task in ours):
        names = [name for name in own.keys() | values.keys() if own.get(name) != values.get(name)]
        differing.append([(name, own.get(name), values.get(name)) for name in sorted(names) if name not in _RUNS])
    nearest = min(differing, key=len, default=[])
    return [f"parameter {name}: {then!r} then, {now!r} in the grid" for name, then, now in nearest]


def _read(folder: Path) -> dict[str, str]:
    found = {}
    for name, file in (("log", "log.txt"), ("traceback", "traceback.txt")):
        with contextlib.suppress(OSError):
            if text := (folder / file).read_text(encoding="utf-8", errors="replace"):
                found[name] = text
    return found


@dataclass(frozen=True)
class Leftover:
    """A file or folder that `clean` deletes, and why."""

    path: Path
    why: str
    key: str


def leftovers(file: str | Path, profile: str | None = None, done: bool = False) -> list[Leftover]:
    """What `clean` would delete: stale and failed runs of the plan, and what killed runners left behind.

    Done runs of the plan are never among it, but for `done=True`. What a living runner works on is left alone.
    """
    tasks = plan(file, profile)
    found: list[Leftover] = []
    for results in dict.fromkeys(task.parameters.results for task in tasks):
        store = Store(run_key.results_folder(results))
        wanted = {task.key for task in tasks if task.parameters.results == results}
        found += _left_in(store, wanted, done)
    return found


def _left_in(store: Store, wanted: set[str], done: bool) -> list[Leftover]:
    identities, held = {run_key.identity_of(key) for key in wanted}, store.held()
    found = []

    def add(path: Path, why: str, key: str) -> None:
        mine = key in wanted or run_key.identity_of(key) in identities
        if mine and key not in held and path.exists():
            found.append(Leftover(path, why, key))

    for name in sorted(store.names()):
        if done or name not in wanted:
            state = "done" if name in wanted else "stale"
            add(store.results / name, state, name)
            add(store.notebooks / f"{name}.ipynb", f"notebook of a {state} run", name)
    for name in sorted(store.failed_names()):
        add(store.failed / name, "failed", name)
    hidden = [path for folder in (store.results, store.failed) for path in folder.glob(".*-*.*")]
    settled = [path for path in hidden if time.time() - _changed(path) > _OLD]
    for path in sorted([*store.work.glob("*"), *store.claims.glob("*"), *settled]):
        add(path, "left by a killed runner", path.name.lstrip(".").removesuffix(".old").rpartition(".")[0])
    return found


def clean(file: str | Path, profile: str | None = None, done: bool = False) -> list[Leftover]:
    """Delete what `leftovers` lists, and return it."""
    found = leftovers(file, profile, done)
    remove(found)
    return found


def remove(found: list[Leftover]) -> None:
    """Delete leftovers. Each is renamed first, so that nobody meets half of it."""
    for left in found:
        end_kernel(left.path)
        hidden = left.path.with_name(f".{uuid.uuid4().hex}.deleted")
        with contextlib.suppress(FileNotFoundError):
            os.replace(left.path, hidden)
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
