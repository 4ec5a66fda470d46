"""Does a map point at the finding: energy-based pointing game, pointing game, overlap with the boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cxrkit.errors import ParameterError

__all__ = [
    "chance_level",
    "class_agnostic",
    "energy_pointing_game",
    "energy_pointing_game_boxes",
    "epg_split",
    "gaussian_smoothing",
    "intersection_over_union",
    "mask_iou",
    "pointing_game",
    "threshold_sweep",
]

KINDS = ("precision", "recall", "signed")
PROTOCOLS = ("corrected", "authors")


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
    _one_of("kind", kind, KINDS)
    thresholds = [float(value) for value in thresholds]
    if bad := [value for value in thresholds if not 0 <= value <= 1]:
        raise ParameterError(f"threshold {bad[0]} is outside [0, 1]: it is a share of the map's maximum")
    if kind == "signed" and any(thresholds):
        raise ParameterError("kind 'signed' keeps negative values, so it has no threshold: use 0, or kind 'precision'")
    maps, masks = _pair(maps, masks)
    if kind == "signed":
        inside, total = maps.double().where(masks, 0).sum((-2, -1)), maps.double().sum((-2, -1))
        scores = [inside / total] * len(thresholds)
    else:
        scores = _clipped_scores(maps, masks, thresholds, kind)
    valid = masks.any(-1).any(-1) & _finite(maps)
    stacked = torch.stack(scores, -1) if scores else maps.new_empty((*valid.shape, 0))
    # A denominator of 0 leaves 0/0 or x/0: neither is a score.
    return stacked.where(valid[..., None] & stacked.isfinite(), torch.nan).to(maps.dtype)


def _clipped_scores(maps: Tensor, masks: Tensor, thresholds: list[float], kind: str) -> list[Tensor]:
    positive = maps.clamp(min=0)
    peak = positive.amax((-2, -1), keepdim=True)
    mass = _sum(maps.abs().where(masks, 0)) if kind == "recall" else None
    scores = []
    for threshold in thresholds:
        kept = positive.where(positive >= threshold * peak, 0) if threshold else positive
        scores.append(_sum(kept.where(masks, 0)) / (_sum(kept) if mass is None else mass))
    return scores


def energy_pointing_game_boxes(
    maps: Tensor,
    box_masks: Tensor,
    kind: str = "precision",
    threshold: float = 0.0,
    protocol: str = "corrected",
) -> Tensor:
    """Energy-based pointing game of several boxes: maps ``[..., H, W]``, box masks ``[..., K, H, W]`` -> ``[...]``.

    ``"corrected"``: the union of the boxes is one mask. ``"authors"``: each box is scored alone; precisions are
    added (an overlap counts twice, so the sum may exceed 1) and recalls are averaged. Box masks without a pixel
    are padding. nan as in :func:`energy_pointing_game`; a box whose recall is nan stays out of the mean.
    Source: paper `bcos`, RSNA evaluation; ``"authors"`` as in its published code.
    """
    _one_of("protocol", protocol, PROTOCOLS)
    box_masks = _boolean(box_masks)
    if box_masks.ndim < 3:
        raise ParameterError(f"box_masks have shape {tuple(box_masks.shape)}; expected [..., K, H, W]")
    if protocol == "corrected":
        return energy_pointing_game(maps, box_masks.any(-3), kind, threshold)
    _one_of("kind", kind, ("precision", "recall"))
    scores = energy_pointing_game(torch.as_tensor(maps).unsqueeze(-3), box_masks, kind, threshold)
    if kind == "recall":
        return scores.nanmean(-1)
    return scores.nansum(-1).where(~scores.isnan().all(-1), torch.nan)


def epg_split(
    scores: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    cutoff: float = 0.5,
    labels: Sequence[str] | None = None,
    protocol: str = "corrected",
) -> pd.DataFrame:
    """Mean score over a label's positives, over those the model found (TP) and over those it missed (FN).

    ``scores``, ``targets`` (1, 0, nan: unknown) and ``probabilities``: ``[N, L]``; found means probability >
    ``cutoff``. "TP" and "FN" are images here, not pixels. A positive without a box has no score: give it the
    target nan.

    Returns rows (label, subset, mean, std, n, degenerate) for the subsets "all", "TP" and "FN" of every label,
    then of "macro", the mean over labels. ``n`` counts the averaged images, ``degenerate`` those left out
    because their score is nan; ``std`` is the population's (over images; for "macro" over labels). A label
    without images in a subset has mean nan and stays out of the macro mean; with ``protocol="authors"`` it
    enters the macro means of TP and FN as 0. Source: paper `bcos`, "EPG", "EPG TP" and "EPG FN", from its
    published code.
    """
    _one_of("protocol", protocol, PROTOCOLS)
    scores, targets, probabilities = (_table(value) for value in (scores, targets, probabilities))
    if scores.ndim != 2 or not scores.shape == targets.shape == probabilities.shape:
        shapes = f"{scores.shape}, {targets.shape} and {probabilities.shape}"
        raise ParameterError(f"scores, targets and probabilities must share one shape [N, L], got {shapes}")
    names = list(labels) if labels is not None else [str(column) for column in range(scores.shape[1])]
    if len(names) != scores.shape[1]:
        raise ParameterError(f"{len(names)} labels for {scores.shape[1]} columns of scores")
    positive = targets == 1
    if (positive & np.isnan(probabilities)).any():
        row, column = np.argwhere(positive & np.isnan(probabilities))[0]
        raise ParameterError(f"the probability of label {names[column]!r} in row {row} is nan: found or missed?")
    found = probabilities > cutoff
    subsets = {"all": positive, "TP": positive & found, "FN": positive & ~found}
    rows = [
        {"label": name, "subset": subset, **_summary(scores[chosen[:, column], column])}
        for column, name in enumerate(names)
        for subset, chosen in subsets.items()
    ]
    frame = pd.DataFrame(rows, columns=["label", "subset", "mean", "std", "n", "degenerate"])
    return pd.concat([frame, _macro(frame, list(subsets), protocol)], ignore_index=True)


def _summary(values: np.ndarray) -> dict[str, float]:
    valid = values[~np.isnan(values)]
    mean, std = (valid.mean(), valid.std()) if len(valid) else (np.nan, np.nan)
    return {"mean": mean, "std": std, "n": len(valid), "degenerate": len(values) - len(valid)}


def _macro(frame: pd.DataFrame, subsets: list[str], protocol: str) -> pd.DataFrame:
    rows = []
    for subset in subsets:
        part = frame[frame["subset"] == subset]
        means = part["mean"].to_numpy(dtype=float, copy=True)
        if protocol == "authors" and subset != "all":
            means[(part["n"] + part["degenerate"]).to_numpy() == 0] = 0.0
        counts = {"n": part["n"].sum(), "degenerate": part["degenerate"].sum()}
        rows.append({"label": "macro", "subset": subset, **_summary(means), **counts})
    return pd.DataFrame(rows)


def class_agnostic(masks: Tensor) -> Tensor:
    """The union of all labels' boxes, given to every label: bool ``[..., L, H, W]`` -> the same shape.

    Source: paper `bcos`, VinBigData evaluation, whose published code filters boxes by image alone.
    """
    masks = _boolean(masks)
    if masks.ndim < 3:
        raise ParameterError(f"masks have shape {tuple(masks.shape)}; expected [..., L, H, W]")
    return masks.any(-3, keepdim=True).expand(masks.shape)


def chance_level(masks: Tensor) -> Tensor:
    """Share of the image inside the mask, the precision of a uniform map: bool ``[..., H, W]`` -> ``[...]`` in (0, 1].

    nan for an empty mask, which has no score to compare with. Source: paper `bcos`, its remark on the box area
    of RSNA.
    """
    area = _boolean(masks).double().mean((-2, -1))
    return area.where(area > 0, torch.nan).float()


def pointing_game(
    maps: Tensor, masks: Tensor, tolerance: float = 15, tolerance_fraction: float | None = None
) -> Tensor:
    """Is the map's maximum near the mask: 1 (hit) or 0 (miss), maps and masks ``[..., H, W]`` -> ``[...]``.

    Hit: a pixel of the mask lies at a Euclidean distance strictly below ``tolerance`` pixels from the maximum;
    of equal maxima the first in row-major order counts. ``tolerance_fraction`` replaces it by this share of the
    longer side, which compares networks of different input size. A tolerance of 1 asks for a maximum inside the
    mask. Smoothing is a step of its own: :func:`gaussian_smoothing`.

    nan: an empty mask, a constant map, a value that is not finite. Raises ParameterError for a tolerance of 0
    or below. Source: paper `normgrad`, pointing game, from its published code; rows stay rows here.
    """
    maps, masks = _pair(maps, masks)
    height, width = maps.shape[-2:]
    reach = tolerance if tolerance_fraction is None else tolerance_fraction * max(height, width)
    if not reach > 0:
        raise ParameterError(f"tolerance {reach} must be above 0: a hit is strictly nearer than the tolerance")
    valid = masks.any(-1).any(-1) & _finite(maps) & (maps.amax((-2, -1)) > maps.amin((-2, -1)))
    peak = maps.flatten(-2).argmax(-1)[..., None, None]
    rows, columns = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    squared = (rows[:, None] - peak // width) ** 2 + (columns - peak % width) ** 2
    hit = (masks & (squared < reach**2)).any(-1).any(-1)
    return hit.to(maps.dtype).where(valid, torch.nan)


def gaussian_smoothing(maps: Tensor, sigma: float = 1.0, size: int = 11) -> Tensor:
    """Maps ``[..., H, W]`` smoothed by a normalised Gaussian of ``size`` x ``size`` pixels, reflected at the border.

    Source: paper `normgrad`, applied to the final map before the pointing game.
    """
    from torchvision.transforms.v2 import functional

    maps = torch.as_tensor(maps)
    if size % 2 == 0 or min(maps.shape[-2:]) <= size // 2:
        raise ParameterError(f"size {size} must be odd and its half smaller than the map's {tuple(maps.shape[-2:])}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return functional.gaussian_blur(flat, kernel_size=[size, size], sigma=[sigma, sigma]).reshape(maps.shape)


def mask_iou(maps: Tensor, masks: Tensor, threshold: float = 0.1, average: str = "foreground") -> Tensor:
    """Overlap of a thresholded map with the mask, maps and masks ``[..., H, W]`` -> ``[...]`` in [0, 1].

    Negative values become 0, the map is divided by its maximum, and pixels of at least ``threshold`` (and above
    0) are the prediction; see :func:`intersection_over_union` for ``average``. A uniform positive map predicts
    the whole image.

    nan: an empty mask, a map without positive values, a value that is not finite. Raises ParameterError for a
    threshold outside [0, 1]. Source: paper `relevance`, IoU evaluation (its Table 2 fits "two_class" only).
    """
    if not 0 <= threshold <= 1:
        raise ParameterError(f"threshold {threshold} is outside [0, 1]: it is a share of the map's maximum")
    maps, masks = _pair(maps, masks)
    peak = maps.amax((-2, -1), keepdim=True)
    prediction = (maps >= threshold * peak) & (maps > 0)
    valid = _finite(maps) & (peak[..., 0, 0] > 0)
    return _iou(prediction, masks, average).where(valid, torch.nan).to(maps.dtype)


def intersection_over_union(predictions: Tensor, masks: Tensor, average: str = "foreground") -> Tensor:
    """Overlap of two regions, bool ``[..., H, W]`` -> ``[...]`` in [0, 1].

    ``"foreground"``: pixels in both / pixels in either. ``"two_class"``: the mean of that and the same of the
    background, the usual mIoU of segmentation; an empty prediction then scores half of the background's share,
    almost 0.5 for a small finding. nan: an empty mask; for two classes also where both regions fill the image.
    Source: paper `relevance`, IoU evaluation.
    """
    predictions, masks = _boolean(predictions), _boolean(masks)
    _same_size(predictions, masks)
    return _iou(predictions, masks, average)


def _iou(predictions: Tensor, masks: Tensor, average: str) -> Tensor:
    _one_of("average", average, ("foreground", "two_class"))
    share = (predictions & masks).sum((-2, -1)) / (predictions | masks).sum((-2, -1))
    if average == "two_class":
        share = (share + (~predictions & ~masks).sum((-2, -1)) / (~predictions | ~masks).sum((-2, -1))) / 2
    return share.where(masks.any(-1).any(-1), torch.nan)


def _sum(values: Tensor) -> Tensor:
    """Sum of values of one sign over the pixels: rows in the values' own dtype (fast), their sums in float64."""
    return values.sum(-1).sum(-1, dtype=torch.float64)


def _finite(maps: Tensor) -> Tensor:
    # One nan or infinity spoils the sum, which is much faster than asking every pixel.
    return _sum(maps).isfinite()


def _pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both on one device and checked against each other; maps float32 or float64, masks bool."""
    maps, masks = torch.as_tensor(maps).detach(), _boolean(masks)
    _same_size(maps, masks)
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    return maps.to(dtype), masks.to(maps.device)


def _same_size(maps: Tensor, masks: Tensor) -> None:
    shapes = f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)}"
    if maps.ndim < 2 or maps.shape[-2:] != masks.shape[-2:] or 0 in maps.shape[-2:]:
        raise ParameterError(f"{shapes} must end in the same [H, W]")
    try:
        torch.broadcast_shapes(maps.shape, masks.shape)
    except RuntimeError as error:
        raise ParameterError(f"{shapes} have leading shapes that don't fit together") from error


def _boolean(masks: Tensor) -> Tensor:
    masks = torch.as_tensor(masks)
    if masks.dtype == torch.bool:
        return masks
    if not ((masks == 0) | (masks == 1)).all():
        raise ParameterError("masks must be bool (or hold only 0 and 1): a pixel is in a box or it is not")
    return masks.bool()


def _table(values: Tensor) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ParameterError(f"{name} {value!r} is unknown; use {', '.join(map(repr, allowed))}")
