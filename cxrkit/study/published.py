"""The papers, a folder each under `notebooks/papers`, and their tables as printed."""

from __future__ import annotations

import re

import pandas as pd

from cxrkit.errors import ParameterError, meant
from cxrkit.project import project_folder

__all__ = ["citation", "papers", "scalars", "table", "title"]


def papers() -> tuple[str, ...]:
    """The keys of the papers: the folders that hold a `paper.md`, in the order of the book's table of contents."""
    project = project_folder()
    contents = project / "_toc.yml"
    text = contents.read_text(encoding="utf-8") if contents.is_file() else ""
    keys = sorted(path.parent.name for path in (project / "notebooks" / "papers").glob("*/paper.md"))
    return tuple(sorted(keys, key=lambda key: text.find(f"papers/{key}/") % (len(text) + 1)))


def title(paper: str) -> str:
    """The title of a paper's page."""
    text = (project_folder() / "notebooks" / "papers" / paper / "paper.md").read_text(encoding="utf-8")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def citation(paper: str) -> str:
    """The key of a paper in the book's bibliography: the first that its page cites."""
    text = (project_folder() / "notebooks" / "papers" / paper / "paper.md").read_text(encoding="utf-8")
    return re.search(r"\{cite:\w+\}`([^`,]+)", text)[1]


def table(name: str) -> pd.DataFrame:
    """A published table as printed, such as "bcos/tab1_rsna_classification"; ParameterError for an unknown one."""
    paper, _, title = name.partition("/")
    folder = project_folder() / "notebooks" / "papers" / paper / "published"
    path = folder / f"{title}.csv"
    if not path.is_file():
        known = [f"{paper}/{file.stem}" for file in sorted(folder.glob("*.csv"))]
        raise ParameterError(f"there is no published table {name!r}; {meant(name, known or papers())}")
    return pd.read_csv(path)


def scalars(paper: str) -> pd.Series:
    """The single numbers that a paper's text gives, by key, as text: `float(scalars("covid")["threshold"])`."""
    return table(f"{paper}/scalars").set_index("key")["value"].astype(str)
