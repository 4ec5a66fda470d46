"""Files of what is shown: a panel as PNG, SVG and PDF, and the raw maps, each with the parameters that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cxrkit.errors import ParameterError
from cxrkit.files import replace_file
from cxrkit.view.codec import array
from cxrkit.view.style import PNG_DPI, style

__all__ = ["FORMATS", "export_figure", "export_maps", "file_name"]

FORMATS = ("png", "svg", "pdf")
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
