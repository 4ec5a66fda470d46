"""Figures of learning: the curves of one training, and the trials of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrkit.errors import ParameterError
from cxrkit.view import interactive
from cxrkit.view.style import COLOURS, INK, MARKERS, SOFT, WIDTH, describe, new_figure, style

__all__ = ["draw_line", "search_trials", "training_curves"]


def training_curves(history: pd.DataFrame, best_epoch: int | None = None) -> Figure:
    """Loss, validation AUC and learning rate by epoch, the chosen epoch marked.

    Columns: epoch, and of train_loss, validation_loss, test_loss, validation_auc, test_auc, learning_rate those that
    there are; a rate that never changes isn't drawn. `best_epoch`: the epoch that was kept; None: that of the highest
    validation AUC.
    """
    if "epoch" not in history or history.empty:
        raise ParameterError(f"history needs the column 'epoch' and a row; it has {list(history.columns)}")
    losses = {name: f"{name}_loss" for name in ("train", "validation", "test") if f"{name}_loss" in history}
    areas = {name: f"{name}_auc" for name in ("validation", "test") if f"{name}_auc" in history}
    areas = {name: column for name, column in areas.items() if history[column].notna().any()}
    moves = "learning_rate" in history and history["learning_rate"].nunique() > 1
    epochs = history["epoch"].to_numpy()
    panels = 1 + bool(areas) + moves
    sentences = []
    with style():
        figure = new_figure(WIDTH if panels > 1 else WIDTH / 2, 2.7)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for place, (name, column) in enumerate(losses.items()):
            name = {"train": "training"}.get(name, name)
            draw_line(axes[0], epochs, history[column], name, place)
            sentences.append(
                f"The {name} loss goes from {history[column].iloc[0]:.3f} to {history[column].iloc[-1]:.3f}."
            )
        axes[0].legend()
        axes[0].set(ylabel="loss")
        if areas:
            sentences.append(_areas(axes[1], history, areas, best_epoch))
        if moves:
            rate = history["learning_rate"]
            draw_line(axes[-1], epochs, rate, "learning rate", 3)
            axes[-1].set(ylabel="learning rate", yscale="log" if (rate > 0).all() else "linear")
            sentences.append(f"The learning rate goes from {rate.iloc[0]:.1e} to {rate.iloc[-1]:.1e}.")
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.grid(axis="y")
    told = f"Learning curves, epochs {epochs.min()} to {epochs.max()}. {' '.join(sentences)}"
    drawn = {column: ("loss", {"train": "training"}.get(name, name)) for name, column in losses.items()}
    drawn |= {column: ("AUC", name) for name, column in areas.items()}
    drawn |= {"learning_rate": ("learning rate", "rate")} if moves else {}
    live = _live(history, drawn)
    if areas:
        kept, told_of = _kept(history, areas, best_epoch)
        side = "bottom left" if 2 * kept >= len(epochs) else "bottom right"
        look = {"line_dash": "dot", "line_color": INK, "annotation_text": told_of, "annotation_position": side}
        live.add_vline(epochs[kept], row=1, col=2, **look)
    if moves and (history["learning_rate"] > 0).all():
        live.update_yaxes(type="log", exponentformat="e", col=panels)
    return describe(figure, told, history, live)


def _live(history: pd.DataFrame, drawn: dict[str, tuple[str, str]]) -> Any:
    long = history.melt("epoch", list(drawn), "column", "value")
    long["panel"] = [drawn[column][0] for column in long["column"]]
    long["line"] = [drawn[column][1] for column in long["column"]]
    return interactive.curves(long, "epoch", "value", "line", "panel", shared=False, up="")


def _kept(history: pd.DataFrame, areas: dict[str, str], best_epoch: int | None) -> tuple[int, str]:
    """The row of the epoch that is marked, and what is written there."""
    epochs, values = history["epoch"].to_numpy(), history[areas.get("validation", next(iter(areas.values())))]
    highest = int(np.nanargmax(values.to_numpy(dtype=float)))
    kept = highest if best_epoch is None else int(np.flatnonzero(epochs == best_epoch)[0])
    return kept, f"{'best' if kept == highest else 'kept'}: {values.iloc[kept]:.3f} in epoch {epochs[kept]}"


def _areas(ax: Axes, history: pd.DataFrame, areas: dict[str, str], best_epoch: int | None) -> str:
    epochs, values = history["epoch"].to_numpy(), history[areas.get("validation", next(iter(areas.values())))]
    for name, column in areas.items():
        draw_line(ax, epochs, history[column], name, 1 + (name == "test"))
    kept, told = _kept(history, areas, best_epoch)
    highest = int(np.nanargmax(values.to_numpy(dtype=float)))
    ax.plot(epochs[kept], values.iloc[kept], "o", ms=10, mfc="none", mec=INK, mew=1.2)
    ax.set_title(told, loc="right")
    ax.set(ylabel="validation AUC" if len(areas) == 1 else "AUC")
    ax.margins(y=0.1)
    if len(areas) > 1:
        ax.legend()
    text = f"The validation AUC is highest, {values.iloc[highest]:.3f}, in epoch {epochs[highest]}."
    return text if kept == highest else f"{text} Kept is epoch {epochs[kept]}, {values.iloc[kept]:.3f}."


def search_trials(trials: pd.DataFrame, score: str = "score") -> Figure:
    """The trials of a search in their order, a marker per number of epochs, and the best score so far as a line.

    Columns: evaluation, epochs, score (higher is better; nan: none).
    """
    if trials.empty or not {"evaluation", "epochs", "score"} <= set(trials.columns):
        raise ParameterError(f"trials need evaluation, epochs, score and a row; they have {list(trials.columns)}")
    with style():
        figure = new_figure(WIDTH, 2.9)
        ax = figure.subplots()
        best = trials["score"].cummax()
        ax.step(trials["evaluation"], best, where="post", color=SOFT, label="best so far", zorder=1)
        for place, (epochs, part) in enumerate(trials.groupby("epochs")):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            name = f"{epochs} epoch{'s' * (epochs != 1)}"
            ax.plot(part["evaluation"], part["score"], marker, color=colour, mec="white", mew=0.6, label=name)
        ax.set(xlabel="trial", ylabel=score)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(axis="y")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    known = trials.dropna(subset="score")
    if known.empty:
        return describe(figure, f"{len(trials)} trials, none with a score.", trials)
    named = trials.assign(epochs=[f"{epochs} epoch{'s' * (epochs != 1)}" for epochs in trials["epochs"]])
    live = interactive.curves(named, "evaluation", "score", "epochs", linked=False, across="trial", up=score)
    line = {"color": SOFT, "shape": "hv"}
    live.add_scatter(x=trials["evaluation"], y=best, mode="lines", line=line, name="best so far")
    top = known.loc[known["score"].idxmax()]
    text = f"{len(trials)} trials. The best {score}, {top['score']:.3f}, is that of trial {top['evaluation']:g}"
    return describe(figure, f"{text}, after {top['epochs']:g} epochs.", trials, live)


def draw_line(ax: Axes, x: Sequence, y: Sequence, label: str, place: int) -> None:
    """A line with markers in the colour of its place."""
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    ax.plot(np.asarray(x), np.asarray(y, dtype=float), color=colour, marker=marker, mec="white", mew=0.6, label=label)
