"""DeepLIFT: differences from a baseline, handed back layer by layer.

The network runs twice, on the baseline and on the image. Wherever it isn't linear, the backward pass multiplies by
the change of the output per change of the input between the two instead of by the derivative. Every call counts,
whether a module or a function makes it, so ReLUs may be shared, in place, or feed a max-pool.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.gradient import noise_source, whole_number
from cxrkit.attribution.operations import OPERATIONS, Call, nonlinearity, tensors, traced
from cxrkit.attribution.registry import method
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["deeplift"]

_ELEMENTWISE, _MAX_POOLS = OPERATIONS["deeplift"]["elementwise"], OPERATIONS["deeplift"]["max_pools"]


@method("gradient", unfit=OPERATIONS["deeplift"]["unfit"])
def deeplift(
    explained: Explained,
    images: Tensor,
    *,
    baseline: str | float | Tensor = "black",
    n_baselines: int = 1,
    noise: float = 0.001,
    seed: int = 0,
) -> Tensor:
    """DeepLIFT by the rescale rule: shares of the difference to the baseline. [B, L, H, W], in units of the score.

    The map sums to score(image) - score(baseline); that is checked, and AttributionError names the gap. Rules: the
    secant slope at activation functions (also the sigmoid of output="probability"); at a max-pool the window's
    difference goes to the pixel that holds the greater of the two maxima. Where input and baseline agree the
    slope is the derivative. What has no rule (products of two tensors that depend on the image, softmax, attention,
    norms by the image's own statistics) is refused with operation and layer.

    `baseline` as for integrated gradients. `n_baselines` above 1 is the mean over so many copies of it with
    Gaussian noise of standard deviation `noise`, fixed by `seed`, as paper `covid` does with 10 for what it calls
    DeepLIFT-SHAP. Source: Shrikumar et al. 2017, sections 3.1, 3.2 and 3.5.1.
    """
    whole_number("n_baselines", n_baselines)
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise ParameterError(f"noise must be a standard deviation, 0 or more; got {noise!r}")
    draw = noise_source(explained, images, seed)
    start = baseline_images(images, baseline)
    total = 0
    for _ in explained.steps(range(n_baselines)):
        copy = start + noise * torch.stack([draw(r) for r in range(len(images))]) if n_baselines > 1 else start
        total = total + _contributions(explained, images, copy)
    return total / n_baselines


def _contributions(explained: Explained, images: Tensor, start: Tensor) -> Tensor:
    pair = _Pair()
    reference = start.clone().requires_grad_()

    def scored(values: Tensor) -> Tensor:
        return explained.scores(explained.logits(values))

    before, constants = traced(explained.model, scored, reference, pair.record, again=False)
    inputs = images.detach().clone().requires_grad_()
    scores, _ = traced(explained.model, scored, inputs, pair.rescale, constants=constants)
    if pair.recorded:
        raise _other_way(pair.recorded[0][0])
    before, after = before.detach(), scores.detach()
    maps = [((images - start) * gradient).sum(1) for gradient in explained.gradients(scores, inputs)]
    maps = torch.stack(maps, 1)
    _refuse_gap(explained, maps, after - before, after.abs() + before.abs())
    return maps


def _refuse_gap(explained: Explained, maps: Tensor, change: Tensor, size: Tensor) -> None:
    gap = (maps.sum((2, 3)) - change).abs()
    # Rounding grows with what cancels within the map.
    allowed = 1024 * torch.finfo(maps.dtype).eps * (size + maps.abs().sum((2, 3)))
    worst = (gap - allowed).argmax().item()
    image, label = divmod(worst, gap.shape[1])
    if not gap[image, label] <= allowed[image, label]:
        raise AttributionError(
            f"deeplift: the map of image {explained.first_row + image}, label {label} of those asked for, sums to "
            f"{maps[image, label].sum():.4g}, but its score differs from the baseline's by {change[image, label]:.4g} "
            f"(gap {gap[image, label]:.2g}): the network computes something that can't be seen, such as a detached "
            "tensor or an autograd function of its own"
        )


@dataclass
class _Pair:
    """Both runs of the network: the first records what its nonlinear calls get, the second takes it up again."""

    recorded: deque[tuple[Call, Tensor]] = field(default_factory=deque)

    def record(self, call: Call, x: Tensor, *args, **kwargs) -> Tensor:
        """Run the baseline on. The graph is cut here: it needs none, and only this tensor is kept."""
        if call.name not in _ELEMENTWISE + _MAX_POOLS:
            return _linear(call, x, *args, **kwargs)
        if not isinstance(x, Tensor) or not x.requires_grad:
            raise _no_rule(call, "with what depends on the image as a parameter")
        if any(t.requires_grad for t in tensors((*args, *kwargs.values()))):
            raise _no_rule(call, "of two tensors that both depend on the image")
        self.recorded.append((call, x.detach()))
        return call.original(x.detach(), *args, **kwargs).requires_grad_()

    def rescale(self, call: Call, x: Tensor, *args, **kwargs) -> Tensor:
        if call.name not in _ELEMENTWISE + _MAX_POOLS:
            return _linear(call, x, *args, **kwargs)
        if not self.recorded:
            raise _other_way(call)
        seen, x0 = self.recorded.popleft()
        if (seen.name, seen.layer, x0.shape) != (call.name, call.layer, x.shape):
            raise _other_way(call)
        rule = _max_pool if call.name in _MAX_POOLS else _elementwise
        return rule(call, x, x0, args, kwargs)


def _linear(call: Call, *args, **kwargs):
    if (why := nonlinearity(call, args, kwargs)) is not None:
        raise _no_rule(call, why)
    return call.original(*args, **kwargs)


def _elementwise(call: Call, x: Tensor, x0: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """Slope of the secant from x0 to x; of the tangent at x where the two are one up to rounding."""

    def f(values: Tensor) -> Tensor:
        return call.original(values, *args, **kwargs)

    at = x.detach()
    y, step = f(at), at - x0
    if y.shape != x.shape:
        raise _no_rule(call, "with a constant of more places")
    slope = (y - f(x0)).div_(step)
    near = step.abs() <= at.abs().mul_(128 * torch.finfo(x.dtype).eps)
    if near.any():
        leaf = at.requires_grad_()
        (tangent,) = torch.autograd.grad(f(leaf).sum(), leaf)
        slope = torch.where(near, tangent, slope)
    return _Sloped.apply(x, y, slope)


def _max_pool(call: Call, x: Tensor, x0: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """Each window's difference at the place of the greater maximum, which is at least as far from its partner."""
    pool = getattr(F, call.name)
    kwargs = {**kwargs, "return_indices": True}
    (y, place), (y0, place0) = pool(x.detach(), *args, **kwargs), pool(x0, *args, **kwargs)
    place = torch.where(y >= y0, place, place0).flatten(2)
    picked = x.flatten(2).gather(2, place)
    step = picked.detach() - x0.flatten(2).gather(2, place)
    change = (y - y0).flatten(2)
    slope = torch.where(step == 0, torch.ones_like(step), change / step)
    return _Sloped.apply(picked.view_as(y), y, slope.view_as(y))


class _Sloped(torch.autograd.Function):
    """y, whose change per change of x is the slope."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None


def _no_rule(call: Call, what: str = "") -> AttributionError:
    return AttributionError(
        f"deeplift has no rule for {call.name}{what and ' ' + what} (layer {call.layer or 'network'}); use "
        "integrated_gradients"
    )


def _other_way(call: Call) -> AttributionError:
    return AttributionError(
        f"deeplift: at layer {call.layer or 'network'} ({call.name}) the network goes another way for the image than "
        "for the baseline; use integrated_gradients"
    )
