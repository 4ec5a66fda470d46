"""Paper `path` beside our runs: its table of networks, its figures as numbers, and its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from cxrkit.attribution.xrai import top_fraction
from cxrkit.errors import ParameterError
from cxrkit.metrics import Interval, bootstrap, classification_report
from cxrkit.study import runs
from cxrkit.study.claims import Claim, Measured, measured
from cxrkit.study.claims import table as claim_table
from cxrkit.study.published import table
from cxrkit.study.study import Study
from papers.path.measure import METHODS

__all__ = [
    "agreement",
    "claims",
    "confusion",
    "decided",
    "difference",
    "exclusive_report",
    "figure_columns",
    "first_of_each",
    "frames",
    "judged",
    "models",
    "name_of",
    "pairs",
    "per_method",
    "separation",
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
TITLES = METHODS | {"both": "XRAI and Blur IG"}
_MORE = ("area", "kept", "chance_iou", "best_iou")
_PRINTED = {name: printed for printed, name in NETWORKS.items()}

# From runs to tables


def name_of(run: runs.Run) -> str:
    """The name of a run's network as the paper prints it."""
    return _PRINTED.get(run.parameters.model, run.parameters.model)


def pairs(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("path_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} holds no finished run of measure.ipynb")


def first_of_each(study: Study) -> dict[str, runs.Run]:
    """The scores run of the first seed of each network, by the network's name."""
    found: dict[str, runs.Run] = {}
    for train, scores in pairs(study):
        found.setdefault(name_of(train), scores)
    return found


def frames(study: Study, frame: str) -> pd.DataFrame:
    """One frame of every scores run of a grid, with its network and seed as columns."""
    parts = [
        scores.frame(frame).assign(network=name_of(train), seed=train.parameters.seed) for train, scores in pairs(study)
    ]
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


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """Images by true (rows) and predicted (columns) class, in the order of the labels."""
    order = list(dict.fromkeys(predictions["label"]))
    one = decided(predictions)
    rows = [*order, *(["none"] if (one["truth"] == "none").any() else [])]
    return pd.crosstab(one["truth"], one["predicted"]).reindex(index=rows, columns=order, fill_value=0)


def exclusive_report(predictions: pd.DataFrame) -> pd.DataFrame:
    """Classification metrics where each image gets the one class of highest probability.

    Rows as `metrics.classification_report` gives them; the micro F1 then is the accuracy, because each wrong image is
    one false positive and one false negative.
    """
    one = decided(predictions)
    order = list(dict.fromkeys(predictions["label"]))
    targets, chosen = (
        np.stack([(one[column] == label).to_numpy() for label in order], 1).astype(float)
        for column in ("truth", "predicted")
    )
    return classification_report(targets, chosen, order)


def models(study: Study) -> pd.DataFrame:
    """The paper's Table 3 beside our networks: accuracy of ours in percent with its 95 % interval, and of the class
    that is most frequent; a row per published network, then others of the grid."""
    ours: dict[str, list] = {}
    for train in study.trained:
        ours.setdefault(name_of(train), []).append(train)
    rows = []
    for cell in [
        *table("path/tab3_models").to_dict("records"),
        *({"model": n} for n in ours if n not in NETWORKS),
    ]:
        row = {
            "network": cell["model"],
            "parameters (M)": cell.get("params_m", np.nan),
        }
        row |= {
            f"{part}, paper": 100 * pd.to_numeric(cell.get(f"top1_{key}", np.nan), errors="coerce")
            for key, part in {"brain": "MRI", "covid": "COVID"}.items()
        }
        if found := ours.get(cell["model"]):
            one = pd.concat([decided(run.frame("predictions")) for run in found])
            mean, low, high = (100 * value for value in _interval(one, "right"))
            most = 100 * one["truth"].value_counts(normalize=True).iloc[0]
            row |= {"ours": mean, "low": low, "high": high, "largest class": most}
        rows.append(row)
    return pd.DataFrame(rows).reindex(
        columns=[
            "network",
            "parameters (M)",
            "MRI, paper",
            "COVID, paper",
            "ours",
            "low",
            "high",
            "largest class",
        ]
    )


def _interval(frame: pd.DataFrame, column: str) -> Interval:
    return bootstrap(
        frame[column].astype(float).to_numpy(),
        frame["patient_id"].astype(str).to_numpy(),
        n=2000,
    )


def per_method(
    study: Study,
    frame: str,
    value: str,
    by: Sequence[str] = ("network", "method"),
    **where: object,
) -> pd.DataFrame:
    """Mean of a column of one frame with its 95 % interval (patients resampled): a row per network and method.

    `where`: columns that must have a value, such as `fraction=0.3, right=True`. Further columns: n (maps with a value),
    degenerate (without one), patients, spread (standard deviation over maps), and the means of area, kept, chance_iou
    and best_iou where the frame has them. Where the frame scores several outputs of a map, ask for one of them.
    """
    found = frames(study, frame)
    for column, wanted in where.items():
        near = np.isclose(found[column], wanted) if isinstance(wanted, float) else found[column] == wanted
        found = found[near]
    rows = []
    for key, part in found.groupby(list(by), sort=False):
        mean, low, high = _interval(part, value)
        row = dict(zip(by, key, strict=True)) | {
            value: mean,
            "low": low,
            "high": high,
        }
        known = part[value].notna()
        row |= {"n": int(known.sum()), "degenerate": int((~known).sum())}
        row |= {
            "patients": part.loc[known, "patient_id"].nunique(),
            "spread": part[value].std(ddof=0),
        }
        rows.append(
            row | {more: part[more].mean() for more in ("area", "kept", "chance_iou", "best_iou") if more in part}
        )
    table_ = pd.DataFrame(rows)
    if "method" in table_:
        table_["method"] = table_["method"].map(
            lambda one: METHODS.get(one, "XRAI and Blur IG" if one == "both" else one)
        )
    return table_


SHORT = {
    "vanilla": "VG",
    "smoothgrad": "SG",
    "ig": "IG",
    "smoothgrad_ig": "SG-IG",
    "xrai": "XRAI",
    "xrai_fast": "fast",
    "guided_ig": "GIG",
    "blur_ig": "BIG",
    "smooth_blur_ig": "SBIG",
}


def figure_columns(kept: Mapping[str, np.ndarray], fraction: float = 0.3) -> tuple[list[str], np.ndarray]:
    """What the paper's Figs. 8 and 9 show of kept maps: short names and maps [n, M, H, W], none below 0.

    Pixel maps by absolute value, XRAI from its lowest value on; after full XRAI the image, black outside its top.
    """
    columns, maps = [], []
    for method, own in zip(kept["methods"], kept["maps"], strict=True):
        regions = method.startswith("xrai")
        columns.append(SHORT[method])
        maps.append(own - own.min((1, 2), keepdims=True) if regions else np.abs(own))
        if method == "xrai":
            columns.append(f"XRAI {100 * fraction:.0f}")
            maps.append(kept["images"] * top_fraction(torch.from_numpy(own), fraction).numpy())
    return columns, np.stack(maps, 1)


def judged(study: Study) -> dict[str, bool]:
    """What `per_method` asks of overlap: that the predicted class is right; nothing where no image was (barely trained
    networks)."""
    return {"right": True} if frames(study, "overlap")["right"].any() else {}


def separation(study: Study) -> pd.DataFrame:
    """How well classes part before and after training: per network and stage the share of test images whose nearest
    image of another patient has the same class, with interval; `chance`: for classes dealt out at random."""
    found = frames(study, "embedding")
    rows = []
    for (network, stage), part in found.groupby(["network", "stage"], sort=False):
        mean, low, high = _interval(part, "same")
        shares = part["label"].value_counts(normalize=True)
        row = {
            "network": network,
            "stage": stage,
            "same class": mean,
            "low": low,
            "high": high,
        }
        rows.append(
            row
            | {
                "in the drawing": part["same_plane"].mean(),
                "chance": float((shares**2).sum()),
            }
        )
    return pd.DataFrame(rows)


def agreement(study: Study) -> pd.DataFrame:
    """Full against fast XRAI per network: correlation of the maps, IoU of their top 30 %, shares kept in percent,
    and seconds per image."""
    found, cost = (
        frames(study, "variants"),
        frames(study, "cost").groupby(["network", "method"])["seconds"].mean(),
    )
    rows = []
    for network, part in found.groupby("network", sort=False):
        row = {
            "network": network,
            "images": len(part),
            "correlation": part["correlation"].mean(),
        }
        row |= {
            "IoU of the tops": part["iou"].mean(),
            "kept, %": 100 * part["kept_full"].mean(),
        }
        row |= {
            "full, s": cost.get((network, "xrai"), np.nan),
            "fast, s": cost.get((network, "xrai_fast"), np.nan),
        }
        rows.append(row)
    return pd.DataFrame(rows)


# Claims


def difference(
    frame: pd.DataFrame,
    column: str,
    a: Mapping[str, object],
    b: Mapping[str, object],
    keys: Sequence[str],
) -> Measured | None:
    """Mean of column where `a` holds less that where `b` holds, over rows alike in `keys`, with a 95 % interval.

    Several rows of a side with the same keys are averaged first. None where the two have no row in common.
    """
    sides = []
    for where in (a, b):
        part = frame
        for name, value in where.items():
            part = part[part[name].isin(value) if isinstance(value, list | tuple) else part[name] == value]
        sides.append(part.groupby([*keys, "patient_id"], sort=False)[column].mean())
    both = pd.concat(sides, axis=1, join="inner", keys=["a", "b"]).dropna()
    if both.empty:
        return None
    return measured(
        (both["a"] - both["b"]).to_numpy(float),
        both.index.get_level_values("patient_id"),
    )


def claims(study: Study) -> pd.DataFrame:
    """The paper's claims as differences of our numbers, in percent points, with intervals and plain verdicts.

    Overlap is taken where the predicted class is right: only then does the map explain the class that the mask is of.
    """
    why = "the shown grid has no such networks or images"
    synthetic = study.synthetic
    found = [
        Claim(text, sign, ours, printed, "" if ours else why, synthetic)
        for text, printed, sign, ours in [
            *_claims_on_maps(study),
            *_claims_on_networks(study),
        ]
    ]
    return claim_table([*found, *_claims_on_images(study, why, synthetic)])


_Said = tuple[str, str, int, Measured | None]  # the claim, what is printed, the sign expected, ours


def _claims_on_maps(study: Study) -> list[_Said]:
    found = frames(study, "overlap").query("output == 'probability' and right")
    top, third = (found[np.isclose(found["fraction"], share)] for share in (0.3, 0.35))
    each = ["network", "seed", "image_id"]
    said: list[_Said] = []
    rivals = {
        "vanilla": "the vanilla gradient",
        "guided_ig": "Guided IG",
        "ig": "integrated gradients",
    }
    for rival, called in rivals.items():
        ours = difference(top, "precision", {"method": "xrai"}, {"method": rival}, each)
        said.append((f"XRAI lies on the finding more than {called}", "by eye", 1, ours))
    both = third[third["method"] == "both"]
    if "DenseNet121" in set(both["network"]):
        both = both[both["network"] == "DenseNet121"]
    gain = both.assign(gain=both["iou"] - both["chance_iou"])
    said.append(
        (
            "XRAI with Blur IG (35 %) finds the outline: IoU above chance",
            "by eye",
            1,
            _mean(gain, "gain"),
        )
    )
    moved = frames(study, "baselines").query("baseline != 'black'").assign(moved=lambda one: 1 - one["similarity"])
    said.append(
        (
            "The baseline changes the map: 1 - correlation",
            "in prose",
            1,
            _mean(moved, "moved"),
        )
    )
    stable = frames(study, "stability")
    ours = difference(stable, "similarity", {"method": "guided_ig"}, {"method": "vanilla"}, each)
    said.append(
        (
            "Guided IG withstands noise better than the vanilla gradient",
            "in prose",
            1,
            ours,
        )
    )
    rest = [network for network in dict.fromkeys(stable["network"]) if network != "Xception"]
    ours = difference(
        stable,
        "similarity",
        {"network": ["Xception"]},
        {"network": rest},
        ["image_id", "method"],
    )
    said.append(("Xception's maps are the least stable", "by eye", -1, ours))
    return said


def _claims_on_networks(study: Study) -> list[_Said]:
    space = frames(study, "embedding").assign(same=lambda one: one["same"].astype(float))
    parted = difference(
        space,
        "same",
        {"stage": "trained"},
        {"stage": "pixels"},
        ["network", "seed", "image_id"],
    )
    return [("Training parts the classes: right neighbours", "Figs. 6, 7", 1, parted)]


def _claims_on_images(study: Study, why: str, synthetic: bool) -> list[Claim]:
    """Which network classifies best, on images of the kind that the paper says it of; the phantom's are radiographs."""
    both = pairs(study)
    mri = all(train.parameters.dataset == "brain_mri" for train, _ in both)
    parts = [decided(train.frame("predictions")).assign(network=name_of(train)) for train, _ in both]
    right = pd.concat(parts).astype({"right": float})
    published, found = table("path/tab3_models").set_index("model"), []
    for kind, column, suits in (
        ("MRI", "top1_brain", mri),
        ("radiographs", "top1_covid", not mri),
    ):
        printed = pd.to_numeric(published[column], errors="coerce").sort_values(ascending=False, kind="stable")
        best, second = printed.index[:2]
        for a, b, text in _ranked(best, second, kind):
            ours = difference(right, "right", {"network": a}, {"network": b}, ["image_id"]) if suits else None
            gap = 100 * (printed[a] - printed[b])
            found.append(
                Claim(
                    text,
                    gap,
                    ours,
                    "",
                    why if suits else f"the grid has no {kind}",
                    synthetic,
                )
            )
    return found


def _ranked(best: str, second: str, kind: str) -> list[tuple[str, str, str]]:
    said = [(best, second, f"{best} classifies {kind} best, before {second}")]
    # The two networks that the claim on MRI is about, as the paper's other table has them.
    more = [
        (
            "Xception",
            "DenseNet121",
            f"Xception classifies {kind} better than DenseNet121",
        )
    ]
    return said + (more if kind == "radiographs" else [])


def _mean(frame: pd.DataFrame, column: str) -> Measured | None:
    values = frame[column].astype(float).to_numpy()
    return measured(values, frame["patient_id"].astype(str).to_numpy()) if np.isfinite(values).any() else None


def _strongest(study: Study) -> pd.DataFrame:
    return per_method(
        study,
        "overlap",
        "precision",
        fraction=0.3,
        output="probability",
        **judged(study),
    )


STORED = {
    "Networks": lambda study: models(study).dropna(subset="ours"),
    "Precision of the strongest 30 %": _strongest,
    "Claims": claims,
}
