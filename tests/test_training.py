"""The training loop: what it may look at, what it keeps, and that it gives the same twice."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import cxrkit
from cxrkit import ModelError, ParameterError
from cxrkit.data.dataset import Dataset, Rendered
from cxrkit.study import training
from cxrkit.study.experiment import TrainParameters

LABELS = ("left", "right")


class Squares:
    """A bright square on the left or the right; remembers which rows were drawn."""

    def __init__(self, targets):
        self.targets = targets
        self.drawn: set[int] = set()

    def render(self, row: int, size: int) -> Rendered:
        self.drawn.add(row)
        image = torch.from_numpy(np.random.default_rng(row).random((size, size), dtype=np.float32)) * 0.3
        for column, present in enumerate(self.targets[row]):
            start = column * size // 2
            image[size // 4 : size // 2, start + 4 : start + size // 4] += 0.6 * float(present)
        return Rendered(image)


@pytest.fixture
def squares() -> Dataset:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (96, 2)).astype(float)
    table = pd.DataFrame(targets, columns=LABELS).assign(
        image_id=[f"i{n}" for n in range(96)],
        patient_id=[f"p{n // 2}" for n in range(96)],
        path=None,
        orig_width=32,
        orig_height=32,
        split=["train"] * 64 + ["validation"] * 16 + ["test"] * 16,
    )
    return Dataset("squares", LABELS, table, None, Squares(targets), size=32)


def parameters(**changes) -> TrainParameters:
    values = {"model": "resnet18", "size": 32, "epochs": 3, "threads": 1, "learning_rate": 1e-3} | changes
    return TrainParameters(**values)


def fit(dataset, **changes):
    chosen = parameters(**changes)
    return training.fit(training.make_model(chosen, dataset.labels), dataset, chosen)


def test_it_learns_and_never_looks_at_the_test_split(squares):
    result = fit(squares)
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]
    assert result.history["validation_auc"].max() > 0.9
    assert max(squares.renderer.drawn) < 80
    predictions = training.predict(result.model, squares.split("test"))
    assert len(predictions) == 16 * 2
    assert predictions["split"].unique().tolist() == ["test"]


def test_the_epoch_with_the_best_validation_auc_is_kept(squares):
    result = fit(squares)
    assert result.best_epoch == result.history["epoch"][result.history["validation_auc"].idxmax()]
    again = training._validate(result.model, squares.split("validation"), parameters())
    assert again["validation_auc"] == pytest.approx(result.history["validation_auc"].max(), abs=1e-6)
    assert not result.model.training


@pytest.mark.parametrize("options", [{}, {"augment": "light", "oversample": True}, {"workers": 1}])
def test_same_seed_same_weights_other_seed_others(squares, options):
    first, second, other = (fit(squares, epochs=1, seed=seed, **options) for seed in (1, 1, 2))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_a_loss_that_is_no_number_ends_with_what_to_do(squares, monkeypatch):
    monkeypatch.setattr(training, "masked_bce", lambda logits, targets: logits.sum() * float("nan"))
    with pytest.raises(ModelError, match=r"epoch 1; lower learning_rate"):
        fit(squares)


def test_a_device_that_is_not_there_is_refused(squares):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ParameterError, match="no CUDA device"):
        fit(squares, device="cuda")


def test_unknown_targets_do_not_count():
    logits = torch.tensor([[0.0, 9.0], [2.0, -9.0]])
    targets = torch.tensor([[1.0, float("nan")], [0.0, float("nan")]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets[:, 0])
    assert training.masked_bce(logits, targets) == pytest.approx(expected.item())
    assert training.masked_bce(logits, torch.full_like(targets, float("nan"))) == 0


def test_sample_weights_of_one_label_balance_the_classes():
    weights = training.sample_weights(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    assert weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_the_authors_weights_never_draw_an_image_without_finding():
    """Counts above 3 are all clipped to a weight of 1/3: what remains is the number of labels (paper `bcos`)."""
    targets = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] * 2 + [[0.0, 0.0]] * 3)
    authors = training.sample_weights(targets, "authors")
    assert authors.tolist() == pytest.approx([2 / 3] * 4 + [1 / 3] * 2 + [0] * 3)
    corrected = training.sample_weights(targets)
    assert corrected.tolist() == pytest.approx([1 / 6 + 1 / 4] * 4 + [1 / 6] * 2 + [1 / 3] * 3)


def test_macro_auc_leaves_out_labels_of_one_class():
    targets = np.array([[0, 1, 0], [1, 1, 0], [1, 1, np.nan], [0, 1, 1]], dtype=float)
    scores = np.array([[0.1, 0, 0.2], [0.9, 0, 0.3], [0.8, 0, 0.9], [0.3, 0, 0.4]])
    assert training.macro_auc(targets, scores) == 1.0
    assert np.isnan(training.macro_auc(targets[:, 1:2], scores[:, 1:2]))


def test_the_global_random_state_of_a_model_is_its_seed(squares):
    first, second = (cxrkit.models.create("resnet18", LABELS, seed=3) for _ in range(2))
    assert torch.equal(next(first.parameters()), next(second.parameters()))
