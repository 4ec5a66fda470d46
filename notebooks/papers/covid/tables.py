"""Paper `covid` beside our runs: tables for its pages, from the runs of a grid."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.covid_labels import HIERARCHY, LABELS
from cxrkit.errors import ParameterError
from cxrkit.metrics import Interval, bootstrap
from cxrkit.metrics.statistics import by_patient, resampled_ratios
from cxrkit.study import ensembles, published, runs
from cxrkit.study.claims import Measured
from cxrkit.study.run_key import project_folder
from cxrkit.study.study import Study
from papers.covid import measure as measuring

__all__ = [
    "MEASURES",
    "PAPER_NAMES",
    "bars",
    "borders",
    "complexity",
    "copredicted",
    "dead",
    "difference",
    "gather",
    "label_rates",
    "located",
    "majority_against_mean",
    "measured",
    "micro_table",
    "overlaps",
    "predictions",
    "rate",
    "renaming",
    "scored",
]

# What the paper calls our networks; one of them stands in for its bigger sister.
PAPER_NAMES = {
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "inception_v3": "InceptionV3",
    "inception_resnet_v2": "InceptionResNetV2",
    "densenet161": "DenseNet161",
    "densenet121": "DenseNet161",
}
SOFT, HARD = "ensemble, mean", "ensemble, majority"
_KEYS = ("image_id", "label", "fold")

# Above and below the line of each quotient, from decision f and truth t.
MEASURES: Mapping[str, tuple[Callable, Callable]] = {
    "precision": (lambda f, t: f & t, lambda f, t: f),
    "recall": (lambda f, t: f & t, lambda f, t: t),
    "F1": (lambda f, t: 2 * (f & t), lambda f, t: f.astype(int) + t),
    "specificity": (lambda f, t: ~f & ~t, lambda f, t: ~t),
}


# Votes


def predictions(study: Study, cutoff: float = measuring.CUTOFF) -> dict[str, pd.DataFrame]:
    """What every network of a grid said of its test images, over all splits, and their two ensembles where there are
    several networks: {network: frame with fold and `found` (the decision)}."""
    trained = study.trained
    found: dict[str, list[pd.DataFrame]] = {}
    for run in trained:
        frame = run.frame("predictions").assign(fold=run.parameters.fold, seed=run.parameters.seed)
        found.setdefault(run.parameters.model, []).append(frame.assign(found=frame["probability"] > cutoff))
    tables = {network: pd.concat(parts, ignore_index=True) for network, parts in found.items()}
    if len(tables) > 1:
        votes = ensembles.ensemble(trained, cutoff).assign(seed=0)
        tables[SOFT] = votes.assign(found=votes["probability"] > cutoff)
        tables[HARD] = votes.assign(found=votes["votes"] > 0.5)
    return tables


def rate(predicted: pd.DataFrame, measure: str, label: str | None = None) -> Interval:
    """A measure over all labels at once (micro) or of one label, with its 95 % interval (patients resampled)."""
    value, drawn = _rates([predicted], measure, label)
    return _interval(value[0], drawn[:, 0])


def difference(a: pd.DataFrame, b: pd.DataFrame, measure: str = "F1", label: str | None = None) -> Measured:
    """Measure of a less that of b, on the same patients; where the two judged different ones, the interval is nan."""
    value, drawn = _rates([a, b], measure, label)
    patients = set(a["patient_id"]) & set(b["patient_id"])
    return Measured(*_interval(value[0] - value[1], drawn[:, 0] - drawn[:, 1]), len(patients))


def _rates(tables: Sequence[pd.DataFrame], measure: str, label: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The measure in each table, and in 1000 resamples of the patients that all of them share: [K], [1000, K]."""
    above, below = MEASURES[measure]
    patients = np.unique(np.concatenate([table["patient_id"].to_numpy(dtype=str) for table in tables]))
    sums = []
    for table in tables:
        rows = table if label is None else table[table["label"] == label]
        rows = rows[rows["target"].notna()]
        found, truth = (
            rows["found"].to_numpy(dtype=bool),
            rows["target"].to_numpy() > 0.5,
        )
        both = np.stack([above(found, truth), below(found, truth)], axis=1).astype(float)
        sums.append(by_patient(both, rows["patient_id"].to_numpy(dtype=str), patients)[0])
    stacked = np.stack(sums, axis=1)  # [P, K, 2]
    totals = stacked.sum(0)
    value = np.divide(
        totals[:, 0],
        totals[:, 1],
        out=np.full(len(tables), np.nan),
        where=totals[:, 1] > 0,
    )
    if len(patients) < 2:
        return value, np.full((1, len(tables)), np.nan)
    # A copy of each column, for a single one is added up in another order of draws.
    doubled = np.concatenate([stacked, stacked], axis=1)
    drawn = resampled_ratios(doubled[:, :, 0], doubled[:, :, 1], 1000, 0)[:, : len(tables)]
    return value, drawn


def _interval(value: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) > 1 else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def micro_table(study: Study) -> pd.DataFrame:
    """The paper's Table 2 beside a grid's: a row per network and micro measure, in percent; `paper` is mean ± standard
    deviation over its five splits, ours has a 95 % interval over the patients of `splits` splits."""
    printed = published.table("covid/tab2_micro_metrics").set_index("model")
    tables, rows = predictions(study), []
    taken = {PAPER_NAMES.get(network, "") for network in tables} | ({"Ensemble"} if SOFT in tables else set())
    for network, table in tables.items():
        row = "Ensemble" if network in (SOFT, HARD) else PAPER_NAMES.get(network, "")
        for measure in ("precision", "recall", "F1"):
            rows.append(_beside(printed, row, network, measure) | _percent(rate(table, measure), table))
    rows += [
        _beside(printed, row, "–", m) for row in printed.index.difference(taken) for m in ("precision", "recall", "F1")
    ]
    return pd.DataFrame(
        rows,
        columns=[
            "network",
            "paper's",
            "measure",
            "paper",
            "ours",
            "95 %",
            "splits",
        ],
    )


def _beside(printed: pd.DataFrame, row: str, network: str, measure: str) -> dict:
    told = "–"
    if row in printed.index:
        mean, std = (printed.loc[row, f"micro_{measure.lower()}_{kind}"] for kind in ("mean", "std"))
        told = f"{100 * mean:.1f} ± {100 * std:.1f}"
    stand_in = " (stands in)" if network == "densenet121" else ""
    return {
        "network": network + stand_in,
        "paper's": row or "–",
        "measure": measure,
        "paper": told,
    }


def _percent(found: Interval, table: pd.DataFrame) -> dict:
    ours, low, high = (100 * value for value in found)
    interval = f"{low:.1f} to {high:.1f}" if np.isfinite(low) else "–"
    return {"ours": ours, "95 %": interval, "splits": str(table["fold"].nunique())}


def bars(study: Study, measures: Sequence[str] = ("precision", "recall", "F1")) -> pd.DataFrame:
    """Rows for `charts.grouped_bars`: network, measure, value, low, high; micro."""
    rows = []
    for network, table in predictions(study).items():
        for measure in measures:
            value, low, high = rate(table, measure)
            rows.append(
                {
                    "network": network,
                    "measure": measure,
                    "value": value,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows)


def label_rates(study: Study, labels: Sequence[str] = (), measure: str = "F1") -> pd.DataFrame:
    """A measure per network and label, with interval and the number of positives. Empty `labels`: those of the paper's
    Fig. 3, or the five most frequent where the grid knows others."""
    tables, rows = predictions(study), []
    first = next(iter(tables.values()))
    own = (
        "COVID-19",
        "Pneumonia",
        "Viral Pneumonia",
        "Bacterial Pneumonia",
        "No Finding",
    )
    counts = first[first["target"] > 0.5]["label"].value_counts()
    labels = labels or ([label for label in own if label in counts] or list(counts.index[:5]))
    for network, table in tables.items():
        for label in labels:
            value, low, high = rate(table, measure, label)
            positives = int((table[table["label"] == label].drop_duplicates(["image_id"])["target"] > 0.5).sum())
            rows.append(
                {
                    "network": network,
                    "label": label,
                    measure: value,
                    "low": low,
                    "high": high,
                    "positives": positives,
                }
            )
    return pd.DataFrame(rows)


def copredicted(study: Study, first: str, second: str, cutoff: float = measuring.CUTOFF) -> pd.DataFrame:
    """Two labels at once: images that have both, of these found both; images found both; of these without both.

    Where the grid doesn't know the labels the table is empty.
    """
    rows = []
    for network, table in predictions(study, cutoff).items():
        wide = {
            column: table.pivot_table(
                index=["image_id", "fold", "seed"],
                columns="label",
                values=column,
                aggfunc="first",
            )
            for column in ("target", "found")
        }
        if not {first, second} <= set(wide["target"]):
            continue
        have, both = ((wide[column][[first, second]] > 0.5).all(axis=1) for column in ("target", "found"))
        row = {
            "have both": have.sum(),
            "found": (have & both).sum(),
            "called both": both.sum(),
        }
        rows.append({"network": network} | row | {"without having both": (both & ~have).sum()})
    return pd.DataFrame(
        rows,
        columns=[
            "network",
            "have both",
            "found",
            "called both",
            "without having both",
        ],
    )


def majority_against_mean(study: Study) -> pd.DataFrame:
    """How often the two votes decide differently: rows (majority, mean, decisions) over all images and labels."""
    tables = predictions(study)
    if SOFT not in tables:
        return pd.DataFrame(columns=["majority", "mean", "decisions"])
    words = {True: "found", False: "not found"}
    pairs = pd.DataFrame(
        {
            "majority": tables[HARD]["found"].map(words),
            "mean": tables[SOFT]["found"].map(words),
        }
    )
    return pairs.value_counts().rename("decisions").reset_index()


# What the runs of the step `scores` keep


def measured(study: Study, frame: str) -> pd.DataFrame:
    """A frame of every measured network of a grid with the column `network`. Raises ParameterError where none is."""
    parts = [run.frame(frame).assign(network=network) for network, _, run in scored(study)]
    if not parts:
        raise ParameterError(f"grid {study.name!r} measures no network of paper covid; `cxrkit grid run covid` does")
    filled = [part for part in parts if len(part)]
    return pd.concat(filled or parts[:1], ignore_index=True)


def scored(study: Study) -> list[tuple[str, runs.Run, runs.Run]]:
    """The measured networks of a grid: (network, training run, measuring run)."""
    pairs = study.pairs("covid_measure")
    several = {train.parameters.model for train, _ in pairs}
    plain = len(several) == len(pairs)
    title = (lambda p: p.model) if plain else (lambda p: f"{p.model}, split {p.fold}, seed {p.seed}")
    return [(title(train.parameters), train, run) for train, run in pairs]


def located(study: Study, by: Sequence[str] = ("network", "method")) -> pd.DataFrame:
    """Share of the shown maps in the region, with interval, chance and number of maps, for each group of `by`."""
    table, rows = measured(study, "methods"), []
    for names, part in table.groupby(list(by), sort=False):
        share = bootstrap(part["share"], part["patient_id"])
        row = dict(zip(by, names, strict=True)) | {
            "share": share.mean,
            "low": share.low,
            "high": share.high,
        }
        told = {
            "chance": part["chance"].mean(),
            "maps": int(part["share"].notna().sum()),
        }
        rows.append(row | told)
    return pd.DataFrame(rows)


def dead(study: Study) -> pd.DataFrame:
    """Dead feature maps of the middle layer, published and ours, in percent; `zero` of them are 0 throughout."""
    printed = published.scalars("covid")
    table = measured(study, "inactive")
    rows = []
    for row in table[table["middle"]].itertuples():
        paper = PAPER_NAMES.get(row.network.split(",")[0], "")
        told = printed.get(f"dead_fm_middle_{paper}", "")
        rows.append(
            {
                "network": row.network,
                "paper's": paper or "–",
                "paper": f"{float(told):.2f}" if told else "–",
                "ours": row.percent,
                "maps": int(row.maps),
                "constant": int(row.constant),
                "zero": int(row.zero),
            }
        )
    return pd.DataFrame(rows)


def borders(study: Study) -> pd.DataFrame:
    """How strong profiles are at the border of the image against everywhere, per network and layer (top maps)."""
    table = measured(study, "profiles")
    found = table.groupby(["network", "layer"], sort=False)["border"].agg(["mean", "min", "max", "size"]).reset_index()
    return found.rename(
        columns={
            "mean": "border",
            "min": "lowest",
            "max": "highest",
            "size": "maps",
        }
    )


# Tables that need no run


def complexity() -> pd.DataFrame:
    """The paper's Table 1, whose cells the text available to us lacks, computed for its five networks with 14 labels.

    Parameters in millions; GFLOPs of one forward pass at `pixels` (a multiplication and an addition are two) and GMACs
    (half of it); memory in MiB of the float32 activations that a training step keeps per image, without weights.
    """
    table = pd.read_csv(project_folder() / "book" / "foundations" / "networks.csv").set_index("network")
    rows = []
    for network in (
        "resnet18",
        "resnet34",
        "inception_v3",
        "inception_resnet_v2",
        "densenet161",
        "densenet121",
    ):
        row = table.loc[network]
        sizes = {
            "parameters": row.parameters,
            "GFLOPs": row.gflops,
            "GMACs": row.gflops / 2,
        }
        name = PAPER_NAMES[network] if network != "densenet121" else "DenseNet121 (stands in)"
        rows.append({"network": name} | sizes | {"memory": row.activations, "pixels": int(row.input_size)})
    return pd.DataFrame(rows)


def overlaps(parts: Sequence[set[str]], everyone: int) -> pd.DataFrame:
    """What sets of test patients share: sizes, patients in any two of them, and how many of `everyone` they reach."""
    shared = [len(a & b) for a, b in combinations(parts, 2)]
    union = set().union(*parts)
    counts = {
        "test patients of a split": f"{min(map(len, parts))} to {max(map(len, parts))}",
        "shared by any two splits": f"{min(shared)} to {max(shared)}",
        "tested in none": str(everyone - len(union)),
        "tested once": str(sum(sum(p in part for part in parts) == 1 for p in union)),
        "tested more than once": str(sum(sum(p in part for part in parts) > 1 for p in union)),
    }
    return pd.DataFrame({"": list(counts), "patients": list(counts.values())})


def gather(cohen: str | Path, kermany: str | Path, target: str | Path) -> Path:
    """A `folder` source with the paper's labels from two: samples of Cohen's and of Kermany's images, as folders with
    images.csv. Files are copied; labels become paths of the paper's hierarchy; `offset` (day) and boxes are kept.

    Load it with `label_map` of `renaming(target)` and `healthy_class="No Finding"`. Raises ParameterError where the
    target exists.
    """
    from cxrkit.data.public.covid import finding_labels

    target = Path(target)
    if target.exists():
        raise ParameterError(f"{target} exists; choose a new folder")
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    tables, boxes = [], []
    for name, root in (("cohen", Path(cohen)), ("kermany", Path(kermany))):
        table = pd.read_csv(root / "images.csv", dtype=str, keep_default_na=False)
        (hidden / name).mkdir(parents=True)
        for file in table["file"]:
            shutil.copyfile(root / file, hidden / name / Path(file).name)
        found = [finding_labels(text.replace(";", ", ")) for text in table["labels"]]
        table["labels"] = [";".join(sorted(map(_path, set(names) - {"No Finding"}))) for names in found]
        table["file"] = [f"{name}/{Path(file).name}" for file in table["file"]]
        table["patient_id"], table["image_id"] = (f"{name}-" + table[c] for c in ("patient_id", "image_id"))
        tables.append(table)
        if (root / "boxes.csv").is_file():
            found = pd.read_csv(root / "boxes.csv", dtype=str, keep_default_na=False)
            boxes.append(found.assign(image_id=f"{name}-" + found["image_id"]))
    pd.concat(tables, ignore_index=True).to_csv(hidden / "images.csv", index=False)
    if boxes:
        pd.concat(boxes, ignore_index=True).to_csv(hidden / "boxes.csv", index=False)
    os.replace(hidden, target)
    return target


def renaming(folder: str | Path) -> dict[str, str]:
    """From the label paths in a folder of `gather` to the paper's labels: the `label_map` of the folder source."""
    table = pd.read_csv(Path(folder) / "images.csv", dtype=str, keep_default_na=False)
    held = {f"{path}/" for cell in table["labels"] for path in cell.split(";")}
    paths = {_path(label): label for label in LABELS}
    return {path: label for path, label in paths.items() if any(one.startswith(f"{path}/") for one in held)}


def _path(label: str) -> str:
    steps = [label]
    while steps[0] in HIERARCHY:
        steps.insert(0, HIERARCHY[steps[0]])
    return "/".join(steps)


def _claims(study: Study) -> pd.DataFrame:
    from papers.covid.claims import claims

    return claims(study)


STORED = {
    "Networks": lambda study: micro_table(study).dropna(subset="ours"),
    "Where maps lie": located,
    "Claims": _claims,
}
