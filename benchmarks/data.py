"""What images cost: an epoch from the pixel cache, from the files, and by a peer; a big index; building the cache.

    python benchmarks/data.py [--images 120] [--rows 100000] [--rounds 3]

The files are synthetic radiographs of 1024 x 1024 pixels, written as RSNA stage 2 has them: 8-bit JPEG in DICOM. The
peer is torchxrayvision's reader of the same set with its own resizer. All three give 224 x 224 images and take turns on
one thread; the shortest epoch of each counts. The big index has the table of NIH ChestX-ray14 in mind: 14 labels, ages,
views, a split; its cache holds black images. It is loaded in a process of its
own, whose memory is told without mapped files. Building is timed with one process and with one per core, and killed
halfway.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from PIL import Image

import cxrkit

SIZE = 224
DRAWN = 8  # phantoms drawn at full size; the others are made from them
LABELS = "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass Nodule "
LABELS = (LABELS + "Pleural_Thickening Pneumonia Pneumothorax").split()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--images", type=int, default=120)
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rsna(root / "rsna", given.images)
        building(root)
        epochs(root, given.rounds)
        big_index(root, given.rows)


# The files


def write_rsna(root: Path, images: int) -> None:
    """Tables and images as RSNA stage 2 has them, and the table of headers that the peer wants."""
    (root / "stage_2_train_images").mkdir(parents=True)
    phantom = cxrkit.data.load("phantom", images=DRAWN, size=1024)
    drawn = [(phantom[k].image[0].numpy() * 255).astype(np.uint8) for k in range(DRAWN)]
    rng = np.random.default_rng(0)
    names = [f"{k:08d}-0000-4000-8000-000000000000" for k in range(images)]
    for k, name in enumerate(names):
        pixels = np.roll(drawn[k % DRAWN], k, axis=1).astype(np.int16) + rng.integers(-3, 4, (1024, 1024))
        write_dicom(root / "stage_2_train_images" / f"{name}.dcm", pixels.clip(0, 255).astype(np.uint8))
    rows = [(name, 100, 200, 300, 250, 1) if k % 3 == 0 else (name, *[""] * 4, 0) for k, name in enumerate(names)]
    table = pd.DataFrame(rows, columns=["patientId", "x", "y", "width", "height", "Target"])
    table.to_csv(root / "stage_2_train_labels.csv", index=False)
    pd.DataFrame({"PatientID": names, "ViewPosition": "PA"}).to_csv(root / "headers.csv", index=False)


def write_dicom(path: Path, grey: np.ndarray) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.PatientID = path.stem
    header.Rows, header.Columns = grey.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 8, 7, 0
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=90)
    header.PixelData = encapsulate([stream.getvalue()])
    header["PixelData"].VR = "OB"
    header.save_as(path, enforce_file_format=True)


def load_rsna(root: Path, **options) -> cxrkit.data.Dataset:
    return cxrkit.data.load("rsna", root / "rsna", size=SIZE, split_by="patients", **options)


# Building


def building(root: Path) -> None:
    cores = os.cpu_count() or 1
    rates = {}
    for workers in sorted({1, 2, cores}):
        began = time.perf_counter()
        done = prepare(root, f"cache-{workers}", workers)
        rates[workers] = done.images / (time.perf_counter() - began)
    told = ", ".join(f"{workers} processes {rate:.0f} images/s" for workers, rate in rates.items())
    print(f"building the cache: {told}; {cores} cores speed it up {rates[cores] / rates[1]:.1f} times")
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(root, "cache", cores))
    process.start()
    while finished(root / "cache") < done.images // 3:
        time.sleep(0.01)
    process.kill()
    process.join()
    time.sleep(0.5)
    before = finished(root / "cache")
    again = prepare(root, "cache", cores)
    print(f"killed with {before} of {done.images} images done; then {again.drawn} drawn: {before + again.drawn} in all")


def prepare(root: Path, cache: str, workers: int):
    options = {"size": SIZE, "split_by": "patients", "progress": False}
    return cxrkit.data.prepare("rsna", root / "rsna", cache=root / cache, workers=workers, **options)


def finished(cache: Path) -> int:
    """Images in the one cache in a folder."""
    indices = list(cache.glob("*.jsonl"))
    return sum(line.startswith("{") for line in indices[0].read_text().splitlines()[1:]) if indices else 0


# Epochs


def epochs(root: Path, rounds: int) -> None:
    plain, cached = load_rsna(root), load_rsna(root, cache=root / "cache")
    readers = {"cache": cached, "files": plain, "torchxrayvision": peer(root / "rsna")}
    assert abs(plain[0].image - cached[0].image).max() <= 0.5 / 255 + 1e-6
    best = dict.fromkeys(readers, np.inf)
    for _ in range(rounds):
        for name, dataset in readers.items():
            began = time.perf_counter()
            for index in range(len(dataset)):
                dataset[index]
            best[name] = min(best[name], (time.perf_counter() - began) / len(dataset))
    for name, seconds in best.items():
        print(f"an image by {name:16}: {1e3 * seconds:7.3f} ms, {seconds / best['cache']:6.0f} times the cache's")


def peer(root: Path):
    """torchxrayvision's reader of the same files, with its resizer."""
    import torchxrayvision

    return torchxrayvision.datasets.RSNA_Pneumonia_Dataset(
        str(root / "stage_2_train_images"),
        csvpath=str(root / "stage_2_train_labels.csv"),
        dicomcsvpath=str(root / "headers.csv"),
        extension=".dcm",
        transform=torchxrayvision.datasets.XRayResizer(SIZE),
    )


# A big index


LOADER = """
import sys, time
import torch, pandas, cxrkit.data, cxrkit.data.folder, cxrkit.data.cache
def memory(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) / 1e3
before, began, cpu = memory("RssAnon"), time.perf_counter(), time.process_time()
data = cxrkit.data.load("folder", {root!r}, cache={cache!r}, split="train")
batch = data.batch(range(32))
took, cpu = time.perf_counter() - began, time.process_time() - cpu
assert len(batch) == 32
print(len(data), took, cpu, before, memory("RssAnon"), memory("RssFile"))
"""


def big_index(root: Path, rows: int) -> None:
    big = root / "big"
    write_big(big, rows)
    write_big_cache(big, root / "big-cache")
    code = LOADER.format(root=str(big), cache=str(root / "big-cache"))
    best = None
    for _ in range(3):
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        best = said if best is None or float(said[1]) < float(best[1]) else best
    images, took, cpu, before, after, mapped = best
    print(
        f"{rows} images indexed ({images} in train) to the first batch of 32: {float(took):.2f} s "
        f"({float(cpu):.2f} s of processor time); memory grows by {float(after) - float(before):.0f} MB to "
        f"{float(after):.0f} MB, {float(mapped):.0f} MB of libraries and map aside"
    )


def write_big(big: Path, rows: int) -> None:
    """Empty files, and a table like that of the NIH with sizes and a split."""
    (big / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    patients = np.sort(rng.integers(0, rows // 4, rows))
    found = rng.random((rows, len(LABELS))) < 0.05
    table = pd.DataFrame(
        {
            "image_id": [f"{patient:08d}_{k:06d}" for k, patient in enumerate(patients)],
            "file": [f"images/{patient:08d}_{k:06d}.png" for k, patient in enumerate(patients)],
            "patient_id": patients.astype(str),
            "labels": [";".join(label for label, there in zip(LABELS, row, strict=True) if there) for row in found],
            "width": 1024,
            "height": 1024,
            "age": rng.integers(1, 90, rows),
            "view": np.where(rng.random(rows) < 0.6, "PA", "AP"),
            "split": np.array(["train", "validation", "test"])[patients % 8 // 6 + (patients % 8 == 7)],
        }
    )
    table.to_csv(big / "images.csv", index=False)
    for file in table["file"]:
        os.close(os.open(big / file, os.O_CREAT))
    boxed = table["image_id"][:: max(1, rows // 1000)]
    pd.DataFrame({"image_id": boxed, "label": "Mass", "x_min": 100, "y_min": 100, "x_max": 300, "y_max": 300}).to_csv(
        big / "boxes.csv", index=False
    )


def write_big_cache(big: Path, cache: Path) -> None:
    """A finished cache of black images."""
    from cxrkit.data import cache as caching
    from cxrkit.data.sources import identity_of

    data = cxrkit.data.load("folder", big)
    identity = identity_of("folder", big, {}, 0, data, 8)
    cache.mkdir()
    held = caching._new(caching.cache_path(identity, cache), identity)
    held.reserve(data.image_ids)
    facts = {"width": 1024, "height": 1024, "masks": []}
    facts["crc"] = caching._checksum(facts, [bytes(SIZE**2)])
    with held.path.with_suffix(".jsonl").open("a") as index:
        for row, image_id in enumerate(data.image_ids):
            stamp = caching.stamp(data.renderer, int(data.rows[row]))
            index.write("\n" + json.dumps({"image_id": image_id, "row": row, "stamp": stamp, **facts}))


if __name__ == "__main__":
    main()
