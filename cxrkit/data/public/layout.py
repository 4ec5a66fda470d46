"""Folders as people unzip them: where a source's files lie, and what to do about files that are not there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.tables import places, refuse
from cxrkit.errors import DataError, ParameterError

__all__ = [
    *("MISSING", "PICTURES", "choose", "find_folder", "images_in", "keep_present", "stems_in", "subfolders"),
    "with_files",
]

MISSING = ("refuse", "leave_out")
PICTURES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


def choose(name: str, value: object, known: Sequence) -> None:
    """Raise ParameterError unless an option's value is one of those known."""
    if value not in known:
        raise ParameterError(f"{name}={value!r} is unknown; use one of {list(known)}")


def subfolders(folder: Path) -> list[Path]:
    """The folders within a folder, by name, without the hidden ones and what unpacking leaves behind."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise DataError(f"{folder}: can't be opened ({error.strerror})") from None
    return [folder / name for name in sorted(names) if not name.startswith((".", "__"))]


def find_folder(root: str | Path, *alternatives: str | Sequence[str], depth: int = 2) -> Path:
    """``root``, or the first folder at most ``depth`` levels below, that holds one of ``alternatives``.

    An alternative is a path inside the folder, or several that must all be there. Raises DataError where none is.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, expected the folder of the download")
    wanted = [[paths] if isinstance(paths, str) else list(paths) for paths in alternatives]
    level = [root]
    for remaining in range(depth, -1, -1):
        for folder in level:
            if any(all((folder / path).exists() for path in paths) for paths in wanted):
                return folder
        if remaining:
            level = [below for folder in level for below in subfolders(folder)]
    needed = " or ".join(" and ".join(paths) for paths in wanted)
    raise DataError(f"{root}: holds no {needed}, nor does a folder within it")


def images_in(folder: Path) -> dict[str, str]:
    """Name and path of every picture in a folder, by one listing; a folder of the same name within it is looked into.

    An archive that holds ``train/`` and is unpacked in ``train/`` makes ``train/train/``. Empty where there is none.
    """
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = {entry.name: entry.path for entry in entries if entry.name.lower().endswith(PICTURES)}
    again = folder / folder.name
    return images_in(again) if not found and again.is_dir() else found


def stems_in(*folders: Path) -> dict[str, str]:
    """Name without suffix and path of every picture in the folders, for tables that name images without one.

    Raises DataError where two pictures share a name, since a table can't mean both.
    """
    found: dict[str, str] = {}
    for folder in folders:
        for name, path in images_in(folder).items():
            stem = name.rpartition(".")[0]
            if found.setdefault(stem, path) != path:
                raise DataError(f"{path}: is there a second time, as {found[stem]}; keep one of them")
    return found


def with_files(
    name: str, path: Path, table: pd.DataFrame, files: Mapping[str, str], missing: str, of: str = "image_id"
) -> pd.DataFrame:
    """The rows whose file is there, with its path as column ``path``; see :func:`keep_present`.

    ``files``: paths by the names that the column ``of`` holds.
    """
    paths = pd.Series([files.get(value) for value in table[of]], table.index, dtype=object)
    return table.assign(path=paths)[keep_present(name, path, table[of], paths.notna(), missing)]


def keep_present(name: str, path: Path, files: pd.Series, there: np.ndarray, missing: str) -> np.ndarray:
    """Which rows to keep, bool ``[N]``: those whose file is ``there``.

    ``files``: what a table at ``path`` calls each file, its index the lines. Absent files are refused
    (``missing="refuse"``) or left out with a UserWarning that counts them ("leave_out").
    """
    choose("missing", missing, MISSING)
    there = np.asarray(there, dtype=bool)
    if there.all():
        return there
    if missing == "refuse":
        refuse(path, "file does not exist (missing='leave_out' loads the others)", places(files, ~there))
    elif not there.any():
        raise DataError(f"{path}: none of its {len(files)} images is in the folder")
    else:
        text = f"{name}: {int((~there).sum())} of {len(files)} images named in {path} are not there and are left out"
        warnings.warn(text, UserWarning, stacklevel=4)
    return there
