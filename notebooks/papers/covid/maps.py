"""Pictures of paper `covid` from what its measuring runs kept, ready for `figures.show_labels(**...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.study import report, runs
from cxrkit.study.study import Study
from papers.covid import measure as measuring
from papers.covid.tables import scored

__all__ = ["course", "failure", "gallery", "nested", "profiles"]

Scored = list[tuple[str, runs.Run, runs.Run]]


def gallery(study: Study, place: int = 0) -> dict[str, Any]:
    """One image, a row per network and a column per method, for the nested label at `place` (0: innermost, -1:
    outermost). Of integrated gradients the map with most steps."""
    found, image_id = _first(study), None
    networks = [(network, train, report.kept_of(run, "maps")) for network, train, run in found]
    methods = [method for method in _columns(networks[0][2]) if all(method in kept["methods"] for *_, kept in networks)]
    label, image_id = (
        str(networks[0][2]["labels"][place]),
        networks[0][2]["image_ids"][0],
    )
    image, truth = pictures(found[0][1], [image_id], label)
    rows, maps = [], []
    for network, _, kept in networks:
        of = list(kept["methods"])
        maps.append([measuring.shown_part(m, torch.from_numpy(kept["maps"][of.index(m), 0, place])) for m in methods])
        rows.append(f"{network}\np = {kept['probabilities'][0, place]:.2f}")
    return {
        "images": image.expand(len(rows), -1, -1),
        "maps": torch.stack([torch.stack(row) for row in maps]),
        "rows": rows,
        "columns": [_short(method) for method in methods],
        "truth": truth.expand(len(rows), -1, -1),
        "scale": "map",
        "caption": f"{label}: what each method shows",
    }


def failure(study: Study, suspect: str = "densenet") -> dict[str, Any]:
    """Occlusion maps of the image on which the suspected network falls furthest behind the others in the probability of
    the innermost label: a column per network. Without that network, or without others: the least sure image."""
    found = _first(study)
    kept = {network: report.kept_of(run, "maps") for network, _, run in found}
    sure = np.stack([one["probabilities"][:, 0] for one in kept.values()])
    own = [place for place, network in enumerate(kept) if suspect in network]
    others = [place for place in range(len(kept)) if place not in own]
    behind = sure[others].mean(0) - sure[own].mean(0) if own and others else -sure.mean(0)
    row = int(behind.argmax())
    first = next(iter(kept.values()))
    image, truth = pictures(found[0][1], [first["explained_ids"][row]], str(first["labels"][0]))
    missed = [network for network, p in zip(kept, sure[:, row], strict=True) if p <= measuring.CUTOFF]
    told = f"missed by {', '.join(missed)}" if missed else "missed by none"
    return {
        "images": image,
        "maps": np.stack([one["occlusion"][row, 0] for one in kept.values()])[None],
        "rows": [str(first["labels"][0])],
        "columns": [f"{network}: p = {p:.2f}" for network, p in zip(kept, sure[:, row], strict=True)],
        "truth": truth,
        "scale": "map",
        "caption": f"Occlusion on the image where the networks differ most; {told}",
    }


def course(study: Study) -> dict[str, Any]:
    """The images of one patient, a row each, with the occlusion map of every network."""
    found = _first(study)
    kept = [report.kept_of(run, "maps") for *_, run in found]
    table = found[0][2].frame("series")
    images, truth = pictures(found[0][1], kept[0]["series_ids"], str(kept[0]["labels"][0]))
    days = [f"day {day:g}" if np.isfinite(day) else f"image {n}" for n, day in enumerate(table["day"], start=1)]
    return {
        "images": images,
        "maps": np.stack([one["series"] for one in kept], axis=1),
        "rows": days,
        "columns": [network for network, *_ in found],
        "truth": truth,
        "scale": "map",
        "caption": f"One patient, {table['label'].iloc[0]}: occlusion",
    }


def nested(study: Study) -> dict[str, Any]:
    """Occlusion maps of one image for the nested labels: a row per network, a column per label."""
    found = _first(study)
    kept = [report.kept_of(run, "maps") for *_, run in found]
    labels = [str(label) for label in kept[0]["labels"]]
    image, truth = pictures(found[0][1], kept[0]["explained_ids"][:1], labels[0])
    return {
        "images": image.expand(len(kept), -1, -1),
        "maps": np.stack([one["occlusion"][0] for one in kept]),
        "rows": [network for network, *_ in found],
        "columns": labels,
        "truth": truth.expand(len(kept), -1, -1),
        "scale": "map",
        "caption": "Occlusion for labels that lie inside one another",
    }


def profiles(study: Study, network: str = "") -> dict[str, Any]:
    """Average images of the groups with the profiles of the image, of two early and of two deep feature maps."""
    found = {called: run for called, _, run in _first(study)}
    network = network if network in found else next(iter(found))
    kept = report.kept_of(found[network], "profiles")
    size = kept["average"].shape[-1]
    parts, columns = [kept["input"]], ["image"]
    for where in ("early", "deep"):
        layer = str(kept[f"{where}_layer"]).removeprefix("network.").removeprefix("features.").split(".")[0]
        parts += [_enlarged(one, size) for one in kept[where]]
        columns += [f"{layer}, {number}" for number in kept[f"{where}_maps"]]
    return {
        "images": kept["average"],
        "maps": np.stack(parts, axis=1),
        "rows": [str(group).replace(" without ", "\nwithout ") for group in kept["groups"]],
        "columns": columns,
        "scale": "map",
        "caption": f"{network}: average images, and how each group differs from the mean of the groups",
    }


def pictures(train: runs.Run, image_ids: Sequence[str], label: str) -> tuple[Tensor, Tensor]:
    """Test images [N, H, W] by name, and where the label is, bool [N, H, W]: the exact finding, or its boxes."""
    test = measuring.load_data(train.parameters).split("test")
    batch = test.batch([test.image_ids.index(str(name)) for name in image_ids])
    regions = batch.masks if batch.truth is None else batch.truth
    return batch.images[:, 0], regions[:, test.labels.index(label)]


def _first(study: Study) -> Scored:
    """The measured networks of the grid's first measured split and seed: they explain the same images."""
    found = scored(study)
    if not found:
        raise ParameterError(f"grid {study.name!r} measures no network of paper covid; `cxrkit grid run covid` does")
    place = [(train.parameters.fold, train.parameters.seed) for _, train, _ in found]
    return [one for one, here in zip(found, place, strict=True) if here == place[0]]


def _columns(kept: dict[str, np.ndarray]) -> list[str]:
    steps = [method for method in kept["methods"] if method.startswith("integrated_gradients")]
    return [str(method) for method in kept["methods"] if method not in steps[:-1]]


def _short(method: str) -> str:
    short = {
        "input_x_gradient": "input x grad.",
        "guided_backprop": "guided bp.",
        "deeplift_shap": "DL-SHAP",
    }
    if method.startswith("integrated_gradients"):
        return f"IG, {method.rpartition('_')[2]} steps"
    return short.get(method, {"deeplift": "DeepLIFT"}.get(method, method))


def _enlarged(maps: np.ndarray, size: int) -> np.ndarray:
    if size % maps.shape[-1] == 0:
        return report.enlarge(maps, size)
    rows = np.arange(size) * maps.shape[-1] // size
    return maps[..., rows[:, None], rows]
