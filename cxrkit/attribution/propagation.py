"""Rules by which relevance passes back through the operations of a network.

The network runs as it is, with each of its operations replaced by one that computes the same value and whose
backward pass carries relevance instead of gradients. Automatic differentiation does the rest: it adds up where a
tensor is used twice, and cuts relevance into slices where tensors were concatenated. What has no rule is refused.

Copies, slices and the winners of a max-pool pass relevance on as they pass gradients. Activation functions, batch
norm with fixed statistics, and constants added or multiplied pass it unchanged. Sums and averages share it out in
proportion to their terms, signed or by size. A gate (what comes out of a sigmoid and multiplies a signal) gets none.
Layers with weights share it out as the method says. Source: paper `relevance`; Bach et al. 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from cxrkit.attribution.operations import OPERATIONS, Call, tensors
from cxrkit.errors import AttributionError

__all__ = ["Back", "Layer", "Propagation", "Shares", "last_rules", "reciprocal"]

Back = Callable[[Tensor], Tensor]  # relevance of an operation's values -> relevance of its input
Term = tuple[int, Callable[[Tensor], Tensor], Tensor]  # sign, linear map, its input


@dataclass(frozen=True)
class Layer:
    """A call of an operation with weights: input, weights and values, and what it makes of such without its bias."""

    name: str
    operation: str  # "conv2d", "linear"
    input: Tensor
    weight: Tensor
    value: Tensor  # with the bias
    apply: Callable[[Tensor, Tensor], Tensor]

    def contributions(self) -> Shares:
        """All contributions to the values."""
        return Shares((1, lambda x: self.apply(x, self.weight), self.input))

    def signed_terms(self, sign: int) -> list[Term]:
        """The contributions of one sign (1 or -1): of positive inputs, and of negative ones where there are any."""
        same, other = self.weight.clamp(min=0), self.weight.clamp(max=0)
        if sign < 0:
            same, other = other, same
        if self.input.min() >= 0:  # behind a ReLU: half the work
            return [(1, lambda x: self.apply(x, same), self.input)]
        return [
            (1, lambda x: self.apply(x, same), self.input.clamp(min=0)),
            (1, lambda x: self.apply(x, other), self.input.clamp(max=0)),
        ]

    def box_contributions(self, low: Tensor, high: Tensor) -> Shares:
        """x w - l w+ - h w-: at least 0 for every input in [l, h] (z^B rule; Montavon et al. 2017)."""
        up, down = self.weight.clamp(min=0), self.weight.clamp(max=0)
        return Shares(
            (1, lambda x: self.apply(x, self.weight), self.input),
            (-1, lambda x: self.apply(x, up), low),
            (-1, lambda x: self.apply(x, down), high),
        )


class Shares:
    """What every input adds to every value of a sum of linear maps.

    `total`: the values. Called with a number per value, it returns per input the sum of its terms times that
    number; with relevance / total, these are the inputs' shares of the relevance.
    """

    def __init__(self, *terms: Term):
        self._inputs = [x.detach().requires_grad_() for _, _, x in terms]
        with torch.enable_grad():
            parts = [m(x) if sign > 0 else -m(x) for (sign, m, _), x in zip(terms, self._inputs, strict=True)]
            self._graph = sum(parts[1:], parts[0])
        self.total = self._graph.detach()

    def __call__(self, per_value: Tensor) -> Tensor:
        slopes = torch.autograd.grad(self._graph, self._inputs, per_value, retain_graph=True)
        parts = [x.detach() * slope for x, slope in zip(self._inputs, slopes, strict=True)]
        return sum(parts[1:], parts[0])

    def rule(self) -> Back:
        """Relevance in proportion to the contributions, whatever their sign."""
        per_unit = reciprocal(self.total)
        return lambda relevance: self(relevance * per_unit)


def reciprocal(total: Tensor) -> Tensor:
    """1 / total, and 0 where there is nothing to share."""
    return torch.where(total.abs() < torch.finfo(total.dtype).tiny, 0, 1 / total)


class _Step(torch.autograd.Function):
    """A value computed elsewhere, with `back` from its relevance to that of the inputs."""

    @staticmethod
    def forward(ctx, back, value, *inputs):
        ctx.back = back
        return value

    @staticmethod
    def backward(ctx, relevance):
        found = ctx.back(relevance)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def last_rules(logits: Tensor, kind: type) -> list:
    """The rules of that kind that stand nearest to the logits: on the way from the logits no other comes before."""
    found, waiting, seen = [], [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "back", None), kind):
            found.append(node.back)
        else:
            waiting.extend(source for source, _ in node.next_functions)
    return found


class Propagation:
    """The rules of one forward pass, to be given to `operations.replaced` for all calls.

    `weighted` makes the rule of a layer with weights. With `box`, layers that read the image itself (through copies
    and constants) follow the z^B rule with the lowest and highest value of the encoded image instead, and are counted
    in `first_layers`. `norms`: batch norm may "pass" relevance, "share" it as a layer with weights and a bias, or
    "drop" that of inputs which are exactly 0 and pass the rest, as published code does. `by_size`: whether "sums" and
    "averages" share by the size of their terms instead; signed terms that all but cancel make relevance explode.
    `lost` gets what relevance each layer takes and doesn't pass on, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        weighted: Callable[[Layer], Back],
        box: bool = False,
        norms: str = "pass",
        by_size: Collection[str] = (),
        lost: dict[str, float] | None = None,
    ):
        self.model, self.weighted, self.norms, self.by_size, self.lost = model, weighted, norms, by_size, lost
        self.first_layers = 0
        self._gates = WeakIdKeyDictionary()  # what came out of a sigmoid
        self._bounds = WeakIdKeyDictionary()  # lowest and highest values of what is still the image
        if box:
            fixed = inputs.detach()
            low, high = (extreme(fixed, (1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
            self._bounds[inputs] = low.expand_as(fixed), high.expand_as(fixed)

    def __call__(self, call: Call, *args, **kwargs):
        rule = _RULES.get(call.name)
        if rule is None:
            raise self._refusal(call, f"{call.name} has no relevance rule")
        if rule not in _FOR_GATES and any(t in self._gates for t in tensors(args)):
            raise self._refusal(call, f"the output of a sigmoid may only multiply a signal, not go into {call.name}")
        return rule(self, call, *args, **kwargs)

    def _step(self, call: Call, back: Back, value: Tensor, *inputs: Tensor) -> Tensor:
        """The value, with relevance passed back by the rule; the loss is counted where it is asked for."""

        def counted(relevance: Tensor):
            found = back(relevance)
            passed = sum(part.sum(dtype=torch.float64) for part in tensors([found]))
            lost = (relevance.sum(dtype=torch.float64) - passed).item()
            self.lost[call.layer] = self.lost.get(call.layer, 0.0) + lost
            return found

        return _Step.apply(back if self.lost is None else counted, value, *inputs)

    def check_logits(self, logits: Tensor) -> None:
        """Raise AttributionError where the logits are no end that relevance could start from."""
        if logits in self._gates:
            raise AttributionError("the network puts out the values of a sigmoid; explain the network before it")
        if not logits.requires_grad:
            raise AttributionError("the logits don't depend on the input through operations that relevance can follow")

    # Rules: each gets a call and its arguments, of which at least one depends on the image.

    def copied(self, call: Call, *args, **kwargs):
        """The values themselves, elsewhere: relevance moves as gradients do."""
        results = call.original(*args, **kwargs)
        self._follow(call, results, args, kwargs)
        return results

    def passed(self, call: Call, *args, **kwargs):
        """Each value passes its relevance on to the one that it was computed from; constants get none."""
        x = self._only_varying(call, args, kwargs)
        with torch.no_grad():
            value = call.original(*args, **kwargs)
        if self.norms == "share" and call.name in _TABLE["shifts"] and not torch.equal(value, x.expand_as(value)):
            return self._shifted(call, value, x.expand_as(value), args, kwargs)
        result = self._step(call, lambda relevance: relevance, value, x.expand_as(value))
        if call.name not in _TABLE["curved"]:
            self._follow(call, result, args, kwargs)
        return result

    def _shifted(self, call: Call, value: Tensor, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """A constant takes its share as a bias does, be it a norm's that is written out or another."""
        if kwargs.get("alpha", 1) != 1:
            raise self._refusal(call, f"{call.name} with a factor has no relevance rule")
        is_first = isinstance(args[0], Tensor) and args[0].requires_grad
        sign = -1 if call.name == ("rsub" if is_first else "sub") else 1
        found = Layer(call.layer, call.name, x.detach(), x.new_tensor(sign), value, torch.mul)
        return self._step(call, self.weighted(found), value, x)

    def normed(self, call: Call, x, mean, variance, weight=None, bias=None, training=False, *args, **kwargs):
        """Batch norm, which works on each value by itself where its statistics are fixed."""
        if training or mean is None:
            raise self._refusal(call, "its statistics change with the batch")
        result = self.passed(call, x, mean, variance, weight, bias, training, *args, **kwargs)
        if self.norms == "pass":
            return result
        if self.norms == "drop":
            nonzero = x.detach() != 0
            return self._step(call, lambda relevance: relevance * nonzero, result.detach(), result)

        # Written out: torch 2.13 on a CPU gives batch norm a wrong gradient for one image in some memory layouts.
        one, zero = torch.ones_like(mean)[None], torch.zeros_like(mean)
        scale = call.original(one, zero, variance, weight, None, training, *args, **kwargs)
        scale, value = scale.view(-1, *[1] * (x.ndim - 2)), result.detach()
        found = Layer(call.layer, call.name, x.detach(), scale, value, torch.mul)
        return self._step(call, self.weighted(found), value, x)

    def divided(self, call: Call, x, divisor, *args, **kwargs):
        """By a constant: passed."""
        if kwargs.get("rounding_mode"):
            raise self._refusal(call, "division with rounding has no relevance rule")
        if isinstance(divisor, Tensor) and divisor.requires_grad:
            raise self._refusal(call, "division by what depends on the image has no relevance rule")
        return self.passed(call, x, divisor, *args, **kwargs)

    def added(self, call: Call, x, y, **kwargs):
        """Terms that depend on the image share in proportion to what they add."""
        if not all(isinstance(term, Tensor) and term.requires_grad for term in (x, y)):
            return self.passed(call, x, y, **kwargs)
        if kwargs.get("alpha", 1) != 1:
            raise self._refusal(call, "add with a factor has no relevance rule")
        x, y = torch.broadcast_tensors(x, y)
        terms = [self._counted("sums", term) for term in (x, y)]
        per_unit = reciprocal(terms[0] + terms[1])

        def back(relevance):
            scaled = relevance * per_unit
            return terms[0] * scaled, terms[1] * scaled

        return self._step(call, back, x.detach() + y.detach(), x, y)

    def averaged(self, call: Call, *args, **kwargs):
        """Sums and averages within a tensor: values share in proportion to what they add."""
        x = self._only_varying(call, args, kwargs)
        with torch.no_grad():
            value = call.original(*args, **kwargs)
        parts = Shares((1, lambda x: call.original(x, *args[1:], **kwargs), self._counted("averages", x)))
        return self._step(call, parts.rule(), value, x)

    def _counted(self, kind: str, term: Tensor) -> Tensor:
        return term.detach().abs() if kind in self.by_size else term.detach()

    def multiplied(self, call: Call, x, y, **kwargs):
        """A constant or a gate gets no relevance: its factor gets it all."""
        if all(isinstance(factor, Tensor) and factor.requires_grad for factor in (x, y)):
            gates = [factor in self._gates for factor in (x, y)]
            if gates == [True, False]:
                x = x.detach()
            elif gates == [False, True]:
                y = y.detach()
            else:
                raise self._refusal(call, "a product of which neither factor or each is a gate has no relevance rule")
            result = self.passed(call, x, y, **kwargs)
            self._bounds.pop(result, None)  # a gate depends on the image
            return result
        return self.passed(call, x, y, **kwargs)

    def gated(self, call: Call, *args, **kwargs):
        """What a sigmoid puts out: it may multiply a signal, and nothing else."""
        gate = call.original(*args, **kwargs)
        self._gates[gate] = True
        return gate

    def layer(self, call: Call, x, weight, bias=None, *args, **kwargs):
        """A layer with weights: by the method's rule, or by z^B where it reads the image."""
        self._only_varying(call, (x, weight, bias), {})
        with torch.no_grad():
            value = call.original(x, weight, bias, *args, **kwargs)

        def apply(x, weight):
            return call.original(x, weight, None, *args, **kwargs)

        found = Layer(call.layer, call.name, x.detach(), weight, value, apply)
        if x not in self._bounds:
            return self._step(call, self.weighted(found), value, x)
        self.first_layers += 1
        return self._step(call, found.box_contributions(*self._bounds[x]).rule(), value, x)

    def _only_varying(self, call: Call, args: tuple, kwargs: dict) -> Tensor:
        """The one argument that depends on the image."""
        varying = [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]
        if len(varying) > 1 or (call.name not in _TABLE["either"] and varying[0] is not args[0]):
            raise self._refusal(call, f"{call.name} has a relevance rule for one input that depends on the image alone")
        return varying[0]

    def _follow(self, call: Call, results, args: tuple, kwargs: dict) -> None:
        """Results are gates, or still the image, where the arguments are."""
        varying = [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]
        if any(t in self._gates for t in varying):
            for result in tensors([results]):
                self._gates[result] = True
        if all(t in self._bounds for t in varying):
            with torch.no_grad():
                low, high = (
                    call.original(*self._bound(end, args), **self._bound(end, kwargs)) for end in ("low", "high")
                )
            for result, a, b in zip(tensors([results]), tensors([low]), tensors([high]), strict=True):
                self._bounds[result] = torch.minimum(a, b), torch.maximum(a, b)

    def _bound(self, end: str, value):
        """An argument with the image in it replaced by its lowest or highest values."""
        if isinstance(value, dict):
            return {name: self._bound(end, v) for name, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._bound(end, v) for v in value)
        if isinstance(value, Tensor) and value in self._bounds:
            return self._bounds[value][end == "high"]
        return value

    def _refusal(self, call: Call, why: str) -> AttributionError:
        module = self.model.get_submodule(call.layer)
        if hasattr(module, "set_explanation_mode"):
            advice = "the contribution map of a B-cos network is method 'bcos'"
        else:
            advice = "methods that need nothing but gradients, for instance integrated_gradients, explain this network"
        return AttributionError(f"layer {call.layer or 'network'} ({type(module).__name__}): {why}; {advice}")


_TABLE = OPERATIONS["relevance"]
_RULES = {name: getattr(Propagation, rule) for rule in vars(Propagation).keys() & _TABLE for name in _TABLE[rule]}
_FOR_GATES = (Propagation.copied, Propagation.multiplied)
