"""VinBigData Chest X-ray Abnormalities Detection 2020: three of 17 radiologists box 14 findings on each image.

The folder as downloaded (``train/IMAGE.dicom``, ``train.csv`` with boxes in original pixels) or a re-release as PNG:
all images squashed to a square of 512 or 1024, with ``train_meta.csv`` (dim0 = original height, dim1 = width) or the
columns width and height in ``train.csv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.geometry import scale_boxes
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import find_folder, stems_in
from cxrkit.data.public.loader import Missing, present, public_loader, with_labels
from cxrkit.data.public.xrv_tables import Annotations, Tables, table_path
from cxrkit.data.readers import image_size, read_image
from cxrkit.data.splits import FOLDS, image_folds, with_validation
from cxrkit.data.tables import EDGES, box_table, lengths, numbers, places, read_table, refuse, sound_rows, whole_boxes
from cxrkit.errors import DataError

__all__ = ["LABELS", "load_vinbigdata", "read_annotations"]

LABELS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration"),
    *("Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    "Pulmonary fibrosis",
)
NO_FINDING = "No finding"
_CLASSES = (*LABELS, NO_FINDING)  # in the order of class_id
_NUMBER = {label: str(position) for position, label in enumerate(_CLASSES)}
TRAIN_CSV, META_CSV = "train.csv", "train_meta.csv"


@public_loader
def load_vinbigdata(
    root: str | Path,
    *,
    seed: int = 0,
    fold: int = 0,
    preprocessing: Preprocessing = SQUASH,
    readers: Literal["any", "majority", "all"] = "any",
    no_finding: bool = False,
    boxes: Literal["told", "original", "file"] = "told",
    window: bool = False,
    split_by: Literal["paper", "patients"] = "paper",
    tables: Tables = "folder",
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """Load VinBigData, DICOM or PNG; DICOM runs from its minimum to its maximum, or by its ``window`` if that is true.

    An image has a label when "any" of its ``readers`` boxed it (as in paper `bcos`), the "majority" or "all" of them.
    Boxes of every reader are kept, each under its reader's name, except those of labels that the image then does not
    have. Where ``boxes`` doesn't say in which pixels they are, a table whose boxes would all fit in the shrunken images
    is refused. No patients are published: every image counts as one. Options: see data_manifests/vinbigdata.yaml.
    Raises DataError naming file and rows. Source: paper `bcos`, its code.
    """
    folder = find_folder(root, TRAIN_CSV, META_CSV, "train")
    found = read_annotations(folder, tables, readers, no_finding)
    table = found.images
    if split_by == "paper":
        table["split"] = _paper_split(table, found.labels, fold, seed)
    table["path"] = table["image_id"].map(stems_in(folder / "train" if (folder / "train").is_dir() else folder))
    table = present(found.path, table, missing)
    sizes = _sizes(folder, table)
    square = _square(folder, table["path"].to_numpy(), sizes.to_numpy())
    placed = found.boxes[found.boxes["image_id"].isin(table["image_id"])]
    known = square is None and not sizes.isna().any(axis=None)
    return {
        "labels": found.labels,
        "table": table,
        "boxes": _in_original_pixels(found.path, placed, sizes, square, boxes),
        "preprocessing": preprocessing if square is None else Squashed(preprocessing, square),
        "side": square,
        "sizes": list(sizes.astype(int).itertuples(index=False, name=None)) if known else None,
        "frames": sizes.to_numpy(),
        "read": partial(read_image, window=window),
        "promise": "the table of original sizes" if known else "every image of this source",
    }


@dataclass(frozen=True)
class Squashed(Preprocessing):
    """``geometry`` on files squashed to ``side`` x ``side`` before; boxes, in original pixels, go that way too."""

    geometry: Preprocessing
    side: int

    def boxes(self, boxes, frame, size):
        return self.geometry.boxes(scale_boxes(boxes, frame, self.side), (self.side, self.side), size)


# Labels


def read_annotations(
    folder: Path, tables: str = "folder", readers: str = "any", no_finding: bool = False
) -> Annotations:
    """Labels and boxes of all images, in order of their id; boxes as the table has them, with their lines as index.

    The column ``readers`` names the readers of each image, joined by ";".
    """
    path = table_path(folder, TRAIN_CSV, tables=tables)
    rows = _sound(path, read_table(path, ["image_id", "class_name", "class_id", "rad_id", *EDGES]))
    # Everything that follows is in order of image_id.
    first = rows.sort_values("image_id", kind="stable").drop_duplicates("image_id")
    given = rows.drop_duplicates(["image_id", "rad_id", "class_name"])
    votes = pd.crosstab(given["image_id"], given["class_name"]).reindex(columns=list(_CLASSES), fill_value=0)
    of_image = rows.sort_values("rad_id").groupby("image_id")["rad_id"].unique()
    asked = of_image.map(len).to_numpy()
    needed = {"any": np.ones_like(asked), "majority": asked // 2 + 1, "all": asked}[readers]
    positive = votes.to_numpy() >= needed[:, None]
    labels = _CLASSES if no_finding else LABELS
    images = pd.DataFrame({"image_id": first["image_id"], "patient_id": first["image_id"]})
    images = with_labels(images, labels, positive[:, : len(labels)])
    images["readers"] = of_image.map(";".join).to_numpy()
    for column in ("width", "height"):
        if column in rows.columns:
            images[column] = first[column]
    kept = positive[votes.index.get_indexer(rows["image_id"]), votes.columns.get_indexer(rows["class_name"])]
    boxed = rows[kept & (rows["class_name"] != NO_FINDING).to_numpy()]
    edges = np.column_stack([numbers(path, boxed, edge) for edge in EDGES])
    boxes = box_table(boxed["image_id"], boxed["class_name"], edges, boxed["rad_id"])
    # How large the images are is not known yet, or only to their files.
    return Annotations(labels, images, whole_boxes(path, boxes, np.full((len(boxes), 2), np.inf)), path)


def _sound(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    if rows.empty:
        raise DataError(f"{path}: holds a header but no row")
    name, filled = rows["class_name"], rows[list(EDGES)] != ""
    none, number = name == NO_FINDING, name.map(_NUMBER)
    reader = rows["image_id"] + " " + rows["rad_id"]
    both = reader.isin(reader[none]) & reader.isin(reader[~none])
    problems = {
        "image_id is empty": (rows["image_id"], rows["image_id"] == ""),
        "rad_id is empty": (rows["rad_id"], rows["rad_id"] == ""),
        f"class_name is none of {list(_CLASSES)}": (name, number.isna()),
        "class_id is not that of class_name": (rows["class_id"], number.notna() & (number != rows["class_id"])),
        "the box is not complete": (rows["image_id"], ~none & ~filled.all(axis=1)),
        f"{NO_FINDING!r} has a box": (rows["image_id"], none & filled.any(axis=1)),
        f"a reader says {NO_FINDING!r} and a finding": (rows["rad_id"], both),
    }
    return sound_rows(path, rows, problems)


def _paper_split(table: pd.DataFrame, labels: tuple[str, ...], fold: int, seed: int) -> np.ndarray:
    if len(table) < FOLDS:
        raise DataError(f"vinbigdata: the paper's folds need {FOLDS} images; use split_by='patients'")
    is_test = image_folds(table[list(LABELS)].to_numpy(), table["image_id"]) == fold
    return with_validation(is_test, table["patient_id"], table[list(labels)].to_numpy(), seed * FOLDS + fold)


# Sizes of the originals, and what became of them in the files


def _sizes(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Original width and height of each image, by image_id; NaN where no table tells."""
    path, sizes, columns = folder / TRAIN_CSV, table, ["width", "height"]
    if not {"width", "height"} <= set(table.columns):
        path, columns = folder / META_CSV, ["dim1", "dim0"]
        if not path.is_file():
            return pd.DataFrame(np.nan, table["image_id"], ["width", "height"])
        sizes = read_table(path, ["image_id", "dim0", "dim1"])
        twice = sizes["image_id"].duplicated()
        refuse(path, "image_id occurs twice", places(sizes["image_id"], twice))
        sizes = sizes[~twice]
    sides = np.column_stack([lengths(path, sizes, column) for column in columns])
    found = pd.DataFrame(sides, sizes["image_id"], ["width", "height"], dtype=float).reindex(table["image_id"])
    unknown = found["width"].isna().to_numpy()
    refuse(path, f"lacks the size of an image of {TRAIN_CSV}, on its line", places(table["image_id"], unknown))
    return found


def _square(folder: Path, paths: np.ndarray, sizes: np.ndarray) -> int | None:
    """The side to which all files were squashed, told by the file of the largest original; None for originals."""
    known = not np.isnan(sizes).any()
    row = int(sizes.prod(axis=1).argmax()) if known else 0
    first = paths[row]
    if Path(first).suffix.lower() in (".dcm", ".dicom"):
        return None
    if not known:
        needed = f"{META_CSV}, with image_id, dim0, dim1"
        raise DataError(f"{folder}: copies of the images need the originals' sizes: {needed}")
    width, height = image_size(first)
    if (width, height) == tuple(sizes[row]):
        return None
    if width != height:
        neither = "neither the original size nor a square copy"
        raise DataError(f"{first}: is {width} x {height}, {neither}; boxes can't be placed")
    return width


def _in_original_pixels(
    path: Path, boxes: pd.DataFrame, sizes: pd.DataFrame, square: int | None, given: str
) -> pd.DataFrame:
    """Boxes in original pixels, checked against the images where their sizes are known."""
    edges = list(EDGES)
    if square is not None and given == "file":
        boxes = whole_boxes(path, boxes, np.full((len(boxes), 2), square))
        originals = sizes.loc[boxes["image_id"]].to_numpy()
        boxes[edges] = boxes[edges].to_numpy() * np.tile(originals, 2) / square
    elif square is not None and given == "told" and boxes[edges].max(axis=None) <= square + 1 < sizes.max(axis=None):
        raise DataError(
            f"{path}: all boxes seem to be in pixels of the copies, {square} x {square}; say boxes='file' to convert "
            "them, or boxes='original' if they are not"
        )
    return boxes if sizes.isna().all(axis=None) else whole_boxes(path, boxes, sizes.loc[boxes["image_id"]].to_numpy())
