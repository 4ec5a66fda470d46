"""From a seed or a downloaded folder to images, labels, boxes and folds."""

from __future__ import annotations

from cxrkit.data.dataset import Batch, Dataset, Sample, collate
from cxrkit.data.files import region
from cxrkit.data.readers import image_tensor, read_image
from cxrkit.data.sources import load, prepare, sources

__all__ = [
    "Batch",
    "Dataset",
    "Sample",
    "collate",
    "image_tensor",
    "load",
    "prepare",
    "read_image",
    "region",
    "sources",
]
