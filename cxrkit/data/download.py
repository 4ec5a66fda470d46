"""Downloads of files that need no account, each compared with its published checksum."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from cxrkit.data.sources import SOURCES, sources
from cxrkit.data.tables import leaves_folder
from cxrkit.errors import DataError, ParameterError
from cxrkit.files import checksum

__all__ = ["Entry", "entries", "get"]


class Entry(BaseModel, frozen=True):
    """One entry of ``files`` in a manifest: a file that the folder must hold, or a pattern of several.

    ``url`` is given where no account is needed, with ``sha256`` or ``md5``; ``bytes``: the file's length.
    """

    path: str = Field(min_length=1)
    what: str = ""
    optional: bool = False
    url: str = Field("", pattern=r"^(https?://.+)?$")
    sha256: str = Field("", pattern=r"^([0-9a-fA-F]{64})?$")
    md5: str = Field("", pattern=r"^([0-9a-fA-F]{32})?$")
    bytes: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _can_be_right(self) -> Entry:
        if leaves_folder(self.path):
            raise ValueError("the path leaves the folder")
        if self.url and (self.pattern or not self.algorithm):
            raise ValueError("what has a url must be one file, with sha256 or md5")
        return self

    @property
    def pattern(self) -> bool:
        """Whether it stands for several files."""
        return any(sign in self.path for sign in "*?[")

    @property
    def algorithm(self) -> str:
        """The checksum that is published: "sha256", "md5" or ""."""
        return "sha256" if self.sha256 else "md5" if self.md5 else ""

    def covers(self, inside: Path) -> bool:
        """Whether it stands for a path inside the folder, or inside a folder within that."""
        name = inside.as_posix()
        return fnmatch(name, self.path) or fnmatch(name, f"*/{self.path}")

    def matches(self, path: Path) -> bool:
        """Whether a file has the published checksum."""
        return checksum(path, self.algorithm) == getattr(self, self.algorithm).lower()


def entries(name: str, manifest: Mapping[str, Any]) -> list[Entry]:
    """The entries of ``files`` in a manifest (see data_manifests/README.md).

    Raises DataError, naming source and entry, for one that can't be right: a download without a checksum, a checksum
    of another length, a path that leaves the folder.
    """
    listed = []
    for item in manifest.get("files") or []:
        try:
            listed.append(Entry.model_validate(item, strict=True))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"manifest of {name}, files, {item!r}: {where} {first['msg']}") from None
    return listed


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
    known = f"{entry.algorithm}:{getattr(entry, entry.algorithm).lower()}"
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
