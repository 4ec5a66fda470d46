"""Paper `covid` beside our runs: votes, scores of maps, claims, and the real sample."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.covid_labels import HIERARCHY
from cxrkit.errors import ParameterError
from cxrkit.metrics import Interval, bootstrap
from cxrkit.metrics.statistics import by_patient, resampled_ratios
from cxrkit.study import claims, ensembles, published, report, runs
from cxrkit.study.claims import Measured
from cxrkit.study.study import Study
from papers.covid.measure import CUTOFF

__all__ = [
    "HARD",
    "MEASURES",
    "PAPER_NAMES",
    "SOFT",
    "difference",
    "gather",
    "located",
    "measured",
    "micro_table",
    "predictions",
    "rate",
    "scored",
    "verdicts",
]

SOFT, HARD = "ensemble, mean", "ensemble, majority"
# What the paper calls our networks; DenseNet-121 stands in for its bigger sister.
PAPER_NAMES = {"resnet18": "ResNet18", "resnet34": "ResNet34", "inception_v3": "InceptionV3"}
PAPER_NAMES |= {"inception_resnet_v2": "InceptionResNetV2", "densenet161": "DenseNet161", "densenet121": "DenseNet161"}
PAPER_NAMES |= dict.fromkeys((SOFT, HARD), "Ensemble")

# Above and below the line of each quotient, from decision f and truth t.
MEASURES: Mapping[str, tuple[Callable, Callable]] = {
    "precision": (lambda f, t: f & t, lambda f, t: f),
    "recall": (lambda f, t: f & t, lambda f, t: t),
    "F1": (lambda f, t: 2 * (f & t), lambda f, t: f.astype(int) + t),
    "specificity": (lambda f, t: ~f & ~t, lambda f, t: ~t),
}


# Votes


def predictions(study: Study, cutoff: float = CUTOFF) -> dict[str, pd.DataFrame]:
    """Predictions of every network of a grid on its test images, over all splits, and of the two ensembles where there
    are several networks: {network: frame with fold, seed and `found` (the decision)}."""
    own = [(run.frame("predictions"), run.parameters) for run in study.trained]
    every = pd.concat([frame.assign(network=p.model, fold=p.fold, seed=p.seed) for frame, p in own])
    by_network = every.assign(found=every["probability"] > cutoff).groupby("network", sort=False)
    tables = {network: part.drop(columns="network").reset_index(drop=True) for network, part in by_network}
    if len(tables) > 1:
        votes = ensembles.ensemble(study.trained, cutoff).assign(seed=0)
        tables[SOFT] = votes.assign(found=votes["probability"] > cutoff)
        tables[HARD] = votes.assign(found=votes["votes"] > 0.5)
    return tables


def rate(predicted: pd.DataFrame, measure: str, label: str | None = None) -> Interval:
    """A measure over all labels at once (micro) or of one label, with its 95 % interval (patients resampled)."""
    value, drawn = _rates([predicted], measure, label)
    return _interval(value[0], drawn[:, 0])


def difference(a: pd.DataFrame, b: pd.DataFrame, measure: str = "F1") -> Measured:
    """Micro measure of a less that of b; the interval, over patients, is nan where the two judged different ones."""
    value, drawn = _rates([a, b], measure)
    patients = set(a["patient_id"]) & set(b["patient_id"])
    return Measured(*_interval(value[0] - value[1], drawn[:, 0] - drawn[:, 1]), len(patients))


def _rates(tables: Sequence[pd.DataFrame], measure: str, label: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The measure in each table, and in 1000 resamples of the patients that all of them share: [K], [1000, K]."""
    above, below = MEASURES[measure]
    patients = np.unique(np.concatenate([table["patient_id"].to_numpy(dtype=str) for table in tables]))
    sums = []
    for table in tables:
        rows = table if label is None else table[table["label"] == label]
        rows = rows[rows["target"].notna()]
        found, truth = rows["found"].to_numpy(dtype=bool), rows["target"].to_numpy() > 0.5
        both = np.stack([above(found, truth), below(found, truth)], axis=1).astype(float)
        sums.append(by_patient(both, rows["patient_id"].to_numpy(dtype=str), patients)[0])
    stacked = np.stack(sums, axis=1)  # [P, K, 2]
    totals = stacked.sum(0)
    value = np.where(totals[:, 1] > 0, totals[:, 0] / np.maximum(totals[:, 1], 1), np.nan)
    if len(patients) < 2:
        return value, np.full((1, len(tables)), np.nan)
    # A copy of each column, for a single one is added up in another order of draws.
    doubled = np.concatenate([stacked, stacked], axis=1)
    return value, resampled_ratios(doubled[:, :, 0], doubled[:, :, 1], 1000, 0)[:, : len(tables)]


def _interval(value: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) > 1 else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def micro_table(study: Study) -> pd.DataFrame:
    """The paper's Table 2 beside a grid's: a row per network and micro measure, in percent; `paper` is mean ± standard
    deviation over its five splits, ours has a 95 % interval over the patients of `splits` splits."""
    rows, measures = [], ("precision", "recall", "F1")
    for network, table in predictions(study).items():
        title = network + " (stands in)" * (network == "densenet121")
        named = {"network": title, "paper's": PAPER_NAMES.get(network, "–")}
        for measure in measures:
            ours, low, high = (100 * value for value in rate(table, measure))
            interval = f"{low:.1f} to {high:.1f}" if np.isfinite(low) else "–"
            found = {"ours": ours, "95 %": interval, "splits": str(table["fold"].nunique())}
            rows.append(named | {"measure": measure} | found)
    printed = published.table("covid/tab2_micro_metrics").set_index("model")
    missing = printed.index.difference([row["paper's"] for row in rows])
    rows += [{"network": "–", "paper's": name, "measure": measure} for name in missing for measure in measures]
    for row in (row for row in rows if row["paper's"] in printed.index):
        mean, std = (printed.loc[row["paper's"], f"micro_{row['measure'].lower()}_{kind}"] for kind in ("mean", "std"))
        row["paper"] = f"{100 * mean:.1f} ± {100 * std:.1f}"
    table = pd.DataFrame(rows, columns=["network", "paper's", "measure", "paper", "ours", "95 %", "splits"])
    return table.fillna({"paper": "–"})


# Maps


def scored(study: Study) -> list[tuple[str, runs.Run, runs.Run]]:
    """The measured networks of a grid: (network, training run, measuring run). Raises ParameterError where none is."""
    pairs = study.pairs("covid_measure")
    if not pairs:
        raise ParameterError(f"grid {study.name!r} measures no network of paper covid; `cxrkit grid run covid` does")
    plain = len({train.parameters.model for train, _ in pairs}) == len(pairs)
    title = (lambda p: p.model) if plain else (lambda p: f"{p.model}, split {p.fold}, seed {p.seed}")
    return [(title(train.parameters), train, run) for train, run in pairs]


def measured(study: Study, frame: str) -> pd.DataFrame:
    """A frame of every measured network of a grid with the column `network`."""
    parts = [run.frame(frame).assign(network=network) for network, _, run in scored(study)]
    return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)


def located(study: Study) -> pd.DataFrame:
    """Share of the shown maps in the region, with interval, chance and number of maps, by network and method."""
    table, by = measured(study, "methods"), ["network", "method"]
    groups, shares = table.groupby(by, sort=False), report.means(table, "share", by, n=1000)
    shares = shares.set_index(by)[["share", "low", "high"]]
    return shares.assign(chance=groups["chance"].mean(), maps=groups["share"].count()).reset_index()


# Claims


def verdicts(study: Study) -> pd.DataFrame:
    """The paper's claims beside ours, in points (percent), from `claims.csv`; see `cxrkit.study.claims`."""
    votes, nested = predictions(study), measured(study, "nested")
    singles = [network for network in votes if network not in (SOFT, HARD)]
    inner = measured(study, "methods")["label"].iloc[0]
    words = {
        "dense": next((network for network in ("densenet161", "densenet121") if network in votes), "densenet161"),
        "best": max(singles, key=lambda network: rate(votes[network], "F1").mean),
        "inner": inner,
        "above": "".join(nested.loc[nested["inner"] == inner, "outer"].head(1)),
    }
    tables = {name: partial(measured, frame=name) for name in ("methods", "nested", "inactive", "profiles")}
    every = pd.concat([table.assign(network=network) for network, table in votes.items()])
    tables |= {"votes": lambda of: every, "together": lambda of: _together(every), "bands": _moved}
    measures = {name: partial(difference, measure=name) for name in MEASURES} | {"dead": _dead}
    measures["beyond the whole"] = lambda a, b: claims.measured(a["border"].astype(float) - 1, range(len(a)))
    return claims.verdicts("covid", study, tables, measures, **words)


def _together(votes: pd.DataFrame, pair: Sequence[str] = ("COVID-19", "ARDS")) -> pd.DataFrame:
    """Of the images that have both labels: the share of networks and votes that found both, less one half."""
    of_pair = votes[votes["label"].isin(pair)].groupby(["network", "fold", "seed", "image_id", "patient_id"])
    have = (of_pair["target"].min() > 0.5) & (of_pair.size() == len(pair))
    if not have.any():
        raise ParameterError("no test image has both")
    found = of_pair["found"].min()[have].astype(float).groupby(["image_id", "patient_id"]).mean()
    return (found - 0.5).rename("beyond").reset_index()


def _moved(study: Study) -> pd.DataFrame:
    bands = measured(study, "bands")
    if bands.empty:
        raise ParameterError("only the phantom can be drawn again without bands")
    return bands.assign(moved=(bands["with_bands"] - bands["without_bands"]).abs())


def _dead(a: pd.DataFrame, b: pd.DataFrame) -> Measured:
    """Share of dead maps of a's layer less that of b's; the interval takes the feature maps as the sample."""
    shares = [bootstrap(np.arange(row.maps) < row.constant, np.arange(row.maps)) for row in (a.iloc[0], b.iloc[0])]
    (mean, low, high), (other, other_low, other_high) = shares
    gap = mean - other
    low, high = gap - np.hypot(mean - low, other_high - other), gap + np.hypot(high - mean, other - other_low)
    return Measured(gap, low, high, int(min(a["maps"].iloc[0], b["maps"].iloc[0])))


# The real sample: profile `sample` of the grid


def gather(sources: Mapping[str, Path], target: Path) -> None:
    """Make a folder source with the paper's labels, as paths of its hierarchy, from several: samples of Cohen's and of
    Kermany's images, by name, each a folder with images.csv. Days and boxes are kept. Raises ParameterError where the
    target exists."""
    from cxrkit.data.public.covid import finding_labels

    if target.exists():
        raise ParameterError(f"{target} exists; choose a new folder")
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    tables: dict[str, list[pd.DataFrame]] = {"images.csv": [], "boxes.csv": []}
    for name, root in sources.items():
        for file, parts in tables.items():
            if (root / file).is_file():
                table = pd.read_csv(root / file, dtype=str, keep_default_na=False)
                parts.append(table.assign(image_id=f"{name}-" + table["image_id"]))
        images = tables["images.csv"][-1]
        (hidden / name).mkdir(parents=True)
        for file in images["file"]:
            shutil.copyfile(root / file, hidden / name / Path(file).name)
        found = [set(finding_labels(text.replace(";", ", "))) - {"No Finding"} for text in images["labels"]]
        images["labels"] = [";".join(sorted(map(_path, labels))) for labels in found]
        images["file"] = [f"{name}/{Path(file).name}" for file in images["file"]]
        images["patient_id"] = f"{name}-" + images["patient_id"]
    for file, parts in tables.items():
        if parts:
            pd.concat(parts, ignore_index=True).to_csv(hidden / file, index=False)
    os.replace(hidden, target)


def _path(label: str) -> str:
    return f"{_path(HIERARCHY[label])}/{label}" if label in HIERARCHY else label


STORED = {
    "Networks": lambda study: micro_table(study).dropna(subset="ours"),
    "Where maps lie": located,
    "Claims": verdicts,
}
