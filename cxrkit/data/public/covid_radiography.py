"""COVID-19 Radiography Database (Chowdhury, Rahman et al.): four classes, a lung mask for every image."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import MISSING, choose, find_folder, images_in
from cxrkit.data.tables import refuse
from cxrkit.errors import DataError, ParameterError

__all__ = ["CLASSES", "load_covid_radiography"]

CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
_LARGEST = 64 * 2**20  # bytes of an unpacked spreadsheet; the true ones hold about 2 MB


def load_covid_radiography(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    classes: Sequence[str] = CLASSES,
    without_rsna: bool = False,
    missing: str = "refuse",
) -> Dataset:
    """COVID-19_Radiography_Dataset: the folders COVID, Lung_Opacity, Normal, Viral Pneumonia, each with images, masks.

    ``classes``: the labels, of which each image has one; paper `path` takes ("COVID", "Lung_Opacity", "Normal").
    ``table`` holds ``lung_mask``, the path of the mask (see :func:`cxrkit.data.region`), and ``url``, the
    origin that the spreadsheets give. ``without_rsna`` leaves out the images taken from the RSNA challenge, which the
    ``url`` tells: all of Lung_Opacity, most of Normal. Patients are not published: each image counts as one.
    ``missing``: "refuse" wants images and masks of every class, "leave_out" takes the classes that are there.
    ``seed`` is not used. Raises DataError naming folder and file. Source: paper `path`, section on data.
    """
    choose("missing", missing, MISSING)
    classes = _classes(classes)
    root = find_folder(root, *(f"{name}/images" for name in CLASSES))
    parts = [_read_class(root, name, missing) for name in classes]
    table = pd.concat(parts, ignore_index=True)
    if without_rsna:
        table = _without_rsna(root, table)
    if table.empty:
        raise DataError(f"{root}: holds no image of {list(classes)}")
    for name in classes:
        table[name] = (table["class"] == name).astype(float)
    table = table.drop(columns="class")
    return file_dataset("covid_radiography", classes, table, None, size, preprocessing)


def _classes(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        raise ParameterError(f"classes={classes!r}: give a list of names, such as [{classes!r}]")
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or len(set(classes)) != len(classes) or not len(classes):
        raise ParameterError(f"classes={list(classes)}: give some of {list(CLASSES)}, each once")
    return tuple(classes)


def _read_class(root: Path, name: str, missing: str) -> pd.DataFrame:
    images, masks = images_in(root / name / "images"), images_in(root / name / "masks")
    if not images:
        if missing == "refuse":
            refuse(root, "the folder holds no image (missing='leave_out' loads the others)", [(None, f"{name}/images")])
        else:
            warnings.warn(f"covid_radiography: {name}/images is not there and is left out", UserWarning, stacklevel=4)
    files = sorted(images, key=_numbered)
    table = pd.DataFrame({"file": files, "path": [images[file] for file in files]}, dtype=object)
    table["lung_mask"] = table["file"].map(masks)
    if missing == "refuse":
        bare = table.loc[table["lung_mask"].isna(), "file"]
        refuse(root / name, "the image has no mask of its name", [(None, f"images/{file}") for file in bare])
    stem = table["file"].str.rsplit(".", n=1).str[0].astype(object)
    table.insert(0, "image_id", stem)
    table.insert(1, "patient_id", stem)
    table["class"] = name
    spreadsheet = root / f"{name}.metadata.xlsx"
    urls = _urls(spreadsheet) if spreadsheet.is_file() else {}
    # The spreadsheets say NORMAL-1 where the file is Normal-1.png.
    table["url"] = stem.str.casefold().map(urls).astype(object)
    return table.drop(columns="file")


def _numbered(file: str) -> tuple[str, int]:
    number = re.search(r"-(\d+)\.\w+$", file)
    return (file[: number.start()], int(number[1])) if number else (file, 0)


def _without_rsna(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    # The publishers name one origin for this class, also where its spreadsheet is not at hand.
    rsna = (table["class"] == "Lung_Opacity") | table["url"].str.contains("rsna", case=False, na=False)
    untold = (table["class"] == "Normal") & table["url"].isna()
    refuse(
        root,
        "without_rsna=True can't tell where the image comes from (Normal.metadata.xlsx says it)",
        [(None, repr(image)) for image in table.loc[untold, "image_id"]],
    )
    return table[~rsna & ~untold].reset_index(drop=True)


def _urls(path: Path) -> dict[str, str]:
    """The origin of each image by its name in lower case."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > _LARGEST:
            raise DataError(f"{path}: unpacks to more than {_LARGEST // 2**20} MB")
        rows = pd.read_excel(path, dtype=str, na_filter=False)
    except ImportError as error:
        raise DataError(f"{path}: {error}") from None
    except DataError:
        raise
    except Exception:  # openpyxl raises whatever the damage leads to
        raise DataError(f"{path}: is not a spreadsheet that can be read") from None
    if not {"FILE NAME", "URL"} <= set(rows.columns):
        raise DataError(f"{path}: lacks the columns FILE NAME and URL; it has {list(rows.columns)}")
    return dict(zip(rows["FILE NAME"].str.casefold(), rows["URL"], strict=True))
