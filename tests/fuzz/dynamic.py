"""B-cos networks: layers whose weights depend on the image, drawn, read and written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.algebra import Plain
from fuzz.steps import AvgPool, Copy, Plan, Step


class Dynamic(Plain):
    """Explanation mode: what the weights depend on the image by is a constant."""

    def dynamic(self, x: Tensor, linear, scale) -> Tensor:
        y = linear(x)
        return y * scale(x, y).detach()


@dataclass(eq=False)
class BcosConv(Step):
    """|cos|^(b - 1) times the response to unit weights, the largest of `units` responses each."""

    weight: Tensor
    stride: int = 1
    padding: int = 0
    groups: int = 1
    b: float = 2.0
    units: int = 1

    def run(self, ops, x):
        if self.b == 1 and self.units == 1:
            return ops.linear(x, self.unit_weight(), None, self.convolved)
        return ops.dynamic(x, self.response, self.scale)

    def unit_weight(self) -> Tensor:
        return self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)

    def response(self, x: Tensor) -> Tensor:
        y = self.convolved(x, self.unit_weight())
        return y.unflatten(1, (-1, self.units)).amax(2) if self.units > 1 else y

    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        if self.b == 1:
            return torch.ones_like(y)
        ones = torch.ones_like(self.weight[: self.groups])
        squares = F.conv2d(x.square(), ones, None, self.stride, self.padding, 1, self.groups)
        norm = (squares + 1e-6).sqrt().repeat_interleave(y.shape[1] // self.groups, 1)
        if self.b == 2:
            return y.abs() / norm
        return ((y / norm).abs() + 1e-6) ** (self.b - 1)


@dataclass(eq=False)
class BcosNorm(Step):
    variance: Tensor
    weight: Tensor

    def run(self, ops, x):
        scale = self.weight / (self.variance + 1e-5).sqrt()
        return ops.constant(x, scale, torch.zeros_like(scale))


@dataclass(eq=False)
class LogitBias(Step):
    value: float

    def run(self, ops, x):
        return ops.constant(x, torch.ones(x.shape[1], dtype=x.dtype), torch.full((x.shape[1],), self.value).to(x.dtype))


def draw_steps(draw, x: Tensor, plan: Plan) -> list[Step]:
    """The network's steps from what comes in."""
    steps: list[Step] = []

    def add(step: Step) -> None:
        nonlocal x
        x = step.run(Plain(), x)
        steps.append(step)

    for _ in range(draw.between(1, 3)):
        into = x.shape[1]
        groups = draw.pick([g for g in (1, 1, 2) if into % g == 0])
        out, units = groups * draw.between(2, 4), draw.pick((1, 1, 2))
        weight = draw.normal(out * units, into // groups, 3, 3)
        b = draw.pick((2.0, 2.0, 1.0, 1.5))
        add(BcosConv(weight, draw.pick((1, 1, 2)), 1, groups, b, units))
        if draw.chance(0.6):
            c = x.shape[1]
            add(BcosNorm(x.var((0, 2, 3), unbiased=False).clamp(min=1e-3), draw.uniform(0.5, 1.5, c)))
        if min(x.shape[2:]) > 5 and draw.chance(0.3):
            add(AvgPool(3, 2, 1))
    add(BcosConv(draw.normal(plan.outputs, x.shape[1], 1, 1)))
    add(AvgPool(None))
    add(Copy("flatten", of_one_pixel=True))
    if draw.chance(0.5):
        plan.logit_bias = draw.pick((-6.5, 1.25))
        add(LogitBias(plan.logit_bias))
    return steps


def written(step: Step, faster: bool) -> nn.Module:
    """As the package `bcos` writes it; `faster`: by the kit's own layers."""
    from bcos.modules import BcosConv2d, LogitLayer
    from bcos.modules.norms import NoBias
    from bcos.modules.norms.uncentered_norms import BatchNormUncentered2d

    from cxrkit.models.bcos_layers import TrainableBatchNorm, TrainableBcosConv2d

    if isinstance(step, LogitBias):
        return LogitLayer(logit_bias=step.value)
    if isinstance(step, BcosNorm):
        kind = TrainableBatchNorm if faster else NoBias(BatchNormUncentered2d)
        made = kind(len(step.weight))
        made.weight.data, made.running_var.data = step.weight.clone(), step.variance.clone()
        return made
    kind = TrainableBcosConv2d if faster else BcosConv2d
    size, into = tuple(step.weight.shape[2:]), step.weight.shape[1] * step.groups
    made = kind(
        into,
        len(step.weight) // step.units,
        size,
        step.stride,
        step.padding,
        1,
        step.groups,
        b=step.b,
        max_out=step.units,
    )
    made.linear.weight.data = step.weight.clone()
    return made
