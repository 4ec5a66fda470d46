"""Networks with random weights, to ask whether an explanation depends on what a network has learnt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError, ParameterError, meant
from cxrkit.models import bcos

__all__ = ["randomised"]

KINDS = ("full", "semi", "cascading")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def randomised(
    model: nn.Module,
    kind: str = "full",
    *,
    seed: int = 0,
    layers: Sequence[str | nn.Module] | None = None,
    calibrate: Tensor | Iterable[Tensor] | None = None,
) -> nn.Module | Iterator[tuple[str, nn.Module]]:
    """A copy of the network with random weights; the network given is left as it is.

    - ``"full"``: all layers are random;
    - ``"semi"``: features are kept, only the classifier head is random;
    - ``"cascading"``: an iterator of (layer, copy) from the logits towards the input; each copy has that layer
      and all before it in the iteration random. Where ``layers`` is None the last one equals ``"full"``.

    ``layers``: the head for ``"semi"`` (default: the last layer with a matrix of weights), the stages in their order
    for ``"cascading"`` (default: all layers with a matrix of weights in reverse order of registration, each with the
    norms registered behind it; name them where a network runs in another order). A layer that holds others stands
    for all of them.

    Weights are drawn on the CPU from ``seed``, per layer, so that a layer gets the same weights in every kind:
    convolutions (also those of B-cos) He-normal, fan-out, bias 0; norms weight 1, bias 0, running mean 0 and
    variance 1; other layers by their own ``reset_parameters`` (linear: uniform within 1/sqrt(inputs)); parameters
    without such a rule (class tokens, layer scales) are shuffled. With these statistics signals grow (DenseNet) or fade
    with depth (a B-cos network's to 1e-5 or less, where maps are rounding errors), and probabilities may saturate.
    ``calibrate`` takes images, [B, 1, H, W] in [0, 1] or batches of them, from which the norms that were randomised get
    their running statistics; the norms that were kept also keep theirs. The copy's model card says what was done.
    Raises ParameterError for an unknown kind or layer, ModelError for a network without weights or no images.

    Source: paper `normgrad`, FR ("full") and SR ("semi"), as torchvision initialises a ResNet; Adebayo et al.,
    Sanity checks for saliency maps, NeurIPS 2018 ("cascading").
    """
    if kind not in KINDS:
        raise ParameterError(f"kind {kind!r} is unknown; use {', '.join(map(repr, KINDS))}")
    if kind == "full" and layers is not None:
        raise ParameterError("layers: kind 'full' randomises all of them; use kind 'semi' for some")
    stages = _stages(model)
    if layers is not None:
        every = [name for name, _ in model.named_modules(remove_duplicate=False)]
        chosen = [_name_of(layer, model) for layer in layers]
        stages = {name: [n for n in every if n == name or n.startswith(f"{name}.")] for name in chosen}
    elif kind == "semi":
        head = next(iter(stages))
        stages = {head: [head]}
    if not stages:
        raise ParameterError("layers is empty; name at least one layer, or pass None")
    images = [calibrate] if isinstance(calibrate, Tensor) else calibrate
    copies = _cascade(model, stages, kind, seed, None if images is None else list(images))
    if kind == "cascading":
        return copies
    *_, (_, last) = copies
    return last


def _cascade(
    model: nn.Module, stages: Mapping[str, Sequence[str]], kind: str, seed: int, images: list[Tensor] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Randomise stage after stage, with a copy after each; kinds that need one copy get it at the end."""
    device = next(model.parameters()).device
    working = copy.deepcopy(model).cpu()
    modules = dict(working.named_modules(remove_duplicate=False))
    seeds = dict(zip(modules, _layer_seeds(len(modules), seed), strict=True))
    done: list[str] = []
    for stage, names in stages.items():
        for name in names:
            _reinitialise(modules[name], seeds[name])
        done.append(stage)
        if kind == "cascading" or len(done) == len(stages):
            result = copy.deepcopy(working)
            if isinstance(getattr(result, "card", None), dict):
                done_so_far = {"kind": kind, "seed": seed, "layers": list(done)}
                done_so_far |= {} if images is None else {"calibrated": True}
                result.card = result.card | {"randomised": done_so_far}
            result = result.to(device)
            if images is not None:
                fresh = {name for stage in done for name in stages[stage]}
                bcos.calibrate(
                    result, images, [m for n, m in result.named_modules(remove_duplicate=False) if n in fresh]
                )
            yield stage, result


def _name_of(layer: str | nn.Module, model: nn.Module) -> str:
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name, module in modules.items():
        if layer is module or layer == name:
            return name
    if isinstance(layer, nn.Module):
        raise ParameterError(f"layer {type(layer).__name__} isn't part of the network; pass one of its own modules")
    raise ParameterError(f"unknown layer {layer!r}; {meant(str(layer), modules, 3)}")


def _stages(model: nn.Module) -> dict[str, list[str]]:
    """Layers with a matrix of weights, the last first, each with the layers that are randomised along with it."""
    stages: dict[str, list[str]] = {}
    waiting: list[str] = []  # go with the next matrix: parameters that a block holds itself, norms before any matrix
    for name, module in model.named_modules():
        sizes = [parameter.ndim for parameter in module.parameters(recurse=False)]
        norm = isinstance(module, _NORMS)  # one that holds its activation is a norm still, no block
        block = next(module.children(), None) is not None and not norm
        if not sizes and not norm:
            continue
        if max(sizes, default=0) >= 2 and not block:
            stages[name] = [*waiting, name]
            waiting = []
        elif block or not stages:
            waiting.append(name)
        else:
            stages[next(reversed(stages))].append(name)
    if not stages:
        raise ModelError(f"{type(model).__name__} has no layer with a matrix of weights to randomise")
    stages[next(reversed(stages))] += waiting
    return dict(reversed(stages.items()))


def _layer_seeds(count: int, seed: int) -> list[int]:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _reinitialise(module: nn.Module, seed: int) -> None:
    """Give the parameters that a layer holds itself their random values."""
    own = list(module.parameters(recurse=False))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _NORMS):
            for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
                if parameter is not None:
                    nn.init.constant_(parameter, value)
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.reset_running_stats()
        elif own and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        else:
            for parameter in own:
                shuffled = parameter.flatten()[torch.randperm(parameter.numel())]
                parameter.copy_(shuffled.view_as(parameter))
