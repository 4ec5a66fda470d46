"""The table of networks, and the one function that makes a classifier from it."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cxrkit.errors import ModelError, ParameterError
from cxrkit.models import bcos
from cxrkit.models import weights as weight_files
from cxrkit.models.classifier import Classifier, check_labels
from cxrkit.models.downsample import POOLS
from cxrkit.models.downsample import antialias as antialias_network

__all__ = ["NETWORKS", "NOTICE", "Architecture", "create"]

NOTICE = "Not a medical device; not for clinical use."
PROTOCOLS = ("paper", "authors", "corrected")


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how to build a network and what the kit needs to know of it.

    `build(n_labels)` returns the network; `weights` maps a name to its origin (see weights.locate);
    `explained_layer` (the last feature map, after its ReLU), `head` and `strided` (the convolutions and average pools
    that anti-aliasing replaces) are dotted names inside the network; `encoding` is a key of classifier.ENCODINGS,
    `authors_encoding` what the published code of papers `bcos` and `covid` fed instead; `input_size` is that of the
    published weights and `min_size` the smallest that works, in pixels per side; `unused` are layers of the published
    weights that the network lacks.
    """

    build: Callable[[int], nn.Module]
    weights: dict[str, str]
    explained_layer: str
    head: str
    strided: tuple[str, ...] = ()
    encoding: str = "imagenet"
    authors_encoding: str | None = "grey"
    input_size: int = 224
    min_size: int = 1
    unused: tuple[str, ...] = ()

    @property
    def is_bcos(self) -> bool:
        return self.encoding == "add_inverse"


def _plain(name: str, entry: str, *layers, options: dict | None = None, **facts) -> Architecture:
    """A network of torchvision with the weights of that entry; `layers` are those of Architecture."""

    def build(n_labels: int) -> nn.Module:
        import torchvision

        network = getattr(torchvision.models, name)(weights=None, num_classes=n_labels, **(options or {}))
        return _with_relu_layer(network) if name.startswith("densenet") else network

    return Architecture(build, {"imagenet": f"torchvision:{entry}.IMAGENET1K_V1"}, *layers, **facts)


def _bcos(build: Callable[[int], nn.Module], origin: str, *layers, **facts) -> Architecture:
    return Architecture(
        build, {"imagenet": f"bcos:{origin}"}, *layers, encoding="add_inverse", authors_encoding=None, **facts
    )


def _with_relu_layer(network: nn.Module) -> nn.Module:
    """A DenseNet of torchvision whose last ReLU, there a mere function, is a layer: its map is the one to explain."""
    parts = {"features": network.features, "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts | {"classifier": network.classifier}))


def _stages(convolution: str) -> tuple[str, ...]:
    return tuple(f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in (convolution, "downsample.0"))


_BASIC, _BOTTLENECK = _stages("conv1"), _stages("conv2")
_TRANSITIONS = tuple(f"features.transition{i}.pool" for i in (1, 2, 3))
_BETWEEN = ("features.2.1", "features.4.1", "features.6.1")
_BCOS_BETWEEN = ("features.3.1", "features.5.1", "features.7.1")
_VIT = "0.to_patch_embedding.conv_stem", "0.linear_head.linear"

NETWORKS: dict[str, Architecture] = {
    "resnet18": _plain("resnet18", "ResNet18_Weights", "layer4", "fc", _BASIC),
    "resnet34": _plain("resnet34", "ResNet34_Weights", "layer4", "fc", _BASIC),
    "resnet50": _plain("resnet50", "ResNet50_Weights", "layer4", "fc", _BOTTLENECK),
    "densenet121": _plain("densenet121", "DenseNet121_Weights", "relu", "classifier", _TRANSITIONS, min_size=29),
    "densenet161": _plain("densenet161", "DenseNet161_Weights", "relu", "classifier", _TRANSITIONS, min_size=29),
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
        unused=("AuxLogits",),  # the second head, for training only: a second output, and training has one loss
        options={"aux_logits": False, "init_weights": False},
    ),
    "efficientnet_b0": _plain("efficientnet_b0", "EfficientNet_B0_Weights", "features", "classifier.1"),
    "convnext_tiny": _plain(
        "convnext_tiny", "ConvNeXt_Tiny_Weights", "features", "classifier.2", _BETWEEN, min_size=32
    ),
    "bcos_resnet18": _bcos(bcos.builder("resnet18"), "bcos_final/resnet_18", "layer4", "fc", _BASIC),
    "bcos_resnet34": _bcos(bcos.builder("resnet34"), "bcos_final/resnet_34", "layer4", "fc", _BASIC),
    "bcos_resnet50": _bcos(bcos.builder("resnet50"), "bcos_final/resnet_50", "layer4", "fc", _BOTTLENECK),
    "bcos_densenet121": _bcos(
        bcos.builder("densenet121"), "bcos_final/densenet_121", "features", "classifier", _TRANSITIONS, min_size=29
    ),
    "bcos_convnext_tiny": _bcos(
        bcos.builder("convnext_tiny", norm_layer=None),  # None: the package's position norm
        "bcos_final_long/convnext_tiny_pn",
        "features",
        "classifier.1",
        _BCOS_BETWEEN,
        min_size=32,
    ),
    "bcos_vit_c_b": _bcos(bcos.vit_builder("vitc_b_patch1_14"), "vit_final/bcos_vitc_b_patch1_14", *_VIT),
}


def create(
    name: str,
    labels: Sequence[str],
    weights: str | None = None,
    antialias: str = "none",
    protocol: str = "corrected",
    seed: int = 0,
    *,
    copy_weights: bool = False,
    logit_bias: float | None = None,
) -> Classifier:
    """A Classifier with one logit per label.

    `name`: a key of NETWORKS. `weights`: None (random, from `seed`), "imagenet", or a path to a .safetensors
    or .pth state dict; a head that doesn't fit the labels stays random. `antialias`: "none", "flc",
    "flc_authors" or "blur" replaces the six strided convolutions of layer2 to layer4 of a ResNet; they start from
    random weights as in the published code unless `copy_weights`. The same rule serves where nothing is published: the
    strided convolutions between the stages of a ConvNeXt, the average pools of a DenseNet (whose weights all stay).
    `protocol="authors"` copies what the published code did: no ImageNet normalisation for ordinary networks,
    a logit bias of -ln 999 for B-cos; "paper" and "corrected" agree here. `logit_bias` overrides the bias of
    a B-cos network. The global random state stays untouched. Raises ModelError (network, labels, weights) or
    ParameterError (options).
    Source: paper `bcos`, sections on B-cos networks and anti-aliasing.
    """
    row = architecture(name)
    labels = check_labels(labels)
    _check_options(name, row, antialias, protocol, logit_bias)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        network = row.build(len(labels))
    replaced = row.strided if antialias != "none" else ()
    if replaced:
        antialias_network(network, antialias, replaced)
    origin = {"origin": "random"}
    if weights is not None:
        origin = weight_files.load_into(
            network,
            weights,
            named=row.weights,
            head=row.head,
            labels=labels,
            replaced=replaced,
            copy_weights=copy_weights,
            unused=row.unused,
        )
    bias = 0.0
    if row.is_bcos:
        bias = bcos.default_logit_bias(len(labels), protocol) if logit_bias is None else float(logit_bias)
        bcos.set_logit_bias(network, bias)
    encoding = row.authors_encoding if protocol == "authors" and row.authors_encoding else row.encoding
    card = {
        "architecture": name,
        "labels": list(labels),
        "antialias": antialias,
        "antialiased_layers": list(replaced),
        "copy_weights": copy_weights,
        "protocol": protocol,
        "seed": seed,
        "encoding": encoding,
        "input": "grey, float32 [B, 1, H, W]",
        "input_range": [0.0, 1.0],
        "input_size": row.input_size,
        "min_size": row.min_size,
        "output": "one logit per label, for a sigmoid",
        "logit_bias": bias,
        "explained_layer": f"network.{row.explained_layer}",
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights": origin,
        "notice": NOTICE,
    }
    model = Classifier(
        network,
        labels,
        encoding,
        explained_layer=card["explained_layer"],
        logit_bias=bias,
        min_size=row.min_size,
        card=card,
    )
    return model.to(memory_format=torch.channels_last)


def architecture(name: str) -> Architecture:
    """The row of that name; raises ModelError with the known names and the nearest ones."""
    if name in NETWORKS:
        return NETWORKS[name]
    near = difflib.get_close_matches(str(name), NETWORKS, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelError(f"unknown network {name!r}; {hint}known: {', '.join(NETWORKS)}")


def _check_options(name: str, row: Architecture, antialias: str, protocol: str, logit_bias: float | None) -> None:
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    if antialias not in ("none", *POOLS):
        raise ParameterError(f"antialias must be one of none, {', '.join(POOLS)}; got {antialias!r}")
    if antialias != "none" and not row.strided:
        able = ", ".join(known for known, other in NETWORKS.items() if other.strided)
        raise ModelError(
            f"{name} can't be anti-aliased: no recipe says which of its layers to replace; use one of {able}"
        )
    if logit_bias is not None and not row.is_bcos:
        raise ParameterError(f"logit_bias is for B-cos networks; the head of {name} learns its own bias")
