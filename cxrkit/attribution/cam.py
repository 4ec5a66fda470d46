"""Class activation maps: sums of the feature maps of one layer, up-sampled to the image.

The layer is `layer=` (a module or a dotted name), else the model's `explained_layer`, else the last layer
with a feature map. Rectified before up-sampling where the method rectifies, and never scaled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cxrkit.attribution.explained import Explained, logit_bias
from cxrkit.attribution.layers import captured, equals_logits, explained_layer, is_class_map, trace, upsample
from cxrkit.attribution.registry import method
from cxrkit.errors import AttributionError

__all__ = ["cam", "gradcam", "layercam"]

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def _has_maps(model: nn.Module) -> bool:
    return any(isinstance(module, _CONVOLUTIONS) for module in model.modules())


def _has_linear_head(model: nn.Module) -> bool:
    """Whether at most one linear layer follows the last convolution: the necessary part of what `cam`
    needs.
    """
    after = None
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            after = 0
        elif isinstance(module, nn.Linear) and after is not None:
            after += 1
    return after is not None and after <= 1


@method(
    "cam",
    papers=("relevance",),
    meaning="the part of the logit that each position of the last feature map brings in",
    formula=r"\sum_k w_k A_k",
    signed=True,
    forwards="1",
    backwards="0",
    needs="a linear head after global average pooling, or a convolution before it as head",
    outputs=("logit",),
    fits=_has_linear_head,
)
def cam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Class activation map, bias dropped. [B, L, H, W]; before up-sampling its mean is the logit less the
    head's bias.

    With a linear head w after global average pooling it is the weighted sum of the feature maps A (of their
    ReLU where the network applies one before pooling, as DenseNet does). Where the head is a convolution
    followed by the pooling, as in B-cos networks, it is the head's own map: its weights change with the
    input, so no fixed sum of feature maps is right. Which of these holds is verified numerically on every
    image; AttributionError if neither does. Source: paper `relevance`; Zhou et al. 2016, Eq. 2.
    """
    seen = trace(explained, images[:1])
    if layer is None and seen.class_map is not None:
        layer = seen.class_map
    name, module = explained_layer(explained, images[:1], layer)
    with torch.no_grad(), captured(name, module, differentiable=False) as activation:
        logits = explained.logits(images)
    maps = _class_maps(activation.map, logits, seen.head, logit_bias(explained.model))
    if maps is None:
        raise AttributionError(_no_cam(name, seen.head, seen.class_map))
    return upsample(explained.select(maps), images)


@method(
    "cam",
    papers=("bcos", "normgrad"),
    meaning="feature maps weighted by how much the score rises with each on average, positive part",
    formula=r"\mathrm{ReLU}\big(\sum_k \overline{\partial y / \partial A_k} \, A_k\big)",
    signed=False,
    forwards="1",
    backwards="L, from the layer on",
    needs="a layer with a feature map",
    fits=_has_maps,
)
def gradcam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Grad-CAM: maps weighted by their spatially averaged gradient, summed, rectified, up-sampled. [B, L,
    H, W], at least 0.

    Right after global average pooling and a linear head it is ReLU(CAM) / (h w). Source: Selvaraju et al.
    2017, Eq. 1 and 2.
    """
    maps = [
        (gradient.mean((2, 3), keepdim=True) * activation).sum(1)
        for activation, gradient in _layer_gradients(explained, images, layer)
    ]
    return upsample(torch.stack(maps, 1).relu(), images)


@method(
    "cam",
    papers=("bcos",),
    meaning="feature maps weighted position by position by the positive part of the gradient",
    formula=r"\mathrm{ReLU}\big(\sum_k \mathrm{ReLU}(\partial y / \partial A_k) \, A_k\big)",
    signed=False,
    forwards="1",
    backwards="L, from the layer on",
    needs="a layer with a feature map",
    fits=_has_maps,
)
def layercam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """LayerCAM: maps times the rectified gradient at each position, summed, rectified, up-sampled. [B, L,
    H, W], at least 0.

    B-cos networks are explained with their ordinary gradients, as in paper `bcos`. Source: Jiang et al. 2021.
    """
    maps = [
        (gradient.relu() * activation).sum(1) for activation, gradient in _layer_gradients(explained, images, layer)
    ]
    return upsample(torch.stack(maps, 1).relu(), images)


def _layer_gradients(explained: Explained, images: Tensor, layer) -> Iterator[tuple[Tensor, Tensor]]:
    """The layer's map [B, C, h, w] with the gradient of each label's score in turn."""
    name, module = explained_layer(explained, images[:1], layer)
    with captured(name, module, differentiable=True) as activation:
        scores = explained.scores(explained.logits(images))
    if activation.map is None:
        raise AttributionError(f"layer {name} doesn't run in a forward pass; name one that does: layer=")
    if not scores.requires_grad:
        raise AttributionError(f"the logits don't depend on layer {name}; name another: layer=")
    fixed = activation.map.detach()
    for gradient in explained.gradients(scores, activation.map):
        yield fixed, gradient


def _class_maps(activation: Tensor | None, logits: Tensor, head, bias: float | Tensor) -> Tensor | None:
    """Maps [B, outputs, h, w] whose mean is the logits less their bias, or None where the layer has none."""
    if activation is None:
        return None
    if is_class_map(activation.mean((2, 3)), logits, bias):
        return activation
    if head is None or head[1].in_features != activation.shape[1]:
        return None
    weight, offset = head[1].weight, head[1].bias
    for maps in (activation, activation.relu()):
        pooled = maps.mean((2, 3))
        size = pooled.abs() @ weight.abs().T + (0 if offset is None else offset.abs())
        if equals_logits(nn.functional.linear(pooled, weight, offset), logits, 1e-4 * size):
            return torch.einsum("lk,bkhw->blhw", weight, maps)
    return None


def _no_cam(layer: str, head, class_map: str | None) -> str:
    start = f"cam: the logits aren't the spatial mean of layer {layer} (or of its ReLU) times a linear head"
    if class_map is not None:
        return f"{start}; the class map of this network is the output of {class_map}: leave layer= out"
    if head is None:
        return f"{start}: no linear layer puts out the logits; use gradcam or layercam"
    return f"{start} ({head[0]}); name the layer before the global average pooling, or use gradcam or layercam"
