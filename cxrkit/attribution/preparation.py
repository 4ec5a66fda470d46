"""The state in which a network is explained, and the way back to the one in which it was found."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cxrkit.errors import AttributionError

__all__ = ["Snapshot", "as_found", "explanation_mode", "working_weights"]


@contextmanager
def as_found(model: nn.Module, device: torch.device) -> Iterator[Snapshot]:
    """Evaluation mode, ordinary gradients, frozen weights, full precision; then everything is as before, bit for bit.

    Modules (training flags, attributes, hooks, buffers), weights (`requires_grad`, `.grad`) and torch's global state
    are put back, also after an error or an interruption. Flags are set, not `train()` called: layers such as LoRA's
    change their weights there. Frozen weights save the backward passes their share of the work. Activation
    checkpoints are plain calls, and compiled parts run as they were written, so that forward hooks and rules see every
    layer; backward hooks are set aside.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(_restored_settings(device))
        for module in modules:
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
        before = Snapshot(modules)
        stack.callback(before.restore)
        if any(nn.parameter.is_lazy(tensor) for tensor, _, _ in before.tensors):
            raise AttributionError("the network has lazy layers that have no weights yet; run it once on an image")
        if any(tensor.is_meta for tensor, _, _ in before.tensors):
            raise AttributionError("the network's weights are on the device 'meta', without values; load them first")
        for module in modules:
            module._backward_hooks.clear()  # they change or watch gradients, not the function that is explained
            module._backward_pre_hooks.clear()
        for tensor, _, _ in before.tensors:
            if tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(explanation_mode(model, False))
        stack.enter_context(_plain_checkpoints())
        if "torch._dynamo" in sys.modules:  # importing it for nothing takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device.type == "cuda":
            stack.enter_context(_ieee_convolutions())
        yield before


@contextmanager
def working_weights(
    tensors: list[tuple[Tensor, Tensor, bool]],
    memory_format: torch.memory_format | None,
    dtype: torch.dtype | None,
    copies: bool,
) -> Iterator[None]:
    """Weights in the order in which convolutions are fastest and in the precision `dtype`, where half precision is
    too coarse; back to their own storage afterwards. `tensors` as `Snapshot` has them.

    Buffers, and with `copies` the weights, are copied: what the network writes into them while it runs is forgotten.
    """
    replaced = []
    try:
        for tensor, values, is_weight in tensors:
            data = values.to(dtype) if dtype is not None and values.dtype in _HALF else values
            if memory_format is not None and data.ndim == 4:
                data = data.contiguous(memory_format=memory_format)
            if data is values or data.data_ptr() == values.data_ptr():
                if is_weight and not copies:
                    continue
                data = values.clone()
            replaced.append((tensor, values))
            tensor.data = data
        yield
    finally:
        for tensor, values in replaced:
            tensor.data = values


@contextmanager
def explanation_mode(model: nn.Module, active: bool) -> Iterator[None]:
    """Switch the explanation mode of B-cos layers (scales detached) on or off, and back to what each layer had."""
    name = "set_explanation_mode"
    layers = [m for m in model.modules() if name in vars(m) or callable(getattr(type(m), name, None))]
    before = [getattr(layer, "detach", False) is True for layer in layers]
    try:
        for layer in layers:
            layer.set_explanation_mode(active)
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.set_explanation_mode(mode)


class Snapshot:
    """A network as it is now: the attributes of every module with what is in the containers among them, however deep,
    and every tensor's storage, `requires_grad` and `.grad`. Values of tensors are kept by `working_weights`.

    `tensors`: weights, buffers and tensors that are plain attributes of a module, each once, with its values and
    whether it is a weight. `fingerprint`: everything but weights that decides how a network runs: its modules, their
    simple attributes, their hooks.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._contents: list[tuple] = []  # containers with their items
        self._empty: list = []  # containers without, most of all, such as of hooks
        tensors: list[Tensor] = []
        simple: list[object] = []
        containers: list = []
        for module in modules:
            attributes = vars(module)
            self._contents.append((attributes, dict(attributes)))
            simple.append(id(module))
            simple.extend(attributes)
            simple.extend([tuple(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks])
            for held in (module._parameters, module._buffers):
                tensors.extend([tensor for tensor in held.values() if tensor is not None])
            for value in attributes.values():
                kind = type(value)
                if kind in _SIMPLE:
                    simple.append(value)
                elif kind in _CONTAINERS:
                    (containers if value else self._empty).append(value)
                elif kind is tuple and _SIMPLE.issuperset(map(type, value)):
                    simple.append(value)
                elif isinstance(value, Tensor):
                    tensors.append(value)
                elif isinstance(value, (int, float, str)):
                    simple.append(value)
                elif isinstance(value, _CONTAINERS):
                    containers.append(value)
        self._add(containers)
        self.fingerprint = tuple(simple)
        tensors = {id(tensor): tensor for tensor in tensors}.values()
        self.tensors = [(t, t.data, type(t) is not Tensor and isinstance(t, nn.Parameter)) for t in tensors]
        self._gradients = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]

    def _add(self, waiting: list) -> None:
        seen = set()
        while waiting:
            container = waiting.pop()
            if id(container) not in seen:
                seen.add(id(container))
                items = dict(container) if isinstance(container, dict) else list(container)
                self._contents.append((container, items))
                within = items.values() if isinstance(items, dict) else items
                waiting.extend([item for item in within if isinstance(item, _CONTAINERS)])

    def restore(self) -> None:
        """Put all back; written only where something has changed: another thread may be using the network."""
        for tensor, values, _ in self.tensors:
            tensor.data = values
        for tensor, trainable, gradient in self._gradients:
            if tensor.requires_grad != trainable:
                tensor.requires_grad_(trainable)
            if tensor.grad is not gradient:
                tensor.grad = gradient
        for container in filter(None, self._empty):
            container.clear()
        for container, items in self._contents:
            if not _has(container, items):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(items)


_HALF = (torch.float16, torch.bfloat16)
_SIMPLE = {bool, int, float, str, type(None)}
_CONTAINERS = (dict, OrderedDict, list, set, deque)


def _has(container, items: dict | list) -> bool:
    """Whether these very items, in this order, are in the container."""
    if len(container) != len(items) or not all(map(operator.is_, container, items)):
        return False
    return not isinstance(container, dict) or all(map(operator.is_, container.values(), items.values()))


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Checkpointed functions run once and keep what they compute: rules and hooks would miss what is recomputed."""

    class Plain:
        apply = staticmethod(lambda function, preserve, *args: function(*args))

    def nothing(*args, **kwargs):
        yield

    plain = {"CheckpointFunction": Plain, "_checkpoint_without_reentrant_generator": nothing}
    module = vars(torch.utils.checkpoint)
    before = {name: module[name] for name in plain if name in module}
    try:
        module.update({name: plain[name] for name in before})
        yield
    finally:
        module.update(before)


def _attribute(owner: object, name: str) -> tuple[Callable, Callable]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


# How each global setting that a network's code might change is read and written.
_SETTINGS: tuple[tuple[Callable, Callable], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    (random.getstate, random.setstate),
)


@contextmanager
def _restored_settings(device: torch.device) -> Iterator[None]:
    """Global settings of torch, and the states of all random generators."""
    before = [read() for read, _ in _SETTINGS]
    drawn, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device], device_type=device.type) if device.type == "cuda" else nullcontext():
        try:
            yield
        finally:
            for (read, write), value in zip(_SETTINGS, before, strict=True):
                if read() != value:
                    write(value)
            torch.set_rng_state(drawn)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _ieee_convolutions() -> Iterator[None]:
    # TensorFloat-32 keeps ten bits: contributions would no longer add up to their logit.
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "ieee"
        yield
    finally:
        convolutions.fp32_precision = before
