"""Areas under the ROC curve of training runs: of one, and of two with the interval of their difference."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from cxrkit.metrics import Interval
from cxrkit.metrics.statistics import resampled_rows
from cxrkit.study import ensembles, report, runs
from cxrkit.train import scoring

__all__ = ["area", "scores"]


def scores(pair: tuple[runs.Run, runs.Run], n: int = 500, seed: int = 0) -> pd.DataFrame:
    """AUC per label on the test images of both runs, and second less first with its 95 % interval.

    The interval resamples the patients ``n`` times, both networks on the same ones; it is nan where the runs were
    tested on different images, for fewer than two patients, and where a label has one class only. The row "macro" is
    the mean over labels. Where classes exclude each other images are ranked by the softmax, since a logit alone says
    nothing of the other classes.
    """
    tables = [run.frame("predictions") for run in pair]
    keys = ["patient_id", "image_id", "label"]
    wide, truth = (
        [table.set_index(keys)[name].unstack().sort_index() for table in tables] for name in ("logit", "target")
    )
    for place, run in enumerate(pair):
        if ensembles.exclusive(run):  # over all labels of the run, also those that the other one lacks
            wide[place] = wide[place].sub(logsumexp(wide[place], axis=1), axis=0)
    labels = [label for label in dict.fromkeys(tables[0]["label"]) if label in wide[1]]
    columns = ["first", "second", "difference", "low", "high"]
    own = [
        _areas(target[labels].to_numpy(), logit[labels].to_numpy()) for target, logit in zip(truth, wide, strict=True)
    ]
    found = pd.DataFrame({"first": own[0], "second": own[1], "difference": own[1] - own[0]}, index=[*labels, "macro"])
    bounds = np.full((2, len(found)), np.nan)
    if wide[0].index.equals(wide[1].index) and truth[0][labels].equals(truth[1][labels]):
        bounds = _paired(truth[0][labels], [one[labels].to_numpy() for one in wide], n, seed)
    return found.assign(low=bounds[0], high=bounds[1])[columns].rename_axis("label")


def _paired(truth: pd.DataFrame, logits: list[np.ndarray], n: int, seed: int) -> np.ndarray:
    """Bounds [2, L + 1] of the difference of two networks' areas over resampled patients."""
    targets = truth.to_numpy()
    drawn = [
        _areas(targets[rows], logits[1][rows]) - _areas(targets[rows], logits[0][rows])
        for rows in resampled_rows(truth.index.get_level_values(0), n, seed)
    ]
    drawn = np.ma.masked_invalid(np.reshape(drawn, (-1, truth.shape[1] + 1)))
    bounds = [
        np.quantile(column.compressed(), [0.025, 0.975]) if column.count() > n / 2 else (np.nan, np.nan)
        for column in drawn.T
    ]
    return np.array(bounds).T


def area(predictions: pd.DataFrame, n: int = 300, seed: int = 0) -> Interval:
    """Macro AUC of predictions as `training.predict` gives them, with its 95 % interval.

    The interval resamples the patients ``n`` times; its bounds are nan for fewer than two patients and where most
    resamples lack a class.
    """
    macro = report.classification_of(predictions, n=n, seed=seed).iloc[-1]
    return Interval(*(float(macro[name]) for name in ("auc", "auc low", "auc high")))


def _areas(targets: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per label and their mean, [L + 1]; nan where a class is missing."""
    own = [scoring.area(target, logit) for target, logit in zip(targets.T, logits.T, strict=True)]
    return np.array([*own, scoring.macro_auc(targets, logits)])
