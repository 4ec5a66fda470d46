"""Shared by the pages of paper `normgrad`: its methods by name, boxed positives, the Grad-CAM of its code."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from cxrkit.attribution.layers import upsample
from cxrkit.data import Dataset
from cxrkit.errors import DataError, ParameterError
from cxrkit.study.notebook import NotebookParameters

__all__ = [
    "METHODS",
    "PIXEL_METHODS",
    "STATES",
    "boxed_positives",
    "check",
    "clipped",
    "gradcam_of_code",
    "layers_of",
    "recipes",
    "without_skip",
]

# The paper's methods by the names of its tables, and what the kit calls them.
PIXEL_METHODS = {
    "InputXGrad": "input_x_gradient",
    "GuidedBackprop": "guided_backprop",
    "GuidedGradCAM": "guided_gradcam",
}
_VIRTUAL_LAYERS = {"Scaling": "scaling", "Conv1x1": "conv1x1", "Conv3x3": "conv3x3"}
METHODS = (
    *PIXEL_METHODS,
    "GradCAM",
    *(f"NormGrad {kind} {layers}" for kind in _VIRTUAL_LAYERS for layers in ("single", "multi")),
)
STATES = ("FR", "SR", "trained")
# The layers of the paper's EfficientNet-B0 in timm's networks of the same build: the first part of every stage, the
# last convolution before and after its norm.
_STAGES = ("conv_stem", *(f"blocks.{stage}.0" for stage in range(7)), "conv_head", "bn2")
_CLIP = 0.99  # of a pixel map's values, beyond which the published code sees no difference


def check(parameters: NotebookParameters) -> None:
    """Raise ParameterError for an unknown method or state in `measure.ipynb`, and for a number out of range."""
    for name, known in (("methods", METHODS), ("states", STATES)):
        if unknown := [one for one in getattr(parameters, name) if one not in known]:
            raise ParameterError(f"{name} {unknown} are unknown; use some of {list(known)}")
    for name, least in (("tolerance", 1), ("paper_size", 1), ("images", 0), ("maps", 1)):
        if getattr(parameters, name) < least:
            raise ParameterError(f"{name} is {getattr(parameters, name)}; it must be at least {least}")


def boxed_positives(data: Dataset, label: str, splits: list[str], count: int = 0) -> Dataset:
    """The images of some splits that show a label and have a box of it; `count` of them, spread evenly, or all (0).

    Raises ParameterError for an unknown label, DataError where there is no such image.
    """
    if label not in data.labels:
        raise ParameterError(f"label {label!r} is unknown to {data.name}; it knows {list(data.labels)}")
    boxed = data.table["image_id"].isin(data.boxes.loc[data.boxes["label"] == label, "image_id"])
    rows = np.flatnonzero(boxed & data.table["split"].isin(splits) & (data.table[label] == 1))
    if not len(rows):
        raise DataError(f"{data.name}: no image of the splits {splits} has the label {label!r} and a box of it")
    if count:
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
    return data.select(rows)


def recipes(model: nn.Module) -> dict[str, tuple[str, dict]]:
    """The kit's method and its options, by the paper's name of the method."""
    found: dict[str, tuple[str, dict]] = {name: (method, {}) for name, method in PIXEL_METHODS.items()}
    found["GradCAM"] = ("gradcam", {})
    for name, kind in _VIRTUAL_LAYERS.items():
        found[f"NormGrad {name} single"] = ("normgrad", {"virtual_layer": kind})
        found[f"NormGrad {name} multi"] = ("normgrad", {"virtual_layer": kind, "layers": layers_of(model)})
    return found


def layers_of(model: nn.Module) -> str | list[str]:
    """The layers whose maps NormGrad multiplies: the paper's, or their like in an EfficientNet of timm."""
    stages = [f"network.{name}" for name in _STAGES]
    return stages if {name for name, _ in model.named_modules()}.issuperset(stages) else "paper"


def clipped(maps: Tensor) -> Tensor:
    """Maps cut at their 99th percentile, as the published code shows pixel maps: one pixel in a hundred is highest."""
    highest = torch.stack([one.flatten().quantile(_CLIP) for one in maps])
    return maps.minimum(highest[:, None, None])


def without_skip(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy of a ResNet whose last block runs its parts one after the other, without the skip connection, as the
    published Grad-CAM runs it; and the name of its last convolution, whose output that code takes.

    Raises ParameterError for another kind of network.
    """
    model = copy.deepcopy(model)
    names = dict(model.named_modules())
    blocks = [name for name in names if name.split(".")[-2:-1] == ["layer4"] and name.split(".")[-1].isdigit()]
    if not blocks:
        raise ParameterError(f"{type(model).__name__} has no layer4 of blocks; give a ResNet of torchvision")
    last = max(blocks, key=lambda name: int(name.rsplit(".", 1)[1]))
    parts = [part for name, part in names[last].named_children() if name != "downsample"]

    def forward(values: Tensor) -> Tensor:
        for part in parts:
            values = part(values)
        return values

    names[last].forward = forward
    return model, next(name for name in reversed(names) if name.startswith(f"{last}.conv"))


def gradcam_of_code(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The published Grad-CAM, [N, H, W] of images [N, 1, H, W] and classes [N], and the class that the network predicts
    without the skip, long [N].

    Weights are the mean gradients at the last convolution, before its norm; the sum begins at 1; negative values go.
    """
    bare, layer = without_skip(model)
    values: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Tensor) -> Tensor:
        values.append(output.detach().requires_grad_())
        return values[-1]

    handle = dict(bare.named_modules())[layer].register_forward_hook(keep)
    with torch.enable_grad():
        logits = bare.eval()(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), values[-1])
    handle.remove()
    maps = 1 + (gradient.mean((2, 3), keepdim=True) * values[-1]).sum(1, keepdim=True)
    return upsample(maps.relu().detach(), images)[:, 0], logits.argmax(1)
