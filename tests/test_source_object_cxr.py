"""Object-CXR: shapes drawn exactly, boxes from them, the published parts, and every annotation that is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cxrkit
from cxrkit.data.public.object_cxr import LABEL, load_object_cxr
from cxrkit.data.public.outlines import outline_mask
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError, ParameterError

# The true header; the empty annotation keeps its comma.
TRAIN = """image_name,annotation
00001.jpg,0 10 5 30 20;1 40 10 60 30
00002.jpg,
00003.jpg,2 5.5 5 20 5 20 30.5 5.5 30.5
"""
DEV = "image_name,annotation\n00001.jpg,0 0 0 80 40\n00002.jpg,\n"
EDGES = ["x_min", "y_min", "x_max", "y_max"]


@pytest.fixture
def folder(tmp_path):
    """Write train.csv and dev.csv with their images, 80 x 40; returns the folder."""

    def write(train=TRAIN, dev=DEV, below="", images=("train", "dev"), nested=False):
        root = tmp_path / below
        root.mkdir(exist_ok=True)
        for part, text in (("train", train), ("dev", dev)):
            if text is None:
                continue
            (root / f"{part}.csv").write_text(text)
            place = root / part / part if nested else root / part
            place.mkdir(parents=True)
            for line in text.splitlines()[1:] if part in images else ():
                name = line.split(",")[0].rsplit("/")[-1]
                Image.fromarray(np.full((40, 80), 100, np.uint8)).save(place / name)
        return tmp_path

    return write


def slow_mask(shapes, width, height):
    """Every pixel centre asked by itself, straight from the definitions."""
    mask = np.zeros((height, width), dtype=bool)
    for i in range(height):
        for j in range(width):
            x, y = j + 0.5, i + 0.5
            for kind, points in shapes:
                (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
                if kind == "0":
                    mask[i, j] |= x0 <= x < x1 and y0 <= y < y1
                elif kind == "1":
                    distance = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2
                    mask[i, j] |= distance <= 1
                else:
                    crossings = 0
                    for k in range(len(points)):
                        (ax, ay), (bx, by) = points[k - 1], points[k]
                        if (ay <= y) != (by <= y):
                            crossings += x < ax + (y - ay) * (bx - ax) / (by - ay)
                    mask[i, j] |= crossings % 2 == 1
    return mask


def shape(kind, *numbers):
    return kind, np.array(numbers, dtype=float).reshape(-1, 2)


def test_shapes_become_labels_boxes_and_exact_masks(folder):
    data = load_object_cxr(folder(), size=80)
    assert data.labels == (LABEL,)
    assert data.table["image_id"].tolist() == ["train/00001", "train/00002", "train/00003", "dev/00001", "dev/00002"]
    assert data.table[LABEL].tolist() == [1, 0, 1, 1, 0]
    assert data.table["split"].tolist() == ["train"] * 3 + ["validation"] * 2
    assert data.boxes[EDGES].to_numpy().tolist() == [
        [10, 5, 30, 20], [40, 10, 60, 30], [5.5, 5, 20, 30.5], [0, 0, 80, 40],
    ]  # fmt: skip
    assert data.boxes["image_id"].tolist() == ["train/00001", "train/00001", "train/00003", "dev/00001"]
    expected = torch.zeros(40, 80, dtype=torch.bool)
    expected[5:20, 10:30] = True
    expected |= torch.from_numpy(slow_mask([shape("1", 40, 10, 60, 30)], 80, 40))
    # 80 x 40 becomes 80 x 80: each row twice.
    truth = data[0].truth[0]
    assert (truth == expected.repeat_interleave(2, dim=0)).float().mean() > 0.99
    assert data[0].mask[0][10:40, 10:30].all()
    assert data[0].mask[0].sum() == 30 * 20 + 40 * 20  # the ellipse's box is larger than the ellipse
    assert truth.sum() < data[0].mask[0].sum()
    assert not data[1].truth.any()
    assert not data[1].mask.any()
    assert data[3].truth.all()


def test_the_drawn_area_is_that_of_the_formula():
    (points,) = (shape("1", 10, 20, 110, 80),)
    assert outline_mask(*points, 128, 100).sum() == pytest.approx(np.pi * 50 * 30, rel=2e-3)
    assert outline_mask(*shape("0", 3, 4, 13, 9), 20, 20).sum() == 50
    triangle = shape("2", 0, 0, 60, 0, 0, 40)
    assert outline_mask(*triangle, 64, 64).sum() == pytest.approx(1200, rel=0.02)
    # A figure of eight: even-odd leaves nothing out of its two halves, and the union counts no pixel twice.
    eight = shape("2", 0, 0, 20, 20, 20, 0, 0, 20)
    assert outline_mask(*eight, 20, 20).sum() == pytest.approx(200, rel=0.06)


coordinate = st.floats(-4, 30, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from("012"),
    st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=6),
)
def test_masks_agree_with_the_slow_definition(kind, points):
    points = np.array(points if kind == "2" else points[:2], dtype=float)
    if not (points.max(axis=0) > points.min(axis=0)).all():
        return
    seen, expected = outline_mask(kind, points, 24, 16), slow_mask([(kind, points)], 24, 16)
    if expected.any():
        np.testing.assert_array_equal(seen, expected)
    else:
        assert seen.sum() <= 1  # the pixel under the middle, so that nothing vanishes


def test_a_speck_keeps_one_pixel():
    assert outline_mask(*shape("1", 5.1, 5.1, 5.3, 5.3), 10, 10).nonzero() == ([5], [5])
    assert not outline_mask(*shape("1", 20, 20, 30, 30), 10, 10).any()


def test_layouts_as_people_unpack_them(folder, tmp_path):
    assert len(load_object_cxr(folder(below="object-CXR", nested=True))) == 5
    with_paths = tmp_path / "paths"
    with_paths.mkdir()
    (with_paths / "train.csv").write_text("image_path,annotation\n/data/train/00001.jpg,1 1 1 9 9\n")
    (with_paths / "train").mkdir()
    Image.new("L", (20, 20)).save(with_paths / "train" / "00001.jpg")
    assert load_object_cxr(with_paths).table["image_id"].tolist() == ["train/00001"]


def test_a_test_table_is_the_test_part(folder):
    root = folder()
    (root / "test.csv").write_text("image_name,annotation\n09001.jpg,\n")
    (root / "test").mkdir()
    Image.new("L", (20, 20)).save(root / "test" / "09001.jpg")
    part = cxrkit.data.load("object_cxr", root, split="test", size=32)
    assert part.table["image_id"].tolist() == ["test/09001"]


def test_split_by_patients_makes_folds_of_ours(folder):
    train = "image_name,annotation\n" + "".join(f"{k:05d}.jpg,{'0 1 1 9 9' if k % 2 else ''}\n" for k in range(20))
    root = folder(train, None)
    assert "split" not in load_object_cxr(root, split_by="patients").table
    part = cxrkit.data.load("object_cxr", root, split="test", fold=3, size=32, split_by="patients")
    assert len(part) == 4
    with pytest.raises(ParameterError, match="fold=1"):
        cxrkit.data.load("object_cxr", root, fold=1, size=32)


def test_a_partial_download(folder):
    root = folder()
    (root / "train" / "00002.jpg").unlink()
    with pytest.raises(DataError, match=r"train.csv: file does not exist.*line 3 \('00002.jpg'\)"):
        load_object_cxr(root)
    with pytest.warns(UserWarning, match="1 of 3 images"):
        data = load_object_cxr(root, missing="leave_out")
    assert data.table["image_id"].tolist() == ["train/00001", "train/00003", "dev/00001", "dev/00002"]
    assert data[1].truth[0].any()  # shapes stay with their images
    (root / "dev" / "00001.jpg").unlink()
    (root / "dev" / "00002.jpg").unlink()
    with pytest.raises(DataError, match="none of its 2 images"), pytest.warns(UserWarning, match="1 of 3"):
        load_object_cxr(root, missing="leave_out")


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("3 1 1 9 9", "none of 0 .rectangle., 1 .ellipse., 2 .polygon."),
        ("0 1 1 9", "four coordinates"),
        ("1 1 1 9 9 9", "four coordinates"),
        ("2 1 1 9 9", "three pairs"),
        ("2 1 1 9 9 5 5 5", "three pairs"),
        ("0 1 one 9 9", "no number"),
        ("0 1 nan 9 9", "no number"),
        ("0 1 inf 9 9", "no number"),
        ("0 5 5 5 9", "no area"),
        ("0 -9 -9 -1 9", "outside its image"),
        ("0", "four coordinates"),
    ],
)
def test_annotations_that_are_refused(folder, cell, problem):
    root = folder(TRAIN.replace("00002.jpg,", f"00002.jpg,0 1 1 5 5;{cell}"))
    with pytest.raises(DataError, match=rf"train.csv: .*{problem}.*line 3"):
        load_object_cxr(root)
    with collecting() as found:
        data = load_object_cxr(root)
    assert [problem.line for problem in found] == [3]
    assert "train/00002" not in set(data.table["image_id"])


def test_all_problems_at_once(folder):
    text = "image_name,annotation\n00001.jpg,9 1 1 2 2\n00001.jpg,\n,0 1 1 2 2\n00004.jpg,0 1 1 x 2\n"
    root = folder("image_name,annotation\n00001.jpg,\n00004.jpg,\n")
    (root / "train.csv").write_text(text)
    with collecting() as found:
        load_object_cxr(root)
    assert {problem.line for problem in found} == {2, 3, 4, 5}


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        load_object_cxr(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no train\.csv or dev\.csv"):
        load_object_cxr(tmp_path)
    root = folder("image,annotation\n1.jpg,\n", None)
    with pytest.raises(DataError, match="lacks a column image_name or image_path"):
        load_object_cxr(root)


def test_it_goes_to_other_processes(folder):
    data = pickle.loads(pickle.dumps(load_object_cxr(folder(), size=32)))
    assert data[0].truth.any()


def test_ten_thousand_images_index_quickly(tmp_path, monkeypatch):
    """No file is opened while the tables are read: the images here do not even hold one."""
    lines = [f"{k:05d}.jpg,{'1 10 10 60 90;2 5 5 9 9 5 9' if k % 2 else ''}" for k in range(10000)]
    (tmp_path / "train.csv").write_text("image_name,annotation\n" + "\n".join(lines) + "\n")
    (tmp_path / "train").mkdir()
    for k in range(10000):
        (tmp_path / "train" / f"{k:05d}.jpg").touch()
    data = load_object_cxr(tmp_path)
    assert len(data) == 10000
    assert len(data.boxes) == 10000
