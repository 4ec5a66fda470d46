"""Cohen's collection: both vintages of its table, views, patients, lungs, and the real images in its true layout."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.data.files import region
from cxrkit.data.public.covid_cohen import finding_paths, load_covid_cohen
from cxrkit.data.tables import collecting
from cxrkit.errors import DataError, ParameterError

# The header of the last version: it ends with a comma, so its last column has no name.
HEADER = (
    "patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu,"
    "needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count,lymphocyte_count,"
    "view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes,"
)
EDGES = ["x_min", "y_min", "x_max", "y_max"]


def write_table(path, rows, header=HEADER):
    """metadata.csv with the rows given as dictionaries; everything else stays empty, notes hold commas and lines."""
    names = header.split(",")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            given = {"modality": "X-ray", "folder": "images", "clinical_notes": 'Fever, cough;\n"bilateral"', **row}
            writer.writerow([given.get(name, "") for name in names])


def row(patient, finding, filename, view="PA", **more):
    return {"patientid": patient, "finding": finding, "filename": filename, "view": view, **more}


ROWS = [
    row("2", "Pneumonia/Viral/COVID-19", "a.jpeg", offset="0", sex="M", age="65"),
    row("2", "Pneumonia/Viral/COVID-19", "b.jpeg", offset="3", sex="M", age="65"),
    row("13", "Pneumonia/Viral/COVID-19", "lateral.jpeg", "L"),
    row("3", "Pneumonia/Viral/SARS", "c.png", "AP", license="CC BY"),
    row("318a", "No Finding", "d.jpg", "AP Supine"),
    row("9", "Pneumonia/Fungal/Pneumocystis", "000001-1.jpg"),
    row("10", "todo", "000001-1.png"),
    row("11", "Pneumonia", "e.jpg"),
    row("12", "Pneumonia/Viral/COVID-19", "coronacases_001.nii.gz", "Axial", folder="volumes", modality="CT"),
]


@pytest.fixture
def folder(tmp_path):
    """Write the repository with images of 60 x 40 pixels; returns the root."""

    def write(rows=ROWS, header=HEADER, below="covid-chestxray-dataset", images=True):
        root = tmp_path / below
        (root / "images").mkdir(parents=True, exist_ok=True)
        write_table(root / "metadata.csv", rows, header)
        for given in rows if images else ():
            if given["filename"].endswith(("jpg", "jpeg", "png")):
                Image.new("L", (60, 40), 80).save(root / "images" / given["filename"])
        return tmp_path

    return write


def test_paths_become_labels_with_their_parents(folder):
    data = load_covid_cohen(folder(), size=32)
    assert data.labels == (
        "Pneumonia", "Pneumonia/Fungal", "Pneumonia/Fungal/Pneumocystis", "Pneumonia/Viral", "Pneumonia/Viral/COVID-19",
        "Pneumonia/Viral/SARS",
    )  # fmt: skip
    assert data.hierarchy["Pneumonia/Viral/COVID-19"] == "Pneumonia/Viral"
    assert data.hierarchy["Pneumonia/Viral"] == "Pneumonia"
    table = data.table.set_index("image_id")
    assert table.loc["a.jpeg", list(data.labels)].tolist() == [1, 0, 0, 1, 1, 0]
    assert table.loc["c.png", list(data.labels)].tolist() == [1, 0, 0, 1, 0, 1]
    assert table.loc["e.jpg", list(data.labels)].tolist() == [1, 0, 0, 0, 0, 0]
    assert table.loc["d.jpg", list(data.labels)].tolist() == [0] * 6
    assert table.loc["000001-1.png", list(data.labels)].isna().all()
    assert table["patient_id"].tolist() == ["2", "2", "3", "318a", "9", "10", "11"]
    assert table["offset"].tolist()[:2] == [0, 3]
    assert np.isnan(table["offset"].iloc[2])
    assert table["license"].tolist()[2] == "CC BY"
    assert data.boxes.empty
    assert data[0].image.shape == (1, 32, 32)


def test_the_older_table(folder):
    """Until mid 2020: Patientid, findings joined by commas, no RT_PCR column, no comma at the end."""
    header = HEADER.removesuffix(",").replace("patientid", "Patientid").replace("RT_PCR_positive,", "")
    names = ["COVID-19", "COVID-19, ARDS", "ARDS", "SARS", "Streptococcus", "Pneumocystis", "E.Coli", "No Finding"]
    rows = [{**row("", name, f"{k}.jpg"), "Patientid": str(k)} for k, name in enumerate(names)]
    data = load_covid_cohen(folder(rows, header), size=32)
    found = [{label for label in data.labels if value[label] == 1} for _, value in data.table.iterrows()]
    assert found[0] == {"Pneumonia", "Pneumonia/Viral", "Pneumonia/Viral/COVID-19"}
    assert found[1] == found[0] | {"ARDS"}
    assert found[2] == {"ARDS"}
    assert found[3] == {"Pneumonia", "Pneumonia/Viral", "Pneumonia/Viral/SARS"}  # SARS does not hold ARDS
    assert found[4] == {"Pneumonia", "Pneumonia/Bacterial", "Pneumonia/Bacterial/Streptococcus"}
    assert found[6] == {"Pneumonia", "Pneumonia/Bacterial", "Pneumonia/Bacterial/E.Coli"}
    assert found[7] == set()
    assert data.table["patient_id"].tolist() == [str(k) for k in range(8)]


def test_views(folder):
    root = folder()
    assert load_covid_cohen(root, views=("L",), size=32).table["image_id"].tolist() == ["lateral.jpeg"]
    assert len(load_covid_cohen(root, views=["PA", "AP Erect"], size=32)) == 5  # a view that this vintage lacks
    with pytest.raises(ParameterError, match="views='PA'"):
        load_covid_cohen(root, views="PA")
    with pytest.raises(DataError, match=r"no radiograph of the views \['PAA'\]; it has \['AP', 'AP Supine', 'Axial'"):
        load_covid_cohen(root, views=["PAA"])


def test_lungs_from_the_annotations(folder):
    root = folder()
    place = root / "covid-chestxray-dataset" / "annotations" / "lungVAE-masks"
    place.mkdir(parents=True)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 5:25] = 255
    Image.fromarray(mask).save(place / "a_mask.png")
    names = [{"id": 1, "name": "Right Lung"}, {"id": 2, "name": "Left Lung"}]
    images = [{"id": 7, "file_name": "a.jpeg", "width": 60, "height": 40},
              {"id": 8, "file_name": "gone.jpeg", "width": 9, "height": 9},
              {"id": 9, "file_name": "b.jpeg", "width": 60, "height": 40}]  # fmt: skip
    boxed = [{"image_id": 7, "category_id": 1, "bbox": [5, 10, 20, 20]},
             {"image_id": 7, "category_id": 2, "bbox": [35, 10, 20, 22]},
             {"image_id": 8, "category_id": 1, "bbox": [1, 1, 2, 2]},
             {"image_id": 9, "category_id": 1, "bbox": [None] * 4}]  # fmt: skip
    path = place.parent / "imageannotation_ai_lung_bounding_boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": boxed, "categories": names}))
    data = load_covid_cohen(root, size=60)
    assert data.boxes["image_id"].tolist() == ["a.jpeg", "a.jpeg"]
    assert data.boxes["label"].tolist() == ["Right Lung", "Left Lung"]
    assert data.boxes[EDGES].to_numpy().tolist() == [[5, 10, 25, 30], [35, 10, 55, 32]]
    assert not data[0].mask.any()  # lungs are no label
    lung = region(data, 0)
    expected = torch.zeros(60, 60, dtype=torch.bool)
    expected[15:45, 5:25] = True
    assert torch.equal(lung, expected)
    with pytest.raises(DataError, match=r"'b\.jpeg': has no lung_mask"):
        region(data, 1)
    with pytest.raises(DataError, match=r"no mask 'heart'; its masks are \['lung_mask'\]"):
        region(data, 0, "heart")
    with pytest.raises(IndexError):
        region(data, 99)
    path.write_text("{}")
    with pytest.raises(DataError, match="is not the COCO file"):
        load_covid_cohen(root)


@pytest.mark.parametrize(
    ("index", "changes", "problem"),
    [
        (0, {"patientid": ""}, "patientid is empty: row on line 3"),
        (3, {"filename": "a.jpeg"}, "filename occurs twice: row on line 9 "),
        (3, {"filename": ""}, "filename is empty"),
        (3, {"filename": "../a.jpeg"}, "filename leaves the folder"),
        (3, {"filename": "gone.jpeg"}, r"file does not exist .*'gone\.jpeg'"),
    ],
)
def test_rows_that_are_refused(folder, index, changes, problem):
    root = folder()
    rows = [{**given, **changes} if k == index else given for k, given in enumerate(ROWS)]
    write_table(root / "covid-chestxray-dataset" / "metadata.csv", rows)
    with pytest.raises(DataError, match=problem):
        load_covid_cohen(root)
    with collecting() as found:
        data = load_covid_cohen(root)
    assert len(found) == 1
    assert len(data) == 6


def test_a_partial_download(folder):
    root = folder()
    (root / "covid-chestxray-dataset" / "images" / "b.jpeg").unlink()
    with pytest.warns(UserWarning, match="1 of 7 images"):
        data = load_covid_cohen(root, missing="leave_out")
    assert "b.jpeg" not in set(data.table["image_id"])


def test_tables_that_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"metadata\.csv and images"):
        load_covid_cohen(tmp_path)
    root = folder(header=HEADER.replace("patientid", "patient"))
    with pytest.raises(DataError, match=r"lacks the columns \['patientid'\]"):
        load_covid_cohen(root)


def test_finding_paths():
    assert finding_paths("COVID-19, ARDS") == ("Pneumonia/Viral/COVID-19", "ARDS")
    assert finding_paths("Pneumonia/Bacterial/Staphylococcus/MRSA") == ("Pneumonia/Bacterial/Staphylococcus/MRSA",)
    assert finding_paths("No Finding") == ()


def test_the_real_sample_in_the_true_layout(shared_data, tmp_path):
    """208 real images under a metadata.csv of the older kind: labels, patients, days and lung masks as their table."""
    known = pd.read_csv(shared_data / "covid_cohen" / "images.csv", dtype={"patient_id": str}, keep_default_na=False)
    masks = tmp_path / "annotations" / "lungVAE-masks"
    masks.mkdir(parents=True)
    (tmp_path / "images").mkdir()
    rows = []
    for given in known.to_dict("records"):
        name = given["file"].rsplit("/")[-1]
        (tmp_path / "images" / name).symlink_to(shared_data / "covid_cohen" / given["file"])
        if given["lung_mask"]:
            (masks / f"{given['image_id']}_mask.png").symlink_to(shared_data / "covid_cohen" / given["lung_mask"])
        rows.append(row(given["patient_id"], given["finding_raw"], name, given["view"], offset=given["offset"]))
    write_table(tmp_path / "metadata.csv", rows)
    data = load_covid_cohen(tmp_path, size=64)
    assert len(data) == 208
    assert data.table["patient_id"].nunique() == 114
    for given, (_, seen) in zip(known.to_dict("records"), data.table.iterrows(), strict=True):
        expected = set()
        for path in filter(lambda name: name not in ("", "No Finding"), given["labels"].split(";")):
            steps = path.split("/")
            expected |= {"/".join(steps[: depth + 1]) for depth in range(len(steps))}
        assert {label for label in data.labels if seen[label] == 1} == expected, given["image_id"]
        assert (given["offset"] == "") == np.isnan(seen["offset"])
    # The lungs are darker than what surrounds them, and the mask lies on the same grid as the image.
    darker = []
    for index in np.flatnonzero(data.table["lung_mask"].notna())[:20].tolist():
        lung, image = region(data, index), data[index].image[0]
        assert lung.shape == image.shape
        darker.append(bool(image[lung].mean() < image[~lung].mean()))
    assert np.mean(darker) > 0.6
    folds = [cxrkit.data.load("covid_cohen", tmp_path, split="test", fold=k, size=32) for k in range(5)]
    assert sum(len(part) for part in folds) == 208
