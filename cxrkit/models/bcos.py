"""B-cos classifiers on the layers of the `bcos` package (paper `bcos`; Böhle et al. 2022)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError

__all__ = [
    "builder",
    "calibrate",
    "default_logit_bias",
    "mode_restored",
    "plain_vit_builder",
    "set_logit_bias",
    "vit_builder",
]


def builder(name: str, **options) -> Callable[[int], nn.Module]:
    """A function from the number of labels to the B-cos network of that name in `bcos.models`.

    As in the published ImageNet models: B = 2, no MaxOut, no activation functions, uncentred batch norm without bias
    (`options` override it), and a 1x1 B-cos convolution as head before the average pool.
    """

    def build(n_labels: int) -> nn.Module:
        import bcos.models
        from bcos.modules import norms

        from cxrkit.models.bcos_layers import TrainableBatchNorm, TrainableBcosConv2d

        layers = {"norm_layer": norms.NoBias(TrainableBatchNorm), "conv_layer": TrainableBcosConv2d}
        # The package turns a bias of 0 into -ln(C-1), so it gets a placeholder; `set_logit_bias` follows.
        return getattr(bcos.models, name)(num_classes=n_labels, logit_bias=-1.0, **layers | options)

    return build


def vit_builder(name: str) -> Callable[[int], nn.Module]:
    """A function from the number of labels to the B-cos vision transformer of that name in `bcos.models.vit`.

    As in the published ImageNet models: B = 2, layer norm without bias, no activation functions, a fixed position code
    added to the tokens, the mean over tokens, and a B-cos linear head. Source: paper `bcos`, ViT-B with convolutional
    stem.
    """

    def build(n_labels: int) -> nn.Module:
        from bcos.modules import BcosLinear, LogitLayer, norms
        from bcos.modules.common import BcosSequential

        from cxrkit.models.bcos_layers import TrainableBcosConv2d

        network = _vit(
            name,
            num_classes=n_labels,
            channels=6,
            linear_layer=BcosLinear,
            conv2d_layer=TrainableBcosConv2d,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(norms.DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
        )
        return BcosSequential(network, LogitLayer(logit_bias=-1.0))

    return build


def plain_vit_builder(name: str) -> Callable[[int], nn.Module]:
    """The ordinary vision transformer of the same shape: linear layers, GELU, layer norm with bias, 3 channels."""

    def build(n_labels: int) -> nn.Module:
        from bcos.modules import norms

        return _vit(
            name,
            num_classes=n_labels,
            channels=3,
            linear_layer=nn.Linear,
            conv2d_layer=nn.Conv2d,
            norm_layer=nn.LayerNorm,
            norm2d_layer=norms.DetachableGNLayerNorm2d,
            act_layer=nn.GELU,
        )

    return build


def _vit(name: str, **options) -> nn.Module:
    from bcos.models import vit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the logit layer is missing: B-cos networks get it, others have none
        return getattr(vit, name)(**options)


def default_logit_bias(n_labels: int, protocol: str = "corrected") -> float:
    """Constant added to every logit: -ln(L-1) for L > 1 labels, 0 for one; "authors": -ln 999 for any number.

    The authors kept the bias of ImageNet's 1000 classes; under binary cross-entropy it starts every
    probability at 0.001.
    """
    if protocol == "authors":
        return -math.log(999)
    return -math.log(n_labels - 1) if n_labels > 2 else 0.0


def set_logit_bias(network: nn.Module, value: float) -> None:
    """Write the bias into the network's logit layer."""
    from bcos.modules import LogitLayer

    layers = [module for module in network.modules() if isinstance(module, LogitLayer)]
    if len(layers) != 1:
        raise ModelError(f"a B-cos network has one logit layer; this one has {len(layers)}")
    layers[0].logit_bias = value


def calibrate(
    model: nn.Module, images: Tensor | Iterable[Tensor], norms: Iterable[nn.Module] | None = None
) -> nn.Module:
    """Set the running statistics of every batch norm, or of those among the modules `norms`, from images, and return
    the model.

    `images` is [B, 1, H, W] in [0, 1], or an iterable of such batches, on any device. With untrained statistics
    the signal of a B-cos network fades to about 1e-9 in evaluation mode. Weights, mode and momentum stay as they were;
    a network without batch norm is left alone. Raises ModelError when there are no images.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not batches or min(len(batch) for batch in batches) == 0:
        raise ModelError("calibration needs at least one image")
    chosen = list(model.modules()) if norms is None else list(norms)
    norms = [module for module in chosen if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with mode_restored(model), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            for batch in batches if norms else ():
                model(batch.to(next(model.parameters(), batch).device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


@contextmanager
def mode_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in training or evaluation mode as before."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
