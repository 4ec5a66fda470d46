"""Occlusion: closed forms, a slow second implementation, captum, forward passes counted, and what is refused."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cxrkit
import cxrkit.attribution.perturbation
from cxrkit import ParameterError


@pytest.fixture(autouse=True)
def _same_networks_every_time():
    torch.manual_seed(0)


class Linear(nn.Module):
    def __init__(self, weights):  # [L, C, H, W]
        super().__init__()
        self.head = nn.Linear(weights[0].numel(), len(weights))
        self.head.weight.data = weights.flatten(1).clone()

    def forward(self, x):
        return self.head(x.flatten(1))


def small_network(channels=1, outputs=3):
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, outputs),
    ).eval()


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 12)


def occlusion(model, images, **options):
    return cxrkit.attribute(model, images, "occlusion", **{"window": 5, "stride": 3, **options})


# Closed forms


def test_linear_network_with_windows_of_one_pixel_has_input_times_weights():
    weights, x = torch.randn(3, 2, 4, 5), torch.rand(2, 2, 4, 5)
    model = Linear(weights)
    product = (weights * x[:, None]).sum(2)
    torch.testing.assert_close(occlusion(model, x, window=1, stride=1), product, atol=1e-6, rtol=0)
    torch.testing.assert_close(cxrkit.attribute(model, x, "input_x_gradient"), product, atol=1e-6, rtol=0)
    x[:, 0] = 0.25  # of a pixel's channels, one is enough to count as changed
    shifted = (weights * (x - 0.25)[:, None]).sum(2)
    torch.testing.assert_close(occlusion(model, x, window=1, stride=1, fill=0.25), shifted, atol=1e-6, rtol=0)


def test_one_window_over_all_is_the_whole_difference_everywhere(images):
    model = small_network()
    difference = (model(images) - model(torch.ones_like(images))).detach()
    found = occlusion(model, images, window=(16, 12), stride=1, fill="white")
    torch.testing.assert_close(found, difference[:, :, None, None].expand(-1, -1, 16, 12), atol=1e-6, rtol=1e-5)


def test_disjoint_windows_share_out_a_linear_score():
    weights, x = torch.randn(2, 1, 6, 8), torch.rand(3, 1, 6, 8)
    found = occlusion(Linear(weights), x, window=(2, 4), stride=(2, 4))
    blocks = (weights * x[:, None])[:, :, 0].unfold(2, 2, 2).unfold(3, 4, 4).sum((4, 5))
    expected = blocks.repeat_interleave(2, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_last_window_is_cut_off_at_the_border():
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum((1, 2, 3))[:, None]

    # Windows of 3 by 2 over 6 pixels cover 0-2, 2-4 and 4-5.
    found = occlusion(Sum(), torch.ones(1, 1, 1, 6), window=(1, 3), stride=(1, 2))
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([3.0, 3.0, 3.0, 3.0, 2.5, 2.0]))


def test_a_covered_patch_that_the_score_reads_is_found(images):
    class Patch(nn.Module):
        def forward(self, x):
            return x[:, 0, 4:7, 6:9].sum((1, 2))[:, None]

    found = occlusion(Patch(), images, window=3, stride=1)
    assert (found[:, 0, 2:9, 4:11] > 0).all()
    found[:, 0, 2:9, 4:11] = 0
    assert not found.any()


def test_where_nothing_changes_the_map_is_exactly_zero_and_nothing_runs():
    model, rows = small_network(), []
    model.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    x = torch.zeros(2, 1, 20, 12)
    cxrkit.attribute(model, x, "saliency")  # tries the network out
    rows.clear()
    assert not occlusion(model, x).any()
    assert rows == [2]
    x[1, 0, 2, 2] = 1
    rows.clear()
    found = occlusion(model, x, window=4, stride=4)
    assert rows == [2, 1]
    assert not found[0].any()
    assert found[1, :, :4, :4].all()
    assert not found[1, :, 4:].any()


# A second, slow implementation: one window of one image at a time


def slow(model, images, window, stride, fill, output="logit"):
    def score(x):
        y = model(x[None])[0]
        return y.sigmoid() if output == "probability" else y

    (high, wide), (down, right) = window, stride
    height, width = images.shape[-2:]
    maps = []
    for image in images:
        total, count = torch.zeros(len(score(image)), height, width), torch.zeros(height, width)
        top = 0
        while True:
            left = 0
            while True:
                hidden = image.clone()
                hidden[:, top : top + high, left : left + wide] = fill
                total[:, top : top + high, left : left + wide] += (score(image) - score(hidden))[:, None, None]
                count[top : top + high, left : left + wide] += 1
                if left + wide >= width:
                    break
                left += right
            if top + high >= height:
                break
            top += down
        maps.append(total / count)
    return torch.stack(maps).detach()


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_occlusion_equals_the_slow_implementation(data, seed):
    height, width = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), "size")
    window = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)), "window")
    stride = data.draw(st.tuples(st.integers(1, window[0]), st.integers(1, window[1])), "stride")
    output = data.draw(st.sampled_from(["logit", "probability"]), "output")
    torch.manual_seed(seed)
    model, x = small_network(channels=2), torch.rand(2, 2, height, width)
    found = occlusion(model, x, window=window, stride=stride, fill=0.3, output=output)
    torch.testing.assert_close(found, slow(model, x, window, stride, 0.3, output), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("window", "stride"), [(3, 2), ((5, 4), (3, 2)), (1, 1), (4, 4), (7, 5), ((16, 13), 1), ([4, 6], [4, 1])]
)
def test_occlusion_agrees_with_captum(window, stride):
    model, x = small_network(channels=3), torch.rand(2, 3, 16, 13)
    found = occlusion(model, x, window=window, stride=stride, fill=0.3)
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (window, stride)]
    for j in range(3):
        peer = captum.attr.Occlusion(model)
        expected = peer.attribute(x, (3, *pairs[0]), target=j, strides=(3, *pairs[1]), baselines=0.3)
        torch.testing.assert_close(found[:, j], expected[:, 0].float(), atol=1e-6, rtol=1e-4)


# Options, labels, chunks


@pytest.mark.parametrize(
    ("fill", "image"),
    [
        ("black", torch.zeros_like),
        ("white", torch.ones_like),
        ("mean", lambda x: x.mean((2, 3), keepdim=True).expand_as(x)),
        (0.7, lambda x: torch.full_like(x, 0.7)),
        (torch.linspace(0, 1, 3).view(3, 1, 1, 1), lambda x: torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand_as(x)),
    ],
)
def test_fills_are_the_baselines_and_follow_their_images(fill, image, images):
    model = small_network()
    found = occlusion(model, images, fill=fill, chunk=2)
    for i, x in enumerate(images):
        expected = slow(model, x[None], (5, 5), (3, 3), image(images)[i, 0, 0, 0])
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-6, rtol=1e-4)


def test_blurred_fill_takes_away_less_than_black_from_a_smooth_image():
    model, x = Linear(torch.ones(1, 1, 16, 16)), torch.full((1, 1, 16, 16), 0.5)
    assert occlusion(model, x, fill="blur").abs().max() < 1e-5
    assert occlusion(model, x).min() > 1


def test_the_preset_is_the_papers_setting():
    model, x = small_network(outputs=2), torch.rand(1, 1, 54, 58)
    found = cxrkit.attribute(model, x, "occlusion", preset="covid")
    expected = occlusion(model, x, window=50, stride=4, fill="black", output="probability")
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    torch.testing.assert_close(found, slow(model, x, (50, 50), (4, 4), 0, "probability"), atol=1e-6, rtol=1e-4)


def test_all_labels_share_the_forward_passes_and_batches_stay_full(images):
    model, rows = small_network(), []
    model.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    cxrkit.attribute(model, images, "saliency")  # tries the network out
    for labels in (None, [1]):
        rows.clear()
        occlusion(model, images[:2], labels=labels, chunk=4)  # 5 x 4 windows of 2 images
        assert rows == [2] + 10 * [4]


def test_networks_without_gradients_are_explained(images):
    class Counting(nn.Module):
        def forward(self, x):
            return (x.detach() > 0.5).flatten(1).sum(1, keepdim=True).float().round()

    assert occlusion(Counting(), images, window=1, stride=1).equal((images > 0.5).float())


def test_attribution_through_the_encoding_of_a_classifier():
    from cxrkit.models import create

    model, x = create("resnet18", labels=("Mass", "Nodule")).eval(), torch.rand(1, 1, 32, 32)
    found = occlusion(model, x, window=16, stride=16, labels="Nodule")
    hidden = x.clone()
    hidden[:, :, 16:, :16] = 0
    with torch.no_grad():
        expected = (model(x) - model(hidden))[0, 1]
    torch.testing.assert_close(found[0, 0, 16:, :16], expected.expand(16, 16), atol=1e-5, rtol=1e-4)


# What is refused, and what is left alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be .* got 0"),
        ({"window": 2.5}, "window must be .* got 2.5"),
        ({"window": True}, "window must be .* got True"),
        ({"window": (3, 3, 3)}, r"window must be .* got \(3, 3, 3\)"),
        ({"window": "3"}, "window must be"),
        ({"stride": (2, 0)}, r"stride must be .* got \(2, 0\)"),
        ({"window": 13}, "window of 13 pixels doesn't fit into images of 12"),
        ({"window": (17, 3)}, "window of 17 pixels doesn't fit into images of 16"),
        ({"stride": 6}, "stride of 6 pixels leaves gaps between windows of 5"),
        ({"window": (5, 2), "stride": 3}, "stride of 3 pixels leaves gaps between windows of 2"),
        ({"fill": "blck"}, "fill: .*'black'"),
        ({"fill": torch.rand(2, 2)}, "fill: .*broadcast"),
        ({"size": 3}, "size"),
        ({"preset": "bcos"}, "covid"),
    ],
)
def test_unfit_options_are_parameter_errors(options, message, images):
    with pytest.raises(ParameterError, match=message):
        occlusion(small_network(), images, **options)
