"""How well a classifier does, label by label: scikit-learn's metrics, nan where a class is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn import metrics as sklearn_metrics

from cxrkit.errors import ParameterError

__all__ = ["classification_report"]

METRICS = ("accuracy", "precision", "recall", "specificity", "f1", "auc", "average_precision")


def classification_report(
    targets: ArrayLike,
    probabilities: ArrayLike,
    labels: Sequence[str],
    cutoff: float = 0.5,
    zero_division: float = np.nan,
) -> pd.DataFrame:
    """One row per label, then "macro": the mean over the labels for which a metric is defined.

    ``targets`` ``[N, L]``: 0, 1, or nan where unknown (left out for that label alone); ``probabilities`` ``[N,
    L]`` in [0, 1]; a label is predicted where its probability exceeds ``cutoff``. Columns: label, n, positives,
    prevalence, accuracy, precision, recall, specificity, f1, auc, average_precision, degenerate.
    ``zero_division`` is what precision, recall, specificity and F1 are when their denominator is 0 (papers
    often mean 0). A label with one class only has no AUC and no average precision (nan) and counts as
    ``degenerate``; the macro row counts such labels. Raises ParameterError for shapes that differ, targets
    other than 0, 1, nan, and probabilities outside [0, 1]. Source: paper `bcos`, appendix A (definitions as in
    scikit-learn).
    """
    targets, probabilities = np.asarray(targets, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if targets.ndim != 2 or targets.shape != probabilities.shape or targets.shape[1] != len(labels):
        shapes = f"targets {targets.shape}, probabilities {probabilities.shape} and {len(labels)} labels"
        raise ParameterError(f"{shapes} must agree as [N, L], [N, L] and L")
    rows = []
    for column, label in enumerate(labels):
        known = ~np.isnan(targets[:, column])
        _check(label, targets[known, column], probabilities[known, column])
        rows.append(
            {"label": label, **_one_label(targets[known, column], probabilities[known, column], cutoff, zero_division)}
        )
    frame = pd.DataFrame(rows)
    macro = {name: frame[name].mean() for name in ("prevalence", *METRICS)}
    macro |= {name: frame[name].sum() for name in ("n", "positives", "degenerate")}
    return pd.concat([frame, pd.DataFrame([{"label": "macro", **macro}])], ignore_index=True)


def _one_label(target: np.ndarray, probability: np.ndarray, cutoff: float, zero_division: float) -> dict[str, float]:
    truth, predicted = target.astype(int), (probability > cutoff).astype(int)
    both = len(np.unique(truth)) == 2
    counts = {"n": len(truth), "positives": int(truth.sum())}
    if not len(truth):
        return counts | {"prevalence": np.nan} | dict.fromkeys(METRICS, np.nan) | {"degenerate": 1}
    recall = {"y_true": truth, "y_pred": predicted, "zero_division": zero_division}
    return counts | {
        "prevalence": truth.mean(),
        "accuracy": sklearn_metrics.accuracy_score(truth, predicted),
        "precision": sklearn_metrics.precision_score(**recall),
        "recall": sklearn_metrics.recall_score(**recall),
        "specificity": sklearn_metrics.recall_score(**recall, pos_label=0),
        "f1": sklearn_metrics.f1_score(**recall),
        "auc": sklearn_metrics.roc_auc_score(truth, probability) if both else np.nan,
        "average_precision": sklearn_metrics.average_precision_score(truth, probability) if both else np.nan,
        "degenerate": int(not both),
    }


def _check(label: str, target: np.ndarray, probability: np.ndarray) -> None:
    if bad := sorted(set(target.tolist()) - {0.0, 1.0}):
        raise ParameterError(f"label {label!r} has the target {bad[0]}; targets are 0, 1 or nan")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ParameterError(f"label {label!r} has probabilities outside [0, 1]: apply the sigmoid to the logits first")
