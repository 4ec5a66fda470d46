"""Does a map say what the network does: perturbation curves and completeness.

Perturbation curves change an image's pixels in the order of its map, highest value first, and follow the score. They
run the network off the images it knows: how pixels are changed rules the numbers, so compare methods only under one
setting, and with the area of a random map (``torch.rand_like(maps)``), which is the chance level here.
"""

from __future__ import annotations

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
from cxrkit.metrics.inputs import dense, number, one_of, real, whole

__all__ = ["CompletenessGap", "Curve", "completeness_gap", "deletion", "insertion"]

OUTPUTS = ("logit", "probability")
PROMISES = ("score", "difference", "without_bias")


class Curve(NamedTuple):
    """A score followed while an image changes.

    `fractions` [S + 1]: share of the pixels changed, from 0; `scores` [B, L, S + 1]; `area` [B, L].
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
    return _curve(model, _baseline(inputs, baseline), inputs, maps, labels, steps, output, chunk, progress)


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
    return _curve(model, inputs, _baseline(inputs, baseline), maps, labels, steps, output, chunk, progress)


def _curve(
    model: nn.Module,
    before: Tensor,
    after: Tensor,
    maps: Tensor,
    labels,
    steps: int,
    output: str,
    chunk: int | None,
    progress: bool | None,
) -> Curve:
    """Follow the scores of images ``before`` whose pixels become those ``after``, in the order of the maps."""
    one_of("output", output, OUTPUTS)
    maps, steps = _checked_maps(maps, before), whole("steps", steps, 1)
    device, size = device_of(model, before), chunk_size(before, chunk)
    explained = Explained(model, labels, output, size)
    places, pixels = _places(maps), maps.shape[-2:].numel()
    steps = min(steps, pixels)
    counts = (2 * torch.arange(steps + 1) * pixels + steps) // (2 * steps)  # round(k N / S), halves up
    results = []
    with (
        prepared(explained, before.to(device)),
        torch.no_grad(),
        progress_bar(progress, f"{len(maps)} images") as report,
    ):
        _check_labels(explained, before[:1].to(device), maps)
        for row, image in enumerate(zip(before, after, places, strict=True)):
            results.append(_image_scores(explained, *(part.to(device) for part in image), counts.to(device), size))
            report((row + 1) / len(maps))
    scores = torch.stack(results).to(before.device, torch.promote_types(before.dtype, torch.float32))
    flat = maps.flatten(2)
    ordered = flat.isfinite().all(-1) & (flat.amax(-1) > flat.amin(-1))
    scores = scores.where(ordered[..., None].to(scores.device), torch.nan)
    fractions = counts / pixels
    area = torch.trapezoid(scores.double(), fractions.double().to(scores.device), dim=-1)
    return Curve(fractions, scores, area.to(scores.dtype))


def _places(maps: Tensor) -> Tensor:
    """Each pixel's place in the order, ``[B, L, H, W]`` from 0."""
    order = maps.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    rising = torch.arange(order.shape[-1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, rising).view(maps.shape)


def _image_scores(
    explained: Explained, before: Tensor, after: Tensor, places: Tensor, counts: Tensor, size: int
) -> Tensor:
    """Scores ``[L, S + 1]`` of an image after ``counts`` ``[S + 1]`` pixels have changed, in each label's order."""
    label = torch.arange(len(places), device=places.device).repeat_interleave(len(counts))
    parts = []
    for which, many in zip(label.split(size), counts.repeat(len(places)).split(size), strict=True):
        mixed = torch.where(places[which, None] < many[:, None, None, None], after, before)
        parts.append(explained.scores(explained.logits(mixed)).gather(1, which[:, None])[:, 0])
    return torch.cat(parts).view(len(places), len(counts))


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
