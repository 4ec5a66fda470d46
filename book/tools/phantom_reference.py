"""Statistics of real radiographs for the page on the phantom: python -m book.tools.phantom_reference FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cxrkit.data.geometry import resize
from cxrkit.data.readers import read_image
from cxrkit.errors import DataError
from cxrkit.phantom.realism import grey_histogram, radial_power_spectrum

__all__ = ["reference_bands"]

PERCENTILES = (5, 50, 95)


def reference_bands(folder: str | Path, size: int = 224) -> pd.DataFrame:
    """The 5th, 50th and 95th percentile of both statistics over the images of a folder, resized to ``size``.

    ``folder``: real frontal radiographs, PNG or JPEG. Returns columns statistic ("grey_histogram" or
    "radial_power_spectrum"), bin, position (grey value, or cycles per image width), p5, p50, p95: percentiles
    only, from which no image can be had back. Raises DataError for a folder without images.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise DataError(f"{folder}: no PNG or JPEG there; give the folder that holds the images")
    images = [resize(torch.from_numpy(read_image(path)), size).numpy() for path in paths]
    parts = []
    for function in (grey_histogram, radial_power_spectrum):
        values = np.stack([function(image) for image in images])
        low, middle, high = np.percentile(values, PERCENTILES, axis=0)
        bins = np.arange(len(middle))
        position = (bins + 0.5) / len(bins) if function is grey_histogram else bins + 1.0
        columns = {"bin": bins, "position": position, "p5": low, "p50": middle, "p95": high}
        parts.append(pd.DataFrame({"statistic": function.__name__, **columns}))
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    reference_bands(sys.argv[1]).to_csv(Path(__file__).parents[1] / "phantom_reference.csv", index=False)
