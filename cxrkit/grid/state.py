"""State of each run of a grid: done, running, failed, stale, blocked or open; and leftovers of runs."""

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
from cxrkit.grid.store import Store, end_kernel, visible
from cxrkit.study import run_key
from cxrkit.study.notebook import parameter_names, parameters_for

if TYPE_CHECKING:
    import pandas as pd

    from cxrkit.study.runs import Run

__all__ = ["STATES", "Leftover", "State", "clean", "estimate", "leftovers", "remove", "show", "states", "status", "why"]

STATES = ("done", "running", "failed", "stale", "blocked", "open")
_OLD = 3600.0  # seconds after which a hidden folder that no one claims is no one's


@dataclass(frozen=True)
class State:
    """A run and its state; `detail`: who makes it, why it failed, what made it stale, or what it waits for."""

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
        self.names, self.failed, self.held = visible(self.store.results), visible(self.store.failed), self.store.held()
        self.twins: dict[str | None, list[str]] = defaultdict(list)
        for name in self.names:
            self.twins[run_key.identity_of(name)].append(name)

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
        if others := [name for name in self.twins.get(run_key.identity_of(key), []) if name != key]:
            return "stale", f"`cxrkit grid why {_newest(self.store, others)}` tells what has changed"
        return "open", ""


def _newest(store: Store, names: list[str]) -> str:
    return max(names, key=lambda name: _changed(store.results / name))


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
        if os.stat(os.path.join(place, "run.json")).st_mtime_ns < os.stat(place).st_mtime_ns:
            from cxrkit.study import runs

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
            if event.get("event") == "done":
                for step in (event.get("step"), None):
                    taken[results, event.get("kind"), step].append(event["seconds"])
    names = [(task.parameters.results, task.notebook.stem, task.step) for task in tasks]
    earlier = [taken.get(name) or taken.get((*name[:2], None)) for name in names]
    return [statistics.median(seconds[-100:]) if seconds else None for seconds in earlier]


def show(key: str, results: str | Path = "results") -> dict[str, Any]:
    """All that is known of one run, by its key or the beginning of it: state, folder, parameters, and for one that runs
    or has failed its log and traceback. Raises DataError when no run, or more than one, is called so."""
    store = Store(run_key.results_folder(results))
    held, failed = store.held(), visible(store.failed)
    name = _called(key, store, set(held) | failed)
    if name in held:
        holder = held[name].holder
        work = next(iter(store.work.glob(f"{name}.*")), store.work / name)
        told = {"state": "running", "where": str(work), "by": f"{holder['host']}, process {holder['pid']}"}
        return {"key": name} | told | {"since": holder["since"]} | _texts(work)
    if name in failed:
        place = store.failed / name
        return {"key": name, "state": "failed", "where": str(place)} | (store.failure(name) or {}) | _texts(place)
    place = store.results / name
    told = {"key": name, "state": "done" if whole(place) else "cut off", "where": str(place)}
    with contextlib.suppress(OSError, ValueError):
        told["finished"] = json.loads((place / "run.json").read_text(encoding="utf-8"))["finished"]
        told["parameters"] = json.loads((place / "parameters.json").read_text(encoding="utf-8"))
    return told


def _called(key: str, store: Store, others: set[str]) -> str:
    known = sorted({name for name in visible(store.results) if run_key.identity_of(name)} | others)
    found = [name for name in known if name == key] or [name for name in known if name.startswith(key)]
    if len(found) != 1:
        told = ", ".join((found or known)[:8]) or "none"
        raise DataError(f"{len(found) or 'no'} runs called {key!r} in {store.results}; there: {told}")
    return found[0]


def _texts(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("log", "traceback"):
        with contextlib.suppress(OSError):
            found[name] = (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
    return {name: text for name, text in found.items() if text}


def why(key: str, results: str | Path = "results", file: str | Path | None = None) -> list[str]:
    """Reasons why a run would be made again today, a line each: parameter, file, module or version of the package; none
    for a run that is as it would be.

    `key`: a run's, the beginning of one, or that of the run that takes its place. `file`: a grid that may hold the run
    with other parameters. Raises DataError when no run, or more than one, is called so.
    """
    from cxrkit.study import runs

    store = Store(run_key.results_folder(results))
    names = visible(store.results)
    twins = [name for name in names if run_key.identity_of(name) == run_key.identity_of(key) is not None]
    # A key that isn't there yet: the runs of the same parameters are older.
    name = _newest(store, twins) if twins and key not in twins else _called(key, store, set())
    run = runs.Run(store.results / name)
    stored = run.json("parameters.json").keys() | {"results"}
    today = parameter_names(parameters_for(run_key.notebook_of(run.parameters)))
    reasons = [f"parameter {one}: {'gone' if one in stored else 'new'}" for one in sorted(today ^ stored)]
    reasons += _other_parameters(run, plan(file)) if file else []
    if (version := run.card["origin"].get("version")) != cxrkit.__version__:
        reasons.append(f"cxrkit: {version} then, {cxrkit.__version__} now")
    then, now = run.card.get("made_from", {}), run_key.made_from(run.parameters)
    for source in sorted(then.keys() | now.keys()):
        if then.get(source) != now.get(source):
            reasons.append(f"{source}: {'new' if source not in then else 'gone' if source not in now else 'changed'}")
    for needed in run_key.needed(run.parameters):
        if needed in names:
            reasons += [f"run {needed}, which it needs: {reason}" for reason in why(needed, results)]
    return reasons


def _other_parameters(run: Run, tasks: list[Task]) -> list[str]:
    """How a run's parameters differ from those of the run of a grid that comes nearest to it."""
    own, differing = run.parameters.identity(), []
    for task in tasks:
        if run_key.notebook_of(task.parameters) == run_key.notebook_of(run.parameters):
            values = task.parameters.identity()
            names = sorted(name for name in own.keys() | values.keys() if own.get(name) != values.get(name))
            differing.append([(n, own.get(n), values.get(n)) for n in names if n not in ("run", "runs")])
    nearest = min(differing, key=len, default=[])
    return [f"parameter {name}: {then!r} then, {now!r} in the grid" for name, then, now in nearest]


@dataclass(frozen=True)
class Leftover:
    """A file or folder that `clean` deletes, and why."""

    path: Path
    why: str
    key: str


def leftovers(file: str | Path, profile: str | None = None, done: bool = False) -> list[Leftover]:
    """What a grid has left and doesn't need: stale and failed runs, and what killed runners left; its done runs as well
    with `done=True`. The work of a living runner is left alone."""
    tasks = plan(file, profile)
    found: list[Leftover] = []
    for results in dict.fromkeys(task.parameters.results for task in tasks):
        wanted = {task.key for task in tasks if task.parameters.results == results}
        store, mine = Store(run_key.results_folder(results)), {run_key.identity_of(key) for key in wanted}
        there = []
        for name in sorted(visible(store.results)):
            if done or name not in wanted:
                state = "done" if name in wanted else "stale"
                there.append(Leftover(store.results / name, state, name))
                there.append(Leftover(store.notebooks / f"{name}.ipynb", f"notebook of a {state} run", name))
        there += [Leftover(store.failed / name, "failed", name) for name in sorted(visible(store.failed))]
        hidden = [path for path in store.results.glob(".*-*.*") if time.time() - _changed(path) > _OLD]
        for path in sorted([*store.work.glob("*"), *store.claims.glob("*"), *hidden]):
            key = path.name.lstrip(".").removesuffix(".old").rpartition(".")[0]
            there.append(Leftover(path, "left by a killed runner", key))
        held = store.held()
        there = [one for one in there if one.key not in held and one.path.exists()]
        found += [one for one in there if run_key.identity_of(one.key) in mine]
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
