"""Paper `relevance` beside our runs: its two tables, what Table 2 can and can't say, and the cells of our networks.

`relevance_maps` holds what is asked of the maps themselves, and the claims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from cxrkit import grid
from cxrkit.errors import ParameterError
from cxrkit.metrics import Accumulator, Interval, LocalisationScores, bootstrap
from cxrkit.metrics.statistics import resampled_rows
from cxrkit.study import runs
from cxrkit.study.published import table
from cxrkit.study.study import Study
from cxrkit.train import scoring

__all__ = [
    "CLASSES",
    "METHODS",
    "aurocs",
    "aurocs_of_two",
    "box_areas",
    "cells",
    "first_network",
    "first_scores",
    "foreground_bound",
    "least_cover",
    "limits",
    "network",
    "overlap_table",
    "scored",
    "side_by_side",
    "table2",
    "two_classes",
]

# The paper's classes, and what other sets call them.
CLASSES = {
    "Atelectasis": ("Atelectasis",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Effusion": ("Effusion", "Pleural effusion"),
    "Infiltration": ("Infiltration",),
    "Mass": ("Mass", "Nodule/Mass"),
    "Nodule": ("Nodule", "Nodule/Mass"),
    "Pneumonia": ("Pneumonia",),
    "Pneumothorax": ("Pneumothorax",),
}
METHODS = {"cam": "CAM", "lrp": "LRP", "rap": "RAP"}
_NETWORKS = {
    "densenet121": "DenseNet-121",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
}


def first_network() -> runs.Run:
    """The first trained network of the grid that the pages show."""
    return grid.load("relevance").trained[0]


def scored(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("relevance_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} has no scores of notebook relevance_scores")


def network(parameters: Any) -> str:
    """How a network is called in tables: its name, and whether it knows many findings or two classes."""
    kind = "two classes" if two_classes(parameters) else "findings"
    return f"{_NETWORKS.get(parameters.model, parameters.model)}, {kind}"


def two_classes(parameters: Any) -> bool:
    """Whether a network was trained on a finding and a class of the normal, as those for RSNA."""
    return bool(parameters.healthy_class)


# The published table and its limits


def box_areas() -> pd.DataFrame:
    """By class of the paper: boxes, their mean share of the image, and what an empty and a full map score there for
    two classes. From the published list of boxes, as the package torchxrayvision carries it; DataError without it."""
    found = _area_of_each_box().groupby("label").agg(["size", "mean"]).reindex(list(CLASSES))
    found = found.rename(columns={"size": "boxes", "mean": "area"}).rename_axis("class").reset_index()
    return found.assign(empty=(1 - found["area"]) / 2, full=found["area"] / 2)


def limits(areas: pd.DataFrame | None = None) -> pd.DataFrame:
    """The 120 cells of Table 2, each with its class's `empty` and `full`, and `above`: whether it beats the empty
    map."""
    cells = table("relevance/tab2_miou").merge(box_areas() if areas is None else areas, on="class")
    return cells.assign(above=cells["mean_iou"] > cells["empty"])


def least_cover(threshold: float, cells: int = 7, size: int = 224) -> float:
    """The least share of the image that a CAM without negative values can cover at a threshold: one cell is 1, the
    others are 0, enlarged as CAM is (bilinear); the best place of the cell."""
    single = torch.eye(cells**2).view(cells**2, 1, cells, cells)
    maps = torch.nn.functional.interpolate(single, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    return float((maps >= threshold * maps.amax((1, 2), keepdim=True)).double().mean((1, 2)).min())


def foreground_bound(cover: float) -> pd.Series:
    """By class: the highest mean IoU of the finding alone that regions of at least this share of the image can have
    with the published boxes."""
    return (_area_of_each_box() / cover).clip(upper=1).groupby("label").mean().reindex(list(CLASSES))


def _area_of_each_box() -> pd.Series:
    """Share of the image by label; an image has at most one box of a label, so a box is an image and a class."""
    from cxrkit.data.public.xrv_tables import annotations

    boxes = annotations("nih").boxes.set_index("label")
    return (boxes["x_max"] - boxes["x_min"]) * (boxes["y_max"] - boxes["y_min"]) / 1024**2


# Ours


def _gathered(study: Study, percentile: float = 100.0) -> pd.DataFrame:
    """Scores of all networks of a grid, with their name, whether they know two classes, and the paper's class."""
    parts = []
    for train, run in scored(study):
        frame = run.frame("scores")
        frame = frame[np.isclose(frame["percentile"], percentile)]
        parts.append(frame.assign(network=network(train.parameters), two=two_classes(train.parameters)))
    found = pd.concat(parts, ignore_index=True)
    return found.assign(empty=(1 - found["area"]) / 2, full=found["area"] / 2)


def first_scores(study: Study, two: bool = False, percentile: float = 100.0) -> pd.DataFrame:
    """The scores of the first network that knows many findings (or two classes); empty where there is none."""
    found = _gathered(study, percentile)
    found = found[found["two"] == two]
    return found[found["network"] == found["network"].iloc[0]] if len(found) else found


def table2(study: Study, percentile: float = 100.0) -> pd.DataFrame:
    """Table 2 in short: by method and threshold the mean over classes, two-class IoU published and ours with its
    interval, what an empty map scores on ours, and ours of the finding alone beside chance."""
    paper = table("relevance/tab2_miou").groupby(["method", "threshold"])["mean_iou"].mean()
    ours = overlap_table(first_scores(study, percentile=percentile))
    published = [paper.get((row.method, round(row.T, 3)), np.nan) for row in ours.itertuples()]
    ours.insert(2, "paper", published)
    return ours.rename(columns={"two classes": "ours"})


def overlap_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores as `measuring.relevance.scores` gives them (one percentile), by method and threshold: the mean over labels
    for two classes with its interval, that of an empty map, and of the finding alone with its chance."""
    frame = frame.assign(empty=(1 - frame["area"]) / 2)
    gathered = Accumulator()
    values = {"two_class": frame["two_class"], "foreground": frame["foreground"]}
    chance = {"two_class": frame["empty"], "foreground": frame["foreground_chance"]}
    scores = LocalisationScores(*({k: v.to_numpy() for k, v in of.items()} for of in (values, chance)))
    columns = {name: frame[name] for name in ("method", "threshold", "label")}
    gathered.add(scores, frame["patient_id"].to_numpy(), **columns)
    found = gathered.table().query("label == 'macro'").set_index(["score", "method", "threshold"])
    rows = []
    for method, threshold in found.loc["two_class"].index:
        both, alone = (found.loc[(score, method, threshold)] for score in ("two_class", "foreground"))
        row = {
            "method": METHODS[method],
            "T": threshold,
            "two classes": both["mean"],
        }
        row |= {"low": both["low"], "high": both["high"], "empty": both["chance"]}
        row |= {"finding alone": alone["mean"], "chance": alone["chance"]}
        rows.append(row | {"maps": both["n"], "degenerate": both["degenerate"]})
    return pd.DataFrame(rows)


def cells(study: Study, percentile: float = 100.0) -> pd.DataFrame:
    """All cells of Table 2, a row per class, threshold and method: paper, ours (two classes) with its interval, empty
    (an empty map on ours), alone (the finding alone), network. Pneumonia is that of a network with two classes where
    no other knows it."""
    frames = [first_scores(study, two, percentile) for two in (False, True)]
    rows = []
    for cell in table("relevance/tab2_miou").to_dict("records"):
        row = {
            "class": cell["class"],
            "T": cell["threshold"],
            "method": cell["method"],
            "paper": cell["mean_iou"],
        }
        for frame in frames:
            part = frame[
                frame["label"].isin(CLASSES[cell["class"]]) & np.isclose(frame["threshold"], cell["threshold"])
            ]
            part = part[part["method"].map(METHODS) == cell["method"]]
            if len(part):
                found = bootstrap(
                    part["two_class"].to_numpy(),
                    part["patient_id"].to_numpy(),
                    n=300,
                )
                row |= {
                    "ours": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "empty": part["empty"].mean(),
                }
                row |= {
                    "alone": part["foreground"].mean(),
                    "network": part["network"].iloc[0],
                }
                break
        rows.append(row)
    columns = [
        "class",
        "T",
        "method",
        "paper",
        "ours",
        "low",
        "high",
        "empty",
        "alone",
        "network",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def side_by_side(found: pd.DataFrame) -> pd.DataFrame:
    """`cells` with a row per class and threshold, and per method the paper's number and ours."""
    wide = found.pivot(index=["class", "T"], columns="method", values=["paper", "ours"])
    wide = wide.reindex(columns=[(who, m) for m in METHODS.values() for who in ("paper", "ours")])
    wide.columns = [f"{m}{' ours' if who == 'ours' else ''}" for who, m in wide.columns]
    return wide.reset_index()


def aurocs(study: Study) -> pd.DataFrame:
    """Table 1, NIH: AUC by class, published and ours (first network, all its folds) with its interval; the last row is
    the mean over all labels."""
    published = table("relevance/tab1_auroc_nih").iloc[0]
    trained = [train for train, _ in scored(study) if not two_classes(train.parameters)]
    first = [train for train in trained if network(train.parameters) == network(trained[0].parameters)]  # its folds
    frame = pd.concat([train.frame("predictions") for train in first] or [pd.DataFrame(columns=["label"])])
    rows = []
    for paper_class, known in CLASSES.items():
        part = frame[frame["label"].isin(known)]
        ours = _auc(part["target"], part["logit"], part["patient_id"]) if len(part) else Interval(*[np.nan] * 3)
        label = part["label"].iloc[0] if len(part) else "–"
        row = {
            "class": paper_class,
            "paper": published[paper_class],
            "our label": label,
        }
        rows.append(row | {"ours": ours.mean, "low": ours.low, "high": ours.high})
    parts = (part for _, part in frame.groupby("label"))
    drawn = [scoring.area(part["target"].to_numpy(), part["logit"].to_numpy()) for part in parts]
    mean = float(np.nanmean(drawn)) if np.isfinite(drawn).any() else np.nan
    last = f"all {int(np.isfinite(drawn).sum())}"
    return pd.DataFrame(
        [
            *rows,
            {
                "class": "mean of 14",
                "paper": published["mean14"],
                "our label": last,
                "ours": mean,
            },
        ]
    )


def aurocs_of_two(study: Study) -> pd.DataFrame:
    """Table 1, RSNA: AUC for pneumonia of networks with two classes, and of one that learnt many findings."""
    published = table("relevance/tab1_auroc_rsna").set_index("model")["auroc"]
    rows = []
    for train, run in scored(study):
        if (run.folder / "predictions.csv").is_file():
            frame = run.frame("predictions")
            ours = _auc(frame["target"], frame["logit"], frame["patient_id"])
            called = _NETWORKS.get(train.parameters.model, train.parameters.model)
            row = {"paper's network": called if two_classes(train.parameters) else "CheXNet"}
            row |= {
                "our network": network(train.parameters),
                "ours": ours.mean,
                "low": ours.low,
                "high": ours.high,
            }
            rows.append(row)
    columns = ["paper's network", "paper", "our network", "ours", "low", "high"]
    found = pd.DataFrame(rows).reindex(columns=columns)
    found["paper"] = found["paper's network"].map(published)
    left = [name for name in published.index if name not in set(found["paper's network"])]
    rest = pd.DataFrame({"paper's network": left, "paper": published[left].to_numpy()}).reindex(columns=columns)
    found.loc[found["paper"].isna(), "paper's network"] = "–"
    return pd.concat([found, rest.assign(**{"our network": "–"})], ignore_index=True)


def _auc(target: Any, value: Any, patients: Any, n: int = 300, seed: int = 0) -> Interval:
    """AUC with its 95 % interval, patients resampled; nan without both classes."""
    target, value = np.asarray(target, dtype=float), np.asarray(value, dtype=float)
    drawn = [scoring.area(target[rows], value[rows]) for rows in resampled_rows(patients, n, seed)]
    bounds = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Interval(scoring.area(target, value), float(bounds[0]), float(bounds[1]))


def _claims(study: Study) -> pd.DataFrame:
    from papers.relevance.maps import claims

    return claims(study)


STORED = {
    "Classes": aurocs,
    "Overlap with boxes": lambda study: overlap_table(first_scores(study)),
    "Claims": _claims,
}
