"""Intervals of a classifier's metrics: patients are resampled, and every metric is computed on every resample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from cxrkit.metrics.statistics import drawn_patients

__all__ = ["DECIDED", "METRICS", "metric_bounds"]

DECIDED = ("accuracy", "precision", "recall", "specificity", "f1")  # they need a cutoff
METRICS = (*DECIDED, "auc", "average_precision")
HELD = 4_000_000  # sums held in memory at once


class _Entries(NamedTuple):
    """One label's entries, summed by patient: what all metrics of a resample are linear in.

    `decided` [P, 4]: true positives, false negatives, false positives, true negatives. `counts`, `positives` [S, P]:
    entries in steps of rising probability. Only steps with a positive matter, so those between two are one.
    """

    decided: np.ndarray
    counts: sparse.csr_array
    positives: sparse.csr_array


def metric_bounds(
    values: np.ndarray, patients: np.ndarray, zero_division: float, n: int, seed: int, confidence: float
) -> dict[str, np.ndarray]:
    """Bounds of each metric by "NAME low" and "NAME high", ``[L + 2]``: the labels, then micro, then macro.

    ``values`` ``[3, N, L]``: targets (nan: unknown), probabilities, decisions (nan: none); ``patients`` ``[N]``. All
    labels of a patient are drawn together; macro is the mean over the labels for which a resample defines the metric.
    nan for fewer than two patients, and for a metric that half of the resamples or more leave undefined.
    """
    names, owner = np.unique(patients, return_inverse=True)
    known = ~np.isnan(values[0])
    parts = [(values[:, rows, label], owner[rows]) for label, rows in enumerate(known.T)]
    parts.append((values[:, known], np.broadcast_to(owner[:, None], known.shape)[known]))
    entries = [_entries(*part, len(names)) for part in parts]
    rows = max(1, HELD // max(1, *(part.counts.shape[0] for part in entries)))
    drawn = [
        np.stack([_metrics(part, times, zero_division) for part in entries])
        for chosen in (drawn_patients(len(names), n, seed) if len(names) > 1 else ())
        for times in _times(chosen, rows)
    ]
    found = np.concatenate(drawn, axis=2) if drawn else np.full((len(entries), len(METRICS), 1), np.nan)
    macro = np.ma.masked_invalid(found[:-1]).mean(0).filled(np.nan)
    bounds = _quantiles(np.concatenate([found, macro[None]]), confidence)
    return {
        f"{name} {side}": bound[:, place]
        for place, name in enumerate(METRICS)
        for side, bound in zip(("low", "high"), bounds, strict=True)
    }


def _quantiles(found: np.ndarray, confidence: float) -> np.ndarray:
    enough = np.isfinite(found).sum(-1) > found.shape[-1] / 2
    bounds = np.full((2, *enough.shape), np.nan)
    if enough.any():
        bounds[:, enough] = np.nanquantile(found[enough], [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return bounds


def _times(chosen: np.ndarray, rows: int) -> list[np.ndarray]:
    """How often each patient is in each resample, ``[P, rows]`` a part."""
    size = chosen.shape[1]
    times = np.stack([np.bincount(line, minlength=size) for line in chosen], axis=1).astype(np.float64)
    return [times[:, start : start + rows] for start in range(0, len(chosen), rows)]


def _entries(values: np.ndarray, owner: np.ndarray, size: int) -> _Entries:
    truth, probability, predicted = values
    cells = [a * b for a in (truth, 1 - truth) for b in (predicted, 1 - predicted)]
    decided = np.stack([np.bincount(owner, cell, size) for cell in cells], axis=1)
    levels, level = np.unique(probability, return_inverse=True)
    positive = np.bincount(level, truth, len(levels)) > 0
    begins = positive | np.concatenate([[False], positive[:-1]])
    step = (np.cumsum(begins) - begins[:1].sum())[level]
    shape = (int(step.max(initial=-1)) + 1, size)
    counts, positives = (
        sparse.csr_array((weight, (step, owner)), shape=shape) for weight in (np.ones(len(truth)), truth)
    )
    return _Entries(decided, counts, positives)


def _metrics(entries: _Entries, times: np.ndarray, zero_division: float) -> np.ndarray:
    """Every metric of every resample, ``[metrics, rows]``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([*_decided(*(entries.decided.T @ times), zero_division), *_ranked(entries, times)])


def _decided(tp: np.ndarray, fn: np.ndarray, fp: np.ndarray, tn: np.ndarray, zero_division: float) -> list[np.ndarray]:
    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(whole == 0, zero_division, part / whole)

    total = tp + fn + fp + tn
    scores = [share(tp, tp + fp), share(tp, tp + fn), share(tn, tn + fp), share(2 * tp, 2 * tp + fp + fn)]
    return [(tp + tn) / total, *(np.where(total == 0, np.nan, score) for score in scores)]


def _ranked(entries: _Entries, times: np.ndarray) -> list[np.ndarray]:
    """AUC (Mann and Whitney: equal probabilities count half) and average precision, ``[rows]`` each."""
    count, positive = entries.counts @ times, entries.positives @ times  # [S, rows]
    negative = count - positive
    positives, negatives = positive.sum(0), negative.sum(0)
    both = (positives > 0) & (negatives > 0)
    auc = (positive * (negative.cumsum(0) - negative / 2)).sum(0) / (positives * negatives)
    found, called = (part[::-1].cumsum(0)[::-1] for part in (positive, count))
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return [np.where(both, score, np.nan) for score in (auc, (positive * precision).sum(0) / positives)]
