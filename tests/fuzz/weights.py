"""How people write layers with weights: convolutions and linear layers on parameters, buffers, parametrizations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from fuzz.steps import Conv, Linear, Step

Entry = tuple[Callable[[Step], bool], Callable[[Step], Callable[[Tensor], Tensor]]]  # where it fits, and its maker


def always(step: Step) -> bool:
    return True


class Held(nn.Module):
    """A module that computes a function of its input and of tensors that it holds as parameters or buffers."""

    def __init__(self, function: Callable[..., Tensor], as_buffers: bool = False, **tensors: Tensor | None):
        super().__init__()
        self.function = function
        self.held = [name for name, tensor in tensors.items() if tensor is not None]
        for name in self.held:
            value = tensors[name].clone()
            if as_buffers:
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **{name: getattr(self, name) for name in self.held})


def convolution(step: Conv, kind=None) -> nn.Module:
    kind = kind or (nn.ConvTranspose2d if step.is_transposed else nn.Conv2d)
    w = step.weight
    into, out = (w.shape[0], w.shape[1]) if step.is_transposed else (w.shape[1] * step.groups, w.shape[0])
    options = {"stride": step.stride, "padding": step.padding, "dilation": step.dilation, "groups": step.groups}
    if not step.is_transposed:
        options["padding_mode"] = step.mode
    made = kind(into, out, tuple(w.shape[2:]), bias=step.bias is not None, **options)
    made.weight.data = w.clone()
    if step.bias is not None:
        made.bias.data = step.bias.clone()
    return made


def dense(step: Linear, kind=nn.Linear) -> nn.Module:
    made = kind(step.weight.shape[1], step.weight.shape[0], bias=step.bias is not None)
    made.weight.data = step.weight.clone()
    if step.bias is not None:
        made.bias.data = step.bias.clone()
    return made


def layer(step: Conv | Linear) -> nn.Module:
    return convolution(step) if isinstance(step, Conv) else dense(step)


def functional(step: Conv | Linear, as_buffers: bool = False) -> nn.Module:
    """The function of torch on tensors that a module of the user holds."""

    def f(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(step, Linear):
            return F.linear(x, weight, bias)
        padding = step.padding
        if step.is_transposed:
            return F.conv_transpose2d(x, weight, bias, step.stride, padding, 0, step.groups, step.dilation)
        if step.mode != "zeros":
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=step.mode)
            padding = 0
        return F.conv2d(x, weight, bias, step.stride, padding, step.dilation, step.groups)

    return Held(f, as_buffers, weight=step.weight, bias=step.bias)


def weight_as_buffer(step: Conv | Linear) -> nn.Module:
    made = layer(step)
    fixed = made.weight.data
    del made.weight
    made.register_buffer("weight", fixed)
    return made


class PaddingConv(nn.Conv2d):
    """Pads by itself, as "same" convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        top, left = self.padding
        return F.conv2d(
            F.pad(x, (left, left, top, top)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class _Merging:
    """Merges its adapter into the weight in evaluation mode, and takes it out again for training, as LoRA does."""

    def adapt(self) -> None:
        flat = self.weight.detach().flatten(1)
        draw = torch.Generator().manual_seed(flat.numel())
        self.a = nn.Parameter(0.3 * torch.randn(1, flat.shape[1], generator=draw, dtype=flat.dtype))
        self.b = nn.Parameter(0.3 * torch.randn(flat.shape[0], 1, generator=draw, dtype=flat.dtype))
        self.merged = False

    def adapter(self) -> Tensor:
        return (self.b @ self.a).view_as(self.weight)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.adapter()
            self.merged = not mode
        return self


class _MergingConv(_Merging, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + self._conv_forward(x, self.adapter(), None)


class _MergingLinear(_Merging, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


def merging(step: Conv | Linear) -> nn.Module:
    made = convolution(step, _MergingConv) if isinstance(step, Conv) else dense(step, _MergingLinear)
    made.adapt()
    return made


class _Halves(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return 2 * raw


def parametrized(step: Conv | Linear) -> nn.Module:
    made = layer(step)
    made.weight.data = made.weight.data / 2
    parametrize.register_parametrization(made, "weight", _Halves())
    return made


def effective_weight(made: nn.Module) -> Tensor | None:
    """The weight that such a layer works with in evaluation mode, where it isn't the one that was asked for."""
    if isinstance(made, _Merging):
        made = copy.deepcopy(made).double().train()
        return (made.weight + made.adapter()).detach()
    if parametrize.is_parametrized(made):
        return copy.deepcopy(made).double().eval().weight.detach().clone()
    if hasattr(made, "weight_g"):
        return torch._weight_norm(made.weight_v.detach().double(), made.weight_g.detach().double(), 0)
    if hasattr(made, "weight_orig"):
        weight, u, v = (getattr(made, f"weight_{name}").detach().double() for name in ("orig", "u", "v"))
        rows = weight.transpose(0, 1) if isinstance(made, nn.ConvTranspose2d) else weight
        return weight / torch.dot(u, rows.flatten(1) @ v)
    return None


def old_spectral_norm(step: Conv | Linear) -> nn.Module:
    made = nn.utils.spectral_norm(layer(step), n_power_iterations=8)
    for hook in made._forward_pre_hooks.values():  # as after some training
        hook(made.train(), ())
    return made


def unfolded(step: Conv) -> nn.Module:
    """The convolution as a matrix product over patches."""

    def f(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        k = tuple(weight.shape[2:])
        rows, columns = (
            (size + 2 * p - d * (n - 1) - 1) // s + 1
            for size, p, d, n, s in zip(x.shape[2:], step.padding, step.dilation, k, step.stride, strict=True)
        )
        patches = F.unfold(x, k, step.dilation, step.padding, step.stride)
        y = (weight.flatten(1) @ patches).view(len(x), len(weight), rows, columns)
        return y if bias is None else y + bias.view(1, -1, 1, 1)

    return Held(f, weight=step.weight, bias=step.bias)


def pointwise(step: Conv) -> nn.Module:
    """A 1 x 1 convolution as a linear layer over channels that come last."""
    inner = dense(Linear(step.weight.flatten(1), step.bias))

    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return Pointwise()


def summed(step: Conv) -> nn.Module:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.einsum("oc,bchw->bohw", weight.flatten(1), x)
        return y if bias is None else y + bias[:, None, None]

    return Held(f, weight=step.weight, bias=step.bias)


class Recomputed(nn.Module):
    """A part that is computed again in the backward pass."""

    def __init__(self, part: nn.Module, use_reentrant: bool):
        super().__init__()
        self.part, self.use_reentrant, self.is_plain = part, use_reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_plain:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.use_reentrant)


def is_simple(step: Conv) -> bool:
    return step.mode == "zeros" and not step.is_transposed


def is_pointwise(step: Conv) -> bool:
    return (
        is_simple(step)
        and tuple(step.weight.shape[2:]) == (1, 1)
        and step.stride == (1, 1)
        and step.groups == 1
        and (step.padding == (0, 0))
    )


def _reentrant(flag: bool) -> Callable[[Step], nn.Module]:
    return lambda s: Recomputed(layer(s), flag)


WEIGHTED: dict[str, Entry] = {
    "functional": (always, functional),
    "buffers": (always, lambda s: functional(s, as_buffers=True)),
    "weight as buffer": (always, weight_as_buffer),
    "weight norm": (always, lambda s: parametrizations.weight_norm(layer(s))),
    "old weight norm": (always, lambda s: nn.utils.weight_norm(layer(s))),
    "spectral norm": (always, lambda s: parametrizations.spectral_norm(layer(s))),
    "old spectral norm": (always, old_spectral_norm),
    "parametrized": (always, parametrized),
    "checkpoint": (always, _reentrant(False)),
    "reentrant checkpoint": (always, _reentrant(True)),
    "adapter": (lambda s: isinstance(s, Linear) or is_simple(s), merging),
}
