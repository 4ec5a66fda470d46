"""Files of what the viewer shows: its panels as PNG, SVG and PDF, and the raw maps, each with its parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cxrkit.errors import ParameterError
from cxrkit.files import replace_file
from cxrkit.view.codec import RAMPS, array
from cxrkit.view.panels import draw_image, draw_region, panels, region_of, stack
from cxrkit.view.style import PNG_DPI, describe, style

__all__ = ["FORMATS", "coloured", "export_figure", "export_maps", "file_name", "full_colour", "show_overlays"]

FORMATS = ("png", "svg", "pdf")
COLUMNS = 3  # of panels
_NOTICE = "Not a medical device; not for clinical use."
# Where each format keeps a free text; no file names its author, its day of making or a path.
_FIELDS = {"png": "Description", "svg": "Description", "pdf": "Subject"}
_UNDATED = {"png": {"Software": "cxrkit"}, "svg": {"Date": None, "Creator": "cxrkit"}, "pdf": {"CreationDate": None}}


def file_name(text: str) -> str:
    """A name for a file from any text, such as a label: letters, digits, dots and hyphens; never empty or hidden."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.")[:120] or "image"


def export_figure(figure: Any, path: str | Path, parameters: Mapping[str, Any], kind: str) -> Path:
    """Write a figure as ``path`` with the suffix ``kind``, one of FORMATS; returns the file.

    ``parameters`` (JSON-able) stand in the file's own description field, with a notice that this is no medical device.
    The same figure gives the same bytes. The file is whole or not there. Raises ParameterError for an unknown format.
    """
    if kind not in FORMATS:
        raise ParameterError(f"format {kind!r} is unknown; known: {', '.join(FORMATS)}")
    metadata = _UNDATED[kind] | {_FIELDS[kind]: _text(parameters)}
    target = Path(path).with_name(f"{Path(path).name}.{kind}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with style():
        replace_file(
            target,
            lambda file: figure.savefig(file, format=kind, dpi=PNG_DPI, facecolor="white", metadata=metadata),
        )
    return target


def export_maps(path: str | Path, image: Any, maps: Mapping[str, Any], parameters: Mapping[str, Any]) -> Path:
    """Write raw maps as a NumPy archive; returns the file.

    Its arrays: ``image`` float32 ``[H, W]``, ``names`` ``[M]``, ``maps`` float32 ``[M, H, W]`` (signed, not
    normalised), ``parameters`` (JSON text). ``numpy.load(path, allow_pickle=False)`` reads it. Raises ParameterError
    when there are no maps, or they differ in shape.
    """
    values = [array(one) for one in maps.values()]
    if not values or len({one.shape for one in values}) > 1:
        raise ParameterError(f"maps: one shape for all expected, got {sorted({one.shape for one in values})}")
    arrays = {
        "image": array(image).squeeze().astype(np.float32),
        "names": np.array(list(maps), dtype=str),
        "maps": np.stack(values).astype(np.float32),
        "parameters": np.array(_text(parameters)),
    }
    path = Path(path).with_name(f"{Path(path).name}.npz")

    def write(target: str) -> None:
        with open(target, "wb") as file:  # to a name it would add a suffix
            np.savez_compressed(file, **arrays)

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)
    return path


def _text(parameters: Mapping[str, Any]) -> str:
    return json.dumps({**parameters, "notice": _NOTICE}, sort_keys=True, ensure_ascii=False)


def full_colour(values: np.ndarray, signed: bool, scale: str = "map") -> float:
    """The magnitude that takes the strongest colour: the maximum, or with ``scale="clip"`` the 99th percentile."""
    size = np.abs(values) if signed else np.maximum(values, 0)
    if scale == "clip" and (size > 0).any():
        return float(np.percentile(size[size > 0], 99, method="lower"))
    return float(size.max())


def coloured(
    values: np.ndarray, limit: float, colours: str, threshold: float = 0.0, strength: float = 1.0
) -> np.ndarray:
    """RGBA ``[H, W, 4]`` in [0, 1] of one map ``[H, W]``, as the viewer paints it.

    ``limit``: the magnitude of full colour; ``colours``: ``"signed"`` or a name of ``RAMPS``; ``threshold``: share of
    the maximum below which nothing is painted; ``strength``: opacity of the strongest colour. Opacity grows with the
    value, so that the radiograph stays visible where a map says little.
    """
    size, signed = np.abs(values), colours == "signed"
    step = np.rint(255 * size / limit).clip(0, 255) if limit > 0 else np.zeros_like(size)
    painted = np.zeros((*values.shape, 4))
    for side, name in ((values > 0, "positive" if signed else colours), (values < 0, "negative" if signed else None)):
        if name:
            stops = np.array(RAMPS[name]) / 255
            place = step[side] / 255 * (len(stops) - 1)
            painted[side, :3] = np.stack([np.interp(place, np.arange(len(stops)), stop) for stop in stops.T], axis=-1)
            painted[side, 3] = strength * np.minimum(1, 1.15 * (step[side] / 255) ** 0.6)
    painted[(size < threshold * max(float(values.max()), 0)) | (limit <= 0), 3] = 0
    return painted


def show_overlays(
    image: Any,
    maps: Any,
    titles: Sequence[str],
    look: Mapping[str, Any],
    region: Any = None,
    truth: Any = None,
) -> Figure:
    """Maps ``[M, H, W]`` over one image ``[1, H, W]`` or ``[H, W]``, at most three in a row, one title per map.

    ``look``: ``caption``; ``overlay`` and ``threshold`` in [0, 1]; ``smooth``; ``zoom`` from 1, and ``left`` and
    ``top``, the corner of the part that is shown, as shares of the image; ``panels``: per map its ``colours`` and
    ``full_colour``, as in :func:`coloured`. ``region``, outlined, and ``truth``: bool ``[H, W]``.
    """
    maps = stack(maps, "maps")
    height, width = maps.shape[-2:]
    with style():
        figure, axes = panels(len(maps), COLUMNS, caption=look["caption"], margin=0.2)
        figure.set_figwidth(max(figure.get_figwidth(), 4.6))  # so that the caption has room over one map
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(maps) // COLUMNS))  # for the lines below
        for ax, values, title, panel in zip(axes, maps, titles, look["panels"], strict=False):
            draw_image(ax, image, title)
            ax.title.set_fontsize(min(9, 300 / max(len(title), 1)))
            layer = coloured(values, panel["full_colour"], panel["colours"], look["threshold"], look["overlay"])
            ax.imshow(layer, interpolation="bilinear" if look["smooth"] else "nearest")
            lowest = -panel["full_colour"] if panel["colours"] == "signed" else 0
            ax.set_xlabel(f"{panel['colours']}: {lowest:.2g} … {panel['full_colour']:.2g}", fontsize=8)
            draw_region(ax, region_of(None, region, (height, width)), truth)
            left, top, side = look["left"] * width - 0.5, look["top"] * height - 0.5, 1 / look["zoom"]
            ax.set(xlim=(left, left + side * width), ylim=(top + side * height, top))
    text = f"{look['caption']}: the image under maps by {', '.join(titles)}."
    return describe(figure, text, {"image": array(image).squeeze(), "maps": maps})
