"""Figures in one style: each function takes arrays or a table and returns a figure with alternative text, showing nothing.

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
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cxrkit import metrics
from cxrkit.errors import ParameterError
from cxrkit.view.style import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    OUTLINE,
    POSITIVE,
    RULE,
    SIGNED,
    SOFT,
    WIDTH,
    describe,
    new_figure,
    style,
)

__all__ = [
    "montage",
    "paper_beside_ours",
    "score_bars",
    "show_labels",
    "show_maps",
    "show_spectrum",
    "threshold_curves",
    "training_curves",
]

LARGEST_PANEL = 2.4  # inches
CLIP = 99.5  # percentile of |map| at which colours are full, as paper `bcos` draws its maps


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
    maps, titles = _stack(maps, "maps"), _names(titles, len(maps), "titles")
    region = _region(boxes, mask, maps.shape[-2:])
    with style():
        figure, axes, panel = _panels(len(maps) + 1, columns)
        _draw_image(axes[0], image, "image")
        limits = _limits(maps, scale, signed)
        for ax, values, title, limit in zip(axes[1:], maps, titles, limits, strict=False):
            _draw_map(ax, values, limit, signed, title)
        for ax in axes[: len(maps) + 1]:
            _draw_region(ax, region, truth)
        _colour_bar(figure, axes, limits, signed, scale, panel)
        _caption(figure, caption)
    return describe(figure, _maps_text(maps, titles, region, caption))


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
    maps, images = _array(maps), _stack(images, "images")
    if maps.ndim != 4 or len(maps) != len(images):
        raise ParameterError(f"maps have shape {maps.shape}; expected [{len(images)}, M, H, W], a row per image")
    rows, columns = _names(rows, len(maps), "rows"), _names(columns, maps.shape[1], "columns")
    regions = [_region(None, None if masks is None else masks[row], maps.shape[-2:]) for row in range(len(maps))]
    with style():
        width = len(columns) + 1
        figure, axes, panel = _panels(width * len(maps), width)
        grid = axes.reshape(len(maps), width)
        for row, cells in enumerate(grid):
            limits = _limits(maps[row], scale, signed)
            _draw_image(cells[0], images[row], "image" if row == 0 else "")
            cells[0].set_ylabel(rows[row], labelpad=4)
            for ax, values, title, limit in zip(cells[1:], maps[row], columns, limits, strict=True):
                _draw_map(ax, values, limit, signed, title if row == 0 else "")
            for ax in cells:
                _draw_region(ax, regions[row], None if truth is None else truth[row])
        _colour_bar(figure, axes, np.ones(1), signed, "map", panel)
        _caption(figure, caption)
    text = " ".join(_maps_text(maps[row], columns, regions[row], rows[row]) for row in range(len(maps)))
    return describe(figure, f"{caption}. {text}" if caption else text)


def show_spectrum(maps: Any, titles: Sequence[str], strides: Sequence[int] | None = None, caption: str = "") -> Figure:
    """Maps ``[M, H, W]`` above their power spectra, with the share of energy at the grid frequencies of the strides.

    Spectra are in decibels below their highest value, frequency 0 in the middle, up to half a cycle per pixel.
    See `metrics.grid_energy` for the measure and its isotropic level.
    """
    maps, titles = _stack(maps, "maps"), _names(titles, len(maps), "titles")
    tensor = torch.as_tensor(maps)
    shares, levels = metrics.grid_energy(tensor, strides), metrics.isotropic_grid_energy(tensor, strides)
    power = metrics.power_spectrum(tensor).numpy()
    with style():
        figure, axes, _ = _panels(2 * len(maps), len(maps))
        limits = _limits(maps, "map", True)
        for column, title in enumerate(titles):
            _draw_map(axes[column], maps[column], limits[column], True, title)
            peak = power[column].max() or 1.0
            decibels = 10 * np.log10(np.maximum(power[column] / peak, 1e-6))
            ax = axes[len(maps) + column]
            shown = ax.imshow(decibels, cmap=POSITIVE, vmin=-60, vmax=0, extent=(-0.5, 0.5, 0.5, -0.5))
            ax.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
            ax.set_title(f"grid {_percent(shares[column])}, isotropic {_percent(levels[column])}", fontsize=8)
            ax.tick_params(length=2)
            if column:
                ax.set_yticklabels([])
            else:
                ax.set_ylabel("cycles per pixel")
        bar = figure.colorbar(shown, ax=axes[len(maps) :].tolist(), fraction=0.04, pad=0.02, aspect=24)
        bar.set_label("power, dB")
        bar.outline.set_visible(False)
        _caption(figure, caption)
    shares_text = "; ".join(
        f"{title} {_percent(share)} (isotropic level {_percent(level)})"
        for title, share, level in zip(titles, shares, levels, strict=True)
    )
    return describe(figure, f"{caption} Maps and their power spectra. Energy at grid frequencies: {shares_text}.")


def montage(images: Any, captions: Sequence[str] = (), columns: int = 6) -> Figure:
    """Images ``[N, H, W]`` or ``[N, 1, H, W]`` in rows, each under its caption."""
    images = _stack(images, "images")
    captions = _names(captions or [""] * len(images), len(images), "captions")
    with style():
        figure, axes, panel = _panels(len(images), columns)
        letters = max(8, int(panel * 14))
        for ax, image, caption in zip(axes, images, captions, strict=False):
            short = caption if len(caption) <= letters else caption[: letters - 1] + "…"
            _draw_image(ax, image, short)
            ax.title.set_fontsize(8)
    named = f": {', '.join(captions)}" if any(captions) else ""
    return describe(figure, f"{len(images)} images{named}.")


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss and validation AUC by epoch, the best epoch marked.

    Columns: epoch, and of train_loss, validation_loss, validation_auc those that there are.
    """
    if "epoch" not in history or history.empty:
        raise ParameterError(f"history needs the column 'epoch' and a row; it has {list(history.columns)}")
    losses = {"training": "train_loss", "validation": "validation_loss"}
    losses = {name: column for name, column in losses.items() if column in history}
    has_auc = "validation_auc" in history and history["validation_auc"].notna().any()
    epochs = history["epoch"].to_numpy()
    sentences = []
    with style():
        figure = new_figure(WIDTH if has_auc else WIDTH / 2, 2.7)
        axes = figure.subplots(1, 1 + has_auc, squeeze=False)[0]
        for place, (name, column) in enumerate(losses.items()):
            _line(axes[0], epochs, history[column], name, place)
            sentences.append(
                f"The {name} loss goes from {history[column].iloc[0]:.3f} to {history[column].iloc[-1]:.3f}."
            )
        axes[0].legend()
        axes[0].set(ylabel="loss")
        if has_auc:
            best = int(history["validation_auc"].to_numpy().argmax())
            top = history["validation_auc"].iloc[best]
            _line(axes[1], epochs, history["validation_auc"], "validation AUC", 1)
            axes[1].plot(epochs[best], top, "o", ms=10, mfc="none", mec=INK, mew=1.2)
            axes[1].annotate(
                f"{top:.3f}, epoch {epochs[best]}",
                (epochs[best], top),
                (0, -16),
                textcoords="offset points",
                ha="center",
                va="top",
            )
            axes[1].set(ylabel="validation AUC")
            axes[1].margins(x=0.12, y=0.3)
            sentences.append(f"The validation AUC is highest, {top:.3f}, in epoch {epochs[best]}.")
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(axis="y")
    return describe(figure, f"Learning curves over {len(epochs)} epochs. {' '.join(sentences)}")


def threshold_curves(frame: pd.DataFrame, by: str = "method") -> Figure:
    """Energy-based pointing game against the threshold: precision and recall, a line for each value of column ``by``.

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
                _line(ax, part["threshold"], part[kind], str(name), place)
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
    return describe(figure, f"As the threshold rises from {first:g} to {last:g}, {'; '.join(sentences)}.")


def score_bars(
    frame: pd.DataFrame, name: str = "label", value: str = "mean", hue: str | None = None, title: str = ""
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
            sentences.append(_bar(ax, row, middle, height, value, COLOURS[place % len(COLOURS)], called))
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_title(title, loc="left")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        if hue:
            for place, text in enumerate(hues):
                ax.barh(0, 0, color=COLOURS[place % len(COLOURS)], label=text)
        if "chance" in frame and frame["chance"].notna().any():
            ax.plot([], [], color=INK, lw=1.4, ls=(0, (1, 1)), label="chance")
        if hue or "chance" in frame:
            figure.legend(loc="outside lower center", ncols=6)
    return describe(figure, f"{title + ': ' if title else ''}{'; '.join(sentences)}.")


def paper_beside_ours(table: pd.DataFrame, caption: str = "", digits: int = 1) -> pd.io.formats.style.Styler:
    """A table of published numbers beside our own, for a page: numbers rounded, gaps as dashes, text escaped.

    Columns whose name holds "ours" are set in bold, so that nobody mistakes one for the other.
    """
    ours = [column for column in table.columns if "ours" in str(column)]
    styler = table.style.format(precision=digits, na_rep="–", escape="html").format_index(escape="html", axis=1)
    styler = styler.hide(axis="index").set_properties(subset=ours, **{"font-weight": "600"})
    numbers = list(table.select_dtypes("number").columns)
    styler = styler.set_properties(subset=numbers, **{"text-align": "right", "font-variant-numeric": "tabular-nums"})
    return styler.set_caption(escape(caption)) if caption else styler


def _array(values: Any) -> np.ndarray:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def _stack(values: Any, name: str) -> np.ndarray:
    """``[N, H, W]`` from that, or from ``[N, 1, H, W]``."""
    array = _array(values)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or not len(array):
        raise ParameterError(f"{name} have shape {array.shape}; expected [N, H, W] with N above 0")
    return array


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


def _panels(count: int, columns: int) -> tuple[Figure, np.ndarray, float]:
    """A figure with ``count`` bare square panels, at most ``columns`` in a row; surplus ones stay hidden."""
    columns = min(columns, count)
    rows = -(-count // columns)
    panel = min(LARGEST_PANEL, WIDTH / columns)
    figure = new_figure(panel * columns, (panel + 0.22) * rows)
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    for place, ax in enumerate(axes):
        ax.set(xticks=[], yticks=[])
        ax.set_visible(place < count)
        for spine in ax.spines.values():
            spine.set(visible=True, color=RULE)
    return figure, axes, panel


def _draw_image(ax: Axes, image: Any, title: str) -> None:
    pixels = _array(image).squeeze()
    ax.imshow(pixels, cmap=GREY, vmin=0, vmax=1, interpolation="antialiased")
    ax.set_title(title)


def _draw_map(ax: Axes, values: np.ndarray, limit: float, signed: bool, title: str) -> None:
    ax.imshow(values, cmap=SIGNED if signed else POSITIVE, vmin=-limit if signed else 0, vmax=limit)
    ax.set_title(title)
    if not np.isfinite(values).all():
        ax.text(0.5, 0.5, "no map", transform=ax.transAxes, ha="center", va="center", color=SOFT)


def _limits(maps: np.ndarray, scale: str, signed: bool) -> np.ndarray:
    """The value of full colour for each map."""
    if scale not in ("map", "row"):
        raise ParameterError(f"scale {scale!r} is unknown; use 'map' or 'row'")
    size = np.where(np.isfinite(maps), np.abs(maps) if signed else np.maximum(maps, 0), 0)
    limits = np.array([np.percentile(size if scale == "row" else one, CLIP) or one.max() for one in size])
    return np.where(limits > 0, limits, 1.0)


def _region(boxes: Any, mask: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Boxes and mask as one bool mask; None when there is neither."""
    if boxes is None and mask is None:
        return None
    region = np.zeros(shape, bool) if mask is None else _array(mask).reshape(shape).astype(bool)
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1]) + 0.5
    for x_min, y_min, x_max, y_max in _array([] if boxes is None else boxes).reshape(-1, 4):
        region = region | ((x_min <= columns) & (columns < x_max) & (y_min <= rows) & (rows < y_max))
    return region


def _draw_region(ax: Axes, region: np.ndarray | None, truth: Any) -> None:
    """Outlines along pixel edges for boxes, a dashed contour for the exact finding."""
    if region is not None and region.any():
        ax.add_collection(LineCollection(_edges(region), linewidths=1.2, capstyle="projecting", **OUTLINE))
    if truth is not None and (exact := np.pad(_array(truth).squeeze(), 1)).any():
        place = np.arange(-1, exact.shape[1] - 1), np.arange(-1, exact.shape[0] - 1)
        lines = ax.contour(*place, exact, levels=[0.5], colors="black", linestyles=[(0, (3, 2))], linewidths=1.0)
        lines.set_path_effects(OUTLINE["path_effects"])
        ax.set(xlim=(-0.5, exact.shape[1] - 2.5), ylim=(exact.shape[0] - 2.5, -0.5))


def _edges(region: np.ndarray) -> list[list[tuple[float, float]]]:
    """Segments between pixels of which one is inside and the other is not."""
    padded = np.pad(region, 1).astype(int)
    across = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])
    down = np.argwhere(np.diff(padded, axis=1)[1:-1])
    return [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in across] + [
        [(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in down
    ]


def _colour_bar(figure: Figure, axes: np.ndarray, limits: np.ndarray, signed: bool, scale: str, panel: float) -> None:
    """One slim bar for all maps: with numbers where they share a scale, in words where they don't."""
    limit = float(limits[0])
    colours = ScalarMappable(Normalize(-limit if signed else 0, limit), SIGNED if signed else POSITIVE)
    bar = figure.colorbar(colours, ax=axes.tolist(), fraction=0.03, pad=0.015, aspect=22, shrink=0.8)
    ticks = [-limit, 0, limit] if signed else [0, limit]
    words = ["against", "0", "for"] if signed else ["0", "max"]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks] if scale == "row" else words)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _caption(figure: Figure, caption: str) -> None:
    if caption:
        figure.suptitle(caption, x=0.01, ha="left", fontsize=10)


def _maps_text(maps: np.ndarray, titles: list[str], region: np.ndarray | None, caption: str) -> str:
    start = f"{caption}: image and " if caption else "Image and "
    if region is None or not region.any():
        return f"{start}maps by {', '.join(titles)}."
    tensor, mask = torch.as_tensor(maps), torch.as_tensor(region)
    scores = metrics.energy_pointing_game(tensor, mask)
    told = ", ".join(f"{title} {_percent(score)}" for title, score in zip(titles, scores, strict=True))
    area = _percent(metrics.chance_level(mask))
    return f"{start}maps with the box outlined; positive energy inside it, by map: {told} (the box covers {area})."


def _line(ax: Axes, x: Any, y: Any, label: str, place: int) -> None:
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    ax.plot(np.asarray(x), np.asarray(y, dtype=float), color=colour, marker=marker, mec="white", mew=0.6, label=label)


def _bar(ax: Axes, row: dict, middle: float, height: float, value: str, colour: str, called: str) -> str:
    """Draw one row of :func:`score_bars` and say it in words."""
    score = float(row[value])
    if not np.isfinite(score):
        ax.text(0, middle, " no score", va="center", color=SOFT, fontsize=8)
        return f"{called} no score"
    ax.barh(middle, score, height * 0.86, color=colour, alpha=0.85)
    text, end = f"{called} {_percent(score)}", score
    if np.isfinite([row.get("low", np.nan), row.get("high", np.nan)]).all():
        ax.plot([row["low"], row["high"]], [middle, middle], color=INK, lw=1.4, solid_capstyle="butt")
        end = max(end, row["high"])
        text += f" ({_percent(row['low'])} to {_percent(row['high'])})"
    if np.isfinite(row.get("chance", np.nan)):
        half = height / 2
        ax.plot([row["chance"]] * 2, [middle - half, middle + half], color=INK, lw=1.4, ls=(0, (1, 1)))
        end = max(end, row["chance"])
        text += f", chance {_percent(row['chance'])}"
    ax.annotate(f"{100 * score:.1f}", (end, middle), (4, 0), textcoords="offset points", va="center", fontsize=8)
    return text
