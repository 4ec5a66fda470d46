"""Rules for the positions of values under each operation of torch; see `positions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cxrkit.attribution.operations import OPERATIONS, tensors

__all__ = ["NEAR", "RESIZED", "Call", "Positions", "add", "rule_of"]

# Rows and columns: for each the positions that a tensor's values come from, broadcastable to the tensor and nan where a
# value has none. Two sets of positions where values of different places were combined; an empty list where there is
# nothing left to tell apart; None instead of both where it isn't known.
Positions = tuple[list[Tensor], list[Tensor]] | None

NEAR = 0.13  # of the image: as far as positions of one value may be apart, and half a cell where cells are larger


@dataclass
class Call:
    """One call of an operation, with the tensors among its arguments that depend on the image."""

    name: str
    function: object
    args: tuple
    kwargs: dict
    given: list[Tensor]
    positions: object

    def argument(self, name: str):
        for i, expected in enumerate(self.function._schema.arguments):
            if expected.name == name:
                given = self.args[i] if i < len(self.args) else expected.default_value
                return self.kwargs.get(name, given)
        return None

    def of(self, tensor: Tensor, axis: int) -> list[Tensor]:
        """The tensor's positions, each with as many dimensions as the tensor."""
        found = self.positions(tensor)[axis] if any(t is tensor for t in self.given) else []
        return [p.reshape((1,) * (tensor.ndim - p.ndim) + p.shape) for p in found]


def add(known: list[Tensor], positions: Tensor) -> None:
    """Put positions into a list, without dimensions along which they are all the same; not at all where there is but
    one position, or where one of those in the list is near enough everywhere or tells the same in finer detail.
    """
    if any(other is positions for other in known):
        return
    for d in range(positions.ndim):
        if positions.shape[d] > 1:
            first = positions.narrow(d, 0, 1)
            if positions.stride(d):
                low = positions.nan_to_num(nan=torch.inf).amin(d, keepdim=True)
                high = positions.nan_to_num(nan=-torch.inf).amax(d, keepdim=True)
                if (high - low > 1e-5).any():
                    continue
                first = low.where(low.isfinite(), torch.nan)
            positions = first
    if positions.numel() == 1 or positions.isnan().all():
        return
    for i, other in enumerate(known):
        fine, coarse = sorted((other, positions), key=lambda p: p.numel(), reverse=True)
        dims = [d for d in range(-fine.ndim, 0) if fine.shape[d] > 1 and (d < -coarse.ndim or coarse.shape[d] == 1)]
        mean = fine.nanmean(dims, keepdim=True) if dims else fine
        if mean.numel() > 1 and (mean - coarse).abs().nan_to_num().max() <= max(NEAR, 0.51 / max(coarse.shape)):
            known[i] = fine if dims else torch.where(other.isnan(), positions, other)
            return
    known.append(positions if positions._base is None else positions.clone())


def _both(rule) -> object:
    """A rule for rows and columns from one for either: (call, axis, outputs) -> positions of each output."""

    def applied(call: Call, outputs: list[Tensor]) -> list[Positions]:
        found: list[tuple[list, list]] = [([], []) for _ in outputs]
        for axis in (0, 1):
            for i, positions in rule(call, axis, outputs):
                add(found[i][axis], positions)
        return found

    return applied


# Rules: each yields the index of an output and positions for it.


@_both
def _aligned(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    given = [call.args[1]] if call.name == "copy" else call.given
    for tensor in given:
        for positions in call.of(tensor, axis):
            for i in range(len(outputs)):
                yield i, positions


@_both
def _same(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    for positions in call.of(call.args[0], axis):
        for i, output in enumerate(outputs):
            if output.shape == call.args[0].shape:
                yield i, positions


@_both
def _moved(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    for k in range(max(len(call.of(t, axis)) for t in call.given)):

        def positions(value, k=k):
            if isinstance(value, (list, tuple)):
                return type(value)(positions(v) for v in value)
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point() and value is not call.args[0]:
                if value.dtype != torch.bool and any(value is t for t in call.given):
                    raise TypeError("where values come from depends on the image")
                return value.cpu()
            own = call.of(value, axis)
            if own or value.is_floating_point() or value.is_complex():
                whole = own[k] if k < len(own) else torch.tensor(torch.nan)
                whole = whole.expand(value.shape)
                return whole.clone() if call.function._schema.is_mutable else whole
            return value.cpu()

        if call.name in _OPERATIONS["reshaped"]:
            yield 0, positions(call.args[0]).reshape(outputs[0].shape)
            continue
        args = positions(call.args)
        if call.name == "constant_pad_nd":
            args = (*args[:2], torch.nan)
        moved = list(tensors((call.function(*args, **{n: positions(v) for n, v in call.kwargs.items()}),)))
        if call.function._schema.is_mutable:  # constants are written over values, which keep their positions
            moved = [torch.where(m.isnan(), positions(call.args[0]), m) for m in moved]
        yield from enumerate(moved)


@_both
def _halved(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    for positions in call.of(call.args[0], axis):
        if positions.shape[call.argument("dim")] == 1:
            yield 0, positions


@_both
def _reduced(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    dims = call.argument("dim")
    if dims is None or dims == []:
        return
    for positions in call.of(call.args[0], axis):
        for i in range(len(outputs)):
            yield (
                i,
                positions.nanmean(dims, keepdim=call.name in _OPERATIONS["sorted"] or bool(call.argument("keepdim"))),
            )


@_both
def _contracted(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    left, right = call.args[1:3] if call.name in ("addmm", "baddbmm", "_addmm_activation") else call.args[:2]
    direct, averaged = [], []
    for tensor, dim in ((left, -1), (right, -2)):
        for positions in call.of(tensor, axis):
            (direct if positions.shape[dim] == 1 else averaged).append(_averaged(positions, dim))
    for positions in direct or averaged:  # what is summed over is the context of a value with a position
        yield 0, positions


@_both
def _attended(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    for positions in call.of(call.args[0], axis):  # of the queries
        yield 0, _averaged(positions, -1)


@_both
def _sampled(call: Call, axis: int, outputs: list[Tensor]) -> Iterator:
    tensor, dims = call.args[0], _spatial_dims(call)
    if call.name == "convolution" and call.of(call.args[1], axis):
        return  # a kernel of values from different places
    centers = _centers(call, dims, tensor.shape[-dims:], outputs[0].shape[-dims:])
    for positions in call.of(tensor, axis):
        if call.name == "convolution":
            positions = _averaged(positions, -dims - 1)
        for d, index in zip(range(-dims, 0), centers, strict=True):
            if positions.shape[d] > 1:
                positions = _at(positions, d, index)
        for i in range(len(outputs)):
            yield i, positions


def _spatial_dims(call: Call) -> int:
    if call.name == "convolution":
        return call.args[1].ndim - 2
    return next((n for n in (1, 3) if f"{n}d" in call.name), 2)


def _centers(call: Call, dims: int, sizes: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """The fractional index at the center of what each output value sees, for every spatial dimension."""
    outputs = [torch.arange(count, dtype=torch.float32, device="cpu") for count in counts]
    kernel = call.args[1].shape[2:] if call.name == "convolution" else call.argument("kernel_size")
    if not kernel:  # resizing
        return [(o + 0.5) * (n / len(o)) - 0.5 for o, n in zip(outputs, sizes, strict=True)]
    facts = [kernel, *(call.argument(name) for name in ("stride", "padding", "dilation"))]
    kernel, stride, padding, dilation = (list(f or ()) * (dims if f and len(f) == 1 else 1) for f in facts)
    centers = []
    for d, o in enumerate(outputs):
        s, p = (stride or kernel)[d], padding[d] if padding else 0
        half = (dilation[d] if dilation else 1) * (kernel[d] - 1) / 2
        centers.append((o + p - half) / s if call.argument("transposed") else s * o - p + half)
    return centers


def _averaged(positions: Tensor, dim: int) -> Tensor:
    return positions if positions.shape[dim] == 1 else positions.nanmean(dim, keepdim=True)


def _at(positions: Tensor, dim: int, index: Tensor) -> Tensor:
    """Positions at fractional indices of a dimension, linear between and beyond the given ones."""
    if len(index) == positions.shape[dim] and index[0] == 0 and index[-1] == len(index) - 1:
        return positions
    low = index.floor().clamp(0, positions.shape[dim] - 2).long()
    share = (index - low).view(-1, *(1,) * (-dim - 1))
    line = _continued(positions, dim)
    a, b = line.index_select(dim, low), line.index_select(dim, low + 1)
    return torch.where(share == 0, a, torch.where(share == 1, b, a + share * (b - a)))


def _continued(positions: Tensor, dim: int) -> Tensor:
    """Positions along one dimension that go on evenly where padding has none."""
    line = positions.flatten()
    index = (~line.isnan()).nonzero().flatten()
    if len(line) != positions.shape[dim] or len(index) in (0, 1, len(line)):
        return positions
    step = (line[index].diff() / index.diff()).median()
    even = line[index[0]] + step * (torch.arange(len(line), device="cpu") - index[0])
    return torch.where(line.isnan(), even, line).view_as(positions)


RESIZED = _sampled  # for an operation that isn't one of those with windows: to the size of its output

_OPERATIONS = OPERATIONS["positions"]
_KINDS = {name: kind for kind, names in _OPERATIONS.items() if kind not in ("reshaped", "sorted") for name in names}
_RULES = {"kept": _same, "aligned": _aligned, "weighted": _aligned, "moved": _moved, "halved": _halved}
_RULES |= {"reduced": _reduced, "contracted": _contracted, "sampled": _sampled}


@cache
def rule_of(name: str, function) -> tuple[str, object]:
    """The kind of an operation and its rule, (call, outputs) -> positions of each output; None for an unknown one."""
    if name in _KINDS:
        return _KINDS[name], _RULES[_KINDS[name]]
    if name.startswith("_scaled_dot_product"):
        return "contracted", _attended
    packet = getattr(torch.ops.aten, name, None) if function.namespace == "aten" else None
    if packet and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
        return "aligned", _aligned
    return "unknown", None
