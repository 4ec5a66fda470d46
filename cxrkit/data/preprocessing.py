"""From a radiograph as it was read to the square that networks take: image, boxes and masks by one transform."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from cxrkit.data.geometry import resize, scale_boxes

__all__ = ["SQUASH", "Preprocessing", "Squash"]


class Preprocessing(Protocol):
    """What a dataset asks of a pre-processing: the same geometry for pixels, masks and boxes."""

    def image(self, pixels: Tensor, size: int) -> Tensor:
        """Float32 ``[H, W]`` in [0, 1] to ``[size, size]`` in [0, 1]."""
        ...

    def masks(self, masks: Tensor, size: int) -> Tensor:
        """Bool ``[L, H, W]`` to ``[L, size, size]``; a pixel stays in when at least half of it was."""
        ...

    def boxes(self, boxes: np.ndarray, frame: tuple[float, float], size: int) -> np.ndarray:
        """``[M, 4]`` in pixels of ``frame`` (width, height) to float64 ``[M, 4]`` in target pixels."""
        ...


class Squash:
    """Resize to a square; the aspect ratio is not kept, as in papers `bcos` and `normgrad`."""

    def image(self, pixels: Tensor, size: int) -> Tensor:
        return resize(pixels, size)

    def masks(self, masks: Tensor, size: int) -> Tensor:
        return resize(masks.float(), size) >= 0.5

    def boxes(self, boxes: np.ndarray, frame: tuple[float, float], size: int) -> np.ndarray:
        return scale_boxes(boxes, frame, size)


SQUASH = Squash()
