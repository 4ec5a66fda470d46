"""What image-level metrics ask of maps and masks, and the sums they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxrkit.errors import ParameterError

__all__ = ["at_least", "boolean", "finite", "one_of", "pair", "pair_of_regions", "shares", "total"]

PROTOCOLS = ("corrected", "paper", "authors")


def pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both on one device and checked against each other; maps float32 or float64, masks bool."""
    maps, masks = torch.as_tensor(maps).detach(), boolean(masks)
    _same_size("maps", maps, masks)
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    return maps.to(dtype), masks.to(maps.device)


def pair_of_regions(predictions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Two bool regions of one size on one device."""
    predictions, masks = boolean(predictions, "predictions"), boolean(masks)
    _same_size("predictions", predictions, masks)
    return predictions, masks.to(predictions.device)


def _same_size(name: str, maps: Tensor, masks: Tensor) -> None:
    shapes = f"{name} {tuple(maps.shape)} and masks {tuple(masks.shape)}"
    if maps.ndim < 2 or maps.shape[-2:] != masks.shape[-2:] or 0 in maps.shape[-2:]:
        raise ParameterError(f"{shapes} must end in the same [H, W]")
    try:
        torch.broadcast_shapes(maps.shape, masks.shape)
    except RuntimeError as error:
        raise ParameterError(f"{shapes} have leading shapes that don't fit together") from error


def boolean(masks: Tensor, name: str = "masks") -> Tensor:
    """Masks as bool; ParameterError for values other than 0 and 1."""
    masks = torch.as_tensor(masks)
    if masks.dtype == torch.bool:
        return masks
    if not ((masks == 0) | (masks == 1)).all():
        raise ParameterError(f"{name} must be bool (or hold only 0 and 1): a pixel is in a box or it is not")
    return masks.bool()


def shares(name: str, values: Sequence[float] | Tensor) -> list[float]:
    """Thresholds as floats; ParameterError for one outside [0, 1]."""
    values = [float(value) for value in values]
    if bad := [value for value in values if not 0 <= value <= 1]:
        raise ParameterError(f"{name} {bad[0]} is outside [0, 1]: it is a share of the map's maximum")
    return values


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """ParameterError unless ``value`` is allowed."""
    if value not in allowed:
        raise ParameterError(f"{name} {value!r} is unknown; use {', '.join(map(repr, allowed))}")


def total(values: Tensor) -> Tensor:
    """Sum of values of one sign over the pixels: rows in the values' own dtype (fast), their sums in float64."""
    return values.sum(-1).sum(-1, dtype=torch.float64)


def finite(maps: Tensor) -> Tensor:
    """Which maps hold finite values only, bool ``[...]``."""
    # One nan or infinity spoils the sum, which is much faster than asking every pixel.
    return total(maps).isfinite()


def at_least(positive: Tensor, bound: Tensor, out: Tensor | None = None) -> Tensor:
    """1 where a value is at least its map's ``bound`` ``[..., 1, 1]`` and above 0, else 0, in the values' own dtype."""
    smallest = torch.finfo(positive.dtype).smallest_normal * torch.finfo(positive.dtype).eps  # above 0, so 0 stays out
    # Numbers instead of bools: a comparison into the same dtype runs at full speed, and so do the products with it.
    return torch.ge(positive, bound.clamp(min=smallest), out=torch.empty_like(positive) if out is None else out)
