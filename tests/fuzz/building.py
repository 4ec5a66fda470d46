"""A drawn network written in torch: one spelling per step, chosen at random."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fuzz import activations, branches, dynamic, layers, weights
from fuzz.algebra import Plain
from fuzz.branches import Branched, Row, SelfAttention
from fuzz.drawing import Draw
from fuzz.dynamic import BcosConv, BcosNorm, LogitBias
from fuzz.steps import (
    GLU,
    Act,
    Attention,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    Copy,
    Gate,
    ImageNorm,
    Linear,
    MaxPool,
    Plan,
    PowerPool,
    Residual,
    Step,
)
from fuzz.weights import Recomputed

# After these a tensor belongs to nobody else, so the next step may overwrite it.
_MAKES_NEW = (Conv, Linear, BatchNorm, ImageNorm, MaxPool, AvgPool, PowerPool)
_ROUNDS = {"mean and deviation", "adapter"}  # in half precision, by more than the plan knows


class Writer:
    """Writes steps; what was chosen is added to `features` of the plan, as "odd ..." where `USUAL` doesn't have it."""

    def __init__(self, plan: Plan, draw: Draw, dtype: torch.dtype, odd: float, can_view: bool):
        self.plan, self.draw, self.dtype, self.odd, self.can_view = plan, draw, dtype, odd, can_view
        self.written: dict[int, Callable[[Tensor], Tensor]] = {}
        self.changed: list[tuple[Step, nn.Module]] = []  # layers whose weight may be another than the step's

    def row(self, steps: list[Step], private: bool = False) -> nn.Module:
        """The steps one after the other; `private`: whether the first may overwrite its input."""
        parts = []
        for step in steps:
            parts.append(self.part(step, private))
            private = isinstance(step, _MAKES_NEW)
        are_modules = all(isinstance(part, nn.Module) for part in parts) and len({id(p) for p in parts}) == len(parts)
        if are_modules and self.draw.chance(0.5):
            return nn.Sequential(*parts)
        if len(parts) > 2 and self.draw.chance(0.06):
            start = self.draw.between(0, len(parts) - 2)
            reentrant = self.draw.chance(0.4)
            self.note("checkpointed rows", usual=True)
            parts[start : start + 2] = [Recomputed(Row(*parts[start : start + 2]), reentrant)]
        return Row(*parts)

    def part(self, step: Step, private: bool) -> Callable[[Tensor], Tensor]:
        if id(step) not in self.written:
            self.written[id(step)] = self.write(step, private)
        elif isinstance(self.written[id(step)], nn.Module):
            self.note("shared module", usual=True)
        return self.written[id(step)]

    def write(self, step: Step, private: bool) -> Callable[[Tensor], Tensor]:
        pick = self.draw.pick
        if isinstance(step, Act):
            return self.activation(step, private)
        if isinstance(step, Copy):
            usual, odd = (
                {n: e for n, e in table.get(step.function, {}).items() if self.fits(n, e, step)}
                for table in (branches.MOVES, branches.ODD_MOVES)
            )
            return self.choose(step.function, usual, odd)[1](step)
        if isinstance(step, ImageNorm):
            name = pick(list(branches.NORMS[step.kind]))
            self.note(f"{step.kind} norm: {name}", usual=name != "formula")
            return branches.NORMS[step.kind][name](step)
        if isinstance(step, Residual):
            return self.residual(step)
        if isinstance(step, Concat):
            join = self.choose("concatenation", branches.CONCATENATIONS, branches.ODD_CONCATENATIONS)
            other = nn.Identity() if step.with_input else self.row(step.other)
            return Branched(join, self.row(step.body), other)
        if isinstance(step, Gate):
            return Branched(self.choose("gate", branches.gate(step)), self.row(step.body))
        if isinstance(step, GLU):
            return self.choose("GLU", {}, branches.GLUS)()
        if isinstance(step, Attention):
            return SelfAttention(step, fused=self.draw.chance(0.5))
        if isinstance(step, (BcosConv, BcosNorm, LogitBias)):
            return dynamic.written(step, faster=pick((True, False)))
        return self.layer(step)

    def layer(self, step: Step) -> Callable[[Tensor], Tensor]:
        kind = type(step)
        usual, odd = ({n: e for n, e in t[kind].items() if self.fits(n, e, step)} for t in (layers.USUAL, layers.ODD))
        made = self.choose(kind.__name__, usual, odd, first=0.6)[1](step)
        if isinstance(step, (Conv, Linear)) and isinstance(made, nn.Module):
            self.changed.append((step, made))
        return made

    def fits(self, name: str, entry, step: Step) -> bool:
        if self.dtype in (torch.float16, torch.bfloat16) and name in _ROUNDS:
            return False
        return entry[0](step) and (self.can_view or name not in ("view", "view of the batch"))

    def activation(self, step: Act, private: bool) -> Callable[[Tensor], Tensor]:
        usual, odd = (
            {n: m for n, m in table.get(step.name, {}).items() if private or n not in activations.IN_PLACE}
            for table in (activations.USUAL, activations.ODD)
        )
        return self.choose(step.name, usual, odd)(step)

    def residual(self, step: Residual) -> nn.Module:
        if step.is_detached:
            join = self.choose("detached sum", {}, branches.DETACHED_SUMS)
        else:
            usual = dict(branches.SUMS)
            if not isinstance(step.body[-1], _MAKES_NEW):  # its values are needed for the gradient
                usual = {n: f for n, f in usual.items() if n in ("+", "torch.add")}
            join = self.choose("sum", usual, branches.ODD_SUMS)
        return Branched(join, self.row(step.body), self.row(step.shortcut) if step.shortcut else nn.Identity())

    def choose(self, what: str, usual: dict, odd: dict | None = None, first: float = 0.0):
        """One of the usual ways (with probability `first` the first) or, rarely, of the odd ones."""
        if odd and (not usual or self.draw.chance(self.odd)):
            name = self.draw.pick(list(odd))
            self.note(f"{what}: {name}", usual=False)
            return odd[name]
        name = next(iter(usual)) if self.draw.chance(first) else self.draw.pick(list(usual))
        self.note(f"{what}: {name}", usual=True)
        return usual[name]

    def note(self, feature: str, usual: bool) -> None:
        self.plan.features.add(feature if usual else f"odd {feature}")


def rounded(plan: Plan, dtype: torch.dtype) -> None:
    """Every number of the plan as the network's precision holds it."""
    for step in (*plan.everything(), *([plan.encoding] if plan.encoding else [])):
        for name in step.tensors():
            setattr(step, name, getattr(step, name).to(dtype).double())


def written(plan: Plan, draw: Draw, dtype: torch.dtype, odd: float) -> list[nn.Module]:
    """The network's steps in torch, in one or more rows to be run one after the other; the plan's weights become those
    that the network works with."""
    rounded(plan, dtype)
    features = set(plan.features)
    for can_view in (True, False):
        plan.features = set(features)
        writer = Writer(plan, draw, dtype, odd, can_view)
        rows = _rows(writer, plan, draw)
        encoded = plan.encode(Plain(), plan.images).to(dtype)
        if _runs(rows, encoded.contiguous(memory_format=torch.channels_last) if plan.encoding else encoded):
            break
    for step, made in writer.changed:
        weight = weights.effective_weight(made)
        if weight is not None:
            step.weight = weight.view(step.weight.shape)
    return rows


def _rows(writer: Writer, plan: Plan, draw: Draw) -> list[nn.Module]:
    cuts = sorted({0, len(plan.steps), *(draw.between(1, len(plan.steps)) for _ in range(draw.between(0, 2)))})
    rows = [writer.row(plan.steps[a:b]) for a, b in pairwise(cuts)]
    return [row.to(writer.dtype).eval() for row in rows]


@torch.no_grad()
def _runs(rows: list[nn.Module], images: Tensor) -> bool:
    """Whether no view is taken of values that don't lie one after the other."""
    x = images
    try:
        for row in rows:
            x = row(x)
    except RuntimeError as error:
        return "view size is not compatible" not in str(error)
    return True


def has_no_map(network: nn.Module) -> set[nn.Module]:
    """Layers that put out tensors of four dimensions which are no maps [B, C, h, w]."""
    found = set()
    for module in network.modules():
        if isinstance(module, SelfAttention):
            found.update(m for m in module.modules() if m is not module)
        elif isinstance(module, branches.LayerNorm2d):
            found.add(module.norm)
        elif type(module).__name__ == "Pointwise":
            found.add(module.inner)
        elif isinstance(module, parametrize.ParametrizationList):
            found.update(module.modules())
    return found
