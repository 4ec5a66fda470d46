"""All localisation scores of many maps in one pass, each with its chance level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cxrkit.metrics.inputs import at_least, finite, pair, shares, total
from cxrkit.metrics.overlap import AVERAGES, THRESHOLDS, overlap, scale_of
from cxrkit.metrics.pointing import at, gaussian_smoothing, grown, peak, reach_of, varies

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
        positive, inside = some.clamp(min=0), where.to(some.dtype)
        spare = torch.empty_like(some)  # written over again and again: fresh memory costs more than the sums
        found = _basic_sums(some, positive, inside) | _pointing_sums(some, where, reach, sigma)
        found |= _energy_sums(some, positive, inside, thresholds, spare)
        found |= _overlap_sums(positive, inside, iou_thresholds, (100, percentile), spare)
        parts.append(found)
    sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scores = _energies(sums, thresholds) | _pointing(sums)
    for of in dict.fromkeys((100, percentile)):
        scores |= _overlaps(sums, iou_thresholds, of, shape[-2] * shape[-1])
    values, chance = (
        {name: both[i].reshape(shape[:-2]).to(maps.dtype) for name, both in scores.items()} for i in (0, 1)
    )
    return LocalisationScores(values, chance)


# Per chunk only sums are taken, [n] or [n, T] each; the formulas then run once over all images.


def _basic_sums(maps: Tensor, positive: Tensor, inside: Tensor) -> dict[str, Tensor]:
    area = total(inside)
    return {
        "area": area,
        "share": area / (maps.shape[-2] * maps.shape[-1]),
        "finite": finite(maps),
        "peak": positive.amax((-2, -1)),
        "varies": varies(maps),
    }


def _energy_sums(
    maps: Tensor, positive: Tensor, inside: Tensor, thresholds: list[float], spare: Tensor
) -> dict[str, Tensor]:
    peak = positive.amax((-2, -1), keepdim=True)
    mass, mass_inside = [], []
    for threshold in thresholds:
        kept = at_least(positive, threshold * peak, out=spare).mul_(positive)
        mass.append(kept.sum(-1))
        mass_inside.append(kept.mul_(inside).sum(-1))
    return {
        "mass": _columns(mass, maps),
        "mass_inside": _columns(mass_inside, maps),
        "magnitude": total(torch.abs(maps, out=spare)),
        "magnitude_inside": total(spare.mul_(inside)),
        "signed": maps.sum((-2, -1), dtype=torch.float64),
        "signed_inside": torch.mul(maps, inside, out=spare).sum((-2, -1), dtype=torch.float64),
    }


def _pointing_sums(maps: Tensor, masks: Tensor, reach: float, sigma: float | None) -> dict[str, Tensor]:
    smooth = maps if sigma is None else gaussian_smoothing(maps, sigma)
    near = grown(masks, reach)
    return {
        "near": near.sum((-2, -1)) / (maps.shape[-2] * maps.shape[-1]),
        "hit_near": at(near, *peak(smooth)).double(),
        "hit": at(masks, *peak(maps)).double(),
        "smooth_varies": varies(smooth),
    }


def _overlap_sums(
    positive: Tensor, inside: Tensor, thresholds: list[float], percentiles: Sequence[float], spare: Tensor
) -> dict[str, Tensor]:
    sums = {}
    for percentile in percentiles:
        scale = scale_of(positive, percentile)
        predicted, both = [], []
        for threshold in thresholds:
            region = at_least(positive, threshold * scale, out=spare)
            predicted.append(region.sum(-1))
            both.append(region.mul_(inside).sum(-1))
        sums |= {
            f"predicted {percentile}": _columns(predicted, positive),
            f"both {percentile}": _columns(both, positive),
        }
    return sums


def _columns(row_sums: list[Tensor], maps: Tensor) -> Tensor:
    """Sums of the rows ``[n, H]`` of each threshold -> sums of the maps, float64 ``[n, T]``."""
    if not row_sums:
        return maps.new_empty((len(maps), 0), dtype=torch.float64)
    return torch.stack(row_sums, 1).sum(-1, dtype=torch.float64)


def _energies(sums: dict[str, Tensor], thresholds: list[float]) -> dict[str, tuple[Tensor, Tensor]]:
    boxed = sums["area"] > 0
    valid = boxed & sums["finite"]

    def scored(part: Tensor, whole: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        score = part / whole
        return score.where(valid & score.isfinite(), torch.nan), chance.where(boxed, torch.nan)

    found = {"epg_signed": scored(sums["signed_inside"], sums["signed"], sums["share"])}
    for column, threshold in enumerate(thresholds):
        mass, inside = sums["mass"][:, column], sums["mass_inside"][:, column]
        found[f"epg_precision@{threshold:g}"] = scored(inside, mass, sums["share"])
        found[f"epg_recall@{threshold:g}"] = scored(inside, sums["magnitude_inside"], mass / sums["magnitude"])
    return found


def _pointing(sums: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    boxed = sums["area"] > 0
    valid = boxed & sums["varies"]
    near = sums["hit_near"].where(valid & sums["smooth_varies"], torch.nan)
    return {
        "pointing_game": (near, sums["near"].where(boxed, torch.nan)),
        "hit_rate": (sums["hit"].where(valid, torch.nan), sums["share"].where(boxed, torch.nan)),
    }


def _overlaps(
    sums: dict[str, Tensor], thresholds: list[float], percentile: float, pixels: int
) -> dict[str, tuple[Tensor, Tensor]]:
    predicted, both = sums[f"predicted {percentile}"], sums[f"both {percentile}"]
    area = sums["area"][:, None]
    valid = ((sums["area"] > 0) & sums["finite"] & (sums["peak"] > 0))[:, None]
    of = "" if percentile == 100 else f" of p{percentile:g}"
    found = {}
    for name, average in zip(("iou", "iou_two_class"), AVERAGES, strict=True):
        score = overlap(predicted, area, both, pixels, average).where(valid, torch.nan)
        chance = overlap(predicted, area, area * predicted / pixels, pixels, average).where(valid, torch.nan)
        columns = {f"{name}@{threshold:g}{of}": column for column, threshold in enumerate(thresholds)}
        found |= {key: (score[:, column], chance[:, column]) for key, column in columns.items()}
        if thresholds:
            found[f"{name}@mean{of}"] = score.mean(1), chance.mean(1)
    return found
