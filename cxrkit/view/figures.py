"""Figures in one style: each function takes arrays or a table and returns a figure with alternative text.

Maps are drawn unsmoothed. Signed ones are red where they speak for a label and blue where they speak against
it, with 0 white; positive ones run from black to yellow. Boxes are outlined, exact findings (where they are
known) are dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from cxrkit import metrics
from cxrkit.errors import ParameterError
from cxrkit.view.charts import percent, score_bars, threshold_curves, verdict_bars
from cxrkit.view.codec import array
from cxrkit.view.panels import broken, colour_bar, draw_image, draw_map, draw_region, limits, panels, region_of, stack
from cxrkit.view.style import POSITIVE, WIDTH, describe, style
from cxrkit.view.training_charts import search_trials, training_curves

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
        full = limits(maps, scale, signed)
        _draw_row(axes, image, maps, ["image", *shown], full, signed, region, truth)
        colour_bar(figure, axes, full[0] if scale == "row" else None, signed)
    return describe(figure, _maps_text(maps, titles, region, caption), {"image": array(image).squeeze(), "maps": maps})


def _draw_row(
    axes: np.ndarray, image: Any, maps: np.ndarray, titles: Sequence[str], full: np.ndarray, signed: bool,
    region: np.ndarray | None, truth: Any,
) -> None:  # fmt: skip
    """An image and its maps, each with its title and the outlines."""
    draw_image(axes[0], image, titles[0])
    for ax, values, title, limit in zip(axes[1:], maps, titles[1:], full, strict=False):
        draw_map(ax, values, limit, signed, title)
    for ax in axes[: len(maps) + 1]:
        draw_region(ax, region, truth)


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
            above = ["image", *shown] if row == 0 else [""] * width
            full = limits(maps[row], scale, signed)
            _draw_row(cells, images[row], maps[row], above, full, signed, regions[row], truths[row])
            cells[0].set_ylabel(beside[row], labelpad=4)
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
            ax.set_title(f"grid {percent(share)}, isotropic {percent(level)}", fontsize=8)
        below[0].set_yticklabels(["-0.5", "0", "0.5"])
        below[0].set_ylabel("cycles per pixel")
        bar = figure.colorbar(shown, ax=below.tolist(), fraction=0.04, pad=0.02, aspect=20)
        bar.set_label("power, dB")
        bar.outline.set_visible(False)
    told = "; ".join(
        f"{title} {percent(share)} (isotropic level {percent(level)})"
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
    told = ", ".join(f"{title} {percent(score)}" for title, score in zip(titles, scores, strict=True))
    area = percent(metrics.chance_level(mask))
    return f"{start} maps with the box outlined; positive energy inside it, by map: {told} (the box covers {area})."
