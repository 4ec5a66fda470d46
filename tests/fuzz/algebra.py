"""Readings of a network's steps in float64: the values themselves, guided backpropagation, and DeepLIFT.

A reading is a set of primitives; a step calls them and nothing else. Gradients come from automatic differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


class NoRule(Exception):
    """The reading isn't defined for a step: a method of that kind has to refuse the network."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function; a rectifier passes what lies between the two ends of its `range` and nothing else."""

    name: str
    function: Callable[[Tensor], Tensor]
    range: tuple[float, float] | None = None
    passes_relevance: bool = True


class Plain:
    """What the network computes."""

    noise: Callable[[Tensor], Tensor] | None = None  # moves what layers put out, as rounding does

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        y = f(x, weight)
        y = y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))
        return y if self.noise is None else y + self.noise(y)

    def norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Batch norm with fixed statistics."""
        return self.constant(x, scale, shift)

    def constant(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Constants [C] multiplied and added, channel by channel."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * scale.view(shape) + shift.view(shape)

    def activation(self, x: Tensor, act: Activation) -> Tensor:
        return act.function(x)

    def max_pool(self, x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """`pool` gives values and, as flat positions, their places."""
        return pool(x)[0]

    def average(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x)

    def copy(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """Values moved, repeated, joined; zeros may be put in."""
        return f(*xs)

    def interpolated(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        return f(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def sigmoid(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A gate."""
        return function(x)

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate

    def opaque(self, x: Tensor, f: Callable[[Tensor], Tensor], kind: str) -> Tensor:
        """A function of all values of an image: "norm", "product", "attention" or "power"."""
        return f(x)

    def detached(self, x: Tensor) -> Tensor:
        return x.detach()

    def dynamic(self, x: Tensor, linear: Callable[[Tensor], Tensor], scale: Callable[[Tensor, Tensor], Tensor]):
        """A linear map of which `scale` depends on the image too."""
        y = linear(x)
        return y * scale(x, y)


class Guided(Plain):
    """Backward, rectifiers pass positive signals only; other activation functions have no such rule."""

    def __init__(self):
        self.rectified = 0

    def activation(self, x: Tensor, act: Activation) -> Tensor:
        if act.range is None:
            raise NoRule(f"guided backpropagation at {act.name}")
        self.rectified += 1
        return _Guided.apply(x, act.function(x.detach()), *act.range)

    def sigmoid(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        raise NoRule("guided backpropagation at a sigmoid")

    def opaque(self, x: Tensor, f: Callable[[Tensor], Tensor], kind: str) -> Tensor:
        if kind in ("attention", "product"):
            raise NoRule(f"guided backpropagation at {kind}")
        return f(x)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x > low) & (x < high))
        return y.clone()

    @staticmethod
    def backward(ctx, signal: Tensor):
        (passed,) = ctx.saved_tensors
        return torch.where(passed & (signal > 0), signal, 0.0), None, None, None


class Rescaled(Plain):
    """DeepLIFT's rescale rule. Images [2 B, ...]: the first half are explained, the second half their baselines."""

    def activation(self, x: Tensor, act: Activation) -> Tensor:
        return _Secant.apply(x, act.function)

    def max_pool(self, x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        return _Greater.apply(x, pool)

    def sigmoid(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return _Secant.apply(x, function)

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        raise NoRule("DeepLIFT at a product")

    def opaque(self, x: Tensor, f: Callable[[Tensor], Tensor], kind: str) -> Tensor:
        raise NoRule(f"DeepLIFT at {kind}")

    def detached(self, x: Tensor) -> Tensor:
        raise NoRule("DeepLIFT at a detached branch")

    def dynamic(self, x: Tensor, linear, scale) -> Tensor:
        raise NoRule("DeepLIFT at a B-cos layer")


class _Secant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function) -> Tensor:
        a, b = x.chunk(2)
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            y = function(leaf)
            (tangent,) = torch.autograd.grad(y.sum(), leaf)
        same = (a - b).abs() <= 1e-9 * (1 + a.abs())
        slope = torch.where(same, tangent, (function(a) - function(b)) / torch.where(same, 1.0, a - b))
        ctx.save_for_backward(slope)
        return function(x)

    @staticmethod
    def backward(ctx, signal: Tensor):
        (slope,) = ctx.saved_tensors
        explained = signal.chunk(2)[0] * slope
        return torch.cat([explained, torch.zeros_like(explained)]), None


class _Greater(torch.autograd.Function):
    """The difference of each window's maxima goes to the place of the greater of the two."""

    @staticmethod
    def forward(ctx, x: Tensor, pool) -> Tensor:
        y, place = pool(x)
        (ya, yb), (pa, pb) = y.flatten(2).chunk(2), place.flatten(2).chunk(2)
        place = torch.where(ya >= yb, pa, pb)
        a, b = x.flatten(2).chunk(2)
        step = a.gather(2, place) - b.gather(2, place)
        slope = torch.where(step == 0, 1.0, (ya - yb) / torch.where(step == 0, 1.0, step))
        ctx.save_for_backward(place, slope)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx, signal: Tensor):
        place, slope = ctx.saved_tensors
        full = signal.new_zeros(ctx.shape)
        half = len(full) // 2
        full[:half].view(half, full.shape[1], -1).scatter_add_(2, place, signal[:half].flatten(2) * slope)
        return full, None


@dataclass
class Kinds:
    """Which primitives a network uses: what `policy` goes by."""

    activations: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


class Listing(Plain):
    """Runs the network and lists what it is made of."""

    def __init__(self):
        self.kinds = Kinds()

    def activation(self, x: Tensor, act: Activation) -> Tensor:
        self.kinds.activations.add(act.name)
        return super().activation(x, act)

    def sigmoid(self, x: Tensor, function) -> Tensor:
        self.kinds.others.add("gate")
        return super().sigmoid(x, function)

    def opaque(self, x: Tensor, f, kind: str) -> Tensor:
        self.kinds.opaque.add(kind)
        return super().opaque(x, f, kind)

    def interpolated(self, x: Tensor, f) -> Tensor:
        self.kinds.others.add("interpolated")
        return super().interpolated(x, f)

    def detached(self, x: Tensor) -> Tensor:
        self.kinds.others.add("detached")
        return super().detached(x)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("relu", F.relu, (0, math.inf)),
        Activation("relu6", F.relu6, (0, 6)),
        Activation("capped", lambda x: F.hardtanh(x, 0.0, 1.5), (0, 1.5)),
        Activation("hardtanh", F.hardtanh),
        Activation("leaky_relu", lambda x: F.leaky_relu(x, 0.1)),
        Activation("elu", F.elu),
        Activation("selu", F.selu),
        Activation("celu", F.celu),
        Activation("silu", F.silu),
        Activation("gelu", F.gelu),
        Activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        Activation("softplus", F.softplus),
        Activation("hardswish", F.hardswish),
        Activation("mish", F.mish),
        Activation("tanh", torch.tanh),
        Activation("hardshrink", lambda x: F.hardshrink(x, 0.5)),
        Activation("softshrink", lambda x: F.softshrink(x, 0.3)),
        Activation("tanhshrink", F.tanhshrink),
        Activation("softsign", F.softsign),
        Activation("logsigmoid", F.logsigmoid),
        Activation("sigmoid", torch.sigmoid, passes_relevance=False),
        Activation("abs", torch.abs, passes_relevance=False),
        Activation("sine", torch.sin, passes_relevance=False),
    )
}
