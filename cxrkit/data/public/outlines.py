"""Outlines of findings, rectangles, ellipses, polygons and run-length codes, and the exact masks that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxrkit.data.readers import image_size

__all__ = ["ELLIPSE", "POLYGON", "RECTANGLE", "RUNS", "Outlines", "outline_mask", "rle_box", "rle_runs"]

RECTANGLE, ELLIPSE, POLYGON, RUNS = "0", "1", "2", "runs"


@dataclass(frozen=True)
class Outlines:
    """The exact masks of each row: bool ``[L, H, W]``; None where nobody looked for outlines.

    ``shapes``: for each row None, or label, kind and points of each shape, as :func:`outline_mask` takes them;
    ``grids``: width and height of each row's masks, or the path of an image that has them.
    """

    labels: tuple[str, ...]
    grids: Sequence[tuple[int, int] | str]
    shapes: Sequence[Sequence[tuple[str, str, np.ndarray]] | None]

    def __call__(self, row: int) -> np.ndarray | None:
        if self.shapes[row] is None:
            return None
        grid = self.grids[row]
        width, height = image_size(grid) if isinstance(grid, str) else grid
        masks = np.zeros((len(self.labels), height, width), dtype=bool)
        for label, kind, points in self.shapes[row]:
            masks[self.labels.index(label)] |= outline_mask(kind, points, width, height)
        return masks


def outline_mask(kind: str, points: np.ndarray, width: int, height: int) -> np.ndarray:
    """One shape on a grid: bool ``[height, width]``; a pixel is inside when its centre is.

    ``kind``: "0" rectangle, "1" ellipse, "2" polygon; ``points``: ``[P, 2]`` as x, y; a rectangle and an ellipse are
    given by two opposite corners of their bounding box. A shape within the image that holds no pixel's centre gets the
    pixel under its middle, so that no object vanishes. Kind "runs": lengths as :func:`rle_runs` gives them.
    """
    if kind == RUNS:
        return np.repeat(np.arange(len(points)) % 2 == 1, points).reshape(width, height).T
    mask = np.zeros((height, width), dtype=bool)
    low, high = points.min(axis=0), points.max(axis=0)
    # Only the pixels under the bounding box need a look: objects are small, radiographs are not.
    x0, y0 = np.floor(low).clip(0, (width, height)).astype(int)
    x1, y1 = np.ceil(high).clip(0, (width, height)).astype(int)
    inside = _inside(kind, points, np.arange(x0, x1) + 0.5, np.arange(y0, y1)[:, None] + 0.5)
    if inside.size and not inside.any():
        x, y = ((low + high) / 2).clip(0, (width - 1, height - 1)).astype(int)
        mask[y, x] = True
    mask[y0:y1, x0:x1] |= inside
    return mask


def _inside(kind: str, points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which positions, x ``[W]`` across and y ``[H, 1]`` down, lie within one shape: bool ``[H, W]``."""
    low, high = points.min(axis=0), points.max(axis=0)
    if kind == RECTANGLE:
        return (low[1] <= y) & (y < high[1]) & (low[0] <= x) & (x < high[0])
    if kind == ELLIPSE:
        middle, half = (low + high) / 2, (high - low) / 2
        return ((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 <= 1
    inside = np.zeros((len(y), len(x)), dtype=bool)
    # Even-odd rule: a ray to the right crosses the outline an odd number of times.
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        rows = ((ay <= y) != (by <= y))[:, 0]
        inside[rows] ^= x < ax + (y[rows] - ay) * (bx - ax) / (by - ay)
    return inside


# Run-length codes


def rle_runs(counts: str | list[int]) -> np.ndarray:
    """Run lengths of a COCO mask, int64 ``[R]``: outside, inside, outside, ... in column-major order.

    ``counts``: the compressed text, or the list of run lengths. In the text each number takes characters of five bits
    (code minus 48, low bits first, bit 5 says that more follow, the last bit 4 is the sign); from the fourth number on
    it is the difference to the number two before. Raises ValueError for text that is no such code.
    """
    if not isinstance(counts, str):
        return np.array(counts, dtype=np.int64)
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    # No run is longer than an image: seven characters hold 35 bits.
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63 or (ends - starts).max() > 6:
        raise ValueError("not a run-length code")
    length = ends - starts + 1
    place = np.arange(len(codes)) - np.repeat(starts, length)
    runs = np.add.reduceat((codes & 31) << 5 * place, starts)
    runs -= (codes[ends] >> 4 & 1) << 5 * length
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def rle_box(runs: np.ndarray, height: int) -> tuple[int, int, int, int] | None:
    """The bounding box of run lengths, half-open, without drawing the mask; None for an empty mask."""
    inside = runs[1::2] > 0
    ends = np.cumsum(runs)[1::2][inside]
    if not len(ends):
        return None
    first, last = ends - runs[1::2][inside], ends - 1
    # A run that goes on in the next column touches the lower edge and the upper.
    whole = (first // height != last // height).any()
    low, high = (0, height - 1) if whole else ((first % height).min(), (last % height).max())
    return int((first // height).min()), int(low), int((last // height).max()) + 1, int(high) + 1
