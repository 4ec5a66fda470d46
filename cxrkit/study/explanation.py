"""Explaining a trained run: maps of its test images, scored against the boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
import cxrkit.metrics
from cxrkit.attribution.api import device_of
from cxrkit.errors import DataError, ParameterError
from cxrkit.study import report, runs
from cxrkit.study.parameters import ExplainParameters
from cxrkit.study.study import Study
from cxrkit.train.devices import chosen_device
from cxrkit.train.loader import target_table
from cxrkit.train.losses import probabilities
from cxrkit.train.parameters import Parameters
from cxrkit.train.scoring import activation_of
from cxrkit.train.setup import load_data

__all__ = ["Subject", "coverage", "example", "extent", "kept_maps", "network_of", "score", "subject"]

# Why an image isn't scored for a label.
LEFT_OUT = ("no box", "box outside", "box, label negative", "box, label unknown")


@dataclass
class Subject:
    """A training run and its model, the methods and labels that explain it, and the test images of its fold.

    `cutoffs`: the probability above which each label is called, chosen by the run on its validation split; empty: the
    run keeps none, and 0.5 is used. `split`: the whole test split, of which `images` are those looked at.
    """

    run: runs.Run
    parameters: Parameters  # with the run's key filled in
    model: nn.Module
    methods: list[str]
    labels: list[str]
    images: cxrkit.data.Dataset | None = None
    cutoffs: dict[str, float] = field(default_factory=dict)
    split: cxrkit.data.Dataset | None = None

    def cutoff(self, label: str) -> float:
        """The probability above which a label is called; nan where the run could choose none."""
        return self.cutoffs.get(label, np.nan if self.cutoffs else 0.5)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, L] of all labels of the model, on the CPU."""
        with torch.no_grad():
            return self.model(images.to(device_of(self.model, images))).cpu()

    def maps(self, images: Tensor, method: str, labels: list[str], **options: Any) -> Tensor:
        """Maps [B, L, H, W], on the CPU."""
        device = device_of(self.model, images)
        return cxrkit.attribute(self.model, images.to(device), method=method, labels=labels, **options).cpu()


def subject(parameters: ExplainParameters, load: Callable[[], Study] | None = None) -> Subject:
    """Load what `parameters` name; empty ones are filled in, an empty run by the first B-cos run of `load()`.

    Raises ParameterError for an unknown method or label, DataError for a run whose data have changed since or have no
    boxes.
    """
    run = runs.find(parameters.run, parameters.results) if parameters.run else _of_study(load)
    if run.parameters.root and not run.stale and runs.key(run.parameters) != run.key:
        raise DataError(f"run {run.key}: the tables in {run.parameters.root} have changed since; train it again")
    model, methods, labels = network_of(run, parameters)
    test = load_data(run.parameters).split("test")
    if not len(test.boxes):
        raise DataError(
            f"run {run.key}: no test image of {test.name} has a box, so no map can be scored; add boxes.csv"
        )
    images = test
    if parameters.images:
        boxed = np.flatnonzero(test.table["image_id"].isin(test.boxes["image_id"]))
        images = test.select(boxed[_spread(len(boxed), min(parameters.images, len(boxed)))])
    parameters = parameters.model_copy(update={"run": run.key})
    return Subject(run, parameters, model, methods, labels, images.cached(), _cutoffs(run), test)


def network_of(
    run: runs.Run, parameters: Parameters, others: Sequence[str] = ()
) -> tuple[nn.Module, list[str], list[str]]:
    """Network of a run, and the methods and labels that explain it: those that `parameters` name, or all.

    Raises ParameterError for a method that can't explain it and a label that it doesn't know, also among `others`.
    """
    model = run.network(chosen_device(parameters))
    labels = list(parameters.labels or model.labels)
    if unknown := sorted({*labels, *others} - set(model.labels)):
        raise ParameterError(f"labels {unknown} are unknown to run {run.key}; it knows {list(model.labels)}")
    able = [card.name for card in cxrkit.attribution.methods(model)]
    methods = list(parameters.methods or able)
    if unfit := [name for name in methods if name not in able]:
        raise ParameterError(f"methods {unfit} can't explain {run.key}; those that can: {', '.join(able)}")
    return model, methods, labels


def _cutoffs(run: runs.Run) -> dict[str, float]:
    try:
        return run.frame("cutoffs").set_index("label")["cutoff"].to_dict()
    except DataError:  # a run of an older version
        return {}


def _of_study(load: Callable[[], Study] | None) -> runs.Run:
    if load is None:
        raise ParameterError("run is empty; give the key or the folder of a training run")
    trained = load().trained
    return next((run for run in trained if run.parameters.model.startswith("bcos_")), trained[0])


def score(subject: Subject) -> pd.DataFrame:
    """Energy-based pointing game of every method on every box-bearing positive of the test images (paper `bcos`, Eqs.
    1-3).

    A row per image, label, method and threshold: precision, recall, signed, chance (the boxes' share of the image),
    chance_recall (what the recall would be with the whole image as box), grid (share of spectral energy at the strides'
    frequencies), logit, probability, cutoff (above which the run calls the label). A degenerate map scores nan and
    keeps its row. :func:`coverage` counts what has no row.
    """
    data = subject.images
    targets = target_table(data)
    parts = []
    for method in subject.methods:
        for label in subject.labels:
            column = data.labels.index(label)
            rows = torch.nonzero(targets[:, column] > 0.5).flatten()
            for chunk in rows.split(32) if len(rows) else []:
                parts.append(_score_chunk(subject, chunk, column, method))
    if not any(len(part) for part in parts):
        left = coverage(subject, pd.DataFrame(columns=["image_id", "patient_id", "label"])).iloc[-1]
        counts = ", ".join(f"{name}: {int(left[name])}" for name in ("positive", *LEFT_OUT))
        raise ParameterError(
            f"run {subject.run.key}: no test image has any of the labels {subject.labels} with a box ({counts})"
        )
    return pd.concat(parts, ignore_index=True)


def coverage(subject: Subject, scores: pd.DataFrame) -> pd.DataFrame:
    """Numbers of images that are scored for each label, and of those that aren't, by cause; then of all labels.

    `scores` as :func:`score` gives them. Columns: label, cutoff, positive (images with the label), scored, patients (of
    the scored images), and the causes: no box; box outside (of what the network sees, or without area); box, label
    negative and box, label unknown (the image's labels deny or don't know the label of the box). The last row adds up
    the labels, so an image counts once for each; its patients count once.
    """
    columns = [subject.images.labels.index(label) for label in subject.labels]
    targets = target_table(subject.images)[:, columns].numpy()
    positive, boxed, scored = targets > 0.5, *(_marked(subject, table) for table in (subject.images.boxes, scores))
    causes = (positive & ~boxed, positive & boxed & ~scored, boxed & (targets <= 0.5), boxed & np.isnan(targets))
    cells = {"positive": positive, "scored": scored} | dict(zip(LEFT_OUT, causes, strict=True))
    frame = pd.DataFrame({name: [*marks.sum(0), marks.sum()] for name, marks in cells.items()})
    patients = scores.groupby("label")["patient_id"].nunique().reindex(subject.labels, fill_value=0)
    frame.insert(0, "label", [*subject.labels, "all labels"])
    frame.insert(1, "cutoff", [*(subject.cutoff(label) for label in subject.labels), np.nan])
    frame.insert(4, "patients", [*patients, scores["patient_id"].nunique()])
    return frame


def _marked(subject: Subject, table: pd.DataFrame) -> np.ndarray:
    """Images and labels that have a row in the table, bool [N, L]."""
    rows = pd.Index(subject.images.image_ids).get_indexer(table["image_id"].astype(str))
    columns = pd.Index(subject.labels).get_indexer(table["label"].astype(str))
    marks = np.zeros((len(subject.images), len(subject.labels)), dtype=bool)
    there = (rows >= 0) & (columns >= 0)
    marks[rows[there], columns[there]] = True
    return marks


def extent(subject: Subject, scores: pd.DataFrame) -> str:
    """In a few sentences: how much of the test split was looked at and scored, and which cutoffs call a label."""
    split = subject.images if subject.split is None else subject.split
    boxed = split.table["image_id"].astype(str).isin(split.boxes["image_id"].astype(str))
    others = subject.images.boxes.loc[~subject.images.boxes["label"].isin(subject.labels), "label"]
    looked, scored = len(subject.images), scores["image_id"].nunique()
    sentences = [
        f"The test split has {_people(split.table)}; {_people(split.table[boxed])} have a box.",
        f"Looked at: {_people(subject.images.table)}; scored: {_people(scores)}.",
        f"Nothing to score on {looked - scored}: no label that is explained is present there with its box.",
    ]
    if len(others):
        names = ", ".join(sorted(map(str, set(others))))
        sentences.append(f"Boxes of labels that aren't explained: {len(others)} ({names}).")
    chosen = "those chosen on the validation split" if subject.cutoffs else "0.5 each, as the run keeps none"
    return "\n".join([*sentences, f"Cutoffs of found and missed: {chosen}."])


def _people(table: pd.DataFrame) -> str:
    return f"{table['image_id'].nunique()} images of {table['patient_id'].nunique()} patients"


def _score_chunk(subject: Subject, rows: Tensor, column: int, method: str) -> pd.DataFrame:
    label = subject.images.labels[column]
    batch = subject.images.batch(rows.tolist())
    boxed = batch.masks[:, column].flatten(1).any(1)
    if not boxed.any():
        return pd.DataFrame()
    images, masks = batch.images[boxed], batch.masks[boxed, column]
    maps = _maps(subject, images, method, [label])[:, 0]
    logits = subject.logits(images)
    place = list(subject.model.labels).index(label)
    frame = {
        "image_id": np.asarray(batch.image_ids)[boxed.numpy()],
        "patient_id": np.asarray(batch.patient_ids)[boxed.numpy()],
        "label": label,
        "method": method,
        "logit": logits[:, place].numpy(),
        "probability": probabilities(logits, activation_of(subject.model))[:, place].numpy(),
        "cutoff": subject.cutoff(label),
        "chance": cxrkit.metrics.chance_level(masks).numpy(),
        "signed": cxrkit.metrics.energy_pointing_game(maps, masks, kind="signed").numpy(),
        "grid": _coarse(cxrkit.metrics.grid_energy, maps),
        "smooth": _coarse(cxrkit.metrics.isotropic_grid_energy, maps),
    }
    thresholds = subject.parameters.thresholds
    kinds = {
        kind: cxrkit.metrics.threshold_sweep(maps, masks, thresholds, kind).numpy() for kind in ("precision", "recall")
    }
    everywhere = torch.ones_like(masks)
    kinds["chance_recall"] = cxrkit.metrics.threshold_sweep(maps, everywhere, thresholds, "recall").numpy()
    parts = [
        pd.DataFrame({**frame, "threshold": threshold} | {kind: values[:, column] for kind, values in kinds.items()})
        for column, threshold in enumerate(thresholds)
    ]
    return pd.concat(parts, ignore_index=True)


def _coarse(share: Callable[..., Tensor], maps: Tensor) -> np.ndarray:
    # The stem keeps its strides of 2 and 4 in every variant; what anti-aliasing can change are the coarser periods.
    return (share(maps) - share(maps, strides=(2, 4))).numpy()


def kept_maps(subject: Subject) -> dict[str, np.ndarray]:
    """Raw maps of a few test images for every method and label, to look at later.

    Keys: image_ids [n], labels [L], methods [M], logits [n, L], maps [M, n, L, H, W] float32.
    """
    data = subject.images
    count = min(subject.parameters.maps, len(data))
    rows = _spread_positive(target_table(data), count)
    batch = data.batch(rows)
    logits = subject.logits(batch.images)
    maps = [_maps(subject, batch.images, method, subject.labels) for method in subject.methods]
    columns = [list(subject.model.labels).index(label) for label in subject.labels]
    return {
        "image_ids": np.asarray(batch.image_ids, dtype=str),
        "labels": np.asarray(subject.labels, dtype=str),
        "methods": np.asarray(subject.methods, dtype=str),
        "logits": logits[:, columns].numpy(),
        "maps": torch.stack(maps).numpy() if maps else np.empty(0, np.float32),
    }


def example(subject: Subject) -> dict:
    """One boxed positive of the test images with its map by every method, ready for `figures.show_maps`.

    Of the first 32 positives the one the network is surest of, so that there is evidence to look at.
    """
    columns = [subject.images.labels.index(label) for label in subject.labels]
    rows = torch.nonzero((target_table(subject.images)[:, columns] > 0.5).any(1)).flatten().tolist()[:32]
    if not rows:
        raise ParameterError(f"run {subject.run.key}: no test image has any of the labels {subject.labels}")
    data = subject.images.select(rows)
    batch = data.batch(range(len(rows)))
    logits = subject.logits(batch.images)[:, columns].numpy()
    row, label = report.surest(data, {"labels": subject.labels, "logits": logits})
    column = data.labels.index(label)
    if not batch.masks[row, column].any():
        raise ParameterError(f"run {subject.run.key}: no positive of the labels {subject.labels} has a box")
    image = batch.images[row : row + 1]
    maps = [_maps(subject, image, method, [label])[0, 0] for method in subject.methods]
    return {
        "image": image[0, 0],
        "maps": torch.stack(maps),
        "titles": list(subject.methods),
        "mask": batch.masks[row, column],
        "truth": None if batch.truth is None else batch.truth[row, column],
        "caption": f"{label}, {batch.image_ids[row]}: logit {logits[row, subject.labels.index(label)]:.2f}",
    }


def _maps(subject: Subject, images: Tensor, method: str, labels: list[str]) -> Tensor:
    options = {"n_steps": subject.parameters.n_steps} if method == "integrated_gradients" else {}
    return subject.maps(images, method, labels, **options)


def _spread(count: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()


def _spread_positive(targets: Tensor, wanted: int) -> list[int]:
    """Rows so that each label is met early: the first unused positive of each label in turn, then the rest in order."""
    positives = [torch.nonzero(column > 0.5).flatten().tolist() for column in targets.T]
    chosen: dict[int, None] = {}
    for rows in positives * (len(targets) // len(positives) + 2):
        chosen |= dict.fromkeys([row for row in rows if row not in chosen][:1])
    return sorted([*chosen, *(row for row in range(len(targets)) if row not in chosen)][:wanted])
