"""Batch norm folded into the convolution before it, for methods that take many gradients at the input.

In evaluation mode a batch norm is one affine map per channel, so a convolution can do its work too:
g (w * x + b - m) + t is a convolution of x with weights g w and bias g (b - m) + t, where g = gamma / sqrt(var + eps).
Gradients at the input stay what they are. What the convolution puts out doesn't: this is not for methods that look at
layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cxrkit.attribution.operations import plain_name, tensors
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError

__all__ = ["folded"]

_FEWEST = 4  # forward passes of one image; for fewer the search for pairs takes longer than the folding saves
_PRECISIONS = (torch.float32, torch.float64)  # lower ones would round the joined weights visibly


@contextmanager
def folded(explained: Explained, image: Tensor, forwards: int) -> Iterator[None]:
    """Within the context, convolutions do the work of the batch norms behind them, wherever they can.

    `image` [1, C, H, W] is run to see which calls belong together; `forwards` says how many forward passes of one image
    follow, each with its backward passes: for a few nothing is changed. The weights of a pair are the network's own,
    each used once, and nothing but the norm uses what the convolution puts out. If the logits don't stay the same,
    something else depends on it in a way that can't be seen, and nothing is folded. The network isn't touched, and
    gradients with respect to the input keep their values up to rounding.
    """
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in explained.model.modules())
    mode = _Folded(explained, image) if has_norms and forwards >= _FEWEST else None
    if mode is None or not mode.keeps_logits:
        yield
    else:
        with mode:
            yield


class _Seen(TorchFunctionMode):
    """Pairs of a convolution and a batch norm, as arguments of their calls, and how many calls use a tensor at all."""

    def __init__(self):
        super().__init__()
        self.convolved: dict[int, tuple] = {}  # by the id of what comes out, held so that no other tensor gets the id
        self.pairs: list[tuple[Tensor, tuple, tuple]] = []
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = plain_name(function)
        if name is not None:  # no mere question about a shape
            self.uses.update(id(tensor) for tensor in tensors((*args, *kwargs.values())))
        result = function(*args, **kwargs)
        if name == "conv2d" and len(args) > 2 and isinstance(result, Tensor):
            self.convolved[id(result)] = result, args[1:3]
            self.uses[id(result)] = 0
        elif name == "batch_norm" and id(args[0]) in self.convolved and not kwargs.get("training", True):
            norm = *args[1:], kwargs.get("weight"), kwargs.get("bias"), kwargs["eps"]
            self.pairs.append((args[0], self.convolved[id(args[0])][1], norm))
        return result


class _Folded(TorchFunctionMode):
    """Calls of the convolutions with joined weights, and none of their norms."""

    def __init__(self, explained: Explained, image: Tensor):
        super().__init__()
        self.kernels: dict[int, tuple[Tensor, Tensor]] = {}
        self.norms: set[int] = set()
        self.keeps_logits = False
        seen, own = _Seen(), {id(t) for t in (*explained.model.parameters(), *explained.model.buffers())}
        try:
            with seen:
                logits = explained.logits(image.detach().clone().requires_grad_()).detach()
        except AttributionError:  # as of a network that squeezes a single image's logits, but not those of several
            return
        for output, kernel, norm in seen.pairs:
            held = [t for t in (*kernel, *norm) if isinstance(t, Tensor)]
            alone = all(seen.uses[id(t)] == 1 for t in (output, *held)) and own.issuperset(map(id, held))
            if alone and norm[0] is not None and kernel[0].dtype in _PRECISIONS:
                self.kernels[id(kernel[0])] = _joined(*kernel, *norm)
                self.norms.add(id(norm[0]))
        if self.kernels:
            with self, torch.no_grad():
                change = (explained.logits(image) - logits).abs()
            self.keeps_logits = bool((change <= 1024 * torch.finfo(logits.dtype).eps * logits.abs().max()).all())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "conv2d" and id(args[1]) in self.kernels:
            args = (args[0], *self.kernels[id(args[1])], *args[3:])
        elif name == "batch_norm" and id(args[1]) in self.norms:
            return args[0]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _joined(kernel: Tensor, offset: Tensor | None, mean, variance, weight, bias, eps: float) -> tuple[Tensor, Tensor]:
    """Weights and bias of the convolution that does the norm's work too; computed in float64."""
    scale = (variance.double() + eps).rsqrt()
    shift = -mean.double()
    if offset is not None:
        shift = shift + offset
    if weight is not None:
        scale = scale * weight
    shift = shift * scale
    if bias is not None:
        shift = shift + bias
    return (kernel * scale[:, None, None, None]).to(kernel.dtype), shift.to(kernel.dtype)
