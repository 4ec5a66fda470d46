"""What augmentation costs: our one homography on a batch against a chain of torchvision's transforms, image by image.

    python benchmarks/augment.py [--batch 16] [--rounds 5]

Both do the light augmentation (shift, scale, rotation with shear, perspective, gamma) on images of 224 pixels and take
turns on one thread; the shortest round of each counts.
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
from cxrkit.data.augment import augmentation

SIZE = 224


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    images = cxrkit.data.load("phantom", images=given.batch, size=SIZE).batch(range(given.batch)).images
    generator = torch.Generator().manual_seed(0)
    light, heavy = augmentation("light"), augmentation("heavy")
    times = shortest(
        {
            "light, cxrkit": lambda: light(images, generator),
            "light, torchvision v2": lambda: [chain()(image) for image in images],
            "heavy, cxrkit": lambda: heavy(images, generator),
        },
        given.rounds,
    )
    for name, seconds in times.items():
        print(f"{name:42s} {1000 * seconds / given.batch:7.2f} ms an image")


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

    def apply(image):
        for step in steps:
            image = v2.functional.affine(image, **(still | step))
        image = v2.RandomPerspective(0.1, p=0.5)(image)
        return v2.functional.adjust_gamma(image, 2 ** draw.normal(0, 0.2))

    return apply


if __name__ == "__main__":
    main()
