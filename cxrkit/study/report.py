"""From runs to tables: what a grid found, with intervals and chance levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.data import Dataset
from cxrkit.errors import ParameterError
from cxrkit.metrics import Accumulator, LocalisationScores, bootstrap, classification_report
from cxrkit.study import runs
from cxrkit.train.parameters import TrainParameters
from cxrkit.train.setup import load_data

__all__ = [
    "classification_of",
    "comparable",
    "curves",
    "enlarge",
    "images_of",
    "means",
    "names",
    "pointing_table",
    "readable",
    "surest",
    "variant",
    "view",
]

COUNTS = ("maps", "images", "patients", "labels", "recall maps", "degenerate", "left out")
# How tables for readers call them.
SUBSETS = {"all": "all positives", "TP": "found (TP)", "FN": "missed (FN)"}
TITLES = {
    "subset": "findings",
    "chance": "EPG by chance",
    "recall chance": "recall by chance",
    "degenerate": "undefined",
    "left out": "undefined by another method",
    "average_precision": "average precision",
    "n": "images",
}
VARIANTS = {"none": "B-cos", "flc": "B-cos + FLC", "flc_authors": "B-cos + FLC (as coded)", "blur": "B-cos + BlurPool"}


def variant(parameters) -> str:
    """How a network is called in tables: baseline, or B-cos with its down-sampling."""
    if not parameters.model.startswith("bcos_"):
        return "Baseline"
    return VARIANTS[parameters.antialias]


def view(parameters) -> str:
    """Which view of its data set a run saw: the phantom's view, or the set's name."""
    return (
        parameters.dataset_options.get("view", "multilabel") if parameters.dataset == "phantom" else parameters.dataset
    )


def test_auc(run: runs.Run) -> float:
    """Macro AUC on the test split of a training run."""
    report = classification_of(run.frame("predictions"))
    return float(report.loc[report["label"] == "macro", "auc"].iloc[0])


def classification_of(
    predictions: pd.DataFrame,
    cutoff: float | Sequence[float] = 0.5,
    exclusive: bool = False,
    n: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Classification metrics per label and their macro mean; predictions as `training.predict` gives them.

    `exclusive`: an image gets the class of highest probability, as `training.Fit.exclusive` says of a training. `n`:
    resamples of the patients, from which each metric gets its 95 % interval ("auc low", "auc high"); 0: none.
    """
    labels = list(dict.fromkeys(predictions["label"]))
    shape = (-1, len(labels))
    targets, probabilities = (predictions[name].to_numpy().reshape(shape) for name in ("target", "probability"))
    drawn = {"patients": predictions["patient_id"].to_numpy()[:: len(labels)], "n": n, "seed": seed} if n else {}
    return classification_report(targets, probabilities, labels, cutoff=cutoff, exclusive=exclusive, **drawn)


def pointing_table(scores: pd.DataFrame, threshold: float = 0.0, cutoff: float | None = None) -> pd.DataFrame:
    """Macro mean EPG by method, over all positives and over those found (TP) and missed (FN); scores as
    `explanation.score` gives, with a column `run` where there are several runs.

    The mean is taken per label, then over labels, as in the tables of paper `bcos`; a label without any such image
    stays out. Intervals: 95 %, patients resampled. `chance` is that of the precision. A finding counts as found above
    its `cutoff`: that of its row in `scores` (tuned by the run on its validation split; nan: neither found nor missed),
    or one number for all. All methods are averaged over the same maps, see :func:`comparable`.

    Each row says what it rests on: maps, images, patients and labels of the EPG, `recall maps` of the recall;
    `degenerate` maps have no EPG, `left out` are those that have one, but not by every other method. Raises
    ParameterError for a threshold not scored.
    """
    frame = scores[np.isclose(scores["threshold"], threshold)].reset_index(drop=True)
    if frame.empty:
        known = sorted(scores["threshold"].unique())
        raise ParameterError(f"there are no scores at threshold {threshold}; there are some at {known}")
    cutoffs = frame.get("cutoff", 0.5) if cutoff is None else cutoff  # runs of older versions keep none
    found, missed = frame["probability"] > cutoffs, frame["probability"] <= cutoffs
    frame = comparable(frame).assign(own=frame["precision"])
    tables = {"all": _macro(frame), "TP": _macro(frame[found]), "FN": _macro(frame[missed])}
    columns = ["method", "subset", "EPG", "low", "high", "chance", "recall", "recall low", "recall high"]
    columns += ["recall chance", *COUNTS]
    empty = dict.fromkeys(COUNTS, 0)
    rows = [
        {"method": method, "subset": subset} | (table.loc[method].to_dict() if method in table.index else empty)
        for method in frame["method"].unique()
        for subset, table in tables.items()
    ]
    return pd.DataFrame(rows).reindex(columns=columns).astype(dict.fromkeys(COUNTS, int))


def comparable(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores in which precision and recall are nan wherever one of the methods has none, so that all methods are
    averaged over the same maps. A method without any score at all would leave none: it stays out of that.
    """
    keys = [scores[name] for name in ("run", "image_id", "label", "threshold") if name in scores]
    shared = {}
    for kind in ("precision", "recall"):
        by = scores["method"].where(scores[kind].notna())
        shared[kind] = scores[kind].where(by.groupby(keys).transform("nunique") == by.nunique())
    return scores.assign(**shared)


def _macro(frame: pd.DataFrame) -> pd.DataFrame:
    """The macro rows of every method, indexed by it."""
    if frame.empty:
        return pd.DataFrame()
    gathered = Accumulator()
    values, chance = dict(frame[["precision", "recall"]]), {"precision": frame["chance"]}
    if "chance_recall" in frame:  # runs of older versions lack it
        chance["recall"] = frame["chance_recall"]
    scores = LocalisationScores(*({name: value.to_numpy() for name, value in of.items()} for of in (values, chance)))
    gathered.add(scores, frame["patient_id"].to_numpy(), method=frame["method"], label=frame["label"])
    table = gathered.table().query("label == 'macro'").set_index(["score", "method"])
    precision, recall = table.loc["precision"], table.loc["recall"]
    return pd.DataFrame(
        {
            "EPG": precision["mean"],
            "low": precision["low"],
            "high": precision["high"],
            "recall": recall["mean"],
            "recall low": recall["low"],
            "recall high": recall["high"],
            "recall chance": recall["chance"],
            "chance": precision["chance"],
            "recall maps": recall["n"],
        }
    ).join(_counts(frame))


def _counts(frame: pd.DataFrame) -> pd.DataFrame:
    """What the EPG of every method rests on, and what it leaves out."""
    used = frame[frame["precision"].notna()].groupby("method")
    counts = {"maps": used.size(), "images": used["image_id"].nunique(), "patients": used["patient_id"].nunique()}
    degenerate = frame["own"].isna().groupby(frame["method"]).sum()
    left = (frame["own"].notna() & frame["precision"].isna()).groupby(frame["method"]).sum()
    counts |= {"labels": used["label"].nunique(), "degenerate": degenerate, "left out": left}
    return pd.DataFrame(counts).fillna(0).astype(int)


def readable(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """A table for readers: each score with its 95 % interval in one cell, other numbers rounded, plain titles.

    `table`: as :func:`pointing_table` or :func:`classification_of` gives it; "–" is a number that isn't defined.
    """
    table = table.rename(columns={"low": "EPG low", "high": "EPG high"}).replace({"subset": SUBSETS})
    text = {}
    for name in (name for name in table if not name.endswith((" low", " high"))):
        values = table[name]
        if f"{name} low" in table:
            bounds = zip(values, table[f"{name} low"], table[f"{name} high"], strict=True)
            text[f"{TITLES.get(name, name)} (95 % CI)"] = [_interval(*cell, digits) for cell in bounds]
        elif pd.api.types.is_float_dtype(values) and (values.dropna() % 1 != 0).any():
            text[TITLES.get(name, name)] = [_rounded(value, digits) for value in values]
        else:
            text[TITLES.get(name, name)] = ["–" if pd.isna(value) else value for value in values]
    return pd.DataFrame(text, index=table.index)


def _interval(value: float, low: float, high: float, digits: int) -> str:
    between = f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite([low, high]).all() else ""
    return _rounded(value, digits) + between


def _rounded(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def curves(scores: pd.DataFrame) -> pd.DataFrame:
    """Macro EPG precision and recall against the threshold, by method (paper `bcos`, Fig. 3), over the same maps as
    :func:`comparable` has it."""
    by_label = comparable(scores).groupby(["method", "threshold", "label"], sort=False)[["precision", "recall"]].mean()
    return by_label.groupby(["method", "threshold"], sort=False).mean().reset_index()


def names(pairs: list[tuple[runs.Run, runs.Run]]) -> list[str]:
    """A name per pair: its network, with fold and seed where the network occurs more than once."""
    variants = [variant(train.parameters) for train, _ in pairs]
    places = [f", fold {train.parameters.fold}, seed {train.parameters.seed}" for train, _ in pairs]
    return [name + place * (variants.count(name) > 1) for name, place in zip(variants, places, strict=True)]


def drawn_finer(parameters: TrainParameters, least: int, **changed: Any) -> Dataset:
    """A training run's data set, or one that `changed` parameters name, at the multiple of its size that reaches
    `least` pixels."""
    size = parameters.size * max(1, -(-least // parameters.size))
    return load_data(parameters.model_copy(update={**changed, "size": size, "cache": "none"}))


def images_of(train: runs.Run, explain: runs.Run, least: int = 256) -> tuple[Dataset, dict[str, np.ndarray]]:
    """The images whose maps an explanation run kept, and the kept arrays (see `explanation.kept_maps`).

    The images are drawn finer than the network saw them.
    """
    kept, data = explain.arrays(), drawn_finer(train.parameters, least)
    position = {image_id: row for row, image_id in enumerate(data.table["image_id"].astype(str))}
    return data.select([position[image_id] for image_id in kept["image_ids"]]), kept


def surest(data: Dataset, kept: dict[str, np.ndarray]) -> tuple[int, str]:
    """Row and label of the boxed positive that a network is surest of: where there is something to look at first."""
    boxed = np.stack([(sample.target > 0.5).numpy() & sample.mask.flatten(1).any(1).numpy() for sample in data])
    columns = [data.labels.index(label) for label in kept["labels"]]
    logits = np.where(boxed[:, columns], kept["logits"][: len(data)], -np.inf)
    row, column = np.unravel_index(logits.argmax(), logits.shape)
    return int(row), str(kept["labels"][column])


def means(frame: pd.DataFrame, score: str, by: Sequence[str], n: int = 500) -> pd.DataFrame:
    """Mean of a column with its 95 % interval (patients resampled), a row for each value of the columns `by`.

    Columns: those of `by`, the score, low, high, patients with a score, and `degenerate`: rows without one.
    """
    rows = []
    for place, part in frame.groupby(list(by), sort=False):
        known = part[score].notna()
        mean, low, high = bootstrap(part[score].astype(float), part["patient_id"], n=n)
        row = dict(zip(by, place, strict=True)) | {score: mean, "low": low, "high": high}
        row["patients"] = part.loc[known, "patient_id"].nunique()
        rows.append(row | {"degenerate": int((~known).sum())})
    found = pd.DataFrame(rows, columns=[*by, score, "low", "high", "patients", "degenerate"])
    return found.astype(dict(frame[list(by)].dtypes))  # also of an empty frame


def enlarge(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps [..., h, w] repeated to [..., size, size]; every value stays what it was. `size` is a multiple of h and
    w."""
    factor = size // maps.shape[-1]
    if factor * maps.shape[-1] != size or factor * maps.shape[-2] != size:
        raise ParameterError(f"size {size} is no multiple of the maps' {maps.shape[-2]} x {maps.shape[-1]}")
    return maps.repeat(factor, axis=-1).repeat(factor, axis=-2)
