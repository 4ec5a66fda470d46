"""The papers' training settings by name, such as "bcos/rsna/bcos_resnet50", each value with its source.

They are data of the project, not of the package: `notebooks/papers/PAPER/settings.yaml`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd

from cxrkit.errors import ParameterError, meant
from cxrkit.project import project_folder
from cxrkit.yaml_files import read_yaml

__all__ = ["names", "table", "values"]


@functools.cache
def _read(papers: Path) -> dict[str, dict[str, Any]]:
    """The settings of every paper and data set, by PAPER/DATA SET."""
    files = sorted(papers.glob("*/settings.yaml"))
    return {f"{path.parent.name}/{data}": entry for path in files for data, entry in read_yaml(path).items()}


def _settings() -> dict[str, dict[str, Any]]:
    return _read(project_folder() / "notebooks" / "papers")


def names() -> list[str]:
    """All presets, as paper/data set/network."""
    return [f"{group}/{network}" for group, entry in _settings().items() for network in entry.get("networks", ())]


def values(name: str, protocol: str = "corrected") -> dict[str, Any]:
    """The plain training parameters of a preset; `protocol="authors"` takes what the published code used where it
    differs from the text. Raises ParameterError for an unknown name, with near ones.
    """
    if name not in (known := names()):
        there = meant(str(name), known) if known else f"there are none, as {project_folder()} has no papers' settings"
        raise ParameterError(f"unknown preset {name!r}; {there}")
    group, network = name.rsplit("/", 1)
    entry = _settings()[group]
    own = dict(entry["networks"][network])
    coded = entry.get("authors", {}) | own.pop("authors", {})
    own.pop("row", None)
    named = {"model": network, "dataset": group.split("/")[1]}
    return {**named, **entry["values"], **own} | (coded if protocol == "authors" else {})


def table(name: str | None = None) -> pd.DataFrame:
    """A row per preset and parameter: preset, parameter, value, authors (the code's value where it differs), source.

    `name`: one preset; None: all.
    """
    rows = []
    for preset in names() if name is None else [name]:
        plain, coded = values(preset), values(preset, "authors")
        group, network = preset.rsplit("/", 1)
        entry = _settings()[group]
        row = entry["networks"][network].get("row", "")
        for parameter, value in plain.items():
            if parameter in ("model", "dataset"):
                continue
            differs = coded[parameter] if coded[parameter] != value else ""
            rows.append((preset, parameter, value, differs, entry["sources"][parameter].format(row=row)))
    return pd.DataFrame(rows, columns=["preset", "parameter", "value", "authors", "source"])
