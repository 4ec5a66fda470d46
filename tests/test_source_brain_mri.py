"""Brain tumour MRI: MATLAB 7.3 files as MATLAB writes them, their transposition, masks, outlines, and the folds."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cxrkit
from cxrkit.data.public.brain_mri import LABELS, load_brain_mri, read_slice
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

EDGES = ["x_min", "y_min", "x_max", "y_max"]
HEADER = b"MATLAB 7.3 MAT-file, Platform: PCWIN64, Created on: Sat Nov 21 2015 HDF5 schema 1.00 ."


def write_mat(path, label=1, patient="100360", image=None, mask=None, without=()):
    """One file as MATLAB 7.3 writes it: a user block with its header, arrays with columns first, text as codes."""
    image = np.zeros((12, 20), np.int16) if image is None else image
    mask = np.zeros(image.shape, np.uint8) if mask is None else mask
    with h5py.File(path, "w", userblock_size=512) as file:
        group = file.create_group("cjdata")
        group.attrs["MATLAB_class"] = np.bytes_("struct")
        values = {
            "label": np.array([[float(label)]]),
            "PID": np.array([[ord(letter)] for letter in patient], dtype=np.uint16).reshape(-1, 1),
            "image": image.T,
            "tumorMask": mask.T,
        }
        for name, value in values.items():
            if name not in without:
                group.create_dataset(name, data=value)
    with open(path, "r+b") as file:
        file.write(HEADER.ljust(124) + b"\x00\x02IM")


def write_folds(path, folds):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["cvind"] = np.array([folds], dtype=float)


def slice_of(row):
    """An image 20 wide and 12 high that is not symmetric, its tumour in the upper right."""
    image = (np.arange(240).reshape(12, 20) * 7 + row * 100 - 300).astype(np.int16)
    mask = np.zeros((12, 20), np.uint8)
    mask[2:5, 13:18] = 1
    return image, mask


@pytest.fixture
def folder(tmp_path):
    """Write slices 1 to 20 of ten patients, two each, over four folders as the download has them; returns the root."""

    def write(flat=False, below="", folds=True, **changes):
        root = tmp_path / below
        for number in range(1, 21):
            place = root if flat else root / f"brainTumorDataPublic_{'1-766' if number < 11 else '767-1532'}"
            place.mkdir(parents=True, exist_ok=True)
            image, mask = slice_of(number)
            given = {"label": number % 3 + 1, "patient": f"MR{(number + 1) // 2:05d}", "image": image, "mask": mask}
            write_mat(place / f"{number}.mat", **{**given, **changes.get(f"_{number}", {})})
        if folds:
            write_folds(root / "cvind.mat", [(number + 1) // 2 % 5 + 1 for number in range(1, 21)])
        return tmp_path

    return write


def test_labels_patients_and_sizes(folder):
    data = load_brain_mri(folder())
    assert data.labels == LABELS == ("meningioma", "glioma", "pituitary tumor")
    assert data.table["image_id"].tolist() == [str(number) for number in range(1, 21)]  # by number, not by name
    assert data.table["patient_id"].tolist()[:3] == ["MR00001", "MR00001", "MR00002"]
    assert data.table[list(LABELS)].to_numpy().argmax(axis=1).tolist() == [number % 3 for number in range(1, 21)]
    assert (data.table[list(LABELS)].sum(axis=1) == 1).all()
    assert data.frames[0].tolist() == [20, 12]


def test_image_and_mask_are_turned_back_alike(folder):
    data = load_brain_mri(folder(), size=12)
    image, mask = slice_of(1)
    pixels = read_slice(data.table["path"].iloc[0])
    expected = (image - image.min()) / float(image.max() - image.min())
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert pixels.min() == 0
    assert pixels.max() == 1
    truth = data.renderer.truth(0)
    assert truth.shape == (3, 12, 20)
    np.testing.assert_array_equal(truth[1], mask > 0)  # slice 1 has label 2, the glioma
    assert not truth[0].any()
    assert not truth[2].any()
    sample = data[0]
    assert sample.truth.shape == (3, 12, 12)
    assert sample.truth[1, 2:5].any(dim=0).nonzero().flatten().tolist() == [8, 9, 10]  # 13..18 of 20, in 12
    assert not sample.truth[1, 5:].any()


def test_boxes_bound_the_tumour(folder):
    data = load_brain_mri(folder(_2={"mask": np.zeros((12, 20), np.uint8)}), size=60)
    assert data.boxes[EDGES].to_numpy().tolist() == [[13, 2, 18, 5]] * 19  # the second slice shows none
    assert data.boxes["label"].iloc[0] == "glioma"
    sample = data[0]
    outside = (sample.truth & ~sample.mask).sum()
    assert outside == 0


def test_the_official_folds(folder):
    root = folder()
    tested = []
    for fold in range(5):
        data = load_brain_mri(root, fold=fold)
        test = data.table["split"] == "test"
        patients = data.table["patient_id"][test].unique().tolist()
        assert sorted(patients) == [f"MR{number:05d}" for number in range(1, 11) if number % 5 == fold]
        assert data.table.groupby("patient_id")["split"].nunique().max() == 1
        assert set(data.table["split"]) == {"train", "validation", "test"}
        tested += data.table["image_id"][test].tolist()
    assert sorted(tested) == sorted(str(number) for number in range(1, 21))
    part = cxrkit.data.load("brain_mri", root, split="test", fold=2, size=32)
    assert set(part.table["patient_id"]) == {"MR00002", "MR00007"}


def test_without_the_official_folds_ours_are_made(folder):
    root = folder(folds=False)
    assert "split" not in load_brain_mri(root).table
    data = cxrkit.data.load("brain_mri", root, size=32)
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1
    assert "split" not in load_brain_mri(folder(), split_by="patients").table


def test_slices_leak_and_say_so(folder):
    with pytest.warns(UserWarning, match="whatever the patient"):
        data = cxrkit.data.load("brain_mri", folder(), split_by="slices", size=32)
    assert data.table.groupby("patient_id")["split"].nunique().max() > 1
    assert (data.table["split"] == "test").sum() == 4
    again = load_brain_mri(folder(), split_by="slices")
    assert again.table["split"].tolist() == data.table["split"].tolist()
    other = load_brain_mri(folder(), split_by="slices", fold=1)
    assert not ((other.table["split"] == "test") & (data.table["split"] == "test")).any()


@pytest.mark.parametrize("layout", [{"flat": True}, {"below": "1512427"}, {"below": "a/b"}])
def test_layouts_as_people_unpack_them(folder, layout):
    assert len(load_brain_mri(folder(**layout))) == 20


def test_what_the_slices_may_look_like(folder):
    constant = np.full((12, 20), 77, np.int16)
    root = folder(_1={"image": constant}, _2={"patient": "100360 "})
    data = load_brain_mri(root, size=32)
    assert not data[0].image.any()
    assert data.table["patient_id"].iloc[1] == "100360"
    assert pickle.loads(pickle.dumps(data))[2].truth.any()


@pytest.mark.parametrize(
    ("number", "changes", "problem"),
    [
        (3, {"label": 4}, "label is none of 1, 2, 3: 3.mat"),
        (3, {"patient": ""}, "PID is empty: 3.mat"),
        (3, {"without": ("tumorMask",)}, r"3.mat: .* holds no numbers of its own as cjdata/tumorMask"),
        (3, {"mask": np.zeros((4, 0), np.uint8)}, r"3.mat: tumorMask has the shape \(4, 0\)"),
    ],
)
def test_files_that_are_refused(folder, number, changes, problem):
    with pytest.raises(DataError, match=problem):
        load_brain_mri(folder(**{f"_{number}": changes}))


def test_a_mask_of_another_size_is_refused(folder):
    data = load_brain_mri(folder(_3={"mask": np.ones((4, 4), np.uint8)}))
    with pytest.raises(DataError, match=r"3\.mat: is 20 x 12 pixels, tumorMask says 4 x 4"):
        data[2]


@pytest.mark.parametrize("field", ["PID", "image", "tumorMask"])
@pytest.mark.parametrize("kind", ["link", "virtual", "raw"])
def test_arrays_of_other_files_are_not_shown(folder, tmp_path, field, kind):
    """A file may name another one of the machine as the place of an array."""
    root = folder()
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["values"] = np.full((20, 12), 65, np.uint16)
    with h5py.File(root / "brainTumorDataPublic_1-766" / "2.mat", "r+") as file:
        del file["cjdata"][field]
        if kind == "link":
            file["cjdata"][field] = h5py.ExternalLink(str(secret), "/values")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((20, 12), dtype="u2")
            layout[:] = h5py.VirtualSource(str(secret), "values", shape=(20, 12))
            file["cjdata"].create_virtual_dataset(field, layout)
        else:
            file["cjdata"].create_dataset(field, (20, 12), dtype="u1", external=[(str(secret), 0, 240)])
    with pytest.raises(DataError, match=rf"2\.mat.* no numbers of its own as cjdata/{field}"):
        load_brain_mri(root)[1]


def test_damage_is_named(folder, tmp_path):
    root = folder()
    path = root / "brainTumorDataPublic_1-766" / "4.mat"
    whole = path.read_bytes()
    for damaged in (b"", b"MATLAB 5.0 MAT-file", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"4\.mat"):
            load_brain_mri(root)
    path.unlink()
    (tmp_path / "again").mkdir()
    write_mat(tmp_path / "again" / "5.mat")
    with pytest.raises(DataError, match="a slice is there twice"):
        load_brain_mri(root)


def test_all_problems_at_once(folder):
    root = folder(_1={"label": 0}, _2={"patient": " "}, _3={"label": 9})
    with collecting() as found:
        data = load_brain_mri(root)
    assert [problem.value for problem in found] == ["1.mat", "3.mat", "2.mat"]
    assert len(data) == 17


def test_folds_that_are_refused(folder, tmp_path):
    root = folder()
    write_folds(root / "cvind.mat", [1] * 19)
    with pytest.raises(DataError, match="from 1 to 5 for each of 20 slices"):
        load_brain_mri(root)
    write_folds(root / "cvind.mat", [6] * 20)
    with pytest.raises(DataError, match="from 1 to 5"):
        load_brain_mri(root)
    write_folds(root / "cvind.mat", [number % 5 + 1 for number in range(20)])
    with pytest.raises(DataError, match="a patient is in two folds: 'MR00001'"):
        load_brain_mri(root)
    (root / "cvind.mat").write_bytes(b"no")
    with pytest.raises(DataError, match=r"cvind\.mat: is no MATLAB 7\.3 file"):
        load_brain_mri(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no 1\.mat or cvind\.mat"):
        load_brain_mri(tmp_path / "empty")


def test_real_slices_in_the_true_layout(shared_data, tmp_path):
    """Sub-volumes of another set with expert masks, written as this set's files: pixels, masks and boxes come back."""
    known = pd.read_csv(shared_data / "brain_mri" / "images.csv").iloc[::8]
    boxes = pd.read_csv(shared_data / "brain_mri" / "boxes.csv")
    for number, (name, file, mask_file) in enumerate(
        zip(known["image_id"], known["file"], known["mask"], strict=True), start=1
    ):
        image = np.asarray(Image.open(shared_data / "brain_mri" / file).convert("L"))
        mask = np.asarray(Image.open(shared_data / "brain_mri" / mask_file).convert("L")) > 0
        write_mat(tmp_path / f"{number}.mat", 2, name[:9], image.astype(np.int16) * 3, mask.astype(np.uint8))
        mine = boxes[boxes["image_id"] == name]
        data_box = mine[["x_min", "y_min"]].min().tolist() + mine[["x_max", "y_max"]].max().tolist()
        known.loc[known["image_id"] == name, EDGES] = data_box
    data = load_brain_mri(tmp_path, size=160)
    for row, (name, file) in enumerate(zip(known["image_id"], known["file"], strict=True)):
        grey = np.asarray(Image.open(shared_data / "brain_mri" / file).convert("L"), dtype=np.float32)
        low, high = grey.min(), grey.max()
        np.testing.assert_allclose(data[row].image[0], (grey - low) / (high - low), atol=1e-6)
        box = data.boxes.loc[data.boxes["image_id"] == str(row + 1), EDGES].to_numpy()[0]
        # Their boxes bound the larger components, the outline bounds all: it may reach further, never less far.
        expected = known.loc[known["image_id"] == name, EDGES].to_numpy(dtype=float)[0]
        assert (box[:2] <= expected[:2]).all()
        assert (box[2:] >= expected[2:]).all()
        assert (data[row].truth[1] & ~data[row].mask[1]).sum() == 0
