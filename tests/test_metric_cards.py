"""Every metric has a card that says what it means, and what its card says is so."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from cxrkit import metrics
from cxrkit.errors import ParameterError

CARDS = tuple(metrics.METRICS.values())
# Exported functions that prepare, compare or sum up scores, and are none themselves.
TOOLS = {
    "bootstrap",
    "chance_level",
    "class_agnostic",
    "compare",
    "explained_maps",
    "gaussian_smoothing",
    "hard_vote",
    "holm",
    "iou_chance",
    "isotropic_grid_energy",
    "localisation_scores",
    "metric_card",
    "operating_cutoffs",
    "over_seeds",
    "pointing_chance",
    "power_spectrum",
    "randomised",
    "rank_feature_maps",
    "soft_vote",
}


def test_every_exported_function_has_a_card_or_is_a_tool():
    exported = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    described = {name for card in CARDS for name in card.functions}
    assert exported - TOOLS == described
    assert exported >= TOOLS


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_complete(card):
    assert metrics.METRICS[card.name] is card
    assert all(getattr(card, name) for name in ("functions", "meaning", "chance", "equation", "source", "changes"))
    assert card.better in ("higher", "lower", "neither")
    assert card.range[0] < card.range[1]
    assert card.equation.count("{") == card.equation.count("}")


def test_every_score_has_a_card_and_keeps_its_range():
    maps, masks = torch.randn(20, 12, 12), torch.rand(20, 12, 12) > 0.7
    found = metrics.localisation_scores(maps, masks)
    for name, values in found.values.items():
        low, high = metrics.metric_card(name).range
        assert ((values >= low) & (values <= high)).all(), name
        assert ((found.chance[name] >= 0) & (found.chance[name] <= 1)).all(), name
    assert math.isinf(metrics.metric_card("epg_signed").range[1])


def test_every_column_of_the_classification_table_has_a_card():
    targets, probabilities = np.array([[1], [0], [1]]), np.array([[0.9], [0.2], [0.4]])
    columns = {*metrics.classification_report(targets, probabilities, ["a"]).columns}
    assert columns - {"label", "n", "positives", "prevalence", "degenerate"} <= set(metrics.METRICS)


def test_chance_levels_of_the_classification_cards():
    generator = np.random.default_rng(0)
    targets = (generator.random((20_000, 1)) < 0.3).astype(float)
    guesses = generator.random((20_000, 1))
    row = metrics.classification_report(targets, guesses, ["a"], cutoff=0.4).iloc[0]
    prevalence, predicted = row["prevalence"], (guesses > 0.4).mean()
    expected = {"precision": prevalence, "recall": predicted, "specificity": 1 - predicted, "auc": 0.5}
    for name, value in (expected | {"average_precision": prevalence}).items():
        assert row[name] == pytest.approx(value, abs=0.02), name
    everything = metrics.classification_report(targets, np.ones_like(targets), ["a"]).iloc[0]
    assert everything["f1"] == pytest.approx(2 * prevalence / (1 + prevalence))
    nothing = metrics.classification_report(targets, np.zeros_like(targets), ["a"]).iloc[0]
    assert nothing["accuracy"] == pytest.approx(1 - prevalence)


def test_an_unknown_metric_is_named_with_near_misses():
    with pytest.raises(ParameterError, match="epg_recall"):
        metrics.metric_card("epg_recal@0.3")
