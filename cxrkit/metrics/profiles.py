"""What a layer answers to in a group of images: neuron activation profiles, and feature maps that answer to nothing.

Images pass through the network batch by batch and only sums are kept, so memory doesn't grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cxrkit.attribution.api import checked_images, chunk_size, device_of
from cxrkit.attribution.layers import checked_map, explained_layer, find_layer, recorded
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.target import Explained, unwrapped
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.metrics.inputs import dense, entries, flag, one_of, real

__all__ = ["inactive_feature_maps", "neuron_activation_profiles", "rank_feature_maps"]

IMAGES = "input"  # names the images themselves, unless a layer of the network is called so
RANGE = 1e-30  # paper `covid`: a map with no larger spatial range is inactive in that image


def neuron_activation_profiles(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    groups: Mapping[str, Sequence[bool] | Tensor],
    layers: Sequence[str | nn.Module],
    *,
    remove_inactive: bool = False,
    chunk: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """How a layer's feature maps in one group of images differ from those of all groups: {layer: {group: [C, h, w]}}.

    With F_i the feature maps of image i and g a group,

        avg_g = mean_{i in g} F_i,     NAP_g = avg_g - (1 / |groups|) sum_g' avg_g',

    so every group weighs the same however many images it has, and the profiles of a layer sum to 0. Values are signed,
    in units of the activation, without bounds; 0: the group is like the mean of the groups. Neither higher nor lower is
    better: a profile describes. Which groups there are changes every profile.

    ``images``: ``[N, 1, H, W]`` or an iterable of such batches, all of one size; ``groups``: a bool ``[N]`` per name,
    which may overlap and need not cover all images; ``layers``: dotted names or modules, "input" for the images.
    ``remove_inactive``: maps that :func:`inactive_feature_maps` counts over these images become nan, so that the others
    keep their numbers. ``chunk``: images per forward pass. Sums are float64, profiles float32 (float64 for float64
    images), on the images' device. The model runs in evaluation mode and is left as it was.

    Raises ParameterError for fewer than two groups, an empty group, groups of another length, and an unknown layer;
    AttributionError for unfit images, and for a layer without maps [B, C, h, w] or with values that are not finite.
    Source: paper `covid`, NAP, from its published code (its text subtracts the mean over images).
    """
    membership, remove_inactive = _membership(groups), flag("remove_inactive", remove_inactive)
    member = torch.stack(list(membership.values()))
    count = member.shape[1]
    if isinstance(images, Tensor) and dense("images", images).ndim and len(images) != count:
        raise ParameterError(f"groups are over {count} images; there are {len(images)}")
    sums, active, seen = {}, {}, 0
    for seen, layer, maps, batch in _layer_maps(model, images, layers, chunk):
        like = batch.new_empty(0, dtype=torch.promote_types(batch.dtype, torch.float32))
        chosen = member[:, seen - len(maps) : seen].to(maps.device)
        if seen > count:
            raise ParameterError(f"groups are over {count} images; there are more")
        part = torch.einsum("gb,bchw->gchw", chosen.double(), maps.double())
        sums[layer] = sums.get(layer, 0) + part
        active[layer] = active.get(layer, False) | _varies(maps)
    if seen != count:
        raise ParameterError(f"groups are over {count} images; there are {seen}")
    profiles = {}
    for layer, total in sums.items():
        average = total / member.sum(1).to(total)[:, None, None, None]
        difference = average - average.mean(0)
        if remove_inactive:
            difference[:, ~active[layer]] = torch.nan
        profiles[layer] = dict(zip(membership, difference.to(like), strict=True))
    return profiles


def rank_feature_maps(profiles: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Feature maps by the strength of their profiles: rows (layer, map, strength), the strongest of each layer first.

    ``profiles`` as :func:`neuron_activation_profiles` returns them. Strength is the mean of |NAP| over groups and
    positions, at least 0, in units of the activation (so it doesn't compare across layers); equal strengths go by
    number, removed maps (nan) are left out. Raises ParameterError for groups whose profiles differ in shape. Source:
    paper `covid`, its published code, which shows the first ten.
    """
    rows = []
    if not isinstance(profiles, Mapping) or not all(isinstance(groups, Mapping) for groups in profiles.values()):
        raise ParameterError(
            f"profiles must be a mapping {{layer: {{group: [C, h, w]}}}}; got {type(profiles).__name__}"
        )
    for layer, groups in profiles.items():
        of_groups = [real(f"profile of {layer}", profile) for profile in groups.values()]
        if len({profile.shape for profile in of_groups}) != 1 or of_groups[0].ndim != 3:
            raise ParameterError(f"layer {layer!r} needs a profile [C, h, w] of one shape for each group")
        strength = torch.stack(of_groups).double().abs().mean((0, 2, 3))
        for number in strength.nan_to_num(-1).argsort(descending=True, stable=True).tolist():
            rows.append({"layer": layer, "map": number, "strength": strength[number].item()})
    frame = pd.DataFrame(rows, columns=["layer", "map", "strength"])
    return frame.dropna().reset_index(drop=True)


def inactive_feature_maps(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    layers: Sequence[str | nn.Module],
    *,
    definition: str = "constant",
    chunk: int | None = None,
) -> pd.DataFrame:
    """Feature maps that answer to none of the images: rows (layer, maps, inactive, percent), percent in [0, 100].

    ``definition``: "constant" (the paper's): max - min over space is at most 1e-30 in every image, though the constant
    may be other than 0 and differ between images; "zero": 0 everywhere in every image, which is stricter.
    ``images``, ``layers`` and ``chunk`` as in :func:`neuron_activation_profiles`. Neither direction is better; more
    and more varied images can only lower the number, so compare networks on the same images. A layer's place decides
    too: before its ReLU hardly any map is constant.

    Raises ParameterError for another definition and an unknown layer; AttributionError for unfit images, a layer
    without maps [B, C, h, w] or with values that are not finite, and, by the first definition, for maps of one pixel,
    which are always constant. Source: paper `covid`, dead feature maps, threshold from its published code.
    """
    one_of("definition", definition, ("constant", "zero"))
    active: dict[str, Tensor] = {}
    for _, layer, maps, _ in _layer_maps(model, images, layers, chunk):
        if definition == "constant" and maps.shape[-2:].numel() == 1:
            raise AttributionError(f"layer {layer} puts out maps of one pixel, which can't vary; use definition 'zero'")
        now = _varies(maps) if definition == "constant" else (maps != 0).any((0, 2, 3))
        active[layer] = active.get(layer, False) | now
    rows = [(layer, alive.numel(), int((~alive).sum())) for layer, alive in active.items()]
    frame = pd.DataFrame(rows, columns=["layer", "maps", "inactive"])
    return frame.assign(percent=100 * frame["inactive"] / frame["maps"])


def _varies(maps: Tensor) -> Tensor:
    """Channels [C] of maps [B, C, h, w] that vary over space in at least one image."""
    return ((maps.amax((2, 3)) - maps.amin((2, 3))) > RANGE).any(0)


def _layer_maps(
    model: nn.Module, images: Tensor | Iterable[Tensor], layers: Sequence[str | nn.Module], chunk: int | None
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Images seen, layer, its maps [b, C, h, w] of the last b of them, and their batch; for every chunk and layer."""
    model = unwrapped(model)
    layers = [layers] if isinstance(layers, (str, nn.Module)) else entries("layers", layers)
    if not layers:
        raise ParameterError("layers is empty; name at least one layer")
    if odd := [layer for layer in layers if not isinstance(layer, (str, nn.Module))]:
        raise ParameterError(f"layers hold {odd[0]!r}; give dotted names or modules")
    found = [None if layer == IMAGES and not _has(model, IMAGES) else find_layer(model, layer) for layer in layers]
    named = list(dict.fromkeys(found))  # a layer named twice counts once
    shapes: dict[str, torch.Size] = {}
    explained = Explained(model)
    seen = 0
    for batch in _batches(images):
        batch = checked_images(model, batch)
        inputs = batch.to(device_of(model, batch))
        for part in inputs.split(chunk_size(inputs, chunk)):
            with prepared(explained, part), torch.no_grad():
                of_layers = _maps(explained, part, named)
            seen += len(part)
            for layer, maps in of_layers:
                _check(maps, layer, shapes, seen - len(part))
                yield seen, layer, maps, batch
    if not seen:
        raise ParameterError("images holds no batch; give at least one image")


def _batches(images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    if isinstance(images, (str, bytes, np.ndarray)) or not isinstance(images, Iterable):
        raise ParameterError(f"images must be a tensor [N, 1, H, W] or batches of them; got {type(images).__name__}")
    for batch in [images] if isinstance(images, Tensor) else images:
        yield dense("images", batch) if isinstance(batch, Tensor) else batch


def _maps(
    explained: Explained, images: Tensor, named: Sequence[tuple[str, nn.Module] | None]
) -> list[tuple[str, Tensor]]:
    """Maps [b, C, h, w] of the layers, in their order, from one forward pass."""
    layers = [layer and explained_layer(explained, images[:1], layer[0]) for layer in named]
    with recorded([layer for layer in layers if layer]) as seen:
        explained.logits(images)
    return [
        (layer.name, checked_map(layer.name, seen.get(layer.name), images).detach()) if layer else (IMAGES, images)
        for layer in layers
    ]


def _check(maps: Tensor, layer: str, shapes: dict[str, torch.Size], first: int) -> None:
    if (shape := shapes.setdefault(layer, maps.shape[1:])) != maps.shape[1:]:
        sizes = f"{list(shape)} and then {list(maps.shape[1:])}"
        raise ParameterError(f"images must be of one size: layer {layer} puts out maps {sizes}")
    bad = (~maps.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise AttributionError(f"layer {layer} has NaN or infinite values for image {first + int(bad[0])}")


def _has(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules())


def _membership(groups: Mapping[str, Sequence[bool] | Tensor]) -> dict[str, Tensor]:
    """Bool tensors [N] by group, all of one length and none of them empty."""
    if not isinstance(groups, Mapping) or len(groups) < 2:
        raise ParameterError(f"groups: {groups!r} given; a profile compares at least two groups, {{name: bool [N]}}")
    membership = {}
    for name, chosen in groups.items():
        member = dense(f"group {name!r}", chosen).cpu()
        if member.dtype != torch.bool or member.ndim != 1:
            got = f"{member.dtype} {list(member.shape)}"
            raise ParameterError(f"group {name!r} must be bool [N], one value per image; got {got}")
        if not member.any():
            raise ParameterError(f"group {name!r} is empty; leave it out, or add images that belong to it")
        membership[name] = member
    lengths = {name: len(member) for name, member in membership.items()}
    if len(set(lengths.values())) > 1:
        raise ParameterError(f"groups differ in length: {', '.join(f'{n!r} {k}' for n, k in lengths.items())}")
    return membership
