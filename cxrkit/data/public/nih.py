"""NIH ChestX-ray14: 112 120 images of 30 805 patients with 14 mined labels, and 984 boxes of 8 labels on 880 of them.

The folder as downloaded: ``images_001/images/*.png`` to ``images_012`` (or all PNGs in ``images``), either vintage of
``Data_Entry_2017*.csv``, ``BBox_List_2017.csv``, ``train_val_list.txt`` and ``test_list.txt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, stems_in, subfolders
from cxrkit.data.public.loader import Missing, present, public_loader, with_labels
from cxrkit.data.public.xrv_tables import Annotations, Tables, table_path
from cxrkit.data.splits import with_validation
from cxrkit.data.tables import box_table, corner_boxes, places, read_table, refuse, sound_rows, whole_boxes
from cxrkit.errors import DataError

__all__ = ["LABELS", "load_nih", "read_annotations"]

SIDE = 1024
# In the order of CheXNet.
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
NO_FINDING = "No Finding"
ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
LISTS = ("train_val_list.txt", "test_list.txt")
# Columns of the published table and ours. The last names of its header hold commas that nobody quoted.
_NUMBERS = {"Follow-up #": "follow_up", "OriginalImage[Width": "acquired_width", "Height]": "acquired_height"}
_ENTRY = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position", *_NUMBERS)
_SEX = ("Patient Sex", "Patient Gender")
_BOX = ("Bbox [x", "y", "w", "h]")
_OLDEST = 120
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}


@public_loader
def load_nih(
    root: str | Path,
    *,
    seed: int = 0,
    split_by: Literal["official", "patients"] = "official",
    tables: Tables = "folder",
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """Load NIH ChestX-ray14. Boxes are in pixels of the published 1024 x 1024 images; "Infiltrate" is "Infiltration".

    The table has follow_up, age (years; NaN where it claims more than 120), sex, view and the size of the image that
    was acquired. Of the patients in train_val_list.txt an eighth, chosen by ``seed``, validates. Options: see
    data_manifests/nih.yaml. Raises DataError naming file and rows. Source: paper `relevance`.
    """
    folder = find_folder(root, *ENTRIES, "images", "images_001")
    found = read_annotations(folder, tables)
    table = found.images
    if split_by == "official":
        is_test = _official_test_part(folder, found)
        table["split"] = with_validation(is_test, table["patient_id"], table[list(LABELS)].to_numpy(), seed)
    parts = [part for part in subfolders(folder) if part.name.startswith("images")]
    files = stems_in(folder, *parts, *(part / "images" for part in parts if part.name != "images"))
    table["path"] = table["image_id"].map(files)
    return {"labels": LABELS, "table": present(found.path, table, missing), "boxes": found.boxes, "side": SIDE}


def read_annotations(folder: Path, tables: str = "folder") -> Annotations:
    """Labels and boxes of all images, in the table's order, without looking at images."""
    path = table_path(folder, *ENTRIES, tables=tables)
    rows = _sound_entries(path)
    patient = rows["Patient ID"].astype(int).astype(str).astype(object)
    images = pd.DataFrame({"image_id": rows["Image Index"].str.removesuffix(".png"), "patient_id": patient})
    images = with_labels(images, LABELS, _findings(path, rows["Finding Labels"]))
    for column, name in _NUMBERS.items():
        images[name] = pd.to_numeric(rows[column], errors="coerce")
    images["age"] = _age(path, rows["Patient Age"])
    images[["sex", "view"]] = rows[["sex", "View Position"]]
    boxes = _boxes(table_path(folder, BOXES, tables=tables), images["image_id"])
    return Annotations(LABELS, images, boxes, path)


def _sound_entries(path: Path) -> pd.DataFrame:
    rows = read_table(path, _ENTRY, _SEX)
    sex = next((column for column in _SEX if column in rows.columns), None)
    if sex is None:
        raise DataError(f"{path}: lacks the column {' or '.join(_SEX)}; it has {list(rows.columns)}")
    if rows.empty:
        raise DataError(f"{path}: holds a header but no row")
    file, patient = rows["Image Index"], rows["Patient ID"]
    well_named = file.str.fullmatch(r"\d{8}_\d{3}\.png").astype(bool)
    same = pd.to_numeric(patient, errors="coerce") == pd.to_numeric(file.str[:8], errors="coerce")
    problems = {
        "Image Index is not like 00000001_000.png": (file, ~well_named),
        "Image Index occurs twice": (file, file.duplicated()),
        "Patient ID is not that of Image Index": (patient, well_named & ~same),
    }
    return sound_rows(path, rows.rename(columns={sex: "sex"}), problems)


def _findings(path: Path, cells: pd.Series) -> np.ndarray:
    # Few of the cells differ: each kind is looked at once.
    kind_of, kinds = pd.factorize(cells)
    found = pd.Series(kinds, dtype=object).str.get_dummies("|")
    unknown = found.drop(columns=[*LABELS, NO_FINDING], errors="ignore").any(axis=1).to_numpy()[kind_of]
    refuse(path, f"Finding Labels holds a name other than {', '.join(LABELS)}", places(cells, unknown))
    found = found.reindex(columns=[*LABELS, NO_FINDING], fill_value=0)
    contradicts = ((found[NO_FINDING] == 1) == found[list(LABELS)].any(axis=1)).to_numpy()[kind_of]
    refuse(path, f"Finding Labels needs either findings or {NO_FINDING!r}", places(cells, contradicts & ~unknown))
    return found[list(LABELS)].to_numpy()[kind_of]


def _age(path: Path, cells: pd.Series) -> np.ndarray:
    """Years, from "58", "058Y", "011M" or "023D", as the vintages write it."""
    parts = cells.str.extract(r"^(\d+)([YMD]?)$")
    refuse(path, "Patient Age is not like 58 or 058Y", places(cells, parts[0].isna()))
    years = pd.to_numeric(parts[0], errors="coerce") * parts[1].map(_YEARS).astype(float)
    return years.where(years <= _OLDEST).to_numpy()


def _boxes(path: Path, image_ids: pd.Series) -> pd.DataFrame:
    rows = read_table(path, ("Image Index", "Finding Label", *_BOX))
    image, label = rows["Image Index"], rows["Finding Label"].replace("Infiltrate", "Infiltration")
    boxes = box_table(image.str.removesuffix(".png"), label, corner_boxes(path, rows, _BOX), "NIH")
    problems = {
        "Image Index is not in the table of images": (image, ~boxes["image_id"].isin(image_ids)),
        "Finding Label is unknown": (rows["Finding Label"], ~boxes["label"].isin(LABELS)),
    }
    boxes = sound_rows(path, boxes, problems)
    return whole_boxes(path, boxes, np.full((len(boxes), 2), SIDE)).reset_index(drop=True)


def _official_test_part(folder: Path, found: Annotations) -> np.ndarray:
    listed = []
    for name in LISTS:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: lacks {name}, which makes the official split; or use split_by='patients'")
        listed.append(found.images["image_id"].isin(path.read_text(encoding="utf-8").replace(".png", "").split()))
    train, test = listed
    where = places(found.images["image_id"], train == test)
    refuse(found.path, f"the image is in both or neither of {' and '.join(LISTS)}", where)
    return test.to_numpy()
