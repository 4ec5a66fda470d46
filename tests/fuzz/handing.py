"""How a network is handed over: its outer form, its precision, its state, its images."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cxrkit
from fuzz.branches import Row
from fuzz.building import written
from fuzz.drawing import Draw, draw_plan
from fuzz.steps import Plan

Outputs = namedtuple("Outputs", "logits features")


@dataclass
class Case:
    """A network as a user hands it over, its images, and the plan that says what is right."""

    plan: Plan
    network: nn.Module
    images: Tensor
    dtype: torch.dtype

    @property
    def features(self) -> set[str]:
        return self.plan.features


def make_case(seed: int) -> Case:
    """The case of that seed; a second call makes one that is equal and shares nothing with the first."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # for what torch draws itself, as spectral norm does
        return _made(seed)


def _made(seed: int) -> Case:
    plan = draw_plan(seed)
    draw = Draw(seed, 1)
    dtype = draw.pick((torch.float32, torch.float64, torch.float16, torch.bfloat16), (82, 6, 6, 6))
    if dtype != torch.float32:
        plan.features.add(str(dtype).removeprefix("torch."))
    rows = written(plan, draw, dtype, draw.pick((0.0, 0.3)))
    network = _odd_forward(_outer(rows, draw, plan), draw, plan)
    network = _wrapped(network, draw, plan, dtype)
    images = _images(draw, plan, dtype)
    _state(network, draw, plan)
    if draw.chance(0.04):
        images = _unfit(images, draw, plan)
    return Case(plan, network, images, dtype)


class Stages(nn.Module):
    """Parts under names of their own, called by a forward of the user."""

    def __init__(self, rows: list[nn.Module]):
        super().__init__()
        self.features = rows[0]
        self.blocks = nn.ModuleList(rows[1:-1])
        self.head = rows[-1] if len(rows) > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Split(nn.Module):
    """Has methods `encode` and `classify` of its own, which `forward` doesn't simply chain."""

    def __init__(self, rows: list[nn.Module]):
        super().__init__()
        self.first, self.rest = rows[0], nn.Sequential(*rows[1:])

    def encode(self, x: Tensor) -> Tensor:
        return self.first(x)

    def classify(self, z: Tensor) -> Tensor:
        return self.rest(z) * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.encode(x))


class Wrapper(nn.Module):
    """A user's own wrapper, with what they need of labels."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def _outer(rows: list[nn.Module], draw: Draw, plan: Plan) -> nn.Module:
    kind = draw.pick(("row", "stages", "split"), (5, 5, 2))
    if kind == "split" and len(rows) > 1:
        plan.features.add("own encode and classify")
        return Split(rows)
    if kind == "row":
        return rows[0] if len(rows) == 1 else Row(*rows)
    return Stages(rows)


class Around(nn.Module):
    """Something done before or after the network proper."""

    def __init__(self, net: nn.Module, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor):
        if self.before is not None:
            x = self.before(self, x)
        y = self.net(x)
        return y if self.after is None else self.after(self, y)


def _counted(module: nn.Module, y: Tensor) -> Tensor:
    module.calls += 1
    return y


def _remembered(module: nn.Module, y: Tensor) -> Tensor:
    module.last, module.history = y, [*module.history, y.shape]
    return y


def _alternating(module: nn.Module, y: Tensor) -> Tensor:
    module.count += 1
    return y * (1 + module.count % 2)


_RANDOM = {
    "functional dropout in evaluation": lambda m, x: F.dropout(x, 0.4, training=True),
    "noise": lambda m, x: x + 0.1 * torch.randn_like(x),
    "random shift": lambda m, x: x.roll(int(torch.randint(1, 4, ())), 3),
}
_OUTPUTS = {
    "[B]": lambda m, y: y.squeeze(1),
    "dict": lambda m, y: {"logits": y, "features": y.detach()},
    "tuple": lambda m, y: (y, y.detach()),
    "namedtuple": lambda m, y: Outputs(y, y.detach()),
    "list": lambda m, y: [y],
}


def _odd_forward(network: nn.Module, draw: Draw, plan: Plan) -> nn.Module:
    if draw.chance(0.03):
        name = draw.pick(list(_RANDOM))
        plan.features.add(f"random: {name}")
        network = Around(network, before=_RANDOM[name])
    elif draw.chance(0.015):
        plan.features.add("random: alternating")
        network = Around(network, after=_alternating)
        network.count = 0
    if draw.chance(0.03):
        plan.features.add("counter")
        network = Around(network, after=_counted)
        network.register_buffer("calls", torch.zeros((), dtype=torch.long))
    if draw.chance(0.03):
        plan.features.add("remembers")
        network = Around(network, after=_remembered)
        network.last, network.history = None, []
    if draw.chance(0.04):
        name = draw.pick([n for n in _OUTPUTS if n != "[B]" or plan.outputs == 1])
        plan.features.add(f"outputs: {name}")
        network = Around(network, after=_OUTPUTS[name])
    return network


def _wrapped(network: nn.Module, draw: Draw, plan: Plan, dtype: torch.dtype) -> nn.Module:
    if plan.encoding is not None:
        plan.features.add("Classifier")
        labels = tuple("abcd"[: plan.outputs])
        bias = plan.logit_bias
        return cxrkit.models.Classifier(network, labels, plan.encoding.name, logit_bias=bias).to(dtype)
    kinds = ("none", "DataParallel", "wrapper", "fx", "compiled", "traced", "scripted", "quantized")
    kind = draw.pick(kinds, (84, 4, 5, 2, 0.15, 1.2, 0.8, 0.7))
    unscriptable = ("random", "outputs", "odd")
    if kind in ("fx", "traced", "scripted", "quantized") and any(f.startswith(unscriptable) for f in plan.features):
        return network
    try:
        made = _WRAPPERS[kind](network, plan, dtype)
    except Exception:  # torch can't script or trace everything
        return network
    if kind != "none":
        plan.features.add(kind)
    return made


def _traced(network: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    traced = torch.jit.trace(network.eval(), plan.images.to(dtype), check_trace=False)
    return _same(traced, network, plan, dtype)


def _same(made: nn.Module, network: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """The new form, if it does the same for one image alone."""
    one = plan.images[:1].to(dtype)
    torch.testing.assert_close(made.eval()(one.clone()), network.eval()(one.clone()))
    return made


def _quantized(network: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    if dtype != torch.float32:
        raise ValueError("of single precision alone")
    made = torch.ao.quantization.quantize_dynamic(network.eval(), {nn.Linear}, dtype=torch.qint8)
    made(plan.images.to(dtype))
    return made


_WRAPPERS = {
    "none": lambda n, p, d: n,
    "DataParallel": lambda n, p, d: nn.DataParallel(n),
    "wrapper": lambda n, p, d: Wrapper(n),
    "fx": lambda n, p, d: _same(torch.fx.symbolic_trace(n), n, p, d),
    "compiled": lambda n, p, d: torch.compile(n, backend="eager"),
    "traced": _traced,
    "scripted": lambda n, p, d: _same(torch.jit.script(n), n, p, d),
    "quantized": _quantized,
}


def _state(network: nn.Module, draw: Draw, plan: Plan) -> None:
    """Flags, gradients and hooks as they may be when a user hands the network over."""
    network.eval()
    if draw.chance(0.35):
        plan.features.add("training")
        network.train()
    elif draw.chance(0.15):
        for module in network.modules():
            module.training = draw.chance(0.5)
    parameters = list(network.parameters())
    if draw.chance(0.3):
        for parameter in parameters:
            parameter.requires_grad_(draw.chance(0.5))
    if draw.chance(0.3):
        for parameter in parameters:
            if parameter.requires_grad and draw.chance(0.5):
                parameter.grad = torch.full_like(parameter, 0.25)
    modules = [m for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]
    for _ in range(draw.pick((0, 0, 0, 1, 2))):
        if modules:
            kind = draw.pick(list(_HOOKS), (6, 3, 2, 1, 1))
            plan.features.add(f"hook: {kind}")
            _HOOKS[kind](draw.pick(modules))


def _gradient_hook(module: nn.Module, args, output) -> None:
    if isinstance(output, Tensor):
        output.register_hook(lambda gradient: None)


_HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda module, args, output: None),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, args: None),
    "keywords": lambda m: m.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(lambda module, into, out: None),
    "needs gradients": lambda m: m.register_forward_hook(_gradient_hook),
}


def _images(draw: Draw, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The images in some precision and memory layout; the plan's become what they really hold."""
    kind = torch.float32
    if dtype != torch.float32 and draw.chance(0.5):
        kind = dtype
    elif draw.chance(0.04):
        kind = draw.pick((torch.float64, torch.float16, torch.bfloat16))
    if kind != torch.float32:
        plan.features.add(f"images {str(kind).removeprefix('torch.')}")
    images = plan.images.to(kind)
    plan.images = images.double()
    layout = draw.pick(("plain", "channels_last", "strided", "expanded", "graph"), (80, 5, 5, 3, 5))
    if layout != "plain":
        plan.features.add(f"images {layout}")
    if layout == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return images.repeat_interleave(2, 3)[..., ::2]
    if layout == "expanded":
        plan.images = plan.images[:1].expand_as(plan.images).clone()
        return images[:1].expand_as(images)
    return images.clone().requires_grad_() if layout == "graph" else images


def _unfit(images: Tensor, draw: Draw, plan: Plan) -> Tensor:
    name = draw.pick(list(_UNFIT))
    plan.features.add(f"unfit images: {name}")
    return _UNFIT[name](images.detach().clone())


def _with(value: float):
    def f(images: Tensor) -> Tensor:
        images[-1, 0, 2, 3] = value
        return images

    return f


_UNFIT = {
    "NaN": _with(float("nan")),
    "infinite": _with(float("inf")),
    "channels": lambda x: torch.cat([x, x, x, x], 1),
    "integers": lambda x: (255 * x).to(torch.uint8),
    "none": lambda x: x[:0],
    "three dimensions": lambda x: x[0],
    "array": lambda x: x.float().numpy(),
    "complex": lambda x: x.to(torch.complex64),
}
