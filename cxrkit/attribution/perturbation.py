"""What the score loses when a part of the image is taken away: forward passes alone, so any network will do."""

from __future__ import annotations

import torch
from torch import Tensor

from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.registry import method
from cxrkit.attribution.target import Explained
from cxrkit.errors import ParameterError

__all__ = ["occlusion"]


@method("perturbation")
def occlusion(
    explained: Explained,
    images: Tensor,
    *,
    window: int | tuple[int, int] = 15,
    stride: int | tuple[int, int] = 8,
    fill: str | float | Tensor = "black",
) -> Tensor:
    """Mean drop of the score over all windows that cover a pixel. [B, L, H, W], in units of the score.

    `window` and `stride`: pixels, or (rows, columns); the stride is at most the window, so every pixel is covered.
    Windows start at the upper left corner, and the last of a row or column is cut off at the border. `fill`: what the
    window shows instead, any baseline of `integrated_gradients`: "black" (0), "white", "mean", "blur", a number, or a
    tensor that broadcasts to the images. All channels are filled at once, and all labels share the forward passes.
    Raises ParameterError for a window larger than the image, or a stride larger than the window. With window and
    stride of 1 and a linear network it is (x - fill) times the weights. Source: Zeiler and Fergus 2014; paper `covid`,
    section on local methods.
    """
    sides = _pair("window", window), _pair("stride", stride)
    rows, columns = (_covered(*axis, images) for axis in zip(images.shape[-2:], *sides, strict=True))
    filled = _filling(images, fill)
    # Windows in which nothing changes, as on a black border, lose nothing and need no forward pass.
    changed = (images != filled).any(1).to(images)
    windows = torch.einsum("ih,bhw,jw->bij", rows.to(images), changed, columns.to(images)).nonzero()
    with torch.no_grad():
        score = explained.scores(explained.logits(images))
        drops = score.new_zeros(len(images), len(rows), len(columns), score.shape[1])
        for chosen in explained.steps(windows.split(explained.batch) if len(windows) else ()):
            image, row, column = chosen.unbind(1)
            covered = rows[row][:, None, :, None] & columns[column][:, None, None, :]
            occluded = torch.where(covered, filled[image], images[image])
            drops[image, row, column] = score[image] - explained.scores(explained.logits(occluded))
    rows, columns = rows.to(drops), columns.to(drops)
    return torch.einsum("ih,bijl,jw->blhw", rows, drops, columns) / torch.outer(rows.sum(0), columns.sum(0))


def _covered(size: int, window: int, stride: int, like: Tensor) -> Tensor:
    """Which of `size` pixels each window along an axis covers, bool [windows, size]."""
    if window > size:
        raise ParameterError(f"window of {window} pixels doesn't fit into images of {size}; choose a smaller one")
    if stride > window:
        raise ParameterError(f"stride of {stride} pixels leaves gaps between windows of {window}; choose a smaller one")
    count = -(-(size - window) // stride) + 1
    first = stride * torch.arange(count, device=like.device)[:, None]
    pixel = torch.arange(size, device=like.device)
    return (pixel >= first) & (pixel < first + window)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise ParameterError(f"{name} must be a whole number of pixels, at least 1, or a pair of them; got {value!r}")
    return pair


def _filling(images: Tensor, fill: str | float | Tensor) -> Tensor:
    try:
        return baseline_images(images, fill)
    except ParameterError as error:
        raise ParameterError(f"fill: {error}") from None
