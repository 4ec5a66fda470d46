"""RSNA Pneumonia Detection Challenge 2018, stage 2: one DICOM a patient, boxes around lung opacities.

The folder as downloaded: ``stage_2_train_images/PATIENT.dcm``, ``stage_2_train_labels.csv`` (one row per box, or
one without coordinates for Target 0) and, optionally, ``stage_2_detailed_class_info.csv``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, stems_in
from cxrkit.data.public.loader import Missing, present, public_loader, with_labels
from cxrkit.data.public.xrv_tables import Annotations, Tables, table_path
from cxrkit.data.readers import read_image
from cxrkit.data.splits import FOLDS, image_folds, with_validation
from cxrkit.data.tables import box_table, corner_boxes, places, read_table, refuse, sound_rows, whole_boxes
from cxrkit.errors import DataError

__all__ = ["load_rsna", "read_annotations"]

SIDE = 1024
OPACITY = "Lung Opacity"
CLASSES = (OPACITY, "No Lung Opacity / Not Normal", "Normal")
LABELS_CSV, CLASSES_CSV = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images"
_BOX = ["x", "y", "width", "height"]


@public_loader
def load_rsna(
    root: str | Path,
    *,
    seed: int = 0,
    fold: int = 0,
    labels: Literal["binary", "classes", "normal"] = "binary",
    split_by: Literal["paper", "patients"] = "paper",
    tables: Tables = "folder",
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """Load RSNA stage 2; pixels are the stored ones divided by 255, no window is applied.

    Boxes are listed one by one, ``Sample.mask`` is their union. ``fold`` of the paper's five tests, an eighth of the
    others, chosen by ``seed``, validates. Options: see data_manifests/rsna.yaml. Raises DataError naming file and
    rows. Source: paper `bcos`, its published code.
    """
    folder = find_folder(root, LABELS_CSV, IMAGES)
    found = read_annotations(folder, tables, labels)
    table = found.images
    if split_by == "paper":
        table["split"] = _paper_split(table, found.labels, fold, seed)
    table["path"] = table["image_id"].map(stems_in(folder / IMAGES if (folder / IMAGES).is_dir() else folder))
    table = present(found.path, table, missing)
    read = partial(read_image, window=False)
    return {"labels": found.labels, "table": table, "boxes": found.boxes, "side": SIDE, "read": read}


def read_annotations(folder: Path, tables: str = "folder", labels: str = "binary") -> Annotations:
    """Labels and boxes of all patients, in order of their id, without looking at images."""
    path = table_path(folder, LABELS_CSV, tables=tables)
    rows = _sound(path, read_table(path, ["patientId", *_BOX, "Target"]))
    first = rows.sort_values("patientId", kind="stable").drop_duplicates("patientId")
    images = pd.DataFrame({"image_id": first["patientId"], "patient_id": first["patientId"]})
    images = with_labels(images, [OPACITY], first["Target"].to_numpy() == "1")
    classes = _classes(folder / CLASSES_CSV, images)
    if classes is None and labels != "binary":
        raise DataError(f"{folder}: labels={labels!r} needs {CLASSES_CSV}, which is not there")
    names = CLASSES if labels == "classes" else (OPACITY,)
    for name in names[1:]:
        images[name] = (classes == name).to_numpy(dtype=np.float32)
    if classes is not None:
        images["detailed_class"] = classes.to_numpy()
    if labels == "normal":
        images = images[images["detailed_class"].isin((OPACITY, "Normal"))]
    boxed = rows[rows["Target"] == "1"]
    boxes = box_table(boxed["patientId"], OPACITY, corner_boxes(path, boxed, _BOX), "RSNA")
    boxes = whole_boxes(path, boxes, np.full((len(boxes), 2), SIDE)).reset_index(drop=True)
    return Annotations(names, images, boxes, path)


def _sound(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose Target and coordinates go together."""
    if rows.empty:
        raise DataError(f"{path}: holds a header but no row")
    patient, target = rows["patientId"], rows["Target"]
    filled = rows[_BOX] != ""
    problems = {
        "patientId is empty": (patient, patient == ""),
        "Target is neither 0 nor 1": (target, ~target.isin(["0", "1"])),
        "Target is 1, but the box is not complete": (patient, (target == "1") & ~filled.all(axis=1)),
        "Target is 0, but there is a box": (patient, (target == "0") & filled.any(axis=1)),
        "Target differs between rows of a patient": (patient, target.groupby(patient).transform("nunique") > 1),
    }
    return sound_rows(path, rows, problems)


def _classes(path: Path, images: pd.DataFrame) -> pd.Series | None:
    """The detailed class of each patient, or None where the folder does not tell."""
    if not path.is_file():
        return None
    rows = read_table(path, ["patientId", "class"])
    patient, name = rows["patientId"], rows["class"]
    positive = patient.map(images.set_index("image_id")[OPACITY])
    problems = {
        f"class is none of {list(CLASSES)}": (patient, ~name.isin(CLASSES)),
        f"patientId is not in {LABELS_CSV}": (patient, positive.isna()),
        "class differs between rows of a patient": (patient, name.groupby(patient).transform("nunique") > 1),
        f"class does not fit Target in {LABELS_CSV}": (
            patient,
            positive.notna() & ((name == OPACITY) != (positive == 1)),
        ),
    }
    sound_rows(path, rows, problems)
    found = images["image_id"].map(rows.drop_duplicates("patientId").set_index("patientId")["class"])
    refuse(path, "has no row for a patient; the line is that of the labels", places(images["image_id"], found.isna()))
    return found


def _paper_split(table: pd.DataFrame, labels: tuple[str, ...], fold: int, seed: int) -> np.ndarray:
    positive = table[OPACITY].to_numpy(dtype=int)
    if min(positive.sum(), (1 - positive).sum()) < FOLDS:
        needed = f"{FOLDS} patients with and {FOLDS} without opacity"
        raise DataError(f"rsna: the paper's folds need {needed}; use split_by='patients'")
    is_test = image_folds(positive, table["patient_id"]) == fold
    return with_validation(is_test, table["patient_id"], table[list(labels)].to_numpy(), seed * FOLDS + fold)
