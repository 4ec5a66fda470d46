"""Guided backpropagation: gradients that go back through rectifiers only where they are positive."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cxrkit.attribution.gradient import PROTOCOLS, by_protocol, is_number
from cxrkit.attribution.operations import OPERATIONS, Call, nonlinearity, tensors, traced
from cxrkit.attribution.registry import check_choice, method
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError

__all__ = ["guided_backprop"]

# Rectifiers pass the signal whole or not at all: between these values, or between those that their arguments say (the
# second of a threshold replaces what is below).
_RECTIFIED = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
_RECTIFIED_FROM = {
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "clamp": {"min": None, "max": None},
    "clamp_min": {"min": None, "max": None},
    "threshold": {"threshold": None, "value": None},
    "maximum": {"other": None, "max": None},
}
_GUIDED = OPERATIONS["guided_backprop"]
_PICKS = (*OPERATIONS["linear"]["norms"], *_GUIDED["picks"], *_GUIDED["reductions"])  # differentiated as they are


@method("gradient", unfit=_GUIDED["unfit"])
def guided_backprop(explained: Explained, images: Tensor, *, protocol: str = "corrected") -> Tensor:
    """Guided backpropagation: at every ReLU only positive signals go back. [B, L, H, W], score per unit of
    brightness, summed over input channels.

    Every ReLU counts: module or function, shared, in place, or written as a clamp, a threshold or a maximum at 0.
    ReLU6 lets pass what lies between 0 and 6. Linear operations, max-pools and norms are differentiated as they are.
    All else has no such rule (other activation functions, products of two signals, attention, what can't be seen):
    AttributionError names operation and layer, also where there is no ReLU at all.
    `protocol="authors"`: in the published code of paper `normgrad` the guidance is without effect and the sum of
    all outputs is differentiated; what remains is the plain gradient of that sum, for every label and for any
    network. "paper" and "corrected" agree. Source: Springenberg et al. 2015, section 3.4.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol == "authors":
        _, gradients = by_protocol(explained, images, protocol)
        return torch.stack([gradient.sum(1) for gradient in gradients], 1)
    inputs = images.detach().clone().requires_grad_()
    rectified, joined = [], []

    def rule(call: Call, x: Tensor, *args, **kwargs):
        if call.name in _RECTIFIED or call.name in _RECTIFIED_FROM:
            rectified.append(call.layer)
            passed = _passed_range(call, x, args, kwargs)
            return _Guided.apply(x, lambda values: call.original(values, *args, **kwargs), *passed)
        if call.name in _GUIDED["joins"] and not all(t.requires_grad for t in tensors([x])):
            joined.append(call.layer)
        passes = call.name in _PICKS or nonlinearity(call, (x, *args), kwargs) is None
        if joined and call.name in _GUIDED["reductions"] and not _is_over_positions(x, *args, **kwargs):
            passes = False  # the maximum of a signal and a constant, as a rectifier might be written
        if not passes:
            _unguided(call)
        return call.function(x, *args, **kwargs)

    logits, _ = traced(explained.model, explained.logits, inputs, rule)
    if not rectified:
        raise AttributionError(
            "guided_backprop: the network has no ReLU between image and logits, so nothing to guide; use saliency"
        )
    gradients = explained.gradients(explained.scores(logits), inputs)
    return torch.stack([gradient.sum(1) for gradient in gradients], 1)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rectify: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
        y = rectify(x)
        ctx.save_for_backward(((y > low) & (y < high)).to(y.dtype))  # several times faster than with booleans
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (passed,) = ctx.saved_tensors
        return gradient.clamp(min=0).mul_(passed), None, None, None


def _passed_range(call: Call, x: Tensor, args: tuple, kwargs: dict) -> tuple[float, float]:
    """Between which values the rectifier passes its input: from 0 to what is above it."""
    if call.name in _RECTIFIED:
        return _RECTIFIED[call.name]
    names = _RECTIFIED_FROM[call.name]
    given = names | dict(zip(names, args, strict=False)) | kwargs
    low, high = (given[name] for name in names)
    if call.name == "threshold":
        low, high = low if high == 0 else None, None
    elif call.name == "maximum":
        fits = not low.requires_grad and torch.broadcast_shapes(x.shape, low.shape) == x.shape
        low = 0.0 if fits and not low.any() else None
    high = math.inf if high is None else high
    if not (is_number(low) and is_number(high) and low == 0 < high):
        _unguided(call)
    return low, high


def _is_over_positions(x: Tensor, dim: object = None, *args, **kwargs) -> bool:
    """Whether a maximum is taken over dimensions behind image and channel alone, as pooling does."""
    if isinstance(dim, Tensor) or dim is None or x.ndim > 4:
        return False
    return all(d % x.ndim > 1 for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


def _unguided(call: Call):
    raise AttributionError(
        f"guided_backprop is defined for ReLU; layer {call.layer or 'network'} applies {call.name}: use saliency or "
        "smoothgrad"
    )
