"""The pixel cache: a source's images decoded and resized once, in an SQLite file that every run then reads.

A cache is found again by its key: the source, its folder, the options that change pixels, the size, the pre-processing
and the code that reads. It lies in the platform's folder for caches (or ``CXRKIT_CACHE``), never among downloaded files
unless that folder is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock  # comes with torch

from cxrkit.data.dataset import Dataset, Rendered, Renderer
from cxrkit.data.files import FileRenderer
from cxrkit.data.parallel import spread
from cxrkit.errors import CxrkitError, DataError, ParameterError
from cxrkit.files import replace_file

__all__ = ["Prepared", "cache_folder", "cache_identity", "cached", "prepare_dataset", "prepared"]

# Options that choose rows, labels or boxes, but leave the pixels of an image as they are. What is not listed is taken
# to change pixels: the worst that follows is a second cache.
_SAME_PIXELS = {
    *("labels", "label_map", "hierarchy_separator", "label_separator", "readers", "verify", "missing", "tables"),
    *("split_by", "images", "images_per_patient"),
}
# Whatever decides on pixels; the key holds a checksum of these modules, and of the source's and the pre-processing's.
_READING = ("readers", "dicom", "presentation", "size_limits", "files")
_DRAWING = ("geometry", "preprocessing", "intensity", "cache")
_OURS = 0x63787263  # the application id of the file
# An image that was tried has a stamp, one that could not be drawn no pixels. Pixels take 8 or 16 bits, masks one.
_SCHEMA = f"""
PRAGMA page_size = 65536;
PRAGMA application_id = {_OURS};
CREATE TABLE images (image_id TEXT PRIMARY KEY, stamp TEXT, crc INTEGER, width INTEGER, height INTEGER,
                     pixels BLOB, truth BLOB, shortcut BLOB);
"""


@dataclass(frozen=True)
class Prepared:
    """A cache: its file, how many images it holds, how many were drawn just now, and those that can't be (why).

    ``problems``: image_id -> message. ``bytes``: length of the file. ``seconds``: the time that making it took.
    """

    path: Path
    images: int
    drawn: int
    problems: dict[str, str]
    bytes: int
    seconds: float


class PixelCache:
    """The images of the cache file at ``path``; each process opens it for itself. Damage is a DataError."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: dict[int, sqlite3.Connection] = {}
        # Each image is compared with its checksum when this process first asks for it.
        self._compared: set[str] = set()

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def query(self, command: str, *values: Any) -> list[tuple]:
        """The rows that a command of SQL gives; a command that writes has written when this returns."""
        try:
            # A connection must not be used on both sides of a fork.
            if os.getpid() not in self._opened:
                address = f"{self.path.absolute().as_uri()}?mode=rw"
                opened = sqlite3.connect(address, 60, uri=True, isolation_level=None, check_same_thread=False)
                opened.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing; a power cut may
                self._opened[os.getpid()] = opened
            return self._opened[os.getpid()].execute(command, values).fetchall()
        except sqlite3.OperationalError as error:
            raise DataError(f"{self.path}: the cache can't be read or written ({error})") from None
        except sqlite3.DatabaseError:
            raise DataError(f"{self.path}: the cache is damaged; cxrkit.data.prepare makes it anew") from None

    def tried(self) -> set[str]:
        """Ids of the images that are in it or could not be drawn."""
        return {image_id for (image_id,) in self.query("SELECT image_id FROM images WHERE stamp IS NOT NULL")}

    def intact(self, image_id: str) -> str | None:
        """The stamp of an image that is here as it was written; None for others."""
        found = self.query("SELECT * FROM images WHERE image_id = ? AND pixels IS NOT NULL", image_id)
        return found[0][1] if found and checksum(*found[0][3:]) == found[0][2] else None

    def get(self, image_id: str, size: int) -> tuple[str, Rendered | None]:
        """The stamp of an image, and image and masks, None where they could not be drawn; refused where damaged."""
        _, written, crc, *row = self.query("SELECT * FROM images WHERE image_id = ?", image_id)[0]
        width, height, pixels, truth, shortcut = row
        if pixels is None:
            return written, None
        if image_id not in self._compared:
            if checksum(*row) != crc:
                raise DataError(f"{self.path}: the cached image is damaged; cxrkit.data.prepare draws it anew")
            self._compared.add(image_id)
        values = np.frombuffer(pixels, np.uint8 if len(pixels) == size**2 else "<u2").reshape(size, size)
        image = torch.from_numpy(np.divide(values, np.float32(np.iinfo(values.dtype).max), dtype=np.float32))
        shortcut = None if shortcut is None else _unpacked(shortcut, size)[0]
        truth = None if truth is None else _unpacked(truth, size)
        return written, Rendered(image, truth, shortcut, (width, height) if width else None)


def checksum(width: int, height: int, *rows: bytes | None) -> int:
    """CRC-32 of an image: the size of the original, its pixels and its masks."""
    crc = zlib.crc32(b"%d %d" % (width, height))
    for row in rows:
        crc = zlib.crc32(row or b"", crc)
    return crc


def _unpacked(bits: bytes, size: int) -> torch.Tensor:
    """Masks ``[N, size, size]`` of one bit a pixel."""
    count = 8 * len(bits) // size**2
    values = np.unpackbits(np.frombuffer(bits, np.uint8), count=count * size**2)
    return torch.from_numpy(values.view(bool).reshape(count, size, size))


class CachedRenderer:
    """Images from a cache, by row; ``renderer`` draws those that are not in it or whose file has changed since."""

    def __init__(self, held: PixelCache, size: int, image_ids: np.ndarray, renderer: Renderer):
        self.held, self.size, self.image_ids, self.renderer = held, size, image_ids, renderer

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``; raises DataError where the cache is damaged, or where it can't be drawn at all."""
        if size == self.size:
            written, drawn = self.held.get(self.image_ids[row].decode(), size)
            if drawn is not None and written == stamp(self.renderer, row):
                return drawn
        return self.renderer.render(row, size)


def cache_folder(cache: str | os.PathLike = "auto") -> Path:
    """The folder of caches: the one given, or for ``"auto"`` ``CXRKIT_CACHE`` or the platform's folder for caches."""
    if cache != "auto":
        return Path(cache)
    if os.environ.get("CXRKIT_CACHE"):
        return Path(os.environ["CXRKIT_CACHE"])
    import pooch

    return Path(pooch.os_cache("cxrkit"))


def prepared(name: str, cache: str | os.PathLike = "auto") -> list[tuple[int, Path]]:
    """Size and file of every finished cache of a source, whatever its options."""
    found = []
    for path in sorted(cache_folder(cache).glob(f"{name}-*-*.sqlite")):
        with contextlib.suppress(DataError):
            held = _usable(path)
            if held is not None and not held.query("SELECT image_id FROM images WHERE stamp IS NULL LIMIT 1"):
                found.append((int(path.stem.split("-")[1]), path))
    return found


def cached(
    dataset: Dataset, identity: Mapping[str, Any], cache: str | os.PathLike = "auto", progress: bool = True
) -> Dataset:
    """``dataset``, just loaded, with its pixels from the cache, which is made where it is missing or not usable."""
    path, image_ids = cache_path(identity, cache), dataset.image_ids
    held = _usable(path)
    if held is None or not held.tried().issuperset(image_ids):
        prepare_dataset(dataset, identity, cache, None, progress)
        held = PixelCache(path)
    part = copy.copy(dataset)
    coded = np.array([image_id.encode() for image_id in image_ids], dtype=np.bytes_)
    # The renderer's rows may be more than the dataset's.
    by_row = np.zeros(int(dataset.rows.max(initial=-1)) + 1, dtype=coded.dtype)
    by_row[dataset.rows] = coded
    part.renderer = CachedRenderer(held, dataset.size, by_row, dataset.renderer)
    return part


# The key


def cache_identity(
    name: str,
    root: str | os.PathLike | None,
    options: Mapping[str, Any],
    seed: int | None,
    module: str,
    dataset: Dataset,
    bits: int,
) -> dict[str, Any]:
    """Everything that decides on the pixels and masks of an image, as JSON takes it, and its checksum, ``key``.

    ``seed``: None for a source whose images do not depend on it; ``module``: the source's own.
    """
    if bits not in (8, 16):
        raise ParameterError(f"bits={bits!r} is out of range; a cache keeps 8 or 16 bits a pixel")
    modules = [f"cxrkit.data.{part}" for part in _READING + _DRAWING]
    modules += [module, module.rpartition(".")[0], type(dataset.preprocessing).__module__]
    modules += [getattr(getattr(dataset.renderer, part, None), "__module__", None) for part in ("read", "truth")]
    unmasked = isinstance(dataset.renderer, FileRenderer) and dataset.renderer.truth is None
    identity = {
        "source": name,
        "root": None if root is None else str(Path(root).resolve()),
        "size": dataset.size,
        "bits": bits,
        "options": {key: options[key] for key in sorted(options) if key not in _SAME_PIXELS},
        "preprocessing": repr(dataset.preprocessing),
        "seed": seed,
        "labels": [] if unmasked else list(dataset.labels),  # each has a mask
        "code": _code(modules),
    }
    text = json.dumps(identity, sort_keys=True, default=repr)
    if " at 0x" in text:
        raise ParameterError(f"{name}: an option or the pre-processing has no lasting name, so it can't have a cache")
    return identity | {"key": hashlib.sha256(text.encode()).hexdigest()}


def _code(modules: list[str | None]) -> str:
    """A checksum of the sources of modules; of a package, of all its modules, except of ``cxrkit.data`` itself."""
    digest = hashlib.sha256()
    for name in sorted({name for name in modules if name} - {"cxrkit.data", "cxrkit.data.public"}):
        file = Path(importlib.util.find_spec(name).origin)
        for part in sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(part.name.encode() + part.read_bytes())
    return digest.hexdigest()


def cache_path(identity: Mapping[str, Any], cache: str | os.PathLike) -> Path:
    """Where the cache of an identity is, or will be."""
    return cache_folder(cache) / f"{identity['source']}-{identity['size']}-{identity['key'][:16]}.sqlite"


def _usable(path: Path) -> PixelCache | None:
    """The cache, or None where it is missing or damaged; a foreign file is refused."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        start = file.read(72)
    if not start.startswith(b"SQLite format 3") or int.from_bytes(start[68:], "big") != _OURS:
        raise DataError(f"{path}: is no cache of cxrkit; move it away, or choose another folder for the cache")
    held = PixelCache(path)
    try:
        held.tried()
    except DataError:
        return None
    return held


# Making it


def prepare_dataset(
    dataset: Dataset, identity: Mapping[str, Any], cache: str | os.PathLike, workers: int | None, progress: bool
) -> Prepared:
    """Draw into the cache what it lacks; see :func:`cxrkit.data.prepare`."""
    path, began = cache_path(identity, cache), time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: the folder for the cache can't be made ({error.strerror})") from None
    image_ids, problems = dataset.image_ids, {}
    with FileLock(path.with_suffix(".lock")):  # it ends with its process, however that ends
        stamps = [stamp(dataset.renderer, row) for row in dataset.rows.tolist()]
        held, whole = _opened(path, image_ids)
        todo = [index for index, found in enumerate(stamps) if whole[index] != found]
        for index, drawn in spread(_Draw(dataset, identity["bits"]), todo, workers, progress):
            if isinstance(drawn, str):
                problems[image_ids[index]] = drawn
                drawn = (None,) * 6
            held.query(
                "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", image_ids[index], stamps[index], *drawn
            )
    took = time.perf_counter() - began
    return Prepared(path, len(dataset), len(todo) - len(problems), problems, path.stat().st_size, took)


def _opened(path: Path, image_ids: list[str]) -> tuple[PixelCache, list[str | None]]:
    """The cache with a row for each image, made anew where it can't be used; and the stamp of each that is intact."""
    held = _usable(path)
    try:
        whole = [None if held is None else held.intact(image_id) for image_id in image_ids]
    except DataError:
        held, whole = None, [None] * len(image_ids)
    if held is None:
        Path(f"{path}-journal").unlink(missing_ok=True)  # of the file that is replaced
        try:
            replace_file(path, create)
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{path}: the cache can't be written ({error})") from None
        held = PixelCache(path)
    held.query("INSERT OR IGNORE INTO images (image_id) SELECT value FROM json_each(?)", json.dumps(image_ids))
    return held, whole


def create(file: str) -> None:
    """Write an empty cache."""
    with contextlib.closing(sqlite3.connect(file)) as opened:
        opened.executescript(_SCHEMA)


def stamp(renderer: Renderer, row: int) -> str:
    """What changes when the file of a row is replaced; empty where there is none."""
    if not isinstance(renderer, FileRenderer):
        return ""
    try:
        found = os.stat(renderer.paths[row])
    except (OSError, ValueError):
        return ""
    return f"{renderer.paths[row]} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


class _Draw:
    """Draws an image: its row in the cache, from the checksum on, or why it can't be drawn."""

    def __init__(self, dataset: Dataset, bits: int):
        self.dataset, self.bits = dataset, bits

    def __call__(self, index: int) -> tuple | str:
        try:
            drawn = self.dataset.draw(index)
            image = drawn.image.numpy()
            if image.min() < 0 or image.max() > 1:
                raise DataError("has pixels outside [0, 1], which a cache can't hold")
        except CxrkitError as error:
            return str(error)
        pixels = np.rint(image * np.float64(2**self.bits - 1)).astype(f"<u{self.bits // 8}").tobytes()
        masks = (
            None if mask is None else np.packbits(mask.numpy()).tobytes() for mask in (drawn.truth, drawn.shortcut)
        )
        row = (*(drawn.frame or (0, 0)), pixels, *masks)
        return checksum(*row), *row
