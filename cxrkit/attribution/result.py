"""Maps together with what made them, in one file."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import cxrkit
from cxrkit.attribution import registry
from cxrkit.attribution.api import Refusal, attributed, checked_images, method_settings
from cxrkit.attribution.layers import find_layer
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.target import Explained
from cxrkit.errors import DataError, ParameterError
from cxrkit.models.storage import replace_file

__all__ = ["Attribution", "explain"]

_FORMAT = "cxrkit.attribution 1"
_TENSORS = ("maps", "logits")


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Maps, and how they came about: made by `explain`, kept as one file.

    `maps` [B, L, H, W] and `logits` [B, L] are float32 or float64; `labels` are L names (indices as text where the
    network has no names). `options`: every option of the method as it was used, with modules by their dotted names
    and tensors by shape, type and SHA-256. `model_card`: the card of a `cxrkit.models.Classifier`, else the name of
    the network's class. `versions`: of cxrkit, torch, numpy and Python. `created`: ISO 8601. `image_ids`: B names,
    or None. `refused`: the maps that the method refused, which are NaN, with the reasons. Raises ParameterError
    naming the field that doesn't fit.
    """

    maps: Tensor
    logits: Tensor
    labels: tuple[str, ...]
    method: str
    options: Mapping[str, object]
    output: str
    model_card: Mapping[str, object]
    versions: Mapping[str, str]
    created: str
    image_ids: tuple[str, ...] | None = None
    refused: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        for name, fits, right in self._requirements():
            if not fits:
                value = getattr(self, name)
                shown = f"a tensor {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ParameterError(f"{name} must be {right}; got {shown[:80]}{'...' if len(shown) > 80 else ''}")

    def _requirements(self) -> Iterator[tuple[str, bool, str]]:
        """Name of a field, whether it is right, and what would be; each may build on those before it."""
        yield "maps", _is_tensor(self.maps, 4), "a tensor [B, L, H, W], float32 or float64"
        images, labels = self.maps.shape[:2]
        fits = _is_tensor(self.logits, 2) and self.logits.shape == (images, labels) and self.logits.isfinite().all()
        yield "logits", fits, f"a tensor [{images}, {labels}] like maps, float32 or float64, without NaN"
        yield "labels", _are_names(self.labels, labels), f"a tuple of {labels} names"
        yield "image_ids", self.image_ids is None or _are_names(self.image_ids, images), f"a tuple of {images} names"
        yield "method", isinstance(self.method, str), "a name"
        yield "output", self.output in ("logit", "probability"), "'logit' or 'probability'"
        yield "created", _is_time(self.created), "a time in ISO 8601"
        for name in ("options", "model_card", "versions"):
            yield name, isinstance(getattr(self, name), dict), "a dict"
        fits = isinstance(self.refused, tuple) and all(isinstance(refusal, Refusal) for refusal in self.refused)
        yield "refused", fits, "a tuple of refusals (image, label, reason)"
        empty = {tuple(place) for place in (~self.maps.isfinite().flatten(2).all(2)).nonzero().tolist()}
        yield "maps", empty <= {refusal[:2] for refusal in self.refused}, "finite where the method refused none"

    def __repr__(self) -> str:
        images, _, height, width = self.maps.shape
        named = ", ".join(self.labels[:3]) + (f" and {len(self.labels) - 3} more" if len(self.labels) > 3 else "")
        return f"Attribution({self.method} of the {self.output} of {named}; {images} images, {height} x {width})"

    def of(self, label: str) -> Tensor:
        """Maps of one label, [B, H, W]. Raises ParameterError for a label that wasn't asked for."""
        registry.check_choice("label", str(label), self.labels)
        return self.maps[:, self.labels.index(str(label))]

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything to one .safetensors file (suffix added when missing) and return its path.

        The file is complete or not there at all. Raises DataError for another suffix.
        """
        path = _checked_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        names = [field.name for field in fields(self) if field.name not in _TENSORS]
        told = {name: json.dumps(getattr(self, name), ensure_ascii=False) for name in names}
        replace_file(path, lambda target: save_file(tensors, target, metadata={"format": _FORMAT, **told}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Attribution:
        """The attribution that `save` wrote, on the CPU. Raises DataError naming file and field for anything else."""
        path = _checked_path(path)
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is damaged or no safetensors file: {error}") from error
        if told.pop("format", None) != _FORMAT:
            raise DataError(f"{path} is no attribution in the format {_FORMAT!r}")
        found = {}
        for name, text in told.items():
            try:
                value = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}: {name} is no JSON: {error}") from error
            found[name] = tuple(value) if isinstance(value, list) else value
        try:
            found["refused"] = tuple(Refusal(*row) for row in found.get("refused", ()))
            return cls(**found, **tensors)
        except (ParameterError, TypeError) as error:
            raise DataError(f"{path}: {error}") from error


def explain(
    model: nn.Module,
    images: Tensor,
    method: str,
    labels=None,
    output: str | None = None,
    *,
    image_ids: Sequence | None = None,
    created: str | None = None,
    **options,
) -> Attribution:
    """Maps as `attribute` makes them, with the logits and everything that is needed to tell how they came about.

    Arguments, `preset`, `chunk`, `progress` and errors are those of `attribute`. `image_ids`: one name per image;
    `created`: a time in ISO 8601, None for now. Maps and logits are on the images' device.
    """
    if image_ids is not None:
        image_ids = tuple(str(name) for name in image_ids)
        if len(image_ids) != len(checked_images(model, images)):
            raise ParameterError(f"image_ids must be {len(images)} names; got {len(image_ids)}")
    maps, refusals, explained = attributed(model, images, method, labels, output, **options)
    logits, names = _logits(explained, images)
    output, used = _used(method, output, options, explained.used_layers)
    model = explained.model
    card = getattr(model, "card", None)
    return Attribution(
        maps=maps,
        logits=logits.to(maps),
        labels=names,
        method=method,
        options=_described(used, model),
        output=output,
        model_card=_described(card, model) if isinstance(card, Mapping) and card else {"class": type(model).__name__},
        versions={
            "cxrkit": cxrkit.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds") if created is None else created,
        image_ids=image_ids,
        refused=tuple(refusals),
    )


def _logits(explained: Explained, images: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Logits [B, L] of the labels asked for, in the state in which the maps were made, and the labels' names."""
    device = next((t.device for t in (*explained.model.parameters(), *explained.model.buffers())), images.device)
    inputs = images.detach().to(device)
    with prepared(explained, inputs), torch.no_grad():
        logits = torch.cat([explained.logits(part) for part in inputs.split(explained.batch)])
    chosen = explained.indices(logits.shape[1])
    return logits[:, chosen], tuple(str(i) if explained.names is None else explained.names[i] for i in chosen)


def _used(method: str, output: str | None, options: dict, layers: list[str]) -> tuple[str, dict]:
    """What was explained, and all options of the method: its defaults, those of the preset, those given; for `layer`
    and `layers` the names of those that were used.
    """
    entry = registry.entry(method)
    output, chosen = method_settings(entry.card, options.get("preset"), output, options)
    parameters = inspect.signature(entry.function).parameters
    used = {name: chosen.get(name, parameters[name].default) for name in entry.card.options}
    if layers and used.get("layers") is not None:
        used["layers"] = layers
    elif layers and "layer" in used:
        used["layer"] = layers[0]
    return output, used


def _described(value: object, model: nn.Module) -> object:
    """A value as JSON holds it: modules by dotted name, tensors by shape, type and SHA-256, paths by file name."""

    def described(item: object) -> object:
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, nn.Module):
            return find_layer(model, item)[0]
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, os.PathLike):
            return Path(item).name
        if not isinstance(item, (Tensor, np.ndarray)):
            return getattr(item, "__name__", type(item).__name__)  # a function, say; never its address
        item = torch.as_tensor(item).detach().cpu().contiguous()
        content = item.reshape(-1).view(torch.uint8).numpy()
        kind = str(item.dtype).removeprefix("torch.")
        return {"shape": list(item.shape), "dtype": kind, "sha256": hashlib.sha256(content).hexdigest()}

    return json.loads(json.dumps(value, default=described), parse_constant=str)


def _checked_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in ("", ".safetensors"):
        raise DataError(f"{path}: attributions are stored as .safetensors, not {path.suffix}")
    return path.with_suffix(".safetensors")


def _is_tensor(value, dimensions: int) -> bool:
    shaped = isinstance(value, Tensor) and value.ndim == dimensions and 0 not in value.shape
    return shaped and value.dtype in (torch.float32, torch.float64)


def _are_names(value, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(isinstance(item, str) for item in value)


def _is_time(text) -> bool:
    try:
        datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return False
    return True
