"""Gradients collected along paths that fit the image: guided by the gradient itself, or from blurred to sharp.

What one input value adds is its gradient times its displacement, summed over the path; channels are summed last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.folding import folded
from cxrkit.attribution.gradient import is_number, summed_over_points, whole_number
from cxrkit.attribution.registry import method
from cxrkit.attribution.target import Explained
from cxrkit.errors import ParameterError

__all__ = ["blur_ig", "guided_ig"]

_TRUNCATE = 4.0  # standard deviations at which scipy.ndimage cuts a Gaussian off
_SIGMA_STEP = 0.01  # of the forward difference, as in the published code


@method("path")
def guided_ig(
    explained: Explained,
    images: Tensor,
    *,
    n_steps: int = 200,
    fraction: float = 0.25,
    max_distance: float = 0.02,
    baseline: str | float | Tensor = "black",
) -> Tensor:
    """Guided integrated gradients: each label of each image has a path of its own. [B, L, H, W], in units of the
    score.

    In step t of `n_steps` the `fraction` (above 0, at most 1) of values with the lowest |gradient| moves towards
    the image, and the next fraction where that isn't enough, until the L1 distance to the image is 1 - t / n_steps
    of the whole. No value may be further than `max_distance` (0 to 1, a share of its way) from the straight path:
    0 is the straight path with a left Riemann sum, 1 leaves the path free. `baseline`: as for integrated
    gradients. The map sums to score(image) - score(baseline) as n_steps grows.

    Positions and distances are float64, gradients are as exact as the network. On ReLU networks gradients that
    tie or differ in the last digit decide the order and change the map: a network and images in float64 make it
    reproducible. Source: Kapishnikov et al. 2021; paper `path` uses 25 steps, fraction 0.5, distance 1.
    """
    whole_number("n_steps", n_steps)
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise ParameterError(f"fraction must be a number above 0 and at most 1; got {fraction!r}")
    if not is_number(max_distance) or not 0 <= max_distance <= 1:
        raise ParameterError(f"max_distance must be a number from 0 to 1; got {max_distance!r}")
    start = baseline_images(images, baseline).flatten(1).double()
    difference = images.flatten(1).double() - start
    with torch.no_grad():
        labels = explained.scores(explained.logits(images[:1])).shape[1]
    paths = torch.arange(len(images) * labels, device=images.device)
    position = torch.zeros(len(paths), difference.shape[1], dtype=torch.float64, device=images.device)
    total = torch.zeros_like(position)
    with folded(explained, images[:1], n_steps * len(paths)):
        for step in explained.steps(range(1, n_steps + 1)):
            for path in paths.split(explained.batch):
                row, old = path // labels, position[path]
                point = (start[row] + old * difference[row]).to(images.dtype).view(-1, *images.shape[1:])
                gradient = _own_gradients(explained, point, path % labels).flatten(1)
                new = _moved(old, difference[row].abs(), gradient.abs(), step / n_steps, fraction, max_distance)
                # The gradient stays the same within a step, so only where the step ends counts.
                total[path] += gradient * (new - old) * difference[row]
                position[path] = new
    return total.view(len(images), labels, *images.shape[1:]).sum(2)


def _own_gradients(explained: Explained, points: Tensor, label: Tensor) -> Tensor:
    """For each point [P, C, H, W] the gradient of the score of its own label [P]: one backward pass for all."""
    inputs = points.requires_grad_()
    scores = explained.scores(explained.logits(inputs))
    return next(explained.gradients(scores.gather(1, label[:, None]), inputs))


def _moved(position: Tensor, way: Tensor, steepness: Tensor, alpha: float, fraction: float, band: float) -> Tensor:
    """Positions [P, N] on the ways from baseline (0) to image (1) after the step that ends at `alpha`.

    `way` is the length of each way, `steepness` the |gradient|. All paths go on together; one that is through
    stays as it is.
    """
    low, high = max(alpha - band, 0.0), min(alpha + band, 1.0)
    position = position.clamp(min=low)
    target = (1 - alpha) * way.sum(1, keepdim=True)
    rank = math.floor(fraction * (way.shape[1] - 1)) + 1  # of the lower quantile
    going = torch.ones_like(target, dtype=torch.bool)
    while going.any():
        steepness = steepness.masked_fill((position == high) | (way == 0), math.inf)
        threshold = steepness.kthvalue(rank, 1, keepdim=True).values
        chosen = going & (steepness <= threshold) & (steepness < math.inf)
        room = (way * (high - position) * chosen).sum(1, keepdim=True)
        share = ((way * (1 - position)).sum(1, keepdim=True) - target) / room
        partly = position + share.clamp(min=0) * (high - position)
        position = torch.where(chosen, torch.where(share > 1, high, partly), position)
        going = (share > 1) & chosen.any(1, keepdim=True)
    return position


@method("path")
def blur_ig(explained: Explained, images: Tensor, *, n_steps: int = 100, max_sigma: float = 50) -> Tensor:
    """Blur integrated gradients: the path goes through Gaussian blurs of the image. [B, L, H, W], in units of the
    score.

    Blurs of 0 to `max_sigma` pixels (at least 0) in `n_steps` equal steps, with zeros beyond the border; the
    change of the blur is a forward difference of 0.01 pixels, the sum a left Riemann sum. The map sums to
    score(image) - score(image at max_sigma) as n_steps grows; at 100 steps about a tenth may be missing.
    Source: Xu et al. 2020; 100 steps to 50 pixels as in paper `path`.
    """
    whole_number("n_steps", n_steps)
    if not is_number(max_sigma) or not 0 <= max_sigma < math.inf:
        raise ParameterError(f"max_sigma must be a number of pixels, 0 or more; got {max_sigma!r}")
    width = max_sigma / n_steps

    def along(row: Tensor, step: Tensor):
        sigma, sharp = width * step.double(), images[row].double()
        point = _blurred(sharp, sigma)
        change = (_blurred(sharp, sigma + _SIGMA_STEP) - point) / _SIGMA_STEP
        displacement = (-width * change).to(images.dtype)
        return point.to(images.dtype), lambda gradient: (gradient * displacement).sum(1)

    return summed_over_points(explained, images, n_steps, along)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image [b, C, H, W] under a Gaussian of its own sigma [b], zeros beyond the border, as scipy.ndimage."""
    rows, columns = (_blur_matrices(sigma, size)[:, None] for size in images.shape[-2:])
    return rows @ images @ columns.mT


def _blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """[b, size, size]: the blur of a line of pixels as a matrix product, quick and exact at every sigma."""
    sigma = sigma[:, None]
    reach = (_TRUNCATE * sigma + 0.5).floor()
    distance = torch.arange(max(size, int(reach.max()) + 1), dtype=sigma.dtype, device=sigma.device)
    # Below a pixel's width only the middle weight remains: sigma 0 is the image itself.
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2) * (distance <= reach)
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    line = torch.arange(size, device=sigma.device)
    return kernel[:, (line[:, None] - line).abs()]
