"""Data of a figure as a file inside a page: a table as CSV, arrays as a NumPy archive."""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrkit.view.series import series_table

__all__ = ["LARGEST_DATA", "drawn", "packed"]

LARGEST_DATA = 400_000  # bytes that a figure's data may add to a page
_SMALLEST = 16  # pixels: an image of fewer isn't made smaller


def drawn(figure: Figure) -> pd.DataFrame | dict[str, np.ndarray] | None:
    """The points of a figure's series as a table with the columns panel, series, x, y, else its images.

    Images are the arrays images ``[N, H, W]`` and titles ``[N]`` (one by one where their shapes differ). None for a
    figure that holds neither.
    """
    table = series_table(figure)
    if table is not None:
        return table
    shown = [ax for ax in figure.axes if ax.images]
    images = [np.ma.filled(ax.images[0].get_array(), np.nan) for ax in shown]
    if not images:
        return None
    titles = {"titles": np.array([ax.get_title() for ax in shown])}
    if len({image.shape for image in images}) == 1:
        return {"images": np.stack(images)} | titles
    return {f"image_{place}": image for place, image in enumerate(images)} | titles


def packed(data: pd.DataFrame | Mapping[str, Any]) -> tuple[str, str, bytes, str]:
    """Ending, media type, content and a remark of the file that holds ``data``, at most ``LARGEST_DATA`` bytes if
    that can be: numbers are rounded for it, then a table is compressed and images are made half as wide, and so on.
    """
    return _table(data) if isinstance(data, pd.DataFrame) else _archive(data)


def _table(frame: pd.DataFrame) -> tuple[str, str, bytes, str]:
    for form, remark in ((None, ""), ("%.4g", "rounded")):
        content = frame.to_csv(index=False, float_format=form).encode()
        if len(content) <= LARGEST_DATA:
            return "csv", "text/csv", content, remark
    return "csv.gz", "application/gzip", gzip.compress(content, mtime=0), "rounded"


def _archive(data: Mapping[str, Any]) -> tuple[str, str, bytes, str]:
    arrays = {name: _plain(values) for name, values in data.items()}
    content, remark, step = _npz(arrays), "", 1
    while len(content) > LARGEST_DATA and (not remark or any(map(_shrinks, arrays.values()))):
        if remark:  # rounded once already
            step *= 2
            arrays = {name: _halved(values) if _shrinks(values) else values for name, values in arrays.items()}
        content = _npz({name: _rounded(values) for name, values in arrays.items()})
        remark = f"rounded, 1/{step} as wide" if step > 1 else "rounded"
    return "npz", "application/octet-stream", content, remark


def _plain(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values if values.dtype.kind in "bU" else values.astype(np.float32)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _rounded(values: np.ndarray) -> np.ndarray:
    """Numbers with 8 bits of their mantissa, two decimal digits: the zeros after them take no room in the archive."""
    if values.dtype != np.float32:
        return values
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def _shrinks(values: np.ndarray) -> bool:
    return values.ndim >= 2 and values.dtype.kind in "bf" and min(values.shape[-2:]) >= 2 * _SMALLEST


def _halved(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; of a mask, whether one of them is in it."""
    height, width = (length // 2 * 2 for length in values.shape[-2:])
    blocks = values[..., :height, :width].reshape(*values.shape[:-2], height // 2, 2, width // 2, 2)
    return blocks.any((-3, -1)) if values.dtype.kind == "b" else blocks.mean((-3, -1), dtype=np.float32)
