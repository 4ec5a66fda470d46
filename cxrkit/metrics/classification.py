"""How well a classifier does, label by label: scikit-learn's metrics, nan where a class is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn import metrics as sklearn_metrics

from cxrkit.errors import ParameterError
from cxrkit.metrics.classification_bounds import DECIDED, METRICS, metric_bounds
from cxrkit.metrics.inputs import flag, label_names, number, numbers, one_of, patient_ids, whole
from cxrkit.metrics.statistics import resampling

__all__ = [
    "calibration_report",
    "classification_report",
    "hard_vote",
    "operating_cutoffs",
    "reliability",
    "soft_vote",
]

CRITERIA = ("youden", "f1")
MOST_BINS = 10**6


def classification_report(
    targets: ArrayLike,
    probabilities: ArrayLike,
    labels: Sequence[str],
    cutoff: float | Sequence[float] = 0.5,
    zero_division: float = np.nan,
    exclusive: bool = False,
    patients: Sequence | None = None,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """One row per label, then "micro" (all entries as one label), then "macro" (the mean over labels).

    ``targets`` ``[N, L]``: 0, 1, or nan where unknown (left out for that label alone); ``probabilities`` ``[N,
    L]`` in [0, 1]; a label is predicted where its probability exceeds ``cutoff``, one number or one per label
    (see :func:`operating_cutoffs`; nan: the metrics that need a cutoff are nan). ``exclusive`` classes need no
    cutoff: an image gets the one of highest probability (the first of several), even where that is below one half.
    Columns: label, n, positives, prevalence, accuracy, precision, recall, specificity, f1, auc,
    average_precision, degenerate. With ``patients`` ``[N]`` each metric is followed by its interval, "auc low" and
    "auc high" and so on: as in :func:`cxrkit.metrics.bootstrap`, but for a whole table, all labels of a patient
    together. Its bounds are nan where half of the ``n`` resamples or more leave the metric undefined.
    ``zero_division`` is what precision, recall, specificity and F1 are when their denominator is 0 (papers
    often mean 0). A label with one class only has no AUC and no average precision (nan) and counts as
    ``degenerate``. Macro is the mean over the labels for which a metric is defined, and counts the degenerate
    ones; micro pools the labels' true and false positives and negatives, and the pairs of the AUC.

    Raises ParameterError for shapes that differ, targets other than 0, 1, nan, and probabilities outside [0,
    1]. Source: paper `bcos`, appendix A; paper `covid`, Eqs. 1 and 2 (macro, micro); definitions as in
    scikit-learn.
    """
    targets, probabilities = checked_predictions(targets, probabilities, labels)
    cutoffs = checked_cutoffs(cutoff, len(labels))
    zero_division = number("zero_division", zero_division, "0, 1 or nan", lambda v: v in (0, 1) or v != v)
    if flag("exclusive", exclusive):
        if (~np.isnan(targets)).any(1)[np.isnan(probabilities).any(1)].any():
            raise ParameterError("exclusive classes need the probabilities of all of them; some are nan")
        predicted = np.where(np.arange(len(labels)) == probabilities.argmax(1)[:, None], 1.0, 0.0)
    else:
        predicted = np.where(np.isnan(cutoffs), np.nan, probabilities > cutoffs)
    known, values = ~np.isnan(targets), np.stack([targets, probabilities, predicted])
    rows = [
        {"label": label, **_row(*values[:, where, column], zero_division)}
        for column, (label, where) in enumerate(zip(labels, known.T, strict=True))
    ]
    frame = pd.DataFrame(rows)
    micro = _row(*values[:, known], zero_division)
    macro = {name: frame[name].mean() for name in ("prevalence", *METRICS)}
    macro |= {name: frame[name].sum() for name in ("n", "positives", "degenerate")}
    averages = pd.DataFrame([{"label": "micro", **micro}, {"label": "macro", **macro}])
    frame = pd.concat([frame, averages], ignore_index=True)
    if patients is None:
        return frame
    n, seed, confidence = resampling(n, seed, confidence)
    patients = patient_ids(patients)
    if len(patients) != len(targets):
        raise ParameterError(f"{len(patients)} patients for {len(targets)} rows of targets: one for each is needed")
    bounds = metric_bounds(values, patients, zero_division, n, seed, confidence)
    columns = [column for name in frame for column in (name, f"{name} low", f"{name} high")]
    return frame.assign(**bounds).reindex(columns=[name for name in columns if name in frame or name in bounds])


def _row(target: np.ndarray, probability: np.ndarray, predicted: np.ndarray, zero_division: float) -> dict[str, float]:
    truth = target.astype(int)
    both = len(np.unique(truth)) == 2
    counts = {"n": len(truth), "positives": int(truth.sum())}
    if not len(truth):
        return counts | {"prevalence": np.nan} | dict.fromkeys(METRICS, np.nan) | {"degenerate": 1}
    return counts | {
        "prevalence": truth.mean(),
        **_decided(truth, predicted, zero_division),
        "auc": sklearn_metrics.roc_auc_score(truth, probability) if both else np.nan,
        "average_precision": sklearn_metrics.average_precision_score(truth, probability) if both else np.nan,
        "degenerate": int(not both),
    }


def _decided(truth: np.ndarray, predicted: np.ndarray, zero_division: float) -> dict[str, float]:
    if np.isnan(predicted).any():
        return dict.fromkeys(DECIDED, np.nan)
    predicted = predicted.astype(int)
    given = {"y_true": truth, "y_pred": predicted, "zero_division": zero_division}
    return {
        "accuracy": sklearn_metrics.accuracy_score(truth, predicted),
        "precision": sklearn_metrics.precision_score(**given),
        "recall": sklearn_metrics.recall_score(**given),
        "specificity": sklearn_metrics.recall_score(**given, pos_label=0),
        "f1": sklearn_metrics.f1_score(**given),
    }


def operating_cutoffs(
    targets: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], criterion: str = "youden"
) -> np.ndarray:
    """The cutoff of each label that does best on these images, ``[L]`` in [0, 1): give it those of validation.

    ``targets`` and ``probabilities`` as in :func:`classification_report`, which takes the result as ``cutoff``
    for the test images; cutoffs tuned on the images they are judged on flatter the network. ``"youden"``
    maximises recall + specificity - 1, ``"f1"`` the F1 score. A cutoff lies midway between two neighbouring
    probabilities (or halfway to 0 below the smallest); of equally good ones the highest is taken. nan for a
    label with one class only. Raises ParameterError as :func:`classification_report` does. Source: Youden,
    Index for rating diagnostic tests, Cancer 3 (1950).
    """
    one_of("criterion", criterion, CRITERIA)
    targets, probabilities = checked_predictions(targets, probabilities, labels)
    known = ~np.isnan(targets)
    return np.array(
        [
            _best_cutoff(targets[where, column], probabilities[where, column], criterion)
            for column, where in enumerate(known.T)
        ]
    )


def _best_cutoff(truth: np.ndarray, probability: np.ndarray, criterion: str) -> float:
    if len(np.unique(truth)) < 2:
        return np.nan
    values, place = np.unique(probability, return_inverse=True)
    size, positives = len(truth), truth.sum()
    # Row k: predicted are the probabilities of at least values[k].
    predicted = np.bincount(place)[::-1].cumsum()[::-1]
    found = np.bincount(place, weights=truth)[::-1].cumsum()[::-1]
    if criterion == "youden":
        score = found * (size - positives) - (predicted - found) * positives  # in whole numbers, so that ties are ties
    else:
        score = 2 * found / (predicted + positives)
    best = len(values) - 1 - int(np.argmax(score[::-1]))
    return float((values[best] + (values[best - 1] if best else 0.0)) / 2)


def calibration_report(
    targets: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], bins: int = 10
) -> pd.DataFrame:
    """Do the probabilities mean what they say: a row per label, then "micro" and "macro".

    Arguments as in :func:`classification_report`. Columns: label, n, prevalence, confidence (the mean
    probability), brier (mean squared distance of probability and target, in [0, 1]), ece (expected calibration
    error, in [0, 1]: distance of mean probability and share of positives in each of ``bins`` equal parts of [0,
    1], weighted by their images). nan for a label without known targets. Source: Brier, Monthly Weather Review
    78 (1950); Pakdaman Naeini et al., AAAI 2015.
    """
    targets, probabilities = checked_predictions(targets, probabilities, labels)
    known = ~np.isnan(targets)
    rows = [
        {"label": label, **_calibration(targets[where, column], probabilities[where, column], bins)}
        for column, (label, where) in enumerate(zip(labels, known.T, strict=True))
    ]
    frame = pd.DataFrame(rows)
    macro = frame[["prevalence", "confidence", "brier", "ece"]].mean().to_dict() | {"n": frame["n"].sum()}
    averages = [
        {"label": "micro", **_calibration(targets[known], probabilities[known], bins)},
        {"label": "macro", **macro},
    ]
    return pd.concat([frame, pd.DataFrame(averages)], ignore_index=True)


def _calibration(truth: np.ndarray, probability: np.ndarray, bins: int) -> dict[str, float]:
    table = _bins(truth, probability, bins)
    if not len(truth):
        return {"n": 0} | dict.fromkeys(("prevalence", "confidence", "brier", "ece"), np.nan)
    gaps = (table["confidence"] - table["frequency"]).abs() * table["n"] / len(truth)
    return {
        "n": len(truth),
        "prevalence": truth.mean(),
        "confidence": probability.mean(),
        "brier": np.square(probability - truth).mean(),
        "ece": gaps.sum(),
    }


def reliability(targets: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], bins: int = 10) -> pd.DataFrame:
    """The reliability diagram as a table: a row per label and bin with low, high, n, confidence, frequency.

    Bins part [0, 1] evenly; a probability on an edge belongs to the lower bin. ``confidence`` is a bin's mean
    probability, ``frequency`` its share of positives; nan for an empty bin. Arguments as in
    :func:`classification_report`. Source: as :func:`calibration_report`; bins as in scikit-learn.
    """
    targets, probabilities = checked_predictions(targets, probabilities, labels)
    parts = []
    for column, label in enumerate(labels):
        known = ~np.isnan(targets[:, column])
        table = _bins(targets[known, column], probabilities[known, column], bins)
        table.insert(0, "label", label)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _bins(truth: np.ndarray, probability: np.ndarray, bins: int) -> pd.DataFrame:
    edges = np.linspace(0, 1, whole("bins", bins, 1, MOST_BINS) + 1)
    place = np.searchsorted(edges[1:-1], probability)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (probability, truth)]
    confidence, frequency = (np.divide(s, count, out=np.full(bins, np.nan), where=count > 0) for s in sums)
    return pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "n": count, "confidence": confidence, "frequency": frequency}
    )


def soft_vote(probabilities: ArrayLike) -> np.ndarray:
    """Mean probability of an ensemble's members: ``[M, N, L]`` -> ``[N, L]``, to be cut like one network's.

    Source: paper `covid`, whose published code averages and cuts at 0.51.
    """
    return _members(probabilities).mean(0)


def hard_vote(probabilities: ArrayLike, cutoff: float | Sequence[float] = 0.5) -> np.ndarray:
    """Share of an ensemble's members that find the label: ``[M, N, L]`` -> ``[N, L]`` in [0, 1].

    A member finds a label where its probability exceeds ``cutoff`` (one number, or one per label). More than
    0.5 is the majority, 3 of 5 or more; half of an even number is none. nan for a label
    whose cutoff is nan. Source: paper `covid`, whose text says majority (``cutoff=0.51``).
    """
    members = _members(probabilities)
    cutoffs = checked_cutoffs(cutoff, members.shape[2])
    return np.where(np.isnan(cutoffs), np.nan, (members > cutoffs).mean(0))


def _members(probabilities: ArrayLike) -> np.ndarray:
    members = numbers("probabilities", probabilities)
    if members.ndim != 3 or 0 in members.shape:
        raise ParameterError(f"probabilities have shape {members.shape}; expected [members, N, L]")
    if not ((members >= 0) & (members <= 1)).all():
        raise ParameterError("probabilities outside [0, 1]: apply the sigmoid to the logits first")
    return members


def checked_cutoffs(cutoff: float | Sequence[float], count: int) -> np.ndarray:
    """One cutoff, ``[]``, or one for each of ``count`` labels, ``[L]``, each in [0, 1] or nan."""
    cutoffs = numbers("cutoff", cutoff)
    if cutoffs.shape not in ((), (count,)):
        raise ParameterError(f"cutoff has shape {cutoffs.shape}; expected one number, or one per label ({count})")
    if ((cutoffs < 0) | (cutoffs > 1)).any():
        raise ParameterError(f"cutoff {cutoff} is outside [0, 1]: it is a probability")
    return cutoffs


def checked_predictions(
    targets: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], used: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities ``[N, L]``, float64; ``used``: entries that need a probability, the known targets."""
    targets, probabilities = numbers("targets", targets), numbers("probabilities", probabilities)
    if targets.ndim != 2 or targets.shape != probabilities.shape:
        raise ParameterError(f"targets {targets.shape} and probabilities {probabilities.shape} must agree as [N, L]")
    known = ~np.isnan(targets)
    wrong = (known if used is None else used) & ~((probabilities >= 0) & (probabilities <= 1))
    for column, label in enumerate(label_names(labels, targets.shape[1])):
        if bad := sorted(set(targets[known[:, column], column].tolist()) - {0.0, 1.0}):
            raise ParameterError(f"label {label!r} has the target {bad[0]}; targets are 0, 1 or nan")
        for row in np.flatnonzero(wrong[:, column]):
            raise ParameterError(
                f"label {label!r} has probabilities outside [0, 1] ({probabilities[row, column]} in row {row}): apply "
                "the sigmoid to the logits first; leave out images without a prediction"
            )
    return targets, probabilities
