"""ChestX-Det and ChestX-Det10: miniatures of each release, refusals, and the whole real table."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data.public.chestx_det import LABELS, LABELS_10, load_chestx_det
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

SQUARE = [[100, 100], [300, 100], [300, 300], [100, 300]]
TRIANGLE = [[500, 500], [700, 500], [500, 700]]


def entry(file, syms=(), boxes=(), polygons=(), **more):
    return {"file_name": file, "syms": list(syms), "boxes": list(boxes), "polygons": list(polygons), **more}


TRAIN = [
    entry("36200.png"),
    entry("36204.png", ["Cardiomegaly", "Nodule"], [[100, 100, 300, 300], [500, 500, 700, 700]], [SQUARE, TRIANGLE]),
    entry("36205.png", ["Nodule", "Nodule"], [[500, 500, 700, 700], [100, 100, 300, 300]], [TRIANGLE, SQUARE]),
]
TEST = [
    entry("36199.png"),
    entry("36302.png", ["Effusion"], [[799, 666, 937, 761]], [[[799, 666], [937, 666], [937, 761]]]),
]
FILES = [e["file_name"] for e in TRAIN + TEST]
NAMED = [
    {**e, "nih_file": name, "split": part}
    for e, name, part in zip(
        TRAIN + TEST,
        ["00000004_000.png", "00000010_000.png", "00000010_001.png", None, "00000010_002.png"],
        ["train"] * 3 + ["test"] * 2,
        strict=True,
    )
]


def ten(entries):
    """The first release: no outlines, names of the NIH."""
    return [{k: e[k] for k in ("file_name", "syms", "boxes")} for e in entries]


@pytest.fixture
def folder(tmp_path):
    def write(tables, files=FILES, below=("train_data", "train_data", "train_data", "test_data", "test_data")):
        for position, (file, part) in enumerate(zip(files, below, strict=False)):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.full((1024, 1024), 40 * position, np.uint8))
            picture.save(tmp_path / part / file, compress_level=1)
        for name, content in tables.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


PARTS = {"ChestX_Det_train.json": TRAIN, "ChestX_Det_test.json": TEST}
UNKNOWN = "ignore:chestx_det. .* do not tell their patient:UserWarning"


# What it reads


@pytest.mark.filterwarnings(UNKNOWN)
def test_the_release_with_outlines(folder):
    data = load_chestx_det(folder(PARTS), size=256)
    assert data.labels == LABELS
    assert len(LABELS) == 13
    assert data.table["image_id"].tolist() == [file[:-4] for file in FILES]
    assert data.table.loc[1, list(LABELS)].sum() == 2
    assert data.table["Nodule"].tolist() == [0, 1, 1, 0, 0]
    assert data.boxes.iloc[0].tolist() == ["36204", "Cardiomegaly", 100, 100, 300, 300, "ChestX-Det"]
    assert len(data.boxes) == 5
    sample = data[1]
    assert sample.image.unique().item() == pytest.approx(40 / 255)
    square = torch.zeros(256, 256, dtype=torch.bool)
    square[25:75, 25:75] = True
    assert torch.equal(sample.mask[LABELS.index("Cardiomegaly")], square)
    assert torch.equal(sample.truth[LABELS.index("Cardiomegaly")], square)
    # The triangle is the upper left half of its box.
    nodule, box = sample.truth[LABELS.index("Nodule")], sample.mask[LABELS.index("Nodule")]
    assert not (nodule & ~box).any()
    assert nodule.sum() / box.sum() == pytest.approx(0.5, abs=0.02)
    assert nodule[130, 130]
    assert not nodule[170, 170]
    assert torch.equal(data[2].truth[LABELS.index("Nodule")], square | nodule)
    assert data[0].truth.sum() == 0
    effusion = LABELS.index("Effusion")
    assert data[4].truth[effusion].sum() > 100
    assert not (data[4].truth[effusion] & ~data[4].mask[effusion]).any()


@pytest.mark.filterwarnings(UNKNOWN)
def test_the_first_release(folder):
    tables = {"train.json": ten([TRAIN[0], TRAIN[2]]), "test.json": ten(TEST)}
    data = load_chestx_det(folder(tables), size=64)
    assert data.labels == LABELS_10
    assert len(LABELS_10) == 10
    assert data[1].truth is None
    assert data[1].mask[LABELS_10.index("Nodule")].sum() > 0


def test_names_of_the_nih_tell_the_patient(folder):
    entries = ten([TRAIN[0], TRAIN[2]]), ten(TEST)
    names = ["00000004_000.png", "00000010_000.png", "00000010_001.png", "00000011_000.png"]
    for one, name in zip(entries[0] + entries[1], names, strict=True):
        one["file_name"] = name
    root = folder(dict(zip(("train.json", "test.json"), entries, strict=True)), names, ["images_001/images"] * 4)
    data = load_chestx_det(root)
    assert data.table["patient_id"].tolist() == ["4", "10", "10", "11"]
    assert data.table["image_id"].tolist() == [name[:-4] for name in names]


def test_images_elsewhere(folder, tmp_path):
    root = folder({}, ["00000004_000.png", "00000010_000.png", "00000010_001.png"], ["nih/images_001/images"] * 3)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "chestxdet.json").write_text(json.dumps(NAMED))
    with pytest.warns(UserWarning, match="do not tell their patient") as told:
        data = load_chestx_det(tmp_path / "labels", images=root / "nih", missing="leave_out")
    texts = [str(one.message) for one in told]
    assert any("1 of 5 images do not tell" in text for text in texts)
    assert any("2 of 5 images" in text and "left out" in text for text in texts)
    assert data.table["image_id"].tolist() == ["00000004_000", "00000010_000", "00000010_001"]
    assert data.table["patient_id"].tolist() == ["4", "10", "10"]
    # Outlines follow their images.
    assert data[2].truth[LABELS.index("Nodule")].any()
    assert not data[0].truth.any()
    with pytest.raises(DataError, match="is no folder"), pytest.warns(UserWarning, match="1 of 5"):
        load_chestx_det(tmp_path / "labels", images=root / "elsewhere")


@pytest.mark.filterwarnings(UNKNOWN)
def test_the_official_parts_must_be_asked_for(folder):
    root = folder({"chestxdet.json": NAMED})
    assert "split" not in load_chestx_det(root).table
    data = load_chestx_det(root, split_by="official")
    assert data.table["image_id"][data.table["split"] == "test"].tolist() == ["36199", "00000010_002"]
    assert set(data.table["split"]) == {"train", "validation", "test"}
    assert "share patients" in data.leak


@pytest.mark.filterwarnings(UNKNOWN)
def test_absent_images(folder):
    root = folder(PARTS)
    (root / "train_data" / "36204.png").unlink()
    with pytest.raises(DataError, match=r"file does not exist.*36204.png"):
        load_chestx_det(root)
    with pytest.warns(UserWarning, match="1 of 5 images"):
        data = load_chestx_det(root, missing="leave_out")
    assert data.table["image_id"].tolist() == ["36200", "36205", "36199", "36302"]
    assert data[1].truth[LABELS.index("Nodule")].any()
    assert set(data.boxes["image_id"]) == {"36205", "36302"}


# What it refuses


def changed(**fields):
    return [TRAIN[0], {**TRAIN[1], **fields}]


@pytest.mark.filterwarnings(UNKNOWN)
@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[{", ("is not a list of images, each with file_name, syms and boxes",)),
        ("{}", ("is not a list of images",)),
        ([], ("is not a list of images",)),
        ([3], ("entry 0",)),
        ([{"file_name": "a.png", "syms": []}], ("entry 0, file_name 'a.png': ['boxes']",)),
        (changed(file_name=7), ("entry 1", "['file_name']")),
        (changed(syms="Nodule"), ("entry 1, file_name '36204.png': ['syms']",)),
        (changed(syms=["Nodule", "Lump"]), ("entry 1, file_name '36204.png'", "syms ['Lump'] are none of Atel")),
        (changed(syms=["Nodule"]), ("not equally many",)),
        (changed(polygons=[SQUARE]), ("not equally many",)),
        (changed(boxes=[[1, 2, 3], [1, 2, 3, 4]]), ("['boxes'][0]",)),
        (changed(boxes=[[1, 2, 3, "x"], [1, 2, 3, 4]]), ("['boxes'][0][3]", "number")),
        (changed(boxes=[[1, 2, 3, 4], [1, 2, 3, float("nan")]]), ("['boxes'][1][3]", "number")),
        (changed(boxes=[[1, 2, 3, 4], [9, 9, 3, 20]]), ("no area", "9, 9, 3, 20")),
        (changed(boxes=[[1, 2, 3, 4], [9, 9, 3000, 20]]), ("outside its image",)),
        (changed(polygons=[SQUARE, [[1, 2], [3, 4]]]), ("['polygons'][1]", "at least 3")),
        (changed(polygons=[SQUARE, [[1, 2], [3, 4], [5, 6000]]]), ("['polygons'][1][2][1]", "1025")),
        (changed(split="validation"), ("['split']", "'train' or 'test'")),
        ([TRAIN[0], TRAIN[0]], ("an image occurs twice", "36200.png")),
    ],
)
def test_bad_tables(folder, train, words):
    with pytest.raises(DataError) as caught:
        load_chestx_det(folder({**PARTS, "ChestX_Det_train.json": train}))
    for word in ("ChestX_Det_train.json", *words):
        assert word in str(caught.value)


@pytest.mark.filterwarnings(UNKNOWN)
def test_all_problems_at_once(folder):
    train = [{**TRAIN[1], "syms": ["Lump", "Nodule"]}, {**TRAIN[2], "boxes": [[1, 2, 3, 4], [3, 2, 1, 4]]}, 5]
    with collecting() as found:
        load_chestx_det(folder({**PARTS, "ChestX_Det_train.json": train}))
    assert len(found) == 3


@pytest.mark.filterwarnings(UNKNOWN)
def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"holds no ChestX_Det_train.json and ChestX_Det_test.json or"):
        load_chestx_det(tmp_path)


# The whole real table


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """The real table with the real images that there are, brought back to their 1024 x 1024."""
    images = pd.read_csv(shared_data / "nih" / "images.csv").set_index("image_id")
    boxes = pd.read_csv(shared_data / "nih" / "boxes.csv")
    boxes = boxes[boxes["reader"] == "ChestX-Det"]
    root = tmp_path_factory.mktemp("chestx_det")
    (root / "images").mkdir()
    chosen = boxes["image_id"].drop_duplicates()[:5].tolist()
    for image in chosen:
        picture = Image.open(shared_data / "nih" / images.loc[image, "file"]).convert("L").resize((1024, 1024))
        picture.save(root / "images" / f"{image}.png", compress_level=1)
    with pytest.warns(UserWarning, match="do not tell their patient") as told:
        data = load_chestx_det(shared_data / "nih", size=512, images=root / "images", missing="leave_out")
    assert {str(one.message)[:25] for one in told} == {"chestx_det: 35 of 3578 im", "3573 of 3578 images named"}
    return data, boxes[boxes["image_id"].isin(chosen)]


def test_real_images(real):
    data, boxes = real
    edges = ["x_min", "y_min", "x_max", "y_max"]
    order = ["image_id", "label", *edges]
    found = data.boxes.sort_values(order).reset_index(drop=True)
    expected = boxes.sort_values(order).reset_index(drop=True)
    assert found[["image_id", "label"]].equals(expected[["image_id", "label"]])
    np.testing.assert_allclose(found[edges], 2 * expected[edges], atol=0.011)
    for position in range(len(data)):
        sample = data[position]
        assert torch.equal(sample.mask.flatten(1).any(1), sample.target == 1)
        assert torch.equal(sample.truth.flatten(1).any(1), sample.target == 1)
        # Outlines lie within their boxes, but for a few whose box is a little short.
        assert (sample.truth & ~sample.mask).sum() <= 0.05 * sample.truth.sum()


def test_published_counts(shared_data):
    from cxrkit.data.public.chestx_det import _read_images, _with_patients

    path = shared_data / "nih" / "chestxdet.json"
    images = _read_images(path, LABELS)
    assert len(images) == 3578
    assert images["boxes"].map(len).sum() == 9639
    assert images["split"].value_counts().to_dict() == {"train": 3025, "test": 553}
    assert (images["syms"].map(len) == 0).sum() == 611
    counts = cxrkit.data.sources()["chestx_det"]["counts"]
    assert (counts["images"], counts["boxes"], counts["boxed_images"]) == (3578, 9639, 3578 - 611)
    assert images["syms"].map(set).explode().value_counts().to_dict() == counts["labels"]
    with pytest.warns(UserWarning, match="35 of 3578"):
        table = _with_patients(path, images)
    # The published parts share patients: the reason why they are not the default.
    known = table[table["nih_file"] != ""]
    shared = known.groupby("patient_id")["split"].transform("nunique") == 2
    assert known["patient_id"].nunique() == 1677
    assert known["patient_id"][shared].nunique() == 271
    assert known["split"][shared].value_counts().to_dict() == {"train": 1070, "test": 373}
    assert (known["split"] == "test").sum() == 542


def test_load_warns_of_the_shared_patients(folder):
    root = folder({"chestxdet.json": NAMED})
    with pytest.warns(UserWarning, match="do not tell their patient") as told:
        data = cxrkit.data.load("chestx_det", root, split_by="official")
    assert (data.table["split"] == "test").sum() == 2
    assert any("parts of ChestX-Det share patients. Of the test images, 1" in str(one.message) for one in told)
