"""How a network is run while it is explained, which networks can't be, and that all is as before afterwards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cxrkit
from cxrkit.attribution import explain, probe, registry
from cxrkit.errors import AttributionError, ParameterError
from cxrkit.models import Classifier


class Network(nn.Module):
    """Convolutions with a batch norm between them; `forward` is what the tests vary."""

    def __init__(self, way=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.way = way

    def features(self, x):
        return self.second(self.norm(self.first(x)).relu()).relu()

    def forward(self, x):
        x = self.features(x)
        return self.head((x if self.way is None else self.way(self, x))[..., 1:, 1:].mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(3, 1, 12, 10)


def gradients(model, images):
    """Gradients of every logit, image by image, by autograd alone: [B, L, H, W]."""
    model = copy.deepcopy(model).eval()
    maps = []
    for image in images.split(1):
        inputs = image.clone().requires_grad_()
        logits = model(inputs)
        maps.append(torch.stack([torch.autograd.grad(y, inputs, retain_graph=True)[0][0, 0] for y in logits[0]]))
    return torch.stack(maps)


# How a network is run


class Viewing(Network):
    def forward(self, x):
        x = self.features(x)
        return self.head(x.view(len(x), 5, -1).mean(2))


class Named(Network):
    """Its `encode` and `classify` are its own, and `forward` does more than both."""

    def encode(self, x):
        return self.features(x).mean((2, 3))

    def classify(self, z):
        return self.head(z)

    def forward(self, x):
        return self.classify(self.encode((x - 0.5) / 0.25))


def checkpointed(reentrant):
    return Network(lambda net, x: checkpoint(lambda x: F.relu(x - 0.1), x, use_reentrant=reentrant))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
@pytest.mark.parametrize("model", [Network, Viewing, Named, lambda: checkpointed(True), lambda: checkpointed(False)])
def test_the_network_runs_as_its_user_runs_it(model, wrap, images):
    model = model()
    plain = copy.deepcopy(model)
    if model.way is not None:
        plain.way = lambda net, x: F.relu(x - 0.1)
    expected = gradients(plain, images)
    torch.testing.assert_close(cxrkit.attribute(wrap(model), images, "saliency"), expected)
    torch.testing.assert_close(cxrkit.attribute(wrap(model), images, "saliency", chunk=1), expected)


def test_layers_of_wrapped_networks_have_both_names(images):
    model = nn.DataParallel(Network())
    expected = cxrkit.attribute(model.module, images, "gradcam", layer="second")
    for name in ("second", "module.second", model.module.second):
        assert torch.equal(cxrkit.attribute(model, images, "gradcam", layer=name), expected)


def test_a_classifier_that_overrides_forward_is_explained_by_its_forward(images):
    class Doubled(Classifier):
        def forward(self, images):
            return 2 * super().forward(images)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain = cxrkit.attribute(Classifier(network, ["a", "b"]), images, "saliency")
    torch.testing.assert_close(cxrkit.attribute(Doubled(network, ["a", "b"]), images, "saliency"), 2 * plain)


def test_a_classifier_around_a_network_that_views_its_maps(images):
    class Views(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)).view(len(x), -1))

    model = Classifier(Views(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4 * 10 * 8, 2)), ["a", "b"])
    assert model(images).shape == (3, 2)
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency"), gradients(model, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [card.name for card in cxrkit.attribution.methods() if card.name != "bcos"])
def test_networks_of_half_precision_are_explained_in_single_precision(method, dtype):
    images = torch.rand(2, 1, 32, 32)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model[0].bias.data.fill_(0.0)
    model = model.to(dtype)
    options = {"first_layer": "zb", "check": False} if method == "lrp" else {}
    few = {"integrated_gradients": "n_steps", "xrai": "n_steps", "guided_ig": "n_steps", "blur_ig": "n_steps"}
    options |= {few[method]: 3} if method in few else {}
    found = cxrkit.attribute(model, images.to(dtype), method, **options)
    assert found.dtype == torch.float32
    exact = cxrkit.attribute(copy.deepcopy(model).float(), images.to(dtype).float(), method, **options)
    torch.testing.assert_close(found, exact)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("of_images", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_network", [torch.float32, torch.float64])
def test_images_are_brought_to_the_precision_of_the_network(of_network, of_images, images):
    model = Network().to(of_network)
    found = cxrkit.attribute(model, images.to(of_images), "saliency")
    assert found.dtype == torch.promote_types(of_images, torch.float32)
    expected = gradients(model.double(), images.to(of_images).double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_network_that_names_its_half_precision_is_explained_in_it(images):
    class Halved(Network):
        def forward(self, x):
            return super().forward(x.bfloat16())

    model = Halved().bfloat16()
    found = cxrkit.attribute(model, images, "saliency")
    assert found.dtype == torch.float32
    expected = gradients(copy.deepcopy(model), images)
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("squeeze", [lambda y: y[:, 0], lambda y: y[:, :1].squeeze(), lambda y: y[:, :1]])
def test_one_label_may_lack_its_axis(squeeze, images):
    class One(Network):
        def forward(self, x):
            return squeeze(super().forward(x))

    model = One()
    whole = gradients(Plain(model), images)[:, :1]
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency"), whole)
    torch.testing.assert_close(cxrkit.attribute(model, images[:1], "saliency"), whole[:1])


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return Network.forward(self.model, x)


def test_hooks_that_want_gradients_get_them(images):
    model, seen = Network(), []
    model.second.register_forward_hook(lambda module, args, output: seen.append(output.register_hook(lambda g: None)))
    for method, options in (("gradcam", {}), ("occlusion", {"window": 8}), ("scorecam", {}), ("saliency", {})):
        assert cxrkit.attribute(model, images, method, **options).isfinite().all()


# Networks that aren't a function of one image


class Counting(Network):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2)


def _clipped_batch_norm(net, x):
    """Constant, until a window is occluded, say."""
    return F.batch_norm(x, None, None, training=True).clamp(-99, -9)


REFUSED = {
    "batch statistics": (lambda: Network(lambda net, x: F.batch_norm(x, None, None, training=True)), "other images"),
    "batch statistics of a flat network": (lambda: Network(_clipped_batch_norm), "other images"),
    "detached batch statistics": (lambda: Network(lambda net, x: x - x.mean(0, keepdim=True).detach()), "other images"),
    "attention over the batch": (lambda: Network(lambda net, x: x + x.flip(0)), "other images"),
    "functional dropout": (lambda: Network(lambda net, x: F.dropout(x, 0.5)), "from call to call"),
    "random noise": (lambda: Network(lambda net, x: x + torch.randn_like(x)), "from call to call"),
    "a random shift": (lambda: Network(lambda net, x: x.roll(int(torch.randint(1, 4, ())), 3)), "from call to call"),
    "noise of numpy": (lambda: Network(lambda net, x: x * np.random.rand()), "from call to call"),  # noqa: NPY002
    "memory": (Counting, "from call to call"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", ["saliency", "occlusion", "gradcam", "integrated_gradients", "lrp"])
def test_what_is_no_function_of_one_image_is_refused(kind, method, images):
    build, cause = REFUSED[kind]
    for chunk in (None, 1):
        with pytest.raises(AttributionError, match=cause):
            cxrkit.attribute(build(), images, method, chunk=chunk)


def test_a_norm_without_statistics_is_named(images):
    model = Network()
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(AttributionError, match=r"layer norm \(BatchNorm2d without running statistics\)"):
        cxrkit.attribute(model, images, "saliency")


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LocalResponseNorm(2)])
def test_norms_of_one_image_are_a_function_of_it(norm, images):
    model = Network()
    model.norm = norm
    expected = gradients(model, images)
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency", chunk=1), expected, atol=1e-6, rtol=1e-3)


def test_a_network_is_tried_out_once_for_a_size_of_images_and_again_when_it_changes(images, monkeypatch):
    tried, original = [], probe._tried
    monkeypatch.setattr(probe, "_tried", lambda *given: tried.append(1) or original(*given))
    model = Network()
    for _ in range(3):
        cxrkit.attribute(model, images, "saliency")
    assert len(tried) == 1
    cxrkit.attribute(model, images[..., :9], "saliency")
    assert len(tried) == 2
    model.first.padding = (0, 0)
    cxrkit.attribute(model, images, "saliency")
    assert len(tried) == 3
    model.norm.track_running_stats, model.norm.running_mean, model.norm.running_var = False, None, None
    with pytest.raises(AttributionError, match="without running statistics"):
        cxrkit.attribute(model, images, "saliency")


# Errors of the network


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: {"logits": y}, r"it returned a dict with logits\. Wrap it"),
        (lambda y: (y, y), "it returned a tuple"),
        (lambda y: y.argmax(1), "it returned int64"),
        (lambda y: y[:, :, None], r"it returned float32 \[1, 3, 1\]"),
        (lambda y: 1 / 0, "stopped with ZeroDivisionError: division by zero"),
        (lambda y: y @ y, "stopped with RuntimeError: mat1 and mat2"),
        (lambda y: y.double() @ torch.eye(3), "mixes precisions"),
    ],
)
def test_what_the_network_returns_or_raises_is_told_with_a_cure(output, message, images):
    class Odd(Network):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(AttributionError, match=message):
        cxrkit.attribute(Odd(), images, "saliency")


def test_lazy_and_weightless_networks_are_named(images):
    with pytest.raises(AttributionError, match="lazy layers"):
        cxrkit.attribute(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), images, "saliency")
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(120, 3))
    with pytest.raises(AttributionError, match="meta"):
        cxrkit.attribute(model, images, "saliency")


@pytest.mark.parametrize(
    "change", [lambda x: x.to_sparse(), lambda x: torch.quantize_per_tensor(x, 0.01, 0, torch.quint8)]
)
def test_images_that_are_no_dense_tensor_are_refused(change, images):
    with pytest.raises(AttributionError, match=r"dense|floating point"):
        cxrkit.attribute(Network(), change(images), "saliency")


# One bad image or label


@pytest.fixture
def touchy(monkeypatch):
    """A method that gives the images themselves, and refuses label 1 of dark ones."""

    def touchy(explained, images):
        for row, image in enumerate(images):
            if image.mean() < 0.1 and 1 in explained.indices(3):
                raise AttributionError(f"image {explained.first_row + row} is too dark for label 1")
        return images.expand(-1, len(explained.indices(3)), -1, -1)

    card = dataclasses.replace(registry.card("saliency"), name="touchy", options=())
    monkeypatch.setitem(registry._entries, "touchy", registry.Entry(card, touchy, lambda model: True))


def test_one_bad_label_of_one_image_costs_one_map(touchy, images):
    model = Network()
    images[1] *= 0.1
    with pytest.raises(AttributionError, match="image 1 is too dark"):
        cxrkit.attribute(model, images, "touchy")
    with pytest.warns(UserWarning, match="1 maps are NaN, for instance: image 1 is too dark"):
        maps = cxrkit.attribute(model, images, "touchy", on_error="nan")
    bad = torch.zeros(3, 3, dtype=torch.bool)
    bad[1, 1] = True
    assert torch.equal(maps.isnan().all(-1).all(-1), bad)
    assert torch.equal(maps[~bad], images.expand(-1, 3, -1, -1)[~bad])
    with pytest.raises(ParameterError, match="unknown on_error 'skip'"):
        cxrkit.attribute(model, images, "touchy", on_error="skip")


def test_what_is_refused_everywhere_raises(touchy, images):
    images *= 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributionError, match="image 0 is too dark"):
            cxrkit.attribute(Network(), images, "touchy", labels=[1], on_error="nan")
        cxrkit.attribute(Network(), images, "touchy", labels=[0, 2], on_error="nan")


def test_a_refusal_is_stored_with_its_reason(touchy, images, tmp_path):
    images[1] *= 0.1
    found = explain(Network(), images, "touchy", labels=[2, 1], on_error="nan")
    assert found.refused == ((1, 1, "image 1 is too dark for label 1"),)
    again = type(found).load(found.save(tmp_path / "maps"))
    assert again.refused == found.refused
    assert again.maps[1, 1].isnan().all()
    with pytest.raises(ParameterError, match="maps must be finite"):
        dataclasses.replace(found, refused=())


# Afterwards


def deep_state(model):
    """Everything about a network that anyone could notice."""
    return [
        (
            name,
            module.training,
            {key: id(value) for key, value in vars(module).items() if key != "history"},
            [
                (key, id(p), p.data_ptr(), p.requires_grad, id(p.grad), p.stride())
                for key, p in module._parameters.items()
            ],
            [(key, id(b), b.data_ptr()) for key, b in module._buffers.items()],
            [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)],
            list(getattr(module, "history", ())),
        )
        for name, module in model.named_modules()
    ], {key: value.clone() for key, value in model.state_dict().items()}


def global_state():
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        repr(np.random.get_state()),  # noqa: NPY002
        id(torch.utils.checkpoint.CheckpointFunction),
    )


class Merging(nn.Linear):
    """Merges weights in `eval()` and takes them apart in `train()`, as LoRA layers do."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(1, inputs)), nn.Parameter(torch.randn(outputs, 1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + (0 if self.merged else F.linear(F.linear(x, self.down), self.up))


class Writing(Network):
    """Keeps what it sees, counts in a buffer, clips its weights, and touches torch's global state."""

    def __init__(self):
        super().__init__()
        self.head = Merging(5, 3)
        self.register_buffer("count", torch.zeros(()))
        self.plain, self.history, self.last = torch.zeros(1), [], None
        self.first.weight.grad = torch.ones_like(self.first.weight)
        self.second.weight.requires_grad_(False)
        self.norm.eval()

    def forward(self, x):
        self.count += 1
        self.plain += 1
        self.last = x
        self.history.append(x)
        self.first.weight.data.clamp_(-0.2, 0.2)
        torch.backends.cudnn.benchmark = True
        random.random()
        torch.rand(1)
        return super().forward(x)


OPTIONS = {"lrp": {"check": False}, "occlusion": {"window": 8}}
METHODS = ("saliency", "integrated_gradients", "gradcam", "scorecam", "occlusion", "guided_backprop", "lrp", "normgrad")


@pytest.mark.parametrize("ending", ["done", "refused", "interrupted"])
@pytest.mark.parametrize("method", METHODS)
def test_the_network_and_torch_are_left_bit_for_bit_as_they_were(method, ending, images):
    model = Writing()
    handle = model.second.register_forward_hook(lambda module, args, output: None)
    (nodes, values), surroundings, given = deep_state(model), global_state(), images.clone()
    options = dict(OPTIONS.get(method, {}))
    if ending == "interrupted":

        def stop(share):
            raise KeyboardInterrupt

        options["progress"] = stop
    with contextlib.suppress(ParameterError, KeyboardInterrupt):
        cxrkit.attribute(model, images, method, labels=[9] if ending == "refused" else None, **options)
    after, later = deep_state(model)
    assert after == nodes
    assert all(torch.equal(values[key], later[key]) for key in values)
    assert float(model.count) == float(model.plain) == 0
    assert torch.equal(model.first.weight.grad, torch.ones_like(model.first.weight))
    assert global_state() == surroundings
    assert torch.equal(images, given)
    handle.remove()


def test_networks_that_write_to_their_weights_are_explained_as_they_run(images):
    model = Writing()
    expected = gradients(model, images)  # of a copy, which clips its weights
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency"), expected)
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency"), expected)


def test_an_error_of_the_progress_function_comes_through(images):
    def stop(share):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        cxrkit.attribute(Network(), images, "integrated_gradients", progress=stop)


def test_backward_hooks_are_set_aside_and_put_back(images):
    model = Network()
    expected = gradients(model, images)
    model.second.register_full_backward_hook(lambda module, given, found: tuple(0 * g for g in given))
    hooks = dict(model.second._backward_hooks)
    torch.testing.assert_close(cxrkit.attribute(model, images, "saliency"), expected)
    cxrkit.attribute(model, images, "guided_backprop")
    assert dict(model.second._backward_hooks) == hooks


def test_dynamic_quantization_is_refused(images):
    model = torch.ao.quantization.quantize_dynamic(Network().eval(), {nn.Linear})
    for method in ("saliency", "occlusion"):
        with pytest.raises(AttributionError, match=r"layer head \(Linear\) is dynamically quantized"):
            cxrkit.attribute(model, images, method)


@pytest.mark.parametrize("method", ["saliency", "layercam", "guided_backprop"])
def test_one_image_through_an_instance_norm_is_explained_as_in_a_batch(method, images):
    model = Network()
    model.norm = nn.InstanceNorm2d(4, affine=True)
    options = {"layer": "first"} if method == "layercam" else {}
    together = cxrkit.attribute(model, images, method, **options)
    torch.testing.assert_close(cxrkit.attribute(model, images, method, chunk=1, **options), together)


class Tokens(nn.Module):
    """Hands gradients back in the order of tokens [B, N, C], as attention over positions does."""

    def forward(self, x):
        return 2 * x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("method", ["saliency", "layercam", "occlusion"])
def test_one_image_through_a_batch_norm_before_tokens_is_explained_as_in_a_batch(method, images):
    model = Network()
    model.norm = nn.Sequential(nn.BatchNorm2d(4), Tokens())
    options = (
        {"layer": "first"} if method == "layercam" else {"window": 4, "stride": 4} if method == "occlusion" else {}
    )
    together = cxrkit.attribute(model, images, method, **options)
    torch.testing.assert_close(cxrkit.attribute(model, images, method, chunk=1, **options), together)
