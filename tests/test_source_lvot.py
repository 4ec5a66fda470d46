"""LVOT is private: the loader says so, reads a folder of those who have it, and the phantom stands in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import cxrkit
from cxrkit.data.public.lvot import load_lvot
from cxrkit.errors import DataError


def test_nobody_can_download_it(tmp_path):
    for call in (load_lvot, lambda: load_lvot(tmp_path)):
        with pytest.raises(DataError, match=r'private.*source "folder".*load\("phantom", view="quality"\)'):
            call()


def test_those_who_have_it_load_it_as_a_folder(tmp_path):
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("image_id,file,patient_id,labels\na,a.png,1,LVOT\n")
    (tmp_path / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\na,LVOT,20,10,40,30\n")
    data = cxrkit.data.load("lvot", tmp_path, size=60)
    assert data.name == "lvot"
    assert data.labels == ("LVOT",)
    assert data[0].mask[0, 15:45, 20:40].all()


def test_the_stand_in_has_the_same_shape():
    data = cxrkit.data.load("phantom", view="quality", images=40, size=64)
    assert len(data.labels) == 1
    assert 0.3 < data.table["Local artefact"].mean() < 0.7
    positive = int(np.flatnonzero(data.table["Local artefact"] == 1)[0])
    assert 0 < data[positive].truth.float().mean() < 0.1


def test_load_without_a_folder_says_what_serves_instead():
    with pytest.raises(cxrkit.DataError, match='view="quality"'):
        cxrkit.data.load("lvot")
