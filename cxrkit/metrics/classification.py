"""How well a classifier does, label by label: nan where a class is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cxrkit.errors import ParameterError
from cxrkit.metrics.classification_scores import SCORES, Entries, entries_of, score_bounds, scores_of
from cxrkit.metrics.inputs import flag, label_names, number, numbers, one_of, patient_ids
from cxrkit.metrics.statistics import resampling

__all__ = ["classification_report", "hard_vote", "operating_cutoffs", "soft_vote"]

CRITERIA = ("youden", "f1")


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
    targets, probabilities = _checked_predictions(targets, probabilities, labels)
    cutoffs = _checked_cutoffs(cutoff, len(labels))
    zero_division = number("zero_division", zero_division, "0, 1 or nan", lambda v: v in (0, 1) or v != v)
    predicted = _decisions(targets, probabilities, cutoffs, flag("exclusive", exclusive))
    known, values = ~np.isnan(targets), np.stack([targets, probabilities, predicted])
    owner = np.arange(len(targets))
    if patients is not None:
        owner = np.unique(patient_ids(patients), return_inverse=True)[1]
        n, seed, confidence = resampling(n, seed, confidence)
    if len(owner) != len(targets):
        raise ParameterError(f"{len(owner)} patients for {len(targets)} rows of targets: one for each is needed")
    size = int(owner.max(initial=-1)) + 1
    entries = [entries_of(values[:, rows, label], owner[rows], size) for label, rows in enumerate(known.T)]
    entries.append(entries_of(values[:, known], np.broadcast_to(owner[:, None], known.shape)[known], size))
    rows = [_row(part, zero_division) for part in entries]
    by_label = pd.DataFrame(rows[:-1])
    macro = by_label.mean().to_dict() | {name: by_label[name].sum() for name in ("n", "positives", "degenerate")}
    frame = pd.DataFrame([*rows, macro])
    frame.insert(0, "label", [*labels, "micro", "macro"])
    if patients is None:
        return frame
    bounds = score_bounds(entries, zero_division, n, seed, confidence)
    columns = [column for name in frame for column in (name, f"{name} low", f"{name} high")]
    return frame.assign(**bounds).reindex(columns=[name for name in columns if name in frame or name in bounds])


def _decisions(targets: np.ndarray, probabilities: np.ndarray, cutoffs: np.ndarray, exclusive: bool) -> np.ndarray:
    """1 where a label is predicted, 0 where it is not, nan without a cutoff; ``[N, L]``."""
    if not exclusive:
        return np.where(np.isnan(cutoffs), np.nan, probabilities > cutoffs)
    if (~np.isnan(targets)).any(1)[np.isnan(probabilities).any(1)].any():
        raise ParameterError("exclusive classes need the probabilities of all of them; some are nan")
    return np.where(np.arange(targets.shape[1]) == probabilities.argmax(1)[:, None], 1.0, 0.0)


def _row(entries: Entries, zero_division: float) -> dict[str, float]:
    scores = scores_of(entries, np.ones((entries.decided.shape[1], 1)), zero_division)[:, 0]
    n, positives = int(entries.counts.sum()), int(entries.positives.sum())
    counts = {"n": n, "positives": positives, "prevalence": positives / n if n else np.nan}
    return counts | dict(zip(SCORES, scores, strict=True)) | {"degenerate": int(positives in (0, n))}


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
    targets, probabilities = _checked_predictions(targets, probabilities, labels)
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
    cutoffs = _checked_cutoffs(cutoff, members.shape[2])
    return np.where(np.isnan(cutoffs), np.nan, (members > cutoffs).mean(0))


def _members(probabilities: ArrayLike) -> np.ndarray:
    members = numbers("probabilities", probabilities)
    if members.ndim != 3 or 0 in members.shape:
        raise ParameterError(f"probabilities have shape {members.shape}; expected [members, N, L]")
    if not ((members >= 0) & (members <= 1)).all():
        raise ParameterError("probabilities outside [0, 1]: apply the sigmoid to the logits first")
    return members


def _checked_cutoffs(cutoff: float | Sequence[float], count: int) -> np.ndarray:
    """One cutoff, ``[]``, or one for each of ``count`` labels, ``[L]``, each in [0, 1] or nan."""
    cutoffs = numbers("cutoff", cutoff)
    if cutoffs.shape not in ((), (count,)):
        raise ParameterError(f"cutoff has shape {cutoffs.shape}; expected one number, or one per label ({count})")
    if ((cutoffs < 0) | (cutoffs > 1)).any():
        raise ParameterError(f"cutoff {cutoff} is outside [0, 1]: it is a probability")
    return cutoffs


def _checked_predictions(
    targets: ArrayLike, probabilities: ArrayLike, labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities ``[N, L]``, float64; every known target needs a probability."""
    targets, probabilities = numbers("targets", targets), numbers("probabilities", probabilities)
    if targets.ndim != 2 or targets.shape != probabilities.shape:
        raise ParameterError(f"targets {targets.shape} and probabilities {probabilities.shape} must agree as [N, L]")
    known = ~np.isnan(targets)
    wrong = known & ~((probabilities >= 0) & (probabilities <= 1))
    for column, label in enumerate(label_names(labels, targets.shape[1])):
        if bad := sorted(set(targets[known[:, column], column].tolist()) - {0.0, 1.0}):
            raise ParameterError(f"label {label!r} has the target {bad[0]}; targets are 0, 1 or nan")
        for row in np.flatnonzero(wrong[:, column]):
            raise ParameterError(
                f"label {label!r} has probabilities outside [0, 1] ({probabilities[row, column]} in row {row}): apply "
                "the sigmoid to the logits first; leave out images without a prediction"
            )
    return targets, probabilities
