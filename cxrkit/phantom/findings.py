"""Findings as changes of thickness: where each lies, what it does to the rays, and its exact region.

A finding is one or more parts. A part has a shape, a function of position that is 0 outside and 1 where the
change is full, and an effect. The true region is where the shape reaches ``EDGE``; the box bounds it.
Nothing outside the shape is touched. All of it is synthetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cxrkit.phantom.anatomy import Anatomy, Frame, Grid
from cxrkit.phantom.body import Thickness
from cxrkit.phantom.shapes import SHAPES, Box, around
from cxrkit.phantom.texture import cloud, net, vessels

__all__ = ["EDGE", "FRAME", "Finding", "Part", "apply", "finding_box", "finding_shape"]

EDGE = 0.15  # a pixel is true where at least this share of the full change is there
FRAME = 1024  # side of the nominal frame of the boxes, pixels
_BOX_GRID = 128


@dataclass(frozen=True)
class Part:
    """``shape``: a name in SHAPES with its parameters ``at``; ``bounds``: x0, y0, x1, y1 in cm that hold it.

    ``effect``: "fill" turns ``amount`` of the aerated path to soft tissue, "empty" takes the lung away, "soft",
    "bone", "metal" and "air" add or take ``amount`` cm, "none" marks a change of the anatomy itself.
    """

    shape: str
    at: Mapping
    bounds: Box
    effect: str
    amount: float = 0.0
    texture: str = "plain"


@dataclass(frozen=True)
class Finding:
    """One finding, one box: its label and its parts."""

    label: str
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def thin(self) -> bool:
        """Whether it may be narrower than a pixel, so that its truth keeps every pixel it touches."""
        return any(part.shape in ("line", "specks", "ring") for part in self.parts)

    @property
    def bounds(self) -> Box:
        """x0, y0, x1, y1 in cm around all parts."""
        return around(part.bounds for part in self.parts)


def finding_shape(finding: Finding, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Share of the full change at each pixel of a grid, the largest of the parts: float32 in [0, 1]."""
    shapes = [SHAPES[part.shape](part.at, anatomy, grid) for part in finding.parts]
    return shapes[0] if len(shapes) == 1 else np.maximum.reduce(shapes)


def apply(finding: Finding, anatomy: Anatomy, grid: Grid, body: Thickness, strength: float) -> np.ndarray:
    """Change the thickness maps (in place) as the finding does; returns its shape on the grid."""
    whole = None
    for part in finding.parts:
        shape = SHAPES[part.shape](part.at, anatomy, grid)
        if strength > 0:
            _EFFECTS[part.effect](part, shape, anatomy, grid, body, strength)
        whole = shape if whole is None else np.maximum(whole, shape)
    return whole


def _texture(part: Part, anatomy: Anatomy, grid: Grid) -> np.ndarray | float:
    """Relative density within a finding, about 1."""
    offset = anatomy.texture
    if part.texture == "cloudy":
        return np.clip(1 + 0.28 * cloud(grid.x * 2, grid.y * 2, offset), 0.35, 1.6)
    if part.texture == "bronchi":
        airways = vessels(grid.across - 2.4, grid.y - np.float32(anatomy.apex[0] + 10.8), anatomy.tree + 1, grid.pixel)
        return np.clip(1 + 0.1 * cloud(grid.x * 2, grid.y * 2, offset) - 0.6 * airways, 0.45, 1.3)
    if part.texture in ("fine", "coarse"):
        return 0.45 + 0.55 * net(grid.x, grid.y, offset, part.texture, grid.pixel)
    return 1.0


def _fill(part: Part, shape: np.ndarray, anatomy: Anatomy, grid: Grid, body: Thickness, strength: float) -> None:
    share = np.clip(shape * _texture(part, anatomy, grid) * np.float32(part.amount * strength), 0, 1)
    filled = body.lung * share
    body.soft += filled
    body.lung -= filled
    body.vessel *= 1 - share


def _empty(part: Part, shape: np.ndarray, anatomy: Anatomy, grid: Grid, body: Thickness, strength: float) -> None:
    left = 1 - np.clip(shape * np.float32(part.amount * strength), 0, 1)
    body.lung *= left
    body.vessel *= left


def _adds(material: str, sign: float) -> Callable:
    def effect(part: Part, shape: np.ndarray, anatomy: Anatomy, grid: Grid, body: Thickness, strength: float) -> None:
        values = getattr(body, material)
        values += shape * np.float32(sign * part.amount * strength)
        np.maximum(values, 0, out=values)

    return effect


def _none(*_) -> None:
    """The anatomy itself is changed before it is drawn."""


_EFFECTS = {
    "fill": _fill,
    "empty": _empty,
    "soft": _adds("soft", 1),
    "air": _adds("soft", -1),
    "bone": _adds("bone", 1),
    "metal": _adds("metal", 1),
    "none": _none,
}


def finding_box(finding: Finding, anatomy: Anatomy, frame: Frame) -> tuple[int, int, int, int] | None:
    """Bounding box of the true region in the nominal frame, half-open; None when it is outside the image.

    The shape is drawn on a coarse grid and its edge found between the grid's points by linear interpolation.
    """
    u0, v0, u1, v1 = frame.window(finding.bounds)
    if u1 - u0 < 1e-3 or v1 - v0 < 1e-3:
        return None
    u = np.linspace(u0, u1, _BOX_GRID)
    v = np.linspace(v0, v1, _BOX_GRID)
    shape = finding_shape(finding, anatomy, Grid(anatomy, frame, u, v))
    if shape.max() < EDGE:
        return None
    left, right = _crossing(shape.max(axis=0), u)
    top, bottom = _crossing(shape.max(axis=1), v)
    edges = np.array([left, top, right, bottom]) * FRAME
    low, high = np.floor(edges[:2] + 1e-6), np.ceil(edges[2:] - 1e-6)
    return (*low.astype(int).tolist(), *high.astype(int).tolist())


def _crossing(profile: np.ndarray, position: np.ndarray) -> tuple[float, float]:
    """First and last position where the profile reaches EDGE."""
    over = np.flatnonzero(profile >= EDGE)
    ends = []
    for index, neighbour in ((over[0], over[0] - 1), (over[-1], over[-1] + 1)):
        if not 0 <= neighbour < len(profile):
            ends.append(position[index])
            continue
        rise = (profile[index] - EDGE) / max(profile[index] - profile[neighbour], 1e-6)
        ends.append(position[index] + rise * (position[neighbour] - position[index]))
    return float(ends[0]), float(ends[1])
