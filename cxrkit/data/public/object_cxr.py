"""Object-CXR: chest radiographs with and without foreign objects, each outlined as rectangle, ellipse or polygon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import MISSING, choose, find_folder, images_in, keep_present
from cxrkit.data.readers import image_size
from cxrkit.data.tables import box_table, places, read_table, refuse
from cxrkit.errors import DataError

__all__ = ["LABEL", "Outlines", "load_object_cxr", "outline_mask"]

LABEL = "foreign object"
PARTS = {"train": "train", "dev": "validation", "test": "test"}
# The published tables say image_name, the published description image_path.
NAMES = ("image_name", "image_path")
RECTANGLE, ELLIPSE, POLYGON = "0", "1", "2"

Shape = tuple[str, np.ndarray]


def load_object_cxr(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    split_by: str = "official",
    missing: str = "refuse",
) -> Dataset:
    """Object-CXR from train.csv, dev.csv and, where it is there, test.csv, with the folders train, dev and test.

    One label, "foreign object". ``truth`` is the union of the shapes, exact at the file's pixels; a box bounds each
    shape. ``split_by``: "official" (train.csv trains, dev.csv validates, test.csv tests) or "patients" (five folds
    of our own; no patient ids are published, so each image counts as a patient). ``missing``: "refuse", or
    "leave_out" for a partial download. ``seed`` is not used. Raises DataError naming file and line. Source: paper
    `normgrad`, section on data.
    """
    choose("split_by", split_by, ("official", "patients"))
    choose("missing", missing, MISSING)
    root = find_folder(root, "train.csv", "dev.csv")
    tables = [(part, root / f"{part}.csv") for part in PARTS if (root / f"{part}.csv").is_file()]
    read = [_read_part(root, part, path, missing) for part, path in tables]
    table = pd.concat([part for part, _ in read], ignore_index=True)
    shapes = [shape for _, shapes in read for shape in shapes]
    if table.empty:
        raise DataError(f"{root}: its tables name no image")
    table[LABEL] = [float(bool(outlines)) for outlines in shapes]
    if split_by == "patients":
        table = table.drop(columns="split")
    truth = Outlines(table["path"].tolist(), shapes)
    boxes = _boxes(table, shapes)
    return file_dataset("object_cxr", (LABEL,), table, boxes, size, preprocessing, truth=truth)


@dataclass(frozen=True)
class Outlines:
    """The exact mask of each row: bool ``[1, H, W]`` on the file's own grid."""

    paths: list[str]
    shapes: list[list[Shape]]

    def __call__(self, row: int) -> np.ndarray:
        return outline_mask(self.shapes[row], *image_size(self.paths[row]))[None]


def _read_part(root: Path, part: str, path: Path, missing: str) -> tuple[pd.DataFrame, list[list[Shape]]]:
    raw = read_table(path, ("annotation",))
    column = next((name for name in NAMES if name in raw.columns), None)
    if column is None:
        raise DataError(f"{path}: lacks a column {' or '.join(NAMES)}; it has {list(raw.columns)}")
    # The table may give paths; the images of a part are in one folder.
    names = raw[column].str.replace("\\", "/", regex=False).str.rsplit("/", n=1).str[-1]
    refuse(path, f"{column} is empty", places(raw[column], names == ""))
    refuse(path, f"{column} occurs twice", places(names, names.duplicated()))
    good = (names != "") & ~names.duplicated()
    shapes, readable = _read_annotations(path, raw["annotation"])
    files = images_in(root / part)
    here = names.map(files)
    keep = keep_present("object_cxr", path, names, here.notna().to_numpy(), missing) & good.to_numpy() & readable
    names, here = names[keep], here[keep]
    image_ids = part + "/" + names.str.rsplit(".", n=1).str[0]
    table = pd.DataFrame({"image_id": image_ids, "patient_id": image_ids, "path": here, "split": PARTS[part]})
    return table, [outlines for outlines, kept in zip(shapes, keep, strict=True) if kept]


def _read_annotations(path: Path, column: pd.Series) -> tuple[list[list[Shape]], np.ndarray]:
    """The shapes of each row, and which rows are sound. ``0 x1 y1 x2 y2;2 x1 y1 x2 y2 x3 y3``; empty for none."""
    shapes: list[list[Shape]] = []
    wrong: dict[str, list[tuple[int, str]]] = {}
    readable = np.ones(len(column), dtype=bool)
    for row, (line, cell) in enumerate(column.items()):
        found = []
        for text in filter(None, (piece.strip() for piece in cell.split(";"))):
            shape, problem = _read_shape(text)
            if problem:
                wrong.setdefault(problem, []).append((line, repr(text[:60])))
                readable[row] = False
            else:
                found.append(shape)
        shapes.append(found)
    for problem, where in wrong.items():
        refuse(path, problem, where)
    return shapes, readable


def _read_shape(text: str) -> tuple[Shape | None, str]:
    """A shape, or what is wrong with it."""
    kind, *words = text.split()
    try:
        points = np.array(words, dtype=np.float64)
    except ValueError:
        points = np.array([np.nan])
    if not np.isfinite(points).all():
        return None, "the annotation holds a coordinate that is no number"
    if kind not in (RECTANGLE, ELLIPSE, POLYGON):
        return None, "the shape is none of 0 (rectangle), 1 (ellipse), 2 (polygon)"
    if kind != POLYGON and len(points) != 4:
        return None, "a rectangle or ellipse needs four coordinates"
    if kind == POLYGON and (len(points) < 6 or len(points) % 2):
        return None, "a polygon needs at least three pairs of coordinates"
    points = points.reshape(-1, 2)
    if (np.ptp(points, axis=0) <= 0).any():
        return None, "the shape has no area"
    if (points.max(axis=0) <= 0).any():
        return None, "the shape lies outside its image"
    return (kind, points), ""


def _boxes(table: pd.DataFrame, shapes: Sequence[Sequence[Shape]]) -> pd.DataFrame:
    corners = [(*points.min(axis=0), *points.max(axis=0)) for outlines in shapes for _, points in outlines]
    image_ids = np.repeat(table["image_id"].to_numpy(), [len(outlines) for outlines in shapes])
    return box_table(image_ids, LABEL, np.array(corners).reshape(-1, 4).clip(0), "object-CXR")


def outline_mask(shapes: Sequence[Shape], width: int, height: int) -> np.ndarray:
    """The union of shapes on a grid: bool ``[height, width]``; a pixel is inside when its centre is.

    ``shapes``: pairs of type ("0" rectangle, "1" ellipse, "2" polygon) and points ``[P, 2]`` as x, y; a rectangle and
    an ellipse are given by two opposite corners of their bounding box. A shape within the image that holds no
    pixel's centre gets the pixel under its middle, so that no object vanishes.
    """
    mask = np.zeros((height, width), dtype=bool)
    for kind, points in shapes:
        low, high = points.min(axis=0), points.max(axis=0)
        # Only the pixels under the bounding box need a look: objects are small, radiographs are not.
        x0, y0 = (int(value) for value in np.floor(low).clip(0, (width, height)))
        x1, y1 = (int(value) for value in np.ceil(high).clip(0, (width, height)))
        inside = _inside(kind, points, np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
        if inside.size and not inside.any():
            x, y = ((low + high) / 2).clip(0, (width - 1, height - 1)).astype(int)
            mask[y, x] = True
        mask[y0:y1, x0:x1] |= inside
    return mask


def _inside(kind: str, points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the positions (x across, y down) lie within one shape: bool ``[len(y), len(x)]``."""
    low, high = points.min(axis=0), points.max(axis=0)
    if kind == RECTANGLE:
        return ((low[1] <= y) & (y < high[1]))[:, None] & ((low[0] <= x) & (x < high[0]))[None, :]
    if kind == ELLIPSE:
        across, down = (((position - middle) / half) ** 2 for position, middle, half in zip(
            (x, y), (low + high) / 2, (high - low) / 2, strict=True
        ))  # fmt: skip
        return down[:, None] + across[None, :] <= 1
    inside = np.zeros((len(y), len(x)), dtype=bool)
    # Even-odd rule: a ray to the right crosses the outline an odd number of times.
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        rows = (ay <= y) != (by <= y)
        crossing = ax + (y[rows] - ay) * (bx - ax) / (by - ay)
        inside[rows] ^= x[None, :] < crossing[:, None]
    return inside
