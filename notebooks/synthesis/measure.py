"""Every method by every paper's metric, on the same positives of one trained network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import cxrkit.attribution
from cxrkit.attribution.api import device_of
from cxrkit.data import Dataset
from cxrkit.errors import ParameterError
from cxrkit.study.phantom_benchmark import settings_of
from cxrkit.train.loader import target_table

__all__ = ["CALLED", "fitting", "maps_of", "positives"]

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
_SLOW = {"scorecam"}  # as many forward passes as the layer has channels


def fitting(model: nn.Module, methods: Sequence[str] = (), slow: bool = False) -> list[str]:
    """The methods (of none given: all, slow ones only where asked for) that can explain a network; ParameterError for
    one that can't."""
    able = [card.name for card in cxrkit.attribution.methods(model)]
    if unfit := set(methods) - set(able):
        raise ParameterError(f"methods {sorted(unfit)} can't explain the network; those that can: {', '.join(able)}")
    return list(methods) or [name for name in able if slow or name not in _SLOW]


def positives(data: Dataset, labels: Sequence[str], count: int) -> dict[str, list[int]]:
    """The first boxed positives of each label (of none given: of all), of patients not yet taken before others, since a
    test counts patients. Raises ParameterError for an unknown label, and where no image has a box of any of them."""
    if unknown := set(labels) - set(data.labels):
        raise ParameterError(f"labels {sorted(unknown)} are unknown to {data.name}; it knows {list(data.labels)}")
    targets, boxed = target_table(data), data.boxes.groupby("label")["image_id"].agg(set)
    names, patients = (data.table[column].tolist() for column in ("image_id", "patient_id"))
    taken: set[str] = set()
    found = {}
    for label in labels or data.labels:
        rows = torch.nonzero(targets[:, data.labels.index(label)] > 0.5).flatten().tolist()
        found[label], rest = [], []
        for row in (row for row in rows if names[row] in boxed.get(label, set())):
            fresh = patients[row] not in taken and len(found[label]) < count
            (found[label] if fresh else rest).append(row)
            taken |= {patients[row]} if fresh else set()
        found[label] = sorted((found[label] + rest)[:count])
    if not any(found.values()):
        raise ParameterError(f"no test image of {data.name} has a box of any of the labels {list(found)}")
    return found


def maps_of(model: nn.Module, images: Tensor, label: str, method: str, n_steps: int) -> Tensor:
    """Maps [B, H, W] of one label, on the CPU."""
    options = settings_of(method, n_steps, images.shape[-1])
    maps = cxrkit.attribute(model, images.to(device_of(model, images)), method, [label], **options)
    return maps[:, 0].float().cpu()
