"""The splits of paper `bcos`, and the carving of a validation part. The package's folds are tested with the dataset."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.data import splits
from cxrkit.errors import DataError, ParameterError


def table(n=120, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.array([f"{value:06x}" for value in rng.permutation(10 * n)[:n]])
    return ids, (rng.random(n) < 0.25).astype(int), (rng.random((n, 4)) < [0.05, 0.2, 0.3, 0.5]).astype(float)


def test_stratified_folds_are_those_of_a_sorted_table():
    """Straight from METHODS 1.7: the table is sorted by id, then dealt by scikit-learn with seed 42."""
    from sklearn.model_selection import StratifiedKFold

    ids, classes, _ = table()
    got = splits.stratified_folds(classes, ids)
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
    got = splits.multilabel_folds(targets)
    for fold, (_, members) in enumerate(
        MultilabelStratifiedKFold(5, shuffle=True, random_state=42).split(ids, targets)
    ):
        assert set(np.flatnonzero(got == fold)) == set(members)
    unknown = np.where(targets == 0, np.nan, targets)
    np.testing.assert_array_equal(splits.multilabel_folds(unknown), got)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), order=st.permutations(range(60)))
def test_folds_do_not_depend_on_the_order_of_rows(seed, order):
    ids, classes, targets = table(60, seed)
    classes[:10] = [0, 1] * 5
    order = np.array(order)
    for deal, given_strata in ((splits.stratified_folds, classes), (splits.multilabel_folds, targets)):
        np.testing.assert_array_equal(deal(given_strata[order], ids[order]), deal(given_strata, ids)[order])


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
        (lambda: splits.stratified_folds([0, 1, 0]), "folds=5 is out of range; use 2 .. 3"),
        (lambda: splits.multilabel_folds(np.zeros((9, 2)), folds=1), "folds=1 is out of range; use 2 .. 9"),
    ],
)
def test_out_of_range(call, words):
    with pytest.raises(ParameterError, match=words):
        call()
