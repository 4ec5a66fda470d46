"""Patient-wise, label-stratified folds; folds of images, which may leak; and the check for patients on two sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from sklearn.model_selection import StratifiedKFold

from cxrkit.data.dataset import SPLITS
from cxrkit.errors import DataError, ParameterError

__all__ = [
    "FOLDS",
    "fold_split",
    "image_folds",
    "patient_overlap",
    "refuse_shared_patients",
    "with_validation",
]

FOLDS = 5
IMAGE_SEED = 42
# One eighth of what is not test chooses thresholds and checkpoints, so that no fold both chooses and reports.
_VALIDATION_PARTS = 8
_SHOWN = 3


def fold_split(
    patients: Sequence[str], targets: np.ndarray, fold: int = 0, folds: int = FOLDS, seed: int = 0
) -> np.ndarray:
    """``"train"``, ``"validation"`` or ``"test"`` for each image: ``[N]``.

    ``patients``: N patient ids; ``targets``: ``[N, L]`` of 0, 1 or NaN (unknown, counted as 0). The images of ``fold``
    are the test part; one eighth of the other patients, and at least one of them, is the validation part. All images of
    a patient share a part; a patient is positive for a label when one of the images is, and labels are spread by
    iterative stratification (Sechidis et al., 2011). The order of the rows does not matter. Raises ParameterError for a
    fold that does not exist, DataError for fewer patients than folds or than three. Source: paper `bcos` (five folds),
    with patients in place of images.
    """
    if not 0 <= fold < folds:
        raise ParameterError(f"fold={fold} does not exist; use 0 .. {folds - 1}")
    names, of_image, positive = _by_patient(patients, targets)
    if len(names) < max(folds, 3):
        raise DataError(
            f"{len(names)} patients can't be spread over {folds} folds with train, validation and test; "
            f"at least {max(folds, 3)} are needed"
        )
    is_test = _stratify(positive, folds, seed)[of_image] == fold
    # The seed differs from fold to fold, or the same patients would validate again and again.
    return with_validation(is_test, patients, targets, seed * folds + fold)


def with_validation(is_test: np.ndarray, patients: Sequence[str], targets: np.ndarray, seed: int = 0) -> np.ndarray:
    """A split around a test part that is already known: ``"train"``, ``"validation"`` or ``"test"`` per image, ``[N]``.

    ``is_test``: bool ``[N]``. One eighth of the patients of the other images, and at least one of them, is the
    validation part, stratified by label. Raises DataError where fewer than two patients are left.
    """
    rest = np.flatnonzero(~np.asarray(is_test, dtype=bool))
    names, of_image, positive = _by_patient(np.asarray(patients, dtype=str)[rest], np.asarray(targets)[rest])
    if len(names) < 2:
        raise DataError(f"{len(names)} patients are left beside the test part; training and validation need 2")
    split = np.full(len(is_test), "test", dtype=object)
    chosen = _stratify(positive, min(_VALIDATION_PARTS, len(names)), seed) == 0
    split[rest] = np.where(chosen, "validation", "train")[of_image]
    return split


# Folds of images


def image_folds(
    strata: np.ndarray, ids: Sequence[str] | None = None, folds: int = FOLDS, seed: int = IMAGE_SEED
) -> np.ndarray:
    """The fold in which each image is tested, int ``[N]``. Images are dealt, not patients.

    ``strata``: classes that exclude each other, ``[N]`` (by scikit-learn's StratifiedKFold), or labels, ``[N, L]`` of
    0, 1 or NaN, counted as 0 (by iterative stratification). ``ids``: the rows are dealt in the order of these, wherever
    they stand. Raises ParameterError for more folds than images. Source: paper `bcos`, code for RSNA and VinBigData:
    5 folds, seed 42, in order of id.
    """
    strata = np.asarray(strata)
    if not 2 <= folds <= len(strata):
        raise ParameterError(f"folds={folds} is out of range; use 2 .. {len(strata)}, the number of images")
    splitter = StratifiedKFold if strata.ndim == 1 else MultilabelStratifiedKFold
    if strata.ndim == 2:
        strata = (np.nan_to_num(strata) > 0).astype(int)
    order = np.arange(len(strata)) if ids is None else np.argsort(np.asarray(ids, dtype=str), kind="stable")
    fold_of = np.empty(len(strata), dtype=int)
    fold_of[order] = _dealt(splitter(folds, shuffle=True, random_state=seed), strata[order])
    return fold_of


def _dealt(splitter: StratifiedKFold | MultilabelStratifiedKFold, strata: np.ndarray) -> np.ndarray:
    """The part of each row: int ``[N]``."""
    part_of = np.empty(len(strata), dtype=int)
    for part, (_, members) in enumerate(splitter.split(strata, strata)):
        part_of[members] = part
    return part_of


def _by_patient(patients: Sequence[str], targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patients in order of name, the position of each image's patient, and each patient's labels."""
    names, of_image = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    targets = np.asarray(targets, dtype=np.float64)
    positive = np.zeros((len(names), targets.shape[1]), dtype=int)
    np.maximum.at(positive, of_image, (np.nan_to_num(targets) > 0).astype(int))
    return names, of_image, positive


def _stratify(positive: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """The part, 0 to ``parts - 1``, of each patient; every part gets at least one."""
    # Patients with and without any finding are strata of their own, also where there is no label at all.
    healthy = positive.sum(axis=1) == 0
    strata = np.column_stack([positive, healthy, ~healthy]).astype(int)
    part_of = _dealt(MultilabelStratifiedKFold(parts, shuffle=True, random_state=seed), strata)
    for part in np.flatnonzero(np.bincount(part_of, minlength=parts) == 0):
        # Stratification may starve a part when patients are few; the largest part then gives up its last
        # patient.
        largest = np.bincount(part_of, minlength=parts).argmax()
        part_of[np.flatnonzero(part_of == largest)[-1]] = part
    return part_of


# Patients on two sides


def patient_overlap(patients: Sequence[str], split: Sequence[str], of: str = "test", to: str = "train") -> pd.Series:
    """How much of part ``of`` belongs to patients of part ``to``, from the table alone.

    ``patients``, ``split``: of N images. Returns ``patients`` (in both parts), ``images`` (of these, in ``of``) and
    ``share`` (of all images in ``of``; nan when there are none). Ids are compared as text.
    """
    patients = pd.Series(np.asarray(patients, dtype=str)).str.strip()
    split = np.asarray(split, dtype=object)
    inside = patients[split == of]
    shared = inside.isin(patients[split == to])
    share = float(shared.mean()) if len(inside) else float("nan")
    return pd.Series({"patients": inside[shared].nunique(), "images": int(shared.sum()), "share": share}, dtype=object)


def refuse_shared_patients(name: str, table: pd.DataFrame) -> None:
    """Raise DataError, naming patients and images, where train, validation and test images share patients.

    ``table``: image_id, patient_id and split; images in none of the three parts are not looked at. Ids are compared as
    text: a number in one row and the same as text in another are one patient.
    """
    rows = table.loc[table["split"].isin(SPLITS), ["image_id", "patient_id", "split"]]
    rows = rows.assign(patient_id=rows["patient_id"].astype(str).str.strip())
    leaking = rows[rows.groupby("patient_id")["split"].transform("nunique") > 1]
    if leaking.empty:
        return
    shown = []
    for patient, images in list(leaking.groupby("patient_id"))[:_SHOWN]:
        pair = images.drop_duplicates("split")[:2]
        where = " and ".join(f"{image!r} in {part}" for image, part in pair[["image_id", "split"]].to_numpy())
        shown.append(f"{patient!r} ({where}" + (f", {len(images) - 2} more images)" if len(images) > 2 else ")"))
    count, parts = leaking["patient_id"].nunique(), " and ".join(leaking["split"].unique())
    more = f"; and {count - _SHOWN} more" if count > _SHOWN else ""
    raise DataError(f"{name}: {parts} share patients ({count}): {'; '.join(shown)}{more}")
