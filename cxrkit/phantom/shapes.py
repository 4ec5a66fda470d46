"""Shapes of findings: functions of position in the body, 1 where a change is full and 0 outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from cxrkit.phantom.anatomy import Anatomy, Ellipse, Grid
from cxrkit.phantom.texture import cloud

__all__ = ["SHAPES", "Box", "around"]

Box = tuple[float, float, float, float]
Shape = Callable[[Mapping, Anatomy, Grid], np.ndarray]
SHAPES: dict[str, Shape] = {}


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds them all."""
    corners = np.array(list(boxes))
    return (*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0))


def _shape(function: Shape) -> Shape:
    SHAPES[function.__name__.strip("_")] = function
    return function


def _in_lung(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """1 in the lung of side ``at["side"]``."""
    return np.clip(_into_lung(grid) * 4, 0, 1) * grid.on(at["side"])


def _into_lung(grid: Grid) -> np.ndarray:
    """Distance in cm from the nearest edge of the lung, negative outside."""
    from_wall, from_middle, above = grid.edges
    return np.minimum(np.minimum(from_wall, from_middle), above)


@_shape
def _blob(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A patch of lung with an uneven, soft edge; ``fissure`` cuts it off along a line (X, Y, slope, sign)."""
    wobble = 0.27 * cloud(grid.x * 0.7, grid.y * 0.7, at["offset"])
    shape = np.clip((at["ellipse"].inside(grid) + wobble) * np.float32(1 / at["soft"]), 0, 1)
    if at.get("fissure"):
        x, y, slope, sign = at["fissure"]
        shape *= np.clip((grid.y - y - slope * (grid.x - x)) * (sign / 0.25), 0, 1)
    return shape * _in_lung(at, anatomy, grid)


@_shape
def _ball(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """The chord through an ellipsoid, lobed a little."""
    lobes = at["lobed"] * cloud(grid.x, grid.y, at["offset"]) if at["lobed"] else 0.0
    return np.sqrt(np.clip(at["ellipse"].inside(grid) + lobes, 0, 1))


@_shape
def _specks(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A cluster of small balls."""
    return np.sqrt(np.clip(np.maximum.reduce([speck.inside(grid) for speck in at["specks"]]), 0, 1))


@_shape
def _meniscus(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Fluid in the lower chest, its level climbing toward the wall."""
    edges = grid.edges
    far = np.clip(edges[0] * np.float32(1 / 7.0), 0, 1)
    level = at["top"] + at["dip"] * (2 - far) * far
    inside = np.minimum(np.minimum(edges[0], edges[1]), edges[2] + 3.0) * 4
    fluid = np.clip((grid.y - level) * np.float32(1 / 1.4), 0, 1)
    return fluid * np.clip(inside, 0, 1) * grid.on(at["side"])


def _beyond(at: Mapping, grid: Grid) -> np.ndarray:
    """Distance in cm outward of a curve within the lung, given by the tables ``outer`` and ``inner`` over Y."""
    return np.maximum(grid.across - at["outer"].take(grid.row), at["inner"].take(grid.row) - grid.across)


def _within(at: Mapping, grid: Grid) -> np.ndarray:
    """Positive between the two heights ``ends``."""
    top, bottom = at["ends"]
    return np.minimum(grid.y - top, bottom - grid.y) * 1.5


@_shape
def _rim(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Between the chest wall and a curve within the lung."""
    near = np.minimum(_into_lung(grid) * 4, _beyond(at, grid) * (1 / at["soft"]))
    near = np.minimum(near, _within(at, grid))
    return np.clip(near, 0, 1) * grid.on(at["side"])


@_shape
def _lining(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """The thin line at the inner edge of a rim: the pleura of a collapsed lung."""
    line = np.maximum(1 - np.abs(_beyond(at, grid)) * 5, 0) * np.clip(
        np.minimum(_into_lung(grid) * 4 - 1, _within(at, grid)), 0, 1
    )
    return line * grid.on(at["side"])


@_shape
def _zone(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A part of one lung between ``top`` and ``bottom``; ``rind`` > 0 keeps to within so many cm of the wall and
    the diaphragm, ``core`` > 0 to within so many cm of the hilum."""
    edges = grid.edges
    shape = np.clip((grid.y - at["top"]) * 0.45, 0, 1) * np.clip((at["bottom"] - grid.y) * 0.45, 0, 1)
    if at.get("rind"):
        wall, floor = np.maximum(edges[0], 0.01), np.maximum(edges[2], 0.01)
        shape *= np.clip((at["rind"] - 1.6 * wall * floor / (wall + floor)) * 0.6, 0, 1)
    if at.get("core"):
        shape *= np.clip((at["core"] - edges[1]) * np.float32(0.5), 0, 1)
    return shape * np.clip(_into_lung(grid) * 4, 0, 1) * grid.on(at["side"])


@_shape
def _plate(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A band about a line from ``start``, ``length`` cm along ``angle``; wedge-shaped when ``wedge`` > 0."""
    dx, dy = grid.x - np.float32(at["start"][0]), grid.y - np.float32(at["start"][1])
    along = dx * np.float32(np.cos(at["angle"])) + dy * np.float32(np.sin(at["angle"]))
    beside = dy * np.float32(np.cos(at["angle"])) - dx * np.float32(np.sin(at["angle"]))
    beside += 0.2 * cloud(grid.x, grid.y, anatomy.texture)
    half = at["half"] + at["wedge"] * np.clip(1 - along / at["length"], 0, 1)
    ends = np.minimum(along, at["length"] - along)
    near = np.minimum((half - np.abs(beside)) * 2.2, ends * 1.5)
    return np.clip(near, 0, 1) * _in_lung(at, anatomy, grid)


@_shape
def _raised(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Between the diaphragm and a copy of it ``lift`` cm higher."""
    edges = grid.edges
    inward = np.clip(np.minimum(edges[0], edges[1]) * 0.2, 0, 1)
    up = at["lift"] * inward * (2 - inward)
    inside = np.minimum(np.minimum(edges[0], edges[1]), edges[2] + 1.0)
    near = np.minimum((up - edges[2]) * 3, inside * 4)
    return np.clip(near, 0, 1) * grid.on(at["side"])


@_shape
def _heart(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """The silhouette of the heart, down to the diaphragm."""
    inside = np.maximum.reduce([ellipse.inside(grid) for ellipse in anatomy.heart])
    return np.sqrt(np.clip(inside, 0, 1)) * np.clip(grid.edges[2] + 1.5, 0, 1)


@_shape
def _aorta(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """The silhouette of the aortic knob and of the uppermost descending aorta."""
    knob = anatomy.knob
    down = Ellipse(knob.x + 0.1 * knob.a, knob.y + 0.9 * knob.b, 0.9 * knob.a, 1.4 * knob.b)
    return np.sqrt(np.clip(np.maximum(knob.inside(grid), down.inside(grid)), 0, 1))


@_shape
def _slab(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A flat object with a rounded outline, such as a coin or a pacemaker."""
    return np.clip(at["ellipse"].inside(grid) * 6, 0, 1)


@_shape
def _ring(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A flat ring."""
    inside = at["ellipse"].inside(grid)
    return np.clip(np.minimum(inside, at["hole"] - inside) * 6, 0, 1)


@_shape
def _line(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """A tube or wire of radius ``radius`` along ``points``."""
    nearest = None
    for (x0, y0), (x1, y1) in zip(at["points"][:-1], at["points"][1:], strict=True):
        dx, dy = x1 - x0, y1 - y0
        length = dx * dx + dy * dy
        px, py = grid.x - np.float32(x0), grid.y - np.float32(y0)
        t = np.clip((px * np.float32(dx / length)) + py * np.float32(dy / length), 0, 1)
        px, py = px - t * np.float32(dx), py - t * np.float32(dy)
        distance = px * px + py * py
        nearest = distance if nearest is None else np.minimum(nearest, distance)
    return np.sqrt(np.clip(1 - nearest * np.float32(1 / at["radius"] ** 2), 0, 1))


@_shape
def _ripple(at: Mapping, anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Stripes ``period`` cm apart within an ellipse, never down to 0, so that the whole inside is changed."""
    along = grid.x * np.float32(np.cos(at["angle"])) + grid.y * np.float32(np.sin(at["angle"]))
    stripes = np.float32(0.6) + np.float32(0.4) * np.cos(along * np.float32(2 * np.pi / at["period"]))
    return np.clip(at["ellipse"].inside(grid) * 4, 0, 1) * stripes
