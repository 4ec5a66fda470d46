"""How fast the phantom is drawn: images per second on one thread, truth masks included, at three sizes.

Beside it stands the least that any drawing costs: one exponential and one logarithm a pixel (attenuation and display).
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from cxrkit.phantom.source import load_phantom

IMAGES = 100
SIZES = (64, 96, 224)


def seconds(function, repeats: int) -> float:
    """Mean seconds for one of ``repeats`` calls, numbered from 0; the best of three rounds, as other work disturbs."""
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for index in range(repeats):
            function(index)
        rounds.append((time.perf_counter() - start) / repeats)
    return min(rounds)


def bound(size: int) -> float:
    """Images per second if an image cost no more than one exponential and one logarithm a pixel."""
    thickness = np.linspace(0, 5, size * size, dtype=np.float32).reshape(size, size)
    return 1 / seconds(lambda _: np.log(np.exp(-thickness)), IMAGES)


def main() -> None:
    dataset = load_phantom(images=IMAGES)
    for row in range(IMAGES):
        dataset.renderer.render(row, 32)  # the banks of texture are made once
    tables = seconds(lambda seed: load_phantom(images=IMAGES, seed=seed), 2) / IMAGES
    print(f"table and boxes: {tables * 1e3:.2f} ms an image")
    for size in SIZES:
        rate = 1 / seconds(lambda row, size=size: dataset.renderer.render(row, size), IMAGES)
        print(f"{size:4d} px: {rate:6.0f} images/s   (bound: {bound(size):8.0f})")


if __name__ == "__main__":
    main()
