"""From the stored values of a DICOM image to the grey that a viewer shows (DICOM PS3.3, C.7.6.3, C.11.1 and C.11.2).

Every grey depends on the stored value alone. It is worked out once for each value, and the image looks it up.
"""

from __future__ import annotations

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut

from cxrkit.data.dicom import GREY, Header, Pixels
from cxrkit.data.intensity import luma
from cxrkit.errors import DataError

__all__ = ["displayed"]

_MOST_LEVELS = 1 << 16


def displayed(header: Header, pixels: Pixels, window: bool) -> np.ndarray:
    """The image as shown, ``[H, W]`` in [0, 1]; padding is black. Raises DataError naming the file and the field."""
    if pixels.photometric not in GREY:
        return _colour_to_grey(header, pixels)
    words, index = _levels(pixels.words)
    shown = _greys(header, pixels, words, index, window)
    return shown.astype(np.float32).take(index)


def _colour_to_grey(header: Header, pixels: Pixels) -> np.ndarray:
    colour = _palette(header, pixels) if pixels.photometric == "PALETTE COLOR" else pixels.words / (2**pixels.bits - 1)
    grey = colour[..., 0] if pixels.photometric.startswith("YBR") else luma(colour)
    if (colour != grey[..., None]).any():
        header.notices.append(f"is a colour image ({pixels.photometric}); its luma is taken")
    return grey


def _palette(header: Header, pixels: Pixels) -> np.ndarray:
    """The colours, ``[H, W, 3]``, that a palette gives (PS3.3, C.7.6.3.1.5 and C.7.6.3.1.6)."""
    if "SegmentedRedPaletteColorLookupTableData" in header.dataset:
        try:
            colour = apply_color_lut(pixels.words, header.dataset)
            return colour[..., :3] / np.iinfo(colour.dtype).max
        except Exception:
            raise DataError(f"{header.path}: the palette of the DICOM file can't be applied") from None
    words, index = _levels(pixels.words)
    stem = "{}PaletteColorLookupTable{}"
    tables = [(stem.format(name, "Descriptor"), stem.format(name, "Data")) for name in ("Red", "Green", "Blue")]
    looked = [_looked_up(header, header.dataset, words, (0, 2**pixels.bits - 1), *fields) for fields in tables]
    return np.stack([values / top for values, top in looked], axis=-1)[index]


# Grey


def _levels(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that words may have, int64, and for each word its position among them."""
    words = words.astype(words.dtype.newbyteorder("="), copy=False)
    low, high = int(words.min()), int(words.max())
    if high - low >= _MOST_LEVELS:
        levels, index = np.unique(words, return_inverse=True)
        return levels.astype(np.int64), index.reshape(words.shape)
    levels = np.arange(low, high + 1)
    # An unsigned difference, which may wrap; as numpy's own kind of index, to which it would convert at every use.
    return levels, (words if low == 0 else words - words.dtype.type(low)).view(f"u{words.itemsize}").astype(np.intp)


def _greys(header: Header, pixels: Pixels, words: np.ndarray, index: np.ndarray, window: bool) -> np.ndarray:
    """The grey of each word, in [0, 1]."""
    stored = _stored(pixels, words)
    padding = _is_padding(header, pixels, words, stored)
    values, ends, bits = _modality(header, pixels, stored)
    table = header.item("VOILUTSequence") if window else None
    centre, width = (header.first(name, float) if window else None for name in ("WindowCenter", "WindowWidth"))
    if table is not None:
        shown, top = _looked_up(header, table, values, ends)
        shown = shown / top
    elif centre is not None and width is not None:
        shown = _windowed(header, values, centre, width)
    else:
        low, high = ends
        if bits > 8:
            low, high = _extremes(header, values, index, padding, ends)
        shown = (values - low) / (high - low)
    shown = shown.clip(0, 1)
    shown = 1 - shown if _is_inverse(header, pixels) else shown
    shown[padding] = 0
    return shown


def _stored(pixels: Pixels, words: np.ndarray) -> np.ndarray:
    """Pixel values: the stored bits of each word, without what else is in it (PS3.5, 8.1.1)."""
    values = words >> pixels.shift & ((1 << pixels.bits) - 1)
    return values - (values >> (pixels.bits - 1) << pixels.bits) if pixels.signed else values


def _is_padding(header: Header, pixels: Pixels, words: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Which words are padding, from Pixel Padding Value to Pixel Padding Range Limit (PS3.3, C.7.5.1.1.2)."""
    value = header.first("PixelPaddingValue", int)
    if value is None:
        return np.zeros(len(words), dtype=bool)
    allocated = 8 * pixels.words.itemsize
    ends = [
        _of_sign(end, allocated, pixels.signed) for end in (value, header.first("PixelPaddingRangeLimit", int, value))
    ]
    low, high = min(ends), max(ends)
    # A value that needs more than the stored bits can only be meant for the whole word.
    fits = _of_sign(low, pixels.bits, pixels.signed) == low and _of_sign(high, pixels.bits, pixels.signed) == high
    among = stored if fits else words
    return (among >= low) & (among <= high)


def _of_sign(value: int, bits: int, signed: bool) -> int:
    """A number of ``bits``, which may be written with the wrong sign, as the pixels have it."""
    value %= 1 << bits
    return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value


def _extremes(
    header: Header, values: np.ndarray, index: np.ndarray, padding: np.ndarray, ends: tuple[float, float]
) -> tuple[float, float]:
    """Minimum and maximum of what is no padding; for an image of one value, the range that it could have."""
    steps = np.diff(values)
    if padding.any() or not ((steps >= 0).all() or (steps <= 0).all()):
        present = np.zeros(len(values), dtype=bool)
        present[index] = True
        values = values[present & ~padding]
    # Otherwise the extremes are the first and the last value, both of which occur.
    if not len(values):
        raise DataError(f"{header.path}: all pixels are padding, by PixelPaddingValue of the DICOM header")
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else ends


def _modality(header: Header, pixels: Pixels, stored: np.ndarray) -> tuple[np.ndarray, tuple[float, float], int]:
    """Values after the modality table or rescaling, the range that they may have, and the bits that they come from."""
    least = -(1 << (pixels.bits - 1)) if pixels.signed else 0
    ends = (least, least + (1 << pixels.bits) - 1)
    table = header.item("ModalityLUTSequence")
    if table is not None:
        values, top = _looked_up(header, table, stored, ends)
        return values, (0, top), int(top).bit_length()
    slope, intercept = header.first("RescaleSlope", float, 1.0), header.first("RescaleIntercept", float, 0.0)
    low, high = sorted(slope * end + intercept for end in ends)
    if not 0 < high - low < np.inf:  # false for NaN too
        raise DataError(
            f"{header.path}: RescaleSlope and RescaleIntercept of the DICOM header leave no range of values"
        )
    return slope * stored + intercept, (low, high), pixels.bits


def _looked_up(
    header: Header,
    table: pydicom.Dataset,
    values: np.ndarray,
    ends: tuple[float, float],
    descriptor: str = "LUTDescriptor",
    data: str = "LUTData",
) -> tuple[np.ndarray, int]:
    """``values`` through a table, and its highest possible entry (PS3.3, C.11.1.1 and C.11.2.1.1).

    Not pydicom's, which counts in the type of the entries: 8 bits can't count to 4095. ``ends``: the range that values
    may have, which settles the sign of the first value mapped, where the file leaves it open.
    """
    try:
        count, first, bits = (int(value) for value in table[descriptor].value)
        count = count % (1 << 16) or 1 << 16
        entries = _entries(table[data].value, count, bits, header.is_little_endian())
        highest = int(entries.max())
    except Exception:
        raise DataError(f"{header.path}: a look-up table of the DICOM file can't be applied") from None
    if len(entries) != count:
        header.notices.append("has a look-up table of another length than its descriptor says; its entries are taken")
    if not (8 <= bits <= 16 and highest < 1 << bits):
        header.notices.append("has a look-up table of other bits than its descriptor says; its entries decide")
        bits = max(8, highest.bit_length())
    meets = [one for one in (first, _other_sign(first)) if one <= ends[1] and one + count > ends[0]]
    position = np.rint(values).astype(np.int64) - (meets[0] if meets else first)
    return entries[position.clip(0, len(entries) - 1)].astype(np.float64), (1 << bits) - 1


def _entries(data: bytes | int | list[int], count: int, bits: int, little_endian: bool) -> np.ndarray:
    """The entries of a table, one in each word of 16 bits or, where they have 8, two."""
    if isinstance(data, bytes):
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little_endian else ">u2")
    else:
        words = np.atleast_1d(np.array(data, dtype=np.int64)).astype(np.uint16)
    return words.astype("<u2").view(np.uint8)[:count] if bits == 8 and len(words) == (count + 1) // 2 else words


def _other_sign(first: int) -> int:
    return first - (1 << 16) if first >= 1 << 15 else first + (1 << 16) if first < 0 else first


def _windowed(header: Header, values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """The window functions of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3, with an output range of [0, 1]."""
    function = header.first("VOILUTFunction", default="LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError(f"{header.path}: the DICOM window function is unknown; read it with window=False")
    smallest = 1 if function == "LINEAR" else 0
    if width < smallest or width == 0 or not np.isfinite([centre, width]).all():
        raise DataError(f"{header.path}: the DICOM window has no positive width; read it with window=False")
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _is_inverse(header: Header, pixels: Pixels) -> bool:
    """Whether low values are bright: as the presentation shape says, or else the photometric interpretation."""
    shape = header.first("PresentationLUTShape")
    inverse, by_shape = pixels.photometric == "MONOCHROME1", {"INVERSE": True, "IDENTITY": False}.get(shape)
    if by_shape in (None, inverse):
        return inverse
    header.notices.append(
        "says opposite things in PresentationLUTShape, which is followed, and in its photometric interpretation"
    )
    return by_shape
