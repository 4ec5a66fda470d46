"""What training minimises: cross-entropies over the known targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cxrkit.errors import DataError

__all__ = ["Loss", "loss_for", "probabilities"]


@dataclass(frozen=True)
class Loss:
    """A loss as a quotient, so that a batch may be computed in parts: `total` summed over parts / `weight` of all.

    `kind`: "bce" (each label for itself) or "cross_entropy" (classes that exclude each other; with one label, that
    label against the rest, which equals "bce"). `class_weights` [L]: weight of a label's positives in the binary loss,
    of a class in the cross-entropy; None: 1. NaN targets don't count; in the cross-entropy the whole image doesn't.
    """

    kind: str = "bce"
    class_weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of logits [B, L] with targets [B, L] of 0, 1 or NaN; 0 where nothing is known."""
        return self.total(logits, targets) / self.weight(targets).clamp(min=1e-12)

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The weighted sum of the losses of all known targets."""
        known = ~targets.isnan()
        goals = targets.nan_to_num()
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if self._exclusive(targets):
            logs = logits.log_softmax(1) * goals * known.all(1, keepdim=True)
            return -(logs if weights is None else logs * weights).sum()
        each = F.binary_cross_entropy_with_logits(logits, goals, pos_weight=weights, reduction="none")
        return (each * known).sum()

    def weight(self, targets: Tensor) -> Tensor:
        """What the total is divided by: the number of known targets, or the summed weight of the images' classes."""
        known = ~targets.isnan()
        if not self._exclusive(targets):
            return known.sum().float()
        goals = targets.nan_to_num() * known.all(1, keepdim=True)
        return (goals if self.class_weights is None else goals * self.class_weights.to(goals.device)).sum()

    def _exclusive(self, targets: Tensor) -> bool:
        return self.kind == "cross_entropy" and targets.shape[1] > 1


def loss_for(kind: str, targets: Tensor, class_weights: str = "none") -> Loss:
    """The loss that fits the training targets [N, L].

    `class_weights="balanced"`: negatives / positives of each label in the binary losses, images / (classes x images of
    the class) in the cross-entropy (paper `path`); a label without positives weighs 1. Raises DataError when a
    cross-entropy meets an image of no or several classes.
    """
    known = ~targets.isnan()
    count = targets.shape[1]
    exclusive = kind == "cross_entropy" and count > 1
    if exclusive:
        rows = (known.all(1) & (targets.nan_to_num().sum(1) != 1)).nonzero().flatten().tolist()
        if rows:
            raise DataError(
                f"loss 'cross_entropy' needs exactly one class per image; {len(rows)} training images have none or "
                f"several (first: row {rows[0]}); name a healthy_class for images without finding, or take 'bce'"
            )
    if class_weights == "none":
        return Loss(kind)
    positives = targets.nan_to_num().sum(0)
    if exclusive:
        weights = positives.sum() / (count * positives.clamp(min=1))
    else:
        weights = (known.sum(0) - positives) / positives.clamp(min=1)
    return Loss(kind, torch.where(positives > 0, weights, 1.0))


def probabilities(logits: Tensor, activation: str = "sigmoid") -> Tensor:
    """Probabilities of logits [N, L]: a sigmoid for each label, or a softmax over classes."""
    return logits.softmax(1) if activation == "softmax" else logits.sigmoid()
