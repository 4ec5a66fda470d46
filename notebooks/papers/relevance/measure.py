"""Paper `relevance`: the boxed positives that are scored, maps by CAM, LRP and RAP, and what a network looks at in
positive and normal images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.models
from cxrkit import metrics
from cxrkit.attribution.api import device_of
from cxrkit.data import Dataset
from cxrkit.errors import DataError, ParameterError
from cxrkit.train.loader import target_table
from cxrkit.train.parameters import TrainParameters
from cxrkit.train.setup import load_data

__all__ = [
    "METHODS",
    "boxed",
    "boxed_labels",
    "fitting",
    "intention",
    "logits_of",
    "maps_of",
    "positives",
    "random_networks",
    "similarity",
    "unit_start",
]

METHODS = ("cam", "lrp", "rap")
STARTS = ("one_hot", "logit")
_CHUNK = 16


# The images


def positives(data: Dataset, label: str, most: int = 0) -> list[int]:
    """Rows of images that show a label and have a box of it; at most so many, evenly spread, where `most` isn't 0."""
    ids = set(data.boxes.loc[data.boxes["label"] == label, "image_id"].astype(str))
    has_box = data.table["image_id"].astype(str).isin(ids).to_numpy()
    shows = (target_table(data)[:, data.labels.index(label)] > 0.5).numpy()
    return _spread(np.flatnonzero(has_box & shows), most)


def boxed_labels(model: nn.Module, data: Dataset, labels: Sequence[str] = ()) -> list[str]:
    """Those of the labels (of none given: of all) that a network knows and that some image shows with a box.

    Raises ParameterError for a label that the network doesn't know, DataError where no image has such a box.
    """
    if not len(data.boxes):
        raise DataError(f"no test image of {data.name} has a box, so no map can be scored; add boxes.csv")
    known = [label for label in data.labels if label in model.labels]
    if unknown := [label for label in labels if label not in known]:
        raise ParameterError(f"labels {unknown} are unknown to the network; it knows {known}")
    if found := [label for label in labels or known if positives(data, label)]:
        return found
    raise DataError(f"no test image of {data.name} shows one of {list(labels or known)} with a box of it")


def boxed(model: nn.Module, data: Dataset, label: str, most: int = 0) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Images [B, 1, H, W] and masks [B, H, W] of a label's boxed positives, with the facts that all their scores share:
    image_id, patient_id, label, logit, and area (the boxes' share of the image)."""
    rows, column = positives(data, label, most), data.labels.index(label)
    for start in range(0, len(rows), _CHUNK):
        batch = data.batch(rows[start : start + _CHUNK])
        seen = batch.masks[:, column].flatten(1).any(1)  # a box may be thinner than a pixel
        if seen.any():
            images, masks = batch.images[seen], batch.masks[seen, column]
            ids, patients = (np.asarray(one)[seen.numpy()] for one in (batch.image_ids, batch.patient_ids))
            logit = logits_of(model, images)[:, list(model.labels).index(label)].numpy()
            facts = {"image_id": ids, "patient_id": patients, "label": label, "logit": logit}
            yield images, masks, facts | {"area": metrics.chance_level(masks).numpy()}


# Maps


def fitting(model: nn.Module, methods: Sequence[str] = ()) -> list[str]:
    """The methods (of none given: CAM, LRP and RAP) that can explain a network. ParameterError for one asked for that
    can't."""
    able = [card.name for card in cxrkit.attribution.methods(model)]
    if unfit := [name for name in methods if name not in able]:
        raise ParameterError(f"methods {unfit} can't explain the network; those that can: {', '.join(able)}")
    return list(methods) or [name for name in METHODS if name in able]


def maps_of(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[str],
    method: str,
    start: str = "one_hot",
    first_layer: str = "zb",
) -> Tensor:
    """Maps [B, L, H, W]. Relevance starts from 1 at a label's node (`start="one_hot"`, as the published code) or from
    its logit ("logit", as the paper's text); `first_layer` is LRP's, "zb" as the published code or "same"."""
    if start not in STARTS:
        raise ParameterError(f"start {start!r} is unknown; use one of {', '.join(STARTS)}")
    options: dict[str, Any] = {} if method == "cam" else {"check": False}
    if method == "lrp":
        options["first_layer"] = first_layer
    images = images.to(device_of(model, images))
    maps = cxrkit.attribute(model, images, method=method, labels=list(labels), progress=False, **options)
    if method in ("lrp", "rap") and start == "one_hot":
        columns = [list(model.labels).index(name) for name in labels]
        maps = unit_start(maps, logits_of(model, images)[:, columns])
    return maps.float().cpu()


def unit_start(maps: Tensor, logits: Tensor) -> Tensor:
    """Relevance [B, L, H, W] that started from 1 in place of the logit [B, L]: both rules are proportional to their
    start, so it is the quotient, 0 where the logit is 0. Source: paper `relevance`, as its published code starts."""
    quotient = maps / logits.to(maps)[..., None, None]
    return quotient.nan_to_num(posinf=0, neginf=0)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, L] on the CPU."""
    device = device_of(model, images)
    return torch.cat([model(part.to(device)).float().cpu() for part in images.split(_CHUNK)])


# Another label, other weights


def random_networks(model: nn.Module, images: Tensor, seed: int = 0) -> dict[str, nn.Module]:
    """The network with its last layer drawn anew ("random head"), or all of it; norms calibrated on the images."""
    kinds = {"random head": "semi", "random network": "full"}
    images = images.to(device_of(model, images))
    return {
        name: cxrkit.models.randomised(model, kind, seed=seed, calibrate=images).eval() for name, kind in kinds.items()
    }


def similarity(own: Tensor, others: Tensor, masks: Tensor) -> dict[str, np.ndarray]:
    """Maps [B, H, W] against others of the same images [B, K, H, W], the mean over K.

    `correlation`, `rank_correlation`: 1 where it makes no difference; `foreground`, `two_class`: mean IoU over the
    paper's thresholds with the box, `..._check` that of the others.
    """
    measures = {"correlation": metrics.map_correlation, "rank_correlation": metrics.rank_correlation}
    found = {name: measure(own[:, None], others).nanmean(1).numpy() for name, measure in measures.items()}
    kinds = ("foreground", "two_class")
    found |= {kind: metrics.mean_iou(own, masks, average=kind).numpy() for kind in kinds}
    for kind in kinds:
        each = np.stack([metrics.mean_iou(one, masks, average=kind).numpy() for one in others.unbind(1)])
        known = ~np.isnan(each)
        mean = np.where(known, each, 0).sum(0) / np.maximum(known.sum(0), 1)
        found[f"{kind}_check"] = np.where(known.any(0), mean, np.nan)
    return found


# What a network looks at


def intention(
    model: nn.Module,
    trained: TrainParameters,
    label: str,
    images: int,
    methods: Sequence[str],
    stand_in: str = "",
    of: dict[str, Any] | None = None,
    **options: str,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Maps of boxed positives of `label` and of normal images, `images` of each.

    `of`: training parameters that name other images than the network's own (`dataset_options`, `root` ...), so that
    several networks can be shown the same. Positives are explained for `label`, or for `stand_in` where the network
    lacks it; normal images for the label with the highest logit; `options` are those of :func:`maps_of`. Returns the
    maps (image_ids, groups, explained, logits, methods, maps [M, n, H, W], masks [n, H, W]) and, for all images of the
    test fold, the prediction: image_id, patient_id, target, logit (of the label, less that of the normal class where
    the network has one). Source: paper `relevance`, Fig. 4.
    """
    names, target_label = list(model.labels), label if label in model.labels else stand_in
    if target_label not in names:
        raise ParameterError(f"the network knows neither {label!r} nor {stand_in!r}: {names}")
    source = trained.model_copy(update=dict(of or {}))
    data = load_data(source).split("test").cached()
    groups = _positive_and_normal(data, label, source.healthy_class, images)
    rows = [row for found in groups.values() for row in found]
    parts = (data.batch(range(first, min(first + 32, len(data)))).images for first in range(0, len(data), 32))
    logits = torch.cat([logits_of(model, part) for part in parts])
    batch, column = data.batch(rows), data.labels.index(label)
    normal = [names[int(place)] for place in logits[rows].argmax(1)]
    explained = [target_label if i < len(groups["positive"]) else best for i, best in enumerate(normal)]
    kept = {
        "image_ids": np.asarray(batch.image_ids, dtype=str),
        "patient_ids": np.asarray(batch.patient_ids, dtype=str),
        "groups": np.asarray([group for group, found in groups.items() for _ in found], dtype=str),
        "explained": np.asarray(explained, dtype=str),
        "logits": np.asarray([logits[row, names.index(name)] for row, name in zip(rows, explained, strict=True)]),
        "methods": np.asarray(methods, dtype=str),
        "maps": torch.stack([_each_its_own(model, batch.images, explained, one, options) for one in methods]).numpy(),
        "masks": batch.masks[:, column].numpy(),
    }
    value = logits[:, names.index(target_label)]
    if trained.healthy_class:
        value = value - logits[:, names.index(trained.healthy_class)]
    facts = {"image_id": data.image_ids, "patient_id": data.table["patient_id"].to_numpy()}
    return kept, pd.DataFrame(facts | {"target": target_table(data)[:, column].numpy(), "logit": value.numpy()})


def _positive_and_normal(data: Dataset, label: str, normal: str, most: int) -> dict[str, list[int]]:
    """Rows of boxed positives, and of images in which every label but the class of the normal ones is absent."""
    if label not in data.labels:
        raise ParameterError(f"the images of {data.name} have no label {label!r}; they have {list(data.labels)}")
    findings = [i for i, one in enumerate(data.labels) if one != normal]
    has_box = data.table["image_id"].isin(data.boxes["image_id"]).to_numpy()
    healthy = (target_table(data).numpy()[:, findings] == 0).all(1) & ~has_box
    found = {"positive": positives(data, label, most), "normal": _spread(np.flatnonzero(healthy), most)}
    if not all(found.values()):
        raise DataError(f"the test images of {data.name} lack boxed positives of {label!r}, or normal images")
    return found


def _each_its_own(model: nn.Module, images: Tensor, explained: list[str], method: str, options: dict) -> Tensor:
    """Maps [n, H, W], each image's of its own label."""
    maps = torch.empty(len(images), *images.shape[-2:])
    for label in dict.fromkeys(explained):
        rows = [i for i, name in enumerate(explained) if name == label]
        maps[rows] = maps_of(model, images[rows], [label], method, **options)[:, 0]
    return maps


def _spread(rows: np.ndarray, most: int) -> list[int]:
    """At most so many rows (0: all), evenly spread."""
    if not most or len(rows) <= most:
        return rows.tolist()
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)].tolist()
