"""Where ten methods point, before and after training: the pointing game of paper `normgrad` on one trained network.

A map points at its maximum. A hit is a maximum nearer than a tolerance to a box of the image. The paper takes 15 pixels
at its own input sizes; a small image is scored with 15 pixels too, and with the same share of its side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
import cxrkit.metrics
import cxrkit.models
from cxrkit.errors import AttributionError, DataError, ParameterError
from cxrkit.study import runs
from cxrkit.study.notebook import NotebookParameters
from cxrkit.train.devices import chosen_device
from cxrkit.train.setup import load_data, make_model

__all__ = [
    "METHODS",
    "PIXEL_METHODS",
    "STATES",
    "Subject",
    "chance",
    "clipped",
    "kept_maps",
    "layers_of",
    "maps_of",
    "measure",
    "quirks",
    "states",
    "subject",
]

_KINDS = {"Scaling": "scaling", "Conv1x1": "conv1x1", "Conv3x3": "conv3x3"}
PIXEL_METHODS = ("InputXGrad", "GuidedBackprop", "GuidedGradCAM")
# The paper's methods by the names of its tables.
METHODS = (
    *PIXEL_METHODS,
    "GradCAM",
    *(f"NormGrad {kind} {layers}" for kind in _KINDS for layers in ("single", "multi")),
)
# Before training, with pre-trained features (and a random head) and without; after training.
STATES = ("FR", "SR", "trained")
# The layers of the paper's EfficientNet-B0 in timm's networks of the same build: the first part of every stage, the
# last convolution before and after its norm.
_STAGES = (
    "conv_stem",
    *(f"blocks.{stage}.0" for stage in range(7)),
    "conv_head",
    "bn2",
)
_CLIP = 0.99  # of a pixel map's values, beyond which the published code sees no difference
_CHUNK = 16  # images per pass
_PART = 64  # images whose maps are held at once

Hear = Callable[[str], None]


@dataclass
class Subject:
    """What is measured: a run, its network, one label, and the rows of its data set that show it and have a box."""

    run: runs.Run
    parameters: NotebookParameters
    model: nn.Module
    label: str
    data: cxrkit.data.Dataset
    rows: np.ndarray

    @property
    def share(self) -> float:
        """The tolerance as a share of the image's side."""
        return self.parameters.tolerance / self.parameters.paper_size

    @property
    def output(self) -> int:
        """The place of the label among the network's outputs."""
        return list(self.model.labels).index(self.label)


@dataclass
class Positives:
    """Images [N, 1, H, W] that show the label, its boxes and, where known, its exact outlines, bool [N, H, W]."""

    images: Tensor
    boxes: Tensor
    truth: Tensor | None
    image_ids: np.ndarray
    patient_ids: np.ndarray

    def table(self, columns: dict) -> pd.DataFrame:
        return pd.DataFrame({"image_id": self.image_ids, "patient_id": self.patient_ids} | columns)


def subject(parameters: NotebookParameters) -> Subject:
    """The run and the images that the parameters of `measure.ipynb` name.

    Raises ParameterError for an unknown label, state or method and for numbers out of range, DataError where no image
    has the label and a box.
    """
    _check(parameters)
    run = runs.find(parameters.run, parameters.results)
    model = run.network(chosen_device(parameters))
    label = parameters.label or model.labels[0]
    if label not in model.labels:
        raise ParameterError(f"label {label!r} is unknown to run {run.key}; it knows {list(model.labels)}")
    data = load_data(run.parameters)
    boxed = data.table["image_id"].isin(data.boxes.loc[data.boxes["label"] == label, "image_id"])
    rows = np.flatnonzero(boxed & data.table["split"].isin(parameters.splits) & (data.table[label] == 1))
    if not len(rows):
        raise DataError(f"run {run.key}: no image of the splits {parameters.splits} has the label {label!r} and a box")
    if parameters.images:
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(parameters.images, len(rows))).round().astype(int))]
    return Subject(run, parameters, model, label, data, rows)


def positives(subject: Subject, rows: np.ndarray) -> Positives:
    """Images and boxes of some rows."""
    batch, column = (
        subject.data.batch(rows.tolist()),
        subject.data.labels.index(subject.label),
    )
    return Positives(
        batch.images,
        batch.masks[:, column],
        None if batch.truth is None else batch.truth[:, column],
        np.asarray(batch.image_ids),
        np.asarray(batch.patient_ids),
    )


def _check(parameters: NotebookParameters) -> None:
    if unknown := [name for name in parameters.methods if name not in METHODS]:
        raise ParameterError(f"methods {unknown} are unknown; use some of {list(METHODS)}")
    if unknown := [name for name in parameters.states if name not in STATES]:
        raise ParameterError(f"states {unknown} are unknown; use some of {list(STATES)}")
    for name, least in (
        ("tolerance", 1),
        ("paper_size", 1),
        ("images", 0),
        ("maps", 0),
    ):
        if getattr(parameters, name) < least:
            raise ParameterError(f"{name} is {getattr(parameters, name)}; it must be at least {least}")


def states(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    """The network fully random ("FR"), as it was before training where that began with pre-trained weights ("SR"), and
    trained, in the order of the parameters. The seed of the training is the seed of every state.
    """
    trained = subject.run.parameters
    device = next(subject.model.parameters()).device
    for name in subject.parameters.states:
        if name == "FR":
            yield (
                name,
                cxrkit.models.randomised(subject.model, "full", seed=trained.seed),
            )
        elif name == "trained":
            yield name, subject.model
        elif trained.weights:
            yield name, make_model(trained, subject.model.labels).to(device).eval()


def layers_of(model: nn.Module) -> str | list[str]:
    """What NormGrad multiplies: the paper's layers, or their like in an EfficientNet of timm."""
    names = {name for name, _ in model.named_modules()}
    stages = [f"network.{name}" for name in _STAGES]
    return stages if names.issuperset(stages) else "paper"


def maps_of(model: nn.Module, images: Tensor, method: str, targets: Tensor) -> Tensor:
    """A method's map of one output per image, at least 0: [N, H, W] of images [N, 1, H, W] and outputs [N].

    Signed maps are given as absolute values, as in the paper. Raises AttributionError where the method can't be right
    for the network.
    """
    if method == "GuidedGradCAM":
        return maps_of(model, images, "GuidedBackprop", targets) * maps_of(model, images, "GradCAM", targets)
    name, options = _recipe(model, method)
    return _of_targets(model, images, targets, name, **options).abs()


def _recipe(model: nn.Module, method: str) -> tuple[str, dict]:
    if method.startswith("NormGrad"):
        _, kind, layers = method.split()
        return "normgrad", {"virtual_layer": _KINDS[kind]} | ({"layers": layers_of(model)} if layers == "multi" else {})
    return {
        "InputXGrad": "input_x_gradient",
        "GuidedBackprop": "guided_backprop",
        "GradCAM": "gradcam",
    }[method], {}


def _of_targets(model: nn.Module, images: Tensor, targets: Tensor, method: str, **options) -> Tensor:
    device = next(model.parameters()).device
    maps = images.new_zeros(len(images), *images.shape[-2:])
    for target in targets.unique().tolist():
        rows = targets == target
        found = cxrkit.attribute(
            model,
            images[rows].to(device),
            method,
            [target],
            chunk=_CHUNK,
            progress=False,
            **options,
        )
        maps[rows] = found[:, 0].cpu()
    return maps


def predicted(subject: Subject, model: nn.Module, images: Tensor) -> Tensor:
    """The output with the highest logit, long [N]; where labels don't exclude each other, the label itself."""
    if getattr(subject.model, "card", {}).get("activation") != "softmax":
        return torch.full((len(images),), subject.output)
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(_CHUNK)])


def measure(subject: Subject, hear: Hear | None = None) -> dict[str, pd.DataFrame]:
    """All tables of a run, a row per image in each; nan stands for a constant map and for a method that is not defined
    for the network.

    "scores": state, method, smoothed (bool), hit at the tolerance in pixels, hit_share at the same share of the side,
    found (whether the network predicts the label). "chance": what a maximum drawn evenly would hit. "quirks": see
    :func:`quirks`. "similarity": rank correlation of the trained network's map with that of each other state.
    """
    networks = dict(states(subject))
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in ("scores", "chance", "quirks", "similarity")}
    for start in range(0, len(subject.rows), _PART):
        shown = positives(subject, subject.rows[start : start + _PART])
        kept = {}
        for state, model in networks.items():
            targets = predicted(subject, model, shown.images)
            kept[state] = maps = all_maps(model, shown.images, targets, subject.parameters.methods)
            tables["scores"] += _scores(subject, shown, state, maps, targets)
            if state == "trained":
                tables["quirks"].append(quirks(subject, shown, maps, targets))
        tables["chance"].append(chance(subject, shown))
        tables["similarity"] += _similarity(shown, kept)
        if hear is not None:
            hear(f"{min(start + _PART, len(subject.rows))} of {len(subject.rows)} images")
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}


def all_maps(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    methods: Sequence[str] = METHODS,
) -> dict[str, Tensor]:
    """:func:`maps_of` by method; nan where a method isn't defined for the network."""
    wanted = methods or METHODS
    both = {"GuidedBackprop", "GradCAM"} if "GuidedGradCAM" in wanted else set()
    maps: dict[str, Tensor] = {}
    for method in (name for name in METHODS if name in {*wanted, *both} - {"GuidedGradCAM"}):
        try:
            maps[method] = maps_of(model, images, method, targets)
        except AttributionError:
            maps[method] = torch.full_like(images[:, 0], torch.nan)
    if both:
        maps["GuidedGradCAM"] = maps["GuidedBackprop"] * maps["GradCAM"]
    return {method: maps[method] for method in METHODS if method in wanted}


def _scores(
    subject: Subject,
    shown: Positives,
    state: str,
    maps: dict[str, Tensor],
    targets: Tensor,
) -> list[pd.DataFrame]:
    found = (targets == subject.output).numpy()
    tables = []
    for method, raw in maps.items():
        for smoothed in (False, True):
            seen = cxrkit.metrics.gaussian_smoothing(raw) if smoothed else raw
            facts = {
                "state": state,
                "method": method,
                "smoothed": smoothed,
                "found": found,
            }
            tables.append(shown.table(facts | hits(subject, seen, shown.boxes)))
    return tables


def hits(subject: Subject, maps: Tensor, regions: Tensor, factor: float = 1.0, **options) -> dict[str, np.ndarray]:
    """The pointing game at ``factor`` times the tolerance: hit in pixels, hit_share of the side."""
    game = cxrkit.metrics.pointing_game
    return {
        "hit": game(maps, regions, factor * subject.parameters.tolerance, **options).numpy(),
        "hit_share": game(maps, regions, tolerance_fraction=factor * subject.share, **options).numpy(),
    }


def chance(subject: Subject, shown: Positives) -> pd.DataFrame:
    """What maps that know nothing of the image would hit, by image.

    hit, hit_share: a maximum at a place drawn evenly; centre, centre_share: one always in the middle of the image;
    boxes: the boxes' share of the image.
    """
    level = cxrkit.metrics.pointing_chance
    middle = torch.zeros_like(shown.images[:, 0])
    middle[:, middle.shape[-2] // 2, middle.shape[-1] // 2] = 1
    always = hits(subject, middle, shown.boxes)
    return shown.table(
        {
            "hit": level(shown.boxes, subject.parameters.tolerance).numpy(),
            "hit_share": level(shown.boxes, tolerance_fraction=subject.share).numpy(),
            "centre": always["hit"],
            "centre_share": always["hit_share"],
            "boxes": cxrkit.metrics.chance_level(shown.boxes).numpy(),
        }
    )


def _similarity(shown: Positives, maps: dict[str, dict[str, Tensor]]) -> list[pd.DataFrame]:
    tables = []
    for state in (name for name in maps if name != "trained" and "trained" in maps):
        for method, trained in maps["trained"].items():
            found = cxrkit.metrics.rank_correlation(trained, maps[state][method]).numpy()
            tables.append(shown.table({"state": state, "method": method, "correlation": found}))
    return tables


def quirks(subject: Subject, shown: Positives, maps: dict[str, Tensor], targets: Tensor) -> pd.DataFrame:
    """Smoothed maps of the trained network, scored as text and code of the paper differ: a row per image, method and
    variant with hit and hit_share.

    Variants: "text"; "tolerance 25" of the code's settings; "transposed disc", around the mirrored maximum; "outline",
    the exact one instead of its box; "label", the positive label explained instead of the predicted one; "all logits",
    the gradient of the sum of all outputs, and guided backprop without guidance. Pixel maps also without smoothing
    ("raw") and cut at their 99th percentile, with smoothing and without ("clipped", "clipped, raw").
    """
    smooth = cxrkit.metrics.gaussian_smoothing
    tables = []

    def add(
        variant: str,
        method: str,
        seen: Tensor,
        region: Tensor = shown.boxes,
        **options,
    ) -> None:
        tables.append(shown.table({"method": method, "variant": variant} | hits(subject, seen, region, **options)))

    for method, raw in maps.items():
        seen = smooth(raw)
        add("text", method, seen)
        add("tolerance 25", method, seen, factor=25 / 15)
        add("transposed disc", method, seen, protocol="authors")
        if shown.truth is not None:
            add("outline", method, seen, shown.truth)
        add("label", method, smooth(_of_label(subject, shown, method, raw, targets)))
        if method in PIXEL_METHODS:
            add("raw", method, raw)
            add("clipped", method, smooth(clipped(raw)))
            add("clipped, raw", method, clipped(raw))
    for method, raw in _without_guidance(subject.model, shown.images).items():
        if method in maps:
            add("all logits", method, smooth(raw))
    return pd.concat(tables, ignore_index=True)


def clipped(maps: Tensor) -> Tensor:
    """Maps cut at their 99th percentile, as the published code shows pixel maps: one pixel in a hundred is highest."""
    highest = torch.stack([one.flatten().quantile(_CLIP) for one in maps])
    return maps.minimum(highest[:, None, None])


def _of_label(subject: Subject, shown: Positives, method: str, raw: Tensor, targets: Tensor) -> Tensor:
    """The map of the positive label; only where another is predicted there is something to compute."""
    other = targets != subject.output
    if not other.any() or raw.isnan().any():
        return raw
    maps = raw.clone()
    maps[other] = maps_of(
        subject.model,
        shown.images[other],
        method,
        torch.full_like(targets[other], subject.output),
    )
    return maps


def _without_guidance(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Absolute maps of the published code: the gradient of the sum of all outputs, and that times the image."""
    first = torch.zeros(len(images), dtype=torch.long)
    gradient = _of_targets(model, images, first, "guided_backprop", protocol="authors")
    return {
        "GuidedBackprop": gradient.abs(),
        "InputXGrad": (gradient * images[:, 0]).abs(),
    }


def kept_maps(subject: Subject) -> dict[str, np.ndarray]:
    """The first images with their maps, to look at later.

    Keys: image_ids [n], images [n, H, W], boxes [n, H, W], states [S], methods [M], maps [S, M, n, H, W] float32, raw,
    each divided by its maximum.
    """
    few = positives(subject, subject.rows[: subject.parameters.maps])
    found = {}
    for state, model in states(subject):
        targets = predicted(subject, model, few.images)
        by_method = all_maps(model, few.images, targets, subject.parameters.methods)
        found[state] = torch.stack(list(by_method.values()))
    maps = torch.stack(list(found.values()))
    highest = maps.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return {
        "image_ids": few.image_ids.astype(str),
        "images": few.images[:, 0].numpy(),
        "boxes": few.boxes.numpy(),
        "states": np.asarray(list(found), dtype=str),
        "methods": np.asarray(subject.parameters.methods or METHODS, dtype=str),
        "maps": (maps / highest).numpy(),
    }
