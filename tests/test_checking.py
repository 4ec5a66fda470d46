"""All problems of a folder in one go, and counts beside the published ones."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import cxrkit
from cxrkit.data.checking import KINDS, check, counts
from cxrkit.errors import ParameterError


@pytest.fixture
def root(tmp_path):
    """Four sound images and their tables."""
    (tmp_path / "x").mkdir()
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "x" / f"{k}.png")
    write(tmp_path)
    return tmp_path


def write(root, images="", boxes=""):
    rows = "".join(f"i{k},x/{k}.png,p{k},A,48,40\n" for k in range(4))
    (root / "images.csv").write_text("image_id,file,patient_id,labels,width,height\n" + rows + images)
    (root / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\ni1,A,4,4,30,20\n" + boxes)


def look(root, **options):
    found = check("folder", root, workers=0, progress=False, **options)
    assert set(found["kind"]) <= set(KINDS)
    return [(row.kind, os.path.basename(row.file), row.line) for row in found.itertuples()]


def test_a_sound_folder(root):
    assert look(root) == []
    assert check("folder", root, progress=False).columns.tolist() == ["kind", "file", "line", "problem", "value"]
    assert not [path for path in root.iterdir() if path.name not in ("x", "images.csv", "boxes.csv")]


def test_everything_at_once(root):
    (root / "x" / "1.png").write_bytes((root / "x" / "1.png").read_bytes()[:80])
    Image.new("L", (40, 48)).save(root / "x" / "2.png")
    shutil.copy(root / "x" / "0.png", root / "x" / "3.png")
    shutil.copy(root / "x" / "0.png", root / "x" / "more.png")
    write(root, "i9,x/9.png,p9,A,48,40\n", "i1,A,4,4,99,20\ni7,A,4,4,9,9\ni1,A,9,9,4,9\n")
    found = check("folder", root, workers=2, progress=False)
    lines = found.set_index(["kind", found["file"].map(os.path.basename)])["line"]
    assert sorted(found["kind"].value_counts().to_dict().items()) == [
        ("duplicate", 1),
        ("image", 2),
        ("table", 4),
        ("unexpected", 1),
    ]
    assert lines["table", "images.csv"] == 6
    assert sorted(lines["table", "boxes.csv"]) == [3, 4, 5]
    problems = found.set_index(found["file"].map(os.path.basename))["problem"]
    assert "truncated or damaged" in problems["1.png"]
    assert "is 40 x 48 pixels, images.csv says 48 x 40" in problems["2.png"]
    assert "same bytes as the image of another patient" in problems["3.png"]
    assert not problems[["1.png", "2.png"]].str.contains(str(root)).any()
    assert "no image of the source uses" in problems["more.png"]


def test_tables_that_cannot_be_read_at_all(root):
    (root / "images.csv").write_text("image_id\n")
    (root / "x" / "1.png").write_bytes(b"no image")
    assert [(kind, file) for kind, file, _ in look(root)] == [("table", ""), ("image", "1.png")]
    assert [k for k, *_ in look(root / "none")] == ["table"]


def test_a_file_that_goes_while_it_is_checked(root, monkeypatch):
    from cxrkit.data import checking

    read = checking.read

    def read_and_remove(*args, **options):
        dataset = read(*args, **options)
        (root / "x" / "1.png").unlink()
        return dataset

    monkeypatch.setattr(checking, "read", read_and_remove)
    assert ("missing", "1.png") in [(kind, file) for kind, file, _ in look(root)]


def test_pictures_named_in_other_columns_are_expected(root):
    Image.new("L", (48, 40)).save(root / "x" / "mask.png")
    assert [kind for kind, *_ in look(root)] == ["unexpected"]
    text = (
        (root / "images.csv")
        .read_text()
        .replace("height\n", "height,lungs\n")
        .replace(",48,40\n", ",48,40,x/mask.png\n")
    )
    (root / "images.csv").write_text(text)
    assert look(root) == []
    (root / ".hidden").mkdir()
    Image.new("L", (48, 40)).save(root / ".hidden" / "mask.png")
    assert look(root) == []


def test_published_checksums(root, monkeypatch):
    files = [{"path": "images.csv", "md5": "0" * 32}, {"path": "boxes.csv", "bytes": 7}, {"path": "absent", "bytes": 7}]
    monkeypatch.setattr("cxrkit.data.checking.manifest", lambda _: {"files": files})
    assert [found[:2] for found in look(root)] == [("checksum", "images.csv"), ("checksum", "boxes.csv")]


def test_missing_files_do_not_hide_the_rest(root, monkeypatch, tmp_path):
    """A source that can leave out what is missing is checked as far as it is there."""
    from cxrkit.data import folder
    from cxrkit.data.sources import SOURCES, Source

    calls = []

    def load_partial(root, *, size=224, seed=0, missing="refuse"):
        calls.append(missing)
        if missing == "refuse":
            folder.tables.refuse(root / "list.csv", "file does not exist", [(7, "'x/7.png'")])
            raise folder.DataError("can't go on")
        return folder.load_folder(root, size=size)

    monkeypatch.setattr(folder, "load_partial", load_partial, raising=False)
    monkeypatch.setitem(SOURCES, "partial", Source("cxrkit.data.folder", "load_partial"))
    (root / "x" / "1.png").write_bytes(b"no image")
    found = check("partial", root, workers=0, progress=False)
    assert calls == ["refuse", "leave_out"]
    assert found["kind"].tolist() == ["table", "table", "image"]


def test_parameters(root):
    with pytest.raises(ParameterError, match="'fodler' is unknown"):
        check("fodler", root)
    with pytest.raises(ParameterError, match="'label' is unknown"):
        check("folder", root, label=1)
    assert check("phantom", images=2, progress=False).empty


def test_an_option_that_is_wrong_is_told_beside_what_the_tables_hold(root):
    with pytest.raises(ParameterError, match="label_map"):
        check("folder", root, label_map={"C": "A"})
    write(root, images="i9,x/9.png,p9,A,48,40\n")
    found = check("folder", root, workers=0, progress=False, label_map={"C": "A"})
    assert found["problem"][0] == "file does not exist"
    assert found["problem"][1].startswith("label_map ['C'] occur neither")


def test_counts(root):
    data = cxrkit.data.load("folder", root)
    found = counts(data, {"counts": {"images": 5, "labels": {"A": 4}}}).set_index("what")
    assert found.loc["images"].tolist() == [4, 5]
    assert found.loc["positive: A"].tolist() == [4, 4]
    assert found.loc["boxes"].isna().tolist() == [False, True]
    assert counts(data, {})["published"].isna().all()
