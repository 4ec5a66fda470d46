"""Oversampling: how often each training image is drawn, as published and corrected."""

from __future__ import annotations

import torch
from torch import Tensor

from cxrkit.errors import ParameterError

__all__ = ["sample_weights"]

_PROTOCOLS = ("paper", "authors", "corrected")


def sample_weights(targets: Tensor, protocol: str = "corrected", exclusive: bool = False) -> Tensor:
    """Weight of each training image when images are drawn with replacement: float32 ``[N, L]`` -> ``[N]``.

    ``targets``: 0, 1 or NaN (unknown, counted as 0). One label, or classes that exclude each other (``exclusive``): 1 /
    size of the image's class, whatever the protocol. Several labels: the sum over an image's positive labels of 1 /
    their count; images without finding form a class of their own, drawn like a label. ``"authors"``: each 1 / count is
    clipped to [1/3, 3], which makes all of them 1/3, and images without finding weigh 0: they are never drawn. Raises
    ParameterError for targets of another shape, for an unknown protocol, or when nothing would be drawn. Source: paper
    `bcos`, 1.7, text and published code.
    """
    if targets.ndim != 2 or not targets.shape[1]:
        raise ParameterError(f"targets must be [N, L] with at least one label, got {tuple(targets.shape)}")
    if protocol not in _PROTOCOLS:
        raise ParameterError(f"protocol={protocol!r} is unknown; use one of {list(_PROTOCOLS)}")
    positive = targets.nan_to_num() > 0.5
    if targets.shape[1] == 1:
        counts = torch.stack([(~positive).sum(), positive.sum()]).clamp(min=1)
        return (1.0 / counts)[positive[:, 0].long()]
    inverse = 1.0 / positive.sum(0).clamp(min=1)
    if protocol == "authors" and not exclusive:
        if len(targets) and not positive.any():
            raise ParameterError("protocol='authors' draws diseased images only, and no image has a finding")
        return (positive * inverse.clamp(1 / 3, 3)).sum(1)
    healthy = ~positive.any(1)
    return (positive * inverse).sum(1) + healthy / healthy.sum().clamp(min=1)
