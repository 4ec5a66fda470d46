"""Radiopaque objects that lie on a patient: coins, buttons, a necklace, a safety pin, a zip; and how wires run."""

from __future__ import annotations

import numpy as np

from cxrkit.phantom.anatomy import Anatomy, Ellipse
from cxrkit.phantom.findings import Finding, Part
from cxrkit.phantom.shapes import around

__all__ = ["curve", "foreign_objects", "wire"]

Point = tuple[float, float]


def curve(points: list[Point]) -> list[Point]:
    """The line through the points with its corners cut twice (Chaikin's algorithm)."""
    line = np.array(points)
    for _ in range(2):
        cut = np.stack([0.75 * line[:-1] + 0.25 * line[1:], 0.25 * line[:-1] + 0.75 * line[1:]], axis=1)
        line = np.concatenate([line[:1], cut.reshape(-1, 2)[1:-1], line[-1:]])
    return [tuple(point) for point in line.tolist()]


def wire(points: list[Point], radius: float, amount: float) -> Part:
    """A metal wire or tube along the points: cm, cm and cm of metal."""
    corners = np.array(points)
    bounds = (*(corners.min(axis=0) - radius), *(corners.max(axis=0) + radius))
    return Part("line", {"points": points, "radius": radius}, bounds, "metal", amount)


def foreign_objects(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """One kind of object, one finding for each object of it."""
    kind = (_coins, _buttons, _necklace, _pin, _zip)[rng.integers(0, 5)]
    return [Finding(label, parts) for parts in kind(rng, anatomy)]


def _disc(x: float, y: float, radius: float, amount: float) -> Part:
    ellipse = Ellipse(x, y, radius, radius, 0.0)
    return Part("slab", {"ellipse": ellipse}, ellipse.bounds(), "metal", amount)


def _beads(points: np.ndarray, radius: float, amount: float) -> Part:
    beads = [Ellipse(x, y, radius, radius, 0.0) for x, y in points.tolist()]
    return Part("specks", {"specks": beads}, around(bead.bounds() for bead in beads), "metal", amount)


def _somewhere(rng: np.random.Generator, anatomy: Anatomy) -> Point:
    return anatomy.place(int(rng.integers(0, 2)), rng.uniform(0.1, 0.9), rng.uniform(0.15, 0.9))


def _coins(rng: np.random.Generator, anatomy: Anatomy) -> list[tuple[Part, ...]]:
    return [(_disc(*_somewhere(rng, anatomy), rng.uniform(0.95, 1.35), 0.7),) for _ in range(rng.integers(1, 4))]


def _buttons(rng: np.random.Generator, anatomy: Anatomy) -> list[tuple[Part, ...]]:
    """A row down the front, evenly spaced."""
    x, top, lean = rng.normal(0, 1.5), anatomy.apex[0] + rng.uniform(1, 4), rng.normal(0, 0.03)
    gap, radius = rng.uniform(4.5, 7.0), rng.uniform(0.6, 0.85)
    return [(_disc(x + lean * gap * index, top + gap * index, radius, 0.6),) for index in range(rng.integers(2, 5))]


def _necklace(rng: np.random.Generator, anatomy: Anatomy) -> list[tuple[Part, ...]]:
    """A chain of beads that hangs in a parabola, now and then with a pendant."""
    top, half = anatomy.apex[0] - rng.uniform(0.5, 1.5), rng.uniform(4.5, 6.5)
    drop = rng.uniform(5.0, 9.0)
    along = np.linspace(-1, 1, 25)
    points = np.stack([half * along, top + drop * (1 - along**2)], axis=1)
    chain = _beads(points, rng.uniform(0.3, 0.4), 0.6)
    return [(chain, _disc(0.0, top + drop + 0.8, rng.uniform(0.7, 1.0), 0.6)) if rng.random() < 0.5 else (chain,)]


def _pin(rng: np.random.Generator, anatomy: Anatomy) -> list[tuple[Part, ...]]:
    """Two arms of wire that meet in a coil, and the clasp over their other ends."""
    x, y = _somewhere(rng, anatomy)
    angle, length, spread = rng.uniform(0, 2 * np.pi), rng.uniform(3.0, 4.5), rng.uniform(0.35, 0.55)
    ahead = np.array([np.cos(angle), np.sin(angle)])
    aside = np.array([-ahead[1], ahead[0]])
    corners = np.array([ahead * length / 2 + aside * spread, -ahead * length / 2, ahead * length / 2 - aside * spread])
    tips = [tuple(point) for point in (corners + np.array([x, y])).tolist()]
    return [(wire(tips, 0.2, 0.6), wire([tips[0], tips[2]], 0.35, 0.6))]


def _zip(rng: np.random.Generator, anatomy: Anatomy) -> list[tuple[Part, ...]]:
    """Two rows of teeth down the front, with the slider at their upper end."""
    x, top = rng.normal(0, 0.8), anatomy.apex[0] + rng.uniform(0, 4)
    teeth = np.arange(int(rng.integers(18, 30)))
    points = np.stack([x + 0.25 * (2 * (teeth % 2) - 1), top + 0.55 * teeth], axis=1)
    return [(_beads(points, 0.3, 0.6), _disc(x, top - 0.4, rng.uniform(0.6, 0.8), 0.6))]
