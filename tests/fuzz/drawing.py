"""Random networks: steps with numbers such that signals neither vanish nor explode, from a seed alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuzz import dynamic
from fuzz.algebra import ACTIVATIONS, Plain
from fuzz.steps import (
    GLU,
    Act,
    Attention,
    AvgPool,
    BatchNorm,
    Concat,
    Constant,
    Conv,
    Copy,
    Encoding,
    Gate,
    ImageNorm,
    Linear,
    MaxPool,
    Plan,
    PowerPool,
    Residual,
    Step,
    Upsample,
    run_all,
)

RECTIFIERS = ("relu", "relu", "relu", "relu6", "capped")
CURVES = (*(name for name in ACTIVATIONS if name not in RECTIFIERS), "prelu", "prelu")
NORMS = ("group", "layer", "layer2d", "instance", "response", "rms", "batch")
_LARGEST = 24  # pixels a side


class Draw:
    """Random choices of one seed."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, options, weights=None):
        p = None if weights is None else np.array(weights) / np.sum(weights)
        return options[int(self.rng.choice(len(options), p=p))]

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(self.rng.normal(0, scale, shape))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.uniform(low, high, shape))


def draw_plan(seed: int) -> Plan:
    """The network of that seed."""
    draw = Draw(seed, 0)
    is_dynamic = draw.chance(0.05)
    encoding = _encoding(draw, is_dynamic) if draw.chance(0.5 if is_dynamic else 0.07) else None
    channels = 1 if encoding else 6 if is_dynamic else draw.between(1, 3)
    rows, columns = draw.between(8, 20), draw.between(8, 20)
    plan = Plan(seed, draw.uniform(0.05, 0.95, draw.between(1, 3), channels, rows, columns), encoding=encoding)
    plan.outputs = draw.pick((1, 2, 3, 4))
    if is_dynamic:
        plan.features.add("B-cos")
        plan.steps = dynamic.draw_steps(draw, plan.encode(Plain(), plan.images), plan)
        return plan
    theme = draw.pick(("rectified", "curved", "normed", "gated", "mixed"), (45, 18, 13, 14, 10))
    plan.features.add(theme)
    trunk = _Trunk(draw, plan.encode(Plain(), plan.images), theme)
    if draw.chance(0.12):
        trunk.input_norm()
    for _ in range(draw.between(1, 4)):
        trunk.block()
    trunk.head(plan.outputs)
    plan.steps = trunk.steps
    return plan


def _encoding(draw: Draw, is_dynamic: bool) -> Encoding:
    from cxrkit.models.classifier import ENCODINGS

    name = "add_inverse" if is_dynamic else draw.pick(("imagenet", "grey", "symmetric", "lite"))
    scale, offset = (torch.tensor(values, dtype=torch.float32).double() for values in ENCODINGS[name])
    return Encoding(name, scale, offset)


class _Trunk:
    """Steps drawn one after the other, each with the values that come in at hand."""

    def __init__(self, draw: Draw, x: Tensor, theme: str):
        self.draw, self.x, self.theme, self.steps = draw, x, theme, []
        self.name = draw.pick(RECTIFIERS if theme in ("rectified", "normed", "gated") else CURVES)
        self.act_once = Act(self.name) if self.name != "prelu" and draw.chance(0.25) else None

    def add(self, step: Step) -> None:
        self.x = step.run(Plain(), self.x)
        self.steps.append(step)

    def branch(self, x: Tensor) -> _Trunk:
        other = _Trunk(self.draw, x, self.theme)
        other.name, other.act_once = self.name, self.act_once
        return other

    def input_norm(self) -> None:
        c = self.x.shape[1]
        scale = self.draw.uniform(1, 3, c)
        self.add(Constant(scale, -0.5 * scale))

    def block(self) -> None:
        draw = self.draw
        if draw.chance(0.1) and self.x.shape[1] > 1 and self.steps:  # as in DenseNet: norm and activation first
            self.norm()
            self.activation()
            self.conv()
        else:
            self.conv()
            if draw.chance(0.5):
                self.norm()
            self.activation()
        for extra, p in (
            (self.residual, 0.22),
            (self.concat, 0.12),
            (self.gate, 0.5 if self.theme == "gated" else 0.04 if self.theme == "mixed" else 0.0),
            (self.attention, 0.12 if self.theme in ("gated", "mixed") else 0.0),
            (self.again, 0.08),
            (self.pool, 0.3),
            (self.moved, 0.12),
            (self.constant, 0.08),
        ):
            if draw.chance(p):
                extra()

    # Steps

    def conv(self, out: int | None = None, same_size: bool = False) -> None:
        draw, (c, h, w) = self.draw, self.x.shape[1:]
        out = out or draw.between(2, 8)
        groups = draw.pick([g for g in (1, 1, 1, 2, 3, c) if c % g == 0 and (out % g == 0 or g == c)])
        if out % groups:
            out = groups * draw.between(1, 2)
        kernel = 1 if min(h, w) < 4 else draw.pick((1, 3, 3, 3, 5 if min(h, w) > 7 else 3, 2))
        if same_size:
            kernel = 1 if min(h, w) < 4 else draw.pick((1, 3))
        reach = kernel // 2
        dilation = 2 if kernel == 3 and min(h, w) > 7 and draw.chance(0.15) else 1
        padding = reach * dilation if same_size or min(h, w) < 8 else draw.pick((0, reach, reach * dilation))
        mode = draw.pick(("zeros", "circular", "reflect", "replicate"), (8, 1, 1, 1)) if padding else "zeros"
        stride = 1 if same_size or min(h, w) < 8 else draw.pick((1, 1, 2))
        grows = not same_size and max(h, w) * 2 <= _LARGEST and draw.chance(0.08)
        if grows:
            groups, stride, padding, dilation, mode = 1, 2, min(padding, 1), 1, "zeros"
        shape = (c, out, kernel, kernel) if grows else (out, c // groups, kernel, kernel)
        bias = draw.normal(out, scale=0.2) if draw.chance(0.6) else None
        pair = lambda n: (n, n)  # noqa: E731
        step = Conv(
            draw.normal(*shape), bias, pair(stride), pair(padding), pair(dilation), groups, mode, is_transposed=grows
        )
        self.add(_scaled(step, self.x))

    def linear(self, out: int, bias: bool = True) -> None:
        weight = self.draw.normal(out, self.x.shape[1])
        self.add(_scaled(Linear(weight, self.draw.normal(out, scale=0.2) if bias else None), self.x))

    def norm(self) -> None:
        draw, (c, h, w) = self.draw, self.x.shape[1:]
        weight, bias = draw.uniform(0.5, 1.5, c), draw.normal(c, scale=0.3)
        if self.theme in ("normed", "mixed") and draw.chance(0.7):
            kind = draw.pick(NORMS, (4, 3, 3, 3, 2, 3, 1))
            if h * w == 1 and kind in ("instance", "batch"):
                kind = "group"
            if kind == "layer":
                weight, bias = draw.uniform(0.5, 1.5, c, h, w), draw.normal(c, h, w, scale=0.3)
            groups = draw.pick([g for g in (1, 2, c) if c % g == 0 and (c // g) * h * w > 1])
            self.add(ImageNorm(kind, weight, bias, groups))
            return
        mean = self.x.mean((0, 2, 3)) + draw.normal(c, scale=0.2)
        variance = self.x.var((0, 2, 3), unbiased=False).clamp(min=0.05) * draw.uniform(0.5, 1.5, c)
        self.add(BatchNorm(mean, variance, weight, bias))

    def activation(self) -> None:
        if self.theme == "mixed":
            self.name = self.draw.pick(("relu", *CURVES))
        if self.theme == "rectified" and self.draw.chance(0.1):
            self.name = self.draw.pick(RECTIFIERS)
        can_halve = self.name != "relu" and self.theme in ("curved", "mixed") and self.x.shape[1] % 2 == 0
        if can_halve and self.draw.chance(0.06):
            self.add(GLU())
            return
        if self.name == "prelu":
            self.add(Act("prelu", self.draw.uniform(0.05, 0.4, self.draw.pick((1, self.x.shape[1])))))
        elif self.act_once is not None and self.act_once.name == self.name:
            self.add(self.act_once)
        else:
            self.add(Act(self.name))

    def residual(self) -> None:
        draw, c = self.draw, self.x.shape[1]
        body, shortcut = self.branch(self.x), self.branch(self.x)
        body.conv(c, same_size=True)
        if body.x.shape != self.x.shape:  # groups changed the number of channels
            return
        if draw.chance(0.4):
            body.norm()
        if draw.chance(0.4):
            body.activation()
        if body.x.shape != self.x.shape:  # a GLU halved it
            return
        if draw.chance(0.3):
            shortcut.norm()
        detached = self.theme == "mixed" and draw.chance(0.1)
        self.add(Residual(body.steps, shortcut.steps, detached))
        if draw.chance(0.6):
            self.activation()

    def concat(self) -> None:
        body, other = self.branch(self.x), self.branch(self.x)
        body.conv(self.draw.between(1, 3), same_size=True)
        if self.draw.chance(0.5):
            body.activation()
        with_input = self.draw.chance(0.5)
        if not with_input:
            other.conv(self.draw.between(1, 3), same_size=True)
        self.add(Concat(body.steps, with_input, other.steps))

    def gate(self) -> None:
        draw, c = self.draw, self.x.shape[1]
        kind = draw.pick(("sigmoid", "hardsigmoid", "tanh"), (5, 2, 1))
        body = self.branch(self.x)
        body.add(AvgPool(None))
        if draw.chance(0.7):
            body.conv(draw.between(1, 4))
            body.activation()
        body.add(_scaled(Conv(draw.normal(c, body.x.shape[1], 1, 1), draw.normal(c, scale=0.3)), body.x))
        self.add(Gate(body.steps, kind))

    def attention(self) -> None:
        c = self.x.shape[1]
        heads = 2 if c % 2 == 0 and self.draw.chance(0.5) else 1
        if self.x.shape[2] * self.x.shape[3] <= 100:
            self.add(Attention(*(self.draw.normal(c, c, scale=c**-0.5) for _ in range(4)), heads=heads))

    def again(self) -> None:
        """A convolution of as many channels out as in, used twice."""
        self.conv(self.x.shape[1], same_size=True)
        step = self.steps[-1]
        if step.weight.shape[0] == step.weight.shape[1] * step.groups and not step.is_transposed:
            self.activation()
            if self.x.shape[1] == step.weight.shape[1] * step.groups:  # a GLU halves
                self.add(step)

    def pool(self) -> None:
        draw, (h, w) = self.draw, self.x.shape[2:]
        if min(h, w) < 4:
            return
        kind = draw.pick(("max", "avg", "power", "adaptive_max", "adaptive_avg", "up"), (6, 5, 1, 1, 2, 1))
        if kind == "power" and self.theme not in ("mixed", "normed"):
            kind = "avg"
        kernel = draw.pick((2, 2, 3))
        padding = draw.between(0, kernel // 2)
        stride, ceil = draw.pick((1, 2, 2)), draw.chance(0.3)
        size = draw.pick(((2, 2), (3, 3), (2, 3), (4, 4)))
        if kind == "up" and max(h, w) * 2 <= _LARGEST:
            self.add(Upsample(draw.pick(("nearest", "bilinear"))))
        elif kind == "power":
            self.add(PowerPool(2))
        elif kind == "max":
            self.add(MaxPool(kernel, stride, padding, ceil))
        elif kind == "adaptive_max":
            self.add(MaxPool(None, size=size))
        elif kind == "avg":
            self.add(AvgPool(kernel, stride, padding, ceil, draw.chance(0.6)))
        else:
            self.add(AvgPool(None, size=size))

    def moved(self) -> None:
        c, h, w = self.x.shape[1:]
        options = ["round_trip", "flip", "roll", "zero_pad", "dropout", "dropout", "dropout"]
        options += ["crop"] if min(h, w) > 4 else []
        options += ["shuffle"] if c % 2 == 0 else []
        options += ["unshuffle"] if h % 2 == 0 and w % 2 == 0 and c < 5 and min(h, w) > 4 else []
        self.add(Copy(self.draw.pick(options)))

    def constant(self) -> None:
        c = self.x.shape[1]
        self.add(Constant(self.draw.uniform(0.5, 2, c), self.draw.normal(c, scale=0.2)))

    def head(self, outputs: int) -> None:
        draw = self.draw
        kind = draw.pick(("mean", "max", "flat", "conv"), (5, 1, 3, 1))
        if kind == "conv":
            bias = draw.normal(outputs, scale=0.2) if draw.chance(0.5) else None
            self.add(_scaled(Conv(draw.normal(outputs, self.x.shape[1], 1, 1), bias), self.x))
            self.add(AvgPool(None))
            self.add(Copy("flatten", of_one_pixel=True))
            return
        if kind == "flat":
            if self.x.shape[2] * self.x.shape[3] > 30 or draw.chance(0.3):
                pool = draw.pick((AvgPool, MaxPool))
                self.add(pool(None, size=draw.pick(((2, 2), (2, 3), (3, 1)))))
        else:
            self.add(AvgPool(None) if kind == "mean" else MaxPool(None))
        self.add(Copy("flatten", of_one_pixel=self.x.shape[2:] == (1, 1)))
        if draw.chance(0.15):
            self.add(Copy("dropout"))
        if draw.chance(0.3):
            self.linear(draw.between(3, 8))
            self.activation()
        self.linear(outputs, draw.chance(0.8))


def _scaled(step: Conv | Linear, x: Tensor) -> Conv | Linear:
    """The layer with weights such that its values have a standard deviation of about 1 for the images at hand."""
    bias, step.bias = step.bias, None
    spread = run_all([step], Plain(), x).square().mean().sqrt()
    step.weight = step.weight / spread.clamp(min=1e-3)
    step.bias = bias
    return step
