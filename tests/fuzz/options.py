"""Options of every method, drawn at random, in the words of `attribute`."""

from __future__ import annotations

import torch
from torch import Tensor

from fuzz.drawing import Draw
from fuzz.maps import LayerMap

PROTOCOLS = ("corrected", "corrected", "paper", "authors")
VIRTUAL = ("scaling", "bias", "conv1x1", "conv3x3", "conv3x3_depthwise")


def _baseline(draw: Draw, images: Tensor):
    broadcast = torch.full((1, images.shape[1], 1, 1), 0.25)
    return draw.pick(("black", "black", "white", "mean", 0.3, broadcast))


def _occlusion(draw: Draw, images: Tensor) -> dict:
    window = draw.pick((4, 5, (3, 6), 8))
    most = min(window) if isinstance(window, tuple) else window
    return {"window": window, "stride": draw.between(3, most), "fill": draw.pick(("black", "white", "mean", 0.4))}


def _lrp(draw: Draw, images: Tensor) -> dict:
    found = {"first_layer": draw.pick(("same", "same", "zb")), "protocol": draw.pick(PROTOCOLS)}
    kind = draw.pick(("default", "default", "two sides", "epsilon"))
    if kind == "two sides":
        found |= {"alpha": 2.0, "beta": 1.0}
    if kind == "epsilon":
        found |= {"rule": "epsilon", "epsilon": draw.pick((1e-6, 1e-2, 0.5)), "protocol": "corrected"}
    if draw.chance(0.2):
        found["check"] = False
    return found


def _xrai(draw: Draw, images: Tensor) -> dict:
    rows, columns = images.shape[-2:]
    pixel = torch.arange(rows)[:, None] * columns + torch.arange(columns)
    label_maps = [pixel // draw.between(50, 60)]
    if draw.chance(0.5):
        cut = draw.between(2, columns - 2)
        label_maps.append((torch.arange(columns) > cut).long().expand(rows, columns))
    return {
        "n_steps": draw.between(2, 4),
        "rule": draw.pick(("gauss_legendre", "uniform")),
        "algorithm": draw.pick(("full", "fast")),
        "segments": torch.stack(label_maps),
    }


_DRAWN = {
    "saliency": lambda d, x: {},
    "input_x_gradient": lambda d, x: {"protocol": d.pick(PROTOCOLS)},
    "smoothgrad": lambda d, x: {
        "n_samples": d.between(1, 3),
        "noise": d.pick((0.0, 0.15, 0.3)),
        "squared": d.chance(0.4),
        "seed": d.between(0, 9),
    },
    "guided_backprop": lambda d, x: {"protocol": d.pick(PROTOCOLS)},
    "integrated_gradients": lambda d, x: {
        "n_steps": d.between(2, 5),
        "baseline": _baseline(d, x),
        "rule": d.pick(("gauss_legendre", "trapezoid", "uniform")),
    },
    "deeplift": lambda d, x: {"baseline": _baseline(d, x), "n_baselines": d.pick((1, 1, 2)), "seed": d.between(0, 9)},
    "guided_ig": lambda d, x: {
        "n_steps": d.between(2, 4),
        "fraction": d.pick((0.25, 0.5, 1.0)),
        "max_distance": d.pick((0.0, 0.02, 0.3, 1.0)),
        "baseline": d.pick(("black", "white")),
    },
    "blur_ig": lambda d, x: {"n_steps": d.between(2, 4), "max_sigma": d.pick((1.0, 3.0, 8))},
    "xrai": _xrai,
    "occlusion": _occlusion,
    "normgrad": lambda d, x: {"virtual_layer": d.pick(VIRTUAL)},
    "lrp": _lrp,
    "rap": lambda d, x: {"protocol": d.pick(PROTOCOLS), **({"check": False} if d.chance(0.2) else {})},
}


def draw_options(draw: Draw, method: str, images: Tensor, layers: list[LayerMap]) -> dict:
    """The method's own options; `layers` are those that may be named."""
    options = _DRAWN.get(method, lambda d, x: {})(draw, images)
    once = [layer.name for layer in layers if layer.runs == 1 and layer.gradients is not None]
    if method in ("gradcam", "gradcam_plus_plus", "layercam", "scorecam", "normgrad", "guided_gradcam") and once:
        if method == "normgrad" and len(once) > 1 and draw.chance(0.3):
            picked = draw.rng.choice(len(once), 2, replace=False)
            options |= {"layers": [once[int(i)] for i in picked], "protocol": draw.pick(PROTOCOLS)}
        elif draw.chance(0.4):
            options["layer"] = draw.pick(once)
    return {name: value for name, value in options.items() if draw.chance(0.9) or name in _NEEDED}


_NEEDED = {"segments", "n_steps", "n_samples", "window", "stride", "rule", "alpha", "beta", "first_layer", "layers"}
