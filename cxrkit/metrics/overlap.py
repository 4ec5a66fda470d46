"""Does a map, cut at a threshold, cover the finding: intersection over union, of the finding or of two classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import (
    at_least,
    boolean,
    finite,
    fit_together,
    in_columns,
    number,
    one_of,
    pair,
    pair_of_regions,
    real,
    shares,
    spares,
    total,
)

__all__ = ["intersection_over_union", "iou_chance", "iou_sweep", "mask_iou", "mean_iou"]

AVERAGES = ("foreground", "two_class")
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


def mask_iou(
    maps: Tensor, masks: Tensor, threshold: float = 0.1, average: str = "foreground", percentile: float = 100
) -> Tensor:
    """Overlap of a thresholded map with the mask, maps and masks ``[..., H, W]`` -> ``[...]`` in [0, 1].

    Negative values become 0, the map is divided by its maximum, and pixels of at least ``threshold`` (and above
    0) are the prediction; see :func:`intersection_over_union` for ``average``. A uniform positive map predicts
    the whole image. ``percentile`` below 100 divides by that percentile of the clipped map instead, and values
    above it count as 1: one hot pixel can't set the scale any more. Chance: :func:`iou_chance`.

    nan: an empty mask, a map without positive values, a value that is not finite. Raises ParameterError for a
    threshold outside [0, 1] and a percentile outside (0, 100]. Source: paper `relevance`, IoU evaluation (its
    Table 2 fits "two_class" only); the percentile is ours.
    """
    return iou_sweep(maps, masks, (threshold,), average, percentile)[..., 0]


def mean_iou(
    maps: Tensor,
    masks: Tensor,
    thresholds: Sequence[float] | Tensor = THRESHOLDS,
    average: str = "foreground",
    percentile: float = 100,
) -> Tensor:
    """Mean of :func:`mask_iou` over thresholds, maps and masks ``[..., H, W]`` -> ``[...]`` in [0, 1].

    Source: the thresholds of paper `relevance`, Table 2.
    """
    return iou_sweep(maps, masks, thresholds, average, percentile).mean(-1)


def iou_sweep(
    maps: Tensor,
    masks: Tensor,
    thresholds: Sequence[float] | Tensor = THRESHOLDS,
    average: str = "foreground",
    percentile: float = 100,
) -> Tensor:
    """:func:`mask_iou` at several thresholds: ``[..., H, W]`` in, ``[..., T]`` out.

    Source: paper `relevance`, Table 2.
    """
    one_of("average", average, AVERAGES)
    thresholds = shares("threshold", thresholds)
    maps, masks = pair(maps, masks)
    return iou_scores(region_sizes(maps, masks, thresholds, percentile), average).to(maps.dtype)


def region_sizes(
    maps: Tensor, masks: Tensor, thresholds: Sequence[float], percentile: float = 100
) -> dict[str, Tensor]:
    """Pixels of the thresholded maps ``predicted`` ``[..., T]``, of the masks, and of ``both``, float64.

    ``valid`` says which pairs have an overlap at all.
    """
    positive, inside = maps.clamp(min=0), masks.to(maps.dtype)
    scale = scale_of(positive, percentile)
    spare, spare_inside = spares(maps, masks)
    predicted, both = [], []
    for threshold in thresholds:
        region = at_least(positive, threshold * scale, out=spare)
        predicted.append(total(region))
        both.append(total(torch.mul(region, inside, out=spare_inside)))
    area = total(inside)
    return {
        "predicted": in_columns(predicted, maps),
        "both": in_columns(both, spare_inside),
        "area": area[..., None],
        "image": torch.full_like(area, masks.shape[-2:].numel())[..., None],
        "valid": (finite(maps) & (positive.amax((-2, -1)) > 0) & (area > 0))[..., None],
    }


def iou_scores(sizes: dict[str, Tensor], average: str) -> Tensor:
    """The overlaps of :func:`region_sizes`, float64 ``[..., T]``."""
    predicted, area, both, image = (sizes[name] for name in ("predicted", "area", "both", "image"))
    score = both / (predicted + area - both)
    if average == "two_class":
        score = (score + (image - predicted - area + both) / (image - both)) / 2
    return score.where(sizes["valid"], torch.nan)


def expected_sizes(sizes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of regions as large as the predicted ones, placed without knowledge of the mask."""
    return sizes | {"both": sizes["area"] * sizes["predicted"] / sizes["image"]}


def intersection_over_union(predictions: Tensor, masks: Tensor, average: str = "foreground") -> Tensor:
    """Overlap of two regions, bool ``[..., H, W]`` -> ``[...]`` in [0, 1].

    ``"foreground"``: pixels in both / pixels in either. ``"two_class"``: the mean of that and the same of the
    background, the usual mIoU of segmentation; an empty prediction then scores half of the background's share,
    almost 0.5 for a small finding. nan: an empty mask; for two classes also where both regions fill the image.
    Source: paper `relevance`, IoU evaluation.
    """
    one_of("average", average, AVERAGES)
    predictions, masks = pair_of_regions(predictions, masks)
    predicted, area, both = (region.sum((-2, -1)).double() for region in (predictions, masks, predictions & masks))
    sizes = {"predicted": predicted, "area": area, "both": both, "image": masks.shape[-2:].numel(), "valid": area > 0}
    return iou_scores(sizes, average).float()


def iou_chance(masks: Tensor, predicted: Tensor | float = 1.0, average: str = "foreground") -> Tensor:
    """Overlap of a region that knows nothing of the mask: bool ``[..., H, W]`` -> ``[...]`` in [0, 1].

    ``predicted`` in [0, 1] is the share of the image that the region covers (``[...]`` or a number; 1: a uniform
    map). With a the share of the mask and p that of the region, both hold a p of the image by chance:
    foreground a p / (a + p - a p), background (1 - a)(1 - p) / (1 - a p), two classes their mean. nan for an
    empty mask. Source: own, for the IoU of paper `relevance`.
    """
    one_of("average", average, AVERAGES)
    area = boolean(masks).double().mean((-2, -1))
    predicted = real("predicted", predicted).double().to(area.device)
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise ParameterError("predicted holds values outside [0, 1]: it is a share of the image")
    fit_together(f"predicted {tuple(predicted.shape)} and masks {tuple(area.shape)}", predicted.shape, area.shape)
    sizes = expected_sizes({"predicted": predicted, "area": area, "image": 1, "valid": area > 0})
    return iou_scores(sizes, average).float()


def scale_of(positive: Tensor, percentile: float) -> Tensor:
    """Value that counts as 1, ``[..., 1, 1]``: the percentile over all pixels, interpolated linearly as NumPy does."""
    percentile = number("percentile", percentile, "above 0 and at most 100 (the maximum)", lambda p: 0 < p <= 100)
    if percentile == 100:
        return positive.amax((-2, -1), keepdim=True)
    flat = positive.flatten(-2)
    position = (flat.shape[-1] - 1) * percentile / 100
    below = int(position)
    rank = flat.shape[-1] - 1 - below  # how many are larger
    if flat.device.type == "cpu":  # where NumPy selects several times faster than PyTorch
        largest = torch.from_numpy(-np.partition(-flat.numpy(), rank, axis=-1)[..., : rank + 1])
    else:
        largest = flat.topk(rank + 1).values
    low = largest[..., rank]
    high = largest[..., :rank].amin(-1) if rank else low
    return (low + (position - below) * (high - low))[..., None, None]
