"""A network tried out once before it is explained: how it has to be run, and whether it can be explained at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cxrkit.attribution.preparation import Snapshot, as_found, working_weights
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError

__all__ = ["prepared"]


@dataclass(frozen=True)
class _Conduct:
    """How a network is run: memory order of images and kernels, precision, whether it writes to its weights, whether
    hooks of its user's need gradients at every call, whether it has batch or instance norms; and what methods find.
    """

    memory_format: torch.memory_format
    dtype: torch.dtype
    writes: bool
    hooked: bool
    has_norms: bool = False
    remembered: dict = field(default_factory=dict, compare=False)


_DRAWS = 16  # of a network that draws random numbers, to see whether they change its logits
_FEW = 8  # conducts remembered for a network: one for each size of image
_known: WeakKeyDictionary[nn.Module, dict[tuple, _Conduct]] = WeakKeyDictionary()


@contextmanager
def prepared(explained: Explained, images: Tensor) -> Iterator[None]:
    """The network as it is explained: evaluation mode, frozen, full precision; afterwards all is as it was.

    `images` [B, C, H, W] on the network's device. The first call for a network and a size of images tries it out, and
    raises AttributionError where the logits aren't a function of one image alone.
    """
    with as_found(explained.model, images.device) as snapshot:
        conduct = _remembered(explained, images, snapshot.fingerprint)
        explained.memory_format, explained.dtype = conduct.memory_format, conduct.dtype
        explained.always_differentiable, explained.remembered = conduct.hooked, conduct.remembered
        norms = _Norms() if conduct.has_norms else nullcontext()
        with norms, working_weights(snapshot.tensors, conduct.memory_format, conduct.dtype, conduct.writes):
            yield


def _remembered(explained: Explained, images: Tensor, fingerprint: tuple) -> _Conduct:
    known = _known.setdefault(explained.model, {})
    key = (images.shape[1:], images.dtype, images.device, fingerprint)
    if key not in known:
        with _Norms() as norms:
            conduct = _tried(explained, images, norms)
        while len(known) >= _FEW:
            known.pop(next(iter(known)))
        known[key] = replace(conduct, has_norms=norms.seen)
    return known[key]


def _tried(explained: Explained, images: Tensor, norms: _Norms) -> _Conduct:
    """Run one image as the user would and as methods do, alone and beside others, and compare."""
    model, image = explained.model, images[:1]
    stored = next((t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), images.dtype)
    logits, gradient, writes = _as_the_user_would(explained, image.to(stored))
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if stored in (torch.float16, torch.bfloat16):
        stored, logits, gradient = _in_single_precision(explained, image, stored, logits, gradient)
    failure = None
    for order in (torch.channels_last, torch.contiguous_format):
        explained.memory_format, explained.dtype = order, stored
        with working_weights(Snapshot(model.modules()).tensors, order, stored, copies=True):
            try:
                found, slope = _run(explained, image)
            except AttributionError as error:  # such as of a view, which wants contiguous tensors
                failure = error
                continue
            if _agree(found, logits, 1e-3) and _alike(slope, gradient, image, logits):
                _refuse_company(explained, image, found, slope, norms)
                return _Conduct(order, stored, writes, hooked)
    raise failure or AttributionError("the network gives other logits with frozen weights than when it is called")


class _Norms(TorchFunctionMode):
    """Batch and instance norms whose gradient is right: torch 2.13 on a CPU reads that of one image in a wrong order
    where its memory is ordered in another way than the norm's output.

    `seen`: whether there are any. `images`: over how many images batch norms took statistics; logits and gradients
    alone don't tell: both may be flat around the images that the network is tried out with.
    """

    def __init__(self):
        super().__init__()
        self.seen = False
        self.images: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "batch_norm" and kwargs.get("training", args[5] if len(args) > 5 else False):
            self.images.add(len(args[0]))
        if name.endswith(("batch_norm", "instance_norm")):
            self.seen = True
            if isinstance(result, Tensor) and result.requires_grad:
                last = not result.is_contiguous() and result.is_contiguous(memory_format=torch.channels_last)
                order = torch.channels_last if last else torch.contiguous_format
                result.register_hook(lambda gradient: gradient.contiguous(memory_format=order))
        return result


def _as_the_user_would(explained: Explained, image: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Logits, gradient, and whether the network writes to its weights."""
    model = explained.model
    explained.memory_format, explained.dtype = torch.contiguous_format, image.dtype
    before = [(weight, weight.data) for weight in model.parameters()]
    with working_weights(Snapshot(model.modules()).tensors, None, None, copies=True):
        logits, gradient = _run(explained, image, whole=not explained.encodes)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
        again = _run(explained, image, whole=not explained.encodes)[0]  # with gradients too, for the same kernels
        drawn = not torch.equal(state[0], torch.get_rng_state()) or state[1] != random.getstate()
        if drawn or state[2] != np.random.get_state()[2]:  # noqa: NPY002
            for _ in range(_DRAWS):
                if torch.equal(again, logits):
                    again = _run(explained, image, whole=not explained.encodes)[0]
        writes = any(not torch.equal(weight.data, values) for weight, values in before)
        hooked = explained.encodes and any((model._forward_hooks, model._forward_pre_hooks))
        if hooked and not _agree(explained.whole(image).detach(), logits, 1e-3):
            raise AttributionError("a forward hook on the classifier changes its logits; register it on its `network`")
    if not _agree(again, logits, 0 if image.device.type == "cpu" else 1e-4):
        raise AttributionError(
            "the network gives one image different logits from call to call, so a map would be one of many: in "
            "evaluation mode it draws random numbers or remembers earlier calls (such as F.dropout without "
            "training=self.training); explain it without that"
        )
    return logits, gradient, writes


def _in_single_precision(explained: Explained, image: Tensor, half: torch.dtype, logits: Tensor, gradient):
    """Precision, logits and gradient of a network of half precision: float32, unless its code names its precision."""
    explained.dtype = torch.float32
    with working_weights(Snapshot(explained.model.modules()).tensors, None, torch.float32, copies=True):
        try:
            exact = _run(explained, image)
        except AttributionError:
            return half, logits, gradient
    # Half precision itself is off by some per cent.
    return (torch.float32, *exact) if _agree(exact[0], logits, 0.3) else (half, logits, gradient)


def _run(explained: Explained, images: Tensor, whole: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logits [B, L], and the gradient of the first image's sum at all images; None where there is none."""
    call, inputs, gradient = (explained.whole if whole else explained.logits), images.detach().clone(), None
    try:
        logits = call(inputs.requires_grad_())
    except AttributionError:  # of what can't be differentiated, which forward passes alone may explain
        with torch.no_grad():
            logits = call(inputs.detach())
    if logits.requires_grad:
        try:
            gradient = next(explained.gradients(logits[:1].sum(1, keepdim=True), inputs))
        except AttributionError:  # no derivative: the method that wants one says so itself
            gradient = None
    return logits.detach(), gradient


def _agree(found: Tensor | None, right: Tensor | None, share: float) -> bool:
    """Whether two tensors differ by no more than a share of their size; NaN equals NaN."""
    if found is None or right is None:
        return found is right
    found, right = found.double().nan_to_num(), right.double().nan_to_num()
    return float((found - right).norm()) <= share * float(right.norm())


def _alike(slope: Tensor | None, right: Tensor | None, image: Tensor, logits: Tensor) -> bool:
    """Whether two gradients agree, up to kinks that rounding passes and to what rounding does to the logits."""
    if slope is None or right is None:
        return slope is right
    noise = 64 * torch.finfo(logits.dtype).eps * logits.double().norm() / image.double().norm().clamp(min=1e-6)
    return _agree(slope, right, 0.02) or float((slope - right).double().nan_to_num().norm()) <= float(noise)


def _refuse_company(explained: Explained, image: Tensor, alone: Tensor, slope: Tensor | None, norms: _Norms) -> None:
    """AttributionError where the logits of an image change with the other images of its batch."""
    for name, module in explained.model.named_modules():
        if ".quantized.dynamic." in type(module).__module__:
            raise AttributionError(
                f"layer {name} ({type(module).__name__}) is dynamically quantized: it rounds by the range of all "
                "images of a batch, so a map would depend on the chunk; explain the network as it was before"
            )
    low, high, generator = image.amin(), image.amax(), torch.Generator().manual_seed(0)
    noise = torch.rand(image.shape, generator=generator, dtype=torch.float64).to(image)
    others = high + low - image.flip(-1), low + (high - low) * noise
    norms.images.clear()
    try:
        logits, gradient = _run(explained, torch.cat([image, *others]))
    except AttributionError:  # takes one image at a time: chunk=1
        return
    if logits.shape[1] != alone.shape[1]:
        raise AttributionError(
            f"the network must return logits [B, L]; it returns {alone.shape[1]} for one image and {logits.shape[1]} "
            "for each of two"
        )
    change = (logits[0] - alone[0]).abs().max()
    spread, size = (logits[0] - logits[1:]).abs().max(), logits.abs().max()
    allowed = 1e-3 * spread + 256 * torch.finfo(logits.dtype).eps * size
    reaches = gradient is not None and bool(gradient[1:].nan_to_num().any())  # exactly 0 where images are separate
    if change > allowed or reaches or len(logits) in norms.images:
        names = [
            f"layer {name} ({type(m).__name__} without running statistics)"
            for name, m in explained.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
        ]
        cause = ", ".join(names[:3]) or "such as normalization by the statistics of the batch, or weights per batch"
        raise AttributionError(
            f"the logits of an image change with the other images of its batch: {cause}. A map would depend on the "
            "chunk; use running statistics, or group or instance norms"
        )
    if not _alike(slope, None if gradient is None else gradient[:1], image, logits):
        raise AttributionError(
            "torch gives an image another gradient alone than in a batch: a fault of its batch and instance norms "
            "where they get a permuted tensor; call contiguous() on what goes into them"
        )
