"""Paper `bcos` beside our runs: its tables of accuracy and of the energy-based pointing game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap
from cxrkit.study import report, runs
from cxrkit.study.claims import Measured, measured
from cxrkit.study.published import table
from cxrkit.study.report import (
    classification_of,
    own_method,
    pointing_table,
    variant,
    view,
)
from cxrkit.study.study import Study

__all__ = [
    "REGIMES",
    "beside",
    "classification",
    "curves",
    "difference",
    "grid_energies",
    "network",
    "overview",
    "per_label",
    "regime",
    "reversed_labels",
]

# What the tables of paper `bcos` call the same networks.
PUBLISHED = {
    "Baseline ResNet50": "Baseline",
    "B-cos ResNet50": "B-cos",
    "B-cos": "B-cos",
    "B-cos_FLC": "B-cos + FLC",
    "B-cos_BP": "B-cos + BlurPool",
    "B-cos ViT-B conv stem": "B-cos ViT",
}
EXPLANATIONS = {"LayerCAM": "layercam", "Inherent": "bcos"}
# Augmentation and oversampling, as tables name them; the first is the plain one.
REGIMES = ("plain", "oversampled", "augmented", "both")
METRICS = {
    "accuracy": "acc",
    "precision": "pre",
    "recall": "rec",
    "f1": "f1",
    "auc": "auc",
}


def regime(parameters) -> str:
    """How a network was trained, by the paper's two switches: one of REGIMES; heavy augmentation says so."""
    switches = (parameters.augment != "none", parameters.oversample)
    name = {
        (False, False): "plain",
        (False, True): "oversampled",
        (True, False): "augmented",
    }.get(switches, "both")
    return f"{name}, heavy" if parameters.augment == "heavy" else name


def network(parameters) -> str:
    """What the tables call a network; the transformer has a row of its own."""
    return "B-cos ViT" if parameters.model == "bcos_vit_c_b" else variant(parameters)


def overview(study: Study) -> pd.DataFrame:
    """A row per view, network, regime and explanation of the paper: AUC, EPG and recall with intervals and chance, and
    what they rest on (see `report.pointing_table`); all folds and seeds of a cell together (patients are resampled)."""
    rows = []
    for place, pairs in cells(study).items():
        auc = _macro(pd.concat([predictions(train) for train, _ in pairs]))["auc"]
        scores = pd.concat([explain.frame("scores").assign(run=train.key) for train, explain in pairs])
        table_ = pointing_table(scores[scores["method"].isin(EXPLANATIONS.values())])
        for found in table_[table_["subset"] == "all"].to_dict("records"):
            rows.append(dict(zip(("view", "network", "regime"), place, strict=True)) | {"AUC": auc} | found)
    columns = [
        "view",
        "network",
        "regime",
        "AUC",
        "method",
        "EPG",
        "low",
        "high",
        "chance",
    ]
    columns += [
        "recall",
        "recall low",
        "recall high",
        "recall chance",
        *report.COUNTS,
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def cells(
    study: Study,
) -> dict[tuple[str, str, str], list[tuple[runs.Run, runs.Run]]]:
    """The explained networks of a grid by (view, network, regime): pairs of training run and explanation."""
    found: dict[tuple[str, str, str], list[tuple[runs.Run, runs.Run]]] = {}
    for train, explain in study.pairs():
        p = train.parameters
        found.setdefault((view(p), network(p), regime(p)), []).append((train, explain))
    return found


def predictions(train: runs.Run) -> pd.DataFrame:
    """A run's, without the added class of healthy images: where there is one, the finding's row is the paper's."""
    found = train.frame("predictions")
    return found[found["label"] != train.parameters.healthy_class] if train.parameters.healthy_class else found


def _macro(predictions: pd.DataFrame, average: str = "macro") -> Mapping[str, float]:
    found = classification_of(predictions)
    return found[found["label"] == average].iloc[0].to_dict()


def regime_of(cell: Mapping[str, object]) -> str:
    """The regime of a published cell."""
    switches = (
        str(cell["aug"]) not in ("No", "nan"),
        str(cell["oversampling"]) == "Yes",
    )
    return REGIMES[{(False, False): 0, (False, True): 1, (True, False): 2, (True, True): 3}[switches]]


def classification(study: Study, published_table: str, view_name: str) -> pd.DataFrame:
    """A published table of accuracy beside the same cells of a grid, "paper / ours" in percent in each cell.

    Ours: test images of all folds and seeds together, cut at 0.5, macro mean over labels (accuracy: share of all
    decisions). A dash: the paper's text lacks the number, or the grid has no such network.
    """
    trained: dict[tuple[str, str], list[runs.Run]] = {}
    for run in study.runs:
        if run.kind == "train" and view(run.parameters) == view_name:
            trained.setdefault((network(run.parameters), regime(run.parameters)), []).append(run)
    rows = []
    for cell in table(published_table).to_dict("records"):
        place = PUBLISHED[cell["variant"]], regime_of(cell)
        ours: Mapping[str, float] = {}
        if place in trained:
            together = pd.concat([predictions(run) for run in trained[place]])
            ours = {
                **_macro(together),
                "accuracy": _macro(together, "micro")["accuracy"],
            }
        row = {"network": place[0], "regime": place[1]}
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
    rows = []
    for cell in table(published_table).to_dict("records"):
        explanation = cell.get("explanation") or "LayerCAM"
        place = (
            PUBLISHED[cell["variant"]],
            regime_of(cell),
            EXPLANATIONS[explanation],
        )
        row = {"network": place[0], "regime": place[1], "explanation": explanation}
        row |= {"paper": cell["epg_mean"], "paper std": cell["epg_std"]}
        if place in ours.index:
            found = ours.loc[place]
            of = "" if metric == "EPG" else f"{metric} "
            row |= {"ours": 100 * found[metric]} | {key: 100 * found[of + key] for key in ("low", "high", "chance")}
            every = found[["maps", "degenerate", "left out"]].sum()
            used = found["maps" if metric == "EPG" else "recall maps"]
            row |= {"maps": used, "left out": every - used}
        rows.append(row)
    columns = [
        "network",
        "regime",
        "explanation",
        "paper",
        "paper std",
        "ours",
        "low",
        "high",
        "chance",
    ]
    columns += ["maps", "left out"]
    frame = pd.DataFrame(rows).reindex(columns=columns).dropna(axis=1, how="all")
    return frame.astype({"maps": "Int64", "left out": "Int64"}) if "maps" in frame else frame


def per_label(study: Study, view_name: str = "multilabel") -> pd.DataFrame:
    """EPG of each label on the plain B-cos network beside the authors' notebook: paper, ours, chance (percent)."""
    published = table("bcos/ext_vinbig_epg_per_class_authors_notebook")
    plain = published.query("variant == 'B-cos' and aug == 'No' and oversampling == 'No' and metric == 'precision'")
    parts = [explain.frame("scores") for _, explain in cells(study).get((view_name, "B-cos", "plain"), [])]
    columns = ["label", "paper", "ours", "low", "high", "chance"]
    if not parts:
        return pd.DataFrame(columns=columns)
    scores = pd.concat(parts).query("method == 'bcos' and threshold == 0")
    rows = []
    for label, part in scores.groupby("label", sort=True):
        printed = plain.loc[plain["class"] == label, "epg_mean"]
        found = bootstrap(part["precision"], part["patient_id"])
        row = {
            "label": label,
            "paper": 100 * printed.iloc[0] if len(printed) else np.nan,
        }
        row |= {
            "ours": 100 * found.mean,
            "low": 100 * found.low,
            "high": 100 * found.high,
        }
        rows.append(row | {"chance": 100 * part["chance"].mean()})
    return pd.DataFrame(rows, columns=columns)


def curves(study: Study, view_name: str, method: str = "own") -> pd.DataFrame:
    """EPG precision and recall against the threshold, of plainly trained networks (paper `bcos`, Fig. 3).

    `method`: "own" takes each network's own (LayerCAM for the baseline), a method's name that one for all. Column
    `method` holds the network's name.
    """
    parts = []
    for (seen, title, how), pairs in cells(study).items():
        if (seen, how) != (view_name, "plain"):
            continue
        wanted = own_method(pairs[0][0].parameters) if method == "own" else method
        scores = pd.concat([explain.frame("scores") for _, explain in pairs])
        parts.append(report.curves(scores[scores["method"] == wanted]).assign(method=title))
    if not parts:
        raise ParameterError(f"grid {study.name!r} has no explained network of the view {view_name!r}")
    return pd.concat(parts, ignore_index=True)


def difference(
    study: Study,
    view_name: str,
    a: Sequence[str],
    b: Sequence[str],
    column: str = "precision",
    thresholds: tuple[float, float] = (0.0, 0.0),
) -> Measured:
    """Mean difference a - b over the maps of the same image and label, with a 95 % interval (patients resampled).

    `a` and `b`: (network, method) or (network, method, regime), plain when not said. `column`: precision, recall,
    signed, grid or excess (grid less what a smooth spectrum would have), at the thresholds of the two. Raises
    ParameterError where the grid has no such network.
    """
    sides = zip((a, b), thresholds, strict=True)
    parts = [scores_of(study, view_name, place, threshold)[[column, "patient_id"]] for place, threshold in sides]
    both = parts[0].join(parts[1], lsuffix="_a", rsuffix="_b", how="inner")
    return measured(
        (both[f"{column}_a"] - both[f"{column}_b"]).to_numpy(),
        both["patient_id_a"].to_numpy(),
    )


def scores_of(study: Study, view_name: str, place: Sequence[str], threshold: float = 0.0) -> pd.DataFrame:
    """The scores of (network, method) or (network, method, regime), plain when not said, at one threshold; a row per
    image, label, fold and seed. Raises ParameterError where the grid has no such network."""
    title, method, how = (*place, "plain")[:3]
    found = []
    for train, explain in cells(study).get((view_name, title, how), []):
        scores = explain.frame("scores")
        scores = scores[(scores["method"] == method) & np.isclose(scores["threshold"], threshold)]
        found.append(scores.assign(fold=train.parameters.fold, seed=train.parameters.seed))
    if not found:
        raise ParameterError(f"grid {study.name!r} has no explained {title!r} ({how}) on {view_name!r}")
    together = pd.concat(found).set_index(["image_id", "label", "fold", "seed"])
    return together.assign(excess=together["grid"] - together["smooth"])


def grid_energies(study: Study) -> pd.DataFrame:
    """Share of the maps' spectral energy on the coarse grid (periods from 8 pixels on), plainly trained networks.

    `grid`: mean share with its 95 % interval; `without a grid`: the share that the same maps would have if their
    spectrum were smooth; `ratio`: one by the other, 1 where there is no grid.
    """
    rows = []
    for (seen, title, how), pairs in cells(study).items():
        if how != "plain":
            continue
        scores = pd.concat([explain.frame("scores") for _, explain in pairs])
        scores = scores[np.isclose(scores["threshold"], 0.0) & scores["method"].isin(["bcos", "input_x_gradient"])]
        for method, part in scores.groupby("method", sort=False):
            found = bootstrap(
                part["grid"].to_numpy(),
                part["patient_id"].to_numpy(),
                n=1000,
                seed=0,
            )
            smooth = part["smooth"].mean()
            row = {
                "view": seen,
                "network": title,
                "method": method,
                "grid": found.mean,
                "low": found.low,
            }
            rows.append(
                row
                | {
                    "high": found.high,
                    "without a grid": smooth,
                    "ratio": found.mean / smooth,
                }
            )
    return pd.DataFrame(rows).sort_values(["view", "method"], kind="stable")


def reversed_labels(study: Study, view_name: str = "binary") -> pd.DataFrame:
    """What becomes of the metrics when 0 and 1 change places, as the paper suspects of a compared work: percent.

    A row per plainly trained network and encoding; the predictions are the same in both rows.
    """
    rows = []
    for (seen, title, how), pairs in cells(study).items():
        if (seen, how) != (view_name, "plain"):
            continue
        given = pd.concat([predictions(train) for train, _ in pairs])
        swapped = given.assign(target=1 - given["target"], probability=1 - given["probability"])
        for encoding, shown in (("finding is 1", given), ("finding is 0", swapped)):
            found = _macro(shown)
            rows.append({"network": title, "encoding": encoding} | {key: 100 * found[key] for key in METRICS})
    return pd.DataFrame(rows)


def _claims(study: Study) -> pd.DataFrame:
    from papers.bcos.claims import claims

    views = dict.fromkeys(view(run.parameters) for run in study.trained)
    return pd.concat([claims(study, one).assign(view=one) for one in views], ignore_index=True)


STORED = {"Networks and methods": overview, "Claims": _claims}
