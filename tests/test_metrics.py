"""Localisation metrics: closed-form cases, a slow second implementation from the formulas, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import jaccard_score

from cxrkit import metrics
from cxrkit.errors import ParameterError

NAN = math.nan


def box(size: int, x_min: int, y_min: int, x_max: int, y_max: int) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y_min:y_max, x_min:x_max] = True
    return mask


def slow_epg(values, mask, kind: str, threshold: float) -> float:
    """Eqs. 1 to 3 of paper `bcos`, pixel by pixel."""
    values, mask = np.asarray(values), np.asarray(mask)
    if not mask.any() or not np.isfinite(values).all():
        return NAN
    peak = values.max()
    above = below = 0.0
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value, inside = float(values[row, column]), mask[row, column]
            kept = value if value > 0 and values[row, column] >= values.dtype.type(threshold) * peak else 0.0
            if kind == "signed":
                above, below = above + value * inside, below + value
            elif kind == "precision":
                above, below = above + kept * inside, below + kept
            else:
                above, below = above + kept * inside, below + abs(value) * inside
    return above / below if below else NAN


def slow_pointing(values: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    peak, best = None, -math.inf
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            if values[row, column] > best:
                peak, best = (row, column), values[row, column]
    distances = [math.dist(peak, pixel) for pixel in np.argwhere(mask)]
    return float(min(distances) < tolerance)


SHAPE = (6, 7)
# Multiples of 1/8 keep sums exact, so that a threshold meets no rounding.
pixels = hnp.arrays(np.float64, SHAPE, elements=st.integers(-24, 24).map(lambda value: value / 8))
regions = hnp.arrays(np.bool_, SHAPE)


def test_uniform_map_scores_the_area_of_the_box():
    mask = box(224, 30, 40, 130, 90)
    uniform = torch.full((224, 224), 0.3)
    assert metrics.energy_pointing_game(uniform, mask).item() == pytest.approx(0.0996492, abs=1e-6)
    assert metrics.chance_level(mask).item() == pytest.approx(0.0996492, abs=1e-6)


def test_all_mass_inside_and_outside():
    mask = box(16, 2, 3, 9, 11)
    inside = mask.float()
    assert metrics.energy_pointing_game(inside, mask).item() == 1
    assert metrics.energy_pointing_game(1 - inside, mask).item() == 0
    assert metrics.energy_pointing_game(inside, mask, kind="recall").item() == 1


def test_recall_of_half_positive_half_negative_box():
    mask = box(16, 0, 0, 8, 8)
    signed = torch.zeros(16, 16)
    signed[:4, :8], signed[4:8, :8] = 1, -1
    assert metrics.energy_pointing_game(signed, mask, kind="recall").item() == 0.5
    assert metrics.energy_pointing_game(signed, mask, kind="precision").item() == 1


def test_signed_kind_is_not_clipped():
    mask = box(4, 0, 0, 2, 2)
    signed = torch.zeros(4, 4)
    signed[0, 0], signed[3, 3] = 3, -1
    assert metrics.energy_pointing_game(signed, mask, kind="signed").item() == 1.5
    assert metrics.energy_pointing_game(-signed, ~mask, kind="signed").item() == -0.5


def test_threshold_one_keeps_only_the_maximum():
    mask = box(32, 4, 4, 12, 12)
    noise = torch.rand(32, 32)
    noise[6, 7] = 2
    assert metrics.energy_pointing_game(noise, mask, threshold=1.0).item() == 1


def test_threshold_is_inclusive_and_relative_to_the_whole_image():
    values = torch.tensor([[1.0, 0.7], [0.3, 0.0]])
    mask = torch.tensor([[False, True], [True, False]])
    assert metrics.energy_pointing_game(values, mask, threshold=0.7).item() == pytest.approx(0.7 / 1.7)
    assert metrics.energy_pointing_game(values, mask, threshold=0.71).item() == 0
    assert metrics.energy_pointing_game(values, mask, kind="recall", threshold=0.7).item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("precision", torch.zeros(4, 4), NAN),
        ("precision", -torch.ones(4, 4), NAN),
        ("recall", torch.zeros(4, 4), NAN),
        ("recall", -torch.ones(4, 4), 0.0),
        ("signed", torch.zeros(4, 4), NAN),
        ("precision", torch.full((4, 4), NAN), NAN),
        ("recall", torch.full((4, 4), torch.inf), NAN),
    ],
)
def test_degenerate_maps(kind, values, expected):
    score = metrics.energy_pointing_game(values, box(4, 0, 0, 2, 2), kind=kind).item()
    assert score == pytest.approx(expected, nan_ok=True)


def test_signed_map_that_sums_to_zero_has_no_signed_score():
    values = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert metrics.energy_pointing_game(values, values > 0, kind="signed").isnan()


@pytest.mark.parametrize("kind", ["precision", "recall", "signed"])
def test_empty_mask_and_one_nan_pixel_give_nan_and_spoil_no_neighbour(kind):
    values = torch.rand(3, 8, 8)
    values[1, 7, 7] = NAN
    masks = box(8, 1, 1, 4, 4).expand(3, 8, 8).clone()
    masks[2] = False
    assert metrics.energy_pointing_game(values, masks, kind=kind).isnan().tolist() == [False, True, True]
    assert metrics.chance_level(masks).isnan().tolist() == [False, False, True]


def test_shapes_dtype_and_broadcasting():
    values, masks = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) > 0.5
    assert metrics.energy_pointing_game(values, masks).shape == (2, 3)
    assert metrics.energy_pointing_game(values, masks[:, :1]).shape == (2, 3)
    assert metrics.energy_pointing_game(values.half(), masks).dtype == torch.float32
    assert metrics.energy_pointing_game(values.double(), masks).dtype == torch.float64
    assert metrics.energy_pointing_game(values.requires_grad_(), masks).requires_grad is False
    assert metrics.threshold_sweep(values, masks, [0, 0.5]).shape == (2, 3, 2)
    assert metrics.threshold_sweep(values, masks, []).shape == (2, 3, 0)
    assert metrics.energy_pointing_game(values[:0], masks[:0]).shape == (0, 3)


def test_long_sums_keep_their_digits():
    values = torch.full((2048, 2048), 0.1)
    values[:, :1024] = 0.3
    mask = box(2048, 0, 0, 1024, 2048)
    assert metrics.energy_pointing_game(values, mask).item() == pytest.approx(0.75, abs=2e-7)


@settings(max_examples=60, deadline=None)
@given(pixels, regions, st.sampled_from(["precision", "recall"]), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_against_the_slow_implementation(values, mask, kind, threshold):
    fast = metrics.energy_pointing_game(torch.tensor(values), torch.tensor(mask), kind, threshold).item()
    assert fast == pytest.approx(slow_epg(values, mask, kind, threshold), nan_ok=True)
    signed = metrics.energy_pointing_game(torch.tensor(values), torch.tensor(mask), "signed").item()
    assert signed == pytest.approx(slow_epg(values, mask, "signed", 0.0), nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(pixels, regions, st.sampled_from([0.125, 2.0, 1024.0]))
def test_range_scale_and_complement(values, mask, factor):
    values, mask = torch.tensor(values), torch.tensor(mask)
    for kind in ("precision", "recall"):
        score = metrics.energy_pointing_game(values, mask, kind)
        assert score.isnan() or 0 <= score <= 1
        torch.testing.assert_close(
            metrics.energy_pointing_game(factor * values, mask, kind, 0.5),
            metrics.energy_pointing_game(values, mask, kind, 0.5),
            equal_nan=True,
        )
    if 0 < mask.sum() < mask.numel() and (values > 0).any():
        both = metrics.energy_pointing_game(values, mask) + metrics.energy_pointing_game(values, ~mask)
        assert both.item() == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(pixels, regions)
def test_recall_never_rises_with_the_threshold(values, mask):
    sweep = metrics.threshold_sweep(torch.tensor(values), torch.tensor(mask), torch.linspace(0, 1, 9), "recall")
    assert sweep.isnan().all() or (sweep.diff() <= 0).all()


def test_sweep_equals_single_calls():
    values, mask = torch.randn(4, 16, 16), torch.rand(4, 16, 16) > 0.7
    thresholds = [0.0, 0.3, 0.9]
    for kind in ("precision", "recall"):
        single = [metrics.energy_pointing_game(values, mask, kind, threshold) for threshold in thresholds]
        torch.testing.assert_close(metrics.threshold_sweep(values, mask, thresholds, kind), torch.stack(single, -1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.energy_pointing_game(torch.ones(4, 4), torch.ones(4, 5).bool()), r"\(4, 5\)"),
        (lambda: metrics.energy_pointing_game(torch.ones(2, 4, 4), torch.ones(3, 4, 4).bool()), "leading"),
        (lambda: metrics.energy_pointing_game(torch.ones(4, 4), torch.full((4, 4), 0.5)), "bool"),
        (lambda: metrics.energy_pointing_game(torch.ones(4, 4), torch.ones(4, 4).bool(), "f1"), "'precision'"),
        (lambda: metrics.energy_pointing_game(torch.ones(4, 4), torch.ones(4, 4).bool(), threshold=1.5), "1.5"),
        (lambda: metrics.energy_pointing_game(torch.ones(4, 4), torch.ones(4, 4).bool(), "signed", 0.5), "signed"),
        (lambda: metrics.pointing_game(torch.rand(4, 4), torch.ones(4, 4).bool(), tolerance=0), "tolerance"),
        (lambda: metrics.mask_iou(torch.rand(4, 4), torch.ones(4, 4).bool(), average="mean"), "two_class"),
        (lambda: metrics.mask_iou(torch.rand(4, 4), torch.ones(4, 4).bool(), threshold=-1), "-1"),
        (lambda: metrics.class_agnostic(torch.ones(4, 4).bool()), r"L, H, W"),
        (lambda: metrics.gaussian_smoothing(torch.rand(4, 4)), "11"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ParameterError, match=message):
        call()


def test_several_boxes():
    values = torch.ones(10, 10)
    masks = torch.stack([box(10, 0, 0, 4, 5), box(10, 2, 0, 6, 5), box(10, 0, 0, 0, 0)])  # 10 pixels overlap; padding
    assert metrics.energy_pointing_game_boxes(values, masks).item() == pytest.approx(0.3)
    assert metrics.energy_pointing_game_boxes(values, masks, protocol="authors").item() == pytest.approx(0.4)
    values[:, 4:] = -1
    recalls = [1.0, 0.5]
    authors = metrics.energy_pointing_game_boxes(values, masks, kind="recall", protocol="authors").item()
    assert authors == pytest.approx(np.mean(recalls))
    assert metrics.energy_pointing_game_boxes(values, masks, kind="recall").item() == pytest.approx(20 / 30)


def test_several_boxes_in_a_batch_and_without_a_score():
    values, masks = torch.rand(3, 8, 8), torch.zeros(3, 2, 8, 8, dtype=torch.bool)
    masks[:2, 0, :4], masks[0, 1, 4:] = True, True
    values[1] = 0
    for protocol in ("corrected", "authors"):
        score = metrics.energy_pointing_game_boxes(values, masks, protocol=protocol)
        assert score.isnan().tolist() == [False, True, True]
        assert score[0].item() == pytest.approx(1)


def test_class_agnostic_mask_is_the_union_for_every_label():
    masks = torch.rand(2, 3, 5, 5) > 0.8
    union = masks[:, 0] | masks[:, 1] | masks[:, 2]
    for label in range(3):
        assert torch.equal(metrics.class_agnostic(masks)[:, label], union)


def test_split_into_found_and_missed():
    scores = torch.tensor([[0.2, 0.9], [0.6, NAN], [1.0, 0.5], [0.4, 0.1]])
    targets = torch.tensor([[1.0, 1], [1, 1], [0, NAN], [1, 0]])
    probabilities = torch.tensor([[0.5, 0.9], [0.9, 0.8], [0.9, 0.9], [0.7, 0.1]])
    frame = metrics.epg_split(scores, targets, probabilities, labels=["a", "b"]).set_index(["label", "subset"])
    assert frame.loc[("a", "all"), "mean"] == pytest.approx(0.4)
    assert frame.loc[("a", "TP"), "mean"] == pytest.approx(0.5)  # 0.5 itself is not found
    assert frame.loc[("a", "FN"), "mean"] == pytest.approx(0.2)
    assert frame.loc[("a", "TP"), "std"] == pytest.approx(0.1)  # of the population
    assert frame.loc[("b", "all"), ["n", "degenerate"]].tolist() == [1, 1]
    assert frame.loc[("macro", "all"), "mean"] == pytest.approx((0.4 + 0.9) / 2)
    assert frame.loc[("macro", "FN"), "mean"] == pytest.approx(0.2)  # b has none: it stays out
    authors = metrics.epg_split(scores, targets, probabilities, labels=["a", "b"], protocol="authors")
    authors = authors.set_index(["label", "subset"])
    assert authors.loc[("macro", "FN"), "mean"] == pytest.approx(0.1)  # ... or counts 0
    assert authors.loc[("macro", "TP"), "mean"] == frame.loc[("macro", "TP"), "mean"]
    assert math.isnan(authors.loc[("b", "FN"), "mean"])


def test_split_refuses_a_positive_without_probability():
    one = torch.ones(1, 1)
    with pytest.raises(ParameterError, match="row 0"):
        metrics.epg_split(one, one, one * NAN)
    with pytest.raises(ParameterError, match="shape"):
        metrics.epg_split(one, one, torch.ones(2, 1))


@pytest.mark.parametrize(("distance", "hit"), [(14, 1.0), (15, 0.0)])
def test_pointing_game_is_strict(distance, hit):
    values = torch.zeros(64, 64)
    values[20, 30 - 1 + distance] = 1  # the box's last column is 29
    assert metrics.pointing_game(values, box(64, 10, 15, 30, 25)).item() == hit


def test_pointing_game_tells_rows_from_columns():
    values = torch.zeros(64, 64)
    values[50, 5] = 1
    assert metrics.pointing_game(values, box(64, 0, 45, 10, 55), tolerance=3).item() == 1
    assert metrics.pointing_game(values, box(64, 45, 0, 55, 10), tolerance=3).item() == 0


def test_acceptance_disc_has_697_pixels():
    mask = box(64, 32, 32, 33, 33)
    peaks = torch.eye(64 * 64).reshape(-1, 64, 64)
    assert metrics.pointing_game(peaks, mask.expand_as(peaks)).sum() == 697


def test_pointing_game_takes_the_first_of_equal_maxima():
    values = torch.zeros(32, 32)
    values[3, 20] = values[20, 3] = 1
    assert metrics.pointing_game(values, box(32, 20, 3, 21, 4), tolerance=1).item() == 1
    assert metrics.pointing_game(values, box(32, 3, 20, 4, 21), tolerance=1).item() == 0


def test_relative_tolerance_and_degenerate_pointing():
    values = torch.zeros(3, 100, 50)
    values[0, 50, 0] = 1
    masks = torch.zeros(3, 100, 50, dtype=torch.bool)
    masks[:2, 50, 10] = True
    assert metrics.pointing_game(values, masks, tolerance_fraction=0.11)[0] == 1
    assert metrics.pointing_game(values, masks, tolerance_fraction=0.10)[0] == 0
    assert metrics.pointing_game(values, masks).isnan().tolist() == [False, True, True]


@settings(max_examples=60, deadline=None)
@given(pixels, regions, st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_pointing_against_the_slow_implementation(values, mask, tolerance):
    fast = metrics.pointing_game(torch.tensor(values), torch.tensor(mask), tolerance).item()
    if not mask.any() or values.min() == values.max():
        assert math.isnan(fast)
    else:
        assert fast == slow_pointing(values, mask, tolerance)


def test_gaussian_smoothing():
    torch.testing.assert_close(
        metrics.gaussian_smoothing(torch.full((2, 3, 20, 20), 0.7)), torch.full((2, 3, 20, 20), 0.7)
    )
    impulse = torch.zeros(31, 31)
    impulse[15, 15] = 1
    smooth = metrics.gaussian_smoothing(impulse)
    assert smooth.sum().item() == pytest.approx(1)
    assert (smooth[15, 16] / smooth[15, 15]).item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert (smooth > 0).sum() == 121


def test_overlap_in_closed_form():
    mask = box(20, 0, 0, 10, 8)  # a fifth of the image
    full, empty = torch.ones(20, 20).bool(), torch.zeros(20, 20).bool()
    for prediction, foreground, two_class in [(mask, 1, 1), (empty, 0, 0.4), (full, 0.2, 0.1)]:
        assert metrics.intersection_over_union(prediction, mask).item() == pytest.approx(foreground)
        assert metrics.intersection_over_union(prediction, mask, "two_class").item() == pytest.approx(two_class)


@pytest.mark.parametrize("area", [0.005, 0.05, 0.15])
def test_an_empty_prediction_scores_almost_half_with_two_classes(area):
    mask = torch.zeros(100, 100).bool()
    mask.view(-1)[: int(area * 10_000)] = True
    score = metrics.intersection_over_union(torch.zeros_like(mask), mask, "two_class").item()
    assert score == pytest.approx((1 - area) / 2)


@settings(max_examples=60, deadline=None)
@given(pixels, regions, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_mask_iou_against_scikit_learn(values, mask, threshold):
    foreground = metrics.mask_iou(torch.tensor(values), torch.tensor(mask), threshold).item()
    two_class = metrics.mask_iou(torch.tensor(values), torch.tensor(mask), threshold, "two_class").item()
    if not mask.any() or values.max() <= 0:
        assert math.isnan(foreground)
        assert math.isnan(two_class)
        return
    clipped = values.clip(min=0) / values.max()
    prediction = (np.where(clipped >= threshold, clipped, 0) > 0).ravel()
    assert foreground == pytest.approx(jaccard_score(mask.ravel(), prediction))
    if not (mask.all() and prediction.all()):
        assert two_class == pytest.approx(jaccard_score(mask.ravel(), prediction, average="macro", labels=[0, 1]))
