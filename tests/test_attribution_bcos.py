"""B-cos contribution maps: completeness, the package `bcos` as second opinion, refusals, colours."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cxrkit
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution.preparation import explanation_mode
from cxrkit.models import calibrate, create

LABELS = ("Cardiomegaly", "Mass", "Nodule")


def network(name="bcos_resnet18", antialias="none", **options):
    model = create(name, labels=LABELS, antialias=antialias, **options).eval()
    return calibrate(model, torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture
def images():
    return torch.rand(2, 1, 64, 64)


def small(*middle, head=None):
    """B-cos layers around something else, 6 channels in, 2 logits out."""
    from bcos.modules import BcosConv2d

    return nn.Sequential(
        BcosConv2d(6, 4, 3, padding=1),
        *middle,
        head or BcosConv2d(4, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


def encoded(height=12, width=12):
    x = torch.rand(2, 3, height, width)
    return torch.cat([x, 1 - x], 1)


@pytest.mark.parametrize("antialias", ["none", "flc", "flc_authors", "blur"])
@pytest.mark.parametrize("name", ["bcos_resnet18", "bcos_resnet50"])
def test_contributions_sum_to_the_logit_less_its_bias(name, antialias, images):
    model = network(name, antialias, logit_bias=-2.5)
    logits = model(images).detach()
    assert (logits + 2.5).abs().max() > 0.01  # a signal that is there
    maps = cxrkit.attribute(model, images, "bcos")
    assert (maps.sum((2, 3)) - (logits + 2.5)).abs().max() < 1e-4
    model, images = model.double(), images.double()
    maps = cxrkit.attribute(model, images, "bcos")
    assert maps.dtype == torch.float64
    assert (maps.sum((2, 3)) - (model(images).detach() + 2.5)).abs().max() < 1e-10


def test_maps_equal_those_of_the_bcos_package_for_every_label(model, images):
    maps = cxrkit.attribute(model, images, "bcos")
    for i, six in enumerate(model.encode(images)):
        for j in range(len(LABELS)):
            theirs = model.network.explain(six[None].clone().requires_grad_(), idx=j)["contribution_map"]
            torch.testing.assert_close(maps[i, j], theirs[0].detach(), atol=1e-7, rtol=1e-3)


def test_explanation_equals_a_network_of_frozen_scales():
    """Straight from the formula: the scales of one forward pass held fixed, then the plain jacobian."""
    from bcos.modules import BcosConv2d

    model, x = small().double(), encoded().double()[:1]
    scales = {}

    def keep(name, layer):
        def hook(module, args, output):
            linear = module.linear(args[0])
            scales[name] = (output / linear).detach()

        return layer.register_forward_hook(hook)

    handles = [keep(n, m) for n, m in model.named_modules() if isinstance(m, BcosConv2d)]
    model(x)
    [handle.remove() for handle in handles]

    def frozen(z):
        z = scales["0"] * model[0].linear(z)
        return (scales["1"] * model[1].linear(z)).mean((2, 3))

    jacobian = torch.autograd.functional.jacobian(frozen, x)[0, :, 0]
    expected = (jacobian * x).sum(1)[None]
    torch.testing.assert_close(cxrkit.attribute(model, x, "bcos"), expected, atol=1e-10, rtol=1e-7)


def test_the_plain_gradient_sums_alike_but_is_another_map():
    model, x = small().double(), encoded().double()
    inherent = cxrkit.attribute(model, x, "bcos")
    plain = cxrkit.attribute(model, x, "input_x_gradient")
    logits = model(x).detach()
    # The stabiliser 1e-6 under the root keeps the plain gradient from being exactly of degree 1.
    torch.testing.assert_close(plain.sum((2, 3)), logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inherent.sum((2, 3)), logits, atol=1e-10, rtol=1e-8)
    assert (inherent - plain).abs().max() > 0.1 * inherent.abs().max()


def test_labels_chunks_and_surroundings(model):
    images = torch.rand(3, 1, 64, 64)
    whole = cxrkit.attribute(model, images, "bcos")
    some = cxrkit.attribute(model, images, "bcos", labels=["Nodule", "Cardiomegaly"], chunk=2)
    torch.testing.assert_close(some, whole[:, [2, 0]], atol=1e-7, rtol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(cxrkit.attribute(model, images.clone(), "bcos"), whole, atol=1e-7, rtol=1e-3)
    with pytest.raises(ParameterError, match="explains the logit"):
        cxrkit.attribute(model, images, "bcos", output="probability")


def test_layercam_uses_ordinary_gradients_even_in_explanation_mode(model, images):
    ordinary = cxrkit.attribute(model, images, "layercam")
    with explanation_mode(model, True):
        torch.testing.assert_close(cxrkit.attribute(model, images, "layercam"), ordinary)
        linear = [m for m in model.modules() if hasattr(m, "set_explanation_mode")]
        assert all(m.detach for m in linear)  # as the caller left it
    assert not any(m.detach for m in linear)


def test_class_activation_map_is_the_map_of_the_head(model, images):
    kept = []
    hook = model.network.fc.register_forward_hook(lambda m, a, y: kept.append(y.detach()))
    logits = model(images).detach()
    hook.remove()
    torch.testing.assert_close(kept[0].mean((2, 3)) + model.logit_bias, logits)
    expected = F.interpolate(kept[0], size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cxrkit.attribute(model, images, "cam"), expected, atol=1e-6, rtol=1e-3)
    with pytest.raises(AttributionError, match=r"network\.fc: leave layer= out"):
        cxrkit.attribute(model, images, "cam", layer="network.layer4")


def test_the_model_is_left_as_it_was_also_after_an_error(model, images):
    model = copy.deepcopy(model).train()
    cxrkit.attribute(model, images, "bcos")

    def state():
        modules = list(model.modules())
        return (
            [m.training for m in modules],
            [getattr(m, "detach", None) for m in modules],
            [len(m._forward_hooks) for m in modules],
            [(p.requires_grad, p.grad) for p in model.parameters()],
        )

    before = state()

    def fail(module, args):
        if not model.network.fc.detach:  # not yet at work
            return
        raise RuntimeError(f"in the middle, explaining: {model.network.fc.detach}")

    handle = model.network.layer3.register_forward_pre_hook(fail)
    with pytest.raises(AttributionError, match="explaining: True"):
        cxrkit.attribute(model, images, "bcos")
    handle.remove()
    assert state() == before
    assert all(before[0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), r"layer 1 \(ReLU\) applies relu, which isn't linear"),
        (nn.MaxPool2d(2), r"layer 1 \(MaxPool2d\)"),
        (nn.BatchNorm2d(4), r"layer 1 \(BatchNorm2d\)"),
        (nn.GroupNorm(1, 4), r"layer 1 \(GroupNorm\)"),
        (nn.Conv2d(4, 4, 1), r"beside the image .*\(1\.bias\)"),
        (nn.Softmax(1), r"layer 1 \(Softmax\)"),
    ],
)
def test_layers_that_break_the_linear_map_are_named(layer, message):
    with pytest.raises(AttributionError, match=message):
        cxrkit.attribute(small(layer), encoded(), "bcos")


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (F.relu, "relu"),
        (torch.sigmoid, "sigmoid"),
        (F.gelu, "gelu"),
        (torch.exp, "exp"),
        (lambda x: x * x, "mul"),
        (lambda x: x / (1 + x.abs()), "div"),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda x: x.pow(2), "pow"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: torch.logaddexp(x, -x), "logaddexp"),
        (torch.erf, "erf"),
        (torch.round, "round"),
        (lambda x: x.abs(), "abs"),
        (lambda x: torch.where(x > 0, x, 0.1 * x) + x.clamp_min(0), "clamp_min"),
        (lambda x: F.normalize(x), "normalize"),
        (lambda x: x - x.var((2, 3), keepdim=True), "var"),
        (lambda x: x + 0.5, "sum to"),
    ],
)
def test_operations_outside_known_layers_are_found_in_the_graph_or_the_sum(function, message):
    with pytest.raises(
        AttributionError, match=message if " " in message else rf"layer 1 \(Function\) applies {message},"
    ):
        cxrkit.attribute(small(Function(function)), encoded(), "bcos")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.Dropout(0.5),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        Function(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1).expand(-1, -1, -1, -1) * 2),
        Function(lambda x: x * x.detach().sigmoid()),
    ],
)
def test_linear_layers_pass(layer):
    model, x = small(layer), encoded()
    torch.testing.assert_close(cxrkit.attribute(model, x, "bcos").sum((2, 3)), model(x).detach(), atol=1e-6, rtol=1e-4)


def test_norms_and_maxout_of_the_bcos_package():
    from bcos.modules import BcosConv2d, norms

    for norm in (norms.BatchNormUncentered2d, norms.AllNormUncentered2d, norms.DetachableGNLayerNorm2d):
        model = small(norms.NoBias(norm)(4), BcosConv2d(4, 4, 3, b=1.5, max_out=2))
        x = encoded()
        torch.testing.assert_close(
            cxrkit.attribute(model, x, "bcos").sum((2, 3)), model(x).detach(), atol=1e-6, rtol=1e-3
        )
    with pytest.raises(AttributionError, match=r"layer 1 \(BatchNorm2d\)"):
        cxrkit.attribute(small(norms.BatchNorm2d(4)), encoded(), "bcos")
    biased = norms.BatchNormUncentered2d(4)
    nn.init.constant_(biased.bias, 0.3)
    with pytest.raises(AttributionError, match=r"beside the image .*\(1\.bias\)"):
        cxrkit.attribute(small(biased), encoded(), "bcos")


def test_layers_off_the_path_do_not_matter():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.softmax = nn.Softmax(1)

        def forward(self, x):
            return x * self.softmax(x.detach())

    model, x = small(Gated()), encoded()
    assert cxrkit.attribute(model, x, "bcos").shape == (2, 2, 12, 12)


def test_a_source_beside_the_image_is_reported_and_can_be_accepted():
    position = torch.rand(1, 4, 12, 12)
    model, x = small(Function(lambda x: x + position)), encoded()
    with pytest.raises(AttributionError, match="image 0, label 0: contributions sum to"):
        cxrkit.attribute(model, x, "bcos")
    maps = cxrkit.attribute(model, x, "bcos", check=False)
    assert (maps.sum((2, 3)) - model(x).detach()).abs().max() > 1e-3


def test_wrong_logit_bias_is_noticed(images):
    model = network()
    model.logit_bias = model.logit_bias + 0.01
    with pytest.raises(AttributionError, match="image 0, label 'Mass'"):
        cxrkit.attribute(model, images, "bcos", labels=["Mass"])


def test_the_image_at_fault_is_counted_over_all_chunks():
    model = small()
    x = encoded()[:1].repeat(3, 1, 1, 1)
    x[2] *= 2
    level = model[0](x[:1]).abs().mean().item() * 1.1
    model = nn.Sequential(model[0], Function(lambda x: x + 0.5 * (x.detach().abs().mean() > level)), *model[1:])
    with pytest.raises(AttributionError, match="image 2, label 0"):
        cxrkit.attribute(model, x, "bcos", chunk=1)


def test_networks_without_bcos_layers_are_refused():
    model = nn.Sequential(nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(AttributionError, match=r"no B-cos layers.*integrated_gradients or layercam"):
        cxrkit.attribute(model, encoded(), "bcos")


def test_colours_equal_those_of_the_bcos_package(model, images):
    from bcos.common import gradient_to_image

    found = cxrkit.attribution.bcos_rgba(model, images, chunk=1)
    assert found.shape == (2, 3, 4, 64, 64)
    assert found.min() >= 0
    assert found.max() <= 1
    for i, six in enumerate(model.encode(images)):
        for j in range(len(LABELS)):
            explained = model.network.explain(six[None].clone().requires_grad_(), idx=j)
            weight = explained["dynamic_linear_weights"][0]
            theirs = torch.from_numpy(gradient_to_image(six, weight)).permute(2, 0, 1)
            # Colours jump where W(x) crosses 0, so a few pixels may differ by rounding.
            assert ((found[i, j] - theirs).abs() > 1e-3).float().mean() < 1e-3
    only = cxrkit.attribution.bcos_rgba(model, images, labels=["Nodule"])
    torch.testing.assert_close(only[:, 0, 3], found[:, 2, 3], atol=1e-4, rtol=1e-3)


def test_colours_of_a_known_map():
    from cxrkit.attribution.inherent import _rgba

    weight = torch.zeros(1, 6, 8, 8)
    weight[:, 0] = 3.0  # red for its channel, nothing for the inverse
    weight[:, 1], weight[:, 4] = 1.0, 1.0  # undecided
    weight[:, 2], weight[:, 5] = -1.0, 2.0
    x = torch.ones(1, 6, 8, 8)
    colour = _rgba(x, weight, smooth=1, percentile=99.5)[0, :, 4, 4]
    torch.testing.assert_close(colour, torch.tensor([1.0, 0.5, 0.0, 1.0]))
    assert _rgba(x, -weight, 15, 99.5)[:, 3].max() == 0  # nothing speaks for the label: transparent


@pytest.mark.parametrize("options", [{"smooth": 2}, {"smooth": 0}, {"percentile": 0}, {"percentile": 101}])
def test_colour_options_are_checked(model, images, options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        cxrkit.attribution.bcos_rgba(model, images, **options)


def test_colours_need_six_channels():
    from bcos.modules import BcosConv2d

    model = nn.Sequential(BcosConv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(AttributionError, match="six encoded channels"):
        cxrkit.attribution.bcos_rgba(model, torch.rand(1, 3, 8, 8))
