"""The loader that all public sources share: options, images that are not there, and the dataset."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.tables import places, refuse
from cxrkit.errors import DataError, ParameterError

__all__ = ["Missing", "first_problem", "present", "public_loader", "read_json", "with_labels"]

Missing = Literal["refuse", "leave_out"]


def public_loader(tables: Callable[..., dict[str, Any]]) -> Callable[..., Dataset]:
    """The loader of a source, given the function that reads its tables and finds its files.

    ``tables(root, **options)`` returns what :func:`cxrkit.data.files.file_dataset` takes, by name; it is given ``seed``
    and ``preprocessing`` where it asks for them. The loader takes these, ``size`` and the same options, and raises
    ParameterError for a value that the ``Literal`` of an option does not list. ``split_by="patients"`` leaves the split
    of the source out: :func:`cxrkit.data.load` then makes folds.
    """
    own = inspect.signature(tables).parameters
    hints = get_type_hints(tables)
    choices = {option: get_args(hint) for option, hint in hints.items() if get_origin(hint) is Literal}
    name = tables.__name__.removeprefix("load_")

    @functools.wraps(tables)
    def load(
        root: str | Path, *, size: int = 224, seed: int = 0, preprocessing: Preprocessing = SQUASH, **options: Any
    ) -> Dataset:
        for option, known in choices.items():
            if options.get(option, known[0]) not in known:
                raise ParameterError(f"{option}={options[option]!r} is unknown; use one of {list(known)}")
        common = {"seed": seed, "preprocessing": preprocessing}
        options |= {option: value for option, value in common.items() if option in own}
        found = {"boxes": None, "preprocessing": preprocessing} | tables(root, **options)
        if "split_by" in own and options.get("split_by", own["split_by"].default) == "patients":
            found["table"] = found["table"].drop(columns="split", errors="ignore")
        return file_dataset(name, size=size, **found)

    shared = list(inspect.signature(load, follow_wrapped=False).parameters.values())[1:-1]
    added = [parameter for parameter in shared if parameter.name not in own]
    load.__signature__ = inspect.Signature([*own.values(), *added])
    return load


def present(path: Path, table: pd.DataFrame, missing: str, written: str = "image_id") -> pd.DataFrame:
    """The rows of ``table`` whose column ``path`` names a file.

    ``path``: the table that the user has, whose lines are the index; ``written``: the column to quote from it. Absent
    files are refused (``missing="refuse"``), or left out with a UserWarning that counts them ("leave_out").
    """
    there = table["path"].notna()
    if there.all():
        return table
    if missing == "refuse":
        refuse(path, "file does not exist (missing='leave_out' loads the others)", places(table[written], ~there))
    elif not there.any():
        raise DataError(f"{path}: none of its {len(table)} images is in the folder")
    else:
        left_out = f"{(~there).sum()} of {len(table)} images named in {path}"
        warnings.warn(f"{left_out} are not there and are left out", UserWarning, stacklevel=4)
    return table[there]


def with_labels(table: pd.DataFrame, labels: Sequence[str], targets: Any) -> pd.DataFrame:
    """``table`` with one column of 0, 1 or NaN a label; ``targets``: ``[N, L]``."""
    return pd.concat([table, pd.DataFrame(targets, table.index, list(labels), dtype="float32")], axis=1)


def read_json(path: Path, kind: Any, wanted: str) -> Any:
    """A JSON file as pydantic reads it into ``kind``. Raises DataError naming the file, the place and ``wanted``."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    except ValidationError as error:
        raise DataError(f"{path}: is not {wanted}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Where the first problem is, and what is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return "".join(f"[{step!r}]" for step in first["loc"]) + f" {first['msg']}"
