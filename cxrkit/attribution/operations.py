"""A network run with some of its operations replaced: how methods with backward rules of their own work.

Every call of torch that a network makes passes by here, whether a module or a function makes it, however often
one module is used. So a rule can't be missed by a functional ReLU, nor meet the wrong activation of a shared
module, and no hook or copy of the network is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from cxrkit.errors import AttributionError

__all__ = ["Call", "replaced", "tensors"]


@dataclass(frozen=True)
class Call:
    """One call of torch: its plain name ("relu" for `torch.relu_` and `F.relu` alike), the layer that makes it,
    and the original.
    """

    name: str
    layer: str
    function: Callable

    def original(self, *args, **kwargs):
        """What the network would have computed itself, out of place where the call was in place."""
        if _works_in_place(self.function, args, kwargs):
            args = tuple(a.clone() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(args))
        return self.function(*args, **{**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)


Rule = Callable[..., object]  # (call, *args, **kwargs) -> what the call returns


@contextmanager
def replaced(model: nn.Module, rules: Mapping[str, Rule], otherwise: Rule | None = None) -> Iterator[None]:
    """Within the context, calls named in `rules` that see a tensor in need of a gradient are made by the rule.

    `otherwise` gets every other call on such a tensor that isn't a mere question about it (shape, device);
    None leaves them alone. A replaced call never works in place; AttributionError where the network goes on
    with the tensor that it thinks changed, and for scripted modules, whose calls can't be seen.
    """
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise AttributionError(
            f"layer {scripted or 'network'} is a TorchScript module, whose operations can't be given rules; "
            "pass the network as it was before torch.jit"
        )
    running: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(_entering(running, name)).remove)
            stack.callback(module.register_forward_hook(_leaving(running), always_call=True).remove)
        stack.enter_context(_Replacing(running, rules, otherwise))
        yield


def tensors(values) -> Iterator[Tensor]:
    """All tensors among the arguments of a call, also within lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


class _Replacing(TorchFunctionMode):
    def __init__(self, running: list[str], rules: Mapping[str, Rule], otherwise: Rule | None):
        super().__init__()
        self.running, self.rules, self.otherwise = running, rules, otherwise
        self.stale = WeakIdKeyDictionary()  # tensors that the network changed in place and we didn't

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not args and isinstance(kwargs.get("input"), Tensor):  # rules take their tensor by position
            args = (kwargs.pop("input"),)
        given = list(tensors((*args, *kwargs.values())))
        name = plain_name(function)
        if name is None or not any(t.requires_grad for t in given):
            return function(*args, **kwargs)
        call = Call(name, self.running[-1] if self.running else "", function)
        self._refuse_stale(call, given)
        rule = self.rules.get(name, self.otherwise)
        if rule is None:
            return function(*args, **kwargs)
        in_place = _works_in_place(function, args, kwargs)
        result = rule(call, *args, **kwargs)
        if in_place and args and isinstance(args[0], Tensor) and result is not args[0]:
            for changed in (args[0], args[0]._base):
                if changed is not None:
                    self.stale[changed] = name
        return result

    def _refuse_stale(self, call: Call, given: list[Tensor]) -> None:
        for tensor in given:
            if tensor in self.stale:
                raise AttributionError(
                    f"layer {call.layer or 'network'} goes on with a tensor that {self.stale[tensor]} changed in "
                    "place; write it out of place, for instance x = torch.relu(x)"
                )


def plain_name(function: Callable) -> str | None:
    """ "add" for `torch.add`, `Tensor.add_`, `+` and `+=` alike; None for a question about a tensor."""
    name = getattr(function, "__name__", "")
    if name == "__get__" or name in _QUESTIONS:
        return None
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return _OPERATORS.get(name, name)
    return name[:-1] if name.endswith("_") else name


_QUESTIONS = {"dim", "size", "numel", "is_floating_point", "is_complex", "stride", "is_contiguous", "__len__", "type"}
_QUESTIONS |= {"get_device", "element_size", "ndimension", "requires_grad_", "__set__", "is_inference", "register_hook"}
_OPERATORS = {"radd": "add", "iadd": "add", "rsub": "rsub", "isub": "sub", "rmul": "mul", "imul": "mul"}
_OPERATORS |= {"truediv": "div", "itruediv": "div", "rtruediv": "rdiv", "rdiv": "rdiv"}


def _in_place_name(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__"}


def _works_in_place(function: Callable, args: tuple, kwargs: dict) -> bool:
    if _in_place_name(function) or kwargs.get("inplace") is True:
        return True
    position = _INPLACE_POSITION.get(getattr(function, "__name__", ""))
    return position is not None and len(args) > position and args[position] is True


# Where `inplace` stands among the arguments of functions that take it.
_INPLACE_POSITION = {"relu": 1, "silu": 1, "relu6": 1, "mish": 1, "hardswish": 1, "elu": 2, "leaky_relu": 2}
_INPLACE_POSITION |= {"hardtanh": 3, "dropout": 3, "threshold": 3, "selu": 1, "celu": 2, "hardsigmoid": 1}


def _entering(running: list[str], name: str):
    def hook(module, args):
        running.append(name)

    return hook


def _leaving(running: list[str]):
    def hook(module, args, output):
        running.pop()

    return hook
