"""FLC pooling and blur pooling against their definitions and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxrkit.errors import ModelError, ParameterError
from cxrkit.models import NETWORKS, BlurPool, FLCPool, calibrate, create
from cxrkit.models.downsample import antialias

EVEN = st.integers(1, 16).map(lambda n: 2 * n)


def flc_by_definition(x):
    """Canonical FLC with the centred crop, two-dimensional transforms as written in the sheet."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))
    top, left = height // 2 - height // 2 // 2, width // 2 - width // 2 // 2
    spectrum = spectrum[..., top : top + height // 2, left : left + width // 2]
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").real


def flc_of_the_authors(x):
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1))
    rows, columns = (torch.hamming_window(n + 1, periodic=False, dtype=x.dtype) for n in (height, width))
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), dim=(-2, -1))
    spectrum = spectrum * torch.outer(rows, columns).sqrt()
    spectrum = spectrum[
        ...,
        int((height + 2) / 4) : int(3 * (height + 2) / 4),
        int((width + 2) / 4) : int(3 * (width + 2) / 4),
    ]
    y = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").abs()
    return y[..., 1:, 1:]


@settings(max_examples=30, deadline=None)
@given(height=EVEN, width=EVEN, seed=st.integers(0, 99))
def test_flc_is_the_transform_of_the_definition(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    assert torch.allclose(FLCPool()(x), flc_by_definition(x), atol=1e-12)
    assert torch.allclose(FLCPool("authors")(x), flc_of_the_authors(x), atol=1e-12)


@pytest.mark.parametrize("size", [6, 10, 14, 28, 56])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flc_keeps_a_constant_at_every_even_size(size, dtype):
    y = FLCPool()(torch.full((1, 2, size, size), 0.7, dtype=dtype))
    assert y.shape == (1, 2, size // 2, size // 2)
    assert y.dtype == dtype
    assert torch.allclose(y, torch.full_like(y, 0.7), atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("size", [16, 14])
def test_flc_of_cosines(size):
    n = torch.arange(size, dtype=torch.float64)
    for k in range(size // 2):
        y = FLCPool()(torch.cos(2 * math.pi * k * n / size).expand(1, 1, size, size))[0, 0]
        sampled = torch.cos(2 * math.pi * k * torch.arange(size // 2, dtype=torch.float64) / (size // 2))
        gain = 1.0 if k < size / 4 else 0.5 if k == size / 4 else 0.0
        assert torch.allclose(y, (gain * sampled).expand_as(y), atol=1e-12), k


def test_flc_removes_what_strided_sampling_would_alias():
    x = torch.cos(2 * math.pi * 6 * torch.arange(16.0) / 16).expand(1, 1, 16, 16)
    assert x[..., ::2, ::2].abs().max() > 0.9
    assert FLCPool()(x).abs().max() < 1e-6


def test_authors_flc_on_ones():
    y = FLCPool("authors")(torch.ones(1, 1, 56, 56))
    assert y.min().item() == pytest.approx(0.475, abs=5e-4)
    assert y.max().item() == pytest.approx(1.166, abs=5e-4)
    assert y.mean().item() == pytest.approx(0.985, abs=5e-4)


@pytest.mark.parametrize(("size", "half"), [(56, 28), (28, 14), (14, 7), (112, 56)])
def test_authors_flc_shape_and_lost_sign(size, half):
    x = torch.randn(1, 2, size, size)
    y = FLCPool("authors")(x)
    assert y.shape == (1, 2, half, half)
    assert torch.equal(y, FLCPool("authors")(-x))
    assert (y >= 0).all()


@pytest.mark.parametrize("size", [14, 16])
def test_authors_flc_has_a_gradient_at_zero(size):
    x = torch.zeros(1, 1, size, size, requires_grad=True)
    FLCPool("authors")(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("pool", [FLCPool(), FLCPool("authors"), BlurPool()], ids=["flc", "authors", "blur"])
@pytest.mark.parametrize("size", [12, 14])
def test_pools_are_homogeneous_of_degree_one(pool, size):
    x = torch.randn(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    y = pool(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (x * gradient).sum().item() == pytest.approx(y.sum().item(), abs=1e-10)
    assert torch.autograd.gradcheck(pool, x)


@pytest.mark.parametrize("pool", [FLCPool(), FLCPool("authors"), BlurPool()], ids=["flc", "authors", "blur"])
def test_pools_take_every_memory_format_and_autocast(pool):
    x = torch.randn(2, 5, 12, 20)
    expected = pool(x)
    assert torch.allclose(pool(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-6)
    assert torch.allclose(pool(x.mT.contiguous().mT), expected, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(pool(x), expected, atol=1e-6)
    assert pool(x.bfloat16()).dtype == torch.bfloat16
    assert not pool.state_dict()
    assert torch.equal(copy.deepcopy(pool)(x), expected)


def test_flc_matrices_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        FLCPool()(torch.rand(1, 1, 44, 44))
    x = torch.rand(1, 1, 44, 44, requires_grad=True)
    FLCPool()(x).sum().backward()
    assert x.grad is not None


def test_flc_refuses_odd_maps_and_says_which():
    with pytest.raises(ModelError, match=r"layer4\.0\.conv2 got a map of 14x7: .*multiples of 32"):
        FLCPool(layer="layer4.0.conv2")(torch.rand(1, 1, 14, 7))
    with pytest.raises(ParameterError, match="protocol"):
        FLCPool("canonical")


def test_blurpool_keeps_constants_and_removes_a_checkerboard():
    assert torch.allclose(BlurPool()(torch.full((1, 3, 9, 12), 0.3)), torch.tensor(0.3), atol=1e-7)
    board = 1 - 2.0 * (torch.arange(12)[:, None] + torch.arange(12)).remainder(2)
    assert board[::2, ::2].abs().min() == 1
    assert BlurPool()(board[None, None]).abs().max() < 1e-7


def test_blurpool_of_an_impulse():
    x = torch.zeros(1, 1, 12, 12)
    x[..., 4, 4] = 1
    y = BlurPool()(x)[0, 0]
    # The window of output i covers inputs 2i-1 to 2i+2: an even position meets its taps 1 (i=1) and 3 (i=2).
    assert torch.equal(y[1:3, 1:3], torch.tensor([[1.0, 3.0], [3.0, 9.0]]) / 64)
    assert y.sum() == y[1:3, 1:3].sum()


@pytest.mark.parametrize(("omega", "gain"), [(2 * math.pi * 2 / 64, 0.98562), (math.pi / 2, 0.35355), (math.pi, 0)])
def test_blurpool_gain(omega, gain):
    n = torch.arange(64, dtype=torch.float64)
    wave = torch.stack([torch.cos(omega * n), torch.sin(omega * n)]).unsqueeze(1).expand(2, 64, 64)
    real, imaginary = BlurPool()(wave[None])[0, :, 5, 2:-2]
    assert torch.hypot(real, imaginary).mean().item() == pytest.approx(gain, abs=1e-5)
    assert abs(math.cos(omega / 2)) ** 3 == pytest.approx(gain, abs=1e-5)


@pytest.mark.parametrize(("size", "half"), [(7, 4), (8, 4), (3, 2)])
def test_blurpool_size_is_rounded_up(size, half):
    assert BlurPool()(torch.rand(1, 2, size, size)).shape == (1, 2, half, half)


def test_blurpool_refuses_tiny_maps():
    with pytest.raises(ModelError, match="at least 3 pixels"):
        BlurPool()(torch.rand(1, 1, 2, 8))


@pytest.mark.parametrize(("name", "first"), [("bcos_resnet50", "conv2"), ("bcos_resnet18", "conv1")])
def test_exactly_six_convolutions_are_replaced(name, first):
    model = create(name, ["a", "b"], antialias="flc")
    expected = [f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in (first, "downsample.0")]
    pooled = [n.removesuffix(".1") for n, m in model.network.named_modules() if isinstance(m, FLCPool)]
    assert sorted(pooled) == sorted(expected) == sorted(model.card["antialiased_layers"])
    for layer in expected:
        convolution, pool = model.network.get_submodule(layer)
        assert convolution.linear.stride == (1, 1)
        assert pool.layer == layer
    strided = [n for n, m in model.network.named_modules() if getattr(m, "stride", None) in (2, (2, 2))]
    assert [n for n in strided if n.startswith("layer") and n.count(".") > 1] == []
    assert {"conv1", "conv1.linear", "pool"} <= set(strided)  # the stem stays as it is


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "flc") for name, row in NETWORKS.items() if row.explained_layer == "layer4"]
    + [("bcos_resnet18", "flc_authors"), ("bcos_resnet18", "blur"), ("resnet18", "blur")],
)
def test_antialiased_networks_keep_their_shapes(name, kind):
    model = create(name, ["a", "b"], antialias=kind).eval()
    shapes = {}
    handles = [
        stage.register_forward_hook(lambda m, i, o, n=n: shapes.update({n: tuple(o.shape[-2:])}))
        for n, stage in model.network.named_children()
        if n.startswith("layer")
    ]
    assert model(torch.rand(1, 1, 96, 64)).shape == (1, 2)
    assert shapes == {"layer1": (24, 16), "layer2": (12, 8), "layer3": (6, 4), "layer4": (3, 2)}
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("bcos_resnet18", ("conv1", "pool")),
        ("resnet18", ("conv1", "maxpool")),
        ("densenet121", ("features.conv0", "features.pool0")),
        ("bcos_convnext_tiny", ("features.0",)),
        ("convnext_tiny", ("features.0.0",)),
    ],
)
def test_the_stem_on_request(name, stem):
    without = create(name, ["a", "b"], antialias="flc")
    model = create(name, ["a", "b"], antialias="flc", antialias_stem=True).eval()
    added = [layer for layer in model.card["antialiased_layers"] if layer not in without.card["antialiased_layers"]]
    assert tuple(added) == stem
    assert model.card["antialias_stem"] is True
    assert without.card["antialias_stem"] is False
    shapes = []
    model.get_submodule(model.explained_layer).register_forward_hook(lambda m, a, y: shapes.append(tuple(y.shape[2:])))
    assert model(torch.rand(1, 1, 64, 96)).isfinite().all()
    assert shapes == [(2, 3)]
    strides = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    assert not [n for n, m in model.named_modules() if isinstance(m, strides) and m.stride not in (1, (1, 1))]


def test_a_stem_of_stride_four_gets_two_pools_on_the_same_grid():
    """At stride 1 every fourth output is that of the strided convolution."""
    network = NETWORKS["convnext_tiny"].build(2).eval()
    layer, x = network.get_submodule("features.0.0"), torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        strided = layer(x)
        antialias(network, "blur", ["features.0.0"])
        steps = network.get_submodule("features.0.0")
        assert [type(step).__name__ for step in steps] == ["ZeroPad2d", "Conv2d", "BlurPool", "BlurPool"]
        assert torch.allclose(steps[:2](x)[..., ::4, ::4], strided, atol=1e-5)
        assert steps(x).shape == strided.shape


def test_a_max_pool_takes_its_maxima_everywhere_before_it_is_halved():
    network = NETWORKS["resnet18"].build(2)
    x = torch.rand(1, 4, 12, 12)
    expected = BlurPool()(F.max_pool2d(x, 3, stride=1, padding=1))
    antialias(network, "blur", ["maxpool"])
    assert torch.equal(network.maxpool(x), expected)


def test_a_shift_of_one_pixel_moves_the_network_less_with_an_antialiased_stem():
    """What the option is for: the smoother the way down, the less a shift by one pixel changes the answer."""
    x = F.interpolate(torch.rand(4, 1, 16, 16), size=(65, 65), mode="bilinear")
    x = (x + 0.3 * torch.rand_like(x)).clamp(0, 1)
    change = {}
    for stem in (False, True):
        model = create("bcos_resnet18", ["a"], antialias="flc", antialias_stem=stem)
        calibrate(model, x[..., :-1, :-1]).eval()
        seen = []
        model.network.layer1.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].mean((2, 3))))
        with torch.no_grad():
            model(x[..., :-1, :-1])
            model(x[..., 1:, 1:])
        change[stem] = float((seen[0] - seen[1]).norm() / seen[0].norm())
    assert change[True] < change[False]


def test_a_stem_without_antialiasing_and_a_layer_without_stride_are_refused():
    with pytest.raises(ParameterError, match="antialias_stem goes with antialias: name one of flc"):
        create("bcos_resnet18", ["a"], antialias_stem=True)
    with pytest.raises(ModelError, match=r"layer layer1\.0\.conv1 has stride .*neither 2 nor 4"):
        antialias(NETWORKS["resnet18"].build(2), "flc", ["layer1.0.conv1"])


def test_a_size_that_flc_cant_halve_is_refused():
    with pytest.raises(ModelError, match=r"layer2\.0\.\S+ got a map of 9x8|layer3\.0\.\S+ got a map of 9x8"):
        create("bcos_resnet18", ["a"], antialias="flc")(torch.rand(1, 1, 72, 64))
