"""CheXpert: labels with uncertainty, and the outlines of CheXlocalize on its validation and test images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import BOX_COLUMNS, Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, keep_present, subfolders
from cxrkit.data.size_limits import check_pixels
from cxrkit.data.tables import places, read_table, refuse
from cxrkit.errors import DataError

__all__ = ["LABELS", "Outlines", "load_chexpert", "rle_box", "rle_mask", "rle_runs"]

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
# Part, names of its table and names of its folder: CheXpert's own, then those of the CheXlocalize release.
PARTS = (
    ("train", ("train.csv",), ("train",)),
    ("validation", ("valid.csv", "val_labels.csv"), ("valid", "val")),
    ("test", ("test.csv", "test_labels.csv"), ("test",)),
)
OUTLINES = {"validation": "gt_segmentations_val.json", "test": "gt_segmentations_test.json"}
RENAMED = {"Airspace Opacity": "Lung Opacity"}
UNCERTAIN = {"nan": np.nan, "zeros": 0.0, "ones": 1.0}
_TAIL = re.compile(r"(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<view>view\d+_(?:frontal|lateral))\.\w+$")
# Cells of a table to the positions of their values: negative, positive, uncertain, not mentioned.
_CODES = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": 2, "-1.0": 2, "": 3}
_LONGEST = 40  # bits of a run: none is longer than an image
_KEPT = {"Sex": "sex", "Age": "age", "AP/PA": "projection"}


def load_chexpert(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    uncertain: str = "nan",
    unmentioned: str = "zeros",
    frontal_only: bool = False,
    split_by: str = "official",
    missing: str = "refuse",
) -> Dataset:
    """CheXpert-v1.0 or CheXpert-v1.0-small, or the folders CheXpert and CheXlocalize of the CheXlocalize release.

    14 labels in published order. ``uncertain``: what -1 becomes, "nan", "zeros" or "ones"; ``unmentioned``: what an
    empty cell becomes, "zeros" (as its authors count it) or "nan". ``frontal_only`` leaves lateral views out.
    ``split_by``: "official" (train.csv, valid.csv and, where it is there, the test table) or "patients" (five folds
    of our own). Where gt_segmentations_val.json or gt_segmentations_test.json is in the folder or one beside it,
    ``truth`` holds the radiologists' outlines of ten labels on those images, and a box bounds each; an image not
    named there has none of them. ``missing``: whether a patient's folder is there is looked at, not every file.
    ``seed`` is not used. Raises DataError naming file and line.
    """
    choose("uncertain", uncertain, tuple(UNCERTAIN))
    choose("unmentioned", unmentioned, ("zeros", "nan"))
    choose("split_by", split_by, ("official", "patients"))
    root = Path(root)
    home = find_folder(root, *(table for _, tables, _ in PARTS for table in tables))
    values = (0.0, 1.0, UNCERTAIN[uncertain], UNCERTAIN[unmentioned])
    parts = []
    for part, tables, folders in PARTS:
        path = next((home / name for name in tables if (home / name).is_file()), None)
        if path is not None:
            folder = next((home / name for name in folders if (home / name).is_dir()), home / folders[0])
            parts.append(_read_part(part, path, folder, values, frontal_only, missing))
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise DataError(f"{home}: its tables name no image that is there")
    outlines, covered = _read_outlines(root, home, table)
    boxes, frames = _boxes(outlines, table)
    truth = Outlines(outlines, table["image_id"].tolist(), table["split"].isin(covered).tolist())
    return file_dataset(
        "chexpert",
        LABELS,
        table.drop(columns="split") if split_by == "patients" else table,
        boxes,
        size,
        preprocessing,
        frames=frames,
        hierarchy=HIERARCHY,
        truth=truth,
    )


# Tables


def _read_part(
    part: str, path: Path, folder: Path, values: tuple[float, ...], frontal_only: bool, missing: str
) -> pd.DataFrame:
    raw = read_table(path, ("Path", *LABELS))
    # One pass in plain Python: several times faster than the string methods of a DataFrame, and these are many rows.
    found = [_TAIL.search(cell) for cell in raw["Path"]]
    unknown = np.array([match is None for match in found])
    refuse(path, "Path does not end in patient/study/view", places(raw["Path"], unknown))
    codes = np.column_stack([raw[label].map(_CODES) for label in LABELS])
    for position, label in enumerate(LABELS):
        refuse(path, f"{label} is none of 1, 0, -1 and empty", places(raw[label], np.isnan(codes[:, position])))
    image_id = pd.Series(["" if match is None else "_".join(match.groups()[:3]) for match in found])
    twice = image_id.duplicated().to_numpy() & ~unknown
    refuse(path, "an image occurs twice", places(raw["Path"], twice))
    sound = ~(unknown | twice | np.isnan(codes).any(axis=1))
    if frontal_only:
        sound &= image_id.str.endswith("frontal").to_numpy(dtype=bool)
    raw, codes, image_id = raw[sound], codes[sound].astype(int), image_id[sound]
    found = [match for match, kept in zip(found, sound, strict=True) if kept]
    here = _names(folder)
    there = np.array([match["patient"] in here for match in found], dtype=bool)
    keep = keep_present("chexpert", path, raw["Path"], there, missing)
    columns = {
        "image_id": image_id.to_numpy(),
        "patient_id": [match["patient"] for match in found],
        "path": [os.path.join(folder, match[0]) for match in found],
    }
    targets = np.array([*values], dtype=np.float32)[codes]
    columns |= {label: targets[:, position] for position, label in enumerate(LABELS)}
    for column in (column for column in _KEPT if column in raw.columns):
        columns[_KEPT[column]] = raw[column].where(raw[column] != "").to_numpy()
    columns["view"] = np.where(image_id.str.endswith("frontal"), "frontal", "lateral")
    columns["split"] = part
    return pd.DataFrame(columns)[keep]


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


# Outlines


def _read_outlines(root: Path, home: Path, table: pd.DataFrame) -> tuple[dict[str, dict[str, dict]], set[str]]:
    """Run-length codes by image and label, for the images of ``table``, and the parts whose file was there."""
    outlines, covered = {}, set()
    for part, name in OUTLINES.items():
        path = next((place / name for place in (root, home, *subfolders(root)) if (place / name).is_file()), None)
        if path is None:
            continue
        covered.add(part)
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")).items())
            images = set(table["image_id"]) & set(found)
            for image in sorted(images):
                named = {RENAMED.get(label, label): code for label, code in found[image].items()}
                unknown = [label for label in named if label not in LABELS]
                if unknown:
                    raise DataError(f"{path}: {image} has the unknown labels {unknown}")
                outlines[image] = {label: _checked(path, image, label, code) for label, code in named.items()}
                sizes = {(code["width"], code["height"]) for code in outlines[image].values()}
                if len(sizes) > 1:
                    raise DataError(f"{path}: the outlines on {image} have the sizes {sorted(sizes)}; one is right")
        except (ValueError, AttributeError, TypeError):
            raise DataError(f"{path}: is not a table of outlines, image -> label -> size and counts") from None
    return outlines, covered


def _checked(path: Path, image: str, label: str, code: Mapping) -> dict:
    try:
        height, width = (int(side) for side in code["size"])
        runs = rle_runs(code["counts"])
    except (KeyError, TypeError, ValueError, UnicodeEncodeError):
        raise DataError(f"{path}: the outline of {label} on {image} holds no size and counts") from None
    if min(height, width) < 1 or (runs < 0).any() or runs.sum() != height * width:
        raise DataError(f"{path}: the outline of {label} on {image} does not fill its {width} x {height} pixels")
    check_pixels(path, width, height)
    return {"height": height, "width": width, "runs": runs}


def _boxes(outlines: Mapping[str, Mapping[str, dict]], table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    rows, frames = [], np.full((len(table), 2), np.nan)
    position = dict(zip(table["image_id"], range(len(table)), strict=True))
    for image, of_label in outlines.items():
        for label, code in of_label.items():
            frames[position[image]] = code["width"], code["height"]
            box = rle_box(code["runs"], code["height"])
            if box is not None:
                rows.append((image, label, *box, "CheXlocalize"))
    return pd.DataFrame(rows, columns=list(BOX_COLUMNS)), frames


@dataclass(frozen=True)
class Outlines:
    """The exact masks of each row, bool ``[L, H, W]``, or None where no file of outlines covers the row's part."""

    of_image: Mapping[str, Mapping[str, dict]]
    images: list[str]
    covered: list[bool]

    def __call__(self, row: int) -> np.ndarray | None:
        of_label = self.of_image.get(self.images[row], {})
        if not of_label:
            # A file of outlines leaves out the images on which there was nothing to outline.
            return np.zeros((len(LABELS), 1, 1), dtype=bool) if self.covered[row] else None
        first = next(iter(of_label.values()))
        masks = np.zeros((len(LABELS), first["height"], first["width"]), dtype=bool)
        for label, code in of_label.items():
            masks[LABELS.index(label)] = rle_mask(code["runs"], code["height"], code["width"])
        return masks


def rle_runs(counts: str | list[int]) -> np.ndarray:
    """Run lengths of a COCO mask, int64 ``[R]``: outside, inside, outside, ... in column-major order.

    ``counts``: the compressed text, or the list of run lengths. In the text each number takes characters of five bits
    (code minus 48, low bits first, bit 5 says that more follow, the last bit 4 is the sign); from the fourth number on
    it is the difference to the number two before. Raises ValueError for text that ends within a number.
    """
    if not isinstance(counts, str):
        return np.array(counts, dtype=np.int64)
    runs, number, place = [], 0, 0
    for code in counts.encode("ascii"):
        if not 48 <= code < 112 or place > _LONGEST:
            raise ValueError("not a run-length code")
        number |= (code - 48 & 31) << place
        place += 5
        if code - 48 & 32 == 0:
            number -= (code - 48 & 16) << place - 4
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number, place = 0, 0
    if place or not runs:
        raise ValueError("not a run-length code")
    return np.array(runs, dtype=np.int64)


def rle_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask of run lengths: bool ``[height, width]``."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def rle_box(runs: np.ndarray, height: int) -> tuple[int, int, int, int] | None:
    """The bounding box of run lengths, half-open, without drawing the mask; None for an empty mask."""
    ends = np.cumsum(runs)[1::2]
    inside = runs[1::2] > 0
    if not inside.any():
        return None
    first, last = (ends - runs[1::2])[inside], ends[inside] - 1
    # A run that goes on in the next column touches the lower edge and the upper.
    whole = (first // height != last // height).any()
    low, high = (0, height - 1) if whole else ((first % height).min(), (last % height).max())
    return int((first // height).min()), int(low), int((last // height).max()) + 1, int(high) + 1
