"""Tables as people write them: read strictly, every problem with its file and line; and boxes checked against images.

A loader calls :func:`refuse` for each kind of problem. It raises, unless :func:`collecting` is on: then all are noted.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from cxrkit.errors import DataError, ParameterError

__all__ = [
    "EDGES",
    "MISSING",
    "Problem",
    "box_table",
    "collecting",
    "corner_boxes",
    "counted_from",
    "notify",
    "numbers",
    "places",
    "read_table",
    "refuse",
    "sound_rows",
    "whole_boxes",
]

EDGES = ("x_min", "y_min", "x_max", "y_max")
# Coordinates rounded or counted from 1 may overshoot the border a little; they are clipped to it.
OVERSHOOT = 1.0
# As pandas writes a missing value; "NA" may be somebody's name.
MISSING = ("", "nan", "NaN", "<NA>", "NaT", "None", "null", "NULL")
# No box of pixels is that small; shares of an image may overshoot 1 a little.
SHARE = 1.5
_SMALL = 8
_SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a source: the file, the line on which the row ends (None: the whole file), and what."""

    file: str
    line: int | None
    problem: str
    value: str = ""
    kind: str = "table"


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
    except (DataError, ParameterError) as error:
        if isinstance(error, ParameterError) and not found:
            raise  # an option that is wrong whatever the tables hold
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


def notify(source: str, path: Path, notices: Sequence[str]) -> None:
    """Give notices about a source's tables in one UserWarning; within :func:`collecting` they are noted instead."""
    collected = _collected.get()
    if collected is not None:
        collected.extend(Problem(str(path), None, text, kind="notice") for text in notices)
    elif notices:
        warnings.warn(f"{source}, {path}: " + "\n  ".join(notices), UserWarning, stacklevel=5)


def places(column: pd.Series, wrong: pd.Series | np.ndarray) -> list[tuple[int, str]]:
    """Where ``wrong`` holds: line and value. The index of ``column`` holds the lines, as :func:`read_table` sets it."""
    return [(line, repr(value)) for line, value in column[np.asarray(wrong, dtype=bool)].items()]


def sound_rows(
    path: Path, rows: pd.DataFrame, problems: Mapping[str, tuple[pd.Series, pd.Series | np.ndarray]]
) -> pd.DataFrame:
    """The rows without a problem; each one is refused. ``problems``: name -> column to quote, and where it holds."""
    for problem, (column, wrong) in problems.items():
        refuse(path, problem, places(column, wrong))
    return rows[~np.any([np.asarray(wrong, dtype=bool) for _, wrong in problems.values()], axis=0)]


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """A table as text, cells stripped; its index holds the line of the file on which each row ends.

    Cells are separated by commas, or by the semicolons, tabs or bars that the header has instead; empty cells at the
    end of a row need not be there. Columns are found whatever the case and the signs between words: "Image ID" is
    image_id. The file may be compressed (.gz, .zip). Raises DataError for a file that is not UTF-8, not a table, lacks
    a ``required`` column, names one twice, or has rows whose number of cells differs from the header's.
    """
    written, rows, lines = _rows(path, required)
    header = _known_names(written, [*required, *optional])
    missing = [column for column in required if column not in header]
    if missing:
        others = [column for column in header if column not in required]
        raise DataError(f"{path}: lacks the columns {missing}; it has {written}{_cure(missing, others)}")
    named = [column for column in header if column]
    if len(set(named)) != len(named):
        raise DataError(f"{path}: a column name occurs twice in {header}")
    least = max(place for place, column in enumerate(header, 1) if column)
    even = [len(row) >= least and not any(row[len(header) :]) for row in rows]
    cells = [f"{len(row)} cells, not {least}" for row in rows]
    wrong = [place for place, fits in enumerate(even) if not fits]
    refuse(path, "the number of cells differs from the header's", [(lines[place], cells[place]) for place in wrong])
    # As Python's own text: pandas steps through its own several times as slowly.
    rows = [(row + [""] * len(header))[: len(header)] for row in rows]
    columns = [column or f"column {place}" for place, column in enumerate(header, 1)]
    table = pd.DataFrame(rows, lines, columns, dtype=object)[np.array(even, dtype=bool)]
    return table.drop(columns=[name for name in columns if name not in header and not any(table[name])])


def _rows(path: Path, required: Sequence[str]) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows below it, and the line on which each of these ends."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = archive.read(archive.namelist()[0])
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                content = file.read()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} can't be read"
        raise DataError(f"{path}: is not UTF-8 text ({where}); save it as CSV in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    told = re.fullmatch(r"sep=(.)\s*", first)  # what a spreadsheet puts above the header
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter=told[1] if told else _delimiter(first, required)
    )
    try:
        rows = [(list(map(str.strip, row)), reader.line_num) for row in reader if any(row)][1 if told else 0 :]
    except csv.Error as error:
        raise DataError(f"{path}: is not a comma-separated table ({error})") from None
    if not rows:
        raise DataError(f"{path}: is empty; expected a header with {', '.join(required)}")
    return rows[0][0], [row for row, _ in rows[1:]], [line for _, line in rows[1:]]


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _known_names(header: list[str], known: Sequence[str]) -> list[str]:
    """The header with known names as they are wanted, where the table has just one column of their letters."""
    for name in known:
        alike = [place for place, column in enumerate(header) if _letters(column) == _letters(name)]
        if name not in header and len(alike) == 1 and header[alike[0]] not in known:
            header = [*header[: alike[0]], name, *header[alike[0] + 1 :]]
    return header


def _cure(missing: list[str], header: list[str]) -> str:
    if set(missing) & set(EDGES) and {"w", "width"} & set(map(_letters, header)):
        return "; from a corner and a size make x_min = x, y_min = y, x_max = x + width, y_max = y + height"
    told = ""
    for name in missing:
        wanted, letters = _letters(name), {_letters(column): column for column in header}
        like = [column for of, column in letters.items() if wanted in of or (len(of) > 3 and of in wanted)]
        like += [letters[of] for of in difflib.get_close_matches(wanted, letters, n=1, cutoff=0.7)]
        told += f"; is {like[0]!r} meant to be {name!r}?" if like else ""
    return told


def _delimiter(header: str, required: Sequence[str]) -> str:
    """The sign between the cells of a header: a comma, unless only another finds all required columns."""
    wanted = {_letters(name) for name in required}
    found = (sign for sign in ",;\t|" if wanted <= set(map(_letters, header.split(sign))))
    return next(found, ",")


def numbers(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64; cells that are no finite number are refused."""
    values = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
    wrong = places(table[column], ~np.isfinite(values))
    comma = any(re.fullmatch(r"'-?\d+,\d+'", value) for _, value in wrong)
    refuse(path, f"{column} is not a number" + (" (12,5 is written 12.5)" if comma else ""), wrong)
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


def box_table(
    image_ids: Sequence[str], labels: str | Sequence[str], edges: np.ndarray, reader: str | Sequence[str]
) -> pd.DataFrame:
    """Boxes as ``Dataset.boxes`` has them, of edges ``[M, 4]``; with the index of ``image_ids``, where it has one."""
    boxes = pd.DataFrame(np.asarray(edges, dtype=float).reshape(-1, 4), columns=list(EDGES))
    if isinstance(image_ids, pd.Series):
        boxes.index = image_ids.index
    boxes.insert(0, "image_id", image_ids)
    boxes.insert(1, "label", labels)
    boxes["reader"] = reader
    return boxes


def corner_boxes(path: Path, rows: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Edges ``[M, 4]`` of boxes that a table gives as x, y, width and height, in columns of these names."""
    x, y, width, height = (numbers(path, rows, column) for column in columns)
    return np.column_stack([x, y, x + width, y + height])


def whole_boxes(
    path: Path, boxes: pd.DataFrame, limits: np.ndarray, originals: np.ndarray | None = None
) -> pd.DataFrame:
    """Boxes clipped to their images; refused where they lie outside by more than one pixel, have no area, or are
    written in shares of the image.

    ``boxes``: columns image_id, x_min, y_min, x_max, y_max (numbers), lines as index; ``limits``: ``[M, 2]``, width and
    height of each box's image, in the same pixels; ``originals``: those before it was reduced. Where problems are
    collected, refused boxes are left out.
    """
    low, high = boxes[["x_min", "y_min"]].to_numpy(), boxes[["x_max", "y_max"]].to_numpy()

    def inside(frame: np.ndarray) -> np.ndarray:
        return ((low >= -OVERSHOOT) & (high <= frame + OVERSHOOT)).all(axis=1)

    shares = (high <= SHARE).all(axis=1) & (low >= -SHARE).all(axis=1) & (limits > _SMALL).all(axis=1)
    outside = ~shares & ~inside(limits)
    clipped = low.clip(0, limits), high.clip(0, limits)
    empty = ~shares & ~outside & ~(clipped[1] > clipped[0]).all(axis=1)
    frames = {"x and y seem swapped": limits[:, ::-1], "it seems to be in original pixels": originals}
    fits = [words for words, frame in frames.items() if frame is not None and inside(frame)[outside].all()]
    sums = (clipped[0] + clipped[1])[empty]
    sizes = (sums <= limits[empty] + OVERSHOOT).all() and (clipped[1][empty] > 0).all()
    ends = "x_max and y_max may be width and height, or the ends swapped" if sizes else "its ends may be swapped"
    cure = "pixels are wanted; for shares of the image multiply x by the width and y by the height"
    for problem, wrong in (
        (f"the box holds no whole pixel; {cure}", shares),
        ("the box lies outside its image" + (f"; {fits[0]}" if fits else ""), outside),
        (f"the box has no area (x_min < x_max and y_min < y_max are needed; {ends})", empty),
    ):
        refuse(path, problem, _box_places(boxes, limits, wrong))
    boxes = boxes.copy()
    boxes[["x_min", "y_min"]], boxes[["x_max", "y_max"]] = clipped
    return boxes[~shares & ~outside & ~empty]


def counted_from(boxes: pd.DataFrame, limits: np.ndarray) -> str:
    """A notice about whole-numbered boxes that seem counted from 1, or to include their last pixel; empty: none.

    ``boxes``, ``limits``: as in :func:`whole_boxes`, which would clip the boxes.
    """
    low, high = boxes[["x_min", "y_min"]].to_numpy(), boxes[["x_max", "y_max"]].to_numpy()
    if not len(boxes) or (low % 1).any() or (high % 1).any():
        return ""
    beyond, last, touch = ((high == limits + more).any(axis=1).sum() for more in (1, -1, 0))
    if beyond:
        sign = f"{beyond} of {len(boxes)} boxes end one pixel beyond their image and are clipped, as if counted from 1"
    elif touch and (low == 1).any() and not (low == 0).any():
        sign = f"no box begins at 0, some at 1, and {touch} end at the border, as if counted from 1"
    elif last and not (high >= limits).any():
        sign = f"{last} of {len(boxes)} boxes end at the last pixel, none at the border, as if they included it"
    else:
        return ""
    return f"{sign}; boxes are half-open and counted from 0: x_min = 0 and x_max = width cover the whole image"


def _box_places(boxes: pd.DataFrame, limits: np.ndarray, wrong: np.ndarray) -> list[tuple[int, str]]:
    rows = boxes.loc[wrong, ["image_id", *EDGES]].itertuples(name=None)
    return [
        (line, repr(f"{image_id}: {x_min:g}, {y_min:g}, {x_max:g}, {y_max:g} in {width:g} x {height:g}"))
        for (line, image_id, x_min, y_min, x_max, y_max), (width, height) in zip(rows, limits[wrong], strict=True)
    ]
