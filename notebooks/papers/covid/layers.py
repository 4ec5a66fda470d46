"""Paper `covid`: what whole layers do for groups of images: dead feature maps, neuron activation profiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cxrkit.data
import cxrkit.metrics
from cxrkit.errors import AttributionError
from cxrkit.study import runs
from papers.covid.measure import Subject, all_images

__all__ = ["groups_of", "inactive", "layers_of", "profiles"]

_FRAME = 1 / 8  # of the side: how wide an image's border is taken to be
_FINE = 128  # pixels of the input: below, the deepest layer is too coarse to show a place, and the one before stands in
# Layers that the authors looked at, by kind of network: all, the middle one, and early, deep, deep for small images.
_DENSE = [f"features.denseblock{number}.denselayer1.relu1" for number in (1, 2, 3, 4)]
_LAYERS = {
    "inception_v3": (
        [
            "Conv2d_4a_3x3",
            "Mixed_5b",
            "Mixed_5c",
            "Mixed_6a",
            "Mixed_7a",
            "Mixed_7b",
            "Mixed_7c",
        ],
        "Mixed_6a",
        ("Conv2d_4a_3x3", "Mixed_7c", "Mixed_6a"),
    ),
    "inception_resnet_v2": (
        [
            "maxpool_3a",
            "maxpool_5a",
            "mixed_5b",
            "mixed_6a",
            "mixed_7a",
            "conv2d_7b",
        ],
        "mixed_6a",
        ("maxpool_3a", "conv2d_7b", "mixed_6a"),
    ),
    "densenet": (
        [*_DENSE, "features"],
        _DENSE[2],
        (_DENSE[0], _DENSE[3], _DENSE[2]),
    ),
    "resnet": (
        ["maxpool", "layer1", "layer2", "layer3", "layer4"],
        "layer2",
        ("layer1", "layer4", "layer3"),
    ),
}


def layers_of(run: runs.Run, model: nn.Module) -> tuple[list[str], str, tuple[str, str]]:
    """The layers that the authors looked at in a network of this kind, the middle one, and an early and a deep one;
    for other kinds the layer that maps are made of."""
    known = {layer for layer, _ in model.named_modules()}
    kind = next((kind for kind in _LAYERS if kind in run.parameters.model), None)
    listed, middle, (early, *deep) = _LAYERS[kind] if kind else ([], "", ("", ""))
    if f"network.{middle}" not in known:
        last = model.card["explained_layer"]
        return [last], last, (last, last)
    chosen = deep[0] if run.parameters.size >= _FINE else deep[1]
    whole = [f"network.{layer}" for layer in listed if f"network.{layer}" in known]
    return whole, f"network.{middle}", (f"network.{early}", f"network.{chosen}")


def inactive(subject: Subject) -> pd.DataFrame:
    """Feature maps that never vary over space in any test image (the paper's dead maps), and of these, or any, those
    that are 0 throughout: rows (layer, maps, constant, zero, percent, middle). Layers of one pixel are left out."""
    layers, middle, _ = layers_of(subject.run, subject.model)
    images, parts = all_images(subject.test), []
    for layer in layers:
        try:
            found = {
                kind: cxrkit.metrics.inactive_feature_maps(subject.model, images, [layer], definition=kind)
                for kind in ("constant", "zero")
            }
        except AttributionError:
            continue  # a map of one pixel can't vary
        row = found["constant"].rename(columns={"inactive": "constant"})
        parts.append(row.assign(zero=found["zero"]["inactive"], middle=layer == middle))
    columns = ["layer", "maps", "constant", "zero", "percent", "middle"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def groups_of(data: cxrkit.data.Dataset, chain: Sequence[str]) -> dict[str, np.ndarray]:
    """The paper's groups of images, bool [N] each: the innermost label, the outermost, the outermost without the
    innermost, and neither. They overlap; empty ones are left out."""
    inner, outer = (data.table[label].to_numpy() > 0.5 for label in (chain[0], chain[-1]))
    groups = {
        chain[0]: inner,
        chain[-1]: outer,
        f"{chain[-1]} without {chain[0]}": outer & ~inner,
    }
    return {name: chosen for name, chosen in (groups | {"neither": ~outer}).items() if chosen.any()}


def profiles(subject: Subject, top: int = 10) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Neuron activation profiles of the groups in the image and in an early and a deep layer.

    A row per layer and strong feature map (layer, map, strength, border), strongest first, ``top`` of each; border:
    mean of |profile| in the outer eighth of the image over its mean everywhere, 1 where the border is like the rest.
    Arrays: groups [G], average [G, H, W] of the images, input [G, H, W], and for early and deep the two strongest maps
    [2, G, h, w] with their numbers.
    """
    groups = groups_of(subject.test, subject.chain)
    layers = ["input", *dict.fromkeys(layers_of(subject.run, subject.model)[2])]
    images = all_images(subject.test)
    found = cxrkit.metrics.neuron_activation_profiles(subject.model, images, groups, layers, remove_inactive=True)
    ranked = cxrkit.metrics.rank_feature_maps(found).groupby("layer", sort=False).head(top)
    stacked = {layer: torch.stack(list(by_group.values()), 1) for layer, by_group in found.items()}  # [C, G, h, w]
    border = {layer: _border(part, subject.test.size) for layer, part in stacked.items()}
    ranked["border"] = [border[row.layer][row.map] for row in ranked.itertuples()]
    average = torch.stack([images[torch.from_numpy(chosen)].mean((0, 1)) for chosen in groups.values()])
    kept = {
        "groups": np.array(list(groups)),
        "average": average.numpy(),
        "input": stacked["input"][0].numpy(),
    }
    for name, layer in zip(("early", "deep"), (layers[1], layers[-1]), strict=True):
        maps = np.array(ranked.loc[ranked["layer"] == layer, "map"][:2])
        kept |= {
            name: stacked[layer][maps].numpy(),
            f"{name}_maps": maps,
            f"{name}_layer": np.array(layer),
        }
    return ranked.reset_index(drop=True), kept


def _border(maps: Tensor, size: int) -> list[float]:
    large = F.interpolate(maps.abs(), size=(size, size), mode="nearest").mean(1)
    width = max(1, int(size * _FRAME))
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[width:-width, width:-width] = True
    return (large[:, ~inside].mean(1) / large.mean((1, 2))).tolist()
