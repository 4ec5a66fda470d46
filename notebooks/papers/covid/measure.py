"""What paper `covid` looks at in a trained network: votes at 0.51, seven local methods, nested labels, and, on
the phantom, how much dark bands alone move the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.attribution
import cxrkit.data
import cxrkit.metrics
from cxrkit.attribution.api import device_of
from cxrkit.data.geometry import union_masks
from cxrkit.errors import ParameterError
from cxrkit.study import runs
from cxrkit.train.devices import chosen_device
from cxrkit.train.loader import target_table
from cxrkit.train.setup import load_data

__all__ = [
    "CUTOFF",
    "SHOWN",
    "Explained",
    "Subject",
    "all_images",
    "banded",
    "bands",
    "chain_of",
    "classification",
    "explain",
    "kept",
    "nested",
    "occlusion_size",
    "scores",
    "series",
    "shown_part",
    "subject",
]

CUTOFF = 0.51  # of the published code
PAPER_SIZE, PAPER_WINDOW, PAPER_STRIDE = 512, 50, 4
# Which part of a map the paper shows.
SHOWN = {
    "occlusion": "positive",
    "saliency": "absolute",
    "input_x_gradient": "positive",
    "guided_backprop": "positive",
    "integrated_gradients": "positive",
    "deeplift": "all",
    "deeplift_shap": "all",
}
_COMPLETE = (
    "integrated_gradients",
    "deeplift",
)  # their maps should sum to f(x) - f(black)
_CHUNK = 32


@dataclass
class Subject:
    """A training run, its network, the test images of its split, the nested labels (innermost first), which test
    images are explained, and which make the series of one patient."""

    run: runs.Run
    model: nn.Module
    test: cxrkit.data.Dataset
    chain: tuple[str, ...]
    rows: list[int]
    series: list[int]


@dataclass
class Explained:
    """Maps by method, ``[N, L, H, W]`` for the labels of the chain, of images ``[N, 1, H, W]``, and what is known of
    them: probabilities ``[N, L]``, regions and black bands (bool)."""

    images: Tensor
    image_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: Tensor
    maps: dict[str, Tensor]
    regions: Tensor
    region: str
    black: Tensor


def subject(parameters) -> Subject:
    """What the parameters of `measure.ipynb` name: a run, and of its test images the first `images` positives of
    the innermost label, each of another patient. The choice depends on the data alone, so that networks of one split
    explain the same images. Raises ParameterError for a run that trained nothing and for a split without positives.
    """
    run = runs.find(parameters.run, parameters.results)
    if run.kind != "train":
        raise ParameterError(f"run {run.key} is of kind {run.kind!r}; only a training run can be measured here")
    model = run.network(chosen_device(parameters))
    data = load_data(run.parameters)
    test = data.split("test").cached()
    chain = chain_of(data)
    positive = np.flatnonzero(target_table(test)[:, test.labels.index(chain[0])].numpy() > 0.5)
    if not len(positive):
        raise ParameterError(f"run {run.key}: no test image shows {chain[0]!r}, so there is nothing to explain")
    patients = test.table["patient_id"].iloc[positive]
    first = positive[~patients.duplicated().to_numpy()]
    rows = [*first, *(row for row in positive if row not in set(first))][: parameters.images]
    longest = patients.value_counts(sort=False).idxmax()
    course = test.table.iloc[positive[(patients == longest).to_numpy()]]
    course = course.sort_values("offset", kind="stable") if "offset" in course else course
    return Subject(
        run,
        model,
        test,
        chain,
        [int(row) for row in rows],
        course.index[:4].tolist(),
    )


def chain_of(data: cxrkit.data.Dataset) -> tuple[str, ...]:
    """The nested labels that are compared, innermost first: of those that lie under another and have none below, the
    most frequent, and all above it. Without a hierarchy: the most frequent label alone.
    """
    leaves = [label for label in data.labels if label in data.hierarchy and label not in data.hierarchy.values()]
    counts = data.table[leaves or list(data.labels)].sum()
    chain = [str(counts.idxmax())]
    while chain[-1] in data.hierarchy:
        chain.append(data.hierarchy[chain[-1]])
    return tuple(chain)


def classification(predictions: pd.DataFrame, cutoff: float = CUTOFF, zero_division: float = 0.0) -> pd.DataFrame:
    """Precision, recall, F1, specificity per label, micro and macro, as the authors count: a label is found above
    ``cutoff``, and a quotient without denominator is 0 (paper `covid`, Eqs. 1 and 2)."""
    labels = list(dict.fromkeys(predictions["label"]))
    target, found = (predictions[name].to_numpy().reshape(-1, len(labels)) for name in ("target", "probability"))
    return cxrkit.metrics.classification_report(target, found, labels, cutoff=cutoff, zero_division=zero_division)


def occlusion_size(size: int, window: int = 0, stride: int = 0) -> tuple[int, int]:
    """Window and stride of the occlusion; 0 stands for the paper's share of the image (50 and 4 of 512 pixels)."""
    own = [max(1, round(size * pixels / PAPER_SIZE)) for pixels in (PAPER_WINDOW, PAPER_STRIDE)]
    return window or own[0], stride or own[1]


def explain(subject: Subject, parameters, hear: Callable[[str], None] | None = None) -> Explained:
    """Maps of the chosen images by every method of the paper that can explain this network; the explained quantity is
    the probability."""
    batch = subject.test.batch(subject.rows)
    device = device_of(subject.model, batch.images)
    maps = {}
    for name, method, options in _asked(subject, parameters):
        found = _maps(subject, batch.images.to(device), method, subject.chain, options)
        maps[name] = found.float().cpu()
        if hear is not None:
            hear(name)
    regions, region = _regions(subject, batch, subject.chain)
    probabilities = _probabilities(subject.model, batch.images)[:, _places(subject)]
    black = (batch.images <= 0)[:, 0]
    return Explained(
        batch.images,
        batch.image_ids,
        batch.patient_ids,
        subject.chain,
        probabilities,
        maps,
        regions,
        region,
        black,
    )


def _asked(subject: Subject, parameters) -> Iterator[tuple[str, str, dict]]:
    able = {card.name for card in cxrkit.attribution.methods(subject.model)}
    window, stride = occlusion_size(subject.test.size, parameters.window, parameters.stride)
    asked = [
        (
            "occlusion",
            "occlusion",
            {"window": window, "stride": stride, "fill": "black"},
        )
    ]
    asked += [(name, name, {}) for name in ("saliency", "input_x_gradient", "guided_backprop")]
    steps = [("integrated_gradients", {"n_steps": count}) for count in parameters.n_steps]
    asked += [(f"{name}_{options['n_steps']}", name, options) for name, options in steps]
    asked.append(("deeplift", "deeplift", {}))
    shap = {
        "n_baselines": parameters.n_baselines,
        "noise": 0.001,
        "seed": parameters.seed,
    }
    asked.append(("deeplift_shap", "deeplift", shap))
    return ((name, method, options) for name, method, options in asked if method in able)


def _maps(
    subject: Subject,
    images: Tensor,
    method: str,
    labels: Sequence[str],
    options: dict,
) -> Tensor:
    return cxrkit.attribute(
        subject.model,
        images,
        method=method,
        labels=list(labels),
        output="probability",
        **options,
    )


def shown_part(name: str, maps: Tensor) -> Tensor:
    """The part of a map that the paper shows, at least 0 or signed: positive, absolute, or all (see `SHOWN`)."""
    kind = SHOWN[name if name in SHOWN else name.rpartition("_")[0]]
    return {"positive": maps.clamp(min=0), "absolute": maps.abs(), "all": maps}[kind]


def scores(subject: Subject, explained: Explained) -> pd.DataFrame:
    """A row per image, label and method: probability, share (of the shown part's positive mass in the region), chance
    (the region's share of the image), region (what it is), black (share of |map| on black bands), black_area, gap (of
    the sum that the method promises; nan where it promises none), agreement (correlation with most steps of
    integrated gradients).
    """
    most = [name for name in explained.maps if name.startswith("integrated_gradients")][-1:]
    parts = []
    for name, maps in explained.maps.items():
        gap = np.full(maps.shape[:2], np.nan)
        if name.startswith(_COMPLETE):
            device = device_of(subject.model, explained.images)
            asked = {
                "labels": list(explained.labels),
                "promise": "difference",
                "output": "probability",
            }
            found = cxrkit.metrics.completeness_gap(
                subject.model, explained.images.to(device), maps.to(device), **asked
            )
            gap = found.gap.cpu().numpy()
        total = maps.abs().sum((2, 3))
        on_black = (maps.abs() * explained.black[:, None]).sum((2, 3)) / total.where(total > 0, torch.nan)
        same = cxrkit.metrics.map_correlation(maps, explained.maps[most[0]]) if most else torch.full_like(total, np.nan)
        share = cxrkit.metrics.energy_pointing_game(shown_part(name, maps), explained.regions)
        share = share.where(explained.regions.flatten(2).any(2), torch.nan)
        values = {
            "probability": explained.probabilities,
            "share": share,
            "chance": cxrkit.metrics.chance_level(explained.regions),
            "black": on_black,
            "black_area": explained.black.flatten(1).float().mean(1)[:, None].expand(maps.shape[:2]),
            "gap": gap,
            "agreement": same,
        }
        parts.append(_tidy(explained, name, values))
    return pd.concat(parts, ignore_index=True).assign(region=explained.region)


def _tidy(explained: Explained, method: str, values: Mapping[str, Tensor | np.ndarray]) -> pd.DataFrame:
    count, labels = len(explained.image_ids), explained.labels
    columns = {
        "image_id": np.repeat(explained.image_ids, len(labels)),
        "patient_id": np.repeat(explained.patient_ids, len(labels)),
        "label": list(labels) * count,
        "method": method,
    }
    return pd.DataFrame(columns | {name: np.asarray(value).ravel() for name, value in values.items()})


def nested(explained: Explained, method: str = "occlusion") -> pd.DataFrame:
    """How alike the maps of nested labels are: a row per image and pair (inner, outer) with their correlation."""
    rows = []
    for inner, outer in combinations(range(len(explained.labels)), 2):
        maps = explained.maps[method]
        alike = cxrkit.metrics.map_correlation(maps[:, inner], maps[:, outer])
        pair = {
            "inner": explained.labels[inner],
            "outer": explained.labels[outer],
            "correlation": alike.numpy(),
        }
        rows.append(
            pd.DataFrame(
                {
                    "image_id": explained.image_ids,
                    "patient_id": explained.patient_ids,
                }
                | pair
            )
        )
    columns = ["image_id", "patient_id", "inner", "outer", "correlation"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def series(subject: Subject, parameters) -> tuple[pd.DataFrame, Tensor]:
    """The images of one patient in the order of their day where the set knows it, else of the table: a row per image
    (image_id, day, probability, share, chance) and occlusion maps of the innermost label [N, H, W]."""
    batch = subject.test.batch(subject.series)
    window, stride = occlusion_size(subject.test.size, parameters.window, parameters.stride)
    device, label = device_of(subject.model, batch.images), subject.chain[:1]
    maps = _maps(
        subject,
        batch.images.to(device),
        "occlusion",
        label,
        {"window": window, "stride": stride},
    )[:, 0].cpu()
    regions, _ = _regions(subject, batch, label)
    share = cxrkit.metrics.energy_pointing_game(maps, regions[:, 0])
    table = subject.test.table.iloc[subject.series]
    frame = {
        "image_id": batch.image_ids,
        "patient_id": batch.patient_ids,
        "day": table["offset"].to_numpy(dtype=float) if "offset" in table else np.nan,
        "label": label[0],
        "probability": _probabilities(subject.model, batch.images)[:, _places(subject)[0]].numpy(),
        "share": share.where(regions[:, 0].flatten(1).any(1), torch.nan).numpy(),
        "chance": cxrkit.metrics.chance_level(regions[:, 0]).numpy(),
    }
    return pd.DataFrame(frame), maps


def _regions(subject: Subject, batch, labels: Sequence[str]) -> tuple[Tensor, str]:
    """Where each label is, bool [N, L, H, W], and what that is: the exact finding, the label's boxes, or, where the set
    boxes something else alone (lungs), any box."""
    columns = [subject.test.labels.index(label) for label in labels]
    if batch.truth is not None:
        return batch.truth[:, columns], "finding"
    if batch.masks[:, columns].any() or not len(subject.test.boxes):
        return batch.masks[:, columns], "box"
    masks = torch.stack([_any_box(subject.test, image_id) for image_id in batch.image_ids])
    return masks[:, None].expand(-1, len(columns), -1, -1), "any box"


def _any_box(data: cxrkit.data.Dataset, image_id: str) -> Tensor:
    boxes = data.boxes[data.boxes["image_id"].astype(str) == image_id]
    frame = tuple(data.frames[data.image_ids.index(image_id)])
    edges = data.preprocessing.boxes(
        boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy(float),
        frame,
        data.size,
    )
    return union_masks(edges, np.zeros(len(edges)), 1, data.size)[0]


def _places(subject: Subject) -> list[int]:
    return [list(subject.model.labels).index(label) for label in subject.chain]


def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    device = device_of(model, images)
    with torch.no_grad():
        return torch.cat([model(part.to(device)).sigmoid().cpu() for part in images.split(_CHUNK)])


def kept(explained: Explained, course: pd.DataFrame, maps: Tensor, shown: int) -> dict[str, np.ndarray]:
    """What pages draw: image_ids [n], labels [L], methods [M] and maps [M, n, L, H, W] of the first ``shown`` images;
    explained_ids, probabilities and occlusion [N, L, H, W] of all; series [K, H, W] with series_ids."""
    return {
        "image_ids": np.array(explained.image_ids[:shown]),
        "labels": np.array(explained.labels),
        "methods": np.array(list(explained.maps)),
        "probabilities": explained.probabilities.numpy(),
        "maps": np.stack([maps[:shown].numpy() for maps in explained.maps.values()]),
        "explained_ids": np.array(explained.image_ids),
        "occlusion": explained.maps["occlusion"].numpy(),
        "series_ids": course["image_id"].to_numpy(dtype=str),
        "series": maps.numpy(),
    }


def all_images(data: cxrkit.data.Dataset) -> Tensor:
    """Every image, [N, 1, H, W]."""
    return data.batch(range(len(data))).images


def bands(subject: Subject) -> pd.DataFrame:
    """On the phantom: every test image drawn with and without dark bands, else the same. A row per image and label of
    the chain with both probabilities; no row on other sets, which can't be drawn again.
    """
    columns = [
        "image_id",
        "patient_id",
        "label",
        "target",
        "with_bands",
        "without_bands",
    ]
    if subject.run.parameters.dataset != "phantom":
        return pd.DataFrame(columns=columns)
    worlds = {name: _drawn(subject, name == "with_bands") for name in columns[-2:]}
    found = {
        name: _probabilities(subject.model, all_images(test))[:, _places(subject)].numpy().ravel()
        for name, test in worlds.items()
    }
    labels, table = list(subject.chain), subject.test.table
    told = {name: np.repeat(table[name].to_numpy(), len(labels)) for name in ("image_id", "patient_id")}
    target = table[labels].to_numpy().ravel()
    return pd.DataFrame(told | {"label": labels * len(table), "target": target} | found)[columns]


def banded(subject: Subject, parameters) -> pd.DataFrame:
    """On the phantom: two of the explained images drawn with dark bands, and how much of each method's |map| of the
    innermost label lies on black, beside black's share of the image (columns as `scores`); else no row."""
    columns = [
        "image_id",
        "patient_id",
        "label",
        "method",
        "probability",
        "black",
        "black_area",
    ]
    if subject.run.parameters.dataset != "phantom":
        return pd.DataFrame(columns=columns)
    world = replace(
        subject,
        test=_drawn(subject, True),
        rows=subject.rows[:2],
        chain=subject.chain[:1],
    )
    return scores(world, explain(world, parameters))[columns]


def _drawn(subject: Subject, with_bands: bool) -> cxrkit.data.Dataset:
    """The test images of a phantom, all or none of them with dark bands."""
    options = {k: v for k, v in subject.run.parameters.dataset_options.items() if k != "dark_borders"}
    planted = {"dark_borders": {"share": 1.0, "share_without": 1.0}} if with_bands else {}
    return load_data(subject.run.parameters.model_copy(update={"dataset_options": options | planted})).split("test")
