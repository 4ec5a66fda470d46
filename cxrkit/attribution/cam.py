"""Class activation maps: sums of the feature maps of one layer, up-sampled to the image.

The layer is `layer=` (a module or a dotted name), else the model's `explained_layer`, else the last layer
with a feature map before the head. Rectified before up-sampling where the method rectifies, and never scaled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cxrkit.attribution.guided import guided_backprop
from cxrkit.attribution.layers import (
    checked_map,
    equals_logits,
    explained_layer,
    has_maps,
    is_class_map,
    is_norm,
    is_spatial,
    layer_gradients,
    recorded,
    trace,
    upsample,
)
from cxrkit.attribution.registry import entry, method
from cxrkit.attribution.target import Explained, logit_bias
from cxrkit.errors import AttributionError

__all__ = ["cam", "gradcam", "gradcam_plus_plus", "guided_gradcam", "layercam", "scorecam"]


def _has_linear_head(model: nn.Module) -> bool:
    """Whether at most one linear layer, and no normalization beside it, is where the last one after the last
    convolution is: the necessary part of what `cam` needs.
    """
    modules = dict(model.named_modules())
    maps = [name for name, module in modules.items() if is_spatial(module) and not is_norm(module)]
    if not maps or not has_maps(model):
        return False
    after = list(modules)[list(modules).index(maps[-1]) :]
    heads = [name for name in after if isinstance(modules[name], nn.Linear)]
    if not heads:
        return True
    place = heads[-1].rpartition(".")[0]
    beside = [name for name in after if name.rpartition(".")[0] == place]
    is_own = place and not any(name.startswith(place + ".") for name in maps)
    normed = is_own and any(is_norm(modules[name]) for name in beside)
    return not normed and sum(isinstance(modules[name], nn.Linear) for name in beside) <= 1


@method("cam", fits=_has_linear_head)
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
    chosen = explained_layer(explained, images[:1], layer)
    with torch.no_grad(), recorded([chosen]) as activations:
        logits = explained.logits(images)
    activation = checked_map(chosen.name, activations.get(chosen.name), images).detach()
    maps = _class_maps(activation, logits, seen.head, logit_bias(explained.model))
    if maps is None:
        raise AttributionError(_no_cam(chosen.name, seen.head, seen.class_map))
    return upsample(explained.select(maps), images)


@method("cam", fits=has_maps)
def gradcam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Grad-CAM: maps weighted by their spatially averaged gradient, summed, rectified, up-sampled. [B, L,
    H, W], at least 0.

    Right after global average pooling and a linear head it is ReLU(CAM) / (h w). Source: Selvaraju et al.
    2017, Eq. 1 and 2.
    """
    return _weighted(explained, images, layer, lambda activation, gradient: gradient.mean((2, 3), keepdim=True))


@method("cam", fits=has_maps)
def layercam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """LayerCAM: maps times the rectified gradient at each position, summed, rectified, up-sampled. [B, L,
    H, W], at least 0.

    B-cos networks are explained with their ordinary gradients, as in paper `bcos`. Source: Jiang et al. 2021.
    """
    return _weighted(explained, images, layer, lambda activation, gradient: gradient.relu())


@method("cam", fits=has_maps)
def gradcam_plus_plus(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Grad-CAM++: maps weighted by their rectified gradients, each with a coefficient from the second and third
    derivative of exp(logit). [B, L, H, W], at least 0.

    The factor exp(logit) > 0 that all weights of a map share is left out. Where the gradient g isn't 0 the published
    coefficient g^2 / (2 g^2 + g^3 sum A) is 1 / (2 + g sum A), as computed here: no small constant in the denominator
    decides. Raises AttributionError where negative feature maps drive that denominator to 0 or below. Right after
    global average pooling and a linear head w the weights are ReLU(w_k) / (2 + w_k mean A_k). Source: Chattopadhay et
    al. 2018, Eq. 19.
    """

    def weights(activation: Tensor, gradient: Tensor) -> Tensor:
        rising = gradient.relu()
        denominator = 2 + rising * activation.sum((2, 3), keepdim=True)
        at_pole = (denominator <= 0).flatten(1).any(1)
        if at_pole.any():
            row = explained.first_row + int(at_pole.nonzero()[0])
            raise AttributionError(
                f"gradcam_plus_plus: the layer's negative values make the weights infinite or change their sign for "
                f"image {row}; name a layer after a ReLU: layer=, or use gradcam or layercam"
            )
        return (rising / denominator).sum((2, 3), keepdim=True)

    return _weighted(explained, images, layer, weights)


@method("cam", unfit=entry("guided_backprop").unfit, fits=has_maps)
def guided_gradcam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Guided Grad-CAM: the maps of `guided_backprop` times those of `gradcam`, pixel by pixel. [B, L, H, W].

    Refuses what either of the two refuses. Source: Selvaraju et al. 2017, section on Guided Grad-CAM.
    """
    return gradcam(explained, images, layer=layer) * guided_backprop(explained, images)


@method("cam", fits=has_maps)
def scorecam(explained: Explained, images: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Score-CAM: maps weighted by the softmax over channels of the score of the image times each map, up-sampled and
    scaled to [0, 1]. [B, L, H, W], at least 0.

    The paper's increase over the score of a black image differs from the score by a constant, which the softmax
    cancels. The image is masked before its encoding, so hidden is black. A constant map hides everything. All labels
    share the forward passes. Source: Wang et al. 2020, Algorithm 1.
    """
    chosen = explained_layer(explained, images[:1], layer)
    with torch.no_grad():
        with recorded([chosen]) as activations:
            explained.logits(images)
        maps = checked_map(chosen.name, activations.get(chosen.name), images).detach()
        weights = _masked_scores(explained, images, maps).softmax(1)
    return upsample(torch.einsum("bkl,bkhw->blhw", weights, maps).relu(), images)


def _masked_scores(explained: Explained, images: Tensor, maps: Tensor) -> Tensor:
    """Scores [B, K, L] of the images, each seen through each of its maps [B, K, h, w]."""
    black = explained.scores(explained.logits(torch.zeros_like(images)))
    scores = black[:, None].repeat(1, maps.shape[1], 1)
    varied = (maps.amax((2, 3)) > maps.amin((2, 3))).nonzero()
    for chosen in explained.steps(varied.split(explained.batch) if len(varied) else ()):
        row, channel = chosen.unbind(1)
        masks = upsample(maps[row, channel][:, None], images)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        masks = (masks - low) / (high - low).clamp(min=torch.finfo(masks.dtype).tiny)
        scores[row, channel] = explained.scores(explained.logits(images[row] * masks))
    return scores


def _weighted(explained: Explained, images: Tensor, layer, weights: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The layer's maps, weighted by what their values [B, C, h, w] and gradients say, summed, rectified, up-sampled."""
    (activation,), gradients = layer_gradients(explained, images, [explained_layer(explained, images[:1], layer)])
    activation = activation.detach()
    maps = [(weights(activation, gradient) * activation).sum(1) for (gradient,) in gradients]
    return upsample(torch.stack(maps, 1).relu(), images)


def _class_maps(activation: Tensor, logits: Tensor, head, bias: float | Tensor) -> Tensor | None:
    """Maps [B, outputs, h, w] whose mean is the logits less their bias, or None where the layer has none."""
    if is_class_map(activation.mean((2, 3)), logits, bias):
        return activation
    if head is None or head[1].weight[0].numel() != activation.shape[1]:
        return None
    weight, offset = head[1].weight.flatten(1), head[1].bias
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
