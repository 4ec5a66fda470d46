"""Tables as people write them: read strictly, every problem with its file and line; and boxes checked against images.

A loader calls :func:`refuse` for each kind of problem. It raises, unless :func:`collecting` is on: then all are noted.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from cxrkit.errors import DataError

__all__ = ["EDGES", "Problem", "collecting", "numbers", "places", "read_table", "refuse", "whole_boxes"]

EDGES = ("x_min", "y_min", "x_max", "y_max")
# Coordinates rounded or counted from 1 may overshoot the border a little; they are clipped to it.
OVERSHOOT = 1.0
_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a source: the file, the line on which the row ends (None: the whole file), and what."""

    file: str
    line: int | None
    problem: str
    value: str = ""


_collected: ContextVar[list[Problem] | None] = ContextVar("collected", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Problem]]:
    """Note problems in the list that this yields, instead of raising at the first kind.

    What ends the reading all the same (a missing table, or what follows from a noted problem) is noted as well.
    """
    found: list[Problem] = []
    token = _collected.set(found)
    try:
        yield found
    except DataError as error:
        found.append(Problem("", None, str(error)))
    except (ValueError, KeyError, IndexError, TypeError):
        if not found:  # not a consequence of what is already known: a mistake of ours, which must be seen
            raise
    finally:
        _collected.reset(token)


def refuse(path: Path, problem: str, where: Sequence[tuple[int | None, str]]) -> None:
    """Raise one DataError for all places (line, what stands there) that share a problem; nothing when there are none.

    A place in a folder, which has no lines, has line None. Within :func:`collecting` each place is noted instead, and
    the caller goes on.
    """
    if not where:
        return
    collected = _collected.get()
    if collected is not None:
        collected.extend(Problem(str(path), line, problem, what) for line, what in where)
        return
    shown = ", ".join(what if line is None else f"row on line {line} ({what})" for line, what in where[:_SHOWN])
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    raise DataError(f"{path}: {problem}: {shown}{more}")


def places(column: pd.Series, wrong: pd.Series | np.ndarray) -> list[tuple[int, str]]:
    """Where ``wrong`` holds: line and value. The index of ``column`` holds the lines, as :func:`read_table` sets it."""
    return [(line, repr(value)) for line, value in column[np.asarray(wrong, dtype=bool)].items()]


def read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """A comma-separated table as text, cells stripped; its index holds the line of the file on which each row ends.

    Raises DataError for a file that is not UTF-8, not a table, lacks a ``required`` column, names one twice, or has
    rows whose number of cells differs from the header's.
    """
    header, cells, widths, lines = _cells(path, required)
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(f"{path}: lacks the columns {missing}; it has {header}")
    if len(set(header)) != len(header):
        raise DataError(f"{path}: a column name occurs twice in {header}")
    width = len(header)
    if any(held != width for held in widths):
        uneven = zip(lines, widths, strict=True)
        where = [(line, f"{held} cells, not {width}") for line, held in uneven if held != width]
        refuse(path, "the number of cells differs from the header's", where)
        starts = np.concatenate([[0], np.cumsum(widths)])
        whole = [row for row, held in enumerate(widths) if held == width]
        cells = [cell for row in whole for cell in cells[starts[row] : starts[row + 1]]]
        lines = [lines[row] for row in whole]
    columns = {column: cells[place::width] for place, column in enumerate(header)}
    return pd.DataFrame(columns, index=lines, dtype=None if lines else object)


def _cells(path: Path, required: Sequence[str]) -> tuple[list[str], list[str], list[int], list[int]]:
    """The header, all cells below it one after the other, and of each row the number of cells and the line.

    One flat list of text, because a list a row would keep the garbage collector busy for most of the time.
    """
    cells: list[str] = []
    widths, lines = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if any(row):
                    cells.extend(map(str.strip, row))
                    widths.append(len(row))
                    lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start} can't be read)") from None
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    except csv.Error as error:
        raise DataError(f"{path}: is not a comma-separated table ({error})") from None
    if not widths:
        raise DataError(f"{path}: is empty; expected a header with {', '.join(required)}")
    return cells[: widths[0]], cells[widths[0] :], widths[1:], lines[1:]


def numbers(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64; cells that are no finite number are refused."""
    values = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
    refuse(path, f"{column} is not a number", places(table[column], ~np.isfinite(values)))
    return values.to_numpy()


def lengths(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as positive whole numbers; other cells are refused (and count as 1 where problems are collected)."""
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = ~(values > 0) | ~np.isfinite(values) | (values % 1 != 0)
    refuse(path, f"{column} is not a positive whole number", places(table[column], wrong))
    return values.where(~wrong, 1).to_numpy(dtype=int)


def leaves_folder(file: str) -> bool:
    """Whether a path named in a table would lead out of its folder."""
    # Windows' rules cover the separators and drives of both worlds.
    path = PureWindowsPath(file)
    return bool(path.anchor) or ".." in path.parts


def whole_boxes(path: Path, boxes: pd.DataFrame, limits: np.ndarray) -> pd.DataFrame:
    """Boxes clipped to their images; refused where they lie outside by more than one pixel, or have no area.

    ``boxes``: columns image_id, x_min, y_min, x_max, y_max (numbers), lines as index; ``limits``: ``[M, 2]``, width and
    height of each box's image, in the same pixels. Where problems are collected, refused boxes are left out.
    """
    low, high = boxes[["x_min", "y_min"]].to_numpy(), boxes[["x_max", "y_max"]].to_numpy()
    outside = ~((low >= -OVERSHOOT) & (high <= limits + OVERSHOOT)).all(axis=1)
    refuse(path, "the box lies outside its image", _described(boxes, limits, outside))
    low, high = low.clip(0, limits), high.clip(0, limits)
    empty = ~outside & ~(high > low).all(axis=1)
    needed = "the box has no area (x_min < x_max and y_min < y_max are needed)"
    refuse(path, needed, _described(boxes, limits, empty))
    boxes = boxes.copy()
    boxes[["x_min", "y_min"]], boxes[["x_max", "y_max"]] = low, high
    return boxes[~outside & ~empty]


def _described(boxes: pd.DataFrame, limits: np.ndarray, wrong: np.ndarray) -> list[tuple[int, str]]:
    rows = boxes.loc[wrong, ["image_id", *EDGES]].itertuples(name=None)
    return [
        (line, repr(f"{image_id}: {x_min:g}, {y_min:g}, {x_max:g}, {y_max:g} in {width:g} x {height:g}"))
        for (line, image_id, x_min, y_min, x_max, y_max), (width, height) in zip(rows, limits[wrong], strict=True)
    ]
