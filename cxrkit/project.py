"""The checkout one works in, its results folder, and relative paths in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cxrkit.errors import CxrkitError

__all__ = ["importable", "in_project", "project_folder", "results_folder"]


def project_folder() -> Path:
    """The checkout one works in: the nearest folder, upwards from here, that holds `notebooks/grids`; else this one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks" / "grids").is_dir()), here)


def results_folder(name: str | Path = "results") -> Path:
    """Where runs are kept: relative names count from the project, so that notebooks and commands share one store.

    The environment variable CXRKIT_RESULTS moves the default folder elsewhere (a shared disk, a test's folder).
    """
    if str(name) == "results":
        name = os.environ.get("CXRKIT_RESULTS", name)
    return project_folder() / name


def in_project(path: str | Path) -> Path:
    """A path as parameters name it: relative ones count from the project, whichever folder a notebook runs in."""
    return project_folder() / Path(path).expanduser()


def importable() -> None:
    """Put the checkout and its `notebooks` on the path of imports: `book.tools`, the papers' folders, `synthesis`.

    Raises CxrkitError outside of a checkout.
    """
    if not (project_folder() / "notebooks" / "grids").is_dir():
        raise CxrkitError(f"{project_folder()} is in no checkout of cxrkit, where the book is; call this inside one")
    for folder in (project_folder() / "notebooks", project_folder()):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
