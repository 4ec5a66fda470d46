"""What augmentation costs: our one homography on a batch against a chain of torchvision's transforms, image by image.

    python benchmarks/augment.py [--batch 16] [--rounds 5] [--hashes 100000]

Both do the light augmentation (shift, scale, rotation with shear, perspective, gamma) on images of 224 pixels, with and
without the masks of 14 labels, and take turns on one thread; the shortest round of each counts. Then the pairs within 6
bits among so many hashes, a tenth of them tested, as the leakage check of a large set looks for them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import cxrkit
from cxrkit.data.augment import augmentation, augmentation_seeds
from cxrkit.data.leakage import near_pairs

SIZE = 224


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--hashes", type=int, default=100_000)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    batch = cxrkit.data.load("phantom", images=given.batch, size=SIZE).batch(range(given.batch))
    seeds = augmentation_seeds(0, 0, batch.image_ids)
    light, heavy = augmentation("light"), augmentation("heavy")
    times = shortest(
        {
            "light, images, cxrkit": lambda: light(batch.images, seeds=seeds),
            "light, images, torchvision v2": lambda: [chain()(image) for image in batch.images],
            "light, images and masks, cxrkit": lambda: light(batch, seeds=seeds),
            "light, images and masks, torchvision v2": lambda: with_masks(batch),
            "heavy, images, cxrkit": lambda: heavy(batch.images, seeds=seeds),
        },
        given.rounds,
    )
    for name, seconds in times.items():
        print(f"{name:42s} {1000 * seconds / given.batch:7.2f} ms an image")
    hashes = np.random.default_rng(0).integers(0, 2**63, given.hashes, dtype=np.uint64)
    start = time.perf_counter()
    tested = given.hashes // 10
    for _ in near_pairs(hashes[:tested], hashes[tested:]):
        pass
    print(f"{tested} against {given.hashes - tested} hashes: {time.perf_counter() - start:.1f} s")


def shortest(tasks: dict[str, Callable], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def chain():
    """The light augmentation as a chain, drawn anew: three affine steps, perspective, gamma."""
    from torchvision.transforms import v2

    draw = np.random.default_rng(0)
    bilinear = v2.InterpolationMode.BILINEAR
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "interpolation": bilinear}
    steps = (
        {"translate": draw.uniform(-32, 32, 2).tolist()},
        {"scale": float(2 ** -draw.normal(0, 0.1))},
        {"angle": draw.normal(0, 5), "shear": [draw.normal(0, 2.5), 0.0]},
    )

    def apply(*inputs):
        for step in steps:
            inputs = [v2.functional.affine(one, **(still | step)) for one in inputs]
        inputs = v2.RandomPerspective(0.1, p=0.5)(*inputs)
        image, *rest = inputs if isinstance(inputs, list | tuple) else (inputs,)
        return v2.functional.adjust_gamma(image, 2 ** draw.normal(0, 0.2)), *rest

    return apply


def with_masks(batch) -> list:
    from torchvision import tv_tensors

    return [
        chain()(tv_tensors.Image(image), *(tv_tensors.Mask(mask) for mask in (masks, truth, shortcut)))
        for image, masks, truth, shortcut in zip(batch.images, batch.masks, batch.truth, batch.shortcut, strict=True)
    ]


if __name__ == "__main__":
    main()
