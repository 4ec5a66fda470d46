"""What the published code of paper `normgrad` does, as far as it differs from the text: its Grad-CAM, its disc."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit
from cxrkit.attribution.layers import upsample
from cxrkit.data import Dataset
from cxrkit.data.geometry import box_masks
from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap, hit_rate, pointing_game

__all__ = ["centred", "disc", "gradcam_of_code", "perfect_maps", "without_skip"]

_STRIDE = 32  # pixels per cell of a ResNet's last layer


def disc(tolerance: float) -> int:
    """How many pixels lie strictly nearer to one than the tolerance, that one included."""
    reach = np.arange(-int(tolerance) - 1, int(tolerance) + 2)
    return int((reach[:, None] ** 2 + reach[None] ** 2 < tolerance**2).sum())


def perfect_maps(data: Dataset, size: int, tolerance: float = 15) -> pd.DataFrame:
    """Maps whose maximum is the middle of an image's first box, at ``size`` pixels: a row per image with boxes.

    right, transposed: whether the pointing game counts a hit, with the disc around the maximum and around the mirrored
    one (row and column exchanged); off: how far the middle is from its mirror, pixels. Boxes lie in 1024 x 1024 pixels.
    """
    rows = []
    for image_id, boxes in data.boxes.groupby("image_id", sort=False):
        corners = boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy(float) * size / 1024
        mask = torch.as_tensor(np.asarray(box_masks(corners, size)), dtype=torch.bool).reshape(-1, size, size).any(0)
        column, row = ((corners[0, :2] + corners[0, 2:]) / 2).astype(int).clip(0, size - 1)
        peak = torch.zeros(size, size)
        peak[row, column] = 1
        found = {name: float(pointing_game(peak, mask, tolerance, protocol=protocol))
                 for name, protocol in (("right", "corrected"), ("transposed", "authors"))}  # fmt: skip
        rows.append({"image_id": image_id} | found | {"off": float(np.hypot(row - column, column - row))})
    return pd.DataFrame(rows)


def centred(sizes: Sequence[int], networks: int = 8, images: int = 8) -> pd.DataFrame:
    """How often the maximum of NormGrad lies in the middle ninth of a phantom's image, for networks of random weights.

    Row per input size, pixels; cells: side of the last layer, odd, so that one cell is in the middle; a column per
    virtual layer; difference: Conv3 x 3 less Conv1 x 1 with its 95 % interval (networks resampled); maps: how many of
    each. Raises ParameterError for a size with an even number of cells, where the middle lies between cells.
    """
    rows = []
    for size in sizes:
        if (cells := -(-size // _STRIDE)) % 2 == 0:
            raise ParameterError(f"sizes: {size} pixels make {cells} cells, none in the middle; take {size + _STRIDE}")
        found = pd.concat(
            [_in_the_middle(size, images, seed) for seed in range(networks)],
            ignore_index=True,
        )
        mean, low, high = bootstrap(found["conv3x3"] - found["conv1x1"], found["seed"])
        row = {"input": size, "cells": cells} | found.drop(columns="seed").mean().to_dict()
        rows.append(row | {"difference": mean, "low": low, "high": high, "maps": len(found)})
    return pd.DataFrame(rows)


def _in_the_middle(size: int, images: int, seed: int) -> pd.DataFrame:
    """Whether the maximum lies there, a row per image, of one random network."""
    model = cxrkit.models.create("resnet18", labels=("object", "none"), seed=seed).eval()
    data = cxrkit.data.load("phantom", view="objects", images=images, size=size, seed=seed)
    batch, third = data.batch(range(images)), size // 3
    middle = torch.zeros(size, size, dtype=torch.bool)
    middle[third : size - third, third : size - third] = True
    rows = {"seed": [seed] * images}
    for kind in ("scaling", "conv1x1", "conv3x3"):
        maps = cxrkit.attribute(model, batch.images, "normgrad", labels=[0], virtual_layer=kind)
        rows[kind] = hit_rate(maps[:, 0], middle).tolist()
    return pd.DataFrame(rows)


def without_skip(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy of a ResNet whose last block runs its parts one after the other, as the published Grad-CAM runs it: the
    skip connection is left out. With the name of its last convolution, whose output that code takes.

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
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = dict(bare.named_modules())[layer].register_forward_hook(keep)
    with torch.enable_grad():
        logits = bare.eval()(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), kept[-1])
    handle.remove()
    maps = 1 + (gradient.mean((2, 3), keepdim=True) * kept[-1]).sum(1, keepdim=True)
    return upsample(maps.relu().detach(), images)[:, 0], logits.argmax(1)
