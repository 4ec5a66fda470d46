"""NormGrad: how much each position of a feature map would contribute to the gradient of a virtual identity layer.

An identity layer put after a layer changes nothing, but its parameters have a gradient, which is a sum over positions.
The norm of a position's term is the map. With A the layer's map and G the gradient of the score with respect to it,
every kind of identity layer weighs G by something of A alone, so no term is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.gradient import PROTOCOLS
from cxrkit.attribution.layers import Layer, explained_layer, find_layer, has_maps, layer_gradients, upsample
from cxrkit.attribution.registry import check_choice, method
from cxrkit.attribution.target import Explained
from cxrkit.errors import ParameterError

__all__ = ["normgrad"]

_AUTHORS_EPSILON = 1e-8  # added to every range by the published code, whatever the gradients' size


def _patch_sums(squares: Tensor) -> Tensor:
    """Sums over the 3 x 3 neighbours of each position, with zeros beyond the border. [B, C, h, w] to the same."""
    return F.avg_pool2d(squares, 3, stride=1, padding=1, divisor_override=1)


# The squared weight of each gradient, [B, K or 1, h, w], from the squared activations [B, K, h, w].
_SQUARED_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias": lambda squares: squares.new_ones(1),
    "scaling": lambda squares: squares,
    "conv1x1": lambda squares: squares.sum(1, keepdim=True),
    "conv3x3": lambda squares: _patch_sums(squares.sum(1, keepdim=True)),
    "conv3x3_depthwise": _patch_sums,
}

# The layers that the paper multiplies, as torchvision names them; the first set that a network has is taken.
_PAPER_LAYERS: tuple[tuple[str, ...], ...] = (
    ("layer2.0", "layer3.0", "layer4.0", "layer4.2"),  # ResNet-34, ResNet-50
    ("layer2.0", "layer3.0", "layer4.0", "layer4.1"),  # ResNet-18, whose stages end one block earlier
    (*(f"features.{stage}.0" for stage in range(9)), "features.8.2"),  # EfficientNet-B0
)


@method("normgrad", fits=has_maps)
def normgrad(
    explained: Explained,
    images: Tensor,
    *,
    virtual_layer: str = "scaling",
    layer: str | nn.Module | None = None,
    layers: str | Sequence[str | nn.Module] | None = None,
    protocol: str = "corrected",
) -> Tensor:
    """Norm of each position's share in the gradient of a virtual identity layer. [B, L, H, W], at least 0.

    `virtual_layer`: with a and g the activations and gradients at a position, k their channels, and ã the zero-padded
    3 x 3 patch of activations around it: "bias" ‖g‖, "scaling" sqrt(Σ a_k² g_k²), "conv1x1" ‖a‖ ‖g‖, "conv3x3" ‖ã‖
    ‖g‖, "conv3x3_depthwise" sqrt(Σ g_k² ‖ã_k‖²). `layer`: one layer, whose norms are up-sampled and not scaled; None
    takes the model's own, else the last with a map before the head. `layers`: several instead; each layer's map is
    up-sampled to the image and brought to [0, 1] by its minimum and maximum, all are multiplied, and the product is
    brought to [0, 1] again. "paper" names the layers of paper `normgrad` in a torchvision ResNet or EfficientNet. A
    layer whose map is constant says nothing and is left out; with none left the map is 0. `protocol="authors"` does as
    the published code: such a layer discards the layers before it, and 1e-8 is added to every range, so that small
    gradients give 0. Raises ParameterError for unknown options and layers, and AttributionError for a layer that has
    no map, runs twice, or that the logits don't depend on. Source: paper `normgrad`; Rebuffi et al. 2020.
    """
    check_choice("virtual_layer", virtual_layer, _SQUARED_WEIGHTS)
    check_choice("protocol", protocol, PROTOCOLS)
    if layers is None:
        chosen = [explained_layer(explained, images[:1], layer)]
        return upsample(_norms(explained, images, chosen, virtual_layer)[0], images)
    if layer is not None:
        raise ParameterError("layer and layers are both given; one layer is layer=, several multiplied are layers=")
    chosen = [explained_layer(explained, images[:1], layer) for layer in _several(explained.model, layers)]
    return _product(_norms(explained, images, chosen, virtual_layer), images, protocol)


def _several(model: nn.Module, layers: str | Sequence[str | nn.Module]) -> list[str]:
    """Names of the layers to multiply; ParameterError for none, one named twice, or a lone name."""
    if isinstance(layers, str) and layers == "paper":
        layers = _paper_layers(model)
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        got = repr(layers) if isinstance(layers, str) else type(layers).__name__
        raise ParameterError(f"layers must be a list of layers or 'paper'; got {got}: one layer is layer=")
    chosen = [find_layer(model, layer) for layer in layers]
    if not chosen:
        raise ParameterError("layers is empty; name at least one layer")
    for i, (name, module) in enumerate(chosen):
        if any(module is earlier for _, earlier in chosen[:i]):
            raise ParameterError(f"layers names {name} twice; each layer counts once")
    return [name for name, _ in chosen]


def _paper_layers(model: nn.Module) -> list[str]:
    names = {name for name, _ in model.named_modules()}
    for prefix in ("", "network."):  # alone, or within a Classifier
        for layers in _PAPER_LAYERS:
            if names.issuperset(prefix + layer for layer in layers):
                return [prefix + layer for layer in layers]
    raise ParameterError(
        "layers='paper' are layers of torchvision's ResNets and EfficientNets, and this network has others; "
        "list the layers by name"
    )


def _norms(explained: Explained, images: Tensor, layers: Sequence[Layer], virtual_layer: str) -> list[Tensor]:
    """One map [B, L, h, w] per layer, before up-sampling: one forward pass, and one backward pass per label for all
    layers at once.
    """
    maps, gradients = layer_gradients(explained, images, layers)
    weights = [_SQUARED_WEIGHTS[virtual_layer](a.detach().square()).sqrt() for a in maps]
    norms = [
        [torch.linalg.vector_norm(w * g, dim=1) for w, g in zip(weights, of_one_label, strict=True)]
        for of_one_label in gradients
    ]
    return [torch.stack(of_one_layer, 1) for of_one_layer in zip(*norms, strict=True)]


def _product(norms: list[Tensor], images: Tensor, protocol: str) -> Tensor:
    """Product of the layers' maps [B, L, h, w], each and at last itself in [0, 1]. [B, L, H, W]."""
    kind = torch.finfo(norms[0].dtype)
    added = _AUTHORS_EPSILON if protocol == "authors" else kind.tiny
    product = torch.ones_like(upsample(norms[0], images))
    for small in norms:
        large = upsample(small, images)
        high = large.amax((2, 3), keepdim=True)
        spread = high - large.amin((2, 3), keepdim=True)
        factor = product * _unit(large, added)
        if protocol == "authors":
            product = torch.where(spread == 0, torch.ones_like(product), factor)
        else:
            # Rounding gives a constant map a little relief, which must not become a map of its own.
            product = torch.where(spread <= 64 * kind.eps * high, product, factor)
    return _unit(product, added)


def _unit(maps: Tensor, added: float) -> Tensor:
    """Each map brought to [0, 1] by its minimum and maximum; a constant one is 0. [B, L, H, W]."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + added)
