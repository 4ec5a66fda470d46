"""The healthy body as thickness maps: how many centimetres of soft tissue, lung, bone and metal a ray meets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cxrkit.data.phantom.anatomy import PER_CM, ROWS, START, Anatomy, Ellipse, Grid
from cxrkit.data.phantom.texture import VESSEL_SHAPE, cloud, vessels

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
    heart = _heart(anatomy, grid)
    lung = np.maximum(cavity - heart, 0)
    soft = trunk - lung
    _subtract_air(anatomy, grid, soft)
    soft += cloud(grid.x, grid.y, anatomy.texture) * np.float32(0.16)
    np.maximum(soft, 0, out=soft)
    soft *= trunk > 0
    vessel = _vessels(anatomy, grid, lung)
    bone = _bone(anatomy, grid)
    return Thickness(soft, lung, vessel, bone, np.zeros_like(soft))


def _rounded(t: np.ndarray) -> np.ndarray:
    """Chord of a rounded edge: 0 outside, rising like a circle to 1 at ``t`` = 1."""
    t = np.clip(t, 0, 1)
    return np.sqrt(t * (2 - t))


def _trunk(anatomy: Anatomy, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Path through the trunk, neck and arms, and the part of it that the pleural cavities take."""
    half_width, depth, sulcus, arm, skin = _trunk_tables(anatomy)
    row, column = grid.by_y & (ROWS - 1), grid.by_x & (ROWS - 1)
    across = grid.across
    q = across / half_width.take(row)
    q *= q
    trunk = depth.take(row) * np.sqrt(np.clip(1 - q * q, 0, 1))
    below_skin = _rounded((grid.y - skin.take(column)) * np.float32(0.3))
    beside = (across - arm.take(row)) * np.float32(1 / 4.6)
    limb = 8.5 * np.sqrt(np.clip(1 - beside * beside, 0, 1)) * np.clip((grid.y - 7) * np.float32(0.25), 0, 1)
    trunk = np.hypot(trunk, limb) * below_skin
    if anatomy.breast:
        for side in (-1, 1):
            breast = Ellipse(side * 8.3, anatomy.dome[0] - 4.6, 5.6, 5.0, -0.25 * side).inside(grid)
            trunk += np.float32(anatomy.breast) * np.sqrt(np.clip(breast, 0, 1)) * np.clip(
                (grid.y - np.float32(anatomy.dome[0] - 9)) * np.float32(0.16), 0, 1
            )
    from_wall, from_middle, above = anatomy.lung_edges(grid)
    profile = _rounded(from_wall * np.float32(1 / 5.5)) * _rounded(from_middle * np.float32(1 / 1.3))
    # Lung reaches down behind the dome, so the shadow does not end at once.
    profile *= 0.86 * _rounded(above * np.float32(1 / 1.2)) + 0.14 * np.clip(1 + above * np.float32(0.3), 0, 1)
    cavity = np.maximum(sulcus.take(row), 0) * profile
    return trunk, np.minimum(cavity, trunk * np.float32(0.86))


def _trunk_tables(anatomy: Anatomy) -> tuple[np.ndarray, ...]:
    """Half-width, depth, depth of the chest cavity, middle of the arm over Y; the skin's Y over |X|."""
    y = START + (np.arange(ROWS) + 0.5) / PER_CM
    x = (np.arange(ROWS) + 0.5) / PER_CM
    apex = anatomy.apex[0]
    chest = np.interp(y, [apex + 4, apex + 8, apex + 22, apex + 34], [1.9, 1.0, 1.0, 1.04])
    half_width = anatomy.half_width * chest
    depth = np.interp(y, [0, apex, apex + 9, apex + 20, 45], np.array([0.56, 0.66, 0.94, 1.0, 1.08]) * anatomy.depth)
    cavity = np.interp(y, [apex, apex + 4, apex + 12, 45], np.array([0.5, 0.7, 1, 1]) * (anatomy.depth - anatomy.wall))
    arm = anatomy.half_width + 4.6 + 0.16 * (y - apex - 9)
    neck = np.interp(x, [4.6, 6.2, 9, 16, 18.5, 22], [-12, -0.5, 1.8, anatomy.shoulder - 0.6, anatomy.shoulder + 0.4, 11])
    return tuple(table.astype(np.float32) for table in (half_width, depth, cavity, arm, neck))


def _heart(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Path through heart and great vessels where they displace lung."""
    total = np.zeros_like(grid.x)
    for ellipse in anatomy.heart:
        inside = np.clip(ellipse.inside(grid), 0, 1)
        total += inside * inside
    chord = np.sqrt(np.sqrt(total)) * np.float32(2 * anatomy.heart_depth / 1.6)
    knob = np.sqrt(np.clip(anatomy.knob.inside(grid), 0, 1)) * np.float32(9.0)
    # The descending aorta runs down beside the spine from the knob.
    middle = np.float32(anatomy.knob.x + 0.32 * anatomy.knob.a - 0.6)
    beside = (grid.x - middle) * np.float32(1 / (0.75 * anatomy.knob.a))
    aorta = np.sqrt(np.clip(1 - beside * beside, 0, 1)) * np.clip((grid.y - np.float32(anatomy.knob.y)), 0, 1)
    return np.maximum(np.maximum(chord, knob), aorta * np.float32(3.0))


def _subtract_air(anatomy: Anatomy, grid: Grid, soft: np.ndarray) -> None:
    """Trachea, main bronchi and gas below the diaphragm: soft tissue that is not there."""
    carina = anatomy.apex[0] + 9.0
    beside = (grid.x - np.float32(0.15)) * np.float32(1 / 0.95)
    trachea = np.sqrt(np.clip(1 - beside * beside, 0, 1))
    trachea *= np.clip((carina - grid.y) * 1.5, 0, 1)
    soft -= trachea * np.float32(1.9)
    for side in (-1, 1):
        bronchus = Ellipse(side * 1.9, carina + 0.9, 2.3, 0.62, side * 0.72).inside(grid)
        soft -= np.sqrt(np.clip(bronchus, 0, 1)) * np.float32(1.2)
    for gas in anatomy.gas:
        inside = gas.inside(grid)
        soft -= np.sqrt(np.clip(inside, 0, 1)) * np.float32(2.2 * gas.b + 1.0)


def _vessels(anatomy: Anatomy, grid: Grid, lung: np.ndarray) -> np.ndarray:
    """Hila and branching vessels, as far as there is lung around them."""
    hilum = anatomy.apex[0] + 10.8
    side = grid.offset >> 10
    down = grid.y - np.float32(hilum) + side.astype(np.float32) * np.float32(0.9)
    out = grid.across - np.float32(2.4)
    tree = np.where(
        side == 0, vessels(out, down, anatomy.tree, grid.pixel), vessels(out, down, anatomy.tree + 3, grid.pixel)
    )
    near = np.clip(1 - np.hypot(out * np.float32(0.3), down * np.float32(0.2)), 0, 1)
    tree = tree * (1.1 + 0.5 * near) + near * near * (
        1.5 + 0.5 * cloud(grid.x * 2.5, grid.y * 2.5, (anatomy.texture[1], anatomy.texture[0]))
    )
    return tree * np.clip(lung * np.float32(0.25), 0, 1)


def _tube(t: np.ndarray, hollow: float = 0.78) -> np.ndarray:
    """Chord through a hollow rod, 1 at most, for ``t`` from -1 to 1 across it."""
    outside = np.sqrt(np.clip(1 - t * t, 0, 1))
    marrow = np.sqrt(np.clip(hollow**2 - t * t, 0, 1))
    return outside - 0.85 * marrow


@lru_cache(maxsize=2)
def _rib_table(front: bool) -> np.ndarray:
    """Bone met by a ray over the running number of ribs (12 of them, 128 entries each)."""
    rng = np.random.default_rng(53 + front)
    ribs = np.zeros((16, 128))
    t = (np.arange(128) + 0.5) / 128 * 2 - 1
    for rib in range(1, 13):
        half = rng.uniform(0.42, 0.5) if not front else rng.uniform(0.46, 0.56)
        # The lower rim of a rib is thinner than the upper one.
        ribs[rib] = _tube(t / half) * rng.uniform(0.9, 1.1) * (1.15 - 0.25 * (t / half).clip(-1, 1))
    return ribs.astype(np.float32).ravel()


def _ribs(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Each rib is a tilted ring about the chest, which projects to an ellipse: its back and its front arc."""
    outer = anatomy.edges[0].take(grid.by_y) + np.float32(0.7)
    u = np.minimum(grid.across / outer, 1)
    w = np.sqrt(1 - u * u)
    drop, spacing = np.float32(anatomy.rib_drop), np.float32(anatomy.rib_spacing)
    first = np.float32(anatomy.apex[0] - 2.2)
    down = (grid.y - first) * (128 / spacing)
    per = 128 / spacing
    back = down - (drop * (1 - w) - 2.6 * u * (1 - u)) * per
    front = down - (drop + (drop + 1.0) * w) * per
    last = 16 * 128 - 1
    behind = _rib_table(False).take(np.clip(back, 0, last).astype(np.int64))
    before = _rib_table(True).take(np.clip(front, 0, last).astype(np.int64))
    # At the side a rib runs along the ray, which then meets more of it; in front it ends in cartilage.
    behind *= np.clip((u - 0.13) * 12, 0, 1) * np.minimum(1 / (w + 0.28), 2.2)
    before *= np.clip((u - 0.42) * 5, 0, 1) * np.minimum(0.8 / (w + 0.3), 1.9)
    return (0.30 * behind + 0.22 * before) * np.clip((1 - u) * 25, 0, 1)


def _spine(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Vertebral bodies, discs, pedicles and spinous processes in a strip about the midline."""
    height = 0.95 * anatomy.rib_spacing
    y = (grid.y - np.float32(START)) * np.float32(1 / height)
    t = (y - np.floor(y)) * 2 - 1
    body = np.clip((0.82 - np.abs(t)) * 6, 0, 1)
    x = grid.x * np.float32(1 / 1.75)
    column = np.sqrt(np.clip(1 - x * x * x * x, 0, 1))
    bone = column * (0.85 + 0.4 * body)
    for middle in (-0.62, 0.62):
        ring = ((x - middle) * 3.6) ** 2 + ((t + 0.25) * 2.1) ** 2
        bone += 0.22 * np.clip(1.2 - np.abs(ring - 0.8), 0, 1) * (ring < 2)
    bone += 0.5 * np.clip(1 - (x * 3.4) ** 2 - ((t - 0.5) * 1.7) ** 2, 0, 1)
    # Transverse processes reach beyond the body.
    wing = np.clip(1 - (np.abs(x) - 1.2) ** 2 * 3 - ((t + 0.3) * 2.6) ** 2, 0, 1)
    return bone + 0.35 * wing


def _rod(grid: Grid, table: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """A bone along a curve Y(|X|) given as a table."""
    return _tube((grid.y - table.take(grid.by_x & (ROWS - 1))) * (1 / radius))


def _shoulder(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Collar bones, shoulder blades and the heads of the arm bones."""
    x = (np.arange(ROWS) + 0.5) / PER_CM
    apex = anatomy.apex[0]
    curve = apex + np.interp(x, [0, 2, 5, 9, 13, 17, 20], [3.4, 3.1, 2.2, 0.9, -0.4, -0.6, -0.3])
    span = np.clip((grid.across - 1.6) * 1.6, 0, 1) * np.clip((17.5 - grid.across) * 1.5, 0, 1)
    bone = 0.6 * span * _rod(grid, curve.astype(np.float32), 0.78)
    wall = anatomy.half_width
    blade = Ellipse(0, apex + 7.5, 3.1, 8.0, -0.3)
    for side in (-1, 1):
        inside = Ellipse(side * (wall - 1.9), blade.y, blade.a, blade.b, side * blade.rotation).inside(grid)
        # A plate with a thick rim.
        bone += 0.17 * np.clip(inside * 9, 0, 1) + 0.3 * np.clip(1 - np.abs(inside - 0.08) * 11, 0, 1)
        head = Ellipse(side * (wall + 3.0), apex + 4.0, 2.5, 2.4).inside(grid)
        bone += 0.9 * np.sqrt(np.clip(head, 0, 1)) + 0.35 * np.clip(1 - np.abs(head) * 6, 0, 1)
    shaft = (grid.across - np.float32(wall + 3.9) - (grid.y - np.float32(apex + 5)) * np.float32(0.13)) * np.float32(0.85)
    return bone + 1.1 * _tube(shaft) * np.clip((grid.y - np.float32(apex + 5)) * 0.6, 0, 1)


def _bone(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    bone = _ribs(anatomy, grid)
    columns = np.flatnonzero((grid.across < 3.6).any(axis=0))
    if len(columns):
        strip = (slice(None), slice(columns[0], columns[-1] + 1))
        part = grid[strip]
        bone[strip] += _spine(anatomy, part) * (part.across < 3.4)
    rows = np.flatnonzero((grid.y < anatomy.apex[0] + 18).any(axis=1))
    if len(rows):
        upper = (slice(rows[0], rows[-1] + 1), slice(None))
        bone[upper] += _shoulder(anatomy, grid[upper])
    return bone * np.float32(anatomy.bone)
