"""LRP and RAP: closed forms, slow second implementations, zennit, conservation, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cxrkit
import cxrkit.attribution.relevance  # registers the methods
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution import methods
from cxrkit.attribution.propagation import Layer
from cxrkit.attribution.relevance import _Influence

RELEVANCE = ("lrp", "rap")


class Function(nn.Module):
    """A network made of a function and the layers it uses."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def linear(*rows, bias=None):
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float32)
    return layer


def row(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def explain(model, x, method="lrp", **options):
    return cxrkit.attribute(model, x, method, **options)


def settled(model, side=32, channels=3, seed=0):
    """The network with random biases, and norms that fit its activations but aren't trivial."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.weight.data.uniform_(0.4, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        elif getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1, generator=generator)
    with torch.no_grad():
        model.train()(torch.randn(8, channels, side, side, generator=generator))
    return model.eval()


# Closed forms


def test_positive_contributions_share():
    maps = explain(nn.Sequential(nn.Flatten(), linear([2, -1, 1])), row(1, 2, 3))
    torch.testing.assert_close(maps.flatten(), torch.tensor([1.2, 0, 1.8]))


def test_signed_inputs_share_in_one_denominator_and_in_the_published_code_in_two():
    model = nn.Sequential(nn.Flatten(), linear([2, -1, 1]))  # contributions 2, 3 and -1
    x = row(1, -3, -1)
    torch.testing.assert_close(explain(model, x).flatten(), torch.tensor([1.6, 2.4, 0]))
    torch.testing.assert_close(explain(model, x, protocol="authors").flatten(), torch.tensor([4.0, 4.0, 0]))
    two = explain(model, x, alpha=2.0, beta=1.0)
    torch.testing.assert_close(two.flatten(), torch.tensor([3.2, 4.8, -4.0]))


def test_biases_get_nothing_and_do_not_thin_out_the_rest():
    model = nn.Sequential(nn.Flatten(), linear([2, -1, 1], bias=[7]))
    torch.testing.assert_close(explain(model, row(1, 2, 3)).flatten(), torch.tensor([4.0, 0, 6]))


def test_a_neuron_of_one_sign_shares_by_that_sign_or_loses_by_the_formula_at_its_word():
    model = nn.Sequential(nn.Flatten(), linear([-1, -3], [1, 3], bias=[10, 0]))
    x = row(1, 2)  # logits 3 and 7
    expected = torch.tensor([[3 / 7, 18 / 7], [1, 6]])
    torch.testing.assert_close(explain(model, x).flatten(2)[0], expected)
    torch.testing.assert_close(explain(model, x, alpha=3.0, beta=2.0).flatten(2)[0], expected)
    literal = explain(model, x, alpha=3.0, beta=2.0, protocol="paper").flatten(2)[0]
    torch.testing.assert_close(literal, torch.tensor([[-6 / 7, -36 / 7], [3, 18]]))
    assert explain(model, x, protocol="paper")[0, 0].abs().max() == 0


def test_epsilon_and_biases_absorb():
    model = nn.Sequential(nn.Flatten(), linear([2, -1, 1], [-2, 1, -1], bias=[1, 0]))
    maps = explain(model, row(1, 2, 3), rule="epsilon", epsilon=0.5).flatten(2)[0]
    torch.testing.assert_close(maps[0], torch.tensor([2.0, -2, 3]) * 4 / 4.5)
    torch.testing.assert_close(maps[1], torch.tensor([-2.0, 2, -3]) * 3 / 3.5)


def test_without_epsilon_it_is_input_times_gradient():
    for network in (resnet, densenet):
        model, x = settled(network()).double(), torch.randn(2, 3, 40, 48, dtype=torch.float64)
        for images in (x, x[:1]):
            found = explain(model, images, rule="epsilon", epsilon=1e-12)
            torch.testing.assert_close(found, explain(model, images, "input_x_gradient"), atol=1e-7, rtol=1e-5)


def test_box_rule_by_hand():
    maps = explain(nn.Sequential(nn.Flatten(), linear([2, -1, 1])), row(1, 2, 4), first_layer="zb")
    share = torch.tensor([0.0, -2 + 4, 4 - 1])  # x w - 1 w+ - 4 w-, of sum 5
    torch.testing.assert_close(maps.flatten(), share / 5 * 4)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda m, x: x[..., 0] + x[..., 1], row(1, 3), [1, 3]),
        (lambda m, x: x.mean(3), row(1, 3), [0.5, 1.5]),
        (lambda m, x: F.avg_pool2d(x, (1, 2)), row(1, 3), [0.5, 1.5]),
        (lambda m, x: F.avg_pool2d(x, (1, 2), 2, (0, 1)).sum(3), row(1, 3, 5), [0.5, 1.5, 2.5]),
        (lambda m, x: F.adaptive_avg_pool2d(x, 1), row(2, -1, 3), [4 / 9, 2 / 9, 2 / 3]),
        (lambda m, x: x[..., 0] + x[..., 1], row(3, -1), [3, -1]),
        (lambda m, x: F.max_pool2d(x, (1, 3)), row(1, 3, 2), [0, 3, 0]),
        (lambda m, x: F.adaptive_max_pool2d(x, 1), row(1, 3, 2), [0, 3, 0]),
        (
            lambda m, x: torch.cat([x[..., :1], x[..., 1:].mean(3, keepdim=True)], 3)[..., 1],
            row(7, 1, 3),
            [0, 0.5, 1.5],
        ),
        (lambda m, x: (2 * x - 1).relu().sum(3), row(1, 0.25), [1, 0]),
        (lambda m, x: (x + x.flip(3))[..., 0], row(1, 3), [1, 3]),
        (lambda m, x: (x + x)[..., 0], row(1, 3), [2, 0]),
        (lambda m, x: (1 - x)[..., 1], row(1, 3), [0, -2]),
        (lambda m, x: (x + x.mean(3, keepdim=True))[..., 1], row(1, 3), [0.5, 4.5]),
    ],
)
def test_operations_without_weights(function, x, expected):
    model = Function(lambda m, x: function(m, x).reshape(1, 1))
    maps = explain(model, x)
    torch.testing.assert_close(maps.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_averages_share_by_size_but_by_signed_terms_in_the_formula_at_its_word():
    model = Function(lambda m, x: x.mean(3).flatten(1))
    x = row(2, -1, 3)  # 4/3
    torch.testing.assert_close(explain(model, x).flatten(), torch.tensor([4, 2, 6]) / 9)
    for options in ({"protocol": "paper"}, {"protocol": "authors"}, {"rule": "epsilon"}):
        torch.testing.assert_close(explain(model, x, **options).flatten(), torch.tensor([2, -1, 3]) / 3)


def test_rap_shares_at_sums_by_size_but_by_signed_terms_as_published():
    model = Function(lambda m, x: m.a(x.flatten(1)) + m.b(x.flatten(1)), a=linear([1, 0, 0]), b=linear([0, -1, 0]))
    x = row(3, 1, 0)  # 3 - 1; the first layers' z^B leaves each its pixel
    torch.testing.assert_close(explain(model, x, "rap").flatten(), torch.tensor([1.5, 0.5, 0]))
    for protocol in ("paper", "authors"):
        torch.testing.assert_close(explain(model, x, "rap", protocol=protocol).flatten(), torch.tensor([3.0, -1, 0]))


def influence(a, w, relevance, protocol="corrected", last=False, operation="linear"):
    a, w = torch.tensor([a], dtype=torch.float32), torch.tensor(w, dtype=torch.float32)
    rule = _Influence(Layer("", operation, a, w, F.linear(a, w), F.linear), protocol, images=1)
    rule.is_last = last
    return rule(torch.tensor([relevance], dtype=torch.float32))[0].tolist()


def test_relative_propagation_by_hand():
    for protocol in ("corrected", "paper", "authors"):
        found = influence([1, 2, 0], [[2, -1, 5]], [1], protocol)
        assert found == pytest.approx([0.75, 0.25, 0])
    # A neuron that is active and unconnected takes part in the text's shift, but not in that of the code.
    assert influence([1, 2, 3], [[2, -1, 0]], [1], "paper") == pytest.approx([5 / 6, 1 / 3, -1 / 6])
    assert influence([1, 2, 3], [[2, -1, 0]], [1]) == pytest.approx([0.75, 0.25, 0])
    # No positive contribution: the text loses what should come through them.
    assert influence([1, 2], [[-1, -2]], [1]) == pytest.approx([0.2, 0.8])
    assert influence([1, 2], [[-1, -2]], [1], "paper") == pytest.approx([-0.3, 0.3])


def test_the_published_code_takes_negative_relevance_through_the_other_side_of_a_convolution():
    a, w = [1, 2, 0], [[2, -1, 5]]  # P = N = 2
    assert influence(a, w, [-1]) == pytest.approx([-0.75, -0.25, 0])
    assert influence(a, w, [-1], "authors") == pytest.approx([-0.75, -0.25, 0])
    # The convolution gives (0, -1) for the first term; (0, -0.5) for the second; 0.5 too many, on one place.
    assert influence(a, w, [-1], "authors", operation="conv2d") == pytest.approx([0, -1, 0])


def test_the_last_layer_shares_by_size():
    assert influence([1, 1], [[3, -1]], [2], last=True) == pytest.approx([1.5, 0.5])
    assert influence([1, 1], [[3, -1]], [-2], last=True) == pytest.approx([-1.5, -0.5])


def test_rap_of_a_small_network_by_hand():
    model = nn.Sequential(
        nn.Flatten(),
        linear([1, 0, 1], [-1, 1, 0]),
        nn.ReLU(),
        linear([1, -1], [-1, 3], [1, 1]),
        nn.ReLU(),
        linear([2, 5, -1]),
    )
    # Values (5, 1), then (4, 0, 6), then 2. Last layer by size: (8, 0, 6) / 7. Layer before: (13/7, 1/3), of which the
    # sum is 4/21 too many: (37, 5) / 21. First layer with l = 1, h = 4: shares (0, 0, 3) / 3 and (3, 1, 0) / 4.
    maps = explain(model, row(1, 2, 4), "rap")
    torch.testing.assert_close(maps.flatten(), torch.tensor([15, 5, 148]) / 84)


# A second, slow implementation: every layer a matrix, every rule as its formula stands, in double precision


def matrix(layer, shape):
    """The layer without bias as a matrix [outputs, inputs] for inputs of that shape, from unit vectors."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    if isinstance(layer, nn.Conv2d):
        made = F.conv2d(units, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        made = units.flatten(1) @ layer.weight.T
    return made.flatten(1).T


def safe(a, b):
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def slow_alpha_beta(z, relevance, alpha=1.0, beta=0.0, protocol="corrected"):
    """z [outputs, inputs]"""
    found = torch.zeros(z.shape[1], dtype=z.dtype)
    for j, r in enumerate(relevance):
        up, down = z[j].clamp(min=0), z[j].clamp(max=0)
        p, n = up.sum(), down.sum()
        if protocol == "corrected" and (p == 0 or n == 0):
            found += r * safe(z[j], z[j].sum())
        else:
            found += r * (alpha * safe(up, p) - beta * safe(down, n))
    return found


def slow_epsilon(z, bias, relevance, epsilon):
    total = z.sum(1) + bias
    return (z * (relevance / (total + epsilon * (2.0 * (total >= 0) - 1)))[:, None]).sum(0)


def slow_norm(norm, x, relevance, options):
    """Relevance of one image's input `x` [C, H, W] of a batch norm."""
    if options.get("rule") != "epsilon":
        return relevance
    mean, scale, shift = (
        v.view(-1, 1, 1) for v in (norm.running_mean, norm.weight / (norm.running_var + norm.eps).sqrt(), norm.bias)
    )
    value = (x - mean) * scale + shift
    return x * scale * relevance / (value + options["epsilon"] * (2.0 * (value >= 0) - 1))


def slow_box(w, x, low, high, relevance):
    z = w * x - w.clamp(min=0) * low - w.clamp(max=0) * high
    return slow_alpha_beta(z, relevance)


def slow_rap(z, relevance, protocol, is_convolution):
    found, through_down = (torch.zeros(z.shape[1], dtype=z.dtype) for _ in range(2))
    for j, r in enumerate(relevance):
        up, down = z[j].clamp(min=0), -z[j].clamp(max=0)
        p, n = up.sum(), down.sum()
        slips = protocol == "authors" and is_convolution and r < 0
        found += r * safe(down, n) if slips else r * safe(up, p)
        through_down += safe(down, n) * r * safe(n, p + n)
    return found + through_down, through_down


def slow_layer(layer, a, relevance, options, method, last=False, box=None):
    """Relevance [inputs] of one image's input `a`, from that of the layer's values."""
    w, x, r = matrix(layer, a.shape), a.flatten(), relevance.flatten()
    protocol = options.get("protocol", "corrected")
    if box is not None:
        return slow_box(w, x, *box, r).view_as(a)
    if method == "rap" and last:
        return (safe((w * x).abs(), (w * x).abs().sum(1, keepdim=True)) * r[:, None]).sum(0).view_as(a)
    if method == "rap":
        found, through_down = slow_rap(w * x, r, protocol, isinstance(layer, nn.Conv2d))
        if protocol == "paper":
            found = found - (x != 0) * through_down.sum() / (x != 0).sum()
        else:
            found = found - (found != 0) * (found.sum() - r.sum()) / (found != 0).sum()
    elif options.get("rule") == "epsilon":
        bias = torch.zeros(len(w)) if layer.bias is None else layer.bias.repeat_interleave(len(w) // len(layer.bias))
        found = slow_epsilon(w * x, bias, r, options["epsilon"])
    else:
        found = slow_alpha_beta(w * x, r, options.get("alpha", 1.0), options.get("beta", 0.0), protocol)
    return found.view_as(a)


def slow_shares(terms, kind, options, method):
    """The parts of the terms of a sum (dimension 0) in it."""
    corrected = options.get("protocol", "corrected") == "corrected" and options.get("rule") != "epsilon"
    if corrected and (kind == "average" or method == "rap"):
        terms = terms.abs()
    return safe(terms, terms.sum(0))


class Branches(nn.Module):
    """Convolution, norm, rectifier, max-pool, residual sum, concatenation, average pool, gate and linear head."""

    def __init__(self, act=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv3 = nn.Conv2d(3, 2, 1)
        self.conv4 = nn.Conv2d(5, 8, 2)
        self.fc = nn.Linear(8, 3)
        self.act = act or nn.ReLU(inplace=True)

    def stem(self, x):
        return self.act(self.norm1(self.conv1(x)))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        x = self.act(x + self.norm2(self.conv2(x)))
        x = torch.cat([x, self.act(self.conv3(x))], 1)
        x = self.act(self.conv4(F.avg_pool2d(x, 2, stride=1)))
        return self.fc(x.mean((2, 3)))


def slow_branches(m, image, label, method, options):
    """Forward with every value kept, then back, line by line. One image [2, H, W]."""
    with torch.no_grad():
        stem = m.stem(image[None])
        pooled, winners = F.max_pool2d(stem, 2, return_indices=True)
        middle = m.conv2(pooled)
        residual = m.norm2(middle)
        joined = m.act(pooled + residual)
        side = m.act(m.conv3(joined))
        both = torch.cat([joined, side], 1)
        averaged = F.avg_pool2d(both, 2, stride=1)
        last = m.act(m.conv4(averaged))
        mean = last.mean((2, 3))
        logits = m.fc(mean)[0]
        r = torch.zeros_like(logits)
        r[label] = logits[label]
        r = slow_layer(m.fc, mean[0], r, options, method, last=True)
        r = (slow_shares(last[0].flatten(1).T, "average", options, method) * r).T.view_as(last[0])
        r = slow_layer(m.conv4, averaged[0], r, options, method)
        spread = torch.zeros_like(both[0])
        for c in range(r.shape[0]):
            for i in range(r.shape[1]):
                for j in range(r.shape[2]):
                    window = both[0, c, i : i + 2, j : j + 2]
                    parts = slow_shares(window.flatten(), "average", options, method).view(2, 2)
                    spread[c, i : i + 2, j : j + 2] += parts * r[c, i, j]
        r = spread[:3] + slow_layer(m.conv3, joined[0], spread[3:], options, method)
        r_skip, r_residual = slow_shares(torch.cat([pooled, residual]), "sum", options, method) * r
        r_residual = slow_norm(m.norm2, middle[0], r_residual, options)
        r = r_skip + slow_layer(m.conv2, pooled[0], r_residual, options, method)
        r = F.max_unpool2d(r[None], winners, 2, output_size=stem.shape[-2:])[0]
        r = slow_norm(m.norm1, m.conv1(image[None])[0], r, options)
        box = (image.min(), image.max()) if method == "rap" or options.get("first_layer") == "zb" else None
        return slow_layer(m.conv1, image, r, options, method, box=box).sum(0)


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU()])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {}),
        ("lrp", {"alpha": 2.0, "beta": 1.0}),
        ("lrp", {"alpha": 1.5, "beta": 0.5, "protocol": "paper", "first_layer": "zb"}),
        ("lrp", {"first_layer": "zb"}),
        ("lrp", {"protocol": "paper"}),
        ("lrp", {"rule": "epsilon", "epsilon": 0.1}),
        ("lrp", {"rule": "epsilon", "epsilon": 1e-6, "first_layer": "zb"}),
        ("rap", {}),
        ("rap", {"protocol": "paper"}),
        ("rap", {"protocol": "authors"}),
    ],
)
def test_maps_equal_the_slow_implementation(method, options, act):
    model = settled(Branches(act), side=16, channels=2).double()
    if isinstance(act, nn.SiLU) and options.get("protocol") == "authors":
        with pytest.raises(AttributionError, match=r"layer conv\d: the published code of rap .* negative"):
            explain(model, torch.randn(1, 2, 16, 12, dtype=torch.float64), method, **options)
        return
    x = torch.randn(3, 2, 16, 12, dtype=torch.float64)
    found = torch.cat([explain(model, part, method, **options) for part in (x[:2], x[2:])])
    expected = torch.stack([torch.stack([slow_branches(model, i, j, method, options) for j in range(3)]) for i in x])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def separable(act, off):
    """Convolutions of stride 2, one of them of one channel each, as in MobileNet and EfficientNet; `off` behind an
    activation that is 0 for two channels.
    """
    layers = [nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), act]
    layers += [nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6), act]
    layers += [nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    model = settled(nn.Sequential(*layers), side=12, channels=2).double()
    if off:
        model[1].bias.data[:2] = -9
    return model


def slow_separable(model, image, label, method, options):
    with torch.no_grad():
        values = [image[None]]
        for layer in model:
            values.append(layer(values[-1]))
        r = torch.zeros_like(values[-1][0])
        r[label] = values[-1][0, label]
        for n in reversed(range(len(model))):
            layer, x = model[n], values[n][0]
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                box = (image.min(), image.max()) if n == 0 and method == "rap" else None
                r = slow_layer(layer, x, r, options, method, last=n == len(model) - 1, box=box)
            elif isinstance(layer, nn.BatchNorm2d):
                r = slow_norm(layer, x, r, options)
            elif isinstance(layer, nn.AdaptiveAvgPool2d):
                r = (slow_shares(x.flatten(1).T, "average", options, method) * r.flatten()).T.view_as(x)
            else:
                r = r.view_as(x)
    return r.sum(0)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU()])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {}),
        ("lrp", {"alpha": 2.0, "beta": 1.0}),
        ("lrp", {"protocol": "paper"}),
        ("lrp", {"rule": "epsilon", "epsilon": 0.1}),
        ("rap", {}),
        ("rap", {"protocol": "paper"}),
    ],
)
def test_maps_of_separable_convolutions_equal_the_slow_implementation(method, options, act):
    """The lattice that strides leave in such maps is the rule's."""
    model, x = separable(act, off=False), torch.randn(1, 2, 14, 12, dtype=torch.float64)
    found = explain(model, x, method, **options, **({} if options.get("rule") else {"check": False}))
    expected = torch.stack([slow_separable(model, x[0], label, method, options) for label in range(2)])
    torch.testing.assert_close(found[0], expected, atol=1e-9, rtol=1e-7)


def test_pixels_that_more_windows_read_get_more():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, 2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data.fill_(1)
    windows = torch.tensor([1.0, 1, 2, 1, 2, 1, 1])
    found = explain(model, torch.ones(1, 1, 7, 7))
    torch.testing.assert_close(found[0, 0], windows.outer(windows) / 9)


@pytest.fixture(scope="module")
def lite():
    """EfficientNet-Lite0 with ImageNet weights, two synthetic radiographs, and its first label for them."""
    model = cxrkit.models.create("efficientnet_lite0", [str(i) for i in range(1000)], weights="imagenet").eval()
    dataset = cxrkit.data.load("phantom", split="test", size=96)
    images = torch.stack([dataset[i].image for i in range(2)])
    return model, images, model(images).sum(0).argmax().item()


def fullest_quarter(maps):
    """Share of the energy that the fullest of four sub-lattices of period 2 holds; 0.25 and a little by chance."""
    energy = torch.stack([maps[..., i::2, j::2].square().sum((-2, -1)) for i in (0, 1) for j in (0, 1)])
    return (energy.amax(0) / energy.sum(0)).flatten()


@pytest.mark.parametrize("method", RELEVANCE)
def test_sums_over_the_step_of_the_first_layer_are_free_of_its_lattice(method, lite):
    model, images, label = lite
    maps = explain(model, images, method, labels=[label], check=False)
    summed = F.avg_pool2d(maps, 2, divisor_override=1)
    assert fullest_quarter(maps).min() > 0.4
    assert fullest_quarter(summed).max() < 0.3
    torch.testing.assert_close(summed.double().sum(), maps.double().sum(), rtol=1e-5, atol=0)
    if method == "rap":  # the shift sees to the sum, and lets the size grow
        logits = model(images).detach()[:, label]
        torch.testing.assert_close(maps.sum((1, 2, 3)), logits, rtol=1e-3, atol=0)
        assert (maps.abs().sum((1, 2, 3)) > 50 * logits.abs()).all()


@pytest.mark.parametrize(("window", "lattice"), [(3, True), (4, False), (5, True)])
def test_the_lattice_is_that_of_odd_windows_in_even_steps(window, lattice):
    first = nn.Conv2d(1, 4, window, stride=2, bias=False)
    first.weight.data.uniform_(0.5, 1)
    layers = [first, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
    x = torch.rand(1, 1, 32 + window, 32 + window)
    found = explain(nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 1)), x, "rap")
    assert (fullest_quarter(found[..., window:-window, window:-window]) > 0.3).all() == lattice


def test_no_alpha_and_beta_reach_past_filters_that_are_off(lite):
    model, images, label = lite
    shares = []
    for options in ({}, {"alpha": 2.0, "beta": 1.0}, {"first_layer": "zb"}):
        with pytest.raises(AttributionError, match=r"% of it stays where neurons have nothing but a bias .*conv_dw"):
            explain(model, images, labels=[label], **options)
        maps = explain(model, images, labels=[label], **options, check=False)
        shares.append(maps.sum((1, 2, 3)) / model(images).detach()[:, label])
        assert ((shares[-1] > 0.2) & (shares[-1] < 0.6)).all()
    torch.testing.assert_close(shares[1], shares[0], rtol=0, atol=0.05)


def test_filters_of_one_channel_that_are_off_keep_their_relevance():
    model, x = separable(nn.ReLU6(), off=True), torch.randn(1, 2, 14, 12, dtype=torch.float64)
    with pytest.raises(
        AttributionError, match=r"image 0, label 0: .* \d+% of it stays .* a bias .* most in layer 3 "
    ) as told:
        explain(model, x)
    reaches = explain(model, x, check=False)
    expected = torch.stack([slow_separable(model, x[0], label, "lrp", {}) for label in range(2)])
    torch.testing.assert_close(reaches[0], expected, atol=1e-9, rtol=1e-7)
    share = 1 - (reaches.sum((2, 3)) / model(x).detach())[0, 0].item()
    assert f" {share:.0%} of it" in str(told.value)
    assert share > 0.01


# An independent library


class Blocks(nn.Module):
    """A VGG-like stem and a residual block, with the sum as a module that zennit knows."""

    def __init__(self, residual):
        from zennit.layer import Sum

        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.sum = Sum() if residual else None
        self.conv3, self.relu3, self.pool2 = nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        self.flat, self.fc1, self.relu4, self.fc2 = nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3)

    def forward(self, x):
        x = self.pool1(self.relu1(self.norm1(self.conv1(x))))
        y = self.norm2(self.conv2(x))
        x = self.relu2(self.sum(torch.stack([x, y], -1)) if self.sum else y)
        x = self.pool2(self.relu3(self.conv3(x)))
        return self.fc2(self.relu4(self.fc1(self.flat(x))))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["alpha1_beta0", "alpha2_beta1", "epsilon", "zb"])
def test_maps_agree_with_zennit(kind, residual):
    from zennit.attribution import Gradient
    from zennit.canonizers import NamedMergeBatchNorm
    from zennit.composites import LayerMapComposite, SpecialFirstLayerMapComposite, layer_map_base
    from zennit.rules import AlphaBeta, Epsilon, ZBox
    from zennit.types import Convolution

    model, x = settled(Blocks(residual)).double(), torch.randn(1, 3, 24, 20, dtype=torch.float64)
    tiny = {"stabilizer": 1e-12, "zero_params": "bias"}
    rule = {
        "alpha1_beta0": AlphaBeta(1.0, 0.0, **tiny),
        "zb": AlphaBeta(1.0, 0.0, **tiny),
        "alpha2_beta1": AlphaBeta(2.0, 1.0, **tiny),
        "epsilon": Epsilon(epsilon=1e-10),
    }[kind]
    layers = [*layer_map_base(1e-12), (Convolution, rule), (nn.Linear, rule)]
    if kind == "zb":
        first = [(Convolution, ZBox(x.min(), x.max(), **tiny))]
        composite = SpecialFirstLayerMapComposite(layers, first)
    else:
        merged = [NamedMergeBatchNorm([(["conv1"], "norm1"), (["conv2"], "norm2")])] if kind == "epsilon" else []
        composite = LayerMapComposite(layers, canonizers=merged)
    options = {
        "alpha2_beta1": {"alpha": 2.0, "beta": 1.0},
        "epsilon": {"rule": "epsilon", "epsilon": 1e-10},
        "zb": {"first_layer": "zb"},
    }.get(kind, {})
    found = explain(model, x, protocol="paper", **options)
    for j in range(3):
        with Gradient(model, composite) as theirs:
            _, expected = theirs(x, lambda logits, j=j: logits * torch.eye(3, dtype=logits.dtype)[[j]])
        exact = {"atol": 1e-9, "rtol": 1e-5} if kind != "epsilon" else {"atol": 1e-6, "rtol": 0}  # merged norms
        torch.testing.assert_close(found[:, j], expected.sum(1).detach(), **exact)


# Conservation on small versions of the networks that people use


def vgg():
    from torchvision.models.vgg import make_layers

    features = make_layers([8, "M", 12, "M", 16, 16, "M"], batch_norm=False)
    head = [nn.Flatten(), nn.Linear(64, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 3)]
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), *head)


def resnet():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=8)


def densenet():
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2), 48, num_classes=3)


def efficientnet():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 12, 1), MBConvConfig(4, 5, 2, 12, 16, 2), MBConvConfig(6, 3, 1, 16, 16, 1)]
    return EfficientNet(blocks, 0.2, num_classes=3, last_channel=32)


def inception():
    from torchvision.models.inception import BasicConv2d, InceptionA

    head = [nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(229, 3)]
    return nn.Sequential(BasicConv2d(3, 24, kernel_size=3, stride=2), InceptionA(24, 5), nn.ReLU(True), *head)


def convolutional_head():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Hardswish(),
        nn.Conv2d(8, 32, 3),
        nn.ReLU6(),
        nn.Conv2d(32, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


NETWORKS = [vgg, resnet, densenet, efficientnet, inception, convolutional_head]


@pytest.mark.parametrize("trained_like", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_maps_sum_to_their_logit(network, trained_like):
    model = settled(network(), side=48) if trained_like else network().eval()
    x = torch.randn(2, 3, 48, 40)
    logits = model(x).detach()
    for method, options in [
        ("lrp", {}),
        ("lrp", {"first_layer": "zb"}),
        ("lrp", {"alpha": 2.0, "beta": 1.0}),
        ("rap", {}),
    ]:
        maps = explain(model, x, method, **options)
        assert ((maps.sum((2, 3)) - logits) / logits).abs().max() < 1e-3
        alone = explain(model, x[1:], method, **options)  # memory layouts differ for one image
        torch.testing.assert_close(alone, maps[1:], atol=1e-3 * maps.abs().max().item(), rtol=0)


@pytest.mark.parametrize("method", RELEVANCE)
def test_what_only_a_bias_brings_belongs_to_no_pixel(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    model[0].bias.data.fill_(-100)
    model[2].bias.data.uniform_(1, 2)
    x = torch.rand(2, 3, 6, 6)
    with pytest.raises(AttributionError, match=rf"{method}: image 0, label 0: relevance sums to .*, the logit is"):
        explain(model, x, method)
    assert explain(model, x, method, check=False).abs().max() == 0
    assert explain(model, x, method, protocol="paper").abs().max() == 0


# Ways to write a network


@pytest.mark.parametrize("method", RELEVANCE)
def test_in_place_shared_and_functional_rectifiers_are_the_same(method):
    first, second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 3)
    layers = {"first": first, "second": second, "shared": nn.ReLU(inplace=True), "head": nn.Linear(3, 2)}
    written = {
        "modules": lambda m, x: nn.ReLU()(m.second(nn.ReLU()(m.first(x)))),
        "shared and in place": lambda m, x: m.shared(m.second(m.shared(m.first(x)))),
        "functions": lambda m, x: F.relu(m.second(torch.relu(m.first(x)))),
        "functions in place": lambda m, x: F.relu_(m.second(m.first(x).relu_())),
    }
    x = torch.randn(2, 2, 9, 9)
    maps = [
        explain(Function(lambda m, x, body=body: m.head(body(m, x).mean((2, 3))), **layers), x, method)
        for body in written.values()
    ]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=0, rtol=0)


class Gated(nn.Module):
    def __init__(self, fixed=None):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.fixed = fixed

    def forward(self, x):
        signal = self.body(x).relu()
        gate = self.excite(self.squeeze(signal.mean((2, 3), keepdim=True)).relu())
        gate = gate.sigmoid() if self.fixed is None else self.fixed
        return self.head((gate.view(-1, 6, 1, 1) * signal).mean((2, 3)))


@pytest.mark.parametrize("method", RELEVANCE)
def test_a_gate_gets_no_relevance(method):
    model, x = Gated().eval(), torch.randn(1, 3, 8, 8)
    found = explain(model, x, method)
    handle = model.excite.register_forward_hook(lambda module, args, output: gates.append(output.sigmoid().detach()))
    gates = []
    model(x)
    handle.remove()
    fixed = Gated(fixed=gates[0]).eval()
    fixed.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, explain(fixed, x, method))


def test_batch_norm_passes_but_in_the_published_code_not_for_zeros():
    norm = nn.BatchNorm1d(3)
    norm.bias.data.fill_(2)
    model = Function(lambda m, x: m.head(m.norm(x.flatten(1))), norm=norm, head=linear([1, 1, 2])).eval()
    x = row(0, 1, 2)  # after the norm 2, 3 and 4 (up to its epsilon), logit 13
    found = explain(model, x).flatten()
    torch.testing.assert_close(found, torch.tensor([2.0, 3, 8]), atol=1e-3, rtol=0)
    torch.testing.assert_close(explain(model, x, protocol="authors").flatten(), found * torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("method", RELEVANCE)
def test_the_first_layer_is_found_behind_padding_and_normalisation(method):
    options = {"first_layer": "zb"} if method == "lrp" else {}
    convolution, head = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Linear(6, 2)
    x = torch.rand(2, 3, 9, 9)
    inner = Function(lambda m, x: m.head(m.conv(x).relu().mean((2, 3))), conv=convolution, head=head)
    expected = explain(inner, (x - 0.4) / 0.2, method, **options)

    def padded(m, x):
        x = F.pad(torch.cat([x[:, :1], x[:, 1:]], 1).sub(0.4).div(0.2), (1, 1, 1, 1))
        return m.head(F.conv2d(x, m.conv.weight, m.conv.bias, stride=2).relu().mean((2, 3)))

    torch.testing.assert_close(explain(Function(padded, conv=convolution, head=head), x, method, **options), expected)
    behind = Function(lambda m, x: m.head(m.conv(x.relu()).relu().mean((2, 3))), conv=convolution, head=head)
    with pytest.raises(AttributionError, match=f"{method}: no layer with weights reads the image"):
        explain(behind, x, method, **options)


def test_a_box_map_of_a_positive_logit_is_positive_also_where_the_image_is_not():
    model = settled(vgg(), side=32)
    model[-1].weight.data[0].abs_()
    x = torch.randn(4, 3, 32, 32)
    maps, logits = explain(model, x, first_layer="zb"), model(x).detach()
    assert (maps * logits.sign()[:, :, None, None] >= 0).all()
    assert logits.min() < 0 < logits.max()


# Properties


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_maps_grow_with_the_logit_and_shares_ignore_the_scale_of_inner_layers(factor, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2, bias=False))
    for weight in model.parameters():
        weight.data.normal_(generator=generator)
    x = torch.randn(1, 2, 6, 6, generator=generator)
    for method in RELEVANCE:
        before = explain(model, x, method)
        for layer in (0, 3):
            model[layer].weight.data *= factor
            after = explain(model, x, method)
            model[layer].weight.data /= factor
            torch.testing.assert_close(after, factor * before, atol=1e-4, rtol=1e-3)


def test_alpha1_beta0_hardly_tells_labels_apart_and_gradients_do():
    model, x = settled(inception(), side=32), torch.randn(3, 3, 32, 32)

    def likeness(maps):
        maps = maps.flatten(2) / maps.sum((2, 3))[..., None]
        return min(torch.corrcoef(m)[0, 1].item() for m in maps)

    assert likeness(explain(model, x)) > 0.95
    assert likeness(explain(model, x, "input_x_gradient")) < 0.5


# What is refused


def after_convolution(step, **layers):
    return Function(lambda m, x: m.head(step(m, m.conv(x))), conv=nn.Conv2d(3, 4, 3), head=nn.LazyLinear(2), **layers)


@pytest.mark.parametrize("method", RELEVANCE)
@pytest.mark.parametrize(
    ("step", "layers", "message"),
    [
        (lambda m, x: x.pow(2).flatten(1), {}, r"layer network \(Function\): pow has no relevance rule"),
        (lambda m, x: x.softmax(1).flatten(1), {}, "softmax"),
        (lambda m, x: (x.flatten(2) @ x.flatten(2).mT).flatten(1), {}, "matmul"),
        (lambda m, x: (x * x.relu()).flatten(1), {}, "a product of which neither factor or each is a gate"),
        (lambda m, x: (x.sigmoid() * x.sigmoid()).flatten(1), {}, "neither factor or each"),
        (lambda m, x: (x / (1 + x.relu())).flatten(1), {}, "division"),
        (lambda m, x: (x - x.relu()).flatten(1), {}, "sub has a relevance rule for one input"),
        (lambda m, x: x.sigmoid().flatten(1), {}, "a sigmoid may only multiply a signal, not go into linear"),
        (lambda m, x: F.conv2d(x, x[:1].mean(0, keepdim=True)).flatten(1), {}, "conv2d has a relevance rule for one"),
        (lambda m, x: m.norm(x).flatten(1), {"norm": nn.GroupNorm(2, 4)}, r"layer norm \(GroupNorm\): group_norm"),
        (lambda m, x: m.norm(x).flatten(1), {"norm": nn.LayerNorm(6)}, r"layer norm \(LayerNorm\): layer_norm"),
        (
            lambda m, x: m.norm(x).flatten(1),
            {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
            r"layer norm \(BatchNorm2d without running statistics\)",
        ),
        (lambda m, x: (x.relu_(), x)[1].flatten(1), {}, "write it out of place"),
    ],
)
def test_operations_without_a_rule_are_refused_by_name(step, layers, message, method):
    model, x = after_convolution(step, **layers), torch.rand(2, 3, 8, 8)
    model(x)
    with pytest.raises(AttributionError, match=message):
        explain(model, x, method)


def refused_networks():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.vision_transformer import VisionTransformer

    from cxrkit.models import create

    labels = ("Mass", "Nodule")
    return {
        "ConvNeXt": (ConvNeXt([CNBlockConfig(8, None, 2)]), 3, r"features.0.1 \(LayerNorm2d\): layer_norm"),
        "ViT": (VisionTransformer(32, 16, 1, 2, 8, 8), 3, r"ln_1 \(LayerNorm\): layer_norm"),
        "B-cos": (create("bcos_resnet18", labels), 1, r"network.conv1 .* map of a B-cos network is method 'bcos'"),
        "FLC": (create("resnet18", labels, antialias="flc"), 1, r"conv1.1 \(FLCPool\)"),
    }


def test_networks_without_rules_are_refused_and_known_to_be_unfit():
    for model, channels, message in refused_networks().values():
        assert not {c.name for c in methods(model)} & set(RELEVANCE)
        for method in RELEVANCE:
            with pytest.raises(AttributionError, match=message):
                explain(model, torch.rand(1, channels, 32, 32), method)
    for network in NETWORKS:
        assert {c.name for c in methods(network())} >= set(RELEVANCE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.head(x.flatten(1)).sigmoid(), "the values of a sigmoid; explain the network before it"),
        (lambda m, x: m.head(x.flatten(1).detach()), "don't depend on the input"),
        (lambda m, x: torch.ones(len(x), 2), "don't depend on the input"),
    ],
)
def test_logits_without_a_start_for_relevance_are_refused(function, message):
    model = Function(function, head=nn.Linear(48, 2))
    for method in RELEVANCE:
        with pytest.raises(AttributionError, match=message):
            explain(model, torch.rand(2, 3, 4, 4), method)


def test_rap_refuses_layers_whose_images_are_not_along_the_first_dimension():
    body, head = nn.Linear(4, 4), nn.Linear(48, 2)
    model = Function(
        lambda m, x: m.head(m.body(m.first(x).relu().permute(2, 0, 3, 1)).transpose(0, 1).flatten(1)),
        first=nn.Conv2d(3, 4, 1),
        body=body,
        head=head,
    )
    x = torch.rand(2, 3, 3, 4)
    assert explain(model, x).shape == (2, 2, 3, 4)
    with pytest.raises(AttributionError, match=r"layer body: rap needs the images along the first dimension.* 3 for 2"):
        explain(model, x, "rap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "alphabeta"}, "'alpha_beta'"),
        ({"alpha": 2.0}, r"alpha - beta must be 1.*alpha=2.0, beta=0.0"),
        ({"alpha": 0.5, "beta": -0.5}, "beta at least 0"),
        ({"epsilon": 0.0}, "epsilon must be a positive number"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"first_layer": "z_b"}, "'zb'"),
        ({"protocol": "author"}, "'authors'"),
        ({"method": "rap", "protocol": "author"}, "'authors'"),
        ({"method": "rap", "first_layer": "zb"}, "first_layer"),
        ({"output": "probability"}, "explains the logit"),
        ({"preset": "covid"}, "known: relevance"),
    ],
)
def test_unknown_options_are_parameter_errors(options, message):
    with pytest.raises(ParameterError, match=message):
        explain(Branches().eval(), torch.randn(1, 2, 16, 16), **options)


def test_presets_are_the_published_settings():
    model, x = settled(Branches(), side=16, channels=2), torch.randn(1, 2, 16, 16)
    published = explain(model, x, preset="relevance")
    torch.testing.assert_close(published, explain(model, x, first_layer="zb", protocol="authors"), atol=0, rtol=0)
    assert not torch.equal(published, explain(model, x))
    published = explain(model, x, "rap", preset="relevance")
    torch.testing.assert_close(published, explain(model, x, "rap", protocol="authors"), atol=0, rtol=0)


# Labels, chunks, what is left alone


@pytest.mark.parametrize("method", RELEVANCE)
def test_maps_of_a_classifier_are_at_its_encoded_input(method):
    from cxrkit.models import create

    model = create("resnet18", labels=("Mass", "Nodule")).eval()
    x = torch.rand(2, 1, 64, 64)
    maps = explain(model, x, method)
    torch.testing.assert_close(maps.sum((2, 3)), model(x).detach(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(maps, explain(model.network, model.encode(x).detach(), method), atol=1e-6, rtol=1e-3)
    blurred = create("resnet18", labels=("Mass", "Nodule"), antialias="blur").eval()
    torch.testing.assert_close(explain(blurred, x, method).sum((2, 3)), blurred(x).detach(), atol=1e-6, rtol=1e-3)
