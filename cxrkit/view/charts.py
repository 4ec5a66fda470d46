"""Plain charts of tables in the style of the other figures: bars in groups, lines with bands, clouds, matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxrkit.errors import ParameterError
from cxrkit.view import interactive
from cxrkit.view.style import COLOURS, INK, MARKERS, WIDTH, describe, new_figure, style

__all__ = ["clouds", "grouped_bars", "lines", "matrix"]


def grouped_bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str | None = None,
    title: str = "",
    unit: str = "",
    level: float | None = None,
) -> Figure:
    """Upright bars: a group per value of ``x``, a colour per value of ``by``, height ``y``.

    Columns low and high, where there are any, are drawn as intervals; ``level``: a dotted line at this height.
    """
    _needs(frame, [x, y, *([by] if by else [])], "grouped_bars")
    groups, hues = _distinct(frame[x]), _distinct(frame[by]) if by else [y]
    width = 0.8 / len(hues)
    with style():
        figure = new_figure(WIDTH, 3.1)
        ax = figure.subplots()
        for place, hue in enumerate(hues):
            part = frame[frame[by].astype(str) == hue] if by else frame
            at = np.array([groups.index(str(name)) for name in part[x]]) + (place - (len(hues) - 1) / 2) * width
            ax.bar(at, part[y], width * 0.92, color=_colour(place), label=hue)
            if {"low", "high"} <= set(part):
                ax.vlines(at, part["low"], part["high"], color=INK, lw=1.2)
        if level is not None:
            ax.axhline(level, color=INK, lw=1.1, ls=(0, (1, 1)))
        long = max(len(name) for name in groups) * len(groups) > 70
        ax.set_xticks(range(len(groups)), groups, rotation=35 if long else 0, ha="right" if long else "center")
        ax.set_ylabel(f"{y} ({unit})" if unit else y)
        ax.set_title(title, loc="left")
        ax.grid(axis="y")
        if by:
            figure.legend(loc="outside lower center", ncols=5)
    told = "; ".join(f"{row[x]}{f', {row[by]}' if by else ''} {row[y]:.3g}" for row in frame.to_dict("records")[:24])
    live = interactive.bars(frame, x, y, by, level, title=title, up=f"{y} ({unit})" if unit else y)
    return describe(figure, f"{title or y}: {told}.", frame, live)


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    title: str = "",
    columns: str | None = None,
    level: float | None = None,
) -> Figure:
    """A line per value of ``by``, a panel per value of ``columns``; columns low and high, if any, are a band."""
    _needs(frame, [x, y, by, *([columns] if columns else [])], "lines")
    panels, hues = _distinct(frame[columns]) if columns else [""], _distinct(frame[by])
    with style():
        across = min(len(panels), 4)
        down = -(-len(panels) // across)
        figure = new_figure(WIDTH, 0.6 + (2.6 if across < 3 else 2.0) * down)
        axes = np.atleast_1d(figure.subplots(down, across, sharey=True, squeeze=False)).ravel()
        for ax, name in zip(axes, panels, strict=False):
            shown = frame[frame[columns].astype(str) == name] if columns else frame
            for place, hue in enumerate(hues):
                part = shown[shown[by].astype(str) == hue].sort_values(x)
                ax.plot(part[x], part[y], color=_colour(place), marker=MARKERS[place % len(MARKERS)], label=hue)
                if {"low", "high"} <= set(part):
                    ax.fill_between(part[x], part["low"], part["high"], color=_colour(place), alpha=0.15, lw=0)
            if level is not None:
                ax.axhline(level, color=INK, lw=1.1, ls=(0, (1, 1)))
            ax.set(xlabel=x, title=name)
            ax.grid()
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        axes[0].set_ylabel(y)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ends = (frame[frame[by].astype(str) == hue].sort_values(x)[y].iloc[[0, -1]] for hue in hues)
    told = "; ".join(f"{hue} from {first:.3g} to {last:.3g}" for hue, (first, last) in zip(hues, ends, strict=True))
    live = interactive.curves(frame, x, y, by, columns, level, title=title)
    return describe(figure, f"{title or y} against {x}: {told}.", frame, live)


def clouds(points: Any, groups: Sequence[str], titles: Sequence[str] = ("",), caption: str = "") -> Figure:
    """Points in the plane, one colour and one mark per group: ``[N, 2]``, or several clouds of the same N in a list."""
    stack = [np.asarray(one, dtype=float) for one in (points if isinstance(points, list | tuple) else [points])]
    if any(one.shape != (len(groups), 2) for one in stack) or len(titles) != len(stack):
        raise ParameterError(
            f"clouds needs [{len(groups)}, 2] points for as many groups, and a title each; got "
            f"{[one.shape for one in stack]} and {len(titles)} titles"
        )
    names = list(dict.fromkeys(map(str, groups)))
    own = np.array([names.index(str(group)) for group in groups])
    with style():
        figure = new_figure(WIDTH, WIDTH / max(2, len(stack)) + 0.5)
        for ax, one, title in zip(np.atleast_1d(figure.subplots(1, len(stack))), stack, titles, strict=True):
            for place, name in enumerate(names):
                of = own == place
                mark = MARKERS[place % len(MARKERS)]
                ax.scatter(*one[of].T, s=14, color=_colour(place), marker=mark, lw=0, alpha=0.8, label=name)
            ax.set(xticks=[], yticks=[], title=title)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    data = pd.concat(
        [
            pd.DataFrame(one, columns=["x", "y"]).assign(group=list(groups), panel=t)
            for one, t in zip(stack, titles, strict=True)
        ]
    )
    live = interactive.points(stack, groups, titles)
    return describe(figure, f"{caption or 'Points'}: {len(groups)} points of {', '.join(names)}.", data, live)


def matrix(
    values: Any, rows: Sequence[str], columns: Sequence[str], title: str = "", digits: int = 0, of: str = ""
) -> Figure:
    """A table as tinted cells with its numbers written in, such as a confusion matrix (rows: truth)."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ParameterError(f"values {values.shape} do not fit {len(rows)} rows and {len(columns)} columns")
    with style():
        figure = new_figure(min(WIDTH, 2.2 + 0.75 * len(columns)), 1.2 + 0.42 * len(rows))
        ax = figure.subplots()
        ax.imshow(values, cmap="Blues", aspect="auto", vmin=min(0, np.nanmin(values)))
        middle = np.nanmax(values) / 2
        for (row, column), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{value:.{digits}f}"
            ax.text(column, row, text, ha="center", va="center", color="white" if value > middle else INK)
        long = sum(map(len, map(str, columns))) > 40
        ax.set_xticks(range(len(columns)), columns, rotation=35 if long else 0, ha="right" if long else "center")
        ax.set_yticks(range(len(rows)), rows)
        ax.set_title(title, loc="left")
        for side in ax.spines.values():
            side.set_visible(False)
        ax.tick_params(length=0)
    told = "; ".join(f"{r}, {c}: {values[i, j]:.{digits}f}" for i, r in enumerate(rows) for j, c in enumerate(columns))
    data = pd.DataFrame(values, columns=list(columns)).assign(**{of or "row": list(rows)})
    live = interactive.cells(values, rows, columns, digits, title=title)
    return describe(figure, f"{title or 'Table'}: {told}.", data, live)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _distinct(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values.astype(str)))


def _needs(frame: pd.DataFrame, columns: list[str], what: str) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise ParameterError(f"{what} needs the columns {missing}; the table has {list(frame.columns)}")
