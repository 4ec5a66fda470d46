"""From a grid file to the list of its runs, checked whole before anything starts."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.grid import spec
from cxrkit.study import run_key
from cxrkit.study.notebook import CLASSES, NotebookParameters, parameter_names, parameters_for
from cxrkit.train.parameters import Parameters, check_dataset_options

__all__ = ["Task", "check_names", "find_grid", "plan"]


@dataclass(frozen=True)
class Task:
    """One run of one notebook: its key, validated parameters, and the keys of the runs that must be there first."""

    key: str
    notebook: Path
    parameters: Parameters | NotebookParameters
    step: str = ""
    after: tuple[str, ...] = ()
    time_limit: float | None = None
    memory_limit: int | None = None
    estimate: float | None = None

    @property
    def needs(self) -> str | None:
        """The key of the run that this one is about, or None."""
        run = getattr(self.parameters, "run", None)
        return run if run in self.after else None

    @property
    def results(self) -> Path:
        return run_key.results_folder(self.parameters.results)

    @property
    def place(self) -> Path:
        return self.results / self.key

    @property
    def done(self) -> bool:
        """Whether the run is there, whole. Its key holds the code's hash, so what is there is never stale."""
        from cxrkit.study import runs

        try:
            runs.Run(self.place)
        except (CxrkitError, OSError):
            return False
        return True


def find_grid(file: str | Path) -> Path:
    """A grid file by path, or by name (`quick`) among the project's grids. Raises ParameterError."""
    folder = run_key.project_folder() / "notebooks"
    for path in (Path(file), folder / "grids" / f"{file}.yaml", folder / "papers" / file / "grid.yaml"):
        if path.is_file():
            return path.resolve()
    named = [path.stem for path in folder.glob("grids/*.yaml")]
    named += [path.parent.name for path in folder.glob("papers/*/grid.yaml")]
    known = ", ".join(sorted(named))
    raise ParameterError(f"there is no grid {str(file)!r}; known: {known or 'none'}")


def plan(file: str | Path | list[str] | tuple[str, ...], profile: str | None = None) -> list[Task]:
    """Every run of a grid file, or of several, in an order that respects what needs what. Nothing is executed.

    The file maps step names to what `spec.Step` holds, and `profiles` to named changes of steps. A step that comes
    `after` others is repeated for each of their runs with `run` set, or made once with all of them in `runs`, where its
    notebook has such a parameter; else it only waits for them. A name may hold the profile, as in "bcos:full", so that
    a page's parameter can; a run that several files hold is there once. Raises ParameterError listing every problem of
    the file at once.
    """
    if isinstance(file, list | tuple):
        return list({task.key: task for one in file for task in plan(one, profile)}.values())
    if profile is None and not Path(file).is_file() and ":" in str(file):
        file, profile = str(file).rsplit(":", 1)
    path = find_grid(file)
    steps, problems = spec.read(path, profile)
    order, tangled = _ordered(steps)
    problems += tangled
    tasks: dict[str, list[Task]] = {}
    names = run_key.Names()
    for name in order:
        step = steps[name]
        if step is not None:
            befores = [task for other in step.after for task in tasks.get(other, [])]
            tasks[name], wrong = _tasks(path, name, step, befores, names)
            problems += [f"step {name!r}: {problem}" for problem in wrong]
    ordered = list(itertools.chain.from_iterable(tasks.values()))
    problems += _twice(ordered)
    if problems:
        raise ParameterError(f"{path.name}: " + "\n  ".join(dict.fromkeys(problems)))
    return ordered


def _ordered(steps: dict[str, spec.Step | None]) -> tuple[list[str], list[str]]:
    """Step names, each behind those that it comes after, else as in the file; and what can't be ordered."""
    problems: list[str] = []
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            problems.append(f"steps wait for each other: {' → '.join([*path[path.index(name) :], name])}")
        elif name not in done:
            for other in steps[name].after if steps[name] else []:
                if other in steps:
                    visit(other, (*path, name))
                else:
                    problems.append(f"step {name!r}: 'after' names {other!r}, which is no step here")
            if name not in done:
                done.append(name)

    for name in steps:
        visit(name, ())
    return done, problems


def _tasks(
    path: Path, name: str, step: spec.Step, befores: list[Task], names: run_key.Names
) -> tuple[list[Task], list[str]]:
    try:
        notebook = _notebook(path, step.notebook)
        checks = parameters_for(notebook)
    except ParameterError as error:
        return [], [str(error)]
    known = parameter_names(checks)
    try:
        keep = _conditions(step, known)
    except ParameterError as error:
        return [], [str(error)]
    rows = spec.combinations(step)
    repeated, wrong = _repeats(rows, step, known, befores)
    if wrong:
        return [], wrong
    settings = {"time_limit": step.time_limit, "memory_limit": step.memory_limit, "estimate": step.estimate}
    made, problems = [], []
    for row in rows:
        for extra, before in repeated:
            try:
                parameters = checks(**row, **extra)
                told = parameters.model_dump()
                if keep(told, before):
                    after = tuple(task.key for task in ([before] if before else befores))
                    made.append(Task(names.key(parameters), notebook, parameters, name, after, **settings))
                    problems += _outside(told | {"results": parameters.results})
            except (CxrkitError, ValueError) as error:
                problems.append(str(error))
    if not made and not problems and (befores or not step.after):
        problems.append("its conditions leave no run")
    return made, list(dict.fromkeys(problems))


def _repeats(
    rows: list[dict[str, Any]], step: spec.Step, known: frozenset[str], befores: list[Task]
) -> tuple[list[tuple[dict[str, Any], Task | None]], list[str]]:
    """For each repetition of a step's parameter sets: what names the runs that it needs, and that run."""
    name = next((name for name in ("run", "runs") if name in known and step.after), None)
    if name and any(name in row for row in rows):
        return [], [f"parameter {name!r} is set by 'after'"]
    if name == "run":
        return [({"run": task.key}, task) for task in befores], []
    return [({"runs": [task.key for task in befores]} if name == "runs" else {}, None)], []


def _notebook(grid: Path, name: str) -> Path:
    path, project = (grid.parent / name).resolve(), run_key.project_folder().resolve()
    if not path.is_relative_to(project):
        raise ParameterError(f"notebook {name!r} lies outside the project {project.name!r}")
    if not path.is_file():
        raise ParameterError(f"there is no notebook {name!r} beside {grid.name}")
    if path.stem in CLASSES and path != project / "notebooks" / path.name:
        raise ParameterError(f"notebook {name!r}: the name {path.name!r} is kept for notebooks/{path.name}")
    if (language := _language(path)) != "python":
        raise ParameterError(f"notebook {name!r} is written in {language}; a grid runs Python")
    return path


def _language(path: Path) -> str:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        told = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
        return str(told or "python").lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ParameterError(f"{path.name}: not a notebook") from None


def _conditions(step: spec.Step, known: frozenset[str]) -> Callable[[dict[str, Any], Task | None], bool]:
    """A function of (parameters, needed run) that says whether a combination is wanted."""
    when, unless = ([spec.Condition.parse(text) for text in part] for part in (step.when, step.unless))
    for condition in (*when, *unless):
        if strangers := sorted(condition.names - known):
            raise ParameterError(f"condition {condition.text!r}: {', '.join(map(repr, strangers))} is no parameter")

    def keep(values: dict[str, Any], before: Task | None) -> bool:
        if before is not None:
            values = values | {"run": before.parameters.model_dump()}
        return all(one.holds(values) for one in when) and not any(one.holds(values) for one in unless)

    return keep if when or unless else lambda values, before: True


def _outside(values: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("results", "root", "weights"):
        value = values.get(name)
        if isinstance(value, str) and os.path.normpath(value).split(os.sep)[0] == "..":
            problems.append(f"parameter {name!r}: {value!r} leads out of the project; give an absolute path")
    return problems


def _twice(tasks: list[Task]) -> list[str]:
    if len({task.key for task in tasks}) == len(tasks):
        return []
    seen: dict[str, Task] = {}
    problems = []
    for task in tasks:
        if (first := seen.setdefault(task.key, task)) is not task:
            steps = f"step {task.step!r}" if first.step == task.step else f"steps {first.step!r} and {task.step!r}"
            problems.append(f"{steps}: the same run comes twice ({task.key})")
    return problems


def check_names(tasks: list[Task]) -> None:
    """Refuse unknown networks, sources, options of sources and methods before anything runs; the package that knows
    them loads only now.

    Raises ParameterError with every unknown name.
    """
    tasks = [task for task in tasks if isinstance(task.parameters, Parameters)]
    if not tasks:
        return
    from cxrkit import attribution, models
    from cxrkit.data.sources import sources

    known = {
        "model": list(models.NETWORKS),
        "dataset": list(sources()),
        "methods": [c.name for c in attribution.methods()],
    }
    wrong = []
    for task in tasks:
        for name, allowed in known.items():
            value = getattr(task.parameters, name, [])
            for item in value if isinstance(value, list) else [value]:
                if item not in allowed:
                    wrong.append(f"{task.notebook.stem}: {name} {item!r} is unknown; known: {', '.join(allowed)}")
        try:
            check_dataset_options(task.parameters, f"the grid, step {task.step!r}")
        except ParameterError as error:
            wrong.append(f"{task.notebook.stem}: {error}")
    if wrong:
        raise ParameterError("\n  ".join(dict.fromkeys(wrong)))
