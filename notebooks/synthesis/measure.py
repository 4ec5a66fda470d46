"""Every method by every paper's metric, on the same positives of one trained network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
from cxrkit import metrics
from cxrkit.attribution.api import device_of
from cxrkit.errors import ParameterError
from cxrkit.study import runs
from cxrkit.study.notebook import NotebookParameters
from cxrkit.study.phantom_benchmark import settings_of
from cxrkit.train.devices import chosen_device
from cxrkit.train.loader import target_table
from cxrkit.train.setup import load_data

__all__ = ["CALLED", "Subject", "score", "subject"]

# The score, as `localisation_scores` calls it, and what pages call it.
CALLED = {
    "epg_precision@0": "EPG precision",
    "epg_recall@0": "EPG recall",
    "pointing_game": "pointing game",
    "iou@0.3": "IoU",
    "iou_two_class@0.3": "two-class IoU",
    "deletion": "deletion",
    "insertion": "insertion",
    "randomised": "likeness to random",
}
_TOLERANCE = 15 / 224  # paper `normgrad`: 15 pixels of an input of 224
_SLOW = {"scorecam"}  # as many forward passes as the layer has channels


@dataclass
class Subject:
    """A run, its network, one with random weights, and the positives by label: rows of the test images."""

    run: runs.Run
    parameters: NotebookParameters
    model: nn.Module
    random: nn.Module
    data: cxrkit.data.Dataset
    rows: dict[str, list[int]]
    methods: list[str]


def subject(parameters: NotebookParameters) -> Subject:
    """Load what `parameters` name.

    Raises ParameterError for an unknown label or method, and where no test image has a box of any of the labels.
    """
    run = runs.find(parameters.run, parameters.results)
    model = run.network(chosen_device(parameters))
    data = load_data(run.parameters).split("test")
    if unknown := set(parameters.labels) - set(data.labels):
        raise ParameterError(f"labels {sorted(unknown)} are unknown to run {run.key}; it knows {list(data.labels)}")
    able = [card.name for card in cxrkit.attribution.methods(model)]
    if not (parameters.slow or parameters.methods):
        able = [name for name in able if name not in _SLOW]
    if unfit := set(parameters.methods) - set(able):
        raise ParameterError(f"methods {sorted(unfit)} can't explain {run.key}; those that can: {', '.join(able)}")
    rows = _positives(data, list(parameters.labels or data.labels), parameters.images)
    if not any(rows.values()):
        raise ParameterError(f"run {run.key}: no test image has a box of any of the labels {list(rows)}")
    images = data.batch(range(min(32, len(data)))).images  # random weights leave signals at their size only with these
    randomised = metrics.randomised(model, seed=parameters.seed, calibrate=images)
    return Subject(
        run,
        parameters,
        model,
        randomised.eval(),
        data,
        rows,
        list(parameters.methods or able),
    )


def _positives(data: cxrkit.data.Dataset, labels: list[str], count: int) -> dict[str, list[int]]:
    """The first boxed positives of each label, of patients not yet taken before others: a test counts patients."""
    targets, boxed = (
        target_table(data),
        data.boxes.groupby("label")["image_id"].agg(set),
    )
    names, patients = (data.table[column].tolist() for column in ("image_id", "patient_id"))
    taken: set[str] = set()
    found = {}
    for label in labels:
        rows = torch.nonzero(targets[:, data.labels.index(label)] > 0.5).flatten().tolist()
        found[label], rest = [], []
        for row in (row for row in rows if names[row] in boxed.get(label, set())):
            fresh = patients[row] not in taken and len(found[label]) < count
            (found[label] if fresh else rest).append(row)
            taken |= {patients[row]} if fresh else set()
        found[label] = sorted((found[label] + rest)[:count])
    return found


def score(subject: Subject, hear: Callable[[str], None] | None = None) -> pd.DataFrame:
    """A row per image, label, method and score: value and chance (nan where a score has none).

    Scores: EPG precision and recall (`bcos`), pointing game with the paper's tolerance as a share of the image
    (`normgrad`), foreground and two-class IoU at 0.3 of the maximum (`relevance`), area under deletion (lower is
    better) and insertion, rank correlation of the sizes of the map's values with those of a random network's map
    (near 0: the map depends on what was learnt), and `seconds` for one map.
    """
    parts = []
    for label, rows in subject.rows.items():
        if not rows:
            continue
        batch = subject.data.batch(rows)
        masks = batch.masks[:, subject.data.labels.index(label)]
        for method in subject.methods:
            values, chance = _scores(subject, batch.images, masks, label, method)
            frame = pd.DataFrame(values).assign(image_id=batch.image_ids, patient_id=batch.patient_ids)
            frame = frame.melt(["image_id", "patient_id"], var_name="score", value_name="value")
            frame["chance"] = np.concatenate([chance.get(name, np.full(len(rows), np.nan)) for name in values])
            parts.append(frame.assign(label=label, method=method))
        if hear is not None:
            hear(label)
    return pd.concat(parts, ignore_index=True)


def _scores(subject: Subject, images: Tensor, masks: Tensor, label: str, method: str) -> tuple[dict, dict]:
    started = time.perf_counter()
    maps = _maps(subject, subject.model, images, label, method)
    seconds = (time.perf_counter() - started) / len(images)
    found = metrics.localisation_scores(
        maps[:, 0],
        masks,
        thresholds=(0.0,),
        iou_thresholds=(0.3,),
        tolerance_fraction=_TOLERANCE,
    )
    values = {name: found.values[name].numpy() for name in CALLED if name in found.values}
    chance = {name: found.chance[name].numpy() for name in values}
    device, steps = device_of(subject.model, images), subject.parameters.n_steps
    for name, curve in (
        ("deletion", metrics.deletion),
        ("insertion", metrics.insertion),
    ):
        found = curve(subject.model, images.to(device), maps.to(device), [label], steps=steps)
        values[name] = found.area[:, 0].cpu().numpy()
    random = _maps(subject, subject.random, images, label, method)
    values["randomised"] = metrics.rank_correlation(maps[:, 0], random[:, 0], absolute=True).numpy()
    values["seconds"] = np.full(len(images), seconds)
    return values, chance


def _maps(subject: Subject, model: nn.Module, images: Tensor, label: str, method: str) -> Tensor:
    options = settings_of(method, subject.parameters.n_steps, images.shape[-1])
    return cxrkit.attribute(model, images.to(device_of(model, images)), method, [label], **options).float().cpu()
