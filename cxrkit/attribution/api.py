"""`attribute`: one call for every method, with its checks, labels and chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cxrkit.attribution import registry
from cxrkit.attribution.explained import Explained, has_encoding, prepared
from cxrkit.attribution.progress import progress_bar
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["attribute", "checked_images", "chunk_size", "device_of"]

# Images of 224 x 224 pixels per forward pass. More gain nothing on a CPU; 4 keep ResNet-50 below 2 GB.
_CPU_IMAGES, _GPU_IMAGES = 4, 16
_TOLERANCE = 1e-3  # as in the encoding: resizing may overshoot [0, 1] by a rounding error


def attribute(
    model: nn.Module,
    images: Tensor,
    method: str,
    labels=None,
    output: str | None = None,
    *,
    preset: str | None = None,
    chunk: int | None = None,
    progress: bool | Callable[[float], None] | None = None,
    **options,
) -> Tensor:
    """Maps of every label of every image: [B, L, H, W], raw (signed, unnormalised), at input resolution.

    `model`: any network from images [B, C, H, W] to logits [B, L]; with a `cxrkit.models.Classifier` images are
    grey [B, 1, H, W] in [0, 1]. `method`: a name of `cxrkit.attribution.methods()`, whose card lists its
    `options`. `labels`: names or indices (None: all). `output`: what is explained, "logit" (default) or
    "probability" (the sigmoid of the logit). `preset`: the settings of a paper's published code, by its key;
    options named beside it win. `chunk`: images per forward pass; None chooses by image size, and the maps don't
    depend on it. `progress`: a bar; None shows it for long work that somebody watches; a function is told the share
    that is done, and may raise to end the work. Maps are float32 on the images' device (float64 for float64
    images). The model is explained in evaluation mode with frozen weights,
    and is left as it was: training flags, `requires_grad`, `.grad`, hooks. Raises ParameterError for an unknown
    method, option, label or layer, and AttributionError for unfit images or where the method can't be right for
    this network.
    """
    entry = registry.entry(method)
    output, options = _settings(entry.card, preset, output, options)
    for option in options:
        if option not in entry.card.options:
            raise registry.unknown(f"option of {method}:", option, entry.card.options)
    if output not in ("logit", "probability"):
        raise registry.unknown("output", output, ("logit", "probability"))
    if output not in entry.card.outputs:
        raise ParameterError(f"{method} explains the logit only; output={output!r} is not defined for it")
    inputs = checked_images(model, images)
    device = device_of(model, images)
    inputs = inputs.to(device)
    explained = Explained(model, labels, output, chunk_size(inputs, chunk))
    with prepared(model, device), progress_bar(progress, f"{method}, {len(inputs)} images") as report:
        maps = _in_chunks(entry.function, explained, inputs, options, report, adaptable=chunk is None)
    maps = maps.to(torch.promote_types(images.dtype, torch.float32))
    return _finite(maps, method).to(images.device)


def _in_chunks(function, explained: Explained, inputs: Tensor, options: dict, report, adaptable: bool) -> Tensor:
    """Maps of all images, chunk by chunk; where the accelerator's memory doesn't hold a chunk, with half of it."""
    parts, start, count = [], 0, len(inputs)
    while start < count:
        rows = slice(start, start + explained.batch)
        here = len(inputs[rows])
        explained.first_row = start
        explained.report = lambda done, start=start, here=here: report((start + done * here) / count)
        try:
            parts.append(function(explained, inputs[rows], **_rows_of(options, rows, count)).detach())
        except torch.OutOfMemoryError:
            if not adaptable or explained.batch == 1:
                raise
            explained.batch //= 2
        else:
            start += here
    return torch.cat(parts)


def _settings(card: registry.Card, preset: str | None, output: str | None, options: dict) -> tuple[str, dict]:
    """Output and options, with those of the preset where the caller names none."""
    chosen = {}
    if preset is not None:
        if preset not in card.presets:
            raise registry.unknown(f"preset of {card.name}:", preset, card.presets)
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
    images = images.detach()
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise AttributionError(f"image {int((~finite).nonzero()[0])} holds NaN or infinite values")
    if has_encoding(model):
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


def _finite(maps: Tensor, method: str) -> Tensor:
    bad = (~maps.isfinite().flatten(2).all(2)).nonzero()
    if len(bad):
        image, label = bad[0].tolist()
        raise AttributionError(
            f"{method} gave NaN or infinite values for image {image}, label {label} of those asked for; "
            "are the network's weights finite?"
        )
    return maps
