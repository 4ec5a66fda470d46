"""Grad-CAM++, Score-CAM, guided Grad-CAM, and layers whose output is no map: closed forms, slow second
implementations, three libraries, and what is refused.
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
from cxrkit.attribution import methods

WEIGHTED = ("gradcam_plus_plus", "scorecam", "guided_gradcam")
LAYERED = ("gradcam", "layercam", *WEIGHTED)


@pytest.fixture(autouse=True)
def _same_networks_every_time():
    torch.manual_seed(0)


class Tiny(nn.Module):
    """A residual network in small: a stage of half the size, a last stage after a ReLU, pooled to a linear head."""

    def __init__(self, channels=1, outputs=3, stride=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 6, 3, stride=stride, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.last = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, outputs)
        self.stem[1].running_mean.normal_()
        self.branch[1].running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.last((x + self.branch(x)).relu())
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture
def tiny():
    return Tiny().eval()


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 12)


def pooled(channels=4, outputs=3):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, outputs),
    ).eval()


def enlarged(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def output_of(module, model, x):
    kept = []
    hook = module.register_forward_hook(lambda m, given, y: kept.append(y.detach().clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return kept[0]


# Grad-CAM++


def test_gradcam_plus_plus_before_pooling_and_a_linear_head():
    model, x = pooled(), torch.rand(2, 1, 7, 7)
    activation, w = model[:2](x).detach(), model[-1].weight.detach()
    weights = w.relu() / (2 + w * activation.mean((2, 3))[:, None])  # [B, L, K]
    expected = torch.einsum("blk,bkhw->blhw", weights, activation).relu()
    torch.testing.assert_close(cxrkit.attribute(model, x, "gradcam_plus_plus"), expected, atol=1e-6, rtol=1e-5)


def test_gradcam_plus_plus_comes_from_the_derivatives_of_the_exponential_score():
    """The definition: second and third derivative of exp(logit) for every single value of the feature map."""
    torch.manual_seed(3)
    tail = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), *tail).double()
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    activation = model[:2](x).detach()
    found = cxrkit.attribute(model, x, "gradcam_plus_plus", layer="1")
    for i in range(2):
        for j in range(2):
            a = activation[[i]].clone().requires_grad_()
            exponential = tail(a)[0, j].exp()
            (first,) = torch.autograd.grad(exponential, a, create_graph=True)
            weights = torch.zeros(2, dtype=torch.float64)
            for k, u, v in (first[0] > 0).nonzero().tolist():
                (second,) = torch.autograd.grad(first[0, k, u, v], a, create_graph=True)
                (third,) = torch.autograd.grad(second[0, k, u, v], a, retain_graph=True)
                second, third = second[0, k, u, v], third[0, k, u, v]
                alpha = second / (2 * second + a[0, k].sum() * third)
                weights[k] += (alpha * first[0, k, u, v] / exponential).detach()
            expected = torch.einsum("k,khw->hw", weights, activation[i]).relu()
            torch.testing.assert_close(found[i, j], expected, atol=1e-10, rtol=1e-8)
    assert found.flatten(2).amax(2).min() > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_gradcam_plus_plus_is_bounded_by_half_the_rectified_gradient(seed, scale):
    """After a ReLU the coefficients lie between 0 and 1/2: 1/2 for a small logit, 0 for a large one."""
    torch.manual_seed(seed)
    model, x = pooled(), torch.rand(1, 1, 5, 5)
    model[-1].weight.data *= scale
    activation, w = model[:2](x).detach(), model[-1].weight.detach()
    most = torch.einsum("lk,bkhw->blhw", w.relu() / 2, activation)
    found = cxrkit.attribute(model, x, "gradcam_plus_plus")
    assert (found <= most * (1 + 1e-5) + 1e-7).all()
    least = torch.einsum("lk,bkhw->blhw", w.relu(), activation) / (2 + (w.relu() * activation.amax()).max())
    assert (found >= least * (1 - 1e-5) - 1e-7).all()


def grad_cam_maps(peer, model, layer, x, target, **attributes):
    """The maps of grad-cam, [B, h, w], before the package scales and resizes them."""
    import pytorch_grad_cam  # imports torchvision, which on a CPU cxrkit must precede
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class Raw(getattr(pytorch_grad_cam, peer)):
        def compute_cam_per_layer(self, inputs, targets, eigen_smooth):
            seen = self.activations_and_grads
            a = seen.activations[0].numpy()
            g = seen.gradients[0].numpy() if seen.gradients else None
            return self.get_cam_image(inputs, self.target_layers[0], targets, a, g, eigen_smooth)

        def aggregate_multi_layers(self, maps):
            return np.maximum(maps, 0)

    with Raw(model, [layer]) as explain:
        return torch.from_numpy(explain(x, [ClassifierOutputTarget(target)] * len(x)))


def test_gradcam_plus_plus_agrees_with_grad_cam_where_its_small_constant_is_small(tiny):
    x = torch.rand(2, 1, 16, 16)
    tiny.fc.weight.data *= 1000  # the package adds 1e-6 to g^2 (2 + g sum A), which rules where g is below 1e-3
    found = cxrkit.attribute(tiny, x, "gradcam_plus_plus", layer=tiny.last)
    for j in range(3):
        small = grad_cam_maps("GradCAMPlusPlus", tiny, tiny.last, x, j)[:, None]
        torch.testing.assert_close(found[:, j], enlarged(small, (16, 16))[:, 0], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("factor", [1, 1e-3])
def test_gradcam_plus_plus_of_a_flat_score_is_half_the_rectified_gradient(factor, images):
    model = pooled()
    model[-1].weight.data *= 1e-4 * factor
    activation, w = model[:2](images).detach(), model[-1].weight.detach()
    expected = torch.einsum("lk,bkhw->blhw", w.relu() / 2, activation)
    found = cxrkit.attribute(model, images, "gradcam_plus_plus")
    torch.testing.assert_close(found / factor, expected / factor, atol=0, rtol=1e-3)


def test_gradcam_plus_plus_refuses_weights_at_a_pole(images):
    model = pooled()
    model[-1].weight.data.fill_(1)
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1)  # before the ReLU: g sum A = -1
    head = nn.Sequential(model[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model[-1])
    assert cxrkit.attribute(head, images, "gradcam_plus_plus", layer="0").isfinite().all()
    model[0].weight.data[:, :, 1, 1] = torch.full((4, 1), -2.0)
    bright = images.clone()
    bright[:2] = 0
    bright[2] = 1  # -3
    with pytest.raises(AttributionError, match=r"image 2; name a layer after a ReLU"):
        cxrkit.attribute(head, bright, "gradcam_plus_plus", layer="0", chunk=1)
    assert cxrkit.attribute(model, bright, "gradcam_plus_plus", layer="1").isfinite().all()


# Score-CAM


def slow_scorecam(model, layer, images, output="logit"):
    def score(x):
        y = model(x[None])[0].detach()
        return y.sigmoid() if output == "probability" else y

    maps = []
    for image, activation in zip(images, output_of(layer, model, images), strict=True):
        labels = len(score(image))
        small = torch.zeros(labels, *activation.shape[1:])
        for j in range(labels):
            increases = []
            for channel in activation:
                mask = enlarged(channel[None, None], image.shape[1:])[0, 0]
                if channel.max() > channel.min():
                    mask = (mask - mask.min()) / (mask.max() - mask.min())
                else:
                    mask = torch.zeros_like(mask)
                increases.append(score(image * mask)[j] - score(torch.zeros_like(image))[j])
            exponentials = torch.stack(increases).exp()
            for weight, channel in zip(exponentials / exponentials.sum(), activation, strict=True):
                small[j] += weight * channel
        maps.append(enlarged(small.clamp(min=0)[None], image.shape[1:])[0])
    return torch.stack(maps)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("layer", ["stem", "stem.0", "branch", "last"])
def test_scorecam_equals_the_slow_implementation(layer, output, tiny, images):
    tiny.fc.weight.data *= 30  # else all weights of the softmax are nearly alike
    found = cxrkit.attribute(tiny, images, "scorecam", layer=layer, output=output)
    expected = slow_scorecam(tiny, tiny.get_submodule(layer), images, output)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_scorecam_of_a_living_and_a_dead_map():
    """Maps x and 0: the first is weighted by sigmoid(score seen through x - score of black)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    model[0].weight.data.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    model[0].bias.data.zero_()
    model[3].weight.data[:, 0] = torch.tensor([5.0, -5.0])
    x = torch.rand(3, 1, 6, 5)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    seen = (x * (x - low) / (high - low)).mean((2, 3), keepdim=True)
    found = cxrkit.attribute(model, x, "scorecam", layer="0")
    torch.testing.assert_close(found[:, [0]], (5 * seen).sigmoid() * x)
    torch.testing.assert_close(found[:, [1]], (-5 * seen).sigmoid() * x)


def test_scorecam_runs_once_per_varied_channel_for_all_labels(tiny, images):
    rows = []
    hook = tiny.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    cxrkit.attribute(tiny, images, "gradcam")  # a network is looked at once
    for labels in (None, [1]):
        rows.clear()
        cxrkit.attribute(tiny, images[:2], "scorecam", labels=labels, layer="stem.0", chunk=4)
        assert rows == [2, 2, 4, 4, 4]  # the maps, black images, 6 channels of 2 images
    hook.remove()
    tiny.stem[0].weight.data[1:] = 0
    hook = tiny.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    cxrkit.attribute(tiny, images, "gradcam")
    rows.clear()
    cxrkit.attribute(tiny, images[:2], "scorecam", layer="stem.0")
    hook.remove()
    assert rows == [2, 2, 2]


def test_scorecam_of_black_images_is_finite_and_weighs_all_channels_alike():
    model, x = pooled(), torch.zeros(2, 1, 5, 5)
    model[0] = nn.Conv2d(1, 4, 1)
    rows = []
    model.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    expected = model[:2](x).mean(1, keepdim=True).expand(-1, 3, -1, -1).detach()
    cxrkit.attribute(model, x, "gradcam")
    rows.clear()
    torch.testing.assert_close(cxrkit.attribute(model, x, "scorecam", layer="1"), expected)
    assert rows == [2, 2]


@pytest.mark.parametrize("stride", [1, 2])
def test_scorecam_agrees_with_grad_cam(stride, monkeypatch):
    model, x = Tiny(channels=3, stride=stride).eval(), torch.rand(2, 3, 16, 16)
    model.fc.weight.data *= 30
    if stride == 2:  # the package up-samples its masks with aligned corners
        monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear"))
    found = cxrkit.attribute(model, x, "scorecam", layer="last")
    for j in range(3):
        expected = enlarged(grad_cam_maps("ScoreCAM", model, model.last, x, j)[:, None], (16, 16))[:, 0]
        torch.testing.assert_close(found[:, j], expected, atol=1e-5, rtol=1e-3)


# Guided Grad-CAM


def test_guided_gradcam_is_the_product_of_its_parts(tiny, images):
    for options in ({}, {"layer": "branch"}, {"output": "probability"}):
        guided = cxrkit.attribute(
            tiny, images, "guided_backprop", **{k: v for k, v in options.items() if k == "output"}
        )
        expected = guided * cxrkit.attribute(tiny, images, "gradcam", **options)
        found = cxrkit.attribute(tiny, images, "guided_gradcam", **options)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert (found < 0).any()


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_guided_gradcam_agrees_with_captum():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).eval()
    x = torch.rand(2, 3, 16, 16)
    found = cxrkit.attribute(model, x, "guided_gradcam", layer="2")
    peer = captum.attr.GuidedGradCam(model, model[2])
    for j in range(3):
        expected = peer.attribute(x.clone().requires_grad_(), target=j, interpolate_mode="bilinear").sum(1)
        torch.testing.assert_close(found[:, j], expected.detach(), atol=1e-7, rtol=1e-4)


def test_guided_gradcam_refuses_what_its_parts_refuse(images):
    smooth = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert "guided_gradcam" not in [c.name for c in methods(smooth)]
    with pytest.raises(AttributionError, match="guided_backprop"):
        cxrkit.attribute(smooth, images, "guided_gradcam")


# Labels, chunks, layers


def test_attribution_through_the_encoding_of_a_classifier():
    from cxrkit.models import create

    model, x = create("resnet18", labels=("Mass", "Nodule")).eval(), torch.rand(1, 1, 32, 32)
    model.explained_layer = "network.relu"  # 64 channels at half the size
    for method in WEIGHTED:
        assert cxrkit.attribute(model, x, method).shape == (1, 2, 32, 32)
    found = cxrkit.attribute(model, x, "scorecam", layer="network.bn1")
    torch.testing.assert_close(found, slow_scorecam(model, model.network.bn1, x), atol=1e-5, rtol=1e-3)


# What is refused


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.unused = nn.Conv2d(1, 1, 1)
        self.side = nn.Conv2d(1, 1, 1)
        self.flat = nn.Flatten()

    def forward(self, x):
        self.side(x)
        return self.flat(self.conv(self.conv(x)).relu())[:, :2]


WITHOUT_A_MAP = {"conv": "more than once", "unused": "doesn't run", "side": "don't depend", "flat": "no map"}


@pytest.mark.parametrize(
    ("method", "layer"),
    # Score-CAM asks what the score is through a map, whoever made it: also through one that nothing depends on.
    [(method, layer) for method in WEIGHTED for layer in WITHOUT_A_MAP if (method, layer) != ("scorecam", "side")],
)
def test_layers_without_one_map_of_their_own_are_refused(method, layer, images):
    message = WITHOUT_A_MAP[layer]
    with pytest.raises(AttributionError, match=message):
        cxrkit.attribute(Reused(), images, method, layer=layer)


class Tokens(nn.Module):
    """Patches as a sequence, as in a vision transformer, or as a grid with channels last, as in Swin."""

    def __init__(self, grid):
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 4, stride=4)
        self.mixed = nn.Linear(24, 24)
        self.head = nn.Linear(24, 2)
        self.grid = grid

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x if self.grid else x.flatten(1, 2)
        x = self.mixed(x).relu()
        return self.head(x.mean((1, 2) if self.grid else 1))


@pytest.mark.parametrize("method", LAYERED)
@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 24)])
def test_layers_whose_output_is_no_map_are_refused(method, size):
    x = torch.rand(2, 1, *size)
    with pytest.raises(AttributionError, match=r"mixed puts out no map \[B, C, h, w\] but \[B, \d+, 24\].*'patches'"):
        cxrkit.attribute(Tokens(grid=False), x, method, layer="mixed")
    with pytest.raises(AttributionError, match=r"layer mixed puts out .* its channels come last"):
        cxrkit.attribute(Tokens(grid=True), x, method, layer="mixed")
    for grid in (False, True):
        with pytest.raises(AttributionError, match=r"last map is that of layer patches; .*layer='patches'"):
            cxrkit.attribute(Tokens(grid), x, method)
    if method != "guided_gradcam":
        assert cxrkit.attribute(Tokens(grid=True), x, method, layer="patches").shape == (2, 2, *size)


@pytest.mark.parametrize("size", [(33, 17), (16, 64), (64, 16), (7, 7)])
def test_maps_of_convolutions_are_never_taken_for_channels_last(size):
    for channels, padding in ((1, 1), (7, 0), (16, 0), (40, 1)):
        model = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, padding),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 2),
        )
        for layer in ("1", "3"):
            assert cxrkit.attribute(model, torch.rand(1, 1, *size), "gradcam", layer=layer).shape == (1, 2, *size)


def test_gradcam_plus_plus_explains_the_logit_only(tiny, images):
    with pytest.raises(ParameterError, match="gradcam_plus_plus explains the logit"):
        cxrkit.attribute(tiny, images, "gradcam_plus_plus", output="probability")
