"""Reading one file: formats, pixel values, and refusals that name the file and quote no header."""

from __future__ import annotations

import io
import shutil
import warnings

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset as Header
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from cxrkit.data.checking import check
from cxrkit.data.folder import load_folder
from cxrkit.data.readers import image_size, noticing, read_image
from cxrkit.errors import CxrkitError, DataError, ParameterError

RAMP = np.arange(12 * 10).reshape(12, 10)
SECRET = "SECRET^PATIENT"


def dicom(path, pixels, photometric="MONOCHROME2", stored=None, **fields):
    """Write ``pixels`` as an uncompressed DICOM file, with a patient's name that no message may repeat."""
    header = Header()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["cxrkit"])
    header.SOPClassUID = SecondaryCaptureImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.PatientName = SECRET
    header.PatientID = SECRET
    grey = pixels.ndim == 2
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 1 if grey else 3
    if not grey:
        header.PlanarConfiguration = 0
    header.PhotometricInterpretation = photometric
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored = stored or header.BitsAllocated
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    header["PixelData"].VR = "OW" if header.BitsAllocated > 8 else "OB"
    for name, value in fields.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def refused(tmp_path):
    """Check that ``read_image`` refuses a file, names it and the cause, quotes no header and writes nothing."""

    def check(path, *words, error=DataError, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error) as caught:
            read_image(path, **options)
        message = str(caught.value)
        assert str(path) in message
        assert SECRET not in message
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        for word in words:
            assert word in message
        assert sorted(tmp_path.rglob("*")) == before

    return check


# PNG and JPEG


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_png_of_any_8_bit_mode_gives_the_same_grey(tmp_path, mode):
    Image.fromarray(RAMP.astype(np.uint8)).convert(mode).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, RAMP / 255, atol=1e-6)


def test_png_16_bit_keeps_its_precision(tmp_path):
    values = (RAMP * 500 + 3).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.rint(read_image(tmp_path / "a.png") * 65535), values)


def test_png_1_bit(tmp_path):
    Image.fromarray(RAMP % 2 == 0).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), (RAMP % 2 == 0).astype(np.float32))


def test_colour_becomes_luma_and_transparency_black(tmp_path):
    colours = np.array([[[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255], [255, 255, 255, 51]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), [[0.299, 0.587, 0.114, 0.2]], atol=1e-6)


def test_jpeg_matches_pillow(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as picture:
        expected = np.asarray(picture) / 255
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), expected, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    stored = np.zeros((8, 16), np.uint8)
    stored[:4, :4] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    read = read_image(path)
    # The standard's table: where the stored first row and first column end up.
    first_row = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    first_col = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    corner = {first_row[orientation], first_col[orientation]}
    row = slice(0, 4) if "top" in corner else slice(-4, None)
    column = slice(0, 4) if "left" in corner else slice(-4, None)
    assert read[row, column].min() > 0.5
    assert np.isclose(read.sum(), 16 * 200 / 255)
    assert image_size(path) == read.shape[::-1]


def test_content_decides_not_the_name(tmp_path):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.dcm")
    dicom(tmp_path / "c.jpg", RAMP.astype(np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / "b.dcm"), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "c.jpg"), expected)


def test_files_that_are_no_image(tmp_path, refused):
    refused(tmp_path / "none.png", "no such file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty", "0 bytes")
    (tmp_path / "text.dcm").write_text("PatientName: " + SECRET)
    refused(tmp_path / "text.dcm", "neither DICOM, PNG nor JPEG")
    (tmp_path / "folder.dcm").mkdir()
    refused(tmp_path / "folder.dcm", "is a folder")
    (tmp_path / "head.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(tmp_path / "head.png", "PNG", "truncated or damaged")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.02, 0.98), kind=st.sampled_from(["PNG", "JPEG"]))
def test_truncated_picture_is_refused(tmp_path, share, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: max(12, int(share * len(buffer.getvalue())))])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_image(path)


def test_frame_of_a_picture(tmp_path, refused):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", frame=0).shape == RAMP.shape
    refused(tmp_path / "a.png", "frame=1", error=ParameterError, frame=1)


def test_a_dark_16_bit_picture_is_no_riddle(tmp_path, refused):
    for highest, bits in ((250, 8), (1000, 10), (4095, 12), (4096, 14), (16383, 14)):
        values = np.linspace(0, highest, 120).astype(np.uint16).reshape(RAMP.shape)
        Image.fromarray(values).save(tmp_path / "a.png")
        with pytest.warns(UserWarning, match=f"a.png: .* {bits} bits .*; depth={bits}") as caught:
            np.testing.assert_allclose(read_image(tmp_path / "a.png"), values / 65535, atol=1e-6)
        assert caught[0].filename == __file__
        np.testing.assert_allclose(read_image(tmp_path / "a.png", depth=bits), values / (2**bits - 1), atol=1e-6)
    refused(tmp_path / "a.png", "above 4095", "depth=12", depth=12)
    for depth in (0, 17, 12.5):
        with pytest.raises(ParameterError, match="depth"):
            read_image(tmp_path / "a.png", depth=depth)


@pytest.mark.parametrize("highest", [0, 16384, 65535])
def test_16_bits_in_use_are_no_notice(tmp_path, highest):
    Image.fromarray(np.full((4, 4), highest, np.uint16)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.png")


def test_a_folder_tells_of_dark_pictures_once_and_takes_their_depth(tmp_path):
    values = np.linspace(0, 4095, 120).astype(np.uint16).reshape(RAMP.shape)
    for name in "ab":
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    (tmp_path / "images.csv").write_text("image_id,file,patient_id,labels\na,a.png,1,\nb,b.png,2,\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert max(sample.image.max() for sample in load_folder(tmp_path, size=32)) < 0.07
    assert [str(tmp_path / "a.png") in str(one.message) for one in caught] == [True]
    found = check("folder", tmp_path, workers=0, progress=False)
    assert found["kind"].tolist()[:2] == ["notice", "notice"]
    assert found["file"].tolist()[:2] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert min(sample.image.max() for sample in load_folder(tmp_path, size=32, depth=12)) > 0.9
    assert check("folder", tmp_path, workers=0, progress=False, depth=12)["kind"].tolist() == ["duplicate"]


# DICOM, written here


def test_dicom_8_bit_is_divided_by_its_range(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8))
    np.testing.assert_allclose(read_image(path), RAMP / 255, atol=1e-6)
    assert image_size(path) == (10, 12)


def test_dicom_deeper_runs_from_minimum_to_maximum(tmp_path):
    path = dicom(tmp_path / "a.dcm", (RAMP * 20 + 100).astype(np.uint16), stored=12)
    np.testing.assert_allclose(read_image(path), RAMP / RAMP.max(), atol=1e-6)


def test_dicom_signed(tmp_path):
    path = dicom(tmp_path / "a.dcm", (RAMP * 20 - 1000).astype(np.int16))
    np.testing.assert_allclose(read_image(path), RAMP / RAMP.max(), atol=1e-6)


def test_dicom_constant_image_keeps_its_place_in_the_range(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.full((4, 4), 1023, np.uint16), stored=12)
    np.testing.assert_allclose(read_image(path), np.full((4, 4), 1023 / 4095), atol=1e-6)


def test_monochrome1_is_inverted(tmp_path):
    for stored, dtype in ((8, np.uint8), (12, np.uint16)):
        plain = dicom(tmp_path / "a.dcm", RAMP.astype(dtype), stored=stored)
        inverted = dicom(tmp_path / "b.dcm", RAMP.astype(dtype), "MONOCHROME1", stored=stored)
        np.testing.assert_allclose(read_image(inverted), 1 - read_image(plain), atol=1e-6)


def test_negative_slope_turns_the_image_over(tmp_path):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), RescaleSlope=-2, RescaleIntercept=7)
    np.testing.assert_allclose(read_image(path), 1 - RAMP / 255, atol=1e-6)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_agrees_with_pydicom(tmp_path, function):
    values = (RAMP * 30).astype(np.uint16)
    fields = {"WindowCenter": 1500, "WindowWidth": 1200, "RescaleSlope": 1, "RescaleIntercept": -50}
    if function:
        fields["VOILUTFunction"] = function
    path = dicom(tmp_path / "a.dcm", values, stored=12, **fields)
    header = pydicom.dcmread(path)
    # pydicom's window runs over the range of the stored values after rescaling: -50 to 4045.
    expected = (apply_windowing(values - 50.0, header) + 50) / 4095
    np.testing.assert_allclose(read_image(path), expected, atol=2e-4)
    np.testing.assert_allclose(read_image(path, window=False), RAMP / RAMP.max(), atol=1e-6)


def test_first_of_several_windows(tmp_path):
    one = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), WindowCenter=50, WindowWidth=41)
    two = dicom(tmp_path / "b.dcm", RAMP.astype(np.uint16), WindowCenter=[50, 9], WindowWidth=[41, 2])
    np.testing.assert_array_equal(read_image(one), read_image(two))
    assert read_image(one)[RAMP <= 29].max() == 0
    assert read_image(one)[RAMP >= 70].min() == 1


def test_window_of_no_width_is_refused(tmp_path, refused):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), WindowCenter=50, WindowWidth=0)
    refused(path, "window", "window=False")
    assert read_image(path, window=False).max() == 1


def test_rgb_secondary_capture_becomes_grey(tmp_path):
    colour = np.repeat(RAMP[..., None], 3, axis=2).astype(np.uint8)
    colour[0, 0] = (255, 0, 0)
    with pytest.warns(UserWarning, match="a.dcm: is a colour image"):
        read = read_image(dicom(tmp_path / "a.dcm", colour, "RGB"))
    assert np.isclose(read[0, 0], 0.299)
    np.testing.assert_allclose(read[1:], RAMP[1:] / 255, atol=1e-6)


PADDED = RAMP.astype(np.uint16) + 1000
PADDED[:2] = 0


@pytest.mark.parametrize(
    "fields", [{}, {"WindowCenter": 1070, "WindowWidth": 100}, {"RescaleSlope": 2, "RescaleIntercept": -7}]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_takes_no_part(tmp_path, fields, photometric):
    padded = read_image(dicom(tmp_path / "a.dcm", PADDED, photometric, 12, PixelPaddingValue=0, **fields))
    body = read_image(dicom(tmp_path / "b.dcm", PADDED[2:], photometric, 12, **fields))
    assert not padded[:2].any()
    np.testing.assert_array_equal(padded[2:], body)


@pytest.mark.parametrize(
    ("dtype", "value", "vr", "limit", "padding"),
    [
        (np.int16, -2000, "SS", None, [-2000]),
        (np.int16, 63536, "US", None, [-2000]),  # the sign left out
        (np.uint16, -1, "SS", None, [65535]),
        (np.uint16, 65535, "US", 65530, [65535, 65532, 65530]),  # downwards
        (np.int16, -2000, "SS", -1990, [-2000, -1995, -1990]),
    ],
)
def test_padding_of_any_sign_and_range(tmp_path, dtype, value, vr, limit, padding):
    pixels = (RAMP + 50).astype(dtype)
    pixels[0, : len(padding)] = padding
    path = dicom(tmp_path / "a.dcm", pixels)
    header = pydicom.dcmread(path)
    header.add_new("PixelPaddingValue", vr, value)
    if limit is not None:
        header.add_new("PixelPaddingRangeLimit", vr, limit)
    header.save_as(path)
    read = read_image(path)
    assert not read[0, : len(padding)].any()
    body = np.delete(pixels, np.arange(len(padding))).astype(float)
    expected = (body - body.min()) / (body.max() - body.min())
    np.testing.assert_allclose(np.delete(read, np.arange(len(padding))), expected, atol=1e-6)


def test_padding_that_needs_more_than_the_stored_bits_is_meant_for_the_whole_word(tmp_path):
    pixels = (RAMP * 30).astype(np.uint16)
    pixels[-1, -1], pixels[0, 0] = 4095, 65535
    read = read_image(dicom(tmp_path / "a.dcm", pixels, stored=12, PixelPaddingValue=65535))
    assert read[-1, -1] == 1
    assert read[0, 0] == 0


def test_nothing_but_padding(tmp_path, refused):
    refused(dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), PixelPaddingValue=0), "padding", "PixelPaddingValue")


def lut(first, entries, bits, count=None, vr=None, data="US"):
    item = Header()
    item.add_new(
        "LUTDescriptor", vr or ("SS" if first < 0 else "US"), [len(entries) if count is None else count, first, bits]
    )
    item.add_new("LUTData", data, entries)
    return [item]


def test_tables_count_further_than_their_entries(tmp_path):
    """An entry of 8 bits for each of 4096 values."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for slope in ({}, {"RescaleSlope": 1, "RescaleIntercept": 0}):
        path = dicom(tmp_path / "a.dcm", values, VOILUTSequence=lut(0, [k // 16 for k in range(4096)], 8), **slope)
        np.testing.assert_allclose(read_image(path), values // 16 / 255, atol=1e-6)
        np.testing.assert_allclose(read_image(path, window=False), values / 4095, atol=1e-6)


@pytest.mark.parametrize("where", ["VOILUTSequence", "ModalityLUTSequence"])
def test_tables_as_devices_write_them(tmp_path, where):
    values, squares = RAMP.astype(np.uint16), [k * k for k in range(120)]
    shown = (RAMP / 119) ** 2

    def check(expected, table, pixels=values, notice=None, **fields):
        path = dicom(tmp_path / "a.dcm", pixels, stored=16, **{where: table}, **fields)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = read_image(path, window=True)
        assert [notice in str(one.message) for one in caught] == ([] if notice is None else [True]), caught
        if where == "ModalityLUTSequence" and (
            table[0].LUTDescriptor[2] > 8 or notice == "other bits"
        ):  # from its minimum to its maximum
            read, expected = ((one - one.min()) / (one.max() - one.min()) for one in (read, expected))
        np.testing.assert_allclose(read, expected, atol=2e-6)

    check(shown * 119**2 / 16383, lut(0, squares, 14))
    check(shown * 119**2 / 65535, lut(0, squares, 16))
    check(shown * 119**2 / 16383, lut(0, squares, 8), notice="other bits")
    check(shown * 119**2 / 16383, lut(0, squares, 14, count=130), notice="another length")
    as_bytes = np.array(squares, "<u2").tobytes()
    check(shown * 119**2 / 16383, lut(0, as_bytes, 14, count=120, data="OW"))
    signed = (RAMP - 60).astype(np.int16)
    check(shown * 119**2 / 16383, lut(-60, squares, 14), pixels=signed)
    check(shown * 119**2 / 16383, lut(65476, squares, 14), pixels=signed)  # the sign left out
    high = (RAMP + 40000).astype(np.uint16)
    check(shown * 119**2 / 16383, lut(-25536, squares, 14), pixels=high)  # a sign that can't be meant
    outside = np.clip(np.arange(120) - 20, 0, 59).reshape(RAMP.shape)
    check(outside / 255, lut(20, list(range(60)), 8))
    first = np.clip(np.arange(120) + 20, 0, 139).reshape(RAMP.shape)
    check(first / 255, lut(-20, list(range(140)), 8))
    everything = (np.arange(65536) ^ 1).astype("<u2").tobytes()
    check((RAMP ^ 1) / 65535, lut(0, everything, 16, count=0, data="OW"))
    packed = bytes(range(0, 240, 2))
    check(RAMP * 2 / 255, lut(0, packed, 8, count=120, data="OW"))
    check(RAMP * 2 / 255, lut(0, [int(one) for one in np.frombuffer(packed, "<u2")], 8, count=120))


def test_tables_that_can_not_be_applied(tmp_path, refused):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), VOILUTSequence=lut(0, [], 8))
    refused(path, "look-up table")
    for missing in ("LUTDescriptor", "LUTData"):
        table = lut(0, [1, 2], 8)
        del table[0][missing]
        refused(dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), VOILUTSequence=table), "look-up table")


def test_empty_fields_are_no_values(tmp_path):
    empty = dict.fromkeys(("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept", "NumberOfFrames"), None)
    empty |= {"VOILUTSequence": [], "ModalityLUTSequence": []}
    empty |= dict.fromkeys(("VOILUTFunction", "PresentationLUTShape"), "")
    empty |= dict.fromkeys(("PixelPaddingValue", "PixelPaddingRangeLimit", "HighBit"), None)
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), **empty)
    np.testing.assert_allclose(read_image(path), RAMP / 119, atol=1e-6)
    empty = {"VOILUTSequence": [Header()], "WindowCenter": 50, "WindowWidth": 41}
    window = read_image(dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), **empty))
    np.testing.assert_allclose(window, ((RAMP - 49.5) / 40 + 0.5).clip(0, 1), atol=1e-6)
    half = dicom(tmp_path / "b.dcm", RAMP.astype(np.uint16), WindowCenter=9, WindowWidth=None, RescaleSlope=2)
    np.testing.assert_allclose(read_image(half), RAMP / 119, atol=1e-6)


def test_photometric_interpretation_missing_or_odd(tmp_path, refused):
    for value in (None, ""):
        path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), value)
        with pytest.warns(UserWarning, match="a.dcm: does not state its photometric interpretation; MONOCHROME2"):
            np.testing.assert_allclose(read_image(path), RAMP / 255, atol=1e-6)
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), "monochrome1 ")
    np.testing.assert_allclose(read_image(path), 1 - RAMP / 255, atol=1e-6)
    refused(dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), "CMYK"), "photometric interpretation")
    refused(dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), "RGB"), "SamplesPerPixel", "disagree")


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("shape", "inverse"), [("IDENTITY", False), ("INVERSE", True), ("LIN OD", None)])
def test_presentation_shape_decides_before_the_photometric_interpretation(tmp_path, photometric, shape, inverse):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), photometric, PresentationLUTShape=shape)
    stated = photometric == "MONOCHROME1"
    inverse = stated if inverse is None else inverse
    with noticing() as notices:
        np.testing.assert_allclose(read_image(path), 1 - RAMP / 255 if inverse else RAMP / 255, atol=1e-6)
    assert [notice for notice in notices if "opposite" in notice] == notices
    assert len(notices) == (inverse != stated)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
@pytest.mark.parametrize("meta", [True, False])
def test_a_file_without_preamble(tmp_path, syntax, meta):
    implicit, little = syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2"
    pixels = (RAMP * 9).astype("<u2" if little else ">u2")
    header = pydicom.dcmread(dicom(tmp_path / "a.dcm", pixels, stored=12))
    header.file_meta.TransferSyntaxUID = syntax
    if not meta:
        del header.file_meta
    header.preamble = None
    pydicom.dcmwrite(tmp_path / "bare.dcm", header, implicit_vr=implicit, little_endian=little)
    assert (tmp_path / "bare.dcm").read_bytes()[128:132] != b"DICM"
    np.testing.assert_allclose(read_image(tmp_path / "bare.dcm"), RAMP / 119, atol=1e-6)
    assert image_size(tmp_path / "bare.dcm") == (10, 12)


def test_what_merely_begins_like_a_file_without_preamble(tmp_path, refused):
    (tmp_path / "a.dcm").write_bytes(b"\x08\x00\x05\x00CS\x0a\x00" + bytes(range(256)))
    refused(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_bytes(bytes(range(200)))
    refused(tmp_path / "b.dcm", "neither DICOM, PNG nor JPEG")


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [("0", "0"), ("0", "5"), ("nan", "0"), ("1", "nan"), ("inf", "0"), ("1e308", "0"), ("1", "1e300")],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_rescaling_that_leaves_no_image_is_refused(tmp_path, refused, slope, intercept, dtype):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(dtype), RescaleSlope="1.2345", RescaleIntercept="5.4321")
    raw = path.read_bytes().replace(b"1.2345", slope.ljust(6).encode())
    path.write_bytes(raw.replace(b"5.4321", intercept.ljust(6).encode()))
    refused(path, "RescaleSlope", "RescaleIntercept")


@pytest.mark.parametrize("field", ["RescaleSlope", "WindowWidth"])
def test_a_number_that_is_none_names_its_field(tmp_path, refused, field):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), WindowCenter=5, **{field: "1.2345"})
    path.write_bytes(path.read_bytes().replace(b"1.2345", b"1,2345"))
    refused(path, field, "can't be read")


@pytest.mark.parametrize("frame", [-1, 2, 0.5, "0"])
def test_a_frame_that_is_none(tmp_path, refused, frame):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), Rows=6, NumberOfFrames=2)
    refused(path, f"frame={frame}", "0 .. 1", error=ParameterError, frame=frame)


def test_a_header_that_says_less_than_the_pixels_hold(tmp_path, refused):
    pixels = (RAMP * 100 + 1).astype(np.uint16)
    data = pixels.tobytes()
    for fields in (
        {"Columns": 5},
        {"Columns": 9},
        {"Rows": 6},
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
        {"PixelData": data * 3},
        {"PixelData": data + data[:20]},
        {"PixelData": data + bytes(100)},
    ):
        refused(dicom(tmp_path / "a.dcm", pixels, **fields), "larger than Rows")
    for more in (b"\xff" * 2, bytes(6)):
        np.testing.assert_allclose(
            read_image(dicom(tmp_path / "a.dcm", pixels, PixelData=data + more)), RAMP / 119, atol=1e-6
        )
    for name in ("BitsAllocated", "BitsStored", "PixelRepresentation"):
        refused(dicom(tmp_path / "a.dcm", pixels, **{name: None}), name)


def test_more_compressed_frames_than_stated(tmp_path, refused):
    header = pydicom.dcmread(dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP]).astype(np.uint8).reshape(24, 10)))
    header.Rows, header.NumberOfFrames = 12, 2
    header.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    del header.NumberOfFrames
    header.save_as(tmp_path / "a.dcm")
    refused(tmp_path / "a.dcm", "more frames than NumberOfFrames")


@pytest.mark.parametrize(("high", "signed"), [(11, 0), (15, 0), (13, 0), (13, 1), (15, 1)])
def test_stored_bits_anywhere_in_the_word_and_others_around_them(tmp_path, high, signed):
    values = RAMP * 30 - (1800 if signed else 0)
    words = (values.astype(np.int64) & 0xFFF) << (high - 11)
    rest = np.random.default_rng(0).integers(0, 1 << 16, words.shape) & ~(0xFFF << (high - 11))
    pixels = (words | rest).astype(np.uint16)
    path = dicom(tmp_path / "a.dcm", pixels, stored=12, HighBit=high, PixelRepresentation=signed)
    np.testing.assert_allclose(read_image(path), RAMP / 119, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_words_of_32_bits(tmp_path, dtype):
    values = np.array([[0, 1 << 20, 3 << 20, 1 << 22]], dtype=dtype)
    np.testing.assert_allclose(read_image(dicom(tmp_path / "a.dcm", values)), [[0, 0.25, 0.75, 1]], atol=1e-6)


def test_values_of_one_frame_come_from_its_functional_groups(tmp_path):
    def group(name, **fields):
        held = Header()
        for key, value in fields.items():
            setattr(held, key, value)
        outer = Header()
        setattr(outer, name, [held])
        return outer

    windows = [group("FrameVOILUTSequence", WindowCenter=c, WindowWidth=41) for c in (30, 50)]
    shared = group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-20)
    pixels = np.concatenate([RAMP, RAMP]).astype(np.uint16)
    fields = {"Rows": 12, "NumberOfFrames": 2, "PerFrameFunctionalGroupsSequence": windows}
    path = dicom(tmp_path / "a.dcm", pixels, SharedFunctionalGroupsSequence=[shared], **fields)
    for frame, centre in enumerate((30, 50)):
        expected = ((RAMP - 20 - (centre - 0.5)) / 40 + 0.5).clip(0, 1)
        np.testing.assert_allclose(read_image(path, frame=frame), expected, atol=1e-6)


def test_damage_to_fields_that_only_name_or_locate_is_a_refusal(tmp_path, refused):
    two = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), Rows=6, NumberOfFrames=2).read_bytes()
    one = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8)).read_bytes()
    for raw, tag in ((two, b"\x08\x00\x16\x00UI"), (one, b"\xe0\x7f\x10\x00OB")):
        assert raw.count(tag) == 1
        (tmp_path / "b.dcm").write_bytes(raw.replace(tag, tag[:-1] + b"\xa5"))
        refused(tmp_path / "b.dcm")


def test_a_palette_in_either_byte_order(tmp_path):
    from pydicom.uid import ExplicitVRBigEndian

    entries = np.linspace(0, 65535, 120).astype(np.uint16)
    for order in "<>":
        fields = {}
        for name in ("Red", "Green", "Blue"):
            fields[f"{name}PaletteColorLookupTableDescriptor"] = [120, 0, 16]
            fields[f"{name}PaletteColorLookupTableData"] = entries.astype(f"{order}u2").tobytes()
        path = dicom(tmp_path / "a.dcm", RAMP.astype(f"{order}u2"), "PALETTE COLOR", **fields)
        if order == ">":
            header = pydicom.dcmread(path)
            header.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            pydicom.dcmwrite(path, header, implicit_vr=False, little_endian=False)
        np.testing.assert_allclose(read_image(path), entries[RAMP] / 65535, atol=1e-6)


def test_objects_are_named_for_what_they_are(tmp_path, refused):
    pixels = RAMP.astype(np.uint8)
    refused(dicom(tmp_path / "a.dcm", pixels, Rows=6, NumberOfFrames=2), "2 frames", "Secondary Capture Image")
    bare = {"Rows": None, "Columns": None}
    for uid, name in (
        ("88.11", "Basic Text SR"),
        ("88.59", "Key Object Selection Document"),
        ("104.1", "Encapsulated PDF"),
    ):
        refused(
            dicom(tmp_path / "a.dcm", pixels, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{uid}", **bare), name, "no image"
        )
    refused(dicom(tmp_path / "a.dcm", pixels, SOPClassUID="1.2.3.4", **bare), "holds no image")
    path = dicom(tmp_path / "a.dcm", pixels)
    header = pydicom.dcmread(path)
    del header.PixelData
    header.FloatPixelData = RAMP.astype(np.float32).tobytes()
    header.BitsAllocated = 32
    header.save_as(path)
    refused(path, "floating-point")


def test_multi_frame_needs_a_choice(tmp_path, refused):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), Rows=6, NumberOfFrames=2)
    refused(path, "2 frames", "frame=0 .. 1")
    refused(path, "frame=2", "0 .. 1", error=ParameterError, frame=2)
    np.testing.assert_allclose(read_image(path, frame=1), RAMP[6:] / 255, atol=1e-6)


def test_damaged_dicom(tmp_path, refused):
    whole = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16)).read_bytes()
    for keep in (140, 300, len(whole) - 100, len(whole) - 2):
        (tmp_path / "cut.dcm").write_bytes(whole[:keep])
        refused(tmp_path / "cut.dcm")
    header = pydicom.dcmread(tmp_path / "a.dcm")
    del header.PixelData
    header.save_as(tmp_path / "bare.dcm")
    refused(tmp_path / "bare.dcm", "no pixel data")
    header = pydicom.dcmread(tmp_path / "a.dcm")
    with pytest.warns(UserWarning, match="CS"):
        header.PhotometricInterpretation = SECRET
    header.save_as(tmp_path / "odd.dcm")
    refused(tmp_path / "odd.dcm")
    header = pydicom.dcmread(tmp_path / "a.dcm")
    header.Rows = 100
    header.save_as(tmp_path / "tall.dcm")
    refused(tmp_path / "tall.dcm", "pixel data")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_read_or_refused_by_name(tmp_path, data):
    path = tmp_path / "a.dcm"
    raw = bytearray(dicom(path, RAMP.astype(np.uint16), WindowCenter=9, WindowWidth=5).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(132, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    message = ""
    try:
        read = read_image(path)
    except CxrkitError as error:
        message = str(error)
    assert str(path) in message if message else np.isfinite(read).all()
    assert "SECRET" not in message


# DICOM, of pydicom's own test files (those that the test machine has; nothing is downloaded)


def installed(name: str) -> str:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_real_radiograph_in_four_encodings(capfd):
    """RG1 is one frontal chest radiograph, MONOCHROME1, stored plain and as JPEG 2000."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain, packed = read_image(installed("RG1_UNCR.dcm")), read_image(installed("RG1_J2KR.dcm"))
        lossy_plain, lossy = read_image(installed("RG1_UNCI.dcm")), read_image(installed("RG1_J2KI.dcm"))
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert plain.shape == (1955, 1841)
    np.testing.assert_array_equal(plain, packed)
    np.testing.assert_allclose(lossy_plain, lossy, atol=0.02)
    # Lungs are dark, the mediastinum is bright.
    assert plain[800:1000, 400:600].mean() < plain[800:1000, 850:950].mean()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("MR_small.dcm", "MR_small_RLE.dcm"),
        ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
        ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"),
        ("MR_small.dcm", "MR_small_bigendian.dcm"),
    ],
)
def test_transfer_syntaxes_agree(one, other):
    np.testing.assert_array_equal(read_image(installed(one)), read_image(installed(other)))


@pytest.mark.parametrize(
    "name",
    ["JPEG-LL.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm", "SC_rgb_jpeg_dcmtk.dcm", "vlut_04.dcm", "mlut_18.dcm"],
)
def test_other_files_fill_the_range(name):
    with noticing():
        read = read_image(installed(name))
    assert read.min() >= 0
    assert read.max() <= 1
    assert read.max() - read.min() > 0.9


@pytest.mark.parametrize("name", ["RG1_J2KR.dcm", "MR_small_RLE.dcm", "JPEG-LL.dcm", "MR_small.dcm"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.95])
def test_truncated_real_file_is_refused(tmp_path, refused, name, share):
    with open(installed(name), "rb") as file:
        raw = file.read()
    (tmp_path / "cut.dcm").write_bytes(raw[: int(share * len(raw))])
    refused(tmp_path / "cut.dcm", "truncated")


def test_file_without_image_is_refused(refused):
    refused(installed("rtplan.dcm"), "holds no image")
