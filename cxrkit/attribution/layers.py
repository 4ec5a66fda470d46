"""Layers of a network: found by name or by tracing, and their maps recorded by hooks that are always
removed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.position_rules import Positions
from cxrkit.attribution.positions import Step, Tracking, why_no_map
from cxrkit.attribution.registry import unknown
from cxrkit.attribution.target import Explained, logit_bias
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.models import FLCPool

__all__ = [
    "Layer",
    "Trace",
    "checked_map",
    "equals_logits",
    "explained_layer",
    "find_layer",
    "has_maps",
    "is_class_map",
    "is_norm",
    "is_spatial",
    "layer_gradients",
    "recorded",
    "trace",
    "upsample",
]


class Layer(NamedTuple):
    """A layer that is explained, and which of its runs in one forward pass is meant."""

    name: str
    module: nn.Module
    run: int = 0


@dataclass
class Output:
    """Output of a layer in one of its runs: shape or type, positions of its values, and the step that computed it."""

    name: str
    run: int
    kind: torch.Size | str
    positions: Positions = None
    step: Step | None = None
    is_class_map: bool = False

    @cached_property
    def fault(self) -> str:
        """Why it is no map; empty for a map."""
        if self.step is None:
            return f"no map [B, C, h, w] that depends on the image but {self.kind}"
        return why_no_map(self.kind, self.positions)

    @property
    def area(self) -> int:
        return self.kind[-2:].numel()


@dataclass
class Trace:
    """Findings of one forward pass: for each run of each layer, in the order in which they ended, why its output is no
    map (empty for a map); the layer that is explained unless another is named, or why there is none; the layer whose
    map, averaged over space, is the logits up to their bias; the layer whose output is the logits.
    """

    faults: list[tuple[str, str]] = field(default_factory=list)
    fit: set[str] = field(default_factory=set)  # layers with maps that the logits depend on
    partial: set[str] = field(default_factory=set)  # those that part of what the logits depend on bypasses
    default: tuple[str, int] | None = None
    no_default: str = ""
    class_map: str | None = None
    head: tuple[str, nn.Linear | nn.Conv2d] | None = None


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Dotted name and module of a layer given as either; ParameterError with near misses otherwise."""
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if isinstance(layer, nn.Module):
        for name, module in modules.items():
            if module is layer:
                return name, module
        raise ParameterError(f"layer {type(layer).__name__} isn't part of the network; pass one of its own modules")
    name = layer
    while name not in modules and name.startswith(_PREFIXES):  # as a wrapper of torch's names its layers
        name = name.partition(".")[2]
    if name not in modules:
        raise unknown("layer", layer, modules)
    return name, modules[name]


_PREFIXES = ("module.", "_orig_mod.")


def explained_layer(explained: Explained, image: Tensor, layer: str | nn.Module | None) -> Layer:
    """The layer asked for, else the model's `explained_layer`, else the last one with a feature map before the head,
    found by one forward pass, and noted as used.

    Raises AttributionError for a layer that has no map or more than one, and where the network goes on in a form that
    is no map; it names layers that would do.
    """
    seen = trace(explained, image)
    layer = layer if layer is not None else getattr(explained.model, "explained_layer", None)
    if layer is None:
        if seen.default is None:
            raise AttributionError(seen.no_default)
        name, run = seen.default
        chosen = Layer(*find_layer(explained.model, name), run)
    else:
        chosen = Layer(*find_layer(explained.model, layer))
        _check_named(explained.model, chosen, seen)
    if chosen.name not in explained.used_layers:
        explained.used_layers.append(chosen.name)
    return chosen


def _check_named(model: nn.Module, layer: Layer, seen: Trace) -> None:
    known = next(name for name, module in model.named_modules() if module is layer.module)
    if isinstance(layer.module, torch.jit.ScriptModule):
        raise AttributionError(f"layer {layer.name} is a TorchScript module, which takes no hooks; {_others(seen)}")
    faults = [fault for name, fault in seen.faults if name == known]
    if not faults:
        raise AttributionError(f"layer {layer.name} doesn't run in a forward pass; {_others(seen, known)}")
    if len(faults) > 1:
        raise AttributionError(
            f"layer {layer.name} runs more than once in a forward pass: which of its maps is meant is open; "
            f"{_others(seen, known)}"
        )
    if faults[0]:
        raise AttributionError(f"layer {layer.name} puts out {faults[0]}; {_others(seen, known)}")


def _others(seen: Trace, name: str | None = None) -> str:
    """Which layers would do: those with one map that are nearest to a layer, or the last of all."""
    order = [n for n, _ in seen.faults]
    place = len(order) - 1 - order[::-1].index(name) if name in order else len(order)
    fit = [(abs(i - place), n) for i, n in enumerate(order) if n in seen.fit and order.count(n) == 1]
    if not fit:
        return "no layer of the network has a map [B, C, h, w] that runs once, so none can be named with layer="
    return "name a layer with a map of its own: " + " or ".join(f"layer={n!r}" for _, n in sorted(fit)[:3])


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """The maps [B, C, h, w] that layers put out in one forward pass, by name, connected with those before and after.

    The graph begins at the first layer: the layers before it need none. The network goes on with a copy of each map,
    so in-place operations after a layer leave the map alone.
    """
    maps: dict[str, Tensor] = {}

    def record(layer: Layer):
        runs = itertools.count()

        def hook(module, args, output):
            if next(runs) != layer.run:
                return None
            maps[layer.name] = output.clone() if output.requires_grad else output.clone().requires_grad_()
            return maps[layer.name].clone()

        return hook

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.register_forward_hook(record(layer)).remove)
        yield maps


def checked_map(name: str, output: Tensor | None, images: Tensor) -> Tensor:
    """The map [B, C, h, w] that a layer put out for `images`; AttributionError if it didn't run or has another B."""
    if output is None:
        raise AttributionError(f"layer {name} doesn't run in a forward pass; name one that does: layer=")
    if output.ndim != 4 or len(output) != len(images) or not output.is_floating_point():
        raise AttributionError(
            f"layer {name} puts out {output.dtype} {list(output.shape)} for {len(images)} images; name one with a map "
            "of each: layer="
        )
    return output


def layer_gradients(
    explained: Explained, images: Tensor, layers: Sequence[Layer]
) -> tuple[list[Tensor], Iterator[tuple[Tensor, ...]]]:
    """The layers' maps [B, C, h, w] and, label by label, the gradients of the score at them: one backward pass each.

    AttributionError for a layer that the logits, or one label of those asked for, don't depend on.
    """
    with recorded(layers) as activations:
        scores = explained.scores(explained.logits(images))
    maps = [checked_map(layer.name, activations.get(layer.name), images) for layer in layers]
    partial = trace(explained, images[:1]).partial

    def of_labels() -> Iterator[tuple[Tensor, ...]]:
        for j, gradients in enumerate(explained.joint_gradients(scores, maps)):
            for layer, gradient in zip(layers, gradients, strict=True):
                if gradient is None:
                    raise _independent(layer)
                if layer.name in partial and not gradient.any():
                    raise _independent(layer, f"label {j} of those asked for doesn't")
            yield gradients

    if not scores.requires_grad:
        raise _independent(layers[0])
    return maps, of_labels()


def _independent(layer: Layer, who: str = "the logits don't") -> AttributionError:
    how = "by differentiable operations; name another: layer="
    return AttributionError(f"{who} depend on layer {layer.name} {how}")


def trace(explained: Explained, image: Tensor) -> Trace:
    """Findings of one forward pass of an image [1, C, H, W], remembered with what else is known of the network."""
    key = "trace", image.shape[1:]
    if key not in explained.remembered:
        explained.remembered[key] = _traced(explained, image)
    return explained.remembered[key]


def _traced(explained: Explained, image: Tensor) -> Trace:
    outputs: list[Output] = []
    means, heads = [], []
    tracking = Tracking(image)

    def record(name, module):
        runs = itertools.count()

        def hook(_, args, output):
            if not isinstance(output, Tensor):
                outputs.append(Output(name, next(runs), f"a {type(output).__name__}"))
                return
            step = tracking.step(output)
            outputs.append(Output(name, next(runs), output.shape, tracking.positions(output) if step else None, step))
            if output.ndim == 4 and (explained.names is None or output.shape[1] == len(explained.names)):
                means.append((outputs[-1], output.mean((2, 3))))
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and output[0, 0].numel() == 1):
                heads.append((name, module, output.flatten(1).clone()))

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for module in explained.model.modules():
            if isinstance(module, FLCPool):  # whose products over whole rows and columns tell no positions
                hooks.callback(module.register_forward_hook(lambda _, args, y: tracking.pooled(args[0], y)).remove)
        for name, module in explained.model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.callback(module.register_forward_hook(record(name, module)).remove)
        with tracking:
            logits = explained.logits(image)
    bias = logit_bias(explained.model)
    for output, mean in means:
        output.is_class_map = is_class_map(mean, logits, bias)
    found = Trace([(output.name, output.fault) for output in outputs])
    exact = [(n, m) for n, m, out in heads if out.shape == logits.shape and torch.equal(out, logits)]
    found.head = exact[-1] if exact else None
    _choose(found, outputs, tracking.start, tracking.step(logits))
    class_maps = [output for output in outputs if output.is_class_map]
    if class_maps:
        largest = max(class_maps, key=lambda output: output.area)
        # A head of 1 x 1 pixels behind the pooling of a larger map is no class map but a linear head.
        found.class_map = largest.name if largest.area > 1 or not found.fit else None
    return found


def _choose(found: Trace, outputs: list[Output], start: Step, end: Step | None) -> None:
    """Find the last map before the head among the layers' outputs, or why there is none, and which maps are bypassed
    by part of what the logits depend on.
    """
    passed = _Paths(start, end)
    maps = [o for o in outputs if o.step in passed.steps and not o.fault and o.area > 1 and not o.is_class_map]
    found.fit = {o.name for o in maps}
    found.partial = {o.name for o in maps if not passed.through(o.step)}
    if not maps:
        found.no_default = (
            "no layer of the network that the logits depend on puts out a map [B, C, h, w] above 1 x 1 pixel, so there "
            "is none to name with layer="
        )
        return
    maps.reverse()  # of layers with the same map the last to end, which holds the others
    last = max(maps, key=lambda o: o.step.index)
    if not passed.through(last.step):  # a gate, say: the map that it weighs comes before it
        whole = [o for o in maps if passed.through(o.step) and o.step.stage == last.step.stage]
        last = max(whole, key=lambda o: o.step.index, default=last)
    beyond = passed.other_form(last.step)
    if not beyond:
        found.default = last.name, last.run
        return
    layers = [o for o in outputs if o.step in beyond and o.fault and (o.positions is None or any(o.positions))]
    form = f": layer {layers[-1].name} puts out {layers[-1].fault}" if layers else ""
    found.no_default = (
        f"the network has no map [B, C, h, w] right before its head{form}. Its last map is that of layer {last.name}; "
        f"to explain it or an earlier one, {_others(found)}"
    )


class _Paths:
    """The operations on the way from the image to the logits."""

    def __init__(self, start: Step, end: Step | None):
        below = {end} if end is not None else set()
        waiting = list(below)
        while waiting:
            for parent in waiting.pop().parents:
                if parent not in below:
                    below.add(parent)
                    waiting.append(parent)
        self.steps = dict.fromkeys(sorted(below, key=lambda s: s.index))
        behind, ahead = dict.fromkeys(self.steps, 0), dict.fromkeys(self.steps, 0)
        for step in self.steps:
            behind[step] = 1 if step is start else sum(behind[p] for p in step.parents)
        if end is not None:
            ahead[end] = 1
        for step in reversed(self.steps):
            for parent in step.parents:
                ahead[parent] += ahead[step]
        self._counts = {s: behind[s] * ahead[s] for s in self.steps}
        self._all = behind.get(end, 0)

    def through(self, step: Step) -> bool:
        """Whether all that the logits depend on passes through this operation: every path does."""
        return self._counts.get(step) == self._all

    def other_form(self, last: Step) -> set[Step]:
        """The operations after a map in which the network mixes or transforms what it has of each position in a form
        that is no map; none where only a head follows, which pools or flattens the map.
        """
        found, mixed = set(), {last: False}
        for step in self.steps:
            before = [mixed[p] for p in step.parents if p in mixed]
            if not before or step is last:
                continue
            is_map = step.positions is not None and not why_no_map(step.shape, step.positions)
            mixed[step] = any(before) or (step.kind in ("contracted", "sampled", "unknown") and not is_map)
            resolved = step.positions is None or any(step.positions)
            # A weight, such as that of attention pooling, isn't yet what the head sees.
            main = step.kind != "weighted" and (self.through(step) or not self.through(last))
            if mixed[step] and resolved and not is_map and main:
                found.add(step)
        return found


def is_class_map(mean: Tensor, logits: Tensor, bias: float | Tensor) -> bool:
    """Whether a map of this spatial mean [B, C] is the logits [B, L] before pooling and bias."""
    if mean.shape != logits.shape:
        return False
    return equals_logits(mean + bias, logits, 1e-4 * mean.abs() + 1e-6 * (logits.abs() + abs(bias)))


def equals_logits(candidate: Tensor, logits: Tensor, allowed: Tensor) -> bool:
    """Whether a candidate is the logits up to the rounding allowed. All [B, L]."""
    return bool(((candidate - logits).abs() <= allowed).all())


def is_spatial(module: nn.Module) -> bool:
    """Whether a layer works on maps, as far as its class and its weights tell."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    named = type(module).__name__.lower().endswith("2d") and not any(module.children())
    return named or any(tensor.ndim == 4 for tensor in own)


def has_maps(model: nn.Module) -> bool:
    """Whether the network has layers for maps, and not the blocks of a transformer or mixer after the last of them."""
    modules = list(model.modules())
    last = max((i for i, module in enumerate(modules) if is_spatial(module)), default=None)
    if last is None or getattr(model, "explained_layer", None) is not None:
        return last is not None
    return max(Counter(type(m) for m in modules[last:] if _mixes_tokens(m)).values(), default=0) < 2


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether this is a block with a normalization and two linear layers."""
    parts = [] if isinstance(module, nn.Sequential) else list(module.modules())
    return sum(isinstance(p, nn.Linear) for p in parts) > 1 and any(map(is_norm, parts))


def is_norm(module: nn.Module) -> bool:
    """Whether the layer is a normalization, by its class's name."""
    return "norm" in type(module).__name__.lower()


def upsample(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, L, h, w] at the images' resolution, bilinear with half-pixel centres."""
    return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)
