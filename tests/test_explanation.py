"""Scores of a network whose maps are known in closed form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from cxrkit import ParameterError
from cxrkit.data.dataset import Dataset, Rendered
from cxrkit.study import explanation
from cxrkit.study.parameters import ExplainParameters

SIZE = 32


class Halves(torch.nn.Module):
    """Logit of "left": twice the left half minus the right half of the image; of "right": the right half."""

    labels = ("left", "right")

    def __init__(self):
        super().__init__()
        weights = torch.zeros(2, SIZE, SIZE)
        weights[0, :, :16], weights[0, :, 16:] = 2.0, -1.0
        weights[1, :, 16:] = 1.0
        self.weights = torch.nn.Parameter(weights)

    def forward(self, images):
        return torch.einsum("bhw,lhw->bl", images[:, 0], self.weights) - 100.0


class Grey:
    def render(self, row, size):
        return Rendered(torch.full((size, size), 0.1 * (row + 1)))


@pytest.fixture
def subject() -> explanation.Subject:
    table = pd.DataFrame({"left": [1.0, 1, 0, 1], "right": [0.0, 1, 1, np.nan]})
    table = table.assign(image_id=list("abcd"), patient_id=list("pqrs"), path=None, orig_width=SIZE, orig_height=SIZE)
    box = {"label": "left", "x_min": 0, "y_min": 0, "x_max": 16, "y_max": 16, "reader": "r"}
    boxes = pd.DataFrame([{"image_id": "a"} | box, {"image_id": "b"} | box, {"image_id": "c", **box, "label": "right"}])
    data = Dataset("halves", ("left", "right"), table.assign(split="test"), boxes, Grey(), SIZE)
    parameters = ExplainParameters(thresholds=[0.0, 1.0], maps=3)
    return explanation.Subject(None, parameters, Halves(), ["saliency", "input_x_gradient"], ["left", "right"], data)


def test_every_boxed_positive_is_scored_by_every_method(subject):
    scores = explanation.score(subject)
    rows = scores.groupby(["method", "threshold"])[["image_id", "label"]].apply(lambda part: part.to_numpy().tolist())
    # d is positive but has no box; b's "right" is positive but has none either.
    assert all(pairs == [["a", "left"], ["b", "left"], ["c", "right"]] for pairs in rows)
    assert len(rows) == 4


def test_scores_are_the_closed_forms(subject):
    scores = (
        explanation.score(subject).query("method == 'saliency' and threshold == 0").set_index(["image_id", "label"])
    )
    left, right = scores.loc[("a", "left")], scores.loc[("c", "right")]
    assert left["chance"] == pytest.approx(0.25)
    assert left["precision"] == pytest.approx(0.5)  # the box holds half of the positive half
    assert left["recall"] == pytest.approx(1.0)
    assert left["chance_recall"] == pytest.approx(1024 / 1536)  # of all evidence in the image, what speaks for it
    assert left["signed"] == pytest.approx(1.0)  # 512 / (1024 - 512): why signed maps need clipping
    assert right["precision"] == 0.0
    assert left["logit"] == pytest.approx(0.1 * 512 - 100.0, abs=1e-3)


def test_kept_maps_are_raw_and_of_every_label(subject):
    kept = explanation.kept_maps(subject)
    assert kept["maps"].shape == (2, 3, 2, SIZE, SIZE)
    assert kept["maps"].dtype == np.float32
    assert kept["maps"][0, 0, 0].min() == -1.0
    assert kept["logits"].shape == (3, 2)
    assert set(kept["image_ids"]) <= set("abcd")


def test_the_example_is_the_surest_boxed_positive(subject):
    example = explanation.example(subject)
    assert example["caption"].startswith("right, c")
    assert example["maps"].shape == (2, SIZE, SIZE)
    assert example["mask"].sum() == 256


@pytest.fixture
def mixed(subject) -> explanation.Subject:
    """Boxes that don't fit the labels: of "right" on a (negative) and d (unknown), and one beside the image on e."""
    table = pd.DataFrame({"left": [1.0, 1, 0, 1, 1], "right": [0.0, 1, 1, np.nan, 0]})
    table = table.assign(image_id=list("abcde"), patient_id=list("ppqrs"), path=None, split="test")
    table = table.assign(orig_width=SIZE, orig_height=SIZE)
    box = {"x_min": 0, "y_min": 0, "x_max": 16, "y_max": 16, "reader": "r"}
    where = [("a", "left"), ("b", "left"), ("c", "right"), ("a", "right"), ("d", "right"), ("d", "Mass")]
    boxes = [{"image_id": image, "label": label, **box} for image, label in where]
    boxes.append({**boxes[0], "image_id": "e", "x_min": 40.1, "x_max": 40.2})
    subject.images = Dataset("mixed", ("left", "right"), table, pd.DataFrame(boxes), Grey(), SIZE)
    subject.cutoffs = {"left": 1e-30}
    return subject


def test_what_is_left_out_is_counted_by_cause(mixed):
    scores = explanation.score(mixed)
    assert set(map(tuple, scores[["image_id", "label"]].to_numpy())) == {("a", "left"), ("b", "left"), ("c", "right")}
    found = explanation.coverage(mixed, scores).set_index("label")
    assert found.loc["left"].drop("cutoff").tolist() == [4, 2, 1, 1, 1, 0, 0]
    assert found.loc["right"].drop("cutoff").tolist() == [2, 1, 1, 1, 0, 1, 1]
    assert found.loc["all labels"].drop("cutoff").tolist() == [6, 3, 2, 2, 1, 1, 1]
    told = explanation.extent(mixed, scores)
    assert "5 images of 4 patients; 5 images of 4 patients have a box" in told
    assert "scored: 3 images of 2 patients" in told
    assert "Nothing to score on 2" in told
    assert "Boxes of labels that aren't explained: 1 (Mass)." in told


def test_cutoffs_are_those_of_the_run(mixed):
    scores = explanation.score(mixed)
    assert (scores.loc[scores["label"] == "left", "cutoff"] == 1e-30).all()
    assert scores.loc[scores["label"] == "right", "cutoff"].isna().all(), "the run could choose none"
    assert "chosen on the validation split" in explanation.extent(mixed, scores)
    mixed.cutoffs = {}
    scores = explanation.score(mixed)
    assert (scores["cutoff"] == 0.5).all()
    assert "0.5 each, as the run keeps none" in explanation.extent(mixed, scores)


def test_a_refusal_says_what_was_left_out(mixed):
    mixed.images, mixed.run = mixed.images.select([3, 4]), type("Run", (), {"key": "k"})
    with pytest.raises(ParameterError, match=r"positive: 2, no box: 1, box outside: 1, .*unknown: 1"):
        explanation.score(mixed)


def test_labels_without_any_positive_are_refused(subject):
    subject.labels = ["right"]
    subject.images = subject.images.select([0])
    subject.run = type("Run", (), {"key": "k"})
    with pytest.raises(ParameterError, match="no test image has any of the labels"):
        explanation.score(subject)
