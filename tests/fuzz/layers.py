"""How people write norms with fixed statistics, pools and constants, and all layers by step class.

As in `activations`: spellings in `USUAL` excuse no refusal. A maker gets the step and returns a module, or a plain
function where nothing needs to be kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fuzz.activations import Applied
from fuzz.steps import AvgPool, BatchNorm, Constant, Conv, Linear, MaxPool, PowerPool, Step, Upsample
from fuzz.weights import (
    WEIGHTED,
    Entry,
    Held,
    PaddingConv,
    always,
    convolution,
    dense,
    is_pointwise,
    is_simple,
    pointwise,
    summed,
    unfolded,
)


def batch_norm(step: BatchNorm, kind=nn.BatchNorm2d, **options) -> nn.Module:
    made = kind(len(step.mean), eps=step.eps, affine=True, **options)
    made.weight.data, made.bias.data = step.weight.clone(), step.bias.clone()
    made.running_mean.data, made.running_var.data = step.mean.clone(), step.variance.clone()
    return made


def _held_norm(function) -> Callable[[BatchNorm], nn.Module]:
    return lambda s: Held(function(s), as_buffers=True, mean=s.mean, variance=s.variance, weight=s.weight, bias=s.bias)


def _norm_call(s: BatchNorm):
    return lambda x, mean, variance, weight, bias: F.batch_norm(x, mean, variance, weight, bias, False, 0.1, s.eps)


def _norm_formula(s: BatchNorm):
    def f(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / (variance + s.eps).sqrt().view(shape) * weight.view(shape) + bias.view(shape)

    return f


def _frozen(step: BatchNorm) -> nn.Module:
    made = torchvision.ops.FrozenBatchNorm2d(len(step.mean), eps=step.eps)
    made.weight, made.bias = step.weight.clone(), step.bias.clone()
    made.running_mean, made.running_var = step.mean.clone(), step.variance.clone()
    return made


def _constant(f) -> Callable[[Constant], nn.Module]:
    return lambda s: Held(f, as_buffers=True, scale=s.scale.view(1, -1, 1, 1), shift=s.shift.view(1, -1, 1, 1))


def _avg_call(s: AvgPool):
    if s.kernel is None:
        return lambda x: F.adaptive_avg_pool2d(x, s.size)
    return lambda x: F.avg_pool2d(x, s.kernel, s.stride, s.padding, s.ceil, s.include_pad)


def _avg_module(s: AvgPool) -> nn.Module:
    if s.kernel is None:
        return nn.AdaptiveAvgPool2d(s.size)
    return nn.AvgPool2d(s.kernel, s.stride, s.padding, s.ceil, s.include_pad)


def _max_module(s: MaxPool) -> nn.Module:
    return (
        nn.AdaptiveMaxPool2d(s.size)
        if s.kernel is None
        else nn.MaxPool2d(s.kernel, s.stride, s.padding, ceil_mode=s.ceil)
    )


def _max_call(s: MaxPool):
    if s.kernel is None:
        return lambda x: F.adaptive_max_pool2d(x, s.size)
    return lambda x: F.max_pool2d(x, s.kernel, s.stride, s.padding, ceil_mode=s.ceil)


def is_global(step: AvgPool | MaxPool) -> bool:
    return step.kernel is None and step.size == (1, 1)


def _plain(f):
    return lambda s: f


USUAL: dict[type[Step], dict[str, Entry]] = {
    Conv: {
        "module": (always, convolution),
        **WEIGHTED,
        "pads by itself": (is_simple, lambda s: convolution(s, PaddingConv)),
        "linear over channels": (is_pointwise, pointwise),
    },
    Linear: {"module": (always, dense), **WEIGHTED},
    BatchNorm: {
        "module": (always, batch_norm),
        "F.batch_norm": (always, _held_norm(_norm_call)),
        "sync": (always, lambda s: batch_norm(s, nn.SyncBatchNorm)),
        "no momentum": (always, lambda s: batch_norm(s, momentum=None)),
        "frozen": (always, _frozen),
    },
    Constant: {
        "x * scale + shift": (always, _constant(lambda x, scale, shift: x * scale + shift)),
        "shift + scale * x": (always, _constant(lambda x, scale, shift: shift + scale * x)),
        "addition in place": (always, _constant(lambda x, scale, shift: x.mul(scale).add_(shift))),
        "mean and deviation": (always, _constant(lambda x, scale, shift: (x - -shift / scale) / (1 / scale))),
    },
    AvgPool: {
        "module": (always, _avg_module),
        "functional": (always, _avg_call),
        "mean": (is_global, _plain(lambda x: x.mean((2, 3), keepdim=True))),
        "sum": (is_global, _plain(lambda x: x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]))),
    },
    MaxPool: {"module": (always, _max_module), "functional": (always, _max_call)},
    PowerPool: {"module": (always, lambda s: nn.LPPool2d(2, s.kernel))},
    Upsample: {
        "module": (always, lambda s: nn.Upsample(scale_factor=2, mode=s.mode)),
        "functional": (always, lambda s: lambda x: F.interpolate(x, scale_factor=2, mode=s.mode)),
    },
}
ODD: dict[type[Step], dict[str, Entry]] = {
    Conv: {
        "unfold": (is_simple_and_ungrouped := lambda s: is_simple(s) and s.groups == 1, unfolded),
        "einsum": (is_pointwise, summed),
        "scripted": (is_simple_and_ungrouped, lambda s: torch.jit.script(convolution(s))),
    },
    Linear: {
        "matmul": (
            always,
            lambda s: Held(
                lambda x, weight, bias=None: x @ weight.T if bias is None else x @ weight.T + bias,
                weight=s.weight,
                bias=s.bias,
            ),
        ),
        "scripted": (always, lambda s: torch.jit.script(dense(s))),
    },
    BatchNorm: {
        "formula": (always, _held_norm(_norm_formula)),
        "instance norm": (always, lambda s: batch_norm(s, nn.InstanceNorm2d, track_running_stats=True)),
        "scripted": (always, lambda s: torch.jit.script(batch_norm(s))),
    },
    Constant: {
        "addcmul": (always, _constant(lambda x, scale, shift: torch.addcmul(shift, x, scale))),
        "in place": (always, _constant(lambda x, scale, shift: x.mul_(scale).add_(shift))),
        "on a slice": (always, _constant(lambda x, scale, shift: _on_slices(x, scale, shift))),
    },
    AvgPool: {
        "mean of means": (is_global, _plain(lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True))),
        "einsum": (is_global, _plain(lambda x: torch.einsum("bchw->bc", x)[..., None, None] / x[0, 0].numel())),
    },
    MaxPool: {
        "amax": (is_global, _plain(lambda x: x.amax((2, 3), keepdim=True))),
        "max of flat": (is_global, _plain(lambda x: x.flatten(2).max(2).values[..., None, None])),
        "with indices": (
            lambda s: s.kernel is not None,
            lambda s: Applied(
                lambda x: F.max_pool2d(x, s.kernel, s.stride, s.padding, 1, s.ceil, return_indices=True)[0]
            ),
        ),
    },
    PowerPool: {"functional": (always, lambda s: lambda x: F.lp_pool2d(x, 2.0, s.kernel))},
    Upsample: {},
}


def _on_slices(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = x * scale
    y[:, :1] += shift[:, :1]
    y[:, 1:].add_(shift[:, 1:])
    return y
