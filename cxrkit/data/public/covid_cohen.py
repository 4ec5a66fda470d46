"""COVID-19 image data collection (Cohen et al., 2020): radiographs from publications, with findings as label paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, images_in
from cxrkit.data.public.loader import Missing, present, public_loader, with_labels
from cxrkit.data.tables import EDGES, box_table, leaves_folder, read_table, sound_rows
from cxrkit.errors import DataError, ParameterError

__all__ = ["PATHS", "VIEWS", "finding_paths", "load_covid_cohen", "radiographs"]

VIEWS = ("PA", "AP", "AP Supine")
NO_FINDING = "No Finding"
# Not yet looked at, or not told: says nothing about any label.
UNKNOWN = ("todo", "Unknown", "")
# Until mid 2020 the table held names joined by commas; since then, paths.
_ABOVE = {
    "Pneumonia/Viral": ("COVID-19", "SARS", "MERS", "Influenza", "Varicella"),
    "Pneumonia/Bacterial": ("Streptococcus", "Klebsiella", "Chlamydophila", "Legionella", "E.Coli"),
    "Pneumonia/Fungal": ("Pneumocystis",),
    "Pneumonia": ("Viral", "Bacterial", "Lipoid"),
}
PATHS = {name: f"{above}/{name}" for above, names in _ABOVE.items() for name in names}
PATHS["Mycoplasma Bacterial Pneumonia"] = "Pneumonia/Bacterial/Mycoplasma"
_LUNG_BOXES = "annotations/imageannotation_ai_lung_bounding_boxes.json"
_LUNG_MASKS = "annotations/lungVAE-masks"
_COLUMNS = ("offset", "sex", "age", "view", "survival", "date", "location", "license", "url", "doi")


@public_loader
def load_covid_cohen(
    root: str | Path, *, views: tuple[str, ...] = VIEWS, missing: Missing = "refuse"
) -> dict[str, Any]:
    """The repository covid-chestxray-dataset: metadata.csv with images/, of any vintage.

    Labels are the paths of the finding and all above them ("Pneumonia", "Pneumonia/Viral"), in order of name. "No
    Finding" is 0 everywhere, "todo" and "Unknown" are NaN everywhere. ``table`` keeps finding, offset (days), sex, age,
    view, licence and more; ``lung_mask`` where the repository holds one (see :func:`cxrkit.data.region`). Boxes
    are of the lungs, which are no labels. Options: see data_manifests/covid_cohen.yaml. Raises DataError naming file
    and line. Source: paper `covid`, section on data.
    """
    root = find_folder(root, ("metadata.csv", "images"))
    table = radiographs(root / "metadata.csv", views, missing)
    labels, targets, hierarchy = _labels(table["finding"])
    table = with_labels(table, labels, targets)
    if masks := images_in(root / _LUNG_MASKS):
        table["lung_mask"] = (table["image_id"].str.rsplit(".", n=1).str[0] + "_mask.png").map(masks)
    boxes, frames = _lungs(root / _LUNG_BOXES, table["image_id"])
    return {"labels": labels, "table": table, "boxes": boxes, "frames": frames, "hierarchy": hierarchy}


def radiographs(
    path: Path, views: tuple[str, ...], missing: str, elsewhere: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """One row per image of a metadata.csv that shows one of these views: image_id (the file's name), patient_id, path,
    finding, and the other columns that this package keeps.

    ``elsewhere``: paths by name of the file; by default they are in the folders that the table names, images or others.
    """
    rows = read_table(path, ("finding", "view", "filename", "patientid"))
    if isinstance(views, str):
        raise ParameterError(f"views={views!r}: give a list of views, such as [{views!r}]")
    held = sorted(set(rows["view"]))
    rows = rows[rows["view"].isin(views)]
    if rows.empty:
        raise DataError(f"{path}: holds no radiograph of the views {list(views)}; it has {held}")
    file = rows["filename"]
    problems = {
        "patientid is empty": (rows["patientid"], rows["patientid"] == ""),
        "filename is empty": (file, file == ""),
        "filename leaves the folder": (file, file.map(leaves_folder)),
        "filename occurs twice": (file, file.duplicated()),
    }
    rows = sound_rows(path, rows, problems)
    table = pd.DataFrame({"image_id": rows["filename"], "patient_id": rows["patientid"]})
    if elsewhere is None:
        folder = rows["folder"].replace("", "images") if "folder" in rows.columns else pd.Series("images", rows.index)
        there = {name: images_in(path.parent / name) for name in folder.unique() if not leaves_folder(name)}
        table["path"] = [there.get(name, {}).get(file) for name, file in zip(folder, rows["filename"], strict=True)]
    else:
        table["path"] = rows["filename"].map(elsewhere)
    table["finding"] = rows["finding"]
    for column in (column for column in _COLUMNS if column in rows.columns):
        table[column] = rows[column].where(rows[column] != "")
        if column in ("offset", "age"):
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return present(path, table, missing).reset_index(drop=True)


def finding_paths(finding: str) -> tuple[str, ...]:
    """The label paths of a cell of the table: ``"COVID-19, ARDS"`` gives Pneumonia/Viral/COVID-19 and ARDS."""
    names = [name.strip() for name in finding.split(",")]
    return tuple(PATHS.get(name, name) for name in names if name and name != NO_FINDING)


def _labels(finding: pd.Series) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    """Labels in order of name, targets ``[N, L]``, and child -> parent."""
    chains, hierarchy = {}, {}
    for cell in finding.unique():
        chains[cell] = set()
        for path in () if cell in UNKNOWN else finding_paths(cell):
            steps = list(accumulate(path.split("/"), "{}/{}".format))
            chains[cell].update(steps)
            hierarchy |= {child: parent for parent, child in pairwise(steps)}
    labels = tuple(sorted(set().union(*chains.values())))
    targets = np.array([[label in chains[cell] for label in labels] for cell in finding], dtype=float)
    targets = targets.reshape(len(finding), len(labels))
    targets[finding.isin(UNKNOWN)] = np.nan
    return labels, targets, hierarchy


def _lungs(path: Path, image_ids: pd.Series) -> tuple[pd.DataFrame | None, np.ndarray]:
    """Boxes of the lungs from the repository's COCO file, and the image sizes that stand there (NaN for the others)."""
    if not path.is_file():
        return None, np.full((len(image_ids), 2), np.nan)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        images = pd.DataFrame(held["images"]).set_index("id")[["file_name", "width", "height"]]
        # Images that the annotators skipped stand there with boxes of nulls.
        boxed = pd.DataFrame(held["annotations"])[["image_id", "category_id", "bbox"]]
        names = {category["id"]: category["name"] for category in held["categories"]}
        edges = np.array(boxed["bbox"].tolist(), dtype=np.float64).reshape(-1, 4)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DataError(f"{path}: is not the COCO file of lung boxes that the repository holds") from None
    # COCO gives corner and extent.
    edges[:, 2:] += edges[:, :2]
    files, sides = boxed["image_id"].map(images["file_name"]), boxed["category_id"].map(names)
    boxes = box_table(files, sides, edges, "General Blockchain").dropna(subset=list(EDGES))
    extent = images.drop_duplicates("file_name").set_index("file_name").reindex(image_ids)
    return boxes, extent.to_numpy(dtype=np.float64)
