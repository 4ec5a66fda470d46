"""Geometry, the dataset class, folds and the door to the sources."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cxrkit
from cxrkit.data import geometry, splits
from cxrkit.data.dataset import Batch, Dataset, Rendered, collate
from cxrkit.data.preprocessing import preprocessing
from cxrkit.data.sources import SOURCES
from cxrkit.errors import DataError, ParameterError

# Geometry


def test_resize_matches_pillow():
    image = np.random.default_rng(0).random((90, 70), dtype=np.float32)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    got = geometry.resize(torch.from_numpy(image), 32)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_resize_keeps_shape_range_and_constants():
    images = torch.rand(2, 3, 50, 41)
    assert geometry.resize(images, 32).shape == (2, 3, 32, 32)
    assert geometry.resize(images, 64).max() <= images.max()
    assert (geometry.resize(torch.ones(33, 47), 40) == 1).all()


def cropped(boxes, protocol="corrected"):
    return preprocessing("bcos/rsna", protocol).boxes(boxes, (1024, 1024), 224)


def test_misplaced_boxes_of_the_authors():
    """METHODS 1.8, test 10: a box at (256, 256) of 256 x 256 in an image of 1024."""
    box = [[256, 256, 512, 512]]
    np.testing.assert_array_equal(cropped(box), [[48, 48, 112, 112]])
    np.testing.assert_array_equal(cropped(box, "authors"), [[56, 56, 112, 112]])
    # No error at the centre, 16 pixels (clipped here) at the border.
    np.testing.assert_array_equal(cropped([[512, 512, 1024, 1024]]), [[112, 112, 224, 224]])
    np.testing.assert_array_equal(cropped([[0, 0, 512, 64]]), [[0, 0, 112, 0]])


def test_cropped_image_and_corrected_box_agree():
    image = torch.zeros(1024, 1024)
    image[256:512, 300:600] = 1
    crop = preprocessing("bcos/rsna").image(image, 224)
    assert crop.shape == (224, 224)
    mask = geometry.box_masks(cropped([[300, 256, 600, 512]]), 224)[0]
    assert torch.equal(crop > 0.5, mask)
    astray = geometry.box_masks(cropped([[300, 256, 600, 512]], "authors"), 224)[0]
    assert not torch.equal(crop > 0.5, astray)


@st.composite
def placed_boxes(draw):
    width, height = draw(st.integers(40, 200)), draw(st.integers(40, 200))
    x = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y = sorted(draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    return width, height, (x[0], y[0], x[1], y[1])


@settings(max_examples=80, deadline=None)
@given(placed=placed_boxes(), size=st.integers(32, 64))
def test_bright_box_stays_inside_the_transformed_box(placed, size):
    """METHODS 0.2: image and box go through the same transform, whatever the aspect ratio."""
    width, height, (x0, y0, x1, y1) = placed
    image = torch.zeros(height, width)
    image[y0:y1, x0:x1] = 1
    small = geometry.resize(image, size)
    mask = geometry.union_masks(geometry.scale_boxes([[x0, y0, x1, y1]], (width, height), size), [0], 1, size)[0]
    rows, columns = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
    # Centre of brightness against centre of the box, unless the border of the image cuts the kernel off.
    if min(x0, y0, width - x1, height - y1) > 0 and size <= min(width, height):
        total = float(small.sum())
        assert abs(float((small * columns).sum()) / total - (x0 + x1) / 2 * size / width) < 0.5
        assert abs(float((small * rows).sum()) / total - (y0 + y1) / 2 * size / height) < 0.5
    # Light reaches no further than the kernel: one target pixel, or one source pixel when enlarging.
    i, j = (small > 1e-6).nonzero(as_tuple=True)
    reach_x, reach_y = max(1, size / width), max(1, size / height)
    assert (j.numpy() + 0.5 > x0 * size / width - reach_x).all()
    assert (j.numpy() + 0.5 < x1 * size / width + reach_x).all()
    assert (i.numpy() + 0.5 > y0 * size / height - reach_y).all()
    assert (i.numpy() + 0.5 < y1 * size / height + reach_y).all()
    assert mask.any()


@pytest.mark.parametrize("outline", [(100, 300, 101, 700), (640, 20, 900, 21), (0, 0, 1, 1), (1023, 1023, 1024, 1024)])
def test_one_pixel_wide_bright_box(outline):
    x0, y0, x1, y1 = outline
    image = torch.zeros(1024, 1024)
    image[y0:y1, x0:x1] = 1
    small = geometry.resize(image, 224)
    mask = geometry.union_masks(geometry.scale_boxes([outline], (1024, 1024), 224), [0], 1, 224)[0]
    assert mask.flatten()[small.argmax()]
    # The mask is one pixel wide and holds the brightest row or column.
    assert min(mask.any(0).sum(), mask.any(1).sum()) == 1


def test_box_masks_follow_pixel_centres():
    masks = geometry.box_masks(
        [[0.5, 0, 2.5, 1], [0.51, 0, 2.51, 1], [1.6, 1.6, 1.9, 1.9], [3, 3, 3, 3], [9, 9, 12, 12]], 4
    )
    assert masks[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert masks[1].nonzero().tolist() == [[0, 1], [0, 2]]
    assert masks[2].nonzero().tolist() == [[1, 1]]
    assert not masks[3].any()
    assert not masks[4].any()
    assert geometry.box_masks(np.empty((0, 4)), 4).shape == (0, 4, 4)


def test_masks_are_unions_per_label():
    boxes = [[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 4, 4]]
    masks = geometry.union_masks(boxes, [0, 0, -1], 2, 4)
    assert masks[0].sum() == 4 + 4 - 1
    assert not masks[1].any()


# Dataset


class Drawn:
    """Row i is an image of value i / 10; counts how often it draws."""

    def __init__(self, truth=True):
        self.truth = truth
        self.count = 0

    def render(self, row, size):
        self.count += 1
        image = torch.full((size, size), row / 10)
        if row == 7:
            image[3, 4] = torch.nan
        truth = torch.ones(2, size, size, dtype=torch.bool) if self.truth else None
        return Rendered(image, truth, truth[0] if self.truth else None)


def dataset(n=7, truth=True, **changes):
    table = pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(n)],
            "patient_id": [f"p{k // 2}" for k in range(n)],
            "path": "",
            "A": np.arange(n) % 2,
            "B": np.nan,
            "orig_width": 64,
            "orig_height": 128,
        }
    )
    boxes = pd.DataFrame(
        [("i1", "A", 0, 0, 32, 64, "r"), ("i1", "A", 32, 64, 64, 128, "s"), ("i3", "C", 0, 0, 9, 9, "r")],
        columns=["image_id", "label", "x_min", "y_min", "x_max", "y_max", "reader"],
    )
    given = {"labels": ["A", "B"], "table": table, "boxes": boxes, "renderer": Drawn(truth), "size": 32}
    return Dataset("drawn", **{**given, **changes})


def test_sample():
    sample = dataset()[1]
    assert sample.image.shape == (1, 32, 32)
    assert sample.image.dtype == torch.float32
    assert sample.target[0] == 1
    assert sample.target[1].isnan()
    assert (sample.image_id, sample.patient_id) == ("i1", "p0")
    expected = torch.zeros(2, 32, 32, dtype=torch.bool)
    expected[0, :16, :16] = expected[0, 16:, 16:] = True
    assert torch.equal(sample.mask, expected)
    assert sample.truth.all()
    assert sample.shortcut.shape == (32, 32)


def test_negative_and_impossible_indices():
    assert dataset()[-1].image_id == "i6"
    with pytest.raises(IndexError, match="holds 7 images"):
        dataset()[7]
    assert len(list(dataset(3))) == 3


def test_batch():
    batch = dataset().batch([2, 1])
    assert isinstance(batch, Batch)
    assert batch.images.shape == (2, 1, 32, 32)
    assert batch.masks.shape == (2, 2, 32, 32)
    assert batch.targets.shape == (2, 2)
    assert batch.image_ids == ("i2", "i1")
    assert batch.truth.shape == (2, 2, 32, 32)
    assert batch.shortcut.shape == (2, 32, 32)
    assert len(batch.to("cpu")) == 2
    assert dataset(truth=False).batch([0]).truth is None
    with pytest.raises(ParameterError, match="at least one sample"):
        dataset().batch([])


def test_select_keeps_rows_boxes_and_pixels_together():
    part = dataset().select([3, 1]).select([1])
    assert part.table["image_id"].tolist() == ["i1"]
    assert len(part.boxes) == 2
    assert torch.equal(part[0].image, dataset()[1].image)
    assert torch.equal(part[0].mask, dataset()[1].mask)
    assert len(dataset().select(np.arange(7) > 4)) == 2
    assert len(dataset().select(slice(2))) == 2
    assert len(dataset().select([])) == 0
    for wrong, words in (
        ([7], "0 .. 6"),
        ([1, 1], "each of them once"),
        ([True], "a mask"),
        ([0.5], "a mask or a slice"),
    ):
        with pytest.raises(ParameterError, match=words):
            dataset().select(wrong)


def test_split_needs_one():
    with pytest.raises(DataError, match="no split is known"):
        dataset().split("train")
    with pytest.raises(ParameterError, match="'valid' is unknown"):
        dataset().split("valid")
    split = dataset().with_split(["train"] * 5 + ["test"] * 2)
    assert len(split.split("test")) == 2
    assert "split" not in dataset().table


def test_cache_draws_once():
    plain = dataset()
    kept = plain.cached()
    assert plain.renderer.count == 0
    for _ in range(2):
        assert torch.equal(kept[3].image, plain[3].image)
    assert plain.renderer.count == 3
    kept[3].image.zero_()
    assert kept[3].image.max() > 0.29


def test_dataset_travels_to_workers():
    copy = pickle.loads(pickle.dumps(dataset().cached()))
    assert torch.equal(copy[3].image, dataset()[3].image)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4, num_workers=1, collate_fn=collate)
    assert [len(batch) for batch in loader] == [4, 3]


@pytest.mark.parametrize("data", [lambda: dataset(8), lambda: dataset(8).cached()])
def test_nan_pixel_is_refused_by_name(data):
    with pytest.raises(DataError, match="drawn, image 'i7': holds NaN"):
        data()[7]


def test_tables_that_do_not_fit():
    table = dataset().table
    with pytest.raises(DataError, match=r"lacks \['path', 'B'\]"):
        dataset(table=table.drop(columns=["path", "B"]))
    with pytest.raises(DataError, match="'i0' occurs twice"):
        dataset(table=table.assign(image_id="i0"))
    with pytest.raises(DataError, match=r"boxes lack the columns \['reader'\]"):
        dataset(boxes=dataset().boxes.drop(columns="reader"))
    with pytest.raises(DataError, match="orig_width"):
        dataset(table=table.drop(columns="orig_width"))
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        dataset(frames=np.ones((2, 2)))
    with pytest.raises(DataError, match="hold a name twice"):
        dataset(labels=["A", "A"])


# Folds


@st.composite
def cohorts(draw):
    n = draw(st.integers(5, 120))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    patients = np.concatenate([np.arange(5), rng.integers(0, max(5, n // 2), n - 5)]).astype(str)
    targets = (rng.random((n, draw(st.integers(1, 4)))) < draw(st.floats(0.02, 0.9))).astype(float)
    targets[rng.random(targets.shape) < 0.05] = np.nan
    return patients, targets, seed


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts())
def test_every_image_is_tested_once_and_patients_stay_together(cohort):
    patients, targets, seed = cohort
    tested = np.zeros(len(patients), dtype=int)
    for fold in range(5):
        split = splits.fold_split(patients, targets, fold, seed=seed)
        assert set(split) == {"train", "validation", "test"}
        tested += split == "test"
        assert pd.Series(split).groupby(patients).nunique().max() == 1
        again = splits.fold_split(patients[::-1], targets[::-1], fold, seed=seed)[::-1]
        np.testing.assert_array_equal(split, again)
    assert (tested == 1).all()


def test_folds_are_balanced():
    rng = np.random.default_rng(0)
    patients = np.arange(500)
    targets = (rng.random((500, 4)) < [0.04, 0.1, 0.3, 0.5]).astype(float)

    def dealt(seed):
        tested = [splits.fold_split(patients, targets, fold, seed=seed) == "test" for fold in range(5)]
        return np.argmax(tested, axis=0)

    folds = dealt(0)
    assert abs(np.bincount(folds) - 100).max() <= 10
    per_fold = np.array([targets[folds == fold].sum(0) for fold in range(5)])
    assert (abs(per_fold - targets.sum(0) / 5) <= 2).all()
    split = splits.fold_split(patients, targets, 2)
    assert 40 <= (split == "validation").sum() <= 60
    assert not np.array_equal(folds, dealt(1))


def test_too_few_patients():
    with pytest.raises(DataError, match="4 patients can't be spread over 5 folds"):
        splits.fold_split(["a", "b", "c", "d", "d"], np.zeros((5, 1)))
    with pytest.raises(ParameterError, match="fold=5"):
        splits.fold_split(range(9), np.zeros((9, 1)), fold=5)


# The door


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "chexbert"}, ["'chexbert' is unknown", "'folder'", "'phantom'"]),
        ({"name": "folder"}, ["'folder' needs root="]),
        ({"name": "phantom", "root": "x"}, ["'phantom' takes no root"]),
        ({"name": "folder", "root": "x", "fold": 5}, ["fold=5", "from 0 to 4"]),
        ({"name": "folder", "root": "x", "fold": -1}, ["fold=-1"]),
        ({"name": "folder", "root": "x", "fold": True}, ["fold=True"]),
        ({"name": "folder", "root": "x", "size": 31}, ["size=31", "at least 32"]),
        ({"name": "folder", "root": "x", "size": 64.5}, ["size=64.5"]),
        ({"name": "folder", "root": "x", "seed": -1}, ["seed=-1"]),
        ({"name": "folder", "root": "x", "split": "val"}, ["split='val'", "'validation'"]),
        ({"name": "folder", "root": "x", "label": ["A"]}, ["'label' is unknown", "did you mean 'labels'?"]),
    ],
)
def test_load_refuses(arguments, words):
    with pytest.raises(ParameterError) as caught:
        cxrkit.data.load(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_sources_have_manifests():
    known = cxrkit.data.sources()
    assert set(known) == set(SOURCES)
    assert {"folder", "phantom"} < set(known)


@pytest.mark.parametrize("name", list(SOURCES))
def test_manifests_say_what_a_user_needs(name):
    manifest = cxrkit.data.sources()[name]
    assert {"title", "description", "licence", "get", "labels", "splits", "checksums", "options"} <= set(manifest)
    if SOURCES[name].module.startswith("cxrkit.data.public."):
        assert {"cite", "files", "counts", "traps"} <= set(manifest)


@pytest.mark.parametrize("name", list(SOURCES))
def test_manifests_name_every_option(name):
    assert set(cxrkit.data.sources()[name]["options"]) == set(SOURCES[name].options())
