"""Guided and blur integrated gradients: closed forms, slow second implementations, the public library, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

import cxrkit
import cxrkit.attribution.path  # registers the methods
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution import card
from cxrkit.attribution.path import _blurred

PATH = ("guided_ig", "blur_ig")
FEW = {"guided_ig": {"n_steps": 6, "max_distance": 0.2}, "blur_ig": {"n_steps": 5, "max_sigma": 4}}


class Linear(nn.Module):
    def __init__(self, weights):  # [L, C, H, W]
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, x):
        return torch.einsum("lchw,bchw->bl", self.weights, x)


def smooth(channels=1, outputs=3, size=(7, 6)):
    features = 4 * size[0] * size[1]
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(features, outputs)]
    return nn.Sequential(*layers, nn.Softplus()).double()


def rectified(channels=1, outputs=3):
    stem = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs))


def scored(model, x, j, output="logit"):
    y = model(x[None])[0, j]
    return y.sigmoid() if output == "probability" else y


def gradient_function(model, shape, j, output="logit", dtype=torch.float64):
    def gradient(x):
        point = torch.as_tensor(x, dtype=dtype).view(shape).requires_grad_()
        return torch.autograd.grad(scored(model, point, j, output), point)[0].double().numpy().reshape(x.shape)

    return gradient


@pytest.fixture
def images():
    return torch.rand(3, 1, 7, 6, dtype=torch.float64)


# Closed forms


@settings(max_examples=25, deadline=None)
@given(
    fraction=st.floats(0.05, 1),
    distance=st.floats(0, 1),
    n_steps=st.integers(1, 7),
    start=st.sampled_from(["black", "white", "mean"]),
)
def test_on_a_linear_model_every_guided_path_gives_weight_times_difference(fraction, distance, n_steps, start):
    generator = torch.Generator().manual_seed(n_steps)
    weights, x = torch.randn(3, 2, 4, 5, generator=generator), torch.rand(2, 2, 4, 5, generator=generator)
    model = Linear(weights).double()
    options = {"fraction": fraction, "max_distance": distance, "n_steps": n_steps, "baseline": start}
    found = cxrkit.attribute(model, x.double(), "guided_ig", **options)
    expected = cxrkit.attribute(model, x.double(), "integrated_gradients", n_steps=1, baseline=start)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_guided_path_without_leave_to_stray_is_a_left_riemann_sum(images):
    model, n_steps = smooth(), 9
    found = cxrkit.attribute(model, images, "guided_ig", n_steps=n_steps, max_distance=0, baseline=0.2)
    expected = torch.zeros_like(found)
    for i, x in enumerate(images):
        for j in range(3):
            gradient = gradient_function(model, x.shape, j)
            points = [0.2 + t / n_steps * (x.numpy() - 0.2) for t in range(n_steps)]
            expected[i, j] = torch.from_numpy(sum(map(gradient, points)) / n_steps * (x.numpy() - 0.2))[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("distance", [0.0, 0.1, 1.0])
def test_guided_maps_sum_to_the_difference_of_scores_as_steps_grow(distance, images):
    model = smooth()
    gap = (model(images) - model(torch.zeros_like(images))).detach()
    errors = [
        (cxrkit.attribute(model, images, "guided_ig", n_steps=n, max_distance=distance).sum((2, 3)) - gap).abs().max()
        for n in (10, 40, 160)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01 * gap.abs().max()


def test_an_image_that_is_its_baseline_gets_zero_and_so_does_what_has_no_influence(images):
    model = smooth()
    same = cxrkit.attribute(model, images, "guided_ig", baseline=images, n_steps=3)
    assert same.abs().max() == 0
    weights = torch.randn(2, 1, 7, 6)
    weights[..., :3] = 0
    squared = nn.Sequential(Linear(weights), nn.Tanh()).double()
    found = cxrkit.attribute(squared, images, "guided_ig", n_steps=5)
    assert found[..., :3].abs().max() == 0
    assert found[..., 3:].abs().min() > 0


def test_pixels_that_start_where_they_end_do_not_move(images):
    images[:, :, :4] = 0  # a black border under a black baseline
    found = cxrkit.attribute(smooth(), images, "guided_ig", n_steps=4, fraction=0.9)
    assert found[..., :4, :].abs().max() == 0
    assert found[..., 4:, :].abs().max() > 0


def test_low_gradients_go_first():
    """On (a + 1)(b + 1) - 1 from zero, the free path moves what is less steep first, so that both orders differ."""

    class Product(nn.Module):
        def forward(self, x):
            a, b = x[:, 0, 0, 0], 2 * x[:, 0, 0, 1]
            return ((a + 1) * (b + 1) - 1)[:, None]

    x = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    options = {"n_steps": 2, "fraction": 0.01, "max_distance": 1.0}
    # a is less steep at 0 (1 against 2): it goes first and gains 1; b then has slope 2 (a + 1) = 4.
    found = cxrkit.attribute(Product(), x, "guided_ig", **options)
    assert found.flatten().tolist() == pytest.approx([1, 4])
    options["max_distance"] = 0.0
    assert cxrkit.attribute(Product(), x, "guided_ig", **options).flatten().tolist() == pytest.approx([1.5, 2.5])


def test_blur_of_a_constant_image_is_zero_away_from_borders_and_without_blur_everywhere():
    model = smooth(size=(30, 28))
    flat = torch.full((1, 1, 30, 28), 0.6, dtype=torch.float64)
    found = cxrkit.attribute(model, flat, "blur_ig", n_steps=4, max_sigma=2)
    inner = (slice(None), slice(None), slice(9, -9), slice(9, -9))
    assert found[inner].abs().max() < 1e-12
    assert found.abs().max() > 1e-6
    images = torch.rand(2, 1, 30, 28, dtype=torch.float64)
    assert cxrkit.attribute(model, images, "blur_ig", n_steps=3, max_sigma=0).abs().max() == 0


def test_blur_map_sums_to_the_difference_of_scores_for_many_steps():
    model, x = smooth(size=(12, 12)), torch.rand(2, 1, 12, 12, dtype=torch.float64)
    gap = (model(x) - model(_blurred(x, torch.full((2,), 3.0, dtype=torch.float64)))).detach()
    fine = cxrkit.attribute(model, x, "blur_ig", n_steps=400, max_sigma=3).sum((2, 3))
    assert (fine - gap).abs().max() < 0.03 * gap.abs().max()


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.12, 0.13, 0.5, 1.37, 4.0, 19.99, 50.0])
def test_blur_is_that_of_scipy(sigma):
    x = torch.rand(2, 2, 17, 12, dtype=torch.float64)
    found = _blurred(x, torch.tensor([sigma, 2.0], dtype=torch.float64))
    for image, own, blurred in zip(x, (sigma, 2.0), found, strict=True):
        expected = ndimage.gaussian_filter(image.numpy(), [0, own, own], mode="constant")
        np.testing.assert_allclose(blurred, expected, atol=1e-12)


# Second, slow implementations: one label of one image at a time, in pixel values


def slow_guided(gradient, x, start, n_steps, fraction, distance):
    state, total, whole = start.copy(), np.zeros_like(x), np.abs(x - start).sum()
    way = np.where(x == start, 1.0, x - start)
    for t in range(1, n_steps + 1):
        slope, before = gradient(state), state.copy()
        alpha = t / n_steps
        low, high = start + max(alpha - distance, 0) * (x - start), start + min(alpha + distance, 1) * (x - start)
        behind = (state - start) / way < max(alpha - distance, 0)
        state = np.where(behind, low, state)
        while np.abs(x - state).sum() - (1 - alpha) * whole > 1e-11:
            cost = np.where(state == high, np.inf, np.abs(slope))
            chosen = (cost <= np.quantile(cost, fraction, method="lower")) & (cost < np.inf)
            ratio = (np.abs(x - state).sum() - (1 - alpha) * whole) / np.abs(high - state)[chosen].sum()
            state = np.where(chosen, high if ratio > 1 else state + ratio * (high - state), state)
        total += slope * (state - before)
    return total


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize(
    ("n_steps", "fraction", "distance", "start"),
    [(20, 0.25, 0.02, 0.0), (25, 0.5, 1.0, 0.0), (10, 0.03, 0.3, 0.7), (7, 1.0, 0.5, 0.3)],
)
def test_guided_ig_equals_the_slow_implementation(n_steps, fraction, distance, start, output):
    model, x = smooth(channels=2), torch.rand(2, 2, 7, 6, dtype=torch.float64)
    options = {"n_steps": n_steps, "fraction": fraction, "max_distance": distance, "baseline": start}
    found = cxrkit.attribute(model, x, "guided_ig", output=output, chunk=4, **options)
    for i, image in enumerate(x.numpy()):
        for j in range(3):
            gradient = gradient_function(model, image.shape, j, output)
            expected = slow_guided(gradient, image, np.full_like(image, start), n_steps, fraction, distance)
            np.testing.assert_allclose(found[i, j], expected.sum(0), atol=1e-10, rtol=1e-8)


def slow_blur(gradient, x, n_steps, max_sigma):
    def blur(sigma):
        return ndimage.gaussian_filter(x, [0, sigma, sigma], mode="constant")

    total = np.zeros_like(x)
    for i in range(n_steps):
        sigma = i * max_sigma / n_steps
        total -= max_sigma / n_steps * (blur(sigma + 0.01) - blur(sigma)) / 0.01 * gradient(blur(sigma))
    return total


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize(("n_steps", "max_sigma"), [(9, 4.5), (4, 50)])
def test_blur_ig_equals_the_slow_implementation(n_steps, max_sigma, output):
    model, x = smooth(channels=2), torch.rand(2, 2, 7, 6, dtype=torch.float64)
    found = cxrkit.attribute(model, x, "blur_ig", output=output, chunk=4, n_steps=n_steps, max_sigma=max_sigma)
    for i, image in enumerate(x.numpy()):
        for j in range(3):
            expected = slow_blur(gradient_function(model, image.shape, j, output), image, n_steps, max_sigma)
            np.testing.assert_allclose(found[i, j], expected.sum(0), atol=1e-12, rtol=1e-8)


def test_on_a_rectified_network_guided_maps_correlate(images):
    model = rectified()
    x = images.float()
    found = cxrkit.attribute(model, x, "guided_ig", n_steps=25, max_distance=1.0, fraction=0.5)
    for i, image in enumerate(x.double().numpy()):
        for j in range(3):
            gradient = gradient_function(model, image.shape, j, dtype=torch.float32)
            expected = slow_guided(gradient, image, np.zeros_like(image), 25, 0.5, 1.0)[0]
            assert np.corrcoef(found[i, j].flatten(), expected.flatten())[0, 1] > 0.9


# The public library


def asked(model, j):
    """The model as the library `saliency` calls it: a batch [b, H, W, C] to its gradients."""
    import saliency.core as library

    def call(batch, call_model_args=None, expected_keys=None):
        x = torch.from_numpy(np.asarray(batch)).permute(0, 3, 1, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[:, j].sum(), x)
        return {library.INPUT_OUTPUT_GRADIENTS: gradient.permute(0, 2, 3, 1).numpy()}

    return call


@pytest.mark.parametrize(("n_steps", "fraction", "distance"), [(30, 0.25, 0.02), (25, 0.5, 1.0)])
def test_guided_ig_agrees_with_saliency(n_steps, fraction, distance, monkeypatch):
    import saliency.core as library

    quantile = np.quantile  # the library asks for it with a keyword that NumPy 2 no longer has
    monkeypatch.setattr(np, "quantile", lambda a, q, interpolation: quantile(a, q, method=interpolation))
    model, x = smooth(channels=2), torch.rand(1, 2, 7, 6, dtype=torch.float64)
    options = {"n_steps": n_steps, "fraction": fraction, "max_distance": distance}
    found = cxrkit.attribute(model, x, "guided_ig", **options)
    for j in range(3):
        peer = library.GuidedIG().GetMask(
            x[0].permute(1, 2, 0).numpy(), asked(model, j), x_steps=n_steps, fraction=fraction, max_dist=distance
        )
        np.testing.assert_allclose(found[0, j], peer.sum(2), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("make", [smooth, lambda **options: rectified(channels=2).double()])
def test_blur_ig_agrees_with_saliency(make):
    import saliency.core as library

    model, x = make(channels=2), torch.rand(1, 2, 7, 6, dtype=torch.float64)
    found = cxrkit.attribute(model, x, "blur_ig", n_steps=20, max_sigma=5)
    for j in range(3):
        image = x[0].permute(1, 2, 0).numpy()
        peer = library.BlurIG().GetMask(image, asked(model, j), max_sigma=5, steps=20, batch_size=5)
        np.testing.assert_allclose(found[0, j], peer.sum(2), atol=1e-10, rtol=1e-8)


# Labels, chunks, what is left alone


@pytest.mark.parametrize("method", PATH)
def test_passes_are_as_few_and_as_small_as_the_card_says(method, images):
    model, rows = smooth(), []
    hook = model[0].register_forward_hook(lambda m, a, y: rows.append(len(y)))
    cxrkit.attribute(model, images, "saliency")  # tries the network out
    rows.clear()
    cxrkit.attribute(model, images, method, chunk=2, **FEW[method])
    hook.remove()
    assert max(rows) == 2
    counting = 2 if method == "guided_ig" else 0  # one image a chunk, to learn how many labels there are
    paths = 3 if method == "guided_ig" else 1
    assert sum(rows) == 3 * paths * FEW[method]["n_steps"] + counting


def test_the_papers_settings_are_a_preset(images):
    model = smooth()
    for method, options in (
        ("guided_ig", {"n_steps": 25, "fraction": 0.5, "max_distance": 1.0}),
        ("blur_ig", {"n_steps": 100, "max_sigma": 50}),
    ):
        by_hand = cxrkit.attribute(model, images, method, output="probability", **options)
        torch.testing.assert_close(cxrkit.attribute(model, images, method, preset="path"), by_hand, atol=0, rtol=0)
        assert card(method).papers == ("path",)
        assert card(method).signed


@pytest.mark.parametrize("method", PATH)
def test_through_the_encoding_of_a_classifier(method):
    model = cxrkit.models.create("resnet18", labels=("Mass", "Nodule"))
    x = torch.rand(1, 1, 64, 64)
    maps = cxrkit.attribute(model, x, method, **{**FEW[method], "n_steps": 2})
    assert maps.shape == (1, 2, 64, 64)
    assert maps.abs().amax((2, 3)).min() > 0


# What is refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("guided_ig", {"n_steps": 0}, "n_steps .* at least 1; got 0"),
        ("guided_ig", {"n_steps": 2.5}, "n_steps .*2.5"),
        ("guided_ig", {"n_steps": True}, "n_steps"),
        ("guided_ig", {"fraction": 0}, "fraction .* above 0 and at most 1; got 0"),
        ("guided_ig", {"fraction": 1.1}, "fraction .*1.1"),
        ("guided_ig", {"fraction": "0.5"}, "fraction .*'0.5'"),
        ("guided_ig", {"max_distance": -0.1}, "max_distance .* from 0 to 1; got -0.1"),
        ("guided_ig", {"max_distance": float("nan")}, "max_distance .*nan"),
        ("guided_ig", {"baseline": "blck"}, "'black'"),
        ("guided_ig", {"max_sigma": 3}, "max_sigma"),
        ("blur_ig", {"n_steps": -1}, "n_steps"),
        ("blur_ig", {"max_sigma": -1}, "max_sigma .* 0 or more; got -1"),
        ("blur_ig", {"max_sigma": float("inf")}, "max_sigma .*inf"),
        ("blur_ig", {"max_sigma": None}, "max_sigma .*None"),
    ],
)
def test_options_out_of_range_are_named(method, options, message, images):
    with pytest.raises(ParameterError, match=message):
        cxrkit.attribute(smooth(), images, method, **options)


@pytest.mark.parametrize("method", PATH)
def test_networks_without_gradients_or_with_broken_weights_are_refused(method, images):
    class Cut(Linear):
        def forward(self, x):
            return super().forward(x.detach())

    weights = torch.rand(2, 1, 7, 6)
    with pytest.raises(AttributionError, match="detach"):
        cxrkit.attribute(Cut(weights).double(), images, method, **FEW[method])
    weights[1, 0, 2, 2] = float("nan")
    with pytest.raises(AttributionError, match="NaN or infinite values for image 0"):
        cxrkit.attribute(Linear(weights).double(), images, method, **FEW[method])
