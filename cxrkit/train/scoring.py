"""What a network says of a split, and how good that is: predictions, AUC, F1, accuracy, loss."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from cxrkit.data import Dataset
from cxrkit.metrics import operating_cutoffs
from cxrkit.train.loader import Feed, target_table
from cxrkit.train.losses import Loss, probabilities

__all__ = ["activation_of", "cutoffs_of", "logits_of", "macro_auc", "predict", "scores", "selections", "value_of"]


def activation_of(model: nn.Module) -> str:
    """What turns the model's logits into probabilities: "softmax" after training by cross-entropy, else "sigmoid"."""
    return getattr(model, "card", {}).get("activation", "sigmoid")


def predict(model: nn.Module, dataset: Dataset, batch_size: int = 32) -> pd.DataFrame:
    """Logits and probabilities of every image and label, computed where the model is.

    A row per image and label: image_id, patient_id, split, label, target, logit, probability.
    """
    logits = logits_of(model, Feed(dataset, device=next(model.parameters()).device, keep=False), batch_size)
    count, labels = len(dataset), list(dataset.labels)
    names = {
        name: np.repeat(dataset.table[name].to_numpy(), len(labels)) for name in ("image_id", "patient_id", "split")
    }
    return pd.DataFrame(
        names
        | {
            "label": labels * count,
            "target": target_table(dataset).numpy().ravel(),
            "logit": logits.numpy().ravel(),
            "probability": probabilities(logits, activation_of(model)).numpy().ravel(),
        }
    )


@torch.no_grad()
def logits_of(model: nn.Module, feed: Feed, batch_size: int, accelerator=None) -> Tensor:
    """Logits float32 [N, L] on the CPU, in the order of the images; several processes share the work."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    count = len(feed)
    # All processes get equally many rows, so that they can be gathered; the surplus is cut off.
    mine = torch.arange(rank, -(-count // world) * world, world) % count
    was_training = model.training
    model.eval()
    parts = [model(images).float() for images, _ in feed.batches([part.tolist() for part in mine.split(batch_size)])]
    model.train(was_training)
    logits = torch.cat(parts)
    if world > 1:
        gathered = accelerator.gather(logits.contiguous())  # rank after rank
        logits = gathered.view(world, len(mine), -1).transpose(0, 1).flatten(0, 1)[:count]
    return logits.cpu()


def scores(
    logits: Tensor, targets: Tensor, loss: Loss, activation: str = "sigmoid", healthy: bool = False
) -> dict[str, float]:
    """Loss, macro AUC, macro F1 and accuracy (share of right decisions) of logits [N, L].

    A label is decided at probability 0.5, exclusive classes by the largest probability. F1: mean over the labels that
    have a positive; without a true positive it is 0. `healthy`: the last label is an added class of images without
    finding, and takes no part in F1 (paper `bcos`, RSNA: the F1 of pneumonia).
    """
    known = ~targets.isnan()
    ranks = logits.log_softmax(1) if activation == "softmax" else logits  # probabilities may tie at 1
    positive = targets.nan_to_num() > 0.5
    if activation == "softmax":
        found = torch.zeros_like(positive).scatter_(1, logits.argmax(1, keepdim=True), True)
        right = (found == positive).all(1)[known.all(1)]
    else:
        found = logits > 0
        right = (found == positive)[known]
    hits, wrong = (found & positive & known).sum(0), ((found != positive) & known).sum(0)
    counted = (positive & known).any(0)
    if healthy:
        counted[-1] = False
    f1 = (2 * hits / (2 * hits + wrong).clamp(min=1))[counted]
    return {
        "loss": loss(logits, targets).item(),
        "auc": macro_auc(targets.numpy(), ranks.numpy()),
        "f1": f1.mean().item() if len(f1) else float("nan"),
        "accuracy": right.float().mean().item() if len(right) else float("nan"),
    }


def cutoffs_of(
    logits: Tensor, dataset: Dataset, activation: str = "sigmoid", criterion: str = "youden"
) -> pd.DataFrame:
    """The probability above which a label is best called on these images, of logits [N, L]: label, cutoff, criterion.

    `criterion`: as in `metrics.operating_cutoffs`. Meant for the validation split; nan for a label of one class.
    """
    labels, chances = list(dataset.labels), probabilities(logits.double(), activation)
    cutoffs = operating_cutoffs(target_table(dataset).numpy(), chances.numpy(), labels, criterion)
    return pd.DataFrame({"label": labels, "cutoff": cutoffs, "criterion": criterion})


def macro_auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean area under the ROC curve over the labels that have both classes; nan when none has."""
    values = [area(target, score) for target, score in zip(targets.T, scores.T, strict=True)]
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def area(target: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of one label, from the ranks of its positives (Mann and Whitney), since a resample needs
    no thresholds; unknown targets don't count, nan where a class is missing."""
    known = np.isfinite(target)
    positive = target[known] > 0.5
    count, rest = positive.sum(), (~positive).sum()
    if not count or not rest:
        return np.nan
    return float((rankdata(score[known])[positive].sum() - count * (count + 1) / 2) / (count * rest))


def value_of(row: dict, split: str, criterion: str) -> float:
    """What the choice of the epoch looks at: higher is better. Without both classes there is no AUC: then the loss."""
    value = row[f"{split}_{criterion}"]
    if criterion == "loss" or not math.isfinite(value):
        return -row[f"{split}_loss"]
    return value


def selections(history: pd.DataFrame, criterion: str = "auc") -> pd.DataFrame:
    """The epoch that each split would choose, and what each split then shows: how much a choice on the test split
    flatters.

    A row per split of the history: chosen_on, epoch, and the criterion and AUC on every split in that epoch. Test
    columns are there only in a training that was chosen on the test split.
    """
    splits = [name for name in ("validation", "test") if f"{name}_loss" in history]
    rows = []
    for split in splits:
        values = [value_of(row, split, criterion) for row in history.to_dict("records")]
        row = history.iloc[int(np.argmax(values))]
        shown = {f"{name}_{key}": row[f"{name}_{key}"] for name in splits for key in dict.fromkeys((criterion, "auc"))}
        rows.append({"chosen_on": split, "epoch": int(row["epoch"])} | shown)
    return pd.DataFrame(rows)
