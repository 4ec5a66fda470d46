"""Two hundred malformed inputs and more: each is refused by name or listed by `check`; none crashes, hangs or fills the
memory."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from test_readers import RAMP, SECRET, dicom

import cxrkit
from cxrkit.data import checking, size_limits
from cxrkit.data.checking import check
from cxrkit.data.download import entries
from cxrkit.data.folder import load_folder
from cxrkit.data.readers import image_size, read_image
from cxrkit.data.sources import manifest, read
from cxrkit.errors import CxrkitError, DataError

TABLES = (".csv", ".json", ".txt", ".xlsx")
PICTURES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".mat")
# What people, programs and attackers write into cells.
ODD = [
    "",
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 400,
    "\0",
    "🙂",
    "'",
    '"',
    ";" * 10,
    "../x",
    "/etc/passwd",
    "None",
    "1_000",
]
ODD += ["0x1F", " ", "\u202e", "1e308", "-0.0", "a" * 5000, "=1+1", "\r", "x\ny", "1,5", "1;5", "TRUE", "٣"]


# The generator: each mutation changes one file; it returns whether the result is malformed beyond doubt


def truncated(path, rng):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(rng.integers(0, max(1, int(len(raw) * 0.9))))])
    return path.suffix in PICTURES


def flipped(path, rng):
    raw = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 6)):
        raw[rng.integers(0, min(len(raw), 4000))] = rng.integers(0, 256)
    path.write_bytes(raw)
    return False


def emptied(path, rng):
    path.write_bytes(b"")
    return True


def noise(path, rng):
    path.write_bytes(rng.bytes(2000))
    return True


def a_folder(path, rng):
    path.unlink()
    path.mkdir()
    return True


def removed(path, rng):
    path.unlink()
    return False  # a part of some sources may be absent


def utf16(path, rng):
    path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16"))
    return True


def latin(path, rng):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[rng.integers(0, len(lines))] += "Ä\n".encode("latin-1")
    path.write_bytes(b"".join(lines))
    return True


def _lines(path):
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def odd_cell(path, rng):
    lines = _lines(path)
    row = int(rng.integers(1, max(2, len(lines)))) % len(lines)
    cells = lines[row].split(",")
    cells[rng.integers(0, len(cells))] = ODD[rng.integers(0, len(ODD))]
    lines[row] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return False


def odd_header(path, rng):
    lines = _lines(path)
    cells = lines[0].split(",")
    cells[rng.integers(0, len(cells))] = ODD[rng.integers(0, len(ODD))]
    path.write_text("\n".join([",".join(cells), *lines[1:]]) + "\n")
    return False


def uneven(path, rng):
    lines = _lines(path)
    row = int(rng.integers(1, max(2, len(lines)))) % len(lines)
    lines[row] = lines[row] + ",1,2,3" if rng.random() < 0.5 else lines[row].rpartition(",")[0]
    path.write_text("\n".join(lines) + "\n")
    return False


def twice(path, rng):
    lines = _lines(path)
    row = int(rng.integers(0, len(lines)))
    path.write_text("\n".join([*lines[:row], lines[row], *lines[row:]]) + "\n")
    return False


def shuffled(path, rng):
    lines = _lines(path)
    path.write_text("\n".join(lines[k] for k in rng.permutation(len(lines))) + "\n")
    return False


def quoted(path, rng):
    lines = _lines(path)
    lines[rng.integers(0, len(lines))] += '"'
    path.write_text("\n".join(lines) + "\n")
    return False


def a_text(path, rng):
    path.write_text(f"PatientName: {SECRET}")
    return True


def zipped(path, rng):
    path.write_bytes(gzip.compress(path.read_bytes()))
    return True


def a_bomb(path, rng):
    path.write_bytes(png_header(60_000, 60_000))
    return True


def a_pipe(path, rng):
    path.unlink()
    os.mkfifo(path)
    return True


def a_loop(path, rng):
    path.unlink()
    path.symlink_to(path)
    return True


TABLE_MUTATIONS = [truncated, flipped, emptied, noise, a_folder, removed, utf16, latin, odd_cell, odd_cell, odd_cell]
TABLE_MUTATIONS += [odd_header, uneven, twice, shuffled, quoted, zipped]
PICTURE_MUTATIONS = [truncated, flipped, emptied, noise, a_folder, a_text, zipped, a_bomb, a_pipe, a_loop]


def verdict(name, root, path, whole):
    """What load and check say of a folder in which ``path`` was changed: problems by load, and by check."""
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = read(name, root, size=32)
            named = dataset.table["path"].astype(str)
            for index in np.flatnonzero((named == str(path)) | (path == root)) if whole else []:
                try:
                    assert np.isfinite(dataset.draw(index).image).all()
                except CxrkitError as error:
                    told.append(str(error))
            if len(dataset) and not whole:
                assert dataset[0].mask.shape[1:] == (32, 32)
        except CxrkitError as error:
            told.append(str(error))
        if whole:
            found = check(name, root, workers=0, progress=False)
            listed = [f"{row.file}: {row.problem} {row.value}" for row in found.itertuples()]
        else:
            rows = []
            checking._tables(name, root, {}, rows)
            rows += checking._published(entries(name, manifest(name)), root)
            listed = [f"{file}: {problem} {value}" for _, file, _, problem, value in rows]
    for message in told + listed:
        assert SECRET not in message
    # A message names the file, or at least the folder in which it lacks.
    assert all(str(root) in message for message in told), told
    return told, listed


def attack(name, pristine, tmp_path, rng, mutation, suffixes, whole):
    """Change one file of a copy of ``pristine``; load and check must tell, or take it as sound."""
    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root)
    files = sorted(path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    if not files:
        return False
    path = files[rng.integers(0, len(files))]
    malformed = mutation(path, rng)
    told, listed = verdict(name, root, path, whole)
    case = f"{name}: {mutation.__name__} of {path.relative_to(root)}"
    if told:
        assert listed, f"{case}: load says {told}, check says nothing"
    if malformed:
        assert listed, f"{case}: passed silently"
    return True


# The folder source


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with every kind of file: PNG, JPEG, DICOM."""
    root = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    rows = "image_id,file,patient_id,labels,width,height,split\n"
    for k in range(6):
        noisy = rng.integers(0, 256, (40, 48), dtype=np.uint8)
        name = f"{k}.{('png', 'jpg', 'dcm')[k % 3]}"
        if name.endswith("dcm"):
            dicom(root / name, noisy.astype(np.uint16), WindowCenter=100, WindowWidth=200)
        else:
            Image.fromarray(noisy).save(root / name)
        rows += f"i{k},{name},p{k},{'A;B' if k % 2 else ''},48,40,{('train', 'validation', 'test')[k % 3]}\n"
    (root / "images.csv").write_text(rows)
    (root / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max,reader\ni1,A,4,4,30,20,r\ni3,B,1,2,3,4,s\n")
    assert not verdict("folder", root, root, True)[1]
    return root


@pytest.mark.parametrize("seed", range(3))
def test_folder_tables(sound, tmp_path, seed):
    rng = np.random.default_rng(seed)
    done = [attack("folder", sound, tmp_path, rng, mutation, (".csv",), False) for mutation in TABLE_MUTATIONS]
    assert sum(done) == len(TABLE_MUTATIONS)


@pytest.mark.parametrize("seed", range(3))
def test_folder_pictures(sound, tmp_path, seed):
    rng = np.random.default_rng(seed)
    done = [attack("folder", sound, tmp_path, rng, mutation, PICTURES, True) for mutation in PICTURE_MUTATIONS]
    assert sum(done) == len(PICTURE_MUTATIONS)


# The public sources, by the miniatures of their own tests


def _miniatures():
    """Make the fixtures that write each source's miniature known here; name of the fixture by source."""
    own = {"vinbigdata": "originals"}
    needed = {"nih": ("pictures",), "rsna": ("images",)}
    found = {}
    for name in ("kermany", "covid_cohen", "object_cxr", "brain_mri", "chestx_det", "vinbigdata", "rsna", "nih"):
        if importlib.util.find_spec(f"test_source_{name}") is None:
            continue
        module = importlib.import_module(f"test_source_{name}")
        if hasattr(module, own.get(name, "folder")):
            globals()[f"{name}_miniature"] = getattr(module, own.get(name, "folder"))
            globals().update({fixture: getattr(module, fixture) for fixture in needed.get(name, ())})
            found[name] = f"{name}_miniature"
    return found


MINIATURES = _miniatures()
# Tables that the miniature's writer must be given.
GIVEN = {"chestx_det": "PARTS"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MINIATURES)
def test_public_sources(name, request, tmp_path_factory):
    write = request.getfixturevalue(MINIATURES[name])
    module = importlib.import_module(f"test_source_{name}")
    pristine = write(getattr(module, GIVEN[name])) if name in GIVEN else write()
    work = tmp_path_factory.mktemp(name)
    rng = np.random.default_rng(len(name))
    before = verdict(name, pristine, pristine, False)
    assert not before[0], f"the miniature is not sound: {before[0]}"
    for mutation in TABLE_MUTATIONS:
        attack(name, pristine, work, rng, mutation, TABLES, False)
    for mutation in PICTURE_MUTATIONS:
        attack(name, pristine, work, rng, mutation, PICTURES, True)


# Decompression bombs


def png_header(width, height, *chunks, bits=8):
    """A PNG of this size, with the chunks given and one row's worth of pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    raw = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        raw += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return raw


def deflated(size, raw=False):
    """``size`` zero bytes, deflated without ever holding them: one flushed block, repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15 if raw else 15)
    block = bytes(1 << 20)
    head = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + again * (size >> 20) + packer.flush()


def jpeg(width, height):
    stream = io.BytesIO()
    Image.new("L", (16, 16), 90).save(stream, "JPEG")
    raw = bytearray(stream.getvalue())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(raw)


def jpeg_2000(width, height):
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, width, height, 0, 0, 1) + b"\x07\x01\x01"
    return b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(size)) + size + b"\xff\xd9"


def jpeg_ls(width, height):
    return b"\xff\xd8\xff\xf7\x00\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\x00" + bytes(20)


def rle(length):
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    return header + b"\x81\x00" * (length // 2)


def coded(path, syntax, stream, **fields):
    """A DICOM of 16 x 16 pixels whose compressed stream is ``stream``."""
    dicom(path, np.zeros((16, 16), np.uint8))
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = syntax
    header.PixelData = encapsulate([stream])
    for name, value in fields.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def deflated_dicom(path):
    dicom(path, np.zeros((16, 16), np.uint8))
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    del header.PixelData
    header.save_as(path, enforce_file_format=True)
    raw = path.read_bytes()
    meta = 144 + struct.unpack("<I", raw[140:144])[0]
    path.write_bytes(raw[:meta] + deflated(8 << 30, raw=True))


def sparse(path):
    path.write_bytes(png_header(16, 16))
    os.truncate(path, size_limits.MOST_BYTES + 1)


MANY = "claims more pixels than any radiograph has"
UNLIKE = "do not match Rows and Columns"
BOMBS = {
    "PNG of 60 000 squared": (lambda path: path.write_bytes(png_header(60_000, 60_000)), MANY),
    "PNG of one bit": (lambda path: path.write_bytes(png_header(20_000, 10_000, bits=1)), MANY),
    "PNG beyond any size": (lambda path: path.write_bytes(png_header(2**31 - 1, 2**31 - 1)), MANY),
    "PNG with a packed text": (
        lambda path: path.write_bytes(png_header(16, 16, (b"zTXt", b"k\0\0" + deflated(2 << 30)))),
        "truncated or damaged",
    ),
    "PNG with a packed UTF-8 text": (
        lambda path: path.write_bytes(png_header(16, 16, (b"iTXt", b"k\0\1\0\0\0" + deflated(2 << 30)))),
        "truncated or damaged",
    ),
    "PNG with many packed texts": (
        lambda path: path.write_bytes(png_header(16, 16, *[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 80)),
        "truncated or damaged",
    ),
    "PNG with a packed profile": (
        lambda path: path.write_bytes(png_header(16, 16, (b"iCCP", b"k\0\0" + deflated(2 << 30)))),
        "",
    ),
    "PNG with too many pixels inside": (
        lambda path: path.write_bytes(png_header(16, 16, (b"IDAT", deflated(2 << 30)))),
        "",
    ),
    "JPEG of 65 535 squared": (lambda path: path.write_bytes(jpeg(65_535, 65_535)), MANY),
    "JPEG of 65 535 rows": (lambda path: path.write_bytes(jpeg(2_000, 65_535)), MANY),
    "gzip": (lambda path: path.write_bytes(gzip.compress(bytes(50 << 20))), "neither DICOM, PNG nor JPEG"),
    "larger than any file": (sparse, "is larger than"),
    "DICOM of 65 535 squared": (
        lambda path: dicom(path, np.zeros((16, 16), np.uint8), Rows=65_535, Columns=65_535),
        MANY,
    ),
    "DICOM of many samples": (
        lambda path: dicom(path, np.zeros((16, 16), np.uint8), Rows=9_000, Columns=9_000, SamplesPerPixel=65_535),
        MANY,
    ),
    "DICOM of many frames": (
        lambda path: dicom(path, np.zeros((16, 16), np.uint8), NumberOfFrames=2**31 - 1),
        "choose one",
    ),
    "deflated DICOM": (deflated_dicom, "unpacks to more than"),
    "JPEG in DICOM": (lambda path: coded(path, JPEGBaseline8Bit, jpeg(65_535, 65_535)), UNLIKE),
    "JPEG 2000 in DICOM": (lambda path: coded(path, JPEG2000Lossless, jpeg_2000(2**31, 2**31)), UNLIKE),
    "JPEG-LS in DICOM": (lambda path: coded(path, JPEGLSLossless, jpeg_ls(65_535, 65_535)), UNLIKE),
    "RLE in DICOM": (lambda path: coded(path, RLELossless, rle(4 << 20)), UNLIKE),
    "RLE DICOM of 65 535 squared": (
        lambda path: coded(path, RLELossless, rle(100), Rows=65_535, Columns=65_535),
        MANY,
    ),
}


def _kilobytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _measured(path, function):
    """The message of the refusal and the memory it took in MB, in a process of its own that starts from here."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        before = _kilobytes("VmRSS")
        try:
            function(path)
        except CxrkitError as error:
            message = str(error)
        except BaseException as error:
            message = f"crash: {error!r}"
        os.write(start, f"{max(0, _kilobytes('VmHWM') - before) // 1000} {message}".encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end, "rb") as file:
        said = file.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    megabytes, _, message = said.partition(" ")
    return message, int(megabytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_fill_the_memory(tmp_path, name):
    make, words = BOMBS[name]
    path = tmp_path / "bomb"
    make(path)
    read_image(dicom(tmp_path / "first.dcm", RAMP.astype(np.uint16)))  # what is imported late shall not count
    for function in (read_image, image_size):
        message, megabytes = _measured(path, function)
        assert megabytes < 120, f"{function.__name__}: {megabytes} MB"
        assert not message.startswith("crash"), message
        if function is read_image:
            assert words in message
            assert not words or str(path) in message


def test_the_limits_leave_room_for_real_radiographs(tmp_path):
    size_limits.check_pixels(tmp_path, 10_000, 10_000)
    with pytest.raises(DataError, match="100 million"):
        size_limits.check_pixels(tmp_path, 10_001, 10_000)
    with pytest.raises(DataError, match="100 million"):
        size_limits.check_pixels(tmp_path, 10_000, 10_000, 8)


@pytest.mark.parametrize(
    ("stream", "stated"),
    [
        (jpeg(300, 200), (200, 300, 1)),
        (jpeg_2000(300, 200), (200, 300, 1)),
        (b"\0" * 85 + jpeg_2000(300, 200), (200, 300, 1)),
        (jpeg_ls(300, 200), (200, 300, 1)),
        (b"\xff\xd8\xff\xff\xff\xff" + jpeg(300, 200)[2:], (200, 300, 1)),
        (b"\xff\x4f\xff\x51", None),
        (b"\xff\xd8\xff\xda" + bytes(50), None),
        (b"", None),
        (b"\xff\xd8" + b"\xff\xc4\x00\x00" * 50, None),
    ],
)
def test_stated_extent(stream, stated):
    assert size_limits.stated_extent(stream) == stated


# Anything at all


CELL = st.one_of(st.sampled_from(ODD), st.text(max_size=8), st.integers(-3, 90).map(str), st.floats().map(str))


@st.composite
def tables(draw, columns, rows):
    header = draw(st.permutations(columns)) if draw(st.booleans()) else list(columns)
    lines = [header, *draw(st.lists(st.lists(CELL, min_size=len(columns), max_size=len(columns)), max_size=3))]
    lines += [[rows[name] for name in header]] if draw(st.booleans()) else []
    quote = draw(st.booleans())
    return "\n".join(",".join(f'"{cell}"' if quote else str(cell) for cell in line) for line in lines)


IMAGE_ROW = {"image_id": "i0", "file": "0.png", "patient_id": "p", "labels": "A", "width": "48", "height": "40"}
IMAGE_ROW |= {"orig_width": "96", "orig_height": "80"}
BOX_ROW = {"image_id": "i0", "label": "A", "x_min": "1", "y_min": "1", "x_max": "9", "y_max": "9"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=tables(tuple(IMAGE_ROW), IMAGE_ROW), boxes=tables(tuple(BOX_ROW), BOX_ROW), row=st.booleans())
def test_any_tables(tmp_path, images, boxes, row):
    Image.new("L", (48, 40), 90).save(tmp_path / "0.png")
    if row:  # a sound table of images, so that the boxes matter
        images = ",".join(IMAGE_ROW) + "\n" + ",".join(IMAGE_ROW.values()) + "\n"
    (tmp_path / "images.csv").write_bytes(images.encode("utf-8", "surrogatepass"))
    (tmp_path / "boxes.csv").write_bytes(boxes.encode("utf-8", "surrogatepass"))
    told = ""
    try:
        data = load_folder(tmp_path, size=32)
        assert all(sample.image.isfinite().all() for sample in data)
    except CxrkitError as error:
        told = str(error)
        assert str(tmp_path) in told
    found = []
    checking._tables("folder", tmp_path, {}, found)
    if told and "pixels, images.csv says" not in told:
        assert found


NUMBER = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1, 8, 16, 32, 64, 65535]))
FIELDS = {
    "Rows": st.integers(0, 65535),
    "Columns": st.integers(0, 65535),
    "SamplesPerPixel": st.integers(0, 65535),
    "BitsAllocated": st.integers(0, 65535),
    "BitsStored": st.integers(0, 65535),
    "HighBit": st.integers(0, 65535),
    "PixelRepresentation": st.integers(0, 65535),
    "PlanarConfiguration": st.integers(0, 65535),
    "NumberOfFrames": NUMBER,
    "RescaleSlope": st.floats(width=16),
    "RescaleIntercept": st.floats(width=16),
    "WindowCenter": st.one_of(st.floats(width=16), st.lists(st.floats(width=16), max_size=3)),
    "WindowWidth": st.one_of(st.floats(width=16), st.lists(st.floats(width=16), max_size=3)),
    "VOILUTFunction": st.sampled_from(["LINEAR", "SIGMOID", "LINEAR_EXACT", SECRET, ""]),
    "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", SECRET, ""]),
    "TransferSyntaxUID": st.sampled_from(["1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2"]),
    "PixelData": st.binary(max_size=300),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True), data=st.data())
def test_any_dicom_header(tmp_path, fields, data, caplog, capfd):
    path = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16), WindowCenter=9, WindowWidth=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path)
        for name in fields:
            place = header.file_meta if name == "TransferSyntaxUID" else header
            setattr(place, name, data.draw(FIELDS[name], label=name))
        try:
            header.save_as(path, implicit_vr=False, little_endian=True)
        except (ValueError, OverflowError, TypeError, struct.error):
            return  # not even pydicom can write this
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", f"{path}: ", UserWarning)  # what had to be assumed
        for function in (read_image, image_size):
            message = str(path)
            try:
                assert np.isfinite(function(path)).all()
            except CxrkitError as error:
                message = str(error)
            assert str(path) in message
            assert "SECRET" not in message
    assert not caplog.records
    assert "SECRET" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("workers", [0, 2])
def test_check_tells_no_header(tmp_path, workers):
    """Whatever is wrong with a DICOM file, nothing of its header is in the list."""
    rows = "image_id,file,patient_id,labels,width,height\n"
    for k in range(20):
        path = dicom(tmp_path / f"{k}.dcm", RAMP.astype(np.uint16), WindowCenter=5, WindowWidth=k % 3)
        raw = path.read_bytes()
        if k % 4 == 0:
            path.write_bytes(raw[: len(raw) - 10 * k - 10])
        rows += f"i{k},{k}.dcm,p,A,{10 if k % 5 else 11},12\n"
    (tmp_path / "images.csv").write_text(rows)
    found = check("folder", tmp_path, workers=workers, progress=False)
    assert len(found) > 5
    assert "SECRET" not in found.to_csv()
    done = cxrkit.data.prepare("folder", tmp_path, size=32, cache=tmp_path / "c", workers=workers, progress=False)
    assert done.problems
    assert "SECRET" not in str(done)
