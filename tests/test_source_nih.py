"""NIH ChestX-ray14: miniatures in both vintages of its broken tables, refusals, published counts, real images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data.public import xrv_tables
from cxrkit.data.public.nih import LABELS, load_nih
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError, ParameterError

# file, findings, follow-up, patient, age, sex, view
IMAGES = [
    ("00000001_000", "Cardiomegaly", 0, 1, 58, "M", "PA"),
    ("00000001_001", "Cardiomegaly|Emphysema", 1, 1, 58, "M", "PA"),
    ("00000002_000", "No Finding", 0, 2, 81, "M", "PA"),
    ("00000003_000", "Hernia|Infiltration", 0, 3, 412, "F", "AP"),
    ("00000004_000", "Mass|Nodule", 0, 4, 82, "M", "AP"),
    ("00000005_000", "No Finding", 0, 5, 69, "F", "PA"),
    ("00013118_008", "Atelectasis|Infiltration", 8, 13118, 69, "M", "PA"),
    ("00013118_009", "No Finding", 9, 13118, 70, "M", "PA"),
]
TEST = ["00000004_000", "00013118_008", "00013118_009"]
OLD = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
OLD += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
NEW = OLD.replace("Patient Gender", "Patient Sex")


def rows_2017(ages="{:03d}Y", end=""):
    """The first vintage: ages with their unit, zeros in front, and a header that is one cell longer than its rows."""
    return "".join(
        f"{file}.png,{found},{follow:03d},{patient:08d},{ages.format(age)},{sex},{view},2682,2749,0.143,0.143{end}\n"
        for file, found, follow, patient, age, sex, view in IMAGES
    )


def rows_2020(end=","):
    return "".join(
        f"{file}.png,{found},{follow},{patient},{age},{sex},{view},2682,2749,0.14300000000000002,0.143{end}\n"
        for file, found, follow, patient, age, sex, view in IMAGES
    )


VINTAGES = {
    "2017, units": ("Data_Entry_2017.csv", OLD + rows_2017()),
    "2017, plain": ("Data_Entry_2017.csv", OLD + rows_2017("{}", ",")),
    "2020": ("Data_Entry_2017_v2020.csv", NEW + rows_2020()),
    "2020, torchxrayvision": ("Data_Entry_2017_v2020.csv", OLD.replace(",\n", "\n") + rows_2020("")),
    "2017, byte order mark": (
        "Data_Entry_2017.csv",
        "\ufeff" + OLD.replace("\n", "\r\n") + rows_2017().replace("\n", "\r\n"),
    ),
}
BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661
00013118_008.png,Atelectasis,600,100,100,50
00013118_008.png,Infiltrate,225.0,547.0,87.0,80.0
00000004_000.png,Nodule,10.5,20.25,30,40
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The images, written once: number k is flat grey 30 k."""
    folder = tmp_path_factory.mktemp("nih")
    for k, (file, *_) in enumerate(IMAGES):
        Image.fromarray(np.full((1024, 1024), 30 * k, np.uint8)).save(folder / f"{file}.png", compress_level=1)
    return folder


@pytest.fixture
def folder(tmp_path, pictures):
    def write(entries=VINTAGES["2020"][1], boxes=BOXES, name="Data_Entry_2017_v2020.csv", lists=TEST, layout="parts"):
        for k, (file, *_) in enumerate(IMAGES):
            below = {"parts": f"images_{1 + k // 3:03d}/images", "one": "images", "flat": "."}[layout]
            (tmp_path / below).mkdir(parents=True, exist_ok=True)
            (tmp_path / below / f"{file}.png").symlink_to(pictures / f"{file}.png")
        tables = {name: entries, "BBox_List_2017.csv": boxes}
        if lists is not None:
            tables["test_list.txt"] = "\n".join(f"{file}.png" for file in lists) + "\n"
            rest = [file for file, *_ in IMAGES if file not in lists]
            tables["train_val_list.txt"] = "\n".join(f"{file}.png" for file in rest)
        for file, text in tables.items():
            if text is not None:
                (tmp_path / file).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return write


# What it reads


@pytest.mark.parametrize("vintage", VINTAGES)
def test_every_vintage(folder, vintage):
    name, text = VINTAGES[vintage]
    data = load_nih(folder(text, name=name), size=64)
    assert data.labels == LABELS
    assert len(LABELS) == 14
    assert data.table["image_id"].tolist() == [file for file, *_ in IMAGES]
    assert data.table["patient_id"].tolist() == ["1", "1", "2", "3", "4", "5", "13118", "13118"]
    for row, (_, found, follow, _, age, sex, view) in enumerate(IMAGES):
        held = data.table.iloc[row]
        assert {label for label in LABELS if held[label] == 1} == set(found.split("|")) - {"No Finding"}
        assert (held["follow_up"], held["sex"], held["view"]) == (follow, sex, view)
        # Nobody is 412 years old.
        assert held["age"] == age if age < 120 else np.isnan(held["age"])
        assert (held["acquired_width"], held["acquired_height"]) == (2682, 2749)
    assert data[3].image.unique().item() == pytest.approx(90 / 255)


def test_ages_in_months_and_days(folder):
    text = VINTAGES["2017, units"][1].replace("058Y", "011M", 1).replace("058Y", "073D", 1)
    age = load_nih(folder(text)).table["age"]
    assert age[0] == pytest.approx(11 / 12)
    assert age[1] == pytest.approx(73 / 365.25)


def test_boxes(folder):
    data = load_nih(folder(), size=1024)
    assert data.boxes["label"].tolist() == ["Atelectasis", "Atelectasis", "Infiltration", "Nodule"]
    assert data.boxes.iloc[3].tolist() == ["00000004_000", "Nodule", 10.5, 20.25, 40.5, 60.25, "NIH"]
    mask = data[6].mask
    # Both boxes of the one label, not only the last.
    expected = torch.zeros(1024, 1024, dtype=torch.bool)
    expected[547:626, 225:312] = expected[100:150, 600:700] = True
    assert torch.equal(mask[LABELS.index("Atelectasis")], expected)
    assert mask[LABELS.index("Infiltration")].sum() == 87 * 80
    assert not data[0].mask.any()


@pytest.mark.parametrize("layout", ["parts", "one", "flat"])
def test_where_images_may_lie(folder, layout):
    assert len(load_nih(folder(layout=layout))) == len(IMAGES)


def test_one_level_deeper(folder, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "ChestXray-NIHCC").symlink_to(folder(), target_is_directory=True)
    assert len(load_nih(outer)) == len(IMAGES)


def test_the_official_split(folder):
    root = folder()
    data = cxrkit.data.load("nih", root)
    table = data.table
    assert table["image_id"][table["split"] == "test"].tolist() == TEST
    validation = table["patient_id"][table["split"] == "validation"]
    assert len(validation) > 0
    assert not set(validation) & set(table["patient_id"][table["split"] == "train"])
    chosen = {tuple(load_nih(root, seed=seed).table["split"]) for seed in range(6)}
    assert len(chosen) > 1
    with pytest.raises(ParameterError, match="brings its own split"):
        cxrkit.data.load("nih", root, fold=1)
    own = cxrkit.data.load("nih", root, fold=1, split_by="patients").table
    assert own.groupby("patient_id")["split"].nunique().max() == 1


def test_images_that_are_not_there(folder):
    root = folder()
    (root / "images_001" / "images" / "00000001_000.png").unlink()
    with pytest.raises(DataError, match=r"v2020.csv: file does not exist .*line 2 \('00000001_000'\)"):
        load_nih(root)
    with pytest.warns(UserWarning, match="1 of 8 images"):
        data = load_nih(root, missing="leave_out")
    assert len(data) == 7
    assert data.table["path"].str.endswith(".png").all()


def test_without_tables(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"lacks Data_Entry_2017.* tables='torchxrayvision'"):
        load_nih(tmp_path)


# What it refuses

ENTRIES = VINTAGES["2020"][1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            ENTRIES.replace("Cardiomegaly", "Big heart", 1),
            ("Finding Labels holds a name other than", "line 2 ('Big heart')"),
        ),
        (ENTRIES.replace("No Finding", "No Finding|Mass", 1), ("either findings or 'No Finding'", "line 4")),
        (ENTRIES.replace("No Finding", "", 1), ("Finding Labels", "line 4")),
        (ENTRIES.replace(",0,1,58", ",0,7,58"), ("Patient ID is not that of Image Index", "line 2 ('7')")),
        (ENTRIES.replace("00000001_001.png", "00000001_000.png"), ("Image Index occurs twice", "line 3")),
        (
            ENTRIES.replace("00000001_001.png", "1.png"),
            ("Image Index is not like 00000001_000.png", "line 3 ('1.png')"),
        ),
        (ENTRIES.replace(",58,M", ",old,M", 1), ("Patient Age is not like", "line 2 ('old')")),
        (ENTRIES.replace("2682,2749,0.14300000000000002,0.143,", "2682", 1), ("the number of cells differs", "line 2")),
        (ENTRIES.replace("0.143,", "0.143,,,7", 1), ("the number of cells differs", "line 2")),
        (ENTRIES.replace("Patient Sex", "Sex"), ("lacks the column", "Patient Sex or Patient Gender")),
        (NEW, ("holds a header but no row",)),
        ("", ("is empty",)),
        (b"\xff\xfe\x00", ("is not UTF-8 text",)),
        (ENTRIES.replace("0.143,", "0.143" + 9 * ",x", 1), ("v2020.csv",)),
        (
            ENTRIES + "00000009_000.png,Mass,0,9,5,M,PA,1,1,1,1,\n",
            ("in both or neither of train_val_list.txt", "line 10"),
        ),
    ],
)
def test_bad_entries(folder, text, words):
    with pytest.raises(DataError) as caught:
        load_nih(folder(text))
    for word in ("Data_Entry_2017_v2020.csv", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOXES.replace("Infiltrate", "Edemas"), ("Finding Label is unknown", "line 4 ('Edemas')")),
        (BOXES.replace("00000004_000", "00000044_000"), ("Image Index is not in the table of images", "line 5")),
        (BOXES.replace("10.5", "x"), ("Bbox [x is not a number", "line 5 ('x')")),
        (BOXES.replace("10.5", "1010.5"), ("outside its image", "line 5", "1024 x 1024")),
        (BOXES.replace("30,40", "30,0"), ("no area", "line 5")),
        (BOXES.replace("30,40", "30"), ("the number of cells differs", "line 5")),
        (BOXES.replace("Bbox [x", "left"), ("lacks the columns ['Bbox [x']",)),
        (None, ("lacks BBox_List_2017.csv", "tables='torchxrayvision'")),
    ],
)
def test_bad_boxes(folder, text, words):
    with pytest.raises(DataError) as caught:
        load_nih(folder(boxes=text))
    for word in ("BBox_List_2017.csv", *words):
        assert word in str(caught.value)


def test_an_image_in_both_lists(folder):
    root = folder()
    (root / "train_val_list.txt").write_text("\n".join(f"{file}.png" for file, *_ in IMAGES))
    with pytest.raises(DataError, match="in both or neither"):
        load_nih(root)
    (root / "train_val_list.txt").unlink()
    with pytest.raises(DataError, match=r"lacks train_val_list.txt"):
        load_nih(root)


def test_all_problems_at_once(folder):
    entries = ENTRIES.replace("Cardiomegaly", "Big heart", 1).replace(",81,M", ",?,M")
    with collecting() as found:
        load_nih(folder(entries, boxes=BOXES.replace("Infiltrate", "Edemas").replace("10.5", "x")))
    assert {problem.line for problem in found} >= {2, 4, 5}
    assert len({problem.problem for problem in found}) >= 4


def test_an_image_of_another_size_is_refused(folder):
    root = folder()
    path = root / "images_001" / "images" / "00000001_000.png"
    path.unlink()
    Image.new("L", (224, 224)).save(path)
    with pytest.raises(DataError, match="is 224 x 224 pixels, every image of this source says 1024 x 1024"):
        load_nih(root)[0]


# The published counts


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("torchxrayvision")
    return xrv_tables.annotations("nih")


def test_every_box_has_its_label(published):
    """No image has two boxes of one label, 93 have boxes of several; and each boxed label is one of the image's."""
    of_image = published.boxes.groupby("image_id")["label"]
    assert (of_image.size() == of_image.nunique()).all()
    assert (of_image.nunique() > 1).sum() == 93
    images = published.images.set_index("image_id")
    assert all(images.at[box.image_id, box.label] == 1 for box in published.boxes.itertuples())


def test_the_2020_vintage(published):
    counts = cxrkit.data.sources()["nih"]["counts"]
    assert published.boxes["label"].value_counts().to_dict() == counts["boxes_per_label"]
    assert (published.images[list(LABELS)].sum(axis=1) == 0).sum() == counts["without_finding"]
    assert published.images["age"].max() == 95
    assert published.images["age"].notna().all()


# Real images


def test_real_images_in_its_layout(shared_data, tmp_path, published):
    images = pd.read_csv(shared_data / "nih" / "images.csv").set_index("image_id")
    boxes = pd.read_csv(shared_data / "nih" / "boxes.csv")
    boxes = boxes[boxes["reader"] == "NIH_BBox_List_2017"]
    chosen = boxes["image_id"].drop_duplicates()[:4].tolist()
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    for image in chosen:
        picture = Image.open(shared_data / "nih" / images.loc[image, "file"]).convert("L").resize((1024, 1024))
        picture.save(tmp_path / "images_001" / "images" / f"{image}.png", compress_level=1)
    with pytest.warns(UserWarning, match="112116 of 112120"):
        data = load_nih(tmp_path, size=512, tables="torchxrayvision", split_by="patients", missing="leave_out")
    edges = ["x_min", "y_min", "x_max", "y_max"]
    expected = boxes[boxes["image_id"].isin(chosen)].sort_values(["image_id", *edges]).reset_index(drop=True)
    found = data.boxes.sort_values(["image_id", *edges]).reset_index(drop=True)
    assert found["label"].tolist() == expected["label"].tolist()
    np.testing.assert_allclose(found[edges], 2 * expected[edges], atol=0.011)
    for position, image in enumerate(data.table["image_id"]):
        held = {label for label in LABELS if data.table.at[position, label] == 1}
        assert held == set(images.loc[image, "labels"].split(";"))
        assert data.table.at[position, "patient_id"] == str(images.loc[image, "patient_id"])
        small = np.asarray(Image.open(shared_data / "nih" / images.loc[image, "file"]).convert("L")) / 255
        assert np.abs(data[position].image[0].numpy() - small).mean() < 0.01
