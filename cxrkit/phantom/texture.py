"""Banks of texture, made once and looked up by position: noise, clouds, a reticular net, vessel trees.

Everything here is synthetic. Each bank comes from a fixed seed, tiles without a seam, and is read at
positions in centimetres, so the same patient looks the same at every size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

__all__ = ["LETTERS", "TILE_CM", "cloud", "net", "quantum_noise", "vessels"]

SIDE = 512
TILE_CM = 25.6  # a tile's side, so a texel is half a millimetre
VESSEL_SHAPE = (30.0, 15.0)  # cm: height and width of the region that a vessel tree covers
_PER_CM = SIDE / TILE_CM
_TREES = 6
_FINER = 2  # vessels are drawn so much finer, then averaged
# Lead letters as radiographers put them on the cassette, 5 x 7 dots.
LETTERS = {
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "R": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
}


def _filtered(seed: int, band) -> np.ndarray:
    """Tileable noise of unit variance, whose amplitude at frequency f (cycles per cm) is ``band(f)``."""
    noise = np.random.default_rng(seed).standard_normal((SIDE, SIDE))
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]) * _PER_CM
    spectrum = np.fft.rfft2(noise) * band(np.maximum(frequency, 1 / TILE_CM))
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return (field / field.std()).astype(np.float32)


def _level(pixel: float, levels: int) -> int:
    """Which blur of a bank fits a pixel of ``pixel`` cm, so that fine detail does not alias."""
    return int(np.clip(np.round(np.log2(max(pixel * _PER_CM / 2, 1))), 0, levels - 1))


@lru_cache(maxsize=1)
def _clouds() -> np.ndarray:
    return _filtered(11, lambda f: f**-1.6)


@lru_cache(maxsize=8)
def _nets(kind: str, level: int) -> np.ndarray:
    """Lines along the zero crossings of band-limited noise: a net with meshes of about one period."""
    centre, seed = (1.15, 23) if kind == "fine" else (0.62, 29)
    field = _filtered(seed, lambda f: np.exp(-(np.log(f / centre) ** 2) / 0.3))
    lines = np.exp(-((field / 0.34) ** 2)) * np.clip(1 + 0.4 * _filtered(seed + 1, lambda f: f**-1.2), 0.2, 2)
    lines = ndimage.gaussian_filter(lines, 2.0**level / 2, mode="wrap")
    return (lines / lines.mean()).astype(np.float32)


def _tile_index(x: np.ndarray, y: np.ndarray, offset: tuple[float, float]) -> np.ndarray:
    columns = ((x + (offset[0] + 100.0)) * _PER_CM).astype(np.int32) & (SIDE - 1)
    rows = ((y + (offset[1] + 100.0)) * _PER_CM).astype(np.int32) & (SIDE - 1)
    return (rows << 9) | columns


def cloud(x: np.ndarray, y: np.ndarray, offset: tuple[float, float]) -> np.ndarray:
    """Cloudy noise, mean 0 and variance 1, at positions in cm: float32 of the shape of ``x``."""
    return _clouds().ravel().take(_tile_index(x, y, offset))


def net(x: np.ndarray, y: np.ndarray, offset: tuple[float, float], kind: str, pixel: float) -> np.ndarray:
    """A reticular net of mean 1, ``kind`` "fine" or "coarse", for pixels of ``pixel`` cm."""
    return _nets(kind, _level(pixel, 5)).ravel().take(_tile_index(x, y, offset))


def _grow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, start, angle: float, radius: float) -> None:
    """Draw one vessel and its branches; the cross-section is shared among the daughters (Murray's law)."""
    x, y = start
    for _ in range(2):
        angle += rng.normal(0, 0.2)
        length = radius * rng.uniform(4.0, 8.0) + 0.3
        x1, y1 = x + length * np.cos(angle), y + length * np.sin(angle)
        line = [_PER_CM * _FINER * value for value in (x, y, x1, y1)]
        draw.line(line, fill=int(min(radius * 600, 255)), width=max(1, round(2 * radius * _PER_CM * _FINER)))
        x, y = x1, y1
        if rng.random() < 0.5:
            _branch(draw, rng, (x, y), angle, radius * rng.uniform(0.4, 0.65), rng.choice((-1, 1)))
    share = rng.uniform(0.3, 0.7)
    for part, side in ((share, 1), (1 - share, -1)):
        _branch(draw, rng, (x, y), angle, radius * part ** (1 / 3) * 0.94, side)


def _branch(draw: ImageDraw.ImageDraw, rng: np.random.Generator, start, angle: float, radius: float, side: int) -> None:
    if radius > 0.05:
        _grow(draw, rng, start, angle + side * rng.uniform(0.2, 0.65), radius)


@lru_cache(maxsize=_TREES)
def _tree(index: int) -> tuple[np.ndarray, ...]:
    """One lung's vessels: thickness in cm, hilum at the left border, 40 % of the height down; four blurs."""
    rng = np.random.default_rng((31, index))
    height, width = VESSEL_SHAPE
    canvas = Image.new("L", (int(width * _PER_CM * _FINER), int(height * _PER_CM * _FINER)))
    draw = ImageDraw.Draw(canvas)
    for angle in (-1.35, -1.1, -0.75, -0.35, 0.1, 0.5, 0.85, 1.1, 1.35, 1.5):
        start = (rng.uniform(0.2, 1.6), 0.4 * height + 2.0 * np.sin(angle) + rng.normal(0, 0.3))
        _grow(draw, rng, start, angle + rng.normal(0, 0.1), rng.uniform(0.2, 0.34))
    canvas = canvas.reduce(_FINER)
    thickness = np.asarray(canvas, dtype=np.float32) / 170
    return tuple(ndimage.gaussian_filter(thickness, 0.6 * 2.0**level).astype(np.float32) for level in range(4))


def vessels(x: np.ndarray, y: np.ndarray, index: int, pixel: float) -> np.ndarray:
    """Thickness in cm of one lung's vessels at ``x`` cm outward of and ``y`` cm below the hilum."""
    tree = _tree(index % _TREES)[_level(pixel, 4)]
    rows, columns = tree.shape
    column = np.clip(x * _PER_CM, 0, columns - 1).astype(np.int32)
    row = np.clip((y + 0.4 * VESSEL_SHAPE[0]) * _PER_CM, 0, rows - 1).astype(np.int32)
    return tree.ravel().take(row * columns + column)


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(41).standard_normal((1024, 1024), dtype=np.float32)


def quantum_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Independent standard normal values, float32 ``[size, size]``; cut from a bank when it is large enough."""
    bank = _noise_bank()
    if size > len(bank) // 2:
        return rng.standard_normal((size, size), dtype=np.float32)
    top, left = rng.integers(0, len(bank) - size, 2)
    flip = rng.integers(0, 2, 2) * 2 - 1
    return bank[top : top + size, left : left + size][:: flip[0], :: flip[1]]
