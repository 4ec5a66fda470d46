"""DICOM files as DCMTK shows them: every file that pydicom brings, and files drawn at random over what headers may say.

Where DCMTK departs from the standard, or can't read a file, the reason is named and the right answer is worked out.
"""

from __future__ import annotations

import subprocess
import warnings
from collections import Counter
from pathlib import Path

import dcmtk
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset as Header
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import (
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
)
from test_readers import dicom

from cxrkit.data.readers import noticing, read_image
from cxrkit.errors import DataError

LEVEL = 1 / 255 + 1e-9


@pytest.fixture(autouse=True, scope="module")
def _dcmtk():
    dcmtk.require()


# Every file of pydicom


def files() -> list[Path]:
    import data_store

    roots = [Path(pydicom.__file__).parent / "data", *map(Path, data_store.__path__)]
    others = (".py", ".pyc", ".json", ".txt", ".md")
    return sorted(path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix not in others)


# Files that can be shown, yet are refused.
REFUSED = {
    "JPEG-lossy.dcm": "no installed decoder",  # its scan states a spectral selection that the standard excludes
    "badVR.dcm": "NumberOfFrames can't be read",  # it is 1A
}
CAUSES = ("holds no image", "holds no pixel data", "truncated", "neither DICOM", "do not match Rows and Columns")


def test_every_file_of_pydicom_is_shown_as_dcmtk_shows_it_or_refused_by_its_cause(tmp_path, capsys):
    counts, different = Counter(), []
    for path in files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, force=True)
            frame = 0 if str(header.get("NumberOfFrames")).isdecimal() else None
            shown, cause = read_or_cause(path, frame)
            if shown is None:
                known = [name for name in CAUSES if name in cause] or [REFUSED.get(path.name, "")]
                assert known[0], cause
                assert known[0] in cause, cause
                assert path.name in REFUSED or dcmtk.shows(path) is None, cause
                counts[f"refused: {known[0]}"] += 1
                continue
            how, expected, tolerance = reference(path, header, tmp_path / "other.dcm")
        if expected is None or shown.shape != expected.shape or np.abs(shown - expected).max() > tolerance:
            different.append(path.name)
        counts[how] += 1
    with capsys.disabled():
        print(f"\n{sum(counts.values())} files of pydicom: {len(different)} different; {dict(counts)}")
    assert not different
    assert counts["equal"] >= 120


def test_signed_pixels_that_a_stream_holds_without_sign(tmp_path):
    """A JPEG of 12 bits knows no sign: the header says that the highest bit is one."""
    ramp = np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)
    path = dicom(tmp_path / "a.dcm", ramp, stored=12)
    subprocess.run(["dcmcjpeg", "-q", str(path), str(path)], check=True)
    header = pydicom.dcmread(path)
    header.PixelRepresentation = 1
    header.save_as(path)
    values = np.where(ramp >= 2048, ramp.astype(int) - 4096, ramp)
    np.testing.assert_allclose(read_image(path), (values + 2048) / 4092, atol=1e-6)
    np.testing.assert_allclose(read_image(path), dcmtk.shows(path, "+Wm"), atol=LEVEL)


def test_a_stream_of_more_bits_than_stated(tmp_path):
    ramp = np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)
    path = dicom(tmp_path / "a.dcm", ramp, stored=12)
    subprocess.run(["dcmcjpeg", "-q", str(path), str(path)], check=True)
    header = pydicom.dcmread(path)
    header.BitsStored, header.HighBit = 8, 7
    header.save_as(path)
    np.testing.assert_allclose(read_image(path), ramp / 4092, atol=1e-6)


def read_or_cause(path: Path, frame: int | None = None):
    try:
        with noticing():
            return read_image(path, frame=frame), ""
    except DataError as error:
        return None, str(error)


def reference(path: Path, header: Header, other: Path) -> tuple[str, np.ndarray, float]:
    """How the right answer was found, the answer, and how near it must be."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if path.name.startswith(("gdcm-US-ALOKA-16", "SC_rgb_32bit", "SC_rgb_expb_32bit", "SC_rgb_jpeg.dcm")):
        return "as pydicom (DCMTK does not read them)", by_pydicom(header), LEVEL
    if syntax == JPEGBaseline8Bit and header.PhotometricInterpretation == "YBR_FULL_422":
        # The standard leaves open how halved chroma is brought back to full size.
        return "equal, chroma apart", dcmtk.shows(path), 2 * LEVEL
    groups = header.get("SharedFunctionalGroupsSequence", [Header()])[0]
    lifted = [groups[name][0] for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence") if name in groups]
    if (
        syntax in JPEG2000
        or header.BitsStored == 1
        or (header.BitsAllocated == 32 and syntax == ExplicitVRBigEndian)
        or lifted
    ):
        # DCMTK knows neither JPEG 2000 nor functional groups, and takes big-endian words of 32 bits for two of 16.
        path = rewritten(header, lifted, other)
        return "equal, once rewritten for DCMTK", dcmtk.shows(path, *options(pydicom.dcmread(path))), LEVEL
    tool = "dcml2pnm" if syntax in JPEG_LS else "dcmj2pnm"
    return "equal", dcmtk.shows(path, *options(header), tool=tool), LEVEL


JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
JPEG2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")


def options(header: Header) -> list[str]:
    """What has to be said to DCMTK, which applies no window or table unless asked to."""
    if header.get("VOILUTSequence"):
        return ["+Wl", "1"]
    if header.get("WindowCenter") not in (None, "") and header.get("WindowWidth") not in (None, ""):
        return ["+Wi", "1"]
    deep = header.SamplesPerPixel == 1 and header.BitsStored > 8
    return ["+Wm"] if deep and header.PhotometricInterpretation != "PALETTE COLOR" else []


def by_pydicom(header: Header) -> np.ndarray:
    pixels = pixel_array(header, index=0)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
    return pixels / np.iinfo(pixels.dtype).max @ np.array(dcmtk.LUMA)


def rewritten(header: Header, lifted: list[Header], path: Path) -> Path:
    """The first frame as a plain file, with the values of its functional groups at the top."""
    plain = Header()
    keep = ("PhotometricInterpretation", "SamplesPerPixel", "WindowCenter", "WindowWidth", "VOILUTSequence")
    for source in (header, *lifted):
        for name in (*keep, "RescaleSlope", "RescaleIntercept", "VOILUTFunction", "PresentationLUTShape"):
            if name in source:
                setattr(plain, name, source[name].value)
    pixels = pixel_array(header, index=0)
    if header.BitsStored == 1:
        pixels = pixels * np.uint8(255)
    fields = {element.keyword: element.value for element in plain}
    stored = max(8, header.BitsStored)
    fields["PhotometricInterpretation"] = (
        fields.pop("PhotometricInterpretation").replace("YBR_RCT", "RGB").replace("YBR_ICT", "RGB")
    )
    return dicom(path, pixels.astype(pixels.dtype.newbyteorder("<")), stored=stored, **fields)
