"""Tables that are kept with the book: the papers' as printed (`book/papers`), and ours of a few real images."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.study.keys import project_folder

__all__ = ["demonstration", "scalars", "table"]


def table(name: str) -> pd.DataFrame:
    """A published table as printed. Raises ParameterError naming those that are there."""
    folder = project_folder() / "book" / "papers"
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise ParameterError(f"there is no paper table {name!r}; known: {known}")
    return pd.read_csv(path)


def scalars(paper: str) -> pd.Series:
    """The single numbers that a paper's text gives, by key, as text: `float(scalars("covid")["threshold"])`."""
    return table(f"{paper}_scalars").set_index("key")["value"].astype(str)


def demonstration(paper: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A small table from a few real images, measured once (`book/results`), and its card: source, licence, images,
    patients, networks, epochs, seeds, version, commit, date. Raises ParameterError where there is none."""
    path = project_folder() / "book" / "results" / f"{paper}_real.csv"
    if not path.is_file():
        raise ParameterError(f"book/results/{path.name} is missing; it is part of the project")
    return pd.read_csv(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
