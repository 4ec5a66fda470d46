"""The one model type of the kit: grey images in, one logit per label out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cxrkit.errors import ModelError

__all__ = ["ENCODINGS", "Classifier"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_TOLERANCE = 1e-3  # resizing with antialiasing may leave [0, 1] by a rounding error

# Every encoding is one affine map per channel: encoded[c] = scale[c] * image + offset[c].
ENCODINGS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (
        tuple(1 / s for s in _IMAGENET_STD),
        tuple(-m / s for m, s in zip(_IMAGENET_MEAN, _IMAGENET_STD, strict=True)),
    ),
    "grey": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "symmetric": ((2.0, 2.0, 2.0), (-1.0, -1.0, -1.0)),
    "lite": ((255 / 128,) * 3, (-127 / 128,) * 3),
    "xrv": ((2048.0,), (-1024.0,)),
    "add_inverse": ((1.0, 1.0, 1.0, -1.0, -1.0, -1.0), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)),
}


class Classifier(nn.Module):
    """A network together with the encoding of its input and the names of its outputs.

    `forward(images)` is `classify(encode(images))`: images float [B, 1, H, W] in [0, 1] to logits [B, L], one
    logit per label, each meant for a sigmoid (binary cross-entropy); a single label therefore has one logit,
    not two. `network` maps the encoded images to [B, L]; `encoding` is a key of ENCODINGS: "imagenet" (three
    equal channels, ImageNet normalisation), "grey" (three equal channels), "symmetric" (three equal channels in
    [-1, 1]), "lite" (three equal channels, (255 x - 127) / 128: EfficientNet-Lite), "xrv" (one channel in
    [-1024, 1024]: torchxrayvision) or "add_inverse" (x, x, x, 1-x, 1-x, 1-x; paper `bcos`). `logit_bias` is the
    constant that a B-cos network adds after its last layer, 0 elsewhere. `explained_layer` is the dotted name of the
    layer that CAM methods use by default. Images must have at least `min_size` pixels per side. `card` is a JSON-able
    description.
    Raises ModelError for unusable labels, an unknown encoding, a layer that the network lacks, or unfit
    images.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Sequence[str],
        encoding: str = "imagenet",
        *,
        explained_layer: str | None = None,
        logit_bias: float = 0.0,
        min_size: int = 1,
        card: dict | None = None,
    ):
        super().__init__()
        self.labels = check_labels(labels)
        if encoding not in ENCODINGS:
            raise ModelError(f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
        self.network = network
        self.encoding = encoding
        self.logit_bias = logit_bias
        self.min_size = min_size
        self.explained_layer = explained_layer
        self.card = dict(card or {})
        self._unread = None  # extremes of a batch that are still on their way from a GPU
        if explained_layer is not None and explained_layer not in dict(self.named_modules()):
            raise ModelError(f"the network has no layer {explained_layer!r} to explain")
        for name, values in zip(("_scale", "_offset"), ENCODINGS[encoding], strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """What the network sees: images float [B, 1, H, W] to [B, C, H, W] in the network's precision,
        differentiable.

        Values outside [0, 1] pass, so that a method may add noise or leave the range on a path. Raises
        ModelError for another shape, an integer type or too few pixels.
        """
        if images.dim() != 4 or images.shape[1] != 1:
            raise ModelError(f"images must be grey, [B, 1, H, W]; got {list(images.shape)}")
        if not images.is_floating_point():
            raise ModelError(f"images must be floating point in [0, 1]; got {images.dtype}")
        if min(images.shape[2:]) < self.min_size:
            size = " x ".join(map(str, images.shape[2:]))
            raise ModelError(f"images are {size} pixels; this network needs at least {self.min_size} per side")
        encoded = torch.addcmul(self._offset, self._scale, images.to(self._scale.dtype))
        return encoded.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU

    def classify(self, encoded: Tensor) -> Tensor:
        """Logits [B, L] of images that `encode` has prepared, [B, C, H, W]."""
        try:
            return self.network(encoded)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
        return self.network(encoded.contiguous())  # code that views its maps wants them in this order

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, tuple]:
        """Logits [B, L] of images float [B, 1, H, W] in [0, 1].

        With `auxiliary`, a pair: the logits, and a tuple of (weight in the loss, logits [B, L]) of further heads, which
        is empty in evaluation mode and for networks without such a head. Raises ModelError for NaN or values outside
        [0, 1]; in training on a GPU only at the next call, or when evaluation mode is set, so that the GPU isn't waited
        for.
        """
        encoded = self.encode(images)
        if not torch.compiler.is_compiling():
            self._check_range(images)
        if not auxiliary:
            return self.classify(encoded)
        weight = getattr(self.network, "auxiliary_weight", None)
        if weight is None or not self.training:
            return self.classify(encoded), ()
        logits, other = self.network(encoded, auxiliary=True)
        return logits, ((weight, other),)

    def train(self, mode: bool = True) -> Classifier:
        if not mode:
            self._check_last()
        return super().train(mode)

    def _check_range(self, images: Tensor) -> None:
        self._check_last()
        if not (self.training and images.is_cuda):
            check_range(images)
            return
        extremes = torch.empty(2, dtype=images.dtype, pin_memory=True)
        extremes.copy_(torch.stack(torch.aminmax(images.detach())), non_blocking=True)
        self._unread = extremes, torch.cuda.current_stream(images.device).record_event()

    def _check_last(self) -> None:
        """Judge the extremes that were copied aside at the last call; they arrived while the GPU worked on."""
        if self._unread is None:
            return
        extremes, arrived = self._unread
        self._unread = None
        arrived.synchronize()
        _judge(*extremes.tolist(), where=" of the batch before")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_unread": None}  # an event can't be copied

    def extra_repr(self) -> str:
        return f"labels={self.labels}, encoding={self.encoding!r}"


def check_range(images: Tensor) -> None:
    """Raise ModelError if images hold NaN or values outside [0, 1]; one pass over the images."""
    if images.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if math.isnan(low):
        bad = torch.isnan(images).flatten(1).any(1).nonzero().flatten().tolist()
        raise ModelError(f"images hold NaN (rows {bad[:10]} of the batch)")
    _judge(low, high)


def _judge(low: float, high: float, where: str = "") -> None:
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # a NaN fails both
        raise ModelError(f"images must lie in [0, 1]; these{where} reach from {low:.4g} to {high:.4g}")


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as a tuple of distinct, non-empty names; raises ModelError otherwise."""
    if isinstance(labels, str):
        raise ModelError(f"labels must be a sequence of names; got the single string {labels!r}")
    labels = tuple(labels)
    wrong = [label for label in labels if not isinstance(label, str) or not label.strip()]
    if wrong:
        raise ModelError(f"labels must be non-empty strings; got {wrong[0]!r}")
    if not labels:
        raise ModelError("a classifier needs at least one label")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ModelError(f"labels must be distinct; repeated: {', '.join(repeated)}")
    return labels
