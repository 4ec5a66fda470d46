"""The right map of every method, slowly, in float64, from its formula in METHODS.md.

An oracle gets a `Subject`, the labels (indices), and the options as `attribute` does, and returns maps [B, L, H, W]. It
knows nothing of the package. `NoRule` means that the method must refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fuzz.algebra import Guided, NoRule, Plain, Rescaled
from fuzz.dynamic import BcosConv, Dynamic
from fuzz.relevance import Relevance
from fuzz.steps import Plan

Scores = Callable[[Tensor], Tensor]


class Subject:
    """A plan with what is asked of it: `scores` [B, L] of images, under any reading."""

    def __init__(self, plan: Plan, labels: list[int], output: str, forward: Callable[[Tensor], Tensor] | None = None):
        self.plan, self.labels, self.output = plan, labels, output
        self.images = plan.images
        self.nudge: Callable[[Tensor], Tensor] | None = None  # moves all values a little, to see what is determined
        self.given = forward

    def scores(self, images: Tensor, ops=None) -> Tensor:
        logits = self.forward(images, ops)
        chosen = logits[:, self.labels]
        if self.output == "logit":
            return chosen
        return (ops or Plain()).sigmoid(chosen, torch.sigmoid) if isinstance(ops, Rescaled) else chosen.sigmoid()

    def forward(self, images: Tensor, ops=None) -> Tensor:
        if self.given is not None and ops is None:
            return self.given(images)
        return self.plan.forward(self.reading(ops or Plain()), self.moved(images))

    def moved(self, images: Tensor) -> Tensor:
        return images if self.nudge is None else images + self.nudge(images)

    def reading(self, ops):
        ops.noise = self.nudge
        return ops

    def gradients(self, images: Tensor, ops=None) -> Tensor:
        """Gradient of each label's score. [B, L, C, H, W]"""
        x = images.detach().clone().requires_grad_()
        scores = self.scores(x, ops)
        return torch.stack([_gradient(score.sum(), x) for score in scores.unbind(1)], 1)


def _with_labels(s: Subject, labels: list[int]) -> Subject:
    other = Subject(s.plan, labels, s.output, s.given)
    other.nudge = s.nudge
    return other


def _gradient(score: Tensor, x: Tensor) -> Tensor:
    if not score.requires_grad:
        raise NoRule("the score doesn't depend on the image")
    (found,) = torch.autograd.grad(score, x, retain_graph=True)
    return found


def baseline(images: Tensor, name) -> Tensor:
    if name == "white":
        return torch.ones_like(images)
    if name == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if isinstance(name, Tensor):
        return name.double().expand_as(images)
    return torch.full_like(images, 0.0 if name == "black" else float(name))


def _draws(images: Tensor, seed: int, count: int) -> list[Tensor]:
    """The documented noise: every image has a generator of its own, from the seed and its place."""
    draws = []
    for row in range(len(images)):
        state = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        draws.append([torch.randn(images.shape[1:], generator=generator).double() for _ in range(count)])
    return [torch.stack([of_image[n] for of_image in draws]) for n in range(count)]


# Gradients


def saliency(s: Subject) -> Tensor:
    return s.gradients(s.images).sum(2)


def input_x_gradient(s: Subject, protocol: str = "corrected") -> Tensor:
    if protocol == "authors":
        return (s.images[:, None] * _of_all_outputs(s)).sum(2)
    return (s.images[:, None] * s.gradients(s.images)).sum(2)


def _of_all_outputs(s: Subject) -> Tensor:
    every = _with_labels(s, list(range(s.plan.outputs)))
    return every.gradients(s.images).sum(1, keepdim=True).expand(-1, len(s.labels), -1, -1, -1)


def smoothgrad(s: Subject, n_samples: int = 25, noise: float = 0.15, squared: bool = False, seed: int = 0) -> Tensor:
    spread = noise * (s.images.amax((1, 2, 3), keepdim=True) - s.images.amin((1, 2, 3), keepdim=True))
    found = [s.gradients(s.images + spread * draw) for draw in _draws(s.images, seed, n_samples)]
    return (sum(g.square() if squared else g for g in found) / n_samples).sum(2)


def guided_backprop(s: Subject, protocol: str = "corrected") -> Tensor:
    if protocol == "authors":
        return _of_all_outputs(s).sum(2)
    ops = Guided()
    found = s.gradients(s.images, ops)
    if not ops.rectified:
        raise NoRule("no rectifier")
    return found.sum(2)


def _quadrature(rule: str, n_steps: int) -> list[tuple[float, float]]:
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        return list(zip((nodes + 1) / 2, weights / 2, strict=True))
    nodes, weights = np.linspace(0, 1, n_steps), np.ones(n_steps)
    if rule == "trapezoid":
        weights[[0, -1]] = 0.5
    return list(zip(nodes, weights / weights.sum(), strict=True))


def _along(s: Subject, start: Tensor, rule: str, n_steps: int) -> Tensor:
    """[B, L, C, H, W]"""
    way = s.images - start
    return sum(w * way[:, None] * s.gradients(start + t * way) for t, w in _quadrature(rule, n_steps))


def integrated_gradients(s: Subject, n_steps: int = 50, baseline="black", rule: str = "gauss_legendre") -> Tensor:
    return _along(s, globals()["baseline"](s.images, baseline), rule, n_steps).sum(2)


def deeplift(s: Subject, baseline="black", n_baselines: int = 1, noise: float = 0.001, seed: int = 0) -> Tensor:
    start = globals()["baseline"](s.images, baseline)
    starts = [start]
    if n_baselines > 1:
        starts = [start + noise * draw for draw in _draws(s.images, seed, n_baselines)]
    total = 0
    for each in starts:
        slopes = s.gradients(torch.cat([s.images, each]), Rescaled()).chunk(2)[0]
        maps = ((s.images - each)[:, None] * slopes).sum(2)
        gap = (maps.sum((2, 3)) - (s.scores(s.images) - s.scores(each))).abs()
        assert s.nudge or (gap < 1e-6 * (1 + maps.abs().sum((2, 3)))).all(), "the oracle isn't complete"
        total = total + maps
    return total / len(starts)


# Paths


def blur_ig(s: Subject, n_steps: int = 100, max_sigma: float = 50) -> Tensor:
    width, total = max_sigma / n_steps, 0
    for step in range(n_steps):
        here, there = _blurred(s.images, step * width), _blurred(s.images, step * width + 0.01)
        total = total - width * ((there - here) / 0.01)[:, None] * s.gradients(here)
    return total.sum(2)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    planes = images.flatten(0, 1).numpy()
    blurred = [gaussian_filter(p, sigma, mode="constant", truncate=4.0) if sigma > 0 else p for p in planes]
    return torch.from_numpy(np.stack(blurred)).view_as(images)


def guided_ig(
    s: Subject, n_steps: int = 200, fraction: float = 0.25, max_distance: float = 0.02, baseline="black"
) -> Tensor:
    start = globals()["baseline"](s.images, baseline)
    maps = torch.zeros(len(s.images), len(s.labels), *s.images.shape[1:], dtype=torch.float64)
    for row, image in enumerate(s.images):
        for place, label in enumerate(s.labels):
            one = _with_labels(s, [label])
            maps[row, place] = _guided_path(one, image, start[row], n_steps, fraction, max_distance)
    return maps.sum(2)


def _guided_path(s: Subject, image: Tensor, start: Tensor, n_steps: int, fraction: float, band: float) -> Tensor:
    """One pixel after the other, by the text: lowest gradients move first, none too far from the straight path."""
    x, way = start.clone(), image - start
    total, length = torch.zeros_like(x), way.abs().sum()
    for step in range(1, n_steps + 1):
        alpha = step / n_steps
        gradient = s.gradients(x[None])[0, 0]
        if s.nudge is not None:  # of gradients that tie, rounding lets one move first
            gradient = gradient + 1e-6 * gradient * s.nudge(gradient)
        low, high = (start + min(max(end, 0), 1) * way for end in (alpha - band, alpha + band))
        old = x.clone()
        behind = (x - low) * way.sign() < 0
        x = torch.where(behind, low, x)
        while True:
            steep = gradient.abs().clone()
            steep[(x == high) | (way == 0)] = math.inf
            rank = math.floor(fraction * (steep.numel() - 1))
            limit = steep.flatten().sort().values[rank]
            chosen = (steep <= limit) & (steep < math.inf)
            left, room = (image - x).abs().sum() - (1 - alpha) * length, ((high - x).abs() * chosen).sum()
            if not chosen.any():
                break
            if left > room:
                x = torch.where(chosen, high, x)
                continue
            share = max(float(left / room), 0.0) if room > 0 else 0.0
            x = torch.where(chosen, x + share * (high - x), x)
            break
        total += gradient * (x - old)
    return total


# Regions and windows


def xrai(
    s: Subject,
    n_steps: int = 100,
    rule: str = "gauss_legendre",
    algorithm: str = "full",
    segments: Tensor | None = None,
    attribution: Tensor | None = None,
) -> Tensor:
    if attribution is None:
        low, high = (e(s.images, (1, 2, 3), keepdim=True).expand_as(s.images) for e in (torch.amin, torch.amax))
        both = _along(s, low, rule, n_steps) + _along(s, high, rule, n_steps)
        attribution = (both / 2).amax(2)
    masks = [label_map == value for label_map in segments for value in label_map.unique()]
    return torch.stack([torch.stack([_regions(m, masks, algorithm) for m in maps]) for maps in attribution.double()])


def _regions(attribution: Tensor, masks: list[Tensor], algorithm: str) -> Tensor:
    result, free = torch.zeros_like(attribution), torch.ones_like(attribution, dtype=torch.bool)
    if algorithm == "fast":
        order = sorted(range(len(masks)), key=lambda i: -float(attribution[masks[i]].mean()))
    for turn in range(len(masks)):
        if algorithm == "fast":
            new = masks[order[turn]] & free
            if new.sum() < 50:
                continue
        else:
            gains = [float(attribution[m & free].mean()) if (m & free).sum() >= 50 else -math.inf for m in masks]
            if max(gains) == -math.inf:
                break
            new = masks[int(np.argmax(gains))] & free
        result[new] = attribution[new].mean()
        free &= ~new
    if free.any():
        result[free] = attribution[free].mean()
    return result


def occlusion(s: Subject, window=15, stride=8, fill="black") -> Tensor:
    window, stride = ((v, v) if isinstance(v, int) else v for v in (window, stride))
    filled = baseline(s.images, fill)
    with torch.no_grad():
        score = s.scores(s.images)
        total = torch.zeros(*score.shape, *s.images.shape[2:], dtype=torch.float64)
        times = torch.zeros(s.images.shape[2:], dtype=torch.float64)
        for top in _starts(s.images.shape[2], window[0], stride[0]):
            for left in _starts(s.images.shape[3], window[1], stride[1]):
                part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                covered = s.images.clone()
                covered[part] = filled[part]
                total[part] += (score - s.scores(covered))[:, :, None, None]
                times[part] += 1
    return total / times


def _starts(size: int, window: int, stride: int) -> range:
    return range(0, stride * (math.ceil((size - window) / stride) + 1), stride)


# Relevance


def bcos(s: Subject, check: bool = True) -> Tensor:
    """Encoded image times its weights in explanation mode."""
    if not any(isinstance(step, BcosConv) for step in s.plan.everything()):
        raise NoRule("no B-cos layers")
    x = s.plan.encode(Plain(), s.moved(s.images)).detach().requires_grad_()
    logits = s.plan.classify(s.reading(Dynamic()), x)
    weights = torch.stack([_gradient(logits[:, label].sum(), x) for label in s.labels], 1)
    return (x.detach()[:, None] * weights).sum(2)


def lrp(s: Subject, check: bool = True, **options) -> Tensor:
    return _relevance(s, Relevance("lrp", **options))


def rap(s: Subject, check: bool = True, protocol: str = "corrected") -> Tensor:
    return _relevance(s, Relevance("rap", protocol=protocol))


def _relevance(s: Subject, ops: Relevance) -> Tensor:
    with torch.no_grad():
        encoded = s.plan.encode(Plain(), s.moved(s.images))
        image = s.reading(ops).image(encoded)
        return ops.maps(s.plan.classify(ops, image), image, s.labels)
