"""All methods by all papers' metrics: tables of the runs of `synthesis_scores`, and the claims of all papers."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd

import cxrkit.attribution
from cxrkit.errors import ParameterError
from cxrkit.metrics import compare, holm
from cxrkit.study import grid
from cxrkit.study.measuring.synthesis import CALLED
from cxrkit.study.papers import PAPERS
from cxrkit.study.report import runs_of, variant

__all__ = ["BETTER", "against", "agreement", "claims", "costs", "counted", "overview", "scores"]

# Where the claims of a paper are, if not in the module of its name.
_CLAIMS = {"covid": "covid_claims", "relevance": "relevance_maps"}
# +1: the higher the better.
BETTER = {name: -1 if name in ("deletion", "likeness to random") else 1 for name in CALLED.values()}


def scores(name: str) -> pd.DataFrame:
    """A row per network, image, label, method and score of a grid; scores as pages call them. Raises ParameterError."""
    found = runs_of(name)
    trained = {run.key: run for run in found if run.kind == "train"}
    parts = []
    for run in (run for run in found if run.kind == "synthesis_scores"):
        of = trained[run.parameters.run].parameters
        network = f"{of.model}, {variant(of)}, seed {of.seed}" if of.seed else f"{of.model}, {variant(of)}"
        parts.append(run.frame("scores").assign(network=network))
    if not parts:
        raise ParameterError(f"grid {name!r} has no run of synthesis_scores; `cxrkit grid run synthesis` makes some")
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(score=frame["score"].replace(CALLED))


def _means(frame: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """Mean over the images of each label, then over labels: a row per method, a column per score."""
    by_label = frame.groupby(["method", "label", "score"], sort=False)[column].mean()
    table = by_label.groupby(["method", "score"], sort=False).mean().unstack()
    return table.reindex(columns=[name for name in BETTER if name in table])


def overview(frame: pd.DataFrame) -> dict[str, dict]:
    """By network, what `charts.matrix` takes: methods in the order of the first metric, and chance below."""
    shown = {}
    for network, part in frame.groupby("network", sort=False):
        table = _means(part)
        table = table.sort_values(table.columns[0], ascending=False)
        table.loc["chance"] = _means(part, "chance").mean()
        shown[network] = {"values": table.to_numpy(), "rows": list(table.index), "columns": list(table.columns)}
    return shown


def agreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation between metrics over (network, method), each turned so that high is good."""
    tables = [_means(part) for _, part in frame.groupby("network", sort=False)]
    turned = pd.concat([table * [BETTER[name] for name in table] for table in tables])
    return turned.corr(method="spearman")


def against(frame: pd.DataFrame, metric: str, reference: str) -> pd.DataFrame:
    """Each method less the reference on the same images, a row per network and method: difference, interval, p (Holm).

    Raises ParameterError for an unknown metric or reference.
    """
    if metric not in BETTER:
        raise ParameterError(f"metric {metric!r} is unknown; use one of {list(BETTER)}")
    rows = []
    for network, part in frame[frame["score"] == metric].groupby("network", sort=False):
        wide = part.pivot_table("value", ["patient_id", "image_id", "label"], "method", sort=False, dropna=False)
        wide = wide.dropna(axis=1, how="all")
        if reference not in wide:
            raise ParameterError(f"reference {reference!r} explains no image of {network}; use one of {list(wide)}")
        for method in (name for name in wide if name != reference):
            both = {method: wide[method].to_numpy(), reference: wide[reference].to_numpy()}
            found = compare(both, wide.index.get_level_values("patient_id").to_numpy()).iloc[0]
            row = {"network": network, "method": method, "difference": found["difference"]}
            rows.append(row | {"low": found["low"], "high": found["high"], "p": found["p"]})
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
    """The claims of all papers with their verdicts, from the grid of each (paper, claim, ours, low, high, verdict)."""
    parts = []
    for paper in PAPERS:
        module = importlib.import_module(f"cxrkit.study.papers.{_CLAIMS.get(paper, paper)}")
        parts.append(module.claims(grid.shown(paper)).assign(source=paper))
    frame = pd.concat(parts, ignore_index=True)
    columns = ["claim", "ours", "low", "high", "verdict"]
    return frame[["source", *columns]].rename(columns={"source": "paper"})


def counted(frame: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each paper got which verdict; reasons why one can't be tested count as one."""
    kinds = frame["verdict"].str.split(":").str[0]
    table = pd.crosstab(frame["paper"], kinds).reindex([paper for paper in PAPERS if paper in set(frame["paper"])])
    return table.assign(claims=table.sum(axis=1)).replace(np.nan, 0).reset_index().rename_axis(columns=None)
