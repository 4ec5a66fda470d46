"""Figures that only paper `path` needs: samples with the finding outlined, an outline in two readings, saturation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrkit.errors import ParameterError
from cxrkit.view.panels import array, draw_image, draw_region, panels, stack
from cxrkit.view.style import COLOURS, SOFT, WIDTH, describe, new_figure, style

__all__ = ["outlined", "two_readings", "two_scales"]


def outlined(images: Any, regions: Any, captions: Sequence[str], columns: int = 4) -> Figure:
    """Images ``[N, H, W]`` or ``[N, 1, H, W]`` under their captions, with the edge of regions bool ``[N, H, W]``.

    Raises ParameterError unless there are as many regions and captions as images.
    """
    images, regions = stack(images, "images"), array(regions)
    if regions.shape != images.shape or len(captions) != len(images):
        raise ParameterError(
            f"images {images.shape}, regions {regions.shape} and {len(captions)} captions do not belong together"
        )
    with style():
        figure, axes = panels(len(images), columns, margin=0)
        for ax, image, region, caption in zip(axes, images, regions, captions, strict=False):
            draw_image(ax, image, caption)
            ax.title.set_fontsize(8)
            draw_region(ax, None, region)
    marked = int(regions.any((1, 2)).sum())
    text = f"{len(images)} images, {marked} with an outlined finding: {', '.join(captions)}."
    return describe(figure, text, {"images": images, "regions": regions > 0, "captions": np.array(captions, dtype=str)})


def two_readings(image: Any, right: np.ndarray, coded: np.ndarray) -> Figure:
    """One image ``[H, W]`` with an outline read in two ways: points (x, y) ``[N, 2]`` as stored and as coded."""
    with style():
        figure, axes = panels(2, 2, margin=0)
        titles = ("steps of two, as stored", "steps of one, as coded")
        for ax, points, title in zip(axes, (right, coded), titles, strict=True):
            draw_image(ax, image, title)
            ax.plot(*np.asarray(points).T, ".", markersize=2.5, color=COLOURS[1])
            height, width = np.asarray(array(image)).squeeze().shape
            ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    text = "An outline read in steps of two lies on the finding; in steps of one it appears mirrored too."
    points = {"as_stored": np.asarray(right), "as_coded": np.asarray(coded)}
    return describe(figure, text, {"image": array(image).squeeze(), **points})


def two_scales(frame: pd.DataFrame, x: str, left: str, right: str, title: str = "") -> Figure:
    """Two columns against ``x`` in one panel, each with an axis of its own at its side."""
    if missing := [column for column in (x, left, right) if column not in frame]:
        raise ParameterError(f"two_scales needs the columns {missing}; the table has {list(frame.columns)}")
    with style():
        figure = new_figure(WIDTH * 0.75, 2.8)
        ax = figure.subplots()
        other = ax.twinx()
        for axis, column, colour in ((ax, left, COLOURS[0]), (other, right, COLOURS[1])):
            axis.plot(frame[x], frame[column], color=colour, marker="o")
            axis.set_ylabel(column, color=colour)
            axis.set_ylim(bottom=0)
        other.spines["right"].set(visible=True, color=SOFT)
        ax.set(xlabel=x)
        ax.set_title(title, loc="left")
    ends = ", ".join(f"{name} from {frame[name].iloc[0]:.3g} to {frame[name].iloc[-1]:.3g}" for name in (left, right))
    return describe(figure, f"{title or 'Two quantities'} against {x}: {ends}.", frame)
