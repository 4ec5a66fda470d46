"""Paediatric chest radiographs of Kermany et al. (2018): normal, bacterial pneumonia, viral pneumonia."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, images_in
from cxrkit.data.public.loader import public_loader, with_labels
from cxrkit.data.tables import refuse
from cxrkit.errors import DataError

__all__ = ["LABELS", "kermany_table", "load_kermany"]

LABELS = ("Pneumonia", "Pneumonia/Bacterial", "Pneumonia/Viral")
HIERARCHY = {"Pneumonia/Bacterial": "Pneumonia", "Pneumonia/Viral": "Pneumonia"}
PARTS = {"train": "train", "val": "validation", "test": "test"}
FINDINGS = {"normal": "No Finding", "im": "No Finding", "bacteria": "Bacterial Pneumonia", "virus": "Viral Pneumonia"}
# person12_bacteria_34, IM-0115-0001, NORMAL2-IM-0246-0001-0002; the later release has BACTERIA-1008087-0001.
_NAME = (
    r"^(?:(?P<person>person\d+)_(?P<kind>bacteria|virus)_\d+"
    r"|(?P<normal>(?:NORMAL2-)?IM-\d+)(?:-\d+)+"
    r"|(?P<release>NORMAL|BACTERIA|VIRUS)-(?P<number>\d+)(?:-\d+)*)$"
)
# Byte-identical images under two numbers: they must not end on two sides of a split.
SAME_PATIENT = {"NORMAL2-IM-0096": "NORMAL2-IM-0095"}


@public_loader
def load_kermany(root: str | Path, *, split_by: Literal["patients", "official"] = "patients") -> dict[str, Any]:
    """The chest_xray folder: train, val and test, each with NORMAL and PNEUMONIA.

    Labels "Pneumonia" and its children "Pneumonia/Bacterial" and "Pneumonia/Viral"; the file name tells them, and the
    patient. Whether a number means the same child among bacterial and viral images, and in train and test, is not
    published: all images of a number count as one patient, which may join too many and never parts one. Numbers recur
    in several of the "official" folders, which is warned of. Raises DataError naming folder and file.
    """
    table = kermany_table(root)
    leaks = split_by == "official" and (table.groupby("patient_id")["split"].nunique() > 1).any()
    leak = "Patient numbers recur in several folders of the official split." if leaks else ""
    return {"labels": LABELS, "table": table, "hierarchy": HIERARCHY, "leak": leak}


def kermany_table(root: str | Path) -> pd.DataFrame:
    """One row per image, by name: image_id, patient_id, path, finding (as words), split (the folder), the labels."""
    folders = [f"{part}/{kind}" for part in PARTS for kind in ("NORMAL", "PNEUMONIA")]
    root = find_folder(root, *folders)
    rows = [(f"{folder}/{name}", path) for folder in folders for name, path in images_in(root / folder).items()]
    if not rows:
        raise DataError(f"{root}: its folders hold no picture")
    table = pd.DataFrame(rows, columns=["file", "path"])
    table["image_id"] = table["file"].str.extract(r"([^/]*)\.[^.]*$")[0]
    named = table["image_id"].str.extract(_NAME)
    kind = named["kind"].fillna(named["release"].str.lower()).fillna("im")
    table["finding"] = kind.map(FINDINGS)
    patient = named["person"].fillna(named["normal"]).fillna(named["number"])
    table["patient_id"] = patient.replace(SAME_PATIENT)
    table["split"] = table["file"].str.split("/").str[0].map(PARTS)
    normal, unknown = table["finding"] == "No Finding", patient.isna()
    misplaced = ~unknown & (normal != table["file"].str.contains("/NORMAL/"))
    problems = {
        "the name tells neither class nor patient (person1_virus_6, IM-0001-0001 are right)": unknown,
        "the name and the folder disagree about the class": misplaced,
        "a file name occurs in two folders": table["image_id"].duplicated(),
    }
    for problem, wrong in problems.items():
        refuse(root, problem, [(None, file) for file in table["file"][wrong]])
    bacterial, viral = table["finding"] == "Bacterial Pneumonia", table["finding"] == "Viral Pneumonia"
    columns = ["image_id", "patient_id", "path", "finding", "split"]
    table = with_labels(table[columns], LABELS, np.column_stack([~normal, bacterial, viral]))
    # By name, so that nothing depends on the order in which a disk lists its files.
    return table[~np.any(list(problems.values()), axis=0)].sort_values("image_id", ignore_index=True)
