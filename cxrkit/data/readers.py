"""Read one radiograph, DICOM, PNG or JPEG, to grey float32 in [0, 1].

The file's first bytes decide on the format, never its name. Messages name the file and the cause in our own words:
they repeat nothing of a DICOM header, which may identify a patient.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cxrkit.data.geometry import resize
from cxrkit.data.intensity import luma
from cxrkit.data.size_limits import check_file, check_pixels
from cxrkit.errors import CxrkitError, DataError, ParameterError

__all__ = ["gathered_notices", "image_size", "image_tensor", "noticing", "read_image"]

_EXIF_ORIENTATION = 0x0112


class _Quiet:
    """Keeps what the libraries say about a file, which may quote its header, from warnings and logs.

    The filters belong to the whole process: the first thread that reads sets them, the last one puts them back.
    """

    def __init__(self):
        self._lock, self._readers, self._before = threading.Lock(), 0, None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._alone)

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
                logging.getLogger("pydicom").disabled = True
            self._readers += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._before.__exit__(None, None, None)
                logging.getLogger("pydicom").disabled = False

    def _alone(self) -> None:
        """A process forked while threads were reading has none of them."""
        self._lock = threading.Lock()
        if self._readers:
            self._readers = 1
            self.__exit__()


_QUIET = _Quiet()
_noticed: ContextVar[list[str] | None] = ContextVar("noticed", default=None)


def gathered_notices() -> list[str] | None:
    """The list of the innermost :func:`noticing`, None outside of any."""
    return _noticed.get()


@contextmanager
def noticing() -> Iterator[list[str]]:
    """Gather the notices of :func:`read_image`, without the file's name, in the list that this yields."""
    token = _noticed.set([])
    try:
        yield _noticed.get()
    finally:
        _noticed.reset(token)


def image_tensor(path: str | Path, size: int, **options: Any) -> Tensor:
    """One radiograph as networks take it: float32 ``[1, size, size]`` in [0, 1]; options and errors of `read_image`."""
    return resize(torch.from_numpy(read_image(path, **options))[None], size)


def read_image(path: str | Path, frame: int | None = None, window: bool = True, depth: int | None = None) -> np.ndarray:
    """Read a radiograph as displayed: float32 ``[H, W]`` in [0, 1], grey, bone bright.

    DICOM: modality table or rescaling, then the first VOI table or window when there is one and ``window`` is true;
    without one, 8-bit images are divided by the range they can store and deeper images run from their own minimum to
    their maximum. Padding takes no part in that and is black. The presentation shape or else MONOCHROME1 inverts;
    colour becomes grey. ``frame`` picks a frame of a multi-frame file, which is refused otherwise. PNG and JPEG:
    divided by 255 or, for 16-bit grey, 65535, unless ``depth`` says how many of the 16 bits are in use; EXIF
    orientation is applied; transparent parts turn black; PNG with 16 bits per colour channel is read at 8 bits.

    A UserWarning names files in which something had to be assumed, or which may be darker than they should. Raises
    DataError, naming file and cause, for whatever cannot be read whole, and ParameterError for a frame that the file
    does not have or a ``depth`` outside 1 to 16. Sources: DICOM PS3.3; paper `bcos`, sections on RSNA and VinBigData.
    """
    path = Path(path)
    if depth is not None and depth not in range(1, 17):
        raise ParameterError(f"depth={depth}: give the bits of a 16-bit picture that are in use, 1 to 16")
    kind = _kind(path)
    if kind == "DICOM":
        with _QUIET, _errors(path, kind):
            from cxrkit.data.dicom import read_header, stored_pixels
            from cxrkit.data.presentation import displayed

            header = read_header(path, pixels=True)
            grey, notices = displayed(header, stored_pixels(header, frame), window), header.notices
    elif frame not in (None, 0):
        raise ParameterError(f"frame={frame}: {path} is a {kind} image, which has only frame 0")
    else:
        grey, notices = _read_picture(path, kind, depth)
    gathered = gathered_notices()
    for notice in dict.fromkeys(notices):
        if gathered is None:
            warnings.warn(f"{path}: {notice}", UserWarning, stacklevel=2)
        else:
            gathered.append(notice)
    return np.ascontiguousarray(grey, dtype=np.float32)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the image as :func:`read_image` returns it, from the header alone.

    Raises DataError as :func:`read_image` does, except for damage to the pixels, which are not looked at.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "DICOM":
        with _QUIET, _errors(path, kind):
            from cxrkit.data.dicom import extent, read_header

            return extent(read_header(path, pixels=False))[::-1]
    with _QUIET, _errors(path, kind), Image.open(path, formats=(kind,)) as picture:
        width, height = picture.size
        check_pixels(path, width, height)
        # Orientations 5 to 8 of the EXIF standard exchange rows and columns.
        turned = picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _kind(path: Path) -> str:
    check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if start[128:132] == b"DICM" or _begins_dataset(start):
        return "DICOM"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    raise DataError(f"{path}: is neither DICOM, PNG nor JPEG, whatever its name says")


def _begins_dataset(start: bytes) -> bool:
    """Whether a file's first bytes are a DICOM data set without the preamble: an element of group 2 or 8."""
    if len(start) < 12:
        return False
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", start[:8])
        explicit = start[4:6].isalpha() and start[4:6].isupper()
        if group in (2, 8) and element <= 0x70 and (explicit or (order == "<" and length <= 256)):
            return True
    return False


@contextmanager
def _errors(path: Path, kind: str):
    try:
        yield
    except Image.DecompressionBombError:
        raise DataError(f"{path}: claims more pixels than any radiograph has") from None
    except CxrkitError:
        raise
    except MemoryError:
        raise DataError(f"{path}: is too large for the memory that is left") from None
    except Exception:  # the libraries raise whatever the damage leads to, struct.error included
        raise DataError(f"{path}: the {kind} file is truncated or damaged") from None


# PNG and JPEG


def _read_picture(path: Path, kind: str, depth: int | None) -> tuple[np.ndarray, list[str]]:
    with _QUIET, _errors(path, kind), Image.open(path, formats=(kind,)) as picture:
        check_pixels(path, *picture.size)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            return _sixteen_bits(path, np.asarray(picture), depth)
        if picture.mode in ("L", "1"):
            grey, alpha = picture.convert("L"), None
        else:
            colour = picture.convert("RGBA")
            grey, alpha = colour.convert("RGB"), colour.getchannel("A")
    pixels = np.asarray(grey).astype(np.float64) / 255
    if pixels.ndim == 3:
        pixels = luma(pixels)
    return pixels if alpha is None else pixels * (np.asarray(alpha) / 255), []


def _sixteen_bits(path: Path, pixels: np.ndarray, depth: int | None) -> tuple[np.ndarray, list[str]]:
    """Divided by the highest value of ``depth`` bits, or of 16 with a notice where most of them are never used."""
    highest, notices = int(pixels.max()), []
    if depth is None and 0 < highest < 1 << 14:
        used = next(bits for bits in (8, 10, 12, 14) if highest < 1 << bits)
        notices = [f"holds no more than {used} bits in its 16, so it is dark; depth={used} makes it bright"]
    top = (1 << int(depth or 16)) - 1
    if highest > top:
        raise DataError(f"{path}: holds values above {top}, so depth={depth} can't be right")
    return pixels.astype(np.float64) / top, notices
