"""The files of a pixel cache: images in a mapped ``.npy`` file, exact masks beside it, and the index that tells whose.

Pixels take 8 or 16 bits, masks one bit a pixel, in ``.npy`` files of their own. The index, in JSON lines, holds a line
about the cache and one for each image, appended once its pixels are written; the last line of an image counts.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxrkit.data.dataset import Rendered
from cxrkit.errors import DataError

__all__ = ["FORMAT", "MASKS", "ForeignFile", "PixelCache", "array_file", "array_rows", "checksum"]

FORMAT = "cxrkit pixel cache"
# Kinds of masks, and the bits of an image's record that say which of them it has.
MASKS = {"truth": 1, "shortcut": 2}
_RECORD = ("slot", "image_id", "drawn", "masks", "width", "height", "stamp", "crc")
_INDEX = [("drawn", "?"), ("masks", "u1"), ("width", "i4"), ("height", "i4"), ("stamp", "u8"), ("crc", "u4")]


class ForeignFile(DataError):
    """A file where a cache belongs that is none; it is left alone."""


def array_file(path: Path, kind: str) -> Path:
    """Where the "pixels", "truth" or "shortcut" masks of the cache at ``path`` are."""
    return path if kind == "pixels" else path.with_suffix(f".{kind}.npy")


def array_rows(header: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of an image's row in each array of a cache; masks are packed, eight pixels a byte."""
    size, labels = header["size"], header["labels"]
    rows = {"pixels": (np.dtype(np.uint8 if header["bits"] == 8 else "<u2"), (size, size))}
    if labels:
        rows["truth"] = (np.dtype(np.uint8), (-(-labels * size**2 // 8),))
    if header["shortcut"]:
        rows["shortcut"] = (np.dtype(np.uint8), (-(-(size**2) // 8),))
    return rows


class PixelCache:
    """The images of the cache whose pixels are at ``path`` (``.npy``), mapped.

    ``slot_of``: image id -> row in the arrays; ``index``: by row, whether the image could be drawn, its checksum, masks
    and original size. Raises DataError for a cache that is damaged, and for files that are none. Travels to other
    processes by its path and is mapped again there.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.header, records = _read_index(self.path)
        self.arrays = {}
        for kind, (dtype, shape) in array_rows(self.header).items():
            file = array_file(self.path, kind)
            try:
                array = np.load(file, mmap_mode="r")
            except (OSError, ValueError, EOFError):
                raise DataError(f"{file}: the cache is damaged or truncated") from None
            if array.dtype != dtype or array.shape[1:] != shape:
                raise DataError(f"{file}: the cache is damaged: it holds {array.dtype} {array.shape}")
            # A plain view: slices of numpy.memmap cost several times as much as those of an array.
            self.arrays[kind] = np.asarray(array)
        self.pixels = self.arrays["pixels"]
        if any(len(array) != len(self.pixels) for array in self.arrays.values()) or len(records) > len(self.pixels):
            raise DataError(f"{self.path}: the cache is damaged: its files are of different lengths")
        self.slot_of = {record["image_id"]: record["slot"] for record in records}
        self.index = np.zeros(len(self.pixels), dtype=_INDEX)
        try:
            for record in records:
                self.index[record["slot"]] = tuple(record[name] for name, _ in _INDEX)
        except (IndexError, ValueError, TypeError, OverflowError):
            raise DataError(f"{self.path.with_suffix('.jsonl')}: the index of the cache is damaged") from None
        # Each image is compared with its checksum when this process first asks for it.
        self._compared = bytearray(len(self.pixels))

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def slots(self, image_ids: Sequence[str]) -> np.ndarray | None:
        """The row of each image, int ``[N]``; None where one has not been tried yet."""
        found = [self.slot_of.get(image_id) for image_id in image_ids]
        return None if None in found else np.array(found, dtype=int)

    def intact(self, slot: int) -> bool:
        """Whether an image is the one that was written."""
        _, masks, width, height, _, crc = self.index[slot].item()
        kinds = ["pixels", *(kind for kind in MASKS if masks & MASKS[kind])]
        return crc == checksum(masks, width, height, [self.arrays[kind][slot] for kind in kinds])

    def get(self, slot: int) -> Rendered:
        """The image and masks at ``slot``, as float32 in [0, 1] and bool; raises DataError where they are damaged."""
        if not self._compared[slot]:
            if not self.intact(slot):
                raise DataError(f"{self.path}: the cached image is damaged; cxrkit.data.prepare draws it anew")
            self._compared[slot] = 1
        _, masks, width, height, _, _ = self.index[slot].item()
        top = np.float32(2 ** self.header["bits"] - 1)
        side, labels = self.header["size"], self.header["labels"]
        image = torch.from_numpy(np.divide(self.pixels[slot], top, dtype=np.float32))
        unpacked = {
            kind: _unpacked(self.arrays[kind][slot], shape) if masks & MASKS[kind] else None
            for kind, shape in (("truth", (labels, side, side)), ("shortcut", (side, side)))
        }
        return Rendered(image, **unpacked, frame=(width, height) if width else None)


def checksum(masks: int, width: int, height: int, rows: Sequence[np.ndarray]) -> int:
    """CRC-32 of an image: its original size, and its rows in the arrays."""
    crc = zlib.crc32(b"%d %d %d" % (masks, width, height))
    for row in rows:
        crc = zlib.crc32(np.ascontiguousarray(row), crc)
    return crc


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).view(bool).reshape(shape))


def _read_index(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header, and the last record of each image; lines that a killed process left unfinished are skipped."""
    file = path.with_suffix(".jsonl")
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = [b""]
    except OSError as error:
        raise DataError(f"{file}: can't be opened ({error.strerror})") from None
    if FORMAT.encode() not in lines[0]:
        name = path if lines == [b""] else file
        raise ForeignFile(f"{name}: is no cache of cxrkit; move it away, or choose another folder for the cache")
    records = {}
    try:
        header = json.loads(lines[0])
        array_rows(header)
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                record = dict(zip(_RECORD, json.loads(line), strict=True))
                records[record["slot"]] = record
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{file}: the index of the cache is damaged") from None
    return header, list(records.values())
