"""Networks with random weights, to ask whether an explanation depends on what a network has learnt."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError, ParameterError
from cxrkit.models import bcos

__all__ = ["randomised"]

KINDS = ("full", "semi")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def randomised(
    model: nn.Module, kind: str = "full", *, seed: int = 0, calibrate: Tensor | Iterable[Tensor] | None = None
) -> nn.Module:
    """A copy of the network with random weights; the network given is left as it is.

    ``"full"``: all layers are random; ``"semi"``: features are kept, only the head is random, the last layer with a
    matrix of weights.

    Weights are drawn on the CPU from ``seed``, per layer, so that the head gets the same weights in both kinds:
    convolutions (also those of B-cos) He-normal, fan-out, bias 0; norms weight 1, bias 0, running mean 0 and
    variance 1; other layers by their own ``reset_parameters`` (linear: uniform within 1/sqrt(inputs)); parameters
    without such a rule (class tokens, layer scales) are shuffled. With these statistics signals grow (DenseNet) or fade
    with depth (a B-cos network's to 1e-5 or less, where maps are rounding errors), and probabilities may saturate.
    ``calibrate`` takes images, [B, 1, H, W] in [0, 1] or batches of them, from which the norms that were randomised get
    their running statistics; the norms that were kept also keep theirs. The copy's model card says what was done.
    Raises ParameterError for an unknown kind, ModelError for a network without weights or no images.

    Source: paper `normgrad`, FR ("full") and SR ("semi"), as torchvision initialises a ResNet.
    """
    if kind not in KINDS:
        raise ParameterError(f"kind {kind!r} is unknown; use {', '.join(map(repr, KINDS))}")
    result = copy.deepcopy(model).cpu()
    modules = dict(result.named_modules(remove_duplicate=False))
    seeds = dict(zip(modules, _layer_seeds(len(modules), seed), strict=True))
    head = _head(model)
    layers = [head] if kind == "semi" else _layers(model)
    for name in layers:
        _reinitialise(modules[name], seeds[name])
    if isinstance(getattr(result, "card", None), dict):
        done = {"kind": kind, "seed": seed} | ({} if calibrate is None else {"calibrated": True})
        result.card = result.card | {"randomised": done}
    result = result.to(next(model.parameters()).device)
    if calibrate is not None:
        bcos.calibrate(result, calibrate, [modules[name] for name in layers])
    return result


def _layers(model: nn.Module) -> list[str]:
    """Modules that hold parameters of their own, and norms, from the logits towards the input."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) or next(module.parameters(recurse=False), None) is not None
    ]
    return names[::-1]


def _head(model: nn.Module) -> str:
    """The last layer with a matrix of weights that holds no other layers."""
    for name, module in reversed(list(model.named_modules())):
        matrix = any(weight.ndim >= 2 for weight in module.parameters(recurse=False))
        alone = isinstance(module, _NORMS) or next(module.children(), None) is None  # a norm may hold its activation
        if matrix and alone:
            return name
    raise ModelError(f"{type(model).__name__} has no layer with a matrix of weights to randomise")


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
