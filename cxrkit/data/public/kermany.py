"""Paediatric chest radiographs of Kermany et al. (2018): normal, bacterial pneumonia, viral pneumonia."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, images_in
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


def load_kermany(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    split_by: str = "patients",
) -> Dataset:
    """The chest_xray folder: train, val and test, each with NORMAL and PNEUMONIA.

    Labels "Pneumonia" and its children "Pneumonia/Bacterial" and "Pneumonia/Viral"; the file name tells them, and the
    patient. Whether a number means the same child among bacterial and viral images, and in train and test, is not
    published: all images of a number count as one patient, which may join too many and never parts one.
    ``split_by``: "patients" (five folds of our own) or "official" (the three folders; numbers recur in several of
    them, which is warned of). ``seed`` is not used. Raises DataError naming folder and file.
    """
    choose("split_by", split_by, ("patients", "official"))
    table = kermany_table(root)
    leaks = split_by == "official" and (table.groupby("patient_id")["split"].nunique() > 1).any()
    leak = "Patient numbers recur in several folders of the official split." if leaks else ""
    if split_by == "patients":
        table = table.drop(columns="split")
    return file_dataset("kermany", LABELS, table, None, size, preprocessing, hierarchy=HIERARCHY, leak=leak)


def kermany_table(root: str | Path) -> pd.DataFrame:
    """One row per image, by name: image_id, patient_id, path, the labels, finding (as words), split (the folder)."""
    root = find_folder(root, *(f"{part}/NORMAL" for part in PARTS), *(f"{part}/PNEUMONIA" for part in PARTS))
    rows = [
        (part, folder, name, path)
        for part in PARTS
        for folder in ("NORMAL", "PNEUMONIA")
        for name, path in images_in(root / part / folder).items()
    ]
    if not rows:
        raise DataError(f"{root}: its folders hold no picture")
    table = pd.DataFrame(rows, columns=["part", "folder", "file", "path"])
    stem = table["file"].str.rsplit(".", n=1).str[0]
    named = stem.str.extract(_NAME)
    unknown = named.isna().all(axis=1)
    problem = "the name tells neither class nor patient (person1_virus_6, IM-0001-0001 are right)"
    refuse(root, problem, _files(table, unknown))
    kind = named["kind"].fillna(named["release"].str.lower()).fillna("im").str.lower()
    finding = kind.map(FINDINGS)
    misplaced = ~unknown & ((finding == "No Finding") != (table["folder"] == "NORMAL"))
    refuse(root, "the name and the folder disagree about the class", _files(table, misplaced))
    patient = named["person"].fillna(named["normal"]).fillna(named["number"])
    twice = stem.duplicated()
    refuse(root, "a file name occurs in two folders", [(None, repr(name)) for name in stem[twice]])
    columns = {"image_id": stem, "patient_id": patient.replace(SAME_PATIENT), "path": table["path"]}
    columns["Pneumonia"] = (finding != "No Finding").astype(float)
    columns["Pneumonia/Bacterial"] = (finding == "Bacterial Pneumonia").astype(float)
    columns["Pneumonia/Viral"] = (finding == "Viral Pneumonia").astype(float)
    found = pd.DataFrame({**columns, "finding": finding, "split": table["part"].map(PARTS)})
    # By name, so that nothing depends on the order in which a disk lists its files.
    return found[~unknown & ~misplaced & ~twice].sort_values("image_id", ignore_index=True)


def _files(table: pd.DataFrame, wrong: pd.Series) -> list[tuple[None, str]]:
    rows = table.loc[wrong, ["part", "folder", "file"]].itertuples(index=False)
    return [(None, "/".join(row)) for row in rows]
