"""What a call must leave bit for bit as it was: the network, the images, and torch's global state."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn


def _bytes(tensor: Tensor | None):
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() and not flat.is_complex() else None


def _of_tensor(tensor: Tensor | None) -> dict:
    if not isinstance(tensor, Tensor):
        return {"object": tensor}
    if tensor.is_quantized or tensor.layout != torch.strided:
        return {"object": tensor}
    grad = tensor.grad if tensor.is_leaf else None
    return {
        "object": tensor,  # also keeps it alive, so that its id isn't given away
        "values": _bytes(tensor),
        "dtype": tensor.dtype,
        "stride": tensor.stride(),
        "address": tensor.data_ptr(),
        "requires_grad": tensor.requires_grad,
        "grad": grad,
        "grad's values": _bytes(grad),
        "hooks": dict(tensor._backward_hooks or {}) if tensor.is_leaf else None,
    }


_DICTS = ("_parameters", "_buffers", "_modules")


def _of_module(module: nn.Module) -> dict:
    found = {"class": type(module), "training": module.training}
    if isinstance(module, torch.jit.ScriptModule):
        return found | {f"parameter {n}": _of_tensor(p) for n, p in module.named_parameters(recurse=False)}
    for name, value in vars(module).items():
        if name in _DICTS:
            found |= {f"{name}: {key}": _of_tensor(item) for key, item in value.items()}
            found[name] = list(value)
        elif isinstance(value, Tensor):  # as the weight of an old weight norm, which every pass computes anew
            found[name] = {"values": _bytes(value), "dtype": value.dtype, "shape": value.shape}
        elif isinstance(value, dict):
            found[name] = dict(value)
        elif isinstance(value, (list, set)):
            found[name] = type(value)(value)
        else:
            found[name] = value
    return found


def _backend_flags() -> dict:
    backends = torch.backends
    return {
        "cudnn.enabled": backends.cudnn.enabled,
        "cudnn.benchmark": backends.cudnn.benchmark,
        "cudnn.deterministic": backends.cudnn.deterministic,
        "cudnn.conv": backends.cudnn.conv.fp32_precision,
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "mkldnn.matmul": backends.mkldnn.matmul.fp32_precision,
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warning": torch.is_deterministic_algorithms_warn_only_enabled(),
        "flash": backends.cuda.flash_sdp_enabled(),
        "memory-efficient": backends.cuda.mem_efficient_sdp_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "fast path": backends.mha.get_fastpath_enabled(),
        "nnpack": torch._C._get_nnpack_enabled(),
    }


def global_state() -> dict:
    kind, keys, place, *rest = np.random.get_state()  # noqa: NPY002  what users of numpy's old interface have
    return {
        **_backend_flags(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of numpy": (kind, keys.tobytes(), place, *rest),
        "random numbers of Python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "checkpoint function": torch.utils.checkpoint.CheckpointFunction.apply,
        "global hooks": tuple(dict(h) for h in _global_hooks()),
        "torch": {name: id(getattr(torch, name)) for name in ("relu", "sigmoid", "matmul", "where", "maximum")},
        "functional": {n: id(f) for n, f in vars(nn.functional).items() if callable(f)},
        "tensor": {n: id(f) for n, f in vars(Tensor).items() if callable(f)},
        "module": {n: id(f) for n, f in vars(nn.Module).items() if callable(f)},
    }


def _global_hooks() -> Iterator[dict]:
    module = nn.modules.module
    return (getattr(module, name) for name in vars(module) if name.startswith("_global_") and name.endswith("_hooks"))


class Before:
    """A record of everything, to be compared with what is there after a call."""

    def __init__(self, network: nn.Module, *given: object):
        self.network, self.given = network, given
        self.record = self._taken()

    def _taken(self) -> dict:
        modules = {name or "network": _of_module(m) for name, m in self.network.named_modules(remove_duplicate=False)}
        given = {f"argument {n}": _of_tensor(t) for n, t in enumerate(self.given) if isinstance(t, Tensor)}
        return {"modules": modules, "arguments": given, "torch": global_state()}

    def changes(self) -> list[str]:
        """Where something differs now."""
        return list(_differences(self.record, self._taken(), ""))


def _differences(a, b, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            gone, come = (sorted(map(str, names)) for names in (set(a) - set(b), set(b) - set(a)))
            yield f"{where}: without {gone[:3]}, with {come[:3]}" if gone or come else f"{where}: in another order"
            return
        for key in a:
            yield from _differences(a[key], b[key], f"{where} / {key}" if where else str(key))
    elif not _is_same(a, b):
        yield where


def _is_same(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, (Tensor, nn.Module)) or isinstance(b, (Tensor, nn.Module)):
        return False
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False
