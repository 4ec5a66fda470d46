"""The papers' tables as printed, kept with the book in `book/papers`."""

from __future__ import annotations

import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.study.run_key import project_folder

__all__ = ["scalars", "table"]


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
