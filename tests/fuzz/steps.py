"""Steps of which random networks consist: numbers in float64, and how a reading (`algebra`) runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.algebra import ACTIVATIONS, Activation


@dataclass(eq=False)
class Step:
    """One step. `spelling` is how `spelling` writes it in torch."""

    spelling: str = field(default="module", kw_only=True)

    def run(self, ops, x):
        raise NotImplementedError

    def tensors(self) -> list[str]:
        """Names of the fields that are its weights."""
        return [name for name, value in vars(self).items() if isinstance(value, Tensor)]

    def children(self) -> list[Step]:
        found = []
        for value in vars(self).values():
            found += [value] if isinstance(value, Step) else []
            found += [v for v in value if isinstance(v, Step)] if isinstance(value, list) else []
        return found

    def everything(self) -> list[Step]:
        return [self, *(below for child in self.children() for below in child.everything())]


def run_all(steps: list[Step], ops, x):
    for step in steps:
        x = step.run(ops, x)
    return x


@dataclass(eq=False)
class Conv(Step):
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    is_transposed: bool = False

    def run(self, ops, x):
        padding = self.padding
        if self.mode != "zeros":
            around = (padding[1], padding[1], padding[0], padding[0])
            x = ops.copy(lambda v: F.pad(v, around, mode=self.mode), x)
            padding = (0, 0)
        return ops.linear(x, self.weight, self.bias, lambda v, w: self.apply(v, w, padding))

    def apply(self, x: Tensor, weight: Tensor, padding) -> Tensor:
        if self.is_transposed:
            return F.conv_transpose2d(x, weight, None, self.stride, padding, 0, self.groups, self.dilation)
        return F.conv2d(x, weight, None, self.stride, padding, self.dilation, self.groups)


@dataclass(eq=False)
class Linear(Step):
    weight: Tensor
    bias: Tensor | None

    def run(self, ops, x):
        return ops.linear(x, self.weight, self.bias, lambda v, w: F.linear(v, w))


@dataclass(eq=False)
class Act(Step):
    name: str
    weight: Tensor | None = None  # of a PReLU

    def run(self, ops, x):
        return ops.activation(x, self.activation())

    def activation(self) -> Activation:
        if self.name == "prelu":
            return Activation("prelu", lambda x: F.prelu(x, self.weight))
        return ACTIVATIONS[self.name]


@dataclass(eq=False)
class MaxPool(Step):
    kernel: int | None  # None: adaptive
    stride: int = 1
    padding: int = 0
    ceil: bool = False
    size: tuple[int, int] = (1, 1)  # of an adaptive pool

    def run(self, ops, x):
        return ops.max_pool(x, self.pool)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kernel is None:
            return F.adaptive_max_pool2d(x, self.size, return_indices=True)
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, 1, self.ceil, return_indices=True)


@dataclass(eq=False)
class AvgPool(Step):
    kernel: int | None  # None: adaptive
    stride: int = 1
    padding: int = 0
    ceil: bool = False
    include_pad: bool = True
    size: tuple[int, int] = (1, 1)

    def run(self, ops, x):
        return ops.average(x, self.pool)

    def pool(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return F.adaptive_avg_pool2d(x, self.size)
        return F.avg_pool2d(x, self.kernel, self.stride, self.padding, self.ceil, self.include_pad)


@dataclass(eq=False)
class PowerPool(Step):
    """LPPool: the root of the sum of squares."""

    kernel: int = 2

    def run(self, ops, x):
        return ops.opaque(x, lambda v: F.lp_pool2d(v, 2.0, self.kernel), "power")


@dataclass(eq=False)
class BatchNorm(Step):
    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5

    def run(self, ops, x):
        return ops.norm(x, *self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        scale = self.weight / (self.variance + self.eps).sqrt()
        return scale, self.bias - self.mean * scale


@dataclass(eq=False)
class Constant(Step):
    scale: Tensor
    shift: Tensor

    def run(self, ops, x):
        return ops.constant(x, self.scale, self.shift)


@dataclass(eq=False)
class ImageNorm(Step):
    """Norms by what the image itself gives. "batch": by the batch's statistics, in evaluation mode too; the right map
    of an image is that of the image alone."""

    kind: str
    weight: Tensor
    bias: Tensor
    groups: int = 1

    def run(self, ops, x):
        return ops.opaque(x, self.normed, "norm")

    def normed(self, x: Tensor) -> Tensor:
        if self.kind == "response":
            return F.local_response_norm(x, 3, 0.5, 0.75, 1.0)
        if self.kind == "rms":
            return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * self.weight.view(1, -1, 1, 1)
        axes = {"group": None, "layer": (1, 2, 3), "layer2d": (1,), "instance": (2, 3), "batch": (2, 3)}[self.kind]
        if axes is None:
            split = x.reshape(len(x), self.groups, -1)
            mean, var = split.mean(2, keepdim=True), split.var(2, unbiased=False, keepdim=True)
            y = ((split - mean) / (var + 1e-5).sqrt()).view_as(x)
        else:
            y = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
        if self.kind == "layer":  # weights [C, h, w]
            return y * self.weight + self.bias
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@dataclass(eq=False)
class Copy(Step):
    """Values that only move: `function` names one of `COPIES`."""

    function: str
    of_one_pixel: bool = False

    def run(self, ops, x):
        return ops.copy(COPIES[self.function], x)


COPIES: dict[str, Callable[..., Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "round_trip": lambda x: x.clone(),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "zero_pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "crop": lambda x: x[:, :, 1:, :-1],
    "shuffle": lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "dropout": lambda x: x.clone(),
}


@dataclass(eq=False)
class Upsample(Step):
    mode: str = "nearest"

    def run(self, ops, x):
        align = None if self.mode == "nearest" else False
        return ops.interpolated(x, lambda v: F.interpolate(v, scale_factor=2.0, mode=self.mode, align_corners=align))


@dataclass(eq=False)
class Residual(Step):
    body: list[Step]
    shortcut: list[Step]
    is_detached: bool = False

    def run(self, ops, x):
        y = run_all(self.body, ops, x)
        return ops.add(run_all(self.shortcut, ops, x), ops.detached(y) if self.is_detached else y)


@dataclass(eq=False)
class Concat(Step):
    body: list[Step]
    with_input: bool = True
    other: list[Step] = field(default_factory=list)

    def run(self, ops, x):
        first = x if self.with_input else run_all(self.other, ops, x)
        return ops.copy(lambda a, b: torch.cat([a, b], 1), first, run_all(self.body, ops, x))


@dataclass(eq=False)
class Gate(Step):
    """Squeeze-and-excitation ("sigmoid", "hardsigmoid"), or a product with a branch's tanh."""

    body: list[Step]
    kind: str = "sigmoid"

    def run(self, ops, x):
        if self.kind == "tanh":
            return ops.opaque(x, self.product, "product")
        function = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}[self.kind]
        return ops.gate(x, ops.sigmoid(run_all(self.body, ops, x), function))

    def product(self, x: Tensor) -> Tensor:
        from fuzz.algebra import Plain

        return x * torch.tanh(run_all(self.body, Plain(), x))


@dataclass(eq=False)
class GLU(Step):
    def run(self, ops, x):
        first, second = (ops.copy(lambda v, n=n: v.chunk(2, 1)[n], x) for n in (0, 1))
        return ops.gate(first, ops.sigmoid(second, torch.sigmoid))


@dataclass(eq=False)
class Attention(Step):
    """Self-attention over positions, with the identity beside it: projections [C, C], one or two heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    heads: int = 1

    def run(self, ops, x):
        return ops.opaque(x, self.attended, "attention")

    def attended(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).mT
        q, k, v = (
            F.linear(tokens, m).view(b, h * w, self.heads, -1).transpose(1, 2)
            for m in (self.query, self.key, self.value)
        )
        mixed = ((q @ k.mT) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return x + F.linear(mixed.transpose(1, 2).reshape(b, h * w, c), self.out).mT.reshape(b, c, h, w)


@dataclass(eq=False)
class Encoding(Step):
    """Grey images to a `Classifier`'s channels: an affine map per channel, of which relevance starts behind."""

    name: str
    scale: Tensor
    shift: Tensor

    def run(self, ops, x):
        return ops.constant(ops.copy(lambda v: v.repeat(1, len(self.scale), 1, 1), x), self.scale, self.shift)


@dataclass
class Plan:
    """A network: its steps, what it puts out, and how it is written and handed over."""

    seed: int
    images: Tensor  # float64
    steps: list[Step] = field(default_factory=list)
    encoding: Encoding | None = None
    outputs: int = 1
    logit_bias: float = 0.0
    features: set[str] = field(default_factory=set)

    def forward(self, ops, images):
        """Logits [B, L] under a reading, from images."""
        return self.classify(ops, self.encode(ops, images))

    def encode(self, ops, images):
        return images if self.encoding is None else self.encoding.run(ops, images)

    def classify(self, ops, encoded):
        return run_all(self.steps, ops, encoded)

    def everything(self) -> list[Step]:
        return [below for step in self.steps for below in step.everything()]
