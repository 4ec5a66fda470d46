"""A device that isn't there: tensors that act as if they lay on one, on machines that have none."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("xpu", 0)
_PLACES = {Tensor.__getitem__, Tensor.__setitem__}  # which may be named by tensors on the CPU


class Elsewhere(Tensor):
    """A tensor on the other device: it computes with its like and with single numbers, and NumPy can't read it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            return DEVICE
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; use Tensor.cpu() first")
        if func == Tensor.cpu or (func == Tensor.to and any(map(_here, args[1:]))):
            return func(args[0].as_subclass(Tensor), *args[1:], **kwargs or {})
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
        if func not in _PLACES and any(not isinstance(each, Elsewhere) and each.ndim for each in given):
            raise RuntimeError(f"{func} met tensors on {DEVICE} and on the CPU")
        return super().__torch_function__(func, types, args, kwargs or {})


class SecondDevice(TorchFunctionMode):
    """Within the context tensors and modules can be moved to `DEVICE`, and tensors be made there."""

    def __enter__(self):
        own = nn.Module.to
        self.modules = mock.patch.object(
            nn.Module, "to", lambda module, *to, **more: moved(module) if to == (DEVICE,) else own(module, *to, **more)
        )
        self.modules.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.modules.stop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.to and any(map(_there, (*args[1:], *kwargs.values()))):
            like = [each if isinstance(each, torch.dtype) else getattr(each, "dtype", None) for each in args[1:]]
            kind = next((each for each in like if each is not None), args[0].dtype)
            return args[0].to(kind).as_subclass(Elsewhere)
        if _there(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).as_subclass(Elsewhere)
        return func(*args, **kwargs)


def _here(goal) -> bool:
    return type(goal) is Tensor or (isinstance(goal, (str, torch.device)) and str(goal) == "cpu")


def _there(goal) -> bool:
    return isinstance(goal, Elsewhere) or (isinstance(goal, torch.device) and goal == DEVICE)


def moved(model: nn.Module) -> nn.Module:
    """The model itself, its weights and buffers on the device that isn't there."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.detach().as_subclass(Elsewhere), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.as_subclass(Elsewhere)
    return model
