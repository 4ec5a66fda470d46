"""Changes of grey values, each fixed beforehand or told by the image itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["EightBit", "Levels", "Percentiles", "luma"]

# ITU-R BT.601, as Pillow's own conversion to grey.
_LUMA = np.array([0.299, 0.587, 0.114])


def luma(colour: np.ndarray) -> np.ndarray:
    """Grey of colours in [0, 1], ``[H, W, 3]``."""
    # Equal channels are kept exactly: the weighted sum would round.
    if (colour == colour[..., :1]).all():
        return colour[..., 0]
    return (colour @ _LUMA).clip(0, 1)


@dataclass(frozen=True)
class Levels:
    """``low`` becomes 0 and ``high`` becomes 1, what lies beyond is clipped; an image of one level alone becomes 0.

    Source: paper `covid`, 3.3: (clip(x, low, high) - low) / (high - low); its code has 0 and 207 of 255 for all.
    """

    low: float
    high: float

    def __call__(self, images: Tensor) -> Tensor:
        return _between(images, self.low, self.high)


@dataclass(frozen=True)
class Percentiles:
    """:class:`Levels` that each image tells itself: its ``low``-th and ``high``-th percentile (linear in between).

    Source: paper `covid`, 3.3 (text: 1 and 95).
    """

    low: float = 1.0
    high: float = 95.0

    def __call__(self, images: Tensor) -> Tensor:
        """``images``: ``[..., H, W]``, each by its own percentiles."""
        flat = images.reshape(-1, images.shape[-2] * images.shape[-1]).numpy()
        low, high = np.percentile(flat, [self.low, self.high], axis=1).reshape(2, *images.shape[:-2], 1, 1)
        return _between(images, torch.from_numpy(low).to(images), torch.from_numpy(high).to(images))


@dataclass(frozen=True)
class EightBit:
    """From an image's own extremes to 256 levels, rounded down. Source: paper `bcos`, code for VinBigData."""

    def __call__(self, images: Tensor) -> Tensor:
        low, high = (getattr(images, name)(dim=(-2, -1), keepdim=True) for name in ("amin", "amax"))
        # In float64: a quotient that float32 rounds up would gain a level.
        levels = (_between(images.double(), low.double(), high.double()) * 255).floor()
        return (levels / 255).to(images.dtype)


def _between(images: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    low, high = torch.as_tensor(low).to(images), torch.as_tensor(high).to(images)
    spread = high - low
    return torch.where(spread > 0, (images.clamp(low, high) - low) / spread, 0)
