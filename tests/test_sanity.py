"""Randomised networks, similarities against scipy, and architectures."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from bcos.modules import BcosConv2d, norms
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import nn

import cxrkit
from cxrkit.errors import ModelError, ParameterError
from cxrkit.metrics.sanity import (
    map_correlation,
    map_distance,
    randomised,
    rank_correlation,
    reproducibility,
)
from cxrkit.metrics.statistics import bootstrap, difference_of_means

NAN = math.nan
SHAPE = (12, 13)
# Few levels: ties are the rule.
pixels = hnp.arrays(np.float64, SHAPE, elements=st.integers(-6, 6).map(lambda value: value / 4))
SIMILARITIES = {
    "correlation": map_correlation,
    "rank_correlation": rank_correlation,
    "absolute_rank_correlation": partial(rank_correlation, absolute=True),
    "distance": map_distance,
}
SCALE_FREE = ["correlation", "rank_correlation", "absolute_rank_correlation"]


class Block(nn.Module):
    """Convolution and norm with a scale and a token of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6).view(6, 1, 1))
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.scale * self.norm(self.conv(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.BatchNorm2d(1)
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Block()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(self.before(x))).relu().mean((2, 3)))


@pytest.fixture
def trained():
    """A network that has seen data: no weight, bias or statistic is as it was made."""
    model = Network()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.mul_(0.5).add_(0.01 + 0.1 * torch.rand_like(tensor))
    return model.eval()


def differing(model: nn.Module, other: nn.Module) -> set[str]:
    own, others = model.state_dict(), other.state_dict()
    return {name for name in own if not own[name].equal(others[name])}


HEAD = {"head.weight", "head.bias"}
COUNTERS = {f"{norm}.num_batches_tracked" for norm in ("before", "stem.1", "block.norm")}


def test_full_randomises_every_weight_and_resets_every_norm(trained):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    random = randomised(trained, seed=3)
    assert differing(trained, random) == set(before) - COUNTERS
    assert all(tensor.equal(before[name]) for name, tensor in trained.state_dict().items())
    for norm in (random.before, random.stem[1], random.block.norm):
        assert norm.weight.unique().tolist() == [1]
        assert norm.bias.unique().tolist() == [0]
        assert norm.running_mean.unique().tolist() == [0]
        assert norm.running_var.unique().tolist() == [1]
    assert random.stem[0].bias.unique().tolist() == [0]
    assert random.head.weight.abs().max() <= 1 / math.sqrt(6)
    assert random.block.scale.flatten().sort().values.equal(trained.block.scale.flatten().sort().values)  # shuffled
    assert not random.training
    assert all(parameter.requires_grad for parameter in random.parameters())


def test_convolutions_have_the_variance_of_he():
    model = nn.Sequential(nn.Conv2d(20, 40, 3), nn.Conv2d(40, 20, 5), nn.Flatten(), nn.Linear(900, 30))
    random = randomised(model)
    assert random[0].weight.std().item() == pytest.approx(math.sqrt(2 / (40 * 9)), rel=0.05)
    assert random[1].weight.std().item() == pytest.approx(math.sqrt(2 / (20 * 25)), rel=0.05)
    assert random[3].weight.std().item() == pytest.approx(math.sqrt(1 / (3 * 900)), rel=0.05)


def test_semi_keeps_the_features(trained):
    assert differing(trained, randomised(trained, "semi")) == HEAD
    features = [m(torch.ones(1, 1, 9, 9)) for m in (trained.stem, randomised(trained, "semi").stem)]
    assert features[0].equal(features[1])


def test_both_kinds_give_the_head_the_same_weights(trained):
    full, semi = randomised(trained, seed=5), randomised(trained, "semi", seed=5)
    assert full.head.weight.equal(semi.head.weight)
    assert full.head.bias.equal(semi.head.bias)


def test_same_seed_same_network_and_the_global_state_is_left_alone(trained):
    state = torch.random.get_rng_state()
    first, second, other = randomised(trained, seed=1), randomised(trained, seed=1), randomised(trained, seed=2)
    assert torch.random.get_rng_state().equal(state)
    assert not differing(first, second)
    assert {"stem.0.weight", "block.conv.weight", "head.weight", "block.scale"} <= differing(first, other)


def test_bcos_networks_keep_their_linear_maps_and_lose_their_weights():
    model = nn.Sequential(
        BcosConv2d(1, 4, 3), norms.NoBias(norms.BatchNormUncentered2d)(4), BcosConv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    model = nn.Sequential(*model, nn.Flatten()).eval()
    model[1].running_var.fill_(3.0)
    random = randomised(model)
    assert {"0.linear.weight", "1.running_var", "2.linear.weight"} <= differing(model, random)
    assert random[1].bias is None
    images = torch.rand(2, 1, 8, 8)
    sums = cxrkit.attribute(random, images, "bcos").sum((2, 3))
    torch.testing.assert_close(sums, random(images).detach(), atol=1e-6, rtol=1e-4)
    assert differing(model, randomised(model, "semi")) == {"2.linear.weight"}


def test_attention_and_class_tokens_are_randomised_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)

    model = Tokens()
    model.norm.bias.data.fill_(0.2)
    model.attention.in_proj_bias.data.normal_()
    model.attention.out_proj.bias.data.normal_()
    random = randomised(model)
    assert differing(model, random) == set(model.state_dict()) - {"norm.weight"}  # was 1 and is 1
    assert differing(model, randomised(model, "semi")) == {f"attention.out_proj.{name}" for name in ("weight", "bias")}


def test_parameters_behind_the_last_matrix_are_not_forgotten():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.relu = nn.Parameter(torch.arange(8.0)), nn.ReLU()

    model = nn.Sequential(nn.Linear(3, 8), Scale())
    assert "1.factor" in differing(model, randomised(model))


def test_the_card_of_the_copy_tells_and_the_model_s_does_not():
    model = cxrkit.models.create("resnet18", labels=["a", "b"]).eval()
    random = randomised(model, "semi", seed=4)
    assert random.card["randomised"] == {"kind": "semi", "seed": 4}
    assert "randomised" not in model.card
    assert random(torch.rand(1, 1, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "half"}, ParameterError, "kind 'half' is unknown; use 'full', 'semi'"),
        ({"model": nn.Sequential(nn.ReLU())}, ModelError, "no layer with a matrix of weights"),
    ],
)
def test_refusals_of_randomised(trained, options, error, message):
    with pytest.raises(error, match=message):
        randomised(**{"model": trained} | options)


# Similarities


@settings(max_examples=60, deadline=None)
@given(pixels, pixels)
def test_similarities_against_scipy(a, b):
    both = torch.tensor(a), torch.tensor(b)
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    for compare, slow in ((map_correlation, stats.pearsonr), (rank_correlation, stats.spearmanr)):
        value = NAN if constant else slow(a.ravel(), b.ravel())[0]
        assert compare(*both).item() == pytest.approx(value, abs=2e-6, nan_ok=True), compare.__name__
    flat = np.ptp(abs(a)) == 0 or np.ptp(abs(b)) == 0
    value = NAN if flat else stats.spearmanr(abs(a).ravel(), abs(b).ravel())[0]
    assert rank_correlation(*both, absolute=True).item() == pytest.approx(value, abs=2e-6, nan_ok=True)
    total = np.linalg.norm(a) + np.linalg.norm(b)
    value = np.linalg.norm(a - b) / total if total else NAN
    assert map_distance(*both).item() == pytest.approx(value, abs=2e-6, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(pixels, pixels, st.sampled_from(list(SIMILARITIES)))
def test_bounds_symmetry_and_flips(a, b, name):
    compare, a, b = SIMILARITIES[name], torch.tensor(a), torch.tensor(b)
    value = compare(a, b)
    assert value.isnan() or (0 if name == "distance" else -1) <= value <= 1
    for other in (compare(b, a), compare(a.flip(0, 1), b.flip(0, 1)), compare(a.T, b.T)):
        torch.testing.assert_close(other, value, equal_nan=True)
    same = compare(a, a)
    assert same.isnan() or same.item() == pytest.approx(0 if name == "distance" else 1)


@settings(max_examples=30, deadline=None)
@given(pixels, pixels, st.floats(0.01, 100), st.sampled_from(SCALE_FREE))
def test_a_positive_factor_changes_no_similarity_but_the_distance(a, b, factor, name):
    a, b = torch.tensor(a), torch.tensor(b)
    torch.testing.assert_close(
        SIMILARITIES[name](factor * a, b), SIMILARITIES[name](a, b), equal_nan=True, atol=1e-5, rtol=0
    )


def test_ranks_ask_only_for_order_and_absolute_ranks_forgive_the_sign():
    a, b = torch.randn(3, 2, *SHAPE)[0], torch.randn(2, *SHAPE)
    torch.testing.assert_close(rank_correlation(a.exp(), b), rank_correlation(a, b))
    torch.testing.assert_close(rank_correlation(-a, a), torch.full((2,), -1.0))
    torch.testing.assert_close(rank_correlation(-a, a, absolute=True), torch.ones(2))
    assert map_distance(a, -a).tolist() == pytest.approx([1, 1])
    assert map_distance(a, 0 * a).tolist() == pytest.approx([1, 1])
    assert map_distance(a, 3 * a).tolist() == pytest.approx([0.5, 0.5])


def test_independent_maps_are_at_chance():
    a, b = torch.randn(2, 40, 32, 32)
    assert abs(map_correlation(a, b).mean().item()) < 0.02
    assert abs(rank_correlation(a, b, absolute=True).mean().item()) < 0.02
    assert map_distance(a, b).mean().item() == pytest.approx(1 / math.sqrt(2), abs=0.01)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_leading_shapes_are_kept_broadcast_and_computed_alone(name):
    compare, a, b = SIMILARITIES[name], torch.randn(2, 3, *SHAPE), torch.randn(3, *SHAPE)
    whole = compare(a, b)
    assert whole.shape == (2, 3)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole[1, 2], compare(a[1, 2], b[2]))
    torch.testing.assert_close(compare(a.float(), b.half()), compare(a.float(), b.half().double()))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_degenerate_maps_give_nan_and_leave_the_others_alone(name):
    compare, good = SIMILARITIES[name], torch.randn(4, *SHAPE)
    bad = good.clone()
    bad[0], bad[1, 3, 3], bad[2, 0, 0] = 0, torch.nan, torch.inf
    values = compare(bad, good)
    assert values[1:3].isnan().all()
    assert values[3].isfinite()
    if name == "distance":
        assert values[0] == 1
        assert compare(bad[0], bad[0]).isnan()
    else:
        assert values[0].isnan()
        assert compare(torch.full(SHAPE, 0.7), good[0]).isnan()


def test_refusals_of_similarities():
    with pytest.raises(ParameterError, match=r"must end in the same \[H, W\]"):
        map_correlation(torch.rand(4, 5), torch.rand(5, 4))
    with pytest.raises(ParameterError, match="leading shapes that don't fit"):
        map_distance(torch.rand(2, 4, 5), torch.rand(3, 4, 5))


def test_randomising_shows_which_method_looks_at_the_network(trained):
    images = torch.rand(2, 1, 21, 21)
    before, after = (cxrkit.attribute(model, images, "saliency") for model in (trained, randomised(trained)))
    assert map_correlation(before, after).abs().max() < 0.9
    edges = images - images.roll(1, -1)  # a "method" that never asks the network
    assert map_correlation(edges, edges).min() == pytest.approx(1)


# Architectures


def slow_reproducibility(a, b, patients, n, seed):
    """Patients drawn as in `bootstrap`, both scores along, image by image; the signed interval folded at 0."""
    rows = {}
    for one, other, patient in zip(a, b, patients, strict=True):
        if not (math.isnan(one) or math.isnan(other)):
            rows.setdefault(patient, []).append((one, other))
    names, generator, differences = sorted(rows), np.random.default_rng(seed), []
    for _ in range(n):
        drawn = [pair for place in generator.integers(len(names), size=len(names)) for pair in rows[names[place]]]
        differences.append(np.mean([x for x, _ in drawn]) - np.mean([y for _, y in drawn]))
    low, high = np.percentile(differences, [2.5, 97.5])
    everything = np.array([pair for name in names for pair in rows[name]])
    mean = abs(everything[:, 0].mean() - everything[:, 1].mean())
    if low <= 0 <= high:
        return mean, 0.0, max(-low, high)
    return mean, min(abs(low), abs(high)), max(abs(low), abs(high))


@pytest.mark.parametrize("shift", [-0.3, 0.02, 0.3])
def test_reproducibility_against_the_slow_version(shift):
    generator = np.random.default_rng(2)
    a = generator.random(60)
    b, patients = a + shift + 0.2 * generator.normal(size=60), [f"p{k}" for k in generator.integers(20, size=60)]
    full = reproducibility(a, b, patients, n=50)
    assert full.mean == pytest.approx(difference_of_means(a, b))
    a[::9], b[::7] = NAN, NAN
    result = reproducibility(a, b, patients, n=200, seed=4)
    assert result == pytest.approx(slow_reproducibility(a, b, patients, 200, 4))
    assert result == pytest.approx(reproducibility(b, a, patients, n=200, seed=4))
    assert result.low <= result.mean <= result.high
    assert (result.low == 0) == (abs(shift) < 0.1)


def test_reproducibility_of_the_same_scores_is_zero_and_of_one_patient_has_no_interval():
    scores = np.random.default_rng(0).random(8)
    assert reproducibility(scores, scores, range(8)) == (0, 0, 0)
    alone = reproducibility(scores, scores + 0.5, ["p"] * 8)
    assert alone.mean == pytest.approx(0.5)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert math.isnan(reproducibility([NAN], [1.0], ["p"]).mean)


def test_refusals_of_reproducibility():
    with pytest.raises(ParameterError, match="over the same images"):
        reproducibility([1, 2], [1], ["a", "b"])
    with pytest.raises(ParameterError, match="two lists of the same length"):
        reproducibility([1, 2], [1, 2], ["a"])
    assert bootstrap([1, 2], ["a", "b"]).mean == 1.5
