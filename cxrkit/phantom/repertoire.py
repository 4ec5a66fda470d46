"""The looks of the labels: from a label and a patient to findings, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cxrkit.phantom.anatomy import PER_CM, ROWS, START, Anatomy, Ellipse
from cxrkit.phantom.findings import Finding, Part
from cxrkit.phantom.foreign import curve, foreign_objects, wire
from cxrkit.phantom.shapes import around

__all__ = ["MAKERS", "enlarge"]

Maker = Callable[[str, np.random.Generator, Anatomy], list[Finding]]
MAKERS: dict[str, Maker] = {}
_BLUNT = 0.8  # cm: a rim that tapers ends here, where a reader would still see it


def _maker(*labels: str):
    def register(function: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(labels, function))
        return function

    return register


def enlarge(anatomy: Anatomy, labels: Sequence[str], rng: np.random.Generator, strength: float) -> Anatomy:
    """The same patient with a larger heart or aorta where the labels say so."""
    heart, aorta = (rng.uniform(0.9, 1.15, 2) * strength).tolist()
    if "Cardiomegaly" in labels:
        ventricle, atrium, outflow = anatomy.heart
        # The heart grows toward the left and down, and a little to the right.
        ventricle = replace(
            ventricle,
            x=ventricle.x + 1.2 * heart,
            a=ventricle.a * (1 + 0.27 * heart),
            b=ventricle.b * (1 + 0.12 * heart),
        )
        atrium = replace(atrium, x=atrium.x - 0.5 * heart, a=atrium.a * (1 + 0.28 * heart))
        anatomy = anatomy.changed(heart=(ventricle, atrium, outflow))
    if "Aortic enlargement" in labels:
        knob = anatomy.knob
        knob = replace(knob, x=knob.x + 0.9 * aorta, a=knob.a * (1 + 0.5 * aorta), b=knob.b * (1 + 0.45 * aorta))
        anatomy = anatomy.changed(knob=knob)
    return anatomy


def _offset(rng: np.random.Generator) -> tuple[float, float]:
    return tuple(rng.uniform(0, 25, 2))


def _around(ellipse: Ellipse, margin: float) -> tuple[float, float, float, float]:
    """Bounds that also hold an outline that wobbles."""
    return replace(ellipse, a=ellipse.a * margin, b=ellipse.b * margin).bounds()


def _patch(
    label: str, rng: np.random.Generator, anatomy: Anatomy, side: int, across: float, down: float,
    size: tuple[float, float], amount: float, soft: float = 0.6, texture: str = "cloudy", fissure=None,
) -> Finding:  # fmt: skip
    x, y = anatomy.place(side, across, down)
    ellipse = Ellipse(x, y, size[0], size[1], rng.uniform(-0.4, 0.4))
    at = {"ellipse": ellipse, "soft": soft, "offset": _offset(rng), "side": side}
    if fissure:
        at["fissure"] = fissure
    return Finding(label, (Part("blob", at, _around(ellipse, 1.4), "fill", amount, texture),))


@_maker("Cardiomegaly")
def _cardiomegaly(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    bounds = around(ellipse.bounds() for ellipse in anatomy.heart)
    return [Finding(label, (Part("heart", {}, bounds, "none"),))]


@_maker("Aortic enlargement")
def _aortic_enlargement(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    knob = anatomy.knob
    bounds = (knob.x - knob.a, knob.y - knob.b, knob.x + knob.a, knob.y + 2.3 * knob.b)
    return [Finding(label, (Part("aorta", {}, bounds, "none"),))]


@_maker("Consolidation")
def _consolidation(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    upper = rng.random() < 0.5
    down = rng.uniform(0.25, 0.34) if upper else rng.uniform(0.68, 0.78)
    line = anatomy.place(side, 0.5, 0.46 if upper else 0.56)
    fissure = (*line, rng.normal(0, 0.08), -1 if upper else 1)
    size = (rng.uniform(4.2, 5.6), rng.uniform(4.4, 5.8))
    return [_patch(label, rng, anatomy, side, rng.uniform(0.4, 0.6), down, size, 0.72, 0.45, "bronchi", fissure)]


@_maker("Infiltration")
def _infiltration(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    found = []
    for _ in range(rng.integers(2, 5)):
        size = tuple(rng.uniform(2.2, 3.4, 2))
        where = int(rng.integers(0, 2)), rng.uniform(0.25, 0.8), rng.uniform(0.3, 0.9)
        found.append(_patch(label, rng, anatomy, *where, size, rng.uniform(0.36, 0.5), 0.8))
    return found


@_maker("Lung Opacity")
def _lung_opacity(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    size = (rng.uniform(3.5, 4.8), rng.uniform(4.0, 6.0))
    where = int(rng.integers(0, 2)), rng.uniform(0.35, 0.7), rng.uniform(0.35, 0.85)
    return [_patch(label, rng, anatomy, *where, size, rng.uniform(0.45, 0.58), 1.0)]


@_maker("Pneumonia")
def _pneumonia(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """One to four opacities, as often as the RSNA boxes: 43, 54, 2 and 1 % of the positives."""
    count = int(rng.choice(4, p=(0.435, 0.54, 0.02, 0.005))) + 1
    first = int(rng.integers(0, 2))
    found = []
    for index in range(count):
        side = (first + index) % 2
        down = rng.uniform(0.45, 0.85) if count < 3 else (0.3, 0.8)[index // 2] + rng.normal(0, 0.04)
        size = (rng.uniform(3.0, 4.6), rng.uniform(3.8, 6.2) * (1 if count < 3 else 0.7))
        found.append(
            _patch(label, rng, anatomy, side, rng.uniform(0.35, 0.65), down, size, rng.uniform(0.45, 0.72), 1.0)
        )
    return found


@_maker("Nodule/Mass")
def _nodule(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    mass = rng.random() < 0.6
    found = []
    for _ in range(1 if mass else rng.integers(1, 4)):
        radius = rng.uniform(2.1, 3.2) if mass else rng.uniform(1.15, 1.6)
        x, y = anatomy.place(int(rng.integers(0, 2)), rng.uniform(0.25, 0.8), rng.uniform(0.2, 0.85))
        ellipse = Ellipse(x, y, radius, radius * rng.uniform(0.85, 1.1), rng.uniform(0, 3))
        at = {"ellipse": ellipse, "lobed": 0.1 if mass else 0.0, "offset": _offset(rng)}
        found.append(Finding(label, (Part("ball", at, _around(ellipse, 1.2), "soft", 2.5 + 0.9 * radius),)))
    return found


@_maker("Calcification")
def _calcification(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    x, y = anatomy.place(int(rng.integers(0, 2)), rng.uniform(0.3, 0.75), rng.uniform(0.18, 0.7))
    specks = []
    for _ in range(rng.integers(6, 11)):
        dx, dy = rng.normal(0, 1.3, 2)
        specks.append(Ellipse(x + dx, y + dy, *rng.uniform(0.4, 0.7, 2), rng.uniform(0, 3)))
    bounds = around(speck.bounds() for speck in specks)
    return [Finding(label, (Part("specks", {"specks": specks}, bounds, "bone", 2.3),))]


@_maker("Pleural effusion")
def _effusion(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    return [_fluid(label, rng, anatomy, side)]


def _fluid(label: str, rng: np.random.Generator, anatomy: Anatomy, side: int) -> Finding:
    at = {"side": side, "top": anatomy.dome[side] - rng.uniform(3.5, 8.5), "dip": rng.uniform(2.0, 3.5)}
    x0, _, x1, _ = anatomy.lung_bounds(side)
    bounds = (x0, at["top"] - 0.2, x1, anatomy.dome[side] + 8.0)
    return Finding(label, (Part("meniscus", at, bounds, "fill", 0.96),))


def _rim_part(
    anatomy: Anatomy, side: int, wide: np.ndarray, cap: float, soft: float, shape: str, effect: str, amount: float
) -> Part:
    """A part along the chest wall: ``wide`` cm across at each height (a table over Y), ``cap`` cm at the apex."""
    outer, inner = (table[side * ROWS : (side + 1) * ROWS] for table in anatomy.lung_outline)
    lower = int(cap * PER_CM)
    top = int((anatomy.apex[side] + cap - START) * PER_CM)
    # The curve is the lung's own outline, moved down and inward; above its top everything lies beyond it.
    outer, inner = (np.concatenate([np.full(lower, table[0]), table[: ROWS - lower]]) for table in (outer, inner))
    outer = outer - wide
    outer[:top] = -60
    inner[top + int(5 * PER_CM) :] = -60
    rows = np.flatnonzero(wide >= _BLUNT)
    ends = (anatomy.apex[side] - 1.0 if cap else rows[0] / PER_CM + START), (rows[-1] + 1) / PER_CM + START
    at = {
        "ends": ends,
        "side": side,
        "outer": outer.astype(np.float32),
        "inner": inner.astype(np.float32),
        "soft": soft,
    }
    x0, y0, x1, y1 = anatomy.lung_bounds(side)
    return Part(shape, at, (x0, max(y0, ends[0]), x1, min(y1, ends[1])), effect, amount)


def _heights() -> np.ndarray:
    return START + (np.arange(ROWS) + 0.5) / PER_CM


@_maker("Pleural thickening")
def _thickening(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    apex, dome = anatomy.apex[side], anatomy.dome[side]
    wide, y, cap = rng.uniform(1.9, 2.9), _heights(), 0.0
    if rng.random() < 0.5:  # an apical cap
        wide, cap = wide * np.clip((apex + rng.uniform(9, 13) - y) / 6, 0, 1), rng.uniform(1.6, 2.6)
    else:
        span = np.minimum(y - (apex + rng.uniform(5, 8)), dome + rng.uniform(0, 2) - y)
        wide = wide * np.sqrt(np.clip(span / 5, 0, 1))
    return [Finding(label, (_rim_part(anatomy, side, wide, cap, 0.6, "rim", "soft", 5.6),))]


@_maker("Pneumothorax")
def _pneumothorax(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    apex, dome = anatomy.apex[side], anatomy.dome[side]
    wide = rng.uniform(2.6, 4.6) * np.clip((dome + rng.uniform(0, 5) - _heights()) / (dome - apex), 0, 0.7)
    outline = anatomy, side, wide, rng.uniform(2.5, 5.0), 0.25
    air = _rim_part(*outline, "rim", "empty", 1.0)
    chest = _rim_part(*outline, "rim", "air", 1.8)  # the chest is wider on that side
    return [Finding(label, (air, chest, _rim_part(*outline, "lining", "soft", 1.4)))]


@_maker("Atelectasis")
def _atelectasis(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """A dense wedge from the hilum over a raised diaphragm."""
    side = int(rng.integers(0, 2))
    lift = rng.uniform(2.6, 4.4)
    x0, _, x1, y1 = anatomy.lung_bounds(side)
    dome = anatomy.dome[side]
    raised = Part("raised", {"side": side, "lift": lift}, (x0, dome - lift - 0.2, x1, y1), "fill", 0.93)
    x, y = anatomy.place(side, 0.08, rng.uniform(0.62, 0.7))
    angle = rng.uniform(0.1, 0.4)
    length = rng.uniform(7.5, 9.5)
    at = {"side": side, "start": (x, y), "angle": angle if side else np.pi - angle, "length": length}
    at |= {"half": rng.uniform(0.3, 0.5), "wedge": rng.uniform(0.8, 1.5)}
    reach = length + 0.5
    bounds = (x - 0.2, y - 2.2, x + reach, y + 6) if side else (x - reach, y - 2.2, x + 0.2, y + 6)
    return [Finding(label, (Part("plate", at, bounds, "fill", 0.8), raised))]


def _lungs(
    label: str, anatomy: Anatomy, top: float, bottom: float, amount: float, texture: str, sides=(0, 1), **zone
) -> list[Finding]:
    """The same change in both lungs, between two heights (0 apex, 1 dome)."""
    found = []
    for side in sides:
        at = {
            "side": side,
            "top": anatomy.place(side, 0.5, top)[1],
            "bottom": anatomy.place(side, 0.5, bottom)[1],
            **zone,
        }
        x0, y0, x1, y1 = anatomy.lung_bounds(side)
        bounds = (x0, max(y0, at["top"]), x1, min(y1, at["bottom"]))
        found.append(Finding(label, (Part("zone", at, bounds, "fill", amount, texture),)))
    return found


@_maker("ILD")
def _ild(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    top, bottom = rng.uniform(-0.05, 0.12), rng.uniform(1.0, 1.25)
    return _lungs(label, anatomy, top, bottom, rng.uniform(0.15, 0.2), "fine")


@_maker("Pulmonary fibrosis")
def _fibrosis(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    top, rind = rng.uniform(0.5, 0.62), rng.uniform(5.0, 6.5)
    return _lungs(label, anatomy, top, 1.3, rng.uniform(0.32, 0.42), "coarse", rind=rind)


@_maker("Other lesion")
def _other(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """A foreign object: a pacemaker with its lead, a chest tube, or a coin, ring or electrode on the skin."""
    return (_pacemaker, _tube, _object)[rng.integers(0, 3)](label, rng, anatomy)


def _pacemaker(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = 1 if rng.random() < 0.75 else -1
    x, y = side * rng.uniform(8.0, 10.5), anatomy.apex[0] + rng.uniform(3.5, 6.0)
    case = Ellipse(x, y, rng.uniform(2.0, 2.5), rng.uniform(1.7, 2.1), rng.uniform(-0.4, 0.4))
    tip = anatomy.heart[0]
    points = [(x - side * 1.5, y - 1.2), (side * 5.0, anatomy.apex[0] + 2.2), (-1.4, anatomy.apex[0] + 5.5)]
    points += [(-2.3, tip.y - 4.0), (-1.0, tip.y + 2.0), (tip.x + 2.0, tip.y + 2.6)]
    lead = wire(curve(points), 0.18, 0.4)
    return [Finding(label, (Part("slab", {"ellipse": case}, case.bounds(), "metal", 0.7), lead))]


def _tube(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    sign = 1 if side else -1
    x, y = anatomy.place(side, 0.45, rng.uniform(0.12, 0.3))
    entry = anatomy.place(side, 1.0, rng.uniform(0.6, 0.8))
    bend = anatomy.place(side, 0.9, rng.uniform(0.38, 0.5))
    points = [(entry[0] + sign * 4, entry[1] + 2.5), entry, bend, (x, y)]
    return [Finding(label, (wire(curve(points), rng.uniform(0.4, 0.55), 0.42),))]


def _object(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    found = []
    for _ in range(rng.integers(1, 4)):
        x, y = anatomy.place(int(rng.integers(0, 2)), rng.uniform(0.1, 0.95), rng.uniform(0.1, 1.05))
        radius = rng.uniform(0.8, 1.5)
        ellipse = Ellipse(x, y, radius, radius * rng.uniform(0.6, 1.0), rng.uniform(0, 3))
        ring = rng.random() < 0.4
        at = {"ellipse": ellipse, "hole": 0.62} if ring else {"ellipse": ellipse}
        found.append(Finding(label, (Part("ring" if ring else "slab", at, ellipse.bounds(), "metal", 0.6),)))
    return found


@_maker("COVID-19")
def _covid(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """Patches on both sides, along the wall and toward the base."""
    found = []
    for side in (0, 1):
        for down in rng.permutation((0.5, 0.72, 0.92))[: rng.integers(1, 4)]:
            size = (rng.uniform(1.9, 2.8), rng.uniform(2.2, 3.4))
            across = rng.uniform(0.78, 0.92)
            found.append(_patch(label, rng, anatomy, side, across, down, size, rng.uniform(0.38, 0.55), 0.7))
    return found


@_maker("SARS")
def _sars(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """One side, middle and lower zone, along the wall."""
    side = int(rng.integers(0, 2))
    size = (rng.uniform(2.8, 3.6), rng.uniform(3.2, 4.4))
    return [_patch(label, rng, anatomy, side, rng.uniform(0.7, 0.85), d, size, 0.5, 0.7) for d in (0.5, 0.85)]


@_maker("ARDS")
def _ards(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    return _lungs(label, anatomy, rng.uniform(-0.1, 0.1), 1.3, rng.uniform(0.5, 0.6), "bronchi")


@_maker("Viral Pneumonia")
def _viral(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    return _lungs(label, anatomy, rng.uniform(0.1, 0.25), 1.2, rng.uniform(0.2, 0.28), "fine", core=rng.uniform(8, 11))


@_maker("Bacterial Pneumonia", "Streptococcus")
def _lobar(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    return _consolidation(label, rng, anatomy)


@_maker("Klebsiella")
def _klebsiella(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """The right upper lobe, heavy, its fissure bulging down."""
    line = anatomy.place(0, 0.5, 0.52)
    fissure = (*line, rng.uniform(0.1, 0.2), -1)
    return [_patch(label, rng, anatomy, 0, 0.55, 0.27, (7.5, 7.5), 0.9, 0.35, "plain", fissure)]


@_maker("Legionella")
def _legionella(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    side = int(rng.integers(0, 2))
    size = (rng.uniform(4.0, 5.0), rng.uniform(3.0, 4.0))
    return [_patch(label, rng, anatomy, side, 0.5, 0.9, size, 0.65, 0.5), _fluid(label, rng, anatomy, side)]


@_maker("Chlamydophila")
def _chlamydophila(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    size = tuple(rng.uniform(2.0, 2.8, 2))
    return [_patch(label, rng, anatomy, int(rng.integers(0, 2)), rng.uniform(0.3, 0.6), 0.65, size, 0.5, 0.6)]


@_maker("Pneumocystis")
def _pneumocystis(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """Ground glass about both hila, the rim of the lung spared."""
    return _lungs(label, anatomy, 0.15, 0.95, rng.uniform(0.38, 0.46), "cloudy", core=rng.uniform(5.5, 7))


# The place of a look in MAKERS seeds its random numbers: a new one comes last.
@_maker("Local artefact")
def _artefact(label: str, rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """A worn patch of the imaging plate near the middle of the image: too dark, and rippled."""
    x, y = rng.normal(0, 1.3), (anatomy.apex[0] + anatomy.dome[0]) / 2 + 1.2 + rng.normal(0, 1.3)
    ellipse = Ellipse(x, y, rng.uniform(1.8, 3.0), rng.uniform(1.8, 3.0), rng.uniform(0, 3))
    at = {"ellipse": ellipse, "period": rng.uniform(0.9, 1.4), "angle": rng.uniform(0, 3)}
    return [Finding(label, (Part("ripple", at, ellipse.bounds(), "air", rng.uniform(3.5, 5.0)),))]


_maker("Foreign object")(foreign_objects)
