"""The classification report against counts made by hand and against scikit-learn's own macro averages."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from cxrkit.errors import ParameterError
from cxrkit.metrics import classification_report

NAN = math.nan


def by_hand(target, probability, cutoff: float) -> dict[str, float]:
    """Counts and pairs, straight from the definitions."""
    pairs = [(t, p) for t, p in zip(target, probability, strict=True) if not math.isnan(t)]
    tp = sum(t == 1 and p > cutoff for t, p in pairs)
    fp = sum(t == 0 and p > cutoff for t, p in pairs)
    fn = sum(t == 1 and p <= cutoff for t, p in pairs)
    tn = sum(t == 0 and p <= cutoff for t, p in pairs)
    wins = [(p > q) + (p == q) / 2 for t, p in pairs if t == 1 for u, q in pairs if u == 0]
    return {
        "n": len(pairs),
        "prevalence": (tp + fn) / len(pairs),
        "accuracy": (tp + tn) / len(pairs),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "auc": sum(wins) / len(wins),
    }


@pytest.fixture
def answers():
    generator = np.random.default_rng(0)
    targets = (generator.random((60, 3)) < 0.4).astype(float)
    probabilities = np.clip(0.5 * targets + 0.7 * generator.random((60, 3)), 0, 1).round(1)
    return targets, probabilities


def test_against_counts_by_hand(answers):
    targets, probabilities = answers
    targets[:7, 1] = NAN
    frame = classification_report(targets, probabilities, ["a", "b", "c"], cutoff=0.6).set_index("label")
    for column, label in enumerate("abc"):
        for name, value in by_hand(targets[:, column], probabilities[:, column], 0.6).items():
            assert frame.loc[label, name] == pytest.approx(value), (label, name)
    assert frame.loc["macro", "auc"] == pytest.approx(frame.loc[list("abc"), "auc"].mean())
    assert frame.loc["macro", "n"] == 173


def test_macro_agrees_with_scikit_learn(answers):
    targets, probabilities = answers
    macro = classification_report(targets, probabilities, ["a", "b", "c"]).iloc[-1]
    assert macro["f1"] == pytest.approx(f1_score(targets, probabilities > 0.5, average="macro"))
    assert macro["auc"] == pytest.approx(roc_auc_score(targets, probabilities, average="macro"))


def test_one_class_only_gives_nan_and_is_counted_without_a_warning():
    targets = np.array([[1.0, 0, NAN], [0, 0, NAN], [1, 0, NAN]])
    probabilities = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.5], [0.8, 0.3, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = classification_report(targets, probabilities, ["a", "b", "c"]).set_index("label")
    assert frame["degenerate"].tolist() == [0, 1, 1, 2]
    assert frame.loc[["b", "c"], ["auc", "average_precision", "precision", "recall"]].isna().all(axis=None)
    assert frame.loc["b", "specificity"] == 1
    assert frame.loc["macro", "auc"] == 1
    assert frame.loc["macro", "n"] == 6


def test_zero_division_is_a_choice():
    targets, probabilities = np.array([[1.0], [0.0]]), np.array([[0.1], [0.2]])
    assert math.isnan(classification_report(targets, probabilities, ["a"])["precision"][0])
    frame = classification_report(targets, probabilities, ["a"], zero_division=0.0)
    assert frame["precision"][0] == 0
    assert frame["f1"][0] == 0


def test_the_cutoff_itself_is_not_positive():
    frame = classification_report([[1], [0]], [[0.5], [0.5]], ["a"])
    assert frame["recall"][0] == 0
    assert frame["auc"][0] == 0.5


@pytest.mark.parametrize(
    ("targets", "probabilities", "message"),
    [
        ([[1.0]], [[2.5]], "'a' has probabilities"),
        ([[1.0]], [[NAN]], "'a' has probabilities"),
        ([[0.5]], [[0.5]], "target 0.5"),
        ([[1.0, 0.0]], [[0.5, 0.5]], "must agree"),
    ],
)
def test_errors_name_the_label(targets, probabilities, message):
    with pytest.raises(ParameterError, match=message):
        classification_report(targets, probabilities, ["a"])
