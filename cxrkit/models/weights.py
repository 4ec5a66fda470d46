"""Weights by name or from a file: found, checked, and loaded without running anything a file may hold."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError

__all__ = ["load_into", "locate", "read_state", "sha256_of"]


_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")  # names in torchvision's files


def load_into(
    network: nn.Module,
    weights: str | Path,
    *,
    named: Mapping[str, str],
    head: str,
    labels: Sequence[str],
    replaced: Sequence[str] = (),
    copy_weights: bool = False,
    unused: Sequence[str] = (),
) -> dict:
    """Load weights into a network, in place, and return where they came from (JSON-able, for the card).

    `weights` is a key of `named` or a path. The layer `head` keeps its random weights when the file's has
    another shape, or when the file's card names other labels. `replaced` are anti-aliased convolutions: from
    a file without them their weights are copied only if `copy_weights`. `unused` are layers that the file may hold
    beyond the network's. Raises ModelError naming file and keys.
    """
    path, origin = locate(weights, named)
    state = _rename(read_state(path), network, replaced, copy_weights)
    own = network.state_dict()
    if not _head_fits(state, own, head, path, labels):
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    fresh = {key for key in own if key.startswith((f"{head}.", *(f"{name}." for name in replaced)))}
    missing = [key for key in own if key not in state and key not in fresh and not _optional(key)]
    unexpected = [key for key in state if key not in own and not key.startswith(tuple(f"{name}." for name in unused))]
    wrong = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if found := [f"{what}: {_some(keys)}" for what, keys in problems.items() if keys]:
        raise ModelError(f"{path.name} doesn't fit this network; {'; '.join(found)}")
    network.load_state_dict(state, strict=False)
    random = sorted({key.rsplit(".", 1)[0] for key in fresh if key not in state})
    return origin | {"file": path.name, "sha256": sha256_of(path), "random_layers": random}


def locate(weights: str | Path, named: Mapping[str, str]) -> tuple[Path, dict]:
    """The local file of named weights (downloaded when missing) or of a path, and its origin for the card.

    An origin is "torchvision:ENUM.ENTRY" or "bcos:EXPERIMENT/NAME". Downloads go to torch.hub's folder and
    are checked against the hash in the file's name. Raises ModelError saying which file to fetch, and where
    to put it, when there is no network.
    """
    if str(weights) not in named:
        path = Path(weights)
        if path.is_file():
            return path, {"origin": "file"}
        known = ", ".join(named) or "none"
        raise ModelError(f"no such weights: {weights!s} is neither a file nor a known name ({known})")
    url = _url(named[str(weights)])
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix and prefix[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"can't download the weights {weights!s} ({error}); fetch {url} elsewhere and put it at {path}, "
                "or pass its path as weights"
            ) from error
    if prefix and not sha256_of(path).startswith(prefix[1]):
        raise ModelError(f"{path} doesn't have the checksum in its name; delete it and fetch {url} again")
    return path, {"origin": str(weights), "url": url}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or .pth/.pt file, on the CPU; raises ModelError for anything else
    in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif path.suffix in (".pth", ".pt"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ModelError(f"{path.name}: weights must be a .safetensors, .pth or .pt file")
    except ModelError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path.name} is damaged or holds more than tensors; it was not loaded") from error
    except Exception as error:  # the readers raise many types for a damaged file
        raise ModelError(f"{path.name} can't be read as weights ({type(error).__name__})") from error
    state = _unwrap(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path.name} doesn't hold a state dict (names to tensors)")
    return state


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _url(origin: str) -> str:
    package, entry = origin.split(":")
    if package == "torchvision":
        import torchvision

        return torchvision.models.get_weight(entry).url
    from bcos.models.pretrained import URLS

    experiment, name = entry.split("/")
    return URLS[experiment][name]


def _unwrap(state):
    """Strip what trainers put around a state dict: an outer dict, and one prefix on every name."""
    if isinstance(state, Mapping):
        for outer in ("state_dict", "model"):
            if isinstance(state.get(outer), Mapping):
                state = state[outer]
        for prefix in ("module.", "model.", "network."):
            if state and all(str(key).startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _rename(state: dict, network: nn.Module, replaced: Sequence[str], copy_weights: bool) -> dict:
    """Give weights their present names: those of replaced convolutions, which may be dropped, and of old DenseNets."""
    own = network.state_dict().keys()
    renamed = {}
    for key, value in state.items():
        key = _OLD_DENSENET.sub(r"\1\2", key)
        layer = next((name for name in replaced if key.startswith(f"{name}.") and key not in own), None)
        if layer is None:
            renamed[key] = value
        elif copy_weights:
            renamed[f"{layer}.0{key.removeprefix(layer)}"] = value
    return renamed


def _head_fits(state: dict, own: dict, head: str, path: Path, labels: Sequence[str]) -> bool:
    keys = [key for key in own if key.startswith(f"{head}.")]
    if any(key not in state or state[key].shape != own[key].shape for key in keys):
        return False
    card = path.with_suffix(".json")
    try:
        return json.loads(card.read_text(encoding="utf-8"))["labels"] == list(labels)
    except (OSError, ValueError, KeyError, TypeError):
        return True  # no card of ours: the shape is all there is to go by


def _optional(key: str) -> bool:
    return key.endswith("num_batches_tracked")  # files from before this counter existed lack it


def _some(keys: Sequence[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
