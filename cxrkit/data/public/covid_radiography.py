"""COVID-19 Radiography Database (Chowdhury, Rahman et al.): four classes, a lung mask for every image."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.data.public.layout import find_folder, images_in
from cxrkit.data.public.loader import Missing, public_loader, with_labels
from cxrkit.data.tables import refuse
from cxrkit.errors import DataError, ParameterError

__all__ = ["CLASSES", "load_covid_radiography"]

CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
_LARGEST = 64 * 2**20  # bytes of an unpacked spreadsheet; the true ones hold about 2 MB


@public_loader
def load_covid_radiography(
    root: str | Path,
    *,
    classes: Sequence[str] = CLASSES,
    without_rsna: bool = False,
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """COVID-19_Radiography_Dataset: the folders COVID, Lung_Opacity, Normal, Viral Pneumonia, each with images, masks.

    ``classes``: the labels, of which each image has one; paper `path` takes ("COVID", "Lung_Opacity", "Normal").
    ``table`` holds ``lung_mask``, the path of the mask (see :func:`cxrkit.data.region`), and ``url``, the
    origin that the spreadsheets give. Patients are not published: each image counts as one. Options: see
    data_manifests/covid_radiography.yaml. Raises DataError naming folder and file. Source: paper `path`.
    """
    if isinstance(classes, str) or not len(classes) or len(set(classes) & set(CLASSES)) != len(classes):
        raise ParameterError(f"classes={classes!r}: give a list of some of {list(CLASSES)}, each once")
    root = find_folder(root, *(f"{name}/images" for name in CLASSES))
    table = pd.concat([_read_class(root, name, missing) for name in classes], ignore_index=True)
    if without_rsna:
        table = _without_rsna(root, table)
    if table.empty:
        raise DataError(f"{root}: holds no image of {list(classes)}")
    of = table.pop("class").to_numpy()
    return {"labels": tuple(classes), "table": with_labels(table, classes, of[:, None] == np.array(classes, object))}


def _read_class(root: Path, name: str, missing: str) -> pd.DataFrame:
    images, masks = images_in(root / name / "images"), images_in(root / name / "masks")
    if not images and missing == "refuse":
        refuse(root, "the folder holds no image (missing='leave_out' loads the others)", [(None, f"{name}/images")])
    elif not images:
        warnings.warn(f"covid_radiography: {name}/images is not there and is left out", UserWarning, stacklevel=4)
    table = pd.DataFrame({"image_id": [file.rpartition(".")[0] for file in images], "class": name}, dtype=object)
    table.insert(1, "patient_id", table["image_id"])
    table["path"], table["lung_mask"] = list(images.values()), [masks.get(file) for file in images]
    bare = [(None, f"images/{file}") for file in images if file not in masks and missing == "refuse"]
    refuse(root / name, "the image has no mask of its name", bare)
    spreadsheet = root / f"{name}.metadata.xlsx"
    urls = _urls(spreadsheet) if spreadsheet.is_file() else {}
    # The spreadsheets say NORMAL-1 where the file is Normal-1.png.
    table["url"] = table["image_id"].str.casefold().map(urls).astype(object)
    number = table["image_id"].str.extract(r"-(\d+)$")[0].astype(float)
    return table.iloc[np.lexsort((table["image_id"].astype(str), number))]


def _without_rsna(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    # The publishers name one origin for this class, also where its spreadsheet is not at hand.
    rsna = (table["class"] == "Lung_Opacity") | table["url"].str.contains("rsna", case=False, na=False)
    untold = (table["class"] == "Normal") & table["url"].isna()
    problem = "without_rsna=True can't tell where the image comes from (Normal.metadata.xlsx says it)"
    refuse(root, problem, [(None, repr(image)) for image in table["image_id"][untold]])
    return table[~rsna & ~untold].reset_index(drop=True)


def _urls(path: Path) -> dict[str, str]:
    """The origin of each image by its name in lower case."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        rows = pd.read_excel(path, dtype=str, na_filter=False) if unpacked <= _LARGEST else None
    except Exception:  # openpyxl raises whatever the damage leads to
        raise DataError(f"{path}: is not a spreadsheet that can be read") from None
    if rows is None:
        raise DataError(f"{path}: unpacks to more than {_LARGEST // 2**20} MB")
    if not {"FILE NAME", "URL"} <= set(rows.columns):
        raise DataError(f"{path}: lacks the columns FILE NAME and URL; it has {list(rows.columns)}")
    return dict(zip(rows["FILE NAME"].str.casefold(), rows["URL"], strict=True))
