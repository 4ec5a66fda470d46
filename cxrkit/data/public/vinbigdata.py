"""VinBigData Chest X-ray Abnormalities Detection 2020: three of 17 radiologists box 14 findings on each image.

The folder as downloaded (``train/IMAGE.dicom``, ``train.csv`` with boxes in original pixels) or a re-release as PNG:
all images squashed to a square of 512 or 1024, with ``train_meta.csv`` (dim0 = original height, dim1 = width) or the
columns width and height in ``train.csv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.geometry import scale_boxes
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, stems_in, with_files
from cxrkit.data.public.xrv_tables import Annotations, table_of
from cxrkit.data.readers import image_size, read_image
from cxrkit.data.splits import FOLDS, image_folds, with_validation
from cxrkit.data.tables import (
    EDGES,
    box_table,
    lengths,
    numbers,
    places,
    read_table,
    refuse,
    sound_rows,
    whole_boxes,
)
from cxrkit.errors import DataError

__all__ = ["LABELS", "load_vinbigdata", "read_annotations"]

LABELS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration"),
    *("Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    "Pulmonary fibrosis",
)
NO_FINDING = "No finding"
_CLASSES = (*LABELS, NO_FINDING)  # in the order of class_id
_NUMBER = {label: position for position, label in enumerate(_CLASSES)}
TRAIN_CSV, META_CSV = "train.csv", "train_meta.csv"
_RULES = ("any", "majority", "all")


def load_vinbigdata(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    fold: int = 0,
    preprocessing: Preprocessing = SQUASH,
    readers: str = "any",
    no_finding: bool = False,
    boxes: str = "told",
    window: bool = False,
    split_by: str = "paper",
    tables: str = "folder",
    missing: str = "refuse",
) -> Dataset:
    """Load VinBigData, DICOM or PNG; DICOM runs from its minimum to its maximum, or by its ``window`` if that is true.

    ``readers``: an image has a label when "any" of its readers boxed it (as in paper `bcos`), the "majority" or "all"
    of them. Boxes of every reader are kept, each under its reader's name, except those of labels that the image then
    does not have. ``no_finding``: add the label "No finding", by the same rule. ``boxes``: "original" or "file" says in
    which pixels they are, for re-releases that shrank them too; "told" goes by the table, and refuses where all boxes
    would fit in the shrunken image. ``split_by``: "paper", five multi-label stratified folds (random state 42, images
    in order of their id), of which ``fold`` is the test part and an eighth of the others validates; "patients", this
    package's own folds. No patients are published: every image counts as one. ``tables``, ``missing``: as in
    :func:`cxrkit.data.public.rsna.load_rsna`. Raises DataError naming file and rows. Source: paper `bcos`, its code.
    """
    choose("split_by", split_by, ("paper", "patients"))
    choose("boxes", boxes, ("told", "original", "file"))
    folder = find_folder(root, TRAIN_CSV, META_CSV, "train")
    found = read_annotations(folder, tables, readers, no_finding)
    table = found.images
    if split_by == "paper":
        table["split"] = _paper_split(table, found.labels, fold, seed)
    pictures = stems_in(folder / "train" if (folder / "train").is_dir() else folder)
    table = with_files("vinbigdata", found.path, table, pictures, missing)
    sizes = _sizes(folder, table)
    square = _square(folder, table["path"].to_numpy(), sizes)
    placed = found.boxes[found.boxes["image_id"].isin(table["image_id"])]
    placed = _in_original(found.path, placed, table["image_id"], sizes, square, boxes)
    known = square is None and not np.isnan(sizes).any()
    return file_dataset(
        "vinbigdata",
        found.labels,
        table,
        placed,
        size,
        preprocessing if square is None else Squashed(preprocessing, square),
        side=square,
        sizes=[(int(width), int(height)) for width, height in sizes] if known else None,
        frames=sizes,
        read=partial(read_image, window=window),
        promise="the table of original sizes" if known else "every image of this source",
    )


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
    choose("readers", readers, _RULES)
    path, rows = table_of(folder, TRAIN_CSV, ["image_id", "class_name", "class_id", "rad_id", *EDGES], tables)
    rows = _sound(path, rows)
    images = rows.sort_values("image_id", kind="stable").drop_duplicates("image_id")
    images = pd.DataFrame({"image_id": images["image_id"], "patient_id": images["image_id"]})
    of_image = pd.Series(np.arange(len(images)), index=images["image_id"].to_numpy())
    votes, asked, named = _votes(rows, of_image)
    needed = {"any": np.ones_like(asked), "majority": asked // 2 + 1, "all": asked}[readers]
    positive = votes >= needed[:, None]
    labels = _CLASSES if no_finding else LABELS
    images[list(labels)] = positive[:, : len(labels)].astype(np.float32)
    images["readers"] = named
    for column in ("width", "height"):
        if column in rows.columns:
            images[column] = rows.loc[images.index, column]
    kept = positive[rows["image_id"].map(of_image), rows["class_name"].map(_NUMBER)]
    boxed = rows[kept & (rows["class_name"] != NO_FINDING).to_numpy()]
    return Annotations(labels, images, _boxes(path, boxed), path)


def _votes(rows: pd.DataFrame, of_image: pd.Series) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """How many readers gave each image each class, ``[N, 15]``, how many it had, ``[N]``, and who they were."""
    votes = np.zeros((len(of_image), len(_CLASSES)), dtype=int)
    given = rows.drop_duplicates(["image_id", "rad_id", "class_name"])
    np.add.at(votes, (given["image_id"].map(of_image), given["class_name"].map(_NUMBER)), 1)
    seen = rows.drop_duplicates(["image_id", "rad_id"]).sort_values(["image_id", "rad_id"])
    asked = np.bincount(seen["image_id"].map(of_image), minlength=len(of_image))
    names = np.split(seen["rad_id"].to_numpy(), np.cumsum(asked)[:-1])
    return votes, asked, [";".join(of_one) for of_one in names]


def _sound(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    if rows.empty:
        raise DataError(f"{path}: holds a header but no row")
    name, filled = rows["class_name"], rows[list(EDGES)] != ""
    none = name == NO_FINDING
    number = name.map({label: str(position) for label, position in _NUMBER.items()})
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


def _boxes(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    edges = np.column_stack([numbers(path, rows, edge) for edge in EDGES])
    boxes = box_table(rows["image_id"], rows["class_name"], edges, rows["rad_id"])
    # How large the images are is not known yet, or only to their files.
    return whole_boxes(path, boxes, np.full((len(boxes), 2), np.inf))


def _paper_split(table: pd.DataFrame, labels: tuple[str, ...], fold: int, seed: int) -> np.ndarray:
    if len(table) < FOLDS:
        raise DataError(f"vinbigdata: the paper's folds need {FOLDS} images; use split_by='patients'")
    is_test = image_folds(table[list(LABELS)].to_numpy(), table["image_id"]) == fold
    return with_validation(is_test, table["patient_id"], table[list(labels)].to_numpy(), seed * FOLDS + fold)


# Sizes of the originals, and what became of them in the files


def _sizes(folder: Path, table: pd.DataFrame) -> np.ndarray:
    """Original width and height of each image; NaN where no table tells."""
    if {"width", "height"} <= set(table.columns):
        path = folder / TRAIN_CSV
        return np.column_stack([lengths(path, table, column) for column in ("width", "height")]).astype(float)
    path = folder / META_CSV
    if not path.is_file():
        return np.full((len(table), 2), np.nan)
    meta = read_table(path, ["image_id", "dim0", "dim1"])
    refuse(path, "image_id occurs twice", places(meta["image_id"], meta["image_id"].duplicated()))
    meta = meta.drop_duplicates("image_id").assign(
        height=lambda rows: lengths(path, rows, "dim0"), width=lambda rows: lengths(path, rows, "dim1")
    )
    sizes = table[["image_id"]].merge(meta, on="image_id", how="left")[["width", "height"]]
    refuse(
        path,
        f"lacks the size of an image; lines are those of {TRAIN_CSV}",
        places(table["image_id"], sizes["width"].isna()),
    )
    return sizes.to_numpy(dtype=float)


def _square(folder: Path, paths: np.ndarray, sizes: np.ndarray) -> int | None:
    """The side to which all files were squashed, told by the file of the largest original; None for originals."""
    known = not np.isnan(sizes).any()
    row = int(sizes.prod(axis=1).argmax()) if known else 0
    first = paths[row]
    if Path(first).suffix.lower() in (".dcm", ".dicom"):
        return None
    if not known:
        raise DataError(
            f"{folder}: copies of the images need the originals' sizes: {META_CSV}, with image_id, dim0, dim1"
        )
    width, height = image_size(first)
    if (width, height) == tuple(sizes[row]):
        return None
    if width != height:
        raise DataError(
            f"{first}: is {width} x {height}, neither the original size nor a square copy; boxes can't be placed"
        )
    return width


def _in_original(
    path: Path, boxes: pd.DataFrame, image_ids: pd.Series, sizes: np.ndarray, square: int | None, given: str
) -> pd.DataFrame:
    """Boxes in original pixels, checked against the images where their sizes are known."""
    position = pd.Series(np.arange(len(image_ids)), index=image_ids.to_numpy())
    limits = sizes[position[boxes["image_id"]].to_numpy()]
    if square is not None and given != "original" and len(boxes):
        reach = boxes[list(EDGES)].to_numpy().max()
        if given == "file":
            boxes = whole_boxes(path, boxes, np.full_like(limits, square))
            limits = sizes[position[boxes["image_id"]].to_numpy()]
            boxes = boxes.copy()
            boxes[list(EDGES)] = boxes[list(EDGES)].to_numpy() * np.tile(limits, 2) / square
        elif reach <= square + 1 < sizes.max():
            raise DataError(
                f"{path}: no box reaches beyond {reach:g}, so all seem to be in pixels of the copies, {square} x "
                f"{square}; say boxes='file' to convert them, or boxes='original' if they are not"
            )
    return boxes if np.isnan(limits).all() else whole_boxes(path, boxes, limits)
