"""The layer that is explained: a feature map is known by what made it; what only looks like one is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cxrkit
from cxrkit import AttributionError
from cxrkit.attribution import methods, registry
from cxrkit.attribution.layers import trace
from cxrkit.attribution.positions import Tracking, why_no_map
from cxrkit.attribution.target import Explained

FAMILY = ("gradcam", "layercam", "gradcam_plus_plus", "scorecam", "normgrad")
SIZE = 16


@pytest.fixture(autouse=True)
def _same_networks_every_time():
    torch.manual_seed(0)


def fault(function, size=SIZE, channels=4) -> str:
    """Why what a function of an image puts out is no map; empty for a map."""
    image = torch.rand(1, channels, size, size)
    tracking = Tracking(image)
    with torch.no_grad(), tracking:
        output = function(image)
    return why_no_map(output.shape, tracking.positions(output))


def windows(x, side, back=False):
    """Windows of `side` x `side` as a batch, [B n n, side, side, C], from or to [B, H, W, C]."""
    if not back:
        b, h, w, c = x.shape
        x = x.view(b, h // side, side, w // side, side, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)
    n = int(len(x) ** 0.5)
    return x.view(1, n, n, side, side, -1).permute(0, 1, 3, 2, 4, 5).reshape(1, n * side, n * side, -1)


def attention(tokens):
    return (tokens @ tokens.mT).softmax(-1) @ tokens


def buffered(x):
    """Circular padding by hand: written piece by piece into a buffer."""
    out = x.new_empty(*x.shape[:2], x.shape[2] + 2, x.shape[3])
    out[:, :, 1:-1] = x
    out[:, :, 0] = x[:, :, -1]
    out[:, :, -1] = x[:, :, 0]
    return out


@torch.library.custom_op("cxrkit_tests::blurred", mutates_args=())
def blurred(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 2, 1)


def assigned(x):
    x = x.clone()
    x[x < 0.5] = 0
    x[:, 1] = 1
    return x


KERNEL = torch.rand(4, 4, 3, 3)
GRID = F.affine_grid(torch.eye(2, 3)[None], [1, 4, 16, 16], align_corners=False)
MAPS = {
    "convolution": lambda x: F.conv2d(x, KERNEL),
    "strided, dilated, padded": lambda x: F.conv2d(x, KERNEL, stride=2, dilation=2, padding=3),
    "transposed": lambda x: F.conv_transpose2d(x, KERNEL, stride=2, padding=1, output_padding=1),
    "depthwise": lambda x: F.conv2d(x, KERNEL[:, :1], groups=4),
    "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    "padded by a layer": nn.Sequential(nn.ZeroPad2d(3), nn.Conv2d(4, 4, 7)),
    "padded for odd strides": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), KERNEL, stride=2),
    "written into a buffer": lambda x: F.conv2d(buffered(x), KERNEL),
    "max pooling": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "mean pooling": lambda x: F.avg_pool2d(x, 2, count_include_pad=False),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, (5, 3)),
    "adaptive max pooling": lambda x: F.adaptive_max_pool2d(x, 7),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=(5, 9)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "focus": lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
    "patch merging": lambda x: x.view(1, 4, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 16, 8, 8),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "group norm": lambda x: F.group_norm(x, 2),
    "instance norm": lambda x: F.instance_norm(x),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer norm over channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "local response norm": lambda x: F.local_response_norm(x, 3),
    "activations": lambda x: F.hardswish(F.mish(F.prelu(F.elu(x), torch.ones(1)))).clamp_min(0) * (x > 0),
    "gated units": lambda x: F.glu(x, 1),
    "where": lambda x: torch.where(x > 0.5, x, -x),
    "in place": lambda x: x.clone().relu_().mul_(2).add_(1),
    "concatenated": lambda x: torch.cat([x, F.conv2d(x, KERNEL, padding=1)], 1),
    "added": lambda x: x + F.avg_pool2d(x, 3, 1, 1),
    "shortcut of another phase": lambda x: F.avg_pool2d(x, 2) + F.conv2d(x, KERNEL, stride=2, padding=1),
    "skip from a deeper stage": lambda x: x + F.interpolate(F.avg_pool2d(x, 4), scale_factor=4),
    "channels shuffled": lambda x: x.view(1, 2, 2, 16, 16).transpose(1, 2).reshape(1, 4, 16, 16),
    "squeeze-excite": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "coordinate attention": lambda x: x * x.mean(3, keepdim=True) * x.mean(2, keepdim=True),
    "spatial attention": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "statistics over channels": lambda x: torch.cat([x.amax(1, keepdim=True), x.var(1, keepdim=True)], 1),
    "self-attention": lambda x: attention(x.flatten(2).mT).mT.reshape(x.shape),
    "fused attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT[:, None]] * 3)[:, 0].mT.reshape(
        x.shape
    ),
    "channel attention": lambda x: attention(x.flatten(2)).view(x.shape),
    "windows": lambda x: windows(
        attention(windows(x.permute(0, 2, 3, 1), 4).view(16, 16, 4)).view(16, 4, 4, 4), 4, back=True
    ).permute(0, 3, 1, 2),
    "rolled and back": lambda x: (x.roll((-2, -2), (2, 3)) + 1).roll((2, 2), (2, 3)),
    "linear attention among patches": lambda x: (
        (
            (p := x.view(1, 4, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 4, 4, 64)).relu()
            * (p * p.softmax(-1)).sum(-1, keepdim=True)
        )
        .view(1, 4, 2, 2, 8, 8)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(1, 4, 16, 16)
    ),
    "linear at each position": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.rand(7, 4)).permute(0, 3, 1, 2),
    "einsum": lambda x: torch.einsum("bchw,dc->bdhw", x, torch.rand(5, 4)),
    "class token and back": lambda x: torch.cat([torch.rand(1, 4, 1), x.flatten(2)], 2)[..., 1:].reshape(x.shape),
    "checkpointed": lambda x: checkpoint(torch.relu, x, use_reentrant=False),
    "scripted": torch.jit.script(nn.Sequential(nn.Conv2d(4, 2, 3), nn.ReLU())),
    "complex numbers and back": lambda x: x.contiguous(memory_format=torch.channels_last).double().half().float(),
    "the strongest of a channel": lambda x: x * (x >= x.flatten(2).topk(9).values[..., -1:, None]),
    "one row": lambda x: x.mean(2, keepdim=True),
    "strips": lambda x: F.adaptive_avg_pool2d(x, (1, 8)),
    "without padding": lambda x: F.conv2d(F.conv2d(F.conv2d(x, KERNEL, dilation=2), KERNEL), KERNEL, stride=2),
    "a masked assignment": lambda x: assigned(x),
}
OTHERS = {
    "tokens": (lambda x: x.flatten(2).mT, "no map"),
    "one row of tokens": (lambda x: x.flatten(2)[:, :, None], "rows and columns"),
    "one column of tokens": (lambda x: x.flatten(2)[..., None], "rows and columns"),
    "heads": (lambda x: x.flatten(2).mT.reshape(1, 256, 2, 2).transpose(1, 2), "rows and columns"),
    "attention matrix": (lambda x: (x.flatten(2).mT @ x.flatten(2))[:, None].softmax(-1), "rows and columns"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), "channels come last"),
    "channels last, square": (lambda x: x.repeat(1, 4, 1, 1).permute(0, 2, 3, 1), "channels come last"),
    "transposed": (lambda x: x.mT, "rows and columns"),
    "mirrored": (lambda x: x.flip(3), "rows and columns"),
    "upside down": (lambda x: F.max_pool2d(x.flip(2), 8), "rows and columns"),
    "turned": (lambda x: x.rot90(1, (2, 3)), "rows and columns"),
    "rolled": (lambda x: x.roll(3, 2), "rows and columns"),
    "rolled further": (lambda x: x.roll(6, 2), "rows and columns"),
    "added to its mirror image": (lambda x: x + x.flip(3), "rows and columns"),
    "one half": (lambda x: x[:, :, :8], "a part of the image"),
    "the middle": (lambda x: F.interpolate(x[..., 6:10, 6:10], size=16), "a part of the image"),
    "windows": (lambda x: windows(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2), "rows and columns"),
    "windows as channels": (lambda x: windows(x.permute(0, 2, 3, 1), 4).view(1, 16, 16, 4), "rows and columns"),
    "rows beside each other": (lambda x: x.reshape(1, 4, 8, 32), "rows and columns"),
    "linear along the rows": (lambda x: F.linear(x, torch.rand(16, 16)), "rows and columns"),
    "mixed tokens": (lambda x: F.linear(x.flatten(2), torch.rand(64, 256)).view(1, 4, 8, 8), "rows and columns"),
    "from a vector": (lambda x: F.linear(x.flatten(1), torch.rand(64, 1024)).view(1, 1, 8, 8), "rows and columns"),
    "constant": (lambda x: x.mean((2, 3), keepdim=True) * torch.rand(1, 1, 8, 8), "rows and columns"),
    "frequencies": (lambda x: torch.fft.fft2(x).abs(), "isn't known"),
    "sorted": (lambda x: x.sort(-1).values, "rows and columns"),
    "gathered by the image": (lambda x: x.flatten(2).gather(2, x.flatten(2).argsort(2)).view(x.shape), "isn't known"),
    "an operation of one's own": (blurred, "isn't known"),
    "sampled on a turned grid": (lambda x: F.grid_sample(x, -GRID, align_corners=False), "isn't known"),
    "shifted by a quarter": (lambda x: F.pad(x, (7, -7)), "a part of the image"),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_keep_the_grid_of_the_image(name):
    assert fault(MAPS[name]) == ""


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_a_map_is_known(name):
    function, reason = OTHERS[name]
    assert reason in fault(function)


# Networks


class Block(nn.Module):
    """A block of a vision transformer as timm builds it: queries pass a layer as [B, heads, tokens, 8]."""

    def __init__(self, mixer: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q_norm, self.qkv = nn.Identity(), nn.Linear(16, 48)
        self.mix = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)) if mixer else None
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def attention(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2).reshape(x.shape)

    def forward(self, x):
        x = x + (self.attention(self.norm1(x)) if self.mix is None else self.mix(self.norm1(x).mT).mT)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, mixer=False, token=True):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, stride=4)
        self.token = nn.Parameter(torch.rand(1, 1, 16)) if token and not mixer else None
        self.blocks = nn.Sequential(Block(mixer), Block(mixer))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("options", [{}, {"token": False}, {"mixer": True}])
def test_the_last_map_is_not_taken_where_the_network_goes_on_in_tokens(method, options):
    model, x = Transformer(**options).eval(), torch.rand(2, 1, SIZE, SIZE)
    with pytest.raises(
        AttributionError,
        match=r"right before its head: layer norm puts out no map .* but \[B, 1., 16\].*layer='patches'",
    ):
        cxrkit.attribute(model, x, method)
    assert cxrkit.attribute(model, x, method, layer="patches").shape == (2, 3, SIZE, SIZE)
    if not options:
        with pytest.raises(AttributionError, match=r"blocks.1.q_norm puts out \[B, 2, 17, 8\].*layer='patches'"):
            cxrkit.attribute(model, x, method, layer="blocks.1.q_norm")
    assert not {card.name for card in methods(model)}.intersection((*FAMILY, "cam"))
    model.explained_layer = "patches"
    assert {card.name for card in methods(model)}.issuperset(FAMILY)
    assert cxrkit.attribute(model, x, method).shape == (2, 3, SIZE, SIZE)


class Reusing(nn.Module):
    """One ReLU for all layers."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.relu, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Linear(6, 2)

    def features(self, x):
        return self.relu(self.c2(self.relu(self.c1(x))))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def enlarged(maps, size=SIZE):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def test_of_a_layer_that_runs_twice_the_last_map_is_explained():
    model, x = Reusing().eval(), torch.rand(2, 1, SIZE, SIZE)
    last = model.features(x).detach()
    weight = model.fc.weight.detach()
    cam = torch.einsum("lk,bkhw->blhw", weight, last)
    torch.testing.assert_close(cxrkit.attribute(model, x, "cam"), enlarged(cam))
    torch.testing.assert_close(cxrkit.attribute(model, x, "gradcam"), enlarged(cam.relu() / last[0, 0].numel()))
    norms = torch.einsum("lk,bkhw->blhw", weight.square(), last.square()).sqrt() / last[0, 0].numel()
    torch.testing.assert_close(cxrkit.attribute(model, x, "normgrad"), enlarged(norms))
    for method in FAMILY:
        assert cxrkit.attribute(model, x, method).shape == (2, 2, SIZE, SIZE)
        with pytest.raises(AttributionError, match=r"relu runs more than once.*layer='c2'"):
            cxrkit.attribute(model, x, method, layer="relu")


def used(model, x, method="gradcam") -> str:
    """The layer that a method takes unless one is named."""
    explained = Explained(model)
    registry.entry(method).function(explained, x)
    (layer,) = explained.used_layers
    return layer


def by_hand(model, x, layer, label=0):
    """Grad-CAM of one label with hooks of torch alone."""
    kept = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, given, y: kept.append(y) or y.clone())
    score = model(x.clone().requires_grad_())[:, label].sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(score, kept)
    return enlarged((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu().detach())[:, 0]


class Parts(nn.Module):
    """Convolutions to put together in one way or another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 6, 3, padding=1) for n in (1, 6, 6))
        self.gate, self.narrow = nn.Conv2d(6, 1, 1), nn.Conv2d(6, 2, 1)
        self.fc, self.wide, self.pool = nn.Linear(6, 2), nn.Linear(12, 2), nn.AdaptiveAvgPool2d(1)

    def head(self, x):
        return self.fc(x.mean((2, 3)))


class InPlace(Parts):
    def forward(self, x):
        return self.head(self.b(F.relu_(self.a(x))).relu_())


class Excited(Parts):
    def forward(self, x):
        x = self.b(self.a(x).relu())
        return self.head(x * self.gate(self.pool(x)).sigmoid())


class Weighed(Parts):
    """Attention pooling: the last map is that of the weights, but what they weigh is explained."""

    def forward(self, x):
        x = self.b(self.a(x).relu())
        weights = self.gate(x).flatten(2).softmax(2)
        return self.fc((weights @ x.flatten(2).mT)[:, 0])


class Beside(Parts):
    """An auxiliary head that the logits don't depend on runs last."""

    def forward(self, x):
        x = self.b(self.a(x).relu())
        logits = self.head(x)
        self.auxiliary = self.narrow(self.c(x)).mean((2, 3))
        return logits


class Decoded(Parts):
    """A decoder back to the size of the image."""

    def forward(self, x):
        x = self.a(x).relu()
        x = self.c(x + F.interpolate(self.b(F.max_pool2d(x, 2)), scale_factor=2))
        return self.head(x.relu())


class Called(Parts):
    """A layer called past its hooks."""

    def forward(self, x):
        return self.head(self.b.forward(self.a(x).relu()))


class Listed(Parts):
    """A layer whose output is a tuple, another with a dictionary."""

    class Pair(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return {"out": self.layer(x)}, x

    def __init__(self):
        super().__init__()
        self.pair = self.Pair(self.b)

    def forward(self, x):
        return self.head(self.pair(self.a(x).relu())[0]["out"])


class Flattened(Parts):
    def forward(self, x):
        x = F.max_pool2d(self.b(self.a(x).relu()), 8).flatten(1).relu()
        return F.linear(x, torch.ones(2, 24))


class LastInPlaceOfView(Parts):
    def forward(self, x):
        x = self.b(self.a(x))
        x.transpose(1, 2).relu_()
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (InPlace, "b"),
        (Excited, "b"),
        (Weighed, "b"),
        (Beside, "b"),
        (Decoded, "c"),
        (Called, "a"),
        (Listed, "b"),
        (Flattened, "b"),
        (LastInPlaceOfView, "b"),
    ],
)
def test_the_last_map_before_the_head_is_explained_and_recorded(kind, layer):
    model, x = kind().eval(), torch.rand(2, 1, SIZE, SIZE)
    for method in ("gradcam", "layercam", "scorecam", "normgrad"):
        assert used(model, x, method) == layer
    found = cxrkit.attribute(model, x, "gradcam")
    assert found.any()
    for label in (0, 1):
        torch.testing.assert_close(found[:, label], by_hand(model, x, layer, label))


class Branches(Parts):
    """A head of its own for each label."""

    def forward(self, x):
        x = self.a(x).relu()
        return torch.cat([self.fc(self.b(x).mean((2, 3)))[:, :1], self.fc(self.c(x).mean((2, 3)))[:, :1]], 1)


@pytest.mark.parametrize("method", ["gradcam", "layercam", "gradcam_plus_plus", "normgrad"])
def test_a_label_that_bypasses_the_layer_is_refused(method):
    model, x = Branches().eval(), torch.rand(2, 1, SIZE, SIZE)
    for options in ({}, {"layer": "c"}):
        with pytest.raises(AttributionError, match="label 0 of those asked for doesn't depend on layer c"):
            cxrkit.attribute(model, x, method, **options)
        assert cxrkit.attribute(model, x, method, labels=1, **options).any()
    assert cxrkit.attribute(model, x, method, layer="a").shape == (2, 2, SIZE, SIZE)
    model.fc.weight.data.zero_()  # a score that doesn't change has a map of zeros at a layer that all passes through
    assert not cxrkit.attribute(model, x, method, layer="a").any()


class Frozen(Parts):
    def forward(self, x):
        with torch.no_grad():
            x = self.b(self.a(x).relu())
        return self.head(x)


def test_layers_that_run_without_gradients():
    model, x = Frozen().eval(), torch.rand(2, 1, SIZE, SIZE)
    for method in ("gradcam", "normgrad"):
        with pytest.raises(AttributionError, match="don't depend on layer b by differentiable operations"):
            cxrkit.attribute(model, x, method)
    with torch.no_grad():
        maps = torch.einsum("lk,bkhw->blhw", model.fc.weight, model.b(model.a(x).relu()))
    torch.testing.assert_close(cxrkit.attribute(model, x, "cam"), enlarged(maps))


def test_a_convolution_as_head_is_a_class_map_before_the_pooling_and_a_linear_layer_behind_it():
    x = torch.rand(2, 1, SIZE, SIZE)
    conv, head = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 1)
    before = nn.Sequential(conv, nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    behind = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
    with torch.no_grad():
        maps = enlarged(F.conv2d(conv(x).relu(), head.weight))
    torch.testing.assert_close(cxrkit.attribute(behind, x, "cam"), maps)
    bias = head.bias.detach()[:, None, None]
    torch.testing.assert_close(cxrkit.attribute(before, x, "cam"), maps + bias)
    assert used(before, x) == used(behind, x) == "1"


class Folded(nn.Module):
    """Its layers see the channels, or the windows, of all images as a batch."""

    def __init__(self, windows):
        super().__init__()
        self.windows, self.conv, self.fc = windows, nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        b = len(x)
        if self.windows:
            x = x.view(b, 1, 2, SIZE // 2, 2, SIZE // 2).permute(0, 2, 4, 1, 3, 5).reshape(b * 4, 1, SIZE // 2, -1)
        else:
            x = torch.cat([x, 1 - x])
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(x.view(b, 4, 3).mean(1) if self.windows else x[:b] - x[b:])


@pytest.mark.parametrize("windows", [False, True])
def test_layers_whose_batch_is_not_that_of_the_images(windows):
    x = torch.rand(2, 1, SIZE, SIZE)
    for method in FAMILY:
        for options in ({}, {"layer": "conv"}):
            with pytest.raises(AttributionError, match=r"4, 3, 16, 16\] for 2 images|rows and columns|above 1 x 1"):
                cxrkit.attribute(Folded(windows).eval(), x, method, **options)


def test_the_same_layer_under_two_names():
    model, x = Reusing().eval(), torch.rand(1, 1, SIZE, SIZE)
    model.alias = model.c2
    expected = cxrkit.attribute(model, x, "gradcam", layer="c2")
    for layer in ("alias", model.c2):
        torch.testing.assert_close(cxrkit.attribute(model, x, "gradcam", layer=layer), expected)


def test_a_network_is_looked_at_once_for_each_size_and_again_when_it_changes():
    model, x, runs = Reusing().eval(), torch.rand(1, 1, SIZE, SIZE), []
    tall = torch.rand(1, 1, 24, SIZE)

    def looked(images):
        """How often the layer runs when the network is explained."""
        runs.clear()
        cxrkit.attribute(model, images, "gradcam")
        return len(runs)

    model.c2.register_forward_hook(lambda module, given, y: runs.append(1))
    assert looked(x) > 1
    assert looked(tall) > 1
    assert (looked(x), looked(tall)) == (1, 1)
    model.relu = nn.Sequential(nn.Tanh())
    assert looked(x) > 1
    assert looked(x) == 1
    gone = weakref.ref(model)
    model = None
    gc.collect()
    assert gone() is None


# Real networks


REAL = {
    "resnet18": "layer4",
    "densenet121": "features",
    "vgg11_bn": "avgpool",
    "mobilenet_v3_small": "features",
    "shufflenet_v2_x0_5": "conv5",
    "swin_t": "permute",
    "convnext_tiny": "features",
}


@pytest.mark.parametrize("name", REAL)
def test_the_layer_of_networks_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    model, x = getattr(torchvision.models, name)(num_classes=2).eval(), torch.rand(1, 3, 64, 64)
    assert trace(Explained(model), x).default[0] == REAL[name]
    assert "gradcam" in {card.name for card in methods(model)}


def test_a_scripted_part_takes_no_hooks_and_is_no_obstacle():
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    plain, images = nn.Sequential(*parts).eval(), torch.rand(2, 1, 12, 12)
    scripted = nn.Sequential(parts[0], torch.jit.script(parts[1]), *parts[2:]).eval()
    for method in ("gradcam", "normgrad", "cam", "scorecam"):
        expected = cxrkit.attribute(plain, images, method)
        torch.testing.assert_close(cxrkit.attribute(scripted, images, method), expected)
    with pytest.raises(AttributionError, match=r"layer 1 is a TorchScript module, .* layer='2'"):
        cxrkit.attribute(scripted, images, "gradcam", layer="1")


@pytest.mark.parametrize("antialias", ["flc", "flc_authors", "blur"])
def test_maps_behind_anti_aliased_layers_keep_the_rows_and_columns_of_the_image(antialias):
    model = cxrkit.models.create("bcos_resnet18", ["a", "b", "c"], antialias=antialias, seed=0).eval()
    image = torch.rand(1, 1, 64, 64)
    for method in ("cam", "gradcam", "layercam", "normgrad"):
        assert cxrkit.attribute(model, image, method).shape == (1, 3, 64, 64)


def test_a_layer_that_a_classifier_declares_is_no_exception():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last, self.head = nn.Conv2d(3, 5, 3), Last(), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.last(self.body(x)).mean((1, 2)))

    model = cxrkit.models.Classifier(ChannelsLast(), ["a", "b"], explained_layer="network.last").eval()
    with pytest.raises(AttributionError, match="channels come last"):
        cxrkit.attribute(model, torch.rand(1, 1, 12, 14), "gradcam")
