"""Resizing images, and boxes with them; and the masks of boxes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cxrkit.errors import ParameterError

__all__ = ["INTERPOLATIONS", "box_masks", "resize", "scale_boxes", "union_masks"]


INTERPOLATIONS = ("bilinear", "bicubic", "aliased", "gaussian", "lanczos")


def resize(images: Tensor, size: int | tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Resize to ``size`` x ``size``, or to ``size`` = (height, width); the aspect ratio is whatever that gives.

    ``images``: float ``[..., H, W]``; returns the same leading shape. Pixel centres lie at half-integers, so a
    coordinate ``x`` of the source lands at ``x * width / W``. ``"bilinear"`` and ``"bicubic"`` widen their kernel when
    shrinking, as Pillow does; ``"aliased"`` is bilinear without that, as Keras resizes; ``"gaussian"`` blurs, then
    interpolates, as scikit-image does; ``"lanczos"`` is Pillow's, of three lobes. Bicubic and lanczos overshoot at
    edges, the others keep the range of values. Raises ParameterError for another name. Source: the papers' code
    (`bcos`: bilinear, and gaussian for VinBigData; `covid`: bicubic; `path`: aliased; `normgrad`: lanczos).
    """
    if interpolation not in INTERPOLATIONS:
        raise ParameterError(f"interpolation={interpolation!r} is unknown; use one of {list(INTERPOLATIONS)}")
    target = (size, size) if isinstance(size, int) else tuple(size)
    if images.shape[-2:] == target:
        return images
    flat = images.reshape(-1, 1, *images.shape[-2:])
    if interpolation in ("gaussian", "lanczos"):
        each = _gaussian if interpolation == "gaussian" else _lanczos
        small = torch.stack([each(image[0], target)[None] for image in flat]).to(images)
    else:
        mode = "bicubic" if interpolation == "bicubic" else "bilinear"
        widened = interpolation != "aliased"
        small = F.interpolate(flat, size=target, mode=mode, antialias=widened, align_corners=False)
    if interpolation not in ("bicubic", "lanczos"):
        # The weights sum to one only up to rounding, so a white image could end at 1 + 1e-7.
        small = small.clamp(flat.min(), flat.max())
    return small.reshape(*images.shape[:-2], *target)


def _lanczos(image: Tensor, target: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(image.numpy().astype(np.float32, copy=False))
    return torch.from_numpy(np.array(picture.resize(target[::-1], Image.Resampling.LANCZOS)))


def _gaussian(image: Tensor, target: tuple[int, int]) -> Tensor:
    from skimage.transform import resize as skimage_resize

    return torch.from_numpy(skimage_resize(image.numpy(), target, anti_aliasing=True))


def scale_boxes(boxes: np.ndarray, frame: tuple[float, float], size: int) -> np.ndarray:
    """Boxes after :func:`resize`: each axis is scaled by its own ``size / frame``.

    ``boxes``: ``[M, 4]`` as x_min, y_min, x_max, y_max in pixels of ``frame`` (width, height); returns
    float64 ``[M, 4]`` in target pixels.
    """
    width, height = frame
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    # Multiply before dividing: 512 * 224 / 1024 is exact where 512 * (224 / 1024) need not be.
    return boxes * size / np.array([width, height, width, height], dtype=np.float64)


def box_masks(boxes: np.ndarray, size: int) -> Tensor:
    """One mask per box: pixel (i, j) is inside when x_min <= j + 0.5 < x_max, and likewise for i and y.

    ``boxes``: ``[M, 4]`` in target pixels; returns bool ``[M, size, size]``. A box with area that holds no
    pixel centre gets the pixel under its middle, so no finding vanishes; a box without area, or outside, gets
    nothing.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    columns = _spans(boxes[:, 0], boxes[:, 2], size)
    rows = _spans(boxes[:, 1], boxes[:, 3], size)
    return torch.from_numpy(rows[:, :, None] & columns[:, None, :])


def _spans(low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
    """Which of ``size`` pixels each interval holds: bool ``[M, size]``."""
    low, high = low.clip(0, size), high.clip(0, size)
    centres = np.arange(size) + 0.5
    inside = (low[:, None] <= centres) & (centres < high[:, None])
    missed = ~inside.any(axis=1) & (high > low)
    middle = np.minimum((low + high) / 2, size - 1).astype(int)
    inside[missed, middle[missed]] = True
    return inside


def union_masks(boxes: np.ndarray, label_index: np.ndarray, n_labels: int, size: int) -> Tensor:
    """Union of the boxes of each label on the target grid.

    ``boxes``: ``[M, 4]`` in target pixels; ``label_index``: int ``[M]``, entries outside ``0 .. n_labels - 1``
    belong to no label and are left out. Returns bool ``[n_labels, size, size]``.
    """
    masks = torch.zeros(n_labels, size, size, dtype=torch.bool)
    single = box_masks(boxes, size)
    for mask, label in zip(single, np.asarray(label_index, dtype=int), strict=True):
        if 0 <= label < n_labels:
            masks[label] |= mask
    return masks
