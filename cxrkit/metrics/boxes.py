"""What a score is taken of, as papers and their code differ in it: which boxes, which map, which images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import PROTOCOLS, boolean, one_of
from cxrkit.metrics.localisation import energy_pointing_game

__all__ = ["class_agnostic", "energy_pointing_game_boxes", "epg_split", "explained_maps"]

SUBSETS = ("all", "TP", "FN", "FP", "TN")


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
    box_masks = boolean(box_masks)
    if box_masks.ndim < 3:
        raise ParameterError(f"box_masks have shape {tuple(box_masks.shape)}; expected [..., K, H, W]")
    if protocol != "authors":
        return energy_pointing_game(maps, box_masks.any(-3), kind, threshold)
    one_of("kind", kind, ("precision", "recall"))
    scores = energy_pointing_game(torch.as_tensor(maps).unsqueeze(-3), box_masks, kind, threshold)
    if kind == "recall":
        return scores.nanmean(-1)
    return scores.nansum(-1).where(~scores.isnan().all(-1), torch.nan)


def class_agnostic(masks: Tensor) -> Tensor:
    """The union of all labels' boxes, given to every label: bool ``[..., L, H, W]`` -> the same shape.

    Source: paper `bcos`, VinBigData evaluation, whose published code filters boxes by image alone.
    """
    masks = boolean(masks)
    if masks.ndim < 3:
        raise ParameterError(f"masks have shape {tuple(masks.shape)}; expected [..., L, H, W]")
    return masks.any(-3, keepdim=True).expand(masks.shape)


def explained_maps(maps: Tensor, logits: Tensor, target: str | int = "predicted") -> Tensor:
    """The map of one label per image: maps ``[N, L, H, W]`` and logits ``[N, L]`` -> ``[N, H, W]``.

    ``target``: the index of a label, or ``"predicted"``: the label with the highest logit. Of an image that the
    network missed, the latter is the map of another label than the finding's. Source: paper `bcos`, whose
    published code takes the predicted label for the B-cos maps of RSNA and label 1 for LayerCAM.
    """
    maps, logits = torch.as_tensor(maps), torch.as_tensor(logits)
    if maps.ndim != 4 or maps.shape[:2] != logits.shape:
        raise ParameterError(f"maps {tuple(maps.shape)} and logits {tuple(logits.shape)} must be [N, L, H, W], [N, L]")
    if target == "predicted":
        return maps[torch.arange(len(maps), device=maps.device), logits.argmax(1).to(maps.device)]
    if not isinstance(target, int) or not 0 <= target < maps.shape[1]:
        raise ParameterError(f"target {target!r} is neither 'predicted' nor a label's index below {maps.shape[1]}")
    return maps[:, target]


def epg_split(
    scores: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    cutoff: float = 0.5,
    labels: Sequence[str] | None = None,
    protocol: str = "corrected",
    subsets: Sequence[str] = ("all", "TP", "FN"),
) -> pd.DataFrame:
    """Mean score over a label's positives, over those the model found (TP) and over those it missed (FN).

    ``scores``, ``targets`` (1, 0, nan: unknown) and ``probabilities``: ``[N, L]``; found means probability >
    ``cutoff``. "TP" and "FN" are images here, not pixels; ``subsets`` may also ask for "FP" and "TN", the
    negatives that the model found or left alone, where they have a mask (that of all labels, or of a planted
    confounder). An image without a mask has no score: give it the target nan.

    Returns rows (label, subset, mean, std, n, degenerate) for the subsets of every label ("all": the positives),
    then of "macro", the mean over labels. ``n`` counts the averaged images, ``degenerate`` those left out
    because their score is nan; ``std`` is the population's, ddof 0 (over images; for "macro" over labels). A
    label without images in a subset has mean nan and stays out of the macro mean; with ``protocol="authors"``
    it enters every macro mean but that of "all" as 0. Source: paper `bcos`, "EPG", "EPG TP" and "EPG FN", from
    its published code.
    """
    one_of("protocol", protocol, PROTOCOLS)
    for subset in subsets:
        one_of("subset", subset, SUBSETS)
    scores, targets, probabilities = (_table(value) for value in (scores, targets, probabilities))
    if scores.ndim != 2 or not scores.shape == targets.shape == probabilities.shape:
        shapes = f"{scores.shape}, {targets.shape} and {probabilities.shape}"
        raise ParameterError(f"scores, targets and probabilities must share one shape [N, L], got {shapes}")
    names = list(labels) if labels is not None else [str(column) for column in range(scores.shape[1])]
    if len(names) != scores.shape[1]:
        raise ParameterError(f"{len(names)} labels for {scores.shape[1]} columns of scores")
    scored = targets == 1 if {"FP", "TN"}.isdisjoint(subsets) else ~np.isnan(targets)
    if (scored & np.isnan(probabilities)).any():
        row, column = np.argwhere(scored & np.isnan(probabilities))[0]
        raise ParameterError(f"the probability of label {names[column]!r} in row {row} is nan: found or missed?")
    chosen = _chosen(targets, probabilities > cutoff)
    rows = [
        {"label": name, "subset": subset, **_summary(scores[chosen[subset][:, column], column])}
        for column, name in enumerate(names)
        for subset in subsets
    ]
    frame = pd.DataFrame(rows, columns=["label", "subset", "mean", "std", "n", "degenerate"])
    return pd.concat([frame, _macro(frame, subsets, protocol)], ignore_index=True)


def _chosen(targets: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """Which entries belong to which subset, bool ``[N, L]`` each."""
    positive, negative = targets == 1, targets == 0
    split = {"TP": positive & found, "FN": positive & ~found, "FP": negative & found, "TN": negative & ~found}
    return {"all": positive, **split}


def _summary(values: np.ndarray) -> dict[str, float]:
    valid = values[~np.isnan(values)]
    mean, std = (valid.mean(), valid.std()) if len(valid) else (np.nan, np.nan)
    return {"mean": mean, "std": std, "n": len(valid), "degenerate": len(values) - len(valid)}


def _macro(frame: pd.DataFrame, subsets: Sequence[str], protocol: str) -> pd.DataFrame:
    rows = []
    for subset in subsets:
        part = frame[frame["subset"] == subset]
        means = part["mean"].to_numpy(dtype=float, copy=True)
        if protocol == "authors" and subset != "all":
            means[(part["n"] + part["degenerate"]).to_numpy() == 0] = 0.0
        counts = {"n": part["n"].sum(), "degenerate": part["degenerate"].sum()}
        rows.append({"label": "macro", "subset": subset, **_summary(means), **counts})
    return pd.DataFrame(rows)


def _table(values: Tensor) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()
