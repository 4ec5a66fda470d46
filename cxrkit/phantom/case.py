"""One synthetic image: patient, camera, exposure, findings and planted shortcuts, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from cxrkit.phantom.anatomy import Anatomy, Frame, Grid, sample_anatomy, sample_frame
from cxrkit.phantom.body import Thickness, draw_body
from cxrkit.phantom.findings import EDGE, Finding, apply, finding_box
from cxrkit.phantom.physics import SOFT, Exposure, block_mean, display, line_integral, sample_exposure
from cxrkit.phantom.repertoire import MAKERS, enlarge
from cxrkit.phantom.texture import LETTERS
from cxrkit.phantom.views import View

__all__ = ["Case", "Drawing", "Marker", "Planted", "draw", "make_case", "patient_images"]

# Streams of random numbers, so that a switch that is turned changes nothing else.
_PATIENT, _LABELS, _IMAGE, _FINDING, _PLANTED, _NOISE, _COUNT = range(7)
_OVERSAMPLE_BELOW = 128  # smaller images are drawn larger and averaged
Switch = tuple[str | None, float, float] | None


@dataclass(frozen=True)
class Marker:
    """A lead letter on the cassette: which, where (image coordinates of its corner), how high, how thick."""

    letter: str
    u: float
    v: float
    height: float
    lead: float


@dataclass(frozen=True)
class Planted:
    """Shortcuts to plant, each as (label, rate with it, rate without it)."""

    marker: Switch = None
    dark_borders: Switch = None
    crop: Switch = None


@dataclass(frozen=True)
class Case:
    """All that an image is drawn from. ``plain``: the anatomy before a finding enlarged a part of it."""

    labels: tuple[str, ...]
    positive: tuple[str, ...]
    anatomy: Anatomy
    plain: Anatomy
    frame: Frame
    exposure: Exposure
    findings: tuple[Finding, ...]
    marker: Marker | None
    conspicuity: float
    noise: tuple[int, ...]

    def boxes(self) -> list[tuple[str, tuple[int, int, int, int]]]:
        """Label and box, in the nominal frame, of every labelled finding that lies in the image."""
        found = []
        for finding in self.findings:
            if finding.label in self.labels:
                box = finding_box(finding, self.anatomy, self.frame)
                if box is not None:
                    found.append((finding.label, box))
        return found

    def healthy(self) -> Case:
        """The same exposure of the same patient without any finding."""
        return replace(self, findings=(), anatomy=self.plain, positive=())


@dataclass(frozen=True)
class Drawing:
    """``image`` float32 ``[H, W]`` in [0, 1]; ``truth``: label and bool ``[H, W]`` per finding; ``shortcut`` bool
    ``[H, W]``; ``attenuation`` float32: the line integrals that the image was made from."""

    image: np.ndarray
    truth: tuple[tuple[str, np.ndarray], ...]
    shortcut: np.ndarray
    attenuation: np.ndarray


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))


@lru_cache(maxsize=64)
def _anatomy(seed: int, patient: int) -> Anatomy:
    """A patient's anatomy, kept for the next image of the same patient."""
    return sample_anatomy(_rng(seed, patient, 0, _PATIENT))


def patient_images(seed: int, patient: int, fewest: int, most: int) -> int:
    """How many images a patient has."""
    return fewest if fewest == most else int(_rng(seed, patient, 0, _COUNT).integers(fewest, most + 1))


def make_case(
    view: View,
    *,
    seed: int,
    patient: int,
    image: int,
    prevalence: Mapping[str, float] | None = None,
    conspicuity: float = 1.0,
    planted: Planted = Planted(),
) -> Case:
    """Draw the parameters of one image. Every part has a random stream of its own."""
    prevalence = prevalence or view.prevalence
    plain = _anatomy(seed, patient)
    positive, looks = view.assign(prevalence, _rng(seed, patient, 0, _LABELS), _rng(seed, patient, image + 1, _LABELS))
    rng = _rng(seed, patient, image + 1, _IMAGE)
    frame, exposure = sample_frame(rng, plain), sample_exposure(rng)
    anatomy = enlarge(plain, looks, _rng(seed, patient, 0, _FINDING), conspicuity)
    order = list(MAKERS)
    findings: list[Finding] = []
    for look in looks:
        if look in MAKERS:
            when = 0 if look in view.chronic else image + 1
            findings += MAKERS[look](look, _rng(seed, patient, when, _FINDING, order.index(look)), anatomy)
    frame, marker = _plant(planted, positive, frame, _rng(seed, patient, image + 1, _PLANTED))
    noise = (seed, patient, image + 1, _NOISE)
    return Case(view.labels, positive, anatomy, plain, frame, exposure, tuple(findings), marker, conspicuity, noise)


def _plant(
    planted: Planted, positive: tuple[str, ...], frame: Frame, rng: np.random.Generator
) -> tuple[Frame, Marker | None]:
    chance = rng.random(3)
    where, letter, height, lead, border, upright, zoom = rng.random(7)

    def wanted(switch: Switch, value: float) -> bool:
        if switch is None:
            return False
        label, rate, without = switch
        return value < (rate if label is None or label in positive else without)

    if wanted(planted.crop, chance[2]):
        frame = frame.zoomed(0.72 + 0.08 * zoom)
    if wanted(planted.dark_borders, chance[1]):
        band = 0.06 + 0.08 * border
        frame = replace(frame, border=(band, 0.0) if upright < 0.5 else (0.0, band))
    if not wanted(planted.marker, chance[0]):
        return frame, None
    height = 0.08 + 0.03 * height
    left = letter < 0.5
    u = frame.border[0] + 0.03 + 0.05 * where
    marker = Marker(
        "R" if left else "L",
        u if left else 1 - u - height * 5 / 7,
        frame.border[1] + 0.04 + 0.06 * where,
        height,
        0.4 + 0.5 * lead,
    )
    return frame, marker


def draw(case: Case, size: int, noise: bool = True) -> Drawing:
    """Draw a case at ``size`` x ``size`` pixels, with or without quantum noise."""
    step = max(1, -(-_OVERSAMPLE_BELOW // size)) if size < _OVERSAMPLE_BELOW else 1
    side = size * step
    centres = (np.arange(side) + 0.5) / side
    grid = Grid(case.anatomy, case.frame, centres, centres)
    body = draw_body(case.anatomy, grid)
    truth = tuple((finding.label, _show(finding, case, grid, body, step)) for finding in case.findings)
    attenuation = line_integral(body, case.anatomy.lung_density)
    shortcut = _mark(case.marker, attenuation, side)
    rng = _rng(*case.noise) if noise else None
    image = display(attenuation, _tissue(case.plain), case.exposure, grid.pixel, rng)
    if any(case.frame.border):
        blank = _blank(case.frame, centres)
        image[blank] = 0
        shortcut |= blank
    image = np.clip(block_mean(image, step), 0, 1)
    return Drawing(image, truth, block_mean(shortcut, step) > 0, block_mean(attenuation, step))


def _tissue(anatomy: Anatomy) -> tuple[float, float]:
    """Line integrals through lung and through mediastinum, which set the display window whatever is found."""
    return SOFT * (anatomy.wall + anatomy.lung_density * (anatomy.depth - anatomy.wall)), SOFT * anatomy.depth


def _show(finding: Finding, case: Case, grid: Grid, body: Thickness, step: int) -> np.ndarray:
    """Apply a finding to the body; returns its true region at the final size, bool ``[size, size]``."""
    side = len(grid.u)
    rows, columns = window = grid.window(finding.bounds)
    true = np.zeros((side, side), dtype=bool)
    if rows.stop > rows.start and columns.stop > columns.start:
        true[window] = apply(finding, case.anatomy, grid[window], body[window], case.conspicuity) >= EDGE
    if any(case.frame.border):
        true &= ~_blank(case.frame, grid.u)
    return true if step == 1 else _coarser(true, step, finding.thin)


def _coarser(true: np.ndarray, step: int, thin: bool) -> np.ndarray:
    """A mask on blocks of ``step`` x ``step`` pixels: where more than half is true or, if thin, any is.

    The middle of a block that is kept lies within the bounding box of the true pixels, and one block always is.
    """
    side = len(true) // step
    coarse = block_mean(true, step) > (0.0 if thin else 0.5)
    if not coarse.any() and not true.any():
        return coarse
    middles = (np.arange(side) + 0.5) * step - 0.5
    spans = []
    for axis in (1, 0):
        where = np.flatnonzero(true.any(axis=axis))
        inside = (where[0] <= middles) & (middles <= where[-1])
        if not inside.any():
            inside[(where[0] + where[-1] + 1) // 2 // step] = True
        spans.append(inside)
    kept = coarse & spans[0][:, None] & spans[1][None, :]
    return kept if kept.any() else _middle(spans)


def _middle(spans: list[np.ndarray]) -> np.ndarray:
    """The middle one of the blocks in two spans, as a mask."""
    rows, columns = (np.flatnonzero(span) for span in spans)
    mask = np.zeros((len(spans[0]), len(spans[1])), dtype=bool)
    mask[rows[len(rows) // 2], columns[len(columns) // 2]] = True
    return mask


def _mark(marker: Marker | None, attenuation: np.ndarray, side: int) -> np.ndarray:
    """Add a lead letter to the line integrals; returns where, bool ``[side, side]``."""
    mask = np.zeros((side, side), dtype=bool)
    if marker is None:
        return mask
    dots = np.array([[dot == "#" for dot in line] for line in LETTERS[marker.letter]])
    centres = (np.arange(side) + 0.5) / side
    row = np.floor((centres - marker.v) / marker.height * 7).astype(int)
    column = np.floor((centres - marker.u) / marker.height * 7).astype(int)
    rows, columns = np.flatnonzero((row >= 0) & (row < 7)), np.flatnonzero((column >= 0) & (column < 5))
    mask[np.ix_(rows, columns)] = dots[np.ix_(row[rows], column[columns])]
    attenuation += mask * np.float32(marker.lead * 8)
    return mask


def _blank(frame: Frame, centres: np.ndarray) -> np.ndarray:
    """Pixels outside the exposed film."""
    u, v = (np.abs(centres - 0.5) > 0.5 - border for border in frame.border)
    return v[:, None] | u[None, :]
