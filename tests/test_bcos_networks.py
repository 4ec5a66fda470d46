"""B-cos DenseNet, ConvNeXt and vision transformer: completeness with the position code, the package as second opinion,
anti-aliasing, refusals.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import cxrkit
from cxrkit import AttributionError, ModelError
from cxrkit.attribution.inherent import bcos_rgba, bcos_shares
from cxrkit.models import Classifier, bcos, calibrate, create
from cxrkit.models.downsample import antialias as antialias_network
from cxrkit.models.zoo import NETWORKS

# A CPU torch needs cxrkit before anything that imports torchvision.
# isort: split
import bcos.models.pretrained as package
from bcos.common import gradient_to_image

LABELS = ("Cardiomegaly", "Mass", "Nodule")
BIAS = -1.0  # of the builders

# Narrow versions: the same code, layer by layer, at a fraction of the cost.
NARROW = {
    "densenet": bcos.builder("densenet121", growth_rate=8, num_init_features=16),
    "convnext": bcos.builder("convnext_atto", norm_layer=None),
    "convnext_batch_norm": bcos.builder("convnext_atto"),
    "vit": bcos.vit_builder("vitc_ti_patch1_14"),
}
POOLED = {"densenet": "bcos_densenet121", "convnext": "bcos_convnext_tiny"}


def pictures(count=2, size=64, dtype=torch.float64):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


@functools.cache
def narrow(kind, antialias="none"):
    """A narrow network in float64, calibrated, in which every block counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NARROW[kind](len(LABELS))
    if antialias != "none":
        antialias_network(network, antialias, NETWORKS[POOLED[kind]].strided)
    for block in network.modules():
        if hasattr(block, "layer_scale"):
            nn.init.ones_(block.layer_scale)  # 1e-6 would hide the block
    model = Classifier(network, LABELS, "add_inverse", logit_bias=BIAS).double().eval()
    return calibrate(model, pictures(4))


@functools.cache
def full(name):
    return calibrate(create(name, LABELS, logit_bias=-2.5).eval(), pictures(4, 64, torch.float32))


def parts(model, images):
    """Logits less their bias, and the largest error of image plus position."""
    logits = model(images).detach() - model.logit_bias
    image, position = bcos_shares(model, images)
    return logits, (image + position - logits).abs().max(), position


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("bcos_resnet34", "resnet34"),
        ("bcos_densenet121", "densenet121"),
        ("bcos_convnext_tiny", "convnext_tiny"),
        ("bcos_vit_c_b", "vitc_b_patch1_14"),
    ],
)
def test_weights_of_the_package_fit(ours, theirs):
    with torch.device("meta"):
        model = create(ours, LABELS)
        plain = getattr(package, theirs)(pretrained=False, num_classes=3)
    shapes = [{key: value.shape for key, value in n.state_dict().items()} for n in (model.network, plain)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["bcos_densenet121", "bcos_convnext_tiny", "bcos_vit_c_b"])
def test_full_networks_are_those_of_the_package_and_complete(name):
    model, images = full(name), pictures(2, 64, torch.float32)
    logits, error, position = parts(model, images)
    assert logits.abs().max() > 1e-3  # there is a signal to explain
    assert error < 1e-4 * max(1, logits.abs().max())
    assert (position.abs().max() > 1e-3) == (name == "bcos_vit_c_b")
    maps = cxrkit.attribute(model, images, "bcos", labels=[1])
    six = model.encode(images)[:1].clone().requires_grad_()
    theirs = model.network.explain(six, idx=1)["contribution_map"][0].detach()
    torch.testing.assert_close(maps[0, 0], theirs, atol=1e-3 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("kind", "antialias"),
    [
        ("vit", "none"),
        ("convnext_batch_norm", "none"),
        ("densenet", "none"),
        ("densenet", "flc_authors"),
        ("convnext", "flc"),
        ("convnext", "blur"),
    ],
)
def test_image_and_position_make_the_logit(kind, antialias):
    model, images = narrow(kind, antialias), pictures()
    logits, error, position = parts(model, images)
    assert logits.abs().min() > 1e-6
    assert error < 1e-10
    maps = cxrkit.attribute(model, images, "bcos")
    torch.testing.assert_close(maps.sum((2, 3)) + position, logits, atol=1e-10, rtol=0)
    for i, six in enumerate(model.encode(images)):
        for j in range(len(LABELS)):
            with model.network.explanation_mode():
                inputs = six[None].clone().requires_grad_()
                (weight,) = torch.autograd.grad(model.network(inputs)[0, j], inputs)
            theirs = (inputs * weight).sum(1)[0].detach()
            torch.testing.assert_close(maps[i, j], theirs, atol=1e-12, rtol=1e-7)
            assert (position[i, j] - (logits[i, j] - theirs.sum())).abs() < 1e-10


def test_the_position_codes_part_by_frozen_scales():
    """A second run in which the code is scaled by t, scales and attention held at t = 1: the logit is linear in t."""
    model, images = narrow("vit"), pictures(1)
    network, held = model.network, {}

    def hold(name, module):
        """Record the factor of a layer at first, use it ever after."""
        plain = module.forward

        def forward(x):
            if name not in held:
                y = plain(x)
                linear = module.linear(x)
                held[name] = (y / linear).detach()
            return held[name] * module.linear(x)

        module.forward = forward

    def hold_norm(name, module):
        def forward(x):
            dims = (-1,) if x.ndim == 3 or x.ndim == 2 else (1, 2, 3)
            centred = x - x.mean(dims, keepdim=True)
            if name not in held:
                held[name] = (x.var(dims, unbiased=False, keepdim=True) + module.eps).rsqrt().detach()
            weight = module.weight if len(dims) == 1 else module.weight[:, None, None]
            return centred * held[name] * weight

        module.forward = forward

    def hold_attention(name, module):
        def forward(dots):
            if name not in held:
                held[name] = dots.softmax(-1).detach()
            return held[name]

        module.forward = forward

    changed = []
    code = network[0].positional_embedding
    plain_code, factor = code.forward, 1.0
    code.forward = lambda patches: factor * plain_code(patches)
    for name, module in network.named_modules():
        kind = type(module).__name__
        rule = {"BcosLinear": hold, "TrainableBcosConv2d": hold, "Softmax": hold_attention}.get(kind)
        rule = hold_norm if "LayerNorm" in kind else rule
        if rule:
            rule(name, module)
            changed.append(module)
    try:
        with torch.no_grad():
            encoded = model.encode(images)
            at_one = network(encoded)
            factor = 0.0
            without = network(encoded)
            factor = 3.0
            torch.testing.assert_close(network(encoded) - without, 3 * (at_one - without), atol=1e-12, rtol=1e-9)
    finally:
        for module in (*changed, code):
            del module.forward
    torch.testing.assert_close(model(images), at_one, atol=1e-12, rtol=0)
    image, position = bcos_shares(model, images)
    torch.testing.assert_close(position, at_one - without, atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(image, without - BIAS, atol=1e-12, rtol=1e-8)


def test_without_a_code_the_position_has_no_part(monkeypatch):
    model, images = narrow("vit"), pictures(1)
    code = model.network[0].positional_embedding
    plain = type(code).forward
    monkeypatch.setattr(type(code), "forward", lambda self, patches: 0 * plain(self, patches))
    image, position = bcos_shares(model, images)
    assert (position == 0).all()
    torch.testing.assert_close(image, model(images).detach() - BIAS, atol=1e-12, rtol=0)


def test_labels_chunks_precision_and_surroundings():
    model, images = narrow("vit"), pictures(3)
    whole = bcos_shares(model, images)
    some = bcos_shares(model, images, labels=["Nodule", "Cardiomegaly"], chunk=1)
    for part, every in zip(some, whole, strict=True):
        assert every.shape == (3, 3)
        assert every.dtype == torch.float64
        torch.testing.assert_close(part, every[:, [2, 0]], atol=1e-12, rtol=0)
    assert bcos_shares(model, images.float())[0].dtype == torch.float32
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert not any(hooks)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(getattr(m, "detach", False) is True for m in model.modules())


def test_the_network_is_left_as_it_was_while_an_error_is_looked_at():
    model = narrow("vit")

    def fail(module, args):
        raise RuntimeError("in the middle")

    handle = model.network[1].register_forward_pre_hook(fail)
    try:
        for call in (bcos_shares, bcos_rgba):
            with pytest.raises(AttributionError, match="in the middle") as caught:
                call(model, pictures(1))
            assert caught.tb is not None
            assert all(p.requires_grad for p in model.parameters())
            assert not any(m._forward_hooks for m in model.modules())
            assert not any(getattr(m, "detach", False) is True for m in model.modules())
    finally:
        handle.remove()


def test_a_norm_with_a_shift_is_named():
    model = Classifier(NARROW["vit"](3), LABELS, "add_inverse", logit_bias=BIAS).eval()
    norm = model.network[0].transformer.encoder_3.ff.net.norm
    norm.bias = nn.Parameter(torch.full_like(norm.weight, 0.1))
    with pytest.raises(AttributionError, match=r"adds to the logit \(.*encoder_3\.ff\.net\.norm\.bias"):
        bcos_shares(model, pictures(1, 32, torch.float32))


def test_attention_that_is_not_held_is_named():
    model = Classifier(NARROW["vit"](3), LABELS, "add_inverse", logit_bias=BIAS).eval()
    model.network[0].transformer.encoder_0.attn.set_explanation_mode = lambda active: None
    with pytest.raises(AttributionError, match=r"encoder_0\.attn \(Attention\) applies matmul, which isn't linear"):
        cxrkit.attribute(model, pictures(1, 32, torch.float32), "bcos")


def test_a_position_code_of_another_kind_is_refused(monkeypatch):
    model, images = narrow("vit"), pictures(1)
    vit, learnt = model.network[0], torch.linspace(-0.1, 0.1, 192)
    monkeypatch.setattr(vit.transformer, "forward", lambda x: nn.Sequential.forward(vit.transformer, x + learnt))
    with pytest.raises(AttributionError, match=r"image 0, label 'Cardiomegaly': .*such as a position code"):
        bcos_shares(model, images)


@pytest.mark.parametrize("kind", ["densenet", "convnext", "vit"])
def test_colours_equal_those_of_the_package(kind):
    model, images = narrow(kind), pictures(1)
    found = bcos_rgba(model, images, labels=["Mass"])
    six = model.encode(images)
    weight = model.network.explain(six.clone().requires_grad_(), idx=1)["dynamic_linear_weights"][0]
    theirs = torch.from_numpy(gradient_to_image(six[0], weight)).permute(2, 0, 1)
    assert found.shape == (1, 1, 4, 64, 64)
    assert ((found[0, 0] - theirs).abs() > 1e-3).double().mean() < 1e-3


def test_the_methods_that_fit_each_network():
    for kind in NARROW:
        assert "bcos" in {card.name for card in cxrkit.attribution.methods(narrow(kind))}
    model = full("bcos_vit_c_b")
    assert cxrkit.attribute(model, pictures(1, 32, torch.float32), "layercam").shape == (1, 3, 32, 32)
    with pytest.raises(AttributionError, match="use gradcam or layercam"):
        cxrkit.attribute(model, pictures(1, 32, torch.float32), "cam")
    for kind in ("densenet", "convnext"):  # the head's own map
        model, images = narrow(kind), pictures(1)
        maps = cxrkit.attribute(model, images, "cam")
        torch.testing.assert_close(maps.mean((2, 3)), model(images).detach() - BIAS, atol=1e-8, rtol=1e-6)


# --- anti-aliasing ---


def test_a_convolution_between_stages_is_pooled_where_it_was_strided():
    """At stride 1, every other output is that of the strided convolution: the pool starts from the same grid."""
    for build, layers in (
        (NARROW["convnext"], "bcos_convnext_tiny"),
        (NETWORKS["convnext_tiny"].build, "convnext_tiny"),
    ):
        network = build(3).eval()
        name = NETWORKS[layers].strided[0]
        layer = network.get_submodule(name)
        x = torch.rand(1, layer.in_channels, 8, 8)
        with torch.no_grad():
            strided = layer(x)
            antialias_network(network, "flc", [name])
            steps = network.get_submodule(name)
            torch.testing.assert_close(steps[:-1](x)[..., ::2, ::2], strided, atol=1e-6, rtol=1e-5)
            assert steps(x).shape == strided.shape


@pytest.mark.parametrize("name", ["densenet121", "bcos_densenet121", "convnext_tiny", "bcos_convnext_tiny"])
def test_antialiased_networks_keep_shapes_and_parameters(name):
    model, shapes = create(name, LABELS, antialias="flc").eval(), []
    with torch.device("meta"):
        assert create(name, LABELS).card["parameters"] == model.card["parameters"]
    assert model.card["antialiased_layers"] == list(NETWORKS[name].strided)
    model.get_submodule(model.explained_layer).register_forward_hook(lambda m, a, y: shapes.append(y.shape[2:]))
    assert model(torch.rand(1, 1, 64, 96)).isfinite().all()
    assert shapes == [(2, 3)]
    with pytest.raises(ModelError, match=r"FLCPool after features\.\S+ got a map of"):
        model(torch.rand(1, 1, 64, 72))


def test_weights_stay_where_only_pools_are_replaced(tmp_path):
    state = create("bcos_densenet121", LABELS, seed=3).network.state_dict()
    torch.save({key: value.contiguous() for key, value in state.items()}, tmp_path / "dense.pth")
    model = create("bcos_densenet121", LABELS, weights=tmp_path / "dense.pth", antialias="blur")
    assert model.card["weights"]["random_layers"] == []
    assert all(torch.equal(value, state[key]) for key, value in model.network.state_dict().items())


def test_networks_without_a_recipe_are_refused():
    for name in ("bcos_vit_c_b", "vgg16"):
        with pytest.raises(ModelError, match=f"{name} can't be anti-aliased: .* use one of resnet18, .*bcos_resnet50"):
            create(name, LABELS, antialias="flc")
