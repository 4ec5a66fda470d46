"""Boxes described: sizes, unions and agreement, each against a slow count."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

import cxrkit
from cxrkit.data import box_statistics
from cxrkit.errors import ParameterError

COLUMNS = ["image_id", "label", "reader", "x_min", "y_min", "x_max", "y_max"]


def boxes(rows):
    return pd.DataFrame(rows, columns=COLUMNS)


def random_boxes(seed, n, images=4, labels="AB", readers="rst", side=24):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, side - 1, (n, 2))
    high = low + 1 + (rng.random((n, 2)) * (side - 1 - low)).astype(int)
    return pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in rng.integers(0, images, n)],
            "label": rng.choice(list(labels), n),
            "reader": rng.choice(list(readers), n),
            "x_min": low[:, 0],
            "y_min": low[:, 1],
            "x_max": high[:, 0],
            "y_max": high[:, 1],
        }
    )


def frames(images=4, width=24.0, height=24.0):
    ids = pd.Index([f"i{k}" for k in range(images)], name="image_id")
    return pd.DataFrame({"width": width, "height": height}, index=ids)


def painted(rows, side=24):
    """Boxes of whole pixels, painted one by one."""
    mask = np.zeros((side, side), dtype=bool)
    for row in rows.itertuples():
        mask[row.y_min : row.y_max, row.x_min : row.x_max] = True
    return mask


def test_geometry_by_hand():
    table = box_statistics.box_geometry(boxes([("i0", "A", "r", 10, 20, 30, 60)]), frames(1, 100.0, 200.0))
    row = table.iloc[0]
    assert (row["width"], row["height"], row["area"]) == pytest.approx((0.2, 0.2, 0.04))
    assert (row["centre_x"], row["centre_y"], row["aspect"]) == pytest.approx((0.2, 0.2, 0.5))
    assert (row["image_id"], row["label"], row["reader"]) == ("i0", "A", "r")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(0, 40))
def test_unions_agree_with_painting(seed, n):
    given_boxes = random_boxes(seed, n)
    for by in (["image_id"], ["image_id", "label"], ["label", "image_id", "reader"]):
        table = box_statistics.union_shares(given_boxes, frames(), by).set_index(by)
        grouped = given_boxes.groupby(by)
        assert len(table) == grouped.ngroups
        for key, rows in grouped:
            got = table.loc[key if len(by) > 1 else key[0]]
            assert got["share"] == pytest.approx(painted(rows).sum() / 24**2)
            areas = (rows["x_max"] - rows["x_min"]) * (rows["y_max"] - rows["y_min"])
            assert got["sum"] == pytest.approx(areas.sum() / 24**2)
            assert got["boxes"] == len(rows)


def test_unions_of_fractions_and_of_nothing():
    edges = [(0.25, 0, 1.75, 1), (1.5, 0.5, 2.5, 1.5), (9, 9, 9, 9)]
    np.testing.assert_allclose(box_statistics.union_areas(edges, [0, 0, 2], 4), [1.5 + 1 - 0.125, 0, 0, 0])
    assert box_statistics.union_areas(np.empty((0, 4)), [], 0).shape == (0,)
    assert box_statistics.union_shares(boxes([]), frames()).empty


def test_blocks_do_not_matter(monkeypatch):
    given_boxes = random_boxes(1, 200, images=60)
    whole = box_statistics.union_shares(given_boxes, frames(60))
    monkeypatch.setattr(box_statistics, "_CELLS", 100)
    pd.testing.assert_frame_equal(whole, box_statistics.union_shares(given_boxes, frames(60)))


def test_chance_level_counts_images_or_area():
    rows = boxes([("i0", "A", "r", 0, 0, 10, 10), ("i1", "A", "r", 0, 0, 10, 10)])
    sizes = frames(2)
    sizes.loc["i0"], sizes.loc["i1"] = [10.0, 20.0], [100.0, 10.0]
    level = box_statistics.chance_level(box_statistics.union_shares(rows, sizes))
    assert level["mean"] == pytest.approx((0.5 + 0.1) / 2)
    assert level["area_weighted"] == pytest.approx(200 / 1200)
    assert level["images"] == 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(0, 30))
def test_box_agreement_agrees_with_painting(seed, n):
    given_boxes = random_boxes(seed, n)
    table = box_statistics.box_agreement(given_boxes)
    expected = {}
    for (image, label), rows in given_boxes.groupby(["image_id", "label"]):
        masks = {reader: painted(of_reader) for reader, of_reader in rows.groupby("reader")}
        for one, other in combinations(sorted(masks), 2):
            iou = (masks[one] & masks[other]).sum() / (masks[one] | masks[other]).sum()
            expected[image, label, one, other] = pytest.approx(iou, abs=1e-9)
    keys = table[["image_id", "label", "reader_a", "reader_b"]].itertuples(index=False, name=None)
    assert dict(zip(keys, table["iou"], strict=True)) == expected


# Agreement on labels


def test_fleiss_by_hand():
    # Three images by three readers: (3 yes), (0 yes), (1 yes).
    # Agreement: 1, 1, (0 + 2) / 6; mean 7/9. Share of yes 4/9: chance 16/81 + 25/81.
    assert box_statistics.fleiss_kappa([3, 0, 1], [3, 3, 3]) == pytest.approx((7 / 9 - 41 / 81) / (1 - 41 / 81))
    assert box_statistics.fleiss_kappa([2, 0], [2, 2]) == 1
    assert np.isnan(box_statistics.fleiss_kappa([3, 3], [3, 3]))
    assert np.isnan(box_statistics.fleiss_kappa([], []))
    for wrong in (([1], [1]), ([3], [2]), ([-1], [2])):
        with pytest.raises(ParameterError, match="two readers or more"):
            box_statistics.fleiss_kappa(*wrong)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), n=st.integers(2, 60), rate=st.floats(0.1, 0.9))
def test_kappas_agree_with_definitions(seed, n, rate):
    rng = np.random.default_rng(seed)
    votes = rng.random((n, 2)) < rate
    votes[0] = [True, False]
    assert box_statistics.cohen_kappa(votes[:, 0], votes[:, 1]) == pytest.approx(cohen_kappa_score(*votes.T), abs=1e-9)
    readers = rng.integers(2, 5, n)
    answers = [rng.random(count) < rate for count in readers]
    answers[0][:2] = [True, False]
    agree = np.mean([np.mean([a == b for a, b in combinations(each, 2)]) for each in answers])
    share = np.concatenate(answers).mean()
    chance = share**2 + (1 - share) ** 2
    got = box_statistics.fleiss_kappa([each.sum() for each in answers], readers)
    assert got == pytest.approx((agree - chance) / (1 - chance), abs=1e-9)


def test_label_agreement_by_reader_and_image():
    rng = np.random.default_rng(0)
    readings = pd.DataFrame(
        [(f"i{k}", reader) for k in range(80) for reader in rng.choice(list("rstu"), 3, replace=False)],
        columns=["image_id", "reader"],
    )
    readings = pd.concat([readings, pd.DataFrame([("alone", "r")], columns=readings.columns)])
    drawn = readings[rng.random(len(readings)) < 0.4]
    rows = boxes([(image, "A", reader, 0, 0, 5, 5) for image, reader in drawn.to_numpy()])
    rows = pd.concat([rows, rows.head(7)])  # a second box of the same label is no second vote
    table = box_statistics.label_agreement(rows, readings, ["A", "B"], fewest=5)
    assert table["images"].tolist() == [80, 80]
    assert table.loc["A", "positive"] == pytest.approx(len(drawn) / 241)
    assert np.isnan(table.loc["B", ["fleiss", "cohen"]]).all()
    votes = set(drawn.itertuples(index=False, name=None))
    wide = {reader: set(images) for reader, images in readings.groupby("reader")["image_id"]}
    kappas, weights = [], []
    for one, other in combinations("rstu", 2):
        common = sorted(wide[one] & wide[other])
        pair = [[(image, reader) in votes for image in common] for reader in (one, other)]
        kappas.append(cohen_kappa_score(*pair))
        weights.append(len(common))
    assert table.loc["A", "cohen"] == pytest.approx(np.average(kappas, weights=weights))
    assert np.isnan(box_statistics.label_agreement(rows, readings, ["A"], fewest=1000).loc["A", "cohen"])
    with pytest.raises(ParameterError, match=r"readings: lacks \('i9', 'z'\), who drew a box"):
        box_statistics.label_agreement(boxes([("i9", "A", "z", 0, 0, 1, 1)]), readings, ["A"])


def test_frames_of_a_dataset():
    dataset = cxrkit.data.load("phantom", images=6, size=32)
    table = box_statistics.union_shares(dataset.boxes, box_statistics.frames_of(dataset))
    assert set(table["image_id"]) == set(dataset.boxes["image_id"])
    assert ((table["share"] > 0) & (table["share"] < 1)).all()


def test_refusals():
    with pytest.raises(ParameterError, match="image 'i9' has boxes, but no frame"):
        box_statistics.box_geometry(boxes([("i9", "A", "r", 0, 0, 1, 1)]), frames())
    with pytest.raises(ParameterError, match=r"by=\['label'\] must hold 'image_id'"):
        box_statistics.union_shares(boxes([("i0", "A", "r", 0, 0, 1, 1)]), frames(), ["label"])


# The real tables


def carried(name):
    spec = find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision, which carries the tables, is not installed")
    return pd.read_csv(f"{spec.submodule_search_locations[0]}/data/{name}")


def test_chance_level_of_rsna():
    """METHODS 1.6: 11.75 % of the image, and the boxes hardly overlap."""
    rows = carried("kaggle_stage_2_train_labels.csv.zip").query("Target == 1")
    given_boxes = pd.DataFrame(
        {
            "image_id": rows["patientId"],
            "label": "Lung Opacity",
            "reader": "RSNA",
            "x_min": rows["x"],
            "y_min": rows["y"],
            "x_max": rows["x"] + rows["width"],
            "y_max": rows["y"] + rows["height"],
        }
    )
    sizes = pd.DataFrame({"width": 1024.0, "height": 1024.0}, index=pd.Index(given_boxes["image_id"].unique()))
    shares = box_statistics.union_shares(given_boxes, sizes)
    assert len(given_boxes) == 9555
    assert box_statistics.chance_level(shares)["images"] == 6012
    assert box_statistics.chance_level(shares)["mean"] == pytest.approx(0.1175, abs=5e-5)
    assert shares["sum"].mean() == pytest.approx(0.1175, abs=5e-5)
    assert shares["boxes"].value_counts().to_dict() == {1: 2614, 2: 3266, 3: 119, 4: 13}


def test_readers_of_vinbigdata():
    rows = carried("vinbigdata-train.csv.gz").rename(columns={"class_name": "label", "rad_id": "reader"})
    found = rows[rows["label"] != "No finding"]
    assert (len(found), found["image_id"].nunique(), rows["image_id"].nunique()) == (36_096, 4394, 15_000)
    agreement = box_statistics.box_agreement(found)
    assert len(agreement) == 19_357
    assert agreement["iou"].mean() == pytest.approx(0.5947, abs=1e-4)
    labels = box_statistics.label_agreement(found, rows, ["Cardiomegaly", "Atelectasis"])
    assert labels["fleiss"].tolist() == pytest.approx([0.789, 0.365], abs=1e-3)
