"""The tables that torchxrayvision carries: found without importing it, and second to those in the folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cxrkit.data import sources
from cxrkit.data.public import xrv_tables
from cxrkit.errors import DataError, ParameterError


def test_the_folder_goes_first(tmp_path):
    pytest.importorskip("torchxrayvision")
    carried = xrv_tables.table_path(tmp_path, "train.csv", tables="torchxrayvision")
    assert carried.name == "vinbigdata-train.csv.gz"
    (tmp_path / "train.csv").touch()
    assert xrv_tables.table_path(tmp_path, "train.csv", tables="torchxrayvision") == tmp_path / "train.csv"


def test_what_it_refuses(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="name='kermany'"):
        xrv_tables.annotations("kermany")
    with pytest.raises(DataError, match=r"lacks train.csv; tables='torchxrayvision'"):
        xrv_tables.table_path(tmp_path, "train.csv", tables="folder")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(xrv_tables, "_package", lambda: tmp_path)
    with pytest.raises(DataError, match=r"does not carry train.csv"):
        xrv_tables.carried_file("train.csv")
    monkeypatch.undo()
    monkeypatch.setattr(xrv_tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install torchxrayvision"):
        xrv_tables.annotations("nih")


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
