"""Kermany: classes and patients told by file names, both releases, the official parts, and real images."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml
from PIL import Image

import cxrkit
from cxrkit.data.public.kermany import LABELS, SAME_PATIENT, kermany_table, load_kermany
from cxrkit.data.sources import MANIFESTS
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError

KAGGLE = {
    "train/NORMAL": ["IM-0115-0001.jpeg", "NORMAL2-IM-0246-0001-0002.jpeg", "IM-0117-0001.jpeg"],
    "train/PNEUMONIA": ["person1_bacteria_1.jpeg", "person1_bacteria_2.jpeg", "person1000_virus_1681.jpeg"],
    "test/NORMAL": ["NORMAL2-IM-0095-0001.jpeg", "NORMAL2-IM-0096-0001.jpeg"],
    "test/PNEUMONIA": ["person1_virus_6.jpeg", "person3_virus_15.jpeg"],
    "val/NORMAL": ["NORMAL2-IM-1427-0001.jpeg"],
    "val/PNEUMONIA": ["person1946_bacteria_4874.jpeg"],
}


@pytest.fixture
def folder(tmp_path):
    """Write images of 12 x 8 pixels under the names given; returns the folder."""

    def write(names=KAGGLE, below="chest_xray"):
        for place, files in names.items():
            (tmp_path / below / place).mkdir(parents=True, exist_ok=True)
            for file in files:
                Image.new("L", (12, 8), 90).save(tmp_path / below / place / file, format="JPEG")
        return tmp_path

    return write


def test_names_tell_class_and_patient(folder):
    data = load_kermany(folder(), size=32)
    assert data.labels == LABELS == ("Pneumonia", "Pneumonia/Bacterial", "Pneumonia/Viral")
    assert data.hierarchy == {"Pneumonia/Bacterial": "Pneumonia", "Pneumonia/Viral": "Pneumonia"}
    table = data.table.set_index("image_id")
    assert table.index.tolist() == sorted(table.index)
    assert table.loc["person1_bacteria_1", list(LABELS)].tolist() == [1, 1, 0]
    assert table.loc["person1_virus_6", list(LABELS)].tolist() == [1, 0, 1]
    assert table.loc["NORMAL2-IM-0246-0001-0002", list(LABELS)].tolist() == [0, 0, 0]
    patients = table["patient_id"]
    assert patients["person1_bacteria_1"] == patients["person1_virus_6"] == "person1"
    assert patients["NORMAL2-IM-0246-0001-0002"] == "NORMAL2-IM-0246"
    assert patients["IM-0115-0001"] == "IM-0115"
    assert "split" not in table
    assert data[0].image.shape == (1, 32, 32)
    assert data[0].truth is None
    assert not data[0].mask.any()


def test_identical_images_share_a_patient(folder):
    table = kermany_table(folder()).set_index("image_id")["patient_id"]
    assert table["NORMAL2-IM-0095-0001"] == table["NORMAL2-IM-0096-0001"]


def test_the_later_release(folder):
    names = {
        "train/NORMAL": ["NORMAL-1003233-0001.jpeg", "NORMAL-1003233-0002.jpeg"],
        "train/PNEUMONIA": ["BACTERIA-1008087-0001.jpeg", "VIRUS-1980593-0001.jpeg"],
    }
    table = kermany_table(folder(names)).set_index("image_id")
    assert table["patient_id"].tolist() == ["1008087", "1003233", "1003233", "1980593"]
    assert table["finding"].tolist() == ["Bacterial Pneumonia", "No Finding", "No Finding", "Viral Pneumonia"]


@pytest.mark.parametrize("below", ["", "chest_xray", "archive/chest_xray"])
def test_layouts_as_people_unpack_them(folder, below):
    assert len(load_kermany(folder(below=below))) == 12


def test_the_doubled_folder_of_the_kaggle_archive_is_not_counted_twice(folder):
    root = folder()
    folder(below="chest_xray/chest_xray")
    folder(below="chest_xray/__MACOSX")
    assert len(load_kermany(root)) == 12


def test_the_official_split_must_be_asked_for_and_warns(folder):
    root = folder()
    with pytest.warns(UserWarning, match="Patient numbers recur.*Of the test images, 1 "):
        data = cxrkit.data.load("kermany", root, split_by="official", size=32)
    assert data.table["split"].value_counts().to_dict() == {"train": 6, "test": 4, "validation": 2}
    parts = {fold: cxrkit.data.load("kermany", root, split="test", fold=fold, size=32) for fold in range(5)}
    tested = [image for part in parts.values() for image in part.table["image_id"]]
    assert sorted(tested) == load_kermany(root).table["image_id"].tolist()
    of = pd.concat([part.table.assign(fold=fold) for fold, part in parts.items()])
    assert of.groupby("patient_id")["fold"].nunique().max() == 1


@pytest.mark.parametrize(
    ("place", "file", "problem"),
    [
        ("train/NORMAL", "scan12.jpeg", "tells neither class nor patient .*: train/NORMAL/scan12.jpeg"),
        ("train/NORMAL", "person7_virus_20.jpeg", "disagree about the class: train/NORMAL/person7_virus_20.jpeg"),
        ("test/PNEUMONIA", "IM-0500-0001.jpeg", "disagree about the class: test/PNEUMONIA/IM-0500-0001.jpeg"),
        ("test/PNEUMONIA", "person1_bacteria_1.jpeg", "in two folders: test/PNEUMONIA/person1_bacteria_1.jpeg"),
    ],
)
def test_files_that_are_refused(folder, place, file, problem):
    root = folder({**KAGGLE, place: [*KAGGLE[place], file]})
    with pytest.raises(DataError, match=problem):
        load_kermany(root)
    with collecting() as found:
        data = load_kermany(root)
    assert len(found) == 1
    assert len(data) == 12


def test_folders_that_are_refused(tmp_path, folder):
    with pytest.raises(DataError, match="holds no train/NORMAL"):
        load_kermany(tmp_path)
    (tmp_path / "train" / "NORMAL").mkdir(parents=True)
    with pytest.raises(DataError, match="hold no picture"):
        load_kermany(tmp_path)


def test_a_file_that_is_no_picture_is_named_when_it_is_read(folder):
    root = folder()
    (root / "chest_xray" / "train" / "NORMAL" / "IM-0115-0001.jpeg").write_bytes(b"")
    data = load_kermany(root, size=32)
    with pytest.raises(DataError, match=r"'IM-0115-0001'.*empty"):
        data[0]


def test_the_real_sample_in_the_true_layout(shared_data, tmp_path):
    """474 images of the test part, laid out as the download has them: the same labels and patients as their table."""
    known = pd.read_csv(shared_data / "kermany" / "images.csv").sort_values("image_id", ignore_index=True)
    for name, labels, file in zip(known["image_id"], known["labels"], known["file"], strict=True):
        place = tmp_path / "chest_xray" / "test" / ("NORMAL" if labels == "No Finding" else "PNEUMONIA")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.jpeg").symlink_to(shared_data / "kermany" / file)
    data = load_kermany(tmp_path, size=64)
    table = data.table
    assert table["image_id"].tolist() == known["image_id"].tolist()
    assert table["patient_id"].tolist() == known["patient_id"].replace(SAME_PATIENT).tolist()
    for label in LABELS[1:]:
        assert ((known["labels"] == label) == (table[label] == 1)).all()
    assert table["Pneumonia"].sum() == 180 + 116
    assert 0.05 < data[0].image.mean() < 0.95
    # Byte-identical images carry one patient id.
    copies = known.groupby("sha256")["image_id"].agg(list)
    copies = [names for names in copies if len(names) > 1]
    assert len(copies) == 6
    of = table.set_index("image_id")["patient_id"]
    assert all(of[names].nunique() == 1 for names in copies)
    manifest = yaml.safe_load((MANIFESTS / "kermany.yaml").read_text(encoding="utf-8"))
    for names in copies:
        assert any(all(name in trap for name in names) for trap in manifest["traps"]), names
