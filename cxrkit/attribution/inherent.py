"""Explanations that a network carries in itself: the contribution maps of B-cos networks, and their
rendering in colour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.api import checked_images, chunk_size, device_of
from cxrkit.attribution.explained import Explained, explanation_mode, label_names, logit_bias, prepared
from cxrkit.attribution.registry import method
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["bcos", "bcos_rgba"]

# Layers of torch that are linear in evaluation mode, if they have no bias.
_LINEAR = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.Linear,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Upsample,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.ZeroPad2d,
)
# Steps of a graph that no fixed linear map takes, by their names in torch.
_CURVED = re.compile(
    r"\w*Relu\w*|[CGS]?[Ee]lu|Glu|Silu|Mish|(Log)?Sigmoid|Tanh|(Log)?Soft\w+|Hard\w+|Threshold|Clamp\w*"
    r"|Exp|Log|Log1P|Pow|R?[Ss]qrt|Reciprocal|Sin|Cos|Erf|(Adaptive)?MaxPool\w*|Native\w+"
    r"|(Cudnn|Miopen)BatchNorm|ScaledDot\w+"
)
_PRODUCTS = ("Mul", "Div", "Mm", "Bmm", "Baddbmm", "Addmm", "Einsum", "Dot")


def _is_bcos(model: nn.Module) -> bool:
    return any(hasattr(m, "b") and callable(getattr(m, "set_explanation_mode", None)) for m in model.modules())


@method(
    "inherent",
    papers=("bcos",),
    meaning="what each pixel contributes to the logit through the network's own dynamic linear map",
    formula=r"\sum_{c=1}^{6} x_c \, W(x)_c",
    signed=True,
    forwards="1",
    backwards="L",
    needs="a B-cos network: B-cos layers, norms without centring and bias, no other activation function",
    outputs=("logit",),
    fits=_is_bcos,
)
def bcos(explained: Explained, images: Tensor, *, check: bool = True) -> Tensor:
    """B-cos contribution maps: encoded input times W(x), summed over the encoded channels. [B, L, H, W], in
    logits.

    W(x) is the gradient in explanation mode (scales detached). The map sums to the logit less the logit
    bias; with `check` an AttributionError is raised where it doesn't, as in networks with another source
    beside the image (a position code, biases); `check=False` returns the map of the image's part. Raises
    AttributionError for a network without B-cos layers, and for one whose path from image to logit holds a
    layer or an operation that isn't linear in explanation mode. Source: paper `bcos`; Böhle et al. 2022.
    """
    encoded, logits, weights = _dynamic_weights(explained, images)
    maps = torch.stack([(encoded * weight).sum(1) for weight in weights], 1)
    if check:
        _check_completeness(explained, maps, logits)
    return maps


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
    inputs = checked_images(model, images)
    device = device_of(model, images)
    inputs = inputs.to(device)
    size = chunk_size(inputs, chunk)
    explained = Explained(model, labels, "logit", size)
    parts = []
    with prepared(model, device):
        for part in inputs.split(size):
            encoded, _, weights = _dynamic_weights(explained, part)
            if encoded.shape[1] != 6:
                raise AttributionError(f"colours need six encoded channels; the network sees {encoded.shape[1]}")
            parts.append(torch.stack([_rgba(encoded, w, smooth, percentile) for w in weights], 1))
    return torch.cat(parts).float().to(images.device)


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


def _dynamic_weights(explained: Explained, images: Tensor) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    """Encoded images [B, 6, H, W], all logits, and label by label W(x), shaped like the encoded images."""
    model = explained.model
    if not _is_bcos(model):
        raise AttributionError(
            f"{type(model).__name__} has no B-cos layers, so it has no dynamic linear map to show; "
            "every other method explains it, for instance integrated_gradients or layercam"
        )
    with torch.no_grad():
        encoded = explained.encode(images)
    encoded = encoded.detach()
    inputs = encoded.clone().requires_grad_()
    with torch.enable_grad(), explanation_mode(model, True), _only_linear_layers(model):
        logits = explained.classify(inputs)
        scores = explained.scores(logits)
    if logits.grad_fn is not None and (operation := _nonlinear_operation(logits.grad_fn)):
        raise AttributionError(
            f"bcos: the network applies {operation} between image and logit, outside any layer that could be "
            "named; in explanation mode everything must be linear"
        )
    return encoded, logits.detach(), explained.gradients(scores, inputs)


@contextmanager
def _only_linear_layers(model: nn.Module) -> Iterator[None]:
    """Raise AttributionError, with its name, for a layer between input and output that isn't linear in
    explanation mode.
    """

    def refuse(name):
        def hook(module, args, output):
            if isinstance(output, Tensor) and output.requires_grad and (why := _why_not_linear(module)):
                raise AttributionError(
                    f"bcos: layer {name or 'network'} ({type(module).__name__}) {why}, "
                    "so contributions would not be the network's own"
                )

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                hooks.callback(module.register_forward_hook(refuse(name)).remove)
        yield


def _why_not_linear(module: nn.Module) -> str | None:
    """What keeps a layer from being linear in explanation mode; None if nothing is known against it."""
    detachable = callable(getattr(module, "set_explanation_mode", None)) and hasattr(module, "detach")
    known = type(module).__module__.startswith("torch.nn") or isinstance(module, nn.modules.batchnorm._NormBase)
    if known and not detachable and not isinstance(module, _LINEAR):
        return "isn't linear without a bias"
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bool(bias.any()):
        return "adds a bias"
    return None


def _nonlinear_operation(last) -> str | None:
    """Name of a step of the graph that isn't linear in the input (two factors that both depend on it, or a
    known curve).
    """
    seen, waiting = {last}, [last]
    while waiting:
        step = waiting.pop()
        kind = step.name().rsplit("::", 1)[-1].split("Backward")[0]
        sources = [source for source, _ in step.next_functions if source is not None]
        if _CURVED.fullmatch(kind) or (kind in _PRODUCTS and len(sources) > 1):
            return kind
        waiting.extend(source for source in sources if source not in seen)
        seen.update(sources)
    return None


def _check_completeness(explained: Explained, maps: Tensor, logits: Tensor) -> None:
    bias = logit_bias(explained.model)
    expected = explained.select((logits - bias).double())
    total = maps.double().sum((2, 3))
    rounding = torch.finfo(logits.dtype).eps
    constant = explained.select(logits.double().abs() + abs(bias))
    allowed = rounding**0.5 * maps.double().abs().sum((2, 3)) + 8 * rounding * constant
    wrong = ((total - expected).abs() > allowed).nonzero()
    if len(wrong):
        image, label = wrong[0].tolist()
        names = label_names(explained.model)
        told = names[explained.indices(logits.shape[1])[label]] if names else label
        raise AttributionError(
            f"bcos: image {explained.first_row + image}, label {told!r}: contributions sum to "
            f"{total[image, label]:.4g}, the logit less its bias is {expected[image, label]:.4g}; "
            "something beside the image adds to the logit (a position code, a bias); check=False returns the "
            "image's part"
        )
