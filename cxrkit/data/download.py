"""Downloads of what may be had without an account, each with its checksum; a broken one goes on where it stopped."""

from __future__ import annotations

import os
import re
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
_SECONDS = (10, 60)  # to connect, and between two pieces
_PIECE = 1 << 16


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
    entry = Entry(
        item["path"],
        str(item.get("what", "")),
        bool(item.get("optional")),
        str(item.get("url", "")),
        algorithm,
        checksum,
        size,
    )
    if entry.url and not re.match(r"https?://", entry.url):
        raise wrong("url must begin with http:// or https://")
    if entry.url and (entry.pattern or not algorithm):
        raise wrong("what has a url must be one file, with sha256 or md5")
    return entry


def get(name: str, to: str | os.PathLike, progress: bool = True) -> list[Path]:
    """Download into folder ``to`` what a source offers without an account; returns the files, empty for none.

    A file that is there with the right checksum is left alone; one that was interrupted goes on where it stopped. The
    steps for the rest are ``cxrkit.data.sources()[name]["get"]``. Raises ParameterError for an unknown source,
    DataError naming the address for what can't be reached, isn't there, or differs from its checksum; nothing of it
    is kept then under its name.
    """
    if name not in SOURCES:
        raise ParameterError(f"source {name!r} is unknown; the sources are {sorted(SOURCES)}")
    folder = Path(to)
    offered = [entry for entry in entries(name, sources()[name]) if entry.url]
    return [fetch(entry, folder, progress) for entry in offered]


def fetch(entry: Entry, folder: Path, progress: bool = True) -> Path:
    """Download one file; see :func:`get`."""
    import pooch

    path = folder / entry.path
    if path.exists():
        if entry.matches(path):
            return path
        raise DataError(f"{path}: is there, but its {entry.algorithm} differs from the published one; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(
            entry.url,
            f"{entry.algorithm}:{entry.checksum}",
            fname=path.name,
            path=path.parent,
            downloader=_Resuming(entry, path, progress),
        )
    except ValueError:
        raise DataError(
            f"{entry.url}: what came differs from the published {entry.algorithm}; nothing was kept. "
            "The file was changed on the server, or a page was sent in its place"
        ) from None
    return path


class _Resuming:
    """A downloader for pooch that keeps what has arrived in a file beside the target, and goes on from there."""

    def __init__(self, entry: Entry, path: Path, progress: bool):
        self.entry, self.progress = entry, progress
        self.part = path.with_name(f".{path.name}.{entry.checksum[:8]}.part")

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        import requests

        try:
            self._load(url)
        except requests.HTTPError as error:
            raise DataError(f"{url}: the server answers {error.response.status_code} {error.response.reason}") from None
        except (requests.RequestException, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise DataError(f"{self.part}: can't be written ({error.strerror})") from None
            raise DataError(
                f"{url}: can't be reached, or the connection broke ({type(error).__name__}); "
                "what has arrived is kept, and the same command goes on from there"
            ) from None
        os.replace(self.part, output_file)

    def _load(self, url: str) -> None:
        import requests
        from tqdm import tqdm

        there = self.part.stat().st_size if self.part.exists() else 0
        if there and there == self.entry.bytes:
            return
        headers = {"Range": f"bytes={there}-"} if there else {}
        # Compression on the way would make lengths and ranges those of something else.
        headers["Accept-Encoding"] = "identity"
        with requests.get(url, stream=True, headers=headers, timeout=_SECONDS) as response:
            if response.status_code == 416:  # nothing is left to send, or what is here is longer than the file
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                if total == str(there):
                    return
                self.part.unlink()
                return self._load(url)
            response.raise_for_status()
            if response.status_code != 206:
                there = 0
            total = there + int(response.headers.get("Content-Length") or 0) or None
            if None not in (total, self.entry.bytes) and total != self.entry.bytes:
                raise DataError(f"{url}: offers {total} bytes, the manifest says {self.entry.bytes}")
            with (
                self.part.open("ab" if there else "wb") as file,
                tqdm(
                    total=total, initial=there, unit="B", unit_scale=True, desc=self.entry.path,
                    disable=None if self.progress else True,
                ) as bar,
            ):  # fmt: skip
                for piece in response.iter_content(_PIECE):
                    file.write(piece)
                    bar.update(len(piece))
                    if self.entry.bytes is not None and file.tell() > self.entry.bytes:
                        raise DataError(f"{url}: sends more than the {self.entry.bytes} bytes of the manifest")
