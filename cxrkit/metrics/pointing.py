"""Does a map's maximum lie at the finding: the pointing game, its tolerance, its smoothing, its chance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import PROTOCOLS, boolean, finite, number, one_of, pair, real_maps, whole

__all__ = ["gaussian_smoothing", "hit_rate", "pointing_chance", "pointing_game"]


def pointing_game(
    maps: Tensor,
    masks: Tensor,
    tolerance: float = 15,
    tolerance_fraction: float | None = None,
    protocol: str = "corrected",
) -> Tensor:
    """Is the map's maximum near the mask: 1 (hit) or 0 (miss), maps and masks ``[..., H, W]`` -> ``[...]``.

    Hit: a pixel of the mask lies at a Euclidean distance strictly below ``tolerance`` pixels from the maximum;
    of equal maxima the first in row-major order counts. ``tolerance_fraction`` replaces it by this share of the
    longer side, which compares networks of different input size. A tolerance of 1 asks for a maximum inside the
    mask. Smoothing is a step of its own: :func:`gaussian_smoothing`. Chance: :func:`pointing_chance`.

    ``protocol``: ``"corrected"`` and ``"paper"`` keep rows and columns apart; ``"authors"`` draws the disc of
    accepted points around the mirrored maximum (row and column exchanged), as the published code does.

    nan: an empty mask, a constant map, a value that is not finite. Raises ParameterError for a tolerance of 0
    or below, and for the authors' protocol on maps that aren't square. Source: paper `normgrad`, pointing game,
    from its published code.
    """
    one_of("protocol", protocol, PROTOCOLS)
    maps, masks = pair(maps, masks)
    height, width = maps.shape[-2:]
    if protocol == "authors" and height != width:
        raise ParameterError(f"protocol 'authors' exchanges rows and columns: maps {height} x {width} aren't square")
    near = grown(masks, reach_of(masks, tolerance, tolerance_fraction))
    return hits(maps, near.mT if protocol == "authors" else near).where(masks.any(-1).any(-1), torch.nan)


def hit_rate(maps: Tensor, masks: Tensor) -> Tensor:
    """Does the map's maximum lie inside the mask: 1 or 0, maps and masks ``[..., H, W]`` -> ``[...]``.

    Its mean over images is the hit rate; it is the pointing game without tolerance. Ties and nan as in
    :func:`pointing_game`. Chance: :func:`chance_level`. Source: Saporta et al., Nature Machine Intelligence 4
    (2022), hit rate.
    """
    return pointing_game(maps, masks, tolerance=1)


def pointing_chance(masks: Tensor, tolerance: float = 15, tolerance_fraction: float | None = None) -> Tensor:
    """Share of the image from which a maximum would hit: bool ``[..., H, W]`` -> ``[...]`` in (0, 1].

    It is the mask grown by the tolerance, cut at the border: what a maximum at a place drawn evenly scores in
    the pointing game. nan for an empty mask. Source: own, for the pointing game of paper `normgrad`.
    """
    masks = boolean(masks)
    area = grown(masks, reach_of(masks, tolerance, tolerance_fraction)).double().mean((-2, -1))
    return area.where(area > 0, torch.nan).float()


def gaussian_smoothing(maps: Tensor, sigma: float = 1.0, size: int = 11) -> Tensor:
    """Maps ``[..., H, W]`` smoothed by a normalised Gaussian of ``size`` x ``size`` pixels, reflected at the border.

    The result has the maps' dtype, at least float32. A constant map stays as it is, to the last bit. The reflection
    doubles the pixels near the border, so noise varies more there and has its maximum there more often. Raises
    ParameterError for a ``sigma`` of 0 or below, and a ``size`` that is even or too large for the maps. Source: paper
    `normgrad`, applied to the final map before the pointing game.
    """
    maps = real_maps(maps)
    sigma = number("sigma", sigma, "above 0; without smoothing, use the maps as they are", lambda s: 0 < s < math.inf)
    half = whole("size", size, 1) // 2
    if size % 2 == 0 or min(maps.shape[-2:]) <= half:
        raise ParameterError(f"size {size} must be odd and its half smaller than the map's {tuple(maps.shape[-2:])}")
    weights = [math.exp(-(min(step / sigma, 40) ** 2) / 2) for step in range(half + 1)]
    norm = weights[0] + 2 * sum(weights[1:])
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    # What differs from one pixel is smoothed, or rounding would give a constant map a maximum.
    level = flat[..., :1, :1]
    smooth = F.pad(flat - level, [half] * 4, mode="reflect")
    for axis in (-2, -1):
        smooth = _weighted(smooth, [weight / norm for weight in weights], axis)
    return (smooth + level).reshape(maps.shape)


def _weighted(padded: Tensor, weights: list[float], axis: int) -> Tensor:
    """Weighted sum of neighbours along one axis: the Gaussian is a product of two such sums."""
    half = len(weights) - 1
    length = padded.shape[axis] - 2 * half
    result = padded.narrow(axis, half, length) * weights[0]
    both = torch.empty_like(result)
    for step in range(1, half + 1):
        torch.add(padded.narrow(axis, half - step, length), padded.narrow(axis, half + step, length), out=both)
        result.add_(both, alpha=weights[step])
    return result


def reach_of(masks: Tensor, tolerance: float, tolerance_fraction: float | None) -> float:
    """The tolerance in pixels of masks ``[..., H, W]``; ParameterError for 0 or below."""
    name, given = ("tolerance", tolerance) if tolerance_fraction is None else ("tolerance_fraction", tolerance_fraction)
    reach = number(name, given, "above 0: a hit is strictly nearer than the tolerance", lambda r: 0 < r < math.inf)
    side = max(masks.shape[-2:])
    return min(reach if tolerance_fraction is None else reach * side, 2 * side)  # nothing is farther away than that


def grown(masks: Tensor, reach: float) -> Tensor:
    """The mask and all pixels strictly nearer to it than ``reach``: bool ``[..., H, W]`` -> the same shape.

    A disc is a stack of rows, the wider the nearer to its middle: the mask is widened along its rows pixel by
    pixel, and each width is shifted up and down to where the disc has it.
    """
    height, width = masks.shape[-2:]
    radius = min(math.ceil(reach) - 1, max(height, width))
    widths = [
        max(side for side in range(radius + 1) if not side or side**2 + away**2 < reach**2)
        for away in range(radius + 1)
    ]
    padded = F.pad(masks, [radius] * 4)
    wide = padded.narrow(-1, radius, width).clone()
    result = masks.clone()
    for side in range(radius + 1):
        if side:
            wide |= padded.narrow(-1, radius - side, width)
            wide |= padded.narrow(-1, radius + side, width)
        for away in (away for away in range(radius + 1) if widths[away] == side):
            result |= wide.narrow(-2, radius - away, height)
            result |= wide.narrow(-2, radius + away, height)
    return result


def hits(maps: Tensor, regions: Tensor) -> Tensor:
    """1 where the maximum of a map ``[..., H, W]`` lies in its region, bool ``[..., H, W]``, else 0; ``[...]``.

    Of equal maxima the first in row-major order counts. nan for a constant map and for a value that is not finite.
    """
    row = maps.amax(-1).argmax(-1)
    line = maps.take_along_dim(row[..., None, None], -2).squeeze(-2)
    place = (row * maps.shape[-1] + line.argmax(-1))[..., None]
    shape = torch.broadcast_shapes(regions.shape[:-2], row.shape)
    hit = regions.flatten(-2).expand(*shape, -1).gather(-1, place.expand(*shape, 1))[..., 0]
    varies = finite(maps) & (maps.amax((-2, -1)) > maps.amin((-2, -1)))
    return hit.to(maps.dtype).where(varies, torch.nan)
