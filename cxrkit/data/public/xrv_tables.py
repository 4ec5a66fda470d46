"""Label and box tables that the package torchxrayvision carries, for when a folder holds images alone.

The package is not imported, only its files are read. They are copies made by its authors; a table in the user's
folder always goes first.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from cxrkit.errors import DataError, ParameterError

__all__ = ["Annotations", "Tables", "annotations", "carried_file", "table_path"]

Tables = Literal["folder", "torchxrayvision"]
_FILES = {
    "Data_Entry_2017_v2020.csv": "Data_Entry_2017_v2020.csv.gz",
    "BBox_List_2017.csv": "BBox_List_2017.csv.gz",
    "stage_2_train_labels.csv": "kaggle_stage_2_train_labels.csv.zip",
    "train.csv": "vinbigdata-train.csv.gz",
}


@dataclass(frozen=True)
class Annotations:
    """The annotations of a source, without its images.

    ``images``: image_id, patient_id, one 0/1 column per label, and the source's further columns, as
    ``Dataset.table`` without path and split; its index holds the lines of the table at ``path``. ``boxes``: as
    ``Dataset.boxes``.
    """

    labels: tuple[str, ...]
    images: pd.DataFrame
    boxes: pd.DataFrame
    path: Path


def annotations(name: str) -> Annotations:
    """Labels and boxes of "nih", "rsna" or "vinbigdata" as torchxrayvision carries them; no image is needed.

    VinBigData counts a label when any reader boxed it. Raises ParameterError for another name, DataError where
    the package is not installed.
    """
    if name not in (known := ("nih", "rsna", "vinbigdata")):
        raise ParameterError(f"name={name!r} is unknown; use one of {list(known)}")
    module = importlib.import_module(f"cxrkit.data.public.{name}")
    return module.read_annotations(_package() / "data", tables="torchxrayvision")


def table_path(folder: Path, *files: str, tables: str) -> Path:
    """The first of ``files`` that ``folder`` holds; or, where tables="torchxrayvision", the copy of the first."""
    for file in files:
        if (folder / file).is_file():
            return folder / file
    if tables == "torchxrayvision":
        return carried_file(files[0])
    cure = "tables='torchxrayvision' takes the copy which that package carries"
    raise DataError(f"{folder}: lacks {' or '.join(files)}; {cure}")


def carried_file(file: str) -> Path:
    """Where torchxrayvision keeps its copy of a published table. Raises DataError where there is none."""
    path = _package() / "data" / _FILES[file]
    if not path.is_file():
        raise DataError(f"{path}: this version of torchxrayvision does not carry {file}; put the table into the folder")
    return path


def _package() -> Path:
    found = importlib.util.find_spec("torchxrayvision")
    if found is None or found.origin is None:
        raise DataError("tables='torchxrayvision' needs that package: pip install torchxrayvision")
    return Path(found.origin).parent
