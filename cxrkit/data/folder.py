"""The ``folder`` source: any folder with images.csv and, optionally, boxes.csv.

images.csv: ``image_id, file, patient_id, labels`` (joined by ``;``, empty or "No Finding" for none), and
optionally ``split, width, height, orig_width, orig_height, sha256``; further columns are kept in the table.
boxes.csv: ``image_id, label, x_min, y_min, x_max, y_max`` in pixels of the file, and optionally ``reader``.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
import torch

from cxrkit.data.dataset import BOX_COLUMNS, SPLITS, Dataset, Rendered
from cxrkit.data.geometry import resize
from cxrkit.data.readers import image_size, read_image
from cxrkit.errors import DataError, ParameterError

__all__ = ["load_folder"]

NO_FINDING = "No Finding"
IMAGE_COLUMNS = ("image_id", "file", "patient_id", "labels")
EDGES = ("x_min", "y_min", "x_max", "y_max")
# Coordinates rounded or counted from 1 may overshoot the border a little; they are clipped to it.
OVERSHOOT = 1.0
_SHOWN = 3


def load_folder(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    hierarchy_separator: str | None = "/",
    readers: Sequence[str] | None = None,
    verify: bool = False,
) -> Dataset:
    """Load a folder with images.csv and, optionally, boxes.csv.

    ``labels``: the labels wanted, in order; by default all of images.csv, the most frequent first. A label
    known to boxes.csv alone is 1 where it is boxed and NaN elsewhere. ``label_map``: old name -> new name,
    for images and boxes. ``hierarchy_separator``: a label ``a/b`` is a child of ``a``, which is positive too;
    None reads names as they are. ``readers``: keep the boxes of these readers only. ``verify``: compare every
    file with its sha256. ``seed`` is not used. Boxes may overshoot the image by one pixel, which is clipped;
    they are returned in original pixels (times ``orig_width / width``). Raises DataError naming file and
    rows, ParameterError for an unknown label or reader.
    """
    root = Path(root)
    images_csv = _images_csv(root)
    images = _read_table(images_csv, IMAGE_COLUMNS)
    if images.empty:
        raise DataError(f"{images_csv}: holds a header but no row")
    _check_images(images_csv, root, images)
    if verify:
        _check_sums(images_csv, root, images)
    width, height = _extent(images_csv, root, images)
    boxes = _read_boxes(root / "boxes.csv", images, width, height)
    boxes = _keep_readers(boxes, readers)

    rename = dict(label_map or {})
    found, parents = _image_labels(images_csv, images, hierarchy_separator, rename)
    boxes["label"] = boxes["label"].map(lambda label: rename.get(label, label))
    labels = _choose_labels(labels, found, boxes)
    table = _table(images_csv, root, images, labels, _targets(images, found, labels, boxes))
    table["width"], table["height"] = width, height
    table["orig_width"] = _lengths(images_csv, images, "orig_width", width)
    table["orig_height"] = _lengths(images_csv, images, "orig_height", height)
    return Dataset(
        name="folder",
        labels=labels,
        table=table,
        boxes=_to_original(boxes, table),
        renderer=FolderRenderer(list(table["path"]), list(zip(width, height, strict=True))),
        size=size,
        hierarchy={child: parent for child, parent in parents.items() if {child, parent} <= set(labels)},
    )


class FolderRenderer:
    """Reads the files of a folder. ``sizes``: width and height that the table promises for each."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[tuple[int, int]]):
        self.paths = list(paths)
        self.sizes = list(sizes)

    def render(self, row: int, size: int) -> Rendered:
        """The image of ``row``, resized to ``size`` x ``size``; raises DataError naming the file."""
        pixels = read_image(self.paths[row])
        held, promised = pixels.shape[::-1], self.sizes[row]
        if held != tuple(promised):
            raise DataError(
                f"{self.paths[row]}: is {held[0]} x {held[1]} pixels, images.csv says "
                f"{promised[0]} x {promised[1]}; boxes would be misplaced"
            )
        return Rendered(resize(torch.from_numpy(pixels), size))


# Tables


def _images_csv(root: Path) -> Path:
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, expected a folder with images.csv")
    path = root / "images.csv"
    if not path.is_file():
        state = "holds no images.csv" if any(root.iterdir()) else "is empty; expected images.csv in it"
        raise DataError(f"{root}: {state}, a table with the columns {', '.join(IMAGE_COLUMNS)}")
    return path


def _read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """The table as text; its index holds the line of the file on which each row ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start} can't be read)") from None
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    except csv.Error as error:
        raise DataError(f"{path}: is not a comma-separated table ({error})") from None
    if not lines:
        raise DataError(f"{path}: is empty; expected a header with {', '.join(required)}")
    header = lines[0][1]
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(f"{path}: lacks the columns {missing}; it has {header}")
    if len(set(header)) != len(header):
        raise DataError(f"{path}: a column name occurs twice in {header}")
    _refuse(
        path,
        "the number of cells differs from the header's",
        [(line, f"{len(row)} cells, not {len(header)}") for line, row in lines[1:] if len(row) != len(header)],
    )
    return pd.DataFrame([row for _, row in lines[1:]], columns=header, index=[line for line, _ in lines[1:]])


def _refuse(path: Path, problem: str, places: Sequence[tuple[int, str]]) -> None:
    """Raise one DataError for all places (line, what stands there) that share a problem, if there are any."""
    if places:
        shown = ", ".join(f"row on line {line} ({what})" for line, what in places[:_SHOWN])
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        raise DataError(f"{path}: {problem}: {shown}{more}")


def _places(column: pd.Series, wrong: pd.Series | np.ndarray) -> list[tuple[int, str]]:
    return [(line, repr(value)) for line, value in column[np.asarray(wrong, dtype=bool)].items()]


def _check_images(path: Path, root: Path, images: pd.DataFrame) -> None:
    for column in ("image_id", "file", "patient_id"):
        _refuse(path, f"{column} is empty", _places(images[column], images[column] == ""))
    twice = images["image_id"].duplicated()
    _refuse(path, "image_id occurs twice", _places(images["image_id"], twice))
    _refuse(path, "file leaves the folder", _places(images["file"], images["file"].map(_leaves)))
    there = images["file"].map(lambda file: (root / file).is_file())
    _refuse(path, "file does not exist", _places(images["file"], ~there))
    if "split" in images.columns:
        wrong = ~images["split"].isin(SPLITS)
        _refuse(path, f"split is none of {', '.join(SPLITS)}", _places(images["split"], wrong))
        splits = images.groupby("patient_id")["split"].transform("nunique")
        _refuse(path, "patient_id is in more than one split", _places(images["patient_id"], splits > 1))


def _leaves(file: str) -> bool:
    # Windows' rules cover the separators and drives of both worlds.
    path = PureWindowsPath(file)
    return bool(path.anchor) or ".." in path.parts


def _check_sums(path: Path, root: Path, images: pd.DataFrame) -> None:
    if "sha256" not in images.columns:
        raise DataError(f"{path}: verify=True needs the column sha256; it has {list(images.columns)}")
    wrong = []
    for line, file, expected in images[["file", "sha256"]].itertuples(name=None):
        with (root / file).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected.lower():
                wrong.append((line, repr(file)))
    _refuse(path, "the sha256 of file differs", wrong)


def _extent(path: Path, root: Path, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of every file, from the table or else from the file itself."""
    if {"width", "height"} <= set(images.columns):
        width = _lengths(path, images, "width", None)
        height = _lengths(path, images, "height", None)
    else:
        sizes = np.array([image_size(root / file) for file in images["file"]])
        width, height = sizes[:, 0], sizes[:, 1]
    return width.astype(int), height.astype(int)


def _lengths(path: Path, images: pd.DataFrame, column: str, default: np.ndarray | None) -> np.ndarray:
    if column not in images.columns:
        return default
    values = pd.to_numeric(images[column], errors="coerce")
    wrong = ~(values > 0) | ~np.isfinite(values) | (values % 1 != 0)
    _refuse(path, f"{column} is not a positive whole number", _places(images[column], wrong))
    return values.to_numpy(dtype=int)


# Labels


def _image_labels(
    path: Path, images: pd.DataFrame, separator: str | None, rename: Mapping[str, str]
) -> tuple[list[set[str]], dict[str, str]]:
    """The labels of each image, ancestors included, and child -> parent."""
    found, parents, wrong = [], {}, []
    for line, cell in images["labels"].items():
        names = {name.strip() for name in cell.split(";")} - {""}
        if NO_FINDING in names and len(names) > 1:
            wrong.append((line, repr(cell)))
        of_image = set()
        for name in names - {NO_FINDING}:
            chain = [rename.get(step, step) for step in _ancestry(name, separator)]
            of_image.update(chain)
            parents.update((child, parent) for parent, child in pairwise(chain))
        found.append(of_image)
    _refuse(path, f"labels holds {NO_FINDING!r} beside a finding", wrong)
    return found, {child: parent for child, parent in parents.items() if child != parent}


def _ancestry(name: str, separator: str | None) -> list[str]:
    """From the root of a label path to the label: a, a/b, a/b/c."""
    if not separator:
        return [name]
    steps = name.split(separator)
    return [separator.join(steps[: depth + 1]) for depth in range(len(steps))]


def _choose_labels(labels: Sequence[str] | None, found: Sequence[set[str]], boxes: pd.DataFrame) -> tuple[str, ...]:
    counts = Counter(label for of_image in found for label in of_image)
    if labels is None:
        return tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    if isinstance(labels, str):
        raise ParameterError(f"labels={labels!r}: give a list of names, such as [{labels!r}]")
    known = set(counts) | set(boxes["label"])
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ParameterError(f"labels {unknown} occur neither in images.csv nor in boxes.csv; known: {sorted(known)}")
    if len(set(labels)) != len(labels):
        raise ParameterError(f"labels={list(labels)} names one label twice")
    return tuple(labels)


def _targets(images: pd.DataFrame, found: Sequence[set[str]], labels: Sequence[str], boxes: pd.DataFrame) -> np.ndarray:
    targets = np.array([[label in of_image for label in labels] for of_image in found], dtype=np.float32)
    targets = targets.reshape(len(images), len(labels))
    for position, label in enumerate(labels):
        if not any(label in of_image for of_image in found):
            boxed = images["image_id"].isin(boxes["image_id"][boxes["label"] == label])
            targets[:, position] = np.where(boxed, 1, np.nan)
    return targets


def _table(path: Path, root: Path, images: pd.DataFrame, labels: Sequence[str], targets: np.ndarray) -> pd.DataFrame:
    clash = [label for label in labels if label in {"path", "split", "width", "height", *images.columns}]
    if clash:
        raise DataError(f"{path}: {clash} are both labels and columns; rename the label with label_map")
    table = images[["image_id", "patient_id"]].reset_index(drop=True)
    table["path"] = [str(root / file) for file in images["file"]]
    table = pd.concat([table, pd.DataFrame(targets, columns=list(labels))], axis=1)
    rest = [column for column in images.columns if column not in table.columns]
    return pd.concat([table, images[rest].reset_index(drop=True).apply(_inferred)], axis=1)


def _inferred(column: pd.Series) -> pd.Series:
    """Numbers where all filled cells are numbers; text otherwise."""
    filled = column.where(column != "")
    numbers = pd.to_numeric(filled, errors="coerce")
    return numbers if numbers.notna().sum() == filled.notna().sum() > 0 else filled


# Boxes


def _read_boxes(path: Path, images: pd.DataFrame, width: np.ndarray, height: np.ndarray) -> pd.DataFrame:
    """Boxes in pixels of the files, clipped to them."""
    boxes = _read_table(path, ("image_id", "label", *EDGES)) if path.exists() else pd.DataFrame()
    if boxes.empty:
        return pd.DataFrame({column: [] for column in BOX_COLUMNS})
    if "reader" not in boxes.columns:
        boxes["reader"] = "unknown"
    known = boxes["image_id"].isin(images["image_id"])
    _refuse(path, "image_id is not in images.csv", _places(boxes["image_id"], ~known))
    _refuse(path, "label is empty", _places(boxes["label"], boxes["label"] == ""))
    for edge in EDGES:
        numbers = pd.to_numeric(boxes[edge], errors="coerce").astype(np.float64)
        _refuse(path, f"{edge} is not a number", _places(boxes[edge], ~np.isfinite(numbers)))
        boxes[edge] = numbers
    order = pd.Series(np.arange(len(images)), index=images["image_id"])[boxes["image_id"]].to_numpy()
    return _clip(path, boxes, np.column_stack([width, height])[order])


def _clip(path: Path, boxes: pd.DataFrame, limits: np.ndarray) -> pd.DataFrame:
    """Boxes clipped to their images, whose width and height are ``limits`` ``[M, 2]``."""
    low, high = boxes[["x_min", "y_min"]].to_numpy(), boxes[["x_max", "y_max"]].to_numpy()
    described = [
        f"{image_id}: {x_min:g}, {y_min:g}, {x_max:g}, {y_max:g} in {width} x {height}"
        for (image_id, x_min, y_min, x_max, y_max), (width, height) in zip(
            boxes[["image_id", *EDGES]].itertuples(index=False, name=None), limits, strict=True
        )
    ]
    described = pd.Series(described, index=boxes.index)
    outside = ((low < -OVERSHOOT) | (high > limits + OVERSHOOT)).any(axis=1)
    _refuse(path, "the box lies outside its image", _places(described, outside))
    low, high = low.clip(0, limits), high.clip(0, limits)
    empty = (high <= low).any(axis=1)
    _refuse(path, "the box has no area (x_min < x_max and y_min < y_max are needed)", _places(described, empty))
    boxes[["x_min", "y_min"]], boxes[["x_max", "y_max"]] = low, high
    return boxes


def _keep_readers(boxes: pd.DataFrame, readers: Sequence[str] | None) -> pd.DataFrame:
    if readers is None:
        return boxes
    readers = [readers] if isinstance(readers, str) else list(readers)
    unknown = [reader for reader in readers if reader not in set(boxes["reader"])]
    if unknown:
        raise ParameterError(f"readers {unknown} drew no box; known: {sorted(set(boxes['reader']))}")
    return boxes[boxes["reader"].isin(readers)].copy()


def _to_original(boxes: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Boxes from pixels of the file to original pixels, as ``Dataset.boxes`` wants them."""
    boxes = boxes.reset_index(drop=True)
    frame = table.set_index("image_id").loc[boxes["image_id"]]
    for axis, side in (("x", "width"), ("y", "height")):
        for end in ("min", "max"):
            scaled = boxes[f"{axis}_{end}"].to_numpy() * frame[f"orig_{side}"].to_numpy() / frame[side].to_numpy()
            boxes[f"{axis}_{end}"] = scaled
    return boxes[[*BOX_COLUMNS, *(column for column in boxes.columns if column not in BOX_COLUMNS)]]
