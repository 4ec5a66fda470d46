"""Two runs side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrkit import train
from cxrkit.study import comparison, runs


def predictions(shift, images=40):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(images):
        for label in ("a", "b", "never"):
            target = float(rng.random() < 0.5) if label != "never" else 0.0
            logit = rng.normal() + target * shift
            rows.append({"image_id": f"i{number}", "patient_id": f"p{number // 2}", "split": "test", "label": label})
            rows[-1] |= {"target": target, "logit": logit, "probability": 1 / (1 + np.exp(-logit))}
    return pd.DataFrame(rows)


@pytest.fixture
def pair(tmp_path):
    made = []
    for model, shift in (("resnet18", 0.5), ("resnet34", 3.0)):
        parameters = train.TrainParameters(model=model, results=str(tmp_path))
        with runs.writing(parameters) as writer:
            writer.frame("predictions", predictions(shift))
        made.append(runs.key(parameters))
    return tuple(runs.find(key, str(tmp_path)) for key in made)


def test_areas_agree_with_scikit_learn_and_the_interval_is_paired(pair):
    table = comparison.scores(pair, n=200)
    frame = predictions(0.5).query("label == 'a'")
    assert table.loc["a", "first"] == pytest.approx(roc_auc_score(frame["target"], frame["logit"]))
    assert table.loc["macro", "second"] == pytest.approx(table["second"][["a", "b"]].mean())
    assert table.loc["never"].isna().all()
    assert (table["low"] <= table["difference"])[["a", "b", "macro"]].all()
    assert 0 < table.loc["macro", "low"] < table.loc["macro", "high"] < 1
    pd.testing.assert_frame_equal(table, comparison.scores(pair, n=200))
    same = comparison.scores((pair[0], pair[0]), n=50).loc["a"]
    assert same[["difference", "low", "high"]].tolist() == [0, 0, 0]


def test_exclusive_classes_are_ranked_by_the_softmax_of_the_whole_run(tmp_path):
    rng = np.random.default_rng(1)
    shift, found = 20 * rng.normal(size=200), rng.integers(0, 3, 200)  # a logit's own level says nothing
    logits = shift[:, None] + rng.normal(size=(200, 3)) + 3 * np.eye(3)[found]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = np.repeat([f"i{row:03d}" for row in range(200)], 3)
    frame = pd.DataFrame({"image_id": names, "patient_id": names, "split": "test", "label": list("abc") * 200})
    frame = frame.assign(target=np.eye(3)[found].ravel(), logit=logits.ravel(), probability=chances.ravel())
    keys = []
    for labels in ("ab", "abc"):  # what a run shares with the other needn't be all its classes
        parameters = train.TrainParameters(loss="cross_entropy", seed=len(labels), results=str(tmp_path))
        with runs.writing(parameters) as writer:
            writer.frame("predictions", frame[frame["label"].isin(list(labels))])
        keys.append(runs.key(parameters))
    table = comparison.scores(tuple(runs.find(key, str(tmp_path)) for key in keys), n=20)
    for column, label in enumerate("ab"):
        right = roc_auc_score(found == column, chances[:, column])
        assert right > 0.9 > 0.2 + roc_auc_score(found == column, logits[:, column])
        assert table.loc[label, "second"] == pytest.approx(right)
        two = logits[:, column] - logits[:, 1 - column]
        assert table.loc[label, "first"] == pytest.approx(roc_auc_score(found == column, two))


def test_other_test_images_leave_no_interval(pair, tmp_path):
    parameters = train.TrainParameters(model="vgg16", results=str(tmp_path))
    with runs.writing(parameters) as writer:
        writer.frame("predictions", predictions(1.0, images=30))
    table = comparison.scores((pair[0], runs.find(runs.key(parameters), str(tmp_path))), n=20)
    assert table["low"].isna().all()
    assert table.loc["a", "difference"] == table.loc["a", "second"] - table.loc["a", "first"]


def test_one_patient_has_no_interval():
    frame = predictions(3.0).assign(patient_id="p")
    truth = frame.set_index(["patient_id", "image_id", "label"])["target"].unstack()
    assert np.isnan(comparison._paired(truth, [truth.to_numpy()] * 2, 20, 0)).all()
    found = comparison.area(frame[frame["label"] != "never"], n=20)
    assert 0.5 < found.mean <= 1
    assert np.isnan(found[1:]).all()
