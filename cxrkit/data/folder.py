"""The ``folder`` source: any folder with images.csv and, optionally, boxes.csv.

images.csv: ``image_id, file, patient_id, labels`` (joined by ``;`` or ``|``, empty or "No Finding" for none), and
optionally ``split, width, height, orig_width, orig_height, sha256``; further columns are kept in the table.
boxes.csv: ``image_id, label, x_min, y_min, x_max, y_max`` in pixels of the file, and optionally ``reader``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data import tables
from cxrkit.data.dataset import BOX_COLUMNS, SPLITS, Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.labels import (
    ImageLabels,
    as_label_map,
    check_known,
    clean,
    doubtful,
    is_blank,
    is_none,
    nearest,
    read_labels,
    spelling,
)
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.readers import image_size, read_image
from cxrkit.errors import DataError, ParameterError
from cxrkit.files import checksum

__all__ = ["load_folder"]

IMAGE_COLUMNS = ("image_id", "file", "patient_id", "labels")
_OPTIONAL = ("split", "width", "height", "orig_width", "orig_height", "sha256")
_SHOWN = 3
# Labels that a message lists.
_LABELS_SHOWN = 8


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
    images_csv = _images_csv(root)
    images, named = _read_images(images_csv, root, verify)
    sides = _sides(images_csv, root, images)
    rows = _box_rows(root / "boxes.csv", named)
    written, rename = set(rows["label"]), as_label_map(label_map)
    found = read_labels(images_csv, images["labels"], written, rename, hierarchy_separator, label_separator)
    check_known("label_map", rename, found.written | written)
    boxes, of_boxes = _placed(root / "boxes.csv", rows, rename, images["image_id"], sides)
    boxes, asked = _of_readers(boxes, readers, set(rows["reader"]))
    chosen = _choose_labels(labels, found.counts(), set(boxes["label"]), readers)
    table = _table(images_csv, root, images, chosen, _targets(images, found, chosen, boxes)).assign(**sides)
    dataset = file_dataset(
        "folder",
        chosen,
        table,
        _to_original(boxes, table),
        size,
        preprocessing,
        sizes=list(zip(sides["width"], sides["height"], strict=True)),
        frames=table[["orig_width", "orig_height"]].to_numpy(),
        hierarchy={child: parent for child, parent in found.parents.items() if {child, parent} <= set(chosen)},
        read=partial(read_image, window=window, depth=depth),
        promise="images.csv",
    )
    told = [*_image_notices(images), *found.notices, *(doubtful(found, rename) if labels is None else ())]
    told = [f"images.csv: {text}" for text in told]
    told += [f"boxes.csv: {text}" for text in (*of_boxes, *_maskless(boxes, chosen, labels is None), *_denied(dataset))]
    tables.notify("folder", root, told)
    dataset.notices = (*told, *asked, *([] if labels is None else _left_out(boxes, chosen, found.counts())))
    return dataset


# Tables


def _images_csv(root: Path) -> Path:
    if not root.is_dir():
        state = "is a file, expected a folder with images.csv" if root.exists() else "no such folder"
        raise DataError(f"{root}: {state}")
    path = root / "images.csv"
    if not path.is_file():
        state = "holds no images.csv" if any(root.iterdir()) else "is empty; expected images.csv in it"
        raise DataError(f"{root}: {state}, a table with the columns {', '.join(IMAGE_COLUMNS)}")
    return path


def _read_images(path: Path, root: Path, verify: bool) -> tuple[pd.DataFrame, pd.Index]:
    """The rows of images.csv that can be used (all, unless problems are collected), and the ids of all."""
    images = tables.read_table(path, IMAGE_COLUMNS, _OPTIONAL)
    if images.empty:
        raise DataError(f"{path}: holds a header but no row")
    ids, file, patient = images["image_id"], images["file"], images["patient_id"]
    empty = {name: images[name].isin(tables.MISSING) for name in ("image_id", "file", "patient_id")}
    odd = file.str.contains(r"\.\.|:|\\|^/", regex=True)
    outside = file.isin({name for name in file[odd] if tables.leaves_folder(name)})
    # As Windows writes them.
    file = file.where(outside | _there(root, file), file.str.replace("\\", "/"))
    absent = ~outside & ~empty["file"] & ~_there(root, file)
    hint = next(filter(None, (_alike(root, name) for name in file[absent][:_SHOWN])), "")
    problems = {f"{name} is empty": (images[name], wrong) for name, wrong in empty.items()} | {
        "image_id occurs twice (an image has one row, which holds all its labels)": (ids, ids.duplicated()),
        "file leaves the folder": (file, outside),
        f"file does not exist{hint}": (file, absent),
    }
    if "split" in images.columns:
        split = images["split"]
        problems[f"split is none of {', '.join(SPLITS)}"] = split, ~split.isin(SPLITS)
        several = images.groupby("patient_id")["split"].transform("nunique") > 1
        problems["patient_id is in more than one split"] = patient, several
    images = tables.sound_rows(path, images.assign(file=file), problems)
    if verify:
        _check_sums(path, root, images)
    return images, pd.Index(ids)


def _there(root: Path, files: pd.Series) -> pd.Series:
    """Whether each file is there; each folder is listed once, since asking for every file takes long on a network."""
    folders = {os.path.dirname(file) for file in files}
    listed = {folder: set(os.listdir(root / folder)) if os.path.isdir(root / folder) else set() for folder in folders}
    # Where letter case or form does not count, a name may differ from the one listed.
    there = [os.path.basename(file) in listed[os.path.dirname(file)] or os.path.isfile(root / file) for file in files]
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
    wrong = [checksum(root / file) != expected.lower() for file, expected in images[["file", "sha256"]].to_numpy()]
    tables.refuse(path, "the sha256 of file differs", tables.places(images["file"], wrong))


def _sides(path: Path, root: Path, images: pd.DataFrame) -> dict[str, np.ndarray]:
    """Width and height of every file, from the table or else from the file itself, and those of the originals."""
    if {"width", "height"} <= set(images.columns):
        width, height = (tables.lengths(path, images, column) for column in ("width", "height"))
    else:
        sizes = np.array([image_size(root / file) for file in images["file"]])
        width, height = sizes[:, 0].astype(int), sizes[:, 1].astype(int)
    sides = {"width": width, "height": height, "orig_width": width, "orig_height": height}
    told = [name for name in ("orig_width", "orig_height") if name in images.columns]
    return sides | {name: tables.lengths(path, images, name) for name in told}


def _image_notices(images: pd.DataFrame) -> list[str]:
    """Ids that a spreadsheet may have changed, and files that several patients share."""
    notices = []
    for column in ("image_id", "patient_id"):
        short = images[column][images[column].str.fullmatch(r"\d(\.\d+)?E\+?\d+")]
        if len(short):
            first = f"{short.iloc[0]!r} on line {short.index[0]}"
            notices.append(f"{len(short)} cells of {column} are shortened numbers, such as {first}")
    spelt: dict[str, str] = {}
    for line, patient in images["patient_id"].drop_duplicates().items():
        if (first := spelt.setdefault(_id_number(patient), patient)) != patient:
            notices.append(f"patient_id {patient!r}, on line {line}, may be {first!r}, but counts as another patient")
    shared = images["file"][images.groupby("file")["patient_id"].transform("nunique") > 1]
    if len(shared):
        first = f"{shared.iloc[0]!r} on line {shared.index[0]}"
        notices.append(f"{len(shared)} rows share a file with another patient's, such as {first}")
    more = [f"and {len(notices) - _SHOWN} more of such kinds"] if len(notices) > _SHOWN else []
    return notices[:_SHOWN] + more


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
    try:
        return pd.to_numeric(filled) if filled.notna().any() else filled
    except ValueError:
        return filled


# Boxes


def _box_rows(path: Path, named: pd.Index) -> pd.DataFrame:
    """The rows of boxes.csv as text; ``named`` are all images of the table, sound or not."""
    rows = tables.read_table(path, ("image_id", "label", *tables.EDGES), ("reader",)) if path.exists() else []
    if not len(rows):
        return pd.DataFrame({column: [] for column in BOX_COLUMNS}, dtype=object)
    if "reader" not in rows.columns:
        rows["reader"] = "unknown"
    rows["label"] = rows["label"].map(clean)
    strange = ~rows["image_id"].isin(named)
    hint = ""
    if strange.any():
        known = {_id_number(value): value for value in named}
        stems = rows["image_id"][strange].str.replace(r".*[/\\]|\.(png|jpe?g|dcm|dicom)$", "", regex=True, case=False)
        alike = [known[number] for number in map(_id_number, stems) if number in known]
        hint = f"; did you mean {alike[0]!r}? {len(alike)} differ in zeros, case or ending" if alike else ""
    tables.refuse(path, f"image_id is not in images.csv{hint}", tables.places(rows["image_id"], strange))
    return rows


def _id_number(value: str) -> str:
    """An id in lower case, without leading zeros and decimals, which spreadsheets add and remove."""
    match = re.fullmatch(r"0*(\d+)(\.0*)?", value)
    return match[1] if match else value.casefold()


def _placed(
    path: Path, rows: pd.DataFrame, rename: Mapping[str, str], image_ids: pd.Series, sides: Mapping[str, np.ndarray]
) -> tuple[pd.DataFrame, list[str]]:
    """Boxes in pixels of the files, clipped to them, under new names; and notices about them."""
    rows = rows.assign(label=rows["label"].map(lambda label: rename.get(label, label)))
    hollow = rows[list(tables.EDGES)].isin(tables.MISSING).all(axis=1)
    blank = rows["label"].map(is_blank) & ~rows["label"].isin(rename.values())
    none = rows["label"].map(is_none) | (blank & hollow)
    told = f"{none.sum()} of {len(rows)} rows say that there is no finding, so they hold no box"
    notices = [told] if none.any() else []
    tables.refuse(path, "label is empty", tables.places(rows["label"], blank & ~none))
    rows = rows[~none].copy()
    for edge in tables.EDGES:
        rows[edge] = tables.numbers(path, rows, edge)
    order = pd.Index(image_ids).get_indexer(rows["image_id"])
    usable = (order >= 0) & np.isfinite(rows[list(tables.EDGES)].to_numpy(dtype=float)).all(axis=1)
    rows, order = rows[usable].copy(), order[usable]
    limits, originals = (np.column_stack([sides[f"{of}width"], sides[f"{of}height"]])[order] for of in ("", "orig_"))
    boxes = tables.whole_boxes(path, rows, limits, originals)
    if text := tables.counted_from(rows, limits):
        notices.append(text)
    if (again := boxes.duplicated().sum()) > 0:
        notices.append(f"{again} of {len(boxes)} boxes repeat another, and count twice")
    return boxes, notices


def _of_readers(
    boxes: pd.DataFrame, readers: Sequence[str] | None, known: Collection[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The boxes of these readers, and how many that leaves out; ``known``: all readers, also those without a box."""
    if readers is None:
        return boxes, []
    readers = [readers] if isinstance(readers, str) else list(readers)
    if unknown := [reader for reader in readers if reader not in known]:
        raise ParameterError(f"readers {unknown} are not in the column reader of boxes.csv; known: {sorted(known)}")
    kept = boxes["reader"].isin(readers)
    return boxes[kept].copy(), [f"readers= leaves out {(~kept).sum()} of {len(boxes)} boxes"]


def _left_out(boxes: pd.DataFrame, labels: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Notices about labels and boxes that the option ``labels`` leaves out."""
    others, beside = sorted(set(counts) - set(labels)), ~boxes["label"].isin(labels)
    told = [f"labels= leaves out {len(others)} labels of images.csv: {', '.join(others)}"] if others else []
    return told + ([f"labels= leaves {beside.sum()} of {len(boxes)} boxes without a mask"] if beside.any() else [])


def _maskless(boxes: pd.DataFrame, labels: Sequence[str], every: bool) -> list[str]:
    """A notice about boxes whose label no image carries; unless ``labels`` are ``every`` one, about misspelt ones."""
    counts = boxes["label"][~boxes["label"].isin(labels)].value_counts()
    if not every:
        counts = counts[counts.index.map(spelling).isin([spelling(label) for label in labels])]
    if counts.empty:
        return []
    close = {label: like for label in counts.index if (like := nearest(label, labels))}
    hints = {label: f"; images.csv has {like!r}" for label, like in close.items()}
    told = [f"{label!r} ({count}{hints.get(label, '')})" for label, count in counts[:_LABELS_SHOWN].items()]
    more = f" and {len(counts) - _LABELS_SHOWN} labels more" if len(counts) > _LABELS_SHOWN else ""
    own = next((label for label in counts.index if label not in close), counts.index[0])
    return [
        f"{counts.sum()} of {len(boxes)} boxes make no mask, as no image carries their label: {', '.join(told)}{more}. "
        f"Rename one with label_map={close or {own: 'NAME'}}, or list it in labels=[..., {own!r}] as a label of its "
        "own, unknown where there is no box"
    ]


def _denied(dataset: Dataset) -> list[str]:
    """A notice about boxes of a label that their image lacks."""
    return [
        f"{len(dataset.denied_boxes)} of {len(dataset.boxes)} boxes are of a label that images.csv denies their image, "
        f"such as {first['label']!r} of {first['image_id']!r}; their masks aren't scored unless it is added there"
        for first in dataset.denied_boxes[:1].to_dict("records")
    ]


def _to_original(boxes: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Boxes from pixels of the file to original pixels, as ``Dataset.boxes`` wants them."""
    boxes = boxes.reset_index(drop=True)
    frame = table.iloc[pd.Index(table["image_id"]).get_indexer(boxes["image_id"])]
    for axis, side in (("x", "width"), ("y", "height")):
        for end in ("min", "max"):
            scaled = boxes[f"{axis}_{end}"].to_numpy() * frame[f"orig_{side}"].to_numpy() / frame[side].to_numpy()
            boxes[f"{axis}_{end}"] = scaled
    return boxes[[*BOX_COLUMNS, *(column for column in boxes.columns if column not in BOX_COLUMNS)]]
