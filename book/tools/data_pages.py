"""A page of the book for each source, made from its manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxrkit.data import sources
from cxrkit.markdown import escaped

__all__ = ["NOTICE", "page", "write_pages"]

NOTICE = """```{admonition} Not a medical device
:class: warning
Nothing here is for clinical use. cxrkit contains no images of this set and sends none anywhere.
```"""
_MADE = "% Made from data_manifests/{name}.yaml by book/tools/data_pages.py; change the manifest, not this page.\n"
# In the order of a page.
_HEADINGS = {
    "licence": "Terms",
    "cite": "Cite",
    "get": "How to get it",
    "files": "What the folder holds",
    "tables": "Tables",
    "labels": "Labels",
    "hierarchy": "Hierarchy of the labels",
    "boxes": "Boxes and outlines",
    "counts": "Published counts",
    "splits": "Splits",
    "traps": "Known traps",
    "options": "Options of `cxrkit.data.load`",
    "checksums": "Checksums",
}


def page(name: str) -> str:
    """The page of one source as MyST Markdown; keys of its manifest without a heading of ours keep their name."""
    card = dict(sources()[name])
    parts = [
        f"(data-{name.replace('_', '-')})=\n# {_text(card.pop('title'))}\n",
        _text(card.pop("description", "")),
        NOTICE,
    ]
    parts.append(f"The name in code is `{name}`.")
    keys = [*(key for key in _HEADINGS if key in card), *(key for key in card if key not in _HEADINGS)]
    for key in keys:
        heading = _HEADINGS.get(key, key.replace("_", " ").capitalize())
        parts.append(f"## {heading}\n\n{_block(key, card[key])}")
    return _MADE.format(name=name) + "\n\n".join(part.strip() for part in parts if part) + "\n"


def write_pages(folder: Path) -> list[Path]:
    """Write the page of every source that has a manifest into ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, card in sources().items():
        if "description" in card:
            path = folder / f"{name}.md"
            path.write_text(page(name), encoding="utf-8", newline="\n")
            written.append(path)
    return written


def _block(key: str, value: Any) -> str:
    if key == "files" and isinstance(value, list):
        rows = [
            (f"`{entry['path']}`", _text(entry.get("what", "")), "yes" if entry.get("optional") else "")
            for entry in value
        ]
        return _table(("path", "what it holds", "optional"), rows)
    if isinstance(value, Mapping):
        return _table(("name", "what"), list(_pairs(value))) if value else "None."
    if isinstance(value, list):
        mark = (lambda place: f"{place}. ") if key == "get" else (lambda place: "- ")
        return "\n".join(mark(place) + _text(entry) for place, entry in enumerate(value, 1))
    return _text(value)


def _pairs(value: Mapping[str, Any], before: str = ""):
    """Rows (name, text) of a nested mapping; names of inner ones are joined."""
    for name, entry in value.items():
        called = f"{before}, {name}" if before else str(name)
        if isinstance(entry, Mapping):
            yield from _pairs(entry, called)
        else:
            yield _code(called), _text(entry)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def _text(value: Any) -> str:
    """One line of prose. What looks like markup in a manifest is text: it may hold names of files and labels."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}".replace(",", " ")
    line = " ".join(str(value).split())
    pieces = re.split(r"(`[^`]*`)", line)  # code stays as it is
    return "".join(piece if piece.count("`") > 1 else escaped(piece) for piece in pieces)


def _code(text: str) -> str:
    return text if " " in text or "," in text else f"`{text}`"
