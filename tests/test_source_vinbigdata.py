"""VinBigData: miniatures in its true formats (DICOM, squashed PNG), readers, refusals, and the published counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from PIL import Image
from pydicom.dataset import Dataset as Header
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

import cxrkit
from cxrkit.data.preprocessing import ResizeAndCrop
from cxrkit.data.public import xrv_tables
from cxrkit.data.public.vinbigdata import LABELS, load_vinbigdata
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

HEADER = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
NUMBER = {name: k for k, name in enumerate((*LABELS, "No finding"))}
IDS = [f"{k:032x}" for k in (5, 2, 9, 4, 7, 1)]
# Width and height of the originals.
SIZES = {image: (800 + 10 * k, 1000 + 20 * k) for k, image in enumerate(IDS)}


def line(image, name, reader, *edges):
    return ",".join([image, name, str(NUMBER[name]), reader, *(map(str, edges) if edges else [""] * 4)])


ROWS = [
    # Three readers agree on the heart, two on a nodule, one on an opacity, which a reader boxes twice.
    line(IDS[0], "Cardiomegaly", "R8", 200.0, 500.0, 600.0, 800.0),
    line(IDS[0], "Cardiomegaly", "R10", 210.0, 510.0, 610.0, 790.0),
    line(IDS[0], "Cardiomegaly", "R9", 190.0, 505.0, 605.0, 795.0),
    line(IDS[0], "Nodule/Mass", "R8", 700.0, 900.0, 760.0, 980.0),
    line(IDS[0], "Nodule/Mass", "R9", 705.0, 905.0, 765.0, 985.0),
    line(IDS[0], "Lung Opacity", "R10", 100.0, 100.0, 200.0, 300.0),
    line(IDS[0], "Lung Opacity", "R10", 150.0, 250.0, 300.0, 400.0),
    *(line(IDS[1], "No finding", reader) for reader in ("R1", "R2", "R3")),
    line(IDS[2], "No finding", "R4"),
    line(IDS[2], "No finding", "R5"),
    line(IDS[2], "ILD", "R6", 10.0, 20.0, 820.0, 1040.0),
    *(line(image, "Pneumothorax", "R7", 0.0, 0.0, 50.0, 60.0) for image in IDS[3:]),
    *(line(image, "No finding", reader) for image in IDS[3:] for reader in ("R1", "R2")),
]
TRAIN = "\n".join([HEADER, *ROWS]) + "\n"


def write_dicom(path, stored, photometric, **fields):
    """12-bit grey in 16 bits, as the challenge stores it."""
    header = Header()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    header.PatientSex, header.PatientAge = "O", "000D"
    header.Rows, header.Columns = stored.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
    header.PixelData = stored.astype(np.uint16).tobytes()
    header["PixelData"].VR = "OW"
    for name, value in fields.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def ramp(image):
    """From 100 to 2100 across the image, in its original size."""
    width, height = SIZES[image]
    return np.broadcast_to(np.linspace(100, 2100, width).round(), (height, width))


@pytest.fixture
def originals(tmp_path):
    def write(train=TRAIN, photometric="MONOCHROME2"):
        (tmp_path / "train").mkdir(exist_ok=True)
        for image in IDS:
            stored = ramp(image)
            if photometric == "MONOCHROME1":
                stored = 4095 - stored
            write_dicom(tmp_path / "train" / f"{image}.dicom", stored, photometric, WindowCenter=200, WindowWidth=100)
        (tmp_path / "train.csv").write_text(train)
        return tmp_path

    return write


@pytest.fixture
def copies(tmp_path):
    """The re-release: every image squashed to a square, the original sizes in train_meta.csv or in train.csv."""

    def write(train=TRAIN, side=512, meta=True, below="vinbigdata"):
        root = tmp_path / below
        (root / "train").mkdir(parents=True, exist_ok=True)
        for image in IDS:
            grey = ((ramp(image) - 100) / 2000 * 255).round().astype(np.uint8)
            Image.fromarray(grey).resize((side, side)).save(root / "train" / f"{image}.png")
        if train is not None:
            (root / "train.csv").write_text(train)
        if meta:
            rows = [f"{image},{SIZES[image][1]},{SIZES[image][0]}" for image in reversed(IDS)]
            (root / "train_meta.csv").write_text("image_id,dim0,dim1\n" + "\n".join(rows) + "\n")
        return tmp_path

    return write


def labels_of(data, image):
    row = data.table.set_index("image_id").loc[image, list(data.labels)]
    return set(row.index[row == 1])


# What it reads


def test_originals(originals):
    data = load_vinbigdata(originals(), size=100, split_by="patients")
    assert data.labels == LABELS
    assert len(LABELS) == 14
    assert data.table["image_id"].tolist() == data.table["patient_id"].tolist() == sorted(IDS)
    assert labels_of(data, IDS[0]) == {"Cardiomegaly", "Nodule/Mass", "Lung Opacity"}
    assert labels_of(data, IDS[1]) == set()
    assert data.table.set_index("image_id").loc[IDS[0], "readers"] == "R10;R8;R9"
    first = data.boxes[data.boxes["image_id"] == IDS[0]]
    assert first["reader"].tolist() == ["R8", "R10", "R9", "R8", "R9", "R10", "R10"]
    assert first.iloc[0, 2:6].tolist() == [200, 500, 600, 800]
    # Only the file knows its size: 800 x 1000 becomes 100 x 100.
    assert np.isnan(data.frames).all()
    mask = data[sorted(IDS).index(IDS[0])].mask[LABELS.index("Lung Opacity")]
    expected = torch.zeros(100, 100, dtype=torch.bool)
    expected[10:30, 12:25] = expected[25:40, 19:37] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_pixels_run_from_minimum_to_maximum(originals, photometric):
    image = load_vinbigdata(originals(photometric=photometric), size=100, split_by="patients")[0].image[0]
    assert torch.allclose(image, torch.linspace(0.005, 0.995, 100).expand(100, 100), atol=2e-3)


def test_the_window_on_request(originals):
    image = load_vinbigdata(originals(), size=100, split_by="patients", window=True)[0].image[0]
    assert image[:, 20:].min() == pytest.approx(1)  # above 250 all is white
    assert image[:, 0].max() == 0


@pytest.mark.parametrize(
    ("readers", "expected", "nothing"),
    [
        ("any", {"Cardiomegaly", "Nodule/Mass", "Lung Opacity"}, 1),
        ("majority", {"Cardiomegaly", "Nodule/Mass"}, 5),
        ("all", {"Cardiomegaly"}, 5),
    ],
)
def test_readers(originals, readers, expected, nothing):
    data = load_vinbigdata(originals(), split_by="patients", readers=readers)
    assert labels_of(data, IDS[0]) == expected
    assert set(data.boxes["label"][data.boxes["image_id"] == IDS[0]]) == expected
    assert (data.table[list(LABELS)].sum(axis=1) == 0).sum() == nothing
    assert labels_of(data, IDS[2]) == ({"ILD"} if readers == "any" else set())


@pytest.mark.parametrize(("readers", "count"), [("any", 5), ("majority", 5), ("all", 1)])
def test_no_finding_by_the_same_rule(originals, readers, count):
    data = load_vinbigdata(originals(), split_by="patients", readers=readers, no_finding=True)
    assert data.labels == (*LABELS, "No finding")
    assert data.table["No finding"].sum() == count


@pytest.mark.parametrize("told_by", ["train_meta.csv", "train.csv"])
@pytest.mark.parametrize("side", [512, 600])
def test_squashed_copies(originals, copies, told_by, side):
    whole = load_vinbigdata(originals(), size=100, split_by="patients")
    train = TRAIN
    if told_by == "train.csv":
        rows = [f"{row},{SIZES[row[:32]][0]},{SIZES[row[:32]][1]}" for row in ROWS]
        train = "\n".join([HEADER + ",width,height", *rows]) + "\n"
    data = load_vinbigdata(
        copies(train, side, meta=told_by == "train_meta.csv") / "vinbigdata", size=100, split_by="patients"
    )
    pd.testing.assert_frame_equal(data.boxes, whole.boxes)
    assert data.frames.tolist() == [list(SIZES[image]) for image in sorted(IDS)]
    for one, other in zip(data, whole, strict=False):
        assert torch.equal(one.mask, other.mask)
        assert (one.image - other.image).abs().max() < 0.02


def test_boxes_of_copies_go_through_the_crop_of_copies(tmp_path, copies):
    """A bright bar of the original, squashed and then cropped, stays inside its box, at whatever aspect."""
    width, height = SIZES[IDS[0]]
    root = copies(
        "\n".join(
            [HEADER, line(IDS[0], "ILD", "R1", 300, 200, 340, 240), line(IDS[0], "ILD", "R1", 700, 900, 705, 990)]
        )
    )
    grey = np.zeros((height, width), np.uint8)
    grey[200:240, 300:340] = 255
    Image.fromarray(grey).resize((512, 512), Image.Resampling.BOX).save(root / "vinbigdata" / "train" / f"{IDS[0]}.png")
    data = load_vinbigdata(root, size=224, split_by="patients", preprocessing=ResizeAndCrop())
    sample = data[0]
    inside = sample.image[0][sample.mask[LABELS.index("ILD")]].sum() / sample.image.sum()
    assert inside > 0.75
    # By the original's aspect it would miss.
    edges = ResizeAndCrop().boxes(np.array([[300, 200, 340, 240]]), (width, height), 224)[0]
    rows = torch.nonzero(sample.image[0] > 0.5)[:, 0]
    assert not edges[1] - 1 <= rows.min() <= rows.max() <= edges[3]


def test_boxes_in_pixels_of_the_copies(originals, copies):
    whole = load_vinbigdata(originals(), split_by="patients").boxes
    rows = []
    for row in ROWS:
        image, *words = row.split(",")
        if words[3]:
            scale = 512 / np.array([*SIZES[image], *SIZES[image]])
            words[3:] = (np.array(words[3:], dtype=float) * scale).astype(str)
        rows.append(",".join([image, *words]))
    root = copies("\n".join([HEADER, *rows]) + "\n") / "vinbigdata"
    with pytest.raises(DataError, match="pixels of the copies, 512 x 512; say boxes='file'"):
        load_vinbigdata(root, split_by="patients")
    found = load_vinbigdata(root, split_by="patients", boxes="file").boxes
    edges = ["x_min", "y_min", "x_max", "y_max"]
    np.testing.assert_allclose(found[edges], whole[edges], rtol=1e-9, atol=1e-9)
    assert len(load_vinbigdata(root, split_by="patients", boxes="original").boxes) == len(whole)


def test_whole_pictures(tmp_path, copies):
    root = copies() / "vinbigdata"
    for image in IDS:
        Image.fromarray(((ramp(image) - 100) / 2000 * 255).astype(np.uint8)).save(root / "train" / f"{image}.png")
    data = load_vinbigdata(root, size=64, split_by="patients")
    assert data.frames.tolist() == [list(SIZES[image]) for image in sorted(IDS)]
    assert data[0].image.shape == (1, 64, 64)
    Image.new("L", (64, 64)).save(root / "train" / f"{sorted(IDS)[0]}.png")
    with pytest.raises(DataError, match="is 64 x 64 pixels, the table of original sizes says"):
        data[0]


def test_the_papers_folds(originals):
    root = originals()
    positive = load_vinbigdata(root, split_by="patients").table[list(LABELS)].to_numpy(dtype=int)
    folds = MultilabelStratifiedKFold(5, shuffle=True, random_state=42).split(positive, positive)
    for fold, (_, members) in enumerate(folds):
        table = cxrkit.data.load("vinbigdata", root, fold=fold).table
        assert table["image_id"][table["split"] == "test"].tolist() == [sorted(IDS)[k] for k in members]
    with pytest.raises(DataError, match="split_by='patients'"):
        load_vinbigdata(originals("\n".join([HEADER, ROWS[0]])))


def test_missing_images(originals):
    root = originals()
    (root / "train" / f"{IDS[1]}.dicom").unlink()
    with pytest.raises(DataError, match=r"train.csv: file does not exist .*line 9"):
        load_vinbigdata(root)
    with pytest.warns(UserWarning, match="1 of 6 images"):
        data = load_vinbigdata(root, missing="leave_out")
    assert IDS[1] not in set(data.table["image_id"])
    assert len(data) == 5


def test_the_tables_of_torchxrayvision(tmp_path):
    pytest.importorskip("torchxrayvision")
    image = "9a5094b2563a1ef3ff50dc5c7ff71345"
    (tmp_path / "train").mkdir()
    write_dicom(tmp_path / "train" / f"{image}.dicom", np.tile(np.arange(200), (240, 10)), "MONOCHROME2")
    with pytest.warns(UserWarning, match="14999 of 15000"):
        data = load_vinbigdata(tmp_path, tables="torchxrayvision", missing="leave_out", split_by="patients")
    assert labels_of(data, image) >= {"Cardiomegaly"}
    assert [691, 1375, 1653, 1831] in data.boxes[data.boxes["reader"] == "R10"].iloc[:, 2:6].to_numpy().tolist()


# What it refuses


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TRAIN.replace("Cardiomegaly", "Big heart", 1), ("class_name is none of", "line 2 ('Big heart')")),
        (TRAIN.replace("Cardiomegaly,3", "Cardiomegaly,4", 1), ("class_id is not that of class_name", "line 2")),
        (TRAIN.replace("200.0", "", 1), ("the box is not complete", "line 2")),
        (TRAIN.replace("200.0", "wide", 1), ("x_min is not a number", "line 2 ('wide')")),
        (TRAIN.replace("200.0", "700.0", 1), ("no area", "line 2")),
        (TRAIN.replace("200.0", "-20.0", 1), ("outside its image", "line 2")),
        (TRAIN.replace("R1,,,,", "R1,1,2,3,4", 1), ("'No finding' has a box", "line 9")),
        (TRAIN + line(IDS[1], "ILD", "R1", 1, 2, 3, 4) + "\n", ("a reader says 'No finding' and a finding", "line 9")),
        (TRAIN.replace(",R8,", ",,", 1), ("rad_id is empty", "line 2")),
        (TRAIN.replace(IDS[0], "", 1), ("image_id is empty", "line 2")),
        (TRAIN.replace("rad_id", "reader"), ("lacks the columns ['rad_id']",)),
        (HEADER + "\n", ("holds a header but no row",)),
    ],
)
def test_bad_tables(originals, text, words):
    with pytest.raises(DataError) as caught:
        load_vinbigdata(originals(text))
    for word in ("train.csv", *words):
        assert word in str(caught.value)


def test_all_problems_at_once(originals):
    text = TRAIN.replace("Cardiomegaly", "Big heart", 1).replace("210.0", "x", 1).replace("700.0", "800.0", 1)
    with collecting() as found:
        load_vinbigdata(originals(text))
    assert {problem.line for problem in found} >= {2, 3, 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id,dim0,dim1\n", ("lacks the size of an image",)),
        ("image_id,dim0,dim1\n" + f"{IDS[0]},0,10\n", ("dim0 is not a positive whole number", "line 2")),
        ("image_id,dim0,dim1\n" + 2 * f"{IDS[0]},10,10\n", ("image_id occurs twice", "line 3")),
        ("image_id,dim0\n", ("lacks the columns ['dim1']",)),
    ],
)
def test_bad_sizes(copies, text, words):
    root = copies()
    (root / "vinbigdata" / "train_meta.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        load_vinbigdata(root)
    for word in ("train_meta.csv", *words):
        assert word in str(caught.value)


def test_a_box_beyond_its_image_is_refused(copies):
    text = TRAIN.replace("700.0,900.0,760.0", "700.0,900.0,860.0", 1)
    with pytest.raises(DataError, match=r"outside its image.*line 5.*800 x 1000"):
        load_vinbigdata(copies(text))


def test_copies_without_sizes_or_shape(copies):
    with pytest.raises(DataError, match=r"need the originals' sizes: train_meta.csv"):
        load_vinbigdata(copies(meta=False))
    root = copies()
    for image in IDS:
        Image.new("L", (300, 512)).save(root / "vinbigdata" / "train" / f"{image}.png")
    with pytest.raises(DataError, match="300 x 512, neither the original size nor a square copy"):
        load_vinbigdata(root)


def test_a_copy_of_another_size_is_refused(copies):
    root = copies()
    data = load_vinbigdata(root)
    Image.new("L", (256, 256)).save(root / "vinbigdata" / "train" / f"{sorted(IDS)[0]}.png")
    with pytest.raises(DataError, match="is 256 x 256 pixels, every image of this source says 512 x 512"):
        data[0]


# The published counts


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("torchxrayvision")
    return xrv_tables.annotations("vinbigdata")


def test_published_counts(published, shared_data):
    assert (published.images[list(LABELS)].sum(axis=1) == 0).sum() == 10606
    assert set(published.images["readers"].str.split(";").explode()) == {f"R{k}" for k in range(1, 18)}
    assert (published.images["readers"].str.count(";") == 2).all()
    # Six of the readers saw no image on which anyone found anything.
    assert set(published.boxes["reader"]) == {f"R{k}" for k in (2, *range(8, 18))}
    table = pd.read_csv(shared_data.parent / "tables" / "ext_bcos_vinbig_label_counts.csv", index_col=0).iloc[:, 0]
    assert published.images[list(LABELS)].sum().to_dict() == table.drop("(no finding)").to_dict()
    assert table["(no finding)"] == 10606


def test_agreement_from_the_table_itself(published):
    """A second way to the labels by majority and by all, straight from the rows."""
    from cxrkit.data.public.vinbigdata import read_annotations

    votes = published.boxes.drop_duplicates(["image_id", "label", "reader"]).groupby(["image_id", "label"]).size()
    for readers, needed in (("majority", 2), ("all", 3)):
        found = read_annotations(xrv_tables._package() / "data", "torchxrayvision", readers)
        expected = votes[votes >= needed].groupby("label").size()
        assert found.images[list(LABELS)].sum().to_dict() == expected.to_dict()
        pairs = set(zip(found.boxes["image_id"], found.boxes["label"], strict=True))
        assert pairs == set(votes[votes >= needed].index)


def test_folds_of_the_paper(published):
    from cxrkit.data.public.vinbigdata import _paper_split

    tests = [(_paper_split(published.images, LABELS, fold, 0) == "test") for fold in range(5)]
    assert np.sum(tests, axis=0).tolist() == [1] * 15000
    assert all(2990 <= test.sum() <= 3010 for test in tests)
