"""What boxes look like, as tables: sizes and places, the share of the image they cover, how far readers agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.tables import EDGES
from cxrkit.errors import ParameterError

__all__ = [
    "box_agreement",
    "box_geometry",
    "chance_level",
    "cohen_kappa",
    "fleiss_kappa",
    "frames_of",
    "label_agreement",
    "union_areas",
    "union_shares",
]

# Cells of the grids that are looked at together, in union_areas.
_CELLS = 2**20


def frames_of(dataset: Dataset) -> pd.DataFrame:
    """Original width and height of each image, indexed by image_id; NaN where only the file knows."""
    ids = dataset.table["image_id"].astype(str)
    return pd.DataFrame(dataset.frames, index=pd.Index(ids, name="image_id"), columns=["width", "height"])


def box_geometry(boxes: pd.DataFrame, frames: pd.DataFrame) -> pd.DataFrame:
    """A row per box, in fractions of its image: ``width``, ``height``, ``area``, ``centre_x``, ``centre_y``.

    ``boxes``: as ``Dataset.boxes``; ``frames``: as :func:`frames_of`. Also ``aspect``, width / height in pixels; and
    image_id, label and reader, for grouping. Raises ParameterError where an image has no frame.
    """
    side = _sides(boxes, frames)
    low, high = (boxes[list(ends)].to_numpy(dtype=np.float64) for ends in (EDGES[:2], EDGES[2:]))
    extent, centre = (high - low) / side, (low + high) / 2 / side
    return pd.DataFrame(
        {
            **{name: boxes[name].to_numpy() for name in ("image_id", "label", "reader")},
            "width": extent[:, 0],
            "height": extent[:, 1],
            "area": extent.prod(axis=1),
            "centre_x": centre[:, 0],
            "centre_y": centre[:, 1],
            "aspect": (high - low)[:, 0] / (high - low)[:, 1],
        }
    )


def union_shares(boxes: pd.DataFrame, frames: pd.DataFrame, by: Sequence[str] = ("image_id",)) -> pd.DataFrame:
    """What part of each image its boxes cover together: a row per group of ``by``, which holds "image_id".

    Columns: those of ``by``, ``boxes`` (how many), ``share`` (of the union), ``sum`` (of the boxes one by one; more
    than the union where they overlap), ``image_area`` (square pixels). Images without box are not listed.
    """
    if "image_id" not in by:
        raise ParameterError(f"by={list(by)} must hold 'image_id': a union lies in one image")
    side = _sides(boxes, frames)
    edges = boxes[list(EDGES)].to_numpy(dtype=np.float64)
    group = boxes.groupby(list(by), sort=False).ngroup().to_numpy()
    count = int(group.max()) + 1 if len(group) else 0
    first = np.zeros(count, dtype=int)
    first[group[::-1]] = np.arange(len(group))[::-1]
    image_area = side[first].prod(axis=1)
    single = (edges[:, 2:] - edges[:, :2]).prod(axis=1)
    return pd.DataFrame(
        {
            **{name: boxes[name].to_numpy()[first] for name in by},
            "boxes": np.bincount(group, minlength=count),
            "share": union_areas(edges, group, count) / image_area,
            "sum": np.bincount(group, single, minlength=count) / image_area,
            "image_area": image_area,
        }
    )


def chance_level(shares: pd.DataFrame) -> pd.Series:
    """What a map that knows nothing scores in the energy-based pointing game, from :func:`union_shares`.

    ``mean``: mean of the shares over their rows, which is what a uniform map scores; ``area_weighted``: covered area
    over all area, where large images count more; ``images``: how many rows. Source: paper `bcos`, 1.6 (RSNA: 11.75 %).
    """
    covered = (shares["share"] * shares["image_area"]).sum()
    return pd.Series(
        {
            "mean": shares["share"].mean(),
            "area_weighted": covered / shares["image_area"].sum(),
            "images": len(shares),
        }
    )


def _sides(boxes: pd.DataFrame, frames: pd.DataFrame) -> np.ndarray:
    """Width and height of each box's image, [M, 2]."""
    row = frames.index.get_indexer(boxes["image_id"].astype(str))
    if (row < 0).any():
        raise ParameterError(f"frames: image {boxes['image_id'].to_numpy()[row < 0][0]!r} has boxes, but no frame")
    return frames[["width", "height"]].to_numpy(dtype=np.float64)[row]


def union_areas(edges: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """Area of the union of each group's boxes, exactly: ``[M, 4]``, int ``[M]`` below ``count`` -> ``[count]``.

    The edges of a group's boxes cut the plane into cells, each wholly in or out; groups of like size go together.
    """
    edges, group = np.asarray(edges, dtype=np.float64).reshape(-1, 4), np.asarray(group, dtype=int)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=count)
    place = np.empty(len(group), dtype=int)
    place[order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    areas = np.zeros(count)
    # Groups are padded with empty boxes to the next power of two.
    padded = 2 ** np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    for size in np.unique(padded[sizes > 0]):
        members = np.flatnonzero((padded == size) & (sizes > 0))
        rank = np.full(count, -1)
        rank[members] = np.arange(len(members))
        held = rank[group] >= 0
        boxes = np.zeros((len(members), size, 4))
        boxes[rank[group[held]], place[held]] = edges[held]
        step = max(1, _CELLS // (2 * size) ** 2)
        areas[members] = np.concatenate([_unions(boxes[i : i + step]) for i in range(0, len(members), step)])
    return areas


def _unions(boxes: np.ndarray) -> np.ndarray:
    """Union area of each row of boxes, [G, S, 4] -> [G]."""
    inside, steps = [], []
    for low, high in ((0, 2), (1, 3)):
        lines = np.sort(boxes[:, :, [low, high]].reshape(len(boxes), -1), axis=1)
        middle = (lines[:, :-1] + lines[:, 1:])[:, None] / 2
        inside.append(((boxes[:, :, low, None] <= middle) & (middle < boxes[:, :, high, None])).astype(np.float32))
        steps.append(np.diff(lines, axis=1))
    covered = np.swapaxes(inside[1], 1, 2) @ inside[0] > 0
    return np.einsum("gij,gi,gj->g", covered, steps[1], steps[0])


# Readers


def box_agreement(boxes: pd.DataFrame) -> pd.DataFrame:
    """How far readers who boxed the same label on the same image agree where it is: a row per image, label and pair.

    Columns: image_id, label, ``reader_a``, ``reader_b``, ``iou`` (of the unions of each reader's boxes). Take the mean
    over all rows, or by label. Readers who did not box the label do not count here; see :func:`label_agreement`.
    """
    of_reader = ["image_id", "label", "reader"]
    edges = boxes[list(EDGES)].to_numpy(dtype=np.float64)
    group = boxes.groupby(of_reader, sort=True).ngroup().to_numpy()
    sets = boxes[of_reader].assign(group=group).drop_duplicates("group").sort_values("group")
    area = union_areas(edges, group, len(sets))
    pairs = sets.merge(sets, on=["image_id", "label"], suffixes=("_a", "_b"))
    pairs = pairs[pairs["group_a"] < pairs["group_b"]].reset_index(drop=True)
    # All boxes of a pair: those of its one reader, then those of the other.
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(sets))
    starts = np.cumsum(sizes) - sizes
    drawn, owner = [], []
    for side in ("group_a", "group_b"):
        of_pair = pairs[side].to_numpy(dtype=int)
        owner.append(np.repeat(np.arange(len(pairs)), sizes[of_pair]))
        within = np.arange(len(owner[-1])) - np.repeat(np.cumsum(sizes[of_pair]) - sizes[of_pair], sizes[of_pair])
        drawn.append(order[np.repeat(starts[of_pair], sizes[of_pair]) + within])
    both = union_areas(edges[np.concatenate(drawn)], np.concatenate(owner), len(pairs))
    shared = area[pairs["group_a"].to_numpy(dtype=int)] + area[pairs["group_b"].to_numpy(dtype=int)] - both
    iou = np.divide(shared, both, out=np.full(len(pairs), np.nan), where=both > 0)
    return pairs[["image_id", "label", "reader_a", "reader_b"]].assign(iou=iou.clip(0, 1))


def label_agreement(
    boxes: pd.DataFrame, readings: pd.DataFrame, labels: Sequence[str], fewest: int = 20
) -> pd.DataFrame:
    """How far readers agree on which labels an image has: a row per label.

    ``readings``: image_id and reader of every reading, also those that found nothing. Columns: ``images`` (read by two
    or more), ``positive`` (share of the readings with the label), ``fleiss`` and ``cohen`` (mean of Cohen's kappa over
    the pairs of readers with ``fewest`` or more images in common, each weighed by these). Raises ParameterError for a
    box without reading.
    """
    readings = pd.MultiIndex.from_frame(readings[["image_id", "reader"]]).unique()
    boxes = boxes[boxes["label"].isin(labels)]
    row = readings.get_indexer(pd.MultiIndex.from_frame(boxes[["image_id", "reader"]]))
    if (row < 0).any():
        raise ParameterError(
            f"readings: lacks {tuple(boxes[['image_id', 'reader']].to_numpy()[row < 0][0])}, who drew a box"
        )
    votes = np.zeros((len(readings), len(labels)), dtype=bool)
    votes[row, pd.Index(labels).get_indexer(boxes["label"])] = True
    image, reader = (pd.factorize(readings.get_level_values(level))[0] for level in (0, 1))
    of_image = np.bincount(image)
    yes = np.stack([np.bincount(image, vote) for vote in votes.T], axis=1)
    several = of_image > 1
    return pd.DataFrame(
        {
            "images": several.sum(),
            "positive": votes.mean(axis=0),
            "fleiss": [fleiss_kappa(column, of_image[several]) for column in yes[several].T],
            "cohen": _mean_cohen(votes, image, reader, fewest),
        },
        index=pd.Index(labels, name="label"),
    )


def _mean_cohen(votes: np.ndarray, image: np.ndarray, reader: np.ndarray, fewest: int) -> np.ndarray:
    """Per label, over pairs of readers; nan where no pair has enough in common and varies."""
    row = np.full((image.max() + 1, reader.max() + 1), -1)
    row[image, reader] = np.arange(len(votes))
    total, weight = np.zeros(votes.shape[1]), np.zeros(votes.shape[1])
    for one, other in combinations(range(row.shape[1]), 2):
        common = (row[:, one] >= 0) & (row[:, other] >= 0)
        if common.sum() >= max(fewest, 1):
            kappa = cohen_kappa(votes[row[common, one]], votes[row[common, other]])
            total += np.nan_to_num(kappa) * common.sum()
            weight += np.isfinite(kappa) * common.sum()
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def cohen_kappa(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Agreement of two readers on N yes-no questions, beyond chance: ``[N, ...]`` -> ``[...]``.

    1 is full agreement, 0 chance; nan where both always say the same.
    """
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    observed, p, q = (one == other).mean(axis=0), one.mean(axis=0), other.mean(axis=0)
    return _beyond_chance(observed, p * q + (1 - p) * (1 - q))


def fleiss_kappa(positive: np.ndarray, readers: np.ndarray) -> float:
    """Agreement of two or more readers per image, not always the same ones, on a yes-no question, beyond chance.

    ``positive``: int ``[N]``, how many said yes; ``readers``: int ``[N]``, how many there were. 1 is full agreement, 0
    chance; nan where all say the same everywhere, or there is no image. Images count alike. Raises ParameterError for
    an image with fewer than two readers.
    """
    positive, readers = np.asarray(positive, dtype=np.float64), np.asarray(readers, dtype=np.float64)
    if (readers < 2).any() or (positive > readers).any() or (positive < 0).any():
        raise ParameterError("each image needs two readers or more, and no more yes than readers")
    if not len(readers):
        return float("nan")
    negative = readers - positive
    observed = ((positive * (positive - 1) + negative * (negative - 1)) / (readers * (readers - 1))).mean()
    share = positive.sum() / readers.sum()
    expected = share**2 + (1 - share) ** 2
    return float(_beyond_chance(observed, expected))


def _beyond_chance(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    varies = np.asarray(expected) < 1
    return np.divide(observed - expected, 1 - expected, out=np.full(varies.shape, np.nan), where=varies)
