"""Bootstrap over patients against a slow resampling of rows, comparisons of methods, and the accumulator."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cxrkit import metrics
from cxrkit.errors import ParameterError
from cxrkit.metrics import Accumulator, bootstrap, compare, difference_of_means, holm, over_seeds, statistics


def slow_bootstrap(values, patients, n: int, seed: int) -> tuple[float, float, float]:
    """Patient by patient, every row carried along."""
    rows: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if not math.isnan(value):
            rows.setdefault(patient, []).append(value)
    names = sorted(rows)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        sample = [value for place in generator.integers(len(names), size=len(names)) for value in rows[names[place]]]
        means.append(sum(sample) / len(sample))
    low, high = np.percentile(means, [2.5, 97.5])
    everything = [value for name in names for value in rows[name]]
    return sum(everything) / len(everything), low, high


@pytest.fixture
def repeated():
    generator = np.random.default_rng(3)
    patients = [f"p{number}" for number in generator.integers(25, size=90)]
    values = generator.random(90) + 0.05 * np.array([int(name[1:]) for name in patients])
    values[::11] = np.nan
    return values, patients


def test_against_the_slow_implementation(repeated):
    values, patients = repeated
    assert bootstrap(values, patients, n=200, seed=5) == pytest.approx(slow_bootstrap(values, patients, 200, 5))


def test_chunks_change_nothing(repeated, monkeypatch):
    whole = bootstrap(*repeated, n=100)
    monkeypatch.setattr(statistics, "CHUNK", 70)
    assert bootstrap(*repeated, n=100) == whole


def test_same_seed_same_interval_and_no_global_state(repeated):
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert bootstrap(*repeated, seed=1) == bootstrap(*repeated, seed=1)
    assert bootstrap(*repeated, seed=1) != bootstrap(*repeated, seed=2)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_images_of_one_patient_do_not_count_as_independent():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    patients = np.repeat(np.arange(40), 10)
    by_patient, by_image = bootstrap(values, patients), bootstrap(values, np.arange(400))
    assert by_patient.high - by_patient.low > 2.5 * (by_image.high - by_image.low)


def test_interval_is_that_of_the_normal_distribution_for_many_values():
    values = np.random.default_rng(0).normal(size=2000)
    interval = bootstrap(values, np.arange(2000), n=4000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_degenerate_input():
    assert all(math.isnan(value) for value in bootstrap([], []))
    assert all(math.isnan(value) for value in bootstrap([math.nan, math.nan], ["a", "b"]))
    one = bootstrap(torch.tensor([0.25, 0.75]), ["a", "a"])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert bootstrap([2.0, 2.0], ["a", "b"]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "arguments",
    [{"patients": ["a"]}, {"n": 0}, {"confidence": 1.0}, {"values": [[1.0, 2.0]], "patients": [["a", "b"]]}],
)
def test_errors(arguments):
    with pytest.raises(ParameterError):
        bootstrap(**({"values": [1.0, 2.0], "patients": ["a", "b"]} | arguments))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_interval_lies_within_the_values(rows):
    values, patients = zip(*rows, strict=True)
    interval = bootstrap(values, patients, n=50)
    if not math.isnan(interval.low):
        assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_difference_of_means():
    a, b = np.array([1.0, 0.0, 1.0, math.nan]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert difference_of_means(a, b) == pytest.approx(2 / 3 - 1 / 4)
    assert difference_of_means(a, b) == difference_of_means(b, a)
    assert difference_of_means(a, a) == 0
    assert math.isnan(difference_of_means([], a))


def test_columns_with_the_same_gaps_share_their_resamples(repeated):
    values, patients = repeated
    table = np.stack([values, 2 * values, np.where(np.arange(90) % 7, values, np.nan)], axis=1)
    found = statistics.intervals(table, np.asarray(patients), 100, 4, 0.9)
    for column, interval in enumerate(found):
        assert interval == pytest.approx(bootstrap(table[:, column], patients, n=100, seed=4, confidence=0.9))


def slow_comparison(a, b, patients, n: int, seed: int) -> tuple[float, float]:
    """Mean difference and p-value, patient by patient."""
    rows: dict[str, list[float]] = {}
    for first, second, patient in zip(a, b, patients, strict=True):
        if not math.isnan(first - second):
            rows.setdefault(patient, []).append(first - second)
    names = sorted(rows)
    generator = np.random.default_rng(seed)
    below = above = 0
    for _ in range(n):
        drawn = [value for place in generator.integers(len(names), size=len(names)) for value in rows[names[place]]]
        below, above = below + (sum(drawn) <= 0), above + (sum(drawn) >= 0)
    everything = [value for values in rows.values() for value in values]
    return sum(everything) / len(everything), min(1, 2 * (1 + min(below, above)) / (n + 1))


def test_comparison_against_the_slow_implementation(repeated):
    values, patients = repeated
    other = values + np.random.default_rng(1).normal(0.03, 0.2, size=90)
    other[5] = np.nan
    row = compare({"a": values, "b": other}, patients, n=300, seed=2).iloc[0]
    assert (row["difference"], row["p"]) == pytest.approx(slow_comparison(values, other, patients, 300, 2))
    assert row["n"] == (~np.isnan(values - other)).sum()
    assert row["n"] + row["left_out"] == 90
    assert (row["low"], row["high"]) == bootstrap(values - other, patients, n=300, seed=2)[1:]


def test_comparison_in_closed_form():
    values, patients = np.random.default_rng(0).random(30), np.arange(30)
    frame = compare({"a": values, "same": values, "more": values + 0.1}, patients, n=999)
    frame = frame.set_index(["a", "b"])
    assert frame.loc[("a", "same"), ["difference", "p", "p_holm"]].tolist() == [0, 1, 1]
    assert frame.loc[("a", "more"), "difference"] == pytest.approx(-0.1)
    assert frame.loc[("a", "more"), "p"] == pytest.approx(2 / 1000)
    assert frame.loc[("a", "more"), "p_holm"] == pytest.approx(3 * 2 / 1000)
    assert frame.loc[("same", "more"), "high"] < 0


@pytest.mark.parametrize("count", [2, 3, 5, 6, 10, 11, 14])
@pytest.mark.parametrize("n", [50, 2000])
def test_no_p_value_falls_below_what_so_few_patients_allow(count, n):
    generator = np.random.default_rng(count)
    better = np.repeat(generator.uniform(0.1, 1, count), 3)  # every patient says the same
    row = compare({"a": better, "b": np.zeros(3 * count)}, np.repeat(np.arange(count), 3), n=n).iloc[0]
    assert row["p"] >= 2 / 2**count
    assert row["patients"] == count
    if 2**count <= n:
        assert row["p"] == 2 / 2**count


def test_few_patients_are_tested_as_scipy_permutes_them():
    difference = np.random.default_rng(4).normal(0.4, 1, size=8)
    row = compare({"a": difference, "b": np.zeros(8)}, np.arange(8)).iloc[0]
    expected = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert row["p"] == pytest.approx(expected.pvalue)


def test_p_values_of_equal_methods_are_even_and_agree_with_the_t_test():
    generator = np.random.default_rng(0)
    own, of_t = [], []
    for trial in range(200):
        a, b = generator.normal(size=(2, 80))
        own.append(compare({"a": a, "b": b}, np.arange(80), n=400, seed=trial)["p"][0])
        of_t.append(stats.ttest_rel(a, b).pvalue)
    assert np.mean(np.array(own) < 0.05) == pytest.approx(0.05, abs=0.05)
    assert np.corrcoef(own, of_t)[0, 1] > 0.98
    assert np.abs(np.array(own) - of_t).max() < 0.2


def test_pairing_tells_what_unpaired_intervals_hide():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=60)  # how hard an image is, for both methods
    a, b = hard + 0.2 + 0.1 * generator.normal(size=60), hard + 0.1 * generator.normal(size=60)
    assert bootstrap(a, np.arange(60)).low < bootstrap(b, np.arange(60)).high
    assert compare({"a": a, "b": b}, np.arange(60))["p_holm"][0] < 0.01


def test_images_of_one_patient_weigh_as_one_in_a_comparison():
    generator = np.random.default_rng(3)
    own = generator.normal(size=15)
    difference = np.repeat(own - own.mean() + 0.3, 20)
    scores = {"a": difference, "b": np.zeros(300)}
    by_patient = compare(scores, np.repeat(np.arange(15), 20))["p"][0]
    assert compare(scores, np.arange(300))["p"][0] < by_patient / 5


@pytest.mark.parametrize(
    ("scores", "patients", "message"),
    [
        ({"a": [1.0]}, ["p"], "two"),
        ({"a": [1.0], "b": [1.0, 2.0]}, ["p"], r"'b' \(2,\)"),
        ({"a": [1.0], "b": [1.0]}, ["p", "q"], "'a'"),
    ],
)
def test_comparisons_that_cannot_be_made(scores, patients, message):
    with pytest.raises(ParameterError, match=message):
        compare(scores, patients)
    one = compare({"a": [1.0, 2.0], "b": [0.0, 1.0]}, ["p", "p"]).iloc[0]
    assert one["difference"] == 1
    assert one[["low", "high", "p", "p_holm"]].isna().all()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, math.nan, 0.7]) == pytest.approx([1, math.nan, 1], nan_ok=True)
    assert holm([]).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_steps_down(p_values):
    """Holm's own words: reject from the smallest on while p_(i) <= level / (m - i + 1)."""
    corrected = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, place in enumerate(order):
            if p_values[place] * (len(p_values) - rank) > level:
                break
            rejected.add(int(place))
        assert set(np.flatnonzero(corrected <= level).tolist()) == rejected
    assert (corrected >= p_values).all()


def test_spread_over_seeds_is_half_the_distance_of_two():
    spread = over_seeds([[0.1, 0.3], [0.4, 0.6]])
    assert spread == pytest.approx((0.35, 0.15, 0, 2))
    assert spread.ddof == 0
    assert over_seeds([[0.1, 0.3], [0.4, 0.6]], ddof=1).std == pytest.approx(0.3 / math.sqrt(2))
    assert over_seeds([[0.5]]).std == 0
    assert math.isnan(over_seeds([[0.5]], ddof=1).std)
    assert math.isnan(over_seeds([[0.5, math.nan], [0.1, 0.2]]).mean)
    with pytest.raises(ParameterError, match="folds"):
        over_seeds([0.1, 0.2])
    with pytest.raises(ParameterError, match="ddof -1"):
        over_seeds([[0.1]], ddof=-1)


@pytest.fixture
def gathered():
    """Two methods, two labels, three batches; one degenerate map."""
    generator = torch.Generator().manual_seed(0)
    accumulator, rows = Accumulator(), []
    for batch in range(3):
        for method in ("a", "b"):
            maps, masks = torch.randn(8, 8, 8, generator=generator), torch.rand(8, 8, 8, generator=generator) > 0.7
            if (batch, method) == (1, "b"):
                maps[2] = 0
            found = metrics.localisation_scores(maps, masks, thresholds=[0.0], iou_thresholds=[0.5])
            images = [f"i{8 * batch + row}" for row in range(8)]
            patients = [f"p{(8 * batch + row) // 3}" for row in range(8)]
            labels = ["Mass" if row < 5 else "Nodule" for row in range(8)]  # few patients have both
            accumulator.add(found, patients, method=method, label=labels)
            rows.append(
                pd.DataFrame(
                    {"image": images, "patient": patients, "method": method, "label": labels}
                    | {name: values.numpy() for name, values in found.values.items()}
                    | {f"chance {name}": values.numpy() for name, values in found.chance.items()}
                )
            )
    return accumulator, pd.concat(rows, ignore_index=True)


def test_the_table_holds_means_intervals_chance_and_counts(gathered):
    accumulator, rows = gathered
    table = accumulator.table(n=200, seed=3).set_index(["method", "label", "score"])
    assert len(table) == 2 * 3 * 13
    for (method, label), part in rows.groupby(["method", "label"]):
        for name in ("epg_precision@0", "pointing_game", "iou@mean"):
            row = table.loc[(method, label, name)]
            known = part[part[name].notna()]
            interval = bootstrap(part[name], part["patient"], n=200, seed=3)
            assert (row["mean"], row["low"], row["high"]) == pytest.approx(interval, rel=1e-6)
            assert row["chance"] == pytest.approx(known[f"chance {name}"].mean(), rel=1e-6)
            assert row["n"] + row["degenerate"] == len(part)
            assert row["patients"] == known["patient"].nunique()
    assert table["degenerate"].xs("epg_precision@0", level="score").to_dict() == {
        ("a", "Mass"): 0, ("a", "Nodule"): 0, ("a", "macro"): 0,
        ("b", "Mass"): 1, ("b", "Nodule"): 0, ("b", "macro"): 1,
    }  # fmt: skip


def test_the_macro_row_is_the_mean_over_labels_and_its_interval_resamples_patients(gathered):
    accumulator, rows = gathered
    table = accumulator.table(n=100, seed=3).set_index(["method", "label", "score"])
    part = rows[rows["method"] == "b"]
    name = "epg_precision@0"
    macro = table.loc[("b", "macro", name)]
    assert macro["mean"] == pytest.approx(part.groupby("label")[name].mean().mean())
    assert macro["chance"] == pytest.approx(table.loc[[("b", "Mass", name), ("b", "Nodule", name)], "chance"].mean())
    by_patient = [group for _, group in part.groupby("patient")]
    generator, means = np.random.default_rng(3), []
    for _ in range(100):
        drawn = pd.concat([by_patient[place] for place in generator.integers(len(by_patient), size=len(by_patient))])
        means.append(drawn.groupby("label")[name].mean().mean())
    assert (macro["low"], macro["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-6)


def test_batches_change_nothing():
    scores, patients = torch.rand(12), [f"p{row // 2}" for row in range(12)]
    whole, parts = Accumulator(), Accumulator()
    whole.add({"score": scores}, patients)
    for start in range(0, 12, 5):
        parts.add({"score": scores[start : start + 5]}, patients[start : start + 5])
    pd.testing.assert_frame_equal(whole.table(), parts.table())
    assert whole.table()["chance"].isna().all()
    assert list(whole.table().columns) == ["score", "mean", "low", "high", "chance", "n", "degenerate", "patients"]


def test_the_accumulator_refuses_what_does_not_fit(gathered):
    accumulator, _ = gathered
    one = {"score": torch.rand(2)}
    with pytest.raises(ParameterError, match="nothing was added"):
        Accumulator().table()
    with pytest.raises(ParameterError, match="score has shape"):
        Accumulator().add(one, ["p"])
    with pytest.raises(ParameterError, match="label has shape"):
        Accumulator().add(one, ["p", "q"], label=["Mass"])
    with pytest.raises(ParameterError, match="'score'"):
        accumulator.add(one, ["p", "q"], method="a", label="Mass")


@pytest.mark.filterwarnings("error")
def test_a_score_that_is_never_defined_stays_nan_without_a_warning():
    accumulator = Accumulator()
    accumulator.add({"score": torch.full((4,), math.nan), "other": torch.rand(4)}, list("ppqq"), label=list("abab"))
    table = accumulator.table(n=50)
    assert table[table["score"] == "score"][["mean", "low", "high"]].isna().all(axis=None)
    assert table[table["score"] == "score"]["degenerate"].tolist() == [2, 2, 4]
    assert table[table["score"] == "other"]["mean"].notna().all()
