"""The runs of a grid as a study, planned and read once."""

from __future__ import annotations

from pathlib import Path

from cxrkit.errors import DataError
from cxrkit.grid.loop import run
from cxrkit.grid.planning import Task, plan
from cxrkit.grid.state import states
from cxrkit.study.runs import Run
from cxrkit.study.study import Study

__all__ = ["finished", "load"]


def finished(file: str | Path, profile: str | None = None) -> Study:
    """The runs of a grid that are done, as they are now; nothing is run."""
    name = f"{file}:{profile}" if profile else str(file)
    return _study(name, plan(file, profile))


def load(name: str = "quick", otherwise: str = "smoke") -> Study:
    """The grid ``name`` where all of it is done; else the tiny grid ``otherwise``, run now: for pages of the book.

    Raises DataError where runs of the tiny grid fail.
    """
    tasks = plan(name)
    if all(state.name == "done" for state in states(tasks)):
        return _study(name, tasks)
    state = run(otherwise, retry=True)
    if (failed := state[state["state"] != "done"]).size:
        raise DataError(f"runs of the grid {otherwise!r} failed: {', '.join(failed['key'])}; see results/failed")
    return finished(otherwise)


def _study(name: str, tasks: list[Task]) -> Study:
    done = [task for task in tasks if task.done]
    left = tuple(task.key for task in tasks if task not in done)
    return Study(name, tuple(Run(task.place) for task in done), left)
