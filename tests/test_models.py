"""Classifiers, the table of networks, B-cos layers, and weights from files."""

from __future__ import annotations

import copy
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cxrkit
from cxrkit.errors import ModelError, ParameterError
from cxrkit.files import checksum
from cxrkit.models import Classifier, calibrate, create, sources
from cxrkit.models.zoo import NETWORKS

# A CPU torch needs cxrkit before anything that imports torchvision.
# isort: split
import bcos.models.pretrained
from bcos.common import explanation_mode
from bcos.data.transforms import AddInverse

LABELS = ("effusion", "nodule", "oedema")


@pytest.fixture(scope="module")
def bcos18():
    """An anti-aliased B-cos network with calibrated norms, in float64."""
    images = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return calibrate(create("bcos_resnet18", LABELS).double(), images).eval(), images[:2]


# Parameters in millions with 1000 classes, as published with the weights (torchvision, timm, package bcos); sides of
# the explained map at the published input size.
PUBLISHED = {
    "resnet18": (11.69, 7),
    "resnet34": (21.80, 7),
    "resnet50": (25.56, 7),
    "resnet50_v2": (25.55, 7),
    "densenet121": (7.98, 7),
    "densenet161": (28.68, 7),
    "vgg16": (138.36, 14),
    "vgg19": (143.67, 14),
    "inception_v3": (23.83, 8),  # 27.16 with the second head
    "inception_resnet_v2": (55.84, 8),
    "xception": (22.86, 10),
    "efficientnet_b0": (5.29, 7),
    "efficientnet_lite0": (4.65, 7),
    "convnext_tiny": (28.59, 7),
    "vit_c_b": (81.39, 14),
    "bcos_resnet18": (11.69, 7),
    "bcos_resnet34": (21.80, 7),
    "bcos_resnet50": (25.54, 7),
    "bcos_densenet121": (7.95, 7),
    "bcos_convnext_tiny": (28.54, 7),
    "bcos_vit_c_b": (81.33, 14),  # 81.37 in its documentation, 81.33 in its code
}


def on_meta(name, labels, **options):
    """A network of shapes without numbers: the largest costs nothing."""
    with torch.device("meta"):
        return create(name, labels, **options).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_public_shape_of_every_network(name):
    millions, side = PUBLISHED[name]
    row, maps = NETWORKS[name], []
    model = on_meta(name, [str(i) for i in range(1000)])
    assert model.card["parameters"] / 1e6 == pytest.approx(millions, abs=0.006)
    assert "not for clinical use" in model.card["notice"]
    model.get_submodule(model.explained_layer).register_forward_hook(lambda m, a, y: maps.append(y.shape))
    encoded = model.encode(torch.rand(2, 1, row.input_size, row.input_size, device="meta"))
    assert model.classify(encoded).shape == (2, 1000)
    assert [tuple(shape[-2:]) for shape in maps] == [(side, side)]


@pytest.mark.parametrize("name", ["resnet18", "bcos_resnet18"])
def test_one_label_has_one_logit(name):
    model = create(name, ["one"]).eval()
    assert model.labels == ("one",)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 1)


@pytest.mark.parametrize(
    "name",
    ["densenet121", "inception_v3", "xception", "resnet50_v2", "efficientnet_lite0", "convnext_tiny", "bcos_resnet34"],
)
def test_the_smallest_images(name):
    model, size = create(name, LABELS).eval(), NETWORKS[name].min_size
    images = torch.rand(2, 1, size, size + 1)
    logits = model(images)
    assert logits.isfinite().all()
    assert torch.equal(logits, model.classify(model.encode(images)))
    if size > 1:
        with pytest.raises(ModelError, match=f"images are {size} x {size - 1} pixels; .* at least {size} per side"):
            model(images[..., :-2])
        with pytest.raises((RuntimeError, ValueError)):  # nothing that would work is refused
            model.network(model.encode(images)[..., :-2].clone())


def test_a_network_trains_with_one_output_per_label():
    for name in ("inception_v3", "densenet121"):
        with torch.device("meta"):
            model = create(name, LABELS).train()
        assert model.classify(model.encode(torch.rand(2, 1, 96, 96, device="meta"))).shape == (2, 3)


def test_the_last_relu_of_a_densenet_is_a_layer():
    import torchvision

    model = create("densenet121", LABELS).eval()
    theirs = torchvision.models.densenet121(weights=None, num_classes=3).eval()
    theirs.load_state_dict(model.network.state_dict())
    images = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(model(images), theirs(model.encode(images)))
    # The mean of the class map is the logit less its bias, and Grad-CAM is its positive part by the area.
    maps = cxrkit.attribute(model, images, "cam")
    torch.testing.assert_close(maps.mean((2, 3)), (model(images) - model.network.classifier.bias).detach())
    kept = []
    handle = model.network.relu.register_forward_hook(lambda m, a, y: kept.append(y.detach()))
    model(images)
    handle.remove()
    weighted = torch.einsum("lk,bkhw->blhw", model.network.classifier.weight.detach(), kept[0])
    expected = F.interpolate(weighted.relu() / 4, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cxrkit.attribute(model, images, "gradcam"), expected, atol=1e-6, rtol=1e-4)


def test_inception_sees_what_its_published_weights_expect():
    import torchvision

    images = torch.rand(2, 1, 16, 16)
    theirs = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=True)
    imagenet = Classifier(nn.Identity(), LABELS)
    model = Classifier(nn.Identity(), LABELS, "symmetric")
    torch.testing.assert_close(model.encode(images), theirs._transform_input(imagenet.encode(images)))
    assert NETWORKS["inception_v3"].encoding == "symmetric"


def test_add_inverse_is_the_encoding_of_the_bcos_package():
    model = create("bcos_resnet18", LABELS)
    images = torch.rand(2, 1, 16, 16)
    encoded = model.encode(images)
    assert encoded.shape == (2, 6, 16, 16)
    assert torch.allclose(encoded[:, :3] + encoded[:, 3:], torch.ones(2, 3, 16, 16))
    assert torch.equal(encoded, AddInverse()(images.expand(-1, 3, -1, -1)))


def test_imagenet_encoding_and_the_authors_without_normalisation():
    images = torch.rand(2, 1, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(create("resnet18", LABELS).encode(images), (images - mean) / std, atol=1e-6)
    authors = create("resnet18", LABELS, protocol="authors")
    assert torch.equal(authors.encode(images), images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 64, 64), r"\[B, 1, H, W\]"),
        (torch.rand(1, 64, 64), r"\[B, 1, H, W\]"),
        (torch.zeros(1, 1, 64, 64, dtype=torch.uint8), "floating point"),
        (torch.full((1, 1, 64, 64), 255.0), "from 255 to 255"),
        (torch.full((1, 1, 64, 64), -0.5), "from -0.5 to -0.5"),
        (torch.cat([torch.rand(1, 1, 64, 64), torch.full((1, 1, 64, 64), math.nan)]), r"NaN \(rows \[1\]"),
        (torch.full((1, 1, 64, 64), math.inf), "inf"),
    ],
)
def test_unfit_images_are_refused(bcos18, images, message):
    with pytest.raises(ModelError, match=message):
        bcos18[0](images)


def test_rounding_just_outside_the_range_is_accepted():
    model = create("resnet18", LABELS).eval()
    assert model(torch.full((1, 1, 32, 32), 1.0005)).isfinite().all()
    assert model.encode(torch.full((1, 1, 32, 32), 1.5)).isfinite().all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [([], "at least one"), (["a", "b", "a"], "repeated: a"), ("effusion", "single string"), (["a", 3], "3")],
)
def test_unusable_labels_are_refused(labels, message):
    with pytest.raises(ModelError, match=message):
        create("resnet18", labels)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ModelError, match=r"bcos_resnet_50.*did you mean 'bcos_resnet50'"):
        create("bcos_resnet_50", LABELS)
    with pytest.raises(ParameterError, match="antialias must be one of none, flc"):
        create("bcos_resnet18", LABELS, antialias="FLC")
    with pytest.raises(ParameterError, match="protocol"):
        create("bcos_resnet18", LABELS, protocol="author")
    with pytest.raises(ParameterError, match="logit_bias"):
        create("resnet18", LABELS, logit_bias=0.0)
    with pytest.raises(ModelError, match="no layer"):
        Classifier(nn.Identity(), LABELS, explained_layer="network.layer4")
    with pytest.raises(ModelError, match="encoding"):
        Classifier(nn.Identity(), LABELS, "rgb")


@pytest.mark.parametrize(
    ("n_labels", "options", "expected"),
    [
        (1, {}, 0.0),
        (2, {}, 0.0),
        (14, {}, -math.log(13)),
        (14, {"protocol": "authors"}, -math.log(999)),
        (14, {"logit_bias": 0.0}, 0.0),
        (1, {"logit_bias": -2.5}, -2.5),
    ],
)
def test_logit_bias(n_labels, options, expected):
    model = create("bcos_resnet18", [str(i) for i in range(n_labels)], **options).eval()
    assert model.logit_bias == pytest.approx(expected)
    assert model.card["logit_bias"] == model.network.logit_layer.logit_bias == model.logit_bias
    # Untrained norms let the signal vanish, so what is left in evaluation mode is the bias.
    assert torch.allclose(model(torch.rand(1, 1, 64, 64)), torch.tensor(expected), atol=1e-3)


def test_a_seed_gives_one_network_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    first, again, other = (create("bcos_resnet18", LABELS, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


# --- the B-cos transform ---


def bcos_patch(x, w, b=2.0):
    """One output of a B-cos unit: |cos|^(B-1) times the unit-norm linear response."""
    linear = torch.dot(w / w.norm(), x)
    return (linear / x.norm()).abs() ** (b - 1) * linear


@pytest.mark.parametrize(
    ("x", "w", "expected"), [((3, 4), (6, 8), 5.0), ((-3, -4), (6, 8), -5.0), ((3, 4), (1, 0), 1.8)]
)
def test_bcos_unit_in_closed_form(x, w, expected):
    x, w = torch.tensor(x, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)
    assert bcos_patch(x, w).item() == pytest.approx(expected)
    layer = type(create("bcos_resnet18", LABELS).network.conv1)(2, 1, kernel_size=1).double()
    with torch.no_grad():
        layer.linear.weight.copy_(w.view(1, 2, 1, 1))
    assert layer(x.view(1, 2, 1, 1)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (7, 2, 3)])
def test_our_bcos_convolution_patch_by_patch(kernel, stride, padding):
    own = type(create("bcos_resnet18", LABELS).network.conv1)
    layer = own(4, 5, kernel_size=kernel, stride=stride, padding=padding).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    y = layer(x)
    padded = F.pad(x, [padding] * 4)
    for n, k, i, j in ((0, 0, 0, 0), (1, 4, 2, 3), (0, 2, 4, 4), (1, 1, 0, 4)):
        patch = padded[n, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        assert y[n, k, i, j].item() == pytest.approx(
            bcos_patch(patch.flatten(), layer.linear.weight[k].flatten()).item(), rel=1e-5, abs=1e-6
        )


def plain_bcos(model):
    """The same network on the layers of the bcos package, with the same weights."""
    name = model.card["architecture"].removeprefix("bcos_")
    plain = getattr(bcos.models.pretrained, name)(pretrained=False, num_classes=len(model.labels))
    plain.to(next(model.parameters()).dtype).load_state_dict(model.network.state_dict())
    plain.logit_layer.logit_bias = model.logit_bias
    return plain


def test_network_is_that_of_the_bcos_package(bcos18):
    model, images = bcos18
    plain = plain_bcos(model).eval()
    assert torch.allclose(model(images), plain(model.encode(images)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("explained", [False, True])
def test_gradients_are_those_of_the_bcos_package(bcos18, explained):
    model, images = bcos18
    plain = plain_bcos(model).eval()
    gradients = []
    for network in (model.network, plain):
        encoded = model.encode(images).detach().requires_grad_()
        if explained:
            with explanation_mode(network):
                logit = network(encoded)[:, 1].sum()
        else:
            logit = network(encoded)[:, 1].sum()
        gradients.append(torch.autograd.grad(logit, [encoded, *network.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9 * max(1.0, theirs.abs().max().item()), rtol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_step_is_that_of_the_bcos_package(momentum):
    model = create("bcos_resnet18", LABELS).double()
    plain = plain_bcos(model).train()
    for norm in (m for n in (model, plain) for m in n.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum
    images = torch.rand(4, 1, 32, 32, dtype=torch.float64)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.float64)
    for logits in (model(images), plain(model.encode(images))):
        F.binary_cross_entropy_with_logits(logits, targets).backward()
    for (name, ours), theirs in zip(model.network.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12, rtol=1e-6), name
    for (name, ours), theirs in zip(model.network.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-9), name


def test_explaining_in_training_mode_is_that_of_the_bcos_package():
    model = create("bcos_resnet18", LABELS).double()
    plain = plain_bcos(model).train()
    encoded = model.encode(torch.rand(2, 1, 32, 32, dtype=torch.float64)).requires_grad_()
    gradients = []
    for network in (model.network, plain):
        with explanation_mode(network):
            gradients.append(torch.autograd.grad(network(encoded)[:, 0].sum(), encoded)[0])
    assert torch.allclose(*gradients, atol=1e-12)


def pair_of_layers():
    """A B-cos convolution and its norm, ours and those of the package, with the same frozen weights."""
    from bcos.modules import BcosConv2d
    from bcos.modules.norms import BatchNormUncentered2d, NoBias

    from cxrkit.models.bcos_layers import TrainableBatchNorm, TrainableBcosConv2d

    ours = nn.Sequential(TrainableBcosConv2d(6, 4, kernel_size=3, padding=1, groups=2), NoBias(TrainableBatchNorm)(4))
    theirs = nn.Sequential(BcosConv2d(6, 4, kernel_size=3, padding=1, groups=2), NoBias(BatchNormUncentered2d)(4))
    ours[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(ours[1].weight, 0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return [layers.double().eval().requires_grad_(False) for layers in (ours, theirs)]


def changed_in_place(module, args, output):
    output.mul_(1 + output.detach())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("hook", [None, lambda m, a, y: 2 * y, changed_in_place], ids=["none", "new", "in_place"])
def test_frozen_layers_are_explained_like_those_of_the_package(merged, hook):
    """Scales of convolution and norm are merged only where nothing happens in between."""
    from contextlib import nullcontext

    from cxrkit.models.bcos_layers import merged_scales

    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for layers in pair_of_layers():
        if hook:
            layers[0].register_forward_hook(hook)
        with explanation_mode(layers), merged_scales() if merged else nullcontext():
            y = layers(x)
        found.append((y, *torch.autograd.grad(y[:, 1].sum(), x)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_without_merging_the_output_of_a_convolution_has_its_gradient():
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for layers in pair_of_layers():
        with explanation_mode(layers):
            middle = layers[0](x)
            gradients.append(torch.autograd.grad(layers[1](middle).square().sum(), middle)[0])
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)


def test_gradients_of_the_training_layers_numerically():
    from cxrkit.models.bcos_layers import TrainableBatchNorm, TrainableBcosConv2d

    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    convolution = TrainableBcosConv2d(3, 4, kernel_size=3, padding=1, stride=2).double()
    grouped = TrainableBcosConv2d(6, 4, kernel_size=3, groups=2).double()
    norm = TrainableBatchNorm(3).double()
    norm.bias = None
    nn.init.uniform_(norm.weight, 0.5, 2)
    assert torch.autograd.gradcheck(lambda x, w: convolution(x), (x, convolution.linear.weight))
    assert torch.autograd.gradcheck(grouped, torch.cat([x, x], 1).detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: norm(x), (x, norm.weight))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "order"),
    [
        (1, 1, 0, torch.channels_last),
        (1, 1, 0, torch.contiguous_format),
        (1, 2, 0, torch.channels_last),
        (3, 1, 1, torch.contiguous_format),
        (3, 2, 1, torch.channels_last),
        (4, 4, 0, torch.channels_last),
        (7, 2, 3, torch.channels_last),
    ],
)
def test_a_training_layer_in_single_precision_is_that_of_the_bcos_package(kernel, stride, padding, order):
    from bcos.modules import BcosConv2d

    from cxrkit.models import bcos_layers

    ours = bcos_layers.TrainableBcosConv2d(12, 20, kernel_size=kernel, stride=stride, padding=padding)
    theirs = BcosConv2d(12, 20, kernel_size=kernel, stride=stride, padding=padding)
    theirs.load_state_dict(ours.state_dict())
    start = torch.randn(2, 12, 13, 15).contiguous(memory_format=order)
    start[0, :, :4] = 0  # patches of zeros
    found = []
    for layer in (ours, theirs):
        x = start.clone().requires_grad_()
        y = layer.train()(x)
        given = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append((y, *torch.autograd.grad(y, [x, layer.linear.weight], given)))
    for mine, other in zip(*found, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    only_weights = torch.autograd.grad(ours(start).sum(), ours.linear.weight)[0]  # as in a first layer
    expected = torch.autograd.grad(theirs(start).sum(), theirs.linear.weight)[0]
    assert (only_weights - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_training_layer_keeps_its_input_and_one_map():
    from cxrkit.models.bcos_layers import TrainableBcosConv2d

    layer, kept = TrainableBcosConv2d(8, 8, kernel_size=3, padding=1).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.rand(2, 8, 16, 16, requires_grad=True))
    assert sum(size >= 2 * 8 * 16 * 16 for size in kept) == 2


@pytest.mark.parametrize("antialias", ["none", "flc", "flc_authors", "blur"])
def test_completeness_and_the_frozen_scales(antialias):
    images = torch.rand(6, 1, 64, 64, dtype=torch.float64)
    model = calibrate(create("bcos_resnet18", LABELS, antialias=antialias).double(), images).eval()
    encoded = model.encode(images[:2]).requires_grad_()
    with explanation_mode(model):
        logits = model.classify(encoded)
        (dynamic,) = torch.autograd.grad(logits[:, 0].sum(), encoded)
    (plain,) = torch.autograd.grad(model.classify(encoded)[:, 0].sum(), encoded)
    contributions = (encoded * dynamic).sum((1, 2, 3))
    assert torch.allclose(contributions, logits[:, 0] - model.logit_bias, atol=1e-10)
    assert (logits[:, 0] - model.logit_bias).abs().min() > 1e-4  # there is a signal to explain
    assert not torch.allclose(dynamic, plain, rtol=1e-2)


@pytest.mark.parametrize("antialias", ["none", "flc"])
def test_a_fresh_bcos_network_learns_separable_images(antialias):
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(8, 1, 64, 64, generator=generator)
    targets = (torch.arange(8) % 2).float()[:, None].repeat(1, 2)
    targets[:, 1] = 1 - targets[:, 1]
    images[::2, :, 16:32, 16:32] += 0.6
    model = create("bcos_resnet18", ["a", "b"], antialias=antialias).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = F.binary_cross_entropy_with_logits(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert 0.3 < losses[0] < 1.5
    assert min(losses[-2:]) < 0.8 * losses[0]


def test_calibration_brings_the_signal_back_and_leaves_the_rest_alone():
    model = create("bcos_resnet18", LABELS).eval()
    model.network.layer1.train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.rand(8, 1, 64, 64)
    faint = (model.eval()(images) - model.logit_bias).abs().max()
    model.network.layer1.train()
    assert calibrate(model, [images[:4], images[4:]]) is model
    assert model.network.layer1.training
    assert not model.network.layer2.training
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert (model.eval()(images) - model.logit_bias).abs().max() > 100 * faint
    with pytest.raises(ModelError, match="at least one image"):
        calibrate(model, [])


def test_calibration_with_one_batch_gives_the_batch_statistics():
    model, images = create("bcos_resnet18", LABELS).double(), torch.rand(8, 1, 64, 64, dtype=torch.float64)
    calibrate(model, images)
    assert torch.allclose(model.eval()(images), copy.deepcopy(model).train()(images), atol=1e-10)


def test_deepcopy_and_half_precision():
    model = create("bcos_resnet18", LABELS, antialias="flc").eval()
    images = torch.rand(1, 1, 64, 64)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(images).float(), model(images.double()).float(), atol=0.1)


# --- weights from files ---


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A state dict as the ImageNet files have it: 1000 classes, plain names."""
    state = create("bcos_resnet18", [str(i) for i in range(1000)], seed=9).network.state_dict()
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save({key: value.contiguous() for key, value in state.items()}, path)
    return path, state


def test_a_file_gives_the_backbone_and_a_fresh_head(backbone):
    path, state = backbone
    model = create("bcos_resnet18", LABELS, weights=path)
    assert model.card["weights"]["sha256"] == checksum(path)
    assert model.card["weights"]["file"] == "backbone.pth"
    assert model.card["weights"]["random_layers"] == ["fc.linear"]
    own = model.network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("fc."))
    assert torch.equal(own["fc.linear.weight"], create("bcos_resnet18", LABELS).network.fc.linear.weight)


@pytest.mark.parametrize("copied", [False, True])
def test_replaced_convolutions_start_fresh_unless_copied(backbone, copied):
    path, state = backbone
    model = create("bcos_resnet18", LABELS, weights=path, antialias="flc", copy_weights=copied)
    layer = model.network.layer2[0].conv1[0].linear.weight
    assert torch.equal(layer, state["layer2.0.conv1.linear.weight"]) == copied
    assert model.card["copy_weights"] is copied
    assert ("layer2.0.conv1.0.linear" in model.card["weights"]["random_layers"]) != copied
    assert torch.equal(model.network.conv1.linear.weight, state["conv1.linear.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wrong_keys_and_damaged_files_are_refused(backbone, tmp_path, suffix):
    from safetensors.torch import save_file

    write = save_file if suffix == ".safetensors" else torch.save
    state = {key: value.contiguous() for key, value in backbone[1].items()}
    del state["layer1.0.conv1.linear.weight"]
    state |= {"extra.weight": torch.zeros(1), "layer2.0.bn1.weight": torch.zeros(3)}
    wrong = tmp_path / f"wrong{suffix}"
    write(state, wrong)
    with pytest.raises(ModelError) as error:
        create("bcos_resnet18", LABELS, weights=wrong)
    for part in (
        wrong.name,
        'Missing key(s) in state_dict: "layer1.0.conv1.linear.weight"',
        'Unexpected key(s) in state_dict: "extra.weight"',
        "size mismatch for layer2.0.bn1.weight",
    ):
        assert part in str(error.value)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(wrong.read_bytes()[:5000])
    with pytest.raises(ModelError, match=rf"cut\{suffix}"):
        create("bcos_resnet18", LABELS, weights=cut)


class _Sneaky:
    ran = False

    def __reduce__(self):
        return (setattr, (_Sneaky, "ran", True))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "sneaky.pth"
    torch.save({"conv1.weight": _Sneaky()}, path)
    with pytest.raises(ModelError, match="more than tensors"):
        create("resnet18", LABELS, weights=path)
    assert not _Sneaky.ran
    torch.save({"conv1.weight": "text"}, path)
    with pytest.raises(ModelError, match="state dict"):
        create("resnet18", LABELS, weights=path)


def test_files_of_densenets_with_old_names_are_read(tmp_path):
    state = create("densenet121", LABELS, seed=4).network.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): v for key, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save({key: value.contiguous() for key, value in old.items()}, tmp_path / "old.pth")
    model = create("densenet121", LABELS, weights=tmp_path / "old.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.network.state_dict().items())


def test_the_second_head_in_files_of_inception_is_left_out(tmp_path):
    import torchvision

    state = torchvision.models.inception_v3(weights=None, init_weights=False).state_dict()
    assert any(key.startswith("AuxLogits.") for key in state)
    torch.save(state, tmp_path / "both.pth")
    model = create("inception_v3", LABELS, weights=tmp_path / "both.pth")
    assert model.card["weights"]["random_layers"] == ["fc"]
    assert torch.equal(model.network.Mixed_7c.branch1x1.conv.weight, state["Mixed_7c.branch1x1.conv.weight"])


def test_named_weights_come_from_the_official_address(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def no_network(url, *args, **kwargs):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    offline = {"efficientnet_lite0"}
    for row in (row for name, row in NETWORKS.items() if name not in offline):
        with pytest.raises(ModelError, match=r"no route.*fetch https://\S+\.(pth|safetensors) .*put it at"):
            sources.locate("imagenet", row.weights)
        assert row.weights["imagenet"].split(":")[0] in ("torchvision", "timm", "bcos")
    assert len(set(asked)) == len(NETWORKS) - len(offline)
    with pytest.raises(ModelError, match=r"neither a file nor a known name \(imagenet\)"):
        create("resnet18", LABELS, weights="imagnet")
    (tmp_path / "checkpoints" / asked[0].rsplit("/", 1)[1]).write_bytes(b"half a download")
    with pytest.raises(ModelError, match="checksum"):
        create(next(iter(NETWORKS)), LABELS, weights="imagenet")
