"""Object-CXR: chest radiographs with and without foreign objects, each outlined as rectangle, ellipse or polygon."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, images_in
from cxrkit.data.public.loader import Missing, present, public_loader
from cxrkit.data.public.outlines import ELLIPSE, POLYGON, RECTANGLE, Outlines
from cxrkit.data.tables import box_table, read_table, refuse, sound_rows
from cxrkit.errors import DataError

__all__ = ["LABEL", "load_object_cxr"]

LABEL = "foreign object"
PARTS = {"train": "train", "dev": "validation", "test": "test"}
# The published tables say image_name, the published description image_path.
NAMES = ("image_name", "image_path")


@public_loader
def load_object_cxr(
    root: str | Path, *, split_by: Literal["official", "patients"] = "official", missing: Missing = "refuse"
) -> dict[str, Any]:
    """Object-CXR from train.csv, dev.csv and, where it is there, test.csv, with the folders train, dev and test.

    One label, "foreign object". ``truth`` is the union of the shapes, exact at the file's pixels; a box bounds each
    shape. No patient ids are published, so each image counts as a patient. Options: see data_manifests/object_cxr.yaml.
    Raises DataError naming file and line. Source: paper `normgrad`, section on data.
    """
    root = find_folder(root, "train.csv", "dev.csv")
    table = pd.concat([_read_part(root, part, missing) for part in PARTS if (root / f"{part}.csv").is_file()])
    if table.empty:
        raise DataError(f"{root}: its tables name no image")
    table[LABEL] = table["shapes"].map(bool).astype(float)
    each = table[["image_id", "shapes"]].explode("shapes").dropna()
    corners = [(*points.min(axis=0), *points.max(axis=0)) for _, _, points in each["shapes"]]
    boxes = box_table(each["image_id"].tolist(), LABEL, np.array(corners).reshape(-1, 4).clip(0), "object-CXR")
    truth = Outlines((LABEL,), table["path"].tolist(), table.pop("shapes").tolist())
    return {"labels": (LABEL,), "table": table, "boxes": boxes, "truth": truth}


def _read_part(root: Path, part: str, missing: str) -> pd.DataFrame:
    path = root / f"{part}.csv"
    raw = read_table(path, ("annotation",))
    column = next((name for name in NAMES if name in raw.columns), None)
    if column is None:
        raise DataError(f"{path}: lacks a column {' or '.join(NAMES)}; it has {list(raw.columns)}")
    # The table may give paths; the images of a part are in one folder.
    name = raw[column].str.replace("\\", "/", regex=False).str.rsplit("/", n=1).str[-1]
    image_id = part + "/" + name.str.rsplit(".", n=1).str[0]
    table = pd.DataFrame({"image_id": image_id, "patient_id": image_id, "path": name.map(images_in(root / part))})
    table = table.assign(split=PARTS[part], shapes=_read_annotations(path, raw["annotation"]), name=name)
    problems = {f"{column} is empty": (name, name == ""), f"{column} occurs twice": (name, name.duplicated())}
    table = sound_rows(path, table, problems).dropna(subset="shapes")
    return present(path, table, missing, "name").drop(columns="name")


def _read_annotations(path: Path, column: pd.Series) -> list[list[tuple[str, str, np.ndarray]] | None]:
    """The shapes of each row, ``0 x1 y1 x2 y2;2 x1 y1 x2 y2 x3 y3``; empty for none, None where one is wrong."""
    shapes, wrong = [], {}
    for line, cell in column.items():
        shapes.append([])
        for text in filter(None, map(str.strip, cell.split(";"))):
            try:
                shapes[-1].append((LABEL, *_read_shape(text)))
            except ValueError as error:
                wrong.setdefault(str(error), []).append((line, repr(text[:60])))
    for problem, where in wrong.items():
        refuse(path, problem, where)
    refused = {line for where in wrong.values() for line, _ in where}
    return [None if line in refused else of_one for line, of_one in zip(column.index, shapes, strict=True)]


def _read_shape(text: str) -> tuple[str, np.ndarray]:
    """Kind and points of a shape; raises ValueError saying what is wrong with it."""
    kind, *words = text.split()
    try:
        points = np.array(words, dtype=np.float64)
    except ValueError:
        points = np.array([np.nan])
    problems = {
        "the annotation holds a coordinate that is no number": not np.isfinite(points).all(),
        "the shape is none of 0 (rectangle), 1 (ellipse), 2 (polygon)": kind not in (RECTANGLE, ELLIPSE, POLYGON),
        "a rectangle or ellipse needs four coordinates": kind != POLYGON and len(points) != 4,
        "a polygon needs at least three pairs of coordinates": len(points) % 2 or (kind == POLYGON and len(points) < 6),
        "the shape has no area": (np.ptp(points[0::2]) <= 0 or np.ptp(points[1::2]) <= 0) if len(points) > 1 else True,
        "the shape lies outside its image": (points[0::2] <= 0).all() or (points[1::2] <= 0).all(),
    }
    for problem, holds in problems.items():
        if holds:
            raise ValueError(problem)
    return kind, points.reshape(-1, 2)
