"""What each number means: one card per metric, with its range, its chance level and what it reacts to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cxrkit.attribution.registry import unknown
from cxrkit.yaml_files import read_yaml

__all__ = ["METRICS", "MetricCard", "metric_card"]


@dataclass(frozen=True)
class MetricCard:
    """What a metric says.

    ``functions`` are those of `cxrkit.metrics` that compute it; ``range`` its bounds; ``better`` is "higher", "lower"
    or "neither"; ``chance`` what an uninformed map or classifier scores; ``equation`` is TeX; ``source`` the paper or
    its key; ``changes`` names what moves the score, and so the ranking, without a better map or network.
    """

    name: str
    functions: tuple[str, ...]
    meaning: str
    range: tuple[float, float]
    better: str
    chance: str
    equation: str
    source: str
    changes: str


def _card(name: str, functions: list[str], range: list[float], **texts: str) -> MetricCard:
    return MetricCard(name=name, functions=tuple(functions), range=tuple(range), **texts)


METRICS = {name: _card(name, **card) for name, card in read_yaml(Path(__file__).with_name("cards.yaml")).items()}


def metric_card(name: str) -> MetricCard:
    """The card of a metric, or of a score such as ``iou@0.3``; ParameterError with near misses otherwise."""
    base = str(name).split("@")[0]
    if base not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[base]
