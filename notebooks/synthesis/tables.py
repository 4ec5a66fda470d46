"""All methods by all papers' metrics: tables of the runs of `measure.ipynb`, and the claims of all papers."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd

import cxrkit.attribution
from cxrkit import grid
from cxrkit.errors import ParameterError
from cxrkit.metrics import Accumulator, LocalisationScores, compare, holm
from cxrkit.study.claims import TOO_FEW
from cxrkit.study.published import papers
from cxrkit.study.report import variant
from cxrkit.study.study import Study
from synthesis.measure import CALLED

__all__ = ["BETTER", "against", "agreement", "claims", "costs", "counted", "means", "overview", "scores"]

# +1: the higher the better.
BETTER = {name: -1 if name in ("deletion", "likeness to random") else 1 for name in CALLED.values()}


def scores(study: Study) -> pd.DataFrame:
    """A row per network, image, label, method and score of a grid; scores as pages call them. Raises ParameterError."""
    parts = []
    for train, run in study.pairs("measure"):
        of = train.parameters
        network = f"{of.model}, {variant(of)}, seed {of.seed}" if of.seed else f"{of.model}, {variant(of)}"
        parts.append(run.frame("scores").assign(network=network))
    if not parts:
        raise ParameterError(
            f"grid {study.name!r} has no run of synthesis/measure.ipynb; `cxrkit grid run synthesis` makes some"
        )
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(score=frame["score"].replace(CALLED))


def _means(frame: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """Mean over the images of each label, then over labels: a row per method, a column per score.

    nan where a map has no score: of fewer images than the others', a mean can't stand beside theirs.
    """
    by_label = frame.groupby(["method", "label", "score"], sort=False)[column].mean()
    table = by_label.groupby(["method", "score"], sort=False).mean().unstack()
    whole = _counts(frame) == frame.groupby(["method", "score"], sort=False).size().unstack()
    table = table.where(whole.reindex_like(table))
    return table.reindex(columns=[name for name in BETTER if name in table])


def _counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Maps that have the score: a row per method, a column per score."""
    return frame.groupby(["method", "score"], sort=False)["value"].count().unstack()


def overview(frame: pd.DataFrame) -> dict[str, dict]:
    """By network, what `charts.matrix` takes: methods in the order of the first metric, and chance below.

    A method that drew a degenerate map says how many of its maps a metric could score, at least, and has nan where that
    isn't all of them.
    """
    shown = {}
    for network, part in frame.groupby("network", sort=False):
        part = part[part["score"].isin(BETTER)]
        table = _means(part)
        table = table.sort_values(table.columns[0], ascending=False)
        fewest, maps = (_counts(part).min(axis=1), part.groupby(["method", "score"]).size().max())
        names = [name if fewest[name] == maps else f"{name} ({fewest[name]} of {maps})" for name in table.index]
        table.index = pd.Index(names)
        table.loc["chance"] = _means(part, "chance").mean()
        shown[network] = {"values": table.to_numpy(), "rows": list(table.index), "columns": list(table.columns)}
    return shown


def means(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric by network and method: mean over labels with its 95 % interval (patients resampled), chance, maps that
    were scored, degenerate ones (left out), patients. Raises ParameterError for an unknown metric."""
    rows = []
    for network, part in _of(frame, metric).groupby("network", sort=False):
        gathered = Accumulator()
        numbers = LocalisationScores({metric: part["value"].to_numpy()}, {metric: part["chance"].to_numpy()})
        gathered.add(numbers, part["patient_id"].to_numpy(), method=part["method"], label=part["label"])
        found = gathered.table().query("label == 'macro'").assign(network=network).set_index("method")
        found["patients"] = part.dropna(subset="value").groupby("method")["patient_id"].nunique()
        rows.append(found.fillna({"patients": 0}).astype({"patients": int}).reset_index())
    table = pd.concat(rows, ignore_index=True).rename(columns={"n": "maps", "mean": metric})
    table.loc[table["patients"] < 2, ["low", "high"]] = np.nan
    return table[["network", "method", metric, "low", "high", "chance", "maps", "degenerate", "patients"]]


def _of(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    if metric not in BETTER:
        raise ParameterError(f"metric {metric!r} is unknown; use one of {list(BETTER)}")
    return frame[frame["score"] == metric]


def agreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation between metrics over (network, method), each turned so that high is good.

    Methods that any metric can't score on every map stay out, so that all numbers rank the same methods.
    """
    tables = [_means(part[part["score"].isin(BETTER)]).dropna() for _, part in frame.groupby("network", sort=False)]
    turned = pd.concat([table * [BETTER[name] for name in table] for table in tables])
    return turned.corr(method="spearman")


def against(frame: pd.DataFrame, metric: str, reference: str) -> pd.DataFrame:
    """Each method less the reference on the same images, a row per network and method: difference, interval, p (Holm),
    maps (of each of the two), left out (a degenerate one of either), patients.

    p is exact where patients are few (see `metrics.compare`); nan below two of them. Raises ParameterError for an
    unknown metric or reference.
    """
    rows = []
    for network, part in _of(frame, metric).groupby("network", sort=False):
        keys = ["patient_id", "image_id", "label", "method"]
        wide = part.groupby(keys, sort=False)["value"].mean().unstack(sort=False).dropna(axis=1, how="all")
        if reference not in wide:
            raise ParameterError(f"reference {reference!r} explains no image of {network}; use one of {list(wide)}")
        for method in (name for name in wide if name != reference):
            both = {method: wide[method].to_numpy(), reference: wide[reference].to_numpy()}
            found = compare(both, wide.index.get_level_values("patient_id").to_numpy()).iloc[0]
            row = {"network": network, "method": method, **found[["difference", "low", "high", "p"]]}
            rows.append(row | {"maps": found["n"], "left out": found["left_out"], "patients": found["patients"]})
    table = pd.DataFrame(rows)
    if len(table):
        table["p"] = holm(table["p"])
    return table.rename(columns={"p": "p (Holm)"})


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """By method: passes as its card states them, and the median time of one map, milliseconds, over all networks."""
    seconds = frame[frame["score"] == "seconds"].groupby("method", sort=False)["value"].median()
    rows = []
    for method, time in seconds.sort_values().items():
        card = cxrkit.attribution.card(method)
        row = {"method": method, "forwards": card.forwards, "backwards": card.backwards}
        rows.append(row | {"ms per map": 1000 * time})
    return pd.DataFrame(rows)


def claims() -> pd.DataFrame:
    """The claims of all papers with verdicts, from the grid of each (paper, claim, ours, low, high, n, verdict)."""
    parts = []
    for paper in papers():
        stored = importlib.import_module(f"papers.{paper}.tables").STORED
        parts.append(stored["Claims"](grid.load(paper)).assign(source=paper))
    frame = pd.concat(parts, ignore_index=True)
    columns = ["claim", "ours", "low", "high", "n", "verdict"]
    return frame[["source", *columns]].rename(columns={"source": "paper"})


def counted(frame: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each paper got which verdict; reasons why one can't be tested count as one, but too few
    patients for any verdict have a column of their own."""
    kinds = frame["verdict"].str.split(":").str[0].mask(frame["verdict"] == TOO_FEW, "too few patients")
    table = pd.crosstab(frame["paper"], kinds).reindex([paper for paper in papers() if paper in set(frame["paper"])])
    return table.assign(claims=table.sum(axis=1)).replace(np.nan, 0).reset_index().rename_axis(columns=None)
