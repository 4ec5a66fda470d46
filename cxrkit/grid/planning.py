"""From a grid file to the list of its runs, checked whole before anything starts.

A file maps step names to steps, and `profiles` to named changes of them: `{PROFILE: {STEP or all: parts}}`, in which a
step is left out by `skip: true`. What a profile sets is no longer varied by the step itself.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from cxrkit.errors import CxrkitError, ParameterError, meant
from cxrkit.study import run_key
from cxrkit.study.notebook import CLASSES, parameter_names, parameters_for
from cxrkit.train.parameters import Parameters, check_dataset_options
from cxrkit.yaml_files import parse_yaml, read_yaml

__all__ = ["Step", "Task", "check_names", "combinations", "duration", "explained", "find_grid", "memory", "plan"]

_FOLDS = 5
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_COUNTED = {"folds": "fold", "seeds": "seed"}  # part of a step: the parameter that it varies
_ABSENT = object()


def duration(value: Any) -> float:
    """Seconds from a number of seconds or text such as `90 s`, `30 min`, `2 h`, `1 d`. Raises ValueError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(s|min|h|d)?\s*", str(value))
    if isinstance(value, bool) or not match or not (seconds := float(match[1]) * _UNITS[match[2] or "s"]) > 0:
        raise ValueError("a time is a number of seconds, or text such as '90 s', '30 min', '2 h'")
    return seconds


def memory(value: Any) -> int:
    """Bytes from text such as `4 GB` or `500 MiB`. Raises ValueError."""
    if not re.fullmatch(r"\s*[\d.]+\s*[KMGT]i?B\s*", str(value)):
        raise ValueError("a memory limit is text such as '4 GB' or '500 MiB'")
    return int(ByteSize._validate(str(value), None))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


def _equally_long(part: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if len({len(values) for values in part.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in part.items())
        raise ValueError(f"lists in 'zip' must be equally long: {lengths}")
    return part


_Values = Annotated[list[Any], Field(min_length=1)]
_Zip = Annotated[dict[str, _Values], AfterValidator(_equally_long)]


def _condition(text: str) -> tuple[list[str], bool, Any]:
    """A comparison of a parameter with a plain value: `model == resnet18`, or with `!=`; as path, whether equal, value.

    A dotted name looks into a mapping (`dataset_options.view`), or, after `run.`, at the parameters of the run that is
    needed. A value that isn't there equals nothing. Raises ValueError for what is no such comparison.
    """
    if not (match := re.fullmatch(r"\s*([A-Za-z_]\w*(?:\.\w+)*)\s*([=!]=)\s*(.+?)\s*", text)):
        raise ValueError(f"condition {text!r}: expected 'name == value' or 'name != value'")
    return match[1].split("."), match[2] == "==", parse_yaml(match[3], f"condition {text!r}")


class Step(BaseModel):
    """One step: a notebook, the parameters common to its runs, and what is varied (each part multiplies the others).

    A profile's change of a step is one too, and may say `skip: true`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: str = ""
    parameters: dict[str, Any] = {}
    product: dict[str, _Values] = {}
    zip: Annotated[list[_Zip], BeforeValidator(_listed)] = []
    cases: Annotated[list[dict[str, Any]] | None, Field(min_length=1)] = None
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] | None = None
    folds: Literal["all"] | Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] | None = None
    when: Annotated[list[Annotated[str, AfterValidator(_condition)]], BeforeValidator(_listed)] = []
    after: Annotated[list[str], BeforeValidator(_listed)] = []
    time_limit: Annotated[float, BeforeValidator(duration)] | None = None
    memory_limit: Annotated[int, BeforeValidator(memory)] | None = None
    skip: bool = False

    @model_validator(mode="after")
    def _varied_once(self) -> Step:
        if twice := sorted({name for name in self.varied if self.varied.count(name) > 1}):
            varied = ", ".join(("product", "zip", "cases", *_COUNTED))
            raise ValueError(f"{', '.join(map(repr, twice))} varied in more than one of: {varied}")
        return self

    @property
    def axes(self) -> list[list[dict[str, Any]]]:
        """What each part varies, as sets of parameters: product, zips, cases, folds, seeds."""
        axes = [[{name: value} for value in values] for name, values in self.product.items()]
        axes += [[dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)] for part in self.zip]
        axes += [self.cases] if self.cases else []
        for part, name in _COUNTED.items():
            if (given := getattr(self, part)) is not None:
                given = _FOLDS if given == "all" else given
                axes.append([{name: value} for value in (range(given) if isinstance(given, int) else given)])
        return axes

    @property
    def varied(self) -> list[str]:
        """Names of the parameters that its runs differ in, as often as they are given."""
        return [name for axis in self.axes for name in dict.fromkeys(itertools.chain(*axis))]


@dataclass(frozen=True)
class Task:
    """One run of one notebook: its key, validated parameters, and the keys of the runs that must be there first."""

    key: str
    notebook: Path
    parameters: Parameters
    step: str = ""
    after: tuple[str, ...] = ()
    time_limit: float | None = None
    memory_limit: int | None = None

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
    papers = [path.parent.name for path in folder.glob("papers/*/grid.yaml")]
    known = ", ".join(sorted([*papers, *(path.stem for path in folder.glob("grids/*.yaml"))]))
    raise ParameterError(f"there is no grid {str(file)!r}; known: {known or 'none'}")


def plan(file: str | Path | list[str] | tuple[str, ...], profile: str | None = None) -> list[Task]:
    """Every run of a grid file, or of several, each behind those that it needs.

    A step that comes `after` others is repeated for each of their runs with `run` set, or made once with all of them in
    `runs`, where its notebook has such a parameter; else it only waits for them. A name may hold the profile, as in
    "bcos:full", so that a page's parameter can; a run that several files hold is there once. Raises ParameterError
    listing every problem of the file's form, all profiles included, or, where that is right, of all its runs.
    """
    if isinstance(file, list | tuple):
        return list({task.key: task for one in file for task in plan(one, profile)}.values())
    if profile is None and not Path(file).is_file() and ":" in str(file):
        file, profile = str(file).rsplit(":", 1)
    path = find_grid(file)
    problems: list[str] = []
    steps = _read(path, profile)
    tasks: dict[str, list[Task]] = {}
    names = run_key.Names()
    for name in _ordered(steps, problems):
        before = [task for other in steps[name].after for task in tasks.get(other, [])]
        try:
            tasks[name] = _tasks(path, name, steps[name], before, names)
        except ParameterError as error:
            problems.append(f"step {name!r}: {error}")
    ordered = list(itertools.chain.from_iterable(tasks.values()))
    for key, count in Counter(task.key for task in ordered).items():
        if count > 1:
            where = " and ".join(dict.fromkeys(task.step for task in ordered if task.key == key))
            problems.append(f"the same run comes twice ({key}): in {where}")
    _refuse(path, problems)
    return ordered


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise ParameterError(f"{path.name}: " + "\n  ".join(dict.fromkeys(problems)))


class _File(BaseModel):
    steps: dict[str, Step]
    profiles: dict[str, Annotated[dict[str, Step], BeforeValidator(lambda changes: changes or {})]]


def _read(path: Path, profile: str | None) -> dict[str, Step]:
    """The steps of a file as a profile changes them."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ParameterError(f"{path.name}: expected step names, each with a notebook")
    try:
        file = _File(profiles=content.pop("profiles", None) or {}, steps=content)
    except ValidationError as error:
        raise ParameterError(f"{path.name}: " + "\n  ".join(explained(error, Step))) from None
    known = {"all", *file.steps}
    changed = ((name, one) for name, changes in file.profiles.items() for one in changes)
    problems = [f"profile {name!r}: there is no step {one!r}" for name, one in changed if one not in known]
    if profile is not None and profile not in file.profiles:
        problems.append(f"unknown profile {profile!r}; known: {', '.join(file.profiles) or 'none'}")
    _refuse(path, problems)
    over = file.profiles[profile] if profile is not None else {}
    steps = {}
    for name, step in file.steps.items():
        changes = [over[one] for one in ("all", name) if one in over]
        if not any(change.skip for change in changes):
            steps[name] = functools.reduce(_changed, changes, step)
    return steps


def _changed(step: Step, change: Step) -> Step:
    """A step as a profile changes it: what the profile sets is no longer varied by the step itself."""
    fixed = {*change.parameters, *change.varied}

    def free(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in fixed}

    cases = [free(case) for case in step.cases or []]
    left = {part: None for part, name in _COUNTED.items() if name in fixed}
    left["cases"] = [case for number, case in enumerate(cases) if case not in cases[:number]] or None
    left["zip"] = [part for one in step.zip if (part := free(one))]
    new = {part: getattr(change, part) for part in change.model_fields_set}
    for part in ("parameters", "product"):
        new[part] = free(getattr(step, part)) | getattr(change, part)
    return step.model_copy(update=left | new)


def explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each part of a `model`, or of one in a grid file, that is wrong."""
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if isinstance(part, int) or not re.match(r"[a-z]+\[|int$", part)]
        intro = ""
        match where:
            case ["steps", step, *where]:
                intro = f"step {step!r}: "
            case ["profiles", profile, step, *where]:
                intro = f"profile {profile!r}, step {step!r}: "
        if problem["type"] == "extra_forbidden":
            lines.append(f"{intro}unknown part {where[0]!r}; {meant(where[0], model.model_fields)}")
        elif problem["type"] == "too_short":
            lines.append(f"{intro}{'.'.join(where)!r} must have something in it")
        else:
            around = (f"{'.'.join(where)!r}: ", f" (got {problem.get('input')!r})") if where else ("", "")
            lines.append(intro + problem["msg"].removeprefix("Value error, ").join(around))
    return list(dict.fromkeys(lines))


def combinations(step: Step) -> list[dict[str, Any]]:
    """The parameter sets of a step: all combinations of its axes, over the common parameters."""
    return [functools.reduce(operator.or_, row, step.parameters) for row in itertools.product(*step.axes)]


def _holds(condition: tuple[list[str], bool, Any], values: dict[str, Any]) -> bool:
    path, equal, wanted = condition
    found: Any = values
    for name in path:
        found = found.get(name, _ABSENT) if isinstance(found, dict) else _ABSENT
    return (found == wanted) is equal


def _ordered(steps: dict[str, Step], problems: list[str]) -> list[str]:
    """Step names, each behind those that it comes after, else as in the file; adds what can't be ordered."""
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            problems.append(f"steps wait for each other: {' → '.join([*path[path.index(name) :], name])}")
        elif name not in steps:
            problems.append(f"step {path[-1]!r}: 'after' names {name!r}, which is no step here")
        elif name not in done:
            for other in steps[name].after:
                visit(other, (*path, name))
            done[name] = None

    for name in steps:
        visit(name, ())
    return list(done)


def _tasks(path: Path, name: str, step: Step, before: list[Task], names: run_key.Names) -> list[Task]:
    """The runs of a step whose needed runs are known. Raises ParameterError with all that is wrong with them."""
    notebook = _notebook(path, step.notebook)
    checks = parameters_for(notebook)
    known = parameter_names(checks)
    if strangers := sorted({path[0] for path, _, _ in step.when} - known):
        raise ParameterError(f"'when': {', '.join(map(repr, strangers))} is no parameter")
    link = next((one for one in ("run", "runs") if one in known and step.after), None)
    repeated: list[tuple[dict[str, Any], list[Task]]] = [({}, before)]
    if link == "run":
        repeated = [({"run": task.key}, [task]) for task in before]
    elif link == "runs":
        repeated = [({"runs": [task.key for task in before]}, before)]
    made, problems = [], []
    for row, (extra, needed) in itertools.product(combinations(step), repeated):
        try:
            if link in row:
                raise ParameterError(f"parameter {link!r} is set by 'after'")
            parameters = checks(**row, **extra)
            about = {"run": needed[0].parameters.model_dump()} if link == "run" else {}
            if all(_holds(condition, parameters.model_dump() | about) for condition in step.when):
                after = tuple(task.key for task in needed)
                limits = {"time_limit": step.time_limit, "memory_limit": step.memory_limit}
                made.append(Task(names.key(parameters), notebook, parameters, name, after, **limits))
        except (CxrkitError, ValueError) as error:
            problems.append(str(error))
    if not made and not problems and (before or not step.after):
        problems.append("its conditions leave no run")
    if problems:
        raise ParameterError("\n  ".join(dict.fromkeys(problems)))
    return made


def _notebook(grid: Path, name: str) -> Path:
    if not name:
        raise ParameterError("must name its notebook")
    path, project = (grid.parent / name).resolve(), run_key.project_folder().resolve()
    if not path.is_relative_to(project):
        raise ParameterError(f"notebook {name!r} lies outside the project {project.name!r}")
    if not path.is_file():
        raise ParameterError(f"there is no notebook {name!r} beside {grid.name}")
    if path.stem in CLASSES and path != project / "notebooks" / path.name:
        raise ParameterError(f"notebook {name!r}: the name {path.name!r} is kept for notebooks/{path.name}")
    return path


def check_names(tasks: list[Task]) -> None:
    """Raise ParameterError with every unknown network, source, option of a source and method of a plan."""
    tasks = [task for task in tasks if task.parameters.kind in CLASSES]
    if not tasks:
        return  # no need to load the packages that know them
    from cxrkit import attribution, models
    from cxrkit.data.sources import sources

    methods = [card.name for card in attribution.methods()]
    known = {"model": list(models.NETWORKS), "dataset": list(sources()), "methods": methods}
    wrong = []
    for task in tasks:
        for name, allowed in known.items():
            strangers = [one for one in _listed(getattr(task.parameters, name, [])) if one not in allowed]
            wrong += [f"{name} {one!r} is unknown; known: {', '.join(allowed)}" for one in strangers]
        try:
            check_dataset_options(task.parameters, f"the grid, step {task.step!r}")
        except ParameterError as error:
            wrong.append(str(error))
    if wrong:
        raise ParameterError("\n  ".join(dict.fromkeys(wrong)))
