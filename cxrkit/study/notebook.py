"""The parameters of a notebook: a class of the package where there is one, else types inferred from its parameters
cell."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)

from cxrkit.errors import ParameterError, meant
from cxrkit.project import project_folder
from cxrkit.study import parameters
from cxrkit.train.parameters import OF_DATASET, Parameters, given, refuse_none_as_text

if TYPE_CHECKING:
    from cxrkit.study.study import Study

__all__ = ["CLASSES", "NotebookParameters", "parameter_names", "parameters_for", "parameters_of"]

CLASSES: dict[str, type[Parameters]] = {
    cls.kind: cls
    for cls in vars(parameters).values()
    if isinstance(cls, type) and issubclass(cls, Parameters) and hasattr(cls, "kind")
}
PLACEMENT = Parameters.placement

_Number = Annotated[StrictInt | StrictFloat, Field(allow_inf_nan=False)]
_TYPES = {bool: StrictBool, int: StrictInt, float: _Number, str: StrictStr}
_NAMED = {cls.__name__: strict for cls, strict in _TYPES.items()}
_NAMED |= dict.fromkeys(("list", "tuple", "sequence"), list[Any])
_NAMED |= dict.fromkeys(("dict", "mapping"), dict[str, Any])


@dataclass(frozen=True)
class NotebookParameters:
    """Checked parameters of a notebook for which the package has no class; each is an attribute too.

    `kind` is the notebook's file name without its ending, after the paper that it belongs to; `notebook` its path
    inside the project.
    """

    kind: str
    notebook: str
    values: dict[str, Any] = field(hash=False)
    results: str = "results"

    placement = PLACEMENT

    def identity(self) -> dict[str, Any]:
        """The parameters that decide the result, JSON-able, in a fixed order."""
        return {name: self.values[name] for name in sorted(self.values) if name not in self.placement}

    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        return dict(self.values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(name)


class Checked:
    """The parameters cell of one notebook as a class of parameters: call it with values, as one calls the others.

    Names that the cell doesn't assign are refused, and values whose type differs from the cell's: a number may be
    whole where the cell has a fraction, and where the cell says None anything plain will do. An annotation says more,
    such as `float | None`. Options and folder of the cell's data set don't go with another. `results` is always known:
    it says where the grid keeps the run. Raises ParameterError.
    """

    def __init__(self, notebook: Path):
        own = notebook.parent.name if notebook.parent.parent.name == "papers" else ""
        self.kind = f"{own}_{notebook.stem}".lstrip("_")
        self.path = notebook.relative_to(project_folder()).as_posix()
        self.defaults = _parameters_cell(notebook)
        fields: dict[str, Any] = {}
        for number, (name, (default, annotation)) in enumerate(self.defaults.items()):
            fields[f"value_{number}"] = (annotation, Field(default, alias=name))
        if "results" not in self.defaults:
            fields["results_"] = (StrictStr, Field("results", alias="results", min_length=1))
        config = ConfigDict(extra="forbid", protected_namespaces=())
        self._model: type[BaseModel] = create_model(f"Parameters of {self.kind}", __config__=config, **fields)
        self.names = frozenset(self.defaults) | {"results"}

    def __call__(self, **values: Any) -> NotebookParameters:
        own, _ = self.defaults.get("dataset", (None, None))
        if values.get("dataset", own) != own:  # the cell's own options and folder are those of another data set
            for name in OF_DATASET:
                default, _ = self.defaults.get(name, (None, None))
                if default and name not in values:
                    values[name] = type(default)()
        changed = {name: value for name, value in values.items() if value != self.defaults.get(name, (None,))[0]}
        refuse_none_as_text(self.kind, changed)
        try:
            checked = self._model(**values).model_dump(by_alias=True)
        except ValidationError as error:
            raise ParameterError(self._explain(error)) from None
        if wrong := [name for name, value in checked.items() if not _plain(value)]:
            raise ParameterError(
                f"parameters {wrong} for {self.kind}: only text, finite numbers, true/false, null, lists and mappings"
            )
        results = checked["results"] if "results" in self.defaults else checked.pop("results")
        return NotebookParameters(self.kind, self.path, checked, results)

    def from_notebook(self, namespace: Mapping[str, Any]) -> NotebookParameters:
        """The parameters as a notebook's namespace holds them; a misspelt one is refused, as `Parameters` does."""
        return self(**given(namespace, self.names))

    def _explain(self, error: ValidationError) -> str:
        lines = []
        for problem in error.errors():
            name = str(problem["loc"][0])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown parameter {name!r} for {self.kind}; {meant(name, sorted(self.names))}")
            else:
                lines.append(f"parameter {name!r} for {self.kind}: {problem['msg']} (got {problem.get('input')!r})")
        return "; ".join(dict.fromkeys(lines))


def parameters_for(notebook: str | Path) -> type[Parameters] | Checked:
    """What checks the parameters of a notebook: the class that belongs to its file name, else its parameters cell.

    Raises ParameterError for a notebook without a parameters cell, or with one that isn't a list of plain values.
    """
    path = Path(notebook)
    if path.stem in CLASSES:
        return CLASSES[path.stem]
    path = (project_folder() / path).resolve()
    if not path.is_file():
        raise ParameterError(f"there is no notebook {str(notebook)!r}")
    return _checked(path, path.stat().st_mtime_ns)


def parameters_of(
    notebook: str, namespace: Mapping[str, Any], load: Callable[[], Study] | None = None
) -> NotebookParameters:
    """The parameters of a notebook under `notebooks`, as its namespace holds them.

    An empty `run` is filled in by the first network of `load()`. Raises ParameterError, also for a name that is no
    parameter.
    """
    check = parameters_for(f"notebooks/{notebook}")
    parameters = check.from_notebook(namespace)
    if parameters.run or load is None:
        return parameters
    return check(**parameters.values | {"run": load().trained[0].key})


def parameter_names(cls: type[Parameters] | Checked) -> frozenset[str]:
    return cls.names if isinstance(cls, Checked) else frozenset(cls.model_fields)


@functools.lru_cache(maxsize=64)
def _checked(path: Path, changed: int) -> Checked:
    return Checked(path)


def _parameters_cell(notebook: Path) -> dict[str, tuple[Any, Any]]:
    """Name → (default, type) of each assignment in the cell that is tagged `parameters`."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ParameterError(f"{notebook.name}: not a notebook") from None
    if source is None:
        raise ParameterError(f"{notebook.name}: no cell is tagged 'parameters', so nothing can be set from outside")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ParameterError(f"{notebook.name}: the parameters cell isn't Python: {error.msg}") from None
    found = {}
    for node in tree.body:
        name, value, annotation = _assignment(node)
        if name is None or (name.startswith("_") or not _plain(value)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            if isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections.abc", "__future__"):
                continue  # what annotations need
            raise ParameterError(
                f"{notebook.name}: line {node.lineno} of the parameters cell is no plain 'name = value': "
                f"{ast.unparse(node)[:80]}"
            )
        found[name] = (value, _type_of(value, annotation))
    return found


def _assignment(node: ast.stmt) -> tuple[str | None, Any, ast.expr | None]:
    annotation = None
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value, annotation=annotation):
            pass
        case _:
            return None, None, None
    try:
        return name, ast.literal_eval(value), annotation
    except ValueError:
        return None, None, None


def _type_of(default: Any, annotation: ast.expr | None) -> Any:
    if annotation is not None and (named := _annotated(annotation)) is not Any:
        return named | None if default is None and named is not None else named
    if default is None or (annotation is not None and ast.unparse(annotation) in ("Any", "typing.Any")):
        return Any
    if isinstance(default, list | tuple):
        kinds = {type(item) for item in default}
        if kinds == {int, float}:
            kinds = {float}
        only = kinds.pop() if len(kinds) == 1 else None
        return list[_TYPES[only]] if only in _TYPES else list[Any]
    return dict[str, Any] if isinstance(default, dict) else _TYPES[type(default)]


def _annotated(hint: ast.expr) -> Any:
    """The type that an annotation names, such as `int | None` or `Optional[list[float]]`; Any for what isn't plain."""
    match hint:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            with contextlib.suppress(SyntaxError):
                return _annotated(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _NAMED.get(name.lower(), Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _filled("union", [_annotated(left), _annotated(right)])
        case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=values):
            with contextlib.suppress(ValueError):
                return Literal[ast.literal_eval(values)]
        case ast.Subscript(value=outer, slice=inner):
            parts = [_annotated(part) for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            return _filled(getattr(outer, "id", getattr(outer, "attr", "")).lower(), parts)
    return Any


def _filled(outer: str, parts: list[Any]) -> Any:
    match outer:
        case "optional" | "union":
            some = functools.reduce(operator.or_, [part for part in parts if part is not None] or [None])
            return some | None if some is not None and (None in parts or outer == "optional") else some
        case "list" | "sequence":
            return list[parts[0]]
        case "dict" | "mapping":
            return dict[str, parts[-1]]
    return _NAMED.get(outer, Any)


def _plain(value: Any) -> bool:
    match value:
        case None | bool() | int() | str():
            return True
        case float():
            return math.isfinite(value)
        case list() | tuple():
            return all(map(_plain, value))
        case dict():
            return all(isinstance(name, str) for name in value) and all(map(_plain, value.values()))
    return False
