"""What is on two sides of a split at once: patients, files, pixels, and images that nearly are the same.

Near duplicates are found in two steps. A 64-bit hash of each image's coarse structure (the signs of its 64 lowest
cosine frequencies about their median) gives candidates, which differ in few bits; a candidate counts when 32 x 32
thumbnails of the two correlate. A hash alone is not enough: chest radiographs look alike. Among 721 294 pairs of
radiographs of different NIH patients, 57 pairs have hashes within 6 bits, and of the usual difference hash (dHash)
3 258 within 4; the highest correlation is 0.959. Copies that were brightened, rescaled, given less contrast or noise
are found, of those cropped by 1 % of a side 96 to 99 in 100, by 2 % every third; a mirrored copy is not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cxrkit.data.dataset import SPLITS, Dataset
from cxrkit.errors import DataError, ParameterError
from cxrkit.files import checksum

__all__ = ["check_parts", "check_split", "find_leaks", "near_pairs", "patient_overlap", "structure_hash"]

CONTENTS = ("none", "files", "pixels", "near")
MAX_DISTANCE = 6
MIN_CORRELATION = 0.98
_THUMBNAIL = 32
_SHOWN = 3
_COLUMNS = ["kind", "key", "part", "image_id", "patient_id"]
# Pairs of hashes that are compared at once: few enough for the processor's cache.
_BLOCK = 2**15


def patient_overlap(patients: Sequence[str], split: Sequence[str], of: str = "test", to: str = "train") -> pd.Series:
    """How much of part ``of`` belongs to patients of part ``to``, from the table alone.

    ``patients``, ``split``: of N images. Returns ``patients`` (in both parts), ``images`` (of these, in ``of``) and
    ``share`` (of all images in ``of``; nan when there are none). Ids are compared as text.
    """
    patients = pd.Series(np.asarray(patients, dtype=str)).str.strip()
    split = np.asarray(split, dtype=object)
    inside = patients[split == of]
    shared = inside.isin(patients[split == to])
    share = float(shared.mean()) if len(inside) else float("nan")
    return pd.Series({"patients": inside[shared].nunique(), "images": int(shared.sum()), "share": share}, dtype=object)


def find_leaks(
    where: Dataset | Mapping[str, Dataset], content: str = "none", patients: bool = True, workers: int | None = None
) -> pd.DataFrame:
    """Everything that lies in more than one part: a row for each image concerned.

    ``where``: a dataset, whose parts are train, validation and test (images in none of them are not looked at); or
    datasets by the name of their part, also of different sources. Columns: ``kind`` ("image_id", "patient", "file",
    "pixels" or "near"), ``key`` (what the rows of one leak share), ``part``, ``image_id``, ``patient_id``.

    ``content``: "none" looks at the tables alone; "files" compares the bytes of files of equal size; "pixels" draws
    every image and compares what networks see, whatever the file's format; "near" finds near duplicates as well (see
    this module). ``patients=False`` leaves patients out, for sources whose ids mean different people. ``workers``:
    threads, by default one per core. Raises ParameterError for another ``content``, or for "files" where images have
    none; DataError for a dataset without split.
    """
    if content not in CONTENTS:
        raise ParameterError(f"content={content!r} is unknown; use one of {list(CONTENTS)}")
    rows = _rows(where)
    found = [_shared(rows, "image_id", rows["image_id"])]
    if patients:
        found.append(_shared(rows, "patient", rows["patient_id"]))
    if content == "files":
        found.append(_shared(rows, "file", _file_digests(rows["path"], workers)))
    if content in ("pixels", "near"):
        drawn = _draw_all(list(zip(rows["dataset"], rows["index"], strict=True)), workers)
        found.append(_shared(rows, "pixels", pd.Series(drawn.digests, dtype=object)))
        if content == "near":
            found.append(_near(rows, drawn))
    return pd.concat(found, ignore_index=True)[_COLUMNS]


def check_split(dataset: Dataset, content: str = "none", workers: int | None = None) -> None:
    """Refuse a dataset whose train, validation and test images are not apart: DataError; see :func:`find_leaks`."""
    check_parts(dataset, content, workers=workers, name=dataset.name)


def check_parts(
    where: Dataset | Mapping[str, Dataset],
    content: str = "none",
    patients: bool = True,
    workers: int | None = None,
    name: str = "the parts",
) -> None:
    """Refuse parts that share something, naming it: DataError; see :func:`find_leaks`."""
    leaks = find_leaks(where, content, patients, workers)
    if len(leaks):
        raise DataError(f"{name}: {_described(leaks)}")


def _rows(where: Dataset | Mapping[str, Dataset]) -> pd.DataFrame:
    """A row per image: its part, its ids as text, its file, and which image of which dataset it is."""
    if isinstance(where, Dataset):
        if "split" not in where.table.columns:
            raise DataError(f"{where.name}: no split is known, so there is nothing to check")
        rows = _rows({where.name: where}).assign(part=where.table["split"].to_numpy())
        return rows[rows["part"].isin(SPLITS)].reset_index(drop=True)
    frames = []
    for part, dataset in where.items():
        ids = {name: dataset.table[name].astype(str).str.strip().to_numpy() for name in ("image_id", "patient_id")}
        frames.append(pd.DataFrame(ids).assign(part=part, path=dataset.table["path"].to_numpy(), dataset=dataset))
        frames[-1]["index"] = np.arange(len(dataset))
    return pd.concat(frames, ignore_index=True)


def _described(leaks: pd.DataFrame) -> str:
    what = {
        "image_id": "image ids",
        "patient": "patients",
        "file": "identical files",
        "pixels": "images of identical pixels",
        "near": "pairs of near duplicates",
    }
    sentences = []
    for kind, rows in leaks.groupby("kind", sort=False):
        keys = rows["key"].unique()
        shown = [_named(kind, key, rows[rows["key"] == key]) for key in keys[:_SHOWN]]
        more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        parts = " and ".join(rows["part"].unique())
        sentences.append(f"{parts} share {what[kind]} ({len(keys)}): {'; '.join(shown)}{more}")
    return ". ".join(sentences)


def _named(kind: str, key: str, rows: pd.DataFrame) -> str:
    """A leak by two images from different parts, and how many more there are."""
    pair = rows.drop_duplicates("part").head(2)
    images = " and ".join(f"{image!r} in {part}" for image, part in zip(pair["image_id"], pair["part"], strict=True))
    more = f", {len(rows) - 2} more images" if len(rows) > 2 else ""
    return f"{key!r} ({images}{more})" if kind == "patient" else f"{images}{more}"


def _shared(rows: pd.DataFrame, kind: str, keys: pd.Series) -> pd.DataFrame:
    """The rows whose key occurs in more than one part, key by key."""
    keys = keys.set_axis(rows.index)
    of_parts = pd.DataFrame({"key": keys, "part": rows["part"]}).drop_duplicates()["key"]
    leaking = keys.isin(of_parts[of_parts.duplicated()])
    return rows[leaking].assign(kind=kind, key=keys[leaking]).sort_values("key", kind="stable")


# Contents


def _file_digests(paths: pd.Series, workers: int | None) -> pd.Series:
    """A digest per file; files whose size is unlike all others' are not opened."""
    if paths.isna().any() or (paths.astype(str) == "").any():
        raise ParameterError("content='files': some images have no file; use content='pixels'")

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path}: can't be opened ({error.strerror})") from None

    with _threads(workers) as pool:
        sizes = pd.Series(list(pool.map(size, paths)), index=paths.index)
        several = sizes.duplicated(keep=False)
        digests = pd.Series(paths.index.astype(str), index=paths.index)
        digests[several] = list(pool.map(checksum, paths[several]))
    return digests


@dataclass
class _Drawn:
    digests: list[bytes]
    hashes: np.ndarray
    thumbnails: np.ndarray


def _draw_all(places: Sequence[tuple[Dataset, int]], workers: int | None) -> _Drawn:
    """Digest, hash and thumbnail (uint8) of every image; no image is kept."""

    def look(place: tuple[Dataset, int]) -> tuple[bytes, Tensor]:
        dataset, index = place
        image = dataset.draw(index).image
        thumbnail = (_thumbnail(image) * 255).round().to(torch.uint8)
        return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest(), thumbnail

    digests, thumbnails = [], []
    with _threads(workers) as pool:
        for digest, thumbnail in pool.map(look, places):
            digests.append(digest)
            thumbnails.append(thumbnail)
    thumbnails = torch.stack(thumbnails) if thumbnails else torch.zeros(0, _THUMBNAIL, _THUMBNAIL, dtype=torch.uint8)
    return _Drawn(digests, structure_hash(thumbnails.float()), thumbnails.numpy().reshape(len(thumbnails), -1))


def _threads(workers: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers or os.cpu_count() or 1)


def _thumbnail(images: Tensor) -> Tensor:
    flat = images.reshape(-1, 1, *images.shape[-2:])
    small = F.interpolate(flat, size=(_THUMBNAIL, _THUMBNAIL), mode="area")
    return small.reshape(*images.shape[:-2], _THUMBNAIL, _THUMBNAIL)


def structure_hash(images: Tensor) -> np.ndarray:
    """64 bits that tell an image's coarse structure: float ``[N, H, W]`` -> uint64 ``[N]``.

    Which of the 8 x 8 lowest cosine frequencies of its 32 x 32 thumbnail lie above their median (the mean grey value
    does not count towards it): what is called a perceptual hash.
    """
    from scipy.fft import dctn

    low = dctn(_thumbnail(images).double().numpy(), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(-1, 64)
    # Rounded: of an even image, frequencies that are noise of the arithmetic must not decide.
    low = low.round(6)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def near_pairs(
    one: np.ndarray, other: np.ndarray, max_distance: int = MAX_DISTANCE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in ``one`` and in ``other`` (uint64 hashes) that differ in at most ``max_distance`` bits, in blocks."""
    step = max(1, _BLOCK // max(len(other), 1))
    for start in range(0, len(one), step):
        distance = np.bitwise_count(one[start : start + step, None] ^ other[None])
        rows, columns = np.nonzero(distance <= max_distance)
        yield rows + start, columns


def _near(rows: pd.DataFrame, drawn: _Drawn) -> pd.DataFrame:
    found = []
    for one, other in combinations(rows["part"].unique(), 2):
        first, second = (np.flatnonzero(rows["part"] == part) for part in (one, other))
        for left, right in near_pairs(drawn.hashes[first], drawn.hashes[second]):
            left, right = first[left], second[right]
            alike = _correlation(drawn.thumbnails[left], drawn.thumbnails[right]) >= MIN_CORRELATION
            same = np.array(
                [drawn.digests[a] == drawn.digests[b] for a, b in zip(left, right, strict=True)], dtype=bool
            )
            found += list(zip(left[alike & ~same], right[alike & ~same], strict=True))
    order = np.array(found, dtype=int).ravel()
    keys = np.repeat([f"{rows['image_id'][a]} ~ {rows['image_id'][b]}" for a, b in found], 2)
    return rows.iloc[order].assign(kind="near", key=keys)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Pearson correlation, row by row; 0 where a row has no contrast."""
    one, other = (
        rows - rows.mean(axis=1, keepdims=True) for rows in (one.astype(np.float32), other.astype(np.float32))
    )
    scale = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide((one * other).sum(axis=1), scale, out=np.zeros(len(one), np.float32), where=scale > 0)
