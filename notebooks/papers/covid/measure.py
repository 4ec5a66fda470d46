"""Paper `covid`: which images, labels, regions and layers `measure.ipynb` looks at, and which part of a map counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.attribution.api import device_of
from cxrkit.data.dataset import Batch, Dataset
from cxrkit.data.geometry import union_masks
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.metrics import inactive_feature_maps
from cxrkit.study import runs
from cxrkit.train.parameters import TrainParameters
from cxrkit.train.setup import load_data

__all__ = [
    "CUTOFF",
    "SHOWN",
    "border_share",
    "by_label",
    "chain_of",
    "course_rows",
    "explained_rows",
    "groups_of",
    "inactive_of",
    "layers_of",
    "occlusion_size",
    "probabilities",
    "redrawn",
    "regions_of",
    "shown_part",
    "trained_run",
]

CUTOFF = 0.51  # of the published code
PAPER_SIZE, PAPER_WINDOW, PAPER_STRIDE = 512, 50, 4
# The part of a map that the paper shows.
SHOWN = {
    "occlusion": "positive",
    "saliency": "absolute",
    "input_x_gradient": "positive",
    "guided_backprop": "positive",
    "integrated_gradients": "positive",
    "deeplift": "all",
    "deeplift_shap": "all",
}
_BORDER = 1 / 8  # of the side: width of an image's border
_FINE = 128  # pixels of the input: below, the deepest layer is too coarse to show a place, so the one before is taken
# Layers that the authors looked at, by kind of network: all, the middle one, and early, deep, deep for small images.
_DENSE = [f"features.denseblock{number}.denselayer1.relu1" for number in (1, 2, 3, 4)]
_INCEPTION = ["Conv2d_4a_3x3", "Mixed_5b", "Mixed_5c", "Mixed_6a", "Mixed_7a", "Mixed_7b", "Mixed_7c"]
_INCEPTION_RESNET = ["maxpool_3a", "maxpool_5a", "mixed_5b", "mixed_6a", "mixed_7a", "conv2d_7b"]
_LAYERS = {
    "inception_v3": (_INCEPTION, "Mixed_6a", ("Conv2d_4a_3x3", "Mixed_7c", "Mixed_6a")),
    "inception_resnet_v2": (_INCEPTION_RESNET, "mixed_6a", ("maxpool_3a", "conv2d_7b", "mixed_6a")),
    "densenet": ([*_DENSE, "features"], _DENSE[2], (_DENSE[0], _DENSE[3], _DENSE[2])),
    "resnet": (["maxpool", "layer1", "layer2", "layer3", "layer4"], "layer2", ("layer1", "layer4", "layer3")),
}


# Images and labels


def trained_run(parameters) -> runs.Run:
    """The training run that the parameters name. Raises ParameterError for a run of another kind."""
    run = runs.find(parameters.run, parameters.results)
    if run.kind != "train":
        raise ParameterError(f"run {run.key} is of kind {run.kind!r}; only a training run can be measured here")
    return run


def chain_of(data: Dataset) -> tuple[str, ...]:
    """The nested labels that are compared, innermost first: the most frequent of those that lie inside another and
    have none inside, and all above it. Without a hierarchy: the most frequent label alone."""
    leaves = [label for label in data.labels if label in data.hierarchy and label not in data.hierarchy.values()]
    counts = data.table[leaves or list(data.labels)].sum()
    chain = [str(counts.idxmax())]
    while chain[-1] in data.hierarchy:
        chain.append(data.hierarchy[chain[-1]])
    return tuple(chain)


def explained_rows(test: Dataset, label: str, count: int) -> list[int]:
    """Rows of the first ``count`` positives of a label, one of each patient before a second of any.

    The choice depends on the data alone, so that networks of one split explain the same images. Raises ParameterError
    where no image has the label.
    """
    positive = _positive(test, label)
    patients = test.table["patient_id"].iloc[positive]
    first = positive[~patients.duplicated().to_numpy()]
    rows = [*first, *(row for row in positive if row not in set(first))][:count]
    return [int(row) for row in rows]


def course_rows(test: Dataset, label: str, count: int = 4) -> list[int]:
    """Rows of the first ``count`` positives of the patient with most of them: by day where the set knows it."""
    positive = _positive(test, label)
    patients = test.table["patient_id"].iloc[positive]
    longest = patients.value_counts(sort=False).idxmax()
    course = test.table.iloc[positive[(patients == longest).to_numpy()]]
    course = course.sort_values("offset", kind="stable") if "offset" in course else course
    return course.index[:count].tolist()


def _positive(test: Dataset, label: str) -> np.ndarray:
    positive = np.flatnonzero(test.table[label].to_numpy(dtype=float) > 0.5)
    if not len(positive):
        raise ParameterError(f"no test image shows {label!r}, so there is nothing to explain")
    return positive


def groups_of(data: Dataset, chain: Sequence[str]) -> dict[str, np.ndarray]:
    """The paper's groups of images, bool [N] each: the innermost label, the outermost, the outermost without the
    innermost, and neither. They overlap; empty ones are left out."""
    inner, outer = (data.table[label].to_numpy() > 0.5 for label in (chain[0], chain[-1]))
    groups = {chain[0]: inner, chain[-1]: outer, f"{chain[-1]} without {chain[0]}": outer & ~inner}
    return {name: chosen for name, chosen in (groups | {"neither": ~outer}).items() if chosen.any()}


def redrawn(parameters: TrainParameters) -> dict[str, Dataset]:
    """The test images of a phantom drawn again, all of them with dark bands ("with_bands") and none ("without_bands"),
    else the same; empty for other data sets, whose images can't be drawn again."""
    if parameters.dataset != "phantom":
        return {}
    options = {name: value for name, value in parameters.dataset_options.items() if name != "dark_borders"}
    worlds = {"with_bands": options | {"dark_borders": {"share": 1.0, "share_without": 1.0}}, "without_bands": options}
    changed = {name: parameters.model_copy(update={"dataset_options": world}) for name, world in worlds.items()}
    return {name: load_data(of_world).split("test") for name, of_world in changed.items()}


# Probabilities, maps and regions


def probabilities(model: nn.Module, images: Tensor, labels: Sequence[str]) -> Tensor:
    """The sigmoid outputs [N, L] of the labels, on the CPU."""
    device, columns = device_of(model, images), [list(model.labels).index(label) for label in labels]
    with torch.no_grad():
        return torch.cat([model(part.to(device)).sigmoid().cpu() for part in images.split(32)])[:, columns]


def occlusion_size(size: int, window: int = 0, stride: int = 0) -> tuple[int, int]:
    """Window and stride of the occlusion; 0 stands for the paper's share of the image (50 and 4 of 512 pixels)."""
    own = [max(1, round(size * pixels / PAPER_SIZE)) for pixels in (PAPER_WINDOW, PAPER_STRIDE)]
    return window or own[0], stride or own[1]


def shown_part(name: str, maps: Tensor) -> Tensor:
    """The part of a map that the paper shows: its positive values, its absolute values, or all (see `SHOWN`)."""
    kind = SHOWN[name if name in SHOWN else name.rpartition("_")[0]]
    return {"positive": maps.clamp(min=0), "absolute": maps.abs(), "all": maps}[kind]


def regions_of(test: Dataset, batch: Batch, labels: Sequence[str]) -> tuple[Tensor, str]:
    """Where each label is, bool [N, L, H, W], and its source: the exact "finding", the label's "box", or, where the set
    boxes something else alone (lungs), "any box"."""
    columns = [test.labels.index(label) for label in labels]
    if batch.truth is not None:
        return batch.truth[:, columns], "finding"
    if batch.masks[:, columns].any() or not len(test.boxes):
        return batch.masks[:, columns], "box"
    masks = torch.stack([_any_box(test, image_id) for image_id in batch.image_ids])
    return masks[:, None].expand(-1, len(columns), -1, -1), "any box"


def _any_box(data: Dataset, image_id: str) -> Tensor:
    boxes = data.boxes[data.boxes["image_id"].astype(str) == image_id]
    corners = boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy(float)
    edges = data.preprocessing.boxes(corners, tuple(data.frames[data.image_ids.index(image_id)]), data.size)
    return union_masks(edges, np.zeros(len(edges)), 1, data.size)[0]


def by_label(batch: Batch, labels: Sequence[str], values: Mapping[str, Tensor], **same: str) -> pd.DataFrame:
    """A row per image and label: image_id, patient_id, label, what is the ``same`` for all, and a column for each of
    the values [N, L]."""
    columns = {
        "image_id": np.repeat(batch.image_ids, len(labels)),
        "patient_id": np.repeat(batch.patient_ids, len(labels)),
        "label": list(labels) * len(batch.image_ids),
    }
    return pd.DataFrame(columns | same | {name: np.asarray(value).ravel() for name, value in values.items()})


# Layers


def layers_of(parameters: TrainParameters, model: nn.Module) -> tuple[list[str], str, tuple[str, str]]:
    """The layers that the authors looked at in a network of this kind, the middle one, and an early and a deep one;
    for other kinds the layer whose maps CAM methods use."""
    known = {layer for layer, _ in model.named_modules()}
    kind = next((kind for kind in _LAYERS if kind in parameters.model), None)
    listed, middle, (early, *deep) = _LAYERS[kind] if kind else ([], "", ("", ""))
    if f"network.{middle}" not in known:
        last = model.card["explained_layer"]
        return [last], last, (last, last)
    chosen = deep[0] if parameters.size >= _FINE else deep[1]
    whole = [f"network.{layer}" for layer in listed if f"network.{layer}" in known]
    return whole, f"network.{middle}", (f"network.{early}", f"network.{chosen}")


def inactive_of(model: nn.Module, images: Tensor, layer: str) -> list[dict]:
    """A row (layer, maps, constant, zero, percent constant) on a layer's dead maps; none where its maps have one pixel,
    which can't vary."""
    try:
        found = [inactive_feature_maps(model, images, [layer], definition=kind) for kind in ("constant", "zero")]
    except AttributionError:
        return []
    constant, zero = (frame["inactive"] for frame in found)
    return found[0].assign(constant=constant, zero=zero).drop(columns="inactive").to_dict("records")


def border_share(maps: Tensor, size: int) -> list[float]:
    """Mean of |map| in the outer eighth of the image over its mean everywhere, for maps [C, G, h, w] -> [C]."""
    large = F.interpolate(maps.abs(), size=(size, size), mode="nearest").mean(1)
    width = max(1, int(size * _BORDER))
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[width:-width, width:-width] = True
    return (large[:, ~inside].mean(1) / large.mean((1, 2))).tolist()
