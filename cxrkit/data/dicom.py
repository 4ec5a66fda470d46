"""DICOM files: the values of the header, what kind of object it is, and the pixels as they are stored.

Nothing of a header, which may identify a patient, is ever repeated in a message: it names fields, not their values.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import get_frame, parse_fragments
from pydicom.multival import MultiValue
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    UID_dictionary,
)

from cxrkit.data.size_limits import check_deflated, check_pixels, stated_extent
from cxrkit.errors import DataError, ParameterError

__all__ = ["GREY", "Header", "Pixels", "extent", "read_header", "stored_pixels"]

GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_MAGIC = slice(128, 132)
# Functional groups of enhanced multi-frame objects that hold what other objects hold at the top (PS3.3 C.7.6.16).
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


class Header:
    """The values of a file's header, for one frame of it; ``notices`` are remarks about the file, without its path."""

    def __init__(self, path: Path, dataset: pydicom.Dataset):
        self.path, self.dataset, self.notices = path, dataset, []
        self._layers = [dataset]

    def first(self, keyword: str, kind: Callable = str, default: Any = None) -> Any:
        """The first value of a field as ``kind`` (text in capitals); ``default`` where it is missing or empty."""
        try:
            for layer in self._layers:
                value = layer[keyword].value if keyword in layer else None
                if isinstance(value, list | tuple | MultiValue):
                    value = value[0] if len(value) else None
                if value is not None and str(value).strip():
                    return str(value).strip().upper() if kind is str else kind(value)
        except Exception:
            raise self.unreadable(keyword) from None
        return default

    def item(self, keyword: str) -> pydicom.Dataset | None:
        """The first item of a sequence, None where it is missing or empty."""
        try:
            items = [layer[keyword].value[0] for layer in self._layers if layer.get(keyword) and len(layer[keyword][0])]
        except Exception:
            items = [None]
        if items and not isinstance(items[0], pydicom.Dataset):
            raise self.unreadable(keyword)
        return items[0] if items else None

    def required(self, keyword: str) -> int:
        """The number in a field without which pixels have no meaning."""
        value = self.first(keyword, int)
        if value is None:
            raise DataError(f"{self.path}: the DICOM header lacks {keyword}, without which its pixels can't be read")
        return value

    def unreadable(self, keyword: str) -> DataError:
        """The error for a field that can't be understood."""
        return DataError(f"{self.path}: the DICOM field {keyword} can't be read")

    def choose(self, frame: int) -> None:
        """Let functional groups, where there are some, speak for one frame."""
        for keyword, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
            groups = self.dataset.get(keyword)
            if isinstance(groups, pydicom.Sequence) and index < len(groups):
                held = [groups[index].get(name) for name in _GROUPS]
                self._layers[:0] = [one[0] for one in held if one]

    @property
    def kind(self) -> str:
        """The standard's name for this kind of object, such as "RT Plan"; empty where it is private or not stated."""
        for place, keyword in ((self.dataset, "SOPClassUID"), (self.dataset.file_meta, "MediaStorageSOPClassUID")):
            known = UID_dictionary.get(str(place.get(keyword)))
            if known:
                return known[0].removesuffix(" Storage")
        return ""

    def is_little_endian(self) -> bool:
        """Whether numbers in raw bytes begin with the low byte."""
        return self.dataset.file_meta.TransferSyntaxUID != ExplicitVRBigEndian


class _File(io.BufferedReader):
    """An open file; pydicom reads the rest of one in one piece only where it is deflated and about to be unpacked."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.path = path

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            check_deflated(self.path, self.tell())
        return super().read(size)


def read_header(path: Path, pixels: bool) -> Header:
    """The header of a file, with the pixels still coded, or without them; pydicom's own errors where it is damaged."""
    # Values are parsed when asked for, so a damaged field that nobody reads does no harm.
    with _File(path) as file:
        bare = file.peek(132)[_MAGIC] != b"DICM"
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, force=bare)
    if not dataset.file_meta.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = _guessed_syntax(path, dataset)
    # Where a compressed image ends too early, pydicom returns nothing at all.
    if not len(dataset):
        raise DataError(f"{path}: the DICOM file is truncated or damaged")
    return Header(path, dataset)


def _guessed_syntax(path: Path, dataset: pydicom.Dataset) -> UID:
    """The transfer syntax that the data set itself shows; for compressed pixels there is none."""
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise DataError(f"{path}: the DICOM file does not say how its pixels are compressed")
    implicit, little = dataset.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def extent(header: Header) -> tuple[int, int]:
    """Rows and columns; raises DataError for an object that is no image, naming its kind."""
    rows, columns = (header.first(name, int, 0) for name in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        raise DataError(f"{header.path}: the DICOM file{_of(header)} holds no image (Rows and Columns are missing)")
    samples, bits = header.first("SamplesPerPixel", int, 1), header.first("BitsAllocated", int, 8)
    check_pixels(header.path, columns, rows, max(1, samples) * max(8, bits) // 8)
    return rows, columns


@dataclass(frozen=True)
class Pixels:
    """One frame: ``words`` as stored, ``[H, W]``, or ``[H, W, 3]`` of ``photometric`` "RGB" or "YBR_…".

    Of each word, ``bits`` bits from bit ``shift`` on are the pixel.
    """

    words: np.ndarray
    photometric: str
    bits: int
    shift: int
    signed: bool


def stored_pixels(header: Header, frame: int | None) -> Pixels:
    """The pixels of a frame; raises DataError where there are none, or others than the header says."""
    path, rows_columns = header.path, extent(header)
    if "PixelData" not in header.dataset:
        if "FloatPixelData" in header.dataset or "DoubleFloatPixelData" in header.dataset:
            raise DataError(f"{path}: holds floating-point pixels{_of(header)}, which no radiograph has")
        raise DataError(f"{path}: the DICOM file holds no pixel data{_of(header)}, or ends before it")
    frames = max(1, header.first("NumberOfFrames", int, 1))
    if frames > 1 and frame is None:
        raise DataError(f"{path}: holds {frames} frames{_of(header)}; choose one with frame=0 .. {frames - 1}")
    if frame is not None and frame not in range(frames):
        raise ParameterError(f"frame={frame}: {path} holds frames 0 .. {frames - 1}")
    frame = int(frame or 0)
    header.choose(frame)
    options = _pixel_options(header, rows_columns, frames)
    words, photometric = _decoded(header, frame, options)
    if words.shape[:2] != rows_columns or words.ndim not in (2, 3):
        raise DataError(f"{path}: the pixel data do not match Rows and Columns")
    bits, signed = options["bits_stored"], bool(options["pixel_representation"])
    if header.dataset.file_meta.TransferSyntaxUID.is_encapsulated and not _is_rle(header):
        # Decoders put the stored bits lowest, and may bring more of them than the header says.
        low, high = int(words.min()), int(words.max())
        return Pixels(words, photometric, max(bits, high.bit_length(), low < 0 and (~low).bit_length() + 1), 0, signed)
    shift = header.first("HighBit", int, bits - 1) + 1 - bits
    return Pixels(words, photometric, bits, shift if 0 <= shift <= options["bits_allocated"] - bits else 0, signed)


def _of(header: Header) -> str:
    return f" ({header.kind})" if header.kind else ""


def _is_rle(header: Header) -> bool:
    return header.dataset.file_meta.TransferSyntaxUID == RLELossless


def _pixel_options(header: Header, rows_columns: tuple[int, int], frames: int) -> dict[str, Any]:
    """The fields on which decoding rests, as pydicom's decoders take them."""
    path, samples = header.path, header.first("SamplesPerPixel", int, 1)
    photometric = header.first("PhotometricInterpretation")
    if photometric is None:
        photometric = "MONOCHROME2" if samples == 1 else "RGB"
        header.notices.append(f"does not state its photometric interpretation; {photometric} is assumed")
    if photometric not in GREY + _COLOUR:
        raise DataError(f"{path}: the photometric interpretation is not one that a radiograph can have")
    if (samples == 1) != (photometric in (*GREY, "PALETTE COLOR")):
        raise DataError(f"{path}: SamplesPerPixel and PhotometricInterpretation of the DICOM header disagree")
    allocated, stored, signed = map(header.required, ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    if not (allocated in (1, 8, 16, 32) and 1 <= stored <= allocated and signed in (0, 1)):
        raise DataError(
            f"{path}: BitsAllocated, BitsStored and PixelRepresentation of the DICOM header don't fit together, "
            "or are not those of a radiograph"
        )
    return {
        "rows": rows_columns[0],
        "columns": rows_columns[1],
        "samples_per_pixel": samples,
        "photometric_interpretation": photometric,
        "planar_configuration": header.first("PlanarConfiguration", int, 0),
        "number_of_frames": frames,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "pixel_representation": signed,
        "pixel_keyword": "PixelData",
        "pixel_vr": header.dataset["PixelData"].VR,
        # Grey words are looked up whole: what is in their unused bits may matter.
        "correct_unused_bits": photometric not in GREY,
    }


def _decoded(header: Header, frame: int, options: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Words of one frame, and the photometric interpretation that they have once decoded."""
    path, syntax = header.path, header.dataset.file_meta.TransferSyntaxUID
    # A name of the standard's own list says what is missing without repeating what the file says.
    name = UID_dictionary[syntax][0] if syntax in UID_dictionary else "unknown"
    try:
        data = header.dataset.PixelData
        if name != "unknown" and syntax.is_encapsulated:
            if "ExtendedOffsetTable" in header.dataset:
                tables = header.dataset.ExtendedOffsetTable, header.dataset.ExtendedOffsetTableLengths
                options = options | {"extended_offsets": tables}
            _check_coded(header, data, frame, options)
        else:
            _check_length(header, data, options)
        words, after = get_decoder(syntax).as_array(data, index=frame, **options)
        return words, str(after["photometric_interpretation"])
    except DataError:
        raise
    except RuntimeError:  # also NotImplementedError: no decoder, or the decoder gave up
        raise DataError(
            f"{path}: the pixel data are damaged, or stored in a way no installed decoder reads ({name})"
        ) from None
    except Exception:
        raise DataError(f"{path}: the pixel data are truncated or do not match the DICOM header") from None


def _size(options: dict[str, Any]) -> float:
    """Bytes of one frame that is not compressed."""
    size = options["rows"] * options["columns"] * options["samples_per_pixel"] * options["bits_allocated"] / 8
    return size * 2 / 3 if options["photometric_interpretation"] == "YBR_FULL_422" else size


def _check_length(header: Header, data: bytes, options: dict[str, Any]) -> None:
    """Refuse pixels that are more or fewer than the header says.

    Less than a row or a column more can't come from a wrong size; nor do a few zeros, which some devices append.
    """
    expected = math.ceil(_size(options) * options["number_of_frames"])
    excess = data[expected + expected % 2 :]
    if len(data) < expected:
        raise DataError(f"{header.path}: the pixel data are truncated or do not match the DICOM header")
    if len(excess) < _size(options) / max(options["rows"], options["columns"]):
        return
    if len(excess) > expected / 32 or any(excess):
        raise DataError(
            f"{header.path}: the pixel data are larger than Rows, Columns, SamplesPerPixel, BitsAllocated and "
            "NumberOfFrames of the DICOM header say"
        )


def _check_coded(header: Header, data: bytes, frame: int, options: dict[str, Any]) -> None:
    """Refuse compressed frames that are more, or of another size, than the header promises."""
    frames, rows, columns = (options[name] for name in ("number_of_frames", "rows", "columns"))
    coded = get_frame(data, frame, number_of_frames=frames, extended_offsets=options.get("extended_offsets"))
    stated = stated_extent(coded)
    fits = stated is None or (stated[:2] == (rows, columns) and stated[2] == options["samples_per_pixel"])
    # No coding makes a frame much larger, so a longer one is there to unpack to more than its pixels.
    most = 2 * rows * columns * options["samples_per_pixel"] * max(8, options["bits_allocated"]) // 8 + 65536
    if not fits or len(coded) > most:
        raise DataError(f"{header.path}: the pixel data do not match Rows and Columns")
    if frames == 1 and _frames_held(data, coded, _is_rle(header)) > 1:
        raise DataError(f"{header.path}: the pixel data hold more frames than NumberOfFrames of the DICOM header says")


def _frames_held(data: bytes, coded: bytes, rle: bool) -> int:
    """How many fragments begin a frame: all where RLE is used, else those that begin as the first one does."""
    fragments = parse_fragments(data)[1][1:]  # behind the table of offsets
    return len(fragments) if rle else sum(data[place + 8 : place + 11] == coded[:3] for place in fragments)
