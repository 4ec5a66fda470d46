"""Read one radiograph, DICOM, PNG or JPEG, to grey float32 in [0, 1].

The format is told by the file's first bytes, never by its name. Messages name the file and the cause in our
own words: nothing that stands in a DICOM header, which may identify a patient, is ever repeated.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cxrkit.data.geometry import resize
from cxrkit.data.limits import check_deflated, check_file, check_pixels, stated_extent
from cxrkit.errors import DataError, ParameterError

__all__ = ["image_size", "image_tensor", "read_image"]

# ITU-R BT.601 luma, as Pillow's own conversion to grey.
_LUMA = np.array([0.299, 0.587, 0.114])
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


def image_tensor(path: str | Path, size: int) -> Tensor:
    """One radiograph as networks take it: float32 ``[1, size, size]`` in [0, 1]; reads and raises as `read_image`."""
    return resize(torch.from_numpy(read_image(path))[None], size)


def read_image(path: str | Path, frame: int | None = None, window: bool = True) -> np.ndarray:
    """Read a radiograph as displayed: float32 ``[H, W]`` in [0, 1], grey, bone bright.

    DICOM: rescale slope and intercept (or the modality table), then the first VOI table or window when there
    is one and ``window`` is true; without one, 8-bit images are divided by the range they can store and
    deeper images run from their own minimum to their maximum. MONOCHROME1 is inverted, colour becomes grey.
    ``frame`` picks a frame of a multi-frame file, which is refused otherwise. PNG and JPEG: divided by 255
    or, for 16-bit grey, 65535; EXIF orientation is applied; transparent parts turn black; PNG with 16 bits
    per colour channel is read at 8 bits. Raises DataError, naming file and cause, for whatever cannot be read
    whole, and ParameterError for a frame that the file does not have. Source: paper `bcos`, sections on RSNA
    and VinBigData.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "DICOM":
        grey = _read_dicom(path, frame, window)
    elif frame not in (None, 0):
        raise ParameterError(f"frame={frame}: {path} is a {kind} image, which has only frame 0")
    else:
        grey = _read_picture(path, kind)
    return np.ascontiguousarray(grey, dtype=np.float32)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the image as :func:`read_image` returns it, from the header alone.

    Raises DataError as :func:`read_image` does, except for damage to the pixels, which are not looked at.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "DICOM":
        with _QUIET:
            header = _dicom_header(path, pixels=False)
            return _dicom_extent(path, header)[::-1]
    with _QUIET, _picture_errors(path, kind), Image.open(path, formats=(kind,)) as picture:
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
    if start[128:132] == b"DICM":
        return "DICOM"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    raise DataError(f"{path}: is neither DICOM, PNG nor JPEG, whatever its name says")


# PNG and JPEG


@contextmanager
def _picture_errors(path: Path, kind: str):
    try:
        yield
    except Image.DecompressionBombError:
        raise DataError(f"{path}: claims more pixels than any radiograph has") from None
    except DataError:
        raise
    except Exception:  # Pillow's decoders raise whatever the damage leads to, struct.error and MemoryError included
        raise DataError(f"{path}: the {kind} file is truncated or damaged") from None


def _read_picture(path: Path, kind: str) -> np.ndarray:
    with _QUIET, _picture_errors(path, kind), Image.open(path, formats=(kind,)) as picture:
        check_pixels(path, *picture.size)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            return np.asarray(picture).astype(np.float64) / 65535
        if picture.mode in ("L", "1"):
            grey, alpha = picture.convert("L"), None
        else:
            colour = picture.convert("RGBA")
            grey, alpha = colour.convert("RGB"), colour.getchannel("A")
    pixels = np.asarray(grey).astype(np.float64) / 255
    if pixels.ndim == 3:
        pixels = _to_grey(pixels)
    return pixels if alpha is None else pixels * (np.asarray(alpha) / 255)


def _to_grey(colour: np.ndarray) -> np.ndarray:
    # Equal channels are kept exactly: the weighted sum would round.
    if (colour == colour[..., :1]).all():
        return colour[..., 0]
    return (colour @ _LUMA).clip(0, 1)


# DICOM


class _DicomFile(io.BufferedReader):
    """An open file; pydicom reads the rest of one in one piece only where it is deflated and about to be unpacked."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.path = path

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            check_deflated(self.path, self.tell())
        return super().read(size)


def _dicom_header(path: Path, pixels: bool):
    import pydicom

    try:
        # Values are parsed when asked for, so a damaged field that nobody reads does no harm.
        with _DicomFile(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=not pixels)
    except DataError:
        raise
    except Exception:  # whatever pydicom says may quote the header
        raise DataError(f"{path}: the DICOM file is truncated or damaged") from None
    # Where a compressed image ends too early, pydicom returns nothing at all.
    if not len(header):
        raise DataError(f"{path}: the DICOM file is truncated or damaged")
    return header


def _dicom_value(path: Path, header, keyword: str, kind: type, default=None):
    """The first value of a header field as a number or text; the message never repeats it."""
    try:
        value = header.get(keyword)
        if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
            value = value[0] if len(value) else None
        return default if value in (None, "") else kind(value)
    except Exception:
        raise DataError(f"{path}: the DICOM field {keyword} can't be read") from None


def _dicom_extent(path: Path, header) -> tuple[int, int]:
    rows = _dicom_value(path, header, "Rows", int, 0)
    columns = _dicom_value(path, header, "Columns", int, 0)
    if rows < 1 or columns < 1:
        raise DataError(f"{path}: the DICOM file holds no image (Rows and Columns are missing)")
    samples = _dicom_value(path, header, "SamplesPerPixel", int, 1)
    bits = _dicom_value(path, header, "BitsAllocated", int, 8)
    check_pixels(path, columns, rows, max(1, samples) * max(8, bits) // 8)
    return rows, columns


def _read_dicom(path: Path, frame: int | None, window: bool) -> np.ndarray:
    with _QUIET:
        header = _dicom_header(path, pixels=True)
        extent = _dicom_extent(path, header)
        if "PixelData" not in header:
            raise DataError(f"{path}: the DICOM file holds no pixel data, or ends before it")
        frames = _dicom_value(path, header, "NumberOfFrames", int, 1)
        if frames > 1 and frame is None:
            raise DataError(f"{path}: holds {frames} frames; choose one with frame=0 .. {frames - 1}")
        if frame is not None and not 0 <= frame < frames:
            raise ParameterError(f"frame={frame}: {path} holds frames 0 .. {frames - 1}")
        pixels = _dicom_pixels(path, header, frame or 0)
        if pixels.shape[:2] != extent or pixels.ndim not in (2, 3):
            raise DataError(f"{path}: the pixel data do not match Rows and Columns")
        return _displayed(path, header, pixels, window)


def _dicom_pixels(path: Path, header, frame: int) -> np.ndarray:
    from pydicom.pixels import pixel_array

    try:
        syntax = header.file_meta.TransferSyntaxUID
        # A name of the standard's own list says what is missing without repeating what the file says.
        name = syntax.name if not syntax.is_private and syntax.name != str(syntax) else "unknown"
        compressed = name != "unknown" and syntax.is_compressed
    except Exception:
        raise DataError(f"{path}: the DICOM file does not say how its pixels are stored") from None
    try:
        if compressed:
            _check_coded(path, header, frame)
        return pixel_array(header, index=frame)
    except DataError:
        raise
    except RuntimeError:  # also NotImplementedError: no decoder, or the decoder gave up
        raise DataError(
            f"{path}: the pixel data are damaged, or stored in a way no installed decoder reads ({name})"
        ) from None
    except Exception:
        raise DataError(f"{path}: the pixel data are truncated or do not match the DICOM header") from None


def _check_coded(path: Path, header, frame: int) -> None:
    """Refuse a compressed frame that would unpack to another size than the header promises."""
    from pydicom.encaps import get_frame

    frames = _dicom_value(path, header, "NumberOfFrames", int, 1)
    coded = get_frame(header.PixelData, frame, number_of_frames=max(1, frames))
    stated = stated_extent(coded)
    rows, columns = _dicom_extent(path, header)
    fits = stated is None or (stated[:2] == (rows, columns) and stated[2] <= 4)
    # No coding makes a frame much larger, so a longer one is there to unpack to more than its pixels.
    most = 2 * rows * columns * max(1, header.SamplesPerPixel) * max(8, header.BitsAllocated) // 8 + 65536
    if not fits or len(coded) > most:
        raise DataError(f"{path}: the pixel data do not match Rows and Columns")


def _displayed(path: Path, header, pixels: np.ndarray, window: bool) -> np.ndarray:
    """From stored values to [0, 1] as a viewer shows them."""
    from pydicom.pixels import apply_color_lut

    photometric = _dicom_value(path, header, "PhotometricInterpretation", str, "MONOCHROME2")
    bits = _dicom_value(path, header, "BitsStored", int, 8 * pixels.dtype.itemsize)
    try:
        if photometric == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)
            return _to_grey(pixels.astype(np.float64) / np.iinfo(pixels.dtype).max)
        if pixels.ndim == 3:
            return _to_grey(pixels[..., :3].astype(np.float64) / (2**bits - 1))
    except Exception:
        raise DataError(f"{path}: the colour tables of the DICOM file can't be applied") from None
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"{path}: the photometric interpretation is not one that grey images have")
    shown = _grey_values(path, header, pixels, bits, window).clip(0, 1)
    return 1 - shown if photometric == "MONOCHROME1" else shown


def _grey_values(path: Path, header, pixels: np.ndarray, bits: int, window: bool) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi

    try:
        values = apply_modality_lut(pixels, header)
        if window and "VOILUTSequence" in header:
            table = header.VOILUTSequence[0]
            top = 2 ** int(table.LUTDescriptor[2]) - 1
            return apply_voi(values, header, index=0).astype(np.float64) / top
    except Exception:
        raise DataError(f"{path}: a look-up table of the DICOM file can't be applied") from None
    values = values.astype(np.float64)
    centre = _dicom_value(path, header, "WindowCenter", float)
    width = _dicom_value(path, header, "WindowWidth", float)
    if window and centre is not None and width is not None:
        function = _dicom_value(path, header, "VOILUTFunction", str, "LINEAR")
        return _windowed(path, values, centre, width, function)
    low, high = values.min(), values.max()
    if bits <= 8 or low == high:
        signed = _dicom_value(path, header, "PixelRepresentation", int, 0)
        ends = np.array([0, 2**bits - 1]) - (2 ** (bits - 1) if signed else 0)
        if "ModalityLUTSequence" not in header:
            ends = apply_modality_lut(ends, header)
        low, high = float(ends.min()), float(ends.max())
    return (values - low) / (high - low)


def _windowed(path: Path, values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """The window functions of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, with an output range of [0, 1]."""
    smallest = 1 if function == "LINEAR" else 0
    if width < smallest or width == 0 or not np.isfinite([centre, width]).all():
        raise DataError(f"{path}: the DICOM window has no positive width; read it with window=False")
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if function != "LINEAR":
        raise DataError(f"{path}: the DICOM window function is unknown; read it with window=False")
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5
