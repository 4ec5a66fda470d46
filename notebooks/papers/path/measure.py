"""Paper `path` on one trained network: maps of the predicted class, their overlap with the finding, their stability."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
import cxrkit.metrics
from cxrkit.attribution.api import device_of
from cxrkit.attribution.baselines import BASELINES
from cxrkit.attribution.xrai import top_fraction
from cxrkit.errors import ParameterError
from cxrkit.study import runs
from cxrkit.study.notebook import NotebookParameters
from cxrkit.train.devices import chosen_device
from cxrkit.train.losses import probabilities
from cxrkit.train.scoring import activation_of
from cxrkit.train.setup import load_data

__all__ = [
    "METHODS",
    "Explained",
    "SoftmaxOdds",
    "Subject",
    "baselines",
    "explain",
    "kept_maps",
    "overlap",
    "saturation",
    "smoothed",
    "spread",
    "stability",
    "subject",
    "xrai_variants",
]

NOISE = 0.15  # of SmoothGrad, as a share of the image's range
METHODS = {
    "vanilla": "Vanilla gradient",
    "smoothgrad": "SmoothGrad",
    "ig": "Integrated gradients",
    "smoothgrad_ig": "SmoothGrad of IG",
    "xrai": "XRAI, full",
    "xrai_fast": "XRAI, fast",
    "guided_ig": "Guided IG",
    "blur_ig": "Blur IG",
    "smooth_blur_ig": "Smooth Blur IG",
}
SIGNED = (
    "vanilla",
    "ig",
    "guided_ig",
    "blur_ig",
)  # the paper shows the absolute values of these
_SMALL = 128  # pixels: images up to this size go through the network 16 at a time


class SoftmaxOdds(nn.Module):
    """A classifier of exclusive classes whose outputs [B, L] are log p - log(1 - p) of the softmax probabilities p.

    The sigmoid of an output is then the softmax probability itself, which is what `output="probability"` explains. A
    network that was trained with a sigmoid per label keeps its logits. Images may leave [0, 1], as noise needs.
    """

    def __init__(self, model: nn.Module, output: str = "probability"):
        super().__init__()
        self.model, self.labels, self.output = model, model.labels, output

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model.classify(self.model.encode(images))
        if self.output == "logit" or activation_of(self.model) != "softmax" or logits.shape[1] == 1:
            return logits
        own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        return logits - logits[:, None].masked_fill(own, -torch.inf).logsumexp(-1)


@dataclass
class Subject:
    """What is measured: a run, its model, test images, and for each [N] the predicted class, its probability, whether
    it is right, and the region [N, H, W] of the image's own finding (exact where known, else its boxes).
    """

    run: runs.Run
    parameters: NotebookParameters
    model: nn.Module
    data: cxrkit.data.Dataset  # every test image
    batch: cxrkit.data.Batch  # those that are explained
    predicted: list[int]
    probability: np.ndarray
    right: np.ndarray
    regions: Tensor

    def rows(self, count: int | None = None) -> pd.DataFrame:
        """What every frame says of the first `count` images: image_id, patient_id, predicted, right, probability."""
        labels = self.model.labels
        frame = {
            "image_id": self.batch.image_ids,
            "patient_id": self.batch.patient_ids,
            "predicted": [labels[place] for place in self.predicted],
            "right": self.right,
            "probability": self.probability,
        }
        return pd.DataFrame(frame).head(count)


@dataclass(frozen=True)
class Explained:
    """Maps [N, H, W] by method, and the seconds that each took for an image."""

    maps: dict[str, Tensor]
    seconds: dict[str, float]


def subject(parameters: NotebookParameters) -> Subject:
    """Load what `parameters` name: run, images, numbers of steps; the model goes to the device that they ask for, the
    images stay on the CPU.

    Test images whose finding is known are taken, evenly from the split; where the source knows none, any. Raises
    ParameterError for numbers out of range.
    """
    least = {
        "images": 1,
        "n_steps": 2,
        "n_samples": 1,
        "blur_steps": 1,
        "xrai_steps": 2,
        "stable_images": 0,
    }
    least |= {"embedded": 2}
    for name, low in least.items():
        if getattr(parameters, name) < low:
            raise ParameterError(f"{name} must be {low} or more; got {getattr(parameters, name)}")
    if not 0 < parameters.fraction < 1:
        raise ParameterError(f"fraction must lie between 0 and 1; got {parameters.fraction}")
    run = runs.find(parameters.run, parameters.results)
    model = run.network(chosen_device(parameters))
    data = load_data(run.parameters).split("test").cached()
    known = np.flatnonzero([bool(_region(data[row]).any()) for row in range(len(data))])
    known = known if len(known) else np.arange(len(data))
    chosen = known[spread(len(known), parameters.images)]
    batch = data.batch(chosen.tolist())
    chances = probabilities(_outputs(model, batch.images), activation_of(model))
    predicted = chances.argmax(1)
    place = torch.arange(len(predicted))
    return Subject(
        run=run,
        parameters=parameters,
        model=model,
        data=data,
        batch=batch,
        predicted=predicted.tolist(),
        probability=chances[place, predicted].numpy(),
        right=(batch.targets[place, predicted] > 0.5).numpy(),
        regions=torch.stack([_region(data[row]) for row in chosen.tolist()]),
    )


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Outputs [B, L] on the CPU, computed where the network is."""
    return network(images.to(device_of(network, images))).cpu()


def spread(count: int, wanted: int) -> np.ndarray:
    """So many of `count` places, evenly."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def _region(sample: cxrkit.data.Sample) -> Tensor:
    """The image's own finding, bool [H, W]: its exact region where the source knows it, else the union of its boxes."""
    exact = sample.mask if sample.truth is None else sample.truth
    return exact[sample.target.nan_to_num() > 0.5].any(0)


def smoothed(
    explain_one: Callable[[Tensor], Tensor],
    images: Tensor,
    n_samples: int,
    seed: int = 0,
    squared: bool = True,
) -> Tensor:
    """SmoothGrad around any method: the mean of the (squared) maps [B, H, W] of noisy copies of images [B, 1, H, W].

    The noise of an image has 0.15 of its range as standard deviation and follows from the seed and its place. Source:
    paper `path`, whose library squares.
    """
    draws = [torch.Generator().manual_seed(seed * 100_003 + row) for row in range(len(images))]
    deviation = NOISE * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    total = torch.zeros_like(images[:, 0])
    for _ in range(n_samples):
        noise = torch.stack([torch.randn(images.shape[1:], generator=draw) for draw in draws])
        found = explain_one(images + deviation * noise.to(images))  # drawn on the CPU: the same on every device
        total += found**2 if squared else found
    return total / n_samples


def explain(
    subject: Subject,
    methods: Sequence[str] = tuple(METHODS),
    output: str = "probability",
    images: Tensor | None = None,
) -> Explained:
    """Maps of the predicted class by each method, with the settings of paper `path` but for the numbers of steps.

    Squared for the smoothed ones, as coded; the signed ones keep their sign. XRAI's two algorithms share one
    attribution. `images`: others of the same predicted classes, such as noisy ones. Raises ParameterError for an
    unknown method.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ParameterError(f"methods {unknown} are unknown; known: {', '.join(METHODS)}")
    images = subject.batch.images if images is None else images
    network = SoftmaxOdds(subject.model, output)
    recipes = [_recipes(network, label, output, subject.parameters) for label in range(len(subject.model.labels))]
    maps, seconds = {}, {}
    for name in methods:
        start = time.perf_counter()
        maps[name] = _by_class(
            subject,
            images,
            lambda label, part, name=name: recipes[label][name](part),
        )
        seconds[name] = (time.perf_counter() - start) / len(images)
    return Explained(maps, seconds)


def _by_class(subject: Subject, images: Tensor, make: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Maps [B, H, W] of the first B images, each of its own predicted class; `make` takes those of one class."""
    maps = torch.zeros_like(images[:, 0])
    for label in sorted(set(subject.predicted[: len(images)])):
        rows = [row for row in range(len(images)) if subject.predicted[row] == label]
        maps[rows] = make(label, images[rows])
    return maps


def _recipes(network: SoftmaxOdds, label: int, output: str, settings: NotebookParameters) -> dict[str, Callable]:
    """For each method what makes maps [B, H, W] of images [B, 1, H, W]."""

    def by(method: str, **options) -> Callable[[Tensor], Tensor]:
        return functools.partial(_maps, network, output, method, label, preset="path", **options)

    ig = by("integrated_gradients", n_steps=settings.n_steps)
    blur = by("blur_ig", n_steps=settings.blur_steps)
    smooth = functools.partial(smoothed, n_samples=settings.n_samples, seed=settings.seed)
    return {
        "vanilla": by("saliency"),
        "smoothgrad": by("smoothgrad", n_samples=settings.n_samples, seed=settings.seed),
        "ig": ig,
        "smoothgrad_ig": lambda images: smooth(ig, images),
        "xrai": by("xrai", n_steps=settings.xrai_steps, algorithm="full"),
        "xrai_fast": by("xrai", n_steps=settings.xrai_steps, algorithm="fast"),
        "guided_ig": by("guided_ig", n_steps=settings.n_steps),
        "blur_ig": blur,
        "smooth_blur_ig": lambda images: smooth(blur, images),
    }


def _maps(
    network: nn.Module,
    output: str,
    method: str,
    label: int,
    images: Tensor,
    **options,
) -> Tensor:
    chunk = 16 if images.shape[-1] <= _SMALL else None
    found = cxrkit.attribute(
        network,
        images,
        method,
        [label],
        output,
        chunk=chunk,
        progress=False,
        **options,
    )
    return found[:, 0]


def shown(name: str, maps: Tensor) -> Tensor:
    """A map as the paper's figures rank its pixels: absolute values, but for XRAI's regions."""
    return maps.abs() if name in SIGNED else maps


def overlap(
    subject: Subject,
    explained: Explained,
    fractions: Sequence[float] = (0.3, 0.35),
    output: str = "probability",
) -> pd.DataFrame:
    """The highest pixels of each map against the region of the finding.

    A row per image, method and fraction: kept (the share that was really kept: ties stay out), precision (share of it
    that lies in the region), iou, and what a map that knows nothing would score: area (the region's share, the chance
    of precision), chance_iou; best_iou is the highest that any map could reach with as many pixels. "both" is what the
    tops of full XRAI and of Blur IG have in common.
    """
    parts = []
    for fraction in fractions:
        kept = {name: top_fraction(shown(name, maps), fraction) for name, maps in explained.maps.items()}
        if {"xrai", "blur_ig"} <= set(kept):
            kept["both"] = kept["xrai"] & kept["blur_ig"]
        for name, region in kept.items():
            more = {"method": name, "fraction": fraction, "output": output}
            parts.append(subject.rows(len(region)).assign(**more, **_scores(region, subject.regions[: len(region)])))
    return pd.concat(parts, ignore_index=True)


def _scores(kept: Tensor, regions: Tensor) -> dict[str, np.ndarray]:
    share, area = kept.double().mean((1, 2)), regions.double().mean((1, 2))
    both = (kept & regions).double().mean((1, 2))
    iou = cxrkit.metrics.intersection_over_union(kept, regions).double()  # nan without a region
    return {
        "kept": share.numpy(),
        "precision": (both / share).where(area > 0, torch.nan).numpy(),  # nan where nothing is kept, too
        "iou": iou.where(share > 0, torch.nan).numpy(),
        "area": area.numpy(),
        "chance_iou": cxrkit.metrics.iou_chance(regions, share).numpy(),
        "best_iou": (torch.minimum(share, area) / torch.maximum(share, area)).where(area > 0, torch.nan).numpy(),
    }


def xrai_variants(subject: Subject, explained: Explained, fraction: float = 0.3) -> pd.DataFrame:
    """Full against fast XRAI, image by image, and what "Fast XRAI 30 %" keeps.

    correlation of the two maps, iou of their top `fraction`, kept_full and kept_fast (shares above the quantile), and
    values (how many different ones the full map has: a map of few regions has many ties).
    """
    full, fast = explained.maps["xrai"], explained.maps["xrai_fast"]
    top = [top_fraction(maps, fraction) for maps in (full, fast)]
    same = [float((a & b).sum() / (a | b).sum().clamp(min=1)) for a, b in zip(*top, strict=True)]
    return subject.rows(len(full)).assign(
        correlation=cxrkit.metrics.map_correlation(full, fast).numpy(),
        iou=same,
        kept_full=top[0].double().mean((1, 2)).numpy(),
        kept_fast=top[1].double().mean((1, 2)).numpy(),
        values=[len(one.unique()) for one in full],
    )


def stability(
    subject: Subject,
    explained: Explained,
    methods: Sequence[str],
    noise: float = 0.02,
) -> pd.DataFrame:
    """How much each map changes when noise that is hardly seen is added: a row per image and method.

    The noise has `noise` of the image's range as standard deviation; the predicted class stays that of the clean image.
    similarity: Pearson correlation of the maps as they are shown, 1 where nothing changes.
    """
    count = min(subject.parameters.stable_images, len(subject.predicted))
    if not count:
        return pd.DataFrame(columns=[*subject.rows(0), "method", "noise", "similarity"])
    images = subject.batch.images[:count]
    generator = torch.Generator().manual_seed(subject.parameters.seed + 1)
    spread = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    moved = images + noise * spread * torch.randn(images.shape, generator=generator).to(images)
    again = explain(subject, methods, images=moved).maps
    return pd.concat(
        [
            subject.rows(count).assign(
                method=name,
                noise=noise,
                similarity=cxrkit.metrics.map_correlation(
                    shown(name, explained.maps[name][:count]),
                    shown(name, again[name]),
                ).numpy(),
            )
            for name in methods
        ],
        ignore_index=True,
    )


def baselines(subject: Subject, names: Sequence[str] = tuple(BASELINES), fraction: float = 0.3) -> pd.DataFrame:
    """Integrated gradients from each baseline: scores as :func:`overlap` gives, start (probability of the baseline),
    missing (what the map's sum lacks of p(image) - p(baseline)), similarity to the map from black.
    """
    network = SoftmaxOdds(subject.model)
    images = subject.batch.images
    maps, parts = {}, []
    given = {"n_steps": subject.parameters.n_steps, "preset": "path"}
    for name in names:
        along = functools.partial(
            _maps,
            network,
            "probability",
            "integrated_gradients",
            baseline=name,
            **given,
        )
        maps[name] = _by_class(subject, images, along)
        start = _outputs(network, BASELINES[name](images)).sigmoid()
        p = start[torch.arange(len(images)), subject.predicted].numpy()
        found = _scores(top_fraction(maps[name].abs(), fraction), subject.regions)
        missing = subject.probability - p - maps[name].sum((1, 2)).numpy()
        alike = cxrkit.metrics.map_correlation(maps[name].abs(), maps[names[0]].abs()).numpy()
        parts.append(subject.rows().assign(baseline=name, start=p, missing=missing, similarity=alike, **found))
    return pd.concat(parts, ignore_index=True)


def saturation(subject: Subject, n_steps: int = 11) -> pd.DataFrame:
    """Along the straight path from black to each image: probability of the predicted class, and the norm of the
    gradient of its probability and of its logit. A row per image and alpha (0: black, 1: the image).
    """
    parts = []
    rows = torch.arange(len(subject.predicted))
    networks = {output: SoftmaxOdds(subject.model, output) for output in ("probability", "logit")}
    for alpha in np.linspace(0, 1, n_steps):
        points = float(alpha) * subject.batch.images
        p = _outputs(networks["probability"], points).sigmoid()[rows, subject.predicted]
        norms = {}
        for output, network in networks.items():
            maps = _by_class(
                subject,
                points,
                functools.partial(_maps, network, output, "saliency"),
            )
            norms[f"gradient_{output}"] = maps.double().norm(dim=(1, 2)).numpy()
        parts.append(subject.rows().assign(alpha=float(alpha), p=p.numpy(), **norms))
    return pd.concat(parts, ignore_index=True)


def kept_maps(subject: Subject, explained: Explained, count: int = 3) -> dict[str, np.ndarray]:
    """A few images with every map for the pages' figures: one per predicted class first, then others.

    Keys: images [n, H, W], regions [n, H, W], maps [M, n, H, W], methods [M], image_ids [n], predicted [n].
    """
    rank = pd.Series(subject.predicted).groupby(subject.predicted).cumcount().to_numpy()
    rows = np.lexsort((np.arange(len(rank)), rank))[:count]
    return {
        "images": subject.batch.images[rows, 0].numpy(),
        "regions": subject.regions[rows].numpy(),
        "maps": torch.stack([maps[rows] for maps in explained.maps.values()]).numpy(),
        "methods": np.array(list(explained.maps)),
        "image_ids": np.asarray(subject.batch.image_ids)[rows],
        "predicted": np.array([subject.model.labels[subject.predicted[row]] for row in rows]),
    }
