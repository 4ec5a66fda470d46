"""LRP and RAP read from their formulas: every step's values are kept, and relevance goes back from the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuzz.algebra import Activation, NoRule


@dataclass(eq=False)
class Node:
    """Values, where they came from with each parent's part of their relevance, and, as long as they are still the
    image, the lowest and highest values they can have."""

    value: Tensor
    parents: list[tuple[Node, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    bounds: tuple[Tensor, Tensor] | None = None
    is_weighted: bool = False
    is_last: bool = False


def transposed(f: Callable[..., Tensor], xs: list[Tensor], signal: Tensor) -> tuple[Tensor, ...]:
    """The signal taken back through a function that is linear, or picks, at `xs`."""
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        return torch.autograd.grad(f(*leaves), leaves, signal)


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    empty = b.abs() < 1e-30
    return torch.where(empty, 0.0, a / torch.where(empty, 1.0, b))


class Relevance:
    """A reading with the options of `lrp` or `rap`."""

    def __init__(
        self,
        method: str,
        rule: str = "alpha_beta",
        alpha: float = 1.0,
        beta: float = 0.0,
        epsilon: float = 1e-6,
        first_layer: str = "same",
        protocol: str = "corrected",
    ):
        self.method, self.rule, self.alpha, self.beta = method, rule, alpha, beta
        self.epsilon, self.protocol = epsilon, protocol
        self.box = method == "rap" or first_layer == "zb"
        self.corrected = protocol == "corrected" and rule != "epsilon"
        self.first_layers = 0
        self.noise: Callable[[Tensor], Tensor] | None = None

    def image(self, encoded: Tensor) -> Node:
        if not self.box:
            return Node(encoded)
        low, high = (e(encoded, (1, 2, 3), keepdim=True).expand_as(encoded) for e in (torch.amin, torch.amax))
        return Node(encoded, bounds=(low, high))

    def maps(self, logits: Node, image: Node, labels: list[int]) -> Tensor:
        """Relevance of the image's channels, summed. [B, L, H, W]"""
        if self.box and not self.first_layers:
            raise NoRule("no layer reads the image itself")
        _mark_last(logits)
        order = _sorted(logits)
        maps = []
        for label in labels:
            start = torch.zeros_like(logits.value)
            start[:, label] = logits.value[:, label]
            found = {logits: start}
            for node in reversed(order):
                for parent, back in node.parents:
                    part = back(found[node])
                    found[parent] = found[parent] + part if parent in found else part
            maps.append(found.get(image, torch.zeros_like(image.value)).sum(1))
        return torch.stack(maps, 1)

    # Primitives

    def linear(self, x: Node, weight: Tensor, bias: Tensor | None, f) -> Node:
        value = f(x.value, weight)
        if bias is not None:
            value = value + bias.view(-1, *[1] * (value.ndim - 2))
        if self.noise is not None:
            value = value + self.noise(value)
        node = Node(value)
        if x.bounds is not None:
            self.first_layers += 1
            low, high = x.bounds
            node.parents = [(x, lambda r: _box(f, x.value, low, high, weight, r))]
            return node
        node.is_weighted = True
        if self.method == "rap" and self.protocol == "authors" and x.value.min() < 0:
            raise NoRule("negative inputs under the published code")
        rule = self._influence if self.method == "rap" else self._epsilon if self.rule == "epsilon" else self._sides
        node.parents = [(x, lambda r: rule(node, x.value, weight, value, f, r))]
        return node

    def norm(self, x: Node, scale: Tensor, shift: Tensor) -> Node:
        shape = (1, -1, *[1] * (x.value.ndim - 2))
        scale, shift = scale.view(shape), shift.view(shape)
        value = x.value * scale + shift
        if self.rule == "epsilon" and self.method == "lrp":
            moved = value + self.epsilon * torch.where(value >= 0, 1.0, -1.0)
            return Node(value, [(x, lambda r: x.value * scale * r / moved)])
        if self.protocol == "authors":
            return Node(value, [(x, lambda r: r * (x.value != 0))], self._moved(x, scale, shift))
        return Node(value, [(x, lambda r: r)], self._moved(x, scale, shift))

    def constant(self, x: Node, scale: Tensor, shift: Tensor) -> Node:
        shape = (1, -1, *[1] * (x.value.ndim - 2))
        scale, shift = scale.view(shape), shift.view(shape)
        value = x.value * scale + shift
        if self.rule == "epsilon" and self.method == "lrp":  # the shift takes its share, as that of a norm
            moved = value + self.epsilon * torch.where(value >= 0, 1.0, -1.0)
            return Node(value, [(x, lambda r: x.value * scale * r / moved)])
        return Node(value, [(x, lambda r: r)], self._moved(x, scale, shift))

    def _moved(self, x: Node, scale: Tensor, shift: Tensor):
        if x.bounds is None:
            return None
        a, b = (end * scale + shift for end in x.bounds)
        return torch.minimum(a, b), torch.maximum(a, b)

    def activation(self, x: Node, act: Activation) -> Node:
        if not act.passes_relevance:
            raise NoRule(f"relevance at {act.name}")
        return Node(act.function(x.value), [(x, lambda r: r)])

    def max_pool(self, x: Node, pool) -> Node:
        return self.copy(lambda v: pool(v)[0], x)

    def average(self, x: Node, f) -> Node:
        counted = x.value.abs() if self.corrected else x.value
        total = f(counted)
        return Node(f(x.value), [(x, lambda r: counted * transposed(f, [counted], over(r, total))[0])])

    def copy(self, f, *xs: Node) -> Node:
        values = [x.value for x in xs]
        bounds = None
        if all(x.bounds is not None for x in xs):
            a, b = f(*[x.bounds[0] for x in xs]), f(*[x.bounds[1] for x in xs])
            bounds = torch.minimum(a, b), torch.maximum(a, b)
        node = Node(f(*values), bounds=bounds)
        node.parents = [(x, lambda r, i=i: transposed(f, values, r)[i]) for i, x in enumerate(xs)]
        return node

    def interpolated(self, x: Node, f) -> Node:
        raise NoRule("relevance at an interpolation")

    def add(self, x: Node, y: Node) -> Node:
        by_size = self.method == "rap" and self.corrected
        a, b = (x.value.abs(), y.value.abs()) if by_size else (x.value, y.value)
        total = a + b
        return Node(x.value + y.value, [(x, lambda r: a * over(r, total)), (y, lambda r: b * over(r, total))])

    def sigmoid(self, x: Node, function) -> Node:
        return Node(function(x.value), [(x, torch.zeros_like)])

    def gate(self, x: Node, gate: Node) -> Node:
        return Node(x.value * gate.value, [(x, lambda r: r)])

    def opaque(self, x: Node, f, kind: str) -> Node:
        raise NoRule(f"relevance at {kind}")

    def detached(self, x: Node) -> Node:
        return x

    def dynamic(self, x: Node, linear, scale) -> Node:
        raise NoRule("relevance at a B-cos layer")

    # Rules of layers with weights

    def _sides(self, node: Node, x: Tensor, w: Tensor, value: Tensor, f, r: Tensor) -> Tensor:
        up = [(x.clamp(min=0), w.clamp(min=0)), (x.clamp(max=0), w.clamp(max=0))]
        down = [(x.clamp(min=0), w.clamp(max=0)), (x.clamp(max=0), w.clamp(min=0))]
        if self.protocol == "authors":  # each part by a sum of its own
            parts = [(self.alpha, [t]) for t in up] + [(-self.beta, [t]) for t in down]
        else:
            parts = [(self.alpha, up), (-self.beta, down)]
        totals = [sum(f(a, b) for a, b in terms) for _, terms in parts]
        found = torch.zeros_like(x)
        for n, ((factor, terms), total) in enumerate(zip(parts, totals, strict=True)):
            factor = torch.full_like(total, factor)
            if self.corrected:
                factor = torch.where(totals[1 - n].abs() < 1e-30, 1.0, factor)
            found = found + _shared(terms, f, factor * over(r, total))
        return found

    def _epsilon(self, node: Node, x: Tensor, w: Tensor, value: Tensor, f, r: Tensor) -> Tensor:
        moved = value + self.epsilon * torch.where(value >= 0, 1.0, -1.0)
        return _shared([(x, w)], f, r / moved)

    def _influence(self, node: Node, x: Tensor, w: Tensor, value: Tensor, f, r: Tensor) -> Tensor:
        up = [(x.clamp(min=0), w.clamp(min=0)), (x.clamp(max=0), w.clamp(max=0))]
        down = [(x.clamp(min=0), -w.clamp(max=0)), (x.clamp(max=0), -w.clamp(min=0))]
        p, n = (sum(f(a, b) for a, b in terms) for terms in (up, down))
        if node.is_last:
            return _shared(up, f, over(r, p + n)) + _shared(down, f, over(r, p + n))
        slips = self.protocol == "authors" and w.ndim > 2
        through_down = _shared(down, f, over(r, p + n))
        if slips:
            through_down = through_down + _shared(down, f, over(r.clamp(max=0), n))
            found = _shared(up, f, over(r.clamp(min=0), p)) + through_down
        else:
            found = _shared(up, f, over(r, p)) + through_down
        if self.protocol == "paper":
            where, excess = x != 0, _per_image(through_down)
        else:
            where, excess = found != 0, _per_image(found) - _per_image(r)
        share = excess / where.flatten(1).sum(1).clamp(min=1)
        return found - where * share.view(-1, *[1] * (found.ndim - 1))


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _shared(terms: list[tuple[Tensor, Tensor]], f, per_value: Tensor) -> Tensor:
    """Each input's terms, times a number per value, summed."""
    return sum(x * transposed(lambda v, w=w: f(v, w), [x], per_value)[0] for x, w in terms)


def _box(f, x: Tensor, low: Tensor, high: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """z^B: x w - l w+ - h w-."""
    total = f(x, w) - f(low, w.clamp(min=0)) - f(high, w.clamp(max=0))
    per_value = over(r, total)
    up, down = _shared([(low, w.clamp(min=0))], f, per_value), _shared([(high, w.clamp(max=0))], f, per_value)
    return _shared([(x, w)], f, per_value) - up - down


def _sorted(last: Node) -> list[Node]:
    """Every node after all nodes it was computed from."""
    order, seen = [], set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for parent, _ in node.parents:
                visit(parent)
            order.append(node)

    visit(last)
    return order


def _mark_last(logits: Node) -> None:
    waiting, seen = [logits], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if node.is_weighted:
                node.is_last = True
            else:
                waiting.extend(parent for parent, _ in node.parents)
