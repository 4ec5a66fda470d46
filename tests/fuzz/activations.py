"""How people write activation functions: name of the function -> spelling -> a maker of the callable.

A maker gets the step and returns a module or a plain function. `USUAL` spellings are those that no method may refuse
for being written so; the rest may be refused by methods with rules of their own. In-place spellings need a tensor that
nobody else holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.steps import Act

Maker = Callable[[Act], Callable[[Tensor], Tensor]]


class Applied(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Swish(torch.autograd.Function):
    """Memory-efficient SiLU, as in many EfficientNets."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, signal: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return signal * (s * (1 + x * (1 - s)))


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, signal: Tensor) -> Tensor:
        return signal * (ctx.saved_tensors[0] > 0)


@torch.jit.script
def _scripted_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@torch.jit.script
def _scripted_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.jit.script
def _scripted_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951))


class MyReLU(nn.ReLU):
    """A subclass as users write it."""


def _masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0
    return y


def _filled(x: Tensor) -> Tensor:
    return x.masked_fill(x < 0, 0.0)


def _maxout_leaky(x: Tensor) -> Tensor:
    return torch.maximum(x, 0.1 * x)


def _h_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def function(f: Callable[[Tensor], Tensor]) -> Maker:
    return lambda step: f


def module(kind: Callable[..., nn.Module], *args, **kwargs) -> Maker:
    return lambda step: kind(*args, **kwargs)


IN_PLACE = {"inplace", "relu_", "F.relu_", "clamp_", "F.inplace", "x.relu_", "silu_", "leaky_", "elu_", "tanh_"}

USUAL: dict[str, dict[str, Maker]] = {
    "relu": {
        "module": module(nn.ReLU),
        "inplace": module(nn.ReLU, inplace=True),
        "F.relu": function(F.relu),
        "F.inplace": function(lambda x: F.relu(x, inplace=True)),
        "F.relu_": function(F.relu_),
        "torch.relu": function(torch.relu),
        "relu_": function(torch.relu_),
        "x.relu": function(lambda x: x.relu()),
        "x.relu_": function(lambda x: x.relu_()),
        "subclass": module(MyReLU),
        "in a module": lambda step: Applied(F.relu),
        "in a sequential": lambda step: nn.Sequential(nn.ReLU()),
    },
    "relu6": {
        "module": module(nn.ReLU6),
        "inplace": module(nn.ReLU6, inplace=True),
        "F.relu6": function(F.relu6),
        "F.hardtanh": function(lambda x: F.hardtanh(x, 0.0, 6.0)),
    },
    "capped": {
        "module": module(nn.Hardtanh, 0.0, 1.5),
        "F.hardtanh": function(lambda x: F.hardtanh(x, 0.0, 1.5)),
        "keywords": function(lambda x: F.hardtanh(x, min_val=0.0, max_val=1.5)),
    },
    "hardtanh": {"module": module(nn.Hardtanh), "F.hardtanh": function(F.hardtanh)},
    "leaky_relu": {
        "module": module(nn.LeakyReLU, 0.1),
        "inplace": module(nn.LeakyReLU, 0.1, inplace=True),
        "F.leaky_relu": function(lambda x: F.leaky_relu(x, 0.1)),
        "leaky_": function(lambda x: F.leaky_relu_(x, 0.1)),
    },
    "elu": {"module": module(nn.ELU), "F.elu": function(F.elu), "elu_": function(lambda x: F.elu(x, inplace=True))},
    "selu": {"module": module(nn.SELU), "F.selu": function(F.selu)},
    "celu": {"module": module(nn.CELU), "F.celu": function(F.celu)},
    "silu": {
        "module": module(nn.SiLU),
        "F.silu": function(F.silu),
        "inplace": module(nn.SiLU, inplace=True),
        "silu_": function(lambda x: F.silu(x, inplace=True)),
    },
    "gelu": {"module": module(nn.GELU), "F.gelu": function(F.gelu)},
    "gelu_tanh": {"module": module(nn.GELU, approximate="tanh")},
    "softplus": {"module": module(nn.Softplus), "F.softplus": function(F.softplus)},
    "hardswish": {"module": module(nn.Hardswish), "F.hardswish": function(F.hardswish)},
    "mish": {"module": module(nn.Mish), "F.mish": function(F.mish)},
    "tanh": {
        "module": module(nn.Tanh),
        "torch.tanh": function(torch.tanh),
        "x.tanh": function(lambda x: x.tanh()),
        "tanh_": function(lambda x: x.tanh_()),
    },
    "prelu": {"module": lambda step: _prelu(step)},
    "sigmoid": {"module": module(nn.Sigmoid), "torch.sigmoid": function(torch.sigmoid)},
    "hardshrink": {"module": module(nn.Hardshrink, 0.5)},
    "softshrink": {"module": module(nn.Softshrink, 0.3)},
    "tanhshrink": {"module": module(nn.Tanhshrink)},
    "softsign": {"module": module(nn.Softsign)},
    "logsigmoid": {"module": module(nn.LogSigmoid)},
    "abs": {"x.abs": function(torch.abs)},
    "sine": {"torch.sin": function(torch.sin)},
}

ODD: dict[str, dict[str, Maker]] = {
    "relu": {
        "clamp": function(lambda x: x.clamp(min=0)),
        "clamp positional": function(lambda x: torch.clamp(x, 0)),
        "clamp_": function(lambda x: x.clamp_(min=0)),
        "clamp_min": function(lambda x: x.clamp_min(0)),
        "clip": function(lambda x: torch.clip(x, min=0.0)),
        "maximum": function(lambda x: torch.maximum(x, torch.zeros_like(x))),
        "maximum, zero first": function(lambda x: torch.maximum(x.new_zeros(()), x)),
        "max of two": function(lambda x: torch.max(x, x.new_zeros(()))),
        "fmax": function(lambda x: torch.fmax(x, x.new_zeros(()))),
        "where": function(lambda x: torch.where(x > 0, x, 0.0)),
        "where, inverted": function(lambda x: torch.where(x <= 0, torch.zeros_like(x), x)),
        "times mask": function(lambda x: x * (x > 0)),
        "times float mask": function(lambda x: x * (x > 0).to(x.dtype)),
        "times detached mask": function(lambda x: x * (x.detach() > 0).to(x.dtype)),
        "times heaviside": function(lambda x: x * torch.heaviside(x.detach(), x.new_zeros(()))),
        "times sign": function(lambda x: x * (0.5 + 0.5 * x.sign())),
        "masked_fill": function(_filled),
        "masked assignment": function(_masked),
        "half of the sum with abs": function(lambda x: (x + x.abs()) / 2),
        "minus minimum": function(lambda x: x - torch.minimum(x, torch.zeros_like(x))),
        "nn.Threshold": module(nn.Threshold, 0.0, 0.0),
        "F.threshold": function(lambda x: F.threshold(x, 0.0, 0.0)),
        "leaky of 0": module(nn.LeakyReLU, 0.0),
        "hardtanh to infinity": module(nn.Hardtanh, 0.0, math.inf),
        "wide hardtanh": function(lambda x: F.hardtanh(x, 0.0, 1e9)),
        "custom": function(_Rectified.apply),
        "scripted": function(_scripted_relu),
        "scripted module": lambda step: torch.jit.script(nn.ReLU()),
        "aten": function(lambda x: torch.ops.aten.relu(x)),
        "stacked maximum": function(lambda x: torch.stack([x, torch.zeros_like(x)]).amax(0)),
        "minus relu of minus": function(lambda x: x + F.relu(-x)),
        "negated clamp": function(lambda x: -((-x).clamp(max=0))),
    },
    "relu6": {
        "clamp": function(lambda x: x.clamp(0, 6)),
        "two rectifiers": function(lambda x: 6 - F.relu(6 - F.relu(x))),
        "minimum": function(lambda x: torch.minimum(F.relu(x), x.new_tensor(6.0))),
    },
    "capped": {"clamp": function(lambda x: x.clamp(0, 1.5)), "minimum": function(lambda x: F.relu(x).clamp(max=1.5))},
    "hardtanh": {"clamp": function(lambda x: x.clamp(-1, 1)), "clamp_": function(lambda x: x.clamp_(-1, 1))},
    "leaky_relu": {
        "maximum": function(_maxout_leaky),
        "where": function(lambda x: torch.where(x > 0, x, 0.1 * x)),
        "two rectifiers": function(lambda x: F.relu(x) - 0.1 * F.relu(-x)),
        "prelu": function(lambda x: F.prelu(x, x.new_tensor([0.1]))),
        "clamps": function(lambda x: x.clamp(min=0) + 0.1 * x.clamp(max=0)),
        "rrelu": function(lambda x: F.rrelu(x, 0.1, 0.1)),
    },
    "elu": {"where": function(lambda x: torch.where(x > 0, x, torch.expm1(x.clamp(max=0))))},
    "silu": {
        "x * sigmoid": function(lambda x: x * torch.sigmoid(x)),
        "x.mul(sigmoid)": function(lambda x: x.mul(x.sigmoid())),
        "sigmoid first": function(lambda x: torch.sigmoid(x) * x),
        "custom": function(_Swish.apply),
        "scripted": function(_scripted_silu),
        "quotient": function(lambda x: x / (1 + torch.exp(-x))),
    },
    "gelu": {
        "erf": function(lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        "scripted": function(_scripted_gelu),
    },
    "softplus": {
        "logaddexp": function(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
        "log1p": function(lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))),
    },
    "hardswish": {"x * relu6": function(_h_swish), "x * hardsigmoid": function(lambda x: x * F.hardsigmoid(x))},
    "mish": {"x * tanh(softplus)": function(lambda x: x * torch.tanh(F.softplus(x)))},
    "tanh": {"of sigmoid": function(lambda x: 2 * torch.sigmoid(2 * x) - 1)},
    "prelu": {"two rectifiers": lambda step: _OwnPReLU(step)},
    "hardshrink": {"F.hardshrink": function(lambda x: F.hardshrink(x, 0.5))},
    "tanhshrink": {"formula": function(lambda x: x - torch.tanh(x))},
    "softsign": {"formula": function(lambda x: x / (1 + x.abs()))},
    "sigmoid": {"formula": function(lambda x: 1 / (1 + torch.exp(-x)))},
    "abs": {"maximum": function(lambda x: torch.maximum(x, -x)), "root": function(lambda x: x.square().sqrt())},
}


def _prelu(step: Act) -> nn.PReLU:
    made = nn.PReLU(len(step.weight))
    made.weight.data = step.weight.clone()
    return made


class _OwnPReLU(nn.Module):
    def __init__(self, step: Act):
        super().__init__()
        self.weight = nn.Parameter(step.weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        slope = self.weight.view(1, -1, *[1] * (x.ndim - 2))
        return F.relu(x) - slope * F.relu(-x)
