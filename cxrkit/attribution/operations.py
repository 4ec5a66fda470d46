"""A network run with some of its operations replaced: how methods with backward rules of their own work.

Every call of torch that a network makes passes by here, whether a module or a function makes it, however often
one module is used. So a rule can't be missed by a functional ReLU, nor meet the wrong activation of a shared
module, and no hook or copy of the network is needed. What passes by elsewhere (an autograd function of the network's
own, a scripted function, an operator in C++, NumPy) is found by what it leaves behind: a step in the graph that no
call made, or a tensor that nobody has seen. So is a path from the image that carries no gradient. All are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from cxrkit.errors import AttributionError
from cxrkit.yaml_files import read_yaml

__all__ = ["OPERATIONS", "Call", "nonlinearity", "plain_name", "tensors", "traced"]


def _split(value):
    return {k: _split(v) for k, v in value.items()} if isinstance(value, dict) else tuple(value.split())


OPERATIONS = _split(read_yaml(Path(__file__).with_name("operations.yaml")))  # plain names by section and kind


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
        if _changed(self.function, args, kwargs) is not None:
            args = tuple(a.clone() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(args))
        return self.function(*args, **{**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)


Rule = Callable[..., object]  # (call, *args, **kwargs) -> what the call returns


def traced(
    model: nn.Module,
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    rule: Rule,
    *,
    cuts: bool = False,
    constants: WeakIdKeyDictionary | None = None,
    again: bool = True,
) -> tuple[Tensor, WeakIdKeyDictionary]:
    """Logits `network(inputs)` with calls made by the rule, and all constants that went into them.

    `rule` gets every call that sees a tensor in need of a gradient and isn't a mere question about it (shape, device,
    whether it is greater than another). A replaced call never works in place. AttributionError where the network goes
    on with the tensor that it thinks changed, where a tensor comes from an operation that can't be seen, where values
    that were cut off from their gradient go into the signal again (unless `cuts`), and for scripted modules.

    A constant that no call made was there before or comes from the image on a hidden path. A second run tells these
    apart: `constants` are those of the first, and AttributionError is raised for one that isn't among them. The second
    run is made here where it is needed, unless the caller makes it (`again`).
    """
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise AttributionError(
            f"layer {scripted or 'network'} is a TorchScript module, whose operations can't be given rules; "
            "pass the network as it was before torch.jit"
        )
    mode = _Replacing(model, rule, cuts, constants)
    mode.made[inputs] = True
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(mode.entering(name)).remove)
            stack.callback(module.register_forward_hook(mode.leaving(name), always_call=True).remove)
        stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED))
        stack.enter_context(mode)
        logits = network(inputs)
        mode.check("", logits)
    if again and constants is None and mode.unknown:
        traced(model, network, inputs, rule, cuts=cuts, constants=mode.made)
    return logits, mode.made


def tensors(values) -> Iterator[Tensor]:
    """All tensors among the arguments of a call, also within lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def nonlinearity(call: Call, args: tuple, kwargs: dict) -> str | None:
    """Why a call isn't known to be linear in what depends on the image, as words behind its name; None where it is."""
    linear = OPERATIONS["linear"]
    if call.name in linear["jointly"]:
        return None
    if call.name not in linear["factors"] or kwargs.get("rounding_mode"):
        return ""
    added = call.name in linear["added"]
    factors = [t for t in tensors((*args[added:], *kwargs.values())) if t.requires_grad]
    if len(factors) > 1:
        return "of two tensors that both depend on the image, as in squeeze-and-excitation"
    if call.name in linear["only_in_first"] and factors and factors[0] is not args[0]:
        return "of a constant by a tensor that depends on the image"
    if call.name == "batch_norm" and kwargs.get("training", args[5] if len(args) > 5 else False):
        return "by the statistics of the images themselves"
    return None


class _Replacing(TorchFunctionMode):
    def __init__(self, model: nn.Module, rule: Rule, cuts: bool, constants: WeakIdKeyDictionary | None):
        super().__init__()
        self.rule, self.cuts, self.constants = rule, cuts, constants
        self.running: list[str] = []
        self.weights = {id(values) for values in (*model.parameters(), *model.buffers())}
        self.stale = WeakIdKeyDictionary()  # tensors that the network changed in place and we didn't
        self.made = WeakIdKeyDictionary()  # tensors without a history that calls returned
        self.cut = WeakIdKeyDictionary()  # values of the image without gradient; whether they share its memory
        self.unknown = False  # whether there were constants that no call made
        self._mark = object()  # on each step of the graph that a call made; graphs of other runs have others

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not args and isinstance(kwargs.get("input"), Tensor):  # rules take their tensor by position
            args = (kwargs.pop("input"),)
        given = list(tensors((*args, *kwargs.values())))
        name = plain_name(function)
        if name is None or not given:
            return self._noted(function(*args, **kwargs), [])
        call = Call(_of_two(name, args), self.running[-1] if self.running else "", function)
        if call.name in ("maximum", "minimum") and len(args) == 2 and not args[0].requires_grad:
            args = args[::-1]  # rules take what depends on the image first
        for tensor in given:
            self._check_origin(call.layer, tensor)
        changed = _changed(function, args, kwargs)
        varying = [t for t in given if t.requires_grad]
        cut = [t for t in given if t in self.cut]
        shaped = name in _SHAPED and not (given[1:] and (cut or any(t.requires_grad for t in given[1:])))
        if shaped or not (varying or cut):
            return self._noted(function(*args, **kwargs), [changed])
        if not varying or name in _CUTTING or not torch.is_grad_enabled():
            return self._cut_off(call, args, kwargs, varying, changed)
        if cut and not self.cuts:
            raise AttributionError(
                f"layer {call.layer or 'network'}: {call.name} joins the signal with values that the network computed "
                "from the image without gradient (comparison, detach, no_grad), which no rule can follow; write an "
                "activation as torch has it, for instance torch.relu(x), or use integrated_gradients"
            )
        result = self.rule(call, *args, **kwargs)
        if changed is not None and result is not None and result is not changed:
            for tensor in (changed, changed._base):
                if tensor is not None:
                    self.stale[tensor] = call.name
            changed = None
        return self._noted(self._no_number(call, result), [changed], varying)

    def entering(self, name: str):
        return lambda module, args: self.running.append(name)

    def leaving(self, name: str):
        def hook(module, args, output):
            if self.running and self.running[-1] == name:  # not where another hook failed before ours
                self.running.pop()
            self.check(name, output)

        return hook

    def check(self, layer: str, values) -> None:
        """Raise AttributionError where a tensor that leaves a layer comes from an operation that can't be seen."""
        for tensor in tensors([values]):
            if tensor.grad_fn is not None:
                self._check_origin(layer, tensor)

    def _check_origin(self, layer: str, tensor: Tensor) -> None:
        layer = f"layer {layer or 'network'}"
        if self.stale and tensor in self.stale:
            raise AttributionError(
                f"{layer} goes on with a tensor that {self.stale[tensor]} changed in place; write it out of place, for "
                "instance x = torch.relu(x)"
            )
        step = tensor.grad_fn
        if step is not None:
            if step.metadata.get(_MADE) is not self._mark:
                raise AttributionError(
                    f"{layer} gets values from {step.name()}, made by an operation that can't be seen: an autograd "
                    "function of the network's own, a scripted or compiled function, an operator in C++, a backward "
                    "hook of a layer, a view of what was changed in place. Write it with torch's own operations, "
                    "remove the hook, or use integrated_gradients"
                )
        elif id(tensor) not in self.weights and tensor not in self.made and tensor not in self.cut:
            if self.constants is not None and tensor not in self.constants:
                raise AttributionError(
                    f"{layer} uses a tensor {list(tensor.shape)} that the network makes anew for each image by an "
                    "operation that can't be seen (a scripted function, NumPy); make it with torch's own operations, "
                    "or register a constant as a buffer"
                )
            self.unknown = self.made[tensor] = True

    def _cut_off(self, call: Call, args: tuple, kwargs: dict, varying: list, changed: Tensor | None):
        """The call itself; what it returns or changes has lost its gradient on the way from the image."""
        memory = {_memory(t) for t in (*varying, *(t for t in self.cut if self.cut[t]))}
        if changed is not None and call.name not in ("detach", "requires_grad") and _memory(changed) in memory:
            raise AttributionError(
                f"layer {call.layer or 'network'}: {call.name} changes the signal in place behind the back of its "
                "gradient (detach, data, no_grad), which no rule can follow; write it out of place with its gradient"
            )
        result = self._no_number(call, call.function(*args, **kwargs))
        for tensor in (*tensors([result]), *_with_base(changed)):
            if not tensor.requires_grad:
                self.cut[tensor] = _memory(tensor) in memory
        return result

    def _noted(self, result, changed: list[Tensor | None], varying: list = ()):
        """The result, with its tensors and those that were changed in place known to come from a call."""
        for tensor in (*tensors([result]), *(t for c in changed for t in _with_base(c))):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata[_MADE] = self._mark
            elif varying and not tensor.requires_grad:
                self.cut[tensor] = False
            else:
                self.made[tensor] = True
        return result

    def _no_number(self, call: Call, result):
        if isinstance(result, (bool, str, type(None))) or any(True for _ in tensors([result])):
            return result
        raise AttributionError(
            f"layer {call.layer or 'network'}: {call.name} reads numbers out of the signal, where no rule can follow; "
            "leave them in tensors, or use integrated_gradients"
        )


def plain_name(function: Callable) -> str | None:
    """ "add" for `torch.add`, `Tensor.add_`, `+` and `+=` alike; None for a question about a tensor."""
    name = getattr(function, "__name__", "").split(".")[0]  # "relu.default" of torch.ops.aten
    if name in ("__get__", "__set__"):
        attribute = getattr(function.__self__, "__name__", "")
        return attribute if attribute in _ATTRIBUTES else None
    if name in _QUESTIONS:
        return None
    if name == "batch_norm" and function is not torch.nn.functional.batch_norm:
        return "torch.batch_norm"  # its arguments come in another order
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    elif name.endswith("_"):
        name = name[:-1]
    return _OTHER_NAMES.get(name, name)


_MADE = "cxrkit"
_HOOKED = (
    "the network keeps or recomputes its activations by hooks on saved tensors (activation checkpointing), so that the "
    "backward pass would not follow the rules; switch that off"
)
_QUESTIONS, _ATTRIBUTES = OPERATIONS["calls"]["questions"], OPERATIONS["calls"]["attributes"]
_SHAPED, _CUTTING = OPERATIONS["calls"]["shaped"], OPERATIONS["calls"]["cutting"]
_OTHER_NAMES = {other: name for name, others in OPERATIONS["calls"]["other_names"].items() for other in others}


def _of_two(name: str, args: tuple) -> str:
    """ "maximum" for a `torch.max` of two tensors."""
    return f"{name}imum" if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor) else name


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _with_base(changed: Tensor | None) -> tuple[Tensor, ...]:
    return () if changed is None else (changed,) if changed._base is None else (changed, changed._base)


def _changed(function: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that a call changes in place, if any."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    name = getattr(function, "__name__", "").split(".")[0]
    position = _INPLACE_POSITION.get(name, len(args))
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    in_place = in_place or kwargs.get("inplace") is True or (position < len(args) and args[position] is True)
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


_IN_PLACE = OPERATIONS["calls"]["in_place"]
_INPLACE_POSITION = {name: i for i, names in OPERATIONS["calls"]["inplace_position"].items() for name in names}
