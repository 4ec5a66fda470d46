"""A network with the outputs to explain."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from cxrkit.attribution.registry import unknown
from cxrkit.errors import AttributionError, CxrkitError, ParameterError
from cxrkit.models.classifier import Classifier

T = TypeVar("T")

__all__ = ["Explained", "has_encoding", "label_names", "logit_bias", "network_errors", "unwrapped"]


class Explained:
    """A network, the labels asked for, and what of them is explained: the only thing a method sees of its
    model.

    `labels`: names, indices, one of either, or None for all. `output`: "logit" or "probability" (the
    sigmoid of one logit: labels are independent). `batch` bounds the images of one forward pass. Compiled and
    data-parallel networks are explained as the network within them.
    """

    def __init__(self, model: nn.Module, labels=None, output: str = "logit", batch: int = 16):
        self.model = unwrapped(model)
        self.labels = labels if labels is None else _as_list(labels)
        self.output = output
        self.batch = batch
        self.first_row = 0  # of the current chunk within all images, for messages
        self.report: Callable[[float], None] = lambda share: None  # share of the current chunk that is done
        self.used_layers: list[str] = []  # whose maps the method took
        self.remembered: dict = {}  # what was found out about the network, kept by `prepared` for later calls
        self.encodes = has_encoding(self.model)
        self.memory_format = torch.contiguous_format  # this and what follows is found out by `prepared`
        self.dtype: torch.dtype | None = None
        self.always_differentiable = False  # for hooks of the user's
        self.names = label_names(self.model)
        if self.names is not None:  # a misspelt name stops before the first forward pass
            self.indices(len(self.names))

    def whole(self, images: Tensor) -> Tensor:
        """Logits [B, outputs] by the network's own forward, as its user calls it."""
        return self._checked(self._called(self.model, images.clone()), len(images))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, outputs] of images [B, C, H, W]; leaves the images alone even where the network works
        in place.
        """
        return self.classify(self.encode(images))  # past the range test of `forward`: paths may leave [0, 1]

    def encode(self, images: Tensor) -> Tensor:
        """What the network proper sees: its own encoding of the images, or the images where it has none."""
        images = images if self.dtype is None else images.to(self.dtype)
        return self._called(self.model.encode, images) if self.encodes else images

    def classify(self, encoded: Tensor) -> Tensor:
        """Logits [B, outputs] of encoded images."""
        network = self.model.classify if self.encodes else self.model
        return self._checked(self._called(network, encoded.clone(memory_format=self.memory_format)), len(encoded))

    def select(self, per_output: Tensor) -> Tensor:
        """The labels asked for, in their order: [B, outputs, ...] to [B, L, ...]."""
        return per_output[:, self.indices(per_output.shape[1])]

    def scores(self, logits: Tensor) -> Tensor:
        """What is explained, [B, L], from all logits."""
        chosen = self.select(logits)
        return chosen.sigmoid() if self.output == "probability" else chosen

    def gradients(self, scores: Tensor, inputs: Tensor) -> Iterator[Tensor]:
        """Gradient of each label's score in turn, shaped like `inputs` [B, ...]."""
        for (gradient,) in self.joint_gradients(scores, [inputs], allow_unused=False):
            yield gradient

    def joint_gradients(
        self, scores: Tensor, inputs: Sequence[Tensor], allow_unused: bool = True
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Gradients of each label's score in turn at several tensors: one backward pass per label. None, where
        `allow_unused`, at a tensor without influence on it.

        On a CPU this beats batching the labels, and the graph is shared by all labels and freed with the
        last.
        """
        if not scores.requires_grad:
            raise AttributionError(
                "the logits don't depend on the input through differentiable operations; "
                "does the network detach, round or switch gradients off on the way?"
            )
        count = scores.shape[1]
        for j in range(count):
            score, is_last = scores[:, j].sum(), j + 1 == count
            with network_errors():
                found = torch.autograd.grad(score, inputs, retain_graph=not is_last, allow_unused=allow_unused)
            yield found

    def steps(self, items: Collection[T]) -> Iterator[T]:
        """The items of a method's longest loop, while the progress bar moves along."""
        for done, item in enumerate(items):
            self.report(done / len(items))
            yield item

    def _called(self, network: Callable[[Tensor], object], inputs: Tensor) -> object:
        with network_errors():
            if not self.always_differentiable or inputs.requires_grad:
                return network(inputs)
            with torch.enable_grad():
                outputs = network(inputs.detach().requires_grad_().clone())  # which the network may change in place
        return outputs if torch.is_grad_enabled() or not isinstance(outputs, Tensor) else outputs.detach()

    def _checked(self, logits: Tensor, rows: int) -> Tensor:
        if isinstance(logits, Tensor) and logits.ndim < 2 and rows in (1, logits.numel()):
            logits = logits.reshape(rows, -1)  # the network has squeezed the axis of the one label, or one image
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows or not logits.is_floating_point():
            raise AttributionError(
                f"the network must return logits [B, L] with B = {rows}; it returned {_kind(logits)}. Wrap it in a "
                "module whose forward picks the logits"
            )
        if self.names is not None and logits.shape[1] != len(self.names):
            raise AttributionError(f"the network has {len(self.names)} labels but returns {logits.shape[1]} logits")
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def indices(self, outputs: int) -> list[int]:
        if self.labels is None:
            return list(range(outputs))
        chosen = [self._index(label, outputs) for label in self.labels]
        if not chosen:
            raise ParameterError("labels is empty; name at least one label, or pass None for all")
        return chosen

    def _index(self, label: object, outputs: int) -> int:
        if isinstance(label, str):
            if self.names is None:
                raise ParameterError(f"label {label!r}: the network has no label names; use indices 0 to {outputs - 1}")
            if label not in self.names:
                raise unknown("label", label, self.names)
            return self.names.index(label)
        try:
            index = operator.index(label)
        except TypeError:
            index = -1
        if isinstance(label, bool) or not 0 <= index < outputs:
            raise ParameterError(f"label {label!r}: must be a name or an index from 0 to {outputs - 1}")
        return index


@contextmanager
def network_errors(kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn what the network raises, forwards or backwards, into an AttributionError with cause and cure."""
    try:
        yield
    except (AttributionError, ParameterError, torch.OutOfMemoryError, MemoryError):
        raise
    except CxrkitError as error:
        raise AttributionError(str(error)) from error
    except kind as error:
        raise AttributionError(_cause(error)) from error


_CAUSES = (  # a part of torch's message, and what it means
    (
        "modified by an inplace operation",
        "the network overwrites a tensor that its own gradient needs, in place; write that step out of place, "
        "for instance nn.ReLU(inplace=False)",
    ),
    (
        "used in the graph|does not require grad|none of output has requires_grad",
        "the logits don't depend on the input through differentiable operations; does the network detach, round or "
        "switch gradients off on the way? occlusion needs no gradient",
    ),
    (
        "erivative for|not implemented the .*backward|not differentiable|does not have an autograd",
        "an operation of the network has no derivative; use occlusion or scorecam, which need none",
    ),
    (
        "should be the same|scalar type|same dtype|dtype",
        "the network mixes precisions or devices on the way; bring all of it to one, for instance model.float()",
    ),
)


def _cause(error: Exception) -> str:
    message = (str(error).strip() or "no message").splitlines()[0][:300]
    for pattern, cause in _CAUSES:
        if re.search(pattern, str(error)):
            return f"{cause} ({type(error).__name__}: {message})"
    return (
        f"the network stopped with {type(error).__name__}: {message}. Does model(images) run in evaluation mode, for "
        "one image and for several?"
    )


def _kind(outputs: object) -> str:
    if isinstance(outputs, Tensor):
        return f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
    names = f" with {', '.join(map(str, outputs))}"[:80] if isinstance(outputs, dict) else ""
    return f"a {type(outputs).__name__}{names}"


def _as_list(labels) -> list:
    """Labels as a list, also where a single name or index stands for itself."""
    if isinstance(labels, str) or not hasattr(labels, "__iter__") or getattr(labels, "ndim", 1) == 0:
        return [labels]
    return list(labels)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within torch's wrappers that compute the same: compiled, data-parallel, averaged."""
    while type(model).__module__.startswith("torch.") and type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_WRAPPERS |= {"AveragedModel": "module"}


def has_encoding(model: nn.Module) -> bool:
    """Whether the model is a `cxrkit.models.Classifier` whose forward is `classify(encode(images))` and no more."""
    whole = isinstance(model, Classifier) and "forward" not in vars(model)
    return whole and type(model).forward is Classifier.forward


def label_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the outputs, or None where the model doesn't say."""
    names = getattr(model, "labels", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def logit_bias(model: nn.Module) -> float | Tensor:
    """The constant that the network adds to its logits last: its own `logit_bias` or that of its logit
    layer, else 0.
    """
    found = (getattr(module, "logit_bias", None) for module in model.modules())
    return next((bias for bias in found if bias is not None), 0.0)
