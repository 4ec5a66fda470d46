"""Brain tumour MRI (Cheng et al., figshare 1512427): contrast-enhanced T1 slices with the tumour's mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, subfolders
from cxrkit.data.public.loader import public_loader, with_labels
from cxrkit.data.size_limits import check_file
from cxrkit.data.splits import FOLDS, with_validation
from cxrkit.data.tables import box_table, refuse
from cxrkit.errors import DataError

__all__ = ["LABELS", "Masks", "load_brain_mri", "read_slice"]

LABELS = ("meningioma", "glioma", "pituitary tumor")
INDEX = "cvind.mat"
_LARGEST = 4096**2  # values in an array; the true slices have 512 x 512 or 256 x 256


@public_loader
def load_brain_mri(
    root: str | Path, *, seed: int = 0, fold: int = 0, split_by: Literal["official", "patients", "slices"] = "official"
) -> dict[str, Any]:
    """The files 1.mat to 3064.mat (in one folder or in the four of the download) and cvind.mat, MATLAB 7.3.

    One of three labels a slice. ``truth`` is the tumour mask, and the box bounds it. Grey values (int16) are scaled to
    [0, 1] by the slice's own minimum and maximum. Official are the five folds of cvind.mat, of which ``fold`` 0 is
    number 1, or, where the file is not there, folds of our own. Label and patient stand inside the files, so each is
    opened once. Options: see data_manifests/brain_mri.yaml. Raises DataError naming the file. Source: paper `path`.
    """
    home, paths = _files(root)
    table = pd.DataFrame([_header(path) for path in paths])
    no_label, no_patient = ~table["number"].isin((1, 2, 3)), table["patient_id"] == ""
    for problem, wrong in {"label is none of 1, 2, 3": no_label, "PID is empty": no_patient}.items():
        refuse(home, problem, [(None, f"{image}.mat") for image in table["image_id"][wrong]])
    table = table[~no_label & ~no_patient].reset_index(drop=True)
    if table.empty:
        raise DataError(f"{home}: holds no slice that can be read")
    number = table.pop("number").to_numpy(dtype=int) - 1
    table = with_labels(table, LABELS, np.eye(len(LABELS))[number])
    boxes = box_table(table["image_id"], [LABELS[one] for one in number], table.pop("box").tolist(), "figshare 1512427")
    split = _split(home, table, fold, seed, split_by)
    sizes = table[["orig_width", "orig_height"]].to_numpy()
    return {
        "labels": LABELS,
        "table": table if split is None else table.assign(split=split),
        "boxes": boxes.dropna().reset_index(drop=True),
        "sizes": list(map(tuple, sizes.tolist())),
        "frames": sizes,
        "promise": "tumorMask",
        "read": read_slice,
        "truth": Masks(table["path"].tolist(), number.tolist()),
        "leak": "split_by='slices' divides slices whatever the patient." if split_by == "slices" else "",
    }


@dataclass(frozen=True)
class Masks:
    """The tumour mask of each row under its label: bool ``[3, H, W]``."""

    paths: list[str]
    labels: list[int]

    def __call__(self, row: int) -> np.ndarray:
        (mask,) = _read(self.paths[row], "cjdata/tumorMask")
        masks = np.zeros((len(LABELS), *mask.shape), dtype=bool)
        masks[self.labels[row]] = mask > 0
        return masks


def read_slice(path: str | Path) -> np.ndarray:
    """The image of one .mat file: float32 ``[H, W]``, its minimum 0 and its maximum 1; a constant image is 0."""
    pixels = _read(path, "cjdata/image")[0].astype(np.float32)
    if pixels.ndim != 2 or not pixels.size or not np.isfinite(pixels).all():
        raise DataError(f"{path}: the image has the shape {pixels.shape}, or holds NaN or infinite values")
    low, high = pixels.min(), pixels.max()
    return np.ascontiguousarray((pixels - low) / (high - low) if high > low else np.zeros_like(pixels))


# Files


def _files(root: str | Path) -> tuple[Path, list[Path]]:
    """The folder that holds the files, or the folders with them, and the files by number."""
    home = find_folder(root, "1.mat", INDEX, "brainTumorDataPublic_1-766")
    found: dict[int, Path] = {}
    for folder in (home, *subfolders(home)):
        for path in folder.glob("*.mat"):
            if path.stem.isdecimal() and found.setdefault(int(path.stem), path) != path:
                refuse(home, "a slice is there twice", [(None, str(path))])
    if not found:
        raise DataError(f"{home}: holds no slice (1.mat, 2.mat, ...), nor does a folder within it")
    return home, [found[number] for number in sorted(found)]


def _read(path: str | Path, *names: str) -> list[np.ndarray]:
    """Arrays of a file as MATLAB has them; HDF5 holds its columns as rows."""
    import h5py

    path, arrays = Path(path), []
    check_file(path)
    try:
        with h5py.File(path, "r") as file:
            for name in names:
                node = file[name]
                # An array may be a link to another file of the machine, which is nobody's to show.
                own = node.file.filename == file.filename and not node.is_virtual and not node.external
                if not own or node.size > _LARGEST or node.dtype.kind not in "iuf":
                    raise TypeError
                arrays.append(node[()].T)
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        wanted = f"is no MATLAB 7.3 file, is truncated, or holds no numbers of its own as {names[len(arrays)]}"
        raise DataError(f"{path}: {wanted}") from None
    return arrays


def _header(path: Path) -> dict[str, Any]:
    """One row of the table: number of the label, patient, size, and the bounding box of the mask."""
    label, patient, mask = _read(path, "cjdata/label", "cjdata/PID", "cjdata/tumorMask")
    if mask.ndim != 2 or not mask.size:
        raise DataError(f"{path}: tumorMask has the shape {mask.shape}")
    codes = patient.ravel()
    name = "".join(map(chr, codes[(codes > 0) & (codes < 0xD800)].astype(int))).strip()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (np.nan,) * 4
    row = {"image_id": path.stem, "patient_id": name, "path": str(path), "number": label.flat[0] if label.size else 0}
    return row | {"orig_width": mask.shape[1], "orig_height": mask.shape[0], "box": box}


# Splits


def _split(home: Path, table: pd.DataFrame, fold: int, seed: int, split_by: str) -> np.ndarray | None:
    if split_by == "patients" or (split_by == "official" and not (home / INDEX).is_file()):
        return None
    if split_by == "slices":
        part, whole = np.random.default_rng(seed).permutation(len(table)) % FOLDS, table["image_id"]
    else:
        part, whole = _official(home / INDEX, table) - 1, table["patient_id"]
    return with_validation(part == fold, whole, table[list(LABELS)].to_numpy(), seed * FOLDS + fold)


def _official(path: Path, table: pd.DataFrame) -> np.ndarray:
    """The fold of each slice as published, 1 to 5; refused where a patient is in two."""
    index = _read(path, "cvind")[0].ravel()
    numbers = table["image_id"].astype(int).to_numpy()
    if not len(index) or numbers.max() > len(index) or not np.isin(index, np.arange(1, FOLDS + 1)).all():
        raise DataError(f"{path}: cvind must hold a number from 1 to {FOLDS} for each of {numbers.max()} slices")
    folds = index[numbers - 1].astype(int)
    of_patient = pd.Series(folds).groupby(table["patient_id"]).nunique()
    refuse(path, "a patient is in two folds", [(None, repr(patient)) for patient in of_patient.index[of_patient > 1]])
    return folds
