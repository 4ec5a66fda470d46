"""CheXpert: labels and their policies, both releases, the true counts, and the run-length codes of CheXlocalize."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cxrkit
from cxrkit.data.public import chexpert
from cxrkit.data.public.chexpert import HIERARCHY, LABELS, load_chexpert
from cxrkit.data.public.outlines import RUNS, outline_mask, rle_box, rle_runs
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

HEADER = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS])
EDGES = ["x_min", "y_min", "x_max", "y_max"]
TRAIN = [
    ("train/patient00001/study1/view1_frontal.jpg", "Female,68,Frontal,AP", {"No Finding": "1.0"}),
    ("train/patient00002/study1/view1_frontal.jpg", "Male,70,Frontal,PA", {"Cardiomegaly": "-1.0", "Edema": "0.0"}),
    ("train/patient00002/study1/view2_lateral.jpg", "Male,70,Lateral,", {"Cardiomegaly": "1.0"}),
    ("train/patient00003/study2/view1_frontal.jpg", "Male,41,Frontal,AP", {"Support Devices": "1.0"}),
]
VALID = [
    ("valid/patient64541/study1/view1_frontal.jpg", "Male,73,Frontal,AP", {"Lung Opacity": "1.0"}),
    ("valid/patient64542/study1/view1_frontal.jpg", "Male,70,Frontal,PA", dict.fromkeys(LABELS, "0.0")),
]


def table(rows, prefix="CheXpert-v1.0-small/"):
    lines = [",".join([prefix + path, more, *(cells.get(label, "") for label in LABELS)]) for path, more, cells in rows]
    return "\n".join([HEADER, *lines]) + "\n"


def encode(mask):
    """The compressed run-length code of a mask, written slowly from the rule: runs down the columns, five bits a
    character, from the fourth run on as the difference to the run two before."""
    flat = mask.T.reshape(-1)
    runs, inside, length = [], False, 0
    for value in flat.tolist():
        if bool(value) != inside:
            runs.append(length)
            inside, length = not inside, 0
        length += 1
    runs.append(length)
    text = ""
    for k, run in enumerate(runs):
        number = run - runs[k - 2] if k > 2 else run
        while True:
            bits = number & 31
            number >>= 5
            more = number != -1 if bits & 16 else number != 0
            text += chr(48 + bits + (32 if more else 0))
            if not more:
                break
    return {"size": list(mask.shape), "counts": text}


@pytest.fixture
def folder(tmp_path):
    """Write CheXpert-v1.0-small with images of 32 x 24 pixels; returns the root."""

    def write(train=TRAIN, valid=VALID, below="CheXpert-v1.0-small", prefix="CheXpert-v1.0-small/"):
        root = tmp_path / below
        for name, rows in (("train", train), ("valid", valid)):
            if rows is None:
                continue
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / f"{name}.csv").write_text(table(rows, prefix))
            for path, _, _ in rows:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (32, 24), 60).save(root / path)
        return tmp_path

    return write


def outline():
    """240 x 320 pixels: the opacity in the upper left, the heart below the middle; the true file calls opacity so."""
    opacity, heart = np.zeros((240, 320), bool), np.zeros((240, 320), bool)
    opacity[30:90, 40:140] = True
    opacity[60:70, 60:80] = False
    heart[150:200, 120:248] = True
    nothing = np.zeros((240, 320), bool)
    return (
        {
            "patient64541_study1_view1_frontal": {
                "Airspace Opacity": encode(opacity),
                "Cardiomegaly": encode(heart),
                "Edema": encode(nothing),
            }
        },
        opacity,
        heart,
    )


# Labels


def test_labels_with_the_default_policies(folder):
    data = load_chexpert(folder(), size=32)
    assert data.labels == LABELS
    assert len(LABELS) == 14
    assert data.hierarchy == HIERARCHY
    assert data.table["image_id"].tolist()[1:3] == [
        "patient00002_study1_view1_frontal",
        "patient00002_study1_view2_lateral",
    ]
    assert data.table["patient_id"].tolist()[1:3] == ["patient00002"] * 2
    assert data.table["split"].tolist() == ["train"] * 4 + ["validation"] * 2
    assert data.table["view"].tolist()[1:3] == ["frontal", "lateral"]
    assert data.table["projection"].tolist()[0] == "AP"
    table = data.table.set_index("image_id")
    assert np.isnan(table.loc["patient00002_study1_view1_frontal", "Cardiomegaly"])  # uncertain
    assert table.loc["patient00002_study1_view1_frontal", "Edema"] == 0
    assert table.loc["patient00002_study1_view1_frontal", "Fracture"] == 0  # not mentioned
    assert data[0].image.shape == (1, 32, 32)
    assert data[0].truth is None
    assert data.boxes.empty


@pytest.mark.parametrize(("uncertain", "value"), [("zeros", 0), ("ones", 1)])
def test_policies(folder, uncertain, value):
    data = load_chexpert(folder(), uncertain=uncertain, unmentioned="nan")
    assert data.table["Cardiomegaly"].tolist()[1:3] == [value, 1]
    assert data.table["Fracture"].isna().tolist() == [True] * 5 + [False]


def test_options(folder):
    root = folder()
    assert load_chexpert(root, frontal_only=True).table["view"].unique().tolist() == ["frontal"]
    assert "split" not in load_chexpert(root, split_by="patients").table
    folds = [cxrkit.data.load("chexpert", root, split="test", fold=k, size=32, split_by="patients") for k in range(5)]
    assert sum(len(part) for part in folds) == 6
    assert len(cxrkit.data.load("chexpert", root, split="validation", size=32)) == 2


def test_layouts(folder, tmp_path):
    assert len(load_chexpert(folder(below="", prefix="CheXpert-v1.0/"))) == 6
    assert len(load_chexpert(folder(train=None, below="one/CheXpert-v1.0") / "one")) == 2


def test_the_release_of_chexlocalize(tmp_path):
    """Its own names: val, test, val_labels.csv, test_labels.csv with paths that start with the part."""
    codes, _, _ = outline()
    base = tmp_path / "chexlocalize"
    (base / "CheXlocalize").mkdir(parents=True)
    (base / "CheXlocalize" / "gt_segmentations_val.json").write_text(json.dumps(codes))
    for part, rows in (("val", VALID), ("test", [("test/patient64741/study1/view1_frontal.jpg", "", {})])):
        lines = [",".join(["Path", *LABELS])]
        for path, _, cells in rows:
            place = base / "CheXpert" / part / path.split("/", 1)[1]
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 24)).save(place)
            lines.append(",".join([path, *(cells.get(label, "0.0") for label in LABELS)]))
        (base / "CheXpert" / f"{part}_labels.csv").write_text("\n".join(lines) + "\n")
    data = load_chexpert(base, size=24)
    assert data.table["split"].tolist() == ["validation", "validation", "test"]
    assert data[0].truth[LABELS.index("Lung Opacity")].any()
    assert not data[1].truth.any()  # an image that the outlines leave out has none
    assert data[2].truth is None  # no outlines of the test part here
    assert "age" not in data.table


def test_outlines_become_truth_and_boxes(folder):
    root = folder()
    codes, opacity, _ = outline()
    (root / "CheXpert-v1.0-small" / "gt_segmentations_val.json").write_text(json.dumps(codes))
    data = load_chexpert(root, size=240)
    index = data.table["image_id"].tolist().index("patient64541_study1_view1_frontal")
    assert data.boxes["label"].tolist() == ["Lung Opacity", "Cardiomegaly"]
    assert data.boxes[EDGES].to_numpy().tolist() == [[40, 30, 140, 90], [120, 150, 248, 200]]
    assert data.frames[index].tolist() == [320, 240]
    truth = data[index].truth
    assert truth.shape == (14, 240, 240)
    wide = torch.nn.functional.interpolate(torch.from_numpy(opacity)[None, None].float(), (240, 240), mode="bilinear",
                                           antialias=True)[0, 0] >= 0.5  # fmt: skip
    assert torch.equal(truth[LABELS.index("Lung Opacity")], wide)
    assert truth.any(dim=(1, 2)).sum() == 2
    assert (truth & ~data[index].mask).sum() == 0
    assert data[0].truth is None


# Run-length codes


def test_codes_of_the_published_sample():
    """The empty outlines of the two images that the authors show: 2 320 x 2 828 and 2 022 x 2 021 pixels."""
    assert rle_runs("PVWX6").tolist() == [2320 * 2828]
    assert rle_runs("nefl3").tolist() == [2022 * 2021]
    assert rle_box(rle_runs("PVWX6"), 2320) is None
    assert not outline_mask(RUNS, rle_runs("nefl3"), 2021, 2022).any()


masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda size: st.lists(st.booleans(), min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
        lambda bits: np.array(bits).reshape(size)
    )
)


@settings(max_examples=150, deadline=None)
@given(masks)
def test_codes_there_and_back(mask):
    code = encode(mask)
    runs = rle_runs(code["counts"])
    np.testing.assert_array_equal(outline_mask(RUNS, runs, *mask.shape[::-1]), mask)
    rows, columns = np.nonzero(mask)
    expected = None if not len(rows) else (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert rle_box(runs, mask.shape[0]) == expected


def test_long_runs_and_uncompressed_codes():
    mask = np.zeros((2320, 900), bool)
    mask[100:2200, 17:880] = True
    mask[1000, 500] = False
    runs = rle_runs(encode(mask)["counts"])
    np.testing.assert_array_equal(outline_mask(RUNS, runs, 900, 2320), mask)
    assert rle_box(runs, 2320) == (17, 100, 880, 2200)
    assert rle_runs([3, 2, 1]).tolist() == [3, 2, 1]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        runs = rle_runs(text)
    except ValueError:  # also what is no ASCII
        return
    assert runs.dtype == np.int64


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ({"size": [240, 320], "counts": "P"}, "not a run-length code"),
        ({"size": [240, 320]}, r"\['Edema'\]\['counts'\]"),
        ({"size": [240], "counts": "0"}, r"\['Edema'\]\['size'\]"),
        ({"size": [240, 320], "counts": ""}, "not a run-length code"),
        ({"size": [10, 10], "counts": "PVWX6"}, "do not fill 10 x 10 pixels"),
        ({"size": [-1, 320], "counts": "0"}, "greater than 0"),
        ({"size": [10, 10], "counts": [50, 60, -10]}, "greater than or equal to 0"),
        ({"size": [20000, 20000], "counts": [20000 * 20000]}, "more pixels than any radiograph"),
        (7, "patient64541_study1_view1_frontal'..'Edema'"),
    ],
)
def test_outlines_that_are_refused(folder, code, problem):
    root = folder()
    path = root / "CheXpert-v1.0-small" / "gt_segmentations_val.json"
    path.write_text(json.dumps({"patient64541_study1_view1_frontal": {"Edema": code}}))
    with pytest.raises(DataError, match=problem):
        load_chexpert(root)


@pytest.mark.parametrize("text", ["", "[]", '{"patient64541_study1_view1_frontal": 3}', "{"])
def test_files_of_outlines_that_are_refused(folder, text):
    root = folder()
    (root / "CheXpert-v1.0-small" / "gt_segmentations_val.json").write_text(text)
    with pytest.raises(DataError, match="is not a table of outlines"):
        load_chexpert(root)


def test_outlines_must_agree_in_label_and_size(folder):
    root = folder()
    path = root / "CheXpert-v1.0-small" / "gt_segmentations_val.json"
    path.write_text(json.dumps({"patient64541_study1_view1_frontal": {"Heart": {"size": [1, 1], "counts": "1"}}}))
    with pytest.raises(DataError, match=r"unknown label 'Heart'"):
        load_chexpert(root)
    codes = {"Edema": {"size": [1, 1], "counts": "1"}, "Fracture": {"size": [1, 2], "counts": "2"}}
    path.write_text(json.dumps({"patient64541_study1_view1_frontal": codes}))
    with pytest.raises(DataError, match=r"outlines of \(1, 1\) and of \(2, 1\) pixels"):
        load_chexpert(root)


# Tables


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("train/patient00001/study1/view1_frontal.jpg", ",,,", {}), "an image occurs twice: row on line 6"),
        (("train/00004/study1/view1_frontal.jpg", ",,,", {}), "does not end in patient/study/view: row on line 6"),
        (("train/patient00002/study9/view1_frontal.jpg", ",,,", {"Edema": "2.0"}), "Edema is none of 1, 0, -1"),
        (("train/patient00009/study1/view1_frontal.jpg", ",,,", {}), "file does not exist"),
    ],
)
def test_rows_that_are_refused(folder, row, problem):
    root = folder()
    (root / "CheXpert-v1.0-small" / "train.csv").write_text(table([*TRAIN, row]))
    with pytest.raises(DataError, match=problem):
        load_chexpert(root)
    with collecting() as found:
        data = load_chexpert(root)
    assert [problem.line for problem in found] == [6]
    assert len(data) == 6


def test_a_partial_download(folder, tmp_path):
    root = folder()
    place = root / "CheXpert-v1.0-small" / "train" / "patient00002"
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()
    with pytest.warns(UserWarning, match="2 of 4 images"):
        assert len(load_chexpert(root, missing="leave_out")) == 4
    with pytest.raises(DataError, match=r"holds no train\.csv or"):
        load_chexpert(tmp_path / "CheXpert-v1.0-small" / "valid")


def test_counts_of_the_true_table(tmp_path, monkeypatch):
    """The training table that torchxrayvision carries: 223 414 images of 64 540 patients, indexed without a look at
    the images."""
    found = importlib.util.find_spec("torchxrayvision")
    path = None if found is None else Path(found.origin).parent / "data" / "chexpert_train.csv.gz"
    if path is None or not path.is_file():
        pytest.skip("torchxrayvision is not installed, or carries no table of CheXpert")
    known = pd.read_csv(path)
    (tmp_path / "train").mkdir()
    with gzip.open(path) as file:
        (tmp_path / "train.csv").write_bytes(file.read())
    everyone = set(known["Path"].str.extract(r"(patient\d+)")[0])
    monkeypatch.setattr(chexpert, "_names", lambda folder: everyone)
    data = load_chexpert(tmp_path)
    assert len(data) == 223414
    assert data.table["patient_id"].nunique() == 64540
    for label in LABELS:
        assert data.table[label].sum() == (known[label] == 1).sum()
        assert data.table[label].isna().sum() == (known[label] == -1).sum()
    assert data.table["patient_id"].iloc[-1] == known["Path"].iloc[-1].split("/")[2]
