"""XRAI: closed forms, a slow second implementation on pixels, the public library, ties, segments and refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import skimage.segmentation
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

import cxrkit
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution import card
from cxrkit.attribution.xrai import _members, top_fraction

ALGORITHMS = ("full", "fast")


class Never(nn.Module):
    """A network that must not be run."""

    def forward(self, x):
        raise AssertionError("the network was run")


def smooth(channels=1, outputs=2, size=32):
    stem = [nn.Conv2d(channels, 4, 5, padding=2), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*stem, nn.Linear(4 * (size // 4) ** 2, outputs), nn.Softplus()).double()


def scene(height=64, width=64, channels=1, seed=0):
    """Bright blobs on a ramp, so that there is something to segment. [C, H, W] in [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(channels, height, width))
    blobs = ndimage.gaussian_filter(noise, [0, 5, 5])
    ramp = np.linspace(0, blobs.std(), width)
    image = np.where(blobs > 0.5 * blobs.std(), 2, 0) * blobs.std() + ramp + 0.3 * blobs
    return torch.from_numpy((image - image.min()) / np.ptp(image))


def random_masks(count, height, width, seed):
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.normal(size=(count, height, width)), [0, 2, 2])
    shares = generator.uniform(0.5, 0.95, count)
    return torch.from_numpy(np.stack([n > np.quantile(n, share) for n, share in zip(noise, shares, strict=True)]))


def shared_out(maps, masks, **options):
    return cxrkit.attribute(Never(), torch.rand(maps.shape[0], 1, *maps.shape[2:]).to(maps), "xrai", segments=masks,
                            attribution=maps, **options)  # fmt: skip


# Closed forms


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_square_of_sixteen_keeps_what_it_has(algorithm):
    squares = torch.zeros(16, 64, 64, dtype=torch.bool)
    for k in range(16):
        squares[k, 16 * (k // 4) : 16 * (k // 4) + 16, 16 * (k % 4) : 16 * (k % 4) + 16] = True
    attribution = squares[6].double()[None, None]
    found = shared_out(attribution, squares, algorithm=algorithm)
    assert torch.equal(found, attribution)
    assert found.sum() == 256


def test_full_looks_at_what_is_new_and_fast_at_the_whole_segment():
    """A segment that is good only for what another one already has: full takes it last, fast second."""
    attribution = torch.zeros(1, 1, 32, 30, dtype=torch.float64)
    attribution[..., :10, :] = 5  # rows of the first segment, half of the second
    attribution[..., 20:, :] = 1
    masks = torch.zeros(3, 32, 30, dtype=torch.bool)
    masks[0, :10], masks[1, :20], masks[2, 18:] = True, True, True
    full, fast = (shared_out(attribution, masks, algorithm=a)[0, 0, :, 0] for a in ALGORITHMS)
    assert full[:10].eq(5).all()
    assert fast[:10].eq(5).all()
    assert full[18:].tolist() == pytest.approx([12 / 14] * 14)  # rows 18 and 19 went with the third segment
    assert full[10:18].eq(0).all()
    assert fast[10:20].eq(0).all()
    assert fast[20:].eq(1).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_segments_that_add_fewer_than_fifty_pixels_are_left_out(algorithm):
    attribution = torch.arange(32 * 32, dtype=torch.float64).view(1, 1, 32, 32)
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, :2], masks[1, -7:, -7:], masks[2, 10:15, :10] = True, True, True  # 64, 49 and 50 pixels
    found = shared_out(attribution, masks, algorithm=algorithm)[0, 0]
    rest = ~(masks[0] | masks[2])
    for region in (masks[0], masks[2], rest):
        torch.testing.assert_close(found[region], attribution[0, 0][region].mean().expand(int(region.sum())))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20), algorithm=st.sampled_from(ALGORITHMS))
def test_the_sum_is_kept_and_values_stay_in_range(seed, count, algorithm):
    attribution = torch.randn(1, 2, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = shared_out(attribution, random_masks(count, 24, 20, seed) | _big(24, 20), algorithm=algorithm)
    torch.testing.assert_close(found.sum((2, 3)), attribution.sum((2, 3)), atol=1e-9, rtol=0)
    assert found.amax() <= attribution.amax()
    assert found.amin() >= attribution.amin()


def _big(height, width):
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, :10, :10] = True
    return mask


# A second, slow implementation: on pixels, one label of one image at a time


def slow(attribution, masks, algorithm):
    result = np.full(attribution.shape, np.nan)
    covered, candidates = np.zeros(attribution.shape, bool), [m for m in masks if m.any()]
    if algorithm == "fast":
        candidates = sorted(candidates, key=lambda m: -attribution[m].mean())
    while candidates:
        if algorithm == "full":
            candidates = [m for m in candidates if (m & ~covered).sum() >= 50]
            if not candidates:
                break
            best = max(range(len(candidates)), key=lambda k: attribution[candidates[k] & ~covered].mean())
        else:
            best = 0
        new = candidates.pop(best) & ~covered
        if new.sum() >= 50:
            result[new] = attribution[new].mean()
            covered |= new
    if not covered.all():
        result[~covered] = attribution[~covered].mean()
    return result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", [3, 40])
def test_maps_equal_the_slow_implementation(count, algorithm):
    attribution = torch.randn(3, 4, 40, 36, dtype=torch.float64)
    masks = torch.stack([random_masks(count, 40, 36, seed) for seed in range(3)])
    masks[:, 1] = False  # an empty segment changes nothing
    found = shared_out(attribution, masks, algorithm=algorithm, chunk=2)
    for i in range(3):
        for j in range(4):
            expected = slow(attribution[i, j].numpy(), masks[i].numpy(), algorithm)
            np.testing.assert_allclose(found[i, j], expected, atol=1e-12)


def test_attribution_is_the_largest_channel_of_the_mean_over_both_baselines():
    model, x = smooth(channels=3), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    expected = torch.zeros(2, 2, 3, 32, 32, dtype=torch.float64)
    for i, image in enumerate(x):
        for start in (image.min(), image.max()):
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                point = (start + node * (image - start))[None]
                slope = torch.autograd.functional.jacobian(model, point)[0, :, 0]
                expected[i] += weight / 2 * slope * (image - start)
    masks = random_masks(9, 32, 32, 1)
    found = cxrkit.attribute(model, x, "xrai", n_steps=6, segments=masks)
    torch.testing.assert_close(found, shared_out(expected.amax(2), masks), atol=1e-12, rtol=0)


# The public library


@pytest.mark.parametrize(("size", "channels"), [((224, 224), 1), ((70, 90), 3)])
def test_segments_are_those_of_saliency(size, channels):
    from saliency.core.xrai import _get_segments_felzenszwalb

    image = scene(*size, channels)
    bits, count = _members(image)
    expected = _get_segments_felzenszwalb(image.permute(1, 2, 0).numpy())
    expected = [mask for mask in expected if mask.any()]
    assert count == len(expected) > 10
    assert np.array_equal(np.unpackbits(bits, axis=0, count=count).astype(bool), np.stack(expected))


@pytest.mark.parametrize("given_segments", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_maps_of_one_attribution_are_those_of_saliency(algorithm, given_segments):
    from saliency.core import XRAI, XRAIParameters

    image, attribution = scene(80, 64), torch.randn(1, 3, 80, 64, dtype=torch.float64)
    masks = random_masks(30, 80, 64, 5) if given_segments else None
    found = cxrkit.attribute(Never(), image[None], "xrai", attribution=attribution, segments=masks, algorithm=algorithm)
    for j in range(3):
        expected = XRAI().GetMask(
            image.permute(1, 2, 0).numpy(),
            None,
            segments=None if masks is None else list(masks.numpy()),
            base_attribution=attribution[0, j, :, :, None].numpy(),
            extra_parameters=XRAIParameters(algorithm=algorithm),
        )
        np.testing.assert_allclose(found[0, j], expected, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_xrai_as_a_whole_agrees_with_saliency(channels):
    import saliency.core as library

    model, x = smooth(channels, size=64), scene(64, 64, channels)[None]

    def call(batch, call_model_args=None, expected_keys=None):
        point = torch.from_numpy(batch).permute(0, 3, 1, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(model(point)[:, call_model_args].sum(), point)
        return {library.INPUT_OUTPUT_GRADIENTS: gradient.permute(0, 2, 3, 1).numpy()}

    found = cxrkit.attribute(model, x, "xrai", n_steps=10, rule="uniform")
    exact = cxrkit.attribute(model, x, "xrai", n_steps=10)
    for j in range(2):
        parameters, image = library.XRAIParameters(steps=10), x[0].permute(1, 2, 0).numpy()
        peer = library.XRAI().GetMask(image, call, call_model_args=j, extra_parameters=parameters, batch_size=10)
        np.testing.assert_allclose(found[0, j], peer, atol=1e-7 * np.abs(peer).max(), rtol=1e-5)
        assert 0.99 < np.corrcoef(exact[0, j].flatten(), peer.flatten())[0, 1] < 1 - 1e-9


# Segments


def test_one_segmentation_serves_all_labels(monkeypatch):
    calls, segment = [], skimage.segmentation.felzenszwalb
    monkeypatch.setattr(
        skimage.segmentation, "felzenszwalb", lambda *a, **k: calls.append(k["scale"]) or segment(*a, **k)
    )
    x = torch.stack([scene(40, 40, seed=s) for s in range(2)])
    maps = cxrkit.attribute(Never(), x, "xrai", attribution=torch.randn(2, 5, 40, 40, dtype=torch.float64))
    assert calls == [50, 100, 150, 250, 500, 1200] * 2
    assert maps.shape == (2, 5, 40, 40)


def test_label_maps_say_the_same_as_their_masks():
    label_maps = torch.stack([torch.arange(30 * 28).view(30, 28) // 99, torch.arange(28).expand(30, 28) // 7 - 2])
    masks = torch.stack([m == value for m in label_maps for value in m.unique()])
    attribution = torch.randn(2, 3, 30, 28)
    expected = shared_out(attribution, masks)
    torch.testing.assert_close(shared_out(attribution, label_maps), expected, atol=0, rtol=0)
    small = label_maps.to(torch.int8).expand(2, -1, -1, -1)
    torch.testing.assert_close(shared_out(attribution, small, chunk=1), expected, atol=0, rtol=0)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_of_equal_segments_the_first_wins(algorithm):
    attribution = torch.zeros(1, 1, 30, 30)
    attribution[..., 10:20, :] = 1
    masks = torch.zeros(2, 30, 30, dtype=torch.bool)
    masks[0, :20], masks[1, 10:] = True, True  # both have a mean of 1/2
    first = shared_out(attribution, masks, algorithm=algorithm)[0, 0, :, 0]
    second = shared_out(attribution, masks.flip(0), algorithm=algorithm)[0, 0, :, 0]
    assert first.tolist() == [0.5] * 20 + [0] * 10
    assert second.tolist() == [0] * 10 + [0.5] * 20


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_an_image_without_contrast_is_one_region(value):
    attribution = torch.randn(1, 1, 40, 48, dtype=torch.float64)
    x = torch.full((1, 1, 40, 48), value, dtype=torch.float64)
    found = cxrkit.attribute(Never(), x, "xrai", attribution=attribution)
    torch.testing.assert_close(found, attribution.mean().expand_as(found))


# Labels, chunks, what is left alone


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_preset(algorithm):
    model, x = smooth(outputs=3), torch.stack([scene(32, 32, seed=s) for s in range(3)])
    masks = torch.stack([random_masks(20, 32, 32, seed) for seed in range(3)])
    options = {"n_steps": 3, "algorithm": algorithm, "segments": masks}
    by_hand = cxrkit.attribute(model, x, "xrai", output="probability", rule="uniform", **options)
    preset = cxrkit.attribute(model, x, "xrai", preset="path", **options)
    torch.testing.assert_close(preset, by_hand, atol=0, rtol=0)
    assert card("xrai").presets["path"] == {
        "n_steps": 100,
        "rule": "uniform",
        "algorithm": "full",
        "output": "probability",
    }


def test_labels_share_the_forward_passes():
    model, x, rows = smooth(outputs=3).train(), scene(32, 32)[None], []
    hook = model[0].register_forward_hook(lambda m, a, y: rows.append(len(y)))
    cxrkit.attribute(model, x, "saliency")  # tries the network out
    rows.clear()
    cxrkit.attribute(model, x, "xrai", n_steps=5, chunk=4)
    hook.remove()
    assert rows == [4, 4, 2]


def test_importing_it_does_not_bring_in_scikit_image():
    code = "import sys, cxrkit.attribution.xrai; print([m for m in ('skimage', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The highest values


def test_the_top_fraction_of_a_continuous_map_is_that_fraction():
    maps = torch.randn(2, 3, 224, 224)
    for fraction in (0.3, 0.05):
        kept = top_fraction(maps, fraction)
        assert kept.dtype == torch.bool
        assert (kept.double().mean((2, 3)) - fraction).abs().max() < 1e-4
    one = maps[0, 0].double().numpy()
    assert np.array_equal(top_fraction(maps)[0, 0], one > np.percentile(one, 70))
    assert torch.equal(top_fraction(maps[0, 0]), top_fraction(maps)[0, 0])


def test_flat_maps_keep_less():
    assert not top_fraction(torch.ones(1, 1, 10, 10)).any()
    steps = torch.zeros(10, 10)
    steps[:4], steps[0] = 1, 2
    assert torch.equal(top_fraction(steps, 0.3), steps == 2)


@pytest.mark.parametrize("fraction", [0, 1, 30, True, "0.3", float("nan")])
def test_a_fraction_out_of_range_is_named(fraction):
    with pytest.raises(ParameterError, match=r"fraction .* between 0 and 1"):
        top_fraction(torch.rand(4, 4), fraction)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "fst"}, "'fast'"),
        ({"n_steps": 0}, "n_steps .* at least 1"),
        ({"n_steps": 1.5}, "n_steps"),
        ({"rule": "gauss"}, "gauss_legendre"),
        ({"segments": torch.ones(4, 32, 30, dtype=torch.bool)}, r"H x W|\[S, 32, 32\].* got torch.bool \[4, 32, 30\]"),
        ({"segments": torch.ones(2, 4, 32, 32, dtype=torch.bool)}, r"\[2, 4, 32, 32\]"),
        ({"segments": torch.ones(0, 32, 32, dtype=torch.bool)}, r"\[0, 32, 32\]"),
        ({"segments": torch.ones(32, 32, dtype=torch.bool)}, r"got torch.bool \[32, 32\]"),
        ({"segments": torch.rand(4, 32, 32)}, "whole numbers .* got torch.float32"),
        ({"segments": np.ones((4, 32, 32), bool)}, "ndarray"),
        ({"segments": torch.arange(1024).view(1, 32, 32)}, "image 0: none has 50 pixels"),
        ({"attribution": torch.rand(1, 3, 32, 32)}, r"\[1, 2, 32, 32\].* got \[1, 3, 32, 32\]"),
        ({"attribution": torch.rand(1, 2, 32, 30)}, r"\[1, 2, 32, 30\]"),
        ({"attribution": torch.rand(2, 32, 32)}, r"\[2, 32, 32\]"),
        ({"attribution": "integrated_gradients"}, "got str"),
        ({"attribution": torch.full((1, 2, 32, 32), float("nan"))}, "NaN"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    model = smooth()
    model.labels = ("Mass", "Nodule")
    with pytest.raises(ParameterError, match=message):
        cxrkit.attribute(model, scene(32, 32)[None], "xrai", **options)


def test_images_too_small_to_segment_are_refused():
    x = torch.rand(1, 1, 40, 24, dtype=torch.float64)
    attribution = torch.rand(1, 2, 40, 24, dtype=torch.float64)
    with pytest.raises(AttributionError, match=r"40 x 24 pixels .* 32 x 32 or more, or segments="):
        cxrkit.attribute(Never(), x, "xrai", attribution=attribution)
    halves = torch.arange(40)[:, None].expand(1, 40, 24) // 20
    assert cxrkit.attribute(Never(), x, "xrai", attribution=attribution, segments=halves).shape == (1, 2, 40, 24)
