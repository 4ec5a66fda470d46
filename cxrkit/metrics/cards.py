"""What each number means: one card per metric, with its range, its chance level and what it reacts to."""

from __future__ import annotations

from collections.abc import Iterable

from cxrkit.attribution.registry import unknown
from cxrkit.metrics.card_texts import (
    ARTEFACTS,
    CLASSIFICATION,
    FAITHFULNESS,
    LOCALISATION,
    PROFILES,
    SANITY,
    MetricCard,
)

__all__ = ["METRICS", "TOOLS", "MetricCard", "metric_card", "metric_cards"]

# Exported functions that prepare, compare or sum up scores, and are none themselves.
TOOLS = (
    "bootstrap",
    "chance_level",
    "class_agnostic",
    "compare",
    "explained_maps",
    "gaussian_smoothing",
    "grid_bin_share",
    "hard_vote",
    "holm",
    "iou_chance",
    "isotropic_grid_energy",
    "localisation_scores",
    "metric_card",
    "metric_cards",
    "operating_cutoffs",
    "over_seeds",
    "pointing_chance",
    "power_spectrum",
    "radial_profile",
    "randomised",
    "rank_feature_maps",
    "reliability",
    "soft_vote",
)


def _table(cards: Iterable[MetricCard]) -> dict[str, MetricCard]:
    table: dict[str, MetricCard] = {}
    for card in cards:
        if table.setdefault(card.name, card) is not card:
            raise ValueError(f"two cards are called {card.name!r}")
    return table


METRICS = _table((*LOCALISATION, *CLASSIFICATION, *ARTEFACTS, *FAITHFULNESS, *SANITY, *PROFILES))


def metric_card(name: str) -> MetricCard:
    """The card of a metric, or of a score such as ``iou@0.3``; ParameterError with near misses otherwise."""
    base = str(name).split("@")[0]
    if base not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[base]


def metric_cards() -> tuple[MetricCard, ...]:
    """Cards of all metrics."""
    return tuple(METRICS.values())
