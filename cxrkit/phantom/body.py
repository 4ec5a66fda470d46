"""The healthy body as thickness maps: how many centimetres of soft tissue, lung, bone and metal a ray meets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cxrkit.phantom.anatomy import PER_CM, ROWS, START, Anatomy, Ellipse, Grid
from cxrkit.phantom.skeleton import draw_bone
from cxrkit.phantom.texture import cloud, vessels

__all__ = ["Thickness", "draw_body"]


@dataclass
class Thickness:
    """Path lengths in cm along each ray, float32 ``[H, W]``: soft tissue, aerated lung, its vessels, cortical
    bone, metal."""

    soft: np.ndarray
    lung: np.ndarray
    vessel: np.ndarray
    bone: np.ndarray
    metal: np.ndarray

    def __getitem__(self, window: tuple[slice, slice]) -> Thickness:
        """Views of a block: writing into them writes into the whole."""
        return Thickness(**{name: values[window] for name, values in vars(self).items()})


def draw_body(anatomy: Anatomy, grid: Grid) -> Thickness:
    """Thickness maps of a patient without findings (beyond the size of heart and aorta) on a grid of pixels."""
    trunk, cavity = _trunk(anatomy, grid)
    lung = np.maximum(cavity - _heart(anatomy, grid), 0)
    soft = trunk - lung
    soft += cloud(grid.x, grid.y, anatomy.texture) * 0.22
    _subtract_air(anatomy, grid, soft)
    np.maximum(soft, 0, out=soft)
    soft *= trunk > 0
    return Thickness(soft, lung, _vessels(anatomy, grid, lung), draw_bone(anatomy, grid), np.zeros_like(soft))


def _rounded(t: np.ndarray) -> np.ndarray:
    """Chord of a rounded edge: 0 outside, rising like a circle to 1 at ``t`` = 1."""
    t = np.clip(t, 0, 1)
    return np.sqrt(t * (2 - t))


def _trunk(anatomy: Anatomy, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Path through the trunk, neck and arms, and the part of it that the pleural cavities take."""
    half_width, depth, sulcus, arm, skin = _trunk_tables(anatomy)
    across = grid.across
    q = across / half_width.take(grid.row)
    q *= q
    trunk = depth.take(grid.row) * np.sqrt(np.maximum(1 - q * q, 0))
    beside = (across - arm.take(grid.row)) * (1 / 4.4)
    limb = 9.0 * np.sqrt(np.maximum(1 - beside * beside, 0))
    limb *= np.clip((grid.y - (anatomy.apex[0] + 1)) * 0.2, 0, 1)
    trunk = np.sqrt(trunk * trunk + limb * limb)
    trunk *= _rounded((grid.y - skin.take(grid.column)) * 0.3)
    if anatomy.breast:
        for side in (-1, 1):
            middle = anatomy.dome[0] - 4.4
            window, inside = Ellipse(side * 8.4, middle, 5.6, 5.2, -0.25 * side).stamp(grid)
            lower = np.clip((grid.y[window] - (middle - 4.5)) * 0.14, 0, 1)
            trunk[window] += anatomy.breast * np.sqrt(np.clip(inside, 0, 1)) * lower
    from_wall, from_middle, above = grid.edges
    profile = _rounded(from_wall * (1 / 4.5)) * _rounded(from_middle * (1 / 1.3))
    # Lung reaches down behind the dome, so the shadow does not end at once.
    profile *= 0.86 * _rounded(above * (1 / 1.2)) + 0.14 * np.clip(1 + above * 0.3, 0, 1)
    return trunk, np.minimum(sulcus.take(grid.row) * profile, trunk * 0.86)


def _trunk_tables(anatomy: Anatomy) -> tuple[np.ndarray, ...]:
    """Half-width, depth, depth of the chest cavity, middle of the arm over Y; the skin's Y over |X|."""
    y = START + (np.arange(ROWS) + 0.5) / PER_CM
    x = (np.arange(ROWS) + 0.5) / PER_CM
    apex = anatomy.apex[0]
    # Above the armpits the trunk runs into the shoulders.
    shoulders = 0.75 * np.clip((apex + 14 - y) / 9, 0, 1) ** 2.2
    half_width = anatomy.half_width * (1 + shoulders + 0.05 * np.clip((y - apex - 20) / 14, 0, 1))
    depth = np.interp(y, [0, apex, apex + 12, apex + 22, 45], np.array([0.62, 0.78, 0.95, 1.0, 1.08]) * anatomy.depth)
    cavity = np.interp(y, [apex, apex + 4, apex + 12, 45], np.array([0.6, 0.78, 1, 1]) * (anatomy.depth - anatomy.wall))
    arm = anatomy.half_width + 3.9 + anatomy.arms * (y - apex - 9)
    end = anatomy.shoulder
    skin = np.interp(x, [4.8, 5.6, 7, 10, 17, 20, 22, 24], [-14, -2, 0.2, 1.8, end - 0.8, end + 0.3, end + 2, end + 8])
    return tuple(table.astype(np.float32) for table in (half_width, depth, cavity, arm, skin))


def _heart(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Path through heart and great vessels where they displace lung."""
    total = np.zeros_like(grid.x)
    for ellipse in anatomy.heart:
        window, inside = ellipse.stamp(grid)
        np.clip(inside, 0, 1, out=inside)
        inside *= 2 - inside
        total[window] += inside * inside
    np.sqrt(np.sqrt(total, out=total), out=total)
    total *= anatomy.heart_depth
    window, inside = anatomy.knob.stamp(grid)
    total[window] = np.maximum(total[window], np.sqrt(np.clip(inside, 0, 1)) * 9.0)
    # The descending aorta runs down beside the spine from the knob; only the knob is ever enlarged.
    middle, half = 2.05, 1.3
    window = grid.window((middle - half, anatomy.knob.y, middle + half, 60))
    beside = (grid.x[window] - middle) * (1 / half)
    aorta = np.sqrt(np.maximum(1 - beside * beside, 0)) * np.clip(grid.y[window] - anatomy.knob.y, 0, 1)
    total[window] = np.maximum(total[window], aorta * 3.0)
    return total


def _subtract_air(anatomy: Anatomy, grid: Grid, soft: np.ndarray) -> None:
    """Trachea, main bronchi and gas below the diaphragm: soft tissue that is not there."""
    carina = anatomy.apex[0] + 9.0
    window = grid.window((-1.0, -9, 1.2, carina + 0.4))
    beside = (grid.x[window] - 0.1) * (1 / 0.95)
    trachea = np.sqrt(np.maximum(1 - beside * beside, 0)) * np.clip((carina + 0.3 - grid.y[window]) * 0.5, 0, 1)
    soft[window] -= trachea * 1.8
    for side in (-1, 1):
        window, inside = Ellipse(side * 1.9, carina + 0.9, 2.3, 0.62, side * 0.72).stamp(grid)
        soft[window] -= np.sqrt(np.clip(inside, 0, 1)) * 0.9
    for gas in anatomy.gas:
        window, inside = gas.stamp(grid, 1.3)
        part = grid[window]
        inside += 0.25 * cloud(part.x, part.y, anatomy.texture)
        soft[window] -= np.sqrt(np.clip(inside, 0, 1)) * (2.0 * gas.b + 0.8)


@lru_cache(maxsize=1)
def _hilum_glow() -> np.ndarray:
    """Hilar density over squared distance from the hilum in units of 1/64 cm2."""
    return np.exp(-np.arange(4096) / 64 / 7.0).astype(np.float32)


def _vessels(anatomy: Anatomy, grid: Grid, lung: np.ndarray) -> np.ndarray:
    """Hila and branching vessels, as far as there is lung around them."""
    hilum = anatomy.apex[0] + 10.6
    vessel = np.zeros_like(lung)
    for side in (0, 1):
        x0, y0, x1, y1 = anatomy.lung_bounds(side)
        window = grid.window((x0, y0, x1, y1))
        part = grid[window]
        out, down = part.across - 2.2, part.y - (hilum - 0.9 * side)
        tree = vessels(out, down, anatomy.tree + 3 * side, grid.pixel)
        near = (out - 0.8) * (out - 0.8) + 0.35 * down * down
        glow = _hilum_glow().take(np.minimum(near * 64, 4095).astype(np.int32))
        clumps = np.maximum(1.3 + 0.7 * cloud(part.x * 3, part.y * 3, anatomy.texture), 0)
        present = np.clip(lung[window] * 0.25, 0, 1) * part.on(side)
        vessel[window] += (tree * (1.0 + 0.5 * glow) + 1.6 * glow * clumps) * present
    return vessel
