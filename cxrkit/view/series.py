"""The series of a chart: points of lines, clouds, bars, bands and intervals, as a table and for the page's script.

A chart is drawn once, by matplotlib. A page holds it as SVG, which is printed and needs no script; the page's script
(``charts.js``) reads values under the pointer, switches series on and off, and enlarges a part.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, PercentFormatter

__all__ = ["Series", "script", "series_of", "series_table", "svg_chart"]

MOST_POINTS = 3000  # of a chart in SVG; one with more is a picture


@dataclass(frozen=True)
class Series:
    """Points ``[N, 2]`` of a panel in data coordinates; ``artists``: one that draws them all, or a bar for each.

    A name that begins with "_" isn't listed in the legend; without the "_" it is the series that it belongs to.
    """

    ax: Axes
    name: str
    points: np.ndarray
    artists: list[Artist]


def series_of(ax: Axes) -> Iterator[Series]:
    """Everything in a panel that stands for data: lines, bars, clouds, bands, intervals; not rules across the panel."""
    names = {child: container.get_label() for container in ax.containers for child in container.get_children()}
    for line in ax.lines:
        if line.get_transform() == ax.transData and len(line.get_xydata()):
            yield Series(ax, names.get(line, line.get_label()), np.asarray(line.get_xydata(), dtype=float), [line])
    for bars in ax.containers:
        if isinstance(bars, BarContainer) and len(bars):
            named = bars[0] if bars.get_label().startswith("_container") else bars  # a histogram labels its first bar
            yield Series(ax, named.get_label(), np.array([_end(bar, bars.orientation) for bar in bars]), list(bars))
    for one in ax.collections:
        name = names.get(one, one.get_label())
        if isinstance(one, PathCollection):
            points = np.ma.filled(np.ma.asarray(one.get_offsets(), dtype=float), np.nan)
            yield Series(ax, name, points, [one])
        elif isinstance(one, PolyCollection if ax.images else (PolyCollection, LineCollection)) and one.get_paths():
            yield Series(ax, name, np.concatenate([path.vertices for path in one.get_paths()]), [one])


def _end(bar: Artist, orientation: str) -> tuple[float, float]:
    if orientation == "horizontal":
        return bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2
    return bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()


def series_table(figure: Figure) -> pd.DataFrame | None:
    """Table of a figure's series with the columns panel, series, x, y; None for a figure without any."""
    rows = [
        pd.DataFrame(
            {"panel": ax.get_title() or place, "series": str(one.name).lstrip("_")}, index=range(len(points))
        ).assign(x=points[:, 0], y=points[:, 1])
        for place, ax in enumerate(figure.axes)
        for one in series_of(ax)
        if len(points := one.points)
    ]
    return pd.concat(rows, ignore_index=True) if rows else None


def svg_chart(figure: Figure) -> tuple[str, str] | None:
    """A chart as SVG, and as JSON its series with their points and values; call inside ``style()``.

    Points are shares of the figure's width and height, from the upper left. None for a figure that shows images or
    has more than ``MOST_POINTS`` points.
    """
    series = [one for ax in figure.axes for one in series_of(ax)]
    if any(ax.images for ax in figure.axes) or sum(len(one.points) for one in series) > MOST_POINTS:
        return None
    entries = _legend_entries(figure)
    names = [one.name for one in series if not one.name.startswith("_")] + [text.get_text() for text, _ in entries]
    places = {name: place for place, name in enumerate(dict.fromkeys(["", *names]))}
    count = [0] * len(places)
    for one in series:
        place = places.get(one.name.lstrip("_"), 0)
        _identify(one.artists, place, count[place])
        count[place] += len(one.points)
    for number, (text, key) in enumerate(entries):
        text.set_gid(f"legend-{places[text.get_text()]}-{number}")
        if isinstance(key, Artist):
            key.set_gid(f"key-{places[text.get_text()]}-{number}")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    found = [{"name": name, "points": []} for name in places]
    for one in series:  # whose places are known once the figure has been laid out
        found[places.get(one.name.lstrip("_"), 0)]["points"] += _points(one, figure)
    return stream.getvalue(), json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _identify(artists: list[Artist], place: int, first: int) -> None:
    """Give artists the ids by which the script finds the series, and of a bar its point."""
    kind = "bar" if len(artists) > 1 or hasattr(artists[0], "get_height") else "mark"
    for number, artist in enumerate(artists, start=first):
        artist.set_gid(f"{kind}-{place}-{number}")


def _legend_entries(figure: Figure) -> list[tuple[Text, Any]]:
    """Text and key of every entry of a figure's legends."""
    legends = [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]
    return [entry for one in legends for entry in zip(one.get_texts(), one.legend_handles, strict=True)]


def _points(series: Series, figure: Figure) -> list[tuple[float, float, str] | None]:
    """Of each point its place and its values in words; None for one that isn't in the panel."""
    ax = series.ax
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = ax.transData.transform(series.points)
    (left, bottom), (right, top) = ax.bbox.get_points()
    inside = (pixels >= (left - 1, bottom - 1)).all(1) & (pixels <= (right + 1, top + 1)).all(1)
    shares = (pixels / figure.bbox.size).round(4)
    words = _words(ax, series.points)
    return [(x, round(1 - y, 4), text) if ok else None for (x, y), text, ok in zip(shares, words, inside, strict=True)]


def _words(ax: Axes, points: np.ndarray) -> list[str]:
    """Values of points as a reader of the axes says them: the category first, where there is one."""
    across, up = (_Scale(axis, values) for axis, values in ((ax.xaxis, points[:, 0]), (ax.yaxis, points[:, 1])))
    first, second = (up, across) if up.categories else (across, up)
    join = ": " if first.categories else ", "
    return [join.join(filter(None, pair)) for pair in zip(first.texts, second.texts, strict=True)]


class _Scale:
    """Values of one axis as texts: names of categories, percent, or numbers; empty where the axis has no ticks."""

    def __init__(self, axis: Axis, values: np.ndarray):
        ticks, fixed = axis.get_majorticklocs(), isinstance(axis.get_major_locator(), FixedLocator)
        names = [label.get_text() for label in axis.get_ticklabels()] if fixed and len(ticks) else []
        self.categories = any(names) and not all(map(_same_number, names, ticks))
        values = np.nan_to_num(values)
        if self.categories:
            nearest = np.abs(values[:, None] - np.asarray(ticks)).argmin(1)
            self.texts = [names[place] for place in nearest]
        elif isinstance(axis.get_major_formatter(), PercentFormatter):
            self.texts = [f"{value:.1%}" for value in values]
        else:
            self.texts = [f"{value:.4g}" if len(ticks) else "" for value in values]


def _same_number(text: str, value: float) -> bool:
    try:
        return math.isclose(float(text), value)
    except ValueError:
        return False


@cache
def script() -> str:
    """The script that makes a page's charts answer to the pointer."""
    return files("cxrkit.view").joinpath("charts.js").read_text(encoding="utf-8")
