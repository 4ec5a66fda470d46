"""The convolution and the norm of the `bcos` package, faster in training and while a network is explained; in all
else they are the package's.

Both times the same formulas are computed with fewer passes over memory: weights are not rescaled, their norm
divides the (smaller) output instead; in training the variance comes from PyTorch's batch norm kernel; explained with
frozen weights, a norm takes one product instead of two, or none of its own within `merged_scales`. Values and
gradients agree with the package to rounding. Everywhere else, and in half precision, the package's own code runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from bcos.modules import BcosConv2d, norms
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["TrainableBatchNorm", "TrainableBcosConv2d", "merged_scales"]

_EPSILON = 1e-6  # of the package, under the root of the patch norm

_merging: ContextVar[bool] = ContextVar("merging", default=False)


@contextmanager
def merged_scales() -> Iterator[None]:
    """Within the context a norm right after a convolution joins its factors with the fixed scale of the convolution.

    Each backward pass then takes one product for both, but the gradient doesn't pass by the output of the
    convolution: for gradients of the input alone.
    """
    token = _merging.set(True)
    try:
        yield
    finally:
        _merging.reset(token)


class TrainableBcosConv2d(BcosConv2d):
    """B-cos convolution: out = |w.x| / (|x| |w|^2) * w.x for B = 2. Source: paper `bcos`, B-cos transform."""

    def forward(self, in_tensor: Tensor) -> Tensor:
        linear = self.linear
        explained = _is_explained(self, linear.weight, in_tensor)
        simple = linear.groups == 1 and linear.dilation == (1, 1) and linear.padding_mode == "zeros"
        trained = simple and _in_training(self, in_tensor)
        if self.b != 2 or self.max_out != 1 or not (explained or trained):
            return super().forward(in_tensor)
        if not explained:
            return _SquaredCosine.apply(in_tensor, linear.weight, linear.stride, linear.padding)
        response = linear._conv_forward(in_tensor, linear.weight, None)
        weight_norm = torch.linalg.vector_norm(linear.weight, dim=(1, 2, 3))
        with torch.no_grad():
            scale = _slope(response, self.calc_patch_norms(in_tensor), weight_norm)
        output = response * scale
        if _merging.get():
            output.factors = response, scale  # for the norm; gone with the output
        return output


class TrainableBatchNorm(norms.BatchNormUncentered2d):
    """Batch norm that divides by the batch's standard deviation without subtracting the mean; no shift."""

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None or self.weight is None:
            return super().forward(input)
        if not self.training and _is_explained(self, self.weight, input):
            scale = (self.weight * (self.running_var + self.eps).rsqrt())[:, None, None]
            if hasattr(input, "factors") and input._version == 0:  # as the convolution left it
                input, fixed = input.factors
                scale = fixed * scale
            return input * scale
        if not _in_training(self, input):
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        output, variance = _UncentredNorm.apply(input, self.weight, self.eps)
        self.running_var.lerp_(variance, momentum)
        return output


def _is_explained(layer: torch.nn.Module, weight: Tensor, x: Tensor) -> bool:
    return layer.detach and not weight.requires_grad and _full_precision(x)


def _in_training(layer: torch.nn.Module, x: Tensor) -> bool:
    return layer.training and not layer.detach and _full_precision(x)


def _full_precision(x: Tensor) -> bool:
    kind = x.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.dtype in (torch.float32, torch.float64) and not mixed and not torch.compiler.is_compiling()


def _slope(response: Tensor, patch_norm: Tensor, weight_norm: Tensor) -> Tensor:
    """|response| / (patch_norm * weight_norm^2), shaped like the response."""
    return response.abs().div_(patch_norm).div_(weight_norm.square()[:, None, None])


class _SquaredCosine(Function):
    """The whole layer: response * |response| / (patch_norm * weight_norm^2), response = x * weight (convolution).

    Kept for the backward pass are the input and the response, nothing else of their size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        response = F.conv2d(x, weight, None, stride, padding)
        squares = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_()
        kernel = weight.shape[2:]
        patch_norm = F.avg_pool2d(squares, kernel, stride, padding).mul_(kernel.numel()).add_(_EPSILON).sqrt_()
        weight_norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3))
        ctx.save_for_backward(x, weight, response, patch_norm, weight_norm)
        ctx.geometry = stride, padding
        return _slope(response, patch_norm, weight_norm).mul_(response)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, response, patch_norm, weight_norm = ctx.saved_tensors
        stride, padding = ctx.geometry
        scaled = _slope(response, patch_norm, weight_norm).mul_(gradient)
        product = scaled * response  # gradient times output
        per_patch, per_output = product.sum(1, keepdim=True), product.sum((0, 2, 3))
        needed = [*ctx.needs_input_grad[:2], False]
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            scaled.mul_(2), x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, needed
        )
        if needed[0]:
            # d patch_norm / d squares = kernel elements * pooling / (2 patch_norm), and d squares / d x = 2 x.
            through, kernel = per_patch.div_(patch_norm.square()).neg_(), weight.shape[2:]
            spread = torch.ops.aten.avg_pool2d_backward(through, x[:, :1], kernel, stride, padding, False, True, None)
            for_x.addcmul_(x, spread.mul_(kernel.numel()))
        if needed[1]:
            for_weight.addcmul_(weight, (-2 * per_output / weight_norm.square())[:, None, None, None])
        return for_x, for_weight, None, None


class _UncentredNorm(Function):
    """weight * x / sqrt(var + eps), and var; the gradient of the variance is (x - mean) times 2/n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.is_meta:  # the kernel has no form for shapes alone
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        else:
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        inverse = (variance + eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(variance)
        return x * (weight * inverse)[:, None, None], variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        product, scale = (gradient * x).sum((0, 2, 3)), weight * inverse
        through = scale * inverse.square() * product / (x.numel() // x.shape[1])
        for_x = gradient * scale[:, None, None]
        for_x.addcmul_(x, -through[:, None, None]).add_((through * mean)[:, None, None])
        return for_x, product * inverse, None
