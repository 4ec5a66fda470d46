"""Perturbation curves and completeness: closed forms, slow versions, scikit-learn, and properties."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bcos.modules import BcosConv2d, BcosLinear, LogitLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics
from torch import nn

import cxrkit
from cxrkit.attribution.baselines import baseline_images
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.metrics.faithfulness import completeness_gap, deletion, insertion

NAN = math.nan
HEIGHT, WIDTH = 6, 5
PIXELS = HEIGHT * WIDTH
CURVES = (insertion, deletion)
levels = hnp.arrays(np.float64, (1, 2, HEIGHT, WIDTH), elements=st.integers(-8, 8).map(float))


class Linear(nn.Module):
    def __init__(self, weights, bias=None):  # [L, C, H, W]
        super().__init__()
        self.head = nn.Linear(weights[0].numel(), len(weights))
        self.head.weight.data = weights.flatten(1).clone()
        self.head.bias.data = torch.zeros(len(weights)) if bias is None else bias

    def forward(self, x):
        return self.head(x.flatten(1))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.drop(self.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture
def tiny():
    return Tiny().eval()


@pytest.fixture
def images():
    return torch.rand(2, 1, HEIGHT, WIDTH)


@pytest.fixture
def maps():
    return torch.randn(2, 3, HEIGHT, WIDTH)


def slow_curve(model, scores_map, column, before, after, counts, output="probability"):
    """One image and label: pixels sorted by value, replaced one by one, one forward pass each."""
    pixels = product(range(HEIGHT), range(WIDTH))
    order = sorted(pixels, key=lambda pixel: -float(scores_map[pixel]))
    image, scores = before.clone(), []
    for done in range(len(order) + 1):
        with torch.no_grad():
            logit = model(image[None])[0, column]
        if done in counts:
            scores.append((logit.sigmoid() if output == "probability" else logit).item())
        if done < len(order):
            row, place = order[done]
            image[:, row, place] = after[:, row, place]
    return scores


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_insertion_and_deletion_against_the_slow_version(tiny, images, maps, steps, output):
    counts = [math.floor(k * PIXELS / min(steps, PIXELS) + 0.5) for k in range(min(steps, PIXELS) + 1)]
    blur, black = baseline_images(images, "blur"), torch.zeros_like(images)
    curves = [
        (insertion(tiny, images, maps, steps=steps, output=output), blur, images),
        (deletion(tiny, images, maps, steps=steps, output=output), images, black),
    ]
    for curve, before, after in curves:
        assert curve.fractions.tolist() == pytest.approx([count / PIXELS for count in counts])
        for row in range(2):
            for label in range(3):
                ends = before[row], after[row]
                expected = slow_curve(tiny, maps[row, label], label, *ends, counts, output=output)
                assert curve.scores[row, label].tolist() == pytest.approx(expected, abs=1e-6)
                area = sklearn_metrics.auc(curve.fractions, expected)
                assert curve.area[row, label].item() == pytest.approx(area, abs=1e-6)


def test_curves_of_a_linear_model_are_sums_of_its_contributions():
    weights, image = torch.randn(2, 1, HEIGHT, WIDTH), torch.rand(1, 1, HEIGHT, WIDTH)
    model, contributions = Linear(weights), weights[:, 0] * image[0]
    exact = {"steps": PIXELS, "output": "logit", "baseline": "black"}
    removed, added = (c(model, image, contributions[None], **exact).scores[0] for c in (deletion, insertion))
    falling = contributions.flatten(1).sort(1, descending=True).values.cumsum(1)
    zero = torch.zeros(2, 1)
    torch.testing.assert_close(added, torch.cat([zero, falling], 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(added + removed, falling[:, -1:].expand(-1, PIXELS + 1), atol=1e-5, rtol=0)


def test_the_true_contributions_are_the_best_order_of_all():
    weights, image = torch.tensor([[[[2.0, -1.0], [0.5, 1.0]]]]), torch.ones(1, 1, 2, 2)
    model, own = Linear(weights), weights
    settings_ = {"steps": 4, "output": "logit", "baseline": "black"}
    others = [torch.tensor(order).float().view(1, 1, 2, 2) for order in permutations(range(4))]
    areas = {c: [c(model, image, m, **settings_).area.item() for m in others] for c in (deletion, insertion)}
    assert deletion(model, image, own, **settings_).area.item() == pytest.approx(min(areas[deletion]))
    assert insertion(model, image, own, **settings_).area.item() == pytest.approx(max(areas[insertion]))


def test_equal_values_go_in_row_major_order():
    image = torch.zeros(1, 1, HEIGHT, WIDTH)
    image[0, 0, 0, 0], image[0, 0, -1, -1] = 1, 0.5
    model, flat = Linear(torch.ones(1, 1, HEIGHT, WIDTH)), torch.zeros(1, 1, HEIGHT, WIDTH)
    flat[0, 0, 2, 2] = 1  # first; then pixel by pixel
    scores = deletion(model, image, flat, steps=PIXELS, output="logit").scores[0, 0]
    assert scores[:3].tolist() == [1.5, 1.5, 0.5]
    assert scores[-2:].tolist() == [0.5, 0]


def test_each_label_follows_its_own_map_and_shares_both_ends(tiny, images, maps):
    curve = deletion(tiny, images, maps, steps=6)
    with torch.no_grad():
        torch.testing.assert_close(curve.scores[..., 0], tiny(images).sigmoid())
        torch.testing.assert_close(curve.scores[..., -1], tiny(0 * images).sigmoid())
    swapped = deletion(tiny, images, maps[:, [2, 0]], labels=[2, 0], steps=6)
    torch.testing.assert_close(swapped.area, curve.area[:, [2, 0]])
    exchanged = deletion(tiny, images, maps[:, [1, 0, 2]], steps=6)
    assert not torch.allclose(exchanged.scores[:, :2], curve.scores[:, :2])


@settings(max_examples=20, deadline=None)
@given(levels, st.sampled_from(CURVES))
def test_only_the_order_of_single_pixels_counts_and_areas_are_bounded(values, curve):
    torch.manual_seed(1)
    model, image, values = Tiny().eval(), torch.rand(1, 1, HEIGHT, WIDTH), torch.tensor(values)
    found = curve(model, image, values, [0, 2], steps=5, output="probability")
    other = curve(model, image, values**3 + 2 * values - 7, [0, 2], steps=5, output="probability")
    torch.testing.assert_close(other.scores, found.scores, equal_nan=True)
    constant = torch.tensor([[m.max() == m.min() for m in values[0]]])
    assert found.area.isnan().equal(constant)
    assert found.scores.isnan().all(-1).equal(constant)
    area = found.area[~constant]
    assert ((area >= 0) & (area <= 1)).all()


@pytest.mark.parametrize("curve", CURVES)
def test_chunks_change_nothing_and_degenerate_maps_are_nan(tiny, images, maps, curve):
    whole = curve(tiny, images, maps, steps=5)
    for chunk in (1, 4, 1000):
        torch.testing.assert_close(curve(tiny, images, maps, steps=5, chunk=chunk).scores, whole.scores)
    maps = maps.clone()
    maps[0, 0], maps[1, 2, 0, 0], maps[1, 0, 3, 3] = 0.3, torch.nan, torch.inf
    damaged = curve(tiny, images, maps, steps=5)
    bad = torch.tensor([[True, False, False], [True, False, True]])
    assert damaged.area.isnan().equal(bad)
    assert damaged.scores.isnan().all(-1).equal(bad)
    torch.testing.assert_close(damaged.area[~bad], whole.area[~bad])


@pytest.mark.parametrize("curve", CURVES)
def test_model_and_images_are_left_as_they_were(images, maps, curve):
    model = Tiny().train()
    model.fc.weight.requires_grad_(False)
    before, statistics = images.clone(), model.norm.running_mean.clone()
    curve(model, images, maps, steps=3)
    completeness_gap(model, images, maps)
    assert images.equal(before)
    assert model.training
    assert model.drop.training
    assert model.norm.running_mean.equal(statistics)
    assert not model.fc.weight.requires_grad
    assert model.conv.weight.requires_grad
    assert model.conv.weight.grad is None


def test_double_images_have_double_curves(images, maps):
    curve = deletion(Tiny().double().eval(), images.double(), maps, steps=3)
    assert curve.area.dtype == curve.scores.dtype == torch.float64


def test_classifiers_take_label_names_and_baselines_of_their_own():
    model = cxrkit.models.create("resnet18", labels=["a", "b"]).eval()
    images, maps = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    curve = insertion(model, images, maps, labels=["b"], steps=2, baseline=-0.5)  # outside [0, 1] on purpose
    with torch.no_grad():
        start = model.classify(model.encode(torch.full_like(images, -0.5))).sigmoid()[0, 1]
    assert curve.scores[0, 0, 0].item() == pytest.approx(start.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0 must be a whole number, at least 1"),
        ({"steps": 2.5}, "steps 2.5 must be a whole number"),
        ({"output": "softmax"}, "output 'softmax' is unknown; use 'logit', 'probability'"),
        ({"baseline": "blak"}, "unknown baseline 'blak'"),
        ({"labels": [0, 1]}, "maps of 3 labels for 2 scores: pass the maps' labels"),
        ({"labels": [0, 1, 7]}, "label 7"),
        ({"maps": torch.rand(2, 3, 4, 4)}, "at the resolution of the images"),
        ({"maps": torch.rand(1, 3, HEIGHT, WIDTH)}, r"must be \[B, L, H, W\]"),
        ({"maps": torch.rand(2, HEIGHT, WIDTH)}, r"must be \[B, L, H, W\]"),
        ({"chunk": 0}, "chunk must be"),
    ],
)
@pytest.mark.parametrize("curve", CURVES)
def test_refusals_of_curves(tiny, images, maps, curve, options, message):
    with pytest.raises(ParameterError, match=message):
        curve(**{"model": tiny, "images": images, "maps": maps} | options)


def test_further_refusals_of_curves(tiny, images, maps):
    with pytest.raises(AttributionError, match="image 0 holds NaN"):
        deletion(tiny, images * torch.nan, maps)


# Completeness


def test_input_x_gradient_of_a_linear_model_lacks_exactly_the_bias():
    model = Linear(torch.randn(3, 1, HEIGHT, WIDTH), torch.tensor([0.5, -1.0, 0.0]))
    images = torch.rand(2, 1, HEIGHT, WIDTH)
    maps = cxrkit.attribute(model, images, "input_x_gradient")
    with torch.no_grad():
        logits = model(images)
    result = completeness_gap(model, images, maps)
    torch.testing.assert_close(result.gap, -model.head.bias.data.expand(2, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.relative, model.head.bias.data.abs() / logits.abs(), atol=1e-5, rtol=1e-4)
    for promise in ("without_bias", logits - model.head.bias.data):
        assert completeness_gap(model, images, maps, promise=promise).gap.abs().max() < 1e-5
    some = completeness_gap(model, images, maps[:, [1]], labels=[1], promise="without_bias", chunk=1)
    assert some.gap.abs().max() < 1e-5


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("baseline", ["black", "white", "blur"])
def test_integrated_gradients_promise_the_difference(images, baseline, output):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 12, 2)).eval()
    options = {"baseline": baseline, "output": output}
    maps = cxrkit.attribute(model, images, "integrated_gradients", n_steps=40, **options)
    result = completeness_gap(model, images, maps, promise="difference", **options)
    assert result.gap.abs().max() < 1e-5
    with torch.no_grad():
        ends = [
            model(x) if output == "logit" else model(x).sigmoid() for x in (images, baseline_images(images, baseline))
        ]
    half = completeness_gap(model, images, maps / 2, promise="difference", **options)
    torch.testing.assert_close(half.gap, (ends[1] - ends[0]) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(half.relative, torch.full((2, 2), 0.5), atol=1e-3, rtol=0)


def test_bcos_contributions_promise_the_score_without_its_bias(images):
    body = [BcosConv2d(1, 4, 3), BcosConv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, LogitLayer(logit_bias=-1.5)).eval()
    maps = cxrkit.attribute(model, images, "bcos")
    assert completeness_gap(model, images, maps, promise="without_bias").gap.abs().max() < 1e-5
    score = completeness_gap(model, images, maps).gap
    torch.testing.assert_close(score, torch.full((2, 2), 1.5), atol=1e-5, rtol=0)


def test_a_logit_bias_is_known_where_no_layer_shows_the_class_map(images):
    model = nn.Sequential(nn.Flatten(), BcosLinear(PIXELS, 2), LogitLayer(logit_bias=0.7)).eval()
    maps = cxrkit.attribute(model, images, "bcos")
    assert completeness_gap(model, images, maps, promise="without_bias").gap.abs().max() < 1e-5


def test_the_bias_of_a_convolutional_head_is_found(images):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    maps = cxrkit.attribute(model, images, "input_x_gradient")
    assert completeness_gap(model, images, maps, promise="without_bias").gap.abs().max() < 1e-5


def test_gaps_without_an_answer_are_nan(images):
    model = Linear(torch.zeros(2, 1, HEIGHT, WIDTH), torch.tensor([0.0, 2.0]))
    maps = torch.ones(2, 2, HEIGHT, WIDTH)
    maps[1, 1, 0, 0] = torch.inf
    result = completeness_gap(model, images, maps)
    assert result.gap.isnan().tolist() == [[False, False], [False, True]]
    assert result.relative.isnan().tolist() == [[True, False], [True, True]]
    assert result.gap[0].tolist() == [PIXELS, PIXELS - 2]


class Headless(nn.Module):
    def forward(self, x):
        return F.softplus(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promise": "all"}, "promise 'all' is unknown; use 'score', 'difference', 'without_bias'"),
        ({"promise": torch.zeros(2, 2)}, r"promise has shape \(2, 2\); one sum per map is \(2, 3\)"),
        ({"promise": "without_bias", "output": "probability"}, "is for output 'logit'"),
        ({"output": "odds"}, "output 'odds' is unknown"),
        ({"labels": [0]}, "maps of 3 labels for 1 scores"),
        ({"model": Headless(), "maps": torch.rand(2, 1, HEIGHT, WIDTH), "promise": "without_bias"}, "no layer ends in"),
    ],
)
def test_refusals_of_completeness(tiny, images, maps, options, message):
    with pytest.raises(ParameterError, match=message):
        completeness_gap(**{"model": tiny, "images": images, "maps": maps} | options)
