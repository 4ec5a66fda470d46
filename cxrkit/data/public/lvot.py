"""LVOT: a private set of cardiac MR slices, which can't be downloaded."""

from __future__ import annotations

from pathlib import Path

from cxrkit.data.dataset import Dataset
from cxrkit.data.folder import load_folder
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.errors import DataError

__all__ = ["load_lvot"]

HELP = (
    "this set is private and can't be downloaded. If you have it, write images.csv and boxes.csv beside the images "
    '(see the source "folder") and give that folder as root=. A synthetic set of the same shape, with a small '
    'artefact near the centre, is cxrkit.data.load("phantom", view="quality")'
)


def load_lvot(
    root: str | Path | None = None, *, size: int = 224, seed: int = 0, preprocessing: Preprocessing = SQUASH
) -> Dataset:
    """The LVOT set through the ``folder`` source, for those who have it: root holds images.csv and boxes.csv.

    Raises DataError where ``root`` is None or holds no images.csv, and says what serves instead. Source: paper
    `normgrad`, section on data (690 patients, 8 682 good slices, 8 522 with the outflow tract in view).
    """
    if root is None or not (Path(root) / "images.csv").is_file():
        raise DataError(f"lvot, {root}: holds no images.csv; {HELP}")
    dataset = load_folder(root, size=size, seed=seed, preprocessing=preprocessing)
    dataset.name = "lvot"
    return dataset
