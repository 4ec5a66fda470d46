"""What a full reproduction of a paper holds, item by item, and which cell of the book makes each.

`checklist.yaml` in a paper's folder lists the items. A cell that makes one carries the tag `item-PAPER-ID`; an item
that no cell makes says why, and one that the book makes in part only says what it takes the profile `full` of
the grid for.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.study.run_key import project_folder
from cxrkit.yaml_files import read_yaml

__all__ = ["items", "made_by", "page", "problems", "table"]

_TAG = re.compile(r"^item-(?P<paper>[a-z]+)-(?P<id>[a-z0-9_]+)$")
_FIELDS = {"id", "item", "why", "full", "note"}


def items(paper: str) -> pd.DataFrame:
    """The items of a paper: id, item, why (it can't be made; empty where it is), full (what of it only the profile
    `full` makes; empty where the book makes all), note (on how ours differs).

    Raises ParameterError for an unknown paper, and for an item without id and text or with other fields.
    """
    path = project_folder() / "notebooks" / "papers" / paper / "checklist.yaml"
    if not path.is_file():
        raise ParameterError(f"paper {paper!r} has no checklist at notebooks/papers/{paper}/checklist.yaml")
    rows = read_yaml(path)
    for place, row in enumerate(rows, start=1):
        if not {"id", "item"} <= set(row) <= _FIELDS:
            known = f"use {sorted(_FIELDS)}, id and item always"
            raise ParameterError(f"notebooks/papers/{paper}/checklist.yaml, item {place}: has {sorted(row)}; {known}")
    return pd.DataFrame(rows, columns=["id", "item", "why", "full", "note"]).fillna("")


def made_by() -> dict[tuple[str, str], list[str]]:
    """The pages (paths in the project) whose cells make an item, by (paper, id)."""
    found: dict[tuple[str, str], list[str]] = {}
    project = project_folder()
    for path in sorted(
        [*project.glob("notebooks/**/*.ipynb"), *project.glob("notebooks/**/*.md"), *project.glob("book/**/*.md")]
    ):
        for tag in _tags(path):
            if match := _TAG.match(tag):
                listed = found.setdefault((match["paper"], match["id"]), [])
                listed += [page for page in [path.relative_to(project).as_posix()] if page not in listed]
    return found


def _tags(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return [tag for cell in nbformat.reads(text, 4).cells for tag in cell.metadata.get("tags", [])]
    lines = re.findall(r"^```\{code-cell\}[^\n]*\n:tags: \[(.*)\]$", text, re.MULTILINE)
    return [tag.strip().strip("\"'") for line in lines for tag in line.split(",")]


def problems(paper: str) -> list[str]:
    """What is wrong between a paper's list and the cells: items neither made nor explained, explained though made, left
    to the profile `full` though never made, listed twice, and tags that no list knows."""
    listed, made = items(paper), {name: pages for (of, name), pages in made_by().items() if of == paper}
    found = [f"{paper}: {name!r} is listed twice" for name in listed["id"][listed["id"].duplicated()]]
    for row in listed.itertuples():
        if row.id in made and row.why:
            found.append(f"{paper}: {row.id!r} is made by {made[row.id]}, yet the list says why it can't be")
        if row.why and row.full:
            found.append(f"{paper}: {row.id!r} can't be made and is made by the profile `full`: say one of them")
        if row.id not in made and not row.why:
            found.append(f"{paper}: {row.id!r} is made by no cell tagged item-{paper}-{row.id}, and nothing says why")
    return found + [
        f"{paper}: a cell is tagged {name!r}, which is not in the list" for name in set(made) - {*listed["id"]}
    ]


def table(paper: str) -> pd.DataFrame:
    """A row per item: ✓ (made), ◐ (whole with the profile `full` only) or –, the item, the pages that make it, and the
    reason or the note."""
    made = made_by()
    rows = []
    for row in items(paper).itertuples():
        pages = made.get((paper, row.id), [])
        mark = "–" if not pages else "◐" if row.full else "✓"
        remark = row.why or "; ".join(text for text in (row.full, row.note) if text)
        rows.append({"": mark, "item": row.item, "pages": pages, "remark": remark})
    return pd.DataFrame(rows)


def page(paper: str) -> str:
    """The table as Markdown for `notebooks/papers/PAPER/checklist.md`, with links to the pages."""
    frame = table(paper)
    made, partly = (int((frame[""] == mark).sum()) for mark in "✓◐")
    told = f"{made} of {len(frame)} items are made; "
    told += f"{partly} (◐) are whole in the profile `full` of the grid only; " if partly else ""
    lines = [f"{told}of the others, the last column says why.", ""]
    lines += ["| | item | made in | remark |", "|---|---|---|---|"]
    for row in frame.to_dict("records"):
        links = ", ".join(f"[{Path(one).stem}](../../../{one})" for one in row["pages"])
        cells = (row[""], row["item"], links, row["remark"])
        lines.append("| " + " | ".join(" ".join(str(cell).split()).replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)
