"""The pixel cache: a source's images decoded and resized once, in a mapped ``.npy`` file that every run then reads.

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
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrkit.data.dataset import Dataset, Rendered, Renderer
from cxrkit.data.files import FileRenderer
from cxrkit.data.parallel import CRASHED, spread, with_bar
from cxrkit.data.pixelcache import FORMAT, MASKS, ForeignFile, PixelCache, array_file, array_rows, checksum
from cxrkit.errors import CxrkitError, DataError, ParameterError
from cxrkit.files import replace_file

__all__ = ["CachedRenderer", "Prepared", "cache_folder", "cache_identity", "cached", "prepare_dataset", "prepared"]

# Options that choose rows, labels or boxes, but leave the pixels of an image as they are. What is not listed is taken
# to change pixels: the worst that follows is a second cache.
_SAME_PIXELS = {
    *("labels", "label_map", "hierarchy_separator", "label_separator", "readers", "verify", "missing", "tables"),
    *("split_by", "images", "images_per_patient"),
}
# Whatever decides on pixels; the key holds a checksum of these modules, and of the source's and the pre-processing's.
_READING = ("readers", "dicom", "presentation", "size_limits", "files")
_DRAWING = ("geometry", "preprocessing", "intensity", "pixelcache", "cache")


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
            if len(held.slot_of) == len(held.pixels):
                found.append((int(held.header["size"]), held.path))
    return found


def cached(
    dataset: Dataset, identity: Mapping[str, Any], cache: str | os.PathLike = "auto", progress: bool = True
) -> Dataset:
    """``dataset``, just loaded, with its pixels from the cache, which is made where it is missing or not usable."""
    path = cache_path(identity, cache)
    held = _usable(path, identity)
    slots = None if held is None else held.slots(dataset.image_ids)
    if slots is None:
        prepare_dataset(dataset, identity, cache, None, progress)
        held = PixelCache(path)
        slots = held.slots(dataset.image_ids)
    part = copy.copy(dataset)
    # The renderer's rows may be more than the dataset's.
    by_row = np.full(int(dataset.rows.max(initial=-1)) + 1, -1)
    by_row[dataset.rows] = slots
    part.renderer = CachedRenderer(held, by_row, dataset.renderer)
    frames = np.column_stack([held.index["width"][slots], held.index["height"][slots]]).astype(np.float64)
    part.frames = np.where(np.isnan(dataset.frames) & (frames > 0), frames, dataset.frames)
    return part


class CachedRenderer:
    """Images from a cache; ``slots[row]`` is the place in it, and ``renderer`` draws those that could not be drawn."""

    def __init__(self, held: PixelCache, slots: np.ndarray, renderer: Renderer):
        self.held, self.slots, self.renderer = held, slots, renderer

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``; raises DataError where the cache is damaged, or where it can't be drawn at all."""
        slot = int(self.slots[row])
        if size != self.held.header["size"] or not self.held.index["drawn"][slot]:
            return self.renderer.render(row, size)
        return self.held.get(slot)


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
    truth, shortcut = _masks(dataset)
    modules = [f"cxrkit.data.{part}" for part in _READING + _DRAWING]
    modules += [module, module.rpartition(".")[0], type(dataset.preprocessing).__module__]
    modules += [getattr(getattr(dataset.renderer, part, None), "__module__", None) for part in ("read", "truth")]
    identity = {
        "source": name,
        "root": None if root is None else str(Path(root).resolve()),
        "size": dataset.size,
        "bits": bits,
        "options": {key: options[key] for key in sorted(options) if key not in _SAME_PIXELS},
        "preprocessing": repr(dataset.preprocessing),
        "seed": seed,
        "labels": list(dataset.labels) if truth else [],
        "shortcut": shortcut,
        "code": _code(modules),
    }
    text = json.dumps(identity, sort_keys=True, default=repr)
    if " at 0x" in text:
        raise ParameterError(f"{name}: an option or the pre-processing has no lasting name, so it can't have a cache")
    return identity | {"key": hashlib.sha256(text.encode()).hexdigest()}


def _masks(dataset: Dataset) -> tuple[bool, bool]:
    """Whether the source draws truth and shortcut masks."""
    if isinstance(dataset.renderer, FileRenderer):
        return dataset.renderer.truth is not None, False
    if not len(dataset):
        return False, False
    drawn = dataset.draw(0)
    return drawn.truth is not None, drawn.shortcut is not None


def _code(modules: list[str | None]) -> str:
    """A checksum of the sources of modules; of a package, of all its modules, except of ``cxrkit.data`` itself."""
    digest = hashlib.sha256()
    for name in sorted({name for name in modules if name} - {"cxrkit.data", "cxrkit.data.public"}):
        file = Path(importlib.util.find_spec(name).origin)
        for part in sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(part.name.encode() + part.read_bytes())
    return digest.hexdigest()


def cache_path(identity: Mapping[str, Any], cache: str | os.PathLike) -> Path:
    return cache_folder(cache) / f"{identity['source']}-{identity['size']}-{identity['key'][:16]}.npy"


def _usable(path: Path, identity: Mapping[str, Any]) -> PixelCache | None:
    """The cache, or None where it is missing, damaged or of other data; a foreign file is refused."""
    if not path.exists() and not path.with_suffix(".jsonl").exists():
        return None
    try:
        held = PixelCache(path)
    except ForeignFile:
        raise
    except DataError:
        return None
    return held if held.header["key"] == identity["key"] else None


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
    with _alone(path.with_suffix(".lock"), progress):
        held, slots = _with_room(path, dataset.image_ids, identity)
        stamps = [_stamp(dataset.renderer, row) for row in dataset.rows.tolist()]
        todo = [index for index in range(len(dataset)) if _is_open(held, int(slots[index]), stamps[index])]
        task = _Draw(dataset, held, slots, stamps)
        problems: dict[str, str] = {}
        for index, problem in with_bar(spread(task, todo, workers), len(todo), progress):
            if problem == CRASHED:
                task.fail(index)
            if problem:
                problems[dataset.image_ids[index]] = problem
    length = sum(array_file(path, kind).stat().st_size for kind in held.arrays)
    return Prepared(path, len(dataset), len(todo) - len(problems), problems, length, time.perf_counter() - began)


@contextlib.contextmanager
def _alone(lock: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of a cache; it ends with its process, however that ends."""
    from filelock import FileLock, Timeout  # comes with torch

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"another process is making {lock.stem}; waiting for it", file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _with_room(path: Path, image_ids: Sequence[str], identity: Mapping[str, Any]) -> tuple[PixelCache, np.ndarray]:
    """The cache to go on with, or a new one, with a row for each image; and these rows, int ``[N]``."""
    held = _usable(path, identity)
    taken = {} if held is None else held.slot_of
    new = [image_id for image_id in image_ids if image_id not in taken]
    count = len(taken) + len(new)
    free = sorted(set(range(count)) - set(taken.values()))
    slot_of = taken | dict(zip(new, free, strict=False))
    header = {name: identity[name] for name in ("key", "size", "bits", "shortcut")}
    header = {"format": FORMAT, **header, "labels": len(identity["labels"])}
    if held is None:
        replace_file(path.with_suffix(".jsonl"), json.dumps(header))
    if held is None or len(held.pixels) < count:
        _make_room(path, header, {} if held is None else held.arrays, count)
    return PixelCache(path), np.array([slot_of[image_id] for image_id in image_ids], dtype=int)


def _make_room(path: Path, header: Mapping[str, Any], before: Mapping[str, np.ndarray], count: int) -> None:
    """Arrays of ``count`` rows that begin with those there were; the space is only reserved where the disk does so."""
    rows = array_rows(header)
    length = sum(count * dtype.itemsize * int(np.prod(shape)) for dtype, shape in rows.values())
    free = shutil.disk_usage(path.parent).free
    if length > free:
        raise DataError(
            f"{path.parent}: the cache takes {length / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free; "
            "choose another folder with cache="
        )
    for kind, (dtype, shape) in rows.items():
        part = array_file(path, kind).with_suffix(".part")
        array = np.lib.format.open_memmap(part, "w+", dtype, (count, *shape))
        if kind in before:
            array[: len(before[kind])] = before[kind]
        array.flush()
        os.replace(part, array_file(path, kind))


def _is_open(held: PixelCache, slot: int, stamp: int) -> bool:
    """Whether an image is still to be drawn: not done, damaged, or of a file that has changed since."""
    record = held.index[slot]
    return not record["drawn"] or int(record["stamp"]) != stamp or not held.intact(slot)


def _stamp(renderer: Renderer, row: int) -> int:
    """Eight bytes that change when the file of a row is replaced; 0 where there is none."""
    try:
        found = os.stat(renderer.paths[row])
    except (AttributeError, OSError, TypeError, ValueError):
        return 0
    stamp = hashlib.blake2b(b"%d %d" % (found.st_size, found.st_mtime_ns), digest_size=8)
    return int.from_bytes(stamp.digest(), "little")


class _Draw:
    """Draws one image into the cache; returns why where it can't."""

    def __init__(self, dataset: Dataset, held: PixelCache, slots: np.ndarray, stamps: list[int]):
        self.dataset, self.held, self.slots, self.stamps = dataset, held, slots, stamps

    def __call__(self, index: int) -> str:
        try:
            drawn = self.dataset.draw(index)
            rows = self._rows(drawn)
        except CxrkitError as error:
            self.fail(index)
            return str(error)
        width, height = drawn.frame or (0, 0)
        masks = sum(MASKS.get(kind, 0) for kind in rows)
        crc = checksum(masks, width, height, list(rows.values()))
        for kind, row in rows.items():
            file = array_file(self.held.path, kind)
            start = file.stat().st_size - len(self.held.arrays[kind]) * row.nbytes
            self._write(file, row.tobytes(), start + int(self.slots[index]) * row.nbytes)
        self._note(index, True, masks, width, height, self.stamps[index], crc)
        return ""

    def fail(self, index: int) -> None:
        """Note that an image can't be drawn."""
        self._note(index, False, 0, 0, 0, 0, 0)

    def _rows(self, drawn: Rendered) -> dict[str, np.ndarray]:
        """The row of an image in each array."""
        image = drawn.image.numpy()
        if image.min() < 0 or image.max() > 1:
            raise DataError("has pixels outside [0, 1], which a cache can't hold")
        top = 2 ** self.held.header["bits"] - 1
        rows = {"pixels": np.rint(image * np.float64(top)).astype(self.held.pixels.dtype)}
        for kind in MASKS:
            mask = getattr(drawn, kind)
            if mask is not None:
                rows[kind] = np.packbits(mask.numpy())
                if kind not in self.held.arrays or rows[kind].shape != self.held.arrays[kind].shape[1:]:
                    raise DataError(f"has {kind} masks that the first image has not; they can't be kept in a cache")
        return rows

    def _note(self, index: int, *fields: int) -> None:
        """Append a line to the index; it begins the line, because a killed process may have left half of one."""
        record = [int(self.slots[index]), self.dataset.image_ids[index], *fields]
        self._write(self.held.path.with_suffix(".jsonl"), b"\n" + json.dumps(record).encode())

    def _write(self, file: Path, content: bytes, start: int | None = None) -> None:
        # Not through the map: where the disk is full, a write raises, but a map ends the process.
        try:
            with open(file, "ab" if start is None else "r+b", buffering=0) as opened:
                if start is not None:
                    opened.seek(start)
                while content:
                    content = content[opened.write(content) :]
        except OSError as error:
            raise DataError(f"{file}: the cache can't be written ({error.strerror})") from None
