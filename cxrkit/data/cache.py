"""The pixel cache: a source's images decoded and resized once, in one mapped file that every run then reads.

Pixels are kept at 8 bits (1/255 steps; 16 on request), truth masks at one bit. A file is found again by its key: the
source, its folder, the options that change pixels, the size, the pre-processing and the code that reads. It lies in
the platform's folder for caches (or ``CXRKIT_CACHE``), never among downloaded files unless that folder is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxrkit.data.dataset import Dataset, Rendered, Renderer
from cxrkit.data.files import FileRenderer
from cxrkit.data.parallel import CRASHED, spread, with_bar
from cxrkit.data.pixelfile import DONE, Layout, PixelFile, create, encode_ids
from cxrkit.data.preprocessing import Preprocessing
from cxrkit.errors import CxrkitError, DataError, ParameterError

__all__ = ["CachedRenderer", "Prepared", "cache_folder", "cached", "prepare", "prepared"]

# Options that choose rows, labels or boxes, but leave the pixels of an image as they are. What is not listed is taken
# to change pixels: the worst that follows is a second cache.
_SAME_PIXELS = {
    *("labels", "label_map", "hierarchy_separator", "label_separator", "readers", "verify", "missing", "tables"),
    *("split_by", "images", "images_per_patient"),
}
# Whatever decides on pixels; the key holds a checksum of these modules, and of the source's and the pre-processing's.
_CODE = (
    "readers",
    "dicom",
    "presentation",
    "size_limits",
    "geometry",
    "files",
    "preprocessing",
    "intensity",
    "pixelfile",
)


@dataclass(frozen=True)
class Prepared:
    """A cache: its file, how many images it holds, how many were drawn just now, and those that can't be (why).

    ``problems``: image_id -> message. ``bytes``: length of the file. ``seconds``: what making it took.
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


def prepare(
    name: str,
    root: str | os.PathLike | None = None,
    size: int = 224,
    seed: int = 0,
    *,
    cache: str | os.PathLike = "auto",
    workers: int | None = None,
    bits: int = 8,
    progress: bool = True,
    preprocessing: str | Preprocessing | None = None,
    **options: Any,
) -> Prepared:
    """Draw every image of a source once and keep it, for ``cxrkit.data.load(..., cache=...)``.

    Killed at any moment, the same call goes on where it was: nothing is drawn twice. Of two processes that call it at
    once, one draws and the other waits. A finished cache is verified; what is damaged, or whose file has changed
    since, is drawn anew. Images that can't be drawn are told in ``problems``, and refused when they are asked for.
    ``preprocessing``, ``options``: as for ``load``.
    ``cache``: "auto" or a folder (:func:`cache_folder`). ``workers``: processes; None: one a core. ``bits``: 8 or 16.
    Raises ParameterError as ``load`` does, DataError for a source that can't be read or a disk that is full.
    """
    from cxrkit.data.sources import read

    _check_bits(bits)
    dataset = read(name, root, size=size, seed=seed, preprocessing=preprocessing, **options)
    return _make(dataset, _identity(name, root, seed, options, dataset, bits), cache, workers, progress)


def cached(
    dataset: Dataset,
    name: str,
    root: str | os.PathLike | None,
    seed: int,
    options: Mapping[str, Any],
    cache: str | os.PathLike = "auto",
    bits: int = 8,
) -> Dataset:
    """``dataset``, just loaded, with its pixels from the cache, which is made where it is missing or not usable."""
    identity = _identity(name, root, seed, options, dataset, bits)
    path = _path(identity, cache)
    file = _usable(path, identity)
    slots = None if file is None else _slots(file, dataset)
    if slots is None:
        _make(dataset, identity, cache, None, True)
        file = PixelFile(path)
        slots = _slots(file, dataset)
    part = copy.copy(dataset)
    part.renderer = CachedRenderer(file, _by_row(dataset, slots), dataset.renderer)
    frames = np.column_stack([file.records["width"][slots], file.records["height"][slots]]).astype(np.float64)
    part.frames = np.where(np.isnan(dataset.frames) & (frames > 0), frames, dataset.frames)
    return part


def prepared(name: str, cache: str | os.PathLike = "auto") -> list[tuple[int, Path]]:
    """Size and file of every finished cache of a source, whatever its options."""
    files = sorted(cache_folder(cache).glob(f"{name}-*.pixels"))
    return [(int(file.stem.split("-")[-2]), file) for file in files if file.stem.count("-") >= 2]


class CachedRenderer:
    """Images from a file of decoded ones; ``slots[row]`` is where in it, and ``renderer`` draws what it lacks."""

    def __init__(self, file: PixelFile, slots: np.ndarray, renderer: Renderer):
        self.file = file
        self.slots = slots
        self.renderer = renderer

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``; raises DataError where the file is damaged, or where it can't be drawn at all."""
        slot = int(self.slots[row])
        if size != self.file.layout.size or self.file.records["state"][slot] != DONE:
            return self.renderer.render(row, size)
        return self.file.get(slot)


# Which file


def _identity(
    name: str, root: str | os.PathLike | None, seed: int, options: Mapping[str, Any], dataset: Dataset, bits: int
) -> dict[str, Any]:
    """Everything that decides on the pixels and masks of an image, as JSON takes it."""
    from cxrkit.data.sources import SOURCES

    _check_bits(bits)
    truth, shortcut = _masks(dataset)
    source = SOURCES[name]
    modules = [f"cxrkit.data.{part}" for part in _CODE]
    modules += [source.module, source.module.rpartition(".")[0], type(dataset.preprocessing).__module__]
    modules += [getattr(getattr(dataset.renderer, part, None), "__module__", None) for part in ("read", "truth")]
    identity = {
        "source": name,
        "root": None if root is None else str(Path(root).resolve()),
        "size": dataset.size,
        "bits": bits,
        "options": {key: options[key] for key in sorted(options) if key not in _SAME_PIXELS},
        "preprocessing": [type(dataset.preprocessing).__qualname__, _state(dataset.preprocessing)],
        "seed": None if source.needs_root else seed,
        "labels": list(dataset.labels) if truth else [],
        "shortcut": shortcut,
        "code": _code(modules),
    }
    text = json.dumps(identity, sort_keys=True, default=repr)
    if " at 0x" in text:
        raise ParameterError(f"{name}: an option or the pre-processing has no lasting name, so it can't have a cache")
    return identity | {"key": hashlib.sha256(text.encode()).hexdigest()}


def _check_bits(bits: int) -> None:
    if bits not in (8, 16):
        raise ParameterError(f"bits={bits!r} is out of range; a cache keeps 8 or 16 bits a pixel")


def _state(thing: Any) -> dict[str, Any]:
    return {key: repr(value) for key, value in sorted(getattr(thing, "__dict__", {}).items())}


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
        file = Path(importlib.import_module(name).__file__)
        for part in sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(part.name.encode() + part.read_bytes())
    return digest.hexdigest()


def _path(identity: Mapping[str, Any], cache: str | os.PathLike) -> Path:
    return cache_folder(cache) / f"{identity['source']}-{identity['size']}-{identity['key'][:16]}.pixels"


def _usable(path: Path, identity: Mapping[str, Any]) -> PixelFile | None:
    """The finished file, or None where it is missing, damaged or of other data; a foreign one is refused."""
    if not path.exists():
        return None
    try:
        file = PixelFile(path)
    except DataError as error:
        if "no cache of cxrkit" in str(error):
            raise
        return None
    return file if file.layout.key == identity["key"] else None


def _slots(file: PixelFile, dataset: Dataset) -> np.ndarray | None:
    """Where in the file each image of the dataset is; None where it lacks one."""
    ids = encode_ids(dataset.image_ids)
    if len(ids) == len(file.ids) and (ids == file.ids).all():
        return np.arange(len(ids))
    order = np.argsort(file.ids, kind="stable")
    found = order[np.searchsorted(file.ids, ids, sorter=order).clip(max=max(len(order) - 1, 0))]
    return found if (file.ids[found] == ids).all() else None


def _by_row(dataset: Dataset, slots: np.ndarray) -> np.ndarray:
    """From the renderer's rows, which may be more than the dataset's, to slots."""
    by_row = np.full(int(dataset.rows.max(initial=-1)) + 1, -1)
    by_row[dataset.rows] = slots
    return by_row


# Making it


def _make(
    dataset: Dataset, identity: Mapping[str, Any], cache: str | os.PathLike, workers: int | None, progress: bool
) -> Prepared:
    path, began = _path(identity, cache), time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: the folder for the cache can't be made ({error.strerror})") from None
    with _alone(path.with_suffix(".lock"), progress):
        begun, part = _begun(path, dataset, identity), path.with_suffix(".part")
        file = PixelFile(begun, writable=True)
        slots = _slots(file, dataset)
        stamps = [_stamp(dataset.renderer, row) for row in dataset.rows.tolist()]
        todo = _left(file, slots, stamps)
        problems: dict[str, str] = {}
        if len(todo) or not file.is_complete:
            if begun == path:
                os.replace(path, part)
                file = PixelFile(part, writable=True)
            file.reopen()
            task = _Draw(dataset, file, slots, stamps)
            for index, problem in with_bar(spread(task, todo, workers), len(todo), progress):
                if problem == CRASHED:
                    file.fail(int(slots[index]))
                if problem:
                    problems[dataset.image_ids[index]] = problem
            file.complete()
            os.replace(part, path)
    took = time.perf_counter() - began
    return Prepared(path, len(dataset), len(todo) - len(problems), problems, path.stat().st_size, took)


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


def _begun(path: Path, dataset: Dataset, identity: Mapping[str, Any]) -> Path:
    """The file to go on with: the finished one, an unfinished one, or a new one."""
    part = path.with_suffix(".part")
    finished = _usable(path, identity)
    if finished is not None and _slots(finished, dataset) is not None:
        return path
    with contextlib.suppress(DataError):
        unfinished = PixelFile(part, writable=True)
        if unfinished.layout.key == identity["key"] and _slots(unfinished, dataset) is not None:
            return part
    ids = encode_ids(dataset.image_ids)
    if finished is not None:  # of other images of the same source: they are kept, and so serve both
        ids = np.concatenate([ids, np.setdiff1d(finished.ids, ids)])
    labels = len(identity["labels"])
    layout = Layout(
        identity["key"], len(ids), dataset.size, identity["bits"], labels, identity["shortcut"], ids.dtype.itemsize
    )
    free = shutil.disk_usage(path.parent).free
    if layout.length > free:
        raise DataError(
            f"{path.parent}: the cache takes {layout.length / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free; "
            "choose another folder with cache="
        )
    part.unlink(missing_ok=True)
    create(part, layout, ids)
    if finished is not None:
        new, (_, here, there) = PixelFile(part, writable=True), np.intersect1d(ids, finished.ids, return_indices=True)
        new.take_over(finished, here, there)
    return part


def _left(file: PixelFile, slots: np.ndarray, stamps: list[int]) -> np.ndarray:
    """Which images are still to be drawn: not done, damaged, or of a file that has changed since."""
    done = file.records["state"][slots] == DONE
    done &= file.records["stamp"][slots] == np.array(stamps, dtype=np.uint64)
    for index in np.flatnonzero(done):
        done[index] = file.intact(int(slots[index]))
    return np.flatnonzero(~done)


def _stamp(renderer: Renderer, row: int) -> int:
    """Eight bytes that change when the file of a row is replaced; 0 where there is none."""
    try:
        found = os.stat(renderer.paths[row])
    except (AttributeError, OSError, TypeError, ValueError):
        return 0
    stamp = hashlib.blake2b(b"%d %d" % (found.st_size, found.st_mtime_ns), digest_size=8)
    return int.from_bytes(stamp.digest(), "little")


class _Draw:
    """Draws one image into the file; returns why where it can't."""

    def __init__(self, dataset: Dataset, file: PixelFile, slots: np.ndarray, stamps: list[int]):
        self.dataset, self.file, self.slots, self.stamps = dataset, file, slots, stamps

    def __call__(self, index: int) -> str:
        slot = int(self.slots[index])
        try:
            self.file.put(slot, self.dataset.draw(index), self.stamps[index])
        except CxrkitError as error:
            self.file.fail(slot)
            return str(error)
        except OSError as error:
            raise DataError(f"{self.file.path}: the cache can't be written ({error.strerror})") from None
        return ""
