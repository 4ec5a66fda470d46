"""Right maps of methods that look at one layer: what every layer puts out, and its gradients, by hooks of our own.

The hooks sit on a second, equal network in float64, one image at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fuzz.algebra import NoRule
from fuzz.oracles import Subject
from fuzz.steps import Linear


@dataclass
class LayerMap:
    """One run of a layer: its map [B, K, h, w] and the gradients of the scores [B, L, K, h, w] (None: no influence)."""

    name: str
    module: nn.Module
    map: Tensor
    gradients: Tensor | None
    runs: int = 1  # how often the layer runs


class NormsByFormula(TorchFunctionMode):
    """Batch norms with running statistics and instance norms without, written out: torch 2.13 gives those of one image
    a wrong gradient in some memory layouts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.instance_norm and kwargs.get("use_input_stats", True):
            x, mean, variance, weight, bias, eps = self._read(*args, **kwargs)
            mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        elif function is F.batch_norm and not kwargs.get("training", args[5] if len(args) > 5 else False):
            x, mean, variance, weight, bias, eps = self._read(*args, **kwargs)
            mean, variance = (t.view(1, -1, *[1] * (x.ndim - 2)) for t in (mean, variance))
        else:
            return function(*args, **kwargs)
        y = (x - mean) / (variance + eps).sqrt()
        for combine, t in ((torch.mul, weight), (torch.add, bias)):
            y = y if t is None else combine(y, t.view(1, -1, *[1] * (x.ndim - 2)))
        return y

    def _read(self, input, running_mean=None, running_var=None, weight=None, bias=None, *flags, eps=1e-5, **others):
        return input, running_mean, running_var, weight, bias, flags[2] if len(flags) > 2 else eps


def layer_maps(
    network: nn.Module, images: Tensor, select, no_maps: set[nn.Module], moved=lambda values: values
) -> list[LayerMap]:
    """Maps above one pixel in the order in which the layers finish; `select` gives scores [1, L] from the outputs, and
    what layers put out goes on through `moved`."""
    calls: Counter[nn.Module] = Counter()
    per_image = [_of_one_image(network, image[None], select, no_maps, calls, moved) for image in images]
    found = []
    for runs in zip(*per_image, strict=True):
        name, module = runs[0][:2]
        gradients = None if any(r[3] is None for r in runs) else torch.cat([r[3] for r in runs])
        found.append(LayerMap(name, module, torch.cat([r[2] for r in runs]), gradients))
    for layer in found:
        layer.runs = calls[layer.module] // len(images)
    return found


def _of_one_image(network: nn.Module, image: Tensor, select, no_maps: set[nn.Module], calls: Counter, moved):
    kept: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str):
        def hook(module, args, output):
            calls[module] += 1
            if module in no_maps or not isinstance(output, Tensor) or output.ndim != 4:
                return None
            if output.shape[2] * output.shape[3] < 2:
                return None
            copy = output.clone()
            kept.append((name, module, copy))
            return moved(copy.clone())

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in network.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with NormsByFormula():
            scores = select(network(image.clone().requires_grad_() * 1))
    finally:
        for handle in handles:
            handle.remove()
    tensors = [tensor for _, _, tensor in kept]
    able = [tensor for tensor in tensors if tensor.requires_grad]
    rows = [
        torch.autograd.grad(score, able, retain_graph=True, allow_unused=True) if able and score.requires_grad else ()
        for score in scores[0]
    ]
    result = []
    for name, module, tensor in kept:
        place = next((i for i, other in enumerate(able) if other is tensor), None)
        found = [row[place] if place is not None and row else None for row in rows]
        gone = all(g is None for g in found)
        filled = [torch.zeros_like(tensor) if g is None else g for g in found]
        result.append((name, module, tensor.detach(), None if gone else torch.stack(filled, 1).detach()))
    return result


def upsampled(maps: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)


def gradcam(layer: LayerMap, s: Subject) -> Tensor:
    weights = layer.gradients.mean((3, 4), keepdim=True)
    return upsampled((weights * layer.map[:, None]).sum(2).relu(), s.images)


def layercam(layer: LayerMap, s: Subject) -> Tensor:
    return upsampled((layer.gradients.relu() * layer.map[:, None]).sum(2).relu(), s.images)


def gradcam_plus_plus(layer: LayerMap, s: Subject) -> Tensor:
    """By the published coefficients, with the exponential's factor left out."""
    g, a = layer.gradients, layer.map[:, None]
    total = a.sum((3, 4), keepdim=True)
    below = 2 * g.square() + g**3 * total
    alpha = torch.where(g == 0, 0.0, g.square() / torch.where(below == 0, 1.0, below))
    weights = (alpha * g.relu()).sum((3, 4), keepdim=True)
    return upsampled((weights * a).sum(2).relu(), s.images)


def at_pole(layer: LayerMap) -> bool:
    """Whether a weight of Grad-CAM++ is infinite, of the wrong sign, or nearly so."""
    total = layer.map[:, None].sum((3, 4), keepdim=True)
    return bool((2 + layer.gradients.relu() * total).min() <= 1e-3)


def scorecam(layer: LayerMap, s: Subject) -> Tensor:
    scores = []
    for channel in range(layer.map.shape[1]):
        small = layer.map[:, channel : channel + 1]
        mask = upsampled(small, s.images)
        low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
        varies = small.amax((2, 3), keepdim=True) > small.amin((2, 3), keepdim=True)
        scaled = torch.where(varies, (mask - low) / (high - low).clamp(min=1e-300), 0.0)
        scores.append(s.scores(s.images * scaled))
    weights = torch.stack(scores, 2).detach().softmax(2)  # [B, L, K]
    return upsampled(torch.einsum("blk,bkhw->blhw", weights, layer.map).relu(), s.images)


def cam(layer: LayerMap, s: Subject) -> Tensor:
    """Infinite for images whose logits aren't the mean of the layer's map, or of its ReLU, times a linear head; NoRule
    where that is so for none."""
    with torch.no_grad():
        logits = s.forward(s.images)
    head, variants = s.plan.steps[-1], []
    if isinstance(head, Linear) and head.weight.shape[1] == layer.map.shape[1]:
        for maps in (layer.map, layer.map.relu()):
            given = F.linear(maps.mean((2, 3)), head.weight, head.bias)
            variants.append((given, torch.einsum("lk,bkhw->blhw", head.weight, maps)))
    variants.append((layer.map.mean((2, 3)) + s.plan.logit_bias, layer.map))
    found = torch.full((len(s.images), len(s.labels), *s.images.shape[2:]), torch.inf, dtype=torch.float64)
    for given, maps in variants:
        if given.shape == logits.shape:
            fits = torch.isclose(given, logits, rtol=1e-6, atol=1e-7).all(1)
            found[fits] = upsampled(maps[:, s.labels], s.images)[fits]
    if found.isinf().flatten(1).any(1).all():
        raise NoRule("no class activation map")
    return found


# NormGrad: the gradient of an identity layer put behind the layer, position by position


def normgrad(layer: LayerMap, s: Subject, virtual_layer: str = "scaling") -> Tensor:
    """Before up-sampling. [B, L, h, w]"""
    a, g = layer.map, layer.gradients
    b, k, h, w = a.shape
    patches = F.unfold(a, 3, padding=1).view(b, k, 9, h, w)
    result = torch.zeros(b, g.shape[1], h, w, dtype=a.dtype)
    for row in range(b):
        for label in range(g.shape[1]):
            slope = g[row, label]
            part = {
                "bias": lambda slope=slope: slope,
                "scaling": lambda slope=slope, row=row: slope * a[row],
                "conv1x1": lambda slope=slope, row=row: slope[:, None] * a[row][None],
                "conv3x3": lambda slope=slope, row=row: slope[:, None, None] * patches[row][None],
                "conv3x3_depthwise": lambda slope=slope, row=row: slope[:, None] * patches[row],
            }[virtual_layer]()
            result[row, label] = part.flatten(0, -3).square().sum(0).sqrt()
    return result


def multiplied(norms: list[Tensor], images: Tensor, protocol: str) -> Tensor:
    added = 1e-8 if protocol == "authors" else 1e-300
    product = torch.ones(*norms[0].shape[:2], *images.shape[2:], dtype=torch.float64)
    for small in norms:
        large = upsampled(small, images)
        low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
        flat = high - low <= (0 if protocol == "authors" else 1e-5 * high)
        scaled = product * (large - low) / (high - low + added)
        product = torch.where(flat, torch.ones_like(product) if protocol == "authors" else product, scaled)
    low, high = product.amin((2, 3), keepdim=True), product.amax((2, 3), keepdim=True)
    return (product - low) / (high - low + added)


def spatial(layers: list[LayerMap]) -> Iterator[LayerMap]:
    """Those that the scores depend on, last first."""
    return (layer for layer in reversed(layers) if layer.gradients is not None)
