"""Gradients with respect to the input image, plain or guided, and means of them over noise or a straight path.

With a `cxrkit.models.Classifier` the input is the grey image before its encoding, one value per pixel; with
other networks the channels of their input are summed. Maps keep their sign: a paper that shows |gradient|
takes the absolute value of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.folding import folded
from cxrkit.attribution.registry import check_choice, method
from cxrkit.attribution.target import Explained
from cxrkit.errors import ParameterError

__all__ = [
    "PROTOCOLS",
    "by_protocol",
    "input_x_gradient",
    "integrated_gradients",
    "is_number",
    "noise_source",
    "quadrature",
    "saliency",
    "smoothgrad",
    "summed_over_points",
    "whole_number",
]

PROTOCOLS = ("paper", "authors", "corrected")


@method("gradient")
def saliency(explained: Explained, images: Tensor) -> Tensor:
    """Gradient of the score, signed, summed over input channels. [B, L, H, W], score per unit of
    brightness.
    """
    _, gradients = _input_gradients(explained, images)
    return torch.stack([gradient.sum(1) for gradient in gradients], 1)


@method("gradient")
def input_x_gradient(explained: Explained, images: Tensor, *, protocol: str = "corrected") -> Tensor:
    """Input times gradient, summed over input channels. [B, L, H, W], in units of the score.

    `protocol="authors"`: the published code of paper `normgrad` differentiates the sum of all outputs instead of
    one of them, so every label gets the same map. "paper" and "corrected" agree.
    """
    inputs, gradients = by_protocol(explained, images, protocol)
    return torch.stack([(inputs * gradient).sum(1) for gradient in gradients], 1)


@method("gradient")
def smoothgrad(
    explained: Explained,
    images: Tensor,
    *,
    n_samples: int = 25,
    noise: float = 0.15,
    squared: bool = False,
    seed: int = 0,
) -> Tensor:
    """Mean gradient over `n_samples` noisy copies of the image. [B, L, H, W], score per unit of brightness.

    Gaussian noise with a standard deviation of `noise` (0 or more) times the image's own maximum less minimum is
    added to the input, which may leave [0, 1]. `squared` takes the mean of the squared gradients of each channel:
    then no value is below 0, and the unit is squared too. `seed` fixes the noise of each image, whatever the
    batches. Source: Smilkov et al. 2017; paper `path` uses 25 squared samples with noise 0.15.
    """
    whole_number("n_samples", n_samples)
    if not is_number(noise) or not 0 <= noise < math.inf:
        raise ParameterError(f"noise must be a share of the image's range, 0 or more; got {noise!r}")
    draw = noise_source(explained, images, seed)
    deviation = noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))

    def near(row: Tensor, step: Tensor):
        points = images[row] + deviation[row] * torch.stack([draw(r) for r in row.tolist()])
        return points, lambda gradient: (gradient**2 if squared else gradient).sum(1) / n_samples

    return summed_over_points(explained, images, n_samples, near)


@method("gradient")
def integrated_gradients(
    explained: Explained,
    images: Tensor,
    *,
    n_steps: int = 50,
    baseline: str | float | Tensor = "black",
    rule: str = "gauss_legendre",
) -> Tensor:
    """Gradients integrated along the straight path from `baseline`, times the difference. [B, L, H, W], in
    units of the score.

    The map sums to score(image) - score(baseline), up to the error of `n_steps` points by `rule`:
    "gauss_legendre", "trapezoid", or "uniform" (the plain mean over points that include both ends, as in paper
    `path`). `baseline`: "black" (0), "white" (1), "mean" (each image's own mean per channel), "blur" (the image
    under a Gaussian of 1/16 of its shorter side), a number, or a tensor that broadcasts to the images. Source:
    Sundararajan et al. 2017, Eq. 1 and 3; paper `covid` uses Gauss-Legendre from black with 10 to 200 points
    (its preset: 50), paper `path` 25 uniform points.
    """
    nodes, weights = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in quadrature(rule, n_steps))
    start = baseline_images(images, baseline)
    difference = images - start

    def along(row: Tensor, step: Tensor):
        points = start[row] + nodes[step].view(-1, 1, 1, 1) * difference[row]
        displacement = weights[step].view(-1, 1, 1, 1) * difference[row]
        return points, lambda gradient: (gradient * displacement).sum(1)

    return summed_over_points(explained, images, n_steps, along)


def summed_over_points(
    explained: Explained,
    images: Tensor,
    n_points: int,
    at: Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]],
) -> Tensor:
    """What `n_points` inputs for each image add up to, every label: [B, L, ...].

    `at(row, step)` says for images `row` [b] at point `step` [b], in order, which inputs [b, C, H, W] to take and
    what share [b, ...] a gradient there [b, C, H, W] has in the sum. Labels share the forward passes, and only
    the sum is kept.
    """
    numbers = torch.arange(len(images) * n_points, device=images.device)
    total = None
    with folded(explained, images[:1], len(numbers)):
        for chosen in explained.steps(numbers.split(explained.batch)):
            row = chosen // n_points
            points, share = at(row, chosen % n_points)
            _, gradients = _input_gradients(explained, points)
            # A product instead of an indexed sum: the order of additions stays fixed on every device.
            owner = (row == torch.arange(len(images), device=images.device)[:, None]).to(images.dtype)
            part = torch.stack([torch.tensordot(owner, share(gradient), dims=1) for gradient in gradients], 1)
            total = part if total is None else total.add_(part)
    return total


def _input_gradients(explained: Explained, images: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """A copy of the images [B, C, H, W] and, label by label, the gradient of the score with respect to it."""
    inputs = images.detach().clone().requires_grad_()
    scores = explained.scores(explained.logits(inputs))
    return inputs.detach(), explained.gradients(scores, inputs)


def by_protocol(explained: Explained, images: Tensor, protocol: str) -> tuple[Tensor, Iterator[Tensor]]:
    """As `_input_gradients`; for the authors of paper `normgrad` the gradient of the sum of all outputs."""
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol != "authors":
        return _input_gradients(explained, images)
    inputs = images.detach().clone().requires_grad_()
    logits = explained.logits(inputs)
    outputs = logits.sigmoid() if explained.output == "probability" else logits
    (gradient,) = explained.gradients(outputs.sum(1, keepdim=True), inputs)
    return inputs.detach(), iter([gradient] * explained.scores(logits.detach()).shape[1])


def noise_source(explained: Explained, images: Tensor, seed: int) -> Callable[[int], Tensor]:
    """A function that draws standard normal noise [C, H, W] for a row of the images, anew at every call.

    Each image has a generator of its own, from the seed and its place among all images: neither batches nor the
    device change the noise.
    """
    whole_number("seed", seed, 0)
    rows = range(explained.first_row, explained.first_row + len(images))
    seeds = [int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]) for row in rows]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda row: torch.randn(images.shape[1:], generator=generators[row]).to(images)


def is_number(value: object) -> bool:
    """Whether the value is a Python number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(name: str, value: object, least: int = 1, why: str = "") -> None:
    """ParameterError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ParameterError(f"{name} must be a whole number, at least {least}{why}; got {value!r}")


def quadrature(rule: str, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1] and weights that sum to 1, both [n_steps], for a mean over a path.

    `rule` is "gauss_legendre", "trapezoid" or "uniform". ParameterError for another, and for too few steps.
    """
    check_choice("rule of integrated_gradients:", rule, ("gauss_legendre", "trapezoid", "uniform"))
    whole_number("n_steps", n_steps, 1 if rule == "gauss_legendre" else 2, f" with {rule}")
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        return (nodes + 1) / 2, weights / 2
    weights = np.ones(n_steps)
    if rule == "trapezoid":
        weights[[0, -1]] /= 2
    return np.linspace(0, 1, n_steps), weights / weights.sum()
