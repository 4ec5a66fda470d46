"""Does a map depend on what the network learned: randomised networks, similarity of maps, architectures.

A map that stays the same when the weights become random shows the image, not the network. Similarities of two maps
keep the leading shape: ``[..., H, W]`` twice -> ``[...]``; a constant map, or one with a value that is not finite,
resembles nothing and gives nan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import flag, numbers, pair_of_maps
from cxrkit.metrics.statistics import Interval, bootstrap
from cxrkit.models import randomised

__all__ = ["map_correlation", "map_distance", "randomised", "rank_correlation", "reproducibility"]


def map_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson correlation of the pixels of two maps, ``[..., H, W]`` -> ``[...]`` in [-1, 1]; chance 0.

    r = sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b|). Unchanged by a positive factor or a constant
    added to a map; ruled by the few strongest pixels. nan: a constant map, a value that is not finite. Raises
    ParameterError for shapes that don't fit together.
    """
    maps, others = pair_of_maps(maps, others)
    return _pearson(maps.flatten(-2), others.flatten(-2)).where(_varied(maps) & _varied(others), torch.nan).float()


def rank_correlation(maps: Tensor, others: Tensor, absolute: bool = False) -> Tensor:
    """Spearman's rank correlation of the pixels of two maps, ``[..., H, W]`` -> ``[...]`` in [-1, 1]; chance 0.

    The Pearson correlation of ranks; equal values share their mean rank. ``absolute`` ranks |map|, which forgives a
    flipped sign and asks only where a map is strong. Unchanged by any rising function of a map. Weak pixels count as
    much as strong ones, so a map's wide quiet areas, and how ties of 0 arise there, decide much. nan: a constant map
    (of absolute values, if those are asked for), a value that is not finite. Raises ParameterError for shapes that
    don't fit together. Source: Adebayo et al., NeurIPS 2018, with and without absolute values.
    """
    maps, others = pair_of_maps(maps, others)
    if flag("absolute", absolute):
        maps, others = maps.abs(), others.abs()
    valid = _varied(maps) & _varied(others)
    return _pearson(_ranks(maps.flatten(-2)), _ranks(others.flatten(-2))).where(valid, torch.nan).float()


def map_distance(maps: Tensor, others: Tensor) -> Tensor:
    """Relative distance of two maps, |a - b| / (|a| + |b|), ``[..., H, W]`` -> ``[...]`` in [0, 1].

    Norms are Euclidean. 0: equal; 1: opposite, or one of them 0; about 0.7 for independent maps of the same norm and
    mean 0. Unlike the correlations it sees the scale. nan: both maps 0, a value that is not finite. Raises
    ParameterError for shapes that don't fit together.
    """
    maps, others = pair_of_maps(maps, others)
    norms = torch.linalg.vector_norm(maps, dim=(-2, -1)) + torch.linalg.vector_norm(others, dim=(-2, -1))
    return (torch.linalg.vector_norm(maps - others, dim=(-2, -1)) / norms).clamp(max=1).float()


def reproducibility(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    patients: Sequence,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Distance of the mean scores of two architectures on the same images, with its interval over patients.

    ``scores_a``, ``scores_b`` and ``patients``: ``[N]``, image by image. DoM = |mean_a - mean_b|, at least 0; lower:
    the explanations depend less on the architecture. Images with a nan under either are left out of both. The interval
    is that of the signed difference (:func:`cxrkit.metrics.bootstrap`, both scores of a patient drawn together),
    folded at 0: where it contains 0, the lower bound is 0. nan as there. Two networks that are both at chance also
    have a DoM of 0. Raises ParameterError for lengths that differ. Source: paper `normgrad`, DoM; the interval is
    ours.
    """
    a, b = numbers("scores_a", scores_a), numbers("scores_b", scores_b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ParameterError(f"scores_a {a.shape} and scores_b {b.shape} must be two lists over the same images")
    signed = bootstrap(a - b, patients, n, seed, confidence)
    low, high = sorted((abs(signed.low), abs(signed.high))) if not np.isnan(signed.low) else (np.nan, np.nan)
    return Interval(abs(signed.mean), 0.0 if signed.low <= 0 <= signed.high else low, high)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = (values - values.mean(-1, keepdim=True) for values in (a, b))
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return ((a * b).sum(-1) / norms).clamp(-1, 1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks ``[..., N]`` along the last axis; equal values share the mean of their places."""
    return torch.from_numpy(rankdata(values.cpu().numpy(), axis=-1)).to(values.device)


def _varied(maps: Tensor) -> Tensor:
    """Whether a map is finite and not constant, ``[...]``."""
    return maps.isfinite().all(-1).all(-1) & (maps.amax((-2, -1)) > maps.amin((-2, -1)))
