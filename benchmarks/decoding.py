"""What reading one file costs, beside another version of this package or beside the libraries below it.

    python benchmarks/decoding.py [--against CHECKOUT] [--rounds 7]

The files are a synthetic radiograph as devices and data sets store it. With ``--against``, another checkout of this
repository reads the same files in a process of its own. Without it, pydicom and Pillow do: pixels, rescaling and
window, or a picture as numbers. The two take turns on one thread; processor time counts, the shortest of each and the
median of the paired ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pydicom
from data import write_dicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

HERE = Path(__file__).resolve().parents[1]
READER = """
import sys, time, warnings
warnings.simplefilter("ignore")
{read}
for line in sys.stdin:
    path = line.strip()
    read(path)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        read(path)
        best = min(best, time.process_time() - began)
    print(best, flush=True)
"""
OURS = "from cxrkit.data.readers import read_image as read"
LIBRARIES = """
import numpy, pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
def read(path):
    if path.endswith(".dcm"):
        header = pydicom.dcmread(path)
        return apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    with Image.open(path) as picture:
        return numpy.asarray(picture).astype(numpy.float32) / 255
"""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--against", type=Path)
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    name = given.against.name if given.against else "libraries"
    readers = {
        "cxrkit": reader(OURS, HERE),
        name: reader(OURS if given.against else LIBRARIES, (given.against or HERE).resolve()),
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, path in write_files(Path(folder)).items():
            seconds = {name: [] for name in readers}
            for round_ in range(given.rounds):
                for who in list(readers)[:: 1 if round_ % 2 else -1]:
                    seconds[who].append(ask(readers[who], path))
            ours, theirs = seconds.values()
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            print(
                f"{what:34}: cxrkit {1e3 * min(ours):7.2f} ms, {name} {1e3 * min(theirs):7.2f} ms; "
                f"median of paired ratios {ratio:.2f}"
            )
    for process in readers.values():
        process.communicate()


def reader(read: str, checkout: Path) -> subprocess.Popen:
    code = READER.format(read=read)
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=checkout,
    )


def ask(process: subprocess.Popen, path: Path) -> float:
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def write_files(folder: Path) -> dict[str, Path]:
    slope = np.add.outer(np.linspace(0, 1, 2500), np.linspace(0, 1, 2000)) / 2
    grey = (slope + np.random.default_rng(0).normal(0, 0.01, slope.shape)).clip(0, 1)
    twelve, eight = (grey * 4095).astype(np.uint16), (grey * 255).astype(np.uint8)
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    files = {
        "DICOM, 5 Mpx of 12 bits": plain(folder / "a.dcm", twelve, 12),
        "the same with a window": plain(folder / "b.dcm", twelve, 12, RescaleSlope=1, RescaleIntercept=0, **window),
        "the same with a sigmoid": plain(folder / "c.dcm", twelve, 12, VOILUTFunction="SIGMOID", **window),
        "the same with padding": plain(folder / "d.dcm", twelve, 12, PixelPaddingValue=0),
        "DICOM, 5 Mpx of 8 bits": plain(folder / "e.dcm", eight, 8),
        "DICOM, 0.3 Mpx of 16 bits": plain(folder / "f.dcm", twelve[:512, :512], 16, **window),
    }
    header = pydicom.dcmread(folder / "a.dcm")
    header.compress(RLELossless)
    header.save_as(folder / "g.dcm")
    files["DICOM, 5 Mpx of 12 bits, RLE"] = folder / "g.dcm"
    write_dicom(folder / "h.dcm", eight[:1024, :1024])
    files["DICOM, 1 Mpx of 8 bits, JPEG"] = folder / "h.dcm"
    for name, pixels in (("8 bits", eight), ("16 bits", (grey * 65535).astype(np.uint16)), ("RGB", eight)):
        picture = Image.fromarray(pixels[:1024, :1024])
        path = files[f"PNG, 1 Mpx, {name}"] = folder / f"{name}.png"
        (picture.convert("RGB") if name == "RGB" else picture).save(path)
    Image.fromarray(eight[:1024, :1024]).save(folder / "i.jpg", quality=90)
    return files | {"JPEG, 1 Mpx": folder / "i.jpg"}


def plain(path: Path, pixels: np.ndarray, stored: int, **fields) -> Path:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 8 * pixels.dtype.itemsize, stored, stored - 1
    header.PixelData = pixels.tobytes()
    header["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for name, value in fields.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


if __name__ == "__main__":
    main()
