"""Bones as centimetres of cortical bone along each ray: ribs, spine, collar bones, shoulder blades, arms."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cxrkit.phantom.anatomy import PER_CM, ROWS, START, Anatomy, Ellipse, Grid

__all__ = ["draw_bone"]

_PER_RIB = 128  # table entries from one rib to the next
_RIBS = 16


def draw_bone(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Bone in cm, float32 ``[H, W]``."""
    bone = _ribs(anatomy, grid)
    strip = grid.window((-3.4, -9, 3.4, 60))
    bone[strip] += _spine(anatomy, grid[strip])
    upper = grid.window((-40, -9, 40, anatomy.apex[0] + 4.5))
    bone[upper] += _collar_bones(anatomy, grid[upper])
    _shoulders(anatomy, grid, bone)
    bone *= anatomy.bone
    return bone


def _rod(t: np.ndarray, hollow: float = 0.8) -> np.ndarray:
    """Chord through a hollow rod, for ``t`` from -1 to 1 across it; marrow counts for a fifth."""
    square = t * t
    return np.sqrt(np.maximum(1 - square, 0)) - 0.8 * np.sqrt(np.maximum(hollow**2 - square, 0))


@lru_cache(maxsize=2)
def _rib_table(front: bool) -> np.ndarray:
    """Bone met by a ray over the running number of ribs."""
    rng = np.random.default_rng(53 + front)
    ribs = np.zeros((_RIBS, _PER_RIB))
    t = (np.arange(_PER_RIB) + 0.5) / _PER_RIB * 2 - 1
    for rib in range(1, 13):
        half = rng.uniform(0.5, 0.6) if front else rng.uniform(0.44, 0.52)
        # The upper rim of a rib is thick and round, the lower one thin.
        ribs[rib] = _rod(t / half) * rng.uniform(0.9, 1.1) * (1.2 - 0.3 * (t / half).clip(-1, 1))
    return ribs.astype(np.float32).ravel()


def _ribs(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Each rib is a tilted ring about the chest, which projects to an ellipse: its back and its front arc."""
    outer = anatomy.lung_outline[0].take(grid.row + grid.offset) + 0.6
    u = np.minimum(grid.across / outer, 1)
    w = np.sqrt(1 - u * u)
    drop, per = anatomy.rib_drop, _PER_RIB / anatomy.rib_spacing
    down = (grid.y - (anatomy.apex[0] - 2.6)) * per
    back = down - drop * per + (drop * per) * w + (2.4 * per) * u * (1 - u)
    front = down - drop * per - ((drop + 2.0) * per) * w
    last = _RIBS * _PER_RIB - 1
    behind = _rib_table(False).take(np.clip(back, 0, last).astype(np.int32))
    before = _rib_table(True).take(np.clip(front, 0, last).astype(np.int32))
    # At the side a rib runs along the ray, which then meets more of it; in front it ends in cartilage.
    slant = 1 / (w + 0.3)
    behind *= np.clip(u * 12 - 1.8, 0, 1) * slant
    before *= np.clip(u * 4 - 1.7, 0, 1) * slant
    return (0.62 * behind + 0.42 * before) * np.clip((1 - u) * 22, 0, 1)


def _spine(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Vertebral bodies, discs, pedicles and spinous processes in a strip about the midline."""
    y = (grid.y - START) * (1 / (0.95 * anatomy.rib_spacing))
    t = (y - np.floor(y)) * 2 - 1
    x = grid.x * (1 / 1.75)
    across = np.abs(x)
    body = np.clip((0.8 - np.abs(t)) * 5, 0, 1)
    square = x * x
    column = np.sqrt(np.maximum(1 - square * square, 0))
    bone = column * (0.4 + 0.18 * body)
    ring = ((across - 0.6) * 3.6) ** 2 + ((t + 0.2) * 2.1) ** 2
    bone += 0.15 * np.maximum(1 - np.abs(ring - 0.8), 0)
    bone += 0.3 * np.maximum(1 - square * 14 - ((t - 0.45) * 1.6) ** 2, 0)
    # Transverse processes reach beyond the body.
    return bone + 0.22 * np.maximum(1 - (across - 1.2) ** 2 * 3.5 - ((t + 0.3) * 2.4) ** 2, 0)


def _collar_bones(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    x = (np.arange(ROWS) + 0.5) / PER_CM
    heights = np.array([3.4, 3.2, 2.4, 1.1, -0.2, -0.8, -0.6]) + anatomy.collar
    curve = np.interp(x, [0, 2, 5, 9, 13, 17, 20], anatomy.apex[0] + heights).astype(np.float32)
    ends = np.clip(np.minimum(grid.across - 1.6, anatomy.half_width + 1.5 - grid.across) * 1.6, 0, 1)
    return 1.1 * ends * _rod((grid.y - curve.take(grid.column)) * (1 / 0.75))


def _shoulders(anatomy: Anatomy, grid: Grid, bone: np.ndarray) -> None:
    """Shoulder blades, heads and shafts of the arm bones, added to ``bone``."""
    apex, wall = anatomy.apex[0], anatomy.half_width
    for side in (-1, 1):
        blade = Ellipse(side * (wall - 1.6), apex + 7.0, 2.9, 7.4, side * -0.28)
        window, inside = blade.stamp(grid, 1.1)
        # A plate with a thick rim.
        bone[window] += 0.22 * np.clip(inside * 9, 0, 1) + 0.25 * np.maximum(1 - np.abs(inside - 0.1) * 8, 0)
        window, inside = Ellipse(side * (wall + 2.8), apex + 3.6, 2.4, 2.3).stamp(grid, 1.15)
        bone[window] += 1.1 * np.sqrt(np.clip(inside, 0, 1)) + 0.4 * np.maximum(1 - np.abs(inside) * 6, 0)
        x0, x1 = sorted((side * (wall + 0.5), side * (wall + 9)))
        window = grid.window((x0, apex + 4.5, x1, 60))
        part = grid[window]
        shaft = part.across - (wall + 3.5) - anatomy.arms * (part.y - (apex + 6))
        bone[window] += 1.5 * _rod(shaft * 0.85) * np.clip((part.y - (apex + 4.8)) * 0.7, 0, 1)
