"""The networks of the kit: how each is built, which weights it may start from, and what else must be known of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cxrkit.models import bcos
from cxrkit.models.sources import XRV_WEIGHTS

__all__ = ["AUXILIARY_WEIGHT", "NETWORKS", "Architecture"]

AUXILIARY_WEIGHT = 0.4  # of InceptionV3's second head in the loss; paper `covid`


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how to build a network and what the kit needs to know of it.

    `build(n_labels)` returns the network, `with_auxiliary(n_labels)` the one with a second head for training, where
    there is one; `weights` maps a name to its origin (see sources.published);
    `explained_layer` (the last feature map, after its ReLU), `head`, `strided` (the convolutions and average pools
    that anti-aliasing replaces) and `stem` (those it replaces on top with `antialias_stem`) are dotted names inside the
    network; `encoding` is a key of classifier.ENCODINGS, `authors_encoding` what the published code of papers `bcos`
    and `covid` fed instead; `input_size` is that of the published weights and `min_size` the smallest that works, in
    pixels per side; `unused` are layers of the published weights that the network lacks.
    """

    build: Callable[[int], nn.Module]
    weights: dict[str, str]
    explained_layer: str
    head: str
    strided: tuple[str, ...] = ()
    stem: tuple[str, ...] = ()
    encoding: str = "imagenet"
    authors_encoding: str | None = "grey"
    input_size: int = 224
    min_size: int = 1
    unused: tuple[str, ...] = ()
    with_auxiliary: Callable[[int], nn.Module] | None = None

    @property
    def is_bcos(self) -> bool:
        return self.encoding == "add_inverse"


def _plain(
    name: str, entry: str, *layers, options: dict | None = None, others: tuple[str, ...] = (), **facts
) -> Architecture:
    """A network of torchvision with the weights of that entry and those of `others`, which are names and origins in
    one; `layers` are those of Architecture.
    """

    def build(n_labels: int) -> nn.Module:
        import torchvision

        network = getattr(torchvision.models, name)(weights=None, num_classes=n_labels, **(options or {}))
        return _with_relu_layer(network) if name.startswith("densenet") else network

    weights = {"imagenet": f"torchvision:{entry}.IMAGENET1K_V1"} | {origin: origin for origin in others}
    return Architecture(build, weights, *layers, **facts)


def _timm(name: str, origin: str, *layers, **facts) -> Architecture:
    """A network of timm with the weights of that origin."""

    def build(n_labels: int) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=n_labels)

    return Architecture(build, {"imagenet": origin}, *layers, **facts)


def _bcos(build: Callable[[int], nn.Module], origin: str, *layers, **facts) -> Architecture:
    return Architecture(
        build, {"imagenet": f"bcos:{origin}"}, *layers, encoding="add_inverse", authors_encoding=None, **facts
    )


def _with_relu_layer(network: nn.Module) -> nn.Module:
    """A DenseNet of torchvision whose last ReLU, there a mere function, is a layer: its map is the one to explain."""
    parts = {"features": network.features, "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts | {"classifier": network.classifier}))


def _inception_with_auxiliary(n_labels: int) -> nn.Module:
    """InceptionV3 with its second head; `network(x)` is the logits, `network(x, auxiliary=True)` in training also
    those of that head.
    """
    from torchvision.models import Inception3

    class InceptionWithAuxiliary(Inception3):
        auxiliary_weight = AUXILIARY_WEIGHT

        def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
            found = super().forward(x)
            if not self.training:
                return found
            return tuple(found) if auxiliary else found[0]

    return InceptionWithAuxiliary(num_classes=n_labels, aux_logits=True, init_weights=False)


def _stages(convolution: str) -> tuple[str, ...]:
    return tuple(f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in (convolution, "downsample.0"))


_BASIC, _BOTTLENECK = _stages("conv1"), _stages("conv2")
_BOTTLENECK_V2 = tuple(
    f"stages.{stage}.blocks.0.{part}" for stage in (1, 2, 3) for part in ("conv2", "downsample.conv")
)
_STEM, _BCOS_STEM, _DENSE_STEM = ("conv1", "maxpool"), ("conv1", "pool"), ("features.conv0", "features.pool0")
_TRANSITIONS = tuple(f"features.transition{i}.pool" for i in (1, 2, 3))
_BETWEEN = ("features.2.1", "features.4.1", "features.6.1")
_BCOS_BETWEEN = ("features.3.1", "features.5.1", "features.7.1")
_VIT = "to_patch_embedding.conv_stem", "linear_head.linear"
_BCOS_VIT = tuple(f"0.{layer}" for layer in _VIT)

NETWORKS: dict[str, Architecture] = {
    "resnet18": _plain("resnet18", "ResNet18_Weights", "layer4", "fc", _BASIC, _STEM),
    "resnet34": _plain("resnet34", "ResNet34_Weights", "layer4", "fc", _BASIC, _STEM),
    "resnet50": _plain("resnet50", "ResNet50_Weights", "layer4", "fc", _BOTTLENECK, _STEM),
    "resnet50_v2": _timm(
        "resnetv2_50",
        "timm:resnetv2_50.a1h_in1k",
        "norm",
        "head.fc",
        _BOTTLENECK_V2,
        ("stem.conv", "stem.pool"),
        encoding="symmetric",
    ),
    "densenet121": _plain(
        "densenet121",
        "DenseNet121_Weights",
        "relu",
        "classifier",
        _TRANSITIONS,
        _DENSE_STEM,
        min_size=29,
        others=XRV_WEIGHTS,
    ),
    "densenet161": _plain(
        "densenet161", "DenseNet161_Weights", "relu", "classifier", _TRANSITIONS, _DENSE_STEM, min_size=29
    ),
    "vgg16": _plain("vgg16", "VGG16_Weights", "features.29", "classifier.6", min_size=32),
    "vgg19": _plain("vgg19", "VGG19_Weights", "features.35", "classifier.6", min_size=32),
    "inception_v3": _plain(
        "inception_v3",
        "Inception_V3_Weights",
        "Mixed_7c",
        "fc",
        encoding="symmetric",
        input_size=299,
        min_size=75,
        unused=("AuxLogits",),
        options={"aux_logits": False, "init_weights": False},
        with_auxiliary=_inception_with_auxiliary,
    ),
    "inception_resnet_v2": _timm(
        "inception_resnet_v2",
        "timm:inception_resnet_v2.tf_in1k",
        "conv2d_7b",
        "classif",
        encoding="symmetric",
        input_size=299,
        min_size=75,
    ),
    "xception": _timm(
        "legacy_xception",
        "timm:legacy_xception.tf_in1k",
        "act4",
        "fc",
        encoding="symmetric",
        input_size=299,
        min_size=7,
    ),
    "efficientnet_b0": _plain("efficientnet_b0", "EfficientNet_B0_Weights", "features", "classifier.1"),
    "efficientnet_lite0": _timm(
        "tf_efficientnet_lite0", "lite:efficientnet-lite0", "bn2", "classifier", encoding="lite"
    ),
    "convnext_tiny": _plain(
        "convnext_tiny", "ConvNeXt_Tiny_Weights", "features", "classifier.2", _BETWEEN, ("features.0.0",), min_size=32
    ),
    "vit_c_b": Architecture(
        bcos.plain_vit_builder("vitc_b_patch1_14"), {"imagenet": "bcos:vit_final/vitc_b_patch1_14"}, *_VIT
    ),
    "bcos_resnet18": _bcos(bcos.builder("resnet18"), "bcos_final/resnet_18", "layer4", "fc", _BASIC, _BCOS_STEM),
    "bcos_resnet34": _bcos(bcos.builder("resnet34"), "bcos_final/resnet_34", "layer4", "fc", _BASIC, _BCOS_STEM),
    "bcos_resnet50": _bcos(bcos.builder("resnet50"), "bcos_final/resnet_50", "layer4", "fc", _BOTTLENECK, _BCOS_STEM),
    "bcos_densenet121": _bcos(
        bcos.builder("densenet121"),
        "bcos_final/densenet_121",
        "features",
        "classifier",
        _TRANSITIONS,
        _DENSE_STEM,
        min_size=29,
    ),
    "bcos_convnext_tiny": _bcos(
        bcos.builder("convnext_tiny", norm_layer=None),  # None: the package's position norm
        "bcos_final_long/convnext_tiny_pn",
        "features",
        "classifier.1",
        _BCOS_BETWEEN,
        ("features.0",),
        min_size=32,
    ),
    "bcos_vit_c_b": _bcos(bcos.vit_builder("vitc_b_patch1_14"), "vit_final/bcos_vitc_b_patch1_14", *_BCOS_VIT),
}
