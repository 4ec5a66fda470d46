"""What a score is taken of, as papers and their code differ in it: which boxes, which map, which images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.classification import checked_cutoffs, checked_predictions
from cxrkit.metrics.inputs import PROTOCOLS, boolean, entries, label_names, numbers, one_of, real, real_maps, whole
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


def epg_split(
    scores: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    cutoff: float | Sequence[float] = 0.5,
    labels: Sequence[str] | None = None,
    protocol: str = "corrected",
    subsets: Sequence[str] = ("all", "TP", "FN"),
) -> pd.DataFrame:
    """Mean score over a label's positives, over those the model found (TP) and over those it missed (FN).

    ``scores``, ``targets`` (1, 0, nan: unknown) and ``probabilities``: ``[N, L]``; found means probability >
    ``cutoff``, one number or one per label (nan: a label without a cutoff has positives only, none of them found or
    missed). "TP" and "FN" are images here, not pixels; ``subsets`` may also ask for "FP" and "TN", the
    negatives that the model found or left alone, where they have a mask (that of all labels, or of a planted
    confounder). An image without a mask has no score: give it the target nan.

    Returns rows (label, subset, mean, std, n, degenerate) for the subsets of every label ("all": the positives),
    then of "macro", the mean over labels. ``n`` counts the averaged images, ``degenerate`` those left out
    because their score is nan; ``std`` is the population's, ddof 0 (over images; for "macro" over labels). A
    label without images in a subset has mean nan and stays out of the macro mean; with ``protocol="authors"``
    it enters every macro mean but that of "all" as 0. Raises ParameterError for shapes that differ, targets other
    than 0, 1, nan, and probabilities outside [0, 1]. Source: paper `bcos`, "EPG", "EPG TP" and "EPG FN", from
    its published code.
    """
    one_of("protocol", protocol, PROTOCOLS)
    for subset in (subsets := entries("subsets", subsets)):
        one_of("subset", subset, SUBSETS)
    scores, targets = numbers("scores", scores), numbers("targets", targets)
    probabilities = numbers("probabilities", probabilities)
    if scores.ndim != 2 or not scores.shape == targets.shape == probabilities.shape:
        shapes = f"{scores.shape}, {targets.shape} and {probabilities.shape}"
        raise ParameterError(f"scores, targets and probabilities must share one shape [N, L], got {shapes}")
    count = scores.shape[1]
    names = label_names(map(str, range(count)) if labels is None else labels, count)
    scored = targets == 1 if {"FP", "TN"}.isdisjoint(subsets) else ~np.isnan(targets)
    targets, probabilities = checked_predictions(targets, probabilities, names, scored)
    chosen = _chosen(targets, probabilities, checked_cutoffs(cutoff, len(names)))
    rows = [
        {"label": name, "subset": subset, **_summary(scores[chosen[subset][:, column], column])}
        for column, name in enumerate(names)
        for subset in subsets
    ]
    frame = pd.DataFrame(rows, columns=["label", "subset", "mean", "std", "n", "degenerate"])
    return pd.concat([frame, _macro(frame, subsets, protocol)], ignore_index=True)


def _chosen(targets: np.ndarray, probabilities: np.ndarray, cutoffs: np.ndarray) -> dict[str, np.ndarray]:
    """Which entries belong to which subset, bool ``[N, L]`` each."""
    positive, negative = targets == 1, targets == 0
    found, missed = probabilities > cutoffs, probabilities <= cutoffs  # neither where the cutoff is nan
    split = {"TP": positive & found, "FN": positive & missed, "FP": negative & found, "TN": negative & missed}
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
