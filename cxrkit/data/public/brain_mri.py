"""Brain tumour MRI (Cheng et al., figshare 1512427): contrast-enhanced T1 slices with the tumour's outline."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, subfolders
from cxrkit.data.size_limits import check_file
from cxrkit.data.splits import FOLDS, with_validation
from cxrkit.data.tables import box_table, refuse
from cxrkit.errors import DataError

__all__ = ["LABELS", "Masks", "load_brain_mri", "read_slice"]

LABELS = ("meningioma", "glioma", "pituitary tumor")
INDEX = "cvind.mat"
SPLITS_BY = ("official", "patients", "slices")
_FIELDS = ("label", "PID", "image", "tumorBorder", "tumorMask")
_LARGEST = 4096  # pixels along a side; the true slices have 512 or 256
_COMPARED = 16  # slices whose outline is held against its mask


def load_brain_mri(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    fold: int = 0,
    preprocessing: Preprocessing = SQUASH,
    split_by: str = "official",
) -> Dataset:
    """The files 1.mat to 3064.mat (in one folder or in the four of the download) and cvind.mat, MATLAB 7.3.

    One of three labels a slice. ``truth`` is the tumour mask; the box bounds the tumour's outline. Grey values
    (int16) are scaled to [0, 1] by the slice's own minimum and maximum. ``split_by``: "official", the five
    patient-wise folds of cvind.mat, of which ``fold`` 0 is number 1 ("patients" where the file is not there);
    "patients", five folds of our own; or "slices", fifths of the slices drawn from ``seed`` whatever the patient,
    which leaks, and is warned of. Label and patient stand inside the files, so
    each is opened once. Raises DataError naming the file. Source: paper `path`, section on data.
    """
    choose("split_by", split_by, SPLITS_BY)
    home, paths = _files(Path(root))
    slices = [_read_header(path) for path in paths]
    table = pd.DataFrame([header for header, _ in slices])
    refuse(home, "label is none of 1, 2, 3", _named(table, ~table["label"].isin((1, 2, 3))))
    refuse(home, "PID is empty", _named(table, table["patient_id"] == ""))
    sound = (table["label"].isin((1, 2, 3)) & (table["patient_id"] != "")).to_numpy()
    table = table[sound].reset_index(drop=True)
    if table.empty:
        raise DataError(f"{home}: holds no slice that can be read")
    boxes = _boxes(table, [border for (_, border), kept in zip(slices, sound, strict=True) if kept])
    for position, label in enumerate(LABELS):
        table[label] = (table["label"] == position + 1).astype(float)
    split = _split(home, table, fold, seed, split_by)
    if split is not None:
        table["split"] = split
    of_label = (table.pop("label") - 1).astype(int).tolist()
    frames = table[["orig_width", "orig_height"]].to_numpy()
    truth = Masks(table["path"].tolist(), of_label)
    leak = "split_by='slices' divides slices whatever the patient." if split_by == "slices" else ""
    more = {"frames": frames, "read": read_slice, "truth": truth, "leak": leak}
    return file_dataset("brain_mri", LABELS, table, boxes, size, preprocessing, **more)


@dataclass(frozen=True)
class Masks:
    """The tumour mask of each row under its label: bool ``[3, H, W]``."""

    paths: list[str]
    labels: list[int]

    def __call__(self, row: int) -> np.ndarray:
        mask = _read(Path(self.paths[row]), "tumorMask") > 0
        masks = np.zeros((len(LABELS), *mask.shape), dtype=bool)
        masks[self.labels[row]] = mask
        return masks


def read_slice(path: str | Path) -> np.ndarray:
    """The image of one .mat file: float32 ``[H, W]``, its minimum 0 and its maximum 1; a constant image is 0."""
    pixels = _read(Path(path), "image").astype(np.float32)
    if not np.isfinite(pixels).all():
        raise DataError(f"{path}: the image holds NaN or infinite values")
    low, high = pixels.min(), pixels.max()
    return np.ascontiguousarray((pixels - low) / (high - low) if high > low else np.zeros_like(pixels))


# Files


def _files(root: Path) -> tuple[Path, list[Path]]:
    """The folder that holds the files, or the folders with them, and the files by number."""
    home = find_folder(root, "1.mat", INDEX, "brainTumorDataPublic_1-766")
    found = {}
    for folder in (home, *subfolders(home)):
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".mat") and entry.name[:-4].isdigit()]
        for name in names:
            number = int(name[:-4])
            if number in found:
                refuse(home, "a slice is there twice", [(None, str(folder / name))])
            found.setdefault(number, folder / name)
    if not found:
        raise DataError(f"{home}: holds no slice (1.mat, 2.mat, ...), nor does a folder within it")
    return home, [found[number] for number in sorted(found)]


def _open(path: Path):
    import h5py

    check_file(path)
    try:
        return h5py.File(path, "r")
    except OSError:
        raise DataError(f"{path}: is no MATLAB 7.3 file, or is truncated") from None


def _read_header(path: Path) -> tuple[dict, np.ndarray]:
    """Number, patient, label and size of a slice, and the outline of its tumour as x and y in turn."""
    with _open(path) as file:
        cjdata = file.get("cjdata")
        lacking = [name for name in _FIELDS if cjdata is None or not hasattr(cjdata, "get") or name not in cjdata]
        if lacking:
            raise DataError(f"{path}: its struct cjdata lacks {lacking}")
        try:
            codes = np.asarray(cjdata["PID"]).ravel()
            patient = "".join(chr(int(code)) for code in codes).strip("\0 ")
            label = int(np.asarray(cjdata["label"]).ravel()[0])
            border = np.asarray(cjdata["tumorBorder"], dtype=np.float64).ravel()
            shapes = [cjdata[name].shape for name in ("image", "tumorMask")]
        except (OSError, ValueError, TypeError, IndexError, OverflowError, AttributeError):
            raise DataError(f"{path}: label, PID, tumorBorder or image of cjdata can't be read") from None
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or not 1 <= max(shapes[0]) <= _LARGEST:
        raise DataError(f"{path}: image and tumorMask have the shapes {shapes[0]} and {shapes[1]}")
    # HDF5 holds MATLAB's columns as rows.
    width, height = shapes[0]
    row = {"image_id": path.stem, "patient_id": patient, "path": str(path), "label": label}
    return row | {"orig_width": width, "orig_height": height}, border


def _read(path: Path, name: str) -> np.ndarray:
    with _open(path) as file:
        try:
            return np.asarray(file["cjdata"][name]).T
        except (KeyError, OSError, ValueError, TypeError):
            raise DataError(f"{path}: {name} of cjdata can't be read") from None


def _named(table: pd.DataFrame, wrong: pd.Series) -> list[tuple[None, str]]:
    return [(None, f"{image}.mat") for image in table.loc[wrong, "image_id"]]


# Boxes


def _boxes(table: pd.DataFrame, borders: list[np.ndarray]) -> pd.DataFrame:
    corners = np.full((len(table), 2, 2), np.nan)
    for row, border in enumerate(borders):
        points = border[: len(border) // 2 * 2].reshape(-1, 2)
        if len(points) and np.isfinite(points).all():
            corners[row] = points.min(axis=0), points.max(axis=0)
    bare = pd.Series(np.isnan(corners).any(axis=(1, 2)))
    refuse(Path(table["path"].iloc[0]).parent, "tumorBorder holds no point", _named(table, bare))
    corners = _in_order(table, corners)
    # MATLAB counts pixels from 1, and a point lies at a pixel's centre.
    low, high = corners[:, 0] - 1, corners[:, 1]
    limits = table[["orig_width", "orig_height"]].to_numpy()
    edges = np.column_stack([low.clip(0, limits), high.clip(0, limits)])
    labels = [LABELS[label - 1] for label in table["label"]]
    boxes = box_table(table["image_id"], labels, edges, "figshare 1512427")
    return boxes[~bare.to_numpy()].reset_index(drop=True)


def _in_order(table: pd.DataFrame, corners: np.ndarray) -> np.ndarray:
    """Corners as x, y. The description says that the outline holds x before y; the masks of some slices decide."""
    first = np.flatnonzero(~np.isnan(corners).any(axis=(1, 2)))[:_COMPARED]
    given, swapped = [], []
    for row in first:
        rows, columns = np.nonzero(_read(Path(table["path"].iloc[row]), "tumorMask"))
        if len(rows):
            bounds = np.array([[columns.min(), rows.min()], [columns.max(), rows.max()]]) + 1
            given.append(np.abs(corners[row] - bounds).max())
            swapped.append(np.abs(corners[row][:, ::-1] - bounds).max())
    if given and np.median(swapped) < np.median(given):
        return corners[:, :, ::-1]
    return corners


# Splits


def _split(home: Path, table: pd.DataFrame, fold: int, seed: int, split_by: str) -> np.ndarray | None:
    if split_by == "patients" or (split_by == "official" and not (home / INDEX).is_file()):
        return None
    targets = table[list(LABELS)].to_numpy()
    if split_by == "slices":
        part = np.random.default_rng(seed).permutation(len(table)) % FOLDS
        return with_validation(part == fold, table["image_id"], targets, seed * FOLDS + fold)
    part = _official(home / INDEX, table) - 1
    return with_validation(part == fold, table["patient_id"], targets, seed * FOLDS + fold)


def _official(path: Path, table: pd.DataFrame) -> np.ndarray:
    """The fold of each slice as published, 1 to 5; refused where a patient is in two."""
    with _open(path) as file:
        try:
            index = np.asarray(file["cvind"], dtype=np.float64).ravel()
        except (KeyError, OSError, ValueError, TypeError):
            raise DataError(f"{path}: holds no vector cvind") from None
    numbers = table["image_id"].astype(int).to_numpy()
    if not len(index) or numbers.max() > len(index) or not np.isin(index, np.arange(1, FOLDS + 1)).all():
        raise DataError(f"{path}: cvind must hold a number from 1 to {FOLDS} for each of {numbers.max()} slices")
    folds = index[numbers - 1].astype(int)
    of_patient = pd.Series(folds).groupby(table["patient_id"]).nunique()
    refuse(path, "a patient is in two folds", [(None, repr(patient)) for patient in of_patient.index[of_patient > 1]])
    return folds
