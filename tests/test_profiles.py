"""Neuron activation profiles and inactive feature maps: closed forms, a slow version, streams, and what is refused."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxrkit.errors import AttributionError, ParameterError
from cxrkit.metrics.profiles import inactive_feature_maps, neuron_activation_profiles, rank_feature_maps


class Two(nn.Module):
    """Two convolutions with an in-place rectifier between them, pooled to two logits."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.head(self.block(self.relu(self.first(x))).mean((2, 3)))


@pytest.fixture
def network():
    return Two().eval()


@pytest.fixture
def images():
    return torch.rand(7, 1, 9, 8)


GROUPS = {
    "covid": torch.tensor([True, True, False, False, False, False, False]),
    "pneumonia": torch.tensor([True, True, True, True, False, False, False]),
    "healthy": torch.tensor([False, False, False, False, True, True, False]),  # the last image is in no group
}
LAYERS = ["first", "block.0", "block"]


def slow_profiles(model, images, groups, layer):
    """Image by image, from METHODS 3.7."""
    kept = []
    handle = dict(model.named_modules())[layer].register_forward_hook(lambda m, i, output: kept.append(output.clone()))
    with torch.no_grad():
        for image in images:
            model(image[None])
    handle.remove()
    maps = [k[0].double().numpy() for k in kept]
    averages = {}
    for name, member in groups.items():
        chosen = [m for m, inside in zip(maps, member.tolist(), strict=True) if inside]
        averages[name] = sum(chosen) / len(chosen)
    mean = sum(averages.values()) / len(averages)
    return {name: average - mean for name, average in averages.items()}


def test_against_the_slow_version(network, images):
    found = neuron_activation_profiles(network, images, GROUPS, LAYERS)
    assert list(found) == LAYERS
    for layer in LAYERS:
        expected = slow_profiles(network, images, GROUPS, layer)
        assert list(found[layer]) == list(GROUPS)
        for name in GROUPS:
            assert found[layer][name].dtype == torch.float32
            np.testing.assert_allclose(found[layer][name].numpy(), expected[name], atol=1e-6)


def test_profiles_of_a_layer_sum_to_zero_and_identical_groups_have_none(network, images):
    profiles = neuron_activation_profiles(network.double(), images.double(), GROUPS, ["input"])["input"]
    assert sum(profiles.values()).abs().max() < 1e-15
    same = dict.fromkeys(("a", "b", "c"), GROUPS["covid"])
    for profile in neuron_activation_profiles(network, images.double(), same, ["first"])["first"].values():
        assert profile.abs().max() < 1e-15


def test_a_constant_image_added_to_all_inputs_of_a_linear_layer_changes_nothing():
    model = Two().double()
    images, extra = torch.rand(7, 1, 9, 8).double() / 2, torch.rand(1, 1, 9, 8).double() / 2
    before = neuron_activation_profiles(model, images, GROUPS, ["first"])["first"]
    after = neuron_activation_profiles(model, images + extra, GROUPS, ["first"])["first"]
    for name in GROUPS:
        torch.testing.assert_close(after[name], before[name], atol=1e-14, rtol=0)


def test_the_mean_of_groups_is_subtracted_not_the_mean_over_images(network):
    images = torch.zeros(5, 1, 4, 4)
    images[4] = 1
    groups = {"many": torch.tensor([True] * 4 + [False]), "one": torch.tensor([False] * 4 + [True])}
    profiles = neuron_activation_profiles(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), images, groups, ["input"])
    assert profiles["input"]["one"].unique().tolist() == [0.5]  # 0.8 with the mean over images
    assert profiles["input"]["many"].unique().tolist() == [-0.5]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_batches_and_chunks_change_nothing(chunk, sizes):
    torch.manual_seed(0)
    model, images = Two().eval(), torch.rand(7, 1, 9, 8)
    whole = neuron_activation_profiles(model, images, GROUPS, LAYERS)
    cuts = [0, *np.minimum(np.cumsum(sizes), 7).tolist(), 7]
    batches = (images[a:b] for a, b in itertools.pairwise(cuts) if b > a)
    parts = neuron_activation_profiles(model, batches, GROUPS, LAYERS, chunk=chunk)
    for layer in LAYERS:
        for name in GROUPS:
            torch.testing.assert_close(parts[layer][name], whole[layer][name], atol=1e-6, rtol=0)
    assert inactive_feature_maps(model, [images[:3], images[3:]], LAYERS).equals(
        inactive_feature_maps(model, images, LAYERS, chunk=chunk)
    )


def test_batches_are_let_go(network):
    alive = []

    def batches():
        for _ in range(7):
            assert sum(reference() is not None for reference in alive) <= 1
            pixels = np.random.default_rng(0).random((1, 1, 9, 8), dtype=np.float32)
            alive.append(weakref.ref(pixels))
            yield torch.from_numpy(pixels)  # keeps the array as long as its memory is in use
            del pixels

    neuron_activation_profiles(network, batches(), GROUPS, LAYERS)
    assert len(alive) == 7


def test_an_inner_layer_s_maps_are_those_before_later_work_in_place(network, images):
    found = neuron_activation_profiles(network, images, GROUPS, [network.first])["first"]["covid"]
    with torch.no_grad():
        maps = network.first(images).double()
    averages = [maps[member].mean(0) for member in GROUPS.values()]
    torch.testing.assert_close(found, (averages[0] - sum(averages) / 3).float())


def test_a_zero_filter_with_a_bias_is_inactive_and_one_varying_image_revives_it():
    conv = nn.Conv2d(1, 2, 3)
    conv.weight.data[0], conv.bias.data[0] = 0, 0.3
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    table = inactive_feature_maps(model, torch.rand(4, 1, 6, 6), ["0"])
    assert table.to_dict("records") == [{"layer": "0", "maps": 2, "inactive": 1, "percent": 50.0}]
    assert inactive_feature_maps(model, torch.rand(4, 1, 6, 6), ["0"], definition="zero")["inactive"].item() == 0
    conv.weight.data[0] = 1
    flat, varied = torch.full((4, 1, 6, 6), 0.5), torch.full((1, 1, 6, 6), 0.5)
    varied[0, 0, 0, 0] = 1
    assert inactive_feature_maps(model, flat, ["0"])["inactive"].item() == 2
    assert inactive_feature_maps(model, [flat, varied, flat], ["0"])["inactive"].item() == 0


def test_a_constant_may_differ_between_images_and_zero_is_stricter():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data[:], model[0].bias.data[:] = 1, -0.45
    images = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 1, 5, 5)
    counts = {
        d: inactive_feature_maps(model, images, ["0", "1"], definition=d)["inactive"].tolist()
        for d in ("constant", "zero")
    }
    assert counts == {"constant": [1, 1], "zero": [0, 0]}
    assert inactive_feature_maps(model, images[:2], ["0", "1"], definition="zero")["inactive"].tolist() == [0, 1]


def test_the_threshold_is_that_of_the_paper():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model[0].weight.data[:] = torch.tensor([1e-30, 1.01e-30], dtype=torch.float64).view(2, 1, 1, 1)
    images = torch.zeros(1, 1, 3, 3).double()
    images[0, 0, 0, 0] = 1
    assert inactive_feature_maps(model, images, ["0"])["inactive"].item() == 1


def test_removed_maps_are_nan_and_the_others_keep_their_numbers(network, images):
    network.first.weight.data[2] = 0
    images[5:] = 0  # the last batch alone would leave no map
    kept = neuron_activation_profiles(network, images, GROUPS, ["first"], chunk=1)
    removed = neuron_activation_profiles(network, images, GROUPS, ["first"], remove_inactive=True, chunk=1)
    for name in GROUPS:
        assert removed["first"][name][2].isnan().all()
        assert removed["first"][name][[0, 1, 3]].equal(kept["first"][name][[0, 1, 3]])
    assert 2 not in rank_feature_maps(removed)["map"].tolist()
    assert rank_feature_maps(kept)["map"].tolist()[-1] == 2
    assert kept["first"]["covid"][2].abs().max() < 1e-15  # the same constant in every group


def test_ranking_by_mean_absolute_profile():
    profile = torch.zeros(3, 2, 2)
    profile[0, 0, 0], profile[2] = -8, 1.5
    table = rank_feature_maps({"layer": {"a": profile, "b": -profile}, "other": {"a": profile[:1], "b": profile[:1]}})
    expected = pd.DataFrame({"layer": ["layer"] * 3 + ["other"], "map": [0, 2, 1, 0], "strength": [2.0, 1.5, 0.0, 2.0]})
    pd.testing.assert_frame_equal(table, expected)
    equal = rank_feature_maps({"layer": {"a": torch.ones(400, 2, 2), "b": torch.ones(400, 2, 2)}})
    assert equal["map"].tolist() == list(range(400))


def test_a_layer_named_twice_counts_once_and_groups_may_be_lists_or_columns(network, images):
    groups = {name: member.tolist() for name, member in GROUPS.items()}
    groups["covid"] = pd.Series(groups["covid"])
    twice = neuron_activation_profiles(network, images, groups, ["first", network.first])
    once = neuron_activation_profiles(network, images, GROUPS, ["first"])
    assert list(twice) == ["first"]
    assert twice["first"]["covid"].equal(once["first"]["covid"])


def test_model_is_left_as_it_was(images):
    model = Two().train()
    model.head.eval()
    model.first.weight.requires_grad_(False)
    statistics = model.block[1].running_mean.clone()
    neuron_activation_profiles(model, images, GROUPS, LAYERS)
    inactive_feature_maps(model, images, LAYERS)
    with pytest.raises(AttributionError):
        inactive_feature_maps(model, images, [*LAYERS, "unused"])
    assert model.training
    assert model.block[2].training
    assert not model.head.training
    assert not model.first.weight.requires_grad
    assert model.block[0].weight.requires_grad
    assert all(not module._forward_hooks for module in model.modules())
    assert model.block[1].running_mean.equal(statistics)
    assert torch.is_grad_enabled()


NAN_WEIGHT = Two()
NAN_WEIGHT.first.weight.data[1] = torch.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": ["blok"]}, ParameterError, "unknown layer 'blok'; did you mean 'block'"),
        ({"layers": [nn.ReLU()]}, ParameterError, "isn't part of the network"),
        ({"layers": []}, ParameterError, "layers is empty"),
        ({"layers": ["head"]}, AttributionError, "layer head puts out no map"),
        ({"layers": ["unused"]}, AttributionError, "layer unused doesn't run"),
        ({"groups": {"all": [True] * 7}}, ParameterError, "at least two groups"),
        ({"groups": {"a": [True] * 7, "b": [False] * 7}}, ParameterError, "group 'b' is empty"),
        ({"groups": {"a": [True] * 7, "b": [1] * 7}}, ParameterError, "group 'b' must be bool"),
        ({"groups": {"a": [True] * 7, "b": [True] * 6}}, ParameterError, "'a' 7, 'b' 6"),
        ({"images": torch.rand(6, 1, 9, 8)}, ParameterError, "groups are over 7 images; there are 6"),
        ({"images": [torch.rand(6, 1, 9, 8)]}, ParameterError, "groups are over 7 images; there are 6"),
        ({"images": [torch.rand(6, 1, 9, 8)] * 2}, ParameterError, "groups are over 7 images; there are more"),
        ({"images": [torch.rand(3, 1, 9, 8), torch.rand(4, 1, 9, 9)]}, ParameterError, "images must be of one size"),
        ({"images": []}, ParameterError, "images holds no batch"),
        ({"images": [["a"]]}, AttributionError, "images must be a tensor"),
        ({"images": torch.full((7, 1, 9, 8), torch.nan)}, AttributionError, "image 0 holds NaN"),
        ({"model": NAN_WEIGHT}, AttributionError, "layer first has NaN or infinite values for image 0"),
        ({"chunk": 0}, ParameterError, "chunk must be"),
    ],
)
def test_refusals(network, images, change, error, message):
    given_ = {"model": network, "images": images, "groups": GROUPS, "layers": ["first"]} | change
    with pytest.raises(error, match=message):
        neuron_activation_profiles(**given_)


def test_refusals_of_inactive_maps(network, images):
    with pytest.raises(ParameterError, match="definition 'dead' is unknown"):
        inactive_feature_maps(network, images, ["first"], definition="dead")
    with pytest.raises(AttributionError, match="layer block puts out maps of one pixel"):
        inactive_feature_maps(network, images[..., :3, :3], ["first", "block"])
    assert inactive_feature_maps(network, images[..., :3, :3], ["block"], definition="zero")["inactive"].item() == 0
