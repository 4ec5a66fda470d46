"""The one dataset class: images, targets, boxes and masks, whatever the source."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cxrkit.data.geometry import union_masks
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.errors import CxrkitError, DataError, ParameterError

__all__ = ["BOX_COLUMNS", "SPLITS", "Batch", "Dataset", "Rendered", "Renderer", "Sample", "collate"]

BOX_COLUMNS = ("image_id", "label", "x_min", "y_min", "x_max", "y_max", "reader")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rendered:
    """One drawn row: image float32 ``[H, W]`` in [0, 1], and the true regions where the source knows them.

    ``truth``: bool ``[L, H, W]`` (exact finding per label) or None; ``shortcut``: bool ``[H, W]`` (planted
    confounder) or None. ``frame``: width and height of the original, where drawing it told them.
    """

    image: Tensor
    truth: Tensor | None = None
    shortcut: Tensor | None = None
    frame: tuple[int, int] | None = None


class Renderer(Protocol):
    """Where the pixels come from: a folder's files, or a drawing made from a seed."""

    def render(self, row: int, size: int) -> Rendered:
        """Draw the image at position ``row`` of the source's whole table, ``size`` x ``size``."""
        ...


@dataclass(frozen=True)
class Sample:
    """``image`` float32 ``[1, H, W]`` in [0, 1] and its ``target`` float32 ``[L]`` (0, 1 or NaN for unknown).

    ``mask``: bool ``[L, H, W]``, the union of each label's boxes; ``truth`` and ``shortcut`` as in
    :class:`Rendered`.
    """

    image: Tensor
    target: Tensor
    mask: Tensor
    image_id: str
    patient_id: str
    truth: Tensor | None = None
    shortcut: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Several samples: images ``[B, 1, H, W]``, targets ``[B, L]``, masks ``[B, L, H, W]``.

    ``truth`` bool ``[B, L, H, W]`` and ``shortcut`` bool ``[B, H, W]`` are None where one sample lacks them.
    """

    images: Tensor
    targets: Tensor
    masks: Tensor
    image_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    truth: Tensor | None = None
    shortcut: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def _map(self, change) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls this when asked to pin."""
        return self._map(lambda tensor: tensor.pin_memory())


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a :class:`Batch`; pass it to DataLoader as ``collate_fn``."""
    samples = list(samples)
    if not samples:
        raise ParameterError("a batch needs at least one sample, none was given")

    def stack(name: str) -> Tensor | None:
        values = [getattr(sample, name) for sample in samples]
        return None if any(value is None for value in values) else torch.stack(values)

    return Batch(
        images=stack("image"),
        targets=stack("target"),
        masks=stack("mask"),
        image_ids=tuple(sample.image_id for sample in samples),
        patient_ids=tuple(sample.patient_id for sample in samples),
        truth=stack("truth"),
        shortcut=stack("shortcut"),
    )


class Dataset(torch.utils.data.Dataset):
    """Images with labels, boxes and patients; a PyTorch map-style dataset of :class:`Sample`.

    ``labels``: names of the L labels, the order of ``target`` and ``mask``. ``table``: one row per image,
    with image_id, patient_id, path, one 0/1/NaN column per label, and split once it is known. ``boxes``:
    columns image_id, label, x_min, y_min, x_max, y_max, reader in original pixels, half-open; boxes whose
    label is not among ``labels`` stay in the table and make no mask. ``renderer``: draws row ``i`` of
    ``table``. ``size``: images are ``size`` x ``size``. ``hierarchy``: child label -> parent label.
    ``frames``: ``[N, 2]`` original width and height, by default the columns orig_width and orig_height; NaN
    where only the file knows, which the renderer then tells. ``preprocessing``: how boxes get to the square;
    the same that the renderer gives its images. ``rows``: int ``[N]``, the position of each image in the source's whole
    table, which is what the renderer is asked for. Raises DataError for a table or boxes that do not fit.
    """

    leak: str = ""
    """Why parts of the split share patients: one sentence, set by a source that was asked for such a split."""
    notices: tuple[str, ...] = ()
    """Sentences about parts of the tables that were left out, or may not mean what was read, each with its cure."""

    def __init__(
        self,
        name: str,
        labels: Sequence[str],
        table: pd.DataFrame,
        boxes: pd.DataFrame | None,
        renderer: Renderer,
        size: int,
        hierarchy: Mapping[str, str] | None = None,
        frames: np.ndarray | None = None,
        preprocessing: Preprocessing = SQUASH,
    ):
        self.name = name
        self.labels = tuple(labels)
        self.table = table.reset_index(drop=True)
        self.boxes = pd.DataFrame(columns=list(BOX_COLUMNS)) if boxes is None else boxes.reset_index(drop=True)
        self.renderer = renderer
        self.size = int(size)
        self.hierarchy = dict(hierarchy or {})
        self.preprocessing = preprocessing
        self._check_table(() if frames is not None else ("orig_width", "orig_height"))
        frames = self.table[["orig_width", "orig_height"]] if frames is None else frames
        self.frames = np.asarray(frames, dtype=np.float64)
        if self.frames.shape != (len(self.table), 2):
            raise DataError(f"{self.name}: frames have shape {self.frames.shape}, expected ({len(self.table)}, 2)")
        self.rows = np.arange(len(self.table))
        self._index()

    def _check_table(self, sides: tuple[str, ...]) -> None:
        if len(set(self.labels)) != len(self.labels):
            raise DataError(f"{self.name}: the labels {list(self.labels)} hold a name twice")
        missing = [c for c in ("image_id", "patient_id", "path", *sides, *self.labels) if c not in self.table.columns]
        if missing:
            raise DataError(f"{self.name}: the table lacks {missing}; it has {list(self.table.columns)}")
        twice = self.table["image_id"][self.table["image_id"].astype(str).duplicated()]
        if len(twice):
            raise DataError(f"{self.name}: image_id {twice.iloc[0]!r} occurs twice; it must be unique")
        missing = [column for column in BOX_COLUMNS if column not in self.boxes.columns]
        if missing:
            raise DataError(f"the boxes lack the columns {missing}; they have {list(self.boxes.columns)}")

    def _index(self) -> None:
        """Arrays that __getitem__ reads, so that drawing a sample never searches a DataFrame."""
        self._targets = self.table[list(self.labels)].to_numpy(dtype=np.float32)
        # Bytes, not a list of strings: worker processes share the pages, since no reference is counted in them.
        self._image_ids = _coded(self.table["image_id"])
        self._patient_ids = _coded(self.table["patient_id"])
        edges = self.boxes[["x_min", "y_min", "x_max", "y_max"]].to_numpy(dtype=np.float64)
        label = pd.Index(self.labels, dtype=object).get_indexer(self.boxes["label"].astype(object))
        row = pd.Index(self._image_ids).get_indexer(_coded(self.boxes["image_id"]))
        # The boxes of row i stand at _first_box[i] : _first_box[i + 1].
        order = np.argsort(row, kind="stable")
        self._box_edges, self._box_label = edges[order], label[order]
        self._first_box = np.searchsorted(row[order], np.arange(len(self.table) + 1))

    @property
    def image_ids(self) -> list[str]:
        """The image ids in the order of the table."""
        return [value.decode() for value in self._image_ids]

    @property
    def maskless_boxes(self) -> pd.DataFrame:
        """The boxes that make no mask, because ``labels`` lacks theirs."""
        return self.boxes[~self.boxes["label"].isin(self.labels)]

    @property
    def denied_boxes(self) -> pd.DataFrame:
        """The boxes of a label that their own image is known to lack."""
        row = pd.Index(self.table["image_id"]).get_indexer(self.boxes["image_id"])
        label = pd.Index(self.labels, dtype=object).get_indexer(self.boxes["label"].astype(object))
        held = np.flatnonzero(label >= 0)
        return self.boxes.iloc[held[self._targets[row[held], label[held]] == 0]]

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        patients = self.table["patient_id"].nunique()
        maskless = f" ({len(self.maskless_boxes)} without a mask)" if len(self.maskless_boxes) else ""
        return (
            f"Dataset({self.name!r}, {len(self)} images of {patients} patients, {len(self.labels)} labels, "
            f"{len(self.boxes)} boxes{maskless}, size {self.size})"
        )

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; raises DataError, naming the image, when it can't be drawn."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside {self.name}, which holds {len(self)} images")
        index %= len(self)
        drawn = self.draw(index)
        return Sample(
            image=drawn.image.unsqueeze(0),
            target=torch.from_numpy(self._targets[index].copy()),
            mask=self._mask(index, drawn.frame),
            image_id=self._image_ids[index].decode(),
            patient_id=self._patient_ids[index].decode(),
            truth=drawn.truth,
            shortcut=drawn.shortcut,
        )

    def draw(self, index: int) -> Rendered:
        """Image and exact masks alone, checked; raises DataError, naming the image, when it can't be drawn."""
        image_id = self._image_ids[index].decode()
        try:
            drawn = self.renderer.render(int(self.rows[index]), self.size)
        except CxrkitError as error:
            raise type(error)(f"{self.name}, image {image_id!r}: {error}") from error
        image = drawn.image
        if tuple(image.shape) != (self.size, self.size) or image.dtype != torch.float32:
            raise DataError(
                f"{self.name}, image {image_id!r}: drawn as {image.dtype} {tuple(image.shape)}, "
                f"expected float32 ({self.size}, {self.size})"
            )
        if not torch.isfinite(image).all():
            raise DataError(f"{self.name}, image {image_id!r}: holds NaN or infinite pixels")
        return drawn

    def _mask(self, index: int, drawn: tuple[int, int] | None) -> Tensor:
        rows = slice(self._first_box[index], self._first_box[index + 1])
        if rows.start == rows.stop:
            return torch.zeros(len(self.labels), self.size, self.size, dtype=torch.bool)
        frame = tuple(self.frames[index])
        if np.isnan(frame).any():
            if drawn is None:
                image_id = self._image_ids[index].decode()
                raise DataError(f"{self.name}, image {image_id!r}: has boxes, but no size to place them")
            frame = drawn
        edges = self.preprocessing.boxes(self._box_edges[rows], frame, self.size)
        return union_masks(edges, self._box_label[rows], len(self.labels), self.size)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at ``indices``, stacked."""
        return collate([self[index] for index in indices])

    def select(self, rows: Sequence[int] | Sequence[bool] | np.ndarray | slice) -> Dataset:
        """The images at ``rows`` alone: positions in the order wanted, a mask of length N, or a slice."""
        if not isinstance(rows, slice) and not len(rows):
            rows = slice(0)
        try:
            rows = np.arange(len(self))[rows if isinstance(rows, slice) else np.array(rows, ndmin=1)]
        except IndexError as error:
            raise ParameterError(f"rows: give positions in 0 .. {len(self) - 1}, a mask or a slice ({error})") from None
        if rows.ndim != 1 or len(np.unique(rows)) != len(rows):
            raise ParameterError("rows: give a list of positions, each of them once")
        part = copy.copy(self)
        part.table = self.table.iloc[rows].reset_index(drop=True)
        part.boxes = self.boxes[self.boxes["image_id"].isin(part.table["image_id"])].reset_index(drop=True)
        part.frames = self.frames[rows]
        part.rows = self.rows[rows]
        part._index()
        return part

    def split(self, name: str) -> Dataset:
        """The part called ``name``: ``"train"``, ``"validation"`` or ``"test"``."""
        if name not in SPLITS:
            raise ParameterError(f"split {name!r} is unknown; use one of {list(SPLITS)}")
        if "split" not in self.table.columns:
            raise DataError(f"{self.name}: no split is known; cxrkit.data.load makes one for at least 5 patients")
        return self.select((self.table["split"] == name).to_numpy())

    def with_split(self, split: Sequence[str]) -> Dataset:
        """The same dataset with ``split`` (train, validation or test per row) as its split column."""
        part = copy.copy(self)
        part.table = self.table.assign(split=list(split))
        return part

    def cached(self) -> Dataset:
        """The same dataset, keeping each image that it has drawn: ``4 * size * size`` bytes, and its exact masks."""
        part = copy.copy(self)
        part.renderer = _CachedRenderer(self.renderer)
        return part


class _CachedRenderer:
    """Keeps what another renderer drew."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self._drawn: dict[tuple[int, int], Rendered] = {}

    def render(self, row: int, size: int) -> Rendered:
        if (row, size) not in self._drawn:
            self._drawn[row, size] = self.renderer.render(row, size)
        drawn = self._drawn[row, size]
        # A caller may write into its sample; the image in memory must not change with it.
        return replace(drawn, image=drawn.image.clone())


def _coded(column: pd.Series) -> np.ndarray:
    """A column of names as UTF-8 of fixed width: bytes ``[N]``."""
    # As objects first: to step through a column of text as pandas holds it takes several times as long.
    return np.array([str(value).encode() for value in column.to_numpy(dtype=object)], dtype=np.bytes_)
