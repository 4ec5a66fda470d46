"""Changes of grey values, each fixed beforehand or told by the image itself; and what must be fitted to a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cxrkit.errors import DataError, ParameterError

__all__ = ["EightBit", "Levels", "Percentiles", "PixelStandardisation", "luma"]

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

    def __post_init__(self):
        if not (np.isfinite([self.low, self.high]).all() and self.low <= self.high):
            raise ParameterError(f"low={self.low}, high={self.high}: levels are finite, and low is not above high")

    def __call__(self, images: Tensor) -> Tensor:
        return _between(images, self.low, self.high)


@dataclass(frozen=True)
class Percentiles:
    """:class:`Levels` that each image tells itself: its ``low``-th and ``high``-th percentile (linear in between).

    :meth:`over` gives one pair for a whole dataset. Source: paper `covid`, 3.3 (text: 1 and 95).
    """

    low: float = 1.0
    high: float = 95.0

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 100:
            raise ParameterError(f"low={self.low}, high={self.high}: percentiles need 0 <= low <= high <= 100")

    def __call__(self, images: Tensor) -> Tensor:
        """``images``: ``[..., H, W]``, each by its own percentiles."""
        flat = images.reshape(-1, images.shape[-2] * images.shape[-1]).numpy()
        low, high = np.percentile(flat, [self.low, self.high], axis=1).reshape(2, *images.shape[:-2], 1, 1)
        return _between(images, torch.from_numpy(low).to(images), torch.from_numpy(high).to(images))

    def over(self, images: Iterable[Tensor]) -> Levels:
        """One pair of levels for all pixels of ``images`` (tensors in [0, 1]), counted in 8 bits, as the authors' code.

        Fit it on training images, or what is tested takes part: the authors fitted it on all they had.
        """
        counts = np.zeros(256, dtype=np.int64)
        for image in images:
            counts += np.bincount((image.numpy() * 255).round().astype(np.uint8).ravel(), minlength=256)
        if not counts.sum():
            raise DataError("percentiles of a dataset need at least one image, none was given")
        below = np.cumsum(counts)

        def level(percent: float) -> float:
            # As numpy's linear rule, between the two sorted values around the position, without sorting.
            position = percent / 100 * (below[-1] - 1)
            left, right = np.searchsorted(below, [np.floor(position), np.ceil(position)], side="right")
            return float(left + (right - left) * (position - np.floor(position))) / 255

        return Levels(level(self.low), level(self.high))


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


@dataclass(frozen=True)
class PixelStandardisation:
    """Subtract the mean image and divide by the image of standard deviations; where that is 0, the result is 0.

    ``mean``, ``std``: float64 ``[H, W]``. The result leaves [0, 1]: it is an encoding for a network trained on it, and
    0 is the mean image, not black. Source: paper `path`, 4.2, whose code fits it on training and test images together.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, images: Iterable[Tensor]) -> PixelStandardisation:
        """From ``images``, each ``[..., H, W]`` (population deviation): those of the training split, or it leaks.

        The papers' own, leaking fit is the same call with the test images among ``images``. Raises DataError when there
        are none.
        """
        count, mean, squares = 0, None, None
        for image in images:
            for one in image.double().reshape(-1, *image.shape[-2:]):
                if mean is None:
                    mean, squares = torch.zeros_like(one), torch.zeros_like(one)
                count += 1
                # Welford: sums of squares of thousands of images would lose the digits that matter.
                step = one - mean
                mean = mean + step / count
                squares = squares + step * (one - mean)
        if mean is None:
            raise DataError("a mean image needs at least one image, none was given")
        return cls(mean, (squares / count).sqrt())

    def __call__(self, images: Tensor) -> Tensor:
        """``images``: ``[..., H, W]`` of the fitted size; returns the same shape."""
        if images.shape[-2:] != self.mean.shape:
            raise ParameterError(f"images are {tuple(images.shape[-2:])}, the mean image is {tuple(self.mean.shape)}")
        mean, std = self.mean.to(images), self.std.to(images)
        return torch.where(std > 0, (images - mean) / std, 0)
