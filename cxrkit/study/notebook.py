"""The parameters of a notebook: a class of the package where there is one, else types inferred from its parameters
cell."""

from __future__ import annotations

import ast
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, create_model

from cxrkit.errors import ParameterError
from cxrkit.project import project_folder
from cxrkit.study import parameters
from cxrkit.train.parameters import Parameters

if TYPE_CHECKING:
    from cxrkit.study.study import Study

__all__ = ["CLASSES", "NotebookParameters", "parameter_names", "parameters_for", "parameters_of", "stored_parameters"]

CLASSES: dict[str, type[Parameters]] = {
    cls.kind: cls
    for cls in vars(parameters).values()
    if isinstance(cls, type) and issubclass(cls, Parameters) and hasattr(cls, "kind")
}
_TYPES: dict[type, Any] = {bool: bool, int: int, float: int | float, str: str, dict: dict[str, Any]}


class _AnyList:
    def __class_getitem__(cls, item: Any) -> Any:
        return list[Any]


# What annotations may name.
_NAMES = {"Any": Any, "Optional": typing.Optional, "Union": typing.Union, "Literal": typing.Literal}
_NAMES |= {kind.__name__: strict for kind, strict in _TYPES.items()}
_NAMES |= dict.fromkeys(("list", "List", "Sequence"), list)
_NAMES |= dict.fromkeys(("tuple", "Tuple"), _AnyList) | dict.fromkeys(("dict", "Dict", "Mapping"), dict)
_NAMES["typing"] = types.SimpleNamespace(**_NAMES)


class NotebookParameters(Parameters):
    """Checked parameters of a notebook for which the package has no class.

    `kind` is the notebook's file name without its ending, after the paper that it belongs to; `notebook` its path
    inside the project. A value's type is that of the parameters cell: a number may be whole where the cell has a
    fraction, and where the cell says None anything plain will do. An annotation says more, such as `float | None`.
    `results` is always known: it says where the grid keeps the run.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @property
    def values(self) -> dict[str, Any]:
        """The parameters by name."""
        return self.model_dump()


def parameters_for(notebook: str | Path) -> type[Parameters]:
    """The class of a notebook's parameters: the one that belongs to its file name, else one made of its parameters
    cell.

    Raises ParameterError for a notebook without a parameters cell, or with one that isn't a list of plain values.
    """
    path = Path(notebook)
    if path.stem in CLASSES:
        return CLASSES[path.stem]
    path = (project_folder() / path).resolve()
    if not path.is_file():
        raise ParameterError(f"there is no notebook {str(notebook)!r}")
    return _of_cell(path, path.stat().st_mtime_ns)


def parameters_of(
    notebook: str, namespace: Mapping[str, Any], load: Callable[[], Study] | None = None
) -> NotebookParameters:
    """The parameters of a notebook under `notebooks`, as its namespace holds them.

    An empty `run` is filled in by the first network of `load()`. Raises ParameterError, also for a name that is no
    parameter.
    """
    cls = parameters_for(f"notebooks/{notebook}")
    parameters = cls.from_notebook(namespace)
    if parameters.run or load is None:
        return parameters
    return cls(**parameters.model_dump() | {"run": load().trained[0].key})


def parameter_names(cls: type[Parameters]) -> frozenset[str]:
    """The names under which a class takes its parameters."""
    return frozenset(cls.fields())


def stored_parameters(kind: str, notebook: str, values: Mapping[str, Any]) -> NotebookParameters:
    """Parameters as a run stores them, which were checked when it was planned."""
    return _stored_class(kind, notebook, frozenset(values))(**values)


@functools.lru_cache(maxsize=64)
def _stored_class(kind: str, notebook: str, names: Iterable[str]) -> type[NotebookParameters]:
    return _class(kind, notebook, dict.fromkeys(names, (Any, None)))


@functools.lru_cache(maxsize=64)
def _of_cell(path: Path, changed: int) -> type[NotebookParameters]:
    paper = path.parent.name if path.parent.parent.name == "papers" else ""
    notebook = path.relative_to(project_folder()).as_posix()
    return _class(f"{paper}_{path.stem}".lstrip("_"), notebook, _parameters_cell(path))


def _class(kind: str, notebook: str, cell: Mapping[str, tuple[Any, Any]]) -> type[NotebookParameters]:
    fields: dict[str, Any] = {}
    if "results" not in cell:
        fields["results"] = (str, Field("results", min_length=1, exclude=True))
    for name, (kind_of_value, default) in cell.items():
        # A notebook may call a parameter what every class has for itself, such as `kind` or `json`.
        free = f"{name}_" if name != "results" and hasattr(Parameters, name) else name
        fields[free] = (Annotated[kind_of_value, BeforeValidator(_plain)], Field(default, alias=name))
    cls = create_model(f"Parameters of {kind}", __base__=NotebookParameters, **fields)
    cls.kind, cls.notebook = kind, notebook
    return cls


def _parameters_cell(notebook: Path) -> dict[str, tuple[Any, Any]]:
    """Name → (type, default) of each assignment in the cell that is tagged `parameters`."""
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
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections.abc", "__future__"):
            continue  # what annotations need
        try:
            name, value = _assignment(node)
        except ValueError:
            raise ParameterError(
                f"{notebook.name}: line {node.lineno} of the parameters cell is no plain 'name = value': "
                f"{ast.unparse(node)[:80]}"
            ) from None
        found[name] = (_type_of(value, getattr(node, "annotation", None)), value)
    return found


def _assignment(node: ast.stmt) -> tuple[str, Any]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    if not isinstance(node, ast.Assign | ast.AnnAssign) or len(targets) > 1 or node.value is None:
        raise ValueError
    if not isinstance(targets[0], ast.Name) or targets[0].id.startswith("_"):
        raise ValueError
    return targets[0].id, _plain(ast.literal_eval(node.value))


def _type_of(default: Any, annotation: ast.expr | None) -> Any:
    if annotation is not None and (named := _annotated(annotation)) is not None:
        return named | None if default is None else named
    if default is None:
        return Any
    if isinstance(default, list):
        kinds = {type(item) for item in default}
        only = float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else None
        return list[_TYPES.get(only, Any)]
    return _TYPES[type(default)]


def _annotated(hint: ast.expr) -> Any:
    """The type that an annotation names, such as `int | None` or `Optional[list[float]]`; None for another."""
    if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
        hint = hint.value
    text = hint if isinstance(hint, str) else ast.unparse(hint)
    try:
        if any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(text))):
            return None
        return eval(text, {"__builtins__": {}}, _NAMES)
    except (SyntaxError, NameError, TypeError, AttributeError):
        return None


def _plain(value: Any) -> Any:
    """A value as JSON has it, tuples as lists. Raises ValueError for anything but text, finite numbers and the like."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict() if all(isinstance(name, str) for name in value):
            return {name: _plain(item) for name, item in value.items()}
    raise ValueError("only text, finite numbers, true/false, null, lists and mappings")
