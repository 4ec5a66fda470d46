"""Methods with rules of their own meet operations that they can't see, and activations in other spellings."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cxrkit
from cxrkit import AttributionError

METHODS = [
    ("guided_backprop", {}),
    ("deeplift", {}),
    ("lrp", {"rule": "epsilon"}),
    ("lrp", {"preset": "relevance"}),
    ("rap", {"protocol": "paper"}),
]


class As(nn.Module):
    """A layer made of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(layer):
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        layer,
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(2, 1, 10, 12, generator=torch.Generator().manual_seed(1))


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mask = (x > 0).to(x.dtype)
        ctx.mark_non_differentiable(mask)
        return mask

    @staticmethod
    def backward(ctx, gradient):
        return None


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


@torch.jit.script
def scripted_mask(x):
    return (x > 0).to(x.dtype)


@torch.jit.script
def scripted_in_place(x):
    return x.clamp_(min=0.0)


def zeroed(x):
    x = x * 1
    x[x < 0] = 0
    return x


def clamped_in_secret(x):
    x = x * 1
    x.data.clamp_(min=0)
    return x


def clamped_without_gradient(x):
    x = x * 1
    with torch.no_grad():
        x.clamp_(min=0)
    return x


def data_replaced(x):
    x = x * 1
    x.data = x.data.clamp(min=0)
    return x


def gated_without_gradient(x):
    with torch.no_grad():
        gate = x.sigmoid()
    return x * gate


def in_numpy(x):
    return x * torch.from_numpy((x.detach().numpy() > 0).astype(np.float32))


UNSEEN = {
    "an autograd function": (Rectified.apply, "RectifiedBackward"),
    "its mask": (lambda x: x * Mask.apply(x), "without gradient"),
    "a scripted function": (scripted, "MulBackward0|CppFunction|DifferentiableGraph"),
    "its scripted mask": (lambda x: x * scripted_mask(x), "anew for each image"),
    "an operator": (lambda x: torch.ops.aten.logaddexp(x, x), "logaddexp"),
    "a subclass": (lambda x: x.as_subclass(nn.Parameter), "AliasBackward0"),
    "vmap": (torch.vmap(lambda x: x.relu()), "ReluBackward0"),
    "activations kept elsewhere": (lambda x: kept_elsewhere(x), "switch that off"),
    "a mask": (lambda x: x * (x > 0), "mul joins the signal"),
    "a choice": (lambda x: torch.where(x > 0, x, 0.0), "where joins the signal"),
    "a filled mask": (lambda x: x.masked_fill(x < 0, 0), "masked_fill joins the signal"),
    "a change of items": (zeroed, "setitem joins the signal"),
    "selected items": (lambda x: torch.stack([y + y[y > 0].sum() for y in x]), "getitem joins the signal"),
    "a detached gate": (lambda x: x * x.sigmoid().detach(), "sigmoid|joins the signal"),
    "a gate without gradient": (gated_without_gradient, "mul joins the signal"),
    "data": (lambda x: x * (x.data > 0), "mul joins the signal"),
    "data changed": (clamped_in_secret, "clamp changes the signal in place"),
    "data replaced": (data_replaced, "data changes the signal in place"),
    "no_grad in place": (clamped_without_gradient, "clamp changes the signal in place"),
    "numbers": (lambda x: torch.stack([y * y.mean().item() for y in x]), "item"),
    "more numbers": (lambda x: torch.stack([y * float(y.mean()) for y in x]), "float reads numbers"),
    "lists": (lambda x: x * torch.tensor((x > 0).tolist()), "tolist reads numbers"),
    "arrays": (in_numpy, "numpy reads numbers"),
    "a copy": (lambda x: x * torch.tensor(x), "tensor"),
    "a leaf": (lambda x: x + x.detach().clone().requires_grad_(), "joins the signal"),
    "places": (lambda x: x + x.gather(1, x.argmax(1, keepdim=True)), "gather joins the signal"),
    "the mean of a mask": (lambda x: x * (x > 0).float().mean((1, 2, 3), keepdim=True), "mul joins the signal"),
    "rounding": (torch.round, "round"),
    "division with rounding": (lambda x: torch.div(x, 0.1, rounding_mode="floor"), "div"),
}


def kept_elsewhere(x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return x.relu()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("unseen", UNSEEN)
def test_what_cannot_be_seen_is_refused_by_name(unseen, method, options, images):
    function, message = UNSEEN[unseen]
    for _ in range(3 if "script" in unseen else 1):  # a scripted function is another one once it is optimized
        with pytest.raises(AttributionError, match=message):
            cxrkit.attribute(network(As(function)), images, method, **options)


@pytest.mark.parametrize("method", ["guided_backprop", "deeplift"])
def test_a_script_that_works_in_place_is_seen_by_what_it_leaves(method, images):
    for _ in range(3):
        with pytest.raises(AttributionError, match=r"layer 3 gets values from (Clamp|CppFunction|DifferentiableGraph)"):
            cxrkit.attribute(network(As(lambda x: scripted_in_place(x * 1))), images, method)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_what_cannot_be_seen_is_refused_also_as_the_last_step(method, options, images):
    model = nn.Sequential(network(nn.ReLU()), As(Rectified.apply))
    with pytest.raises(AttributionError, match="layer 1 gets values from RectifiedBackward"):
        cxrkit.attribute(model, images, method, **options)


# What may be seen


def asked(x):
    assert bool((x == x).all())
    assert not torch.isnan(x).any()
    assert x.shape[1] > 0
    return (x if x.detach().abs().max() < 1e9 else x * 0).relu()


def joined(x):
    out = torch.empty_like(x)
    out = torch.cat([x[:, :2], x[:, 2:]], 1).type_as(out) + torch.zeros_like(x)
    return out.mT.mT.relu()


HARMLESS = {
    "questions": asked,
    "views, constants and types": joined,
    "a print": lambda x: (f"{x} {x.detach().mean():.2f}", x)[1].relu(),
    "a constant of the code": lambda x: x.relu() * ONE,
    "a constant made here": lambda x: x.relu() * torch.ones(1),
    "a constant from numpy, kept": lambda x: x.relu() + ZERO,
    "an operator": lambda x: torch.ops.aten.relu(x),
    "an operator's overload": lambda x: torch.ops.aten.relu.default(x),
}
ONE, ZERO = torch.ones(4, 1, 1), torch.from_numpy(np.zeros((1, 1, 1), np.float32))


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_is_harmless_changes_nothing(harmless, method, options, images):
    found = cxrkit.attribute(network(As(HARMLESS[harmless])), images, method, **options)
    same(found, cxrkit.attribute(network(nn.ReLU()), images, method, **options))


RECTIFIERS = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp by place": lambda x: x.clamp(0),
    "clip": lambda x: torch.clip(x, 0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp in place": lambda x: x.clamp_(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum of a number": lambda x: torch.maximum(torch.tensor(0.0), x),
    "max of two": lambda x: torch.max(x, torch.zeros(1)),
    "threshold": nn.Threshold(0, 0),
    "threshold in place": nn.Threshold(0, 0, inplace=True),
    "hardtanh": nn.Hardtanh(0, 1e9),
    "keyword": lambda x: F.relu(input=x, inplace=True),
    "place": lambda x: F.relu(x, True),
}


@pytest.mark.parametrize("method", ["guided_backprop", "deeplift"])
@pytest.mark.parametrize("spelling", RECTIFIERS)
def test_a_rectifier_is_one_however_it_is_written(spelling, method, images):
    layer = RECTIFIERS[spelling]
    found = cxrkit.attribute(network(layer if isinstance(layer, nn.Module) else As(layer)), images, method)
    same(found, cxrkit.attribute(network(nn.ReLU()), images, method))
    six = cxrkit.attribute(network(As(lambda x: x.clamp(0, 0.5))), images, method)
    same(six, cxrkit.attribute(network(nn.Hardtanh(0, 0.5)), images, method))


class Affine(nn.Module):
    """What guidance leaves alone, in many spellings; `layers` alone are the same function."""

    def __init__(self):
        super().__init__()
        self.norm, self.group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.register_buffer("kernel", torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel)
        x = self.group(self.norm(x)).relu()
        out = torch.zeros_like(x)
        out[:, ::2], out[:, 1::2] = x[:, 2:], x[:, :2]
        out += x.amax((2, 3), keepdim=True) + F.max_pool2d(x, 3, 1, 1)
        out.mul_(0.5)
        best, _ = x.topk(2, 1)
        return out - best.sum(1, keepdim=True) + x.max(1, keepdim=True)[0]


def test_guidance_is_autograd_with_another_relu(images):
    """Everything but the ReLUs is differentiated as torch does."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)

    class GuidedRelu(nn.Module):
        def forward(self, x):
            return Guided.apply(x)

    model = network(nn.Sequential(Affine(), nn.ReLU())).eval()
    found = cxrkit.attribute(model, images, "guided_backprop")
    twin = copy.deepcopy(model)
    twin[1], twin[3][1], twin[5] = (GuidedRelu() for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "relu", lambda x: Guided.apply(x))
        inputs = images.clone().requires_grad_()
        # `relu` within Guided.forward runs without gradient mode; the patched method must not call itself.
        patch.setattr(Guided, "forward", staticmethod(lambda ctx, x: (ctx.save_for_backward(x), F.relu(x))[1]))
        scores = twin(inputs)
        for label in range(2):
            (expected,) = torch.autograd.grad(scores[:, label].sum(), inputs, retain_graph=True)
            same(found[:, label], expected.sum(1))


@pytest.mark.parametrize(
    "parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_weights_made_in_the_forward_pass_are_constants(parametrize, method, options, images):
    model, plain = network(nn.ReLU()), network(nn.ReLU())
    parametrize(model[2])
    model.eval()
    plain[2].weight.data = model[2].weight.detach()
    same(cxrkit.attribute(model, images, method, **options), cxrkit.attribute(plain, images, method, **options))
