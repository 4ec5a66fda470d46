"""Explanations that a network carries in itself: the contribution maps of B-cos networks, their sums, and their
rendering in colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.api import explaining
from cxrkit.attribution.operations import Call, nonlinearity, tensors, traced
from cxrkit.attribution.preparation import explanation_mode
from cxrkit.attribution.registry import method
from cxrkit.attribution.target import Explained, label_names, logit_bias
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.models import FLCPool

__all__ = ["bcos", "bcos_rgba", "bcos_shares"]


_CURVE = "curve"  # which call made a step of the graph that isn't linear


def _is_bcos(model: nn.Module) -> bool:
    return any(hasattr(m, "b") and callable(getattr(m, "set_explanation_mode", None)) for m in model.modules())


@method("inherent", fits=_is_bcos)
def bcos(explained: Explained, images: Tensor, *, check: bool = True) -> Tensor:
    """B-cos contribution maps: encoded input times W(x), summed over the encoded channels. [B, L, H, W], in
    logits.

    W(x) is the gradient in explanation mode (scales detached). The map is the image's part: it sums to the logit
    less the logit bias, in a vision transformer also less the part of the position code that is added to its tokens
    (see `bcos_shares`). With `check` an AttributionError is raised where it doesn't, as in networks with yet another
    source beside the image (biases); `check=False` returns the map all the same. Raises AttributionError for a
    network without B-cos layers, and for one whose path from image to logit holds a layer or an operation that isn't
    linear in explanation mode. Source: paper `bcos`; Böhle et al. 2022.
    """
    return _contributions(explained, images, check)[0]


def bcos_shares(model: nn.Module, images: Tensor, labels=None, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """What the image and what the position code contribute to each logit of a B-cos network: [B, L] each, in logits.

    Their sum is the logit less the logit bias. The image's share is the sum of its map, that of the position code
    its gradient in explanation mode times the code; 0 for networks without one. Images, labels, `chunk` and errors
    as in `attribute(model, images, "bcos")`. Source: paper `bcos`; Böhle et al. 2022.
    """

    def shares(explained: Explained, part: Tensor) -> Tensor:
        maps, positions = _contributions(explained, part)
        return torch.stack([maps.sum((2, 3), dtype=torch.float64), positions], -1)

    image, position = _by_chunk(shares, model, images, labels, chunk).unbind(-1)
    return image, position


def bcos_rgba(
    model: nn.Module,
    images: Tensor,
    labels=None,
    *,
    smooth: int = 15,
    percentile: float = 99.5,
    chunk: int | None = None,
) -> Tensor:
    """The dynamic linear map of a B-cos network as colours: RGBA in [0, 1], [B, L, 4, H, W], for images as
    in `attribute`.

    Colour: the share of each colour channel against its inverse in the positive part of W(x). Opacity: the
    norm of W(x) where the contribution is positive, averaged over `smooth` x `smooth` pixels, relative to
    its `percentile` within the image. An image without positive contribution is transparent. Needs six
    encoded channels. Source: paper `bcos`; Böhle et al. 2022.
    """
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 1 or smooth % 2 == 0:
        raise ParameterError(f"smooth must be an odd number of pixels; got {smooth!r}")
    if not 0 < percentile <= 100:
        raise ParameterError(f"percentile must be above 0 and at most 100; got {percentile!r}")

    def colours(explained: Explained, part: Tensor) -> Tensor:
        encoded, _, weights = _dynamic_weights(explained, part)
        if encoded.shape[1] != 6:
            raise AttributionError(f"colours need six encoded channels; the network sees {encoded.shape[1]}")
        return torch.stack([_rgba(encoded, weight, smooth, percentile) for weight, _ in weights], 1)

    return _by_chunk(colours, model, images, labels, chunk).float()


def _by_chunk(function, model: nn.Module, images: Tensor, labels, chunk: int | None) -> Tensor:
    """`function(explained, images)` of every chunk in one tensor, on the images' device and in their precision."""
    parts = []
    with explaining(model, images, labels, chunk=chunk) as (explained, inputs):
        for part in inputs.split(explained.batch):
            parts.append(function(explained, part))
            explained.first_row += len(part)
    return torch.cat(parts).to(images.device, torch.promote_types(images.dtype, torch.float32))


def _rgba(encoded: Tensor, weight: Tensor, smooth: int, percentile: float) -> Tensor:
    """Colours [B, 4, H, W] of one label from the encoded images and its linear map, both [B, 6, H, W]."""
    tiny = 1e-12
    positive = (weight / (weight.abs().amax(1, keepdim=True) + tiny)).clamp(min=0)
    colour, inverse = positive[:, :3], positive[:, 3:]
    strength = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    strength = strength * ((encoded * weight).sum(1, keepdim=True) >= 0)
    strength = F.avg_pool2d(strength, smooth, stride=1, padding=smooth // 2)
    top = torch.quantile(strength.flatten(1), percentile / 100, dim=1).view(-1, 1, 1, 1)
    opacity = torch.where(top > 0, strength / top.clamp(min=torch.finfo(top.dtype).tiny), 0).clamp(0, 1)
    return torch.cat([colour / (colour + inverse + tiny), opacity], 1)


def _contributions(explained: Explained, images: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """Maps of the image's part [B, L, H, W] and the position code's part [B, L]."""
    encoded, logits, weights = _dynamic_weights(explained, images)
    maps, positions = zip(*(((encoded * weight).sum(1), position) for weight, position in weights), strict=True)
    maps, positions = torch.stack(maps, 1), torch.stack(positions, 1)
    if check:
        _check_completeness(explained, maps, positions, logits)
    return maps, positions


def _dynamic_weights(explained: Explained, images: Tensor) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Encoded images [B, 6, H, W], all logits, and label by label W(x), shaped like the encoded images, with the
    position code's part [B].
    """
    model = explained.model
    if not _is_bcos(model):
        raise AttributionError(
            f"{type(model).__name__} has no B-cos layers, so it has no dynamic linear map to show; "
            "every other method explains it, for instance integrated_gradients or layercam"
        )
    from cxrkit.models.bcos_layers import merged_scales

    with torch.no_grad():
        encoded = explained.encode(images)
    encoded = encoded.detach()
    inputs = encoded.clone().requires_grad_()
    with (
        torch.enable_grad(),
        explanation_mode(model, True),
        _position_codes(model) as codes,
        merged_scales(),
    ):
        logits, _ = traced(model, explained.classify, inputs, partial(_watched, model), cuts=True)
        scores = explained.scores(logits)
    _refuse_curves(logits)
    return encoded, logits.detach(), _by_label(explained, scores, inputs, codes)


def _by_label(explained: Explained, scores: Tensor, inputs: Tensor, codes: list[Tensor]):
    for weight, *slopes in explained.joint_gradients(scores, [inputs, *codes], allow_unused=bool(codes)):
        shares = [(code.detach() * s).flatten(1).sum(1) for code, s in zip(codes, slopes, strict=True) if s is not None]
        yield weight, sum(shares, weight.new_zeros(len(weight)))


@contextmanager
def _position_codes(model: nn.Module) -> Iterator[list[Tensor]]:
    """The position codes that vision transformers of the package add to their tokens, as leaves [B, tokens, D]."""
    from bcos.models.vit import PosEmbSinCos2d

    codes = []

    def keep(module, args, output):
        codes.append(output.expand(len(args[0]), *output.shape).clone().requires_grad_())
        return codes[-1]

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PosEmbSinCos2d):
                hooks.callback(module.register_forward_hook(keep).remove)
        yield codes


def _watched(model: nn.Module, call: Call, *args, **kwargs):
    """The call itself; its step in the graph keeps who made it unless that is linear.

    Scales may be computed in any way and are detached then: what counts is the way from the logits back to the image.
    There a MaxOut picks its unit as scales are picked, and the published FLC pooling takes a modulus.
    """
    result = call.function(*args, **kwargs)
    layer = model.get_submodule(call.layer)
    maxout = call.name == "max" and len(args) + len(kwargs) > 1
    modulus = call.name in ("complex", "abs") and isinstance(layer, FLCPool)
    if call.name == "batch_norm" or not (maxout or modulus or nonlinearity(call, args, kwargs) is None):
        text = f"layer {call.layer or 'network'} ({type(layer).__name__}) applies {call.name}"
        for value in list(tensors([result]))[: 1 if call.name == "var_mean" else None]:  # a mean is linear
            if value.grad_fn is not None:
                value.grad_fn.metadata[_CURVE, value.output_nr] = text
    return result


def _refuse_curves(logits: Tensor) -> None:
    """Raise AttributionError for a step between image and logits that isn't linear in explanation mode."""
    seen, waiting = set(), [(logits.grad_fn, logits.output_nr)]
    while waiting:
        step, output = waiting.pop()
        if step is None or (step, output) in seen:
            continue
        if (_CURVE, output) in step.metadata:
            raise AttributionError(
                f"bcos: {step.metadata[_CURVE, output]}, which isn't linear in explanation mode, so contributions "
                "would not be the network's own"
            )
        seen.add((step, output))
        waiting.extend(step.next_functions)


def _check_completeness(explained: Explained, maps: Tensor, positions: Tensor, logits: Tensor) -> None:
    bias = logit_bias(explained.model)
    expected = explained.select((logits - bias).double())
    total = maps.sum((2, 3), dtype=torch.float64) + positions
    size = maps.abs().sum((2, 3), dtype=torch.float64) + positions.abs()
    rounding = torch.finfo(logits.dtype).eps
    constant = explained.select(logits.double().abs() + abs(bias))
    wrong = ((total - expected).abs() > rounding**0.5 * size + 8 * rounding * constant).nonzero()
    if len(wrong):
        image, label = wrong[0].tolist()
        names = label_names(explained.model)
        told = names[explained.indices(logits.shape[1])[label]] if names else label
        biased = [name for name, bias in explained.model.named_parameters() if name.endswith("bias") and bias.any()]
        source = ", ".join(biased[:3]) or "such as a position code"
        raise AttributionError(
            f"bcos: image {explained.first_row + image}, label {told!r}: contributions sum to "
            f"{total[image, label]:.4g}, the logit less its bias is {expected[image, label]:.4g}; "
            f"something beside the image adds to the logit ({source}); check=False returns the image's part"
        )
