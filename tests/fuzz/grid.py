"""Where the cells of every map lie in the image: the mean row and column of the pixels that a cell sees.

The network is read once more with all weights 1 and all curves straight, on two images whose values are their own rows
and columns, and on one of ones to divide by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.algebra import Plain
from fuzz.steps import Plan


class _Values(Plain):
    """Keeps what every primitive gives."""

    def __init__(self):
        self.kept: list[Tensor] = []


class _Centers(Plain):
    """Images [3, C, h, w]: rows, columns, ones."""

    def __init__(self):
        self.kept: list[Tensor] = []

    def linear(self, x, weight, bias, f):
        return self.divided(f(x, torch.ones_like(weight)))

    def divided(self, x: Tensor) -> Tensor:
        return torch.cat([x[:2] / x[2:], torch.where(x[2:] == 0, torch.nan, 1.0)])  # padding alone: nowhere

    def constant(self, x, scale, shift):
        return x.clone()

    def activation(self, x, act):
        return x.clone()

    def max_pool(self, x, pool):
        return (pool(x)[0] - pool(-x)[0]) / 2

    def average(self, x, f):
        return self.divided(f(x))

    def copy(self, f, *xs):
        return f(*xs)

    def interpolated(self, x, f):
        return f(x)

    def add(self, x, y):
        return (x + y) / 2

    def sigmoid(self, x, function):
        return x.clone()

    def gate(self, x, gate):
        return x.clone()

    def opaque(self, x, f, kind):
        return F.avg_pool2d(x, 2) if kind == "power" else x.clone()

    def dynamic(self, x, linear, scale):
        shape = linear(torch.zeros_like(x)).shape
        return F.interpolate(x.mean(1, keepdim=True), shape[2:], mode="bilinear").expand(3, *shape[1:])


def _keeping(name: str):
    def kept(self, *args):
        y = getattr(super(type(self), self), name)(*args) if isinstance(self, _Values) else plain(self, *args)
        self.kept.append(y)
        return y

    plain = vars(_Centers).get(name)
    return kept


_PRIMITIVES = ("linear", "constant", "activation", "max_pool", "average", "copy", "interpolated", "add", "sigmoid")
_PRIMITIVES += ("gate", "opaque", "dynamic")
for _name in _PRIMITIVES:
    _both = _keeping(_name)
    setattr(_Centers, _name, _both)
    setattr(_Values, _name, _both)


class Grid:
    """How far the cells of a layer's map lie from where up-sampling puts them."""

    def __init__(self, plan: Plan):
        rows, columns = plan.images.shape[2:]
        self.size = rows, columns
        row, column = torch.arange(rows).double()[:, None], torch.arange(columns).double()
        ramps = torch.stack([t.expand(rows, columns) for t in (row, column, torch.ones(1, 1).double())])[:, None]
        values, centers = _Values(), _Centers()
        with torch.no_grad():
            encoded = plan.encode(Plain(), plan.images)
            plan.classify(values, encoded)
            plan.classify(centers, ramps.expand(3, encoded.shape[1], rows, columns))
        self.kept = [(v, c) for v, c in zip(values.kept, centers.kept, strict=True) if v.ndim == 4]

    def distance(self, found: Tensor) -> float:
        """As a share of the image, at most; infinite where the map is none of those that the plan knows."""
        for value, center in self.kept:
            if value.shape == found.shape and torch.allclose(value, found, rtol=1e-5, atol=1e-6):
                return max(self._off(center[axis].mean(0), axis) for axis in (0, 1))
        return float("inf")

    def _off(self, center: Tensor, axis: int) -> float:
        cells = center.shape[axis]
        cell = self.size[axis] / cells
        expected = (torch.arange(cells).double() + 0.5) * cell - 0.5
        off = (center - (expected[:, None] if axis == 0 else expected)).abs() / self.size[axis]
        return float("inf") if off.isnan().any() else float(off.max())
