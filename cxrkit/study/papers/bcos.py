"""Paper `bcos` beside our runs: its tables of accuracy and of the energy-based pointing game, and its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap
from cxrkit.study import comparing, report, runs
from cxrkit.study.papers.claims import Claim, Measured, measured
from cxrkit.study.papers.claims import table as claim_table
from cxrkit.study.papers.published import table
from cxrkit.study.report import (
    classification_of,
    explained_runs,
    own_method,
    pointing_table,
    runs_of,
    synthetic,
    variant,
    view,
)

__all__ = [
    "REGIMES",
    "beside",
    "claims",
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
METRICS = {"accuracy": "acc", "precision": "pre", "recall": "rec", "f1": "f1", "auc": "auc"}
_CLAIMS = (
    ("FLC raises the EPG of B-cos explanations", ("B-cos + FLC", "bcos"), ("B-cos", "bcos")),
    ("BlurPool raises the EPG of B-cos explanations", ("B-cos + BlurPool", "bcos"), ("B-cos", "bcos")),
    ("B-cos + FLC beats LayerCAM on the baseline", ("B-cos + FLC", "bcos"), ("Baseline", "layercam")),
    ("Plain B-cos falls behind LayerCAM on the baseline", ("B-cos", "bcos"), ("Baseline", "layercam")),
    (
        "With FLC, B-cos explanations beat LayerCAM on the same network",
        ("B-cos + FLC", "bcos"),
        ("B-cos + FLC", "layercam"),
    ),
)


def regime(parameters) -> str:
    """How a network was trained, by the paper's two switches: one of REGIMES; heavy augmentation says so."""
    switches = (parameters.augment != "none", parameters.oversample)
    name = {(False, False): "plain", (False, True): "oversampled", (True, False): "augmented"}.get(switches, "both")
    return f"{name}, heavy" if parameters.augment == "heavy" else name


def network(parameters) -> str:
    """What the tables call a network; the transformer has a row of its own."""
    return "B-cos ViT" if parameters.model == "bcos_vit_c_b" else variant(parameters)


def overview(name: str) -> pd.DataFrame:
    """A row per view, network, regime and method: AUC, EPG with interval, chance, recall; all folds and seeds of a
    cell together (patients are resampled)."""
    rows = []
    for place, pairs in _cells(name).items():
        auc = _macro(pd.concat([_predictions(train) for train, _ in pairs]))["auc"]
        table_ = pointing_table(pd.concat([explain.frame("scores") for _, explain in pairs]))
        for found in table_[table_["subset"] == "all"].to_dict("records"):
            rows.append(dict(zip(("view", "network", "regime"), place, strict=True)) | {"AUC": auc} | found)
    columns = ["view", "network", "regime", "AUC", "method", "EPG", "low", "high", "chance", "recall", "maps"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "degenerate"])


def _cells(name: str) -> dict[tuple[str, str, str], list[tuple[runs.Run, runs.Run]]]:
    found: dict[tuple[str, str, str], list[tuple[runs.Run, runs.Run]]] = {}
    for train, explain in explained_runs(name):
        p = train.parameters
        found.setdefault((view(p), network(p), regime(p)), []).append((train, explain))
    return found


def _predictions(train: runs.Run) -> pd.DataFrame:
    """Without the added class of healthy images: where there is one, the finding's row is the paper's."""
    found = train.frame("predictions")
    return found[found["label"] != train.parameters.healthy_class] if train.parameters.healthy_class else found


def _macro(predictions: pd.DataFrame, average: str = "macro") -> Mapping[str, float]:
    found = classification_of(predictions)
    return found[found["label"] == average].iloc[0].to_dict()


def _regime_of(cell: Mapping[str, object]) -> str:
    switches = (str(cell["aug"]) not in ("No", "nan"), str(cell["oversampling"]) == "Yes")
    return REGIMES[{(False, False): 0, (False, True): 1, (True, False): 2, (True, True): 3}[switches]]


def classification(name: str, published_table: str, view_name: str) -> pd.DataFrame:
    """A published table of accuracy beside the same cells of a grid, "paper / ours" in percent in each cell.

    Ours: test images of all folds and seeds together, cut at 0.5, macro mean over labels (accuracy: share of all
    decisions). A dash: the paper's text lacks the number, or the grid has no such network.
    """
    trained: dict[tuple[str, str], list[runs.Run]] = {}
    for run in runs_of(name):
        if run.kind == "train" and view(run.parameters) == view_name:
            trained.setdefault((network(run.parameters), regime(run.parameters)), []).append(run)
    rows = []
    for cell in table(published_table).to_dict("records"):
        place = PUBLISHED[cell["variant"]], _regime_of(cell)
        ours: Mapping[str, float] = {}
        if place in trained:
            together = pd.concat([_predictions(run) for run in trained[place]])
            ours = {**_macro(together), "accuracy": _macro(together, "micro")["accuracy"]}
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
    level. Rows that the grid doesn't hold have no numbers of ours.
    """
    ours = ours[ours["view"] == view_name].set_index(["network", "regime", "method"])
    rows = []
    for cell in table(published_table).to_dict("records"):
        explanation = cell.get("explanation") or "LayerCAM"
        place = PUBLISHED[cell["variant"]], _regime_of(cell), EXPLANATIONS[explanation]
        row = {"network": place[0], "regime": place[1], "explanation": explanation}
        row |= {"paper": cell["epg_mean"], "paper std": cell["epg_std"]}
        if place in ours.index:
            found = ours.loc[place]
            row |= {"ours": 100 * found[metric], "chance": 100 * found["chance"], "maps": found["maps"]}
            if metric == "EPG":
                row |= {"low": 100 * found["low"], "high": 100 * found["high"]}
        rows.append(row)
    columns = ["network", "regime", "explanation", "paper", "paper std", "ours", "low", "high", "chance", "maps"]
    frame = pd.DataFrame(rows).reindex(columns=columns).dropna(axis=1, how="all")
    return frame.astype({"maps": "Int64"}) if "maps" in frame else frame


def per_label(name: str, view_name: str = "multilabel") -> pd.DataFrame:
    """EPG of each label on the plain B-cos network beside the authors' notebook: paper, ours, chance (percent)."""
    published = table("ext_bcos_vinbig_epg_per_class_authors_notebook")
    plain = published.query("variant == 'B-cos' and aug == 'No' and oversampling == 'No' and metric == 'precision'")
    parts = [explain.frame("scores") for _, explain in _cells(name).get((view_name, "B-cos", "plain"), [])]
    columns = ["label", "paper", "ours", "low", "high", "chance"]
    if not parts:
        return pd.DataFrame(columns=columns)
    scores = pd.concat(parts).query("method == 'bcos' and threshold == 0")
    rows = []
    for label, part in scores.groupby("label", sort=True):
        printed = plain.loc[plain["class"] == label, "epg_mean"]
        found = bootstrap(part["precision"], part["patient_id"])
        row = {"label": label, "paper": 100 * printed.iloc[0] if len(printed) else np.nan}
        row |= {"ours": 100 * found.mean, "low": 100 * found.low, "high": 100 * found.high}
        rows.append(row | {"chance": 100 * part["chance"].mean()})
    return pd.DataFrame(rows, columns=columns)


def curves(name: str, view_name: str, method: str = "own") -> pd.DataFrame:
    """EPG precision and recall against the threshold, of plainly trained networks (paper `bcos`, Fig. 3).

    `method`: "own" takes each network's own (LayerCAM for the baseline), a method's name that one for all. Column
    `method` holds the network's name.
    """
    parts = []
    for (seen, title, how), pairs in _cells(name).items():
        if (seen, how) != (view_name, "plain"):
            continue
        wanted = own_method(pairs[0][0].parameters) if method == "own" else method
        scores = pd.concat([explain.frame("scores") for _, explain in pairs])
        parts.append(report.curves(scores[scores["method"] == wanted]).assign(method=title))
    if not parts:
        raise ParameterError(f"grid {name!r} has no explained network of the view {view_name!r}")
    return pd.concat(parts, ignore_index=True)


def difference(
    name: str,
    view_name: str,
    a: Sequence[str],
    b: Sequence[str],
    column: str = "precision",
    thresholds: tuple[float, float] = (0.0, 0.0),
) -> Measured:
    """Mean difference a - b over the maps of the same image and label, with a 95 % interval (patients resampled).

    `a` and `b`: (network, method) or (network, method, regime), plain when not said. `column`: precision, recall,
    signed or grid, at the thresholds of the two. Raises ParameterError where the grid has no such network.
    """
    parts = []
    for place, threshold in zip((a, b), thresholds, strict=True):
        title, method, how = (*place, "plain")[:3]
        found = []
        for train, explain in _cells(name).get((view_name, title, how), []):
            scores = explain.frame("scores")
            scores = scores[(scores["method"] == method) & np.isclose(scores["threshold"], threshold)]
            found.append(scores.assign(fold=train.parameters.fold, seed=train.parameters.seed))
        if not found:
            raise ParameterError(f"grid {name!r} has no explained {title!r} ({how}) on {view_name!r}")
        keys = ["image_id", "label", "fold", "seed"]
        parts.append(pd.concat(found).set_index(keys)[[column, "patient_id"]])
    both = parts[0].join(parts[1], lsuffix="_a", rsuffix="_b", how="inner")
    return measured((both[f"{column}_a"] - both[f"{column}_b"]).to_numpy(), both["patient_id_a"].to_numpy())


def claims(name: str, view_name: str = "binary") -> pd.DataFrame:
    """The paper's claims as differences: published, ours with interval (percent), and a plain verdict."""
    made = [*_about_maps(name, view_name), *_about_training(name, view_name), *_about_accuracy(name, view_name)]
    return claim_table(made)


def _about_maps(name: str, view_name: str) -> list[Claim]:
    published = pd.concat([table("bcos_tab3_rsna_epg_antialiasing"), table("bcos_tab2_rsna_epg")])
    paper = {
        (PUBLISHED[cell["variant"]], EXPLANATIONS[cell["explanation"]], _regime_of(cell)): cell["epg_mean"]
        for cell in published.to_dict("records")
    }
    found = []
    for text, a, b in _CLAIMS:
        try:
            ours = difference(name, view_name, a, b)
        except ParameterError:  # a small grid holds no such pair
            continue
        found.append(Claim(text, paper[(*a, "plain")] - paper[(*b, "plain")], ours, synthetic=synthetic(name)))
    return found


def _about_training(name: str, view_name: str) -> list[Claim]:
    published = {
        (PUBLISHED[cell["variant"]], _regime_of(cell)): cell["epg_mean"]
        for cell in table("bcos_tab3_rsna_epg_antialiasing").query("explanation == 'Inherent'").to_dict("records")
    }
    found = []
    for title in ("B-cos", "B-cos + FLC", "B-cos + BlurPool"):
        gain = published[(title, "both")] - published[(title, "plain")]
        text = f"Augmentation and oversampling {'raise' if gain > 0 else 'lower'} the EPG of {title}"
        try:
            ours = difference(name, view_name, (title, "bcos", "both"), (title, "bcos"))
        except ParameterError:
            continue
        found.append(Claim(text, gain, ours, synthetic=synthetic(name)))
    text = "The EPG grows with the threshold, up to 0.7 of the maximum"
    try:
        ours = difference(name, view_name, ("B-cos + FLC", "bcos"), ("B-cos + FLC", "bcos"), thresholds=(0.7, 0.0))
        found.append(Claim(text, 1, ours, printed="Fig. 3", synthetic=synthetic(name)))
    except ParameterError:
        pass
    return found


def _about_accuracy(name: str, view_name: str) -> list[Claim]:
    rsna = {_regime_of(cell): cell for cell in table("bcos_tab1_rsna_classification").dropna(
        subset="auc_mean").to_dict("records")}  # fmt: skip
    trained = {
        (network(run.parameters), regime(run.parameters), view(run.parameters)): run
        for run in reversed(runs_of(name))
        if run.kind == "train"
    }
    found = []
    for how, text in (
        ("augmented", "Light augmentation raises the AUC"),
        ("oversampled", "Oversampling alone does not"),
    ):
        pair = [trained.get(("B-cos", one, view_name)) for one in ("plain", how)]
        if None not in pair:
            gain = rsna[how]["auc_mean"] - rsna["plain"]["auc_mean"]
            found.append(Claim(f"{text} (B-cos)", gain, _auc_difference(pair), synthetic=synthetic(name)))
    pair = [trained.get((title, "plain", "multilabel")) for title in ("Baseline", "B-cos")]
    if None not in pair:
        base, bcos = table("bcos_tab6_vinbig_classification")["auc_mean"]
        text = "With fourteen labels, B-cos loses a little AUC to the baseline"
        found.append(Claim(text, bcos - base, _auc_difference(pair), synthetic=synthetic(name)))
    return found


def _auc_difference(pair: Sequence[runs.Run]) -> Measured:
    """Second less first, on the same test images; the first fold and seed."""
    row = comparing.scores((pair[0], pair[1])).loc["macro"]
    patients = set.intersection(*(set(run.frame("predictions")["patient_id"]) for run in pair))
    return Measured(row["difference"], row["low"], row["high"], len(patients))


def grid_energies(name: str) -> pd.DataFrame:
    """Share of the maps' spectral energy on the coarse grid (periods from 8 pixels on), plainly trained networks.

    `grid`: mean share with its 95 % interval; `without a grid`: the share that the same maps would have if their
    spectrum were smooth; `ratio`: one by the other, 1 where there is no grid.
    """
    rows = []
    for (seen, title, how), pairs in _cells(name).items():
        if how != "plain":
            continue
        scores = pd.concat([explain.frame("scores") for _, explain in pairs])
        scores = scores[np.isclose(scores["threshold"], 0.0) & scores["method"].isin(["bcos", "input_x_gradient"])]
        for method, part in scores.groupby("method", sort=False):
            found = bootstrap(part["grid"].to_numpy(), part["patient_id"].to_numpy(), n=1000, seed=0)
            smooth = part["smooth"].mean()
            row = {"view": seen, "network": title, "method": method, "grid": found.mean, "low": found.low}
            rows.append(row | {"high": found.high, "without a grid": smooth, "ratio": found.mean / smooth})
    return pd.DataFrame(rows).sort_values(["view", "method"], kind="stable")


def reversed_labels(name: str, view_name: str = "binary") -> pd.DataFrame:
    """What becomes of the metrics when 0 and 1 change places, as the paper suspects of a compared work: percent.

    A row per plainly trained network and encoding; the predictions are the same in both rows.
    """
    rows = []
    for (seen, title, how), pairs in _cells(name).items():
        if (seen, how) != (view_name, "plain"):
            continue
        predictions = pd.concat([_predictions(train) for train, _ in pairs])
        swapped = predictions.assign(target=1 - predictions["target"], probability=1 - predictions["probability"])
        for encoding, shown in (("finding is 1", predictions), ("finding is 0", swapped)):
            found = _macro(shown)
            rows.append({"network": title, "encoding": encoding} | {key: 100 * found[key] for key in METRICS})
    return pd.DataFrame(rows)
