"""SmoothGrad, guided backpropagation, DeepLIFT and the presets of their family: closed forms, second
implementations, libraries, and what is refused or left alone.
"""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cxrkit
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution import card, deeplift, methods
from cxrkit.attribution.gradient import noise_source
from cxrkit.attribution.operations import traced
from cxrkit.attribution.target import Explained

NEW = ("smoothgrad", "guided_backprop", "deeplift")
FEW = {"smoothgrad": {"n_samples": 3}}


class Function(nn.Module):
    """A network made of one function of the image."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x) if self._modules else self.function(x)


class Tiny(nn.Module):
    """A residual network with a stem as in ResNet and ReLUs of every make: each its own module, or one shared
    module, or functions; in place or not.
    """

    def __init__(self, make="modules", channels=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, 3)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 4 else 0.6))
            self.norm1.running_mean.copy_(torch.randn(6, generator=generator) / 3)
            self.last[1].running_var.copy_(torch.rand(5, generator=generator) + 0.5)
        if make == "shared":
            self.relu1 = self.relu2 = self.relu3 = nn.ReLU(inplace=True)
        elif make == "modules":
            self.relu1, self.relu2, self.relu3 = (nn.ReLU() for _ in range(3))
        else:
            self.relu1, self.relu2 = (lambda x: F.relu(x, inplace=True)), torch.relu
            self.relu3 = lambda x: x.relu_()

    def forward(self, x):
        x = self.pool(self.relu1(self.norm1(self.conv1(x))))
        x = x + self.relu2(self.conv2(x))
        return self.fc(self.drop(self.relu3(self.last(x)).mean((2, 3))))


@pytest.fixture
def tiny():
    return Tiny().eval()


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 12)


def linear_network(weights):  # [L, C, H, W]
    return Function(lambda x: x.flatten(1) @ weights.flatten(1).T)


# SmoothGrad


def test_smoothgrad_without_noise_is_the_gradient_or_its_square():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.rand(2, 2, 6, 6)
    plain = cxrkit.attribute(model, x, "smoothgrad", noise=0, n_samples=2)
    torch.testing.assert_close(plain, cxrkit.attribute(model, x, "saliency"))
    squared = cxrkit.attribute(model, x, "smoothgrad", noise=0, n_samples=2, squared=True)
    inputs = x.clone().requires_grad_()
    for j in range(3):  # squared channel by channel, then summed
        (gradient,) = torch.autograd.grad(model(inputs)[:, j].sum(), inputs)
        torch.testing.assert_close(squared[:, j], (gradient**2).sum(1))


def test_noise_is_a_share_of_each_images_own_range():
    half_square = Function(lambda x: (x**2).sum((1, 2, 3))[:, None] / 2)  # its gradient is its input
    x = torch.rand(2, 1, 60, 60) * torch.tensor([1.0, 0.1]).view(2, 1, 1, 1) + torch.tensor([0, 0.4]).view(2, 1, 1, 1)
    noise = cxrkit.attribute(half_square, x, "smoothgrad", n_samples=1, noise=0.2) - x
    spread = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
    assert (noise.std((1, 2, 3)) / spread - 0.2).abs().max() < 0.01
    assert noise.mean().abs() < 0.005
    assert not torch.allclose(noise[0] / spread[0], noise[1] / spread[1], atol=1e-3)  # each image has its own


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_smoothgrad_equals_the_slow_implementation(squared, output, tiny, images):
    options = {"n_samples": 4, "noise": 0.1, "squared": squared, "seed": 7}
    found = cxrkit.attribute(tiny, images, "smoothgrad", output=output, **options)
    draw = noise_source(Explained(tiny), images, 7)
    expected = torch.zeros(3, 3, 16, 12)
    for i, image in enumerate(images):
        for _ in range(4):
            noisy = (image + 0.1 * (image.max() - image.min()) * draw(i))[None].requires_grad_()
            for j in range(3):
                score = tiny(noisy)[0, j]
                score = score.sigmoid() if output == "probability" else score
                (gradient,) = torch.autograd.grad(score, noisy)
                expected[i, j] += (gradient[0, 0] ** 2 if squared else gradient[0, 0]) / 4
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_seed_decides_and_the_global_state_is_left_alone(tiny, images):
    state = torch.get_rng_state()
    first, again, other = (cxrkit.attribute(tiny, images, "smoothgrad", n_samples=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    # The image's place decides, not the batch in which it comes.
    same = cxrkit.attribute(tiny, images[:1].expand(3, -1, -1, -1), "smoothgrad", n_samples=2)
    assert not torch.allclose(same[0], same[1])


def test_all_labels_share_the_forward_passes_of_a_batch(tiny, images):
    sizes = []
    hook = tiny.register_forward_hook(lambda module, args, logits: sizes.append(len(logits)))
    cxrkit.attribute(tiny, images, "saliency")  # tries the network out
    sizes.clear()
    cxrkit.attribute(tiny, images, "smoothgrad", n_samples=5, chunk=4)
    assert sizes == [1, 1, 4, 4, 4, 3]  # one image to look for batch norms to fold, one to check
    sizes.clear()
    cxrkit.attribute(tiny, images, "integrated_gradients", n_steps=5, chunk=2)
    assert [size for size in sizes if size > 1] == [2] * 5 + [2, 2]
    sizes.clear()
    cxrkit.attribute(tiny, images, "deeplift", chunk=2)
    hook.remove()
    assert sizes == [2, 2, 1, 1]


def by_saliency(model, image, label):
    """What the package saliency needs: its model function, and a call of it."""
    from saliency.core.base import INPUT_OUTPUT_GRADIENTS

    def gradients(inputs, call_model_args=None, expected_keys=None):
        x = torch.tensor(np.asarray(inputs, np.float32)).permute(0, 3, 1, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[:, label].sum(), x)
        return {INPUT_OUTPUT_GRADIENTS: gradient.permute(0, 2, 3, 1).numpy()}

    return image.permute(1, 2, 0).numpy(), gradients


@pytest.mark.parametrize("squared", [False, True])
def test_smoothgrad_agrees_with_the_package_saliency(squared, tiny, images, monkeypatch):
    from saliency.core import GradientSaliency

    found = cxrkit.attribute(tiny, images[:1], "smoothgrad", n_samples=25, squared=squared)
    for j in range(3):
        draw = noise_source(Explained(tiny), images, 0)
        monkeypatch.setattr(
            np.random, "normal", lambda mean, std, shape, draw=draw: std * draw(0).permute(1, 2, 0).numpy()
        )
        array, gradients = by_saliency(tiny, images[0], j)
        expected = GradientSaliency().GetSmoothedMask(array, gradients, magnitude=squared)
        torch.testing.assert_close(found[0, j], torch.from_numpy(expected[:, :, 0]).float(), atol=1e-6, rtol=1e-4)


# Integrated gradients at uniform points


def test_uniform_points_agree_with_the_package_saliency(tiny, images):
    from saliency.core import IntegratedGradients

    found = cxrkit.attribute(tiny, images[:1], "integrated_gradients", n_steps=25, rule="uniform")
    by_preset = cxrkit.attribute(tiny, images[:1], "integrated_gradients", preset="path", output="logit")
    assert torch.equal(found, by_preset)
    for j in range(3):
        array, gradients = by_saliency(tiny, images[0], j)
        expected = IntegratedGradients().GetMask(array, gradients, x_steps=25)
        torch.testing.assert_close(found[0, j], torch.from_numpy(expected[:, :, 0]).float(), atol=1e-6, rtol=1e-4)


def test_uniform_points_are_exact_for_linear_and_quadratic_scores_only():
    weights, x = torch.randn(1, 1, 4, 5), torch.rand(2, 1, 4, 5)
    for power, expected in ((1, weights * x), (2, weights * x**2)):
        model = Function(lambda x, p=power: (weights * x**p).sum((1, 2, 3))[:, None])
        found = cxrkit.attribute(model, x, "integrated_gradients", n_steps=4, rule="uniform")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    cubic = Function(lambda x: (x**3).sum((1, 2, 3))[:, None])
    found = cxrkit.attribute(cubic, torch.ones(1, 1, 2, 2), "integrated_gradients", n_steps=3, rule="uniform")
    torch.testing.assert_close(found, torch.full((1, 1, 2, 2), (0 + 3 / 4 + 3) / 3))


# Guided backpropagation


def test_guidance_by_hand():
    first, second = torch.tensor([[1.0, 2.0], [1.0, -3.0], [-1.0, -1.0], [2.0, 1.0]]), torch.tensor([1.0, 1, 1, -1])
    model = Function(lambda x: (torch.relu(x.flatten(1) @ first.T) @ second)[:, None])
    x = torch.tensor([1.0, 0.5]).view(1, 1, 1, 2)
    # Of the units 2, -0.5, -1.5 and 2.5 the second and third are off; the fourth lowers the score.
    torch.testing.assert_close(cxrkit.attribute(model, x, "guided_backprop").flatten(), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(cxrkit.attribute(model, x, "saliency").flatten(), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("make", [nn.ReLU6, lambda: nn.Hardtanh(0, 6), lambda: Function(F.relu6)])
def test_relu6_passes_what_lies_between_its_ends(make):
    weights = torch.tensor([1.0, 2.0, 3.0, -4.0])
    model = Function(lambda self, x: (self.act(x.flatten(1)) @ weights)[:, None], act=make())
    x = torch.tensor([-1.0, 5.0, 7.0, 3.0]).view(1, 1, 1, 4)
    found = cxrkit.attribute(model, x, "guided_backprop").flatten()
    assert found.tolist() == [0, 2, 0, 0]


def slow_guided_backprop(model, x):
    """ReLU by ReLU: every piece of the network differentiated on its own, guidance in between."""
    maps = torch.zeros(len(x), 3, *x.shape[-2:])
    pieces = [
        lambda t: model.norm1(model.conv1(t)),
        lambda t: model.conv2(model.pool(t)),
        lambda t: model.last(t[0] + model.pool(t[1])),
        lambda t: model.fc(t.mean((2, 3))),
    ]

    def through(piece, inputs, signal):
        inputs = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(piece(inputs if len(inputs) > 1 else inputs[0]), inputs, signal)

    def guided(signal, before):
        return torch.where((signal > 0) & (before > 0), signal, 0.0)

    with torch.no_grad():
        a = pieces[0](x)
        b = pieces[1](a.relu())
        c = pieces[2]((b.relu(), a.relu()))
    for j in range(3):
        signal = torch.eye(3)[j].expand(len(x), -1)
        (signal,) = through(pieces[3], [c.relu()], signal)
        to_b, to_a = through(pieces[2], [b.relu(), a.relu()], guided(signal, c))
        (more,) = through(pieces[1], [a.relu()], guided(to_b, b))
        (signal,) = through(pieces[0], [x], guided(to_a + more, a))
        maps[:, j] = signal[:, 0]
    return maps


@pytest.mark.parametrize("make", ["modules", "shared", "functions"])
def test_guided_backprop_equals_the_slow_implementation_whatever_makes_the_relus(make, images):
    model = Tiny(make).eval()
    expected = slow_guided_backprop(model, images)
    found = cxrkit.attribute(model, images, "guided_backprop")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(found, cxrkit.attribute(model, images, "saliency"), atol=1e-3)
    p = model(images).sigmoid().detach()
    slope = (p * (1 - p))[:, :, None, None]
    found = cxrkit.attribute(model, images, "guided_backprop", output="probability")
    torch.testing.assert_close(found, expected * slope, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_backprop_agrees_with_captum():
    model, x = Tiny(channels=3).eval(), torch.rand(2, 3, 16, 16)
    found = cxrkit.attribute(model, x, "guided_backprop")
    for j in range(3):
        expected = captum.attr.GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=j).sum(1)
        torch.testing.assert_close(found[:, j], expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_the_authors_of_normgrad_differentiate_the_sum_of_all_outputs(output, images):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 140, 3))  # nothing to guide
    inputs = images.clone().requires_grad_()
    scores = model(inputs).sigmoid() if output == "probability" else model(inputs)
    (gradient,) = torch.autograd.grad(scores.sum(), inputs)
    for method, expected in (("guided_backprop", gradient), ("input_x_gradient", images * gradient)):
        found = cxrkit.attribute(model, images, method, preset="normgrad", output=output, labels=[2, 0])
        torch.testing.assert_close(found, expected.expand(-1, 2, -1, -1), atol=1e-6, rtol=1e-5)
    for method in ("guided_backprop", "input_x_gradient"):
        paper = cxrkit.attribute(Tiny().eval(), images, method, protocol="paper")
        assert torch.equal(paper, cxrkit.attribute(Tiny().eval(), images, method))


# DeepLIFT

ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(0.2), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU()]
ACTIVATIONS += [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Softplus(), nn.Sigmoid()]
ACTIVATIONS += [nn.Hardsigmoid(), nn.Hardswish(), nn.Tanh(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)]
ACTIVATIONS += [nn.Threshold(0.2, -0.3), nn.LogSigmoid(), nn.Softsign(), nn.Softshrink(), nn.Hardshrink()]
ACTIVATIONS += [nn.Tanhshrink(), Function(F.relu6), Function(torch.abs), Function(torch.square), Function(torch.relu_)]
ACTIVATIONS += [
    Function(f)
    for f in (
        lambda x: x**3,
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp_min(0.3),
        lambda x: x.clamp_max(0.3),
        lambda x: torch.maximum(torch.full((5,), 0.3), x),
        lambda x: torch.min(x, torch.zeros_like(x)),
        torch.exp,
        torch.erf,
    )
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda layer: type(layer).__name__)
def test_a_pixelwise_activation_gives_each_pixel_its_own_difference(activation):
    weights = torch.randn(2, 1, 4, 5)
    model = Function(lambda self, x: self.act(6 * x - 3).flatten(1) @ weights.flatten(1).T, act=activation)
    x, start = torch.rand(2, 1, 4, 5), torch.rand(1, 1, 4, 5)
    x[0, 0, 0] = start[0, 0, 0]  # where nothing changes, nothing is added
    with torch.no_grad():
        expected = weights[:, 0] * (activation(6 * x - 3) - activation(6 * start - 3))
    torch.testing.assert_close(cxrkit.attribute(model, x, "deeplift", baseline=start), expected, atol=1e-5, rtol=1e-4)


def test_activations_under_test_are_those_with_a_rule(images):
    seen = set()
    for activation in ACTIVATIONS:
        activation.requires_grad_(False)
        inputs = images.clone().requires_grad_()
        traced(activation, activation, inputs, lambda call, *args, **_: seen.add(call.name) or args[0])
    assert seen == set(deeplift._ELEMENTWISE)


def test_where_image_and_baseline_agree_the_slope_is_the_derivative():
    # Both units see no difference though their inputs differ: what the pixels add cancels.
    first = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    model = Function(lambda x: (F.softplus(x.flatten(1) @ first.T + 1) @ torch.tensor([1.0, 2.0]))[:, None])
    x = torch.full((1, 1, 1, 2), 0.5)
    slope = torch.tensor(1.0).sigmoid()
    expected = 0.5 * slope * torch.tensor([1 - 2, -1 + 2])
    torch.testing.assert_close(cxrkit.attribute(model, x, "deeplift").flatten(), expected)
    # The same at a max-pool: the sum of two pixels stays the greater one.
    model = Function(lambda x: F.max_pool1d(torch.stack([x.sum((1, 2, 3)), -x[:, 0, 0, 0]], 1)[:, None], 2)[:, 0])
    x, start = torch.tensor([[0.3, 0.5], [0.5, 0.3]]).view(2, 1, 1, 1, 2)
    found = cxrkit.attribute(model, x, "deeplift", baseline=start)
    torch.testing.assert_close(found.flatten(), torch.tensor([-0.2, 0.2]))


@pytest.mark.parametrize("pool", [nn.MaxPool1d(4), nn.AdaptiveMaxPool1d(1), Function(lambda x: F.max_pool1d(x, 4))])
def test_a_max_pool_hands_its_difference_to_the_greater_maximum(pool):
    model = Function(lambda self, x: self.pool(x[:, 0]).flatten(1), pool=pool)
    x = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3], [0.2, 0.5, 0.8, 0.5]]).view(3, 1, 1, 4)
    start = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.2, 0.6, 0.1], [0.8, 0.1, 0.1, 0.2]]).view(3, 1, 1, 4)
    found = cxrkit.attribute(model, x, "deeplift", baseline=start)
    expected = torch.tensor([[0, 0.2, 0, 0], [0, 0, -0.2, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(found.view(3, 4), expected)


def test_overlapping_windows_of_two_dimensions():
    model = Function(lambda x: F.max_pool2d(x, 3, 2, 1).sum((1, 2, 3))[:, None])
    x, start = torch.rand(2, 2, 7, 6), torch.rand(2, 2, 7, 6)
    found = cxrkit.attribute(model, x, "deeplift", baseline=start)
    expected = torch.zeros(2, 7, 6)
    for i in range(2):
        for c in range(2):
            for top in range(-1, 7 - 1, 2):
                for left in range(-1, 6 - 1, 2):
                    window = [(r, s) for r in range(max(top, 0), top + 3) for s in range(max(left, 0), left + 3)]
                    window = [(r, s) for r, s in window if r < 7 and s < 6]
                    best = max(window, key=lambda p: max(x[i, c][p], start[i, c][p]))
                    expected[i][best] += max(x[i, c][p] for p in window) - max(start[i, c][p] for p in window)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-5)


def slow_deeplift(model, x, start):
    """The multipliers as one matrix product per label, each layer a dense matrix, for one image and one output."""

    def jacobian(layer, at):
        matrix = torch.autograd.functional.jacobian(layer, at[None])
        return matrix.reshape(-1, at.numel())

    def secant(f, a, b):
        slope = (f(a) - f(b)) / (a - b)
        return torch.where(a == b, (a > 0).to(a.dtype), slope).flatten()

    def pooled(a, b):
        y, y0 = model.pool(a[None])[0], model.pool(b[None])[0]
        matrix = torch.zeros(y.numel(), a.numel(), dtype=a.dtype)
        for k, (c, i, j) in enumerate(np.ndindex(*y.shape)):
            rows, columns = (slice(max(2 * n - 1, 0), 2 * n + 2) for n in (i, j))
            source = a if y[c, i, j] >= y0[c, i, j] else b
            window = source[c, rows, columns]
            r, s = np.unravel_index(int(window.argmax()), window.shape)
            place = (c, rows.start + r, columns.start + s)
            where = int(np.ravel_multi_index(place, a.shape))
            matrix[k, where] = 1.0 if a[place] == b[place] else (y[c, i, j] - y0[c, i, j]) / (a[place] - b[place])
        return matrix, y, y0

    stem = lambda t: model.norm1(model.conv1(t))  # noqa: E731
    a, a0 = stem(x[None])[0], stem(start[None])[0]
    one = secant(torch.relu, a, a0)[:, None] * jacobian(stem, x)
    matrix, p, p0 = pooled(a.relu(), a0.relu())
    one = matrix @ one
    b, b0 = model.conv2(p[None])[0], model.conv2(p0[None])[0]
    two = one + secant(torch.relu, b, b0)[:, None] * (jacobian(model.conv2, p) @ one)
    q, q0 = b.relu() + p, b0.relu() + p0
    c, c0 = model.last(q[None])[0], model.last(q0[None])[0]
    three = secant(torch.relu, c, c0)[:, None] * (jacobian(model.last, q) @ two)
    four = jacobian(lambda t: model.fc(t.mean((2, 3))), c.relu()) @ three
    return (four * (x - start).flatten()).view(3, *x.shape).sum(1)


@pytest.mark.parametrize("make", ["modules", "shared", "functions"])
def test_deeplift_equals_the_slow_implementation_whatever_makes_the_relus(make):
    model = Tiny(make).eval().double().requires_grad_(False)
    x, start = torch.rand(2, 1, 8, 6).double(), torch.rand(2, 1, 8, 6).double()
    found = cxrkit.attribute(model, x, "deeplift", baseline=start)
    expected = torch.stack([slow_deeplift(model, image, black) for image, black in zip(x, start, strict=True)])
    torch.testing.assert_close(found, expected)


def test_a_probability_has_the_secant_of_the_sigmoid(tiny, images):
    by_logit = cxrkit.attribute(tiny, images, "deeplift", baseline=0.2)
    with torch.no_grad():
        logits, before = tiny(images), tiny(torch.full_like(images, 0.2))
    slope = (logits.sigmoid() - before.sigmoid()) / (logits - before)
    found = cxrkit.attribute(tiny, images, "deeplift", baseline=0.2, output="probability")
    torch.testing.assert_close(found, by_logit * slope[:, :, None, None], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deeplift_agrees_with_captum_where_captum_is_right():
    """Each ReLU its own module, none right before or after a max-pool: captum 0.9 is wrong for the others."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.MaxPool2d(2)]
    layers += [
        nn.Conv2d(5, 4, 3),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ELU(),
        nn.Conv2d(4, 4, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    ]
    model, x, start = nn.Sequential(*layers), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    found = cxrkit.attribute(model, x, "deeplift", baseline=start)
    for j in range(3):
        expected = captum.attr.DeepLift(model).attribute(x.clone().requires_grad_(), start, target=j).sum(1)
        torch.testing.assert_close(found[:, j], expected.detach(), atol=1e-5, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    baseline=st.sampled_from(["black", "white", "mean", "blur", 0.3]),
    output=st.sampled_from(["logit", "probability"]),
    make=st.sampled_from(["modules", "shared", "functions"]),
    equal=st.floats(0, 1),
)
def test_deeplift_is_complete(seed, baseline, output, make, equal):
    generator = torch.Generator().manual_seed(seed)
    model = Tiny(make).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    x[torch.rand(x.shape, generator=generator) < equal] = 0.3  # black bands, and pixels like the baseline
    found = cxrkit.attribute(model, x, "deeplift", baseline=baseline, output=output)
    from cxrkit.attribution.baselines import baseline_images

    score = torch.sigmoid if output == "probability" else (lambda y: y)
    with torch.no_grad():
        change = score(model(x)) - score(model(baseline_images(x, baseline)))
    size = 1 + found.abs().sum((2, 3))
    assert ((found.sum((2, 3)) - change).abs() / size).max() < 1e-12


def test_several_noisy_baselines_are_averaged(tiny, images):
    found = cxrkit.attribute(tiny, images, "deeplift", n_baselines=3, noise=0.1, seed=5, baseline="white")
    draw = noise_source(Explained(tiny), images, 5)
    maps = []
    for _ in range(3):
        start = 1 + 0.1 * torch.stack([draw(i) for i in range(3)])
        maps.append(cxrkit.attribute(tiny, images, "deeplift", baseline=start))
    torch.testing.assert_close(found, torch.stack(maps).mean(0), atol=1e-6, rtol=1e-4)
    one = cxrkit.attribute(tiny, images, "deeplift", n_baselines=1, noise=0.1, baseline="white")
    assert torch.equal(one, cxrkit.attribute(tiny, images, "deeplift", baseline="white"))


@pytest.mark.parametrize("kind", ["cat", "index", "resize", "matrix"])
def test_linear_operations_pass(kind):
    weights = torch.randn(12, 12)
    operation = {
        "cat": lambda x: torch.cat([x, 2 - x / 3], 1).sum(1),
        "index": lambda x: x[:, 0, ::2].repeat(1, 2, 1).flip(1),
        "resize": lambda x: F.interpolate(F.pad(x, (1, 1, 0, 2), mode="reflect"), (12, 16)).transpose(2, 3).squeeze(1),
        "matrix": lambda x: torch.addcmul(x, x, torch.tensor(0.5)).squeeze(1) @ weights,
    }[kind]
    model = Function(lambda x: F.softplus(operation(x)).flatten(1)[:, :3])
    x = torch.rand(2, 1, 16, 12)
    with torch.no_grad():
        change = model(x) - model(torch.zeros_like(x))
    torch.testing.assert_close(cxrkit.attribute(model, x, "deeplift").sum((2, 3)), change, atol=1e-5, rtol=1e-4)


# Presets


@pytest.mark.parametrize(
    ("method", "paper", "settings"),
    [
        ("saliency", "covid", {"output": "probability"}),
        ("saliency", "path", {"output": "probability"}),
        ("input_x_gradient", "covid", {"output": "probability"}),
        ("input_x_gradient", "normgrad", {"protocol": "authors"}),
        ("smoothgrad", "path", {"n_samples": 25, "noise": 0.15, "squared": True, "output": "probability"}),
        ("guided_backprop", "covid", {"output": "probability"}),
        ("guided_backprop", "normgrad", {"protocol": "authors"}),
        ("integrated_gradients", "covid", {"n_steps": 50, "rule": "gauss_legendre", "output": "probability"}),
        ("integrated_gradients", "path", {"n_steps": 25, "rule": "uniform", "output": "probability"}),
        ("deeplift", "covid", {"baseline": "black", "output": "probability"}),
    ],
)
def test_presets_are_the_settings_of_the_papers(method, paper, settings, tiny, images):
    assert paper in card(method).papers
    found = cxrkit.attribute(tiny, images, method, preset=paper)
    assert torch.equal(found, cxrkit.attribute(tiny, images, method, **settings))
    assert not torch.allclose(found, cxrkit.attribute(tiny, images, method), atol=1e-4)


# Labels, chunks, surroundings


def test_through_the_encoding_of_a_classifier():
    from cxrkit.models import create

    model = create("resnet18", labels=("Mass", "Nodule")).eval()
    x = torch.rand(2, 1, 64, 64)
    maps = cxrkit.attribute(model, x, "deeplift", baseline="white")
    assert maps.shape == (2, 2, 64, 64)
    with torch.no_grad():
        change = model(x) - model(torch.ones_like(x))
    torch.testing.assert_close(maps.sum((2, 3)), change, atol=1e-4, rtol=1e-4)
    assert cxrkit.attribute(model, x, "smoothgrad", n_samples=2).shape == (2, 2, 64, 64)
    for antialias in ("flc", "blur"):
        network = create("resnet18", labels=("Mass",), antialias=antialias)
        assert cxrkit.attribute(network, x, "deeplift").shape == (2, 1, 64, 64)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "smoothgrad", "n_samples": 0}, "n_samples must be a whole number, at least 1"),
        ({"method": "smoothgrad", "n_samples": 2.0}, "n_samples"),
        ({"method": "smoothgrad", "noise": -0.1}, "noise must be a share"),
        ({"method": "smoothgrad", "noise": True}, "noise"),
        ({"method": "smoothgrad", "noise": float("nan")}, "noise"),
        ({"method": "smoothgrad", "seed": -1}, "seed must be a whole number, at least 0"),
        ({"method": "smoothgrad", "preset": "covid"}, "preset of smoothgrad"),
        ({"method": "guided_backprop", "protocol": "author"}, "'authors'"),
        ({"method": "input_x_gradient", "protocol": "ours"}, "protocol 'ours'"),
        ({"method": "integrated_gradients", "n_steps": 1, "rule": "uniform"}, "at least 2 with uniform"),
        ({"method": "integrated_gradients", "rule": "unifrm"}, "'uniform'"),
        ({"method": "deeplift", "baseline": "grey"}, "baseline"),
        ({"method": "deeplift", "n_baselines": 0}, "n_baselines"),
        ({"method": "deeplift", "n_baselines": 2, "noise": float("inf")}, "noise must be a standard deviation"),
        ({"method": "deeplift", "seed": 1.5}, "seed"),
    ],
)
def test_unfit_options_are_parameter_errors(arguments, message, tiny, images):
    with pytest.raises(ParameterError, match=message):
        cxrkit.attribute(tiny, images, **arguments)


def pooled(**layers):
    return nn.Sequential(
        *[nn.Conv2d(1, 4, 3), *layers.values(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    )


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.ELU(), "elu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Softmax(1), "softmax"),
        (Function(lambda x: x.clamp(max=1)), "clamp"),
        (Function(lambda x: x.clamp(-1, 1)), "clamp"),
        (Function(lambda x: x.clamp_min(0.1)), "clamp_min"),
        (Function(lambda x: F.threshold(x, 0, -1)), "threshold"),
        (Function(lambda x: F.threshold(x, 0.5, 0)), "threshold"),
        (Function(lambda x: torch.maximum(x, 0.1 * x)), "maximum"),
        (Function(lambda x: torch.maximum(x, torch.ones_like(x))), "maximum"),
        (Function(lambda x: torch.logaddexp(x, torch.zeros_like(x))), "logaddexp"),
        (Function(lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))), "erf"),
        (Function(lambda x: x * F.relu6(x + 3) / 6), "mul"),
        (Function(lambda x: F.glu(torch.cat([x, x], 1), 1)), "glu"),
        (Function(F.hardshrink), "hardshrink"),
        (Function(F.tanhshrink), "tanhshrink"),
        (Function(torch.abs), "abs"),
        (Function(lambda x: x.relu() ** 2), "pow"),
        (Function(torch.round), "round"),
        (Function(lambda x: x / (1 + x.mean((1, 2, 3), keepdim=True))), "div"),
        (Function(F.normalize), "normalize"),
    ],
)
def test_guidance_through_other_activations_is_refused(layer, operation, images):
    model = pooled(relu=nn.ReLU(), layer=layer)
    with pytest.raises(AttributionError, match=f"guided_backprop is defined for ReLU; layer 2 applies {operation}"):
        cxrkit.attribute(model, images, "guided_backprop")


def test_guidance_without_any_relu_is_refused(images):
    with pytest.raises(AttributionError, match="no ReLU between image and logits"):
        cxrkit.attribute(pooled(norm=nn.BatchNorm2d(4)), images, "guided_backprop")


class Gate(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Gate(), r"mul of two tensors that both depend on the image, .* \(layer 1\)"),
        (nn.GroupNorm(2, 4), r"group_norm \(layer 1\)"),
        (nn.Softmax(1), r"softmax \(layer 1\)"),
        (nn.InstanceNorm2d(4), "instance_norm"),
        (nn.LocalResponseNorm(2), "local_response_norm"),
        (Function(lambda x: x / (1 + x.abs())), "div of two tensors"),
        (Function(lambda x: 1 / (3 + x.abs())), "rdiv"),
        (Function(lambda x: torch.div(torch.ones(4, 1, 1), 3 + x.abs())), "div of a constant"),
        (Function(lambda x: torch.pow(torch.tensor(2.0), x)), "as a parameter"),
        (Function(lambda x: x @ x.mT), "matmul of two tensors"),
        (Function(lambda x: x if x.sum() > 0 else -x), "gap"),
        (Function(lambda x: x.relu() if x.data.mean() > 0 else x), "another way"),
        (Function(lambda x: x.tanh() if x.data.mean() > 0 else x.relu()), "another way"),
        (Function(lambda x: x if x.data.mean() > 0 else x.relu()), "another way"),
    ],
)
def test_what_has_no_rule_is_refused_by_operation_and_layer(layer, message, images):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():  # positive for the image, negative for black
        model[0].weight.copy_(torch.tensor([9.0, 10, 11, 12]).view(4, 1, 1, 1))
        model[0].bias.fill_(-1.0)
    with pytest.raises(AttributionError, match=f"deeplift.*({message})"):
        cxrkit.attribute(model, images, "deeplift")


@pytest.mark.parametrize("size", [1, 2])
def test_the_gap_names_image_and_label(size, images):
    model = Function(lambda x: torch.stack([x.mean((1, 2, 3)), x.mean((1, 2, 3)) + bool(x.mean() > 0)], 1))
    x = images.clone()
    x[:2] = 0  # no gap there
    with pytest.raises(AttributionError, match=r"image 2, label 1 of those asked for, sums to 0.*\(gap"):
        cxrkit.attribute(model, x, "deeplift", chunk=size)


def test_nan_is_refused(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.ReLU())
    model[1].weight.data[1, 0] = float("nan")
    with pytest.raises(AttributionError, match=r"image 0, label \d of those asked for, sums to nan"):
        cxrkit.attribute(model, images, "deeplift")


@pytest.mark.parametrize(
    ("name", "guided", "lifted"),
    [
        ("resnet18", True, True),
        ("vgg11", True, True),
        ("densenet121", True, True),
        ("inception_v3", True, True),  # all its ReLUs are functions
        ("mobilenet_v2", True, True),
        ("mobilenet_v3_small", False, False),
        ("efficientnet_b0", False, False),
        ("convnext_tiny", False, False),
        ("vit_b_16", False, False),
    ],
)
def test_methods_of_real_architectures(name, guided, lifted):
    torchvision = pytest.importorskip("torchvision")
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=2, **options)
    fit = [c.name for c in methods(model)]
    assert ("guided_backprop" in fit, "deeplift" in fit) == (guided, lifted)


def test_methods_of_other_networks(tiny):
    from cxrkit.models import create

    names = {c.name for c in methods(tiny)}
    assert set(NEW) <= names
    names = {c.name for c in methods(create("bcos_resnet18", labels=("Mass",)))}
    assert names & set(NEW) == {"smoothgrad"}
