"""Maps as layers over the radiograph in the viewer's colours, drawn for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxrkit.view.codec import RAMPS, array
from cxrkit.view.panels import draw_image, draw_region, panels, region_of, stack
from cxrkit.view.style import describe, style

__all__ = ["coloured", "full_colour", "show_overlays"]

COLUMNS = 3


def full_colour(values: np.ndarray, signed: bool, scale: str = "map") -> float:
    """The magnitude that takes the strongest colour: the maximum, or with ``scale="clip"`` the 99th percentile."""
    size = np.abs(values) if signed else np.maximum(values, 0)
    if scale == "clip" and (size > 0).any():
        return float(np.percentile(size[size > 0], 99, method="lower"))
    return float(size.max())


def coloured(
    values: np.ndarray, limit: float, colours: str, threshold: float = 0.0, strength: float = 1.0
) -> np.ndarray:
    """RGBA ``[H, W, 4]`` in [0, 1] of one map ``[H, W]``, as the viewer paints it.

    ``limit``: the magnitude of full colour; ``colours``: ``"signed"`` or a name of ``RAMPS``; ``threshold``: share of
    the maximum below which nothing is painted; ``strength``: opacity of the strongest colour. Opacity grows with the
    value, so that the radiograph stays visible where a map says little.
    """
    size, signed = np.abs(values), colours == "signed"
    step = np.rint(255 * size / limit).clip(0, 255) if limit > 0 else np.zeros_like(size)
    painted = np.zeros((*values.shape, 4))
    for side, name in ((values > 0, "positive" if signed else colours), (values < 0, "negative" if signed else None)):
        if name:
            stops = np.array(RAMPS[name]) / 255
            place = step[side] / 255 * (len(stops) - 1)
            painted[side, :3] = np.stack([np.interp(place, np.arange(len(stops)), stop) for stop in stops.T], axis=-1)
            painted[side, 3] = strength * np.minimum(1, 1.15 * (step[side] / 255) ** 0.6)
    painted[(size < threshold * max(float(values.max()), 0)) | (limit <= 0), 3] = 0
    return painted


def show_overlays(
    image: Any,
    maps: Any,
    titles: Sequence[str],
    look: Mapping[str, Any],
    region: Any = None,
    truth: Any = None,
) -> Figure:
    """Maps ``[M, H, W]`` over one image ``[1, H, W]`` or ``[H, W]``, at most three in a row, one title per map.

    ``look``: ``caption``; ``overlay`` and ``threshold`` in [0, 1]; ``smooth``; ``zoom`` from 1, and ``left`` and
    ``top``, the corner of the part that is shown, as shares of the image; ``panels``: per map its ``colours`` and
    ``full_colour``, as in :func:`coloured`. ``region``, outlined, and ``truth``: bool ``[H, W]``.
    """
    maps = stack(maps, "maps")
    height, width = maps.shape[-2:]
    with style():
        figure, axes = panels(len(maps), COLUMNS, caption=look["caption"], margin=0.2)
        figure.set_figwidth(max(figure.get_figwidth(), 4.6))  # so that the caption has room over one map
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(maps) // COLUMNS))  # for the lines below
        for ax, values, title, panel in zip(axes, maps, titles, look["panels"], strict=False):
            draw_image(ax, image, title)
            ax.title.set_fontsize(min(9, 300 / max(len(title), 1)))
            layer = coloured(values, panel["full_colour"], panel["colours"], look["threshold"], look["overlay"])
            ax.imshow(layer, interpolation="bilinear" if look["smooth"] else "nearest")
            lowest = -panel["full_colour"] if panel["colours"] == "signed" else 0
            ax.set_xlabel(f"{panel['colours']}: {lowest:.2g} … {panel['full_colour']:.2g}", fontsize=8)
            draw_region(ax, region_of(None, region, (height, width)), truth)
            left, top, side = look["left"] * width - 0.5, look["top"] * height - 0.5, 1 / look["zoom"]
            ax.set(xlim=(left, left + side * width), ylim=(top + side * height, top))
    text = f"{look['caption']}: the image under maps by {', '.join(titles)}."
    return describe(figure, text, {"image": array(image).squeeze(), "maps": maps})
