"""The ``folder`` source: any folder with images.csv and, optionally, boxes.csv.

images.csv: ``image_id, file, patient_id, labels`` (joined by ``;``, empty or "No Finding" for none), and
optionally ``split, width, height, orig_width, orig_height, sha256``; further columns are kept in the table.
boxes.csv: ``image_id, label, x_min, y_min, x_max, y_max`` in pixels of the file, and optionally ``reader``.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import BOX_COLUMNS, SPLITS, Dataset
from cxrkit.data.files import FileRenderer
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.readers import image_size, read_image
from cxrkit.data.tables import EDGES, leaves_folder, lengths, numbers, places, read_table, refuse, whole_boxes
from cxrkit.errors import DataError, ParameterError

__all__ = ["load_folder"]

NO_FINDING = "No Finding"
IMAGE_COLUMNS = ("image_id", "file", "patient_id", "labels")


def load_folder(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    hierarchy_separator: str | None = "/",
    readers: Sequence[str] | None = None,
    verify: bool = False,
    window: bool = True,
    depth: int | None = None,
    preprocessing: Preprocessing = SQUASH,
) -> Dataset:
    """Load a folder with images.csv and, optionally, boxes.csv.

    ``labels``: the labels wanted, in order; by default all of images.csv, the most frequent first. A label
    known to boxes.csv alone is 1 where it is boxed and NaN elsewhere. ``label_map``: old name -> new name,
    for images and boxes. ``hierarchy_separator``: a label ``a/b`` is a child of ``a``, which is positive too;
    None reads names as they are. ``readers``: keep the boxes of these readers only. ``verify``: compare every
    file with its sha256. ``window``, ``depth``: as `cxrkit.data.read_image` has them. ``preprocessing``: how
    pixels and boxes get to the square. ``seed`` is not used. Boxes may overshoot the image by one pixel, which
    is clipped; they are returned in original pixels (times ``orig_width / width``). Raises DataError naming file
    and rows, ParameterError for an unknown label or reader.
    """
    root = Path(root)
    images_csv = _images_csv(root)
    images = read_table(images_csv, IMAGE_COLUMNS)
    if images.empty:
        raise DataError(f"{images_csv}: holds a header but no row")
    # pandas steps through text of its own kind several times as slowly as through Python's.
    images = images.astype(object)
    named = pd.Index(images["image_id"])
    images = _sound_images(images_csv, root, images)
    if verify:
        _check_sums(images_csv, root, images)
    width, height = _extent(images_csv, root, images)
    boxes = _read_boxes(root / "boxes.csv", images, named, width, height)
    boxes = _keep_readers(boxes, readers)

    rename = dict(label_map or {})
    cell_of, found, parents = _image_labels(images_csv, images, hierarchy_separator, rename)
    boxes["label"] = boxes["label"].map(lambda label: rename.get(label, label))
    labels = _choose_labels(labels, cell_of, found, boxes)
    table = _table(images_csv, root, images, labels, _targets(images, cell_of, found, labels, boxes))
    table["width"], table["height"] = width, height
    for column, default in (("orig_width", width), ("orig_height", height)):
        table[column] = lengths(images_csv, images, column) if column in images.columns else default
    return Dataset(
        name="folder",
        labels=labels,
        table=table,
        boxes=_to_original(boxes, table),
        renderer=FileRenderer(
            table["path"],
            list(zip(width, height, strict=True)),
            preprocessing,
            read=partial(read_image, window=window, depth=depth),
            table="images.csv",
        ),
        size=size,
        hierarchy={child: parent for child, parent in parents.items() if {child, parent} <= set(labels)},
        preprocessing=preprocessing,
    )


# Tables


def _images_csv(root: Path) -> Path:
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, expected a folder with images.csv")
    path = root / "images.csv"
    if not path.is_file():
        state = "holds no images.csv" if any(root.iterdir()) else "is empty; expected images.csv in it"
        raise DataError(f"{root}: {state}, a table with the columns {', '.join(IMAGE_COLUMNS)}")
    return path


def _sound_images(path: Path, root: Path, images: pd.DataFrame) -> pd.DataFrame:
    """The rows that can be used: all of them, unless problems are collected."""
    wrong = pd.Series(False, images.index)

    def check(problem: str, column: str, found: pd.Series) -> None:
        refuse(path, problem, places(images[column], found))
        wrong[found] = True

    for column in ("image_id", "file", "patient_id"):
        check(f"{column} is empty", column, images[column] == "")
    check("image_id occurs twice", "image_id", images["image_id"].duplicated() & ~wrong)
    odd = images["file"].str.contains(r"\.\.|:|\\|^/", regex=True)
    outside = {file for file in images["file"][odd] if leaves_folder(file)}
    check("file leaves the folder", "file", images["file"].isin(outside))
    check("file does not exist", "file", ~_there(root, images["file"]) & ~wrong)
    if "split" in images.columns:
        check(f"split is none of {', '.join(SPLITS)}", "split", ~images["split"].isin(SPLITS))
        splits = images.groupby("patient_id")["split"].transform("nunique")
        refuse(path, "patient_id is in more than one split", places(images["patient_id"], splits > 1))
    return images[~wrong]


def _there(root: Path, files: pd.Series) -> pd.Series:
    """Whether each file is there; each folder is listed once, since asking for every file takes long on a network."""
    listed: dict[str, set[str]] = {}
    parts = [file.rpartition("/") for file in files]
    for folder in {folder for folder, _, _ in parts}:
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                listed[folder] = {entry.name for entry in entries if entry.is_file()}
        except (OSError, ValueError):
            listed[folder] = set()
    # Where letter case or form does not count, a name may differ from the one listed.
    there = [name in listed[folder] or os.path.isfile(os.path.join(root, folder, name)) for folder, _, name in parts]
    return pd.Series(there, index=files.index, dtype=bool)


def _check_sums(path: Path, root: Path, images: pd.DataFrame) -> None:
    if "sha256" not in images.columns:
        raise DataError(f"{path}: verify=True needs the column sha256; it has {list(images.columns)}")
    wrong = []
    for line, file, expected in images[["file", "sha256"]].itertuples(name=None):
        with (root / file).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected.lower():
                wrong.append((line, repr(file)))
    refuse(path, "the sha256 of file differs", wrong)


def _extent(path: Path, root: Path, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of every file, from the table or else from the file itself."""
    if {"width", "height"} <= set(images.columns):
        width, height = (lengths(path, images, column) for column in ("width", "height"))
    else:
        sizes = np.array([image_size(root / file) for file in images["file"]])
        width, height = sizes[:, 0], sizes[:, 1]
    return width.astype(int), height.astype(int)


# Labels


def _image_labels(
    path: Path, images: pd.DataFrame, separator: str | None, rename: Mapping[str, str]
) -> tuple[np.ndarray, list[set[str]], dict[str, str]]:
    """The combination of labels that each image has, those combinations with all ancestors, and child -> parent."""
    found, parents, both = [], {}, set()
    # Few combinations of labels make up many rows.
    cell_of, cells = pd.factorize(images["labels"])
    for cell in cells:
        names = {name.strip() for name in cell.split(";")} - {""}
        if NO_FINDING in names and len(names) > 1:
            both.add(cell)
        of_cell = set()
        for name in names - {NO_FINDING}:
            chain = [rename.get(step, step) for step in _ancestry(name, separator)]
            of_cell.update(chain)
            parents.update((child, parent) for parent, child in pairwise(chain))
        found.append(of_cell)
    wrong = places(images["labels"], images["labels"].isin(both))
    refuse(path, f"labels holds {NO_FINDING!r} beside a finding", wrong)
    return cell_of, found, {child: parent for child, parent in parents.items() if child != parent}


def _ancestry(name: str, separator: str | None) -> list[str]:
    """From the root of a label path to the label: a, a/b, a/b/c."""
    if not separator:
        return [name]
    steps = name.split(separator)
    return [separator.join(steps[: depth + 1]) for depth in range(len(steps))]


def _choose_labels(
    labels: Sequence[str] | None, cell_of: np.ndarray, found: Sequence[set[str]], boxes: pd.DataFrame
) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for of_cell, images in zip(found, np.bincount(cell_of, minlength=len(found)).tolist(), strict=True):
        counts.update(dict.fromkeys(of_cell, images))
    if labels is None:
        return tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    if isinstance(labels, str):
        raise ParameterError(f"labels={labels!r}: give a list of names, such as [{labels!r}]")
    known = set(counts) | set(boxes["label"])
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ParameterError(f"labels {unknown} occur neither in images.csv nor in boxes.csv; known: {sorted(known)}")
    if len(set(labels)) != len(labels):
        raise ParameterError(f"labels={list(labels)} names one label twice")
    return tuple(labels)


def _targets(
    images: pd.DataFrame, cell_of: np.ndarray, found: Sequence[set[str]], labels: Sequence[str], boxes: pd.DataFrame
) -> np.ndarray:
    of_cell = np.array([[label in held for label in labels] for held in found], dtype=np.float32)
    targets = of_cell.reshape(len(found), len(labels))[cell_of]
    for position, label in enumerate(labels):
        if not any(label in of_image for of_image in found):
            boxed = images["image_id"].isin(boxes["image_id"][boxes["label"] == label])
            targets[:, position] = np.where(boxed, 1, np.nan)
    return targets


def _table(path: Path, root: Path, images: pd.DataFrame, labels: Sequence[str], targets: np.ndarray) -> pd.DataFrame:
    clash = [label for label in labels if label in {"path", "split", "width", "height", *images.columns}]
    if clash:
        raise DataError(f"{path}: {clash} are both labels and columns; rename the label with label_map")
    table = images[["image_id", "patient_id"]].reset_index(drop=True)
    within = os.path.join(root, "")
    table["path"] = [within + file for file in images["file"]]
    table = pd.concat([table, pd.DataFrame(targets, columns=list(labels))], axis=1)
    rest = [column for column in images.columns if column not in table.columns]
    return pd.concat([table, images[rest].reset_index(drop=True).apply(_inferred)], axis=1)


def _inferred(column: pd.Series) -> pd.Series:
    """Numbers where all filled cells are numbers; text otherwise."""
    filled = column.where(column != "")
    some = filled.dropna()
    if len(some) and pd.isna(pd.to_numeric(some.iloc[:1], errors="coerce")).all():
        return filled  # the others need not be tried
    numbers = pd.to_numeric(filled, errors="coerce")
    return numbers if numbers.notna().sum() == filled.notna().sum() > 0 else filled


# Boxes


def _read_boxes(
    path: Path, images: pd.DataFrame, named: pd.Index, width: np.ndarray, height: np.ndarray
) -> pd.DataFrame:
    """Boxes in pixels of the files, clipped to them; ``named`` are all images of the table, sound or not."""
    boxes = read_table(path, ("image_id", "label", *EDGES)).astype(object) if path.exists() else pd.DataFrame()
    if boxes.empty:
        return pd.DataFrame({column: [] for column in BOX_COLUMNS})
    if "reader" not in boxes.columns:
        boxes["reader"] = "unknown"
    refuse(path, "image_id is not in images.csv", places(boxes["image_id"], ~boxes["image_id"].isin(named)))
    refuse(path, "label is empty", places(boxes["label"], boxes["label"] == ""))
    for edge in EDGES:
        boxes[edge] = numbers(path, boxes, edge)
    order = pd.Index(images["image_id"]).get_indexer(boxes["image_id"])
    usable = (order >= 0) & np.isfinite(boxes[list(EDGES)].to_numpy(dtype=float)).all(axis=1)
    boxes, order = boxes[usable].copy(), order[usable]
    return whole_boxes(path, boxes, np.column_stack([width, height])[order])


def _keep_readers(boxes: pd.DataFrame, readers: Sequence[str] | None) -> pd.DataFrame:
    if readers is None:
        return boxes
    readers = [readers] if isinstance(readers, str) else list(readers)
    unknown = [reader for reader in readers if reader not in set(boxes["reader"])]
    if unknown:
        raise ParameterError(f"readers {unknown} drew no box; known: {sorted(set(boxes['reader']))}")
    return boxes[boxes["reader"].isin(readers)].copy()


def _to_original(boxes: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Boxes from pixels of the file to original pixels, as ``Dataset.boxes`` wants them."""
    boxes = boxes.reset_index(drop=True)
    frame = table.iloc[pd.Index(table["image_id"]).get_indexer(boxes["image_id"])]
    for axis, side in (("x", "width"), ("y", "height")):
        for end in ("min", "max"):
            scaled = boxes[f"{axis}_{end}"].to_numpy() * frame[f"orig_{side}"].to_numpy() / frame[side].to_numpy()
            boxes[f"{axis}_{end}"] = scaled
    return boxes[[*BOX_COLUMNS, *(column for column in boxes.columns if column not in BOX_COLUMNS)]]
