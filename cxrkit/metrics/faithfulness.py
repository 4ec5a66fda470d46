"""Does a map say what the network does: perturbation curves, completeness, sensitivity to baseline and label.

Perturbation curves change an image's pixels in the order of its map, highest value first, and follow the score. They
run the network off the images it knows: how pixels are changed rules the numbers, so compare methods only under one
setting, and with the area of a random map (``torch.rand_like(maps)``), which is the chance level here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cxrkit.attribution.api import checked_images, chunk_size, device_of
from cxrkit.attribution.baselines import baseline_images
from cxrkit.attribution.layers import find_layer, trace
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.progress import progress_bar
from cxrkit.attribution.target import Explained, logit_bias
from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import dense, entries, number, one_of, real, real_maps, whole
from cxrkit.metrics.sanity import SIMILARITIES

__all__ = [
    "CompletenessGap",
    "Curve",
    "baseline_sensitivity",
    "class_sensitivity",
    "completeness_gap",
    "deletion",
    "insertion",
    "pixel_flipping",
]

OUTPUTS = ("logit", "probability")
PROMISES = ("score", "difference", "without_bias")


class Curve(NamedTuple):
    """A score followed while an image changes.

    `fractions` [S + 1]: share of the pixels (or regions) changed, from 0; `scores` [B, L, S + 1]; `area` [B, L].
    """

    fractions: Tensor
    scores: Tensor
    area: Tensor


def insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    labels=None,
    *,
    baseline: str | float | Tensor = "blur",
    steps: int = 50,
    output: str = "probability",
    chunk: int | None = None,
    progress: bool | None = None,
) -> Curve:
    """Score while an image's pixels come back on a baseline, highest value of its map first; area: higher is better.

    ``images`` ``[B, C, H, W]``, ``maps`` ``[B, L, H, W]`` of the ``labels`` (names or indices, None: all); each
    label's score follows its own map. After step k of S the round(k N / S) first of the N pixels are the image's. The
    area is the trapezoidal integral of the score over the share of pixels. ``output``: "probability" (as in the
    source), area in [0, 1], or "logit", without bounds. ``baseline``: see
    :func:`cxrkit.attribution.baselines.baseline_images`. ``steps``: at most one per pixel; each costs a forward pass
    per image and label. Equal values go in row-major order, so a map with many equal values (zeros after a ReLU,
    XRAI segments) is partly judged by that order. ``chunk`` and ``progress`` as in :func:`cxrkit.attribute`.

    Only the order of a map's values counts. The area grows with the score of the whole image: compare maps on the
    same images. Chance: the area of a random map. What changes the ranking: baseline, steps, output, map resolution.
    nan: a constant map, a value that is not finite. Raises ParameterError for shapes and options that don't fit.
    Source: Petsiuk et al., RISE, BMVC 2018.
    """
    inputs = _checked_images(model, images)
    start = _baseline(inputs, baseline)
    return _area_under(model, (start, inputs), maps, labels, steps, output, chunk, progress)


def deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    labels=None,
    *,
    baseline: str | float | Tensor = "black",
    steps: int = 50,
    output: str = "probability",
    chunk: int | None = None,
    progress: bool | None = None,
) -> Curve:
    """Score while an image's pixels give way to a baseline, highest value of its map first; area: lower is better.

    Arguments, rules and nan as in :func:`insertion`; after step k the round(k N / S) first pixels are the
    baseline's. Black pixels make edges that a network may answer to: an area can be low for that alone. Source:
    Petsiuk et al., RISE, BMVC 2018.
    """
    inputs = _checked_images(model, images)
    end = _baseline(inputs, baseline)
    return _area_under(model, (inputs, end), maps, labels, steps, output, chunk, progress)


def pixel_flipping(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    labels=None,
    *,
    region: int = 9,
    steps: int = 100,
    baseline: str | float | Tensor = "uniform",
    seed: int = 0,
    output: str = "logit",
    chunk: int | None = None,
    progress: bool | None = None,
) -> Curve:
    """Score while regions are replaced, most relevant first; area over the perturbation curve, higher: better.

    Regions are squares of ``region`` x ``region`` pixels that tile the image from its upper left corner (smaller at
    the other borders), ranked by the sum of the map; 1: single pixels. The first ``steps`` of them, at most all, are
    replaced one after another. With x(k) the image after k of K replacements and f the score,

        AOPC = 1 / (K + 1) sum_{k=0}^{K} (f(x(0)) - f(x(k))),

    in the unit of the score, without bounds for logits, in (-1, 1) for probabilities. ``baseline``: "uniform" (values
    drawn from [0, 1] by ``seed`` and the image's place, the same for all its labels), or as in :func:`insertion`, as
    are the other arguments, the rule for equal values, and nan. ``-maps`` flips the least relevant regions first.

    Chance: the AOPC of a random map, seldom 0: a network notices random patches anywhere. What changes the ranking:
    region, steps, baseline, output. Source: Samek et al., Evaluating the visualization of what a deep neural network
    has learned, IEEE TNNLS 28 (2017), with regions of 9 x 9 and 100 steps; Bach et al., PLoS ONE 10 (2015).
    """
    region = whole("region", region, 1)
    inputs = _checked_images(model, images)
    end = _uniform(inputs, seed) if isinstance(baseline, str) and baseline == "uniform" else None
    end = _baseline(inputs, baseline) if end is None else end
    maps = _checked_maps(maps, inputs)
    places, count = _places(maps, region)
    counts = torch.arange(min(whole("steps", steps, 1), count) + 1)
    scores = _followed(model, (inputs, end), maps, places, counts, labels, output, chunk, progress)
    return Curve(counts / count, scores, (scores[..., :1] - scores).double().mean(-1).to(scores.dtype))


def _area_under(model, ends: tuple[Tensor, Tensor], maps: Tensor, labels, steps: int, output, chunk, progress) -> Curve:
    maps = _checked_maps(maps, ends[0])
    places, count = _places(maps, 1)
    steps = min(whole("steps", steps, 1), count)
    counts = (2 * torch.arange(steps + 1) * count + steps) // (2 * steps)  # round(k N / S), halves up
    scores = _followed(model, ends, maps, places, counts, labels, output, chunk, progress)
    fractions = counts / count
    area = torch.trapezoid(scores.double(), fractions.double().to(scores.device), dim=-1)
    return Curve(fractions, scores, area.to(scores.dtype))


def _places(maps: Tensor, region: int) -> tuple[Tensor, int]:
    """Each pixel's place in the order, ``[B, L, H, W]`` from 0 (its region's), and how many places there are."""
    height, width = maps.shape[-2:]
    rows, columns = torch.arange(height) // region, torch.arange(width) // region
    tiles = (rows[:, None] * (columns[-1] + 1) + columns).flatten().to(maps.device)
    count = int(tiles[-1]) + 1
    values = maps.flatten(-2).double()
    if region > 1:
        values = values.new_zeros((*maps.shape[:2], count)).index_add(-1, tiles, values)
    order = values.argsort(dim=-1, descending=True, stable=True)
    places = torch.empty_like(order).scatter(-1, order, torch.arange(count, device=maps.device).expand_as(order))
    return places[..., tiles].view(maps.shape), count


def _followed(
    model: nn.Module,
    ends: tuple[Tensor, Tensor],
    maps: Tensor,
    places: Tensor,
    counts: Tensor,
    labels,
    output: str,
    chunk: int | None,
    progress: bool | None,
) -> Tensor:
    """Scores ``[B, L, S + 1]`` of images whose first ``counts`` pixels are those of the second end."""
    one_of("output", output, OUTPUTS)
    images, device = ends[0], device_of(model, ends[0])
    size = chunk_size(images, chunk)
    explained = Explained(model, labels, output, size)
    results = []
    with (
        prepared(explained, images.to(device)),
        torch.no_grad(),
        progress_bar(progress, f"{len(images)} images") as report,
    ):
        _check_labels(explained, images[:1].to(device), maps)
        for row, (before, after, order) in enumerate(zip(*ends, places, strict=True)):
            before, after, order = before.to(device), after.to(device), order.to(device)
            label = torch.arange(len(order), device=device).repeat_interleave(len(counts))
            changed = counts.to(device).repeat(len(order))
            parts = []
            for start, which, many in zip(
                range(0, len(label), size), label.split(size), changed.split(size), strict=True
            ):
                mixed = torch.where(order[which, None] < many[:, None, None, None], after, before)
                scores = explained.scores(explained.logits(mixed))
                parts.append(scores.gather(1, which[:, None])[:, 0])
                report((row + start / len(label)) / len(images))
            results.append(torch.cat(parts).view(len(order), len(counts)))
    scores = torch.stack(results).to(images.device, torch.promote_types(images.dtype, torch.float32))
    flat = maps.flatten(2)
    ordered = flat.isfinite().all(-1) & (flat.amax(-1) > flat.amin(-1))
    return scores.where(ordered[..., None].to(scores.device), torch.nan)


def _uniform(images: Tensor, seed: int) -> Tensor:
    """Noise in [0, 1] like the images; drawn on the CPU row by row, so that it doesn't depend on the rows behind."""
    generator = torch.Generator().manual_seed(whole("seed", seed, 0))
    return torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images)


class CompletenessGap(NamedTuple):
    """`gap` [B, L]: sum of the map less what was promised; `relative` [B, L]: |gap| / |promised|."""

    gap: Tensor
    relative: Tensor


def completeness_gap(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    labels=None,
    *,
    promise: str | Tensor = "score",
    baseline: str | float | Tensor = "black",
    output: str = "logit",
    chunk: int | None = None,
) -> CompletenessGap:
    """How far a map's sum is from what its method promises, in the unit of the score; 0: complete, no chance level.

    ``images`` ``[B, C, H, W]``, ``maps`` ``[B, L, H, W]`` of the ``labels``. ``promise``: what the map should sum to,

    - ``"score"``: f(x) (LRP without biases, input x gradient on a network without biases);
    - ``"difference"``: f(x) - f(``baseline``) (integrated gradients, DeepLIFT);
    - ``"without_bias"``: f(x) less the constant added last, that of a B-cos network or of the last layer (B-cos
      contributions); logits only;
    - a tensor ``[B, L]`` with the sums themselves.

    Methods that promise no sum (saliency, the CAM family, NormGrad, XRAI) have no gap to speak of. Complete is not
    right: a map may put the right sum in the wrong place. ``relative`` ranks labels with large scores better, the
    gap those with small ones; it is nan where 0 is promised. A value of the map that is not finite gives nan. Raises
    ParameterError for a promise, an output or shapes that don't fit. Source: completeness, Sundararajan et al., ICML
    2017; for B-cos paper `bcos`.
    """
    inputs = _checked_images(model, images)
    maps = _checked_maps(maps, inputs)
    if isinstance(promise, str):
        promised = _promised(model, inputs, maps, labels, promise, baseline, output, chunk)
    elif (promised := real("promise", promise)).shape != maps.shape[:2]:
        raise ParameterError(f"promise has shape {tuple(promised.shape)}; one sum per map is {tuple(maps.shape[:2])}")
    promised = promised.to(inputs.device).double()
    gap = maps.double().sum((-2, -1)).to(inputs.device) - promised
    gap = gap.where(gap.isfinite(), torch.nan)
    return CompletenessGap(gap.float(), (gap.abs() / promised.abs()).where(promised != 0, torch.nan).float())


def _promised(model, images: Tensor, maps: Tensor, labels, promise: str, baseline, output: str, chunk) -> Tensor:
    one_of("promise", promise, PROMISES)
    one_of("output", output, OUTPUTS)
    if promise == "without_bias" and output != "logit":
        raise ParameterError("promise 'without_bias' is for output 'logit': a probability has no bias to subtract")
    device = device_of(model, images)
    size = chunk_size(images, chunk)
    explained = Explained(model, labels, output, size)
    with prepared(explained, images.to(device)), torch.no_grad():
        first = images[:1].to(device)
        _check_labels(explained, first, maps)
        promised = _scores(explained, images, device)
        if promise == "difference":
            promised = promised - _scores(explained, _baseline(images, baseline), device)
        elif promise == "without_bias":
            bias = torch.as_tensor(_last_bias(explained, first), dtype=torch.float64, device=device)
            outputs = explained.logits(first).shape[1]
            promised = promised - explained.select(bias.expand(1, outputs))
    return promised


def _scores(explained: Explained, images: Tensor, device: torch.device) -> Tensor:
    return torch.cat([explained.scores(explained.logits(part.to(device))) for part in images.split(explained.batch)])


def _last_bias(explained: Explained, image: Tensor) -> float | Tensor:
    """What the network adds to its logits last: its logit bias, or the bias of its last layer."""
    known = logit_bias(explained.model)
    if torch.as_tensor(known).any():
        return known
    seen = trace(explained, image)
    name = seen.head[0] if seen.head is not None else seen.class_map
    if name is None:
        raise ParameterError("promise 'without_bias': no layer ends in the logits; pass the sums themselves [B, L]")
    bias = getattr(find_layer(explained.model, name)[1], "bias", None)
    return bias if isinstance(bias, Tensor) else known


def baseline_sensitivity(maps: Sequence[Tensor] | Tensor, measure: str = "correlation") -> Tensor:
    """How alike maps stay when the baseline changes: ``[..., H, W]`` per baseline -> ``[...]``, mean over all pairs.

    ``measure``: "correlation", "rank_correlation", "absolute_rank_correlation", "ssim" (1: the baseline doesn't
    matter; range and chance as in the functions of those names) or "distance" (0: it doesn't matter). Which baselines
    are compared decides the number: name them beside it. nan where a pair is nan. Raises ParameterError for fewer
    than two baselines, another measure and shapes that differ. Source: the dependence is that shown by Sturmfels et
    al., Visualizing the impact of feature attribution baselines, Distill 2020; the measure is ours.
    """
    one_of("measure", measure, list(SIMILARITIES))
    maps = entries("maps", maps)
    if len(maps) < 2:
        raise ParameterError(f"maps holds {len(maps)} baselines; give the maps of at least two")
    pairs = combinations(maps, 2)
    return torch.stack([SIMILARITIES[measure](a, b) for a, b in pairs]).mean(0)


def class_sensitivity(maps: Tensor, measure: str = "correlation") -> Tensor:
    """How alike the maps of one image's labels are: ``[..., L, H, W]`` -> ``[..., L]``, mean over the other labels.

    ``measure`` as in :func:`baseline_sensitivity`. 1 (a "distance" of 0) means that the map doesn't say which label
    it explains; lower is better up to what the labels share: findings that occur together, or in one place, have maps
    that are rightly alike. Chance as in the measure. Pairs with a degenerate map are left out; nan where none is left.
    Raises ParameterError for fewer than two labels and another measure. Source: after the class sensitivity of Rebuffi
    et al., There and back again, CVPR 2020; over all pairs of labels it is ours.
    """
    one_of("measure", measure, list(SIMILARITIES))
    maps = real_maps(maps, axes="L, H, W")
    if maps.shape[-3] < 2:
        raise ParameterError(f"maps have shape {tuple(maps.shape)}; expected [..., L, H, W] with at least two labels")
    count = maps.shape[-3]
    table = maps.new_full((*maps.shape[:-2], count), torch.nan, dtype=torch.float32)
    for a, b in combinations(range(count), 2):
        table[..., a, b] = table[..., b, a] = SIMILARITIES[measure](maps[..., a, :, :], maps[..., b, :, :])
    return table.nanmean(-1)


def _checked_images(model: nn.Module, images: Tensor) -> Tensor:
    return checked_images(model, dense("images", images) if isinstance(images, Tensor) else images)


def _baseline(images: Tensor, baseline: str | float | Tensor) -> Tensor:
    if isinstance(baseline, float):
        largest = torch.finfo(images.dtype).max
        number("baseline", baseline, f"that {images.dtype} can hold", lambda value: abs(value) <= largest)
    return baseline_images(images, real("baseline", baseline) if isinstance(baseline, Tensor) else baseline)


def _checked_maps(maps: Tensor, images: Tensor) -> Tensor:
    maps = real("maps", maps)
    if maps.ndim != 4 or len(maps) != len(images) or maps.shape[-2:] != images.shape[-2:]:
        raise ParameterError(
            f"maps {tuple(maps.shape)} must be [B, L, H, W] at the resolution of the images {tuple(images.shape)}"
        )
    return maps


def _check_labels(explained: Explained, image: Tensor, maps: Tensor) -> None:
    count = explained.scores(explained.logits(image)).shape[1]
    if count != maps.shape[1]:
        raise ParameterError(f"maps of {maps.shape[1]} labels for {count} scores: pass the maps' labels as labels=")
