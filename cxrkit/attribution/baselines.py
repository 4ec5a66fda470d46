"""Images without evidence: where paths start, and what occluded pixels are filled with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cxrkit.attribution.registry import check_choice
from cxrkit.errors import ParameterError

__all__ = ["BASELINES", "baseline_images"]


def baseline_images(images: Tensor, baseline: str | float | Tensor) -> Tensor:
    """The image without evidence that a method starts from or fills in, [B, C, H, W].

    "black" (0), "white" (1), "mean" (each image's own mean per channel), "blur" (the image under a Gaussian of
    1/16 of its shorter side), a number, or a tensor that broadcasts to the images. Raises ParameterError for
    anything else and for values that aren't finite.
    """
    if isinstance(baseline, Tensor):
        try:
            start = baseline.detach().to(images).expand_as(images)
        except RuntimeError:
            shapes = f"{list(baseline.shape)} for images {list(images.shape)}"
            raise ParameterError(f"baseline doesn't broadcast to the images: {shapes}") from None
    elif isinstance(baseline, str):
        check_choice("baseline", baseline, BASELINES)
        start = BASELINES[baseline](images)
    elif isinstance(baseline, (int, float)) and not isinstance(baseline, bool):
        start = torch.full_like(images, float(baseline))
    else:
        raise ParameterError(f"baseline must be a name, a number or a tensor; got {type(baseline).__name__}")
    if not start.isfinite().all():
        raise ParameterError("baseline holds NaN or infinite values")
    return start


def _blurred(images: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    sigma = max(min(images.shape[-2:]) / 16, 0.5)
    reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [2 * reach + 1] * 2, [sigma] * 2)


BASELINES = {
    "black": torch.zeros_like,
    "white": torch.ones_like,
    "mean": lambda images: images.mean((2, 3), keepdim=True).expand_as(images),
    "blur": _blurred,
}
