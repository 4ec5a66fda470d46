"""Maps, masks and images as the few bytes that a page carries, and back."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
from PIL import Image

from cxrkit.errors import ParameterError

__all__ = [
    "LEVELS",
    "RAMPS",
    "THRESHOLD_STEP",
    "area_resize",
    "array",
    "box_mask",
    "pack_image",
    "pack_map",
    "pack_mask",
    "unpack_map",
]

# Colours from the smallest to the largest value: for signed maps two hues that colour-blind readers tell apart, for
# maps without sign ramps that rise in lightness.
RAMPS: dict[str, list[tuple[int, int, int]]] = {
    "positive": [(255, 176, 92), (255, 132, 46), (240, 78, 16)],
    "negative": [(140, 196, 255), (84, 158, 255), (38, 112, 235)],
    "heat": [(92, 22, 120), (150, 38, 104), (206, 68, 70), (242, 118, 32), (252, 182, 40), (250, 246, 150)],
    "viridis": [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)],
    "white": [(150, 160, 170), (205, 210, 215), (255, 255, 255)],
}
THRESHOLD_STEP = 0.05  # The viewer's threshold slider moves in these steps.


def _codebook() -> tuple[np.ndarray, np.ndarray]:
    """Bin edges and one value per bin for magnitudes in [0, 1], as codes 0 … 127.

    Every step of the threshold slider is a bin edge, so rounding never moves a value across a threshold. Below the
    first step the bins shrink towards zero, because gradient maps keep much of their mass in small values. Code 127
    is the maximum alone: thresholds are relative to it.
    """
    fine = THRESHOLD_STEP * (np.arange(32) / 31) ** 2
    coarse = np.arange(6, 101) / 100
    edges = np.concatenate([[fine[1] / 4], fine[1:], coarse])
    values = np.concatenate([[0.0], (edges[:-1] + edges[1:]) / 2, [1.0]])
    return edges, values.round(7)


_EDGES, _VALUES = _codebook()
LEVELS: list[float] = _VALUES.tolist()


def array(values: Any) -> np.ndarray:
    """Tensor, array or nested list as float64 on the CPU."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def box_mask(boxes: Any, shape: tuple[int, int]) -> np.ndarray:
    """Union of boxes x_min, y_min, x_max, y_max, bool ``[H, W]``: a pixel is inside when its center is, half-open."""
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1]) + 0.5
    mask = np.zeros(shape, dtype=bool)
    for x_min, y_min, x_max, y_max in array(boxes).reshape(-1, 4):
        mask |= (x_min <= columns) & (columns < x_max) & (y_min <= rows) & (rows < y_max)
    return mask


def area_resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink by exact area averaging, so that the share of mass in a region and the area of a mask stay what they were.

    ``array``: ``[..., H, W]``; returns float64 ``[..., height, width]``.
    """
    rows, columns = _overlap(array.shape[-2], height), _overlap(array.shape[-1], width)
    return rows @ np.asarray(array, dtype=np.float64) @ columns.T


def _overlap(source: int, target: int) -> np.ndarray:
    """Share of each target cell that each source pixel covers: ``[target, source]``, rows sum to 1."""
    cell = np.arange(target + 1)[:, None] * source / target
    pixel = np.arange(source)[None, :]
    covered = np.minimum(cell[1:], pixel + 1) - np.maximum(cell[:-1], pixel)
    return covered.clip(min=0) * target / source


def pack_map(values: np.ndarray) -> dict:
    """One signed map ``[h, w]`` in 8 bits per value: ``{"z": text, "scale": [negative, positive]}``.

    Codes are int8, stored as differences between rows (modulo 256), because smooth maps then shrink by another 40 %;
    ``sign(code) * LEVELS[|code|] * scale[code > 0]`` gives the value back. The two scales are the largest magnitudes
    of either sign. Raises ParameterError for values that aren't finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ParameterError("the map holds NaN or infinite values; only finite maps can be shown")
    scale = [float(max(0.0, -values.min())), float(max(0.0, values.max()))]
    codes = np.zeros(values.shape, dtype=np.int8)
    for sign, largest in zip((-1, 1), scale, strict=True):
        if largest > 0:
            chosen = sign * values > 0
            codes[chosen] = sign * np.searchsorted(_EDGES, sign * values[chosen] / largest, side="right")
    return {"z": _deflate(np.diff(codes.view(np.uint8), axis=0, prepend=np.uint8(0))), "scale": scale}


def unpack_map(record: dict, shape: tuple[int, int]) -> np.ndarray:
    """The values that the viewer shows for a packed map: float64 ``[h, w]``."""
    rows = np.frombuffer(zlib.decompress(base64.b64decode(record["z"])), dtype=np.uint8).reshape(shape)
    codes = np.add.accumulate(rows, axis=0, dtype=np.uint8).view(np.int8)
    magnitude = _VALUES[np.abs(codes.astype(int))]
    return np.where(codes < 0, -record["scale"][0] * magnitude, record["scale"][1] * magnitude)


def pack_mask(coverage: np.ndarray) -> str:
    """A region on the map's grid: the covered share of each cell, 0 … 1, as 0 … 255."""
    return _deflate(np.rint(np.asarray(coverage, dtype=np.float64) * 255).clip(0, 255).astype(np.uint8))


def pack_image(image: np.ndarray) -> str:
    """A grey image ``[H, W]`` in [0, 1] as the base64 text of an 8-bit PNG."""
    grey = np.rint(np.asarray(image, dtype=np.float64).clip(0, 1) * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _deflate(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode("ascii")
