"""Two statistics in which synthetic radiographs can be held against real ones: grey values and spatial frequencies."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cxrkit.errors import ParameterError

__all__ = ["BINS", "grey_histogram", "radial_power_spectrum", "share_within"]

BINS = 32


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, dtype=np.float64)
    if images.ndim < 2 or images.shape[-1] != images.shape[-2]:
        raise ParameterError(f"images have shape {images.shape}; expected [..., S, S]")
    return images


def grey_histogram(images: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Share of the pixels in each of ``bins`` equal steps of grey from 0 to 1.

    ``images``: ``[..., S, S]`` in [0, 1]; returns float64 ``[..., bins]`` that sums to 1.
    """
    images = _checked(images)
    flat = np.clip((images * bins).astype(int), 0, bins - 1).reshape(-1, images.shape[-1] ** 2)
    counts = np.stack([np.bincount(image, minlength=bins) for image in flat])
    return (counts / flat.shape[1]).reshape(*images.shape[:-2], bins)


def radial_power_spectrum(images: np.ndarray) -> np.ndarray:
    """log10 of the mean power at each spatial frequency 1, 2, ... S // 2 - 1 (cycles per image width).

    ``images``: ``[..., S, S]``; a Hann window is applied after the mean is taken off. Returns float64 ``[...,
    S // 2 - 1]``.
    """
    images = _checked(images)
    side = images.shape[-1]
    window = np.hanning(side)
    centred = (images - images.mean(axis=(-2, -1), keepdims=True)) * window[:, None] * window
    power = np.abs(np.fft.fft2(centred)) ** 2 / side**2
    frequency = np.fft.fftfreq(side) * side
    ring = np.round(np.hypot(frequency[:, None], frequency[None])).astype(int).ravel()
    flat = power.reshape(-1, side * side)
    count = np.bincount(ring)
    radial = np.stack([np.bincount(ring, weights=image) / count for image in flat])
    radial = np.log10(radial[:, 1 : side // 2] + 1e-12)
    return radial.reshape(*images.shape[:-2], side // 2 - 1)


def share_within(images: np.ndarray, bands: pd.DataFrame) -> dict[str, float]:
    """For each statistic, the share of bins in which the median over ``images`` ``[N, S, S]`` lies in the band."""
    shares = {}
    for function in (grey_histogram, radial_power_spectrum):
        band = bands[bands["statistic"] == function.__name__]
        median = np.median(function(images), axis=0)
        if len(median) != len(band):
            raise ParameterError(f"{function.__name__}: {len(median)} bins against {len(band)} of the reference")
        inside = (band["p5"].to_numpy() <= median) & (median <= band["p95"].to_numpy())
        shares[function.__name__] = float(inside.mean())
    return shares
