"""ChestX-Det10 and ChestX-Det: findings that radiologists boxed, and later outlined, on NIH ChestX-ray14 images.

The folder: ``ChestX_Det_train.json`` and ``ChestX_Det_test.json`` (13 labels, boxes and outlines), or ``train.json``
and ``test.json`` (ChestX-Det10: 10 labels, boxes), or ``chestxdet.json``, both parts in one with the names that the
images have at the NIH; with the images in folders beside them, or in a copy of NIH ChestX-ray14.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, ValidationInfo, model_validator

from cxrkit.data.public.layout import find_folder, stems_in, subfolders
from cxrkit.data.public.loader import Missing, first_problem, present, public_loader, read_json, with_labels
from cxrkit.data.public.outlines import POLYGON, Outlines
from cxrkit.data.splits import with_validation
from cxrkit.data.tables import box_table, refuse, whole_boxes

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
_Coordinate = Annotated[FiniteFloat, Field(ge=-1, le=SIDE + 1)]
_Polygon = Annotated[list[tuple[_Coordinate, _Coordinate]], Field(min_length=3)]


class _Image(BaseModel):
    """One image of the JSON file: findings with one box and, maybe, one outline each."""

    file_name: Annotated[str, Field(min_length=1)]
    nih_file: str | None = None
    split: Literal["train", "test"] | None = None
    syms: list[str]
    boxes: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]]
    polygons: list[_Polygon] | None = None

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo):
        if unknown := [finding for finding in self.syms if finding not in info.context]:
            raise ValueError(f"syms {unknown} are none of {', '.join(info.context)}")
        if len({len(held) for held in (self.syms, self.boxes, self.polygons) if held is not None}) > 1:
            raise ValueError("syms, boxes and polygons are not equally many")
        return self


@public_loader
def load_chestx_det(
    root: str | Path,
    *,
    seed: int = 0,
    images: str | Path | None = None,
    split_by: Literal["patients", "official"] = "patients",
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """Load ChestX-Det or ChestX-Det10. ``Sample.truth`` holds the filled outlines, where the release has them.

    ``images``: where the images lie, if not in ``root``: a folder with pictures under the names of the JSON file, or
    NIH ChestX-ray14 as downloaded. The "official" parts share patients: of 1 677 known ones, 271 are in both. Patients
    are known by the NIH's file names alone; an image without one counts as a patient of its own, with a UserWarning.
    Further options: see data_manifests/chestx_det.yaml. Raises DataError naming file and entry.
    """
    folder = find_folder(root, *(names for names, _ in _FILES))
    names, labels = next((names, labels) for names, labels in _FILES if all((folder / n).is_file() for n in names))
    path = folder / names[0]
    table = _with_patients(path, pd.concat([_read_images(folder / name, labels) for name in names], ignore_index=True))
    table = with_labels(table, labels, [[label in found for label in labels] for found in table["syms"]])
    is_test = table.pop("split") == "test"
    if split_by == "official":
        table["split"] = with_validation(is_test, table["patient_id"], table[list(labels)].to_numpy(), seed)
    place = folder if images is None else find_folder(images, ".")
    deeper = [one for part in subfolders(place) for one in subfolders(part) if one.name != part.name]
    files = stems_in(place, *subfolders(place), *deeper)
    table["path"] = table["file_name"].str.rpartition(".")[0].map(files).fillna(table["image_id"].map(files))
    # The file has no lines to name.
    table = present(path, table.set_axis([None] * len(table)), missing, "file_name").reset_index(drop=True)
    each = table[["image_id", "syms", "boxes"]].explode(["syms", "boxes"]).dropna()
    edges = np.array(each["boxes"].tolist())
    boxes = box_table(each["image_id"].to_numpy(), each["syms"].to_numpy(), edges, "ChestX-Det")
    boxes = whole_boxes(path, boxes.set_axis([None] * len(boxes)), np.full((len(boxes), 2), SIDE))
    shapes = [
        [(finding, POLYGON, np.array(polygon)) for finding, polygon in zip(syms, polygons or (), strict=False)]
        for syms, polygons in zip(table["syms"], table["polygons"], strict=True)
    ]
    return {
        "labels": labels,
        "table": table.drop(columns=["syms", "boxes", "polygons"]),
        "boxes": boxes.reset_index(drop=True),
        "side": SIDE,
        "truth": Outlines(labels, table["path"].tolist(), shapes) if any(shapes) else None,
        "leak": "The published parts of ChestX-Det share patients." if split_by == "official" else "",
    }


def _read_images(path: Path, labels: Sequence[str]) -> pd.DataFrame:
    """One row per image of a JSON file, with the columns of :class:`_Image`."""
    wanted = "a list of images, each with file_name, syms and boxes"
    rows, wrong = [], []
    for position, entry in enumerate(read_json(path, Annotated[list[Any], Field(min_length=1)], wanted)):
        try:
            rows.append(_Image.model_validate(entry, context=labels).model_dump())
        except ValidationError as error:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            wrong.append((None, f"entry {position}, file_name {name!r}: {first_problem(error)}"))
    refuse(path, f"is not {wanted}", wrong)
    table = pd.DataFrame(rows, columns=list(_Image.model_fields))
    return table.fillna({"nih_file": "", "split": "test" if path.name.endswith("test.json") else "train"})


def _with_patients(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    # ChestX-Det10 names its files as the NIH does.
    own = table["nih_file"].where(table["nih_file"] != "", table["file_name"])
    image_id = own.str.rpartition(".")[0]
    twice = image_id.duplicated()
    refuse(path, "an image occurs twice", [(None, repr(name)) for name in table["file_name"][twice]])
    number = own.str.extract(r"^0*(\d+)_\d{3}\.png$")[0].where(own.str.fullmatch(r"\d{8}_\d{3}\.png"))
    if unknown := int(number.isna().sum()):
        text = f"{unknown} of {len(table)} images do not tell their patient and count as one each"
        warnings.warn(f"chestx_det: {text}; parts of a split may share patients", UserWarning, stacklevel=4)
    table.insert(0, "image_id", image_id)
    table.insert(1, "patient_id", number.fillna(image_id))
    return table[~twice].reset_index(drop=True)
