"""Pixels from the files of a downloaded source: read, checked against what the tables promise, pre-processed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cxrkit.data.dataset import Dataset, Rendered
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.readers import gathered_notices, noticing, read_image
from cxrkit.errors import CxrkitError, DataError

__all__ = ["FileRenderer", "file_dataset", "region"]


class FileRenderer:
    """Reads file ``row`` of ``paths`` when it is asked for.

    ``sizes``: width and height that a table promises for each file, or None where no table does; a file of another
    size is refused, because its boxes would be misplaced. ``read``: from a path to grey float32 ``[H, W]`` in [0, 1].
    ``truth``: from a row to exact masks, bool ``[L, H, W]`` on the file's own grid or one of the same aspect, or None.
    ``preprocessing`` brings image and masks to the square that networks take. Each kind of notice of ``read`` is a
    UserWarning once, for the first file that it is about.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        sizes: Sequence[tuple[int, int]] | None = None,
        preprocessing: Preprocessing = SQUASH,
        read: Callable[[str | Path], np.ndarray] = read_image,
        truth: Callable[[int], np.ndarray | None] | None = None,
        table: str = "the table",
    ):
        self.paths = list(paths)
        self.sizes = None if sizes is None else list(sizes)
        self.preprocessing = preprocessing
        self.read = read
        self.truth = truth
        self.table = table
        self._noticed: set[str] = set()

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``, ``size`` x ``size``; raises DataError naming the file."""
        try:
            pixels = self._read(self.paths[row])
            masks = None if self.truth is None else self.truth(row)
        except CxrkitError:
            raise
        except Exception as error:  # a library's own; its text may quote the file
            raise DataError(f"{self.paths[row]}: can't be read ({type(error).__name__})") from None
        held = pixels.shape[::-1]
        if self.sizes is not None and held != tuple(self.sizes[row]):
            width, height = self.sizes[row]
            raise DataError(
                f"{self.paths[row]}: is {held[0]} x {held[1]} pixels, {self.table} says {width} x {height}; "
                "boxes would be misplaced"
            )
        return Rendered(
            image=self.preprocessing.image(torch.from_numpy(pixels), size),
            truth=None if masks is None else self._truth(torch.from_numpy(masks), size),
            frame=held,
        )

    def _read(self, path: str | Path) -> np.ndarray:
        if gathered_notices() is not None:
            return self.read(path)
        with noticing() as notices:
            pixels = self.read(path)
        for notice in sorted(set(notices) - self._noticed):
            warnings.warn(f"{path}: {notice} (further files like this are not named)", UserWarning, stacklevel=4)
        self._noticed.update(notices)
        return pixels

    def _truth(self, masks: Tensor, size: int) -> Tensor:
        """Masks on the square. Empty ones, which most are, cost nothing: a large radiograph has 14 of 6 Mpx each."""
        truth = torch.zeros(len(masks), size, size, dtype=torch.bool)
        filled = masks.flatten(1).any(dim=1)
        if filled.any():
            truth[filled] = self.preprocessing.masks(masks[filled], size)
        return truth


def file_dataset(
    name: str,
    labels: Sequence[str],
    table: pd.DataFrame,
    boxes: pd.DataFrame | None,
    size: int,
    preprocessing: Preprocessing,
    *,
    side: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    frames: np.ndarray | None = None,
    hierarchy: Mapping[str, str] | None = None,
    read: Callable[[str | Path], np.ndarray] = read_image,
    truth: Callable[[int], np.ndarray | None] | None = None,
    promise: str = "every image of this source",
    leak: str = "",
) -> Dataset:
    """A dataset of files, those of the column ``path``, with the boxes of its images.

    ``side``: all files are ``side`` x ``side``; ``sizes``: width and height that each must have; ``frames``: those of
    the originals ``[N, 2]``, by default ``side``, or NaN: only the file tells; ``promise``: where sizes are written,
    for messages. ``leak``: as `Dataset.leak`. Others as for Dataset and FileRenderer.
    """
    if side is not None:
        sizes = [(side, side)] * len(table)
    if frames is None:
        frames = np.full((len(table), 2), np.nan if side is None else side)
    renderer = FileRenderer(table["path"].tolist(), sizes, preprocessing, read, truth, table=promise)
    if boxes is not None:
        boxes = boxes[boxes["image_id"].isin(table["image_id"])]
    dataset = Dataset(name, labels, table, boxes, renderer, size, hierarchy, frames, preprocessing)
    dataset.leak = leak
    return dataset


def region(dataset: Dataset, index: int, name: str = "lung_mask") -> Tensor:
    """The region of one image on the grid of ``dataset[index].image``: bool ``[size, size]``.

    ``name``: the column of ``dataset.table`` that holds the path of a mask, a picture with 0 outside and white inside,
    of the image's own aspect. It goes through the dataset's pre-processing, as the image did. Raises DataError
    where there is no such column, or no mask of this image.
    """
    if not -len(dataset) <= index < len(dataset):
        raise IndexError(f"index {index} is outside {dataset.name}, which holds {len(dataset)} images")
    masks = [column for column in dataset.table.columns if str(column).endswith("_mask")]
    if name not in masks:
        raise DataError(f"{dataset.name}: there is no mask {name!r}; its masks are {masks}")
    row = dataset.table.iloc[index]
    if not isinstance(row[name], str):
        raise DataError(f"{dataset.name}, image {row['image_id']!r}: has no {name}")
    mask = torch.from_numpy(read_image(row[name]) >= 0.5)
    return dataset.preprocessing.masks(mask[None], dataset.size)[0]
