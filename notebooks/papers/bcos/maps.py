"""Paper `bcos`: the maps that its figures show, drawn with the networks of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
from cxrkit import metrics
from cxrkit.attribution.inherent import bcos_rgba
from cxrkit.data import Dataset
from cxrkit.errors import ParameterError
from cxrkit.study.report import view
from cxrkit.study.study import Study
from cxrkit.train.loop import fit
from cxrkit.train.parameters import TrainParameters
from cxrkit.train.setup import load_data, make_model
from papers.bcos.tables import network, regime

__all__ = [
    "Gallery",
    "coarse_grid",
    "coarse_grids",
    "colours",
    "comparison",
    "gallery",
    "healthy_and_ill",
    "per_label",
    "pools",
    "properties",
    "thresholds",
    "two_logits",
    "which_map",
]

_SEEN = 64  # test images among which the shown ones are looked for
_ORDER = ("B-cos", "B-cos + FLC", "B-cos + BlurPool")


class Gallery(NamedTuple):
    """Plainly trained networks of one view by their name, and the test images that they are looked at on."""

    networks: dict[str, nn.Module]
    data: Dataset


def gallery(study: Study, view_name: str) -> Gallery:
    """The networks of a grid that saw one view: plain regime, first fold and seed. Raises ParameterError for none."""
    found = {}
    for run in study.runs:
        if run.kind == "train" and view(run.parameters) == view_name and regime(run.parameters) == "plain":
            found.setdefault(network(run.parameters), run)
    if not found:
        raise ParameterError(f"grid {study.name!r} has no plainly trained network of the view {view_name!r}")
    test = load_data(next(iter(found.values())).parameters).split("test")
    networks = {title: run.network() for title, run in found.items()}
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
    wanted = [
        ("Baseline", "gradcam"),
        ("Baseline", "layercam"),
        *((title, "bcos") for title in _ORDER),
    ]
    return _panel(shown, row, column, [pair for pair in wanted if pair[0] in shown.networks])


def pools(shown: Gallery) -> dict:
    """One positive through the inherent maps of every way of down-sampling, ready for `figures.show_maps`."""
    row, column = _surest(shown)
    return _panel(
        shown,
        row,
        column,
        [(title, "bcos") for title in _ORDER if title in shown.networks],
    )


def _panel(shown: Gallery, row: int, column: int, wanted: list[tuple[str, str]]) -> dict:
    batch = shown.data.batch([row])
    label = shown.data.labels[column]
    maps = torch.cat([_map(shown, title, method, batch.images, [label]) for title, method in wanted])
    titles = [_title(title, method) for title, method in wanted]
    truth = None if batch.truth is None else batch.truth[0, column]
    caption = f"{label}; outlined: the box{'' if truth is None else ', dashed: the exact finding'}"
    region = {"mask": batch.masks[0, column], "truth": truth}
    return {
        "image": batch.images[0, 0],
        "maps": maps,
        "titles": titles,
        "caption": caption,
    } | region


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
    wanted = [
        ("Baseline", "gradcam"),
        ("B-cos", "bcos"),
        ("B-cos + BlurPool", "bcos"),
    ]
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
    return {
        "image": batch.images[0, 0],
        "colours": drawn,
        "truth": truth,
        "caption": f"{label}, {title}",
    }


def coarse_grid(maps: Tensor) -> Tensor:
    """Grid energy at periods from 8 pixels on, over that of an evenly filled spectrum: ``[..., H, W]`` -> ``[...]``.

    1: no grid. The periods of 2 and 4 pixels are left out: they come from the stem, which every variant keeps as it is.
    """
    return _beyond_stem(metrics.grid_energy, maps) / _beyond_stem(metrics.isotropic_grid_energy, maps)


def _beyond_stem(energy: Callable[..., Tensor], maps: Tensor) -> Tensor:
    # The bins of a period hold those of its divisors, so they are taken away, not left out of the list.
    return energy(maps) - energy(maps, strides=(2, 4))


def coarse_grids(shown: Gallery) -> pd.DataFrame:
    """:func:`coarse_grid` of the inherent maps of the first label, mean and 95 % interval over all images of a gallery
    (patients resampled): a row per way of down-sampling."""
    batch = shown.data.batch(range(len(shown.data)))
    rows = []
    for title in (name for name in _ORDER if name in shown.networks):
        maps = cxrkit.attribute(shown.networks[title], batch.images, "bcos", [shown.data.labels[0]])[:, 0].float()
        mean, low, high = metrics.bootstrap(coarse_grid(maps).numpy(), batch.patient_ids)
        rows.append(
            {
                "network": title,
                "coarse grid": mean,
                "low": low,
                "high": high,
                "images": len(batch),
            }
        )
    return pd.DataFrame(rows)


def properties(shown: Gallery, images: int = 8) -> pd.DataFrame:
    """What can be said of each kind of map without knowing the truth, measured on a few images.

    `sums to the logit`: largest relative gap between the map's sum and the logit less its constant; `signed`: share of
    values below 0; `cells`: side of the map's smallest independent part, pixels; `coarse grid`: energy at the strides'
    periods from 8 pixels on, over that of a smooth spectrum.
    """
    batch = shown.data.batch(range(min(images, len(shown.data))))
    size = batch.images.shape[-1]
    rows = []
    wanted = [
        ("Baseline", "gradcam"),
        ("Baseline", "layercam"),
        *((title, "bcos") for title in _ORDER),
    ]
    for title, method in (pair for pair in wanted if pair[0] in shown.networks):
        maps = cxrkit.attribute(shown.networks[title], batch.images, method)
        model = shown.networks[title]
        gap = float("nan")  # the CAM family promises no sum
        if method == "bcos":
            found = metrics.completeness_gap(model, batch.images, maps, promise="without_bias")
            gap = float(found.relative.nan_to_num().abs().amax())
        rows.append(
            {
                "map": _title(title, method),
                "sums to the logit": "not promised" if np.isnan(gap) else "yes" if gap < 1e-3 else "no",
                "gap": gap,
                "values below 0": float((maps < 0).float().mean()),
                "cells, pixels": 1 if method == "bcos" else size // max(size // 32, 1),
                "coarse grid": float(coarse_grid(maps).nanmean()) if method == "bcos" else np.nan,
            }
        )
    return pd.DataFrame(rows)


def two_logits(images: int = 400, epochs: int = 3, positives: int = 200, seed: int = 0) -> Gallery:
    """A small B-cos network with the classes Pneumonia and No pneumonia under cross-entropy, as the paper has them on
    RSNA, trained here on the phantom; and boxed positives of patients that it never saw."""
    options = {
        "view": "binary",
        "conspicuity": 2.0,
        "prevalence": {"Pneumonia": 0.35},
    }
    parameters = TrainParameters(
        dataset_options=options | {"images": images},
        healthy_class="No pneumonia",
        loss="cross_entropy",
        epochs=epochs,
        learning_rate=5e-4,
        seed=seed,
    )
    data = load_data(parameters)
    model = fit(make_model(parameters, data.labels), data, parameters).model.eval()
    # Another seed draws other patients; about a third of the images are positive.
    fresh = cxrkit.data.load(
        "phantom",
        size=parameters.size,
        images=3 * positives,
        seed=seed + 1,
        **options,
    )
    ill = fresh.table["image_id"].isin(fresh.boxes["image_id"]).to_numpy().nonzero()[0][:positives]
    return Gallery({"B-cos": model}, fresh.select(ill.tolist()))


def which_map(shown: Gallery, seed: int = 0) -> pd.DataFrame:
    """EPG of positives that a network found and missed: by the map of the finding, and by that of the higher logit.

    ``shown``: networks of two logits, and boxed positives of one finding. The published code takes the second map for
    B-cos networks on RSNA (see `metrics.explained_maps`). Rows: network and subset; difference: second less first,
    with its 95 % interval (patients resampled); images: how many.
    """
    batch = shown.data.batch(range(len(shown.data)))
    finding, masks, patients = (
        shown.data.labels[0],
        batch.masks[:, 0],
        np.array(batch.patient_ids),
    )
    rows = []
    for title, model in shown.networks.items():
        with torch.no_grad():
            logits = model(batch.images)
        maps = cxrkit.attribute(model, batch.images, "bcos").float()
        column = model.labels.index(finding)
        own, higher = (
            metrics.energy_pointing_game(metrics.explained_maps(maps, logits, target), masks)
            for target in (column, "predicted")
        )
        found = logits.argmax(1) == column
        for subset, chosen in (("found", found), ("missed", ~found)):
            scores = {
                "own map": own,
                "map of the higher": higher,
                "chance": metrics.chance_level(masks),
            }
            means = {name: float(value[chosen].nanmean()) for name, value in scores.items()}
            mean, low, high = metrics.bootstrap((higher - own)[chosen].numpy(), patients[chosen.numpy()], seed=seed)
            gap = {
                "difference": mean,
                "low": low,
                "high": high,
                "images": int(chosen.sum()),
            }
            rows.append({"network": title, "positives": subset} | means | gap)
    return pd.DataFrame(rows)


def thresholds(maps: Tensor, masks: Tensor, shares: Sequence[float] = (0.0, 0.1, 0.3, 0.5)) -> pd.DataFrame:
    """Mean precision and recall of maps ``[N, H, W]`` with boxes bool ``[N, H, W]``, a row per threshold, three ways.

    As the published code has it (share of the whole map's maximum; the recall's denominator is never cut); with the
    box's own maximum; and with the recall's denominator cut like its numerator.
    """
    inside = maps * masks
    whole_peak, box_peak = (values.clamp(min=0).amax((-2, -1), keepdim=True) for values in (maps, inside))
    rows = []
    for share in shares:
        row = {kind: metrics.energy_pointing_game(maps, masks, kind, share) for kind in ("precision", "recall")}
        of_box = inside.where(inside >= share * box_peak, 0.0).clamp(min=0)
        row["recall, box's maximum"] = of_box.sum((-2, -1)) / inside.abs().sum((-2, -1))
        left = inside.where(maps >= share * whole_peak, 0.0) if share else inside
        row["recall, cut below too"] = left.clamp(min=0).sum((-2, -1)) / left.abs().sum((-2, -1))
        rows.append({"threshold": share} | {name: float(value.nanmean()) for name, value in row.items()})
    return pd.DataFrame(rows)
