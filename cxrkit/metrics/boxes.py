"""Which boxes and which map a score is taken of, where papers and their code differ."""

from __future__ import annotations

import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import PROTOCOLS, boolean, one_of, real, real_maps, whole
from cxrkit.metrics.localisation import energy_pointing_game

__all__ = ["class_agnostic", "energy_pointing_game_boxes", "explained_maps"]


def energy_pointing_game_boxes(
    maps: Tensor,
    box_masks: Tensor,
    kind: str = "precision",
    threshold: float = 0.0,
    protocol: str = "corrected",
) -> Tensor:
    """Energy-based pointing game of several boxes: maps ``[..., H, W]``, box masks ``[..., K, H, W]`` -> ``[...]``.

    ``"corrected"`` (and ``"paper"``): the union of the boxes is one mask. ``"authors"``: each box is scored
    alone; precisions are added (an overlap counts twice, so the sum may exceed 1) and recalls are averaged. Box
    masks without a pixel are padding. nan as in :func:`energy_pointing_game`; a box whose recall is nan stays
    out of the mean. Source: paper `bcos`, appendix B; ``"authors"`` as in its published code for RSNA.
    """
    one_of("protocol", protocol, PROTOCOLS)
    box_masks = boolean(box_masks, "box_masks", "K, H, W")
    if protocol != "authors":
        return energy_pointing_game(maps, box_masks.any(-3), kind, threshold)
    one_of("kind", kind, ("precision", "recall"))
    scores = energy_pointing_game(real_maps(maps).unsqueeze(-3), box_masks, kind, threshold)
    if kind == "recall":
        return scores.nanmean(-1)
    return scores.nansum(-1).where(~scores.isnan().all(-1), torch.nan)


def class_agnostic(masks: Tensor) -> Tensor:
    """The union of all labels' boxes, given to every label: bool ``[..., L, H, W]`` -> the same shape.

    Source: paper `bcos`, VinBigData evaluation, whose published code filters boxes by image alone.
    """
    masks = boolean(masks, axes="L, H, W")
    return masks.any(-3, keepdim=True).expand(masks.shape)


def explained_maps(maps: Tensor, logits: Tensor, target: str | int = "predicted") -> Tensor:
    """The map of one label per image: maps ``[N, L, H, W]`` and logits ``[N, L]`` -> ``[N, H, W]``.

    ``target``: the index of a label, or ``"predicted"``: the label with the highest logit. Of an image that the
    network missed, the latter is the map of another label than the finding's. Source: paper `bcos`, whose
    published code takes the predicted label for the B-cos maps of RSNA and label 1 for LayerCAM.
    """
    maps, logits = real_maps(maps, axes="N, L, H, W"), real("logits", logits)
    if maps.ndim != 4 or maps.shape[:2] != logits.shape:
        raise ParameterError(f"maps {tuple(maps.shape)} and logits {tuple(logits.shape)} must be [N, L, H, W], [N, L]")
    if isinstance(target, str) and target == "predicted":
        if logits.isnan().any():
            raise ParameterError("logits hold nan: which label is predicted?")
        return maps[torch.arange(len(maps), device=maps.device), logits.argmax(1).to(maps.device)]
    return maps[:, whole("target", target, 0, maps.shape[1] - 1)]
