"""A network with the outputs to explain, and the state in which it is explained."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from cxrkit.attribution.registry import unknown
from cxrkit.errors import AttributionError, ParameterError

T = TypeVar("T")

__all__ = ["Explained", "explanation_mode", "has_encoding", "label_names", "logit_bias", "prepared"]


class Explained:
    """A network, the labels asked for, and what of them is explained: the only thing a method sees of its
    model.

    `labels`: names, indices, one of either, or None for all. `output`: "logit" or "probability" (the
    sigmoid of one logit: labels are independent). `batch` bounds the images of one forward pass.
    """

    def __init__(self, model: nn.Module, labels=None, output: str = "logit", batch: int = 16):
        self.model = model
        self.labels = labels if labels is None else _as_list(labels)
        self.output = output
        self.batch = batch
        self.first_row = 0  # of the current chunk within all images, for messages
        self.report: Callable[[float], None] = lambda share: None  # share of the current chunk that is done
        self.used_layers: list[str] = []  # whose maps the method took
        self.names = label_names(model)
        if self.names is not None:  # a misspelt name stops before the first forward pass
            self.indices(len(self.names))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, outputs] of images [B, C, H, W]; leaves the images alone even where the network works
        in place.
        """
        if has_encoding(self.model):  # past the range test of `forward`: paths may leave [0, 1]
            return self._checked(self.model.classify(self.model.encode(images)), len(images))
        return self._checked(self.model(images.clone(memory_format=torch.channels_last)), len(images))

    def encode(self, images: Tensor) -> Tensor:
        """What the network proper sees: its own encoding of the images, or the images where it has none."""
        return self.model.encode(images) if has_encoding(self.model) else images

    def classify(self, encoded: Tensor) -> Tensor:
        """Logits [B, outputs] of encoded images."""
        network = self.model.classify if has_encoding(self.model) else self.model
        return self._checked(network(encoded.clone(memory_format=torch.channels_last)), len(encoded))

    def select(self, per_output: Tensor) -> Tensor:
        """The labels asked for, in their order: [B, outputs, ...] to [B, L, ...]."""
        return per_output[:, self.indices(per_output.shape[1])]

    def scores(self, logits: Tensor) -> Tensor:
        """What is explained, [B, L], from all logits."""
        chosen = self.select(logits)
        return chosen.sigmoid() if self.output == "probability" else chosen

    def gradients(self, scores: Tensor, inputs: Tensor) -> Iterator[Tensor]:
        """Gradient of each label's score in turn, shaped like `inputs` [B, ...]: one backward pass per
        label.

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
            with _overwriting_refused():
                gradient = torch.autograd.grad(scores[:, j].sum(), inputs, retain_graph=j + 1 < count)[0]
            yield gradient

    def steps(self, items: Collection[T]) -> Iterator[T]:
        """The items of a method's longest loop, while the progress bar moves along."""
        for done, item in enumerate(items):
            self.report(done / len(items))
            yield item

    def _checked(self, logits: Tensor, rows: int) -> Tensor:
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != rows:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise AttributionError(f"the network must return logits [B, L] with B = {rows}; it returned {got}")
        if self.names is not None and logits.shape[1] != len(self.names):
            raise AttributionError(f"the network has {len(self.names)} labels but returns {logits.shape[1]} logits")
        return logits

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
def _overwriting_refused() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise AttributionError(
            "the network overwrites a tensor that its own gradient needs, in place; write that step out of place, "
            "for instance nn.ReLU(inplace=False)"
        ) from error


def _as_list(labels) -> list:
    """Labels as a list, also where a single name or index stands for itself."""
    if isinstance(labels, str) or not hasattr(labels, "__iter__") or getattr(labels, "ndim", 1) == 0:
        return [labels]
    return list(labels)


def has_encoding(model: nn.Module) -> bool:
    """Whether the model splits into `encode` and `classify`, as `cxrkit.models.Classifier` does."""
    return callable(getattr(model, "encode", None)) and callable(getattr(model, "classify", None))


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


@contextmanager
def prepared(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, ordinary gradients, frozen weights, full precision; everything is put back, also
    after an error.

    Frozen weights save the backward passes their share of the work and leave every `.grad` alone.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(explanation_mode(model, False))
            stack.enter_context(_channels_last(model))
            if device.type == "cuda":
                stack.enter_context(_ieee_convolutions())
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def explanation_mode(model: nn.Module, active: bool) -> Iterator[None]:
    """Switch the explanation mode of B-cos layers (scales detached) on or off, and back to what each layer
    had.
    """
    layers = [m for m in model.modules() if callable(getattr(m, "set_explanation_mode", None))]
    before = [getattr(layer, "detach", False) is True for layer in layers]
    try:
        for layer in layers:
            layer.set_explanation_mode(active)
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.set_explanation_mode(mode)


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Kernels in the order in which convolutions are fastest, and back to their own storage."""
    kernels = [(parameter, parameter.data) for parameter in model.parameters() if parameter.ndim == 4]
    try:
        for parameter, values in kernels:
            parameter.data = values.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, values in kernels:
            parameter.data = values


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
