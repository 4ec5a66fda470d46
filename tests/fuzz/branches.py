"""How people write moves, norms by the image's own values, branches, gates and attention.

Makers of branches get the step and the written branches; entries are (where it fits, maker) as in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz.steps import Attention, Copy, Gate, ImageNorm
from fuzz.weights import Entry, Held, always


class Row(nn.Module):
    """Modules and plain functions, one after the other."""

    def __init__(self, *parts: Callable[[Tensor], Tensor]):
        super().__init__()
        self.order: list[str | Callable[[Tensor], Tensor]] = []
        known: dict[int, str] = {}
        for n, part in enumerate(parts):
            if not isinstance(part, nn.Module):
                self.order.append(part)
                continue
            name = known.setdefault(id(part), f"s{n}")  # one module used twice keeps its name
            self.add_module(name, part)
            self.order.append(name)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.order:
            x = getattr(self, part)(x) if isinstance(part, str) else part(x)
        return x


class Branched(nn.Module):
    """A function of the input and of two branches."""

    def __init__(self, function: Callable, first: nn.Module, second: nn.Module | None = None):
        super().__init__()
        self.function, self.first, self.second = function, first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.first, self.second)


# Moves


def _fits_one_pixel(step: Copy) -> bool:
    return step.of_one_pixel


def _moves(**entries: Callable[[Tensor], Tensor] | type[nn.Module] | nn.Module) -> dict[str, Entry]:
    return {name: (always, lambda s, f=f: f() if isinstance(f, type) else f) for name, f in entries.items()}


MOVES: dict[str, dict[str, Entry]] = {
    "flatten": {
        "view": (always, lambda s: lambda x: x.view(x.size(0), -1)),
        "view of the batch": (always, lambda s: lambda x: x.view(len(x), -1)),
        "reshape": (always, lambda s: lambda x: x.reshape(x.shape[0], -1)),
        "torch.flatten": (always, lambda s: lambda x: torch.flatten(x, 1)),
        "nn.Flatten": (always, lambda s: nn.Flatten()),
        "contiguous view": (always, lambda s: lambda x: x.contiguous().view(x.size(0), -1)),
        "squeeze": (_fits_one_pixel, lambda s: lambda x: x.squeeze(-1).squeeze(-1)),
        "index": (_fits_one_pixel, lambda s: lambda x: x[:, :, 0, 0]),
    },
    "round_trip": _moves(
        permute=lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        transpose=lambda x: x.transpose(2, 3).transpose(2, 3),
        view=lambda x: x.flatten(2).view(x.shape[0], x.shape[1], x.shape[2], -1),
        chunks=lambda x: torch.cat(x.split(1, 1), 1),
        identity=nn.Identity,
        tokens=lambda x: x.flatten(2).mT.reshape(len(x), -1, x.shape[1]).mT.reshape(x.shape),
        stack=lambda x: torch.stack(x.unbind(1), 1),
        clone=lambda x: x.clone(),
    ),
    "flip": _moves(flip=lambda x: x.flip(3), index=lambda x: x[..., list(range(x.shape[3]))[::-1]]),
    "roll": _moves(roll=lambda x: torch.roll(x, 1, 2), cat=lambda x: torch.cat([x[:, :, -1:], x[:, :, :-1]], 2)),
    "zero_pad": _moves(pad=lambda x: F.pad(x, (1, 0, 0, 1)), module=lambda x: nn.ZeroPad2d((1, 0, 0, 1))(x)),
    "crop": _moves(
        slice=lambda x: x[:, :, 1:, :-1], narrow=lambda x: x.narrow(2, 1, x.shape[2] - 1).narrow(3, 0, x.shape[3] - 1)
    ),
    "shuffle": _moves(
        view=lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape),
        reshape=lambda x: x.reshape(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    ),
    "unshuffle": _moves(function=lambda x: F.pixel_unshuffle(x, 2), module=lambda x: nn.PixelUnshuffle(2)(x)),
    "dropout": {
        "module": (always, lambda s: nn.Dropout(0.4)),
        "F.dropout": (always, lambda s: FunctionalDropout()),
        "path": (always, lambda s: DropPath(0.3)),
    },
}


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.4, self.training)


class DropPath(nn.Module):
    """Drops whole images in training."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) > self.p).to(x.dtype) / (1 - self.p)


ODD_MOVES: dict[str, dict[str, Entry]] = {
    "dropout": {"alpha": (always, lambda s: nn.AlphaDropout(0.3))},
    "flatten": {"unflatten": (always, lambda s: lambda x: x.flatten(1).unflatten(1, (1, -1)).squeeze(1))},
    "round_trip": _moves(
        unfold=lambda x: F.fold(F.unfold(x, 1), x.shape[2:], 1),
        expand=lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1)[:, 1],
        gather=lambda x: x.gather(1, torch.arange(x.shape[1]).view(1, -1, 1, 1).expand(x.shape)),
        double=lambda x: x.to(torch.float64).to(x.dtype),
        as_strided=lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
        buffer=lambda x: torch.empty_like(x).copy_(x),
    ),
}

# Norms by the image's own values


class LayerNorm2d(nn.Module):
    """A layer norm over channels, which come last for it."""

    def __init__(self, step: ImageNorm, kind=nn.LayerNorm):
        super().__init__()
        self.norm = kind(len(step.weight), eps=1e-5)
        self.norm.weight.data = step.weight.clone()
        if kind is nn.LayerNorm:
            self.norm.bias.data = step.bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _weighted(made: nn.Module, step: ImageNorm) -> nn.Module:
    made.weight.data, made.bias.data = step.weight.clone(), step.bias.clone()
    return made


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    y = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    return y * weight[:, None, None] + bias[:, None, None]


def _rms_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * weight[:, None, None]


def _batch(step: ImageNorm) -> nn.Module:
    return _weighted(nn.BatchNorm2d(len(step.weight), track_running_stats=False), step)


NORMS: dict[str, dict[str, Callable[[ImageNorm], nn.Module]]] = {
    "group": {"module": lambda s: _weighted(nn.GroupNorm(s.groups, len(s.weight)), s)},
    "layer": {"module": lambda s: _weighted(nn.LayerNorm(s.weight.shape), s)},
    "layer2d": {
        "module": LayerNorm2d,
        "formula": lambda s: Held(_formula, weight=s.weight, bias=s.bias),
    },
    "instance": {
        "module": lambda s: _weighted(nn.InstanceNorm2d(len(s.weight), affine=True), s),
        "function": lambda s: Held(
            lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias), weight=s.weight, bias=s.bias
        ),
    },
    "response": {"module": lambda s: nn.LocalResponseNorm(3, 0.5, 0.75, 1.0)},
    "rms": {
        "module": lambda s: LayerNorm2d(s, nn.RMSNorm),
        "formula": lambda s: Held(_rms_formula, weight=s.weight),
    },
    "batch": {
        "module": _batch,
        "function": lambda s: Held(
            lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True), weight=s.weight, bias=s.bias
        ),
    },
}

# Sums, products, concatenations

SUMS = {
    "+": lambda x, body, short: short(x) + body(x),
    "torch.add": lambda x, body, short: torch.add(body(x), short(x)),
    "+=": lambda x, body, short: _added(body(x), short(x)),
    "add_": lambda x, body, short: body(x).add_(short(x)),
}
ODD_SUMS = {
    "stacked": lambda x, body, short: torch.stack([short(x), body(x)]).sum(0),
    "sum": lambda x, body, short: sum([short(x), body(x)]),
    "minus minus": lambda x, body, short: short(x) - (-body(x)),
    "lerp": lambda x, body, short: 2 * torch.lerp(short(x), body(x), 0.5),
}
DETACHED_SUMS = {
    "detach": lambda x, body, short: short(x) + body(x).detach(),
    "no_grad": lambda x, body, short: short(x) + _without_gradient(body, x),
    "data": lambda x, body, short: short(x) + body(x).data,
}


def _added(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


def _without_gradient(body, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


CONCATENATIONS = {
    "torch.cat": lambda x, body, other: torch.cat([other(x), body(x)], 1),
    "dim=1": lambda x, body, other: torch.concat((other(x), body(x)), dim=1),
}
ODD_CONCATENATIONS = {
    "into a buffer": lambda x, body, other: _into_buffer(other(x), body(x)),
    "hstack": lambda x, body, other: torch.hstack([other(x), body(x)]),
}


def _into_buffer(a: Tensor, b: Tensor) -> Tensor:
    made = a.new_empty(len(a), a.shape[1] + b.shape[1], *a.shape[2:])
    made[:, : a.shape[1]] = a
    made[:, a.shape[1] :] = b
    return made


def gate(step: Gate) -> dict[str, Callable]:
    f = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "tanh": torch.tanh}[step.kind]
    return {
        "x * gate": lambda x, body, _: x * f(body(x)),
        "gate * x": lambda x, body, _: f(body(x)) * x,
        "expanded": lambda x, body, _: x * f(body(x)).expand_as(x),
        "torch.mul": lambda x, body, _: torch.mul(x, f(body(x))),
    }


GLUS = {
    "module": lambda: nn.GLU(1),
    "F.glu": lambda: lambda x: F.glu(x, 1),
    "product": lambda: lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
}


class SelfAttention(nn.Module):
    """Attention over positions; `norm` and `drop` see tensors [B, heads, N, d] and [B, heads, N, N], no maps."""

    def __init__(self, step: Attention, fused: bool):
        super().__init__()
        for name in ("query", "key", "value", "out"):
            weight = getattr(step, name)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            self.add_module(name, linear)
        self.norm, self.drop, self.heads, self.fused = nn.Identity(), nn.Dropout(0.1), step.heads, fused

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (m(tokens).view(b, h * w, self.heads, -1).transpose(1, 2) for m in (self.query, self.key, self.value))
        q, k = self.norm(q), self.norm(k)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = self.drop((q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)) @ v
        mixed = self.out(mixed.transpose(1, 2).reshape(b, h * w, c))
        return x + mixed.transpose(1, 2).reshape(b, c, h, w)
