"""Where a training computes, and in which precision: as low as the maps allow."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cxrkit.errors import ParameterError
from cxrkit.train.parameters import Parameters, TrainParameters

__all__ = [
    "accelerator_for",
    "chosen_device",
    "half_precision_errors",
    "own_random_state",
    "precision_for",
    "seed_global",
]

_CPU = torch.device("cpu")
_ALLOWED = 1e-2
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_device(parameters: Parameters) -> torch.device:
    """The device that the parameters ask for; also sets the number of CPU threads.

    "cuda" without a number is, as "auto" is, the GPU of this process: each that a launcher has started has its own.
    Raises ParameterError for a device that isn't there.
    """
    if parameters.threads:
        torch.set_num_threads(parameters.threads)
    asked = parameters.device
    if asked == "auto" and not torch.cuda.is_available():
        return _CPU
    device = torch.device("cuda" if asked == "auto" else asked)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ParameterError(f"device {asked!r}: there is no MPS device here; use 'auto' or 'cpu'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ParameterError(f"device {asked!r}: there is no CUDA device here; use 'auto' or 'cpu'")
        device = _own_gpu(device, asked)
        torch.cuda.set_device(device)
    return device


def _own_gpu(device: torch.device, asked: str) -> torch.device:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    index = local if device.index is None else device.index
    if index < count:
        return torch.device("cuda", index)
    problem = f"there are only {count} of them, counted from 0"
    if device.index is None:
        problem += f", and this is process {local} of its machine; start at most one process for each, or take 'cpu'"
    raise ParameterError(f"device {asked!r}: {problem}")


def accelerator_for(parameters: TrainParameters, precision: str = "no"):
    """The accelerator of this process, alone or one of several that `accelerate launch` or `torchrun` has started."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = chosen_device(parameters)
    AcceleratorState._reset_state(True)  # a notebook may train again in the same kernel, on another device
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def precision_for(model: nn.Module, images: Tensor, parameters: TrainParameters) -> tuple[str, str]:
    """The precision to train in ("no" is float32), and a sentence on it for the card.

    "auto" wants bfloat16 on GPUs that have it. A B-cos network gets the half precision that is wanted if its maps stay
    complete in it: on a few images the error of their totals must stay within 1e-2 of that in float32. Maps of other
    networks have no total to keep. Raises ParameterError for fp16 without a GPU.
    """
    device, wanted = chosen_device(parameters), parameters.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if wanted == "no":
        return "no", _float32(device)
    if wanted == "fp16" and device.type != "cuda":
        raise ParameterError("mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no' here")
    full, half, moved = half_precision_errors(model, images, _HALF[wanted], device)
    logits = f"logits at the start differ from float32 by {moved:.1e}"
    if getattr(model, "encoding", "") != "add_inverse":
        return wanted, f"{wanted}; {logits}"
    if half - full < _ALLOWED:  # false for nan too
        return wanted, f"{wanted}; maps add up to their logits within {half:.1e} (float32: {full:.1e}); {logits}"
    return "no", f"{_float32(device)}, because maps in {wanted} add up to their logits only within {half:.1e}"


def _float32(device: torch.device) -> str:
    """float32 in words: on a GPU torch multiplies in TF32 (ten bits of mantissa) wherever that is allowed."""
    allowed = {"convolutions": torch.backends.cudnn.allow_tf32, "matrices": torch.backends.cuda.matmul.allow_tf32}
    inexact = [name for name, on in allowed.items() if on] if device.type == "cuda" else []
    return f"float32 ({' and '.join(inexact)} in TF32)" if inexact else "float32"


def half_precision_errors(
    model: nn.Module, images: Tensor, dtype: torch.dtype, device: torch.device | str
) -> tuple[float, float, float]:
    """What half precision does to a network: errors of completeness in full and in half precision, and the logits'.

    Completeness: how far the total of each label's map (encoded image x gradient, in explanation mode where there is
    one) is from the logit less its bias; logits: how far they are from those in float32. Each is the root of the mean
    square over images and labels, relative to that of the logits. A copy of the model is used, its batch norm
    calibrated on the images. (`cxrkit.attribute` itself always computes in full precision.)
    """
    from cxrkit.attribution.preparation import explanation_mode
    from cxrkit.models import Classifier, calibrate

    twin = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    images = images.to(device)
    encode, classify = (twin.encode, twin.classify) if isinstance(twin, Classifier) else (nn.Identity(), twin)
    calibrate(twin, images)
    logits, totals = [], []
    for half in (False, True):
        encoded = encode(images).detach().requires_grad_()
        with explanation_mode(twin, True), torch.autocast(images.device.type, dtype=dtype, enabled=half):
            found = classify(encoded)
        gradients = [torch.autograd.grad(one.sum(), encoded, retain_graph=True)[0] for one in found.unbind(1)]
        totals.append(torch.stack([(encoded * one).double().flatten(1).sum(1) for one in gradients], 1).detach())
        logits.append(found.detach().double() - getattr(model, "logit_bias", 0.0))
    gaps = [total - logit for total, logit in zip(totals, logits, strict=True)]
    full, half, moved = (
        (error.square().mean() / logit.square().mean()).sqrt().item()
        for error, logit in ((gaps[0], logits[0]), (gaps[1], logits[1]), (logits[1] - logits[0], logits[0]))
    )
    return full, half, moved


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is seeded inside, the global random state is afterwards what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout and its like draw from: that of the CPU, and of this device alone."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
