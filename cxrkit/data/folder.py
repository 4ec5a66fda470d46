"""The ``folder`` source: any folder with images.csv and, optionally, boxes.csv.

images.csv: ``image_id, file, patient_id, labels`` (joined by ``;`` or ``|``, empty or "No Finding" for none), and
optionally ``split, width, height, orig_width, orig_height, sha256``; further columns are kept in the table.
boxes.csv: ``image_id, label, x_min, y_min, x_max, y_max`` in pixels of the file, and optionally ``reader``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.boxes import box_rows, denied, id_number, keep_readers, left_out, maskless, placed, to_original
from cxrkit.data.dataset import SPLITS, Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.labels import ImageLabels, as_label_map, check_known, doubtful, read_labels
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.readers import image_size, read_image
from cxrkit.data.tables import MISSING, leaves_folder, lengths, notify, places, read_table, refuse
from cxrkit.errors import DataError, ParameterError

__all__ = ["load_folder"]

IMAGE_COLUMNS = ("image_id", "file", "patient_id", "labels")
_OPTIONAL = ("split", "width", "height", "orig_width", "orig_height", "sha256")
_SHOWN = 3


def load_folder(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    hierarchy_separator: str | None = "/",
    label_separator: str | None = None,
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
    None reads names as they are. ``label_separator``: between the labels of an image; by default ";" or "|", or a list
    written as text, and "," where that is sure. ``readers``: keep the boxes of these readers only. ``verify``: compare
    every file with its sha256. ``window``, ``depth``: as `cxrkit.data.read_image` has them. ``preprocessing``: how
    pixels and boxes get to the square. ``seed`` is not used. Boxes may overshoot the image by one pixel, which is
    clipped; they are returned in original pixels (times ``orig_width / width``). ``Dataset.notices`` lists what is left
    out or doubtful; one UserWarning holds those that no option asked for. Raises DataError naming file and rows,
    ParameterError for a label, reader or key of ``label_map`` that no table holds.
    """
    root = Path(root)
    images_csv, boxes_csv = _images_csv(root), root / "boxes.csv"
    images, named = _read_images(images_csv, root, verify)
    sides = _sides(images_csv, root, images)
    rows = box_rows(boxes_csv, named)
    written, rename = set(rows["label"]), as_label_map(label_map)
    found = read_labels(images_csv, images["labels"], written, rename, hierarchy_separator, label_separator)
    check_known("label_map", rename, found.written | written)
    boxes, notices = placed(boxes_csv, rows, rename, images["image_id"], sides)
    notices = [*_image_notices(images), *(f"images.csv: {text}" for text in found.notices), *notices]
    boxes, asked = keep_readers(boxes, readers, set(rows["reader"]))
    counts, chosen = found.counts(), labels is not None
    labels = _choose_labels(labels, counts, set(boxes["label"]), readers)
    if chosen:
        asked += left_out(boxes, labels, counts)
    else:
        notices += [f"images.csv: {text}" for text in doubtful(counts, found, rename)]
    notices += maskless(boxes, labels, chosen)
    table = _table(images_csv, root, images, labels, _targets(images, found, labels, boxes)).assign(**sides)
    dataset = file_dataset(
        "folder",
        labels,
        table,
        to_original(boxes, table),
        size,
        preprocessing,
        sizes=list(zip(sides["width"], sides["height"], strict=True)),
        frames=table[["orig_width", "orig_height"]].to_numpy(),
        hierarchy={child: parent for child, parent in found.parents.items() if {child, parent} <= set(labels)},
        read=partial(read_image, window=window, depth=depth),
        promise="images.csv",
    )
    notices += denied(dataset.denied_boxes, len(boxes))
    notify("folder", root, notices)
    dataset.notices = (*notices, *asked)
    return dataset


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


def _read_images(path: Path, root: Path, verify: bool) -> tuple[pd.DataFrame, pd.Index]:
    """The rows of images.csv that can be used, and the ids of all."""
    images = read_table(path, IMAGE_COLUMNS, _OPTIONAL)
    if images.empty:
        raise DataError(f"{path}: holds a header but no row")
    named = pd.Index(images["image_id"])
    images = _sound_images(path, root, images)
    if verify:
        _check_sums(path, root, images)
    return images, named


def _sound_images(path: Path, root: Path, images: pd.DataFrame) -> pd.DataFrame:
    """The rows that can be used: all of them, unless problems are collected."""
    wrong = pd.Series(False, images.index)

    def check(problem: str, column: str, found: pd.Series) -> None:
        refuse(path, problem, places(images[column], found))
        wrong[found] = True

    for column in ("image_id", "file", "patient_id"):
        check(f"{column} is empty", column, images[column].isin(MISSING))
    again = images["image_id"].duplicated() & ~wrong
    check("image_id occurs twice (an image has one row, which holds all its labels)", "image_id", again)
    odd = images["file"].str.contains(r"\.\.|:|\\|^/", regex=True)
    outside = {file for file in images["file"][odd] if leaves_folder(file)}
    check("file leaves the folder", "file", images["file"].isin(outside))
    if (windows := images["file"].str.contains("\\", regex=False) & ~wrong).any():
        images["file"] = images["file"].mask(
            windows & ~_there(root, images["file"]), images["file"].str.replace("\\", "/")
        )
    absent = ~_there(root, images["file"]) & ~wrong
    hint = next(filter(None, (_alike(root, file) for file in images["file"][absent][:_SHOWN])), "")
    check(f"file does not exist{hint}", "file", absent)
    if "split" in images.columns:
        check(f"split is none of {', '.join(SPLITS)}", "split", ~images["split"].isin(SPLITS))
        splits = images.groupby("patient_id")["split"].transform("nunique")
        refuse(path, "patient_id is in more than one split", places(images["patient_id"], splits > 1))
    return images[~wrong]


def _there(root: Path, files: pd.Series) -> pd.Series:
    """Whether each file is there; each folder is listed once, since asking for every file takes long on a network."""
    folders = {os.path.dirname(file) for file in files}
    listed = {folder: set(os.listdir(root / folder)) if os.path.isdir(root / folder) else set() for folder in folders}
    there = [os.path.basename(file) in listed[os.path.dirname(file)] for file in files]
    return pd.Series(there, index=files.index, dtype=bool)


def _alike(root: Path, file: str) -> str:
    """A file of the same name but for case or ending, to tell beside one that isn't there."""
    folder, name = os.path.split(file)
    held = sorted(os.listdir(root / folder)) if os.path.isdir(root / folder) else []
    stem = os.path.splitext(name)[0].casefold()
    close = [one for one in held if os.path.splitext(one)[0].casefold() == stem]
    return f" (there is {os.path.join(folder, close[0])!r})" if close else ""


def _check_sums(path: Path, root: Path, images: pd.DataFrame) -> None:
    if "sha256" not in images.columns:
        raise DataError(f"{path}: verify=True needs the column sha256; it has {list(images.columns)}")
    wrong = []
    for line, file, expected in images[["file", "sha256"]].itertuples(name=None):
        with (root / file).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected.lower():
                wrong.append((line, repr(file)))
    refuse(path, "the sha256 of file differs", wrong)


def _sides(path: Path, root: Path, images: pd.DataFrame) -> dict[str, np.ndarray]:
    """Width and height of every file, from the table or else from the file itself, and those of the originals."""
    if {"width", "height"} <= set(images.columns):
        width, height = (lengths(path, images, column) for column in ("width", "height"))
    else:
        sizes = np.array([image_size(root / file) for file in images["file"]])
        width, height = sizes[:, 0].astype(int), sizes[:, 1].astype(int)
    sides = {"width": width, "height": height, "orig_width": width, "orig_height": height}
    told = [name for name in ("orig_width", "orig_height") if name in images.columns]
    return sides | {name: lengths(path, images, name) for name in told}


def _image_notices(images: pd.DataFrame) -> list[str]:
    """Ids that a spreadsheet may have changed, and files that several patients share."""
    notices = []
    for column in ("image_id", "patient_id"):
        short = images[column].str.fullmatch(r"\d(\.\d+)?E\+?\d+")
        if short.any():
            value, line = images[column][short].iloc[0], images.index[short][0]
            notices.append(f"{short.sum()} cells of {column} are shortened numbers, such as {value!r} on line {line}")
    spelt: dict[str, str] = {}
    for line, patient in images["patient_id"].drop_duplicates().items():
        if (first := spelt.setdefault(id_number(patient), patient)) != patient:
            notices.append(f"patient_id {patient!r}, on line {line}, may be {first!r}, but counts as another patient")
    shared = images["file"].duplicated(keep=False)
    shared[shared] = images[shared].groupby("file")["patient_id"].transform("nunique") > 1
    if shared.any():
        file, line = images["file"][shared].iloc[0], images.index[shared][0]
        notices.append(f"{shared.sum()} rows share a file with another patient's, such as {file!r} on line {line}")
    return [f"images.csv: {text}" for text in notices[:_SHOWN]] + (
        [f"images.csv: and {len(notices) - _SHOWN} more of such kinds"] if len(notices) > _SHOWN else []
    )


# Labels


def _choose_labels(
    labels: Sequence[str] | None, counts: Mapping[str, int], boxed: Collection[str], readers: Sequence[str] | None
) -> tuple[str, ...]:
    if labels is None:
        return tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    if isinstance(labels, str):
        raise ParameterError(f"labels={labels!r}: give a list of names, such as [{labels!r}]")
    boxes = "boxes.csv" if readers is None else f"the boxes of readers {readers}"
    check_known("labels", labels, set(counts) | set(boxed), boxes)
    if len(set(labels)) != len(labels):
        raise ParameterError(f"labels={list(labels)} names one label twice")
    return tuple(labels)


def _targets(images: pd.DataFrame, found: ImageLabels, labels: Sequence[str], boxes: pd.DataFrame) -> np.ndarray:
    of_cell = np.array([[label in held for label in labels] for held in found.found], dtype=np.float32)
    targets = of_cell.reshape(len(found.found), len(labels))[found.cell]
    for position, label in enumerate(labels):
        if not any(label in held for held in found.found):
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
