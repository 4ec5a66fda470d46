"""Paper `normgrad` beside our runs: the pointing game of its Tables 2 to 7, and its claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import Interval, bootstrap, over_seeds, reproducibility
from cxrkit.metrics.statistics import drawn_patients
from cxrkit.study import report, runs
from cxrkit.study.claims import Claim, Measured, measured
from cxrkit.study.claims import table as claim_table
from cxrkit.study.published import scalars, table
from cxrkit.study.study import Study
from papers.normgrad.measure import METHODS, PIXEL_METHODS

__all__ = [
    "SETS",
    "architectures",
    "called",
    "change",
    "claims",
    "classifiers",
    "layer_kinds",
    "positions",
    "quirks",
    "randomisation",
    "references",
    "sets",
    "smoothing",
    "tables_of",
    "ties",
]

# What stands in for the paper's sets, and the sets themselves.
SETS = {
    "objects": "Object-CXR",
    "object_cxr": "Object-CXR",
    "quality": "LVOT",
    "lvot": "LVOT",
}
_TABLES = {
    "Object-CXR": {"random": "Table4", "architectures": "Table6"},
    "LVOT": {"random": "Table3", "architectures": "Table5"},
}
SHORT = {
    "InputXGrad": "Input × gradient",
    "GuidedBackprop": "Guided backprop",
    "GuidedGradCAM": "Guided Grad-CAM",
    "GradCAM": "Grad-CAM",
} | {name: name.removeprefix("NormGrad ").replace("x", " × ") for name in METHODS if name.startswith("NormGrad")}
_NORMGRAD = tuple(name for name in METHODS if name.startswith("NormGrad"))
_SINGLE, _MULTI = (tuple(name for name in _NORMGRAD if name.endswith(kind)) for kind in ("single", "multi"))
_BASELINES = tuple(name for name in METHODS if name not in _NORMGRAD)
_STRIDES = {"layer2": 8, "layer3": 16, "layer4": 32}
_REFERENCES = {"random place": "hit", "centre of the image": "centre"}


def pairs(study: Study) -> list[tuple[runs.Run, runs.Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("normgrad_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} holds no scores of this paper; `cxrkit grid run normgrad` makes them")


def set_of(trained: runs.Run) -> str:
    """The paper's set that a run's images are, or stand for; else what the run says of them."""
    view = report.view(trained.parameters)
    return SETS.get(view, view)


def called(study: Study, of: str) -> str:
    """How pages call a set of a grid: they say where the phantom stands in for it."""
    own = any(set_of(trained) == of and trained.parameters.dataset != "phantom" for trained, _ in pairs(study))
    return of if own else f"the phantom, in place of {of}"


def sets(study: Study) -> list[str]:
    """The sets of a grid."""
    return list(dict.fromkeys(set_of(trained) for trained, _ in pairs(study)))


def network_of(trained: runs.Run) -> str:
    return trained.parameters.model + (", pre-trained" if trained.parameters.weights else "")


def frames(study: Study, which: str) -> pd.DataFrame:
    """A table of every scores run, with the columns set, network and seed before it."""
    parts = []
    for trained, scored in pairs(study):
        facts = {
            "set": set_of(trained),
            "network": network_of(trained),
            "seed": trained.parameters.seed,
        }
        if (scored.folder / f"{which}.csv").is_file():
            parts.append(scored.frame(which).assign(**facts))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def cells(frame: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean over images, then over seeds, of each group of `by`: mean, std over the seeds (population), and the 95 %
    interval of the mean (patients resampled, an image's seeds averaged first). Constant maps are left out.
    """
    rows = []
    for names, part in frame.groupby(list(by), sort=False):
        of_seed = part.groupby("seed")[column].mean().to_numpy()
        spread = over_seeds(of_seed[:, None])
        by_image = part.groupby(["patient_id", "image_id"])[column].mean().reset_index()
        found = bootstrap(by_image[column], by_image["patient_id"])
        row = {
            "mean": spread.mean,
            "std": spread.std if spread.seeds > 1 else np.nan,
        }
        row |= {
            "low": found.low,
            "high": found.high,
            "seeds": spread.seeds,
            "images": len(by_image),
        }
        rows.append(dict(zip(by, names, strict=True)) | row)
    return pd.DataFrame(rows, columns=[*by, "mean", "std", "low", "high", "seeds", "images"])


def _shown(mean: float, std: float) -> str:
    if np.isnan(mean):
        return "–"
    return f"{mean:.3f}" if np.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def references(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """What maps that know nothing would hit, by set: a maximum drawn evenly, one always in the middle; and the boxes'
    share of the image."""
    found = frames(study, "chance")
    columns = {title: start + column.removeprefix("hit") for title, start in _REFERENCES.items()}
    columns |= {"boxes' share": "boxes"}
    means = found.groupby("set", sort=False)[list(columns.values())].mean()
    return means.set_axis(list(columns), axis=1).reset_index()


def positions(sizes: Sequence[int]) -> pd.DataFrame:
    """Positions per side of the layers that NormGrad takes from a ResNet, at the paper's input sizes and at ours."""
    paper = [int(scalars("normgrad")[f"{one}_input"].split("x")[0]) for one in ("objectcxr", "lvot")]
    rows = [{"input": size, "whose": "paper" if size in paper else "ours"} for size in dict.fromkeys([*paper, *sizes])]
    return pd.DataFrame(
        [row | {layer: -(-row["input"] // stride) for layer, stride in _STRIDES.items()} for row in rows]
    )


def _paper(which: str, condition: str, arch: str | None = None) -> pd.Series:
    """Printed means of a table's column, by method; nan where the text has none."""
    cells = table("normgrad/tables_2_to_6_layout")
    cells = cells[(cells["table"] == which) & (cells["condition"] == condition)]
    if arch is not None:
        cells = cells[cells["arch"] == arch]
    return cells.set_index("method")["pg_mean"]


def smoothing(study: Study, of: str, network: str | None = None, column: str = "hit_share") -> pd.DataFrame:
    """Table 2 on one set: hits of the raw and of the smoothed maps, and their difference with its 95 % interval.

    All networks and seeds together, or one network. No cell of the paper's table is in the text available.
    """
    found = _of(frames(study, "scores"), of, network).query("state == 'trained'")
    known = cells(found, ["method", "smoothed"], column).set_index(["method", "smoothed"])["mean"]
    rows = []
    for method in METHODS:
        part = found[found["method"] == method]
        change = _paired(part, column, part["smoothed"], ~part["smoothed"])
        row = {"method": SHORT[method], "paper": np.nan}
        row |= {
            "ours, raw": known.get((method, False)),
            "ours, smoothed": known.get((method, True)),
        }
        rows.append(row | {"change": change.mean, "low": change.low, "high": change.high})
    return pd.DataFrame(rows)


def _of(frame: pd.DataFrame, of: str, network: str | None) -> pd.DataFrame:
    frame = frame[frame["set"] == of]
    if network is not None and network not in set(frame["network"]):
        raise ParameterError(f"network {network!r} has no scores on {of}; there are {sorted(set(frame['network']))}")
    return frame if network is None else frame[frame["network"] == network]


def _paired(frame: pd.DataFrame, column: str, a: pd.Series, b: pd.Series) -> Measured:
    """Mean over images of (mean of the rows `a`) - (mean of the rows `b`), patients resampled."""
    means = [frame[rows].groupby(["patient_id", "image_id"])[column].mean() for rows in (a, b)]
    both = pd.concat(means, axis=1, keys=["a", "b"]).dropna().reset_index()
    if both.empty:
        return Measured(np.nan, np.nan, np.nan, 0)
    return measured(both["a"] - both["b"], both["patient_id"])


def randomisation(study: Study, of: str, network: str, column: str = "hit_share") -> pd.DataFrame:
    """Tables 3 and 4 for one network: hits fully random (FR), with pre-trained features (SR) and trained, mean ± std
    over the seeds, beside the printed trained cells; low and high bound the trained mean.
    """
    found = _of(frames(study, "scores"), of, network).query("smoothed")
    known = cells(found, ["state", "method"], column).set_index(["state", "method"])
    paper = _paper(_TABLES[of]["random"], "trained") if of in _TABLES else pd.Series(dtype=float)
    rows = []
    for method in METHODS:
        row = {"method": SHORT[method], "paper, trained": paper.get(method, np.nan)}
        for state in ("FR", "SR", "trained"):
            cell = known.loc[(state, method)] if (state, method) in known.index else {"mean": np.nan, "std": np.nan}
            row[f"ours, {state}"] = _shown(cell["mean"], cell["std"])
        trained = known.loc[("trained", method)]
        rows.append(row | {"low": trained["low"], "high": trained["high"]})
    levels = references(study, column).set_index("set").loc[of]
    rows += [{"method": title, "ours, trained": f"{levels[title]:.3f}"} for title in _REFERENCES]
    return pd.DataFrame(rows).fillna({"ours, FR": "–", "ours, SR": "–"})


def tables_of(study: Study) -> list[tuple[str, str]]:
    """Every (set, network) of a grid that has scores, set by set."""
    found = [(set_of(trained), network_of(trained)) for trained, _ in pairs(study)]
    return sorted(dict.fromkeys(found), key=lambda pair: sets(study).index(pair[0]))


def layer_kinds(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """Hits of NormGrad by the kind of the virtual layer and by what it is taken from: one layer, or the product of
    several; trained networks, smoothed, mean with its 95 % interval, by set."""
    found = frames(study, "scores").query("smoothed and state == 'trained'")
    table = cells(found[found["method"].isin(_NORMGRAD)], ["set", "method"], column)
    names = table["method"].str.split()
    kinds = {
        "layer": names.str[1].str.replace("x", " × "),
        "taken from": names.str[2],
    }
    return table.rename(columns={"mean": column}).assign(**kinds)


def architectures(study: Study, of: str, column: str = "hit_share") -> pd.DataFrame:
    """Tables 5 and 6: hits on a ResNet and on an EfficientNet, and the difference of the means (DoM) with its interval.

    The paper prints no cell of them in the text available but its ResNet's, where Table 3 or 4 has it.
    """
    found = _of(frames(study, "scores"), of, None).query("smoothed and state == 'trained'")
    known = cells(found, ["network", "method"], column).set_index(["network", "method"])
    networks = sorted(found["network"].unique(), reverse=True)[:2]
    paper = _paper(_TABLES[of]["random"], "trained") if of in _TABLES else pd.Series(dtype=float)
    rows = []
    for method in METHODS:
        row = {"method": SHORT[method], "paper's ResNet": paper.get(method, np.nan)}
        for network in networks:
            cell = known.loc[(network, method)]
            row[f"ours, {network.split(',')[0]}"] = _shown(cell["mean"], cell["std"])
        dom = _dom(found[found["method"] == method], networks, column)
        rows.append(row | {"DoM, ours": dom.mean, "low": dom.low, "high": dom.high})
    return pd.DataFrame(rows)


def _dom(frame: pd.DataFrame, networks: Sequence[str], column: str) -> Interval:
    if len(networks) < 2:
        return Interval(np.nan, np.nan, np.nan)
    both = frame.pivot_table(values=column, index=["patient_id", "image_id"], columns="network").reset_index()
    if not set(networks) <= set(both):
        return Interval(np.nan, np.nan, np.nan)
    return reproducibility(both[networks[0]], both[networks[1]], both["patient_id"])


def classifiers(study: Study) -> pd.DataFrame:
    """Table 7: accuracy and AUC on the test images of every training; the paper's best trial of a ResNet beside it."""
    stated = scalars("normgrad")
    best = {"Object-CXR": "best_R34_objectcxr", "LVOT": "best_R50_lvot"}
    rows = []
    for trained, _ in pairs(study):
        found = report.classification_of(trained.frame("predictions")).iloc[0]
        row = {
            "set": set_of(trained),
            "network": network_of(trained),
            "seed": trained.parameters.seed,
        }
        row |= {"ours, accuracy": found["accuracy"], "ours, AUC": found["auc"]}
        for title, ending in (
            ("paper's best accuracy", "acc"),
            ("paper's best AUC", "auc"),
        ):
            key = f"{best.get(row['set'], '')}_{ending}"
            of_resnet = trained.parameters.model.startswith("resnet")
            row[title] = float(stated[key]) if of_resnet and key in stated else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def quirks(study: Study, of: str, column: str = "hit_share") -> pd.DataFrame:
    """What each way of the code does to the hits of the trained networks: a row per variant, over the methods that it
    touches: hits by the text, hits by the variant, and the difference with its 95 % interval.
    """
    found = _of(frames(study, "quirks"), of, None)
    rows = []
    for variant in (one for one in found["variant"].unique() if one not in ("text", "raw")):
        touched = found[found["method"].isin(found.loc[found["variant"] == variant, "method"].unique())]
        base = "raw" if variant == "clipped, raw" else "text"
        change = _paired(
            touched,
            column,
            touched["variant"] == variant,
            touched["variant"] == base,
        )
        means = touched.groupby("variant")[column].mean()
        rows.append(
            {
                "variant": variant,
                "methods": touched["method"].nunique(),
                "by the text": means[base],
                "variant's hits": means[variant],
                "difference": change.mean,
                "low": change.low,
                "high": change.high,
            }
        )
    return pd.DataFrame(rows)


def ties(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """What smoothing does to the three pixel maps, whole and cut at their 99th percentile: hits raw and smoothed, and
    the change with its 95 % interval, by set. A cut map has many equal maxima, of which the first one counts.
    """
    found, rows = frames(study, "quirks"), []
    for of, part in found.groupby("set", sort=False):
        part = part[part["method"].isin(PIXEL_METHODS)]
        for maps, raw, smoothed in (
            ("whole", "raw", "text"),
            ("cut", "clipped, raw", "clipped"),
        ):
            change = _paired(part, column, part["variant"] == smoothed, part["variant"] == raw)
            means = part.groupby("variant")[column].mean()
            row = {
                "set": of,
                "maps": maps,
                "ours, raw": means[raw],
                "ours, smoothed": means[smoothed],
            }
            rows.append(row | {"change": change.mean, "low": change.low, "high": change.high})
    return pd.DataFrame(rows)


def claims(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """The paper's claims as differences of hits, ours with interval, and a verdict; percent of the images.

    Ours: an image's hits are averaged over networks and seeds first, patients are resampled. States are compared on the
    networks that have both.
    """
    stated = scalars("normgrad")
    found = []
    for text, of, published, printed, ours in _claimed(stated):
        scores = frames(study, "scores")
        scores = scores[scores["set"] == of]
        if scores.empty:
            interval, why = None, f"the grid has no images for {of}"
        else:
            interval, why = ours(scores, column), ""
            if np.isnan(interval.mean):
                interval, why = None, "no network of the grid has both"
        found.append(Claim(text, published, interval, printed, why, synthetic=study.synthetic))
    return claim_table(found)


def _claimed(stated: pd.Series) -> list[tuple[str, str, float, str, Callable]]:
    """Claim, set, sign or difference, what is printed, and what computes ours."""
    lvot = {key: float(stated[f"lvot_R50_{key}_trained_PG"]) for key in
            ("gradcam", "ng_conv1x1_multi", "ng_conv3x3_single", "ng_conv3x3_multi")}  # fmt: skip
    both = ("LVOT", "Object-CXR")
    no_number = "no number"
    multi = lvot["ng_conv1x1_multi"] - lvot["gradcam"]
    layers = lvot["ng_conv3x3_multi"] - lvot["ng_conv3x3_single"]
    rows = [
        (
            f"Training raises the hits ({of})",
            of,
            1.0,
            no_number,
            change("trained", METHODS, "FR", METHODS),
        )
        for of in both
    ]
    rows += [
        ("Conv1 × 1 over several layers beats Grad-CAM (LVOT)", "LVOT", multi,
         f"{lvot['ng_conv1x1_multi']} against {lvot['gradcam']}",
         change("trained", ["NormGrad Conv1x1 multi"], "trained", ["GradCAM"])),
        ("Conv3 × 3 gains by several layers (LVOT)", "LVOT", layers,
         f"{lvot['ng_conv3x3_multi']} against {lvot['ng_conv3x3_single']}",
         change("trained", ["NormGrad Conv3x3 multi"], "trained", ["NormGrad Conv3x3 single"])),
        ("NormGrad beats the four baselines (Object-CXR)", "Object-CXR", 1.0, no_number,
         change("trained", _NORMGRAD, "trained", _BASELINES)),
        ("Several layers of NormGrad beat the baselines (LVOT)", "LVOT", 1.0, no_number,
         change("trained", _MULTI, "trained", _BASELINES)),
        ("Grad-CAM hits least often (Object-CXR)", "Object-CXR", -1.0, no_number,
         change("trained", ["GradCAM"], "trained", [name for name in METHODS if name != "GradCAM"])),
        ("Scaling is the best single layer (LVOT)", "LVOT", 1.0, no_number,
         change("trained", ["NormGrad Scaling single"], "trained", ["NormGrad Conv1x1 single",
                                                                    "NormGrad Conv3x3 single"])),
        ("Conv1 × 1 is the best over several layers (LVOT)", "LVOT", 1.0, no_number,
         change("trained", ["NormGrad Conv1x1 multi"], "trained", ["NormGrad Scaling multi",
                                                                   "NormGrad Conv3x3 multi"])),
        ("Pre-trained features raise the hits before training (Object-CXR)", "Object-CXR", 1.0, no_number,
         change("SR", METHODS, "FR", METHODS)),
    ]  # fmt: skip
    rows += [
        (
            f"Smoothing helps pixel maps more than the others ({of})",
            of,
            1.0,
            no_number,
            _smoothing_helps,
        )
        for of in both
    ]
    return rows + [
        (
            f"Several layers agree better across networks than one ({of})",
            of,
            -1.0,
            no_number,
            _dom_by_layers,
        )
        for of in both
    ]


def change(state: str, methods: Sequence[str], other: str, others: Sequence[str]) -> Callable:
    """A function of (scores, column): smoothed hits of `methods` in a state less those of `others` in another."""

    def difference(scores: pd.DataFrame, column: str) -> Measured:
        able = [set(scores.loc[scores["state"] == one, "network"]) for one in (state, other)]
        scores = scores[scores["smoothed"] & scores["network"].isin(able[0] & able[1])]
        a = (scores["state"] == state) & scores["method"].isin(methods)
        b = (scores["state"] == other) & scores["method"].isin(others)
        return _paired(scores, column, a, b)

    return difference


def _smoothing_helps(scores: pd.DataFrame, column: str) -> Measured:
    trained = scores[scores["state"] == "trained"]
    wide = trained.pivot_table(
        values=column,
        index=["patient_id", "image_id", "method"],
        columns="smoothed",
    )
    gain = (wide[True] - wide[False]).rename("gain").reset_index()
    return _paired(
        gain,
        "gain",
        gain["method"].isin(PIXEL_METHODS),
        ~gain["method"].isin(PIXEL_METHODS),
    )


def _dom_by_layers(scores: pd.DataFrame, column: str, n: int = 1000) -> Measured:
    """Mean DoM of the maps of several layers less that of single layers; patients are resampled, and the difference of
    the means is taken anew in each resample."""
    trained = scores[scores["smoothed"] & (scores["state"] == "trained") & scores["method"].isin(_NORMGRAD)]
    wide = trained.pivot_table(values=column, index="patient_id", columns=["network", "method"]).dropna()
    networks = sorted(set(wide.columns.get_level_values("network")))
    if len(networks) < 2 or len(wide) < 2:
        return Measured(np.nan, np.nan, np.nan, 0)
    gaps = (wide[networks[0]] - wide[networks[1]])[[*_MULTI, *_SINGLE]].to_numpy()
    drawn = np.concatenate(list(drawn_patients(len(gaps), n, seed=0)))
    doms = np.abs(np.concatenate([gaps.mean(0)[None], gaps[drawn].mean(1)]))
    values = doms[:, : len(_MULTI)].mean(1) - doms[:, len(_MULTI) :].mean(1)
    return Measured(
        float(values[0]),
        *np.quantile(values[1:], (0.025, 0.975)).tolist(),
        len(wide),
    )


STORED = {"Networks": classifiers, "Claims": claims}
