"""How sure a mean is, and how far sets of scores lie apart: patients are resampled, not images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import number, numbers, patient_ids, whole

__all__ = ["Interval", "Spread", "bootstrap", "compare", "difference_of_means", "holm", "over_seeds"]

CHUNK = 1_000_000  # drawn patients held in memory at once


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float


class Spread(NamedTuple):
    """Mean and standard deviation over seeds, the ``ddof`` it was taken with, and how many seeds it is of."""

    mean: float
    std: float
    ddof: int
    seeds: int


def bootstrap(
    values: ArrayLike, patients: Sequence, n: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of ``values`` ``[N]`` with a percentile interval from ``n`` resamples of the patients.

    ``patients`` ``[N]`` names whose each value is: images of one patient resemble each other, so patients are
    drawn (with replacement, as many as there are) and bring all their values along. nan values are left out.
    The bounds are nan for fewer than two patients, the mean is nan without any value. The same ``seed`` gives
    the same interval. Raises ParameterError for lengths that differ, a patient without an id, ids that mix text and
    numbers, and parameters out of range. Source:
    Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979), on clusters.
    """
    values, patients = numbers("values", values), patient_ids(patients)
    if values.ndim != 1 or values.shape != patients.shape:
        raise ParameterError(
            f"values {values.shape} and patients {patients.shape} must be two lists of the same length"
        )
    return intervals(values[:, None], patients, n, seed, confidence)[0]


def intervals(values: np.ndarray, patients: np.ndarray, n: int, seed: int, confidence: float) -> list[Interval]:
    """:func:`bootstrap` of every column of ``[N, K]``; columns with the same nan share their resamples."""
    n, seed, confidence = resampling(n, seed, confidence)
    means = [float(valid.mean()) if len(valid := column[~np.isnan(column)]) else np.nan for column in values.T]
    found = [Interval(mean, np.nan, np.nan) for mean in means]
    for columns, sums, counts in _known(values, patients):
        drawn = resampled_ratios(sums, counts, n, seed)
        bounds = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        for column, low, high in zip(columns, *bounds, strict=True):
            found[column] = Interval(means[column], float(low), float(high))
    return found


def resampling(n: int, seed: int, confidence: float) -> tuple[int, int, float]:
    """The same as plain numbers; ParameterError for one out of range."""
    confidence = number("confidence", confidence, "inside (0, 1)", lambda share: 0 < share < 1)
    return whole("n", n, 1), whole("seed", seed, 0), confidence


def _known(values: np.ndarray, patients: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Columns that lack the same values, with each patient's sums and numbers ``[P, k]``; none below two patients."""
    known = ~np.isnan(values)
    patterns, place = np.unique(known, axis=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        columns = np.flatnonzero(place == index)
        sums, counts = by_patient(values[np.ix_(pattern, columns)], patients[pattern])
        if len(sums) > 1:
            yield columns, sums, counts


def by_patient(values: np.ndarray, patients: np.ndarray, among: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Each patient's sums and numbers of values without nan, ``[P, K]`` each, for patients in sorted order.

    ``among``: all patients there are, sorted; those without a row get zeros.
    """
    names, owner = np.unique(patients, return_inverse=True)
    if among is not None:
        owner, names = np.searchsorted(among, names)[owner], among
    rows = np.arange(len(patients))
    whose = sparse.csr_array((np.ones(len(patients)), (owner, rows)), shape=(len(names), len(patients)))
    known = ~np.isnan(values)
    return whose @ np.where(known, values, 0.0), whose @ known.astype(np.float64)


def drawn_patients(size: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """``n`` resamples of as many patients as there are, with replacement: which ones, ``[rows, size]`` a part."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // size)
    for start in range(0, n, rows):
        yield generator.integers(size, size=(min(rows, n - start), size))


def resampled_rows(patients: Sequence, n: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of as many patients as there are, drawn with replacement, ``n`` times; none below two patients."""
    of_patient = list(pd.Series(np.arange(len(patients))).groupby(np.asarray(patients)).indices.values())
    if len(of_patient) > 1:
        for drawn in drawn_patients(len(of_patient), n, seed):
            yield from (np.concatenate([of_patient[place] for place in line]) for line in drawn)


def resampled_ratios(sums: np.ndarray, counts: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Means of ``n`` resamples from each patient's sums and numbers of values ``[P, K]`` -> ``[n, K]``.

    How often each patient is drawn is counted once per resample and serves all columns, as one product of
    matrices; a single score is faster added up. nan where a resample holds no value.
    """
    size = len(sums)
    both = np.concatenate([sums, counts], axis=1)
    parts = []
    for drawn in drawn_patients(size, n, seed):
        if both.shape[1] == 2:
            parts.append(np.stack([column[drawn].sum(1) for column in both.T], axis=1))
            continue
        times = np.stack([np.bincount(line, minlength=size) for line in drawn])
        parts.append(times.astype(np.float64) @ both)
    totals = np.concatenate(parts)
    above, below = totals[:, : sums.shape[1]], totals[:, sums.shape[1] :]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def compare(
    scores: Mapping[str, ArrayLike], patients: Sequence, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> pd.DataFrame:
    """Which methods differ: every pair of ``scores`` (name: ``[N]``, the same images in the same order).

    Per pair (a, b) the mean of a - b over the images that both scored, with its interval from ``n`` resamples of
    the patients, a two-sided p-value, and p_holm, corrected for the number of pairs by :func:`holm`. Of P patients
    with 2^P <= ``n``, p is exact: the share of all 2^P ways to give each patient's differences a sign whose mean is
    as far from 0. Of more patients: twice the share of resamples on the other side of 0, with one added above and
    below. So p never falls under 2 / 2^P: below six patients no difference is significant at 0.05. Columns: a, b,
    difference, low, high, p, p_holm, n, left_out (images that one of the two lacks), patients. nan for fewer than
    two patients. Raises ParameterError for fewer than two methods and for lengths that differ. Source: Fisher, The
    Design of Experiments (1935), chapter 3, and Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapters 13 and 16.
    """
    patients = patient_ids(patients)
    if not isinstance(scores, Mapping):
        raise ParameterError(f"scores must be a mapping from each method's name to its scores; got {type(scores)}")
    columns = {name: numbers(f"scores of {name!r}", values) for name, values in scores.items()}
    if wrong := [f"{name!r} {values.shape}" for name, values in columns.items() if values.shape != patients.shape]:
        raise ParameterError(f"scores {', '.join(wrong)} don't have the length of patients {patients.shape}")
    if len(columns) < 2:
        raise ParameterError(f"scores hold {len(columns)} method(s): a comparison needs two")
    n, seed, confidence = resampling(n, seed, confidence)
    pairs = list(combinations(columns, 2))
    differences = np.stack([columns[a] - columns[b] for a, b in pairs], axis=1)
    p_values = np.full(len(pairs), np.nan)
    few = max(1, int(np.log2(n)))  # patients up to which every sign is tried
    for place, sums, counts in _known(differences, patients):
        if len(sums) <= few:
            p_values[place] = _exact(sums)
            continue
        # Differences that rounding alone makes are none.
        drawn = resampled_ratios(sums, counts, n, seed)
        drawn = np.where(np.abs(drawn) < 1e-12, 0, drawn)
        other_side = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
        p_values[place] = np.minimum(1, 2 * (1 + other_side) / (n + 1))
    rows = [
        {"a": a, "b": b, "difference": found.mean, "low": found.low, "high": found.high}
        for (a, b), found in zip(pairs, intervals(differences, patients, n, seed, confidence), strict=True)
    ]
    known = ~np.isnan(differences)
    kept, of = known.sum(0), [len(np.unique(patients[rows])) for rows in known.T]
    table = pd.DataFrame(rows).assign(p=p_values, p_holm=holm(p_values), n=kept, left_out=len(patients) - kept)
    return table.assign(patients=of)


def _exact(sums: np.ndarray) -> np.ndarray:
    """Two-sided p-value of each column of the patients' sums ``[P, K]``: every sign of every patient is tried."""
    signs = np.array(list(product((1.0, -1.0), repeat=len(sums))))
    # As far from 0 is as far, whatever rounding makes of the same numbers in another order.
    far = np.abs(signs @ sums) >= np.abs(sums.sum(0)) - 1e-9 * np.abs(sums).sum(0) - 1e-12
    return far.mean(0)


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values corrected so that one false alarm among all tests stays as rare as one test's: ``[M]`` -> ``[M]``.

    The i-th smallest of m is multiplied by m - i + 1; none falls below a smaller one, none exceeds 1. nan tests
    stay nan and don't count. Source: Holm, A simple sequentially rejective multiple test procedure,
    Scandinavian Journal of Statistics 6 (1979).
    """
    p_values = numbers("p_values", p_values)
    if p_values.ndim != 1 or ((p_values < 0) | (p_values > 1)).any():
        raise ParameterError(f"p_values {p_values} must be a list of numbers in [0, 1] (or nan)")
    order = np.argsort(p_values, kind="stable")[: (~np.isnan(p_values)).sum()]
    corrected = np.full_like(p_values, np.nan)
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return corrected


def over_seeds(values: ArrayLike, ddof: int = 0) -> Spread:
    """Mean over folds, then mean and standard deviation over seeds: ``[S, F]`` -> :class:`Spread`.

    ``ddof`` 0 is the population's std (half the distance, for two seeds), 1 the sample's. A nan anywhere makes
    both nan: seeds of different folds don't compare. The std is nan where there are no more seeds than
    ``ddof``. Raises ParameterError for another shape and a negative ddof. Source: paper `bcos`, its tables
    (five folds, two seeds, ddof 0).
    """
    values = numbers("values", values)
    if values.ndim != 2 or 0 in values.shape:
        raise ParameterError(f"values have shape {values.shape}; expected [seeds, folds]")
    whole("ddof", ddof, 0)
    by_seed = values.mean(1)
    std = by_seed.std(ddof=ddof) if len(by_seed) > ddof else np.nan
    return Spread(float(by_seed.mean()), float(std), ddof, len(by_seed))


def difference_of_means(scores_a: ArrayLike, scores_b: ArrayLike) -> float:
    """Distance of the means of two sets of scores, at least 0; lower: the explanations depend less on the network.

    nan scores are left out; nan when one set has none left. Source: paper `normgrad`, DoM, the maximum mean
    discrepancy with a linear kernel in one dimension.
    """
    sets = [numbers("scores", scores).ravel() for scores in (scores_a, scores_b)]
    averages = [valid.mean() if len(valid := scores[~np.isnan(scores)]) else np.nan for scores in sets]
    return float(abs(averages[0] - averages[1]))
