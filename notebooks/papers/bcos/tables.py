"""Paper `bcos` beside our runs: its tables of accuracy and of the energy-based pointing game, and its claims."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.study import claims, comparison, report
from cxrkit.study.claims import Measured
from cxrkit.study.published import table
from cxrkit.study.report import variant, view
from cxrkit.study.runs import Run
from cxrkit.study.study import Study

__all__ = [
    "EXPLANATIONS",
    "METRICS",
    "PUBLISHED",
    "SETS",
    "beside",
    "cells",
    "classification",
    "macro",
    "maps",
    "network",
    "overview",
    "place",
    "predictions",
    "published_place",
    "regime",
    "verdicts",
    "view_of",
]

# What the tables of the paper call the same networks.
PUBLISHED = {
    "Baseline ResNet50": "Baseline",
    "B-cos ResNet50": "B-cos",
    "B-cos": "B-cos",
    "B-cos_FLC": "B-cos + FLC",
    "B-cos_BP": "B-cos + BlurPool",
    "B-cos ViT-B conv stem": "B-cos ViT",
}
# The paper's sets by their own names and by the views of the phantom that stand in for them.
SETS = {"rsna": "RSNA", "binary": "RSNA", "vinbigdata": "VinBigData", "multilabel": "VinBigData"}
EXPLANATIONS = {"LayerCAM": "layercam", "Inherent": "bcos"}
# Whether images are augmented and positives oversampled, as tables name it.
_REGIMES = {
    (False, False): "plain",
    (False, True): "oversampled",
    (True, False): "augmented",
    (True, True): "both",
}
METRICS = {
    "accuracy": "acc",
    "precision": "pre",
    "recall": "rec",
    "f1": "f1",
    "auc": "auc",
}


def regime(parameters: Any) -> str:
    """How a network was trained, by the paper's two switches: plain, oversampled, augmented or both; heavy augmentation
    says so."""
    name = _REGIMES[parameters.augment != "none", parameters.oversample]
    return f"{name}, heavy" if parameters.augment == "heavy" else name


def network(parameters: Any) -> str:
    """What the tables call a network; the transformer has a row of its own."""
    return "B-cos ViT" if parameters.model == "bcos_vit_c_b" else variant(parameters)


def place(run: Run) -> tuple[str, str, str]:
    """View, network and regime of a training run."""
    return view(run.parameters), network(run.parameters), regime(run.parameters)


def view_of(study: Study, of: str) -> str:
    """The view of a grid's images that is a set of the paper, or stands in for it; empty where the grid has none."""
    views = {view(run.parameters) for run in study.trained}
    return next((name for name, known in SETS.items() if known == of and name in views), "")


def published_place(cell: Mapping[str, Any]) -> tuple[str, str]:
    """Network and regime of a row of a published table."""
    augmented = str(cell["aug"]) not in ("No", "nan")
    return PUBLISHED[cell["variant"]], _REGIMES[augmented, cell["oversampling"] == "Yes"]


def cells(study: Study) -> dict[tuple[str, str, str], list[tuple[Run, Run]]]:
    """The explained networks of a grid by (view, network, regime): pairs of training run and explanation."""
    found: dict[tuple[str, str, str], list[tuple[Run, Run]]] = {}
    for train, explain in study.pairs():
        found.setdefault(place(train), []).append((train, explain))
    return found


def maps(study: Study) -> pd.DataFrame:
    """The scores of all maps: a row per run, image, label, method and threshold, with view, network, regime, fold, seed
    and run; `excess` is the share of energy on the grid beyond that of a smooth spectrum."""
    parts = []
    for train, explain in study.pairs():
        facts = dict(zip(("view", "network", "regime"), place(train), strict=True))
        facts |= {"fold": train.parameters.fold, "seed": train.parameters.seed, "run": train.key}
        parts.append(explain.frame("scores").assign(**facts))
    if not parts:
        return pd.DataFrame(columns=["view", "network", "regime", "run", "method", "threshold"])
    scores = pd.concat(parts, ignore_index=True)
    return scores.assign(threshold=scores["threshold"].round(6), excess=scores["grid"] - scores["smooth"])


def predictions(train: Run) -> pd.DataFrame:
    """A run's, without the added class of healthy images: where there is one, the finding's row is the paper's."""
    found = train.frame("predictions")
    return found[found["label"] != train.parameters.healthy_class] if train.parameters.healthy_class else found


def macro(predictions: pd.DataFrame, average: str = "macro") -> dict[str, float]:
    """Classification metrics averaged over labels ("macro") or over all decisions ("micro"), by name."""
    return report.classification_of(predictions).set_index("label").loc[average].to_dict()


def overview(study: Study) -> pd.DataFrame:
    """A row per view, network, regime and explanation of the paper: AUC, EPG and recall with intervals and chance, and
    what they rest on (see `report.pointing_table`); all folds and seeds of a cell together (patients are resampled)."""
    rows, scores = [], maps(study)
    scores = scores[scores["method"].isin(EXPLANATIONS.values())]
    for names, pairs in cells(study).items():
        facts = dict(zip(("view", "network", "regime"), names, strict=True))
        facts["AUC"] = macro(pd.concat([predictions(train) for train, _ in pairs]))["auc"]
        found = report.pointing_table(scores[scores["run"].isin([train.key for train, _ in pairs])])
        rows += [facts | row for row in found[found["subset"] == "all"].to_dict("records")]
    columns = ["view", "network", "regime", "AUC", "method", "EPG", "low", "high", "chance"]
    columns += ["recall", "recall low", "recall high", "recall chance", *report.COUNTS]
    return pd.DataFrame(rows).reindex(columns=columns)


def classification(study: Study, published_table: str, view_name: str) -> pd.DataFrame:
    """A published table of accuracy beside the same cells of a grid, "paper / ours" in percent in each cell.

    Ours: test images of all folds and seeds together, cut at 0.5, macro mean over labels (accuracy: share of all
    decisions). A dash: the paper's text lacks the number, or the grid has no such network.
    """
    rows = []
    for cell in table(published_table).to_dict("records"):
        where = published_place(cell)
        trained = [run for run in study.trained if place(run) == (view_name, *where)]
        ours: dict[str, float] = {}
        if trained:
            together = pd.concat([predictions(run) for run in trained])
            ours = macro(together) | {"accuracy": macro(together, "micro")["accuracy"]}
        row = dict(zip(("network", "regime"), where, strict=True))
        for title, short in METRICS.items():
            row[title] = f"{_percent(cell[f'{short}_mean'] / 100)} / {_percent(ours.get(title, np.nan))}"
        rows.append(row)
    return pd.DataFrame(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if np.isfinite(share) else "–"


def beside(ours: pd.DataFrame, published_table: str, view_name: str, metric: str = "EPG") -> pd.DataFrame:
    """A published EPG table beside the same cells of `overview`, in percent.

    `metric`: "EPG" (precision) or "recall". Ours: macro mean over test positives with its 95 % interval and chance
    level (for recall the whole image's, see `metrics.energy_pointing_game`), over so many maps; left out are those that
    the metric doesn't define for every method of the network. Rows that the grid doesn't hold have no numbers of ours.
    """
    ours = ours[ours["view"] == view_name].set_index(["network", "regime", "method"])
    start = "" if metric == "EPG" else f"{metric} "
    rows = []
    for cell in table(published_table).to_dict("records"):
        explanation = cell.get("explanation") or "LayerCAM"
        where = published_place(cell)
        row = dict(zip(("network", "regime", "explanation"), (*where, explanation), strict=True))
        row |= {"paper": cell["epg_mean"], "paper std": cell["epg_std"]}
        if (key := (*where, EXPLANATIONS[explanation])) in ours.index:
            found = ours.loc[key]
            row["ours"] = 100 * found[metric]
            row |= {name: 100 * found[start + name] for name in ("low", "high", "chance")}
            row["maps"] = found["maps" if metric == "EPG" else "recall maps"]
            row["left out"] = found[["maps", "degenerate", "left out"]].sum() - row["maps"]
        rows.append(row)
    columns = ["network", "regime", "explanation", "paper", "paper std", "ours", "low", "high", "chance"]
    frame = pd.DataFrame(rows).reindex(columns=[*columns, "maps", "left out"]).dropna(axis=1, how="all")
    return frame.astype({"maps": "Int64", "left out": "Int64"}) if "maps" in frame else frame


def verdicts(study: Study) -> pd.DataFrame:
    """The claims of `claims.csv` as differences: published, ours with interval (percent), patients, and a verdict.

    A claim about networks or a set that the grid lacks is left out; one about a network that learnt too little isn't
    judged (see `claims.too_little`).
    """

    @functools.cache
    def too_little() -> dict[tuple[str, str, str], str]:
        found = {}
        for names, pairs in cells(study).items():
            why = claims.too_little(pd.concat([predictions(train) for train, _ in pairs]))
            found[names] = f"{names[1]} ({names[2]}) learnt too little: {why}" if why else ""
        return found

    def barred(frame: pd.DataFrame) -> pd.DataFrame:
        places = zip(frame["view"], frame["network"], frame["regime"], strict=True)
        return frame.assign(barred=[too_little().get(names, "") for names in places])

    def networks(study: Study) -> pd.DataFrame:
        rows = [(*place(run), run) for run in study.trained]
        return barred(pd.DataFrame(rows, columns=["view", "network", "regime", "run"]))

    tables = {"maps": lambda study: barred(maps(study)), "networks": networks}
    words = {"one": view_of(study, "RSNA"), "many": view_of(study, "VinBigData")}
    return claims.verdicts("bcos", study, tables, {"AUC": _gain_of_area}, **words)


def _gain_of_area(a: pd.DataFrame, b: pd.DataFrame) -> Measured:
    """AUC of the first training run of `a` less that of the first of `b`, on the same test images."""
    pair = b["run"].iloc[0], a["run"].iloc[0]
    row = comparison.scores(pair).loc["macro"]
    patients = set.intersection(*(set(run.frame("predictions")["patient_id"]) for run in pair))
    return Measured(row["difference"], row["low"], row["high"], len(patients))


STORED = {"Networks and methods": overview, "Claims": verdicts}
