"""Localisation metrics: closed-form cases, a slow second implementation from the formulas, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import jaccard_score

from cxrkit import metrics
from cxrkit.data import geometry
from cxrkit.data.preprocessing import preprocessing
from cxrkit.errors import ParameterError
from cxrkit.metrics import scores as one_pass

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
        (lambda: metrics.mask_iou(torch.rand(4, 4), torch.ones(4, 4).bool(), percentile=0), "percentile 0"),
        (lambda: metrics.pointing_chance(torch.ones(4, 4).bool(), tolerance=-1), "tolerance -1"),
        (lambda: metrics.pointing_game(torch.rand(4, 4), torch.ones(4, 4).bool(), protocol="code"), "'authors'"),
        (lambda: metrics.pointing_game(torch.rand(4, 5), torch.ones(4, 5).bool(), protocol="authors"), "square"),
        (lambda: metrics.explained_maps(torch.rand(2, 3, 4, 4), torch.rand(2, 2)), r"\[N, L, H, W\]"),
        (lambda: metrics.explained_maps(torch.rand(2, 3, 4, 4), torch.rand(2, 3), 3), "target 3"),
        (lambda: metrics.localisation_scores(torch.rand(4, 4), torch.ones(4, 4).bool(), [2.0]), r"2\.0"),
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


def test_missed_findings_are_explained_by_another_label_in_the_authors_protocol():
    maps = torch.stack([box(8, 0, 0, 4, 4).float(), box(8, 4, 4, 8, 8).float()])[None]
    logits, mask = torch.tensor([[2.0, -1.0]]), box(8, 4, 4, 8, 8)  # a finding of label 1, called label 0
    assert metrics.energy_pointing_game(metrics.explained_maps(maps, logits), mask).item() == 0
    assert metrics.energy_pointing_game(metrics.explained_maps(maps, logits, target=1), mask).item() == 1
    assert torch.equal(
        metrics.explained_maps(maps.repeat(3, 1, 1, 1), logits.repeat(3, 1), 0), maps[:, 0].repeat(3, 1, 1)
    )


def test_boxes_scaled_without_the_crop_miss_what_the_map_sees():
    finding = [[256, 256, 512, 512]]  # of 1024 pixels
    moved = {p: preprocessing("bcos/rsna", p).boxes(finding, (1024, 1024), 224) for p in ("corrected", "authors")}
    true, astray = (geometry.box_masks(boxes, 224)[0] for boxes in moved.values())
    assert metrics.energy_pointing_game(true.float(), true).item() == 1
    assert metrics.energy_pointing_game(true.float(), astray).item() == pytest.approx(56**2 / 64**2)
    np.testing.assert_allclose(moved["authors"], 0.21875 * np.array(finding))


def test_class_agnostic_masks_raise_score_and_chance():
    masks = torch.stack([box(10, 0, 0, 5, 2), box(10, 5, 5, 10, 9)])
    maps = torch.ones(2, 10, 10)
    assert metrics.energy_pointing_game(maps, masks).tolist() == pytest.approx([0.1, 0.2])
    assert metrics.energy_pointing_game(maps, metrics.class_agnostic(masks)).tolist() == pytest.approx([0.3, 0.3])
    assert metrics.chance_level(metrics.class_agnostic(masks)).tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("kind", ["precision", "recall"])
def test_the_text_of_the_paper_means_the_union_of_boxes(kind):
    values, masks = torch.randn(5, 8, 8), torch.rand(5, 3, 8, 8) > 0.6
    paper = metrics.energy_pointing_game_boxes(values, masks, kind, 0.2, protocol="paper")
    assert torch.equal(paper, metrics.energy_pointing_game(values, masks.any(1), kind, 0.2))


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


def authors_pointing(values: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    """The published arithmetic: NumPy's grids in xy order, so that the disc lies at (column, row)."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    first, second = np.meshgrid(np.arange(values.shape[0]), np.arange(values.shape[1]))
    disc = (first - row) ** 2 + (second - column) ** 2 < tolerance**2
    return float((mask & disc).any())


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, (6, 6), elements=st.integers(-24, 24)), hnp.arrays(np.bool_, (6, 6)), st.integers(1, 3))
def test_the_authors_disc_is_transposed(values, mask, tolerance):
    score = metrics.pointing_game(torch.tensor(values), torch.tensor(mask), tolerance, protocol="authors").item()
    if mask.any() and values.min() < values.max():
        assert score == authors_pointing(values, mask, tolerance)
        turned = metrics.pointing_game(torch.tensor(values), torch.tensor(mask.T.copy()), tolerance)
        assert score == turned.item()  # as if the mask were mirrored
    paper = metrics.pointing_game(torch.tensor(values), torch.tensor(mask), tolerance, protocol="paper")
    assert torch.equal(
        paper.nan_to_num(2), metrics.pointing_game(torch.tensor(values), torch.tensor(mask), tolerance).nan_to_num(2)
    )


def test_a_peak_off_the_diagonal_tells_the_protocols_apart():
    values = torch.zeros(64, 64)
    values[50, 5] = 1
    here, mirrored = box(64, 0, 45, 10, 55), box(64, 45, 0, 55, 10)
    for protocol, hits in {"corrected": [1, 0], "paper": [1, 0], "authors": [0, 1]}.items():
        assert [metrics.pointing_game(values, mask, 3, protocol=protocol).item() for mask in (here, mirrored)] == hits


def test_acceptance_disc_has_697_pixels():
    mask = box(64, 32, 32, 33, 33)
    peaks = torch.eye(64 * 64).reshape(-1, 64, 64)
    assert metrics.pointing_game(peaks, mask.expand_as(peaks)).sum() == 697


def test_hit_rate_asks_for_a_maximum_inside():
    values = torch.zeros(3, 16, 16)
    values[0, 4, 4] = values[1, 4, 8] = 1  # inside; one pixel to the right of the mask; nowhere
    assert metrics.hit_rate(values, box(16, 2, 2, 8, 8)).tolist() == pytest.approx([1, 0, NAN], nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(regions, st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5, 4.0, 30.0]))
def test_chance_of_the_pointing_game_is_the_share_of_maxima_that_hit(mask, tolerance):
    chance = metrics.pointing_chance(torch.tensor(mask), tolerance).item()
    if not mask.any():
        assert math.isnan(chance)
        return
    assert chance == pytest.approx((ndimage.distance_transform_edt(~mask) < tolerance).mean())
    peaks = torch.eye(mask.size).reshape(-1, *SHAPE)
    hits = metrics.pointing_game(peaks, torch.tensor(mask), tolerance)
    assert chance == pytest.approx(hits.mean().item())
    assert chance >= metrics.chance_level(torch.tensor(mask)).item() - 1e-7


def test_chance_of_the_pointing_game_in_closed_form():
    one = box(64, 32, 32, 33, 33)
    assert metrics.pointing_chance(one).item() == pytest.approx(697 / 4096)
    assert metrics.pointing_chance(one, tolerance_fraction=15 / 64).item() == pytest.approx(697 / 4096)
    assert metrics.pointing_chance(box(64, 0, 0, 64, 10), tolerance=6).item() == pytest.approx(15 / 64)  # cut above


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


@pytest.mark.parametrize("value", [0.1, -0.7, 1e-9, 12345.678])
def test_smoothing_leaves_constant_maps_constant_to_the_last_bit(value):
    constant = torch.full((1, 33, 47), value)
    assert torch.equal(metrics.gaussian_smoothing(constant), constant)
    assert metrics.pointing_game(metrics.gaussian_smoothing(constant), constant > -1e9).isnan().all()


def test_smoothing_agrees_with_scipy():
    values = torch.randn(24, 37, dtype=torch.float64)
    window = np.exp(-np.square(np.arange(-5, 6)) / 2)
    kernel = np.outer(window, window) / window.sum() ** 2
    expected = ndimage.convolve(values.numpy(), kernel, mode="mirror")  # mirror: the border pixel is not repeated
    np.testing.assert_allclose(metrics.gaussian_smoothing(values).numpy(), expected, atol=1e-12)


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


@settings(max_examples=60, deadline=None)
@given(pixels, regions, st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from([50.0, 90.0, 99.0]))
def test_percentile_scale_against_numpy(values, mask, threshold, percentile):
    values = values + np.linspace(0, 1e-3, values.size).reshape(SHAPE)  # no ties
    score = metrics.mask_iou(torch.tensor(values), torch.tensor(mask), threshold, percentile=percentile).item()
    clipped = values.clip(min=0)
    if not mask.any() or not clipped.any():
        assert math.isnan(score)
        return
    prediction = (clipped >= threshold * np.percentile(clipped, percentile)) & (clipped > 0)
    assert score == pytest.approx(jaccard_score(mask.ravel(), prediction.ravel()))


def test_one_hot_pixel_rules_the_maximum_but_not_the_percentile():
    mask = box(20, 5, 5, 15, 15)
    values = mask.float()
    values[0, 0] = 100
    assert metrics.mask_iou(values, mask, 0.3).item() == 0
    assert metrics.mask_iou(values, mask, 0.3, percentile=99).item() == pytest.approx(100 / 101)
    sparse = torch.zeros(20, 20)
    sparse[7, 7] = 2  # its 99th percentile is 0: all that is positive counts
    assert metrics.mask_iou(sparse, mask, 0.5, percentile=99).item() == pytest.approx(0.01)


def test_mean_iou_is_the_mean_of_the_sweep_of_single_calls():
    values, mask = torch.randn(4, 16, 16), torch.rand(4, 16, 16) > 0.7
    for options in ({}, {"average": "two_class"}, {"percentile": 95}):
        single = [metrics.mask_iou(values, mask, threshold, **options) for threshold in (0.1, 0.2, 0.3, 0.4, 0.5)]
        torch.testing.assert_close(metrics.iou_sweep(values, mask, **options), torch.stack(single, -1))
        torch.testing.assert_close(metrics.mean_iou(values, mask, **options), torch.stack(single, -1).mean(-1))
    assert metrics.iou_sweep(values, mask, []).shape == (4, 0)


def test_chance_of_the_overlap_in_closed_form():
    mask = box(20, 0, 0, 10, 8)  # a fifth of the image
    for share, foreground, two_class in [
        (1.0, 0.2, 0.1),
        (0.0, 0.0, 0.4),
        (0.5, 0.1 / 0.6, (0.1 / 0.6 + 0.4 / 0.9) / 2),
    ]:
        assert metrics.iou_chance(mask, share).item() == pytest.approx(foreground)
        assert metrics.iou_chance(mask, share, "two_class").item() == pytest.approx(two_class)
    assert metrics.iou_chance(~(mask | ~mask)).isnan()


@pytest.mark.parametrize("average", ["foreground", "two_class"])
def test_regions_placed_without_knowledge_overlap_by_chance(average):
    mask = box(32, 3, 5, 20, 25)
    places = torch.rand(400, 32 * 32).argsort(1).reshape(400, 32, 32) < 200
    found = metrics.intersection_over_union(places, mask, average).mean().item()
    assert found == pytest.approx(metrics.iou_chance(mask, 200 / 1024, average).item(), abs=0.004)


def single_calls(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {
        "epg_signed": metrics.energy_pointing_game(maps, masks, "signed"),
        "hit_rate": metrics.hit_rate(maps, masks),
    }
    for step in range(10):
        for kind in ("precision", "recall"):
            found[f"epg_{kind}@{step / 10:g}"] = metrics.energy_pointing_game(maps, masks, kind, step / 10)
    found["pointing_game"] = metrics.pointing_game(metrics.gaussian_smoothing(maps), masks, tolerance=2)
    for name, average in {"iou": "foreground", "iou_two_class": "two_class"}.items():
        for of, percentile in {"": 100, " of p99": 99}.items():
            for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
                found[f"{name}@{threshold}{of}"] = metrics.mask_iou(maps, masks, threshold, average, percentile)
            found[f"{name}@mean{of}"] = metrics.mean_iou(maps, masks, average=average, percentile=percentile)
    return found


def odd_maps() -> tuple[torch.Tensor, torch.Tensor]:
    maps = torch.randn(40, 24, 20)
    maps[1, 3, 4], maps[2, 0, 0] = NAN, torch.inf
    maps[3], maps[4], maps[5] = 0, -maps[4].abs(), 0.1
    maps[6], maps[7] = maps[6].clamp(min=0).round(), maps[7] * 1e-30
    masks = torch.rand(40, 24, 20) > 0.95
    masks[8] = False
    return maps, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_equals_the_single_calls(dtype):
    maps, masks = odd_maps()
    found = metrics.localisation_scores(maps.to(dtype), masks, tolerance=2)
    expected = single_calls(maps.to(dtype), masks)
    assert set(found.values) == set(expected) == set(found.chance)
    for name, values in expected.items():
        assert found.values[name].dtype == dtype
        torch.testing.assert_close(found.values[name], values, equal_nan=True, msg=lambda text, name=name: name + text)


def test_one_pass_chance_levels_equal_the_single_calls():
    maps, masks = odd_maps()
    chance = metrics.localisation_scores(maps, masks, tolerance=2).chance
    for name in ("epg_signed", "hit_rate", "epg_precision@0", "epg_precision@0.7"):
        torch.testing.assert_close(chance[name], metrics.chance_level(masks), equal_nan=True)
    torch.testing.assert_close(chance["pointing_game"], metrics.pointing_chance(masks, 2), equal_nan=True)
    whole = metrics.energy_pointing_game(maps[0], torch.ones_like(masks[0]), "recall", 0.3)
    torch.testing.assert_close(chance["epg_recall@0.3"][0], whole)
    share = (maps[0] >= 0.2 * maps[0].max()).double().mean()
    for name, average in {"iou@0.2": "foreground", "iou_two_class@0.2": "two_class"}.items():
        torch.testing.assert_close(chance[name][0], metrics.iou_chance(masks[0], share, average))


def test_one_pass_in_chunks_of_any_shape_and_with_other_settings(monkeypatch):
    maps, masks = torch.randn(3, 4, 16, 16), torch.rand(4, 16, 16) > 0.8
    settings_ = {
        "thresholds": [0.25],
        "iou_thresholds": [],
        "tolerance_fraction": 0.1,
        "sigma": None,
        "percentile": 100,
    }
    whole = metrics.localisation_scores(maps, masks, **settings_)
    monkeypatch.setitem(one_pass.CHUNK, "cpu", 5 * 256)
    parts = metrics.localisation_scores(maps, masks, **settings_)
    for kind in (0, 1):
        for name, values in whole[kind].items():
            assert values.shape == (3, 4)
            torch.testing.assert_close(parts[kind][name], values, equal_nan=True)
    torch.testing.assert_close(
        whole.values["pointing_game"], metrics.pointing_game(maps, masks, tolerance_fraction=0.1), equal_nan=True
    )
    assert [name for name in whole.values if name.startswith("iou")] == []
    assert metrics.localisation_scores(maps[:0], masks[:0, None].expand(0, 4, 16, 16)).values["hit_rate"].shape == (
        0,
        4,
    )
    assert metrics.localisation_scores(maps[0, 0], masks[0]).values["hit_rate"].shape == ()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2.0**-20, 2.0**10]))
def test_one_pass_ignores_scale_and_flips_and_falls_with_the_threshold(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 18, 18, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 18, 18, generator=generator) > 0.8
    found = metrics.localisation_scores(maps, masks)
    scaled = metrics.localisation_scores(factor * maps, masks)
    flipped = metrics.localisation_scores(maps.flip(-1), masks.flip(-1))
    for name, values in found.values.items():
        torch.testing.assert_close(scaled.values[name], values, equal_nan=True)
        torch.testing.assert_close(flipped.values[name], values, equal_nan=True)
        torch.testing.assert_close(flipped.chance[name], found.chance[name], equal_nan=True)
    recalls = torch.stack([found.values[f"epg_recall@{step / 10:g}"] for step in range(10)])
    assert (recalls.diff(dim=0) <= 0).all()
    sizes = torch.stack([found.chance[f"iou@{step / 10:g}"] for step in range(1, 6)])
    assert (sizes.diff(dim=0) <= 1e-12).all()


def test_maps_that_know_nothing_score_their_chance_levels():
    maps = torch.randn(1500, 32, 32, generator=torch.Generator().manual_seed(0))
    found = metrics.localisation_scores(maps, box(32, 4, 6, 18, 20), tolerance=4, sigma=None)
    for name, values in found.values.items():
        if name != "epg_signed":  # its denominator comes near 0
            assert values.mean().item() == pytest.approx(found.chance[name].mean().item(), abs=0.035), name


def test_smoothing_draws_the_maxima_of_noise_to_the_reflected_border():
    noise = torch.randn(1500, 32, 32, generator=torch.Generator().manual_seed(0))
    inner = box(32, 3, 3, 29, 29)
    plain, smooth = (metrics.hit_rate(maps, inner).mean() for maps in (noise, metrics.gaussian_smoothing(noise)))
    assert plain.item() == pytest.approx(metrics.chance_level(inner).item(), abs=0.04)
    assert smooth < plain - 0.2
