"""A classifier's scores on all images and on resamples of the patients, by the same formulas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from cxrkit.metrics.statistics import drawn_patients

__all__ = ["SCORES", "Entries", "entries_of", "score_bounds", "scores_of"]

SCORES = ("accuracy", "precision", "recall", "specificity", "f1", "auc", "average_precision")
HELD = 4_000_000  # sums held in memory at once


class Entries(NamedTuple):
    """One label's entries, summed by patient: all scores of a resample follow from sums that are linear in them.

    `decided` [4, P]: true positives, false negatives, false positives, true negatives. `counts`, `positives` [S, P]:
    entries in steps of rising probability. Only steps with a positive matter, so those between two are one.
    """

    decided: np.ndarray
    counts: sparse.csr_array
    positives: sparse.csr_array


def entries_of(values: np.ndarray, owner: np.ndarray, size: int) -> Entries:
    """Sum ``values`` ``[3, N]`` (target, probability, decision) by their patients' places ``[N]`` among ``size``."""
    truth, probability, predicted = values
    cells = [a * b for a in (truth, 1 - truth) for b in (predicted, 1 - predicted)]
    levels, level = np.unique(probability, return_inverse=True)
    positive = np.bincount(level, truth, len(levels)) > 0
    begins = positive | np.concatenate([[False], positive[:-1]])
    step = (np.cumsum(begins) - begins[:1].sum())[level]
    shape = (int(step.max(initial=-1)) + 1, size)
    counts, positives = (
        sparse.csr_array((weight, (step, owner)), shape=shape) for weight in (np.ones(len(truth)), truth)
    )
    return Entries(np.stack([np.bincount(owner, cell, size) for cell in cells]), counts, positives)


def scores_of(entries: Entries, times: np.ndarray, zero_division: float) -> np.ndarray:
    """The :data:`SCORES` ``[7, R]`` of R resamples, in which each patient is ``times`` ``[P, R]``; nan: undefined."""
    tp, fn, fp, tn = entries.decided @ times
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [(tp, tp + fp), (tp, tp + fn), (tn, tn + fp), (2 * tp, 2 * tp + fp + fn)]
        shares = [np.where(whole == 0, zero_division, part / whole) for part, whole in parts]
        total = tp + fn + fp + tn
        decided = [(tp + tn) / total, *(np.where(total == 0, np.nan, share) for share in shares)]
        return np.stack([*decided, *_ranked(entries, times)])


def _ranked(entries: Entries, times: np.ndarray) -> list[np.ndarray]:
    """AUC (Mann and Whitney: equal probabilities count half) and average precision, ``[R]`` each."""
    count, positive = entries.counts @ times, entries.positives @ times  # [S, R]
    negative = count - positive
    positives, negatives = positive.sum(0), negative.sum(0)
    both = (positives > 0) & (negatives > 0)
    auc = (positive * (negative.cumsum(0) - negative / 2)).sum(0) / (positives * negatives)
    found, called = (part[::-1].cumsum(0)[::-1] for part in (positive, count))
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return [np.where(both, score, np.nan) for score in (auc, (positive * precision).sum(0) / positives)]


def score_bounds(
    entries: list[Entries], zero_division: float, n: int, seed: int, confidence: float
) -> dict[str, np.ndarray]:
    """Bounds by "NAME low" and "NAME high", ``[L + 2]``, of L labels and micro (``entries``), and of macro.

    All labels of a patient are drawn together; macro is the mean over the labels for which a resample defines the
    score. nan for fewer than two patients, and for a score that half of the resamples or more leave undefined.
    """
    size = entries[0].decided.shape[1]
    rows = max(1, HELD // max(1, *(label.counts.shape[0] for label in entries)))
    drawn = [
        np.stack([scores_of(label, times, zero_division) for label in entries])
        for chosen in (drawn_patients(size, n, seed) if size > 1 else ())
        for times in _times(chosen, rows)
    ]
    found = np.concatenate(drawn, axis=2) if drawn else np.full((len(entries), len(SCORES), 1), np.nan)
    macro = np.ma.masked_invalid(found[:-1]).mean(0).filled(np.nan)
    found = np.concatenate([found, macro[None]])
    enough = np.isfinite(found).sum(-1) > found.shape[-1] / 2
    bounds = np.full((2, *enough.shape), np.nan)
    if enough.any():
        bounds[:, enough] = np.nanquantile(found[enough], [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return {
        f"{name} {side}": bound[:, place]
        for place, name in enumerate(SCORES)
        for side, bound in zip(("low", "high"), bounds, strict=True)
    }


def _times(chosen: np.ndarray, rows: int) -> list[np.ndarray]:
    """How often each patient is in each resample, ``[P, rows]`` a part."""
    size = chosen.shape[1]
    times = np.stack([np.bincount(line, minlength=size) for line in chosen], axis=1).astype(np.float64)
    return [times[:, start : start + rows] for start in range(0, len(chosen), rows)]
