"""Training a classifier: one loop to read at a sitting, on a CPU, one GPU or many (accelerate)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cxrkit.data
import cxrkit.models
from cxrkit.data.augment import augmentation
from cxrkit.data.dataset import SPLITS, collate
from cxrkit.errors import DataError, ModelError, ParameterError
from cxrkit.study.experiment import Parameters, TrainParameters
from cxrkit.study.runs import in_project

__all__ = ["Fit", "fit", "load_data", "make_model", "predict", "print_epoch", "sample_weights"]


@dataclass
class Fit:
    """What training gives: the best model by validation AUC, the history by epoch, and which epoch was best."""

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int


def load_data(parameters: TrainParameters) -> cxrkit.data.Dataset:
    """The data set that the parameters name, every image, with its fold's split column."""
    return cxrkit.data.load(
        parameters.dataset,
        root=in_project(parameters.root) if parameters.root else None,
        size=parameters.size,
        fold=parameters.fold,
        **parameters.dataset_options,
    )


def make_model(parameters: TrainParameters, labels: tuple[str, ...]) -> nn.Module:
    """The untrained network that the parameters name, with one logit per label."""
    return cxrkit.models.create(
        parameters.model,
        labels=labels,
        weights=str(local) if (local := in_project(parameters.weights or ".")).is_file() else parameters.weights,
        antialias=parameters.antialias,
        protocol=parameters.protocol,
        seed=parameters.seed,
        copy_weights=parameters.copy_weights,
    )


def print_epoch(row: dict) -> None:
    """Print one line of the history."""
    print(
        f"epoch {row['epoch']:3d}   train loss {row['train_loss']:.4f}   "
        f"validation loss {row['validation_loss']:.4f}   AUC {row['validation_auc']:.3f}"
    )


def fit(
    model: nn.Module,
    dataset: cxrkit.data.Dataset,
    parameters: TrainParameters,
    report: Callable[[dict], None] | None = None,
) -> Fit:
    """Train `model` on the training split, choose the epoch on the validation split; the test split stays untouched.

    Binary cross-entropy per label, Adam, learning rate down tenfold when the validation loss stalls (paper `bcos`,
    1.7). `report` is called with each epoch's row. Raises ModelError when the loss stops being a number.
    """
    if missing := [name for name in SPLITS if not (dataset.table["split"] == name).any()]:
        raise DataError(
            f"{dataset.name}: no image is in the split {' or '.join(missing)}; training needs all of {SPLITS}"
        )
    set_seed(parameters.seed)
    accelerator = accelerator_for(parameters)
    train, validation = dataset.split("train"), dataset.split("validation")
    if parameters.workers == 0:
        train, validation = train.cached(), validation.cached()
    targets = target_table(train)
    # Two streams: processes that draw batches of different sizes must still agree on the order of images.
    generator = torch.Generator().manual_seed(parameters.seed)
    noise = torch.Generator().manual_seed(parameters.seed + 1_000_003 * (1 + accelerator.process_index))
    augment = augmentation(parameters.augment)

    optimizer = torch.optim.Adam(model.parameters(), lr=parameters.learning_rate, weight_decay=parameters.weight_decay)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=parameters.patience)
    network, optimizer = accelerator.prepare(model, optimizer)
    weights = sample_weights(targets, parameters.protocol) if parameters.oversample else None

    history, best_auc, best_state, best_epoch = [], -np.inf, None, 0
    for epoch in range(1, parameters.epochs + 1):
        network.train()
        losses = []
        order = _order(len(train), parameters.batch_size, generator, weights, accelerator)
        for batch in _loader(train, order, parameters.workers):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                logits = network(augment(batch.images, noise))
            loss = masked_bce(logits.float(), batch.targets)
            if not torch.isfinite(loss):
                rate = parameters.learning_rate
                raise ModelError(f"the loss became {loss.item()} in epoch {epoch}; lower learning_rate ({rate:g})")
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())

        score = _validate(accelerator.unwrap_model(network), validation, parameters)
        row = {
            "epoch": epoch,
            "train_loss": float(np.mean(losses)),
            **score,
            "learning_rate": scheduler.get_last_lr()[0],
        }
        history.append(row)
        scheduler.step(score["validation_loss"])
        # Without both classes in the validation split there is no AUC: then the loss decides.
        criterion = score["validation_auc"] if np.isfinite(score["validation_auc"]) else -score["validation_loss"]
        if criterion > best_auc:
            best_auc, best_epoch = criterion, epoch
            best_state = copy.deepcopy(accelerator.unwrap_model(network).state_dict())
        if report is not None and accelerator.is_main_process:
            report(row)

    trained = accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # full precision from here on
    trained.load_state_dict(best_state)
    return Fit(trained.eval(), pd.DataFrame(history), best_epoch)


def accelerator_for(parameters: TrainParameters) -> Accelerator:
    """The accelerator for the wanted device; mixed precision (bfloat16) is switched on where the device has it."""
    device = chosen_device(parameters)
    precision = parameters.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    AcceleratorState._reset_state(True)  # a notebook may train again in the same kernel, on another device
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")


def chosen_device(parameters: Parameters) -> torch.device:
    """The device that the parameters ask for; also sets the number of CPU threads. Raises ParameterError if it isn't
    there."""
    if parameters.threads:
        torch.set_num_threads(parameters.threads)
    if parameters.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parameters.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ParameterError(f"device {parameters.device!r}: there is no CUDA device here; use 'auto' or 'cpu'")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ParameterError(f"device {parameters.device!r}: there are only {torch.cuda.device_count()} of them")
        torch.cuda.set_device(device)
    return device


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with logits, mean over the known targets; NaN targets don't count."""
    known = ~targets.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp(min=1)


def sample_weights(targets: Tensor, protocol: str = "corrected") -> Tensor:
    """Weight of each training image when images are drawn with replacement; targets [N, L] -> [N].

    One label: 1 / size of the image's class. Several labels: the sum over an image's positive labels of 1 / their
    count; with `protocol="authors"` each is clipped to [1/3, 3] as in the code of paper `bcos`, which makes all of
    them 1/3 and leaves images without finding undrawn. Otherwise images without finding form a class of their own,
    drawn like a label.
    """
    positive = targets.nan_to_num() > 0.5
    if targets.shape[1] == 1:
        counts = torch.stack([(~positive).sum(), positive.sum()]).clamp(min=1)
        return (1.0 / counts)[positive[:, 0].long()]
    inverse = 1.0 / positive.sum(0).clamp(min=1)
    if protocol == "authors":
        return (positive * inverse.clamp(1 / 3, 3)).sum(1)
    healthy = ~positive.any(1)
    return (positive * inverse).sum(1) + healthy / healthy.sum().clamp(min=1)


def target_table(dataset: cxrkit.data.Dataset) -> Tensor:
    """All targets, float32 [N, L], without reading an image."""
    return torch.tensor(dataset.table[list(dataset.labels)].to_numpy(dtype=np.float32))


def _order(
    count: int, size: int, generator: torch.Generator, weights: Tensor | None, accelerator: Accelerator
) -> list[list[int]]:
    """The batches of one epoch as lists of rows; of several processes each takes its share of every batch."""
    if weights is None:
        rows = torch.randperm(count, generator=generator)
    else:
        rows = torch.multinomial(weights, count, replacement=True, generator=generator)
    # Batch norm has nothing to work with in a rest of one image.
    batches = [batch for batch in rows.split(size) if len(batch) > accelerator.num_processes]
    if not batches:
        raise ParameterError(f"{count} training images are too few: every process needs two or more in a batch")
    return [batch[accelerator.process_index :: accelerator.num_processes].tolist() for batch in batches]


def _loader(dataset: cxrkit.data.Dataset, order: list[list[int]], workers: int = 0) -> DataLoader:
    return DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate)


@torch.no_grad()
def predict(model: nn.Module, dataset: cxrkit.data.Dataset, batch_size: int = 32) -> pd.DataFrame:
    """Logits and probabilities of every image and label, computed where the model is.

    A row per image and label: image_id, patient_id, split, label, target, logit, probability.
    """
    model.eval()
    device = next(model.parameters()).device
    order = [rows.tolist() for rows in torch.arange(len(dataset)).split(batch_size)]
    logits = torch.cat([model(batch.images.to(device)).float().cpu() for batch in _loader(dataset, order)])
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
            "probability": logits.sigmoid().numpy().ravel(),
        }
    )


def _validate(model: nn.Module, dataset: cxrkit.data.Dataset, parameters: TrainParameters) -> dict[str, float]:
    frame = predict(model, dataset, 2 * parameters.batch_size)
    shape = (len(dataset), len(dataset.labels))
    logits, targets = (torch.tensor(frame[name].to_numpy()).view(shape) for name in ("logit", "target"))
    return {
        "validation_loss": masked_bce(logits, targets).item(),
        "validation_auc": macro_auc(targets.numpy(), logits.numpy()),
    }


def macro_auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean area under the ROC curve over the labels that have both classes; nan when none has."""
    values = []
    for target, score in zip(targets.T, scores.T, strict=True):
        known = np.isfinite(target)
        if len(np.unique(target[known])) == 2:
            values.append(roc_auc_score(target[known], score[known]))
    return float(np.mean(values)) if values else float("nan")
