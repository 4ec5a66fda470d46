"""`attribute`: one call for every method, with its checks, labels and chunks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cxrkit.attribution import registry
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.progress import progress_bar
from cxrkit.attribution.target import Explained, has_encoding, unwrapped
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["Refusal", "attribute", "attributed", "checked_images", "chunk_size", "device_of", "explaining"]
__all__ += ["method_settings"]

# Images of 224 x 224 pixels per forward pass. More gain nothing on a CPU; 4 keep ResNet-50 below 2 GB.
_CPU_IMAGES, _GPU_IMAGES = 4, 16
_TOLERANCE = 1e-3  # as in the encoding: resizing may overshoot [0, 1] by a rounding error


class Refusal(NamedTuple):
    """A map that the method refused: place of the image and of the label among those asked for, and why."""

    image: int
    label: int
    reason: str


def attribute(
    model: nn.Module,
    images: Tensor,
    method: str,
    labels=None,
    output: str | None = None,
    *,
    preset: str | None = None,
    chunk: int | None = None,
    on_error: str = "raise",
    progress: bool | Callable[[float], None] | None = None,
    **options,
) -> Tensor:
    """Maps of every label of every image: [B, L, H, W], raw (signed, unnormalised), at input resolution.

    `model`: any network from images [B, C, H, W] to logits [B, L]; with a `cxrkit.models.Classifier` images are
    grey [B, 1, H, W] in [0, 1]. `method`: a name of `cxrkit.attribution.methods()`, whose card lists its
    `options`. `labels`: names or indices (None: all). `output`: what is explained, "logit" (default) or
    "probability" (the sigmoid of the logit). `preset`: the settings of a paper's published code, by its key;
    options named beside it win. `chunk`: images per forward pass; None chooses by image size, and the maps don't
    depend on it. `on_error`: "raise", or "nan" for maps of NaN where the method refuses single images or labels,
    with a warning that gives the reasons; what is refused everywhere still raises. `progress`: a bar; None shows it
    for long work that somebody watches; a function is told the share that is done, and may raise to end the work.
    Maps are float32 on the images' device (float64 for float64 images); networks of half precision are explained in
    float32. The model is explained in evaluation mode with frozen weights, and is left bit for bit as it was, as is
    torch's global state. Raises ParameterError for an unknown method, option, label or layer, and AttributionError
    for unfit images, for networks that aren't a function of one image, or where the method can't be right for this
    network.
    """
    facts = {"preset": preset, "chunk": chunk, "on_error": on_error, "progress": progress}
    maps, refusals, _ = attributed(model, images, method, labels, output, **facts, **options)
    if refusals:
        told = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals[:3]))
        warnings.warn(f"{method}: {len(refusals)} maps are NaN, for instance: {told}", stacklevel=2)
    return maps


def attributed(
    model, images, method, labels, output, *, preset=None, chunk=None, on_error="raise", progress=None, **options
) -> tuple[Tensor, list[Refusal], Explained]:
    """The maps of `attribute`, those that were refused, and the network as the method saw it; arguments as there."""
    entry = registry.entry(method)
    output, options = method_settings(entry.card, preset, output, options)
    for option in options:
        registry.check_choice(f"option of {method}:", option, entry.card.options)
    registry.check_choice("output", output, ("logit", "probability"))
    registry.check_choice("on_error", on_error, ("raise", "nan"))
    if output not in entry.card.outputs:
        raise ParameterError(f"{method} explains the logit only; output={output!r} is not defined for it")
    runs = options.get("attribution") is None  # of xrai: with one the network isn't run
    with (
        explaining(model, images, labels, output, chunk, runs) as (explained, inputs),
        progress_bar(progress, f"{method}, {len(inputs)} images") as report,
    ):
        run = _Run(entry, explained, inputs, options, report, adaptable=chunk is None)
        maps, refusals = run.maps(), []
        if run.failure is not None and on_error == "raise":
            raise run.failure
        if run.failure is not None:
            maps, refusals = run.one_by_one()
    return maps.to(images.device, torch.promote_types(images.dtype, torch.float32)), refusals, explained


@contextmanager
def explaining(
    model: nn.Module, images: Tensor, labels=None, output: str = "logit", chunk: int | None = None, runs: bool = True
) -> Iterator[tuple[Explained, Tensor]]:
    """The network in the state in which it is explained, and the images on its device in its precision."""
    inputs = checked_images(model, images)
    inputs = inputs.to(device_of(model, images))
    explained = Explained(model, labels, output, chunk_size(inputs, chunk))
    with prepared(explained, inputs) if runs else nullcontext():
        inputs = inputs.to(explained.dtype or inputs.dtype)
        yield explained, inputs.clone() if inputs.is_inference() else inputs  # which autograd can't follow


class _Run:
    """A method at work on all images, chunk by chunk."""

    def __init__(self, entry: registry.Entry, explained: Explained, inputs: Tensor, options: dict, report, adaptable):
        self.entry, self.explained, self.inputs, self.options = entry, explained, inputs, options
        self.report, self.adaptable = report, adaptable
        self.failure: AttributionError | None = None

    def maps(self) -> Tensor | None:
        """Maps of all images; where the accelerator's memory doesn't hold a chunk, with half of it."""
        parts, start, count = [], 0, len(self.inputs)
        while start < count:
            rows = slice(start, min(start + self.explained.batch, count))
            try:
                parts.append(self._chunk(self.explained, rows))
            except torch.OutOfMemoryError:
                if not self.adaptable or self.explained.batch == 1:
                    raise
                self.explained.batch //= 2
            except AttributionError as error:
                self.failure = error
                return None
            else:
                start = rows.stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def one_by_one(self) -> tuple[Tensor, list[Refusal]]:
        """Maps of each image and label by itself, NaN where it is refused; raises where all are."""
        with torch.no_grad():
            outputs = self.explained.logits(self.inputs[:1]).shape[1]
        chosen, refusals, maps = self.explained.indices(outputs), [], []
        for row in range(len(self.inputs)):
            whole = slice(row, row + 1)
            try:
                maps.append(self._chunk(self.explained, whole))
                continue
            except AttributionError:
                maps.append(self.inputs.new_full((1, len(chosen), *self.inputs.shape[-2:]), math.nan))
            for place, label in enumerate(chosen):
                one = copy.copy(self.explained)
                one.labels = [label]
                try:
                    maps[-1][:, place] = self._chunk(one, whole)[:, 0]
                except AttributionError as error:
                    refusals.append(Refusal(row, place, str(error)))
        if len(refusals) == len(chosen) * len(maps):
            raise self.failure
        return torch.cat(maps), refusals

    def _chunk(self, explained: Explained, rows: slice) -> Tensor:
        count, part = len(self.inputs), self.inputs[rows]
        explained.first_row = rows.start
        explained.report = lambda done: self.report((rows.start + done * len(part)) / count)
        maps = self.entry.function(explained, part, **_rows_of(self.options, rows, count)).detach()
        return _finite(maps, self.entry.card.name, rows.start)


def method_settings(card: registry.Card, preset: str | None, output: str | None, options: dict) -> tuple[str, dict]:
    """Output and options, with those of the preset where the caller names none."""
    chosen = {}
    if preset is not None:
        registry.check_choice(f"preset of {card.name}:", preset, card.presets)
        chosen = dict(card.presets[preset])
    from_preset = chosen.pop("output", "logit")
    return (from_preset if output is None else output), {**chosen, **options}


def checked_images(model: nn.Module, images: Tensor) -> Tensor:
    """The images, cut off from any graph; AttributionError names what is wrong with them."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise AttributionError(f"images must be a tensor [B, C, H, W] with at least one image; got {got}")
    if not images.is_floating_point():
        raise AttributionError(f"images must be floating point (scale 8-bit images to [0, 1]); got {images.dtype}")
    if images.layout != torch.strided or images.is_quantized:
        raise AttributionError("images must be a dense tensor; call to_dense() or dequantize() first")
    images = images.detach()
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise AttributionError(f"image {int((~finite).nonzero()[0])} holds NaN or infinite values")
    if has_encoding(unwrapped(model)):
        if images.shape[1] != 1:
            raise AttributionError(f"images must be grey, [B, 1, H, W]; got {list(images.shape)}")
        outside = ((images < -_TOLERANCE) | (images > 1 + _TOLERANCE)).flatten(1).any(1)
        if outside.any():
            raise AttributionError(f"image {int(outside.nonzero()[0])} has values outside [0, 1]")
    return images


def chunk_size(images: Tensor, chunk: int | None) -> int:
    """Images per forward pass: `chunk`, or as many as hold 4 (CPU) or 16 images of 224 x 224 pixels, at least one."""
    if chunk is None:
        most = _CPU_IMAGES if images.device.type == "cpu" else _GPU_IMAGES
        return max(1, min(most, most * 224 * 224 // (images.shape[-2] * images.shape[-1])))
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ParameterError(f"chunk must be a whole number of images, at least 1; got {chunk!r}")
    return chunk


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Where the model computes: the device of its weights, or that of the images if it has none."""
    held = next(model.parameters(), None)
    return (held if held is not None else next(model.buffers(), images)).device


def _rows_of(options: dict, rows: slice, count: int) -> dict:
    """Options with the tensors that have one row per image cut to the chunk's rows."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim == 4 and len(value) == count else value
        for name, value in options.items()
    }


def _finite(maps: Tensor, method: str, first: int) -> Tensor:
    if maps.sum().isfinite():  # which takes a tenth of the time
        return maps
    bad = (~maps.isfinite().flatten(2).all(2)).nonzero()
    if len(bad):
        image, label = bad[0].tolist()
        raise AttributionError(
            f"{method} gave NaN or infinite values for image {first + image}, label {label} of those asked for; "
            "are the network's weights finite?"
        )
    return maps
