"""All localisation scores of many maps in one pass, each with its chance level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cxrkit.metrics.inputs import pair, shares
from cxrkit.metrics.localisation import chance_level, energy_scores, energy_sums
from cxrkit.metrics.overlap import AVERAGES, THRESHOLDS, expected_sizes, iou_scores, region_sizes
from cxrkit.metrics.pointing import gaussian_smoothing, grown, hits, reach_of

__all__ = ["LocalisationScores", "localisation_scores"]

CHUNK = {"cpu": 2**19, "cuda": 2**26}  # pixels scored at once: what the caches hold, and what a GPU keeps busy with


class LocalisationScores(NamedTuple):
    """Scores and chance levels by name, each ``[...]``.

    A name is that of the score's card, with its setting behind an @: ``epg_precision@0.3``, ``iou@mean``,
    ``iou_two_class@0.1 of p99``.
    """

    values: dict[str, Tensor]
    chance: dict[str, Tensor]


def localisation_scores(
    maps: Tensor,
    masks: Tensor,
    thresholds: Sequence[float] = tuple(step / 10 for step in range(10)),
    iou_thresholds: Sequence[float] = THRESHOLDS,
    percentile: float = 99,
    tolerance: float = 15,
    tolerance_fraction: float | None = None,
    sigma: float | None = 1.0,
) -> LocalisationScores:
    """Every localisation score of maps ``[..., H, W]`` against masks bool ``[..., H, W]``, in one pass.

    Leading shapes broadcast. Energy-based pointing game: precision and recall at ``thresholds`` (by default those
    of paper `bcos`, Fig. 3) and signed; pointing game on the map smoothed with ``sigma`` (None: as it is) and hit
    rate on the map as it is; IoU of the foreground and of two classes at ``iou_thresholds`` and their mean, with
    the map divided by its maximum and by its ``percentile``. Values and nan are those of the single functions.

    Chance levels: the boxes' share of the image for precision, signed and hit rate; the recall of the whole image
    for the recall; the boxes grown by the tolerance for the pointing game; for the IoU a region as large as the
    map's, placed without knowledge. nan where the score is nan for want of a mask. Raises ParameterError as the
    single functions do.
    """
    thresholds, iou_thresholds = shares("threshold", thresholds), shares("iou_threshold", iou_thresholds)
    maps, masks = pair(maps, masks)
    shape = torch.broadcast_shapes(maps.shape, masks.shape)
    maps, masks = (tensor.expand(shape).reshape(-1, *shape[-2:]) for tensor in (maps, masks))
    reach = reach_of(masks, tolerance, tolerance_fraction)
    rows = max(1, CHUNK.get(maps.device.type, CHUNK["cpu"]) // (shape[-2] * shape[-1]))
    parts = []
    for some, where in zip(maps.split(rows), masks.split(rows), strict=True):
        found = _energies(some, where, thresholds) | _pointing(some, where, reach, sigma)
        for of in (100, percentile):
            found |= _overlaps(some, where, iou_thresholds, of)
        parts.append(found)
    values, chance = (
        {name: torch.cat([part[name][i] for part in parts]).reshape(shape[:-2]).to(maps.dtype) for name in parts[0]}
        for i in (0, 1)
    )
    return LocalisationScores(values, chance)


def _energies(maps: Tensor, masks: Tensor, thresholds: list[float]) -> dict[str, tuple[Tensor, Tensor]]:
    sums = energy_sums(maps, masks, thresholds)
    precision, recall, signed = (energy_scores(sums, kind) for kind in ("precision", "recall", "signed"))
    area = sums["area"].where(sums["area"] > 0, torch.nan)
    share, everywhere = (
        area[:, 0] / masks.shape[-2:].numel(),
        (sums["positive"] / sums["absolute"]).where(area > 0, area),
    )
    found = {"epg_signed": (signed[:, 0], share)}
    for column, threshold in enumerate(thresholds):
        found[f"epg_precision@{threshold:g}"] = precision[:, column], share
        found[f"epg_recall@{threshold:g}"] = recall[:, column], everywhere[:, column]
    return found


def _pointing(maps: Tensor, masks: Tensor, reach: float, sigma: float | None) -> dict[str, tuple[Tensor, Tensor]]:
    smooth = maps if sigma is None else gaussian_smoothing(maps, sigma)
    regions = {"pointing_game": (smooth, grown(masks, reach)), "hit_rate": (maps, masks)}
    chance = {name: chance_level(region) for name, (_, region) in regions.items()}
    return {name: (hits(*both).where(chance[name] > 0, torch.nan), chance[name]) for name, both in regions.items()}


def _overlaps(
    maps: Tensor, masks: Tensor, thresholds: list[float], percentile: float
) -> dict[str, tuple[Tensor, Tensor]]:
    sizes = region_sizes(maps, masks, thresholds, percentile)
    of = "" if percentile == 100 else f" of p{percentile:g}"
    found = {}
    for name, average in zip(("iou", "iou_two_class"), AVERAGES, strict=True):
        both = iou_scores(sizes, average), iou_scores(expected_sizes(sizes), average)
        for column, threshold in enumerate(thresholds):
            found[f"{name}@{threshold:g}{of}"] = tuple(score[:, column] for score in both)
        if thresholds:
            found[f"{name}@mean{of}"] = tuple(score.mean(1) for score in both)
    return found
