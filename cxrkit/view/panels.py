"""Panels of images and maps: a grid of bare axes, colours that share a scale, outlines of boxes and findings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cxrkit.errors import ParameterError
from cxrkit.view.codec import array, box_mask
from cxrkit.view.style import GREY, OUTLINE, POSITIVE, RIM, RULE, SIGNED, SOFT, WIDTH, new_figure

__all__ = [
    "broken",
    "colour_bar",
    "draw_image",
    "draw_map",
    "draw_region",
    "limits",
    "panels",
    "region_of",
    "stack",
]

LARGEST_PANEL = 2.2  # inches
TITLE, MARGIN = 0.24, 0.75  # inches: the height of a row of titles, the width of a colour bar or of row names
LETTERS, LINE = 15.5, 0.15  # of a title: how many fit into an inch, inches that one more line takes
LEAST_PANEL = 90  # CSS pixels: a narrower one is too small to be read, as on a phone
CLIP = 99.5  # percentile of |map| at which colours are full, as paper `bcos` draws its maps


def stack(values: Any, name: str) -> np.ndarray:
    """``[N, H, W]`` from that, or from ``[N, 1, H, W]``. Raises ParameterError for another shape."""
    stacked = array(values)
    if stacked.ndim == 4 and stacked.shape[1] == 1:
        stacked = stacked[:, 0]
    if stacked.ndim != 3 or not len(stacked):
        raise ParameterError(f"{name} have shape {stacked.shape}; expected [N, H, W] with N above 0")
    return stacked


def broken(names: Sequence[str], columns: int, margin: float = MARGIN) -> tuple[list[str], int]:
    """Titles in lines that fit above so many panels in a row, and how many lines the longest one has; lines that a
    title has stay lines."""
    letters = max(8, int(LETTERS * _side(columns, margin)))
    fitted = [
        "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in name.split("\n")) for name in names
    ]
    return fitted, max(name.count("\n") + 1 for name in fitted)


def _side(columns: int, margin: float) -> float:
    return min(LARGEST_PANEL, (WIDTH - margin) / columns)


def panels(
    count: int, columns: int, titles: int | None = None, margin: float = MARGIN, caption: str = "", deep: int = 1
) -> tuple[Figure, np.ndarray]:
    """A figure with ``count`` bare square panels, at most ``columns`` in a row; surplus ones stay hidden.

    ``titles``: how many rows have titles (all by default), of ``deep`` lines; ``margin``: inches left for what stands
    beside the panels; ``caption``: a line above all of them.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    side, titled = _side(columns, margin), rows if titles is None else titles
    lines = TITLE * (titled + bool(caption)) + LINE * (deep - 1) * titled
    figure = new_figure(side * columns + margin, side * rows + lines)
    figure.least_width = round(LEAST_PANEL * columns)
    if caption:
        figure.suptitle(caption, x=0.01, ha="left", fontsize=10)
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    for place, ax in enumerate(axes):
        ax.set(xticks=[], yticks=[])
        ax.set_visible(place < count)
        for spine in ax.spines.values():
            spine.set(visible=True, color=RULE)
    return figure, axes


def draw_image(ax: Axes, image: Any, title: str) -> None:
    pixels = array(image).squeeze()
    ax.imshow(pixels, cmap=GREY, vmin=0, vmax=1, interpolation="antialiased")
    ax.set_title(title)


def draw_map(ax: Axes, values: np.ndarray, limit: float, signed: bool, title: str) -> None:
    ax.imshow(values, cmap=SIGNED if signed else POSITIVE, vmin=-limit if signed else 0, vmax=limit)
    ax.set_title(title)
    if not np.isfinite(values).all():
        ax.text(0.5, 0.5, "no map", transform=ax.transAxes, ha="center", va="center", color=SOFT)


def limits(maps: np.ndarray, scale: str, signed: bool) -> np.ndarray:
    """The value of full colour for each map."""
    if scale not in ("map", "row"):
        raise ParameterError(f"scale {scale!r} is unknown; use 'map' or 'row'")
    size = np.where(np.isfinite(maps), np.abs(maps) if signed else np.maximum(maps, 0), 0)
    full = np.array([np.percentile(size if scale == "row" else one, CLIP) or one.max() for one in size])
    return np.where(full > 0, full, 1.0)


def region_of(boxes: Any, mask: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Boxes and mask as one bool mask; None when there is neither."""
    if boxes is None and mask is None:
        return None
    region = box_mask([] if boxes is None else boxes, shape)
    return region if mask is None else region | array(mask).reshape(shape).astype(bool)


def draw_region(ax: Axes, region: np.ndarray | None, truth: Any) -> None:
    """Outlines along pixel edges for boxes, a dashed contour for the exact finding."""
    if region is not None and region.any():
        edges = _edges(region)
        # The rim goes under the whole outline, or each piece would cover its neighbour.
        for look in (RIM, OUTLINE):
            ax.add_collection(LineCollection(edges, capstyle="projecting", **look))
    if truth is not None and (exact := np.pad(array(truth).squeeze(), 1)).any():
        x, y = (np.arange(-1, length - 1) for length in (exact.shape[1], exact.shape[0]))
        for look in (RIM, OUTLINE | {"linestyles": [(0, (3, 2))]}):
            ax.contour(x, y, exact, levels=[0.5], **look)
        ax.set(xlim=(-0.5, exact.shape[1] - 2.5), ylim=(exact.shape[0] - 2.5, -0.5))


def _edges(region: np.ndarray) -> list[list[tuple[float, float]]]:
    """Segments between pixels of which one is inside and the other is not."""
    padded = np.pad(region, 1).astype(int)
    across = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])
    down = np.argwhere(np.diff(padded, axis=1)[1:-1])
    return [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in across] + [
        [(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in down
    ]


def colour_bar(figure: Figure, axes: np.ndarray, limit: float | None, signed: bool) -> None:
    """One slim bar for all maps: with numbers up to ``limit`` where they share a scale, in words where it is None."""
    top = 1.0 if limit is None else float(limit)
    colours = ScalarMappable(Normalize(-top if signed else 0, top), SIGNED if signed else POSITIVE)
    rows = axes[0].get_subplotspec().get_gridspec().nrows
    bar = figure.colorbar(
        colours, ax=axes.tolist(), fraction=0.03, pad=0.015, aspect=16, shrink=0.9 / rows, anchor=(0.0, 0.94)
    )
    ticks = [-top, 0, top] if signed else [0, top]
    words = ["against", "0", "for"] if signed else ["0", "max"]
    bar.set_ticks(ticks, labels=words if limit is None else [f"{tick:.2g}" for tick in ticks])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
