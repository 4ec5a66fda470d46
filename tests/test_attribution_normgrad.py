"""NormGrad: closed forms, identity layers really inserted as a second implementation, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cxrkit
import cxrkit.attribution.normgrad  # registers the method
from cxrkit import AttributionError, ParameterError
from cxrkit.attribution.normgrad import _paper_layers

KINDS = ("bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise")
LAYERS = ("conv1", "norm1", "conv2", "last.0", "last")


class Tiny(nn.Module):
    """A residual network in small; rectifiers work in place on the maps that are explained."""

    def __init__(self, outputs=3):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.Tanh())
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * 4 * 3, outputs)
        self.norm1.running_mean.normal_()

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.last(x + self.relu(self.conv2(x)))
        return self.fc(self.drop(x.flatten(1)))


class Untied(nn.Module):
    """A virtual identity layer with parameters of its own at every position, so that the gradient at one of them is
    the contribution of its position: [h, w, ...].
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.theta = None

    def forward(self, x):
        _, k, h, w = x.shape
        delta = torch.eye(9)[4]
        start = {
            "bias": torch.zeros(k),
            "scaling": torch.ones(k),
            "conv1x1": torch.eye(k),
            "conv3x3": torch.einsum("kl,p->klp", torch.eye(k), delta),
            "conv3x3_depthwise": delta.expand(k, 9),
        }[self.kind]
        self.theta = start.expand(h, w, *start.shape).clone().requires_grad_()
        patches = F.unfold(x, 3, padding=1).view(-1, k, 9, h, w)
        return {
            "bias": lambda: x + self.theta.permute(2, 0, 1),
            "scaling": lambda: x * self.theta.permute(2, 0, 1),
            "conv1x1": lambda: torch.einsum("hwkl,blhw->bkhw", self.theta, x),
            "conv3x3": lambda: torch.einsum("hwklp,blphw->bkhw", self.theta, patches),
            "conv3x3_depthwise": lambda: torch.einsum("hwkp,bkphw->bkhw", self.theta, patches),
        }[self.kind]()


class Tied(nn.Module):
    """The virtual identity layer as it is defined: one set of parameters for all positions."""

    def __init__(self, kind, k):
        super().__init__()
        self.kind = kind
        if kind in ("bias", "scaling"):
            self.theta = nn.Parameter(torch.full((k,), float(kind == "scaling")))
        else:
            side, groups = (1, 1) if kind == "conv1x1" else (3, k if kind == "conv3x3_depthwise" else 1)
            self.theta = nn.Parameter(torch.zeros(k, k // groups, side, side))
            with torch.no_grad():
                for i in range(k):
                    self.theta[i, 0 if groups > 1 else i, side // 2, side // 2] = 1

    def forward(self, x):
        if self.kind == "bias":
            return x + self.theta.view(-1, 1, 1)
        if self.kind == "scaling":
            return x * self.theta.view(-1, 1, 1)
        return F.conv2d(x, self.theta, padding=self.theta.shape[-1] // 2, groups=x.shape[1] // self.theta.shape[1])


def with_layer(model, layer, virtual):
    """A copy of the network with a virtual layer really put after a layer."""
    model = copy.deepcopy(model)
    parent, _, child = layer.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(model.get_submodule(layer), virtual))
    return model


def contributions(model, image, label, layer, kind, output="logit"):
    """What each position adds to the gradient of the virtual layer's parameters, [h, w, ...]."""
    virtual = Untied(kind)
    logits = with_layer(model, layer, virtual)(image[None])
    torch.testing.assert_close(logits, model(image[None]))
    score = logits[0, label].sigmoid() if output == "probability" else logits[0, label]
    return torch.autograd.grad(score, virtual.theta)[0]


def slow(model, images, layer, kind, output="logit"):
    """Maps [B, L, h, w] before up-sampling, one label of one image at a time."""
    return torch.stack(
        [
            torch.stack(
                [contributions(model, x, j, layer, kind, output).flatten(2).norm(dim=2) for j in range(model.outputs)]
            )
            for x in images
        ]
    )


def enlarged(maps, size=(16, 12)):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def unit(maps, added=0.0):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + added)


@pytest.fixture
def tiny():
    model = Tiny().eval()
    model.outputs = 3
    return model


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 12)


def bare(gradients):
    """A network whose layer "0" has the image as its map and `gradients` [L, K, h, w] as its gradients."""
    head = nn.Linear(gradients[0].numel(), len(gradients))
    head.weight.data = gradients.flatten(1).clone()
    return nn.Sequential(nn.Identity(), nn.Flatten(), head)


# Closed forms


@pytest.mark.parametrize("channels", [1, 5])
def test_maps_of_ones(channels):
    ones = torch.ones(1, channels, 4, 5)
    maps = {kind: cxrkit.attribute(bare(ones), ones, "normgrad", layer="0", virtual_layer=kind)[0, 0] for kind in KINDS}
    for kind, value in (("bias", channels**0.5), ("scaling", channels**0.5), ("conv1x1", channels)):
        torch.testing.assert_close(maps[kind], torch.full((4, 5), float(value)))
    neighbours = torch.full((4, 5), 9.0)
    neighbours[[0, -1]] = neighbours[:, [0, -1]] = 6
    neighbours[::3, ::4] = 4
    torch.testing.assert_close(maps["conv3x3"], channels * neighbours.sqrt())
    torch.testing.assert_close(maps["conv3x3_depthwise"], (channels * neighbours).sqrt())


def test_contributions_by_explicit_outer_products():
    a, g = torch.randn(2, 1, 3, 4, 5)
    found = {kind: cxrkit.attribute(bare(g), a, "normgrad", layer="0", virtual_layer=kind)[0, 0] for kind in KINDS}
    padded = F.pad(a[0], (1, 1, 1, 1))
    for row in range(4):
        for column in range(5):
            at, gt = a[0, :, row, column], g[0, :, row, column]
            patch = padded[:, row : row + 3, column : column + 3]
            terms = {
                "bias": gt,
                "scaling": at * gt,
                "conv1x1": torch.outer(gt, at),
                "conv3x3": torch.outer(gt, patch.flatten()),
                "conv3x3_depthwise": gt[:, None, None] * patch,
            }
            for kind, term in terms.items():
                torch.testing.assert_close(found[kind][row, column], term.norm())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 4), scale=st.sampled_from([-3.0, -1e-12, 1e-9, 2.0]))
def test_order_of_the_virtual_layers_and_homogeneity(seed, channels, scale):
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(2, 1, channels, 4, 3, generator=generator)
    maps = {kind: cxrkit.attribute(bare(g), a, "normgrad", layer="0", virtual_layer=kind) for kind in KINDS}
    chains = [("scaling", "conv1x1", "conv3x3"), ("scaling", "conv3x3_depthwise", "conv3x3")]
    for chain in chains:
        for smaller, larger in itertools.pairwise(chain):
            assert (maps[smaller] <= maps[larger] * (1 + 1e-5)).all()
    for kind in KINDS:
        found = cxrkit.attribute(bare(scale * g), a, "normgrad", layer="0", virtual_layer=kind)
        torch.testing.assert_close(found, abs(scale) * maps[kind], rtol=1e-4, atol=abs(scale) * 1e-6)


# Identity layers really inserted


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_norms_of_contributions_to_an_inserted_layer(kind, layer, output, tiny, images):
    found = cxrkit.attribute(tiny, images, "normgrad", layer=layer, virtual_layer=kind, output=output)
    torch.testing.assert_close(found, enlarged(slow(tiny, images, layer, kind, output)), atol=1e-7, rtol=1e-4)
    assert found.min() >= 0


@pytest.mark.parametrize("layer", ["norm1", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_to_the_gradient_of_the_inserted_layer(kind, layer, tiny, images):
    virtual = Tied(kind, {"norm1": 4, "last": 3}[layer])
    logits = with_layer(tiny, layer, virtual)(images[:1])
    torch.testing.assert_close(logits, tiny(images[:1]))
    (expected,) = torch.autograd.grad(logits[0, 1], virtual.theta)
    found = contributions(tiny, images[0], 1, layer, kind).sum((0, 1))
    torch.testing.assert_close(found.flatten(), expected.flatten(), atol=1e-6, rtol=1e-4)


# Several layers


@pytest.mark.parametrize("kind", KINDS)
def test_several_layers_are_multiplied_at_the_size_of_the_image(kind, tiny, images):
    layers = ["conv1", "norm1", "conv2", "last"]
    product = torch.ones(1)
    for layer in layers:
        product = product * unit(enlarged(slow(tiny, images, layer, kind)))
    found = cxrkit.attribute(tiny, images, "normgrad", layers=layers, virtual_layer=kind)
    torch.testing.assert_close(found, unit(product), atol=1e-5, rtol=1e-3)
    assert found.amin((2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(found.amax((2, 3)), torch.ones(3, 3), atol=1e-4, rtol=0)
    backwards = [tiny.last, "conv2", "norm1", tiny.conv1]
    torch.testing.assert_close(
        cxrkit.attribute(tiny, images, "normgrad", layers=backwards, virtual_layer=kind), found, atol=1e-5, rtol=1e-3
    )


def test_one_layer_multiplied_is_its_map_between_0_and_1_and_the_same_map_twice_its_square(tiny, images):
    single = unit(cxrkit.attribute(tiny, images, "normgrad", layer="last"))
    torch.testing.assert_close(cxrkit.attribute(tiny, images, "normgrad", layers=["last"]), single)
    twice = cxrkit.attribute(tiny, images, "normgrad", layers=["last.1", "last"])  # one and the same map
    torch.testing.assert_close(twice, unit(single.square()), atol=1e-6, rtol=1e-5)


class Pooled(nn.Module):
    """At the size of the image throughout; the gradient at `last` is constant, and `dead` puts out zeros."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.dead = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.dead.weight)
        nn.init.zeros_(self.dead.bias)
        self.last = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x).tanh()
        x = self.second(x + self.dead(x)).tanh()
        return self.fc(self.last(x).mean((2, 3)))


@pytest.mark.parametrize(("kind", "flat"), [("bias", "last"), ("scaling", "dead"), ("conv3x3", "dead")])
def test_a_constant_map_is_left_out_or_discards_the_layers_before_it(kind, flat, images):
    model = Pooled().eval()

    def product(*layers, protocol="corrected"):
        return cxrkit.attribute(model, images, "normgrad", layers=layers, virtual_layer=kind, protocol=protocol)

    both, second = product("first", "second"), product("second")
    assert (both - second).abs().max() > 0.1
    torch.testing.assert_close(product("first", flat, "second"), both)
    torch.testing.assert_close(product("first", flat, "second", protocol="paper"), both)
    torch.testing.assert_close(product("first", flat, "second", protocol="authors"), second)
    torch.testing.assert_close(product(flat, "first", "second", protocol="authors"), both)
    assert product("first", flat, protocol="authors").abs().max() == 0
    assert product(flat).abs().max() == 0
    torch.testing.assert_close(product("first", "second", protocol="authors"), both)


def test_the_product_does_not_depend_on_the_size_of_the_gradients_but_in_the_published_code(tiny, images):
    layers = ["conv1", "norm1", "conv2"]
    before = cxrkit.attribute(tiny, images, "normgrad", layers=layers)
    singles = [cxrkit.attribute(tiny, images, "normgrad", layer=layer) for layer in layers]
    for scale in (1e-6, 1e-15):
        smaller = copy.deepcopy(tiny)
        smaller.fc.weight.data *= scale
        torch.testing.assert_close(
            cxrkit.attribute(smaller, images, "normgrad", layers=layers), before, atol=1e-4, rtol=0
        )
        product = torch.ones(1)
        for single in singles:
            product = product * unit(scale * single, 1e-8)
        published = cxrkit.attribute(smaller, images, "normgrad", layers=layers, protocol="authors")
        torch.testing.assert_close(published, unit(product, 1e-8), atol=1e-4, rtol=1e-3)
        assert (published.max() < 1e-6) == (scale == 1e-15)


def test_rounding_in_a_constant_map_is_not_enlarged():
    ones = torch.full((1, 3, 7, 7), 0.1)
    jitter = 0.1 * (1 + 2e-7 * torch.randn(1, 3, 7, 7))
    model = bare(jitter)
    assert cxrkit.attribute(model, ones, "normgrad", layers=["0"], virtual_layer="bias").abs().max() == 0
    small = bare(0.1 * (1 + 1e-3 * torch.rand(1, 3, 7, 7)))
    assert cxrkit.attribute(small, ones, "normgrad", layers=["0"], virtual_layer="bias").max() > 0.99


# Layers of the paper


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer2.0", "layer3.0", "layer4.0", "layer4.1"]),
        ("resnet34", ["layer2.0", "layer3.0", "layer4.0", "layer4.2"]),
        ("resnet50", ["layer2.0", "layer3.0", "layer4.0", "layer4.2"]),
        ("efficientnet_b0", [*(f"features.{i}.0" for i in range(9)), "features.8.2"]),
        ("densenet121", None),
        ("mobilenet_v3_large", None),
        ("vgg11", None),
    ],
)
def test_layers_of_the_paper_by_network(name, layers):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=2)
    if layers is None:
        with pytest.raises(ParameterError, match="list the layers by name"):
            _paper_layers(model)
        return
    assert _paper_layers(model) == layers
    last = model.get_submodule(layers[-1])
    assert last is (model.layer4[-1] if hasattr(model, "layer4") else model.features[-1][-1])


def test_the_preset_multiplies_the_layers_of_the_paper_within_a_classifier():
    from cxrkit.models import create

    model = create("resnet18", labels=("Mass", "Nodule")).eval()
    x = torch.rand(1, 1, 64, 64)
    found = cxrkit.attribute(model, x, "normgrad", preset="normgrad", labels="Nodule")
    layers = [f"network.layer{name}" for name in ("2.0", "3.0", "4.0", "4.1")]
    torch.testing.assert_close(found, cxrkit.attribute(model, x, "normgrad", layers=layers, labels=[1]))
    by_name = cxrkit.attribute(model, x, "normgrad")  # the classifier's own layer, unscaled
    torch.testing.assert_close(by_name, cxrkit.attribute(model, x, "normgrad", layer="network.layer4.1"))
    assert found.shape == (1, 1, 64, 64)


def test_the_layers_of_the_paper_in_a_network_full_of_rectifiers_in_place():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.efficientnet_b0(num_classes=2).double().eval()
    for block in model.modules():  # random weights let the signal vanish
        if isinstance(block, nn.BatchNorm2d):
            block.running_var.fill_(0.05)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)  # the product of ten maps enlarges rounding errors
    norms = torch.ones(1)
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output
            return output.clone()

        return hook

    layers = _paper_layers(model)
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    model(x)[0, 1].backward()
    for handle in handles:
        handle.remove()
    for name in layers:
        a, g = outputs[name].detach(), outputs[name].grad
        norms = norms * unit(enlarged((a * g).norm(dim=1)[:, None], (64, 64)))
    model.zero_grad(set_to_none=True)
    found = cxrkit.attribute(model, x, "normgrad", layers="paper", labels=[1])
    torch.testing.assert_close(found, unit(norms), atol=1e-8, rtol=0)
    assert found.std() > 0.05


# Labels, chunks, layers


OPTIONS = ({}, {"layers": ["conv1", "last"], "virtual_layer": "conv3x3"})


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_layer": "conv3"}, "'conv3x3'"),
        ({"virtual_layer": "scale"}, "'scaling'"),
        ({"protocol": "author"}, "'authors'"),
        ({"layer": "lst"}, "'last'"),
        ({"layers": ["conv1", "lst"]}, "'last'"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "last"}, "'last': one layer is layer="),
        ({"layers": nn.ReLU()}, "ReLU: one layer is layer="),
        ({"layers": ["last", nn.ReLU()]}, "isn't part"),
        ({"layers": ["last", "conv1", "last"]}, "last twice"),
        ({"layer": "last", "layers": ["conv1"]}, "both given"),
        ({"layers": "paper"}, "list the layers by name"),
        ({"preset": "normgrad"}, "list the layers by name"),
    ],
)
def test_unknown_names_and_values_are_parameter_errors(options, message, tiny, images):
    with pytest.raises(ParameterError, match=message):
        cxrkit.attribute(tiny, images, "normgrad", **options)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.unused = nn.Conv2d(1, 1, 1)
        self.side = nn.Conv2d(1, 1, 1)
        self.mix = nn.Linear(1, 1)
        self.tokens = nn.Flatten(2)
        self.flat = nn.Flatten()

    def forward(self, x):
        self.side(x)
        x = self.conv(self.conv(x))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.flat(self.tokens(x))[:, :2]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv", "layer conv runs more than once"),
        ("unused", "layer unused doesn't run"),
        ("side", "don't depend on layer side"),
        ("mix", r"layer mix puts out \[B, 16, 12, 1\]: its channels come last"),
        ("tokens", r"layer tokens puts out no map \[B, C, h, w\] but \[B, 1, 192\]"),
    ],
)
def test_layers_without_one_map_of_their_own_are_refused(layer, message, images):
    model = Odd()
    for options in ({"layer": layer}, {"layers": [layer]}):
        with pytest.raises(AttributionError, match=message):
            cxrkit.attribute(model, images, "normgrad", **options)
        assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_without_influence_is_refused_beside_one_with(images):
    class Beside(Tiny):
        def forward(self, x):
            self.conv2(self.conv1(x))
            return super().forward(x.clone())

    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.side = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            x = self.used(x)
            self.side(x)
            return x.mean((2, 3))

    with pytest.raises(AttributionError, match="don't depend on layer side"):
        cxrkit.attribute(Side(), images, "normgrad", layers=["used", "side"])
    with pytest.raises(AttributionError, match="conv1 runs more than once"):
        cxrkit.attribute(Beside().eval(), images, "normgrad", layers=["last", "conv1"])
