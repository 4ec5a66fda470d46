"""The table of networks, and the one function that makes a classifier from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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

    `build(n_labels)` returns the network; `encoding` is a key of classifier.ENCODINGS, `authors_encoding`
    what the published code of paper `bcos` fed instead; `explained_layer`, `head` and `strided` (the
    convolutions that anti-aliasing replaces) are dotted names inside the network; `weights` maps a name to
    its origin (see weights.locate).
    """

    build: Callable[[int], nn.Module]
    encoding: str
    explained_layer: str
    head: str
    weights: dict[str, str] = field(default_factory=dict)
    strided: tuple[str, ...] = ()
    input_size: int = 224
    authors_encoding: str | None = None

    @property
    def is_bcos(self) -> bool:
        return self.encoding == "add_inverse"


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(n_labels: int) -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=n_labels)

    return build


def _resnet(
    build: Callable[[int], nn.Module],
    origin: str,
    first_conv: str,
    encoding: str = "imagenet",
    authors_encoding: str | None = "grey",
) -> Architecture:
    return Architecture(
        build,
        encoding,
        explained_layer="layer4",
        head="fc",
        weights={"imagenet": origin},
        strided=tuple(f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in (first_conv, "downsample.0")),
        authors_encoding=authors_encoding,
    )


def _bcos_resnet(name: str, origin: str, first_conv: str) -> Architecture:
    return _resnet(bcos.builder(name), origin, first_conv, "add_inverse", None)


NETWORKS: dict[str, Architecture] = {
    "resnet18": _resnet(_torchvision("resnet18"), "torchvision:ResNet18_Weights.IMAGENET1K_V1", "conv1"),
    "resnet50": _resnet(_torchvision("resnet50"), "torchvision:ResNet50_Weights.IMAGENET1K_V1", "conv2"),
    "bcos_resnet18": _bcos_resnet("resnet18", "bcos:bcos_final/resnet_18", "conv1"),
    "bcos_resnet50": _bcos_resnet("resnet50", "bcos:bcos_final/resnet_50", "conv2"),
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
    "flc_authors" or "blur" replaces the six strided convolutions of layer2 to layer4; they start from random
    weights as in the published code unless `copy_weights`.
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
        "output": "one logit per label, for a sigmoid",
        "logit_bias": bias,
        "explained_layer": f"network.{row.explained_layer}",
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights": origin,
        "notice": NOTICE,
    }
    model = Classifier(network, labels, encoding, explained_layer=card["explained_layer"], logit_bias=bias, card=card)
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
        raise ModelError(f"{name} can't be anti-aliased: only ResNets have a published recipe")
    if logit_bias is not None and not row.is_bcos:
        raise ParameterError(f"logit_bias is for B-cos networks; the head of {name} learns its own bias")
