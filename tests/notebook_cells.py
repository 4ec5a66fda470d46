"""Runs the code cells of a notebook in this process, so that tests can look at what they define."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run_cells(name: str, last: str = "", **parameters: Any) -> dict[str, Any]:
    """The names that the code cells of `notebooks/NAME.ipynb` leave, up to the cell with the id `last` (empty: all).

    `parameters` replace those of the cell tagged `parameters`, and what a cell displays is collected in "_displayed".
    """
    shown: list[Any] = []
    known = vars(builtins) | {"display": shown.append}
    names: dict[str, Any] = {"__name__": name, "__builtins__": known, "_displayed": shown}
    for cell in _code_cells(name):
        exec(compile("".join(cell["source"]), f"{name}, cell {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
        if cell["id"] == last:
            break
    return names


def run_cell(name: str, number: str, **names: Any) -> dict[str, Any]:
    """The names that one code cell leaves, found by its id; `names` are those that it needs."""
    (source,) = ["".join(cell["source"]) for cell in _code_cells(name) if cell["id"] == number]
    exec(compile(source, f"{name}, cell {number}", "exec"), names)
    return names


def _code_cells(name: str) -> list[dict[str, Any]]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]
