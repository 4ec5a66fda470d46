"""Folders as people unzip them: where the files of a source lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cxrkit.errors import DataError

__all__ = ["PICTURES", "find_folder", "images_in", "stems_in", "subfolders"]

PICTURES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


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
    if not root.is_dir():
        raise DataError(f"{root}: is no folder, expected that of the download")
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
