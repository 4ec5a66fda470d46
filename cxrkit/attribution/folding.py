"""Batch norm folded into the convolution before it, for methods that take many gradients at the input.

In evaluation mode a batch norm is one affine map per channel, so a convolution can do its work too:
g (w * x + b - m) + t is a convolution of x with weights g w and bias g (b - m) + t, where g = gamma / sqrt(var + eps).
Gradients at the input stay what they are. What the convolution puts out doesn't: this is not for methods that look at
layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cxrkit.attribution.operations import tensors
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError

__all__ = ["folded"]

_FEWEST = 4  # forward passes of one image; for fewer the search for pairs takes longer than the folding saves
_PRECISIONS = (torch.float32, torch.float64)  # lower ones would round the joined weights visibly


@contextmanager
def folded(explained: Explained, image: Tensor, forwards: int) -> Iterator[None]:
    """Within the context every batch norm that can be is part of the convolution before it; then all is as before.

    `image` [1, C, H, W] is run to see how the network uses its layers; `forwards` says how many forward passes of one
    image follow, each with its backward passes: for a few nothing is changed. A pair is an `nn.Conv2d` and an
    `nn.BatchNorm2d` with running statistics (no subclasses, no hooks), each run once, where the norm alone sees what
    the convolution puts out. If the logits don't stay the same, something else depends on a layer in a way that can't
    be seen, and nothing is folded. Gradients with respect to the input keep their values up to rounding.
    """
    with ExitStack() as stack:
        if forwards >= _FEWEST:
            logits, pairs = _traced(explained, image)
            for convolution, norm in pairs:
                stack.enter_context(_joined(convolution, norm))
            if pairs and not _same(explained, image, logits):
                stack.close()
        yield


def _traced(explained: Explained, image: Tensor) -> tuple[Tensor | None, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """Logits of one image, and the pairs that its forward pass shows."""
    convolutions = [m for m in explained.model.modules() if _is_bare(m, nn.Conv2d)]
    norms = [m for m in explained.model.modules() if _is_bare(m, nn.BatchNorm2d)]
    norms = [m for m in norms if not m.training and m.running_mean is not None]
    if not convolutions or not norms:
        return None, []
    seen = _Seen()
    with ExitStack() as stack:
        for convolution in convolutions:
            stack.callback(convolution.register_forward_hook(seen.convolved).remove)
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(seen.normalised).remove)
        stack.enter_context(seen)
        try:
            logits = explained.logits(image.detach().clone().requires_grad_())
        except AttributionError:  # as of a network that squeezes a single image's logits, but not those of several
            return None, []
    return logits.detach(), seen.pairs()


def _is_bare(module: nn.Module, kind: type) -> bool:
    """Whether the module is of this very class, without hooks or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


class _Seen(TorchFunctionMode):
    """Which convolution puts out which tensor, which norm it goes into, and how many calls use a tensor at all."""

    def __init__(self):
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # by id, held so that no other tensor gets the id
        self.norms: dict[int, nn.BatchNorm2d] = {}
        self.runs: Counter[nn.BatchNorm2d] = Counter()
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of an attribute such as x.shape
            name = getattr(function.__self__, "__name__", "")
        if name not in _QUESTIONS:
            self.uses.update(id(tensor) for tensor in tensors((*args, *kwargs.values())))
        return function(*args, **kwargs)

    def convolved(self, module: nn.Conv2d, args: tuple, output: Tensor) -> None:
        self.outputs[id(output)] = output, module
        self.uses[id(output)] = 0

    def normalised(self, module: nn.BatchNorm2d, args: tuple) -> None:
        self.runs[module] += 1
        if args and id(args[0]) in self.outputs:
            self.norms[id(args[0])] = module

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        found = [(key, self.outputs[key][1], norm) for key, norm in self.norms.items()]
        return [(convolution, norm) for key, convolution, norm in found if self._is_pair(key, convolution, norm)]

    def _is_pair(self, key: int, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
        return (
            all(self.uses[i] == 1 for i in (key, *map(id, convolution.parameters())))  # weights of its own, one run
            and set(convolution._parameters) == {"weight", "bias"}  # no buffers in their place
            and convolution.weight is not None
            and self.runs[norm] == 1
            and convolution.weight.dtype in _PRECISIONS
        )


# What a network may ask about a tensor without using its values.
_QUESTIONS = {"dim", "size", "numel", "stride", "is_contiguous", "is_floating_point"}
_QUESTIONS |= {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda"}


@contextmanager
def _joined(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Iterator[None]:
    before = convolution.weight, convolution.bias
    try:
        values = _with_norm(convolution, norm)
        convolution.weight, convolution.bias = (nn.Parameter(v, requires_grad=False) for v in values)
        norm.forward = _identity
        yield
    finally:
        convolution.weight, convolution.bias = before
        vars(norm).pop("forward", None)


def _identity(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _with_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weights and bias of the convolution that does the norm's work too; computed in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double()
    if convolution.bias is not None:
        bias = bias + convolution.bias
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    dtype = convolution.weight.dtype
    return (convolution.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)


@torch.no_grad()
def _same(explained: Explained, image: Tensor, logits: Tensor) -> bool:
    """Whether the logits of the image are still the same up to rounding."""
    allowed = 1024 * torch.finfo(logits.dtype).eps * logits.abs().max()
    return bool(((explained.logits(image) - logits).abs() <= allowed).all())
