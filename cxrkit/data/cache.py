"""The pixel cache: a source's images decoded and resized once, in a mapped ``.npy`` file that every run then reads.

Pixels take 8 or 16 bits; exact masks, one bit a pixel, are in a second ``.npy`` file beside it. The index, in JSON
lines, holds a line about the cache and one for each image, appended once its pixels are written; the last line of an
image counts. A cache is found again by its key: the source, its folder, the options that change pixels, the size, the
pre-processing and the code that reads. It lies in the platform's folder for caches (or ``CXRKIT_CACHE``), never among
downloaded files unless that folder is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
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
_FORMAT = "cxrkit pixel cache"
_STARTS = {".npy": b"\x93NUMPY", ".jsonl": b'{"format": "%s"' % _FORMAT.encode()}


@dataclass(frozen=True)
class Prepared:
    """A cache: its file, how many images it holds, how many were drawn just now, and those that can't be (why).

    ``problems``: image_id -> message. ``bytes``: length of all its files. ``seconds``: the time that making it took.
    """

    path: Path
    images: int
    drawn: int
    problems: dict[str, str]
    bytes: int
    seconds: float


class PixelCache:
    """The images of the cache whose pixels are at ``path`` (``.npy``), mapped; damage is a DataError.

    ``index``: image id -> record: row in the arrays, stamp of the file, checksum (None where it can't be drawn), masks
    that it has, width and height of the original. Travels to other processes as its path.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header, self.index = _read_index(path.with_suffix(".jsonl"))
        size, channels = self.header["size"], self.header["channels"]
        shapes = {path: (size, size)}
        if channels:
            shapes[path.with_suffix(".masks.npy")] = (-(-channels * size**2 // 8),)
        self.arrays = {file: _mapped(file, shape) for file, shape in shapes.items()}
        if any(record["row"] >= len(array) for array in self.arrays.values() for record in self.index.values()):
            raise _damaged(path)
        # Each image is compared with its checksum when this process first asks for it.
        self._compared: set[str] = set()

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def intact(self, image_id: str) -> str | None:
        """The stamp of an image that is here as it was written; None for others."""
        record = self.index.get(image_id, {"crc": None})
        whole = record["crc"] is not None and _checksum(record, self._rows(record)) == record["crc"]
        return record["stamp"] if whole else None

    def _rows(self, record: Mapping[str, Any]) -> list[bytes]:
        """Pixels of an image, and its masks where it has some."""
        arrays = list(self.arrays.values())[: 2 if record["masks"] else 1]
        return [array[record["row"]].tobytes() for array in arrays]

    def get(self, image_id: str) -> Rendered:
        """Image and masks; refused where damaged."""
        record = self.index[image_id]
        pixels, *masks = self._rows(record)
        if image_id not in self._compared:
            if _checksum(record, [pixels, *masks]) != record["crc"]:
                raise DataError(f"{self.path}: the cached image is damaged; cxrkit.data.prepare draws it anew")
            self._compared.add(image_id)
        size, dtype = self.header["size"], self.arrays[self.path].dtype
        values = np.frombuffer(pixels, dtype).reshape(size, size)
        image = torch.from_numpy(np.divide(values, np.float32(np.iinfo(dtype).max), dtype=np.float32))
        found = {}
        if masks:
            shape = (self.header["channels"], size, size)
            bits = np.unpackbits(np.frombuffer(masks[0], np.uint8), count=int(np.prod(shape))).view(bool).reshape(shape)
            both = {"truth": bits[:-1], "shortcut": bits[-1]}
            found = {name: torch.from_numpy(both[name]) for name in record["masks"]}
        frame = (record["width"], record["height"]) if record["width"] else None
        return Rendered(image, found.get("truth"), found.get("shortcut"), frame)

    def reserve(self, image_ids: list[str]) -> None:
        """Make the arrays long enough for these images too."""
        count = len(self.index.keys() | set(image_ids))
        for file, array in self.arrays.items():
            if len(array) < count:
                _resize(file, array.dtype, (count, *array.shape[1:]))
                self.arrays[file] = np.load(file, mmap_mode="r")

    def put(self, image_id: str, stamp: str, facts: Mapping[str, Any], rows: list[bytes]) -> None:
        """Write an image, then its line in the index."""
        row = self.index.get(image_id, {"row": len(self.index)})["row"]
        record = {"image_id": image_id, "row": row, "stamp": stamp, **facts}
        # Not through the map: where the disk is full, a write raises, but a map ends the process.
        try:
            for (file, array), content in zip(self.arrays.items(), rows, strict=False):
                with open(file, "r+b") as opened:
                    opened.seek(array.offset + row * len(content))
                    opened.write(content)
            with open(self.path.with_suffix(".jsonl"), "ab") as opened:
                opened.write(f"\n{json.dumps(record)}".encode())  # a killed process may have left half a line
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.index[image_id] = record


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Header and records of an index, by image; lines that a killed process left half are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header, found = json.loads(lines[0]), {}
        for line in filter(None, lines[1:]):
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                found[record["image_id"]] = record
        return header, found
    except (OSError, ValueError, LookupError, TypeError):
        raise _damaged(path) from None


def _mapped(file: Path, shape: tuple[int, ...]) -> np.memmap:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise _damaged(file) from None
    if array.shape[1:] != shape:
        raise _damaged(file)
    return array


def _resize(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Make a ``.npy`` file, or one longer: its header has room for more rows, and the disk space is only reserved."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with open(file, "r+b" if file.exists() else "w+b") as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            opened.truncate(opened.tell() + dtype.itemsize * int(np.prod(shape)))
    except OSError as error:
        raise _unwritable(file, error) from None


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: the cache is damaged; cxrkit.data.prepare makes it anew")


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: the cache can't be written ({error.strerror})")


def _checksum(facts: Mapping[str, Any], rows: list[bytes]) -> int:
    """CRC-32 of an image: the size of the original, the masks that it has, and its rows."""
    crc = zlib.crc32(f"{facts['width']} {facts['height']} {facts['masks']}".encode())
    for row in rows:
        crc = zlib.crc32(row, crc)
    return crc


class CachedRenderer:
    """Images from a cache, by row; ``renderer`` draws those that are not in it or whose file has changed since."""

    def __init__(self, held: PixelCache, size: int, image_ids: np.ndarray, renderer: Renderer):
        self.held, self.size, self.image_ids, self.renderer = held, size, image_ids, renderer

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``; raises DataError where the cache is damaged, or where it can't be drawn at all."""
        image_id = self.image_ids[row].decode()
        record = self.held.index[image_id]
        if size != self.size or record["crc"] is None or record["stamp"] != stamp(self.renderer, row):
            return self.renderer.render(row, size)
        return self.held.get(image_id)


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
    for path in sorted(cache_folder(cache).glob(f"{name}-*-*.jsonl")):
        with contextlib.suppress(DataError):
            held = PixelCache(path.with_suffix(".npy"))
            if len(held.index) == len(held.arrays[held.path]):
                found.append((held.header["size"], held.path))
    return found


def cached(
    dataset: Dataset, identity: Mapping[str, Any], cache: str | os.PathLike = "auto", progress: bool = True
) -> Dataset:
    """``dataset``, just loaded, with its pixels from the cache, which is made where it is missing or not usable."""
    path, image_ids = cache_path(identity, cache), dataset.image_ids
    held = _usable(path)
    if held is None or not held.index.keys() >= set(image_ids):
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
    return cache_folder(cache) / f"{identity['source']}-{identity['size']}-{identity['key'][:16]}.npy"


def _usable(path: Path) -> PixelCache | None:
    """The cache, or None where it is missing or damaged; a foreign file is refused."""
    for suffix, start in _STARTS.items():
        file = path.with_suffix(suffix)
        if file.exists() and not start.startswith(file.open("rb").read(len(start))):
            raise DataError(f"{file}: is no cache of cxrkit; move it away, or choose another folder for the cache")
    try:
        return PixelCache(path)
    except DataError:
        return None


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
        held = _usable(path) or _new(path, identity)
        todo = [index for index, found in enumerate(stamps) if held.intact(image_ids[index]) != found]
        held.reserve(image_ids)
        for index, drawn in spread(_Draw(dataset, identity["bits"], held.header["channels"]), todo, workers, progress):
            if isinstance(drawn, str):
                problems[image_ids[index]] = drawn
                drawn = {"crc": None}, []
            held.put(image_ids[index], stamps[index], *drawn)
    length = sum(file.stat().st_size for file in held.arrays)
    took = time.perf_counter() - began
    return Prepared(path, len(dataset), len(todo) - len(problems), problems, length, took)


def _new(path: Path, identity: Mapping[str, Any]) -> PixelCache:
    """A cache without images."""
    size, labels = identity["size"], len(identity["labels"])
    header = {"format": _FORMAT, "size": size, "channels": labels + 1 if labels else 0}  # truth, then the shortcut
    pixels, masks = path, path.with_suffix(".masks.npy")
    try:
        for file in (pixels, masks):
            file.unlink(missing_ok=True)
        replace_file(path.with_suffix(".jsonl"), json.dumps(header))
    except OSError as error:
        raise _unwritable(path, error) from None
    _resize(pixels, np.dtype(f"<u{identity['bits'] // 8}"), (0, size, size))
    if labels:
        _resize(masks, np.dtype(np.uint8), (0, -(-header["channels"] * size**2 // 8)))
    return PixelCache(path)


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
    """Draws an image: what the index tells of it and its rows in the arrays, or why it can't be drawn."""

    def __init__(self, dataset: Dataset, bits: int, channels: int):
        self.dataset, self.bits, self.channels = dataset, bits, channels

    def __call__(self, index: int) -> tuple[dict[str, Any], list[bytes]] | str:
        try:
            drawn = self.dataset.draw(index)
            image = drawn.image.numpy()
            if image.min() < 0 or image.max() > 1:
                raise DataError("has pixels outside [0, 1], which a cache can't hold")
        except CxrkitError as error:
            return str(error)
        rows = [np.rint(image * np.float64(2**self.bits - 1)).astype(f"<u{self.bits // 8}").tobytes()]
        masks = [name for name in ("truth", "shortcut") if getattr(drawn, name) is not None]
        if masks:
            bits = np.zeros((self.channels, *image.shape), dtype=bool)
            for name, part in (("truth", bits[:-1]), ("shortcut", bits[-1])):
                part[...] = getattr(drawn, name).numpy() if name in masks else False
            rows.append(np.packbits(bits).tobytes())
        width, height = drawn.frame or (0, 0)
        facts = {"width": int(width), "height": int(height), "masks": masks}
        return facts | {"crc": _checksum(facts, rows)}, rows
