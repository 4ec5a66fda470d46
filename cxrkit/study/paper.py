"""A paper's tables beside ours: cells, claims and verdicts (paper `bcos`)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.metrics import Interval, bootstrap
from cxrkit.study import runs
from cxrkit.study.report import explained_runs, summary, variant, view

__all__ = ["beside", "claims", "difference", "table", "verdict"]

# What the tables of paper `bcos` call the same networks.
PUBLISHED = {
    "Baseline ResNet50": "Baseline",
    "B-cos ResNet50": "B-cos",
    "B-cos": "B-cos",
    "B-cos_FLC": "B-cos + FLC",
    "B-cos_BP": "B-cos + BlurPool",
}
EXPLANATIONS = {"LayerCAM": "layercam", "Inherent": "bcos"}
CLAIMS = (
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


def beside(name: str, published_table: str, view_name: str, metric: str = "EPG") -> pd.DataFrame:
    """A published EPG table (rows without augmentation and oversampling) beside the same cells of a grid, in percent.

    `metric`: "EPG" (precision) or "recall". Ours: macro mean over test positives with its 95 % interval and chance
    level.
    """
    published = table(published_table)
    published = published[(published["aug"] == "No") & (published["oversampling"] == "No")]
    ours = summary(name)
    ours = ours[ours["view"] == view_name]
    several = ours.duplicated(["network", "method"]).any()
    ours = ours.groupby(["network", "method"], sort=False).mean(numeric_only=True)  # over folds and seeds
    if several:
        ours[["low", "high"]] = np.nan  # the mean of intervals is no interval
    rows = []
    for cell in published.to_dict("records"):
        network, method = PUBLISHED[cell["variant"]], EXPLANATIONS[cell["explanation"]]
        row = {
            "network": network,
            "explanation": cell["explanation"],
            "paper": cell["epg_mean"],
            "paper std": cell["epg_std"],
        }
        if (network, method) in ours.index:
            found = ours.loc[(network, method)]
            row |= {"ours": 100 * found[metric], "chance": 100 * found["chance"], "maps": found["maps"]}
            if metric == "EPG":
                row |= {"low": 100 * found["low"], "high": 100 * found["high"]}
        rows.append(row)
    columns = ["network", "explanation", "paper", "paper std", "ours", "low", "high", "chance", "maps"]
    frame = pd.DataFrame(rows).reindex(columns=columns).dropna(axis=1, how="all")
    return frame.astype({"maps": "Int64"}) if "maps" in frame else frame


def difference(
    name: str, view_name: str, a: tuple[str, str], b: tuple[str, str], column: str = "precision"
) -> Interval:
    """Mean difference a - b over the maps of the same image and label, with a 95 % interval (patients resampled).

    `a` and `b`: (network, method). `column`: precision, recall, signed or grid, at threshold 0.
    """
    parts = []
    for network, method in (a, b):
        found = []
        for train, explain in explained_runs(name):
            if (view(train.parameters), variant(train.parameters)) == (view_name, network):
                scores = explain.frame("scores")
                scores = scores[(scores["method"] == method) & np.isclose(scores["threshold"], 0.0)]
                found.append(scores.assign(fold=train.parameters.fold, seed=train.parameters.seed))
        if not found:
            raise ParameterError(f"grid {name!r} has no explained {network!r} on {view_name!r}")
        keys = ["image_id", "label", "fold", "seed"]
        parts.append(pd.concat(found).set_index(keys)[[column, "patient_id"]])
    both = parts[0].join(parts[1], lsuffix="_a", rsuffix="_b", how="inner")
    return bootstrap(
        (both[f"{column}_a"] - both[f"{column}_b"]).to_numpy(), both["patient_id_a"].to_numpy(), n=2000, seed=0
    )


def claims(name: str) -> pd.DataFrame:
    """The paper's claims about EPG as differences: published, ours with interval (percent), and a plain verdict."""
    published = table("bcos_tab3_rsna_epg_antialiasing"), table("bcos_tab2_rsna_epg")
    cells = (
        pd.concat(published).query("aug == 'No' and oversampling == 'No'").drop_duplicates(["variant", "explanation"])
    )
    paper = {(PUBLISHED[row.variant], EXPLANATIONS[row.explanation]): row.epg_mean for row in cells.itertuples()}
    rows = []
    for claim, a, b in CLAIMS:
        try:
            found = difference(name, "binary", a, b)
        except ParameterError:  # a small grid holds no such pair
            continue
        expected = paper[a] - paper[b]
        row = {
            "claim": claim,
            "paper": expected,
            "ours": 100 * found.mean,
            "low": 100 * found.low,
            "high": 100 * found.high,
        }
        rows.append(row | {"verdict": verdict(found, expected)})
    return pd.DataFrame(rows, columns=["claim", "paper", "ours", "low", "high", "verdict"])


def verdict(interval: Interval, expected: float) -> str:
    """Whether an interval agrees with the sign of the published difference."""
    if not np.isfinite(interval.low) or interval.low <= 0 <= interval.high:
        return "undecided here"
    return "same direction" if np.sign(interval.mean) == np.sign(expected) else "opposite direction"


def table(name: str) -> pd.DataFrame:
    """A published table as printed, from `book/papers/`. Raises ParameterError naming those that are there."""
    folder = runs.project_folder() / "book" / "papers"
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise ParameterError(f"there is no paper table {name!r}; known: {known}")
    return pd.read_csv(path)
