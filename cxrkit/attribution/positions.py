"""Positions in the image that the values of a network come from, followed through one forward pass.

A value's position is its row and column in the image, between 0 and 1. Every operation that torch dispatches has a
rule: pointwise operations and normalizations keep positions, views and copies move them along with the values,
convolutions and pooling sample them, sums and products over a dimension average them, so that a value that sees the
whole image has none. Operations without a rule leave positions unknown. So a feature map is known by what made it, not
by its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from cxrkit.attribution.operations import tensors
from cxrkit.attribution.position_rules import NEAR, RESIZED, Call, Positions, add, rule_of

__all__ = ["Step", "Tracking", "why_no_map"]

_BEYOND = 0.3  # of the image: as far as a map may end before the image or reach beyond it, if not by one position


@dataclass(eq=False)
class Step:
    """One operation: what it used, what became of the positions."""

    index: int
    parents: tuple[Step, ...]
    kind: str
    shape: torch.Size
    positions: Positions
    stage: int = 0  # the last step in which values of different positions met


@dataclass
class _Origin:
    positions: Positions
    written: list[Step] = field(default_factory=list)  # by whom last: one list for all views of a storage


class Tracking(TorchDispatchMode):
    """Follow the positions of an image [1, C, H, W] through everything that is computed from it within the context."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the compiler takes seconds to load

    def __init__(self, image: Tensor):
        super().__init__()
        rows, columns = ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / n for n in image.shape[-2:])
        positions = [rows.view(1, 1, -1, 1)], [columns.view(1, 1, 1, -1)]
        self.start = Step(0, (), "image", image.shape, positions)
        self.steps = 1
        self._origins = WeakTensorKeyDictionary()
        self._origins[image] = _Origin(positions, [self.start])

    def step(self, tensor: Tensor) -> Step | None:
        """The operation that wrote the tensor's present values; None for a tensor that the image has no part in."""
        origin = self._origins.get(tensor)
        return origin and origin.written[0]

    def positions(self, tensor: Tensor) -> Positions:
        return self._origins[tensor].positions

    def pooled(self, x: Tensor, output: Tensor) -> None:
        """Note that the output is `x` at a lower resolution, whatever computed it."""
        if x in self._origins and output in self._origins and self.positions(x) is not None:
            function = torch.ops.aten._adaptive_avg_pool2d.default
            call = Call("_adaptive_avg_pool2d", function, (x, output.shape[-2:]), {}, [x], self.positions)
            self._origins[output].positions = self.step(output).positions = RESIZED(call, [output])[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [t for t in tensors((*args, *kwargs.values())) if t in self._origins]
        if given:
            self._follow(function, args, kwargs, given, result)
        return result

    def _follow(self, function, args, kwargs, given: list[Tensor], result) -> None:
        name = function._schema.name.split("::")[-1].rstrip("_")
        if name.startswith("new_") or name.endswith("_like"):
            return  # like it in size only
        outputs = list(tensors((result,)))
        known = all(self.positions(t) is not None for t in given)
        if name == "as_strided" and result.shape == args[0].shape:
            name = "clone"  # other strides only
        kind, rule = rule_of(name, function) if known else ("unknown", None)
        if name == "convolution" and args[1].shape[2:].numel() == 1:
            kind = "contracted"  # a linear layer at each position
        call = Call(name, function, args, kwargs, given, self.positions)
        try:
            found = rule(call, outputs) if rule is not None else [None] * len(outputs)
        except (RuntimeError, IndexError, TypeError, ValueError):  # called in a way that the rule doesn't know
            kind, found = "unknown", [None] * len(outputs)
        for tensor, positions in zip(outputs, found, strict=True):
            if tensor.numel() == max(tensor.shape, default=1) == tensor.shape[-1:].numel() and positions is None:
                positions = [], []  # one number per output: a head's, whatever computed it
            before = self._origins.get(tensor)
            if function.is_view:
                self._origins[tensor] = _Origin(positions, self._origins[given[0]].written)
                continue
            step = self._new_step(kind, given, tensor.shape, positions)
            if before is None:
                self._origins[tensor] = _Origin(positions, [step])
            else:
                before.positions, before.written[0] = positions, step
            if tensor._base is not None and function._schema.is_mutable:
                self._write_through(tensor, positions, step)

    def _new_step(self, kind: str, given: list[Tensor], shape: torch.Size, positions: Positions) -> Step:
        parents = tuple(dict.fromkeys(self._origins[t].written[0] for t in given))
        mixes = kind in ("sampled", "unknown") or (kind == "contracted" and len(parents) > 1)
        stage = self.steps if mixes else max(p.stage for p in parents)
        self.steps += 1
        return Step(self.steps, parents, kind, shape, positions, stage)

    def _write_through(self, view: Tensor, positions: Positions, step: Step) -> None:
        """Give the tensor that a view belongs to the positions that were written into the view."""
        base = view._base
        origin = self._origins.setdefault(base, _Origin(([], []), [step]))
        origin.written[0] = step
        if positions is None or origin.positions is None:
            origin.positions = None
            return
        written = [], []
        for axis, (old, new) in enumerate(zip(origin.positions, positions, strict=True)):
            for whole, part in zip_longest(old, new, fillvalue=torch.tensor(torch.nan)):
                copy = torch.empty_strided(base.shape, base.stride(), dtype=torch.float32, device="cpu").copy_(whole)
                copy.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset()).copy_(part)
                add(written[axis], copy)
        origin.positions = written


def why_no_map(shape: Sequence[int], positions: Positions) -> str:
    """Why a tensor of this shape and these positions is no feature map [B, C, h, w]; empty where it is one."""
    shown = "[" + ", ".join(map(str, ("B", *shape[1:]))) + "]"
    if len(shape) != 4:
        return f"no map [B, C, h, w] but {shown}"
    if positions is None:
        return f"{shown}, of which isn't known what its positions are"
    if _follows(positions, shape, (2, 3)):
        return ""
    if _follows(positions, shape, (1, 2)):
        return f"{shown}: its channels come last"
    if _follows(positions, shape, (2, 3), beyond=1.0):
        return f"{shown}, which covers a part of the image only or reaches far beyond it"
    return f"{shown}, whose rows and columns aren't those of the image"


def _follows(
    positions: tuple[list[Tensor], list[Tensor]], shape: Sequence[int], dims: tuple[int, int], beyond: float = _BEYOND
) -> bool:
    """Whether a tensor's rows and columns of positions run along these two of its dimensions, and how far they may end
    from the borders.
    """
    return all(
        not known if shape[d] == 1 else len(known) == 1 and _runs_along(known[0], d, beyond)
        for known, d in zip(positions, dims, strict=True)
    )


def _runs_along(positions: Tensor, dim: int, beyond: float) -> bool:
    positions = positions.reshape((1,) * (4 - positions.ndim) + positions.shape)
    count = positions.shape[dim]
    others = [d for d in range(4) if d != dim]
    line = positions.nanmean(others, keepdim=True)
    if count == 1 or (positions - line).abs().nan_to_num().max() > max(NEAR, 0.51 / count):
        return False
    line = line.flatten()
    index = (~line.isnan()).nonzero().flatten()
    steps = line[index].diff() / index.diff()
    if not len(steps):
        return False
    forwards = bool((steps > -1e-4).all())
    step = (line[index[-1]] - line[index[0]]) / (index[-1] - index[0]) if forwards else steps.median()
    start = (line[index] - step * index).median()
    if step <= 0:
        return False
    first, last, beyond = start, start + step * (count - 1), max(beyond, float(step))
    if not forwards:  # padding may repeat some of the other end
        inner = index[(line[index] - (start + step * index)).abs() < 0.51 * step]
        if len(inner) < 0.6 * len(index):
            return False
        beyond, (first, last) = min(beyond, NEAR), line[inner[[0, -1]]]
    # Resizing a map leaves its borders where they are, up to rounding.
    return bool(max(abs(first - step / 2), abs(last + step / 2 - 1)) < beyond + 1e-4)
