"""Paper `path`: which test images `measure.ipynb` explains, softmax probabilities, overlap scores, and neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.metrics
from cxrkit.attribution.api import device_of
from cxrkit.data.dataset import Dataset, Sample
from cxrkit.errors import ParameterError
from cxrkit.study.notebook import NotebookParameters
from cxrkit.train.loader import target_table
from cxrkit.train.scoring import activation_of

__all__ = [
    "METHODS",
    "SIGNED",
    "SoftmaxOdds",
    "by_class",
    "checked",
    "class_names",
    "explained_rows",
    "features",
    "outputs",
    "overlap_scores",
    "region_of",
    "same_neighbour",
    "shown",
    "smoothed",
    "spread",
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
SIGNED = ("vanilla", "ig", "guided_ig", "blur_ig")  # the paper shows the absolute values of these
_LEAST = {"images": 1, "n_steps": 2, "n_samples": 1, "blur_steps": 1, "xrai_steps": 2, "embedded": 2}


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


def checked(parameters: NotebookParameters) -> NotebookParameters:
    """The same parameters. Raises ParameterError for numbers out of range and for unknown methods."""
    for name, least in (_LEAST | {"stable_images": 0}).items():
        if getattr(parameters, name) < least:
            raise ParameterError(f"{name} must be {least} or more; got {getattr(parameters, name)}")
    if not 0 < parameters.fraction < 1:
        raise ParameterError(f"fraction must lie between 0 and 1; got {parameters.fraction}")
    if unknown := [name for name in (*parameters.logit_methods, *parameters.stable_methods) if name not in METHODS]:
        raise ParameterError(f"methods {unknown} are unknown; known: {', '.join(METHODS)}")
    return parameters


# Images


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `count` places, evenly."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def explained_rows(data: Dataset, count: int) -> list[int]:
    """At most `count` rows of images whose finding is known, evenly from all; where no finding is known, of any."""
    known = np.flatnonzero([bool(region_of(data[row]).any()) for row in range(len(data))])
    known = known if len(known) else np.arange(len(data))
    return known[spread(len(known), count)].tolist()


def region_of(sample: Sample) -> Tensor:
    """The image's own finding, bool [H, W]: its exact region where the source knows it, else the union of its boxes."""
    exact = sample.mask if sample.truth is None else sample.truth
    return exact[sample.target.nan_to_num() > 0.5].any(0)


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Outputs [B, L] on the CPU, computed where the network is."""
    return network(images.to(device_of(network, images))).cpu()


# Maps


def by_class(images: Tensor, predicted: Tensor, make: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Maps [B, H, W] of images [B, 1, H, W], each of its own predicted class; `make(label, images)` gives those of
    one class. `predicted`: at least B classes, of the images in order."""
    maps = torch.zeros_like(images[:, 0])
    predicted = predicted[: len(images)]
    for label in predicted.unique().tolist():
        maps[predicted == label] = make(label, images[predicted == label])
    return maps


def smoothed(
    explain_one: Callable[[Tensor], Tensor], images: Tensor, n_samples: int, seed: int = 0, squared: bool = True
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


def shown(name: str, maps: Tensor) -> Tensor:
    """A map as the paper's figures rank its pixels: absolute values, but for XRAI's regions."""
    return maps.abs() if name in SIGNED else maps


def overlap_scores(kept: Tensor, regions: Tensor) -> dict[str, np.ndarray]:
    """Scores [N] of kept pixels against regions, bool [N, H, W] each; nan without a region or without kept pixels.

    kept: share of the image that was kept (ties stay out). precision: share of it inside the region; iou. A map that
    knows nothing scores area (the region's share of the image) and chance_iou; best_iou is the highest that any map
    can reach with as many pixels.
    """
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


# Classes apart


def class_names(data: Dataset) -> np.ndarray:
    """The class of each image, [N]: its labels joined where it has several, "none" where it has none."""
    positive = target_table(data).nan_to_num() > 0.5
    names = np.asarray(data.labels)
    return np.array([" + ".join(names[row.numpy()]) or "none" for row in positive])


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """The map of the layer that CAM methods use, flattened: [N, F], on the CPU."""
    found: list[Tensor] = []
    handle = model.get_submodule(model.explained_layer).register_forward_hook(
        lambda module, given, output: found.append(output.detach().flatten(1).cpu().clone())
    )
    try:
        for part in images.split(32):
            model(part.to(device_of(model, part)))
    finally:
        handle.remove()
    return torch.cat(found)


def same_neighbour(features: Tensor, of: pd.DataFrame) -> np.ndarray:
    """For each row of features [N, F] 1 where its nearest row of another patient has its label, 0 where not, else nan.

    `of`: patient_id and label of the rows."""
    patients, labels = of["patient_id"].to_numpy(), of["label"].to_numpy()
    distance = torch.cdist(features, features)
    distance[torch.from_numpy(patients[:, None] == patients[None])] = torch.inf
    nearest, alone = distance.argmin(1).numpy(), torch.isinf(distance.amin(1)).numpy()
    return np.where(alone, np.nan, labels[nearest] == labels)
