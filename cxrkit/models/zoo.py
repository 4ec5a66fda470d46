"""The one function that makes a classifier from the table of networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cxrkit.errors import ModelError, ParameterError, meant
from cxrkit.models import bcos
from cxrkit.models import weights as weight_files
from cxrkit.models.classifier import ENCODINGS, Classifier, check_labels
from cxrkit.models.downsample import POOLS
from cxrkit.models.downsample import antialias as antialias_network
from cxrkit.models.networks import NETWORKS, Architecture

__all__ = ["NETWORKS", "NOTICE", "architecture", "create"]

NOTICE = "Not a medical device; not for clinical use."
PROTOCOLS = ("paper", "authors", "corrected")
AUXILIARY_SIZE = 299  # the second head of InceptionV3 pools a map of 17 x 17


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
    antialias_stem: bool = False,
    auxiliary: bool = False,
    encoding: str | None = None,
) -> Classifier:
    """A Classifier with one logit per label.

    `name`: a key of NETWORKS. `weights`: None (random, from `seed`), a name ("imagenet"; for densenet121 also
    "xrv:densenet121-res224-all" and its kin), or a path to a state dict (.safetensors, .pth, .pt, .tar), such as
    CheXNet's for densenet121; a head that doesn't fit the labels stays random. `antialias`: "none", "flc",
    "flc_authors" or "blur" replaces the six strided convolutions of layer2 to layer4 of a ResNet; they start from
    random weights as in the published code unless `copy_weights`. The same rule serves where nothing is published: the
    strided convolutions between the stages of a ConvNeXt, the average pools of a DenseNet (whose weights all stay).
    `antialias_stem` also replaces what is strided before the first stage, which the papers left aliased.
    `protocol="authors"` copies what the published code did: no ImageNet normalisation for ordinary networks,
    a logit bias of -ln 999 for B-cos; "paper" and "corrected" agree here. `logit_bias` overrides the bias of
    a B-cos network. `auxiliary` adds InceptionV3's second head for training (paper `covid`, weight 0.4); such a model
    needs images of 299 pixels per side. `encoding` overrides the network's own: a key of ENCODINGS, "xrv" (one
    channel, for densenet121) comes with the weights of torchxrayvision. The global random state stays untouched. Raises
    ModelError (network, labels, weights) or ParameterError (options). Source: paper `bcos`, B-cos and anti-aliasing.
    """
    row, labels = architecture(name), check_labels(labels)
    if encoding is None:
        encoding = _default_encoding(row, weights, protocol)
    _check_options(name, row, antialias, antialias_stem, protocol, logit_bias, auxiliary)
    _check_encoding(name, row, encoding)
    network = _network(row, len(labels), seed, auxiliary, encoding)
    replaced = (*(row.stem if antialias_stem else ()), *row.strided) if antialias != "none" else ()
    antialias_network(network, antialias, replaced)
    origin = {"origin": "random"}
    if weights is not None:
        heads = (row.head, "AuxLogits.fc") if auxiliary else (row.head,)
        given = {"replaced": replaced, "copy_weights": copy_weights, "unused": row.unused}
        origin = weight_files.load_into(network, weights, named=row.weights, heads=heads, labels=labels, **given)
    card = {
        "architecture": name,
        "labels": list(labels),
        "antialias": antialias,
        "antialias_stem": antialias_stem,
        "antialiased_layers": list(replaced),
        "auxiliary": auxiliary,
        "copy_weights": copy_weights,
        "protocol": protocol,
        "seed": seed,
        **_facts(row, network, encoding, auxiliary),
        "logit_bias": _set_logit_bias(row, network, len(labels), protocol, logit_bias),
        "weights": origin,
        "notice": NOTICE,
    }
    facts = {key: card[key] for key in ("explained_layer", "logit_bias", "min_size")}
    return Classifier(network, labels, encoding, **facts, card=card).to(memory_format=torch.channels_last)


def _default_encoding(row: Architecture, weights: str | None, protocol: str) -> str:
    authors = row.authors_encoding if protocol == "authors" else None
    return "xrv" if str(weights).startswith("xrv:") else authors or row.encoding


def _network(row: Architecture, n_labels: int, seed: int, auxiliary: bool, encoding: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        network = (row.with_auxiliary if auxiliary else row.build)(n_labels)
        if encoding == "xrv":
            network.features.conv0 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return network


def _set_logit_bias(row: Architecture, network: nn.Module, n_labels: int, protocol: str, bias: float | None) -> float:
    if not row.is_bcos:
        return 0.0
    bias = bcos.default_logit_bias(n_labels, protocol) if bias is None else float(bias)
    bcos.set_logit_bias(network, bias)
    return bias


def _facts(row: Architecture, network: nn.Module, encoding: str, auxiliary: bool) -> dict[str, object]:
    """The card's lines on input, output and size."""
    ends = [end for scale, offset in zip(*ENCODINGS[encoding], strict=True) for end in (offset, scale + offset)]
    return {
        "encoding": encoding,
        "input": "grey, float32 [B, 1, H, W]",
        "input_range": [0.0, 1.0],
        "encoded_range": [min(ends), max(ends)],
        "input_size": row.input_size,
        "min_size": max(row.min_size, AUXILIARY_SIZE if auxiliary else 1),
        "explained_layer": f"network.{row.explained_layer}",
        "output": "one logit per label, for a sigmoid",
        "parameters": sum(weight.numel() for weight in network.parameters()),
    }


def architecture(name: str) -> Architecture:
    """The row of that name; raises ModelError with the nearest names, or all."""
    if name not in NETWORKS:
        raise ModelError(f"unknown network {name!r}; {meant(str(name), NETWORKS, 3)}")
    return NETWORKS[name]


def _check_options(
    name: str, row: Architecture, antialias: str, stem: bool, protocol: str, logit_bias: float | None, auxiliary: bool
) -> None:
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    if antialias not in ("none", *POOLS):
        raise ParameterError(f"antialias must be one of none, {', '.join(POOLS)}; got {antialias!r}")
    if antialias != "none" and not row.strided:
        able = ", ".join(known for known, other in NETWORKS.items() if other.strided)
        raise ModelError(
            f"{name} can't be anti-aliased: no recipe says which of its layers to replace; use one of {able}"
        )
    if stem and antialias == "none":
        raise ParameterError(f"antialias_stem goes with antialias: name one of {', '.join(POOLS)}")
    if logit_bias is not None and not row.is_bcos:
        raise ParameterError(f"logit_bias is for B-cos networks; the head of {name} learns its own bias")
    if auxiliary and row.with_auxiliary is None:
        able = ", ".join(known for known, other in NETWORKS.items() if other.with_auxiliary)
        raise ParameterError(f"{name} has no auxiliary head; those that do: {able}")


def _check_encoding(name: str, row: Architecture, encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ParameterError(f"encoding must be one of {', '.join(ENCODINGS)}; got {encoding!r}")
    channels = {key: len(scale) for key, (scale, _) in ENCODINGS.items()}
    able = [key for key in ENCODINGS if channels[key] == channels[row.encoding]]
    if any(origin.startswith("xrv:") for origin in row.weights):
        able.append("xrv")
    if encoding not in able:
        raise ParameterError(f"{name} can't take the encoding {encoding!r}; it takes {', '.join(able)}")
