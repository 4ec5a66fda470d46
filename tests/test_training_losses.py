"""Losses against torch and slow formulas; optimisers, rates and the running mean against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from squares import parameters
from torch.nn import functional as F

from cxrkit import DataError
from cxrkit.data.sampling import sample_weights
from cxrkit.train import optimizer as optimizers
from cxrkit.train.losses import Loss, loss_for, probabilities

LOGITS = torch.tensor([[0.3, -1.2, 2.0], [1.5, 0.1, -0.4], [-2.0, 0.7, 0.2], [0.9, -0.3, 1.1]])
TARGETS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
CLASSES = torch.tensor([0, 2, 1, 2])


def slow_bce(logits, targets, positive=(1, 1, 1)):
    """Entry by entry, in Python."""
    terms = []
    for logit_row, target_row in zip(logits.tolist(), targets.tolist(), strict=True):
        for logit, target, weight in zip(logit_row, target_row, positive, strict=True):
            if math.isnan(target):
                continue
            chance = 1 / (1 + math.exp(-logit))
            terms.append(-weight * target * math.log(chance) - (1 - target) * math.log(1 - chance))
    return sum(terms) / len(terms)


def test_unknown_targets_do_not_count():
    logits = torch.tensor([[0.0, 9.0], [2.0, -9.0]])
    targets = torch.tensor([[1.0, float("nan")], [0.0, float("nan")]])
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], targets[:, 0])
    assert Loss()(logits, targets) == pytest.approx(expected.item())
    assert Loss()(logits, torch.full_like(targets, float("nan"))) == 0


@pytest.mark.parametrize("holes", [False, True])
def test_binary_losses_against_the_slow_formula(holes):
    targets = TARGETS.clone()
    if holes:
        targets[1, 2] = targets[3, 0] = float("nan")
    assert Loss("bce")(LOGITS, targets) == pytest.approx(slow_bce(LOGITS, targets))
    weighted = Loss("bce", torch.tensor([2.0, 3.0, 0.5]))
    assert weighted(LOGITS, targets) == pytest.approx(slow_bce(LOGITS, targets, (2.0, 3.0, 0.5)))


def test_cross_entropy_against_torch():
    goals = F.one_hot(CLASSES, 3).float()
    assert Loss("cross_entropy")(LOGITS, goals) == pytest.approx(F.cross_entropy(LOGITS, CLASSES).item())
    weights = torch.tensor([0.5, 2.0, 1.5])
    expected = F.cross_entropy(LOGITS, CLASSES, weight=weights).item()
    assert Loss("cross_entropy", weights)(LOGITS, goals) == pytest.approx(expected)
    goals[1, 0] = float("nan")
    known = [0, 2, 3]
    expected = F.cross_entropy(LOGITS[known], CLASSES[known]).item()
    assert Loss("cross_entropy")(LOGITS, goals) == pytest.approx(expected)


def test_cross_entropy_of_one_label_is_its_binary_cross_entropy():
    """Softmax over (0, z) is the sigmoid of z."""
    logits, targets = LOGITS[:, :1], TARGETS[:, :1]
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    expected = F.cross_entropy(two, targets[:, 0].long()).item()
    assert Loss("cross_entropy")(logits, targets) == pytest.approx(expected)
    assert torch.equal(probabilities(logits), logits.sigmoid())
    assert torch.equal(probabilities(LOGITS, "softmax"), LOGITS.softmax(1))


@pytest.mark.parametrize("kind", ["bce", "cross_entropy"])
def test_a_batch_in_parts_has_the_same_loss(kind):
    targets = F.one_hot(CLASSES, 3).float()
    targets[1, 0] = float("nan")
    loss = loss_for(kind, targets, "balanced")
    parts = sum(loss.total(LOGITS[rows], targets[rows]) for rows in ([0], [1, 2], [3]))
    assert parts / loss.weight(targets) == pytest.approx(loss(LOGITS, targets).item())


def test_balanced_weights():
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [float("nan"), 0.0]])
    assert loss_for("bce", targets, "balanced").class_weights.tolist() == [2.0, 1.0]
    goals = F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()
    weights = loss_for("cross_entropy", goals, "balanced").class_weights
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])  # n / (C n_c), paper `path`


def test_what_a_loss_cannot_take():
    with pytest.raises(DataError, match=r"2 training images have none or several \(first: row 1\)"):
        loss_for("cross_entropy", torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))


def test_sample_weights_of_one_label_balance_the_classes():
    weights = sample_weights(torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    assert weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    exclusive = sample_weights(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), "authors", True)
    assert exclusive.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_the_authors_weights_never_draw_an_image_without_finding():
    """Counts above 3 are all clipped to a weight of 1/3: what remains is the number of labels (paper `bcos`)."""
    targets = torch.tensor([[1.0, 1.0]] * 4 + [[1.0, 0.0]] * 2 + [[0.0, 0.0]] * 3)
    authors = sample_weights(targets, "authors")
    assert authors.tolist() == pytest.approx([2 / 3] * 4 + [1 / 3] * 2 + [0] * 3)
    corrected = sample_weights(targets)
    assert corrected.tolist() == pytest.approx([1 / 6 + 1 / 4] * 4 + [1 / 6] * 2 + [1 / 3] * 3)


def rates(steps_per_epoch: int = 5, losses=(), **changes) -> np.ndarray:
    chosen = parameters(learning_rate=0.1, **changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rate = optimizers.LearningRate(optimizer, chosen, steps_per_epoch)
    found = []
    for step in range(chosen.epochs * steps_per_epoch):
        rate.before(step)
        found.append(rate.value)
        if (step + 1) % steps_per_epoch == 0:
            rate.after_epoch(losses[step // steps_per_epoch] if losses else 1.0)
    return np.array(found)


def torch_rates(scheduler, steps: int = 20, per: int = 1, **options) -> np.ndarray:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rate, found = scheduler(optimizer, **options), []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % per == 0:
            rate.step()
    return np.array(found)


def test_rates_against_torch():
    from torch.optim import lr_scheduler as torch_s

    same = {"rtol": 1e-9, "atol": 1e-15}
    np.testing.assert_allclose(
        rates(epochs=4, schedule="cosine"), torch_rates(torch_s.CosineAnnealingLR, T_max=20), **same
    )
    np.testing.assert_allclose(
        rates(epochs=4, schedule="step", schedule_epochs=2, schedule_factor=0.3),
        torch_rates(torch_s.StepLR, per=5, step_size=2, gamma=0.3),
        **same,
    )
    np.testing.assert_allclose(
        rates(epochs=4, schedule="inverse_time", schedule_decay=0.01), 0.1 / (1 + 0.01 * np.arange(20)), **same
    )
    assert (rates(epochs=4, schedule="constant") == 0.1).all()


def test_the_rate_falls_when_the_loss_stalls():
    losses = [3, 2, 2, 2, 2, 1, 1]
    found = rates(steps_per_epoch=1, losses=losses, epochs=7, schedule="plateau", patience=1, schedule_factor=0.5)
    assert found.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05])


def test_warm_up_rises_in_a_line_then_the_schedule_begins():
    for schedule in ("plateau", "cosine", "constant"):
        found = rates(epochs=4, schedule=schedule, warmup_epochs=1.0)
        assert found[:5].tolist() == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
        assert found[5] == pytest.approx(0.1)
    assert found.max() <= 0.1 + 1e-12


def test_optimisers_are_those_named():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    for name, cls in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        chosen = parameters(optimizer=name, learning_rate=0.2, weight_decay=0.3, momentum=0.7)
        found = optimizers.optimizer_for(model, chosen)
        assert type(found) is cls
        group = found.param_groups[0]
        assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.2, 0.3, 1)
    assert group["momentum"] == 0.7
