"""The networks of the kit: how each is built, which weights it may start from, and what else must be known of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cxrkit.models import bcos
from cxrkit.models.sources import XRV_WEIGHTS
from cxrkit.yaml_files import read_yaml

__all__ = ["AUXILIARY_WEIGHT", "NETWORKS", "Architecture"]

AUXILIARY_WEIGHT = 0.4  # of InceptionV3's second head in the loss; paper `covid`


@dataclass(frozen=True)
class Architecture:
    """One row of networks.yaml: how to build a network and what the kit needs to know of it.

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


def _torchvision(name: str, **options) -> Callable[[int], nn.Module]:
    def build(n_labels: int) -> nn.Module:
        import torchvision

        network = getattr(torchvision.models, name)(weights=None, num_classes=n_labels, **options)
        return _with_relu_layer(network) if name.startswith("densenet") else network

    return build


def _timm(name: str) -> Callable[[int], nn.Module]:
    def build(n_labels: int) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=n_labels)

    return build


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


_BUILDERS = {
    "torchvision": _torchvision,
    "timm": _timm,
    "vit": bcos.plain_vit_builder,
    "bcos": bcos.builder,
    "bcos_vit": bcos.vit_builder,
}
_LISTS = ("strided", "stem", "unused")


def _architecture(
    build: str, weights: str, others: str | None = None, options: dict | None = None, **facts
) -> Architecture:
    library, name = build.split(":")
    origins = {"imagenet": weights} | ({origin: origin for origin in XRV_WEIGHTS} if others == "xrv" else {})
    facts |= {field: tuple(facts[field]) for field in _LISTS if field in facts}
    if library.startswith("bcos"):
        facts |= {"encoding": "add_inverse", "authors_encoding": None}
    if name == "inception_v3":
        facts["with_auxiliary"] = _inception_with_auxiliary
    return Architecture(_BUILDERS[library](name, **options or {}), origins, **facts)


NETWORKS: dict[str, Architecture] = {
    name: _architecture(**row) for name, row in read_yaml(Path(__file__).with_name("networks.yaml")).items()
}
