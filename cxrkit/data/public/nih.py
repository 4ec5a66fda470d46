"""NIH ChestX-ray14: 112 120 images of 30 805 patients with 14 mined labels, and 984 boxes of 8 labels on 880 of them.

The folder as downloaded: ``images_001/images/*.png`` to ``images_012`` (or all PNGs in ``images``), either vintage of
``Data_Entry_2017*.csv``, ``BBox_List_2017.csv``, ``train_val_list.txt`` and ``test_list.txt``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import BOX_COLUMNS, Dataset
from cxrkit.data.files import FileRenderer
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.layout import choose, find_folder, keep_present, stems_in, subfolders
from cxrkit.data.public.xrv_tables import TABLES, Annotations, carried_file
from cxrkit.data.splits import with_validation
from cxrkit.data.tables import numbers, places, refuse, whole_boxes
from cxrkit.errors import DataError

__all__ = ["LABELS", "load_nih", "read_annotations"]

SIDE = 1024
# In the order of CheXNet.
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
LISTS = ("train_val_list.txt", "test_list.txt")
# Cells of the headers, whose last names hold commas that nobody quoted.
_ENTRY_CELLS = (
    ("Image Index",),
    ("Finding Labels",),
    ("Follow-up #",),
    ("Patient ID",),
    ("Patient Age",),
    ("Patient Gender", "Patient Sex"),
    ("View Position",),
    ("OriginalImage[Width",),
    ("Height]",),
    ("OriginalImagePixelSpacing[x",),
    ("y]",),
)
_ENTRY_NAMES = ("file", "findings", "follow_up", "patient", "age", "sex", "view", "width", "height", "dx", "dy")
_BOX_CELLS = (("Image Index",), ("Finding Label",), ("Bbox [x",), ("y",), ("w",), ("h]",))
_BOX_NAMES = ("file", "label", "x", "y", "w", "h")
_OLDEST = 120
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}


def load_nih(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    preprocessing: Preprocessing = SQUASH,
    split_by: str = "official",
    tables: str = "folder",
    missing: str = "refuse",
) -> Dataset:
    """Load NIH ChestX-ray14. Boxes are in pixels of the published 1024 x 1024 images; "Infiltrate" is "Infiltration".

    ``split_by``: "official", test_list.txt against train_val_list.txt, of whose patients an eighth, chosen by ``seed``,
    validates; "patients", this package's own folds. ``tables``: "torchxrayvision" takes the labels and boxes which that
    package carries (those of 2020) when the folder holds none; the lists it does not carry. ``missing``: "leave_out"
    loads the images that are there. The table has follow_up, age (years; NaN where it claims more than 120), sex, view
    and the size of the image that was acquired. Raises DataError naming file and rows. Source: paper `relevance`.
    """
    choose("split_by", split_by, ("official", "patients"))
    folder = find_folder(root, *ENTRIES, "images", "images_001")
    found = read_annotations(folder, tables)
    table = found.images
    if split_by == "official":
        table["split"] = _official_split(folder, found, seed)
    parts = [part for part in subfolders(folder) if part.name.startswith("images")]
    files = stems_in(folder, *parts, *(part / "images" for part in parts if part.name != "images"))
    table["path"] = pd.Series(list(map(files.get, table["image_id"])), table.index, dtype=object)
    table = table[keep_present("nih", found.path, table["image_id"], table["path"].notna(), missing)]
    return Dataset(
        name="nih",
        labels=LABELS,
        table=table,
        boxes=found.boxes[found.boxes["image_id"].isin(table["image_id"])],
        renderer=FileRenderer(
            table["path"], [(SIDE, SIDE)] * len(table), preprocessing, table="every image of this source"
        ),
        size=size,
        frames=np.full((len(table), 2), SIDE),
        preprocessing=preprocessing,
    )


def read_annotations(folder: Path, tables: str = "folder") -> Annotations:
    """Labels and boxes of all images, in the table's order, without looking at images."""
    choose("tables", tables, TABLES)
    path = next((folder / file for file in ENTRIES if (folder / file).is_file()), None)
    if path is None:
        if tables == "folder":
            raise DataError(
                f"{folder}: lacks {' or '.join(ENTRIES)}; "
                "tables='torchxrayvision' takes the copy which that package carries"
            )
        path = carried_file(ENTRIES[0])
    rows = _checked(path, _read_wide(path, _ENTRY_CELLS, _ENTRY_NAMES))
    images = pd.DataFrame(
        {"image_id": rows["file"].str.removesuffix(".png"), "patient_id": rows["patient"].astype(int)}
    )
    # Python's own strings: pandas' would be converted to them again and again.
    images["patient_id"] = images["patient_id"].astype(str).astype(object)
    findings = _findings(path, rows["findings"])
    images = pd.concat([images, findings], axis=1)
    for name in ("follow_up", "width", "height"):
        to = name if name == "follow_up" else f"acquired_{name}"
        images[to] = pd.to_numeric(rows[name], errors="coerce")
    images["age"] = _age(path, rows["age"])
    images[["sex", "view"]] = rows[["sex", "view"]]
    boxes = folder / BOXES
    if tables == "torchxrayvision" and not boxes.is_file():
        boxes = carried_file(BOXES)
    return Annotations(LABELS, images, _boxes(boxes, images["image_id"]), path)


def _read_wide(path: Path, header: tuple[tuple[str, ...], ...], names: tuple[str, ...]) -> pd.DataFrame:
    """A table by position: ``names`` for the cells of ``header``, of which each may be spelt in several ways.

    Header and rows may end in empty cells, not always equally many. As text, the lines as index; 100 000 rows in a
    quarter of a second.
    """
    spare = [f"spare {k}" for k in range(4)]
    try:
        cells = pd.read_csv(
            path,
            header=None,
            names=[*names, *spare],
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
        )
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{path}: is not a comma-separated table ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror or error})") from None
    if cells.empty:
        raise DataError(f"{path}: is empty")
    if not isinstance(cells.index, pd.RangeIndex):  # what pandas makes of a first line that is too long
        raise DataError(f"{path}: the header has more than {len(names)} cells")
    cells.index += 1
    first = [cell.strip() for cell in cells.iloc[0]]
    fits = all(cell in spelling for cell, spelling in zip(first, header, strict=False))
    if not fits or any(first[len(header) :]):
        wanted = ",".join(" or ".join(spelling) for spelling in header)
        raise DataError(f"{path}: the header is {','.join(first).rstrip(',')!r}, expected {wanted!r}")
    rows = cells.iloc[1:]
    beyond, complete = (rows[spare] != "").any(axis=1), rows[names[-1]] != ""
    blank = ~complete & ~beyond & (rows[list(names)] == "").all(axis=1)
    if blank.all():
        raise DataError(f"{path}: holds a header but no row")
    refuse(path, f"a row needs {len(names)} cells", places(rows[names[0]], ~blank & (beyond | ~complete)))
    return rows.loc[complete & ~beyond, list(names)]


def _checked(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    well_named = rows["file"].str.fullmatch(r"\d{8}_\d{3}\.png")
    same = pd.to_numeric(rows["patient"], errors="coerce") == pd.to_numeric(rows["file"].str[:8], errors="coerce")
    wrong = {
        "Image Index is not like 00000001_000.png": (rows["file"], ~well_named),
        "Image Index occurs twice": (rows["file"], rows["file"].duplicated()),
        "Patient ID is not that of Image Index": (rows["patient"], well_named & ~same),
    }
    for problem, (column, where) in wrong.items():
        refuse(path, problem, places(column, where))
    return rows[~np.any([where for _, where in wrong.values()], axis=0)]


def _findings(path: Path, cells: pd.Series) -> pd.DataFrame:
    # Few of the cells differ: each kind is looked at once.
    kind_of, kinds = pd.factorize(cells)
    found = pd.Series(kinds, dtype=object).str.get_dummies("|")
    unknown = found.drop(columns=[*LABELS, NO_FINDING], errors="ignore").any(axis=1).to_numpy()[kind_of]
    refuse(path, f"Finding Labels holds a name other than {', '.join(LABELS)}", places(cells, unknown))
    found = found.reindex(columns=[*LABELS, NO_FINDING], fill_value=0)
    contradicts = (found[NO_FINDING] == 1) == found[list(LABELS)].any(axis=1)
    refuse(
        path,
        f"Finding Labels needs either findings or {NO_FINDING!r}",
        places(cells, contradicts.to_numpy()[kind_of] & ~unknown),
    )
    return pd.DataFrame(found[list(LABELS)].to_numpy(dtype=np.float32)[kind_of], cells.index, LABELS)


def _age(path: Path, cells: pd.Series) -> np.ndarray:
    """Years, from "58", "058Y", "011M" or "023D", as the vintages write it."""
    kind_of, kinds = pd.factorize(cells)
    parts = pd.Series(kinds, dtype=object).str.extract(r"^(\d+)([YMD]?)$")
    refuse(path, "Patient Age is not like 58 or 058Y", places(cells, parts[0].isna().to_numpy()[kind_of]))
    years = pd.to_numeric(parts[0], errors="coerce") * parts[1].map(_YEARS).astype(float)
    return years.where(years <= _OLDEST).to_numpy()[kind_of]


def _boxes(path: Path, image_ids: pd.Series) -> pd.DataFrame:
    rows = _read_wide(path, _BOX_CELLS, _BOX_NAMES)
    x, y, width, height = (numbers(path, rows, column) for column in ("x", "y", "w", "h"))
    boxes = pd.DataFrame({"image_id": rows["file"].str.removesuffix(".png"), "label": rows["label"]})
    boxes["label"] = boxes["label"].replace("Infiltrate", "Infiltration")
    boxes["x_min"], boxes["y_min"], boxes["x_max"], boxes["y_max"] = x, y, x + width, y + height
    boxes["reader"] = "NIH"
    known, labelled = boxes["image_id"].isin(image_ids), boxes["label"].isin(LABELS)
    refuse(path, "Image Index is not in the table of images", places(rows["file"], ~known))
    refuse(path, "Finding Label is unknown", places(rows["label"], ~labelled))
    boxes = boxes[known & labelled]
    return whole_boxes(path, boxes, np.full((len(boxes), 2), SIDE))[list(BOX_COLUMNS)].reset_index(drop=True)


def _official_split(folder: Path, found: Annotations, seed: int) -> np.ndarray:
    listed = []
    for name in LISTS:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{folder}: lacks {name}, which makes the official split; or use split_by='patients'")
        listed.append(found.images["image_id"].isin(path.read_text(encoding="utf-8").replace(".png", "").split()))
    train, test = listed
    refuse(
        found.path,
        f"the image is in both or neither of {' and '.join(LISTS)}",
        places(found.images["image_id"], train == test),
    )
    targets = found.images[list(LABELS)].to_numpy()
    return with_validation(test.to_numpy(), found.images["patient_id"], targets, seed)
