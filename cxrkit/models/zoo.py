"""The one function that makes a classifier from the table of networks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from cxrkit.errors import ModelError, ParameterError
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
    ModelError (network, labels, weights) or ParameterError (options).
    Source: paper `bcos`, sections on B-cos networks and anti-aliasing.
    """
    row = architecture(name)
    labels = check_labels(labels)
    if encoding is None:
        authors = row.authors_encoding if protocol == "authors" else None
        encoding = "xrv" if str(weights).startswith("xrv:") else authors or row.encoding
    _check_options(name, row, antialias, antialias_stem, protocol, logit_bias, auxiliary)
    _check_encoding(name, row, encoding)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        network = (row.with_auxiliary if auxiliary else row.build)(len(labels))
        if encoding == "xrv":
            network.features.conv0 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    replaced = (*(row.stem if antialias_stem else ()), *row.strided) if antialias != "none" else ()
    if replaced:
        antialias_network(network, antialias, replaced)
    origin = {"origin": "random"}
    if weights is not None:
        origin = weight_files.load_into(
            network,
            weights,
            named=row.weights,
            heads=(row.head, "AuxLogits.fc") if auxiliary else (row.head,),
            labels=labels,
            replaced=replaced,
            copy_weights=copy_weights,
            unused=row.unused,
        )
    bias = 0.0
    if row.is_bcos:
        bias = bcos.default_logit_bias(len(labels), protocol) if logit_bias is None else float(logit_bias)
        bcos.set_logit_bias(network, bias)
    ends = [end for scale, offset in zip(*ENCODINGS[encoding], strict=True) for end in (offset, scale + offset)]
    min_size = max(row.min_size, AUXILIARY_SIZE if auxiliary else 1)
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
        "encoding": encoding,
        "input": "grey, float32 [B, 1, H, W]",
        "input_range": [0.0, 1.0],
        "encoded_range": [min(ends), max(ends)],
        "input_size": row.input_size,
        "min_size": min_size,
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
        min_size=min_size,
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
