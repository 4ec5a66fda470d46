"""Runs a notebook's cells in the process of a test, which can then look at what they define."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def names_of(notebook: str, **parameters: Any) -> dict[str, Any]:
    """The names that a notebook under `notebooks` defines, with these parameters set below its parameters cell."""
    cells = json.loads((NOTEBOOKS / notebook).read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"In": ["", "parameters", "these"], "display": lambda shown: None}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
    return names
