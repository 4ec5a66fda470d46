"""Paper `relevance` beside our runs: tables of scores, and the frames that its claims are tested on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from cxrkit import metrics
from cxrkit.data import Dataset
from cxrkit.errors import DataError, ParameterError
from cxrkit.metrics import Accumulator, LocalisationScores, bootstrap
from cxrkit.study import claims, report, runs
from cxrkit.study.claims import Measured
from cxrkit.study.published import table
from cxrkit.study.study import Study

__all__ = [
    "CLASSES",
    "METHODS",
    "aurocs",
    "first_scores",
    "intention",
    "intentions",
    "lung_mask",
    "network",
    "overlap",
    "predictions",
    "scored",
    "seen_by_all",
    "shared_mass",
    "two_classes",
    "verdicts",
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


def scored(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("relevance_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} has no finished run of measure.ipynb")


def network(parameters: Any) -> str:
    """How a network is called in tables: its name, and whether it knows many findings or two classes."""
    kind = "two classes" if two_classes(parameters) else "findings"
    return f"{_NETWORKS.get(parameters.model, parameters.model)}, {kind}"


def two_classes(parameters: Any) -> bool:
    """Whether a network was trained on a finding and a class of the normal, as those for RSNA."""
    return bool(parameters.healthy_class)


# How well the networks classify


def aurocs(study: Study) -> pd.DataFrame:
    """Table 1, NIH: AUC by class, published and ours (first network, all its folds) with its interval; the last row is
    the mean over all labels."""
    published = table("relevance/tab1_auroc_nih").iloc[0]
    trained = [train for train, _ in scored(study) if not two_classes(train.parameters)]
    folds = [train.frame("predictions") for train in trained if train.parameters.model == trained[0].parameters.model]
    found = report.classification_of(pd.concat(folds), n=300).set_index("label") if folds else pd.DataFrame()
    rows = []
    for paper_class, known in CLASSES.items():
        label = next((one for one in known if one in found.index), "–")
        ours = found.loc[label, ["auc", "auc low", "auc high"]] if label in found.index else [np.nan] * 3
        rows.append([paper_class, published[paper_class], label, *ours])
    areas = found.get("auc", pd.Series(dtype=float))
    counted = areas.drop(["micro", "macro"], errors="ignore").notna().sum()
    rows.append(["mean of 14", published["mean14"], f"all {counted}", areas.get("macro", np.nan), np.nan, np.nan])
    return pd.DataFrame(rows, columns=["class", "paper", "our label", "ours", "low", "high"])


# Maps against boxes


def first_scores(study: Study, two: bool = False, percentile: float = 100.0) -> pd.DataFrame:
    """The scores of the first network that knows many findings (or two classes); empty where there is none.

    `empty`: what a map without any pixel scores for two classes.
    """
    pairs = [pair for pair in scored(study) if two_classes(pair[0].parameters) == two] or scored(study)[:1]
    names = [network(train.parameters) for train, _ in pairs]
    frame = pd.concat([run.frame("scores") for (_, run), name in zip(pairs, names, strict=True) if name == names[0]])
    frame = frame[np.isclose(frame["percentile"], percentile) & (two_classes(pairs[0][0].parameters) == two)]
    return frame.assign(network=names[0], empty=(1 - frame["area"]) / 2)


def overlap(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores (see :func:`first_scores`) by method and threshold, the mean over labels: for two classes with its
    interval, that of an empty map, and of the finding alone with its chance."""
    gathered = Accumulator()
    values = {"two_class": frame["two_class"], "foreground": frame["foreground"]}
    chance = {"two_class": frame["empty"], "foreground": frame["foreground_chance"]}
    scores = LocalisationScores(*({k: v.to_numpy() for k, v in of.items()} for of in (values, chance)))
    columns = {name: frame[name] for name in ("method", "threshold", "label")}
    gathered.add(scores, frame["patient_id"].to_numpy(), **columns)
    found = gathered.table().query("label == 'macro'").set_index(["method", "threshold"])
    both, alone = (found[found["score"] == score] for score in ("two_class", "foreground"))
    shown = both[["mean", "low", "high", "chance"]].set_axis(["two classes", "low", "high", "empty"], axis=1)
    shown = shown.assign(**{"finding alone": alone["mean"], "chance": alone["chance"]})
    shown = shown.assign(maps=both["n"], degenerate=both["degenerate"]).reset_index()
    return shown.assign(method=shown["method"].map(METHODS)).rename(columns={"threshold": "T"})


# What several networks look at


def intentions(study: Study) -> list[tuple[str, bool, dict[str, np.ndarray]]]:
    """Name, whether it knows two classes, and maps of every network that was shown a set of images: the same images,
    in the first network's order. Raises DataError where a network was shown others."""
    found = [
        (network(train.parameters), two_classes(train.parameters), run.arrays("intention"))
        for train, run in scored(study)
        if (run.folder / "intention.npz").is_file()
    ]
    return [(name, two, _in_order(kept, found[0][2]["image_ids"], (name, found[0][0]))) for name, two, kept in found]


def _in_order(kept: dict[str, np.ndarray], ids: np.ndarray, names: tuple[str, str]) -> dict[str, np.ndarray]:
    _refuse_others(kept["image_ids"], ids, *names)
    places = pd.Index(kept["image_ids"]).get_indexer(ids)
    of_images = {name: values.take(places, int(name == "maps")) for name, values in kept.items() if name != "methods"}
    return kept | of_images


def _refuse_others(own: Iterable[str], ids: Iterable[str], name: str, first: str) -> None:
    if others := sorted({*map(str, own)} ^ {*map(str, ids)}):
        raise DataError(
            f"{name!r} was shown other images than {first!r}: {len(others)} are of one of them alone, such as "
            f"{others[0]!r}; name the same images for all by `other_images`"
        )


def predictions(study: Study) -> dict[str, pd.DataFrame]:
    """What every network of :func:`intentions` says of the test images that all were shown, by the network's name.

    Raises DataError where a network has others."""
    shown = [(train, run) for train, run in scored(study) if (run.folder / "predictions.csv").is_file()]
    found = {network(train.parameters): run.frame("predictions") for train, run in shown}
    for name, frame in found.items():
        first = next(iter(found))
        _refuse_others(frame["image_id"], found[first]["image_id"], name, first)
    return found


def seen_by_all(study: Study, least: int = 0) -> Dataset:
    """The data set whose positive and normal images every network of the grid was shown, of at least `least` pixels."""
    train, run = next(pair for pair in scored(study) if (pair[1].folder / "intention.npz").is_file())
    return report.drawn_finer(train.parameters, least, **run.parameters.other_images)


def intention(study: Study) -> pd.DataFrame:
    """Where the maps of those images lie: a row per network, method and image.

    `inside`: share of the positive mass in the boxes, `area` their share of the image; `lungs` and `lung_area`: the
    same of the clear lung (on positives without the box), nan where the images aren't the phantom's. `two`: whether
    the network knows two classes; `first`: the first one of its kind.
    """
    seen = intentions(study)
    firsts = {two: called for called, two, _ in reversed(seen)}
    clear = _clear_lungs(study, seen[0][2]) if seen else None
    parts = [pd.DataFrame(columns=["images", "method", "two", "first", "inside", "lung_area", "network"])]
    for called, two, kept in seen:
        masks = torch.from_numpy(kept["masks"])
        facts = {"image_id": kept["image_ids"], "patient_id": kept["patient_ids"], "images": kept["groups"]}
        facts |= {"network": called, "model": called.partition(",")[0], "two": two, "first": firsts[two] == called}
        for method, own in zip(kept["methods"], kept["maps"], strict=True):
            found = {"method": str(method)} | _inside(torch.from_numpy(own), masks, "inside", "area")
            found |= (
                {"lungs": np.nan, "lung_area": np.nan}
                if clear is None
                else _inside(torch.from_numpy(own), clear, "lungs", "lung_area")
            )
            parts.append(pd.DataFrame(facts | found))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _inside(maps: torch.Tensor, masks: torch.Tensor, share: str, area: str) -> dict[str, np.ndarray]:
    return {share: metrics.energy_pointing_game(maps, masks).numpy(), area: metrics.chance_level(masks).numpy()}


def _clear_lungs(study: Study, kept: dict[str, np.ndarray]) -> torch.Tensor | None:
    data = seen_by_all(study)
    if data.name != "phantom":
        return None
    lungs = [lung_mask(data, data.image_ids.index(one)) for one in kept["image_ids"]]
    return torch.from_numpy(np.stack(lungs) & ~kept["masks"])


def lung_mask(data: Dataset, row: int) -> np.ndarray:
    """Where the lungs of a phantom's image are, bool [size, size]."""
    from cxrkit.phantom.anatomy import Grid

    renderer = getattr(data.renderer, "renderer", data.renderer)  # behind the class that was added
    case = renderer.case(int(data.rows[row]))
    centres = (np.arange(data.size) + 0.5) / data.size
    return (Grid(case.anatomy, case.frame, centres, centres).edges > 0).all(0)


def shared_mass(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of their positive mass that two maps put in the same pixels, ``[..., H, W]`` twice -> ``[...]``: the
    sum of the smaller one after both were made to sum to 1. 1: the same, 0: nowhere in common; nan without any."""
    both = [np.clip(values, 0, None).astype(np.float64) for values in (maps, others)]
    totals = [values.sum((-2, -1), keepdims=True) for values in both]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.minimum(both[0] / totals[0], both[1] / totals[1]).sum((-2, -1))


# Claims


def _beyond_area(a: pd.DataFrame, _: pd.DataFrame) -> Measured:
    """Share of the mass in the clear lung less that area's share of the image."""
    found, area = bootstrap(a["lungs"], a["patient_id"], n=500), a["lung_area"].mean()
    return Measured(*(value - area for value in found), a.loc[a["lungs"].notna(), "patient_id"].nunique())


def verdicts(study: Study) -> pd.DataFrame:
    """The paper's claims tested on a study."""
    tables = {"overlap": first_scores, "intention": intention}
    return claims.verdicts("relevance", study, tables, {"beyond area": _beyond_area})


STORED = {"Classes": aurocs, "Overlap with boxes": lambda study: overlap(first_scores(study)), "Claims": verdicts}
