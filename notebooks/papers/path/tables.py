"""Paper `path` beside our runs: its table of networks, scores by method, claims, and what printed digits tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap
from cxrkit.study import claims, report, runs
from cxrkit.study.published import table
from cxrkit.study.study import Study
from papers.path.measure import METHODS

__all__ = [
    "NETWORKS",
    "SETS",
    "TITLES",
    "agreement",
    "decided",
    "denominators",
    "frames",
    "judged",
    "models",
    "name_of",
    "pairs",
    "per_method",
    "set_of",
    "sets",
    "verdicts",
]

# What the paper's Table 3 calls the same networks.
NETWORKS = {
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "ResNet50": "resnet50",
    "ResNet50V2": "resnet50_v2",
    "InceptionV3": "inception_v3",
    "Xception": "xception",
    "EfficientNetB0": "efficientnet_b0",
    "DenseNet121": "densenet121",
    "InceptionResNetV2": "inception_resnet_v2",
}
# The paper's sets by source; the phantom's diagnoses stand in for the radiographs.
SETS = {"brain_mri": "MRI", "covid_radiography": "radiographs", "phantom": "radiographs"}
_ACCURACY = {"MRI": "top1_brain", "radiographs": "top1_covid"}
TITLES = METHODS | {"both": "XRAI and Blur IG"}
_PRINTED = {name: printed for printed, name in NETWORKS.items()}
_MEANS = ("area", "kept", "chance_iou", "best_iou")


# From runs to tables


def name_of(run: runs.Run) -> str:
    """The name of a run's network as the paper prints it."""
    return _PRINTED.get(run.parameters.model, run.parameters.model)


def set_of(run: runs.Run) -> str:
    """The paper's set that a training run's images are, or stand for; else the name of their source."""
    return SETS.get(run.parameters.dataset, run.parameters.dataset)


def sets(study: Study) -> list[str]:
    """The sets of a grid, in its order."""
    return list(dict.fromkeys(set_of(run) for run in study.trained))


def pairs(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("path_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} holds no finished run of measure.ipynb")


def frames(study: Study, frame: str) -> pd.DataFrame:
    """One frame of every scores run of a grid, with its set, network and seed as columns."""
    parts = []
    for train, scores in pairs(study):
        facts = {"set": set_of(train), "network": name_of(train), "seed": train.parameters.seed}
        parts.append(scores.frame(frame).assign(**facts))
    return pd.concat(parts, ignore_index=True)


def decided(predictions: pd.DataFrame) -> pd.DataFrame:
    """One class per image: image_id, patient_id, truth, predicted (highest probability), right.

    `predictions` as `training.predict` gives them. An image of several labels has the first of them as truth, and is
    right where the predicted label is one of them; one of no label has the truth "none".
    """
    keys = ["image_id", "patient_id"]
    order = list(dict.fromkeys(predictions["label"]))
    wide = {
        column: predictions.pivot_table(column, keys, "label", sort=False)[order]
        for column in ("probability", "target")
    }
    names, target = np.asarray(order), wide["target"].fillna(0).to_numpy() > 0.5
    place = wide["probability"].to_numpy().argmax(1)
    frame = wide["target"].index.to_frame(index=False)
    return frame.assign(
        truth=np.where(target.any(1), names[target.argmax(1)], "none"),
        predicted=names[place],
        right=target[np.arange(len(place)), place],
    )


def models(study: Study) -> pd.DataFrame:
    """The paper's Table 3 beside our networks, set by set: accuracy of ours in percent with its 95 % interval, and of
    the class that is most frequent; of each set a row per published network, then others of the grid."""
    printed = table("path/tab3_models").rename(columns={"model": "network", "params_m": "parameters (M)"})
    printed = printed.set_index("network")
    parts = []
    for of in sets(study):
        own = [run for run in study.trained if set_of(run) == of]
        ours = _accuracies(pd.concat([decided(run.frame("predictions")).assign(network=name_of(run)) for run in own]))
        paper = 100 * pd.to_numeric(printed[_ACCURACY[of]], errors="coerce") if of in _ACCURACY else np.nan
        rows = printed[["parameters (M)"]].assign(paper=paper)
        ours = ours.reindex([*rows.index, *ours.index.difference(rows.index)])
        parts.append(rows.reindex(ours.index).join(ours).reset_index().assign(set=of))
    every = pd.concat(parts, ignore_index=True)
    return every[["set", *every.columns.drop("set")]]


def _accuracies(decisions: pd.DataFrame) -> pd.DataFrame:
    """Percent of right images by network, as ours, low and high, and of images of the largest class."""
    rows = {}
    for network, one in decisions.groupby("network", sort=False):
        found = bootstrap(one["right"].astype(float), one["patient_id"].astype(str), n=2000)
        rows[network] = [100 * value for value in (*found, one["truth"].value_counts(normalize=True).iloc[0])]
    columns = ["ours", "low", "high", "largest class"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("network")


def per_method(
    study: Study, frame: str, value: str, by: Sequence[str] = ("set", "network", "method"), **where: object
) -> pd.DataFrame:
    """Mean of a column of one frame with its 95 % interval (patients resampled): a row per set, network and method.

    `where`: columns that must have a value, such as `fraction=0.3, right=True`. Further columns: n (maps with a value),
    degenerate (without one), patients, spread (standard deviation over maps), and the means of area, kept, chance_iou
    and best_iou where the frame has them. Where the frame scores several outputs of a map, ask for one of them.
    """
    found, by = frames(study, frame), list(by)
    for column, wanted in where.items():
        found = found[np.isclose(found[column], wanted) if isinstance(wanted, float) else found[column] == wanted]
    groups = found.groupby(by, sort=False)
    scores = report.means(found, value, by, n=2000).set_index(by)
    scores = scores.assign(n=groups[value].count(), spread=groups[value].std(ddof=0))
    scores = scores[[value, "low", "high", "n", "degenerate", "patients", "spread"]]
    scores = scores.join(groups[[column for column in _MEANS if column in found]].mean()).reset_index()
    return scores.assign(method=scores["method"].map(TITLES)) if "method" in scores else scores


def judged(study: Study) -> dict[str, bool]:
    """What `per_method` asks of overlap: that the predicted class is right; nothing where no image was (barely trained
    networks)."""
    return {"right": True} if frames(study, "overlap")["right"].any() else {}


def agreement(study: Study) -> pd.DataFrame:
    """Full against fast XRAI per set and network: correlation of the maps, IoU of their top 30 %, shares kept in
    percent, and seconds per image."""
    by = ["set", "network"]
    found = frames(study, "variants").assign(kept=lambda rows: 100 * rows["kept_full"]).groupby(by, sort=False)
    cost = frames(study, "cost").groupby(["method", *by])["seconds"].mean()
    names = {"correlation": "correlation", "iou": "IoU of the tops", "kept": "kept, %"}
    scores = found[list(names)].mean().rename(columns=names)
    scores.insert(0, "images", found.size())
    return scores.assign(**{"full, s": cost.get("xrai"), "fast, s": cost.get("xrai_fast")}).reset_index()


# Claims


def verdicts(study: Study) -> pd.DataFrame:
    """The paper's claims as differences of our numbers, in percent points, from `claims.csv`; see
    `cxrkit.study.claims`. Overlap is taken where the predicted class is right: only then does the map explain the class
    that the mask is of."""
    trained = [train for train, _ in pairs(study)]

    def decisions(of: str) -> pd.DataFrame:
        own = [train for train in trained if set_of(train) == of]
        if not own:
            raise ParameterError(f"the grid has no {of}")
        parts = [decided(train.frame("predictions")).assign(network=name_of(train)) for train in own]
        return pd.concat(parts).astype({"right": float})

    tables = {
        "tops": _tops,
        "moved": _moved,
        "stability": lambda of: frames(of, "stability"),
        "embedding": lambda of: frames(of, "embedding").astype({"same": float}),
        "MRI": lambda of: decisions("MRI"),
        "radiographs": lambda of: decisions("radiographs"),
    }
    there = {name_of(train) for train in trained}
    return claims.verdicts("path", study, tables, expert="DenseNet121" if "DenseNet121" in there else "")


def _moved(study: Study) -> pd.DataFrame:
    """How far maps of integrated gradients move (1 - correlation): by another baseline, or by faint "noise"."""
    baselines = frames(study, "baselines").rename(columns={"baseline": "by"})
    noise = frames(study, "stability").query("method == 'ig'").assign(by="noise")
    both = pd.concat([baselines, noise], ignore_index=True)
    return both.assign(moved=1 - both["similarity"])


def _tops(study: Study) -> pd.DataFrame:
    table = frames(study, "overlap").query("output == 'probability' and right")
    return table.assign(fraction=table["fraction"].round(6), gain=table["iou"] - table["chance_iou"])


# What printed digits tell


def denominators(values: Sequence[float], digits: int = 6, most: int = 4000) -> list[int]:
    """All n up to `most` for which every value, printed with `digits` decimals, is a share k / n: smallest first."""
    values = [float(value) for value in values]
    half = 0.5 * 10**-digits * (1 + 1e-9)
    return [n for n in range(1, most + 1) if all(abs(round(v * n) / n - v) <= half for v in values)]


STORED = {
    "Networks": lambda study: models(study).dropna(subset="ours"),
    "Precision of the strongest 30 %": lambda study: per_method(
        study, "overlap", "precision", fraction=0.3, output="probability", **judged(study)
    ),
    "Claims": verdicts,
}
