"""Paper `path`: how far the classes part, in t-SNE of the test images before and after training."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import cxrkit.data
from cxrkit.attribution.api import device_of
from cxrkit.train.loader import target_table
from cxrkit.train.setup import make_model
from papers.path.measure import Subject, spread

__all__ = ["embeddings"]


def embeddings(subject: Subject) -> pd.DataFrame:
    """t-SNE of the test images before and after training, as in the paper's Figs. 6 and 7, and how well classes part.

    Stages: "pixels", "untrained" and "trained"; of networks the flattened feature map before pooling, as coded. A row
    per image and stage: image_id, patient_id, label (joined where an image has several), x, y; same and same_plane:
    whether the nearest image of another patient has the same label, among the features and in the plane.
    """
    from sklearn.manifold import TSNE

    data = subject.data.select(spread(len(subject.data), subject.parameters.embedded))
    images = data.batch(range(len(data))).images
    patients = data.table["patient_id"].astype(str).to_numpy()
    known = {
        "image_id": data.image_ids,
        "patient_id": patients,
        "label": _labels(data),
    }
    untrained = make_model(subject.run.parameters, subject.model.labels).to(device_of(subject.model, images))
    stages = {
        "pixels": images.flatten(1),
        "untrained": _features(untrained.eval(), images),
        "trained": _features(subject.model, images),
    }
    parts = []
    for stage, features in stages.items():
        made = TSNE(
            perplexity=min(30.0, (len(features) - 1) / 3),
            init="random",
            random_state=subject.parameters.seed,
        )
        plane = made.fit_transform(features.numpy())
        part = pd.DataFrame({"stage": stage, **known, "x": plane[:, 0], "y": plane[:, 1]})
        same = [_same_neighbour(space, part) for space in (features.double(), torch.from_numpy(plane).double())]
        parts.append(part.assign(same=same[0], same_plane=same[1]))
    return pd.concat(parts, ignore_index=True)


def _labels(data: cxrkit.data.Dataset) -> np.ndarray:
    positive = target_table(data).nan_to_num() > 0.5
    names = np.asarray(data.labels)
    return np.array([" + ".join(names[row.numpy()]) or "none" for row in positive])


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> Tensor:
    """The map of the layer that CAM methods use, flattened: [N, F], on the CPU."""
    found: list[Tensor] = []
    handle = model.get_submodule(model.explained_layer).register_forward_hook(
        lambda module, given, output: found.append(output.detach().flatten(1).cpu().clone())
    )
    try:
        for part in images.split(32):
            model(part.to(device_of(model, part)))
    finally:
        handle.remove()
    return torch.cat(found)


def _same_neighbour(features: Tensor, of: pd.DataFrame) -> np.ndarray:
    """For each row of features [N, F] 1 where its nearest row of another patient has its label, 0 where not, else nan.

    `of`: patient_id and label of the rows."""
    patients, labels = of["patient_id"].to_numpy(), of["label"].to_numpy()
    distance = torch.cdist(features, features)
    distance[torch.from_numpy(patients[:, None] == patients[None])] = torch.inf
    nearest, alone = (
        distance.argmin(1).numpy(),
        torch.isinf(distance.amin(1)).numpy(),
    )
    return np.where(alone, np.nan, labels[nearest] == labels)
