"""Gradients with respect to the input image, and integrals of them along a straight path.

With a `cxrkit.models.Classifier` the input is the grey image before its encoding, one value per pixel; with
other networks the channels of their input are summed. Maps keep their sign: a paper that shows |gradient|
takes the absolute value of the map.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.explained import Explained
from cxrkit.attribution.registry import method, unknown
from cxrkit.errors import ParameterError

__all__ = ["input_x_gradient", "integrated_gradients", "saliency"]


@method(
    "gradient",
    papers=("covid", "path"),
    meaning="how fast the score rises with the brightness of a pixel",
    formula=r"\sum_c \partial y / \partial x_c",
    signed=True,
    forwards="1",
    backwards="L",
)
def saliency(explained: Explained, images: Tensor) -> Tensor:
    """Gradient of the score, signed, summed over input channels. [B, L, H, W], score per unit of
    brightness.
    """
    _, gradients = _input_gradients(explained, images)
    return torch.stack([gradient.sum(1) for gradient in gradients], 1)


@method(
    "gradient",
    papers=("normgrad", "covid"),
    meaning="what a pixel adds to the score if the network were linear around the image",
    formula=r"\sum_c x_c \, \partial y / \partial x_c",
    signed=True,
    forwards="1",
    backwards="L",
)
def input_x_gradient(explained: Explained, images: Tensor) -> Tensor:
    """Input times gradient, summed over input channels. [B, L, H, W], in units of the score."""
    inputs, gradients = _input_gradients(explained, images)
    return torch.stack([(inputs * gradient).sum(1) for gradient in gradients], 1)


@method(
    "gradient",
    papers=("covid", "path"),
    meaning="what each pixel adds to the score on the way from the baseline to the image",
    formula=r"\sum_c (x_c - x'_c) \int_0^1 \partial y(x' + \alpha (x - x')) / \partial x_c \, d\alpha",
    signed=True,
    forwards="n_steps",
    backwards="n_steps x L",
)
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

    The map sums to score(image) - score(baseline), up to the error of `n_steps` points by `rule`
    ("gauss_legendre" or "trapezoid"). `baseline`: "black" (0), "white" (1), "mean" (each image's own mean
    per channel), "blur" (the image under a Gaussian of 1/16 of its shorter side), a number, or a tensor
    that broadcasts to the images. Source: Sundararajan et al. 2017, Eq. 1 and 3; paper `covid` uses
    Gauss-Legendre from black.
    """
    nodes, weights = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in _rule(rule, n_steps))
    start = baseline_images(images, baseline)
    difference = images - start
    points = torch.arange(len(images) * n_steps, device=images.device)
    total = None
    for chosen in points.split(explained.batch):
        row, step = chosen // n_steps, chosen % n_steps
        along = start[row] + nodes[step].view(-1, 1, 1, 1) * difference[row]
        _, gradients = _input_gradients(explained, along)
        # A product instead of an indexed sum: the order of additions stays fixed on every device.
        share = torch.zeros(len(images), len(chosen), dtype=images.dtype, device=images.device)
        share[row, torch.arange(len(chosen), device=images.device)] = weights[step]
        terms = [torch.tensordot(share, (g * difference[row]).sum(1), dims=1) for g in gradients]
        total = torch.stack(terms, 1) if total is None else total.add_(torch.stack(terms, 1))
    return total


def _input_gradients(explained: Explained, images: Tensor):
    """A copy of the images [B, C, H, W] and, label by label, the gradient of the score with respect to it."""
    inputs = images.detach().clone().requires_grad_()
    scores = explained.scores(explained.logits(inputs))
    return inputs.detach(), explained.gradients(scores, inputs)


def _rule(rule: str, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1] and weights that sum to 1."""
    fewest = 2 if rule == "trapezoid" else 1
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < fewest:
        raise ParameterError(f"n_steps must be a whole number, at least {fewest} with {rule}; got {n_steps!r}")
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        return (nodes + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(n_steps, 1 / (n_steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, n_steps), weights
    raise unknown("rule of integrated_gradients:", rule, ("gauss_legendre", "trapezoid"))
