"""How much of a map's energy lies at the finding: the energy-based pointing game."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import at_least, boolean, finite, in_columns, one_of, pair, shares, spares, total

__all__ = ["chance_level", "energy_pointing_game", "threshold_sweep"]

KINDS = ("precision", "recall", "signed")


def energy_pointing_game(maps: Tensor, masks: Tensor, kind: str = "precision", threshold: float = 0.0) -> Tensor:
    """Share of a map's energy that lies inside the mask.

    ``maps`` ``[..., H, W]`` signed and unnormalised, ``masks`` bool ``[..., H, W]`` (the union of a label's
    boxes); leading shapes broadcast; returns ``[...]``. With s the map, s+ = max(s, 0) and M the mask:

    - ``"precision"``: sum of s+ in M / sum of s+, in [0, 1];
    - ``"recall"``: sum of s+ in M / sum of |s| in M, in [0, 1];
    - ``"signed"``: sum of s in M / sum of s, not clipped: below 0 or above 1 when signs are mixed.

    ``threshold`` in [0, 1] keeps s+ where it is at least this share of the map's maximum over the whole image.
    It acts on numerator and denominator of the precision and on the numerator of the recall, which therefore
    never rises with it; the signed kind has no threshold.

    Chance: :func:`chance_level` for precision and signed; for the recall, which doesn't know the size of the
    boxes, its value with the whole image as mask.

    nan: an empty mask; a map with a value that is not finite; a denominator of 0 (precision: nothing positive
    anywhere; recall: nothing but zeros inside the mask; signed: the map sums to 0). The result has the maps'
    dtype, at least float32. Raises ParameterError for shapes, kind or threshold that don't fit.

    Source: paper `bcos`, Eqs. 1 (signed, from Score-CAM), 2 (precision) and 3 (recall); threshold as in its
    code.
    """
    return threshold_sweep(maps, masks, (threshold,), kind)[..., 0]


def threshold_sweep(
    maps: Tensor, masks: Tensor, thresholds: Sequence[float] | Tensor, kind: str = "precision"
) -> Tensor:
    """Energy-based pointing game at several thresholds: ``[..., H, W]`` in, ``[..., T]`` out.

    See :func:`energy_pointing_game`, which gives each single column. Source: paper `bcos`, Fig. 3.
    """
    one_of("kind", kind, KINDS)
    thresholds = shares("threshold", thresholds)
    if kind == "signed" and any(thresholds):
        raise ParameterError("kind 'signed' keeps negative values, so it has no threshold: use 0, or kind 'precision'")
    maps, masks = pair(maps, masks)
    scores = energy_scores(energy_sums(maps, masks, thresholds), kind)
    return scores.expand(*scores.shape[:-1], len(thresholds)).to(maps.dtype)


def energy_sums(maps: Tensor, masks: Tensor, thresholds: Sequence[float]) -> dict[str, Tensor]:
    """Energies of maps ``[..., H, W]`` over the image and inside bool masks, float64 ``[..., T]``, or ``[..., 1]``.

    ``positive`` is s+ at each of the T thresholds, ``absolute`` is |s| and ``signed`` s; ``inside positive`` and so on
    are the same inside the masks, ``area`` is the masks' own; ``valid`` says which pairs have a score at all.
    """
    clipped, inside = maps.clamp(min=0), masks.to(maps.dtype)
    peak = clipped.amax((-2, -1), keepdim=True)
    spare, spare_inside = spares(maps, masks)
    positive, positive_inside = [], []
    for threshold in thresholds:
        kept = at_least(clipped, threshold * peak, out=spare).mul_(clipped)
        positive.append(total(kept))
        positive_inside.append(total(torch.mul(kept, inside, out=spare_inside)))
    area, absolute = total(inside), torch.abs(maps, out=spare)
    return {
        "positive": in_columns(positive, maps),
        "inside positive": in_columns(positive_inside, spare_inside),
        "absolute": total(absolute)[..., None],
        "inside absolute": total(torch.mul(absolute, inside, out=spare_inside))[..., None],
        "signed": maps.sum((-2, -1), dtype=torch.float64)[..., None],
        "inside signed": torch.mul(maps, inside, out=spare_inside).sum((-2, -1), dtype=torch.float64)[..., None],
        "area": area[..., None],
        "valid": (finite(maps) & (area > 0))[..., None],
    }


def energy_scores(sums: dict[str, Tensor], kind: str) -> Tensor:
    """The energy-based pointing game from :func:`energy_sums`: float64 ``[..., T]``, for "signed" ``[..., 1]``."""
    part, whole = {
        "precision": (sums["inside positive"], sums["positive"]),
        "recall": (sums["inside positive"], sums["inside absolute"]),
        "signed": (sums["inside signed"], sums["signed"]),
    }[kind]
    score = part / whole
    # A denominator of 0 leaves 0/0 or x/0: neither is a score.
    return score.where(sums["valid"] & score.isfinite(), torch.nan)


def chance_level(masks: Tensor) -> Tensor:
    """Share of the image inside the mask: bool ``[..., H, W]`` -> ``[...]`` in (0, 1].

    It is the precision and the signed score of a uniform map, the mean precision of maps that know nothing of
    the boxes, and the hit rate of a maximum anywhere. nan for an empty mask, which has no score to compare
    with. Source: paper `bcos`, its remark on the box area of RSNA.
    """
    masks = boolean(masks)
    area = masks.sum((-2, -1)).double() / masks.shape[-2:].numel()
    return area.where(area > 0, torch.nan).float()
