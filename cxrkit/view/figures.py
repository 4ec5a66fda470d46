"""Figures in one style: each function takes arrays or a table and returns a figure with alternative text.

Maps are drawn unsmoothed. Signed ones are red where they speak for a label and blue where they speak against
it, with 0 white; positive ones run from black to yellow. Boxes are outlined, exact findings (where they are
known) are dashed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cxrkit import metrics
from cxrkit.errors import ParameterError
from cxrkit.view import interactive
from cxrkit.view.learning import draw_line, search_trials, training_curves
from cxrkit.view.panels import (
    array,
    broken,
    colour_bar,
    draw_image,
    draw_map,
    draw_region,
    limits,
    panels,
    region_of,
    stack,
)
from cxrkit.view.style import COLOURS, INK, MARKERS, POSITIVE, SOFT, WIDTH, describe, new_figure, style

__all__ = [
    "montage",
    "paper_beside_ours",
    "score_bars",
    "search_trials",
    "show_colours",
    "show_labels",
    "show_maps",
    "show_spectrum",
    "threshold_curves",
    "training_curves",
    "verdict_bars",
]


def show_maps(
    image: Any,
    maps: Any,
    titles: Sequence[str],
    boxes: Any = None,
    mask: Any = None,
    truth: Any = None,
    caption: str = "",
    signed: bool = True,
    scale: str = "map",
    columns: int = 5,
) -> Figure:
    """One image, then its maps: ``image`` ``[H, W]`` or ``[1, H, W]``, ``maps`` ``[M, H, W]``, one title per map.

    ``boxes``: rows x_min, y_min, x_max, y_max in pixels; ``mask`` bool ``[H, W]`` instead: its outline is
    drawn; ``truth`` bool ``[H, W]``: the exact finding. ``scale``: ``"map"`` colours each map by its own values
    (methods measure different things), ``"row"`` all by the same ones (to compare networks). Colours are full
    at the 99.5th percentile of the absolute values.
    """
    maps, titles = stack(maps, "maps"), _names(titles, len(maps), "titles")
    region = region_of(boxes, mask, maps.shape[-2:])
    shown, deep = broken(titles, min(columns, len(maps) + 1))
    with style():
        figure, axes = panels(len(maps) + 1, columns, caption=caption, deep=deep)
        draw_image(axes[0], image, "image")
        full = limits(maps, scale, signed)
        for ax, values, title, limit in zip(axes[1:], maps, shown, full, strict=False):
            draw_map(ax, values, limit, signed, title)
        for ax in axes[: len(maps) + 1]:
            draw_region(ax, region, truth)
        colour_bar(figure, axes, full[0] if scale == "row" else None, signed)
    return describe(figure, _maps_text(maps, titles, region, caption), {"image": array(image).squeeze(), "maps": maps})


def show_colours(image: Any, colours: Any, truth: Any = None, caption: str = "") -> Figure:
    """An image beside a map in colours: ``image`` ``[H, W]``, ``colours`` RGBA in [0, 1], ``[4, H, W]``, on white."""
    colours = array(colours)
    with style():
        figure, axes = panels(2, 2, caption=caption, margin=0.2)
        draw_image(axes[0], image, "image")
        axes[1].imshow(np.moveaxis(colours, 0, -1))
        axes[1].set_title("contributions in colour")
        for ax in axes[:2]:
            draw_region(ax, None, truth)
    share = float((colours[3] > 0.5).mean())
    text = f"{caption}: an image and its coloured contributions, opaque over {share:.0%} of it"
    return describe(figure, text, {"image": array(image).squeeze(), "colours": colours})


def show_labels(
    images: Any,
    maps: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    masks: Any = None,
    truth: Any = None,
    caption: str = "",
    signed: bool = True,
    scale: str = "row",
) -> Figure:
    """A row per image (or label) and a column per method: ``images`` ``[N, H, W]``, ``maps`` ``[N, M, H, W]``.

    ``rows`` and ``columns`` name them; ``masks`` and ``truth``: bool ``[N, H, W]`` or None. ``scale="row"``
    colours the maps of one row alike, ``"map"`` each by its own values.
    """
    maps, images = array(maps), stack(images, "images")
    if maps.ndim != 4 or len(maps) != len(images):
        raise ParameterError(f"maps have shape {maps.shape}; expected [{len(images)}, M, H, W], a row per image")
    rows, columns = _names(rows, len(maps), "rows"), _names(columns, maps.shape[1], "columns")
    regions = [region_of(None, mask, maps.shape[-2:]) for mask in _each(masks, len(maps))]
    truths = _each(truth, len(maps))
    width = len(columns) + 1
    shown, deep = broken(columns, width, 1.0)
    beside = broken(rows, width, 1.0)[0]
    with style():
        figure, axes = panels(width * len(maps), width, titles=1, margin=1.0, caption=caption, deep=deep)
        for row, cells in enumerate(axes.reshape(len(maps), width)):
            draw_image(cells[0], images[row], "image" if row == 0 else "")
            cells[0].set_ylabel(beside[row], labelpad=4)
            full = limits(maps[row], scale, signed)
            for ax, values, title, limit in zip(cells[1:], maps[row], shown, full, strict=True):
                draw_map(ax, values, limit, signed, title if row == 0 else "")
            for ax in cells:
                draw_region(ax, regions[row], truths[row])
        colour_bar(figure, axes, None, signed)
    text = " ".join(_maps_text(maps[row], columns, regions[row], rows[row]) for row in range(len(maps)))
    return describe(figure, f"{caption}. {text}" if caption else text, {"images": images, "maps": maps})


def show_spectrum(maps: Any, titles: Sequence[str], strides: Sequence[int] | None = None, caption: str = "") -> Figure:
    """Maps ``[M, H, W]`` above their power spectra, with the share of energy at the strides' grid frequencies.

    Spectra (under a Hann window) are in decibels below their highest value, frequency 0 in the middle, up to
    half a cycle per pixel; the shares are those of the whole map. See `metrics.grid_energy` for the measure and
    its isotropic level.
    """
    maps, titles = stack(maps, "maps"), _names(titles, len(maps), "titles")
    tensor = torch.as_tensor(maps)
    shares, levels = metrics.grid_energy(tensor, strides), metrics.isotropic_grid_energy(tensor, strides)
    power = metrics.power_spectrum(tensor, window=True).numpy()
    with style():
        figure, axes = panels(2 * len(maps), len(maps), titles=3, margin=1.25, caption=caption)
        full = limits(maps, "map", True)
        for ax, values, limit, title in zip(axes, maps, full, titles, strict=False):
            draw_map(ax, values, limit, True, title)
        below = axes[len(maps) :]
        for ax, values, share, level in zip(below, power, shares, levels, strict=True):
            decibels = 10 * np.log10(np.maximum(values / (values.max() or 1.0), 1e-6))
            shown = ax.imshow(decibels, cmap=POSITIVE, vmin=-60, vmax=0, extent=(-0.5, 0.5, 0.5, -0.5))
            ax.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5), yticklabels=[])
            ax.tick_params(length=2)
            ax.set_title(f"grid {_percent(share)}, isotropic {_percent(level)}", fontsize=8)
        below[0].set_yticklabels(["-0.5", "0", "0.5"])
        below[0].set_ylabel("cycles per pixel")
        bar = figure.colorbar(shown, ax=below.tolist(), fraction=0.04, pad=0.02, aspect=20)
        bar.set_label("power, dB")
        bar.outline.set_visible(False)
    told = "; ".join(
        f"{title} {_percent(share)} (isotropic level {_percent(level)})"
        for title, share, level in zip(titles, shares, levels, strict=True)
    )
    return describe(
        figure, f"{caption} Maps and their power spectra. Energy at grid frequencies: {told}.", {"maps": maps}
    )


def montage(images: Any, captions: Sequence[str] = (), columns: int = 6) -> Figure:
    """Images ``[N, H, W]`` or ``[N, 1, H, W]`` in rows, each under its caption."""
    images = stack(images, "images")
    captions = _names(captions or [""] * len(images), len(images), "captions")
    with style():
        figure, axes = panels(len(images), columns, titles=None if any(captions) else 0, margin=0)
        letters = max(8, int(14 * WIDTH / min(columns, max(len(images), 3))))
        for ax, image, caption in zip(axes, images, captions, strict=False):
            short = caption if len(caption) <= letters else caption[: letters - 1] + "…"
            draw_image(ax, image, short)
            ax.title.set_fontsize(8)
    named = f": {', '.join(captions)}" if any(captions) else ""
    return describe(figure, f"{len(images)} images{named}.", {"images": images})


def threshold_curves(frame: pd.DataFrame, by: str = "method") -> Figure:
    """Energy-based pointing game against the threshold: precision and recall, a line per value of ``by``.

    Columns: ``by``, threshold, precision and recall (or one of them), optionally chance, drawn as a dashed
    line.
    """
    kinds = [kind for kind in ("precision", "recall") if kind in frame]
    _needs(frame, [by, "threshold"], "threshold_curves")
    sentences = []
    with style():
        figure = new_figure(WIDTH, 3.1)
        axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for ax, kind in zip(axes, kinds, strict=True):
            for place, (name, part) in enumerate(frame.groupby(by, sort=False)):
                part = part.sort_values("threshold")
                draw_line(ax, part["threshold"], part[kind], str(name), place)
                ends = _percent(part[kind].iloc[0]), _percent(part[kind].iloc[-1])
                sentences.append(f"{kind} of {name} goes from {ends[0]} to {ends[1]}")
            if kind == "precision" and "chance" in frame:
                ax.axhline(frame["chance"].mean(), color=SOFT, lw=1.2, ls=(0, (4, 3)), label="chance")
            ax.set(xlabel="threshold, share of the map's maximum", title=f"EPG {kind}")
            ax.set_ylim(0, max(1.0, np.nanmax(frame[kinds].to_numpy(), initial=0)) * 1.02)
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            ax.grid(axis="y")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))
    first, last = frame["threshold"].min(), frame["threshold"].max()
    long = frame.melt([by, "threshold"], kinds, "kind", "share")
    if "chance" in frame:
        level = {by: "chance", "threshold": [first, last], "kind": "precision", "share": frame["chance"].mean()}
        long = pd.concat([long, pd.DataFrame(level)])
    across = "threshold, share of the map's maximum"
    live = interactive.curves(long, "threshold", "share", by, "kind", percent="y", up="EPG", across=across)
    return describe(figure, f"As the threshold rises from {first:g} to {last:g}, {'; '.join(sentences)}.", frame, live)


def score_bars(
    frame: pd.DataFrame, name: str = "name", value: str = "EPG", hue: str | None = None, title: str = ""
) -> Figure:
    """A bar per row: its score, its interval and the chance level.

    Columns: ``name``, ``value``, and where there are any: low and high (an interval, drawn as a line), chance
    (a tick across the bar), ``hue`` (colours and a legend). Scores are shares, drawn in percent. Rows without a
    score say so.
    """
    _needs(frame, [name, value, *([hue] if hue else [])], "score_bars")
    hues = list(dict.fromkeys(frame[hue].astype(str))) if hue else [""]
    names = list(dict.fromkeys(frame[name].astype(str)))
    height = 0.8 / len(hues)
    sentences = []
    with style():
        figure = new_figure(WIDTH, 0.85 + max(0.34, 0.2 * len(hues)) * len(names))
        ax = figure.subplots()
        for row in frame.to_dict("records"):
            place = hues.index(str(row[hue])) if hue else 0
            middle = names.index(str(row[name])) + (place - (len(hues) - 1) / 2) * height
            called = f"{row[hue]}, {row[name]}" if hue else str(row[name])
            sentences.append(_bar(ax, row, middle, height, value, _tint(place), called))
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_title(title, loc="left")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        if hue:
            for place, text in enumerate(hues):
                ax.barh(0, 0, color=_tint(place), label=text)
        if "chance" in frame and frame["chance"].notna().any():
            ax.plot([], [], color=INK, lw=1.4, ls=(0, (1, 1)), label="chance")
        if hue or "chance" in frame:
            figure.legend(loc="outside lower center", ncols=6)
    look = {"title": title, "across": value, "percent": "x", "height": 140 + max(34, 20 * len(hues)) * len(names)}
    live = interactive.bars(frame, name, value, hue, lying=True, **look)
    return describe(figure, f"{title + ': ' if title else ''}{'; '.join(sentences)}.", frame, live)


def paper_beside_ours(table: pd.DataFrame, caption: str = "", digits: int | None = 1) -> pd.io.formats.style.Styler:
    """A table of published numbers beside our own, for a page: numbers rounded, gaps as dashes, text escaped.

    Columns whose name holds "ours" are set in bold, so that nobody mistakes one for the other. ``digits``: decimals;
    None: three significant digits, for columns of several units.
    """
    table = table.reset_index(drop=True)  # hidden anyway, and a style needs each row to be told apart
    ours = [column for column in table.columns if "ours" in str(column)]
    numbers = list(table.select_dtypes("number").columns)
    styler = table.style.format(precision=digits, na_rep="–", escape="html").format_index(escape="html", axis=1)
    if digits is None:
        styler = styler.format("{:.3g}", subset=list(table.select_dtypes("float").columns), na_rep="–")
    styler = (
        styler.hide(axis="index")
        .set_properties(padding="0.1em 0.7em")
        .set_properties(subset=ours, **{"font-weight": "600"})
    )
    styler = styler.set_properties(subset=numbers, **{"text-align": "right", "font-variant-numeric": "tabular-nums"})
    return styler.set_caption(escape(caption)) if caption else styler


def _names(names: Sequence[str], count: int, what: str) -> list[str]:
    names = [str(name) for name in names]
    if len(names) != count:
        raise ParameterError(f"{len(names)} {what} for {count}: {names}")
    return names


def _needs(frame: pd.DataFrame, columns: list[str], what: str) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise ParameterError(f"{what} needs the columns {missing}; the table has {list(frame.columns)}")


def _percent(share: float) -> str:
    share = float(share)
    return f"{100 * share:.1f} %" if np.isfinite(share) else "no score"


def _each(stacked: Any, count: int) -> list[Any]:
    """One entry per row; None for each where there is nothing."""
    entries = [None] * count if stacked is None else list(stacked)
    if len(entries) != count:
        raise ParameterError(f"{len(entries)} masks or truths for {count} rows")
    return entries


def _maps_text(maps: np.ndarray, titles: list[str], region: np.ndarray | None, caption: str) -> str:
    start = f"{caption}: image and" if caption else "Image and"
    if region is None or not region.any():
        return f"{start} maps by {', '.join(titles)}."
    tensor, mask = torch.as_tensor(maps), torch.as_tensor(region)
    scores = metrics.energy_pointing_game(tensor, mask)
    told = ", ".join(f"{title} {_percent(score)}" for title, score in zip(titles, scores, strict=True))
    area = _percent(metrics.chance_level(mask))
    return f"{start} maps with the box outlined; positive energy inside it, by map: {told} (the box covers {area})."


def _tint(place: int) -> tuple[float, ...]:
    """A paler colour for areas, on which intervals and chance levels show."""
    return tuple(0.6 * part + 0.4 for part in to_rgb(COLOURS[place % len(COLOURS)]))


def _bar(ax: Axes, row: dict, middle: float, height: float, value: str, colour: Any, called: str) -> str:
    """Draw one row of :func:`score_bars` and say it in words."""
    score = float(row[value])
    if not np.isfinite(score):
        ax.text(0, middle, " no score", va="center", color=SOFT, fontsize=8)
        return f"{called} no score"
    ax.barh(middle, score, height * 0.86, color=colour)
    text, end = f"{called} {_percent(score)}", score
    low, high, chance = (float(row.get(column, np.nan)) for column in ("low", "high", "chance"))
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [middle, middle], color=INK, lw=1.4, solid_capstyle="butt")
        end = max(end, high)
        text += f" ({_percent(low)} to {_percent(high)})"
    if np.isfinite(chance):
        ax.plot([chance] * 2, [middle - height / 2, middle + height / 2], color=INK, lw=1.4, ls=(0, (1, 1)))
        end = max(end, chance)
        text += f", chance {_percent(chance)}"
    ax.annotate(f"{100 * score:.1f}", (end, middle), (4, 0), textcoords="offset points", va="center", fontsize=8)
    return text


_TIMES = (0.03, 30)  # times chance: what lies beyond is drawn at the edge


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
                look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
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
