"""boxes.csv of the folder source: its rows, the boxes on their images, and those that make no mask."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.dataset import BOX_COLUMNS
from cxrkit.data.labels import clean, is_blank, is_none, nearest, spelling
from cxrkit.data.tables import EDGES, MISSING, counted_from, numbers, places, read_table, refuse, whole_boxes
from cxrkit.errors import ParameterError

__all__ = ["box_rows", "denied", "id_number", "keep_readers", "left_out", "maskless", "placed", "to_original"]

# Labels that a message lists.
_SHOWN = 8


def box_rows(path: Path, named: pd.Index) -> pd.DataFrame:
    """The rows of boxes.csv as text; ``named`` are all images of the table, sound or not."""
    rows = read_table(path, ("image_id", "label", *EDGES), ("reader",)) if path.exists() else []
    if not len(rows):
        return pd.DataFrame({column: [] for column in BOX_COLUMNS}, dtype=object)
    if "reader" not in rows.columns:
        rows["reader"] = "unknown"
    rows["label"] = rows["label"].map(clean)
    strange = ~rows["image_id"].isin(named)
    hint = ""
    if strange.any():
        known = {id_number(value): value for value in named}
        stems = rows["image_id"][strange].str.replace(r".*[/\\]|\.(png|jpe?g|dcm|dicom)$", "", regex=True, case=False)
        alike = [known[number] for number in map(id_number, stems) if number in known]
        hint = f"; did you mean {alike[0]!r}? {len(alike)} differ in zeros, case or ending" if alike else ""
    refuse(path, f"image_id is not in images.csv{hint}", places(rows["image_id"], strange))
    return rows


def id_number(value: str) -> str:
    """An id in lower case, without leading zeros and decimals, which spreadsheets add and remove."""
    match = re.fullmatch(r"0*(\d+)(\.0*)?", value)
    return match[1] if match else value.casefold()


def placed(
    path: Path, rows: pd.DataFrame, rename: Mapping[str, str], image_ids: pd.Series, sides: Mapping[str, np.ndarray]
) -> tuple[pd.DataFrame, list[str]]:
    """Boxes in pixels of the files, clipped to them, under new names; and notices about them."""
    rows = rows.assign(label=rows["label"].map(lambda label: rename.get(label, label)))
    hollow = rows[list(EDGES)].isin(MISSING).all(axis=1)
    blank = rows["label"].map(is_blank) & ~rows["label"].isin(rename.values())
    none = rows["label"].map(is_none) | (blank & hollow)
    told = f"boxes.csv: {none.sum()} of {len(rows)} rows say that there is no finding, so they hold no box"
    notices = [told] if none.any() else []
    refuse(path, "label is empty", places(rows["label"], blank & ~none))
    rows = rows[~none].copy()
    for edge in EDGES:
        rows[edge] = numbers(path, rows, edge)
    order = pd.Index(image_ids).get_indexer(rows["image_id"])
    usable = (order >= 0) & np.isfinite(rows[list(EDGES)].to_numpy(dtype=float)).all(axis=1)
    rows, order = rows[usable].copy(), order[usable]
    limits, originals = (np.column_stack([sides[f"{of}width"], sides[f"{of}height"]])[order] for of in ("", "orig_"))
    boxes = whole_boxes(path, rows, limits, originals)
    if text := counted_from(rows, limits):
        notices.append(f"boxes.csv: {text}")
    if (again := boxes.duplicated().sum()) > 0:
        notices.append(f"boxes.csv: {again} of {len(boxes)} boxes repeat another, and count twice")
    return boxes, notices


def keep_readers(
    boxes: pd.DataFrame, readers: Sequence[str] | None, known: Collection[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The boxes of these readers, and how many that leaves out; ``known``: all readers, also those without a box."""
    if readers is None:
        return boxes, []
    readers = [readers] if isinstance(readers, str) else list(readers)
    if unknown := [reader for reader in readers if reader not in known]:
        raise ParameterError(f"readers {unknown} are not in the column reader of boxes.csv; known: {sorted(known)}")
    kept = boxes["reader"].isin(readers)
    return boxes[kept].copy(), [f"readers= leaves out {(~kept).sum()} of {len(boxes)} boxes"]


def left_out(boxes: pd.DataFrame, labels: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Notices about labels and boxes that the option ``labels`` leaves out."""
    others, beside = sorted(set(counts) - set(labels)), ~boxes["label"].isin(labels)
    told = [f"labels= leaves out {len(others)} labels of images.csv: {', '.join(others)}"] if others else []
    return told + ([f"labels= leaves {beside.sum()} of {len(boxes)} boxes without a mask"] if beside.any() else [])


def maskless(boxes: pd.DataFrame, labels: Sequence[str], chosen: bool) -> list[str]:
    """A notice about boxes whose label no image carries; where labels were ``chosen``, about misspelt ones alone."""
    counts = boxes["label"][~boxes["label"].isin(labels)].value_counts()
    if chosen:
        counts = counts[counts.index.map(spelling).isin([spelling(label) for label in labels])]
    if counts.empty:
        return []
    close = {label: like for label in counts.index if (like := nearest(label, labels))}
    told = [
        f"{label!r} ({count}{f'; images.csv has {close[label]!r}' if label in close else ''})"
        for label, count in counts[:_SHOWN].items()
    ]
    more = f" and {len(counts) - _SHOWN} labels more" if len(counts) > _SHOWN else ""
    own = next((label for label in counts.index if label not in close), counts.index[0])
    return [
        f"boxes.csv: {counts.sum()} of {len(boxes)} boxes make no mask, as no image carries their label: "
        f"{', '.join(told)}{more}. Rename one with label_map={close or {own: 'NAME'}}, or list it in "
        f"labels=[..., {own!r}] as a label of its own, unknown where there is no box"
    ]


def denied(boxes: pd.DataFrame, count: int) -> list[str]:
    """A notice about boxes, among ``count``, of a label that their image lacks."""
    if boxes.empty:
        return []
    first = boxes.iloc[0]
    return [
        f"boxes.csv: {len(boxes)} of {count} boxes are of a label that images.csv denies their image, such as "
        f"{first['label']!r} of {first['image_id']!r}; their masks aren't scored unless the label is added there"
    ]


def to_original(boxes: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Boxes from pixels of the file to original pixels, as ``Dataset.boxes`` wants them."""
    boxes = boxes.reset_index(drop=True)
    frame = table.iloc[pd.Index(table["image_id"]).get_indexer(boxes["image_id"])]
    for axis, side in (("x", "width"), ("y", "height")):
        for end in ("min", "max"):
            scaled = boxes[f"{axis}_{end}"].to_numpy() * frame[f"orig_{side}"].to_numpy() / frame[side].to_numpy()
            boxes[f"{axis}_{end}"] = scaled
    return boxes[[*BOX_COLUMNS, *(column for column in boxes.columns if column not in BOX_COLUMNS)]]
