"""One synthetic patient: sizes in centimetres, the outline of the lungs, and where the camera stands.

Coordinates: X runs across the body from the midline (positive: the patient's left, on the right of the
image), Y runs down from the top of the film; both in cm. Side 0 is the patient's right, side 1 the left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

__all__ = ["Anatomy", "Ellipse", "Frame", "Grid", "sample_anatomy", "sample_frame"]

ROWS = 1024  # entries of a table over Y or |X|
SPAN = 51.2  # cm that a table covers
START = -3.0  # cm, the first entry's Y
PER_CM = ROWS / SPAN


@dataclass(frozen=True)
class Frame:
    """Where image coordinates (u, v in [0, 1]) fall in the body: centre and extent in cm, rotation in radians.

    ``border``: share of the width and of the height that is blank at either side (left-right, top-bottom).
    """

    x: float
    y: float
    width: float
    height: float
    rotation: float
    border: tuple[float, float] = (0.0, 0.0)

    def to_body(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image coordinates to X and Y in cm."""
        u = ((u - 0.5) / (1 - 2 * self.border[0])) * self.width
        v = ((v - 0.5) / (1 - 2 * self.border[1])) * self.height
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        return self.x + cos * u - sin * v, self.y + sin * u + cos * v

    def zoomed(self, factor: float) -> Frame:
        """The same centre with ``factor`` times the extent: below 1 is a tight crop."""
        return replace(self, width=self.width * factor, height=self.height * factor)

    def window(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Image bounds (u0, v0, u1, v1) of a box (x0, y0, x1, y1) in cm, clipped to the exposed film."""
        x, y = (box[0] + box[2]) / 2 - self.x, (box[1] + box[3]) / 2 - self.y
        half_x, half_y = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        bounds = []
        for middle, half, extent, border in (
            (cos * x + sin * y, abs(cos) * half_x + abs(sin) * half_y, self.width, self.border[0]),
            (cos * y - sin * x, abs(sin) * half_x + abs(cos) * half_y, self.height, self.border[1]),
        ):
            scale = (1 - 2 * border) / extent
            bounds += [min(max(0.5 + scale * (middle + way * half), border), 1 - border) for way in (-1, 1)]
        return bounds[0], bounds[2], bounds[1], bounds[3]


class Grid:
    """Positions in cm of a block of pixels, with what many structures ask for: |X|, side, table rows, edges."""

    def __init__(self, anatomy: Anatomy, frame: Frame, u: np.ndarray, v: np.ndarray):
        self.anatomy, self.frame, self.u, self.v = anatomy, frame, u, v
        x, y = frame.to_body(u[None, :], v[:, None])
        self.x = x.astype(np.float32)
        self.y = y.astype(np.float32)
        self.pixel = float(frame.width / (1 - 2 * frame.border[0]) * (u[1] - u[0]))

    @cached_property
    def across(self) -> np.ndarray:
        return np.abs(self.x)

    @cached_property
    def offset(self) -> np.ndarray:
        """First table entry of each pixel's side: tables hold the right side, then the left."""
        return (self.x > 0).astype(np.int32) << 10

    @cached_property
    def row(self) -> np.ndarray:
        """Entry of each pixel's Y in the tables of one side."""
        return np.clip((self.y - START) * PER_CM, 0, ROWS - 1).astype(np.int32)

    @cached_property
    def column(self) -> np.ndarray:
        """Entry of each pixel's |X| in the tables of one side."""
        return np.minimum(self.across * PER_CM, ROWS - 1).astype(np.int32)

    @cached_property
    def edges(self) -> np.ndarray:
        """Distances in cm into the lung from the chest wall, the mediastinum and the diaphragm: ``[3, H, W]``."""
        outer, inner = self.anatomy.lung_outline
        row = self.row + self.offset
        above = self.anatomy.diaphragm.take(self.column + self.offset)
        return np.stack([outer.take(row) - self.across, self.across - inner.take(row), above - self.y])

    def on(self, side: int) -> np.ndarray:
        """Pixels of the patient's right (0) or left (1)."""
        return self.x > 0 if side else self.x <= 0

    def window(self, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        """The pixels that hold a box (x0, y0, x1, y1) given in cm, with one to spare."""
        u0, v0, u1, v1 = self.frame.window(box)
        return _span(self.v, v0, v1), _span(self.u, u0, u1)

    def __getitem__(self, window: tuple[slice, slice]) -> Grid:
        """A block of the same grid, sharing what has been worked out."""
        part = object.__new__(Grid)
        rows, columns = window
        part.anatomy, part.frame, part.pixel = self.anatomy, self.frame, self.pixel
        part.u, part.v = self.u[columns], self.v[rows]
        for name in ("x", "y", "across", "offset", "row", "column", "edges"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][..., rows, columns]
        return part


def _span(positions: np.ndarray, low: float, high: float) -> slice:
    """Entries of an even row of positions between two bounds, with one to spare at either end."""
    first, step = float(positions[0]), float(positions[1] - positions[0])
    return slice(max(0, int((low - first) / step) - 1), max(0, min(len(positions), int((high - first) / step) + 3)))


@dataclass(frozen=True)
class Ellipse:
    """Centre, half-axes and rotation, in cm and radians."""

    x: float
    y: float
    a: float
    b: float
    rotation: float = 0.0

    def inside(self, grid: Grid) -> np.ndarray:
        """1 at the centre, 0 on the rim, negative outside."""
        dx, dy = grid.x - float(self.x), grid.y - float(self.y)
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        along = dx * float(cos / self.a) + dy * float(sin / self.a)
        beside = dy * float(cos / self.b) - dx * float(sin / self.b)
        return 1 - along * along - beside * beside

    def stamp(self, grid: Grid, extent: float = 1.0) -> tuple[tuple[slice, slice], np.ndarray]:
        """The window of a grid that holds the ellipse (``extent`` times as large), and ``inside`` there."""
        window = grid.window(replace(self, a=self.a * extent, b=self.b * extent).bounds())
        return window, self.inside(grid[window])

    def bounds(self) -> tuple[float, float, float, float]:
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        dx, dy = math.hypot(self.a * cos, self.b * sin), math.hypot(self.a * sin, self.b * cos)
        return self.x - dx, self.y - dy, self.x + dx, self.y + dy


@dataclass(frozen=True)
class Anatomy:
    """A patient's sizes in cm; all tables follow from them."""

    apex: tuple[float, float]  # Y of the lung apices, right and left
    outer: tuple[float, float]  # largest |X| of the lungs
    inner: tuple[float, float]  # |X| of the mediastinal edges
    dome: tuple[float, float]  # Y of the diaphragm's domes
    depth: float  # front to back, at the chest
    wall: float  # chest wall, front and back together
    half_width: float  # of the trunk
    heart: tuple[Ellipse, ...]  # ventricle, right atrium, outflow
    heart_depth: float
    knob: Ellipse  # aortic knob
    breast: float  # thickness in cm, 0 for none
    lung_density: float
    rib_spacing: float
    rib_drop: float
    shoulder: float  # Y where the shoulder line ends
    arms: float  # how far the arms lead away from the trunk, cm per cm
    collar: float  # how high the collar bones lie
    bone: float  # mineral content relative to the average
    texture: tuple[float, float]  # offset into the banks of texture, cm
    tree: int  # which vessel trees
    gas: tuple[Ellipse, ...]  # stomach and bowel

    @cached_property
    def lung_outline(self) -> tuple[np.ndarray, np.ndarray]:
        """Tables of the lungs' outer and inner |X| over Y, right side then left: two float32 ``[2 * ROWS]``."""
        y = START + (np.arange(ROWS) + 0.5) / PER_CM
        outer, inner = [], []
        for side in (0, 1):
            top, widest = self.apex[side], self.apex[side] + 19.5
            crown = 0.39 * self.outer[side]
            rise = np.clip((widest - y) / (widest - top), 0, None)
            arch = np.sqrt(np.clip(1 - rise**2.3, 0, 1))
            taper = 0.012 * np.clip(y - widest, 0, None) ** 2
            outer.append(np.where(rise < 1, crown + (self.outer[side] - crown) * arch - taper, crown))
            rise = np.clip((top + 4.5 - y) / 4.5, 0, 1)
            # The mediastinum is widest at the great vessels and again at the hilum.
            vessels = 0.5 * np.exp(-(((y - top - 3.5) / 2.5) ** 2)) + 0.4 * np.exp(-(((y - top - 10.5) / 2.5) ** 2))
            edge = self.inner[side] + vessels * (1.2 if side == 0 else 0.7)
            inner.append(crown - (crown - edge) * np.sqrt(1 - rise**2))
        return np.concatenate(outer).astype(np.float32), np.concatenate(inner).astype(np.float32)

    @cached_property
    def diaphragm(self) -> np.ndarray:
        """Table of the diaphragm's Y over |X|, right side then left: float32 ``[2 * ROWS]``."""
        x = (np.arange(ROWS) + 0.5) / PER_CM
        tables = []
        for side in (0, 1):
            summit = 0.47 * self.outer[side]
            lateral = 4.4 * (np.clip(x - summit, 0, None) / (self.outer[side] - summit)) ** 2.3
            medial = 1.1 * (np.clip(summit - x, 0, None) / 4.5) ** 2
            tables.append(self.dome[side] + lateral + medial)
        return np.concatenate(tables).astype(np.float32)

    def changed(self, **parts) -> Anatomy:
        """The same patient with another heart or aorta; the lungs' tables are kept."""
        other = replace(self, **parts)
        for table in ("lung_outline", "diaphragm"):
            other.__dict__[table] = getattr(self, table)
        return other

    def place(self, side: int, across: float, down: float) -> tuple[float, float]:
        """X and Y in cm of a point of a lung: ``across`` 0 at the mediastinum, 1 at the wall; ``down`` 0 at the
        apex, 1 at the dome."""
        y = self.apex[side] + down * (self.dome[side] - self.apex[side])
        row = int((y - START) * PER_CM) + side * ROWS
        low, high = self.lung_outline[1][row], self.lung_outline[0][row]
        x = low + across * (high - low)
        return float(x if side else -x), float(y)

    def lung_bounds(self, side: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in cm around one lung."""
        far, bottom = self.outer[side] + 0.2, self.dome[side] + 5.0
        return (0.5, self.apex[side], far, bottom) if side else (-far, self.apex[side], -0.5, bottom)


def sample_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient; every size varies about an adult's average."""
    build = rng.normal(0, 1)  # tall and wide
    weight = rng.normal(0, 1)
    outer = 13.2 + 0.7 * build + rng.normal(0, 0.3)
    apex = 5.2 + rng.normal(0, 0.5)
    height = 21.5 + 1.3 * build - 0.6 * weight + rng.normal(0, 1.0)
    dome = apex + height
    depth = 20.5 + 0.5 * build + 2.0 * weight
    woman = rng.random() < 0.45
    heart = rng.normal(0, 0.25, 6)
    low = dome - 4.4
    ellipses = (
        Ellipse(2.7 + heart[0], low + 1.0, 7.0 + 0.2 * build + heart[1], 4.8 + heart[2], 0.74 - 0.1 * weight),
        Ellipse(-0.9 + 0.5 * heart[3], low + 0.2, 3.4 + heart[4], 5.4, 0.12),
        Ellipse(1.7, low - 4.0, 3.5 + 0.4 * heart[5], 5.0, -0.25),
    )
    bubble = rng.uniform(0.8, 2.8), rng.uniform(0.5, 1.4)
    gas = [Ellipse(6.2 + rng.normal(0, 0.8), dome + 3.4, *bubble, rng.normal(0, 0.2))]
    for _ in range(rng.integers(1, 6)):
        gas.append(
            Ellipse(rng.uniform(-2, 11), dome + rng.uniform(6, 11), *rng.uniform(0.5, 1.5, 2), rng.uniform(0, 3))
        )
    return Anatomy(
        apex=(apex, apex + rng.normal(0.1, 0.2)),
        outer=(outer, outer + rng.normal(-0.1, 0.25)),
        inner=(2.5 + rng.normal(0, 0.2), 2.3 + rng.normal(0, 0.2)),
        dome=(dome - 0.4 + rng.normal(0, 0.3), dome + 0.7 + rng.normal(0, 0.4)),
        depth=float(np.clip(depth, 16.5, 26)),
        wall=float(np.clip(5.0 + 1.2 * weight, 3.2, 8)),
        half_width=outer + 2.6 + float(np.clip(0.9 * weight, -1, 2.4)),
        heart=ellipses,
        heart_depth=float(10.5 + 0.4 * build + 0.3 * weight),
        knob=Ellipse(2.1 + rng.normal(0, 0.15), apex + 7.0 + rng.normal(0, 0.4), 1.75 + rng.normal(0, 0.12), 2.0, 0.0),
        breast=rng.uniform(2.0, 5.0) if woman else 0.0,
        lung_density=float(np.clip(rng.normal(0.27, 0.025), 0.2, 0.34)),
        rib_spacing=2.42 + 0.12 * build + rng.normal(0, 0.06),
        rib_drop=5.4 + rng.normal(0, 0.6),
        shoulder=apex - 0.4 + rng.normal(0, 0.8),
        arms=rng.uniform(0.0, 0.3),
        collar=rng.normal(0, 0.5),
        bone=float(np.clip(rng.normal(1, 0.15), 0.6, 1.4)),
        texture=tuple(rng.uniform(0, 25, 2)),
        tree=int(rng.integers(0, 1000)),
        gas=tuple(gas),
    )


def sample_frame(rng: np.random.Generator, anatomy: Anatomy) -> Frame:
    """Draw how the patient stands before the film: centring, magnification, a slight rotation."""
    extent = 2 * anatomy.half_width * float(np.clip(rng.normal(1.02, 0.07), 0.88, 1.2))
    middle = (anatomy.apex[0] + anatomy.dome[0]) / 2 + 1.2
    return Frame(
        x=rng.normal(0, 0.7),
        y=middle + rng.normal(0, 1.0),
        width=extent,
        height=extent * float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.12)),
        rotation=float(np.clip(rng.normal(0, 0.025), -0.07, 0.07)),
    )
