"""The state in which a network is explained, and the way back to the one in which it was found."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cxrkit.errors import AttributionError

__all__ = ["as_found", "explanation_mode", "working_weights"]


@contextmanager
def as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, ordinary gradients, frozen weights, full precision; then everything is as before, bit for bit.

    Modules (training flags, attributes, hooks, buffers), weights (`requires_grad`, `.grad`) and torch's global state
    are put back, also after an error or an interruption. Flags are set, not `train()` called: layers such as LoRA's
    change their weights there. Frozen weights save the backward passes their share of the work. Activation
    checkpoints are plain calls, and compiled parts run as they were written, so that forward hooks and rules see every
    layer; backward hooks are set aside.
    """
    modules = list(model.modules())
    tensors = _tensors(modules)
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise AttributionError("the network has lazy layers that have no weights yet; run it once on an image")
    if any(t.is_meta for t in tensors):
        raise AttributionError("the network's weights are on the device 'meta', without values; load them first")
    with ExitStack() as stack:
        stack.enter_context(_restored_settings(device))
        stack.enter_context(_restored_modules(modules))
        stack.enter_context(_restored_tensors(tensors))
        for module in modules:
            if module.training:
                module.training = False
            module._backward_hooks.clear()  # they change or watch gradients, not the function that is explained
            module._backward_pre_hooks.clear()
        for tensor in tensors:
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
        yield


@contextmanager
def working_weights(
    model: nn.Module, memory_format: torch.memory_format | None, dtype: torch.dtype | None, copies: bool
) -> Iterator[None]:
    """Weights in the order in which convolutions are fastest and in the precision `dtype`, where half precision is
    too coarse; back to their own storage afterwards.

    Buffers, and with `copies` the weights, are copied: what the network writes into them while it runs is forgotten.
    """
    held = [(tensor, tensor.data, isinstance(tensor, nn.Parameter)) for tensor in _tensors(model.modules())]
    try:
        for tensor, values, is_weight in held:
            data = values.to(dtype) if dtype is not None and _is_half(values) else values
            if data.ndim == 4 and memory_format is not None:
                data = data.contiguous(memory_format=memory_format)
            if data is values or data.data_ptr() == values.data_ptr():
                data = values.clone() if copies or not is_weight else values
            tensor.data = data
        yield
    finally:
        for tensor, values, _ in held:
            tensor.data = values


@contextmanager
def explanation_mode(model: nn.Module, active: bool) -> Iterator[None]:
    """Switch the explanation mode of B-cos layers (scales detached) on or off, and back to what each layer had."""
    layers = [m for m in model.modules() if callable(getattr(m, "set_explanation_mode", None))]
    before = [getattr(layer, "detach", False) is True for layer in layers]
    try:
        for layer in layers:
            layer.set_explanation_mode(active)
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.set_explanation_mode(mode)


def _is_half(values: Tensor) -> bool:
    return values.dtype in (torch.float16, torch.bfloat16)


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights, buffers and tensors that are plain attributes of a module, each once."""
    found = {}
    for module in modules:
        for held in (module._parameters, module._buffers, vars(module)):
            found |= {id(value): value for value in held.values() if isinstance(value, Tensor)}
    return list(found.values())


_CONTAINERS = (dict, list, set, deque)


@contextmanager
def _restored_modules(modules: list[nn.Module]) -> Iterator[None]:
    """Attributes of every module, and what is in the containers among them, however deep."""
    flags = [module.training for module in modules]
    held = [(vars(module), dict(vars(module))) for module in modules]
    containers = [v for _, values in held for v in values.values() if isinstance(v, _CONTAINERS)]
    empty, waiting, seen = [], containers, set()
    while waiting:
        value = waiting.pop()
        if not value:  # as most hooks are
            empty.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            items = dict(value) if isinstance(value, dict) else list(value)
            held.append((value, items))
            within = items.values() if isinstance(value, dict) else items
            waiting.extend(v for v in within if isinstance(v, _CONTAINERS))
    try:
        yield
    finally:
        for container in empty:
            if container:
                container.clear()
        for container, before in held:
            _put_back(container, before)
        for module, flag in zip(modules, flags, strict=True):  # of scripted modules, which aren't attributes
            if module.training != flag:
                module.training = flag


def _put_back(container, before: dict | list) -> None:
    """Write only where something has changed: another thread may be using the network."""
    same = len(container) == len(before)
    if isinstance(container, dict):
        if not same or any(container.get(key, container) is not value for key, value in before.items()):
            container.clear()
            container.update(before)
    elif not same or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


@contextmanager
def _restored_tensors(tensors: list[Tensor]) -> Iterator[None]:
    """Storage, `requires_grad` and `.grad` of every tensor; values are kept by `working_weights`."""
    held = [(t, t.data, t.requires_grad, t.grad if t.is_leaf else None) for t in tensors]
    try:
        yield
    finally:
        for tensor, values, trainable, gradient in held:
            tensor.data = values
            if tensor.is_leaf:
                if tensor.requires_grad != trainable:
                    tensor.requires_grad_(trainable)
                if tensor.grad is not gradient:
                    tensor.grad = gradient


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
