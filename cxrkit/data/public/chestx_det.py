"""ChestX-Det10 and ChestX-Det: findings that radiologists boxed, and later outlined, on NIH ChestX-ray14 images.

The folder: ``ChestX_Det_train.json`` and ``ChestX_Det_test.json`` (13 labels, boxes and outlines), or ``train.json``
and ``test.json`` (ChestX-Det10: 10 labels, boxes), or ``chestxdet.json``, both parts in one with the names that the
images have at the NIH; with the images in folders beside them, or in a copy of NIH ChestX-ray14.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, keep_present, stems_in, subfolders
from cxrkit.data.public.object_cxr import POLYGON, outline_mask
from cxrkit.data.splits import with_validation
from cxrkit.data.tables import box_table, refuse, whole_boxes
from cxrkit.errors import DataError

__all__ = ["LABELS", "LABELS_10", "load_chestx_det"]

SIDE = 1024
LABELS_10 = (
    *("Atelectasis", "Calcification", "Consolidation", "Effusion", "Emphysema", "Fibrosis", "Fracture", "Mass"),
    *("Nodule", "Pneumothorax"),
)
LABELS = tuple(sorted((*LABELS_10, "Cardiomegaly", "Diffuse Nodule", "Pleural Thickening")))
_FILES = (
    (("ChestX_Det_train.json", "ChestX_Det_test.json"), LABELS),
    (("chestxdet.json",), LABELS),
    (("train.json", "test.json"), LABELS_10),
)
_NIH = r"^(\d{8})_\d{3}\.png$"


def load_chestx_det(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    images: str | Path | None = None,
    split_by: str = "patients",
    missing: str = "refuse",
) -> Dataset:
    """Load ChestX-Det or ChestX-Det10. ``Sample.truth`` holds the filled outlines, where the release has them.

    ``images``: where the images lie, if not in ``root``: a folder with pictures under the names of the JSON file, or
    NIH ChestX-ray14 as downloaded. ``split_by``: "patients", this package's folds; "official", the published parts,
    which share patients: of 1 677 known ones, 271 are in both. An eighth of the training patients validates. Patients
    are known by the NIH's file names alone; an image without one counts as a patient of its own, with a UserWarning.
    ``missing``: "leave_out" loads the images that are there. Raises DataError naming file and entry.
    """
    choose("split_by", split_by, ("patients", "official"))
    folder = find_folder(root, *(names for names, _ in _FILES))
    names, labels = next((names, labels) for names, labels in _FILES if all((folder / n).is_file() for n in names))
    entries = [entry for name in names for entry in _entries(folder / name, labels)]
    path = folder / names[0]
    table = _table(path, entries, labels)
    if split_by == "official":
        is_test = np.array([entry.part == "test" for entry in entries])
        table["split"] = with_validation(is_test, table["patient_id"], table[list(labels)].to_numpy(), seed)
    table["path"] = _paths(folder if images is None else find_folder(images, "."), table)
    asked = table["file_name"].set_axis([None] * len(table))  # the file has no lines to name
    there = keep_present("chestx_det", path, asked, table["path"].notna(), missing)
    table = table[there].reset_index(drop=True)
    entries = [entry for entry, kept in zip(entries, there, strict=True) if kept]
    outlined = any(entry.outlines for entry in entries)
    truth = _Truth(labels, entries) if outlined else None
    boxes = _boxes(path, entries, table["image_id"])
    leak = "The published parts of ChestX-Det share patients." if split_by == "official" else ""
    return file_dataset("chestx_det", labels, table, boxes, size, preprocessing, side=SIDE, truth=truth, leak=leak)


@dataclass(frozen=True)
class _Entry:
    """One image of the JSON file, checked: findings with one box and, maybe, one outline each."""

    file: str
    nih: str
    part: str
    findings: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    outlines: tuple[np.ndarray, ...]


def _entries(path: Path, labels: Sequence[str]) -> list[_Entry]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON text ({error})") from None
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: expected a list of images, each with file_name, syms and boxes")
    part = "test" if path.name.endswith("test.json") else "train"
    checked: list[_Entry] = []
    wrong: dict[str, list[tuple[None, str]]] = {}
    for position, entry in enumerate(found):
        result = _entry(entry, part, labels)
        if isinstance(result, _Entry):
            checked.append(result)
        else:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            wrong.setdefault(result, []).append((None, f"entry {position}, file_name {name!r}"))
    for problem, where in wrong.items():
        refuse(path, problem, where)
    return checked


def _entry(entry: Any, part: str, labels: Sequence[str]) -> _Entry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"file_name", "syms", "boxes"} <= set(entry):
        return "an entry needs file_name, syms and boxes"
    file, nih, part = entry["file_name"], entry.get("nih_file") or "", entry.get("split", part)
    findings, boxes, polygons = entry["syms"], entry["boxes"], entry.get("polygons")
    if not (isinstance(file, str) and file and isinstance(nih, str)):
        return "file_name must be the name of a file"
    if part not in ("train", "test"):
        return "split is neither train nor test"
    if not all(isinstance(held, list) for held in (findings, boxes, polygons or [])):
        return "syms, boxes and polygons must be lists"
    if any(finding not in labels for finding in findings):
        return f"syms holds a name other than {', '.join(labels)}"
    if len(boxes) != len(findings) or (polygons is not None and len(polygons) != len(findings)):
        return "syms, boxes and polygons are not equally many"
    placed, outlines = _numbers(boxes), [_numbers(polygon) for polygon in polygons or []]
    if placed is None or (boxes and placed.shape != (len(boxes), 4)):
        return "a box is not four numbers"
    if any(one is None or one.ndim != 2 or one.shape[1] != 2 or len(one) < 3 for one in outlines):
        return "a polygon is not three or more points"
    if any(not ((one >= -1) & (one <= SIDE + 1)).all() for one in outlines):
        return f"a polygon leaves the image of {SIDE} x {SIDE}"
    return _Entry(file, nih, part, tuple(findings), tuple(map(tuple, placed.tolist())), tuple(outlines))


def _numbers(values: Any) -> np.ndarray | None:
    """The array, or None where the lists do not make one of finite numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if np.isfinite(array).all() else None


def _table(path: Path, entries: Sequence[_Entry], labels: Sequence[str]) -> pd.DataFrame:
    table = pd.DataFrame({"file_name": [e.file for e in entries], "nih_file": [e.nih for e in entries]}, dtype=object)
    # ChestX-Det10 names its files as the NIH does.
    own = table["nih_file"].where(table["nih_file"] != "", table["file_name"])
    table["image_id"] = own.str.rpartition(".")[0]
    twice = table["image_id"].duplicated()
    refuse(path, "an image occurs twice", [(None, repr(name)) for name in table["file_name"][twice]])
    patient = pd.to_numeric(own.str.extract(_NIH)[0], errors="coerce")
    unknown = int(patient.isna().sum())
    if unknown:
        text = f"{unknown} of {len(table)} images do not tell their patient and count as one each"
        warnings.warn(f"chestx_det: {text}; parts of a split may share patients", UserWarning, stacklevel=3)
    table["patient_id"] = [
        image if missing else str(int(number))
        for image, number, missing in zip(table["image_id"], patient, patient.isna(), strict=True)
    ]
    for label in labels:
        table[label] = np.array([label in e.findings for e in entries], dtype=np.float32)
    return table


def _paths(folder: Path, table: pd.DataFrame) -> pd.Series:
    """The file of each image under its own or its NIH name, in the folder or two levels below."""
    below = subfolders(folder)
    files = stems_in(
        folder, *below, *(deeper for part in below for deeper in subfolders(part) if deeper.name != part.name)
    )
    own = table["file_name"].str.rpartition(".")[0].map(files)
    return own.where(own.notna(), table["image_id"].map(files))


def _boxes(path: Path, entries: Sequence[_Entry], image_ids: Sequence[str]) -> pd.DataFrame:
    names = np.repeat(np.asarray(image_ids, dtype=object), [len(entry.findings) for entry in entries])
    findings = [finding for entry in entries for finding in entry.findings]
    boxes = box_table(names, findings, np.array([box for entry in entries for box in entry.boxes]), "ChestX-Det")
    boxes.index = [None] * len(boxes)  # the file has no lines to name
    return whole_boxes(path, boxes, np.full((len(boxes), 2), SIDE)).reset_index(drop=True)


@dataclass(frozen=True)
class _Truth:
    """The outlines of each row, filled: a pixel is inside when its centre is. Bool ``[L, 1024, 1024]``."""

    labels: tuple[str, ...]
    entries: Sequence[_Entry]

    def __call__(self, row: int) -> np.ndarray:
        masks = np.zeros((len(self.labels), SIDE, SIDE), dtype=bool)
        entry = self.entries[row]
        for finding, outline in zip(entry.findings, entry.outlines, strict=True):
            masks[self.labels.index(finding)] |= outline_mask([(POLYGON, outline)], SIDE, SIDE)
        return masks
