"""Paper `bcos`: the maps that its figures show, drawn with the networks of a grid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.models
from cxrkit import metrics
from cxrkit.attribution.inherent import bcos_rgba
from cxrkit.data import Batch, Dataset
from cxrkit.errors import ParameterError
from cxrkit.study.papers.bcos import network, regime
from cxrkit.study.report import runs_of, view
from cxrkit.study.training import load_data

__all__ = [
    "Gallery",
    "colours",
    "comparison",
    "gallery",
    "healthy_and_ill",
    "per_label",
    "pools",
    "properties",
    "which_map",
]

_SEEN = 64  # test images among which the shown ones are looked for
_ORDER = ("B-cos", "B-cos + FLC", "B-cos + BlurPool")


class Gallery(NamedTuple):
    """Plainly trained networks of one view by their name, and the test images that they are looked at on."""

    networks: dict[str, nn.Module]
    data: Dataset


def gallery(name: str, view_name: str) -> Gallery:
    """The networks of a grid that saw one view: plain regime, first fold and seed. Raises ParameterError for none."""
    found = {}
    for run in runs_of(name):
        if run.kind == "train" and view(run.parameters) == view_name and regime(run.parameters) == "plain":
            found.setdefault(network(run.parameters), run)
    if not found:
        raise ParameterError(f"grid {name!r} has no plainly trained network of the view {view_name!r}")
    test = load_data(next(iter(found.values())).parameters).split("test")
    networks = {title: cxrkit.models.load(run.folder / "model.safetensors").eval() for title, run in found.items()}
    return Gallery(networks, test.select(range(min(len(test), _SEEN))).cached())


def _probabilities(shown: Gallery) -> Tensor:
    """Lowest probability of any of the networks, [N, L]: high where all are sure."""
    images = shown.data.batch(range(len(shown.data))).images
    with torch.no_grad():
        return torch.stack([model(images).sigmoid() for model in shown.networks.values()]).amin(0)


def _map(shown: Gallery, title: str, method: str, image: Tensor, labels: list[str]) -> Tensor:
    """Maps [L, H, W] of one image."""
    return cxrkit.attribute(shown.networks[title], image, method, labels)[0].float()


def _surest(shown: Gallery, ill: bool = True) -> tuple[int, int]:
    """Row and column of the boxed positive that all networks are surest of; or the healthy image they are."""
    batch, sure = shown.data.batch(range(len(shown.data))), _probabilities(shown)
    if ill:
        fitting = (batch.targets == 1) & batch.masks.flatten(2).any(2)
        return divmod(int(sure.where(fitting, -1.0).argmax()), sure.shape[1])
    none = (batch.targets == 0).all(1)
    return int((-sure.amax(1)).where(none, -2.0).argmax()), 0


def comparison(shown: Gallery) -> dict:
    """One positive through every method and network of the paper's first figure, ready for `figures.show_maps`."""
    row, column = _surest(shown)
    wanted = [("Baseline", "gradcam"), ("Baseline", "layercam"), *((title, "bcos") for title in _ORDER)]
    return _panel(shown, row, column, [pair for pair in wanted if pair[0] in shown.networks])


def pools(shown: Gallery) -> dict:
    """One positive through the inherent maps of every way of down-sampling, ready for `figures.show_maps`."""
    row, column = _surest(shown)
    return _panel(shown, row, column, [(title, "bcos") for title in _ORDER if title in shown.networks])


def _panel(shown: Gallery, row: int, column: int, wanted: list[tuple[str, str]]) -> dict:
    batch = shown.data.batch([row])
    label = shown.data.labels[column]
    maps = torch.cat([_map(shown, title, method, batch.images, [label]) for title, method in wanted])
    titles = [_title(title, method) for title, method in wanted]
    truth = None if batch.truth is None else batch.truth[0, column]
    caption = f"{label}; outlined: the box{'' if truth is None else ', dashed: the exact finding'}"
    region = {"mask": batch.masks[0, column], "truth": truth}
    return {"image": batch.images[0, 0], "maps": maps, "titles": titles, "caption": caption} | region


def _title(title: str, method: str) -> str:
    names = {"gradcam": "Grad-CAM", "layercam": "LayerCAM"}
    return title if method == "bcos" else f"{title}, {names[method]}"


def per_label(shown: Gallery, titles: list[str], most: int = 4) -> dict:
    """The inherent maps of every label that one image has (at most `most`), a row each, for `figures.show_labels`."""
    batch = shown.data.batch(range(len(shown.data)))
    boxed = (batch.targets == 1) & batch.masks.flatten(2).any(2)
    sure = _probabilities(shown).where(boxed, 0.0)
    row = int((sure.topk(min(most, sure.shape[1]), dim=1).values.sum(1) + boxed.sum(1).clamp(max=most)).argmax())
    columns = sorted(sure[row].argsort(descending=True)[: min(most, int(boxed[row].sum()))].tolist())
    labels = [shown.data.labels[column] for column in columns]
    there = [title for title in titles if title in shown.networks] or list(shown.networks)[:1]
    methods = ["bcos" if title in _ORDER else "layercam" for title in there]
    image = batch.images[row : row + 1]
    maps = [_map(shown, title, method, image, labels) for title, method in zip(there, methods, strict=True)]
    return {
        "images": image[0].expand(len(labels), -1, -1),
        "maps": torch.stack(maps, dim=1),
        "rows": labels,
        "columns": [_title(*pair) for pair in zip(there, methods, strict=True)],
        "masks": batch.masks[row, columns],
        "scale": "map",
        "caption": "one image, every label that it has",
    }


def healthy_and_ill(shown: Gallery) -> dict:
    """A positive and an image without finding, Grad-CAM beside the inherent map, for `figures.show_labels`."""
    ill, column = _surest(shown)
    rows = [ill, _surest(shown, ill=False)[0]]
    batch, label = shown.data.batch(rows), shown.data.labels[column]
    wanted = [("Baseline", "gradcam"), ("B-cos", "bcos"), ("B-cos + BlurPool", "bcos")]
    wanted = [pair for pair in wanted if pair[0] in shown.networks]
    maps = [
        torch.cat([_map(shown, title, method, image[None], [label]) for title, method in wanted])
        for image in batch.images
    ]
    return {
        "images": batch.images[:, 0],
        "maps": torch.stack(maps),
        "rows": [label, "no finding"],
        "columns": [_title(*pair) for pair in wanted],
        "masks": batch.masks[:, column],
        "scale": "map",
        "caption": f"the map of {label.lower()}, where it is and where it isn't",
    }


def colours(shown: Gallery) -> dict:
    """The inherent map of one positive in colour, enlarged, for `figures.show_colours`; of BlurPool if it is there."""
    row, column = _surest(shown)
    title = next((name for name in reversed(_ORDER) if name in shown.networks), "")
    if not title:
        raise ParameterError(f"none of {list(shown.networks)} is a B-cos network")
    batch, label = shown.data.batch([row]), shown.data.labels[column]
    drawn = bcos_rgba(shown.networks[title], batch.images, [label])[0, 0]
    truth = None if batch.truth is None else batch.truth[0, column]
    return {"image": batch.images[0, 0], "colours": drawn, "truth": truth, "caption": f"{label}, {title}"}


def properties(shown: Gallery, images: int = 8) -> pd.DataFrame:
    """What can be said of each kind of map without knowing the truth, measured on a few images.

    `sums to the logit`: largest relative gap between the map's sum and the logit less its constant; `signed`: share of
    values below 0; `cells`: side of the map's smallest independent part, pixels; `coarse grid`: energy at the strides'
    periods from 8 pixels on, over that of a smooth spectrum.
    """
    batch = shown.data.batch(range(min(images, len(shown.data))))
    size = batch.images.shape[-1]
    rows = []
    wanted = [("Baseline", "gradcam"), ("Baseline", "layercam"), *((title, "bcos") for title in _ORDER)]
    for title, method in (pair for pair in wanted if pair[0] in shown.networks):
        maps = cxrkit.attribute(shown.networks[title], batch.images, method)
        model = shown.networks[title]
        gap = float("nan")  # the CAM family promises no sum
        if method == "bcos":
            found = metrics.completeness_gap(model, batch.images, maps, promise="without_bias")
            gap = float(found.relative.nan_to_num().abs().amax())
        coarse = metrics.grid_energy(maps) - metrics.grid_energy(maps, strides=(2, 4))
        smooth = metrics.isotropic_grid_energy(maps) - metrics.isotropic_grid_energy(maps, strides=(2, 4))
        rows.append(
            {
                "map": _title(title, method),
                "sums to the logit": "not promised" if np.isnan(gap) else "yes" if gap < 1e-3 else "no",
                "gap": gap,
                "values below 0": float((maps < 0).float().mean()),
                "cells, pixels": 1 if method == "bcos" else size // max(size // 32, 1),
                "coarse grid": float(np.nanmean((coarse / smooth).numpy())) if method == "bcos" else np.nan,
            }
        )
    return pd.DataFrame(rows)


def which_map(shown: Gallery) -> pd.DataFrame:
    """EPG of positives that a network found and missed: by the finding's own map, and by that of the highest logit.

    The published code takes the second for B-cos networks on RSNA (see `metrics.explained_maps`). Rows: network
    and subset; `maps`: how many, of boxed positives of every label.
    """
    batch = shown.data.batch(range(len(shown.data)))
    boxed = (batch.targets == 1) & batch.masks.flatten(2).any(2)
    rows = []
    for title in (name for name in _ORDER if name in shown.networks):
        model = shown.networks[title]
        with torch.no_grad():
            logits = model(batch.images)
        maps = _maps_of(model, batch, boxed | torch.nn.functional.one_hot(logits.argmax(1), boxed.shape[1]).bool())
        highest = metrics.explained_maps(maps, logits, "predicted")[:, None].expand_as(maps)
        own, other = (metrics.energy_pointing_game(one, batch.masks) for one in (maps, highest))
        chance = metrics.chance_level(batch.masks)
        for subset, chosen in (("found", boxed & (logits > 0)), ("missed", boxed & (logits <= 0))):
            scores = {"own map": own, "map of the highest": other, "chance": chance}
            means = {name: float(value[chosen].nanmean()) for name, value in scores.items()}
            rows.append({"network": title, "positives": subset, **means, "maps": int(chosen.sum())})
    return pd.DataFrame(rows)


def _maps_of(model: nn.Module, batch: Batch, wanted: Tensor) -> Tensor:
    """Maps of the wanted labels of each image, wanted bool [N, L]; zeros for the others, which cost nothing."""
    maps = torch.zeros_like(batch.masks, dtype=torch.float32)
    for column, label in enumerate(model.labels):
        if (rows := wanted[:, column].nonzero()[:, 0]).numel():
            maps[rows, column] = cxrkit.attribute(model, batch.images[rows], "bcos", [label])[:, 0].float()
    return maps
