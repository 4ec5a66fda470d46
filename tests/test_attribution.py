"""Attribution: closed forms, a slow second implementation, two libraries, and what is refused or left alone."""

from __future__ import annotations

import gc
import weakref

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
from cxrkit.attribution import card, methods
from cxrkit.attribution.api import chunk_size
from cxrkit.attribution.probe import prepared
from cxrkit.attribution.registry import FAMILIES
from cxrkit.attribution.target import Explained

GRADIENT = ("saliency", "input_x_gradient", "integrated_gradients")
CAM = ("cam", "gradcam", "layercam")
EVERY = (
    *("saliency", "input_x_gradient", "smoothgrad", "guided_backprop", "integrated_gradients", "deeplift"),
    *("occlusion", "cam", "gradcam", "gradcam_plus_plus", "layercam", "scorecam", "guided_gradcam", "normgrad"),
    *("lrp", "rap", "guided_ig", "blur_ig", "xrai", "bcos"),
)
UNSIGNED = {"gradcam", "gradcam_plus_plus", "layercam", "scorecam", "normgrad"}


class Linear(nn.Module):
    def __init__(self, weights):  # [L, C, H, W]
        super().__init__()
        self.head = nn.Linear(weights[0].numel(), len(weights))
        self.head.weight.data = weights.flatten(1).clone()
        self.shape = weights.shape[1:]

    def forward(self, x):
        return self.head(x.flatten(1))


class Tiny(nn.Module):
    """A residual network in small, with in-place and functional rectifiers, pooled to a linear head."""

    def __init__(self, channels=1, outputs=3, functional=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, outputs)
        self.functional = functional
        self.norm1.running_mean.normal_()
        self.last[1].running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.last(self.first(x))
        x = F.relu(x, inplace=True) if self.functional else x
        return self.fc(self.drop(x.mean((2, 3))))

    def first(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return x + self.relu(self.conv2(x))


@pytest.fixture
def tiny():
    return Tiny().eval()


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 12)


def smooth_network(outputs=2):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, outputs), nn.Softplus()
    )


# Closed forms


def test_linear_model_has_its_weights_as_saliency():
    weights = torch.randn(3, 2, 4, 5)
    x = torch.rand(2, 2, 4, 5)
    model = Linear(weights)
    torch.testing.assert_close(
        cxrkit.attribute(model, x, "saliency"), weights.sum(1).expand(2, -1, -1, -1), atol=1e-6, rtol=0
    )
    product = (weights * x[:, None]).sum(2)
    torch.testing.assert_close(cxrkit.attribute(model, x, "input_x_gradient"), product, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["gauss_legendre", "trapezoid"])
@pytest.mark.parametrize(
    ("baseline", "start"),
    [
        ("black", lambda x: torch.zeros_like(x)),
        ("white", lambda x: torch.ones_like(x)),
        ("mean", lambda x: x.mean((2, 3), keepdim=True)),
        (0.25, lambda x: torch.full_like(x, 0.25)),
        (torch.full((1, 1, 4, 5), 0.7), lambda x: torch.full_like(x, 0.7)),
    ],
)
def test_linear_model_has_weights_times_difference_as_integrated_gradients(rule, baseline, start):
    weights, x = torch.randn(3, 2, 4, 5), torch.rand(2, 2, 4, 5)
    expected = (weights * (x - start(x))[:, None]).sum(2)
    found = cxrkit.attribute(Linear(weights), x, "integrated_gradients", n_steps=3, baseline=baseline, rule=rule)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_quadratic_model_integrates_exactly_with_one_gauss_point():
    class Quadratic(nn.Module):
        def forward(self, x):
            return (x**2).sum((1, 2, 3))[:, None]

    x = torch.rand(2, 1, 3, 3)
    found = cxrkit.attribute(Quadratic(), x, "integrated_gradients", n_steps=1)
    torch.testing.assert_close(found, x**2)
    torch.testing.assert_close(cxrkit.attribute(Quadratic(), x, "saliency"), 2 * x)


def test_blur_baseline_is_smoother_than_the_image_and_keeps_a_constant(images):
    model = Linear(torch.randn(1, 1, 16, 12))
    constant = torch.full((1, 1, 16, 12), 0.3)
    zero = cxrkit.attribute(model, constant, "integrated_gradients", baseline="blur", n_steps=2)
    assert zero.abs().max() < 1e-6
    assert cxrkit.attribute(model, images, "integrated_gradients", baseline="blur", n_steps=2).abs().max() > 0.01


def test_probability_is_the_sigmoid_of_the_logit(tiny, images):
    by_logit = cxrkit.attribute(tiny, images, "saliency")
    p = tiny(images).sigmoid().detach()
    slope = (p * (1 - p))[:, :, None, None]
    torch.testing.assert_close(cxrkit.attribute(tiny, images, "saliency", output="probability"), by_logit * slope)


def test_cam_mean_plus_bias_is_the_logit_and_gradcam_its_positive_part():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    x = torch.rand(2, 1, 7, 7)  # stride 1: no up-sampling in the way
    cam = cxrkit.attribute(model, x, "cam")
    torch.testing.assert_close(cam.mean((2, 3)) + model[-1].bias, model(x))
    torch.testing.assert_close(cxrkit.attribute(model, x, "gradcam"), cam.relu() / 49, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("functional", [False, True])
def test_cam_before_pooling_with_and_without_a_functional_relu(functional, images):
    model = Tiny(functional=functional).eval()
    activation = model.last(model.first(images))
    activation = activation.relu() if functional else activation
    small = torch.einsum("lk,bkhw->blhw", model.fc.weight, activation)
    expected = F.interpolate(small, size=(16, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cxrkit.attribute(model, images, "cam"), expected.detach(), atol=1e-6, rtol=1e-5)


def test_cam_of_a_convolutional_head_is_its_own_map(images):
    head = nn.Conv2d(4, 2, 1, bias=True)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), head)
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(cxrkit.attribute(model, images, "cam"), body(images).detach())


# A second, slow implementation: one label of one image at a time


def slow(model, images, method, output="logit"):
    maps = torch.zeros(len(images), model(images).shape[1], *images.shape[-2:])
    for i, image in enumerate(images):
        for j in range(maps.shape[1]):

            def score(x, j=j):
                y = model(x[None])[0, j]
                return y.sigmoid() if output == "probability" else y

            def gradient(x, score=score):
                return torch.autograd.functional.jacobian(score, x)

            if method == "saliency":
                maps[i, j] = gradient(image).sum(0)
            elif method == "input_x_gradient":
                maps[i, j] = (image * gradient(image)).sum(0)
            else:
                nodes, weights = np.polynomial.legendre.leggauss(20)
                for node, weight in zip(nodes, weights, strict=True):
                    maps[i, j] += (image * gradient(image * (node + 1) / 2)).sum(0) * weight / 2
    return maps.detach()


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("method", GRADIENT)
def test_gradient_methods_equal_the_slow_implementation(method, output):
    model, x = smooth_network(), torch.rand(3, 2, 6, 6)
    options = {"n_steps": 20} if method == "integrated_gradients" else {}
    found = cxrkit.attribute(model, x, method, output=output, **options)
    torch.testing.assert_close(found, slow(model, x, method, output), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize("layer", ["conv1", "norm1", "conv2", "last.0", "last"])
def test_layer_methods_equal_a_computation_by_hand(method, layer, tiny, images):
    found = cxrkit.attribute(tiny, images, method, layer=layer)
    rest = {
        "conv1": lambda a: rest["norm1"](tiny.norm1(a)),
        "norm1": lambda a: rest["block"](a.relu()),
        "block": lambda a: rest["last"](tiny.last(a + tiny.conv2(a).relu())),
        "last.0": lambda a: rest["last"](tiny.last[1](a)),
        "last": lambda a: tiny.fc(a.mean((2, 3))),
    }
    stem = tiny.norm1(tiny.conv1(images)).relu()
    rest["conv2"] = lambda a: rest["last"](tiny.last(stem + a.relu()))
    activation = {
        "conv1": lambda: tiny.conv1(images),
        "norm1": lambda: tiny.norm1(tiny.conv1(images)),
        "conv2": lambda: tiny.conv2(stem),
        "last.0": lambda: tiny.last[0](tiny.first(images)),
        "last": lambda: tiny.last(tiny.first(images)),
    }[layer]().detach()
    for j in range(3):
        a = activation.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rest[layer](a)[:, j].sum(), a)
        weight = gradient.mean((2, 3), keepdim=True) if method == "gradcam" else gradient.clamp(min=0)
        small = (weight * activation).sum(1, keepdim=True).clamp(min=0)
        large = F.interpolate(small, size=(16, 12), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found[:, j], large[:, 0], atol=1e-6, rtol=1e-4)


# Independent libraries


@pytest.mark.parametrize(
    ("method", "peer", "options", "peer_options"),
    [
        ("saliency", captum.attr.Saliency, {}, {"abs": False}),
        ("input_x_gradient", captum.attr.InputXGradient, {}, {}),
        (
            "integrated_gradients",
            captum.attr.IntegratedGradients,
            {"n_steps": 30, "baseline": 0.4},
            {"n_steps": 30, "method": "gausslegendre", "baselines": 0.4},
        ),
    ],
)
def test_gradient_methods_agree_with_captum(method, peer, options, peer_options):
    model, x = Tiny(channels=3).eval(), torch.rand(2, 3, 16, 16)
    found = cxrkit.attribute(model, x, method, **options)
    for j in range(3):
        expected = peer(model).attribute(x.clone().requires_grad_(), target=j, **peer_options).sum(1)
        torch.testing.assert_close(found[:, j], expected.detach().float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("method", "peer"), [("gradcam", "GradCAM"), ("layercam", "LayerCAM")])
def test_layer_methods_agree_with_grad_cam_up_to_its_scaling(method, peer, tiny):
    import pytorch_grad_cam  # imports torchvision, which on a CPU cxrkit must precede
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class Raw(getattr(pytorch_grad_cam, peer)):  # before the package scales and resizes
        def compute_cam_per_layer(self, inputs, targets, eigen_smooth):
            seen = self.activations_and_grads
            a, g = seen.activations[0].numpy(), seen.gradients[0].numpy()
            return self.get_cam_image(inputs, self.target_layers[0], targets, a, g, eigen_smooth)

        def aggregate_multi_layers(self, maps):
            return np.maximum(maps, 0)

    x = torch.rand(2, 1, 16, 16)
    found = cxrkit.attribute(tiny, x, method, layer=tiny.last)
    for j in range(3):
        with Raw(tiny, [tiny.last]) as explain:
            small = torch.from_numpy(explain(x, [ClassifierOutputTarget(j)] * 2))[:, None]
        expected = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(found[:, j], expected, atol=1e-6, rtol=1e-4)


def test_integrated_gradients_are_complete():
    model, x = smooth_network(), torch.rand(3, 2, 6, 6)
    gap = model(x) - model(torch.zeros_like(x))
    assert (cxrkit.attribute(model, x, "integrated_gradients").sum((2, 3)) - gap).abs().max() < 1e-5
    rough = cxrkit.attribute(model, x, "integrated_gradients", n_steps=50, rule="trapezoid").sum((2, 3)) - gap
    assert 1e-7 < rough.abs().max() < 1e-3


# Labels, chunks, layers


def test_the_default_chunk_shrinks_with_larger_images():
    sizes = [chunk_size(torch.empty(1, 1, side, side), None) for side in (32, 224, 448, 2048)]
    assert sizes == [4, 4, 1, 1]
    assert chunk_size(torch.empty(1, 1, 32, 32), 5) == 5


def test_a_network_that_works_in_place_leaves_the_images_alone(images):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 2))
    shifted = images - 0.5
    before = shifted.clone()
    for method in GRADIENT:
        cxrkit.attribute(model, shifted, method)
    assert torch.equal(shifted, before)


@settings(max_examples=20, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 1000))
def test_methods_are_linear_in_a_linear_model(a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, 2, 1, 4, 4, generator=generator)
    x = torch.rand(2, 1, 4, 4, generator=generator)
    for method in GRADIENT:
        options = {"n_steps": 2} if method == "integrated_gradients" else {}
        left = cxrkit.attribute(Linear(a * u + b * v), x, method, **options)
        right = sum(s * cxrkit.attribute(Linear(w), x, method, **options) for s, w in ((a, u), (b, v)))
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "salency"}, "saliency"),
        ({"method": "gradcam", "layers": "last"}, "'layer'"),
        ({"method": "saliency", "n_steps": 3}, "n_steps"),
        ({"method": "gradcam", "layer": "lst"}, "'last'"),
        ({"method": "gradcam", "layer": nn.ReLU()}, "isn't part"),
        ({"method": "saliency", "labels": [3]}, "0 to 2"),
        ({"method": "saliency", "labels": [-1]}, "0 to 2"),
        ({"method": "saliency", "labels": [True]}, "True"),
        ({"method": "saliency", "labels": "Mass"}, "no label names"),
        ({"method": "saliency", "labels": []}, "empty"),
        ({"method": "saliency", "output": "logits"}, "'logit'"),
        ({"method": "cam", "output": "probability"}, "cam explains the logit"),
        ({"method": "saliency", "chunk": 0}, "chunk"),
        ({"method": "integrated_gradients", "n_steps": 0}, "n_steps"),
        ({"method": "integrated_gradients", "n_steps": 1, "rule": "trapezoid"}, "at least 2"),
        ({"method": "integrated_gradients", "rule": "gauss"}, "gauss_legendre"),
        ({"method": "integrated_gradients", "baseline": "blck"}, "'black'"),
        ({"method": "integrated_gradients", "baseline": torch.rand(2, 2)}, "broadcast"),
        ({"method": "integrated_gradients", "baseline": float("nan")}, "NaN"),
        ({"method": "integrated_gradients", "baseline": None}, "NoneType"),
    ],
)
def test_unknown_names_and_values_are_parameter_errors(arguments, message, tiny, images):
    with pytest.raises(ParameterError, match=message):
        cxrkit.attribute(tiny, images, **arguments)


def test_a_misspelt_label_names_its_neighbours(tiny, images):
    tiny.labels = ("Mass", "Nodule", "Effusion")
    with pytest.raises(ParameterError, match="'Nodule'"):
        cxrkit.attribute(tiny, images, "saliency", labels=["Nodul"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"\[1, 16, 12\]"),
        (lambda x: x[:0], "at least one image"),
        (lambda x: (x * 255).to(torch.uint8), "uint8"),
        (lambda x: x.masked_fill(torch.arange(3).view(3, 1, 1, 1) == 1, float("nan")), "image 1"),
        (lambda x: x.masked_fill(torch.arange(3).view(3, 1, 1, 1) == 2, float("inf")), "image 2"),
        (lambda x: x.numpy(), "ndarray"),
    ],
)
def test_unfit_images_are_named(change, message, tiny, images):
    with pytest.raises(AttributionError, match=message):
        cxrkit.attribute(tiny, change(images), "saliency")


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.unused = nn.Conv2d(1, 1, 1)
        self.side = nn.Conv2d(1, 1, 1)
        self.flat = nn.Flatten()

    def forward(self, x):
        self.side(x)
        return self.flat(self.conv(self.conv(x)))[:, :2]


@pytest.mark.parametrize(
    ("layer", "message"),
    [("conv", "more than once"), ("unused", "doesn't run"), ("side", "don't depend"), ("flat", "no map")],
)
@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_layers_without_one_map_of_their_own_are_refused(method, layer, message, images):
    with pytest.raises(AttributionError, match=message):
        cxrkit.attribute(Reused(), images, method, layer=layer)


@pytest.mark.parametrize(
    "tail",
    [
        [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)],
        [nn.Flatten(), nn.Linear(4 * 192, 3)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid()],
    ],
)
def test_cam_is_refused_where_the_logits_are_no_pooled_linear_sum(tail, images):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *tail)
    with pytest.raises(AttributionError, match=r"layer 0 .*use gradcam or layercam"):
        cxrkit.attribute(model, images, "cam", layer="0")


def test_cam_of_another_layer_than_the_last_is_refused(tiny, images):
    with pytest.raises(AttributionError, match="conv2"):
        cxrkit.attribute(tiny, images, "cam", layer="conv2")


@pytest.mark.parametrize("outputs", [lambda y: y[:, :, None], lambda y: (y,), lambda y: y[:1].T])
def test_networks_that_return_no_logits_are_refused(outputs, images):
    class Odd(Linear):
        def forward(self, x):
            return outputs(super().forward(x))

    with pytest.raises(AttributionError, match=r"logits \[B, L\]"):
        cxrkit.attribute(Odd(torch.rand(2, 1, 16, 12)), images, "saliency")


def test_a_network_that_cuts_the_graph_or_gives_nan_is_refused(images):
    class Cut(Linear):
        def forward(self, x):
            return super().forward(x.detach())

    with pytest.raises(AttributionError, match="detach"):
        cxrkit.attribute(Cut(torch.rand(2, 1, 16, 12)), images, "saliency")
    weights = torch.rand(2, 1, 16, 12)
    weights[1, 0, 0, 0] = float("nan")
    with pytest.raises(AttributionError, match="NaN or infinite values for image 0"):
        cxrkit.attribute(Linear(weights), images, "saliency")


# What is left alone


def test_prepared_restores_after_an_error_within(tiny):
    tiny.train()
    within = {}

    def fail():
        with prepared(Explained(tiny), torch.rand(1, 1, 8, 8)):
            within["training"] = tiny.training
            within["trainable"] = any(p.requires_grad for p in tiny.parameters())
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    assert within == {"training": False, "trainable": False}
    assert tiny.training
    assert all(p.requires_grad for p in tiny.parameters())


# Cards


def test_every_method_of_the_public_face_has_a_complete_card(tiny):
    cards = methods()
    assert sorted(c.name for c in cards) == sorted(EVERY)
    families = [c.family for c in cards]
    assert families == sorted(families, key=FAMILIES.index)
    for c in cards:
        assert card(c.name) is c
        assert c.meaning
        assert c.formula
        assert set(c.papers) <= {"bcos", "normgrad", "covid", "path", "relevance"}
    assert {c.name for c in cards if not c.signed} == UNSIGNED
    with pytest.raises(AttributeError):
        cards[0].name = "other"
    assert {c.name for c in methods(tiny)} == set(EVERY) - {"bcos"}
    linear = {c.name for c in methods(Linear(torch.rand(2, 1, 4, 4)))}
    assert {"saliency", "integrated_gradients", "occlusion", "guided_ig", "xrai", "lrp"} <= linear
    assert not linear & {"cam", "gradcam", "layercam", "scorecam", "normgrad", "bcos"}
    with pytest.raises(ParameterError, match="layercam"):
        card("layer_cam")


CHEAP = {
    "smoothgrad": {"n_samples": 2},
    "integrated_gradients": {"n_steps": 2},
    "guided_ig": {"n_steps": 2},
    "blur_ig": {"n_steps": 2},
    "xrai": {"n_steps": 2, "segments": torch.arange(4).repeat_interleave(64).view(1, 16, 16)},
    "occlusion": {"window": 8, "stride": 8},
}


@pytest.mark.parametrize("method", sorted(set(EVERY) - {"bcos"}))
def test_memory_is_flat_over_a_hundred_calls(method, tiny):
    images = torch.rand(1, 1, 16, 16)
    seen, counts = [], []
    hook = tiny.fc.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    gc.freeze()  # what was there before is not looked through again
    for call in range(100):
        cxrkit.attribute(tiny, images, method, labels=[0, 2], **CHEAP.get(method, {}))
        if call in (9, 99):
            gc.collect()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    gc.unfreeze()
    hook.remove()
    assert counts[0] == counts[1]
    assert seen
    assert all(ref() is None for ref in seen)


def test_methods_of_real_architectures():
    torchvision = pytest.importorskip("torchvision")
    for name, has_cam in [("resnet18", True), ("densenet121", True), ("vgg11", False), ("convnext_tiny", False)]:
        with torch.device("meta"):
            model = getattr(torchvision.models, name)(num_classes=2)
        assert ("cam" in [c.name for c in methods(model)]) == has_cam


def test_torchvision_networks_have_the_cams_they_should():
    torchvision = pytest.importorskip("torchvision")
    x = torch.rand(1, 3, 64, 64)
    for name, last in [("resnet18", "layer4"), ("densenet121", "features"), ("squeezenet1_1", None)]:
        model = getattr(torchvision.models, name)(num_classes=2).eval()
        small = cxrkit.attribute(model, x, "cam")
        if last is None:
            continue
        torch.testing.assert_close(cxrkit.attribute(model, x, "cam", layer=last), small)
        activation = model.get_submodule(last)
        with torch.no_grad():
            kept = []
            hook = activation.register_forward_hook(lambda m, a, y, kept=kept: kept.append(y.clone()))
            logits = model(x)
            hook.remove()
        head = model.fc if name == "resnet18" else model.classifier
        cam = torch.einsum("lk,bkhw->blhw", head.weight, kept[0].relu())
        torch.testing.assert_close(cam.mean((2, 3)) + head.bias, logits, atol=1e-5, rtol=1e-4)
        expected = F.interpolate(cam, size=(64, 64), mode="bilinear", align_corners=False).detach()
        torch.testing.assert_close(small, expected, atol=1e-5, rtol=1e-4)


def test_attribution_through_the_encoding_of_a_classifier():
    from cxrkit.models import create

    model = create("resnet18", labels=("Mass", "Nodule")).eval()
    x = torch.rand(2, 1, 64, 64)
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs)[:, 1].sum(), inputs)
    found = cxrkit.attribute(model, x, "saliency", labels=["Nodule"])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    for method in (*CAM, "integrated_gradients"):
        options = {"n_steps": 2, "baseline": 1.5} if method == "integrated_gradients" else {}
        assert cxrkit.attribute(model, x, method, **options).shape == (2, 2, 64, 64)
    with pytest.raises(AttributionError, match="image 1 has values outside"):
        cxrkit.attribute(model, x * torch.tensor([1.0, 255.0]).view(2, 1, 1, 1), "saliency")
    with pytest.raises(AttributionError, match="grey"):
        cxrkit.attribute(model, x.expand(-1, 3, -1, -1), "saliency")
    with pytest.raises(AttributionError, match="no B-cos layers"):
        cxrkit.attribute(model, x, "bcos")


def test_explained_keeps_labels_lazy_for_unnamed_networks(tiny, images):
    explained = Explained(tiny, labels=[1])
    assert explained.select(explained.logits(images)).shape == (3, 1)
