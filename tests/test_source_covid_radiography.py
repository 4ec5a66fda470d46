"""COVID-19 Radiography Database: classes, spreadsheets as they are, lung masks, and the images taken from RSNA."""

from __future__ import annotations

import zipfile

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data.files import region
from cxrkit.data.public.covid_radiography import CLASSES, load_covid_radiography
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError, ParameterError

RSNA = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data"
KERMANY = "https://www.kaggle.com/paultimothymooney/chest-xray-pneumonia"
COHEN = "https://github.com/ieee8023/covid-chestxray-dataset"
# As published: the spreadsheet of Normal writes names in capitals.
SHEETS = {
    "COVID": [("COVID-1", COHEN), ("COVID-2", COHEN), ("COVID-10", COHEN)],
    "Lung_Opacity": [("Lung_Opacity-1", RSNA), ("Lung_Opacity-2", RSNA)],
    "Normal": [("NORMAL-1", RSNA), ("NORMAL-2", KERMANY), ("NORMAL-3", KERMANY)],
    "Viral Pneumonia": [("Viral Pneumonia-1", KERMANY)],
}
FILES = {name: [sheet.replace("NORMAL", "Normal") for sheet, _ in rows] for name, rows in SHEETS.items()}


def write_xlsx(path, rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


@pytest.fixture
def folder(tmp_path):
    """Write the download with images of 29 x 29 and masks of 25 x 25 in three channels; returns the root."""

    def write(sheets=SHEETS, below="COVID-19_Radiography_Dataset", files=FILES):
        root = tmp_path / below
        mask = np.zeros((25, 25, 3), np.uint8)
        mask[5:20, :10] = 255
        for name, images in files.items():
            for place in ("images", "masks"):
                (root / name / place).mkdir(parents=True, exist_ok=True)
            for image in images:
                Image.new("L", (29, 29), 120).save(root / name / "images" / f"{image}.png")
                Image.fromarray(mask).save(root / name / "masks" / f"{image}.png")
        for name, rows in sheets.items():
            table = [("FILE NAME", "FORMAT", "SIZE", "URL"), *((row[0], "PNG", "256*256", row[1]) for row in rows)]
            write_xlsx(root / f"{name}.metadata.xlsx", table)
        return tmp_path

    return write


def test_one_class_an_image(folder):
    data = load_covid_radiography(folder(), size=32)
    assert data.labels == CLASSES
    assert data.table["image_id"].tolist() == [name for files in FILES.values() for name in files]  # 2 before 10
    assert (data.table[list(CLASSES)].sum(axis=1) == 1).all()
    assert data.table[list(CLASSES)].sum().tolist() == [3, 2, 3, 1]
    assert data.table["url"].tolist() == [url for rows in SHEETS.values() for _, url in rows]
    assert data.table["patient_id"].is_unique
    assert data[0].image.shape == (1, 32, 32)
    assert data[0].truth is None


def test_the_papers_three_classes(folder):
    data = load_covid_radiography(folder(), classes=["COVID", "Lung_Opacity", "Normal"])
    assert data.labels == ("COVID", "Lung_Opacity", "Normal")
    assert len(data) == 8
    for classes, word in ((["COVID", "Healthy"], "Healthy"), (["COVID", "COVID"], "each once"), ([], "each once")):
        with pytest.raises(ParameterError, match=word):
            load_covid_radiography(folder(), classes=classes)
    with pytest.raises(ParameterError, match="classes='COVID'"):
        load_covid_radiography(folder(), classes="COVID")


def test_the_lung_mask_comes_on_the_grid_of_the_image(folder):
    data = load_covid_radiography(folder(), size=50)
    expected = torch.zeros(50, 50, dtype=torch.bool)
    expected[10:40, :20] = True
    assert torch.equal(region(data, 0), expected)
    part = data.select([4, 7])
    assert torch.equal(region(part, -1), expected)


def test_images_from_rsna_can_be_left_out(folder):
    root = folder()
    data = load_covid_radiography(root, without_rsna=True)
    assert data.table["image_id"].tolist() == [
        "COVID-1", "COVID-2", "COVID-10", "Normal-2", "Normal-3", "Viral Pneumonia-1",
    ]  # fmt: skip
    assert data.table["Lung_Opacity"].sum() == 0
    place = root / "COVID-19_Radiography_Dataset"
    (place / "Lung_Opacity.metadata.xlsx").unlink()
    assert len(load_covid_radiography(root, without_rsna=True)) == 6
    (place / "Normal.metadata.xlsx").unlink()
    with pytest.raises(DataError, match=r"can't tell where the image comes from .*'Normal-1', 'Normal-2', 'Normal-3'"):
        load_covid_radiography(root, without_rsna=True)
    assert load_covid_radiography(root).table["url"].isna().sum() == 5


def test_layouts_as_people_unpack_them(folder):
    assert len(load_covid_radiography(folder(below=""))) == 9
    assert len(load_covid_radiography(folder(below="archive/COVID-19_Radiography_Dataset"))) == 9


def test_a_partial_download(folder, tmp_path):
    root = folder(files={name: files for name, files in FILES.items() if name != "Normal"})
    with pytest.raises(DataError, match=r"holds no image.*: Normal/images"):
        load_covid_radiography(root)
    with pytest.warns(UserWarning, match="Normal/images is not there"):
        data = load_covid_radiography(root, missing="leave_out")
    assert len(data) == 6
    mask = root / "COVID-19_Radiography_Dataset" / "COVID" / "masks" / "COVID-2.png"
    mask.unlink()
    with pytest.raises(DataError, match=r"no mask of its name: images/COVID-2\.png"):
        load_covid_radiography(root, classes=["COVID"])
    data = load_covid_radiography(root, classes=["COVID"], missing="leave_out")
    with pytest.raises(DataError, match="'COVID-2': has no lung_mask"):
        region(data, 1)
    with collecting() as found:
        load_covid_radiography(root)
    assert len(found) == 2
    with pytest.raises(DataError, match="holds no COVID/images"):
        load_covid_radiography(tmp_path / "COVID-19_Radiography_Dataset" / "COVID" / "masks")


def test_folds_and_the_cacheable_door(folder):
    root = folder()
    parts = [cxrkit.data.load("covid_radiography", root, split="test", fold=fold, size=32) for fold in range(5)]
    assert sum(len(part) for part in parts) == 9


# Spreadsheets


def test_spreadsheets_that_are_refused(folder):
    root = folder()
    path = root / "COVID-19_Radiography_Dataset" / "COVID.metadata.xlsx"
    whole = path.read_bytes()
    for content in (b"FILE NAME,URL\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"COVID\.metadata\.xlsx: is not a spreadsheet"):
            load_covid_radiography(root)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(DataError, match="is not a spreadsheet"):
        load_covid_radiography(root)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", " " * (65 * 2**20))
    with pytest.raises(DataError, match="more than 64 MB"):
        load_covid_radiography(root)
    write_xlsx(path, [("NAME", "URL")])
    with pytest.raises(DataError, match="lacks the columns FILE NAME and URL; it has"):
        load_covid_radiography(root)
