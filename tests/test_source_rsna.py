"""RSNA stage 2: a miniature in its true format, what is refused, the published counts, real images in its layout."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset as Header
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid
from sklearn.model_selection import StratifiedKFold

import cxrkit
from cxrkit.data.public import xrv_tables
from cxrkit.data.public.rsna import load_rsna
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

IDS = [f"{k:08x}-4fd1-4e49-80ba-63a80b6bddd6" for k in (7, 3, 11, 2, 5, 1, 9, 4, 8, 6, 10, 12)]
POSITIVE = IDS[::2]
ROWS = [f"{IDS[0]},264.0,152.0,213.0,379.0,1", f"{IDS[0]},562.0,152.0,256.0,453.0,1"]
ROWS += [f"{patient},100.0,200.0,50.0,60.0,1" if patient in POSITIVE else f"{patient},,,,,0" for patient in IDS[1:]]
LABELS = "\n".join(["patientId,x,y,width,height,Target", *ROWS]) + "\n"
KINDS = [
    "Lung Opacity" if p in POSITIVE else ("Normal", "No Lung Opacity / Not Normal")[k % 4 == 1]
    for k, p in enumerate(IDS)
]
CLASSES = "patientId,class\n" + "".join(
    f"{p},{kind}\n" for p, kind in zip([IDS[0], *IDS], [KINDS[0], *KINDS], strict=True)
)


def write_dicom(path, grey):
    """8-bit grey ``grey`` as the challenge stores it, JPEG in DICOM; with a window that must not be applied."""
    header = Header()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.PatientID = header.PatientName = path.stem
    header.Modality, header.ViewPosition = "CR", "PA"
    header.Rows, header.Columns = grey.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 8, 7, 0
    header.WindowCenter, header.WindowWidth = 30, 10
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95)
    header.PixelData = encapsulate([stream.getvalue()])
    header["PixelData"].VR = "OB"
    header.save_as(path, enforce_file_format=True)


def flat(level, side=1024):
    return np.full((side, side), level, np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The images of the miniature, written once: patient k is flat grey 20 k."""
    folder = tmp_path_factory.mktemp("rsna") / "stage_2_train_images"
    folder.mkdir()
    for k, patient in enumerate(IDS):
        write_dicom(folder / f"{patient}.dcm", flat(20 * k))
    return folder


@pytest.fixture
def folder(tmp_path, images):
    def write(labels=LABELS, classes=CLASSES, present=IDS, below=""):
        root = tmp_path / below
        (root / "stage_2_train_images").mkdir(parents=True, exist_ok=True)
        for patient in present:
            (root / "stage_2_train_images" / f"{patient}.dcm").symlink_to(images / f"{patient}.dcm")
        for name, text in (("stage_2_train_labels.csv", labels), ("stage_2_detailed_class_info.csv", classes)):
            if text is not None:
                (root / name).write_text(text)
        return tmp_path

    return write


# What it reads


def test_the_miniature(folder):
    data = load_rsna(folder(), size=128)
    assert data.labels == ("Lung Opacity",)
    assert data.table["image_id"].tolist() == sorted(IDS)
    assert data.table["patient_id"].tolist() == sorted(IDS)
    assert data.table.set_index("image_id")["Lung Opacity"].to_dict() == {p: float(p in POSITIVE) for p in IDS}
    assert data.table.set_index("image_id").loc[IDS, "detailed_class"].tolist() == KINDS
    assert data.boxes[data.boxes["image_id"] == IDS[0]].iloc[:, 1:].to_numpy().tolist() == [
        ["Lung Opacity", 264, 152, 477, 531, "RSNA"],
        ["Lung Opacity", 562, 152, 818, 605, "RSNA"],
    ]
    assert len(data.boxes) == 7
    sample = data[sorted(IDS).index(IDS[0])]
    expected = torch.zeros(128, 128, dtype=torch.bool)
    # Centres of pixels of 8: 264 to 477 holds columns 33 to 59, 562 to 818 holds 70 to 101.
    expected[19:66, 33:60] = expected[19:76, 70:102] = True
    assert torch.equal(sample.mask[0], expected)
    assert data[sorted(IDS).index(IDS[7])].image.unique().item() == pytest.approx(140 / 255, abs=1e-6)


def test_the_detailed_classes_as_labels(folder):
    data = load_rsna(folder(), labels="classes")
    assert data.labels == ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
    found = data.table.set_index("image_id")[list(data.labels)]
    assert found.idxmax(axis=1)[IDS].tolist() == KINDS
    assert (found.sum(axis=1) == 1).all()


def test_the_normal_are_those_called_so(folder):
    data = load_rsna(folder(), labels="normal", split_by="patients")
    kinds = {image: kind for image, kind in zip(IDS, KINDS, strict=True) if kind != "No Lung Opacity / Not Normal"}
    assert dict(zip(data.table["image_id"], data.table["detailed_class"], strict=True)) == kinds
    assert data.labels == ("Lung Opacity",)
    assert len(data.boxes) == 7


def test_without_detailed_classes(folder):
    root = folder(classes=None)
    assert "detailed_class" not in load_rsna(root).table
    with pytest.raises(DataError, match=r"labels='classes' needs stage_2_detailed_class_info.csv"):
        load_rsna(root, labels="classes")
    with pytest.raises(DataError, match="labels='normal' needs"):
        load_rsna(root, labels="normal")


def test_one_level_deeper(folder):
    assert len(load_rsna(folder(below="rsna-pneumonia-detection-challenge"))) == 12


def test_the_papers_folds(folder):
    root = folder()
    order = sorted(IDS)
    target = np.array([patient in POSITIVE for patient in order])
    tested = []
    for fold, (_, members) in enumerate(StratifiedKFold(5, shuffle=True, random_state=42).split(target, target)):
        data = cxrkit.data.load("rsna", root, fold=fold, size=32)
        split = data.table.set_index("image_id")["split"]
        assert split[split == "test"].index.tolist() == [order[k] for k in members]
        assert set(split) == {"train", "validation", "test"}
        tested += split[split == "test"].index.tolist()
    assert sorted(tested) == order


def test_own_folds(folder):
    root = folder()
    parts = [cxrkit.data.load("rsna", root, "test", k, split_by="patients").table["image_id"] for k in range(5)]
    assert sorted(pd.concat(parts)) == sorted(IDS)
    assert "split" not in load_rsna(root, split_by="patients").table


def test_folds_do_not_depend_on_what_is_there(folder, tmp_path):
    whole = load_rsna(folder(), fold=2).table.set_index("image_id")["split"]
    (tmp_path / "stage_2_train_images" / f"{IDS[4]}.dcm").unlink()
    with pytest.warns(UserWarning, match="1 of 12 images"):
        part = load_rsna(tmp_path, fold=2, missing="leave_out").table.set_index("image_id")["split"]
    assert part.to_dict() == whole.drop(IDS[4]).to_dict()


def test_the_tables_of_torchxrayvision(tmp_path):
    pytest.importorskip("torchxrayvision")
    patient = "00436515-870c-4b36-a041-de91049b9ab4"
    (tmp_path / "stage_2_train_images").mkdir()
    write_dicom(tmp_path / "stage_2_train_images" / f"{patient}.dcm", flat(9))
    with pytest.raises(DataError, match=r"lacks stage_2_train_labels.csv; tables='torchxrayvision'"):
        load_rsna(tmp_path)
    with pytest.warns(UserWarning, match="26683 of 26684"):
        data = load_rsna(tmp_path, tables="torchxrayvision", missing="leave_out")
    assert data.boxes.iloc[:, 2:6].to_numpy().tolist() == [[264, 152, 477, 531], [562, 152, 818, 605]]
    assert data[0].target.item() == 1


# What it refuses


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LABELS.replace(",1\n", ",2\n", 1), ("Target is neither 0 nor 1", "row on line 2 ('2')")),
        (LABELS.replace("264.0", "", 1), ("the box is not complete", "line 2")),
        (LABELS.replace(",,,,,0", ",1,,,,0", 1), ("Target is 0, but there is a box", "line 4")),
        (LABELS.replace("264.0", "nan", 1), ("x is not a number", "line 2")),
        (LABELS.replace("264.0", "left", 1), ("x is not a number", "line 2 ('left')")),
        (LABELS.replace("213.0", "913.0", 1), ("outside its image", "1177", "1024 x 1024")),
        (LABELS.replace("213.0", "0", 1), ("no area", "line 2")),
        (LABELS.replace("264.0,152.0,213.0,379.0,1", ",,,,0", 1), ("Target differs between rows", "line 2", "line 3")),
        (LABELS.replace(IDS[0], "", 1), ("patientId is empty", "line 2")),
        (
            LABELS.replace("Target", "Targets", 1),
            ("lacks the columns ['Target']", "is 'Targets' meant to be 'Target'?"),
        ),
        (LABELS.split("\n")[0] + "\n", ("holds a header but no row",)),
        (LABELS + f"{'f' * 8},,,,,0\n", ("file does not exist", "line 15")),
        ("", ("is empty",)),
    ],
)
def test_bad_labels(folder, text, words):
    with pytest.raises(DataError) as caught:
        load_rsna(folder(labels=text, classes=None))
    for word in ("stage_2_train_labels.csv", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CLASSES.replace("Normal", "normal", 1), ("class is none of", "line 4")),
        (CLASSES.replace("Lung Opacity", "Normal", 1), ("class differs between rows",)),
        (CLASSES.replace("Lung Opacity\n", "Normal\n"), ("class does not fit Target",)),
        (CLASSES + f"{'f' * 8},Normal\n", ("patientId is not in stage_2_train_labels.csv", "line 15")),
        (CLASSES.replace(f"{IDS[1]},{KINDS[1]}\n", ""), ("has no row for a patient",)),
    ],
)
def test_bad_classes(folder, text, words):
    with pytest.raises(DataError) as caught:
        load_rsna(folder(classes=text))
    for word in ("stage_2_detailed_class_info.csv", *words):
        assert word in str(caught.value)


def test_all_problems_at_once(folder):
    text = LABELS.replace("264.0", "", 1).replace("100.0", "1000.0", 1).replace(",0\n", ",7\n", 1)
    with collecting() as found:
        load_rsna(folder(labels=text, classes=None))
    kinds = {problem.problem for problem in found}
    assert {
        "Target is 1, but the box is not complete",
        "Target is neither 0 nor 1",
        "the box lies outside its image",
    } <= kinds


def test_no_images_at_all(folder):
    root = folder(present=[])
    with pytest.raises(DataError, match="none of its 12 images"):
        load_rsna(root, missing="leave_out")


def test_few_patients_need_own_folds(folder):
    text = "\n".join(LABELS.split("\n")[:8]) + "\n"
    root = folder(labels=text, classes=None)
    with pytest.raises(DataError, match="split_by='patients'"):
        load_rsna(root)
    assert len(load_rsna(root, split_by="patients")) == 6


def test_an_image_of_another_size_is_refused(folder, tmp_path):
    root = folder(present=IDS[1:])
    write_dicom(root / "stage_2_train_images" / f"{IDS[0]}.dcm", flat(1, 512))
    data = load_rsna(root)
    with pytest.raises(DataError, match="is 512 x 512 pixels") as caught:
        data[sorted(IDS).index(IDS[0])]
    assert IDS[0] in str(caught.value)


def test_a_second_copy_is_refused(folder, tmp_path):
    root = folder()
    Image.fromarray(flat(1)).save(root / "stage_2_train_images" / f"{IDS[0]}.png")
    with pytest.raises(DataError, match="second time"):
        load_rsna(root)


# The published counts


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("torchxrayvision")
    return xrv_tables.annotations("rsna")


def union_area(boxes):
    """Area of a union of boxes, cell by cell of the grid that their edges make."""
    x, y = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])
    inside = np.zeros((len(y) - 1, len(x) - 1), dtype=bool)
    for x_min, y_min, x_max, y_max in boxes:
        inside |= ((y[:-1] >= y_min) & (y[1:] <= y_max))[:, None] & ((x[:-1] >= x_min) & (x[1:] <= x_max))[None]
    return (np.diff(y)[:, None] * np.diff(x)[None])[inside].sum()


def test_share_of_the_image_that_boxes_cover(published):
    edges = published.boxes.set_index("image_id")[["x_min", "y_min", "x_max", "y_max"]]
    area = (edges["x_max"] - edges["x_min"]) * (edges["y_max"] - edges["y_min"])
    total = area.groupby(level=0).sum()
    union = pd.Series({image: union_area(of_one.to_numpy()) for image, of_one in edges.groupby(level=0)})
    assert len(union) == 6012
    assert round(100 * union.mean() / 1024**2, 2) == 11.75
    assert round(100 * total.mean() / 1024**2, 2) == 11.75
    # They are not the same, though: some boxes do overlap.
    assert 0 < (total - union).mean() / 1024**2 < 1e-5


def test_folds_of_the_paper(published):
    from cxrkit.data.public.rsna import _paper_split

    tests, positives = [], []
    for fold in range(5):
        split = _paper_split(published.images, published.labels, fold, 0)
        tests.append(int((split == "test").sum()))
        positives.append(int(published.images["Lung Opacity"][split == "test"].sum()))
    assert tests == [5337, 5337, 5337, 5337, 5336]
    assert positives == [1202, 1202, 1203, 1203, 1202]


# Real images


def test_real_images_in_its_layout(shared_data, tmp_path):
    images = pd.read_csv(shared_data / "nih" / "images.csv").set_index("image_id")
    boxes = pd.read_csv(shared_data / "nih" / "boxes.csv")
    boxes = boxes[boxes["reader"] == "RSNA_stage2"]
    chosen = boxes["image_id"].drop_duplicates()[:3].tolist()
    healthy = images.index[images["rsna_class"] == "Normal"][:2].tolist()
    boxes = boxes[boxes["image_id"].isin(chosen)]
    rows = [
        f"{box.image_id},{2 * box.x_min},{2 * box.y_min},{2 * (box.x_max - box.x_min)},{2 * (box.y_max - box.y_min)},1"
        for box in boxes.itertuples()
    ] + [f"{image},,,,,0" for image in healthy]
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\n" + "\n".join(rows) + "\n")
    (tmp_path / "stage_2_train_images").mkdir()
    greys = {}
    for image in chosen + healthy:
        picture = Image.open(shared_data / "nih" / images.loc[image, "file"]).convert("L").resize((1024, 1024))
        greys[image] = np.asarray(picture)
        write_dicom(tmp_path / "stage_2_train_images" / f"{image}.dcm", greys[image])
    data = load_rsna(tmp_path, size=1024, split_by="patients")
    edges = ["x_min", "y_min", "x_max", "y_max"]
    found = data.boxes.sort_values(["image_id", *edges]).reset_index(drop=True)
    expected = boxes.sort_values(["image_id", *edges]).reset_index(drop=True)
    np.testing.assert_allclose(found[edges], 2 * expected[edges], atol=1e-9)
    for position, image in enumerate(data.table["image_id"]):
        sample = data[position]
        assert np.abs(sample.image[0].numpy() - greys[image] / 255).mean() < 0.01  # what JPEG lost
        assert bool(sample.mask.any()) == (image in chosen) == bool(sample.target.item())
