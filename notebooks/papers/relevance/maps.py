"""Paper `relevance`: do maps depend on label and weights, what do several networks look at, and the paper's claims."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch

from cxrkit import metrics
from cxrkit.data import Dataset
from cxrkit.metrics import bootstrap
from cxrkit.study import report, runs
from cxrkit.study.claims import Claim, Measured, measured
from cxrkit.study.claims import table as claim_table
from cxrkit.study.published import table
from cxrkit.study.study import Study
from papers.relevance.tables import (
    METHODS,
    first_scores,
    network,
    scored,
    two_classes,
)

__all__ = [
    "agreement",
    "claims",
    "inside_boxes",
    "inside_lungs",
    "lung_mask",
    "networks_side_by_side",
    "pictures",
    "sanity",
    "seen_by_all",
    "shared_mass",
    "surviving",
]


def sanity(study: Study) -> pd.DataFrame:
    """By network, method and check: mean correlation of a map with that of another label or of random weights, with
    its interval, and the two-class IoU of both kinds of map."""
    rows = []
    for train, run in scored(study):
        for (method, check), part in run.frame("sanity").groupby(["method", "check"], sort=False):
            found = bootstrap(part["correlation"].to_numpy(), part["patient_id"].to_numpy(), n=500)
            row = {
                "network": network(train.parameters),
                "check": check,
                "method": METHODS[method],
            }
            row |= {"correlation": found.mean, "low": found.low, "high": found.high}
            rows.append(
                row
                | {
                    "IoU": part["two_class"].mean(),
                    "IoU of the check": part["two_class_check"].mean(),
                }
            )
    frame = pd.DataFrame(rows)
    order = {check: place for place, check in enumerate(("another label", "random head", "random network"))}
    return frame.sort_values(
        ["network", "check"],
        key=lambda c: c.map(order) if c.name == "check" else c,
        kind="stable",
    )


# What several networks look at


def _intentions(study: Study) -> list[tuple[str, runs.Run, dict[str, np.ndarray]]]:
    """Name, scores and kept maps of every network that was shown the same positive and normal images."""
    found = []
    for train, run in scored(study):
        if (run.folder / "intention.npz").is_file():
            found.append((network(train.parameters), run, report.kept_of(run, "intention")))
    return found


def shared_mass(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of their positive mass that two maps put in the same pixels, ``[..., H, W]`` twice -> ``[...]``: the
    sum of the smaller one after both were made to sum to 1. 1: the same, 0: nowhere in common; nan without any."""
    both = [np.clip(values, 0, None).astype(np.float64) for values in (maps, others)]
    totals = [values.sum((-2, -1), keepdims=True) for values in both]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.minimum(both[0] / totals[0], both[1] / totals[1]).sum((-2, -1))


def agreement(study: Study) -> pd.DataFrame:
    """By group of images, method and pair of networks: the share of the mass that both put in the same places of one
    image, with its interval; and of two images of the group, which tells how much of it is habit."""
    rows = []
    for (first, _, a), (second, _, b) in combinations(_intentions(study), 2):
        common = [i for i in range(len(a["image_ids"])) if a["image_ids"][i] in b["image_ids"]]
        there = [list(b["image_ids"]).index(a["image_ids"][i]) for i in common]
        for method in (m for m in a["methods"] if m in b["methods"]):
            mine, yours = (one["maps"][list(one["methods"]).index(method)] for one in (a, b))
            for group in dict.fromkeys(a["groups"]):
                of = [k for k, i in enumerate(common) if a["groups"][i] == group]
                left, right = (
                    mine[[common[k] for k in of]],
                    yours[[there[k] for k in of]],
                )
                same = shared_mass(left, right)
                found = bootstrap(same, a["patient_ids"][[common[k] for k in of]], n=500)
                other = shared_mass(left, np.roll(right, 1, axis=0))
                row = {
                    "images": group,
                    "method": METHODS[method],
                    "networks": f"{first} and {second}",
                }
                row |= {
                    "same image": found.mean,
                    "low": found.low,
                    "high": found.high,
                }
                rows.append(row | {"another image": float(np.nanmean(other)) if np.isfinite(other).any() else np.nan})
    columns = [
        "images",
        "method",
        "networks",
        "same image",
        "low",
        "high",
        "another image",
    ]
    return pd.DataFrame(rows, columns=columns).sort_values(["images", "method"], ascending=[False, True], kind="stable")


def inside_boxes(study: Study) -> pd.DataFrame:
    """By network and method: the share of the positives' mass in the boxes, with its interval, beside the boxes'
    share of the image."""
    rows = []
    for called, _, kept in _intentions(study):
        boxed = kept["masks"].any((1, 2))
        masks = torch.from_numpy(kept["masks"][boxed])
        for method, maps in zip(kept["methods"], kept["maps"], strict=True):
            share = metrics.energy_pointing_game(torch.from_numpy(maps[boxed]), masks).numpy()
            rows.append(
                _share(
                    called,
                    method,
                    share,
                    kept["patient_ids"][boxed],
                    metrics.chance_level(masks).mean(),
                )
            )
    return pd.DataFrame(rows)


def _share(called: str, method: str, share: np.ndarray, patients: np.ndarray, chance: Any) -> dict[str, Any]:
    found = bootstrap(share, patients, n=500)
    row = {
        "network": called,
        "method": METHODS[method],
        "share": found.mean,
        "low": found.low,
        "high": found.high,
    }
    known = ~np.isnan(share)
    counts = {
        "patients": len(np.unique(patients[known])),
        "degenerate": int((~known).sum()),
    }
    return row | {"chance": float(chance)} | counts


def inside_lungs(study: Study) -> pd.DataFrame:
    """By network, method and group: the share of a map's positive mass in the clear lung (on positives without the
    box), beside that area's share of the image. Only the phantom knows its lungs: empty for other images."""
    rows = []
    for called, _, kept in _intentions(study):
        data = seen_by_all(study)
        if data.name != "phantom":
            continue
        places = [data.image_ids.index(one) for one in kept["image_ids"]]
        clear = np.stack([lung_mask(data, row) for row in places]) & ~kept["masks"]
        for group in dict.fromkeys(kept["groups"]):
            of = kept["groups"] == group
            masks = torch.from_numpy(clear[of])
            for method, maps in zip(kept["methods"], kept["maps"], strict=True):
                share = metrics.energy_pointing_game(torch.from_numpy(maps[of]), masks).numpy()
                chance = metrics.chance_level(masks).mean()
                rows.append({"images": group} | _share(called, method, share, kept["patient_ids"][of], chance))
    columns = [
        "images",
        "network",
        "method",
        "share",
        "low",
        "high",
        "chance",
        "patients",
        "degenerate",
    ]
    return pd.DataFrame(rows, columns=columns)


def lung_mask(data: Dataset, row: int) -> np.ndarray:
    """Where the lungs of a phantom's image are, bool [size, size]."""
    from cxrkit.phantom.anatomy import Grid

    renderer = getattr(data.renderer, "renderer", data.renderer)  # behind the class that was added
    case = renderer.case(int(data.rows[row]))
    centres = (np.arange(data.size) + 0.5) / data.size
    return (Grid(case.anatomy, case.frame, centres, centres).edges > 0).all(0)


def seen_by_all(study: Study, least: int = 0) -> Dataset:
    """The data set whose positive and normal images every network of the grid was shown, of at least `least` pixels."""
    train, run = next(pair for pair in scored(study) if (pair[1].folder / "intention.npz").is_file())
    return report.drawn_finer(train.parameters, least, **run.parameters.other_images)


# Pictures


def pictures(study: Study, of: str = "gallery", least: int = 192) -> dict:
    """Images with their maps, drawn finer than the network saw them: images [n, H, W], maps [n, M, H, W], rows
    (labels), columns (methods), masks [n, H, W], logits [n]. `of`: "gallery", the first network's surest positives."""
    train, run = scored(study)[0]
    kept, data = (
        report.kept_of(run, of),
        report.drawn_finer(train.parameters, least),
    )
    places = [data.image_ids.index(one) for one in kept["image_ids"]]
    samples = [data[place] for place in places]
    columns = [data.labels.index(label) for label in kept["labels"]]
    return {
        "images": torch.stack([sample.image[0] for sample in samples]),
        "maps": report.enlarge(np.moveaxis(kept["maps"], 0, 1), data.size),
        "rows": [str(label) for label in kept["labels"]],
        "columns": [METHODS[method] for method in kept["methods"]],
        "masks": torch.stack([sample.mask[column] for sample, column in zip(samples, columns, strict=True)]),
        "logits": kept["logits"],
    }


def networks_side_by_side(
    study: Study,
    method: str = "lrp",
    positives: int = 1,
    normals: int = 2,
    least: int = 192,
):
    """The same images by every network: what `figures.show_labels` takes, a column per network (Fig. 4), and which
    label each explains: a table with a row per image."""
    shown = [one for one in _intentions(study) if method in one[2]["methods"]]
    kept = shown[0][2]
    groups = (np.flatnonzero(kept["groups"] == name) for name in ("positive", "normal"))
    rows = [row for found, most in zip(groups, (positives, normals), strict=True) for row in found[:most]]
    data = seen_by_all(study, least)
    samples = [data[data.image_ids.index(kept["image_ids"][row])] for row in rows]
    maps = np.stack(
        [one["maps"][list(one["methods"]).index(method)][rows] for _, _, one in shown],
        1,
    )
    first = {group: int(np.flatnonzero(kept["groups"] == group)[0]) for group in set(kept["groups"])}
    titles = [f"{kept['groups'][row]} {row - first[kept['groups'][row]] + 1}" for row in rows]
    explained = {called: [str(one["explained"][row]) for row in rows] for called, _, one in shown}
    return {
        "images": torch.stack([sample.image[0] for sample in samples]),
        "maps": report.enlarge(maps, data.size),
        "rows": titles,
        "columns": [called for called, _, _ in shown],
        "masks": torch.stack([sample.mask.any(0) for sample in samples]),
        "explained": pd.DataFrame({"image": titles} | explained),
    }


# Claims


def _paired(
    frame: pd.DataFrame,
    a: tuple[str, float],
    b: tuple[str, float],
    column: str = "two_class",
) -> Measured:
    """Mean difference a - b over the same images and labels, (method, threshold) each; patients resampled."""
    parts = []
    for method, threshold in (a, b):
        part = frame[(frame["method"] == method) & np.isclose(frame["threshold"], threshold)]
        parts.append(part.set_index(["image_id", "label"])[[column, "patient_id"]])
    both = parts[0].join(parts[1], lsuffix="_a", rsuffix="_b", how="inner")
    return measured(
        (both[f"{column}_a"] - both[f"{column}_b"]).to_numpy(),
        both["patient_id_a"].to_numpy(),
    )


_STEPS = (
    (
        "LRP overlaps the boxes better than CAM at a low threshold",
        ("lrp", 0.1),
        ("cam", 0.1),
    ),
    (
        "RAP overlaps the boxes better than CAM at a low threshold",
        ("rap", 0.1),
        ("cam", 0.1),
    ),
    ("LRP still does at T = 0.5", ("lrp", 0.5), ("cam", 0.5)),
    (
        "CAM gains when the threshold rises from 0.1 to 0.5",
        ("cam", 0.5),
        ("cam", 0.1),
    ),
    ("LRP gains from 0.1 to 0.2", ("lrp", 0.2), ("lrp", 0.1)),
    ("LRP loses from 0.2 to 0.5", ("lrp", 0.5), ("lrp", 0.2)),
    ("RAP loses from 0.3 to 0.5", ("rap", 0.5), ("rap", 0.3)),
)


def _published(a: tuple[str, float], b: tuple[str, float]) -> tuple[float, str]:
    means = table("relevance/tab2_miou").groupby(["method", "threshold"])["mean_iou"].mean()
    first, second = (float(means[METHODS[method], threshold]) for method, threshold in (a, b))
    return first - second, f"{100 * first:.1f} against {100 * second:.1f}"


def claims(study: Study) -> pd.DataFrame:
    """The paper's claims as differences of two-class IoU (percent) on the same images, with verdicts; then what it
    says of the networks with two classes."""
    frame, synthetic = first_scores(study), study.synthetic
    found = []
    for text, a, b in _STEPS:
        number, printed = _published(a, b)
        known = len(frame) and {a[0], b[0]} <= set(frame["method"])
        ours = _paired(frame, a, b) if known else None
        found.append(
            Claim(
                text,
                number,
                ours,
                printed,
                "no such network in this grid",
                synthetic,
            )
        )
    return claim_table([*found, *_of_intention(study, synthetic)])


def _of_intention(study: Study, synthetic: bool) -> list[Claim]:
    kept = {called: one for called, _, one in _intentions(study)}
    two = [network(train.parameters) for train, run in scored(study) if two_classes(train.parameters)]
    many = [called for called in kept if called not in two]
    why = "needs networks with two classes and one with many findings"
    ours = None
    if many and any(called in kept for called in two):
        one = next(called for called in two if called in kept)
        ours = _less_inside(kept[one], kept[many[0]])
    text = "With two classes, LRP lies less in the box than with many findings"
    claims = [Claim(text, -1, ours, "shown, no number", why, synthetic)]
    lungs = inside_lungs(study)
    part = lungs[(lungs["images"] == "normal") & lungs["network"].isin(two)]
    for method in ("LRP", "RAP"):
        rows = part[part["method"] == method].to_dict("records")
        more = [_beyond_chance(row) for row in rows]
        text = f"With two classes, {method} lies in the lungs of normal images, beyond their area"
        named = [f"{text} ({row['network'].removesuffix(', two classes')})" for row in rows] or [text]
        why = "only the phantom knows its lungs"
        claims += [
            Claim(of, 1, one, "shown, no number", why, synthetic) for of, one in zip(named, more or [None], strict=True)
        ]
    return claims


def _beyond_chance(row: Mapping[str, Any]) -> Measured:
    return Measured(
        *(row[key] - row["chance"] for key in ("share", "low", "high")),
        row["patients"],
    )


def _less_inside(a: dict[str, np.ndarray], b: dict[str, np.ndarray], method: str = "lrp") -> Measured:
    """Share of the mass in the boxes, a - b, on the same positives."""
    common = [one for one in a["image_ids"][a["groups"] == "positive"] if one in b["image_ids"]]
    shares = []
    for kept in (a, b):
        rows = [list(kept["image_ids"]).index(one) for one in common]
        maps = torch.from_numpy(kept["maps"][list(kept["methods"]).index(method)][rows])
        shares.append(metrics.energy_pointing_game(maps, torch.from_numpy(kept["masks"][rows])).numpy())
    patients = a["patient_ids"][[list(a["image_ids"]).index(one) for one in common]]
    return measured(shares[0] - shares[1], patients)


def surviving(study: Study) -> pd.DataFrame:
    """What is left of "LRP and RAP beat CAM" by the reading of the IoU: difference of the methods at each threshold for
    two classes and for the finding alone (percent), with its interval."""
    frame = first_scores(study)
    rows = []
    for column, reading in (
        ("two_class", "two classes"),
        ("foreground", "the finding alone"),
    ):
        for method in ("lrp", "rap"):
            for threshold in sorted(frame["threshold"].unique()):
                found = _paired(frame, (method, threshold), ("cam", threshold), column)
                row = {
                    "IoU of": reading,
                    "difference": f"{METHODS[method]} less CAM",
                    "T": threshold,
                }
                rows.append(
                    row
                    | dict(
                        zip(
                            ("ours", "low", "high"),
                            (100 * v for v in found[:3]),
                            strict=True,
                        )
                    )
                )
    return pd.DataFrame(rows)
