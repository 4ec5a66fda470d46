"""COVID-19 image data collection (Cohen et al., 2020): radiographs from publications, with findings as label paths."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, images_in, keep_present
from cxrkit.data.tables import EDGES, box_table, leaves_folder, read_table, sound_rows
from cxrkit.errors import DataError, ParameterError

__all__ = [
    "NO_FINDING",
    "UNKNOWN",
    "VIEWS",
    "cohen_table",
    "finding_paths",
    "load_covid_cohen",
    "located",
    "radiographs",
]

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
_KEPT = ("offset", "sex", "age", "view", "survival", "date", "location", "license", "url", "doi")


def load_covid_cohen(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    views: tuple[str, ...] = VIEWS,
    missing: str = "refuse",
) -> Dataset:
    """The repository covid-chestxray-dataset: metadata.csv with images/, of any vintage.

    Labels are the paths of the finding and all above them ("Pneumonia", "Pneumonia/Viral",
    "Pneumonia/Viral/COVID-19"), in order of name; findings joined by commas, as the table had them in 2020, become
    the same paths. "No Finding" is 0 everywhere, "todo" and "Unknown" are NaN everywhere. ``views``: which to keep;
    CT slices and lateral views have others. ``table`` keeps finding, offset (days), sex, age, view, licence and
    more; ``lung_mask`` where the repository holds one (see :func:`cxrkit.data.region`). Boxes are of the
    lungs, which are no labels. ``missing``: "refuse", or "leave_out" for a partial download. ``seed`` is not used.
    Raises DataError naming file and line. Source: paper `covid`, section on data.
    """
    root = find_folder(root, ("metadata.csv", "images"))
    table = cohen_table(root, views, missing)
    labels, targets, hierarchy = _labels(table["finding"])
    table = pd.concat([table, pd.DataFrame(targets, columns=list(labels))], axis=1)
    masks = images_in(root / _LUNG_MASKS)
    if masks:
        stem = table["image_id"].str.rsplit(".", n=1).str[0]
        table["lung_mask"] = (stem + "_mask.png").map(masks)
    boxes, frames = _lungs(root / _LUNG_BOXES, table)
    return file_dataset("covid_cohen", labels, table, boxes, size, preprocessing, frames=frames, hierarchy=hierarchy)


def cohen_table(root: Path, views: tuple[str, ...] = VIEWS, missing: str = "refuse") -> pd.DataFrame:
    """One row per radiograph of these views: image_id (the file's name), patient_id, path, finding, columns kept."""
    choose("missing", missing, ("refuse", "leave_out"))
    path = root / "metadata.csv"
    rows = radiographs(path, views)
    folder = rows["folder"].replace("", "images") if "folder" in rows.columns else pd.Series("images", rows.index)
    held = {name: images_in(root / name) for name in folder.unique() if not leaves_folder(name)}
    paths = [held.get(where, {}).get(name) for where, name in zip(folder, rows["filename"], strict=True)]
    return located("covid_cohen", path, rows, pd.Series(paths, index=rows.index, dtype=object), missing)


def radiographs(path: Path, views: tuple[str, ...]) -> pd.DataFrame:
    """The sound rows of a metadata.csv that show one of these views, as text; lines as index."""
    rows = read_table(path, ("finding", "view", "filename")).rename(columns={"Patientid": "patientid"})
    if "patientid" not in rows.columns:
        raise DataError(f"{path}: lacks the column 'patientid'; it has {list(rows.columns)}")
    if isinstance(views, str):
        raise ParameterError(f"views={views!r}: give a list of views, such as [{views!r}]")
    unknown = [view for view in views if view not in set(rows["view"])]
    if len(unknown) == len(views):
        raise DataError(f"{path}: holds no radiograph of the views {list(views)}; it has {sorted(set(rows['view']))}")
    rows = rows[rows["view"].isin(views)]
    problems = {
        "patientid is empty": (rows["patientid"], rows["patientid"] == ""),
        "filename is empty": (rows["filename"], rows["filename"] == ""),
        "filename leaves the folder": (rows["filename"], rows["filename"].map(leaves_folder)),
        "filename occurs twice": (rows["filename"], rows["filename"].duplicated()),
    }
    return sound_rows(path, rows, problems)


def located(name: str, path: Path, rows: pd.DataFrame, paths: pd.Series, missing: str) -> pd.DataFrame:
    """Rows of a metadata.csv with the files found for them (None where there is none), under this package's names."""
    keep = keep_present(name, path, rows["filename"], paths.notna().to_numpy(), missing)
    rows, paths = rows[keep], paths[keep]
    table = pd.DataFrame({"image_id": rows["filename"], "patient_id": rows["patientid"], "path": paths})
    table["finding"] = rows["finding"]
    for column in (column for column in _KEPT if column in rows.columns):
        table[column] = rows[column].where(rows[column] != "")
    for column in ("offset", "age"):
        if column in table.columns:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table.reset_index(drop=True)


def finding_paths(finding: str) -> tuple[str, ...]:
    """The label paths of a cell of the table: ``"COVID-19, ARDS"`` gives Pneumonia/Viral/COVID-19 and ARDS."""
    names = [name.strip() for name in finding.split(",")]
    return tuple(PATHS.get(name, name) for name in names if name and name != NO_FINDING)


def _labels(finding: pd.Series) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    """Labels in order of name, targets ``[N, L]``, and child -> parent."""
    chains = {}
    for cell in finding.unique():
        steps = [] if cell in UNKNOWN else [path.split("/") for path in finding_paths(cell)]
        chains[cell] = [["/".join(path[: depth + 1]) for depth in range(len(path))] for path in steps]
    labels = tuple(sorted({name for found in chains.values() for chain in found for name in chain}))
    hierarchy = {child: parent for found in chains.values() for chain in found for parent, child in pairwise(chain)}
    rows = {cell: np.isin(labels, [name for chain in found for name in chain]) for cell, found in chains.items()}
    targets = np.array([rows[cell] for cell in finding], dtype=np.float64).reshape(len(finding), len(labels))
    targets[finding.isin(UNKNOWN)] = np.nan
    return labels, targets, hierarchy


def _lungs(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame | None, np.ndarray]:
    """Boxes of the lungs from the repository's COCO file, and the image sizes that stand there (NaN for the others)."""
    frames = np.full((len(table), 2), np.nan)
    if not path.is_file():
        return None, frames
    try:
        annotated = json.loads(path.read_text(encoding="utf-8"))
        images = pd.DataFrame(annotated["images"])[["id", "file_name", "width", "height"]]
        boxed = pd.DataFrame(annotated["annotations"])[["image_id", "category_id", "bbox"]]
        names = {category["id"]: category["name"] for category in annotated["categories"]}
        edges = np.array(boxed["bbox"].tolist(), dtype=np.float64).reshape(-1, 4)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DataError(f"{path}: is not the COCO file of lung boxes that the repository holds") from None
    files = dict(zip(images["id"], images["file_name"], strict=True))
    # COCO gives corner and extent.
    edges[:, 2:] += edges[:, :2]
    boxes = box_table(boxed["image_id"].map(files), boxed["category_id"].map(names), edges, "General Blockchain")
    # Images that the annotators skipped stand there with boxes of nulls.
    boxes = boxes.dropna(subset=list(EDGES))
    extent = images.drop_duplicates("file_name").set_index("file_name").reindex(table["image_id"])
    return boxes, extent[["width", "height"]].to_numpy(dtype=np.float64)
