"""Charts that answer to the pointer: values under it, lines switched on and off, a part drawn larger.

Each is a plotly figure of the table that a picture was drawn from. In the book it takes the picture's place when that
comes into view (``interactive.js``); the picture stays for print, and wherever no script runs.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cxrkit.view.style import COLOURS, INK

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["bars", "cells", "curves", "points", "script", "to_json"]

_BAND = 0.15  # opacity
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
_LINE = {"color": INK, "width": 1.2, "dash": "dot"}


def bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str | None = None,
    level: float | None = None,
    lying: bool = False,
    **look: Any,
) -> Figure:
    """Bars in groups, with the columns low and high as intervals and a tick at chance, where there are such columns.

    ``lying``: from left to right; ``look``: see `_laid_out`.
    """
    figure = _empty()
    for place, (name, part) in enumerate(_parts(frame, by)):
        across, along = ("y", "x") if lying else ("x", "y")
        known = {"name": name, "showlegend": bool(name), "marker_color": _colour(place)}
        trace = known | {across: part[x].map(_plain), along: part[y]}
        if {"low", "high"} <= set(part):
            reach = {"array": part["high"] - part[y], "arrayminus": part[y] - part["low"], "symmetric": False}
            trace[f"error_{along}"] = reach | {"thickness": 1.2, "width": 0, "color": INK}
        figure.add_bar(**trace, orientation="h" if lying else "v")
    if (none := frame[frame[y].isna()]).size:
        places = dict(zip(("y", "x") if lying else ("x", "y"), (none[x].map(_plain), [0] * len(none)), strict=True))
        where = "middle right" if lying else "top center"
        figure.add_scatter(**places, mode="text", text="no score", textposition=where, showlegend=False)
    if "chance" in frame and frame["chance"].notna().any():
        mark = {"symbol": "line-ns" if lying else "line-ew", "size": 18, "line": {"color": INK, "width": 1.4}}
        places = {"y": frame[x].map(_plain), "x": frame["chance"]}
        if not lying:
            places = dict(zip("xy", places.values(), strict=True))
        figure.add_scatter(**places, mode="markers", marker=mark, name="chance")
    (figure.update_yaxes if lying else figure.update_xaxes)(showgrid=False)
    if lying:
        figure.update_yaxes(autorange="reversed")
    _rule(figure, level, upright=lying)
    return _laid_out(figure, **look)


def curves(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str | None = None,
    columns: str | None = None,
    level: float | None = None,
    shared: bool = True,
    linked: bool = True,
    **look: Any,
) -> Figure:
    """A line per value of ``by``, a panel per value of ``columns``, with the columns low and high as bands.

    ``shared``: the panels have one scale; ``linked``: points are joined.
    """
    panels = list(dict.fromkeys(frame[columns].astype(str))) if columns else [""]
    figure = _empty([_plain(panel) for panel in panels], shared)
    listed: set[str] = set()
    for at, panel in enumerate(panels):
        shown = frame[frame[columns].astype(str) == panel] if columns else frame
        row, column = divmod(at, _across(panels))
        for place, (name, part) in enumerate(_parts(shown, by, of=frame)):
            if part.empty:
                continue
            known = {"name": name, "legendgroup": name, "showlegend": bool(name) and name not in listed}
            listed.add(name)
            _line(figure, part.sort_values(x), x, y, place, known, {"row": row + 1, "col": column + 1}, linked)
    _rule(figure, level)
    return _laid_out(figure, **{"across": x, "up": y} | look, rows=-(-len(panels) // _across(panels)))


def points(clouds: Sequence[np.ndarray], groups: Sequence[str], titles: Sequence[str], **look: Any) -> Figure:
    """Clouds of points ``[N, 2]`` side by side, a colour and a mark per group."""
    figure = _empty([_plain(title) for title in titles])
    own = np.array([_plain(group) for group in groups])
    for column, cloud in enumerate(clouds, start=1):
        for place, name in enumerate(dict.fromkeys(own)):
            x, y = np.asarray(cloud, dtype=np.float32)[own == name].T
            mark = {"color": _colour(place), "symbol": _SYMBOLS[place % len(_SYMBOLS)], "size": 6}
            known = {"name": name, "legendgroup": name, "showlegend": column == 1, "hovertemplate": name}
            figure.add_scatter(x=x, y=y, mode="markers", marker=mark, **known, row=1, col=column)
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    return _laid_out(figure, **look)


def cells(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], digits: int = 0, **look: Any) -> Figure:
    """A table as tinted cells with their numbers."""
    figure = _empty()
    written = [["–" if np.isnan(value) else f"{value:.{digits}f}" for value in row] for row in values]
    told = "%{y}<br>%{x}<br><b>%{text}</b><extra></extra>"
    known = {"text": written, "texttemplate": "%{text}", "hovertemplate": told, "colorscale": "Blues"}
    figure.add_heatmap(z=values, x=[*map(_plain, columns)], y=[*map(_plain, rows)], showscale=False, **known)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(type="category", showgrid=False)
    return _laid_out(figure, **{"height": 120 + 44 * len(rows)} | look)


def to_json(figure: Figure) -> str:
    """The figure for a page: data and layout, safe inside a ``script`` element."""
    return figure.to_json().replace("<", "\\u003c")


@cache
def script() -> str:
    """What turns a page's pictures into their charts; it loads the library when the first comes into view."""
    return files("cxrkit.view").joinpath("interactive.js").read_text(encoding="utf-8")


def _empty(panels: Sequence[str] = ("",), shared: bool = True) -> Figure:
    from plotly.subplots import make_subplots

    across = _across(panels)
    down = -(-len(panels) // across)
    figure = make_subplots(down, across, shared_yaxes=shared, subplot_titles=panels if any(panels) else None)
    return figure.update_layout(template="none")


def _across(panels: Sequence[str]) -> int:
    return min(len(panels), 4)


def _parts(frame: pd.DataFrame, by: str | None, of: pd.DataFrame | None = None) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each value of ``by`` that the whole table ``of`` holds, in its order: a value keeps its colour."""
    if by is None:
        return [("", frame)]
    names = dict.fromkeys((frame if of is None else of)[by].astype(str))
    return [(_plain(name), frame[frame[by].astype(str) == name]) for name in names]


def _line(
    figure: Figure, part: pd.DataFrame, x: str, y: str, place: int, known: dict, cell: dict, linked: bool
) -> None:
    colour = _colour(place)
    if {"low", "high"} <= set(part):
        edge = known | {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=part[x], y=part["low"], **edge, **cell)
        figure.add_scatter(x=part[x], y=part["high"], fill="tonexty", fillcolor=_faint(colour), **edge, **cell)
    look = {"mode": "lines+markers" if linked else "markers", "line_color": colour}
    mark = {"symbol": _SYMBOLS[place % len(_SYMBOLS)], "size": 7, "color": colour}
    figure.add_scatter(x=part[x], y=part[y], **look, marker=mark, **known, **cell)


def _rule(figure: Figure, level: float | None, upright: bool = False) -> None:
    if level is not None:
        (figure.add_vline if upright else figure.add_hline)(level, line=_LINE)


def _laid_out(
    figure: Figure,
    title: str = "",
    across: str = "",
    up: str = "",
    percent: str = "",
    height: int = 340,
    rows: int = 1,
) -> Figure:
    """``across`` and ``up``: the axes' names; ``percent``: the axis, "x" or "y", whose numbers are shares."""
    listed = any(trace.showlegend is not False and trace.type != "heatmap" for trace in figure.data)
    figure.update_layout(
        title={"text": _plain(title), "x": 0.01, "font_size": 14} if title else None,
        height=height + 200 * (rows - 1),
        margin={"l": 60, "r": 12, "t": 48 if title else 28, "b": 84 if listed else 54},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True, zeroline=False)
    figure.update_xaxes(title_text=_plain(across), row=rows)
    figure.update_yaxes(title_text=_plain(up), col=1)
    if percent:
        (figure.update_xaxes if percent == "x" else figure.update_yaxes)(tickformat=".0%")
    return figure


def _plain(text: object) -> str:
    """A name as text: plotly reads names as a small HTML."""
    return html.escape(str(text), quote=False)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{_BAND})"
