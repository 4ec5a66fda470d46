"""Paper `relevance`: CAM, LRP and RAP of boxed positives against their boxes, do they depend on label and weights, and
what several networks look at in the same positive and normal images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.metrics
import cxrkit.models
from cxrkit.attribution.api import device_of
from cxrkit.data import Dataset
from cxrkit.errors import DataError, ParameterError
from cxrkit.metrics.overlap import THRESHOLDS, scale_of
from cxrkit.train.loader import target_table
from cxrkit.train.setup import load_data

__all__ = [
    "METHODS",
    "Bench",
    "bench",
    "gallery",
    "intention",
    "maps_of",
    "sanity",
    "scores",
    "unit_start",
]

METHODS = ("cam", "lrp", "rap")
STARTS = ("one_hot", "logit")
_CHUNK = 16


@dataclass
class Bench:
    """A trained network, the boxed test images that are scored, and for which labels; `start` and `first_layer` as in
    `maps_of`. `trained`: the network's training parameters."""

    trained: Any
    model: nn.Module
    images: Dataset
    labels: list[str]
    methods: list[str]
    start: str = "one_hot"
    first_layer: str = "zb"

    def rows(self, label: str, most: int = 0) -> list[int]:
        """Images that show the label and have a box of it, spread over the test images where there are more."""
        ids = set(self.images.boxes.loc[self.images.boxes["label"] == label, "image_id"].astype(str))
        boxed = self.images.table["image_id"].astype(str).isin(ids).to_numpy()
        positive = (target_table(self.images)[:, self.images.labels.index(label)] > 0.5).numpy()
        found = np.flatnonzero(boxed & positive)
        return _spread(found, most)


def bench(
    trained: Any,
    folder: Any,
    labels: list[str] | None = None,
    methods: list[str] | None = None,
    start: str = "one_hot",
    first_layer: str = "zb",
    device: torch.device | str = "cpu",
) -> Bench:
    """The network of a training run (its parameters and folder) with the boxed positives of its test fold.

    `labels`: None takes all that have a boxed positive. Raises ParameterError for a label, method or start that is
    unknown, DataError where no test image has a box.
    """
    if start not in STARTS:
        raise ParameterError(f"start {start!r} is unknown; use one of {', '.join(STARTS)}")
    model = cxrkit.models.load(folder / "model.safetensors").to(device).eval()
    able = [card.name for card in cxrkit.attribution.methods(model)]
    methods = list(methods or [name for name in METHODS if name in able])
    if unfit := [name for name in methods if name not in able]:
        raise ParameterError(f"methods {unfit} can't explain {trained.model}; those that can: {', '.join(able)}")
    test = load_data(trained).split("test")
    if not len(test.boxes):
        raise DataError(f"no test image of {test.name} has a box, so no map can be scored; add boxes.csv")
    found = Bench(trained, model, test.cached(), [], methods, start, first_layer)
    known = [label for label in test.labels if label in model.labels]
    if unknown := [label for label in labels or [] if label not in known]:
        raise ParameterError(f"labels {unknown} are unknown to the network; it knows {known}")
    found.labels = [label for label in labels or known if found.rows(label)]
    if not found.labels:
        raise DataError(f"no test image of {test.name} shows one of {list(labels or known)} with a box of it")
    return found


def maps_of(
    bench: Bench,
    images: Tensor,
    label: str,
    method: str,
    model: nn.Module | None = None,
) -> Tensor:
    """Maps [B, H, W] of one label. Relevance starts from 1 at the label's node (`start="one_hot"`, as the published
    code) or from its logit (as the paper's text); `first_layer` is LRP's, "zb" as the published code or "same"."""
    model = bench.model if model is None else model
    return _all_maps(bench, images, [label], method, model)[:, 0]


def _all_maps(bench: Bench, images: Tensor, labels: list[str], method: str, model: nn.Module) -> Tensor:
    options: dict[str, Any] = {} if method == "cam" else {"check": False}
    if method == "lrp":
        options["first_layer"] = bench.first_layer
    images = images.to(device_of(model, images))
    maps = cxrkit.attribute(model, images, method=method, labels=labels, progress=False, **options)
    if method in ("lrp", "rap") and bench.start == "one_hot":
        maps = unit_start(
            maps,
            logits_of(model, images)[:, [list(model.labels).index(name) for name in labels]],
        )
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


def _batches(bench: Bench, label: str, most: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Images and masks of a label's boxed positives, with the facts that all scores of them share."""
    column, place = (
        bench.images.labels.index(label),
        list(bench.model.labels).index(label),
    )
    rows = bench.rows(label, most)
    for start in range(0, len(rows), _CHUNK):
        batch = bench.images.batch(rows[start : start + _CHUNK])
        seen = batch.masks[:, column].flatten(1).any(1)  # a box may be thinner than a pixel
        if not seen.any():
            continue
        images, masks = batch.images[seen], batch.masks[seen, column]
        facts = {
            "image_id": np.asarray(batch.image_ids)[seen.numpy()],
            "patient_id": np.asarray(batch.patient_ids)[seen.numpy()],
            "label": label,
            "logit": logits_of(bench.model, images)[:, place].numpy(),
            "area": cxrkit.metrics.chance_level(masks).numpy(),
        }
        yield images, masks, facts


def scores(
    bench: Bench,
    images: int = 0,
    thresholds: tuple[float, ...] = THRESHOLDS,
    percentiles: tuple[float, ...] = (100.0, 99.0),
    hear: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """IoU of every method on every boxed positive (paper `relevance`, Table 2); `images`: at most so many per label.

    A row per image, label, method, percentile and threshold: `foreground` and `two_class` IoU with what a region of
    the same size that knows nothing would score (`foreground_chance`, `two_class_chance`); `covered`, the share of the
    image above the threshold; `area`, the share that the boxes cover: an empty map scores (1 - area) / 2 for two
    classes, a map that fills the image area / 2. `inside`: the share of positive mass in the boxes. A map without
    positive values scores nan and keeps its row.
    """
    parts = []
    for label in bench.labels:
        for chosen, masks, facts in _batches(bench, label, images):
            for method in bench.methods:
                maps = maps_of(bench, chosen, label, method)
                inside = cxrkit.metrics.energy_pointing_game(maps, masks).numpy()
                shared = facts | {"method": method, "inside": inside}
                parts += [pd.DataFrame(shared | row) for row in _overlaps(maps, masks, thresholds, percentiles)]
        if hear is not None:
            hear(label)
    return pd.concat(parts, ignore_index=True)


def _overlaps(maps: Tensor, masks: Tensor, thresholds: tuple, percentiles: tuple) -> Iterator[dict[str, Any]]:
    positive = maps.clamp(min=0)
    kinds = ("foreground", "two_class")
    for percentile in percentiles:
        sweeps = {k: cxrkit.metrics.iou_sweep(maps, masks, thresholds, k, percentile) for k in kinds}
        scale = scale_of(positive, percentile)
        for place, threshold in enumerate(thresholds):
            covered = ((positive >= threshold * scale) & (positive > 0)).double().mean((-2, -1))
            chance = {f"{k}_chance": cxrkit.metrics.iou_chance(masks, covered, k).numpy() for k in kinds}
            row = {k: sweep[:, place].numpy() for k, sweep in sweeps.items()}
            yield (
                row
                | chance
                | {
                    "percentile": percentile,
                    "threshold": threshold,
                    "covered": covered.numpy(),
                }
            )


def sanity(
    bench: Bench,
    images: int = 2,
    seed: int = 0,
    hear: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Does a map say which label it explains, and what the network learnt? At most `images` boxed positives per label.

    A row per image, label, method and check: "another label" (the mean over all other labels of `bench`, or of the
    network where `bench` has one), "random head" (only the last layer drawn anew) and "random network" (all of it;
    norms calibrated on the images).
    `correlation` and `rank_correlation`: of the map with that of the check, 1 where it makes no difference;
    `foreground` and `two_class`: mean IoU over the thresholds with the box, `..._check` that of the check's map.
    """
    networks = _randomised(bench, seed)
    names = bench.labels if len(bench.labels) > 1 else list(bench.model.labels)
    parts = []
    for label in bench.labels:
        for chosen, masks, facts in _batches(bench, label, images):
            for method in bench.methods:
                all_maps = _all_maps(bench, chosen, names, method, bench.model)
                place = names.index(label)
                own, others = (
                    all_maps[:, place],
                    np.delete(np.arange(len(names)), place),
                )
                checks = {"another label": all_maps[:, others]} if len(others) else {}
                checks |= {n: maps_of(bench, chosen, label, method, model)[:, None] for n, model in networks.items()}
                before = _means(own, masks)
                for name, maps in checks.items():
                    found = _similarity(own, maps) | before | _after(maps, masks)
                    parts.append(pd.DataFrame(facts | {"method": method, "check": name} | found))
        if hear is not None:
            hear(label)
    return pd.concat(parts, ignore_index=True)


def _randomised(bench: Bench, seed: int) -> dict[str, nn.Module]:
    rows = bench.rows(bench.labels[0], _CHUNK)
    images = bench.images.batch(rows).images.to(device_of(bench.model, torch.empty(0)))
    kinds = {"random head": "semi", "random network": "full"}
    return {
        name: cxrkit.models.randomised(bench.model, kind, seed=seed, calibrate=images).eval()
        for name, kind in kinds.items()
    }


def _similarity(own: Tensor, maps: Tensor) -> dict[str, np.ndarray]:
    measures = {
        "correlation": cxrkit.metrics.map_correlation,
        "rank_correlation": cxrkit.metrics.rank_correlation,
    }
    return {name: measure(own[:, None], maps).nanmean(1).numpy() for name, measure in measures.items()}


def _means(maps: Tensor, masks: Tensor) -> dict[str, np.ndarray]:
    return {k: cxrkit.metrics.mean_iou(maps, masks, average=k).numpy() for k in ("foreground", "two_class")}


def _after(maps: Tensor, masks: Tensor) -> dict[str, np.ndarray]:
    found = [_means(maps[:, column], masks) for column in range(maps.shape[1])]
    return {f"{k}_check": _nanmean(np.stack([one[k] for one in found])) for k in found[0]}


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def gallery(bench: Bench, images: int = 1) -> dict[str, np.ndarray]:
    """Maps to look at: of each label the `images` boxed positives that the network is surest of.

    Keys: image_ids, labels, logits [n], methods [M], maps float32 [M, n, H, W].
    """
    ids, labels, logits, maps = [], [], [], []
    for label in bench.labels:
        place = list(bench.model.labels).index(label)
        rows = bench.rows(label)
        found = torch.cat(
            [
                logits_of(bench.model, bench.images.batch(rows[i : i + _CHUNK]).images)[:, place]
                for i in range(0, len(rows), _CHUNK)
            ]
        )
        best = found.argsort(descending=True)[:images].tolist()
        batch = bench.images.batch([rows[i] for i in best])
        ids += batch.image_ids
        labels += [label] * len(batch)
        logits.append(found[best])
        maps.append(torch.stack([maps_of(bench, batch.images, label, method) for method in bench.methods]))
    return {
        "image_ids": np.asarray(ids, dtype=str),
        "labels": np.asarray(labels, dtype=str),
        "logits": torch.cat(logits).numpy(),
        "methods": np.asarray(bench.methods, dtype=str),
        "maps": torch.cat(maps, 1).numpy(),
    }


def intention(
    bench: Bench,
    label: str,
    images: int,
    stand_in: str = "",
    of: dict[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """What a network looks at in boxed positives of `label` and in normal images, `images` of each.

    `of`: training parameters that name other images than the network's own (`dataset_options`, `root` ...), so that
    several networks can be shown the same. Positives are explained for `label`, or for `stand_in` where the network
    lacks it; normal images for the label with the highest logit. Returns the maps (image_ids, groups, explained,
    logits, methods, maps [M, n, H, W], masks [n, H, W]) and, for all images of the test fold, the prediction: image_id,
    patient_id, target, logit (of the label, less that of the normal class where the network has one). Source: paper
    `relevance`, Fig. 4.
    """
    told = stand_in if label not in bench.model.labels else label
    if told not in bench.model.labels:
        raise ParameterError(f"the network knows neither {label!r} nor {stand_in!r}: {list(bench.model.labels)}")
    source = bench.trained.model_copy(update=dict(of or {}))
    data = load_data(source).split("test").cached()
    if label not in data.labels:
        raise ParameterError(f"the images of {data.name} have no label {label!r}; they have {list(data.labels)}")
    column, names = data.labels.index(label), list(bench.model.labels)
    logits = torch.cat([logits_of(bench.model, batch.images) for batch in _chunks(data)])
    target = target_table(data)[:, column].numpy()
    value = logits[:, names.index(told)]
    if bench.trained.healthy_class:
        value = value - logits[:, names.index(bench.trained.healthy_class)]
    facts = {
        "image_id": data.image_ids,
        "patient_id": data.table["patient_id"].to_numpy(),
    }
    predictions = pd.DataFrame(facts | {"target": target, "logit": value.numpy()})
    boxed = data.table["image_id"].isin(data.boxes.loc[data.boxes["label"] == label, "image_id"]).to_numpy()
    chosen = {
        "positive": _spread(np.flatnonzero(boxed & (target > 0.5)), images),
        "normal": _spread(np.flatnonzero(_without_finding(data, source.healthy_class)), images),
    }
    rows = [row for group in chosen.values() for row in group]
    if not all(chosen.values()):
        raise DataError(f"the test images of {data.name} lack boxed positives of {label!r}, or normal images")
    batch = data.batch(rows)
    groups = [group for group, found in chosen.items() for _ in found]
    best = [names[int(place)] for place in logits[rows].argmax(1)]
    explained = [told if group == "positive" else best[i] for i, group in enumerate(groups)]
    kept = {
        "image_ids": np.asarray(batch.image_ids, dtype=str),
        "patient_ids": np.asarray(batch.patient_ids, dtype=str),
        "groups": np.asarray(groups, dtype=str),
        "explained": np.asarray(explained, dtype=str),
        "logits": np.asarray([logits[row, names.index(name)] for row, name in zip(rows, explained, strict=True)]),
        "methods": np.asarray(bench.methods, dtype=str),
        "maps": torch.stack([_of_each(bench, batch.images, explained, method) for method in bench.methods]).numpy(),
        "masks": batch.masks[:, column].numpy(),
    }
    return kept, predictions


def _of_each(bench: Bench, images: Tensor, explained: list[str], method: str) -> Tensor:
    """Maps [n, H, W], each image's of its own label."""
    maps = torch.empty(len(images), *images.shape[-2:])
    for label in dict.fromkeys(explained):
        rows = [i for i, name in enumerate(explained) if name == label]
        maps[rows] = maps_of(bench, images[rows], label, method)
    return maps


def _without_finding(data: Dataset, normal: str) -> np.ndarray:
    """Images in which every label but the class of the normal ones is absent, and nothing is boxed."""
    findings = [i for i, label in enumerate(data.labels) if label != normal]
    boxed = data.table["image_id"].isin(data.boxes["image_id"]).to_numpy()
    return (target_table(data).numpy()[:, findings] == 0).all(1) & ~boxed


def _chunks(data: Dataset, size: int = 32):
    return (data.batch(range(start, min(start + size, len(data)))) for start in range(0, len(data), size))


def _spread(rows: np.ndarray, most: int) -> list[int]:
    """At most so many rows (0: all), evenly spread."""
    if not most or len(rows) <= most:
        return rows.tolist()
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)].tolist()
