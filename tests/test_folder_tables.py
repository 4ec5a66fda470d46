"""Tables of the folder source as Kaggle, hospitals and spreadsheets write them: read right, told, or refused."""

from __future__ import annotations

import csv
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cxrkit
from cxrkit.data.checking import check, counts
from cxrkit.data.folder import load_folder
from cxrkit.data.labels import is_none, nearest, read_labels, spelling
from cxrkit.errors import DataError, ParameterError

IMAGES = "image_id,file,patient_id,labels\na,x/a.png,1,Mass\nb,x/b.png,2,Edema\nc,x/c.png,3,\nd,x/d.png,4,No Finding\n"
BOXES = "image_id,label,x_min,y_min,x_max,y_max\n"


@pytest.fixture
def folder(tmp_path):
    """Write a folder of four 80 x 40 images and the tables given; returns its path."""
    (tmp_path / "x").mkdir()
    for name in "abcd":
        Image.fromarray(np.full((40, 80), 50, np.uint8)).save(tmp_path / "x" / f"{name}.png")

    def write(images=IMAGES, boxes=None):
        for name, text in (("images.csv", images), ("boxes.csv", None if boxes is None else BOXES + boxes)):
            if text is not None:
                (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def labelled(*cells: str) -> str:
    text = io.StringIO()
    csv.writer(text).writerows((name, f"x/{name}.png", name, cell) for name, cell in zip("abcd", cells, strict=False))
    return IMAGES.split("\n")[0] + "\n" + text.getvalue()


def read(root, **options):
    """The dataset and the warnings of reading it, of which there is one at most."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = load_folder(root, **options)
    assert len(told) <= 1
    text = str(told[0].message) if told else ""
    assert all(notice in text for notice in data.notices) or options
    return data, text


def targets(data) -> list[set[str]]:
    return [{label for label in data.labels if row[label] == 1} for row in data.table.to_dict("records")]


# Labels


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["Mass", "No finding", "no_finding", "NO FINDINGS."], ["Mass", "", "", ""]),
        (["Mass", "NoFinding", "No-Finding", " no  finding "], ["Mass", "", "", ""]),
        (["Mass|Edema", "Edema", "No Finding", "|Mass|"], ["Edema Mass", "Edema", "", "Mass"]),
        (["Mass; Edema ;", " Edema", ";", " ; "], ["Edema Mass", "Edema", "", ""]),
        (["['Mass', 'Edema']", '["Edema"]', "[]", "[Mass]"], ["Edema Mass", "Edema", "", "Mass"]),
        (["['Mass' 'Edema']", "{'Mass'}", "set()", "('Edema',)"], ["Edema Mass", "Mass", "", "Edema"]),
        (["Mass,Edema", "Edema", "Mass", ""], ["Edema Mass", "Edema", "Mass", ""]),
        (["Mass\nEdema", "Edema\tMass", "'Mass'", '"Mass"'], ["Edema Mass", "Edema Mass", "Mass", "Mass"]),
        (["Mass,", "Mass\u00a0", "Pleural  effusion", "Pleural effusion"], ["Mass", "Mass", *["Pleural effusion"] * 2]),
        (["\u00e9dema", "e\u0301dema", "", ""], ["\u00e9dema", "\u00e9dema", "", ""]),
        (["P / V", "P/V", "/P", "P/"], ["P P/V", "P P/V", "P", "P"]),
        (["A-", "A+", "A", "T1"], ["A-", "A+", "A", "T1"]),
    ],
)
def test_labels_that_are_sure_are_read(folder, cells, right):
    data, told = read(folder(labelled(*cells)))
    expected = [{one} if " e" in one else set(one.split()) for one in right]
    assert (targets(data), told) == (expected, "")


WRITERS = [
    *(";".join, "|".join, " ; ".join, "\n".join, str, json.dumps, lambda names: str(np.array(names, dtype=object))),
    lambda names: str(tuple(names)),
    lambda names: str(set(names)) if names else "set()",
    lambda names: ";".join(names) + ";",
    lambda names: ";".join(names) or "No finding",
]


@given(st.lists(st.tuples(st.sets(st.sampled_from(["Mass", "Edema", "Pleural effusion"])), st.sampled_from(WRITERS))))
def test_however_sets_of_labels_are_written_they_are_read(written):
    cells = pd.Series([write(sorted(names)) for names, write in written], range(2, len(written) + 2), dtype=object)
    read = read_labels(Path("images.csv"), cells, (), {}, "/", None)
    assert [read.found[cell] for cell in read.cell] == [names for names, _ in written]
    assert read.notices == []


@pytest.mark.parametrize(
    ("cells", "right", "words"),
    [
        (["Mass", "nan", "None", "NULL"], ["Mass", "", "", ""], "'NULL', 'None', 'nan' (3 rows, the first on line 3)"),
        (["Mass", "N/A", "-", "[nan]"], ["Mass", "", "", ""], "hold a missing value, read as no finding"),
        (["Mass", "Normal", "Normal", ""], ["Mass", "Normal", "Normal", ""], "label_map={'Normal': 'No Finding'}"),
        (["Mass", "no acute disease", "", ""], ["Mass", "no acute disease", "", ""], "label_map={'no acute disease':"),
        (["0", "1", "1", "14"], ["0", "1", "1", "14"], "all labels are numbers"),
        (["Mass", "0", "Edema", ""], ["Mass", "0", "Edema", ""], "some labels are numbers or yes and no: 0"),
        (
            ["P, viral", "P, viral", "Mass", ""],
            ["P, viral", "P, viral", "Mass", ""],
            "'P, viral' (2 rows, the first",
        ),
        (["Mass + Edema", "Mass", "Edema", ""], ["Mass + Edema", "Mass", "Edema", ""], "its parts are labels"),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_told(folder, cells, right, words):
    data, told = read(folder(labelled(*cells)))
    assert targets(data) == [{one} - {""} for one in right]
    assert words in told
    assert data.notices == tuple(told.partition(": ")[2].split("\n  "))


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["Mass", "mass", "Mass", ""], ["'Mass' (2 images)", "label_map={'mass': 'Mass'}", "line 3 ('mass')"]),
        (["A_b", "A b", "A-b", ""], ["label_map={'A-b': 'A b', 'A_b': 'A b'}", "line 2", "line 4"]),
        (["P/V", "P/v", "", ""], ["label_map={'P/v': 'P/V'}"]),
        (["Mass,Edema", "Edema", "", ""], ["label_separator=','", "label_separator=';'", "line 2 ('Mass,Edema')"]),
        (["No finding;Mass", "", "", ""], ["'No Finding' beside a finding", "line 2"]),
        (["Mass;Normal", "Normal", "", ""], ["'No Finding' beside a finding", "line 2"]),
    ],
)
def test_labels_that_are_not_sure_are_refused(folder, cells, words):
    options = {"label_map": {"Normal": "No Finding"}} if "Normal" in cells else {}
    with pytest.raises(DataError) as caught:
        load_folder(folder(labelled(*cells)), **options)
    for word in ("images.csv", *words):
        assert word in str(caught.value)


def test_the_cures_cure(folder):
    def cured(*cells, **options):
        data, told = read(folder(labelled(*cells)), **options)
        assert told == ""
        return targets(data)

    assert cured("Mass", "mass", label_map={"mass": "Mass"}) == [{"Mass"}, {"Mass"}]
    assert cured("Mass", "Normal", label_map={"Normal": "No Finding"}) == [{"Mass"}, set()]
    assert cured("Mass", "No finding", label_map={"No finding": "Normal"}) == [{"Mass"}, {"Normal"}]
    assert cured("Mass", "NA", label_map={"NA": "Not assessed"}) == [{"Mass"}, {"Not assessed"}]
    assert cured("Mass", "Normal", labels=["Mass", "Normal"]) == [{"Mass"}, {"Normal"}]
    assert cured("Mass,Edema", "Edema", label_separator=",") == [{"Mass", "Edema"}, {"Edema"}]
    assert cured("Mass,Edema", "Edema", label_separator=";") == [{"Mass,Edema"}, {"Edema"}]
    assert cured("A|B+C", "['A']", label_separator="+") == [{"A|B", "C"}, {"A"}]


def test_a_label_map_that_matches_nothing_is_refused(folder):
    root = folder(boxes="a,mass,1,2,10,12\n")
    for wrong, words in (
        ({"Maas": "Mass"}, r"label_map \['Maas'\] occur neither in images.csv nor in boxes.csv; did you mean 'Mass'"),
        ({"Mass": None}, "label_map=.* give old names and new ones"),
        ({"Mass": " "}, "label_map=.* give old names and new ones"),
        ("Mass", "label_map='Mass': give old names"),
        ({"mass": "Mass", "x": "y"}, r"label_map \['x'\] occur neither"),
    ):
        with pytest.raises(ParameterError, match=words):
            load_folder(root, label_map=wrong)
    with pytest.raises(ParameterError, match="did you mean 'Mass'"):
        load_folder(root, labels=["Masss"])
    for options in ({"label_separator": ""}, {"label_separator": [","]}, {"hierarchy_separator": ["/"]}):
        with pytest.raises(ParameterError, match=rf"{next(iter(options))}=.*: give the sign, such as '.', or None"):
            load_folder(root, **options)


def test_spellings():
    assert spelling("Pleural_Thickening") == spelling("pleural  thickening") == spelling("PLEURAL-Thickening")
    assert len({spelling(name) for name in ("A", "A-", "A+", "B", "a b")}) == 5
    assert nearest("Pleural Thickening", ["Mass", "Pleural_Thickening"]) == "Pleural_Thickening"
    assert nearest("Fracture", ["Mass", "Fibrosis"]) is None
    assert [is_none(name) for name in ("No finding", "Normal", "Nodule")] == [True, False, False]


# Boxes


def test_boxes_whose_label_no_image_carries_are_counted(folder):
    root = folder(boxes="a,Mass,1,2,10,12\na,mass,1,3,10,12\nb,Opacity,1,2,10,12\nb,Opacity,2,2,10,12\n")
    data, told = read(root)
    for words in ("boxes.csv: 3 of 4 boxes make no mask", "'Opacity' (2)", "'mass' (1; images.csv has 'Mass')"):
        assert words in told
    assert "label_map={'mass': 'Mass'}" in told
    assert "labels=[..., 'Opacity']" in told
    assert "4 boxes (3 without a mask)" in repr(data)
    assert len(data.maskless_boxes) == 3
    found = check("folder", root, workers=0, progress=False)
    found = found[found["kind"] == "notice"]
    assert found["problem"].tolist() == list(data.notices)
    numbers = counts(data, {}).set_index("what")["loaded"]
    assert numbers["boxes without mask"] == 3
    both = {"label_map": {"mass": "Mass"}, "labels": ["Mass", "Opacity"]}
    cured, told = read(root, **both)
    assert told == ""
    assert repr(cured).endswith("4 boxes, size 224)")


def test_what_an_option_leaves_out_is_noted_without_a_warning(folder):
    rows = "a,Mass,1,2,10,12,R1\nb,Edema,1,2,10,12,R2\nb,Opacity,1,2,10,12,R1\n"
    root = folder()
    (root / "boxes.csv").write_text(BOXES.strip() + ",reader\n" + rows)
    data, told = read(root, labels=["Mass"], readers="R1")
    assert told == ""
    assert data.notices == (
        "readers= leaves out 1 of 3 boxes",
        "labels= leaves out 1 labels of images.csv: Edema",
        "labels= leaves 1 of 2 boxes without a mask",
    )
    (root / "boxes.csv").write_text(BOXES + "a,mass,1,2,10,12\n")
    assert "images.csv has 'Mass'" in read(root, labels=["Mass"])[1]
    split = IMAGES.replace("labels\n", "labels,split\n").replace("Mass\n", "Mass,train\n")
    split = split.replace("Edema\n", "Edema,test\n").replace("3,\n", "3,,test\n").replace("Finding\n", "Finding,test\n")
    assert (
        cxrkit.data.load("folder", folder(split), split="test").notices[-1] == "split='test' leaves out 1 of 4 images"
    )
    assert cxrkit.data.load("folder", root).select([0]).notices == cxrkit.data.load("folder", root).notices


def test_boxes_of_a_label_that_their_image_lacks_are_counted(folder):
    data, _ = read(folder(boxes="a,Mass,1,2,10,12\nb,Mass,1,2,10,12\nc,Edema,1,2,10,12\n"))
    numbers = counts(data, {}).set_index("what")["loaded"]
    assert numbers["boxes of labels that their image lacks"] == 2
    assert counts(data.select([2]), {}).set_index("what")["loaded"]["boxes without mask"] == 0
    empty, _ = read(folder(labelled("", "", "", ""), "a,Mass,1,2,10,12\n"))
    assert counts(empty, {}).set_index("what")["loaded"]["boxes without mask"] == 1


def test_boxes_that_the_labels_of_their_image_deny_are_told(folder):
    data, told = read(folder(boxes="a,Mass,1,2,10,12\nb,Mass,1,2,10,12\nd,Edema,1,2,10,12\n"))
    assert "2 of 3 boxes are of a label that images.csv denies their image, such as 'Mass' of 'b'" in told
    assert data.denied_boxes["image_id"].tolist() == ["b", "d"]
    assert counts(data, {}).set_index("what")["loaded"]["boxes of labels that their image lacks"] == 2
    assert not read(folder(boxes="a,Mass,1,2,10,12\nb,Other,1,2,10,12\n"), labels=["Mass", "Other"])[1]


def test_readers_are_those_of_the_table_and_their_labels_those_they_boxed(folder):
    root = folder()
    header = "image_id,label,reader,x_min,y_min,x_max,y_max\n"
    (root / "boxes.csv").write_text(header + "a,Mass,R1,1,2,10,12\na,Other,R1,1,2,10,12\nd,No finding,R2,,,,\n")
    data, _ = read(root, readers=["R2"])
    assert len(data.boxes) == 0
    assert "readers= leaves out 2 of 2 boxes" in data.notices
    with pytest.raises(ParameterError, match=r"\['R3'\] are not in the column reader.*\['R1', 'R2'\]"):
        load_folder(root, readers=["R3"])
    with pytest.raises(ParameterError, match=r"\['Other'\] occur neither in images.csv nor in the boxes of readers"):
        load_folder(root, readers=["R2"], labels=["Other"])


@pytest.mark.parametrize("value", ["no", "off", 0, 1.0, None])
def test_options_that_are_true_or_false_take_nothing_else(folder, value):
    with pytest.raises(ParameterError, match=r"option window=.*use true or false"):
        cxrkit.data.load("folder", folder(), window=value)


def test_none_in_words_with_a_slash_is_told(folder):
    names = ["Lung Opacity", "No Lung Opacity / Not Normal", "Normal", ""]
    _, told = read(folder(labelled(*names)))
    for name in ("No Lung Opacity", "No Lung Opacity/Not Normal", "Normal"):
        assert f"label_map={{{name!r}: 'No Finding'}}" in told
    rename = dict.fromkeys(("No Lung Opacity", "No Lung Opacity/Not Normal", "Normal"), "No Finding")
    data, told = read(folder(labelled(*names)), label_map=rename)
    assert (data.labels, told) == (("Lung Opacity",), "")


def test_rows_that_say_no_finding_hold_no_box(folder):
    rows = "a,No finding,,,,\nb,No finding,0,0,1,1\nc,,,,,\nd,nan,nan,nan,nan,nan\na,Mass,1,1,5,5\n"
    data, told = read(folder(boxes=rows))
    assert len(data.boxes) == 1
    assert "4 of 5 rows say that there is no finding" in told


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,Mass,0.1,0.2,0.5,0.6\n", ["holds no whole pixel", "multiply x by the width", "line 2"]),
        ("a,Mass,1,2,30,30\na,Mass,0,0,1,1.2\n", ["holds no whole pixel", "line 3"]),
        ("a,Mass,5,60,15,75\nb,Edema,0,50,20,70\n", ["outside its image; x and y seem swapped", "line 2", "line 3"]),
        ("a,Mass,30,2,10,12\n", ["no area", "ends swapped", "line 2"]),
        ("a,Mass,60,20,10,12\n", ["no area", "x_max and y_max may be width and height"]),
        ("a,Mass,60,20,120,30\n", ["the box lies outside its image: row"]),
        ('a,Mass,"1,5",2,10,12\n', ["x_min is not a number (12,5 is written 12.5)", "line 2"]),
        ("a,nan,1,2,10,12\n", ["label is empty", "line 2"]),
        ("A,Mass,1,2,10,12\n", ["image_id is not in images.csv; did you mean 'a'?", "line 2 ('A')"]),
        ("x/a.PNG,Mass,1,2,10,12\n", ["did you mean 'a'?"]),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused_with_the_cure(folder, rows, words):
    with pytest.raises(DataError) as caught:
        load_folder(folder(boxes=rows))
    for word in ("boxes.csv", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,Mass,1,1,81,41\n", "1 of 1 boxes end one pixel beyond their image and are clipped, as if counted from 1"),
        ("a,Mass,1,1,80,40\nb,Edema,5,5,9,9\n", "no box begins at 0, some at 1, and 1 end at the border"),
        ("a,Mass,0,0,79,39\nb,Edema,5,5,9,9\n", "1 of 2 boxes end at the last pixel, none at the border"),
        ("a,Mass,5,5,9,9\na,Mass,5,5,9,9\n", "1 of 2 boxes repeat another"),
        ("a,Mass,0,0,80,40\nb,Edema,5,5,79,39\n", ""),
        ("a,Mass,0,0,79.5,39\n", ""),
        ("a,Mass,1,1,9,9\n", ""),
        ("a,Mass,0,0,80.4,40.2\n", ""),
    ],
)
def test_coordinates_that_seem_counted_otherwise_are_told(folder, rows, words):
    _, told = read(folder(boxes=rows))
    assert words in told
    assert bool(words) == bool(told)


def test_boxes_in_original_pixels_are_told(folder):
    images = "image_id,file,patient_id,labels,width,height,orig_width,orig_height\na,x/a.png,1,Mass,80,40,800,400\n"
    with pytest.raises(DataError, match="it seems to be in original pixels"):
        load_folder(folder(images, "a,Mass,100,100,700,300\n"))


@pytest.mark.parametrize("names", ["x,y,width,height", "x_min,y_min,w,h"])
def test_boxes_as_corner_and_size_are_refused_with_the_cure(folder, names):
    root = folder(boxes="")
    (root / "boxes.csv").write_text(f"image_id,label,{names}\na,Mass,1,2,3,4\n")
    with pytest.raises(DataError, match=r"lacks the columns.*x_max = x \+ width"):
        load_folder(root)


# Spreadsheets


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.replace(",", ";"),
        IMAGES.replace(",", "\t"),
        "sep=;\r\n" + IMAGES.replace(",", ";").replace("\n", "\r\n"),
        "\ufeff" + IMAGES.replace("image_id,file,patient_id,labels", "Image_ID , FILE, Patient ID,Labels"),
        IMAGES.replace("\n", ",,\n"),
        "\n".join(f"{row - 1 if row else ''},{line}" for row, line in enumerate(IMAGES.strip().split("\n"))),
        IMAGES.replace("x/", "x\\"),
        IMAGES.replace("x/", ".\\x\\"),
        IMAGES.replace(",x/a.png,", ' , "x/a.png" , ').replace(' "x', '"x').replace('png" ', 'png"'),
    ],
)
def test_tables_as_spreadsheets_write_them(folder, images):
    data, told = read(folder(images, "a,Mass,1,2,10,12\n"), size=32)
    assert (targets(data), told) == ([{"Mass"}, {"Edema"}, set(), set()], "")
    assert data[0].mask.any()
    assert data.table["patient_id"].tolist() == ["1", "2", "3", "4"]


def test_boxes_with_other_signs_and_names(folder):
    root = folder()
    (root / "boxes.csv").write_text("Image ID;Label;Xmin;ymin;X_MAX;y-max;Reader\na;Mass;1;2;10.5;12;me\n")
    assert read(root)[0].boxes.to_numpy().tolist() == [["a", "Mass", 1, 2, 10.5, 12, "me"]]


def test_a_split_column_in_capitals_is_the_split(folder):
    images = IMAGES.replace("labels\n", "labels,Split\n").replace("Mass\n", "Mass,train\n")
    images = (
        images.replace("Edema\n", "Edema,test\n").replace("3,\n", "3,,test\n").replace("Finding\n", "Finding,test\n")
    )
    assert cxrkit.data.load("folder", folder(images)).table["split"].tolist() == ["train", "test", "test", "test"]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.replace("png,1", "png,12").replace("png,2", "png,12.0"), "'12.0', on line 3, may be '12'"),
        (IMAGES.replace("png,1", "png,007").replace("png,2", "png,7"), "'7', on line 3, may be '007'"),
        (IMAGES.replace("png,1", "png,P1").replace("png,2", "png,p1"), "'p1', on line 3, may be 'P1'"),
        (IMAGES.replace("png,1", "png,1.2E+15"), "1 cells of patient_id are shortened numbers, such as '1.2E+15'"),
        (IMAGES.replace("b.png", "a.png"), "2 rows share a file with another patient's, such as 'x/a.png' on line 2"),
        (IMAGES.replace("png,1", "png,NA"), ""),
    ],
)
def test_ids_that_a_spreadsheet_may_have_changed_are_told(folder, images, words):
    _, told = read(folder(images))
    assert words in told
    assert bool(words) == bool(told)


@pytest.mark.parametrize(
    ("images", "boxes", "words"),
    [
        (IMAGES.replace("a,x", "001,x"), "1,Mass,1,2,3,4\n", ["did you mean '001'?", "line 2 ('1')"]),
        (IMAGES.replace("a,x", "12,x"), "12.0,Mass,1,2,3,4\n", ["did you mean '12'?"]),
        (IMAGES.replace("png,1", "png,nan"), None, ["patient_id is empty", "line 2 ('nan')"]),
        (IMAGES.replace("b,x", "a,x"), None, ["image_id occurs twice", "one row", "line 3 ('a')"]),
        (IMAGES.replace("a.png", "a.PNG"), None, ["file does not exist (there is 'x/a.png')", "line 2 ('x/a.PNG')"]),
        (IMAGES.replace("a.png", "a"), None, ["there is 'x/a.png'"]),
        (IMAGES.replace("labels", "Finding Labels"), None, ["is 'Finding Labels' meant to be 'labels'?"]),
        (IMAGES.encode("utf-16"), None, ["not UTF-8", "save it as CSV in UTF-8"]),
    ],
)
def test_tables_that_a_spreadsheet_broke_are_refused_with_the_cure(folder, images, boxes, words):
    with pytest.raises(DataError) as caught:
        load_folder(folder(images, boxes))
    for word in words:
        assert word in str(caught.value)
