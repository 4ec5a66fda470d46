"""From a grid file to the list of its runs, checked whole before anything starts.

A file maps step names to steps, and `profiles` to named changes of them: `{PROFILE: {STEP or all: parts}}`, in which a
step is left out by `skip: true`. What a profile sets is no longer varied by the step itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from cxrkit.errors import CxrkitError, ParameterError, meant
from cxrkit.study import run_key
from cxrkit.study.notebook import CLASSES, NotebookParameters, parameter_names, parameters_for
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


_Values = Annotated[list[Any], Field(min_length=1)]


class Step(BaseModel):
    """One step: a notebook, the parameters common to its runs, and what is varied (each part multiplies the others)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: str
    parameters: dict[str, Any] = {}
    product: dict[str, _Values] = {}
    zip: Annotated[list[dict[str, _Values]], BeforeValidator(_listed)] = []
    cases: Annotated[list[dict[str, Any]] | None, Field(min_length=1)] = None
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] | None = None
    folds: Literal["all"] | Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] | None = None
    when: Annotated[list[str], BeforeValidator(_listed)] = []
    after: Annotated[list[str], BeforeValidator(_listed)] = []
    time_limit: Annotated[float, BeforeValidator(duration)] | None = None
    memory_limit: Annotated[int, BeforeValidator(memory)] | None = None


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
    listing every problem of the file at once.
    """
    if isinstance(file, list | tuple):
        return list({task.key: task for one in file for task in plan(one, profile)}.values())
    if profile is None and not Path(file).is_file() and ":" in str(file):
        file, profile = str(file).rsplit(":", 1)
    path = find_grid(file)
    steps, problems = _read(path, profile)
    tasks: dict[str, list[Task]] = {}
    names = run_key.Names()
    for name in _ordered(steps, problems):
        if (step := steps[name]) is not None:
            before = [task for other in step.after for task in tasks.get(other, [])]
            tasks[name], wrong = _tasks(path, name, step, before, names)
            problems += [f"step {name!r}: {problem}" for problem in wrong]
    ordered = list(itertools.chain.from_iterable(tasks.values()))
    if problems := dict.fromkeys([*problems, *_twice(ordered)]):
        raise ParameterError(f"{path.name}: " + "\n  ".join(problems))
    return ordered


def _read(path: Path, profile: str | None) -> tuple[dict[str, Step | None], list[str]]:
    """The steps of a file as a profile changes them, None for one that isn't right, and all that is wrong with it."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ParameterError(f"{path.name}: expected step names, each with a notebook")
    profiles = content.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(one, dict | None) for one in profiles.values()):
        raise ParameterError(f"{path.name}: 'profiles' must map names to what they change, by step name or 'all'")
    steps, problems = _steps(content, (profiles.get(profile) if profile is not None else None) or {})
    if profile is not None and profile not in profiles:
        problems.append(f"unknown profile {profile!r}; known: {', '.join(profiles) or 'none'}")
    for name, changes in profiles.items():
        strangers = [step for step in changes or {} if step != "all" and step not in content]
        problems += [f"profile {name!r}: there is no step {step!r}" for step in strangers]
        if name != profile:
            problems += [f"profile {name!r}, {one}" for one in _steps(content, changes or {})[1] if one not in problems]
    return steps, problems


def _steps(content: dict[Any, Any], changes: dict[str, Any]) -> tuple[dict[str, Step | None], list[str]]:
    steps: dict[str, Step | None] = {}
    problems: list[str] = []
    for name, raw in content.items():
        over = [one for one in (changes.get("all"), changes.get(name)) if one]
        wrong = []
        if not isinstance(raw, dict) or "notebook" not in raw:
            wrong = ["must name its notebook"]
        elif not all(isinstance(one, dict) for one in over):
            wrong = ["a profile must map its parts to values"]
        elif not any(one.get("skip") is True for one in over):
            for one in over:
                raw = _changed(raw, one)
            try:
                steps[str(name)] = step = Step(**{str(part): value for part, value in raw.items()})
                wrong = _contradictions(step)
            except ValidationError as error:
                wrong = explained(error, Step)
        if wrong:
            steps[str(name)] = None
            problems += [f"step {name!r}: {problem}" for problem in wrong]
    return steps, problems


def _changed(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A step as a profile changes it: what the profile sets is no longer varied by the step itself."""
    change = {name: value for name, value in change.items() if name != "skip"}
    own = {part: change.pop(part) for part in ("parameters", "product") if isinstance(change.get(part), dict)}
    fixed = {*itertools.chain(*own.values()), *_names(change.get("zip")), *_names(change.get("cases"))}
    fixed |= {name for part, name in _COUNTED.items() if part in change}
    merged = {part: value for part, value in raw.items() if _COUNTED.get(part) not in fixed}
    for part in ("parameters", "product"):
        if isinstance(raw.get(part, {}), dict):
            left = {name: value for name, value in raw.get(part, {}).items() if name not in fixed}
            merged[part] = left | own.get(part, {})
    for part in {"zip", "cases"} & raw.keys():
        left = [{n: v for n, v in one.items() if n not in fixed} for one in _listed(raw[part])]
        merged[part] = [one for i, one in enumerate(left) if one not in left[:i] and (one or part == "cases")]
        if not any(merged[part]):
            del merged[part]
    return merged | change


def _names(part: Any) -> set[str]:
    return {name for one in _listed(part) if isinstance(one, dict) for name in one}


def explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each part of a `model` that a file gets wrong."""
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if isinstance(part, int) or not re.match(r"[a-z]+\[|int$", part)]
        name, place = where[0] if where else "", ".".join(where)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown part {name!r}; {meant(name, model.model_fields)}")
        elif problem["type"] == "too_short":
            lines.append(f"{place!r} must have something in it")
        else:
            lines.append(f"{place!r}: {problem['msg'].removeprefix('Value error, ')} (got {problem.get('input')!r})")
    return list(dict.fromkeys(lines))


def _contradictions(step: Step) -> list[str]:
    problems = []
    for part in step.zip:
        lengths = {name: len(values) for name, values in part.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
            problems.append(f"lists in 'zip' must be equally long: {counts}")
    names = [*step.product, *itertools.chain(*step.zip), *_names(step.cases)]
    names += [name for part, name in _COUNTED.items() if getattr(step, part) is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        varied = ", ".join(("product", "zip", "cases", *_COUNTED))
        problems.append(f"{', '.join(map(repr, twice))} varied in more than one of: {varied}")
    for text in step.when:
        try:
            _condition(text)
        except ValueError as error:
            problems.append(str(error))
    return problems


def combinations(step: Step) -> list[dict[str, Any]]:
    """The parameter sets of a step: product × zips × cases × folds × seeds, over the common parameters."""
    axes: list[list[dict[str, Any]]] = [[{name: value} for value in values] for name, values in step.product.items()]
    axes += [[dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)] for part in step.zip]
    axes += [step.cases or [{}]]
    for part, name in _COUNTED.items():
        if (given := getattr(step, part)) is not None:
            given = _FOLDS if given == "all" else given
            axes.append([{name: value} for value in (range(given) if isinstance(given, int) else given)])
    return [dict(itertools.chain(step.parameters.items(), *map(dict.items, row))) for row in itertools.product(*axes)]


_CLAUSE = re.compile(r"\s*([A-Za-z_]\w*(?:\.\w+)*)\s*(==|!=|\bnot\s+in\b|\bin\b)\s*(.+?)\s*")


def _condition(text: str) -> list[tuple[list[str], bool, list[Any]]]:
    """Comparisons of parameters with plain values, joined by `and`: `model == resnet18 and size in [64, 128]`.

    A dotted name looks into a mapping (`dataset_options.view`), or, after `run.`, at the parameters of the run that is
    needed. A value that isn't there equals nothing. Raises ValueError for what is no such comparison.
    """
    clauses = []
    for part in re.split(r"\s+and\s+", text):
        if not (match := _CLAUSE.fullmatch(part)):
            raise ValueError(f"condition {text!r}: expected 'name == value', also with !=, in, not in")
        value, among = parse_yaml(match[3], f"condition {text!r}"), match[2].endswith("in")
        if among and not isinstance(value, list):
            raise ValueError(f"condition {text!r}: 'in' needs a list such as [a, b]")
        clauses.append((match[1].split("."), match[2][0] in "!n", value if among else [value]))
    return clauses


def _holds(clauses: list[tuple[list[str], bool, list[Any]]], values: dict[str, Any]) -> bool:
    for path, negated, among in clauses:
        found: Any = values
        for name in path:
            found = found.get(name, _ABSENT) if isinstance(found, dict) else _ABSENT
        if (found in among) is negated:
            return False
    return True


def _ordered(steps: dict[str, Step | None], problems: list[str]) -> list[str]:
    """Step names, each behind those that it comes after, else as in the file; adds what can't be ordered."""
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
    return done


def _tasks(path: Path, name: str, step: Step, before: list[Task], names: run_key.Names) -> tuple[list[Task], list[str]]:
    """The runs of a step whose needed runs are known, and all that is wrong with them."""
    try:
        notebook = _notebook(path, step.notebook)
        checks = parameters_for(notebook)
    except ParameterError as error:
        return [], [str(error)]
    known = parameter_names(checks)
    clauses = [clause for text in step.when for clause in _condition(text)]
    if strangers := sorted({path[0] for path, _, _ in clauses} - known):
        return [], [f"condition {' and '.join(step.when)!r}: {', '.join(map(repr, strangers))} is no parameter"]
    rows = combinations(step)
    link = next((one for one in ("run", "runs") if one in known and step.after), None)
    if link and any(link in row for row in rows):
        return [], [f"parameter {link!r} is set by 'after'"]
    repeated: list[tuple[dict[str, Any], list[Task]]] = [({"runs": [task.key for task in before]}, before)]
    if link == "run":
        repeated = [({"run": task.key}, [task]) for task in before]
    made, problems = [], []
    for row, (extra, needed) in itertools.product(rows, repeated):
        try:
            parameters = checks(**row, **(extra if link else {}))
            values = parameters.model_dump()
            about = {"run": needed[0].parameters.model_dump()} if link == "run" else {}
            if _holds(clauses, values | about):
                after = tuple(task.key for task in needed)
                limits = {"time_limit": step.time_limit, "memory_limit": step.memory_limit}
                made.append(Task(names.key(parameters), notebook, parameters, name, after, **limits))
                problems += _outside(values | {"results": parameters.results})
        except (CxrkitError, ValueError) as error:
            problems.append(str(error))
    if not made and not problems and (before or not step.after):
        problems.append("its conditions leave no run")
    return made, list(dict.fromkeys(problems))


def _notebook(grid: Path, name: str) -> Path:
    path, project = (grid.parent / name).resolve(), run_key.project_folder().resolve()
    if not path.is_relative_to(project):
        raise ParameterError(f"notebook {name!r} lies outside the project {project.name!r}")
    if not path.is_file():
        raise ParameterError(f"there is no notebook {name!r} beside {grid.name}")
    if path.stem in CLASSES and path != project / "notebooks" / path.name:
        raise ParameterError(f"notebook {name!r}: the name {path.name!r} is kept for notebooks/{path.name}")
    language = "python"
    with contextlib.suppress(ValueError, KeyError, TypeError):  # what is no notebook is refused later
        language = json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["language"]
    if language != "python":
        raise ParameterError(f"notebook {name!r} is written in {language}; a grid runs Python")
    return path


def _outside(values: dict[str, Any]) -> list[str]:
    found = {name: value for name in ("results", "root", "weights") if isinstance(value := values.get(name), str)}
    wrong = {name: value for name, value in found.items() if os.path.normpath(value).split(os.sep)[0] == ".."}
    return [f"parameter {name!r}: {wrong[name]!r} leads out of the project; give an absolute path" for name in wrong]


def _twice(tasks: list[Task]) -> list[str]:
    steps: dict[str, list[str]] = {}
    for task in tasks:
        steps.setdefault(task.key, []).append(task.step)
    twice = {key: dict.fromkeys(names) for key, names in steps.items() if len(names) > 1}
    return [f"the same run comes twice ({key}): in {' and '.join(names)}" for key, names in twice.items()]


def check_names(tasks: list[Task]) -> None:
    """Raise ParameterError with every unknown network, source, option of a source and method of a plan."""
    tasks = [task for task in tasks if isinstance(task.parameters, Parameters)]
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
