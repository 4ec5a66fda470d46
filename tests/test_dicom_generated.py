"""DICOM files drawn at random over what headers may say: shown as the standard's text has it, and as DCMTK does.

Each is compared with a second implementation, value by value and slow, and with DCMTK where that follows the standard.
"""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace

import dcmtk
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from test_readers import dicom, lut

from cxrkit.data.readers import noticing, read_image

FILES = 160
SIDES = (33, 32)
PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
BY_PYDICOM = {"RLE": RLELossless, "JPEG 2000": JPEG2000Lossless}
BY_DCMTK = {"JPEG lossless": "dcmcjpeg", "JPEG-LS": "dcmcjpls"}
NATIVE = (*PLAIN, "RLE")


@dataclass
class Drawn:
    """One file: how its words are made up, and what its header says."""

    syntax: str
    allocated: int
    stored: int
    high: int
    signed: bool
    inverse: bool
    words: np.ndarray = None
    slope: float = 1
    intercept: float = 0
    modality: tuple[int, list[int], int] | None = None
    window: tuple[str, list[float], list[float]] | None = None
    voi: tuple[int, list[int], int] | None = None
    padding: tuple[int, int] | None = None
    truncated: bool = False
    fields: dict = field(default_factory=dict)

    # The standard, one value after the other

    def stored_value(self, word: int) -> int:
        value = (word >> (self.high + 1 - self.stored)) % (1 << self.stored)
        return value - (1 << self.stored) if self.signed and value >= 1 << (self.stored - 1) else value

    def is_padding(self, value: int) -> bool:
        return self.padding is not None and min(self.padding) <= value <= max(self.padding)

    def modality_value(self, value: int) -> float:
        if self.modality is None:
            value = self.slope * value + self.intercept
            return math.trunc(value) if self.truncated else value
        return through(value, *self.modality)

    def range(self) -> tuple[float, float]:
        least = -(1 << (self.stored - 1)) if self.signed else 0
        if self.modality is not None:
            return 0, (1 << self.modality[2]) - 1
        return tuple(sorted(self.modality_value(end) for end in (least, least + (1 << self.stored) - 1)))

    def ends(self) -> tuple[float, float]:
        """Where black and white are, if there is neither window nor VOI table."""
        values = [self.stored_value(word) for word in self.words.ravel().tolist()]
        values = [self.modality_value(value) for value in values if not self.is_padding(value)]
        deep = (self.stored if self.modality is None else self.modality[2]) > 8
        return (min(values), max(values)) if deep and min(values) < max(values) else self.range()

    def shade(self, word: int, low: float, high: float) -> float:
        stored = self.stored_value(word)
        if self.is_padding(stored):
            return 0
        value = self.modality_value(stored)
        if self.voi is not None:
            shade = through(value, *self.voi) / ((1 << self.voi[2]) - 1)
        elif self.window is not None:
            shade = windowed(value, self.window[1][0], self.window[2][0], self.window[0])
        else:
            shade = (value - low) / (high - low)
        shade = min(max(shade, 0), 1)
        return 1 - shade if self.inverse else shade

    def shown(self) -> np.ndarray:
        ends = self.ends()
        known = {word: self.shade(word, *ends) for word in set(self.words.ravel().tolist())}
        return np.array([[known[word] for word in row] for row in self.words.tolist()])

    def body(self) -> np.ndarray:
        return np.array([[not self.is_padding(self.stored_value(word)) for word in row] for row in self.words.tolist()])

    def dcmtk_options(self) -> tuple[str, ...]:
        if self.voi is not None:
            return "+Wl", "1"
        if self.window is None:
            return dcmtk.between(*self.ends())
        function, centre, width = self.window[0], self.window[1][0], self.window[2][0]
        # It does not know the exact linear function, which is the other one a half further and one wider.
        return ("+Ww", str(centre + 0.5), str(width + 1)) if function == "LINEAR_EXACT" else ("+Wi", "1")


def through(value: float, first: int, entries: list[int], bits: int) -> int:
    return entries[min(max(round(value) - first, 0), len(entries) - 1)]


def windowed(value: float, centre: float, width: float, function: str) -> float:
    if function == "SIGMOID":
        return 1 / (1 + math.exp(min(-4 * (value - centre) / width, 700)))
    if function == "LINEAR_EXACT":
        return (value - centre) / width + 0.5
    if value <= centre - 0.5 - (width - 1) / 2:
        return 0
    if value > centre - 0.5 + (width - 1) / 2:
        return 1
    return (value - (centre - 0.5)) / (width - 1) + 0.5


def draw(rng: np.random.Generator) -> Drawn:
    syntax = str(rng.choice([*PLAIN, *BY_PYDICOM, *BY_DCMTK]))
    sizes = [8, 16, 16, 16, 32] if syntax in ("implicit", "explicit", "deflated") else [8, 16, 16]
    allocated = int(rng.choice(sizes))
    most = min(allocated, 30)  # DCMTK reckons with 32 bits
    stored = int(rng.integers(max(6, allocated // 2 + 1), most + 1)) if rng.random() < 0.8 else most
    high = int(rng.integers(stored - 1, allocated)) if syntax in NATIVE and rng.random() < 0.3 else stored - 1
    signed, mono1 = bool(rng.integers(2)), bool(rng.integers(2))
    shape = str(rng.choice(["", "", "IDENTITY", "INVERSE"]))
    one = Drawn(syntax, allocated, stored, high, signed, inverse=shape == "INVERSE" if shape else mono1)
    one.fields = {"PhotometricInterpretation": f"MONOCHROME{2 - mono1}", "HighBit": high}
    one.fields |= {"PixelRepresentation": int(signed)} | ({"PresentationLUTShape": shape} if shape else {})
    one.words = draw_words(one, rng)
    draw_modality(one, rng)
    draw_padding(one, rng)
    draw_voi(one, rng)
    return one


def draw_words(one: Drawn, rng: np.random.Generator) -> np.ndarray:
    """Words whose pixels fill a part of their range; in plain files the unused bits may hold anything."""
    span = 1 << one.stored
    low, high = sorted(rng.integers(0, span, 2).tolist())
    values = rng.integers(low, high + 1, SIDES)
    shift = one.high + 1 - one.stored
    words = values << shift
    if one.syntax in NATIVE and rng.random() < 0.4:
        mask = (1 << one.allocated) - 1 & ~(span - 1 << shift)
        return words | (rng.integers(0, 1 << one.allocated, SIDES) & mask)
    if one.signed and shift == 0:  # as most programs write them
        signs = values >= span // 2
        words = np.where(signs, (values - span) % (1 << one.allocated), values)
    return words


def draw_modality(one: Drawn, rng: np.random.Generator) -> None:
    kind = rng.choice(["none", "rescale", "rescale", "table"])
    if kind == "rescale":
        one.slope = float(rng.choice([1, 1, -1, 2, 1.5]))
        one.intercept = int(rng.integers(-2000, 2000)) if rng.random() < 0.7 else 0
        one.fields |= {"RescaleSlope": one.slope, "RescaleIntercept": one.intercept}
    elif kind == "table" and one.stored <= 16:
        one.modality = draw_table(one.range(), rng)
        one.fields["ModalityLUTSequence"] = lut(*one.modality)


def draw_padding(one: Drawn, rng: np.random.Generator) -> None:
    values = sorted({one.stored_value(word) for word in one.words.ravel().tolist()})
    if one.allocated <= 16 and len(values) > 8 and rng.random() < 0.4:
        first, last = values[int(rng.integers(len(values)))], None
        if rng.random() < 0.5:
            last = values[int(rng.integers(len(values) // 4))]
        one.padding = (first, first if last is None else last)
        if one.body().sum() < 3:
            one.padding = None
            return
        one.fields["PixelPaddingValue"] = first
        if last is not None:
            one.fields["PixelPaddingRangeLimit"] = last


def draw_voi(one: Drawn, rng: np.random.Generator) -> None:
    kind, (low, high) = rng.choice(["none", "window", "window", "table"]), one.range()
    if kind == "window":
        function = str(rng.choice(["", "LINEAR", "LINEAR_EXACT", "SIGMOID"]))
        number = int(rng.integers(1, 4))
        width = [float(round(w)) for w in rng.uniform(2, max(high - low, 3), number)]
        centre = [float(round(c)) + float(rng.choice([0, 0.5])) for c in rng.uniform(low, high, number)]
        one.window = (function or "LINEAR", centre, width)
        one.fields |= {"WindowCenter": centre, "WindowWidth": width}
        one.fields |= {"VOILUTFunction": function} if function else {}
    elif kind == "table" and high < 1 << 16 and low >= -(1 << 15) and (low >= 0 or high < 1 << 15):
        one.voi = draw_table((low, high), rng)
        one.fields["VOILUTSequence"] = lut(*one.voi)
        if rng.random() < 0.3:  # the table comes first
            one.fields |= {"WindowCenter": 5, "WindowWidth": 7}


def draw_table(reach: tuple[float, float], rng: np.random.Generator) -> tuple[int, list[int], int]:
    """A table that rises or falls, over all values or a part of them: first value, entries, bits."""
    bits = int(rng.choice([8, 10, 12, 16]))
    low, high = int(reach[0]), int(reach[1])
    first = low if rng.random() < 0.6 else int(rng.integers(low - 50, high))
    number = int(min(high - first + 1, rng.integers(2, 5000)))
    entries = np.linspace(0, (1 << bits) - 1, number).round().astype(int)
    return first, (entries[::-1] if rng.random() < 0.4 else entries).tolist(), bits


def write(one: Drawn, path) -> None:
    kind = f"u{one.allocated // 8}"
    pixels = one.words.astype(np.uint64).astype((">" if one.syntax == "big endian" else "<") + kind)
    fields = dict(one.fields)
    padding = {name: fields.pop(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit") if name in fields}
    dicom(path, pixels, fields.pop("PhotometricInterpretation"), one.stored, **fields)
    header = pydicom.dcmread(path)
    for name, value in padding.items():
        header.add_new(name, "SS" if one.signed else "US", value)
    if one.allocated == 8:
        header["PixelData"].VR = "OB"
    if one.syntax in PLAIN:
        syntax = header.file_meta.TransferSyntaxUID = PLAIN[one.syntax]
        pydicom.dcmwrite(path, header, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    elif one.syntax in BY_PYDICOM:
        header.compress(BY_PYDICOM[one.syntax], generate_instance_uid=False)
        header.save_as(path)
    else:
        header.save_as(path)
        subprocess.run([BY_DCMTK[one.syntax], "-q", str(path), str(path)], check=True)


def as_dcmtk_has_it(one: Drawn) -> tuple[str, Drawn]:
    """Where DCMTK departs from the standard: how, and a file of which the standard says what DCMTK shows."""
    for name in ("modality", "voi"):
        table = getattr(one, name)
        if table is not None and table[0] < 0 and not (one.signed if name == "modality" else one.range()[0] < 0):
            return "takes a negative first value for a large one", replace(
                one, **{name: (table[0] + 65536, *table[1:])}
            )
    if one.modality is None and one.slope % 1:
        return "cuts fractions off after rescaling", replace(one, truncated=True)
    return "", one


@pytest.mark.parametrize("seed", [0])
def test_files_drawn_at_random_are_shown_as_the_standard_says_and_as_dcmtk_shows_them(tmp_path, capsys, seed):
    dcmtk.require()
    rng = np.random.default_rng(seed)
    counts, wrong, path = Counter(), [], tmp_path / "a.dcm"
    for number in range(FILES):
        one = draw(rng)
        write(one, path)
        with noticing() as notices:
            read = read_image(path)
        assert all("opposite" in notice for notice in notices)
        body = one.body()
        if np.abs(read - one.shown()).max() > 1e-5:
            wrong.append((number, "the standard", one))
        departs, other = as_dcmtk_has_it(one)
        counts[f"DCMTK {departs}" if departs else "equal to DCMTK"] += 1
        if one.syntax == "JPEG 2000":  # which it does not know: it gets the same pixels plain
            write(replace(one, syntax="explicit"), path)
        expected = other.shown() if departs else read
        shown = dcmtk.shows(path, *other.dcmtk_options(), tool="dcml2pnm" if one.syntax == "JPEG-LS" else "dcmj2pnm")
        if shown is None or np.abs(expected - shown)[body].max() > 1 / 255 + 1e-6:
            wrong.append((number, departs, one))
    with capsys.disabled():
        print(f"\n{FILES} files drawn at random: {len(wrong)} different; {dict(counts)}")
    assert not wrong
    assert counts["equal to DCMTK"] > FILES / 2
