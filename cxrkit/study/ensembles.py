"""Votes of several training runs together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cxrkit.errors import DataError, ParameterError
from cxrkit.metrics import classification_report, hard_vote, soft_vote
from cxrkit.study import runs

__all__ = ["ensemble", "exclusive", "scores_of"]

_ID = ["image_id", "patient_id", "split", "label"]


def ensemble(members: Sequence[runs.Run], cutoff: float = 0.5) -> pd.DataFrame:
    """Votes of training runs on the test images of each fold: a row per image and label.

    Runs of the same fold vote together, so that no image is judged by a network that has learnt from it. Columns:
    image_id, patient_id, split, label, target, fold, members, exclusive (see :func:`exclusive`), probability (the soft
    vote: the mean) and votes (the hard vote: the share of members above `cutoff`; more than 0.5 is the majority. Of
    exclusive classes a member votes for its likeliest, whatever the cutoff). Source: paper `covid`, which writes of
    majority and codes the mean. Raises DataError when runs of one fold have other images, labels or targets,
    ParameterError without runs, for one that is no training, and where only some have exclusive classes.
    """
    if not members:
        raise ParameterError("an ensemble needs at least one run")
    for run in members:
        if run.kind != "train":
            raise ParameterError(f"{run.key} is a run of kind {run.kind!r}; only training runs make an ensemble")
    kinds = [exclusive(run) for run in members]
    if len(set(kinds)) > 1:
        one, other = (members[kinds.index(kind)].key for kind in (True, False))
        raise ParameterError(
            f"{one} chose among classes that exclude each other (cross-entropy), {other} judged each label for itself; "
            "give runs of one kind"
        )
    folds: dict[int, list[runs.Run]] = {}
    for run in members:
        folds.setdefault(run.parameters.fold, []).append(run)
    return pd.concat([_of_fold(fold, folds[fold], cutoff, kinds[0]) for fold in sorted(folds)], ignore_index=True)


def exclusive(run: runs.Run) -> bool:
    """Whether a training's classes exclude each other: a cross-entropy over two labels or more, hence a softmax."""
    return run.parameters.loss == "cross_entropy" and run.frame("predictions")["label"].nunique() > 1


def _of_fold(fold: int, members: list[runs.Run], cutoff: float, one_of_several: bool) -> pd.DataFrame:
    first = members[0].frame("predictions")
    parts = []
    for run in members:
        frame = run.frame("predictions")
        if len(frame) != len(first) or not frame[[*_ID, "target"]].equals(first[[*_ID, "target"]]):
            raise DataError(f"{run.key} and {members[0].key} of fold {fold} differ in images, labels or targets")
        parts.append(frame["probability"].to_numpy())
    found = np.stack(parts).reshape(len(parts), -1, first["label"].nunique())
    choices = np.eye(found.shape[-1])[found.argmax(-1)] if one_of_several else found
    return first[[*_ID, "target"]].assign(
        fold=fold,
        members=len(members),
        exclusive=one_of_several,
        probability=soft_vote(found).ravel(),
        votes=hard_vote(choices, 0.5 if one_of_several else cutoff).ravel(),
    )


def scores_of(predictions: pd.DataFrame, cutoff: float = 0.5, column: str = "probability") -> pd.DataFrame:
    """Classification metrics per label of an ensemble's votes: `column="probability"` (soft) or `"votes"` (hard).

    Of exclusive classes the one with the largest mean or with the most votes is found (the first of several), whatever
    the cutoff.
    """
    labels = list(dict.fromkeys(predictions["label"]))
    shape = (-1, len(labels))
    targets, found = (predictions[name].to_numpy().reshape(shape) for name in ("target", column))
    at = 0.5 if column == "votes" else cutoff
    return classification_report(targets, found, labels, cutoff=at, exclusive=bool(predictions["exclusive"].all()))
