"""The papers' training settings by name, such as "bcos/rsna/bcos_resnet50", each value with its source."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

import pandas as pd

from cxrkit.errors import ParameterError
from cxrkit.yaml_files import read_yaml

__all__ = ["names", "table", "values"]


@functools.cache
def _groups() -> dict[str, dict[str, Any]]:
    return read_yaml(Path(__file__).with_suffix(".yaml"))


def names() -> list[str]:
    """All presets, as paper/data set/network."""
    return [f"{group}/{network}" for group, entry in _groups().items() for network in entry["networks"]]


def values(name: str, protocol: str = "corrected") -> dict[str, Any]:
    """The plain training parameters of a preset; `protocol="authors"` takes what the published code used where it
    differs from the text. Raises ParameterError for an unknown name, with near ones.
    """
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.4)
        raise ParameterError(f"unknown preset {name!r}; " + (f"near: {', '.join(near)}" if near else f"{names()}"))
    group, network = name.rsplit("/", 1)
    entry = _groups()[group]
    own = dict(entry["networks"][network])
    coded = entry.get("authors", {}) | own.pop("authors", {})
    own.pop("row", None)
    return {"model": network, **entry["more"], **entry["values"], **own} | (coded if protocol == "authors" else {})


def table(name: str | None = None) -> pd.DataFrame:
    """A row per preset and parameter: preset, parameter, value, authors (the code's value where it differs), source.

    `name`: one preset; None: all.
    """
    rows = []
    for preset in names() if name is None else [name]:
        plain, coded = values(preset), values(preset, "authors")
        group, network = preset.rsplit("/", 1)
        entry = _groups()[group]
        row = entry["networks"][network].get("row", "")
        for parameter, value in plain.items():
            if parameter in ("model", "dataset"):
                continue
            differs = coded[parameter] if coded[parameter] != value else ""
            source = entry["sources"][parameter].format(row=row)
            rows.append((preset, parameter, value, differs, source))
    return pd.DataFrame(rows, columns=["preset", "parameter", "value", "authors", "source"])
