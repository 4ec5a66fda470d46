"""From thickness maps to grey values: attenuation, scatter, quantum noise, detector, display.

Effective energy 65 keV, that of a chest exposure at 110 to 120 kV behind the patient. Linear attenuation
coefficients in 1/cm are mass coefficients (NIST, Hubbell and Seltzer tables, between 60 and 80 keV) times
density: soft tissue 0.20 * 1.05 g/cm3; cortical bone 0.287 * 1.92; titanium, for all metal, 0.68 * 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cxrkit.phantom.body import Thickness
from cxrkit.phantom.texture import quantum_noise

__all__ = ["SOFT", "Exposure", "block_mean", "display", "line_integral", "sample_exposure"]

SOFT = 0.20 * 1.05
BONE = 0.287 * 1.92
METAL = 0.68 * 4.5
_PIXEL_BLUR = 0.38  # pixels: what averaging a finer image into these pixels does
_COARSE = 32  # side of the grid on which scatter is worked out


@dataclass(frozen=True)
class Exposure:
    """One exposure: ``quanta`` per square cm at the detector without a patient; share of ``scatter`` in the
    signal; the display window (share of the tissue range added below and above), its curve and its brightest grey;
    detector blur in cm."""

    quanta: float
    scatter: float
    low: float
    high: float
    curve: float
    white: float
    blur: float


def sample_exposure(rng: np.random.Generator) -> Exposure:
    """Draw the settings of an exposure and of its display."""
    return Exposure(
        quanta=float(10 ** rng.normal(6.3, 0.2)),
        scatter=float(rng.uniform(0.25, 0.6)),
        low=float(rng.uniform(0.2, 0.95)),
        high=float(rng.uniform(-0.05, 0.4)),
        curve=float(np.clip(rng.normal(0.05, 0.35), -0.9, 0.9)),
        white=float(rng.uniform(0.88, 1.0)),
        blur=0.045,
    )


def line_integral(body: Thickness, lung_density: float) -> np.ndarray:
    """Attenuation along each ray (Beer-Lambert exponent), float32 ``[H, W]``; lung counts by its density."""
    soft = body.soft + body.vessel + np.float32(lung_density) * body.lung
    return soft * np.float32(SOFT) + body.bone * np.float32(BONE) + body.metal * np.float32(METAL)


def block_mean(values: np.ndarray, step: int) -> np.ndarray:
    """Mean over blocks of ``step`` x ``step`` pixels, float32; what does not fill a block is left out."""
    if step == 1:
        return values
    rows, columns = (side // step * step for side in values.shape)
    # Sums of slices: many times faster than a mean over two short axes.
    lines = sum(
        (values[i:rows:step, :columns] for i in range(1, step)), values[:rows:step, :columns].astype(np.float32)
    )
    total = sum((lines[:, i::step] for i in range(1, step)), lines[:, ::step])
    return total * np.float32(1 / step**2)


def _scattered(primary: np.ndarray, share: float) -> np.ndarray:
    """Scatter: the primary image blurred over several cm, so it fills the dense parts most."""
    coarse = block_mean(primary, max(1, len(primary) // _COARSE))
    # Light that bypasses the body is not scattered in it.
    coarse = ndimage.gaussian_filter(np.minimum(coarse, 0.25), len(coarse) / 9, mode="nearest")
    return np.float32(share * 0.35) * _enlarge(coarse, len(primary))


def _enlarge(coarse: np.ndarray, side: int) -> np.ndarray:
    """Bilinear enlargement of a square to ``side`` pixels, as two matrix products."""
    n = len(coarse)
    position = np.clip((np.arange(side) + 0.5) * n / side - 0.5, 0, n - 1)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(n)[None])).astype(np.float32)
    return weights @ coarse.astype(np.float32) @ weights.T


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Detector blur: three taps along each axis, with the variance ``sigma`` squared (in pixels)."""
    tap = np.float32(min(sigma**2 / 2, 0.25))
    if tap < 0.01:
        return image
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if axis == a else (0, 0) for a in (0, 1)], mode="edge")
        first, last = (padded[:-2], padded[2:]) if axis == 0 else (padded[:, :-2], padded[:, 2:])
        image = image * (1 - 2 * tap) + (first + last) * tap
    return image


def display(
    attenuation: np.ndarray,
    tissue: tuple[float, float],
    exposure: Exposure,
    pixel: float,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """The displayed image, float32 ``[H, W]`` in [0, 1], dense parts bright.

    ``attenuation``: line integrals; ``tissue``: the line integrals of lung and of mediastinum that set the
    window; ``pixel``: side of a pixel in cm; ``rng``: source of quantum noise, None for an image without it.
    """
    signal = np.exp(-attenuation)
    signal += _scattered(signal, exposure.scatter)
    if rng is not None:
        # Poisson noise of N quanta, as a normal of variance N.
        quanta = exposure.quanta * pixel * pixel
        signal += quantum_noise(len(signal), rng) * np.sqrt(signal * np.float32(1 / quanta))
    signal = _smooth(signal, np.hypot(exposure.blur / pixel, _PIXEL_BLUR))
    dense = -np.log(np.maximum(signal, 1e-4))
    reach = tissue[1] - tissue[0]
    low, high = tissue[0] - exposure.low * reach, tissue[1] + exposure.high * reach
    grey = np.clip((dense - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    # A gentle film curve, monotonic for |curve| <= 1.
    return (grey + exposure.curve * grey * (1 - grey)) * exposure.white
