"""How sure a mean is, and how far two sets of scores lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cxrkit.errors import ParameterError

__all__ = ["Interval", "bootstrap", "difference_of_means"]

CHUNK = 1_000_000  # drawn patients held in memory at once


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: ArrayLike, patients: Sequence, n: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of ``values`` ``[N]`` with a percentile interval from ``n`` resamples of the patients.

    ``patients`` ``[N]`` names whose each value is: images of one patient resemble each other, so patients are
    drawn (with replacement, as many as there are) and bring all their values along. nan values are left out.
    The bounds are nan for fewer than two patients, the mean is nan without any value. The same ``seed`` gives
    the same interval. Raises ParameterError for lengths that differ and for parameters out of range. Source:
    Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979), on clusters.
    """
    values = np.asarray(values, dtype=np.float64)
    patients = np.asarray(patients)
    if values.ndim != 1 or values.shape != patients.shape:
        raise ParameterError(
            f"values {values.shape} and patients {patients.shape} must be two lists of the same length"
        )
    if n < 1 or not 0 < confidence < 1:
        raise ParameterError(f"n {n} must be at least 1 and confidence {confidence} inside (0, 1)")
    known = ~np.isnan(values)
    values, patients = values[known], patients[known]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    mean = float(values.mean())
    names, owner = np.unique(patients, return_inverse=True)
    if len(names) < 2:
        return Interval(mean, np.nan, np.nan)
    means = _resampled_means(np.bincount(owner, weights=values), np.bincount(owner), n, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Means of ``n`` resamples from each patient's sum and number of values."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(sums))
    means = []
    for start in range(0, n, rows):
        drawn = generator.integers(len(sums), size=(min(rows, n - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def difference_of_means(scores_a: ArrayLike, scores_b: ArrayLike) -> float:
    """Distance of the means of two sets of scores, at least 0; lower: the explanations depend less on the network.

    nan scores are left out; nan when one set has none left. Source: paper `normgrad`, DoM, the maximum mean
    discrepancy with a linear kernel in one dimension.
    """
    sets = [np.asarray(scores, dtype=np.float64).ravel() for scores in (scores_a, scores_b)]
    means = [valid.mean() if len(valid := scores[~np.isnan(scores)]) else np.nan for scores in sets]
    return float(abs(means[0] - means[1]))
