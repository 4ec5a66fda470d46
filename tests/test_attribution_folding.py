"""Batch norm folded into convolutions: same maps, same network afterwards, and where nothing may be folded."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cxrkit
from cxrkit.attribution import folding
from cxrkit.attribution.folding import folded
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.target import Explained
from cxrkit.models import Classifier, create

CPU = torch.device("cpu")
OPTIONS = {
    "integrated_gradients": {"n_steps": 3},
    "smoothgrad": {"n_samples": 3},
    "guided_ig": {"n_steps": 4, "max_distance": 0.2},
    "blur_ig": {"n_steps": 3, "max_sigma": 3},
    "xrai": {"n_steps": 2},
}


def used(norm):
    """A norm whose numbers are those of a trained one: none is 0 or 1, some factors are negative."""
    for values in (norm.weight, norm.bias, norm.running_mean):
        if values is not None:
            nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.3, 2)
    return norm


class Residual(nn.Module):
    """Convolutions with and without bias, in groups and strided; in-place and functional ReLUs; a shortcut."""

    def __init__(self, channels=1, outputs=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1, bias=False), used(nn.BatchNorm2d(6)), nn.ReLU(True))
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.norm1 = used(nn.BatchNorm2d(8, affine=False))
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.norm2 = used(nn.BatchNorm2d(6, eps=0.1))
        self.short = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), used(nn.BatchNorm2d(6)))
        self.head = nn.Linear(6, outputs)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


class Dense(nn.Module):
    """Norm, ReLU, convolution, as in DenseNet: only conv1 has a norm to itself."""

    def __init__(self, channels=1, outputs=3):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm1, self.conv1 = used(nn.BatchNorm2d(5)), nn.Conv2d(5, 6, 1, bias=False)
        self.norm2, self.conv2 = used(nn.BatchNorm2d(6)), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm3, self.head = used(nn.BatchNorm2d(9)), nn.Linear(9, outputs)

    def forward(self, x):
        x = self.conv0(x)
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(torch.cat([x, y], 1))).mean((2, 3)))


FOLDABLE = {Residual: {"stem.0", "conv1", "conv2", "short.0"}, Dense: {"conv1"}}


def pairs(model, image=None, check=True):
    """Names of the convolutions that get a norm's work while the network is explained; without `check` those that the
    forward pass of one image shows, whatever becomes of the logits.
    """
    image = torch.rand(1, 1, 12, 10).to(next(model.parameters())) if image is None else image
    explained = Explained(model)
    with prepared(explained, image):
        mode = folding._Folded(explained, image)
        names = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return {names[kernel] for kernel in mode.kernels if mode.keeps_logits or not check}


def maps(model, images, method, monkeypatch):
    """Maps with and without folding."""
    found = cxrkit.attribute(model, images, method, **OPTIONS[method])
    with monkeypatch.context() as patch:
        patch.setattr(folding, "_FEWEST", math.inf)
        return found, cxrkit.attribute(model, images, method, **OPTIONS[method])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Same maps


@pytest.mark.parametrize("kind", FOLDABLE)
def test_layers_that_are_folded(kind):
    assert pairs(kind().eval()) == FOLDABLE[kind]


@pytest.mark.parametrize("kind", FOLDABLE)
@pytest.mark.parametrize("method", OPTIONS)
def test_maps_are_those_of_the_network_itself(kind, method, monkeypatch):
    model, images = kind().eval().double(), torch.rand(2, 1, 32, 33, dtype=torch.float64)
    found, expected = maps(model, images, method, monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)
    assert not torch.equal(found, expected)  # so it was folded


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "blur_ig"])
def test_maps_in_single_precision(method, monkeypatch):
    found, expected = maps(Residual().eval(), torch.rand(2, 1, 20, 21), method, monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_maps_of_a_classifier(name, monkeypatch):
    model = create(name, ["a", "b"]).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.rand(2, 1, 40, 40, dtype=torch.float64)
    found, expected = maps(model, images, "integrated_gradients", monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)
    assert not torch.equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(
    bias=st.booleans(),
    affine=st.booleans(),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_folded_convolution_is_both_layers(bias, affine, groups, stride, dilation, eps, seed):
    torch.manual_seed(seed)
    convolution = nn.Conv2d(2, 4, 3, stride, 1, dilation, groups, bias)
    norm = used(nn.BatchNorm2d(4, eps, affine=affine))
    pair = nn.Sequential(convolution, norm).eval().double()
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    values = ((convolution(x).movedim(1, -1) - norm.running_mean) / (norm.running_var + eps).sqrt()).movedim(-1, 1)
    if affine:
        values = values * norm.weight[:, None, None] + norm.bias[:, None, None]
    pair.append(nn.Flatten())
    with folded(Explained(pair), x[:1], 100):
        found = pair(x)
        torch.testing.assert_close(convolution(x).flatten(1), found, atol=0, rtol=0)
    torch.testing.assert_close(found, values.flatten(1), atol=1e-12, rtol=0)


def test_methods_of_layers_and_rules_never_fold(monkeypatch):
    def refuse(*args):
        raise AssertionError("folded")

    monkeypatch.setattr(folding, "_Folded", refuse)
    model, images = Residual().eval(), torch.rand(2, 1, 12, 12)
    for method in ("saliency", "input_x_gradient", "guided_backprop", "deeplift", "gradcam", "normgrad", "lrp"):
        cxrkit.attribute(model, images, method)
    with pytest.raises(AssertionError, match="folded"):
        cxrkit.attribute(model, images, "smoothgrad")


# What isn't folded


class Odd(nn.Module):
    """One convolution and its norm, used as `way` says."""

    def __init__(self, way=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = used(nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.way = way or (lambda net, x: net.norm(net.conv(x)))

    def forward(self, x):
        return self.head(torch.tanh(self.way(self, x)).mean((2, 3)))


@torch.jit.script
def doubled(x):
    return x * 2


def shortcut(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def gated(net, x):
    y = net.conv(x)
    return net.norm(y) * (y.detach() > 0)


def by_attribute(net, x):
    y = net.conv(x)
    return net.norm(y) + y.data


def scripted(net, x):
    y = net.conv(x)
    return net.norm(y) + doubled(y)


def convolved_twice(net, x):
    return net.norm(net.conv(x)) + net.conv(x.detach())


def normalised_twice(net, x):
    return net.norm(net.conv(x)) + net.norm(x.detach().expand(-1, 4, -1, -1))


def weights_used(net, x):
    return net.norm(net.conv(x)) * net.conv.weight.norm()


def weights_shared(net, x):
    return net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)


def between(net, x):
    return net.norm(F.relu(net.conv(x)))


def norm_first(net, x):
    return net.conv(net.norm(x.expand(-1, 4, -1, -1))[:, :1])


def changed_in_place(net, x):
    return net.norm(net.conv(x).mul_(2))


WAYS = (shortcut, gated, by_attribute, scripted, convolved_twice, normalised_twice, weights_used, weights_shared)
WAYS += (between, norm_first, changed_in_place)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_layers_used_in_another_way_are_left_alone(way, monkeypatch):
    assert pairs(Odd().eval()) == {"conv"}
    model = Odd(way).eval()
    assert not pairs(model)
    assert not pairs(model, check=False) or way is scripted  # seen by the logits only
    result, expected = maps(model, torch.rand(2, 1, 8, 8), "integrated_gradients", monkeypatch)
    assert torch.equal(result, expected)


CHANGES = {
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "old weight norm": lambda m: nn.utils.weight_norm(m.conv),
    "norm without running statistics": lambda m: setattr(m, "norm", nn.BatchNorm2d(4, track_running_stats=False)),
    "norm in training": lambda m: setattr(m.norm, "forward", lambda x: F.batch_norm(x, None, None, training=True)),
    "hook on the convolution": lambda m: m.conv.register_forward_hook(lambda _, args, y: y * 2),
    "half precision": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_someone_changed_are_left_alone(change):
    model, image = Odd().eval(), torch.rand(1, 1, 8, 8)
    assert folding._Folded(Explained(model), image).kernels
    CHANGES[change](model)
    dtype = next(model.parameters()).dtype
    assert not folding._Folded(Explained(model), image.to(dtype)).kernels


def test_convolutions_with_the_same_weights_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Flatten())
    model[2].weight = model[0].weight
    assert not pairs(model.eval())
    model[2].weight = nn.Parameter(torch.rand(1, 1, 3, 3))
    assert pairs(model) == {"0", "2"}


def test_a_network_that_squeezes_a_single_image_is_explained_as_before():
    class Squeezing(Residual):
        def forward(self, x):
            return super().forward(x).squeeze()

    model, images = Squeezing().eval(), torch.rand(4, 1, 9, 9)
    assert cxrkit.attribute(model, images, "smoothgrad", n_samples=4, chunk=4).shape == (4, 3, 9, 9)


@pytest.mark.parametrize("name", ["bcos_resnet18", "bcos_densenet121"])
def test_bcos_networks_are_left_alone(name):
    model = create(name, ["a", "b"]).eval()
    assert isinstance(model, Classifier)
    assert not pairs(model, torch.rand(1, 1, 64, 64))
