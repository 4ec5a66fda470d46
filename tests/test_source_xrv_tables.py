"""The tables that torchxrayvision carries: found without importing it, and second to those in the folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cxrkit.data import sources
from cxrkit.data.public import xrv_tables
from cxrkit.errors import DataError, ParameterError

LABELS = "patientId,x,y,width,height,Target\na,1,2,3,4,1\n"
COLUMNS = ["patientId", "Target"]


def test_the_folder_goes_first(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text(LABELS)
    path, rows = xrv_tables.table_of(tmp_path, "stage_2_train_labels.csv", COLUMNS, "torchxrayvision")
    assert path == tmp_path / "stage_2_train_labels.csv"
    assert rows["patientId"].tolist() == ["a"]
    assert rows.index.tolist() == [2]


def test_the_fallback(tmp_path):
    pytest.importorskip("torchxrayvision")
    path, rows = xrv_tables.table_of(tmp_path, "stage_2_train_labels.csv", COLUMNS, "torchxrayvision")
    assert path.name == "kaggle_stage_2_train_labels.csv.zip"
    assert len(rows) == 30227
    # As read_table gives it: text, and the line of the file as index.
    assert rows.loc[2].tolist() == ["0004cfab-14fd-4e49-80ba-63a80b6bddd6", "", "", "", "", "0"]


def test_what_it_refuses(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="tables='other'"):
        xrv_tables.table_of(tmp_path, "train.csv", COLUMNS, "other")
    with pytest.raises(ParameterError, match="name='kermany'"):
        xrv_tables.annotations("kermany")
    with pytest.raises(DataError, match=r"lacks train.csv; tables='torchxrayvision'"):
        xrv_tables.table_of(tmp_path, "train.csv", COLUMNS, "folder")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(xrv_tables, "_package", lambda: tmp_path)
    with pytest.raises(DataError, match=r"does not carry train.csv"):
        xrv_tables.table_of(tmp_path, "train.csv", COLUMNS, "torchxrayvision")
    monkeypatch.undo()
    monkeypatch.setattr(xrv_tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install torchxrayvision"):
        xrv_tables.annotations("nih")


def test_a_table_with_other_columns(tmp_path):
    pytest.importorskip("torchxrayvision")
    with pytest.raises(DataError, match=r"vinbigdata-train.csv.gz: lacks the columns \['patientId', 'Target'\]"):
        xrv_tables.table_of(tmp_path, "train.csv", COLUMNS, "torchxrayvision")


@pytest.mark.parametrize("name", ["nih", "rsna", "vinbigdata"])
def test_counts_of_the_manifests(name):
    pytest.importorskip("torchxrayvision")
    counts = sources()[name]["counts"]
    found = xrv_tables.annotations(name)
    assert len(found.images) == counts["images"]
    assert found.images["patient_id"].nunique() == counts.get("patients", counts["images"])
    assert len(found.boxes) == counts["boxes"]
    assert found.boxes["image_id"].nunique() == counts["boxed_images"]
    assert found.images[list(found.labels)].sum().to_dict() == counts["labels"]


def test_the_package_is_not_imported():
    pytest.importorskip("torchxrayvision")
    code = (
        "import sys; from cxrkit.data.public import xrv_tables; found = xrv_tables.annotations('rsna'); "
        "print(len(found.images), len(found.boxes), found.labels, 'torchxrayvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["26684", "9555", "('Lung", "Opacity',)", "False"]
