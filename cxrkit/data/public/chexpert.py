"""CheXpert: labels with uncertainty, and the outlines of CheXlocalize on its validation and test images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, PositiveInt, model_validator

from cxrkit.data.dataset import BOX_COLUMNS
from cxrkit.data.public.layout import find_folder, subfolders
from cxrkit.data.public.loader import Missing, present, public_loader, read_json
from cxrkit.data.public.outlines import RUNS, Outlines, rle_box, rle_runs
from cxrkit.data.size_limits import check_pixels
from cxrkit.data.tables import read_table, sound_rows
from cxrkit.errors import DataError

__all__ = ["LABELS", "load_chexpert"]

LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
HIERARCHY = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    **dict.fromkeys(("Lung Lesion", "Edema", "Consolidation", "Atelectasis"), "Lung Opacity"),
    "Pneumonia": "Consolidation",
}
# Tables of each part and their folders: CheXpert's own, then those of the CheXlocalize release.
PARTS = {
    "train": {"train.csv": "train"},
    "validation": {"valid.csv": "valid", "val_labels.csv": "val"},
    "test": {"test.csv": "test", "test_labels.csv": "test"},
}
OUTLINES = {"validation": "gt_segmentations_val.json", "test": "gt_segmentations_test.json"}
RENAMED = {"Airspace Opacity": "Lung Opacity"}
POLICIES = {"nan": np.nan, "zeros": 0.0, "ones": 1.0}
_TAIL = r"(?P<file>(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<view>view\d+_(?P<side>frontal|lateral))\.\w+)$"
_COLUMNS = {"Sex": "sex", "Age": "age", "AP/PA": "projection"}


@public_loader
def load_chexpert(
    root: str | Path,
    *,
    uncertain: Literal["nan", "zeros", "ones"] = "nan",
    unmentioned: Literal["zeros", "nan"] = "zeros",
    frontal_only: bool = False,
    split_by: Literal["official", "patients"] = "official",
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """CheXpert-v1.0 or CheXpert-v1.0-small, or the folders CheXpert and CheXlocalize of the CheXlocalize release.

    14 labels in published order. Where gt_segmentations_val.json or gt_segmentations_test.json is in the folder or one
    beside it, ``truth`` holds the radiologists' outlines of ten labels on those images, and a box bounds each; an image
    not named there has none of them. Whether a patient's folder is there is looked at, not every file. Options: see
    data_manifests/chexpert.yaml. Raises DataError naming file and line.
    """
    root = Path(root)
    home = find_folder(root, *(name for tables in PARTS.values() for name in tables))
    cells = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": POLICIES[unmentioned]}
    cells |= dict.fromkeys(("-1", "-1.0"), POLICIES[uncertain])
    parts = []
    for part, tables in PARTS.items():
        name = next((name for name in tables if (home / name).is_file()), None)
        if name is not None:
            part_table = _read_part(home / name, home / tables[name], cells, frontal_only)
            parts.append(present(home / name, part_table, missing, "Path").drop(columns="Path").assign(split=part))
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise DataError(f"{home}: its tables name no image that is there")
    shapes, grids, boxes = _read_outlines([root, home, *subfolders(root)], table)
    return {
        "labels": LABELS,
        "table": table,
        "boxes": pd.DataFrame(boxes, columns=list(BOX_COLUMNS)),
        "frames": np.array([(np.nan, np.nan) if grid == (1, 1) else grid for grid in grids]),
        "hierarchy": HIERARCHY,
        "truth": Outlines(LABELS, grids, shapes),
    }


def _read_part(path: Path, folder: Path, cells: Mapping[str, float], frontal_only: bool) -> pd.DataFrame:
    raw = read_table(path, ("Path", *LABELS))
    named = raw["Path"].str.extract(_TAIL)
    table = pd.DataFrame({"image_id": named["patient"] + "_" + named["study"] + "_" + named["view"]})
    table["patient_id"] = named["patient"]
    table["path"] = (os.path.join(folder, "") + named["file"]).where(named["patient"].isin(_names(folder)))
    for label in LABELS:
        table[label] = raw[label].map(cells).astype(np.float32)
    for column in _COLUMNS:
        if column in raw.columns:
            table[_COLUMNS[column]] = raw[column].where(raw[column] != "")
    table = table.assign(view=named["side"], Path=raw["Path"])
    unknown = named["file"].isna()
    problems = {
        "Path does not end in patient/study/view": (raw["Path"], unknown),
        "an image occurs twice": (raw["Path"], table["image_id"].duplicated() & ~unknown),
    }
    problems |= {f"{name} is none of 1, 0, -1 and empty": (raw[name], ~raw[name].isin(list(cells))) for name in LABELS}
    table = sound_rows(path, table, problems)
    return table[table["view"] == "frontal"] if frontal_only else table


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


# Outlines


class _Outline(BaseModel):
    """The mask of a label as run-length code; size: height and width."""

    size: tuple[PositiveInt, PositiveInt]
    counts: list[Annotated[int, Field(ge=0, le=10**9)]] | str

    @model_validator(mode="after")
    def _fill(self):
        runs = rle_runs(self.counts)
        if (runs < 0).any() or runs.sum() != self.size[0] * self.size[1]:
            raise ValueError(f"the runs do not fill {self.size[1]} x {self.size[0]} pixels")
        self.counts = runs.tolist()
        return self


def _read_outlines(places: list[Path], table: pd.DataFrame) -> tuple[list, list[tuple[int, int]], list[tuple]]:
    """Shapes and grid of each row, as :class:`Outlines` takes them, and the rows of the table of boxes."""
    found: dict[str, tuple[Path, dict[str, dict[str, _Outline]]]] = {}
    for part, name in OUTLINES.items():
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is not None:
            wanted = "a table of outlines, image -> label -> size and counts"
            found[part] = path, read_json(path, dict[str, dict[str, _Outline]], wanted)
    shapes, grids, boxes = [None] * len(table), [(1, 1)] * len(table), []
    for row, (image, part) in enumerate(zip(table["image_id"], table["split"], strict=True)):
        if part not in found:
            continue
        path, outlines = found[part]
        # The file leaves out the images on which there was nothing to outline.
        shapes[row] = []
        for name, outline in outlines.get(image, {}).items():
            label, (height, width) = RENAMED.get(name, name), outline.size
            if label not in LABELS:
                raise DataError(f"{path}: {image} has the unknown label {label!r}; known are {', '.join(LABELS)}")
            if shapes[row] and grids[row] != (width, height):
                raise DataError(f"{path}: {image} has outlines of {grids[row]} and of {(width, height)} pixels")
            check_pixels(path, width, height)
            runs, grids[row] = np.array(outline.counts), (width, height)
            shapes[row].append((label, RUNS, runs))
            if box := rle_box(runs, height):
                boxes.append((image, label, *box, "CheXlocalize"))
    return shapes, grids, boxes
