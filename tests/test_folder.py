"""The folder source: what it reads, what it refuses by file and row, and the real sets beside the project."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data.folder import load_folder
from cxrkit.errors import DataError, ParameterError

IMAGES = """image_id,file,patient_id,labels,view
a,x/a.png,1,Nodule;Effusion,PA
b,x/b.png,1,Nodule,AP
c,x/c.png,2,No Finding,PA
d,x/d.png,3,,
"""
BOXES = """image_id,label,x_min,y_min,x_max,y_max,reader
a,Nodule,0,0,20,20,one
a,Nodule,10,10,30,30,two
a,Opacity,40,30,60,40,two
b,Effusion,5.5,5,80,40,one
"""


@pytest.fixture
def folder(tmp_path):
    """Write a folder of four 80 x 40 images and the tables given; returns its path."""

    def write(images=IMAGES, boxes=BOXES):
        (tmp_path / "x").mkdir(exist_ok=True)
        for k, name in enumerate("abcd"):
            Image.fromarray(np.full((40, 80), 50 * k, np.uint8)).save(tmp_path / "x" / f"{name}.png")
        for name, text in (("images.csv", images), ("boxes.csv", boxes)):
            if text is not None:
                (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path

    return write


def refuse(root, *words, error=DataError, **options):
    """Check that the folder is refused with a message of these words, and that nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")} if root.is_dir() else {}
    with pytest.raises(error) as caught:
        load_folder(root, **options)
    for word in words:
        assert word in str(caught.value)
    assert before == ({path: path.stat().st_mtime_ns for path in root.rglob("*")} if root.is_dir() else {})


# What it reads


def test_tables_and_pixels(folder):
    data = load_folder(folder(), size=40)
    assert data.labels == ("Nodule", "Effusion")
    assert data.table[["Nodule", "Effusion"]].to_numpy().tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert data.table["view"].tolist()[:3] == ["PA", "AP", "PA"]
    assert data.table["patient_id"].tolist() == ["1", "1", "2", "3"]
    assert data.boxes.columns.tolist() == ["image_id", "label", "x_min", "y_min", "x_max", "y_max", "reader"]
    assert len(data.boxes) == 4
    assert data[2].image.unique().item() == pytest.approx(100 / 255)
    # Two overlapping boxes in an image squeezed from 80 x 40 to 40 x 40.
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[:20, :10] = expected[10:30, 5:15] = True
    assert torch.equal(data[0].mask[0], expected)
    assert not data[0].mask[1].any()
    assert data[1].mask[1].any()


@pytest.mark.parametrize("boxes", [None, BOXES.split("\n")[0]])
def test_no_boxes(folder, boxes):
    data = load_folder(folder(boxes=boxes))
    assert len(data.boxes) == 0
    assert not data[0].mask.any()


def test_no_findings(folder):
    rows = "".join(f"{k},x/a.png,{k},No Finding\n" for k in range(10))
    root = folder("image_id,file,patient_id,labels\n" + rows, None)
    data = cxrkit.data.load("folder", root, split="test", size=32)
    assert len(data) == 2
    assert data.batch([0, 1]).masks.shape == (2, 0, 32, 32)


def test_reduced_copies_give_boxes_in_original_pixels(folder):
    text = IMAGES.replace("view", "view,width,height,orig_width,orig_height")
    rows = [line + ",80,40,800,200" if line and k else line for k, line in enumerate(text.split("\n"))]
    data = load_folder(folder("\n".join(rows)))
    assert data.boxes.loc[3, ["x_min", "y_min", "x_max", "y_max"]].tolist() == [55, 25, 800, 200]
    assert data.frames[0].tolist() == [800, 200]
    assert torch.equal(data[0].mask, load_folder(folder())[0].mask)


def test_boxes_may_overshoot_by_one_pixel(folder):
    data = load_folder(folder(boxes=BOXES.replace("5.5,5,80,40", "-0.6,-1,81,40.2")))
    assert data.boxes.loc[3, ["x_min", "y_min", "x_max", "y_max"]].tolist() == [0, 0, 80, 40]


def test_label_options(folder):
    root = folder()
    assert load_folder(root, labels=["Effusion", "Nodule"]).labels == ("Effusion", "Nodule")
    boxed = load_folder(root, labels=["Opacity"])
    np.testing.assert_array_equal(boxed.table["Opacity"], [1, np.nan, np.nan, np.nan])
    assert boxed[0].mask[0].any()
    renamed = load_folder(root, label_map={"Opacity": "Effusion"})
    assert renamed[0].mask[1].any()
    assert load_folder(root, label_map={"Effusion": "Nodule"}).labels == ("Nodule",)
    one = load_folder(root, readers=["one"])
    assert one.boxes["reader"].unique().tolist() == ["one"]
    refuse(root, "['Mass']", "'Effusion', 'Nodule', 'Opacity'", error=ParameterError, labels=["Mass"])
    refuse(root, "labels='Nodule'", error=ParameterError, labels="Nodule")
    refuse(root, "twice", error=ParameterError, labels=["Nodule", "Nodule"])
    refuse(root, "['three']", "['one', 'two']", error=ParameterError, readers=["three"])


def test_label_paths_make_a_hierarchy(folder):
    text = IMAGES.replace("Nodule;Effusion", "P/V/Covid").replace(",Nodule,", ",P/B,")
    data = load_folder(folder(text, None))
    assert data.labels == ("P", "P/B", "P/V", "P/V/Covid")
    assert data.hierarchy == {"P/V/Covid": "P/V", "P/V": "P", "P/B": "P"}
    assert data.table.loc[0, ["P", "P/B", "P/V", "P/V/Covid"]].tolist() == [1, 0, 1, 1]
    named = load_folder(folder(text, None), label_map={"P": "Pneumonia", "P/V/Covid": "COVID-19"})
    assert named.hierarchy == {"COVID-19": "P/V", "P/V": "Pneumonia", "P/B": "Pneumonia"}
    assert named.table.loc[1, ["Pneumonia", "COVID-19"]].tolist() == [1, 0]
    flat = load_folder(folder(text, None), hierarchy_separator=None)
    assert flat.labels == ("P/B", "P/V/Covid")
    assert flat.hierarchy == {}
    assert load_folder(folder(text, None), labels=["P/V/Covid"]).hierarchy == {}


def test_given_split_is_kept(folder):
    rows = IMAGES.strip().split("\n")
    parts = ["split", "train", "train", "test", "validation"]
    root = folder("\n".join(f"{row},{part}" for row, part in zip(rows, parts, strict=True)))
    assert len(cxrkit.data.load("folder", root, split="train", size=32)) == 2
    with pytest.raises(ParameterError, match="fold=1: folder brings its own split"):
        cxrkit.data.load("folder", root, fold=1)
    text = "\n".join(f"{row},{part}" for row, part in zip(rows, [*parts[:3], "train", "train"], strict=True))
    with pytest.raises(DataError, match=r"no image is in split 'test'; there are \['train'\]"):
        cxrkit.data.load("folder", folder(text), split="test")


def test_few_patients_can_only_be_read_whole(folder):
    root = folder()
    assert len(cxrkit.data.load("folder", root)) == 4
    with pytest.raises(DataError, match=r"3 patients can't be spread over 5 folds.*split=None"):
        cxrkit.data.load("folder", root, split="test")


def test_byte_order_mark_quotes_and_blank_lines(folder):
    text = "\ufeff" + IMAGES.replace("a,x/a.png", 'a,"x/a.png"').replace("\n", "\r\n") + "\r\n\r\n"
    assert len(load_folder(folder(text))) == 4


def test_checksums(folder):
    root = folder()
    sums = [hashlib.sha256((root / "x" / f"{name}.png").read_bytes()).hexdigest() for name in "abcd"]
    rows = IMAGES.strip().split("\n")
    folder("\n".join(f"{row},{end}" for row, end in zip(rows, ["sha256", *sums], strict=True)))
    assert len(load_folder(root, verify=True)) == 4
    Image.new("L", (80, 40)).save(root / "x" / "b.png")
    assert len(load_folder(root)) == 4
    refuse(root, "images.csv", "sha256", "line 3", "x/b.png", verify=True)
    refuse(folder(), "verify=True needs the column sha256", verify=True)


# What it refuses


def test_folders_without_a_table(tmp_path):
    refuse(tmp_path / "none", "none", "no such folder")
    refuse(tmp_path, str(tmp_path), "is empty", "images.csv")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "is a file")
    refuse(tmp_path, "holds no images.csv", "image_id, file, patient_id, labels")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("", ["images.csv", "is empty"]),
        ("\n\n", ["is empty"]),
        ("image_id,file,patient_id,labels\n", ["no row"]),
        ("image_id,file,labels\na,x/a.png,\n", ["['patient_id']", "'image_id', 'file', 'labels'"]),
        ("image_id,file,file,patient_id,labels\n", ["column name occurs twice"]),
        (IMAGES.replace("b,x/b", "a,x/b"), ["image_id occurs twice", "line 3 ('a')"]),
        (IMAGES.replace("b,x/b.png,1", "b,x/b.png,"), ["patient_id is empty", "line 3"]),
        (IMAGES.replace("x/b.png", "x/e.png"), ["file does not exist", "line 3 ('x/e.png')"]),
        (IMAGES.replace("x/b.png", "../b.png"), ["file leaves the folder", "line 3 ('../b.png')"]),
        (IMAGES.replace("x/b.png", "/etc/passwd"), ["file leaves the folder", "'/etc/passwd'"]),
        (IMAGES.replace("x/b.png", "C:\\b.png"), ["file leaves the folder", "line 3"]),
        (IMAGES.replace("Nodule;Effusion", "Nodule;No Finding"), ["'No Finding' beside a finding", "line 2"]),
        (IMAGES.replace("b,x/b.png,1", "b,x/b.png,1,9"), ["number of cells", "line 3 (6 cells, not 5)"]),
        (IMAGES.replace("a,x/a", '"a,x/a'), ["images.csv", "not a comma-separated table"]),
        (IMAGES.replace("Nodule", "Nodülé").encode("latin-1"), ["images.csv", "UTF-8"]),
        (IMAGES.replace(",view", ",Nodule"), ["['Nodule']", "label_map"]),
        (IMAGES.replace(",view", ",split"), ["split is none of", "line 2 ('PA')"]),
        (
            IMAGES.replace("view", "split").replace("PA", "train").replace("AP", "test").replace(",,\n", ",,test\n"),
            ["patient_id is in more than one split", "line 2 ('1')", "line 3 ('1')"],
        ),
    ],
)
def test_images_csv_is_refused(folder, images, words):
    refuse(folder(images, None), *words)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (
            BOXES.replace("b,Effusion,5.5,5,80,40", "b,Effusion,5.5,5,80,41.5"),
            ["outside", "line 5", "b: 5.5, 5, 80, 41.5"],
        ),
        (BOXES.replace("a,Opacity,40", "a,Opacity,-2"), ["outside its image", "line 4", "80 x 40"]),
        (BOXES.replace("0,0,20,20", "20,0,20,20"), ["no area", "line 2 ('a: 20, 0, 20, 20 in 80 x 40')"]),
        (BOXES.replace("10,10,30,30", "30,10,10,30"), ["no area", "line 3"]),
        (BOXES.replace("b,Eff", "z,Eff"), ["image_id is not in images.csv", "line 5 ('z')"]),
        (BOXES.replace("5.5", "left"), ["x_min is not a number", "line 5 ('left')"]),
        (BOXES.replace("5.5", "nan"), ["x_min is not a number", "line 5"]),
        (BOXES.replace("5.5", ""), ["x_min is not a number", "line 5"]),
        (BOXES.replace("5.5,5,80,40", "5.5,5,inf,40"), ["x_max is not a number"]),
        (BOXES.replace("label", "finding"), ["boxes.csv", "['label']", "'finding'"]),
        (BOXES.replace("Opacity", ""), ["label is empty", "line 4"]),
        ("", ["boxes.csv", "is empty"]),
    ],
)
def test_boxes_csv_is_refused(folder, boxes, words):
    refuse(folder(boxes=boxes), *words)


def test_problems_of_one_kind_come_together(folder):
    rows = "".join(f"a,Nodule,0,0,{200 + k},20,one\n" for k in range(9))
    refuse(folder(boxes=BOXES + rows), "line 6", "line 7", "line 8", "and 6 more")


def test_damaged_file_is_named_when_drawn(folder):
    root = folder()
    data = load_folder(root, size=32)
    (root / "x" / "b.png").write_bytes((root / "x" / "b.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"'b'.*b\.png.*truncated or damaged"):
        data[1]
    Image.new("L", (40, 80)).save(root / "x" / "b.png")
    with pytest.raises(DataError, match=r"'b'.*is 40 x 80 pixels, images.csv says 80 x 40"):
        data[1]
    assert data[0].image.shape == (1, 32, 32)


def test_damaged_header_is_refused_at_once(folder):
    root = folder()
    (root / "x" / "c.png").write_text("not an image")
    refuse(root, "c.png", "neither DICOM, PNG nor JPEG")


# The real sets


@pytest.mark.parametrize(
    ("name", "images", "patients", "boxes", "labels"),
    [
        ("nih", 1202, 957, 497, 14),
        ("covid_cohen", 208, 114, 82, 14),
        ("kermany", 474, 326, 0, 3),
        ("brain_mri", 64, 2, 92, 1),
    ],
)
def test_real_sets(shared_data, name, images, patients, boxes, labels):
    data = cxrkit.data.load("folder", shared_data / name, size=64)
    assert (len(data), data.table["patient_id"].nunique(), len(data.boxes), len(data.labels)) == (
        images,
        patients,
        boxes,
        labels,
    )
    raw = pd.read_csv(shared_data / name / "images.csv", dtype=str)
    assert data.table["image_id"].tolist() == raw["image_id"].tolist()
    for index in (0, len(data) // 2, -1):
        image = data[index].image
        assert image.shape == (1, 64, 64)
        assert 0 <= image.min() < image.max() <= 1
    assert ("split" in data.table) == (patients >= 5)


def test_real_folds(shared_data):
    tested = []
    for fold in range(5):
        data = cxrkit.data.load("folder", shared_data / "nih", fold=fold)
        parts = {name: data.split(name) for name in ("train", "validation", "test")}
        assert sum(map(len, parts.values())) == len(data)
        people = [set(part.table["patient_id"]) for part in parts.values()]
        assert sum(map(len, people)) == len(set.union(*people))
        # Every label is tested in every fold, the rarest (18 images) included.
        assert (parts["test"].table[list(data.labels)].sum() > 0).all()
        tested += parts["test"].table["image_id"].tolist()
    assert sorted(tested) == sorted(data.table["image_id"])


def test_real_boxes(shared_data):
    data = cxrkit.data.load("folder", shared_data / "nih", size=64)
    raw = pd.read_csv(shared_data / "nih" / "boxes.csv")
    np.testing.assert_allclose(data.boxes["x_max"], raw["x_max"] * 2)
    assert data.boxes["x_max"].max() <= 1024
    row = data.table.index[data.table["image_id"] == "00000100_000"][0]
    mask = data[row].mask[data.labels.index("Effusion")]
    rows, columns = mask.nonzero(as_tuple=True)
    assert (columns.min(), columns.max()) == (1, 17)  # 6 to 142.5 of 512
    assert (rows.min(), rows.max()) == (44, 52)  # 352.5 to 423.5 of 512
    opacity = cxrkit.data.load("folder", shared_data / "nih", readers=["RSNA_stage2"], labels=["Lung Opacity"])
    assert opacity.table["Lung Opacity"].sum() == opacity.boxes["image_id"].nunique()


def test_real_checksums(shared_data):
    cxrkit.data.load("folder", shared_data / "brain_mri", verify=True)
