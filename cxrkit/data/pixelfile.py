"""One file of decoded images: a header, a record and a name per image, then pixels and packed masks, all to be mapped.

Layout, little-endian: ``MAGIC``; the header as JSON with its length and checksum; then, each from a multiple of 4096
bytes, the records (``RECORD``), the image ids, the pixels ``[N, size, size]``, the truth masks and the shortcut masks,
one bit a pixel. Each record holds the checksum of its image, so a half-written or damaged one is recognised.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cxrkit.data.dataset import Rendered
from cxrkit.errors import DataError

__all__ = ["DONE", "FAILED", "OPEN", "Layout", "PixelFile", "create", "encode_ids"]

MAGIC = b"cxrkit pixels 1\n"
RECORD = np.dtype(
    [
        ("state", "u1"),
        ("masks", "u1"),
        ("spare", "<u2"),
        ("crc", "<u4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("stamp", "<u8"),
    ]
)
OPEN, DONE, FAILED = 0, 1, 2
_TRUTH, _SHORTCUT = 1, 2
_HEADER = 1 << 14
_PAGE = 4096


@dataclass(frozen=True)
class Layout:
    """What a file holds: ``count`` images of ``size`` x ``size`` at ``bits`` (8 or 16), ``labels`` truth masks each.

    ``labels`` is 0 where the source knows no exact regions; ``key`` says of which data, read in which way.
    """

    key: str
    count: int
    size: int
    bits: int
    labels: int
    shortcut: bool
    id_bytes: int

    def sections(self) -> dict[str, tuple[int, int]]:
        """Offset and bytes per image of each section, and the length of the whole."""
        each = {
            "records": RECORD.itemsize,
            "ids": self.id_bytes,
            "pixels": self.size**2 * self.bits // 8,
            "truth": -(-self.labels * self.size**2 // 8),
            "shortcut": -(-(self.size**2) // 8) if self.shortcut else 0,
        }
        found, offset = {}, _HEADER
        for name, width in each.items():
            found[name] = (offset, width)
            offset += -(-width * self.count // _PAGE) * _PAGE
        return found | {"end": (offset, 0)}

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self.sections()["end"][0]


def encode_ids(image_ids: Sequence[str]) -> np.ndarray:
    """Image ids as fixed-width bytes, which take a tenth of the memory of Python's strings."""
    coded = [image_id.encode() for image_id in image_ids]
    if any(not name or name.endswith(b"\0") for name in coded):
        raise DataError("an image_id is empty or ends in a zero byte; such images can't be kept in a cache")
    return np.array(coded, dtype=f"S{max(map(len, coded), default=1)}")


def create(path: Path, layout: Layout, ids: np.ndarray) -> None:
    """A new file with no image done; the space for pixels is only reserved where the file system does so."""
    with path.open("wb") as file:
        _write_header(file, layout, complete=False)
        file.seek(layout.sections()["ids"][0])
        file.write(ids.astype(f"S{layout.id_bytes}").tobytes())
        file.truncate(layout.length)


def _write_header(file, layout: Layout, complete: bool, index_crc: int = 0) -> None:
    text = json.dumps(asdict(layout) | {"complete": complete, "index_crc": index_crc}).encode()
    head = MAGIC + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    file.seek(0)
    file.write(head.ljust(_HEADER, b"\0"))


class PixelFile:
    """A file of decoded images, mapped; raises DataError for one that is damaged, truncated or of another kind.

    ``writable``: also accepts a file that is not complete, and allows :meth:`put` and :meth:`complete`. Travels to
    other processes by its path and is mapped again there.
    """

    def __init__(self, path: Path, writable: bool = False):
        self.path = Path(path)
        self.writable = writable
        self._file = None
        self.layout, self.is_complete, index_crc = _read_header(self.path)
        if not self.is_complete and not writable:
            raise DataError(f"{self.path}: the cache is not complete; make it with cxrkit.data.prepare")
        self._map = np.memmap(self.path, mode="r", dtype=np.uint8)
        self.records = self._section("records").reshape(-1).view(RECORD)
        self.ids = self._section("ids").reshape(-1).view(f"S{self.layout.id_bytes}")
        kind = np.uint8 if self.layout.bits == 8 else np.dtype("<u2")
        side = self.layout.size
        self.pixels = self._section("pixels").view(kind).reshape(-1, side, side)
        self.truth, self.shortcut = self._section("truth"), self._section("shortcut")
        if self.is_complete and self._index_crc() != index_crc:
            raise DataError(f"{self.path}: the index of the cache is damaged")
        # Each image is compared with its checksum when this process first asks for it.
        self._known = bytearray(self.layout.count)

    def _section(self, name: str) -> np.ndarray:
        start, width = self.layout.sections()[name]
        # A plain view: slices of numpy.memmap cost several times as much as those of an array.
        whole = np.asarray(self._map)[start : start + width * self.layout.count]
        return whole.reshape(self.layout.count, width)

    def _index_crc(self) -> int:
        return zlib.crc32(self.ids.tobytes(), zlib.crc32(self.records.tobytes()))

    def __getstate__(self) -> dict:
        return {"path": self.path, "writable": self.writable}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _crc(self, slot: int) -> int:
        _, masks, _, _, width, height, _ = self.records[slot].item()
        crc = zlib.crc32(b"%d %d %d %s" % (masks, width, height, self.ids[slot]))
        crc = zlib.crc32(self.pixels[slot], crc)
        if masks & _TRUTH:
            crc = zlib.crc32(self.truth[slot], crc)
        if masks & _SHORTCUT:
            crc = zlib.crc32(self.shortcut[slot], crc)
        return crc

    def intact(self, slot: int) -> bool:
        """Whether an image that is marked as done is the one that was written."""
        return int(self.records["crc"][slot]) == self._crc(slot)

    def get(self, slot: int) -> Rendered:
        """The image and masks at ``slot``, as float32 in [0, 1] and bool; raises DataError where they are damaged."""
        if not self._known[slot]:
            if not self.intact(slot):
                raise DataError(f"{self.path}: the cached image is damaged; cxrkit.data.prepare draws it anew")
            self._known[slot] = 1
        top = np.float32(2**self.layout.bits - 1)
        _, masks, _, _, width, height, _ = self.records[slot].item()
        side, labels = self.layout.size, self.layout.labels
        truth = _unpacked(self.truth[slot], (labels, side, side)) if masks & _TRUTH else None
        shortcut = _unpacked(self.shortcut[slot], (side, side)) if masks & _SHORTCUT else None
        image = torch.from_numpy(np.divide(self.pixels[slot], top, dtype=np.float32))
        return Rendered(image, truth, shortcut, (width, height) if width else None)

    def put(self, slot: int, drawn: Rendered, stamp: int) -> None:
        """Write one image; its record, which says that it is done, comes last."""
        image = drawn.image.numpy()
        if image.min() < 0 or image.max() > 1:
            raise DataError("has pixels outside [0, 1], which a cache can't hold")
        top = 2**self.layout.bits - 1
        self._write("pixels", slot, np.rint(image * np.float64(top)).astype(self.pixels.dtype))
        masks = 0
        for name, mask, bit in (("truth", drawn.truth, _TRUTH), ("shortcut", drawn.shortcut, _SHORTCUT)):
            if mask is not None:
                masks |= bit
                packed = np.packbits(mask.numpy())
                if packed.size != self.layout.sections()[name][1]:
                    raise DataError(f"has {name} masks that the first image has not; they can't be kept in a cache")
                self._write(name, slot, packed)
        width, height = drawn.frame or (0, 0)
        record = np.zeros((), RECORD)
        record["masks"], record["width"], record["height"], record["stamp"] = masks, width, height, stamp
        self._write("records", slot, record)
        record["state"], record["crc"] = DONE, self._crc(slot)
        self._write("records", slot, record)

    def fail(self, slot: int) -> None:
        """Mark an image that can't be drawn."""
        record = np.zeros((), RECORD)
        record["state"] = FAILED
        self._write("records", slot, record)

    def _write(self, name: str, slot: int, values: np.ndarray) -> None:
        # Not through the map: where the disk is full, a write raises, but a map ends the process.
        if self._file is None:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  kept open for all images
        start, width = self.layout.sections()[name]
        try:
            self._file.seek(start + slot * width)
            left = memoryview(values.tobytes())
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def complete(self) -> None:
        """Note that every image was tried, with a checksum over the index, and bring all to the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
            _write_header(file, self.layout, complete=True, index_crc=self._index_crc())
            file.flush()
            os.fsync(file.fileno())

    def reopen(self) -> None:
        """Note that work is left; the file is complete only after :meth:`complete`."""
        with self.path.open("r+b") as file:
            _write_header(file, self.layout, complete=False)

    def take_over(self, other: PixelFile, slots: np.ndarray, theirs: np.ndarray) -> None:
        """Copy intact images of another file of the same key: its ``theirs`` to ``slots`` here."""
        for slot, their in zip(slots.tolist(), theirs.tolist(), strict=True):
            if other.records["state"][their] == DONE and other.intact(their):
                for name in ("pixels", "truth", "shortcut", "records"):
                    self._write(name, slot, getattr(other, name)[their])


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).view(bool).reshape(shape))


def _read_header(path: Path) -> tuple[Layout, bool, int]:
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER)
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    if not head.startswith(MAGIC):
        raise DataError(f"{path}: is no cache of cxrkit; move it away, or choose another folder for the cache")
    start = len(MAGIC) + 8
    size, crc = (int.from_bytes(head[start - k : start - k + 4], "little") for k in (8, 4))
    text = head[start : start + size]
    if not text or len(text) != size or zlib.crc32(text) != crc:
        raise DataError(f"{path}: the header of the cache is damaged")
    about = json.loads(text)
    complete, index_crc = about.pop("complete"), about.pop("index_crc")
    layout = Layout(**about)
    if length != layout.length:
        raise DataError(f"{path}: the cache is truncated or damaged: {length} bytes, expected {layout.length}")
    return layout, complete, index_crc
