"""Folds of images, the carving of a validation part, and patients on two sides of a split.

The folds of patients are tested with the dataset.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import train_test_split

import cxrkit
from cxrkit.data import splits
from cxrkit.data.splits import patient_overlap, refuse_shared_patients
from cxrkit.errors import DataError, ParameterError


def table(n=120, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.array([f"{value:06x}" for value in rng.permutation(10 * n)[:n]])
    return ids, (rng.random(n) < 0.25).astype(int), (rng.random((n, 4)) < [0.05, 0.2, 0.3, 0.5]).astype(float)


def test_stratified_folds_are_those_of_a_sorted_table():
    """Straight from METHODS 1.7: the table is sorted by id, then dealt by scikit-learn with seed 42."""
    from sklearn.model_selection import StratifiedKFold

    ids, classes, _ = table()
    got = splits.image_folds(classes, ids)
    sorted_table = pd.DataFrame({"id": ids, "class": classes}).sort_values("id")
    dealt = StratifiedKFold(n_splits=5, shuffle=True, random_state=42).split(sorted_table, sorted_table["class"])
    for fold, (_, members) in enumerate(dealt):
        assert set(ids[got == fold]) == set(sorted_table["id"].iloc[members])
    counts = np.array([classes[got == fold].sum() for fold in range(5)])
    assert np.ptp(counts) <= 1
    assert np.ptp(np.bincount(got)) <= 1


def test_multilabel_folds_are_those_of_the_library():
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    ids, _, targets = table()
    got = splits.image_folds(targets)
    for fold, (_, members) in enumerate(
        MultilabelStratifiedKFold(5, shuffle=True, random_state=42).split(ids, targets)
    ):
        assert set(np.flatnonzero(got == fold)) == set(members)
    unknown = np.where(targets == 0, np.nan, targets)
    np.testing.assert_array_equal(splits.image_folds(unknown), got)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), order=st.permutations(range(60)))
def test_folds_do_not_depend_on_the_order_of_rows(seed, order):
    ids, classes, targets = table(60, seed)
    classes[:10] = [0, 1] * 5
    order = np.array(order)
    for given_strata in (classes, targets):
        np.testing.assert_array_equal(
            splits.image_folds(given_strata[order], ids[order]), splits.image_folds(given_strata, ids)[order]
        )


def test_with_validation():
    _, _, targets = table(200)
    patients = np.arange(200) // 2
    is_test = patients < 20
    split = splits.with_validation(is_test, patients, targets, seed=1)
    assert ((split == "test") == is_test).all()
    assert pd.Series(split).groupby(patients).nunique().max() == 1
    assert 14 <= (split == "validation").sum() <= 26
    with pytest.raises(DataError, match="1 patients are left"):
        splits.with_validation([True, False], ["a", "b"], np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: splits.image_folds([0, 1, 0]), "folds=5 is out of range; use 2 .. 3"),
        (lambda: splits.image_folds(np.zeros((9, 2)), folds=1), "folds=1 is out of range; use 2 .. 9"),
    ],
)
def test_out_of_range(call, words):
    with pytest.raises(ParameterError, match=words):
        call()


# Patients on two sides

SPLIT = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2


def rows(patients, split=SPLIT):
    ids = [f"i{k}" for k in range(len(patients))]
    return pd.DataFrame({"image_id": ids, "patient_id": patients, "split": split})


def test_patients_are_compared_as_text():
    """METHODS 3.9: ids that are numbers in one row and text in another are the same patient."""
    refuse_shared_patients("held", rows([0, 1, 2, 3, 4, 5, 6, 8]))
    with pytest.raises(DataError) as caught:
        refuse_shared_patients("held", rows([7, 1, 2, 3, 4, 5, "7 ", 8]))
    assert str(caught.value) == "held: train and test share patients (1): '7' ('i0' in train and 'i6' in test)"


def test_message_names_a_few_and_counts_the_rest():
    leaking = rows(list("abcdef") + list("abcdea"), ["train"] * 6 + ["test"] * 6)
    with pytest.raises(
        DataError, match=r"patients \(5\): 'a' \('i0' in train and 'i6' in test, 1 more images\).*and 2 more"
    ):
        refuse_shared_patients("held", leaking)


def test_images_in_no_part_are_not_looked_at():
    refuse_shared_patients("held", rows(list("abcdabef"), ["train"] * 4 + ["unused", "", "test", "test"]))


def test_patient_overlap():
    patients = ["a", "a", "b", "c", "c", 7, "7"]
    split = ["train", "test", "test", "train", "test", "train", "test"]
    assert patient_overlap(patients, split).to_dict() == {"patients": 3, "images": 3, "share": 0.75}
    assert np.isnan(patient_overlap(patients, ["train"] * 7)["share"])


def test_image_wise_splits_of_nih_leak():
    """From the real table: four of five test images are of a patient who was trained on."""
    spec = find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision, which carries the table, is not installed")
    path = f"{spec.submodule_search_locations[0]}/data/Data_Entry_2017_v2020.csv.gz"
    patients = pd.read_csv(path, usecols=["Patient ID"])["Patient ID"]
    assert len(patients) == 112_120
    assert patients.nunique() == 30_805
    split = np.full(len(patients), "train", dtype=object)
    split[train_test_split(np.arange(len(patients)), test_size=0.2, random_state=0)[1]] = "test"
    leaked = patient_overlap(patients, split)
    assert leaked["patients"] == 7977
    assert leaked["share"] == pytest.approx(0.8285, abs=1e-4)


def test_load_refuses_a_leaking_split_unless_it_was_asked_for(tmp_path, monkeypatch):
    split = ["train"] * 3 + ["validation", "test", "test"]
    lines = []
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
        lines.append(f"i{index},{index}.png,{'abcdef'[index]},A,{split[index]}\n")
    (tmp_path / "images.csv").write_text("image_id,file,patient_id,labels,split\n" + "".join(lines))
    whole = cxrkit.data.load("folder", root=tmp_path, size=48)
    assert len(whole) == 6
    whole.table["patient_id"] = list("abcdea")
    monkeypatch.setattr("cxrkit.data.folder.load_folder", lambda root, size, seed: whole)
    with pytest.raises(DataError, match=r"train and test share patients \(1\): 'a'"):
        cxrkit.data.load("folder", root=tmp_path)
    whole.leak = "Slices were dealt, not patients."
    with pytest.warns(UserWarning, match=r"folder: Slices were dealt, not patients. Of the test images, 1 \(50%\) are"):
        assert len(cxrkit.data.load("folder", root=tmp_path, split="test")) == 2
