"""The classification report against counts made by hand and against scikit-learn's own macro averages."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from cxrkit.errors import ParameterError
from cxrkit.metrics import (
    classification_report,
    hard_vote,
    operating_cutoffs,
    soft_vote,
)
from cxrkit.metrics.classification_scores import SCORES

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
    assert frame["degenerate"].tolist() == [0, 1, 1, 0, 2]  # the last two: micro, macro
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


def test_micro_agrees_with_scikit_learn(answers):
    targets, probabilities = answers
    micro = classification_report(targets, probabilities, ["a", "b", "c"]).set_index("label").loc["micro"]
    predicted = probabilities > 0.5
    for name, score in {
        "precision": sklearn_metrics.precision_score(targets, predicted, average="micro"),
        "recall": sklearn_metrics.recall_score(targets, predicted, average="micro"),
        "f1": f1_score(targets, predicted, average="micro"),
        "auc": roc_auc_score(targets, probabilities, average="micro"),
        "average_precision": sklearn_metrics.average_precision_score(targets, probabilities, average="micro"),
        "accuracy": (targets == predicted).mean(),
    }.items():
        assert micro[name] == pytest.approx(score), name


def test_micro_and_macro_in_closed_form():
    """TP (8, 0), FP (2, 0), FN (0, 2)."""
    targets = np.array([[1, 0]] * 8 + [[0, 1]] * 2)
    probabilities = np.array([[0.9, 0.1]] * 10)
    frame = classification_report(targets, probabilities, ["a", "b"], zero_division=0.0).set_index("label")
    names = ["precision", "recall", "f1"]
    assert frame.loc["micro", names].tolist() == pytest.approx([0.8, 0.8, 0.8])
    assert frame.loc["macro", names].tolist() == pytest.approx([0.4, 0.5, 4 / 9])


def test_every_label_may_have_its_own_cutoff(answers):
    targets, probabilities = answers
    cutoffs = [0.3, 0.5, math.nan]
    frame = classification_report(targets, probabilities, ["a", "b", "c"], cutoff=cutoffs).set_index("label")
    for column, label in enumerate("ab"):
        alone = classification_report(targets[:, [column]], probabilities[:, [column]], [label], cutoff=cutoffs[column])
        assert frame.loc[label].tolist() == pytest.approx(alone.iloc[0, 1:].tolist())
    assert frame.loc["c", ["accuracy", "precision", "recall", "specificity", "f1"]].isna().all()
    assert frame.loc["c", "auc"] > 0
    micro = classification_report(targets, probabilities, ["a", "b", "c"], cutoff=[0.3, 0.5, 0.8]).iloc[-2]
    assert micro["label"] == "micro"
    assert micro["f1"] == pytest.approx(f1_score(targets, probabilities > [0.3, 0.5, 0.8], average="micro"))
    with pytest.raises(ParameterError, match="cutoff"):
        classification_report(targets, probabilities, ["a", "b", "c"], cutoff=[0.3, 0.5])


def test_exclusive_classes_need_no_cutoff():
    probabilities = np.array([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.4, 0.2, 0.4]])
    targets = np.eye(3)[[0, 0, 1, 2, 2]]
    frame = classification_report(targets, probabilities, ["a", "b", "c"], exclusive=True).set_index("label")
    assert frame["recall"].tolist() == pytest.approx([1 / 2, 1, 1 / 2, 3 / 5, 2 / 3])
    assert frame["precision"].tolist() == pytest.approx([1 / 2, 1 / 2, 1, 3 / 5, 2 / 3])
    cut = classification_report(targets, probabilities, ["a", "b", "c"]).set_index("label")
    assert cut.loc["a", "recall"] == cut.loc["c", "recall"] == 0
    assert cut["auc"].equals(frame["auc"])


def best_by_trying(truth: np.ndarray, probability: np.ndarray, criterion: str) -> float:
    scores = []
    for cutoff in [-1, *probability]:
        predicted = probability > cutoff
        recall, specificity = predicted[truth == 1].mean(), (~predicted[truth == 0]).mean()
        youden = recall + specificity - 1
        scores.append(youden if criterion == "youden" else f1_score(truth, predicted, zero_division=0))
    return max(scores)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int64, 12, elements=st.integers(0, 1)),
    hnp.arrays(np.int64, 12, elements=st.integers(1, 8)),
    st.sampled_from(["youden", "f1"]),
)
def test_no_other_cutoff_does_better(truth, eighths, criterion):
    targets, probabilities = truth[:, None], eighths[:, None] / 8
    cutoff = operating_cutoffs(targets, probabilities, ["a"], criterion)
    if truth.min() == truth.max():
        assert np.isnan(cutoff).all()
        return
    row = classification_report(targets, probabilities, ["a"], cutoff=cutoff, zero_division=0.0).iloc[0]
    score = row["recall"] + row["specificity"] - 1 if criterion == "youden" else row["f1"]
    assert score == pytest.approx(best_by_trying(truth, eighths / 8, criterion))
    assert 0 <= cutoff[0] < 1


def test_cutoffs_in_closed_form():
    targets, probabilities = np.array([[0], [0], [1], [1]]), np.array([[0.1], [0.4], [0.6], [0.9]])
    assert operating_cutoffs(targets, probabilities, ["a"]).tolist() == pytest.approx([0.5])
    assert operating_cutoffs(1 - targets, probabilities, ["a"], "f1").tolist() == pytest.approx([0.05])  # all of them
    targets = np.array([[0.0], [1], [NAN], [1], [0]])  # 0.3 and 0.7 do equally well: the higher one
    assert operating_cutoffs(targets, np.array([[0.2], [0.4], [0.5], [0.8], [0.6]]), ["a"]).tolist() == [0.7]
    with pytest.raises(ParameterError, match="'youden', 'f1'"):
        operating_cutoffs(targets, targets, ["a"], "auc")


def test_cutoffs_tuned_on_the_test_images_flatter():
    generator = np.random.default_rng(0)
    gains = []
    for _ in range(30):
        targets = (generator.random((2, 60, 1)) < 0.5).astype(float)
        probabilities = np.clip(0.2 * targets + 0.8 * generator.random((2, 60, 1)), 0, 1)
        scores = []
        for tuned_on in (1, 0):  # the test images themselves, the validation images
            cutoff = operating_cutoffs(targets[tuned_on], probabilities[tuned_on], ["a"])
            row = classification_report(targets[1], probabilities[1], ["a"], cutoff=cutoff).iloc[0]
            scores.append(row["recall"] + row["specificity"] - 1)
        gains.append(scores[0] - scores[1])
    assert min(gains) >= 0
    assert np.mean(gains) > 0.03


def test_votes_differ_where_the_paper_and_its_code_do():
    members = np.array([0.9, 0.9, 0.05, 0.05, 0.55]).reshape(5, 1, 1)
    assert soft_vote(members).item() == pytest.approx(0.49)
    assert hard_vote(members, cutoff=0.51).item() == pytest.approx(0.6)
    report = classification_report([[1], [0]], np.repeat(soft_vote(members), 2, 0), ["a"], cutoff=0.51)
    assert report["recall"][0] == 0  # soft: not found
    report = classification_report([[1], [0]], np.repeat(hard_vote(members, cutoff=0.51), 2, 0), ["a"])
    assert report["recall"][0] == 1  # hard: 3 of 5


def test_votes_of_many_members_and_labels():
    members = np.random.default_rng(0).random((4, 7, 3))
    np.testing.assert_allclose(soft_vote(members), members.mean(0))
    shares = hard_vote(members, cutoff=[0.3, 0.5, 0.9])
    for row in range(7):
        for column, cutoff in enumerate([0.3, 0.5, 0.9]):
            assert shares[row, column] == sum(members[:, row, column] > cutoff) / 4
    assert hard_vote(np.full((3, 1, 1), 0.5)).item() == 0  # the cutoff itself is no vote
    assert not (hard_vote(np.array([0.9, 0.9, 0.1, 0.1]).reshape(4, 1, 1)) > 0.5).any()  # half is no majority
    with pytest.raises(ParameterError, match=r"\[members, N, L\]"):
        soft_vote(members[0])
    with pytest.raises(ParameterError, match="sigmoid"):
        hard_vote(members + 1)


def clustered(images=120, labels=3, patients=25, seed=4):
    """Targets with gaps, probabilities with ties, and whose images they are."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, labels)) < 0.3).astype(float)
    probabilities = np.round(0.3 * targets + 0.7 * rng.random((images, labels)), 1)
    targets[rng.random((images, labels)) < 0.1] = NAN
    return targets, probabilities, rng.integers(patients, size=images)


@pytest.mark.parametrize("options", [{"cutoff": [0.3, 0.5, 0.7]}, {"exclusive": True}, {"zero_division": 0.0}])
def test_intervals_are_those_of_tables_made_of_resampled_patients(options):
    targets, probabilities, patients = clustered()
    names, n = list("abc"), 30
    table = classification_report(targets, probabilities, names, patients=patients, n=n, seed=7, **options)
    known, rng, slow = np.unique(patients), np.random.default_rng(7), []
    for _ in range(n):
        rows = np.concatenate([np.flatnonzero(patients == known[k]) for k in rng.integers(len(known), size=len(known))])
        slow.append(classification_report(targets[rows], probabilities[rows], names, **options)[list(SCORES)])
    bounds = np.nanquantile(np.array(slow, dtype=float), [0.025, 0.975], axis=0)
    for place, name in enumerate(SCORES):
        np.testing.assert_allclose(table[f"{name} low"], bounds[0, :, place], err_msg=name)
        np.testing.assert_allclose(table[f"{name} high"], bounds[1, :, place], err_msg=name)
    plain = classification_report(targets, probabilities, names, **options)
    pd.testing.assert_frame_equal(table[plain.columns], plain)


def test_one_resample_agrees_with_weights_of_scikit_learn():
    targets, probabilities, patients = clustered(labels=1)
    table = classification_report(targets, probabilities, ["a"], patients=patients, n=1, seed=3).iloc[0]
    known = np.unique(patients)
    drawn = np.bincount(np.random.default_rng(3).integers(len(known), size=len(known)), minlength=len(known))
    there = ~np.isnan(targets[:, 0])
    truth, value = targets[there, 0], probabilities[there, 0]
    weights = drawn[np.searchsorted(known, patients)][there]
    for name, score in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        assert (
            table[f"{name} low"] == table[f"{name} high"] == pytest.approx(score(truth, value, sample_weight=weights))
        )
    assert table["recall low"] == pytest.approx(recall_score(truth, value > 0.5, sample_weight=weights))


def test_intervals_without_patients_to_draw():
    targets, probabilities = [[1.0, 0.0], [0.0, 0.0], [1.0, NAN]], [[0.9, 0.2], [0.3, 0.4], [0.6, 0.1]]
    table = classification_report(targets, probabilities, ["a", "b"], patients=["p", "p", "p"], n=20)
    assert table.filter(regex=" (low|high)$").isna().all(axis=None)
    table = classification_report(targets, probabilities, ["a", "b"], patients=["p", "q", "r"], n=20)
    assert np.isnan(table.set_index("label").loc["b", "auc low"]), "a label of one class has no AUC"
    assert (table["accuracy low"] <= table["accuracy"]).all()
    empty = classification_report([[NAN], [NAN]], [[0.5], [0.5]], ["a"], patients=["p", "q"], n=20)
    assert empty.filter(like="low").isna().all(axis=None)
    with pytest.raises(ParameterError, match="2 patients for 3 rows"):
        classification_report(targets, probabilities, ["a", "b"], patients=["p", "q"])
