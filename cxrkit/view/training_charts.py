"""Charts of training: the curves of one training run, and the trials of a search."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from cxrkit.errors import ParameterError
from cxrkit.view.charts import line_panels
from cxrkit.view.style import COLOURS, INK, MARKERS, SOFT, WIDTH, describe, new_figure, style

__all__ = ["search_trials", "training_curves"]

_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def training_curves(history: pd.DataFrame, best_epoch: int | None = None) -> Figure:
    """Loss, validation AUC and learning rate by epoch, the chosen epoch marked.

    Columns: epoch, and of train_loss, validation_loss, test_loss, validation_auc, test_auc, learning_rate those that
    there are; a rate that never changes isn't drawn. `best_epoch`: the epoch whose network is used; None: that of the
    highest validation AUC.
    """
    if "epoch" not in history or history.empty:
        raise ParameterError(f"history needs the column 'epoch' and a row; it has {list(history.columns)}")
    places = {f"{split}_loss": ("loss", name) for split, name in _SPLITS.items()}
    places |= {f"{split}_auc": ("AUC", split) for split in ("validation", "test")}
    places = {column: place for column, place in places.items() if column in history and history[column].notna().any()}
    if "learning_rate" in history and history["learning_rate"].nunique() > 1:
        places["learning_rate"] = ("learning rate", "learning rate")
    long = history.melt("epoch", list(places), "column", "value")
    long["panel"], long["line"] = ([places[column][place] for column in long["column"]] for place in (0, 1))
    epochs, sentences = history["epoch"], []
    with style():
        figure, axes = line_panels(long, "epoch", "value", "line", "panel", shared=False)
        panel = {ax.get_title(): ax for ax in axes}
        for name, ax in panel.items():
            ax.set(ylabel=name, title="", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        area = next((column for column, (kind, _) in places.items() if kind == "AUC"), None)
        for column, (kind, name) in places.items():
            if column == area:
                sentences.append(_mark_epoch(panel["AUC"], epochs, history[area], best_epoch))
            elif kind != "AUC":
                digits, of = (".3f", f"{name} loss") if kind == "loss" else (".1e", kind)
                first, last = history[column].iloc[[0, -1]]
                sentences.append(f"The {of} goes from {first:{digits}} to {last:{digits}}.")
        if "learning_rate" in places and (history["learning_rate"] > 0).all():
            axes[-1].set_yscale("log")
            axes[-1].yaxis.set_major_formatter(LogFormatter())
    told = f"Learning curves, epochs {epochs.min()} to {epochs.max()}. {' '.join(sentences)}"
    return describe(figure, told, history)


def _mark_epoch(ax: Axes, epochs: pd.Series, areas: pd.Series, best_epoch: int | None) -> str:
    """Ring the epoch whose network is used; returns the sentence that tells it and the highest one."""
    highest = int(np.nanargmax(areas.to_numpy(dtype=float)))
    used = highest if best_epoch is None else int(np.flatnonzero(epochs == best_epoch)[0])
    value, epoch = areas.iloc[used], epochs.iloc[used]
    ax.plot(epoch, value, "o", ms=10, mfc="none", mec=INK, mew=1.2)
    ax.set_title(f"{'best' if used == highest else 'kept'}: {value:.3f} in epoch {epoch}", loc="right")
    ax.margins(y=0.1)
    text = f"The validation AUC is highest, {areas.iloc[highest]:.3f}, in epoch {epochs.iloc[highest]}."
    return text if used == highest else f"{text} Kept is epoch {epoch}, {value:.3f}."


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
    top = known.loc[known["score"].idxmax()]
    text = f"{len(trials)} trials. The best {score}, {top['score']:.3f}, is that of trial {top['evaluation']:g}"
    return describe(figure, f"{text}, after {top['epochs']:g} epochs.", trials)
