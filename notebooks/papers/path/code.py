"""Paper `path`: what its printed numbers and its published code say, as small experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

import cxrkit
import cxrkit.data
from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap

__all__ = [
    "blur_gap",
    "blur_gaps",
    "denominators",
    "files_for",
    "leak",
    "outline_pairs",
    "smooth_network",
    "standardised",
]


def denominators(values: Sequence[float], digits: int = 6, most: int = 4000) -> list[int]:
    """All n up to `most` for which every value, printed with `digits` decimals, is a share k / n: smallest first."""
    values = [float(value) for value in values]
    half = 0.5 * 10**-digits * (1 + 1e-9)
    return [n for n in range(1, most + 1) if all(abs(round(v * n) / n - v) <= half for v in values)]


def files_for(test_images: int, share: float) -> range:
    """How many files give so many test images when `share` of them is taken, rounded up as scikit-learn does."""
    found = [n for n in range(1, math.ceil(test_images / share) + 2) if math.ceil(round(share * n, 9)) == test_images]
    return range(found[0], found[-1] + 1) if found else range(0)


def outline_pairs(border: Sequence[float], step: int = 2) -> np.ndarray:
    """Points (x, y) of an outline stored as x1, y1, x2, y2, ...: `[N, 2]`.

    `step=2` pairs each x with its y; `step=1` pairs every entry with the next, as the published code did, so that every
    second point is (y, x of the next).
    """
    values = np.asarray(border, dtype=float).ravel()
    if step not in (1, 2):
        raise ParameterError(f"step must be 2 (as stored) or 1 (as coded); got {step!r}")
    starts = np.arange(0, len(values) - 1, step)
    return np.stack([values[starts], values[starts + 1]], 1)


def standardised(images: torch.Tensor, fitted_on: torch.Tensor) -> torch.Tensor:
    """Each pixel of images [N, 1, H, W] less its mean over `fitted_on`, by its deviation; 0 where that is 0."""
    mean, deviation = fitted_on.mean(0), fitted_on.std(0, correction=0)
    return torch.where(
        deviation > 0,
        (images - mean) / deviation.clamp(min=1e-12),
        torch.zeros_like(images),
    )


def leak(
    conspicuity: float,
    images: int = 300,
    size: int = 32,
    images_per_patient: tuple[int, int] = (6, 10),
    seed: int = 0,
) -> pd.DataFrame:
    """What a split of images instead of patients is worth: five-fold accuracy of simple classifiers on the phantom.

    Three exclusive diagnoses, one a patient, who has several images. Conspicuity 0 leaves nothing to be found. The
    classifiers look at principal components of the pixels, fitted on the training folds: "neighbour" takes the class of
    the image in the most similar direction (60 components), "logistic" is a logistic regression (100 components).
    Columns: split ("by image", "by patient"), classifier, accuracy with its 95 % interval (patients resampled), largest
    class, images, patients.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    options = {
        "view": "diagnosis",
        "images": images,
        "images_per_patient": images_per_patient,
        "seed": seed,
    }
    data = cxrkit.data.load("phantom", size=size, conspicuity=conspicuity, **options)
    batch = data.batch(range(len(data)))
    pixels, truth = batch.images.flatten(1).numpy(), batch.targets.argmax(1).numpy()
    patients, own = np.unique(batch.patient_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    folds = {
        "by image": rng.permutation(images) % 5,
        "by patient": (rng.permutation(len(patients)) % 5)[own],
    }
    classifiers = {
        "neighbour": (60, KNeighborsClassifier(1, metric="cosine")),
        "logistic": (100, LogisticRegression(max_iter=3000)),
    }
    rows = []
    for split, fold in folds.items():
        for title, (components, classifier) in classifiers.items():
            right = np.zeros(images)
            for number in range(5):
                test = fold == number
                space = PCA(components, whiten=True, random_state=0).fit(pixels[~test])
                classifier.fit(space.transform(pixels[~test]), truth[~test])
                right[test] = classifier.predict(space.transform(pixels[test])) == truth[test]
            mean, low, high = bootstrap(right, own, n=2000)
            row = {
                "split": split,
                "classifier": title,
                "accuracy": mean,
                "low": low,
                "high": high,
            }
            rows.append(row | {"largest class": np.bincount(truth).max() / images})
    return pd.DataFrame(rows).assign(images=images, patients=len(patients))


def smooth_network(seed: int = 0, classes: int = 3) -> torch.nn.Module:
    """A small untrained network without kinks (softplus), from grey images [B, 1, H, W] to logits [B, classes]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            torch.nn.Conv2d(1, 8, 5, stride=2, padding=2),
            torch.nn.Softplus(),
        ]
        layers += [
            torch.nn.Conv2d(8, 16, 5, stride=2, padding=2),
            torch.nn.Softplus(),
            torch.nn.AdaptiveAvgPool2d(4),
        ]
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(256, classes)).eval()


def blur_gap(network: torch.nn.Module, images: torch.Tensor, steps: Sequence[int]) -> list[dict[str, float]]:
    """What the sum of a map of Blur IG (first output) lacks of score(image) - score(blurred image), as a share of it.

    A row per number of steps to a blur of 50 pixels: steps, width of a step in pixels, missing (mean over images, %).
    """
    from scipy.ndimage import gaussian_filter

    blurred = np.stack([gaussian_filter(image[0].numpy(), 50, mode="constant")[None] for image in images])
    with torch.no_grad():
        promised = (network(images) - network(torch.from_numpy(blurred)))[:, 0]
    rows = []
    for count in steps:
        maps = cxrkit.attribute(network, images, "blur_ig", labels=[0], n_steps=count, max_sigma=50)
        lacking = ((promised - maps.sum((1, 2, 3))) / promised).abs()
        rows.append(
            {
                "steps": count,
                "step, pixels": 50 / count,
                "missing, %": 100 * float(lacking.mean()),
            }
        )
    return rows


def blur_gaps(images: torch.Tensor, steps: Sequence[int] = (25, 100, 400), seed: int = 0) -> pd.DataFrame:
    """:func:`blur_gap` of images [N, 1, H, W] under a smooth network, and of random pixels under a random linear score.

    Random pixels change most under the first bit of blur, which a left sum sees least of.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 1, bias=False))
    linear[1].weight.data = torch.randn(linear[1].weight.shape, generator=generator)
    sharp = torch.rand(images.shape, generator=generator)
    cases = {
        "phantom, smooth network": (smooth_network(seed), images),
        "random pixels, linear score": (linear, sharp),
    }
    parts = [pd.DataFrame(blur_gap(*case, steps)).assign(case=title) for title, case in cases.items()]
    return pd.concat(parts, ignore_index=True)[["case", "steps", "step, pixels", "missing, %"]]
