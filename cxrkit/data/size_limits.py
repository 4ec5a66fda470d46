"""Size limits: files that claim more, or unpack to more, are refused before they fill the memory."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

from cxrkit.errors import DataError

__all__ = ["MOST_BYTES", "MOST_PIXELS", "check_deflated", "check_file", "check_pixels", "stated_extent"]

# The largest detectors have about 20 million pixels.
MOST_PIXELS = 100_000_000
# Of a file, and of what it unpacks to: colour at 16 bits takes 6 bytes a pixel.
MOST_BYTES = 6 * MOST_PIXELS
_PIECE = 1 << 20
_JPEG_2000 = b"\xff\x4f\xff\x51"


def check_file(path: Path) -> None:
    """Refuse what is no ordinary file (a pipe would wait for ever) or larger than ``MOST_BYTES``."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        # A name with a zero byte, or one too long, is as good as missing.
        why = getattr(error, "strerror", None) or "no file can have this name"
        raise DataError(f"{path}: can't be opened ({why})") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: is a folder, expected an image file")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is no ordinary file, expected an image file")
    if found.st_size > MOST_BYTES:
        raise DataError(f"{path}: is larger than {MOST_BYTES // 10**6} MB, which no radiograph is")


def check_pixels(path: Path, width: int, height: int, bytes_per_pixel: int = 1) -> None:
    """Refuse an image that claims more than ``MOST_PIXELS`` pixels or ``MOST_BYTES`` bytes."""
    if width * height > MOST_PIXELS or width * height * bytes_per_pixel > MOST_BYTES:
        raise DataError(
            f"{path}: claims more pixels than any radiograph has (the limit is {MOST_PIXELS // 10**6} million)"
        )


def check_deflated(path: Path, start: int) -> None:
    """Refuse a deflated stream, from byte ``start`` on, that unpacks to more than ``MOST_BYTES``; keeps none of it."""
    unpacker, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        try:
            piece = file.read(_PIECE)
            while piece and not unpacker.eof:
                total += len(unpacker.decompress(piece, _PIECE))
                if total > MOST_BYTES:
                    raise DataError(f"{path}: unpacks to more than {MOST_BYTES // 10**6} MB, which no radiograph does")
                piece = unpacker.unconsumed_tail or file.read(_PIECE)
        except zlib.error:
            raise DataError(f"{path}: the DICOM file is truncated or damaged") from None


def stated_extent(coded: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components that a JPEG, JPEG-LS or JPEG 2000 stream itself states; None where none is found.

    A decoder believes the stream, not the DICOM header around it. Sources: ITU-T T.81 B.2.2, T.87 C.2.2, T.800 A.5.1.
    """
    start = coded.find(_JPEG_2000)
    if 0 <= start <= 256:  # behind the boxes of a JP2 file, if any
        fields = coded[start + 8 : start + 42]
        if len(fields) < 34:
            return None
        x1, y1, x0, y0 = (int.from_bytes(fields[k : k + 4], "big") for k in (0, 4, 8, 12))
        return y1 - y0, x1 - x0, int.from_bytes(fields[32:34], "big")
    position = 2 if coded[:2] == b"\xff\xd8" else len(coded)
    while position + 9 < len(coded):
        if coded[position] != 0xFF:
            return None
        marker = coded[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            rows, columns = (int.from_bytes(coded[position + k : position + k + 2], "big") for k in (5, 7))
            return rows, columns, coded[position + 9]
        position += 2 + max(2, int.from_bytes(coded[position + 2 : position + 4], "big"))
    return None
