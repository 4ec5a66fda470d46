"""The grid file: what a step may say, how profiles change it, and every problem of a file at once."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from cxrkit.errors import ParameterError, meant
from cxrkit.yaml_files import parse_yaml, read_yaml

__all__ = ["FOLDS", "Condition", "Step", "combinations", "duration", "memory", "read"]

FOLDS = 5
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_VARIED = ("product", "zip", "cases", "seeds", "folds")


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
_Duration = Annotated[float, BeforeValidator(duration)]


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
    unless: Annotated[list[str], BeforeValidator(_listed)] = []
    after: Annotated[list[str], BeforeValidator(_listed)] = []
    time_limit: _Duration | None = None
    memory_limit: Annotated[int, BeforeValidator(memory)] | None = None
    estimate: _Duration | None = None


class Override(Step):
    """What a profile says of a step; `skip` leaves the step out."""

    notebook: str | None = None
    skip: bool = False


def read(path: Path, profile: str | None = None) -> tuple[dict[str, Step | None], list[str]]:
    """The steps of a grid file, as a profile changes them (None for one that isn't right), and every problem found.

    Raises ParameterError for what is no grid file at all, and for an unknown profile.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ParameterError(f"{path.name}: expected step names, each with a notebook")
    profiles = content.pop("profiles", None) or {}
    problems = _profile_problems(profiles, content)
    if profile is not None and profile not in profiles:
        known = f"known: {', '.join(profiles)}" if profiles else "the file has none"
        problems.append(f"unknown profile {profile!r}; {known}")
    changes = profiles.get(profile) if profile is not None and isinstance(profiles, dict) else None
    changes = changes if isinstance(changes, dict) else {}
    steps: dict[str, Step | None] = {}
    for name, raw in content.items():
        steps[str(name)] = None
        if not isinstance(raw, dict) or "notebook" not in raw:
            problems.append(f"step {name!r} must name its notebook")
            continue
        over = [one for one in (changes.get("all"), changes.get(name)) if isinstance(one, dict)]
        if any(one.get("skip") is True for one in over):
            del steps[str(name)]
            continue
        for one in over:
            raw = _changed(raw, one)
        try:
            step = Step(**raw)
            wrong = _contradictions(step)
            steps[str(name)] = None if wrong else step
            problems += [f"step {name!r}: {problem}" for problem in wrong]
        except ValidationError as error:
            problems += [f"step {name!r}: {problem}" for problem in _told(error, Step)]
    return steps, problems


def _profile_problems(profiles: Any, steps: Mapping[str, Any]) -> list[str]:
    if not isinstance(profiles, dict) or not all(isinstance(one, dict | None) for one in profiles.values()):
        return ["'profiles' must map names to what they change, by step name or 'all'"]
    problems = []
    for name, changes in profiles.items():
        for step, change in (changes or {}).items():
            if step != "all" and step not in steps:
                problems.append(f"profile {name!r}: there is no step {step!r}")
            try:
                Override(**(change or {}))
            except ValidationError as error:
                problems += [f"profile {name!r}, step {step!r}: {problem}" for problem in _told(error, Override)]
            except TypeError:
                problems.append(f"profile {name!r}, step {step!r}: must map parts of a step to values")
    return problems


def _changed(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A step as a profile changes it: what the profile sets is no longer varied by the step itself."""
    change = {name: value for name, value in change.items() if name != "skip"}
    parameters, product = change.pop("parameters", {}), change.pop("product", {})
    fixed = {*parameters, *product, *_names(change.get("zip")), *_names(change.get("cases"))}
    fixed |= {name for part, name in (("seeds", "seed"), ("folds", "fold")) if part in change}
    merged = dict(raw)
    for part in ("parameters", "product"):
        if isinstance(raw.get(part), dict):
            merged[part] = {name: value for name, value in raw[part].items() if name not in fixed}
    for part in ("zip", "cases"):
        if part in raw:
            kept = [{n: v for n, v in one.items() if n not in fixed} for one in _listed(raw[part])]
            merged[part] = [one for i, one in enumerate(kept) if one not in kept[:i] and (one or part == "cases")]
            if not any(merged[part]):
                del merged[part]
    for part, name in (("seeds", "seed"), ("folds", "fold")):
        if name in fixed:
            merged.pop(part, None)
    merged["parameters"] = {**merged.get("parameters", {}), **parameters}
    merged["product"] = {**merged.get("product", {}), **product}
    return merged | change


def _names(part: Any) -> set[str]:
    return {name for one in _listed(part) if isinstance(one, dict) for name in one}


def _told(error: ValidationError, cls: type[BaseModel]) -> list[str]:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if isinstance(part, int) or not re.match(r"[a-z]+\[|int$", part)]
        name, shown = where[0] if where else "", ".".join(where)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown part {name!r}; {meant(name, cls.model_fields)}")
        elif problem["type"] == "too_short":
            lines.append(f"{shown!r} must have something in it")
        else:
            told = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{shown!r}: {told} (got {problem.get('input')!r})")
    return list(dict.fromkeys(lines))


def _contradictions(step: Step) -> list[str]:
    problems = []
    for part in step.zip:
        lengths = {name: len(values) for name, values in part.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            problems.append(f"lists in 'zip' must be equally long: {told}")
    axes = [*([name] for name in step.product), *step.zip, _names(step.cases)]
    axes += [[name] for part, name in (("seeds", "seed"), ("folds", "fold")) if getattr(step, part) is not None]
    names = [name for axis in axes for name in axis]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{', '.join(map(repr, twice))} varied in more than one of: {', '.join(_VARIED)}")
    for text in (*step.when, *step.unless):
        try:
            Condition.parse(text)
        except ValueError as error:
            problems.append(str(error))
    return problems


def combinations(step: Step) -> list[dict[str, Any]]:
    """The parameter sets of a step: product × zips × cases × folds × seeds, over the common parameters."""
    axes: list[list[dict[str, Any]]] = [[{name: value} for value in values] for name, values in step.product.items()]
    axes += [[dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True)] for part in step.zip]
    axes += [step.cases or [{}]]
    for name, given in (("fold", FOLDS if step.folds == "all" else step.folds), ("seed", step.seeds)):
        if given is not None:
            axes.append([{name: value} for value in (range(given) if isinstance(given, int) else given)])
    rows = []
    for parts in itertools.product(*axes):
        row = dict(step.parameters)
        for part in parts:
            row.update(part)
        rows.append(row)
    return rows


_COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, among: value in among,
    "not in": lambda value, among: value not in among,
}
_CLAUSE = re.compile(r"\s*([A-Za-z_]\w*(?:\.\w+)*)\s*(==|!=|<=|>=|<|>|\bnot\s+in\b|\bin\b)\s*(.+?)\s*")


class Condition:
    """Comparisons of parameters with plain values, joined by `and`: `model == resnet18 and size >= 128`.

    A dotted name looks into a mapping (`dataset_options.view`), or, after `run.`, at the parameters of the run that is
    needed. A value that isn't there equals nothing.
    """

    def __init__(self, text: str, clauses: list[tuple[list[str], str, Any]]):
        self.text, self.clauses = text, clauses

    @classmethod
    def parse(cls, text: str) -> Condition:
        clauses = []
        for part in re.split(r"\s+and\s+", text):
            match = _CLAUSE.fullmatch(part)
            if not match:
                raise ValueError(f"condition {text!r}: expected 'name == value', also with {', '.join(_COMPARE)}")
            name, compare, value = match[1], " ".join(match[2].split()), parse_yaml(match[3], f"condition {text!r}")
            if "in" in compare and not isinstance(value, list):
                raise ValueError(f"condition {text!r}: {compare!r} needs a list such as [a, b]")
            clauses.append((name.split("."), compare, value))
        return cls(text, clauses)

    @property
    def names(self) -> set[str]:
        return {path[0] for path, _, _ in self.clauses}

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether every comparison holds. Raises ValueError where two values have no order."""
        return all(self._one(values, *clause) for clause in self.clauses)

    def _one(self, values: Any, path: list[str], compare: str, wanted: Any) -> bool:
        for name in path:
            if not isinstance(values, Mapping) or name not in values:
                return compare in ("!=", "not in")
            values = values[name]
        try:
            return bool(_COMPARE[compare](values, wanted))
        except TypeError:
            raise ValueError(
                f"condition {self.text!r}: {'.'.join(path)} is {values!r}, which has no order with {wanted!r}"
            ) from None
