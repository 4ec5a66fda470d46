"""Layers of a network: found by name or by tracing, and their maps recorded by hooks that are always
removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.explained import Explained, logit_bias
from cxrkit.attribution.registry import unknown
from cxrkit.errors import AttributionError, ParameterError

__all__ = [
    "Trace",
    "captured",
    "checked_map",
    "equals_logits",
    "explained_layer",
    "find_layer",
    "is_class_map",
    "trace",
    "upsample",
]


@dataclass
class Captured:
    """The map of one layer, [B, C, h, w], from the last forward pass."""

    name: str
    map: Tensor | None = None


@dataclass
class Trace:
    """What one forward pass showed: layers with maps in the order in which they finished, the class map,
    the linear head.
    """

    maps: list[str] = field(default_factory=list)
    class_map: str | None = None  # the layer whose map, averaged over space, is the logits up to their bias
    head: tuple[str, nn.Linear] | None = None  # the linear layer whose output is the logits


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Dotted name and module of a layer given as either; ParameterError with near misses otherwise."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name, module
        raise ParameterError(f"layer {type(layer).__name__} isn't part of the network; pass one of its own modules")
    if layer not in modules:
        raise unknown("layer", layer, modules)
    return layer, modules[layer]


def explained_layer(explained: Explained, image: Tensor, layer: str | nn.Module | None) -> tuple[str, nn.Module]:
    """The layer asked for, else the model's `explained_layer`, else the last one with a feature map, found
    by one forward pass.
    """
    layer = layer if layer is not None else getattr(explained.model, "explained_layer", None)
    if layer is None:
        seen = trace(explained, image)
        if not seen.maps:
            raise AttributionError(
                "no layer of the network puts out a map [B, C, h, w] above 1 x 1 pixel; name one: layer="
            )
        layer = seen.maps[-1]
    return find_layer(explained.model, layer)


@contextmanager
def captured(name: str, module: nn.Module, differentiable: bool) -> Iterator[Captured]:
    """Record the map [B, C, h, w] that a layer puts out.

    With `differentiable` the map is a leaf that the rest of the network is computed from, so gradients
    reach it and the layers before it need no graph. The network goes on with a copy: later in-place
    operations leave the record alone. Raises AttributionError for a layer that runs twice or whose output
    is no map.
    """
    seen = Captured(name)

    def record(module, args, output):
        if seen.map is not None:
            raise AttributionError(
                f"layer {name} runs more than once in a forward pass: which of its maps is meant is open"
            )
        if not isinstance(output, Tensor) or output.ndim != 4:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise AttributionError(f"layer {name} puts out no map [B, C, h, w] but {got}; name another: layer=")
        seen.map = output.detach().clone()
        if differentiable:
            seen.map.requires_grad_()
            return seen.map.clone()
        return None

    handle = module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def checked_map(name: str, output: Tensor | None, images: Tensor) -> Tensor:
    """The map [B, C, h, w] that a layer put out for `images`.

    Raises AttributionError for a layer that didn't run, and for a map whose channels come last, as within Swin and
    ConvNeXt: the shape of the images is then found in its first two sizes instead of its last two.
    """
    if output is None:
        raise AttributionError(f"layer {name} doesn't run in a forward pass; name one that does: layer=")
    rows, columns = images.shape[-2:]
    first, middle, last = output.shape[1:]

    def misfit(height: int, width: int) -> float:
        return abs(math.log(height * columns / (width * rows)))

    if misfit(first, middle) + math.log(1.4) < misfit(middle, last):  # 1.4: unpadded convolutions shrink unevenly
        raise AttributionError(
            f"layer {name} puts out {list(output.shape)} for images of {rows} x {columns}: its channels come last; "
            "name a layer that puts out [B, C, h, w]: layer="
        )
    return output


def trace(explained: Explained, image: Tensor) -> Trace:
    """Run one image [1, C, H, W] and say which layers have maps, which map is the class map, and which
    linear layer is the head.
    """
    maps, linears = [], []

    def record(name):
        def hook(module, args, output):
            if not isinstance(output, Tensor):
                return
            if output.ndim == 4 and len(output) == len(image):
                head_like = explained.names is None or output.shape[1] == len(explained.names)
                mean = output.mean((2, 3)) if head_like else output.new_empty(0)
                maps.append((name, output.shape[-2] * output.shape[-1], mean))
            if isinstance(module, nn.Linear):
                linears.append((name, module, output.clone()))

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in explained.model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(record(name)).remove)
        logits = explained.logits(image)
    found = Trace()
    bias = logit_bias(explained.model)
    areas = {}
    for name, area, mean in maps:
        if is_class_map(mean, logits, bias):
            areas[name] = area
        elif area > 1:
            found.maps.append(name)
    if areas:
        found.class_map = max(areas, key=lambda name: areas[name])
    exact = [(n, m) for n, m, out in linears if out.shape == logits.shape and torch.equal(out, logits)]
    found.head = exact[-1] if exact else None
    return found


def is_class_map(mean: Tensor, logits: Tensor, bias: float | Tensor) -> bool:
    """Whether a map of this spatial mean [B, C] is the logits [B, L] before pooling and bias."""
    if mean.shape != logits.shape:
        return False
    return equals_logits(mean + bias, logits, 1e-4 * mean.abs() + 1e-6 * (logits.abs() + abs(bias)))


def equals_logits(candidate: Tensor, logits: Tensor, allowed: Tensor) -> bool:
    """Whether a candidate is the logits up to the rounding allowed. All [B, L]."""
    return bool(((candidate - logits).abs() <= allowed).all())


def upsample(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, L, h, w] at the images' resolution, bilinear with half-pixel centres."""
    return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)
