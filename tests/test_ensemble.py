"""Ensembles and means over folds and seeds: by hand, and refused where runs don't belong together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cxrkit import DataError, ParameterError, study
from cxrkit.study import ensembles
from cxrkit.train.parameters import TrainParameters


class Trained:
    """What an ensemble reads of a run."""

    kind = "train"

    def __init__(self, probabilities, fold=0, seed=0, images=("a", "b"), labels=("x", "y"), target=None, loss="bce"):
        self.key = f"train-fold{fold}-seed{seed}"
        self.parameters = TrainParameters(fold=fold, seed=seed, loss=loss)
        count = len(images) * len(labels)
        self._frame = pd.DataFrame(
            {
                "image_id": np.repeat(images, len(labels)),
                "patient_id": np.repeat(images, len(labels)),
                "split": "test",
                "label": list(labels) * len(images),
                "target": [1.0, 0.0] * (count // 2) if target is None else target,
                "logit": 0.0,
                "probability": probabilities,
            }
        )

    def frame(self, name):
        assert name == "predictions"
        return self._frame


def test_soft_and_hard_votes_differ_as_in_the_papers_example():
    chances = [[0.9] * 4, [0.9] * 4, [0.05] * 4, [0.05] * 4, [0.55] * 4]
    found = study.ensemble([Trained(values, seed=seed) for seed, values in enumerate(chances)])
    assert found["probability"].tolist() == pytest.approx([0.49] * 4)
    assert found["votes"].tolist() == pytest.approx([0.6] * 4)
    assert found["members"].unique().tolist() == [5]
    soft, hard = (ensembles.scores_of(found, column=name) for name in ("probability", "votes"))
    assert soft.loc[0, "recall"] == 0
    assert hard.loc[0, "recall"] == 1
    assert ensembles.scores_of(found, cutoff=0.48).loc[0, "recall"] == 1


def of_three(first, second, **options):
    """A member that splits its belief over three classes; the first image is of class x, the second of class z."""
    given = {"labels": ("x", "y", "z"), "target": [1.0, 0, 0, 0, 0, 1.0], "loss": "cross_entropy"}
    return Trained([*first, *second], **given | options)


def test_of_exclusive_classes_the_likeliest_is_found_even_below_one_half():
    members = [of_three([0.4, 0.3, 0.3], [0.3, 0.3, 0.4], seed=seed) for seed in range(3)]
    found = study.ensemble(members, cutoff=0.51)
    assert found["exclusive"].all()
    assert found["votes"].tolist() == [1, 0, 0, 0, 0, 1]
    for column in ("probability", "votes"):
        scores = ensembles.scores_of(found, cutoff=0.51, column=column).set_index("label")
        assert scores.loc[["x", "z", "micro"], "recall"].tolist() == [1, 1, 1], column
        assert scores.loc["micro", "precision"] == 1


def test_the_most_votes_decide_without_a_majority():
    members = [
        of_three(first, [0, 0, 1], seed=seed)
        for seed, first in enumerate(([0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0, 1, 0], [0, 0, 1], [0, 0.4, 0.6]))
    ]
    found = study.ensemble([*members, of_three([1, 0, 0], [0, 0, 1], seed=5), of_three([0, 1, 0], [0, 0, 1], seed=6)])
    assert found["votes"].max() == 1
    assert found["votes"].tolist()[:3] == pytest.approx([3 / 7, 2 / 7, 2 / 7])
    assert ensembles.scores_of(found, column="votes").loc[0, "recall"] == 1


def test_exclusive_classes_and_labels_for_themselves_do_not_vote_together():
    with pytest.raises(ParameterError, match=r"train-fold0-seed0 chose among classes .* train-fold0-seed1 judged each"):
        study.ensemble([of_three([1, 0, 0], [0, 0, 1]), of_three([1, 0, 0], [0, 0, 1], seed=1, loss="bce")])
    one = {"images": ("a", "b"), "labels": ("x",), "target": [1.0, 0.0]}  # one label against the rest: a sigmoid
    assert not study.ensemble([Trained([0.9, 0.1], loss="cross_entropy", **one)])["exclusive"].any()


def test_only_runs_of_the_same_fold_vote_together():
    members = [
        Trained([0.2, 0.4, 0.6, 0.8], fold=1, images=("c", "d")),
        Trained([0.0, 0.0, 1.0, 1.0], seed=0),
        Trained([1.0, 0.0, 1.0, 0.0], seed=1),
    ]
    found = study.ensemble(members)
    assert found["fold"].tolist() == [0] * 4 + [1] * 4
    assert found["members"].tolist() == [2] * 4 + [1] * 4
    assert found["probability"].tolist() == pytest.approx([0.5, 0, 1, 0.5, 0.2, 0.4, 0.6, 0.8])
    assert found["votes"].tolist() == pytest.approx([0.5, 0, 1, 0.5, 0, 0, 1, 1])
    assert found["image_id"].tolist() == ["a", "a", "b", "b", "c", "c", "d", "d"]


def test_runs_that_do_not_belong_together_are_refused():
    with pytest.raises(DataError, match="train-fold0-seed1 and train-fold0-seed0 of fold 0 differ"):
        study.ensemble([Trained([0.1] * 4), Trained([0.1] * 4, seed=1, images=("a", "c"))])
    with pytest.raises(ParameterError, match="at least one run"):
        study.ensemble([])
    other = Trained([0.1] * 4)
    other.kind = "explain"
    with pytest.raises(ParameterError, match="only training runs"):
        study.ensemble([other])
