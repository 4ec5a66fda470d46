"""Downloads of files that need no account, each compared with its published checksum."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cxrkit.data.sources import SOURCES, sources
from cxrkit.data.tables import leaves_folder
from cxrkit.errors import DataError, ParameterError
from cxrkit.files import checksum

__all__ = ["Entry", "entries", "get"]

_DIGITS = {"sha256": 64, "md5": 32}


@dataclass(frozen=True)
class Entry:
    """One entry of ``files`` in a manifest: a file that the folder must hold, or a pattern of several.

    ``url`` is given where no account is needed; ``algorithm`` ("sha256", "md5" or "") and ``checksum`` then are too.
    """

    path: str
    what: str = ""
    optional: bool = False
    url: str = ""
    algorithm: str = ""
    checksum: str = ""
    bytes: int | None = None

    @property
    def pattern(self) -> bool:
        """Whether it stands for several files."""
        return any(sign in self.path for sign in "*?[")

    def covers(self, inside: Path) -> bool:
        """Whether it stands for a path inside the folder, or inside a folder within that."""
        name = inside.as_posix()
        return fnmatch(name, self.path) or fnmatch(name, f"*/{self.path}")

    def matches(self, path: Path) -> bool:
        """Whether a file has the published checksum."""
        return checksum(path, self.algorithm) == self.checksum


def entries(name: str, manifest: Mapping[str, Any]) -> list[Entry]:
    """The entries of ``files`` in a manifest (see data_manifests/README.md); a plain string is an entry's path.

    Raises DataError, naming source and entry, for one that can't be right: a download without a checksum, a checksum
    of another length, a path that leaves the folder.
    """
    listed = manifest.get("files") or []
    if isinstance(listed, str):
        listed = [listed]
    if isinstance(listed, Mapping):
        listed = [{"path": path, "what": str(what)} for path, what in listed.items()]
    return [_entry(name, {"path": item} if isinstance(item, str) else item) for item in listed]


def _entry(name: str, item: Mapping[str, Any]) -> Entry:
    def wrong(why: str) -> DataError:
        return DataError(f"manifest of {name}, files, {item.get('path', item)!r}: {why}")

    if not isinstance(item, Mapping) or not isinstance(item.get("path"), str) or not item["path"]:
        raise DataError(f"manifest of {name}, files, {item!r}: needs a path")
    if leaves_folder(item["path"]):
        raise wrong("the path leaves the folder")
    algorithm = next((algorithm for algorithm in _DIGITS if item.get(algorithm)), "")
    checksum = str(item.get(algorithm, "")).lower()
    if algorithm and not re.fullmatch(rf"[0-9a-f]{{{_DIGITS[algorithm]}}}", checksum):
        raise wrong(f"{algorithm} must be {_DIGITS[algorithm]} hexadecimal digits")
    size = item.get("bytes")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise wrong("bytes must be a positive whole number")
    what, url, optional = str(item.get("what", "")), str(item.get("url", "")), bool(item.get("optional"))
    entry = Entry(item["path"], what, optional, url, algorithm, checksum, size)
    if entry.url and not re.match(r"https?://", entry.url):
        raise wrong("url must begin with http:// or https://")
    if entry.url and (entry.pattern or not algorithm):
        raise wrong("what has a url must be one file, with sha256 or md5")
    return entry


def get(name: str, to: str | os.PathLike, progress: bool = True) -> list[Path]:
    """Download into folder ``to`` what a source offers without an account; returns the files, empty for none.

    A file that is there with the right checksum is left alone. The steps for the rest are
    ``cxrkit.data.sources()[name]["get"]``. Raises ParameterError for an unknown source, DataError naming the address of
    a file that can't be reached, isn't there, or differs from its checksum; nothing of it is kept then.
    """
    if name not in SOURCES:
        raise ParameterError(f"source {name!r} is unknown; the sources are {sorted(SOURCES)}")
    folder = Path(to)
    offered = [entry for entry in entries(name, sources()[name]) if entry.url]
    return [fetch(entry, folder, progress) for entry in offered]


def fetch(entry: Entry, folder: Path, progress: bool = True) -> Path:
    """Download one file; see :func:`get`."""
    import pooch
    import requests

    path = folder / entry.path
    if path.exists():
        if entry.matches(path):
            return path
        raise DataError(f"{path}: is there, but its {entry.algorithm} differs from the published one; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    known = f"{entry.algorithm}:{entry.checksum}"
    shown = progress and sys.stderr.isatty()
    try:
        pooch.retrieve(entry.url, known, fname=path.name, path=path.parent, progressbar=shown)
    except ValueError:
        raise DataError(
            f"{entry.url}: the file that came differs from the published {entry.algorithm}; nothing was kept. "
            "It was changed on the server, or a page was sent in its place"
        ) from None
    except requests.HTTPError as error:
        answer = error.response
        raise DataError(f"{entry.url}: the server answers {answer.status_code} {answer.reason}") from None
    except requests.RequestException as error:
        raise DataError(f"{entry.url}: can't be reached, or the connection broke ({type(error).__name__})") from None
    except OSError as error:
        raise DataError(f"{path}: can't be written ({error.strerror})") from None
    return path
