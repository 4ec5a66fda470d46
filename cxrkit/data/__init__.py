"""From a seed or a downloaded folder to images, labels, boxes and folds."""

from __future__ import annotations

from cxrkit.data.dataset import Batch, Dataset, Sample, collate
from cxrkit.data.readers import read_image
from cxrkit.data.sources import load, sources

__all__ = ["Batch", "Dataset", "Sample", "collate", "load", "read_image", "sources"]
