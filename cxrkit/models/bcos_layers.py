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
from bcos.modules import BcosConv2d, norms
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["TrainableBatchNorm", "TrainableBcosConv2d", "merged_scales"]

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
        trained = linear.groups == 1 and _in_training(self, in_tensor)
        if self.b != 2 or self.max_out != 1 or not (explained or trained):
            return super().forward(in_tensor)
        response = linear._conv_forward(in_tensor, linear.weight, None)
        weight_norm = torch.linalg.vector_norm(linear.weight, dim=(1, 2, 3))
        if not explained:
            return _SquaredCosine.apply(response, self.calc_patch_norms(in_tensor), weight_norm)
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
    full = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    return full and not torch.compiler.is_compiling()


def _slope(response: Tensor, patch_norm: Tensor, weight_norm: Tensor) -> Tensor:
    """|response| / (patch_norm * weight_norm^2), shaped like the response."""
    return response.abs().div_(patch_norm).mul_(weight_norm.square().reciprocal_()[:, None, None])


class _SquaredCosine(Function):
    """response * |response| / (patch_norm * weight_norm^2)."""

    @staticmethod
    def forward(ctx, response: Tensor, patch_norm: Tensor, weight_norm: Tensor) -> Tensor:
        slope = _slope(response, patch_norm, weight_norm)
        ctx.save_for_backward(response, slope, patch_norm, weight_norm)
        return slope * response

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        response, slope, patch_norm, weight_norm = ctx.saved_tensors
        scaled = gradient * slope
        product = scaled * response  # gradient times output
        for_patch = product.sum(1, keepdim=True).div_(patch_norm).neg_()
        for_weight = product.sum((0, 2, 3)).mul_(-2).div_(weight_norm)
        return scaled.mul_(2), for_patch, for_weight


class _UncentredNorm(Function):
    """weight * x / sqrt(var + eps), and var; the gradient of the variance is (x - mean) times 2/n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        inverse = (variance + eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(variance)
        return x * (weight * inverse)[:, None, None], variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        product = (gradient * x).sum((0, 2, 3))
        scale = weight * inverse
        through_variance = scale * inverse.square() * product / (x.numel() // x.shape[1])
        for_x = torch.addcmul((through_variance * mean)[:, None, None], x, -through_variance[:, None, None])
        return for_x.addcmul_(gradient, scale[:, None, None]), product * inverse, None
