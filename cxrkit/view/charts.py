"""Plain charts of tables in the style of the other figures: bars in groups, lines with bands, clouds, matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cxrkit.errors import ParameterError
from cxrkit.view.style import COLOURS, INK, MARKERS, SOFT, WIDTH, describe, new_figure, style

__all__ = [
    "clouds",
    "grouped_bars",
    "line_panels",
    "lines",
    "matrix",
    "percent",
    "score_bars",
    "threshold_curves",
    "verdict_bars",
]

_TIMES = (0.03, 30)  # times chance: what lies beyond is drawn at the edge


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
    with style():
        figure = new_figure(WIDTH, 3.1)
        ax = figure.subplots()
        groups = _draw_bars(ax, frame, x, y, by)
        if level is not None:
            ax.axhline(level, color=INK, lw=1.1, ls=(0, (1, 1)))
        long = max(len(name) for name in groups) * len(groups) > 70
        ax.set_xticks(range(len(groups)), groups, rotation=35 if long else 0, ha="right" if long else "center")
        ax.set_ylabel(f"{y} ({unit})" if unit else y)
        ax.set_title(title, loc="left")
        ax.grid(axis="y")
    return describe(figure, f"{title or y}: {_bars_text(frame, x, y, by, '{:.3g}'.format)}.", frame)


def score_bars(
    frame: pd.DataFrame, name: str = "name", value: str = "EPG", hue: str | None = None, title: str = ""
) -> Figure:
    """Lying bars of scores, with their intervals and chance levels.

    Columns: ``name``, ``value``, and where there are any: low and high (an interval, drawn as a line), chance
    (a tick across the bar), ``hue`` (colours and a legend). Scores are shares, drawn in percent. Rows without a
    score say so.
    """
    _needs(frame, [name, value, *([hue] if hue else [])], "score_bars")
    with style():
        hues = frame[hue].nunique() if hue else 1
        figure = new_figure(WIDTH, 0.85 + max(0.34, 0.2 * hues) * frame[name].nunique())
        ax = figure.subplots()
        names = _draw_bars(ax, frame, name, value, hue, lying=True)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_title(title, loc="left")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    text = _bars_text(frame, name, value, hue, percent)
    return describe(figure, f"{title + ': ' if title else ''}{text}.", frame)


def _draw_bars(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str | None, lying: bool = False) -> list[str]:
    """Draw bars, their intervals, chance levels and legend; returns the groups in their order."""
    groups, hues = _distinct(frame[x]), _distinct(frame[by]) if by else [y]
    width, rule = 0.8 / len(hues), {"color": INK, "lw": 1.4, "ls": (0, (1, 1))}
    draw, along, across = (ax.barh, ax.hlines, ax.vlines) if lying else (ax.bar, ax.vlines, ax.hlines)
    for place, hue in enumerate(hues):
        part = frame[frame[by].astype(str) == hue] if by else frame
        at = np.array([groups.index(str(name)) for name in part[x]]) + (place - (len(hues) - 1) / 2) * width
        # Lying bars are paler, so that what is written and drawn on them shows.
        draw(at, part[y], width * 0.92, color=_faint(place) if lying else _colour(place), label=hue)
        if {"low", "high"} <= set(part):
            along(at, part["low"], part["high"], color=INK, lw=1.2, label=f"_{hue}")
        if "chance" in part:
            across(part["chance"], at - width / 2, at + width / 2, label="_chance", **rule)
        if lying:
            ends = part[[name for name in (y, "high", "chance") if name in part]].max(axis=1)
            for middle, score, end in zip(at, part[y], ends, strict=True):
                text, end = (f"{100 * score:.1f}", end) if np.isfinite(score) else ("no score", 0)
                ax.annotate(text, (end, middle), (4, 0), textcoords="offset points", va="center", fontsize=8)
    chance = "chance" in frame and frame["chance"].notna().any()
    if chance:
        ax.plot([], [], label="chance", **rule)
    if by or chance:
        handles, names = ax.get_legend_handles_labels()
        shown = [place for place, name in enumerate(names) if by or name == "chance"]
        entries = [handles[place] for place in shown], [names[place] for place in shown]
        ax.figure.legend(*entries, loc="outside lower center", ncols=5)
    return groups


def _bars_text(frame: pd.DataFrame, x: str, y: str, by: str | None, said: Callable[[float], str]) -> str:
    """Every bar in words, with its interval and chance level."""
    texts = []
    for row in frame.to_dict("records"):
        texts.append(f"{row[x]}{f', {row[by]}' if by else ''} {said(row[y])}")
        if np.isfinite([row[y], row.get("low", np.nan), row.get("high", np.nan)]).all():
            texts[-1] += f" ({said(row['low'])} to {said(row['high'])})"
        if np.isfinite([row[y], row.get("chance", np.nan)]).all():
            texts[-1] += f", chance {said(row['chance'])}"
    return "; ".join(texts)


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    title: str = "",
    columns: str | None = None,
) -> Figure:
    """A line per value of ``by``, a panel per value of ``columns``; columns low and high, if any, are a band."""
    _needs(frame, [x, y, by, *([columns] if columns else [])], "lines")
    with style():
        figure, axes = line_panels(frame, x, y, by, columns)
        axes[0].set_ylabel(y)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    ends = {hue: part.sort_values(x)[y].iloc[[0, -1]] for hue, part in frame.groupby(frame[by].astype(str), sort=False)}
    told = "; ".join(f"{hue} from {first:.3g} to {last:.3g}" for hue, (first, last) in ends.items())
    return describe(figure, f"{title or y} against {x}: {told}.", frame)


def line_panels(
    frame: pd.DataFrame, x: str, y: str, by: str, columns: str | None = None, shared: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per value of ``columns``, a line per value of ``by``, and a legend; call inside `style()`.

    A value of ``by`` has the same colour in every panel. ``shared``: the panels have one scale.
    """
    panels, hues = _distinct(frame[columns]) if columns else [""], _distinct(frame[by])
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure = new_figure(WIDTH, 0.6 + (2.6 if across < 3 else 2.0) * down)
    axes = figure.subplots(down, across, sharey=shared, squeeze=False).ravel().tolist()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax, name in zip(axes, panels, strict=False):
        shown = frame[frame[columns].astype(str) == name] if columns else frame
        for place, hue in enumerate(hues):
            part = shown[shown[by].astype(str) == hue].sort_values(x)
            if part.empty:
                continue
            look = {"color": _colour(place), "marker": MARKERS[place % len(MARKERS)], "mec": "white", "mew": 0.6}
            ax.plot(part[x], part[y].astype(float), label=hue, **look)
            if {"low", "high"} <= set(part):
                band = {"color": _colour(place), "alpha": 0.15, "lw": 0, "label": f"_{hue}"}
                ax.fill_between(part[x], part["low"], part["high"], **band)
        ax.set(xlabel=x, title=name)
        ax.grid()
    _legend(figure, axes)
    return figure, axes[: len(panels)]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, each name once."""
    entries = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=5)


def threshold_curves(frame: pd.DataFrame, by: str = "method") -> Figure:
    """Energy-based pointing game against the threshold: precision and recall, a line per value of ``by``.

    Columns: ``by``, threshold, precision and recall (or one of them), optionally chance, drawn as a dashed line.
    """
    kinds = [kind for kind in ("precision", "recall") if kind in frame]
    _needs(frame, [by, "threshold"], "threshold_curves")
    long = frame.melt([by, "threshold"], kinds, "kind", "share")
    with style():
        figure, axes = line_panels(long.assign(kind="EPG " + long["kind"]), "threshold", "share", by, "kind")
        for ax in axes:
            ax.set(xlabel="threshold, share of the map's maximum")
            ax.set_ylim(0, max(1.0, np.nanmax(long["share"], initial=0)) * 1.02)
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if "chance" in frame and kinds[0] == "precision":
            axes[0].axhline(frame["chance"].mean(), color=SOFT, lw=1.2, ls=(0, (4, 3)), label="chance")
            figure.legends[0].remove()
            _legend(figure, axes)
    sentences = []
    for (kind, name), part in long.groupby(["kind", by], sort=False):
        shares = part.sort_values("threshold")["share"]
        sentences.append(f"{kind} of {name} goes from {percent(shares.iloc[0])} to {percent(shares.iloc[-1])}")
    first, last = frame["threshold"].min(), frame["threshold"].max()
    return describe(figure, f"As the threshold rises from {first:g} to {last:g}, {'; '.join(sentences)}.", frame)


def verdict_bars(questions: Mapping[str, pd.DataFrame]) -> Figure:
    """For each question a panel: by method the share of positive mass over chance, on a logarithmic scale.

    Tables have the columns network, world, method, share, low, high, chance; a colour for each network and world.
    """
    asked = {question: table for question, table in questions.items() if len(table)}
    methods = list(dict.fromkeys(name for table in asked.values() for name in table["method"]))
    with style():
        figure = new_figure(WIDTH, 1.8 + 0.26 * len(methods))
        axes = np.atleast_1d(figure.subplots(1, len(asked), sharey=True))
        for ax, (question, table) in zip(axes, asked.items(), strict=True):
            groups = list(table.groupby(["network", "world"], sort=False))
            for place, ((network, world), part) in enumerate(groups):
                y = np.array([methods.index(name) for name in part["method"]]) + (place - (len(groups) - 1) / 2) * 0.18
                low, mid, high = ((part[name] / part["chance"]).clip(*_TIMES) for name in ("low", "share", "high"))
                look = {"color": _colour(place), "marker": MARKERS[place % len(MARKERS)]}
                name = network if world == "none" else f"{network}; {world.replace('_', ' ')}"
                bars = np.clip(np.array([mid - low, high - mid]), 0, None)
                ax.errorbar(mid, y, xerr=bars, linestyle="none", markersize=4, label=name, **look)
            ax.axvline(1, color=INK, linewidth=0.8)
            ax.set(xscale="log", xlim=(_TIMES[0] / 1.3, _TIMES[1] * 1.3), xlabel="times chance", title=question)
            ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
            ax.minorticks_off()
            ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(-0.1, -0.1))
        axes[0].set_yticks(range(len(methods)), methods)
        axes[0].invert_yaxis()
    told = "; ".join(f"{q}: {_best(table)} is highest" for q, table in asked.items())
    drawn = pd.concat([table.assign(question=question) for question, table in asked.items()])
    return describe(figure, f"Share of positive mass over chance, by method. {told}", drawn)


def _best(table: pd.DataFrame) -> str:
    ratio = (table["share"] / table["chance"]).fillna(0).to_numpy()
    return str(table["method"].iloc[int(ratio.argmax())])


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
    return describe(figure, f"{caption or 'Points'}: {len(groups)} points of {', '.join(names)}.", data)


def matrix(values: Any, rows: Sequence[str], columns: Sequence[str], title: str = "", digits: int = 0) -> Figure:
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
    data = pd.DataFrame(values, columns=list(columns)).assign(row=list(rows))
    return describe(figure, f"{title or 'Table'}: {told}.", data)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _distinct(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values.astype(str)))


def _needs(frame: pd.DataFrame, columns: list[str], what: str) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise ParameterError(f"{what} needs the columns {missing}; the table has {list(frame.columns)}")


def percent(share: float) -> str:
    """A share in words: percent with one decimal, or "no score" for nan."""
    share = float(share)
    return f"{100 * share:.1f} %" if np.isfinite(share) else "no score"


def _faint(place: int) -> tuple[float, ...]:
    """A paler colour for areas, on which intervals and chance levels show."""
    return tuple(0.6 * part + 0.4 for part in to_rgb(_colour(place)))
