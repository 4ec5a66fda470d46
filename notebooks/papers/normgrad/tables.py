"""Paper `normgrad` beside our runs: the pointing game of its Tables 2 to 7, and its claims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap, over_seeds, reproducibility
from cxrkit.metrics.statistics import drawn_patients
from cxrkit.study import claims, report
from cxrkit.study.claims import Measured
from cxrkit.study.published import scalars, table
from cxrkit.study.runs import Run
from cxrkit.study.study import Study
from papers.normgrad.measure import METHODS, PIXEL_METHODS

__all__ = [
    "NORMGRAD",
    "SETS",
    "SHORT",
    "change",
    "changes",
    "classifiers",
    "difference_of_means",
    "frames",
    "in_order",
    "means",
    "network_of",
    "of_paper",
    "pairs",
    "printed",
    "references",
    "set_of",
    "sets",
    "verdicts",
]

# The paper's sets by the views of the phantom that stand in for them, and by their own names.
SETS = {
    "objects": "Object-CXR",
    "object_cxr": "Object-CXR",
    "quality": "LVOT",
    "lvot": "LVOT",
}
NORMGRAD = tuple(name for name in METHODS if name.startswith("NormGrad"))
SHORT = {
    "InputXGrad": "Input × gradient",
    "GuidedBackprop": "Guided backprop",
    "GuidedGradCAM": "Guided Grad-CAM",
    "GradCAM": "Grad-CAM",
} | {name: name.removeprefix("NormGrad ").replace("x", " × ") for name in NORMGRAD}
_PRINTED = {"Object-CXR": "Table4", "LVOT": "Table3"}
# The paper's network on each set; on a laptop ResNet-18 stands for both.
_NETWORK = {"Object-CXR": "resnet34", "LVOT": "resnet50"}
_SMALL = "resnet18"
_BEST = {"Object-CXR": "best_R34_objectcxr", "LVOT": "best_R50_lvot"}


def pairs(study: Study) -> list[tuple[Run, Run]]:
    """The finished pairs (training run, its scores) of a grid. Raises ParameterError where there is none."""
    if both := study.pairs("normgrad_measure"):
        return both
    raise ParameterError(f"grid {study.name!r} holds no scores of this paper; `cxrkit grid run normgrad` makes them")


def set_of(trained: Run) -> str:
    """The paper's set that a run's images are, or stand for; else what the run says of them."""
    view = report.view(trained.parameters)
    return SETS.get(view, view)


def network_of(trained: Run) -> str:
    """The network's name, and whether it began with pre-trained weights."""
    return trained.parameters.model + (", pre-trained" if trained.parameters.weights else "")


def sets(study: Study) -> dict[str, str]:
    """The sets of a grid, and how pages call them: they say where the phantom stands in for one."""
    called: dict[str, str] = {}
    for trained, _ in pairs(study):
        of = set_of(trained)
        called.setdefault(of, f"the phantom, in place of {of}")
        if trained.parameters.dataset != "phantom":
            called[of] = of
    return called


def frames(study: Study, which: str) -> pd.DataFrame:
    """A table of every scores run, with the columns set, network, pretrained and seed."""
    parts = []
    for trained, scored in pairs(study):
        facts = {"set": set_of(trained), "network": network_of(trained), "seed": trained.parameters.seed}
        if (scored.folder / f"{which}.csv").is_file():
            parts.append(scored.frame(which).assign(pretrained=bool(trained.parameters.weights), **facts))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def means(frame: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean over images, then over seeds, of each group of `by`, which is the index; constant maps are left out.

    Columns: mean, std over the seeds (population; nan for one), low and high (95 % interval of the mean; patients
    resampled, an image's seeds averaged first), text ("0.450 ± 0.010"), seeds, images.
    """
    rows = {}
    for names, part in frame.groupby(list(by), sort=False):
        spread = over_seeds(part.groupby("seed")[column].mean().to_numpy()[:, None])
        std = spread.std if spread.seeds > 1 else np.nan
        by_image = part.groupby(["patient_id", "image_id"])[column].mean().reset_index()
        _, low, high = bootstrap(by_image[column], by_image["patient_id"])
        text = "–" if np.isnan(spread.mean) else f"{spread.mean:.3f}" + ("" if np.isnan(std) else f" ± {std:.3f}")
        rows[names] = [spread.mean, std, low, high, text, spread.seeds, len(by_image)]
    index = pd.MultiIndex.from_tuples(rows, names=by) if rows else pd.MultiIndex.from_arrays([[]] * len(by), names=by)
    return pd.DataFrame(rows.values(), index, ["mean", "std", "low", "high", "text", "seeds", "images"])


def in_order(table_: pd.DataFrame) -> pd.DataFrame:
    """A table whose index is the method in the paper's order, with the methods' short names as its first column."""
    return table_.reindex(METHODS).set_axis([*SHORT.values()]).rename_axis("method").reset_index()


def of_paper(of: str, network: str) -> bool:
    """Whether the paper's numbers for a set are of that network, as :func:`network_of` names it, or of its stand-in."""
    return network.split(",")[0] in (_NETWORK.get(of), _SMALL)


def printed(of: str, network: str = _SMALL) -> pd.Series:
    """The printed hits of trained networks on a set, by method; nan where the text available has none, and for networks
    that the printed table isn't about."""
    cells = table("normgrad/tables_2_to_6_layout")
    cells = cells[(cells["table"] == _PRINTED.get(of)) & (cells["condition"] == "trained")]
    known = cells.set_index("method")["pg_mean"].reindex(METHODS)
    return known if of_paper(of, network) else known * np.nan


def references(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """What maps that know nothing would hit, by set: a maximum drawn evenly, one always in the middle; and the boxes'
    share of the image."""
    columns = {
        column: "random place",
        column.replace("hit", "centre"): "centre of the image",
        "boxes": "boxes' share",
    }
    known = frames(study, "chance").groupby("set", sort=False)[list(columns)].mean()
    return known.rename(columns=columns).reset_index()


def change(frame: pd.DataFrame, column: str, a: pd.Series, b: pd.Series) -> Measured:
    """Mean over images of (mean of the rows `a`) - (mean of the rows `b`), patients resampled."""
    found = claims.difference(frame[a], frame[b], column, ["image_id"])
    return Measured(np.nan, np.nan, np.nan, 0) if found is None else found


def changes(frame: pd.DataFrame, column: str, a: str, b: str) -> pd.DataFrame:
    """:func:`change` by method, between the rows of two queries: change, low, high."""
    rows = {}
    for method, part in frame.groupby("method", sort=False):
        rows[method] = change(part, column, part.eval(a), part.eval(b))[:3]
    return pd.DataFrame(rows.values(), [*rows], ["change", "low", "high"])


def difference_of_means(frame: pd.DataFrame, networks: Sequence[str], column: str) -> pd.DataFrame:
    """Distance of the mean hits on two networks, by method: DoM with its 95 % interval; nan where there is one only."""
    rows = {}
    for method, part in frame.groupby("method", sort=False):
        both = part.pivot_table(values=column, index=["patient_id", "image_id"], columns="network").reset_index()
        if len(networks) == 2 and set(networks) <= set(both):
            rows[method] = reproducibility(*(both[name] for name in networks), both["patient_id"])
    return pd.DataFrame(rows.values(), [*rows], ["DoM, ours", "low", "high"]).reindex(METHODS)


def classifiers(study: Study) -> pd.DataFrame:
    """Table 7: accuracy and AUC on the test images of every training; the paper's best trial of a ResNet beside it."""
    stated = scalars("normgrad")
    rows = []
    for trained, _ in pairs(study):
        row = {"set": set_of(trained), "network": network_of(trained), "seed": trained.parameters.seed}
        found = report.classification_of(trained.frame("predictions")).iloc[0]
        row |= {"ours, accuracy": found["accuracy"], "ours, AUC": found["auc"]}
        best = _BEST.get(row["set"], "") if of_paper(row["set"], row["network"]) else ""
        row["paper's best accuracy"] = float(stated.get(f"{best}_acc", np.nan))
        row["paper's best AUC"] = float(stated.get(f"{best}_auc", np.nan))
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(study: Study, column: str = "hit_share") -> pd.DataFrame:
    """The claims of `claims.csv` as differences of hits, ours with interval, and a verdict; percent of the images.

    An image's hits are averaged over networks and seeds first, patients are resampled.
    """
    tables = {
        "all states": lambda study: _hits(study, column).query("smoothed"),
        "trained": lambda study: _hits(study, column).query("smoothed and state == 'trained'"),
        "gain": lambda study: _gain(_hits(study, column)),
    }
    return claims.verdicts("normgrad", study, tables, {"DoM": _dom_by_layers})


def _hits(study: Study, column: str) -> pd.DataFrame:
    """Scores with the column `hits`, and what the methods are: kind of virtual layer, "baseline" for others; layers."""
    scores = frames(study, "scores")
    names = scores["method"].str.split()
    kinds = {"kind": names.str[1].fillna("baseline"), "layers": names.str[2].fillna("")}
    return scores.assign(hits=scores[column], **kinds)


def _gain(hits: pd.DataFrame) -> pd.DataFrame:
    """What smoothing adds to the hits of trained networks, by set, image and method; whether its maps are of pixels."""
    trained = hits[hits["state"] == "trained"]
    index = ["set", "patient_id", "image_id", "method"]
    wide = trained.pivot_table(values="hits", index=index, columns="smoothed")
    table_ = (wide[True] - wide[False]).rename("gain").reset_index()
    return table_.assign(pixel=table_["method"].isin(PIXEL_METHODS))


def _dom_by_layers(several: pd.DataFrame, single: pd.DataFrame, n: int = 1000) -> Measured | None:
    """Mean DoM of the maps of several layers less that of single layers; patients are resampled, and the difference of
    the means is taken anew in each resample."""
    both = pd.concat([several, single])
    wide = both.pivot_table(values="hits", index="patient_id", columns=["network", "method"]).dropna()
    networks = sorted(set(wide.columns.get_level_values("network")))
    if len(networks) < 2 or len(wide) < 2:
        return None
    methods = [*dict.fromkeys(several["method"]), *dict.fromkeys(single["method"])]
    gaps = (wide[networks[0]] - wide[networks[1]])[methods].to_numpy()
    drawn = np.concatenate(list(drawn_patients(len(gaps), n, seed=0)))
    doms = np.abs(np.concatenate([gaps.mean(0)[None], gaps[drawn].mean(1)]))
    count = several["method"].nunique()
    values = doms[:, :count].mean(1) - doms[:, count:].mean(1)
    return Measured(float(values[0]), *np.quantile(values[1:], (0.025, 0.975)).tolist(), len(wide))


STORED = {"Networks": classifiers, "Claims": verdicts}
