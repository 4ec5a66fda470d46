"""Regions of an image that are no label: a lung mask, say, which tells what lies outside the body part in question."""

from __future__ import annotations

import torch
from torch import Tensor

from cxrkit.data.dataset import Dataset
from cxrkit.data.readers import read_image
from cxrkit.errors import DataError

__all__ = ["region"]


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
