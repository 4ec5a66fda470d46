"""Bootstrap over patients against a slow resampling of rows, and the difference of means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrkit.errors import ParameterError
from cxrkit.metrics import bootstrap, difference_of_means, statistics


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
