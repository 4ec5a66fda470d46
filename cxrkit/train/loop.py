"""Training a classifier: one loop to read at a sitting, on a CPU, one GPU, many GPUs or many machines (accelerate)."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import nn

import cxrkit.data
import cxrkit.models
from cxrkit.data.augment import augmentation
from cxrkit.data.dataset import SPLITS
from cxrkit.data.sampling import sample_weights
from cxrkit.errors import DataError, ModelError
from cxrkit.train.checkpoints import Checkpoints, State, check_same
from cxrkit.train.devices import accelerator_for, own_random_state, precision_for, seed_global
from cxrkit.train.loader import Feed, Step, plan_epoch, seed_of, target_table
from cxrkit.train.losses import Loss, loss_for
from cxrkit.train.optimizer import LearningRate, optimizer_for
from cxrkit.train.parameters import TrainParameters
from cxrkit.train.scoring import cutoffs_of, logits_of, scores, value_of

__all__ = ["Fit", "fit", "print_epoch"]

_PATIENT_SECONDS = 5.0  # epochs shorter than this don't complain of waiting
_WAITING = 0.2


@dataclass
class Fit:
    """What training gives: the chosen model, the history by epoch, which epoch was best, and how it was computed.

    `card`: precision, selection, criterion, loss, augmentation, epoch, cutoffs; also in the model's card, "training".
    `exclusive`: its classes exclude each other, so that an image gets the one of highest probability. `cutoffs`: label,
    cutoff, criterion: the probability above which a label is best called, chosen on the validation split.
    """

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int
    card: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    cutoffs: pd.DataFrame = field(default_factory=pd.DataFrame)


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
    folder: str | Path | None = None,
) -> Fit:
    """Train `model` on the training split and choose the epoch on the validation split; the test split stays untouched
    unless `parameters.selected_on` says that it chooses, as in the papers' code.

    `report` is called with each epoch's row. With a `folder` (`study.checkpoint_folder(parameters)`) the state is kept
    there every so often, and a training that was cut off goes on from it to the same result, on a CPU to the last bit.
    History: a row per epoch with train_loss, loss, AUC, F1 and accuracy of the validation (and test) split,
    learning_rate, seconds, images_per_second, waiting_share (of the time, for data). Raises DataError for an empty
    split, ModelError when the loss or a logit of the validation split stops being a finite number.
    """
    splits = _splits(dataset)
    images = splits["train"].batch(range(min(4, len(splits["train"])))).images
    precision, note = precision_for(model, images, parameters)
    accelerator = accelerator_for(parameters, precision)
    with own_random_state(accelerator.device):
        return _Training(model, splits, parameters, accelerator, note, folder).run(report)


def _splits(dataset: cxrkit.data.Dataset) -> dict[str, cxrkit.data.Dataset]:
    if missing := [name for name in SPLITS if not (dataset.table["split"] == name).any()]:
        raise DataError(
            f"{dataset.name}: no image is in the split {' or '.join(missing)}; training needs all of {SPLITS}"
        )
    return {name: dataset.split(name) for name in SPLITS}


class _Network(nn.Module):
    """What accelerate may wrap and patch, so that the model itself stays as it came."""

    def __init__(self, model: nn.Module, has_extra: bool):
        super().__init__()
        self.model, self.options = model, {"auxiliary": True} if has_extra else {}

    def forward(self, images: torch.Tensor):
        found = self.model(images, **self.options)
        return found if self.options else (found, ())


class _Training:
    """One training: what stays the same throughout (`State` holds what doesn't), and the loop."""

    def __init__(self, model, splits, parameters: TrainParameters, accelerator, precision: str, folder):
        self.parameters, self.accelerator = parameters, accelerator
        self.lag = accelerator.device.type != "cpu"  # steps; to read a loss at once would make a GPU wait
        self.decider = parameters.selected_on
        self.splits = {name: splits[name] for name in dict.fromkeys(("validation", self.decider))}
        self.count = len(splits["train"])
        self.targets = target_table(splits["train"])
        self.loss: Loss = loss_for(parameters.loss, self.targets, parameters.class_weights)
        exclusive = parameters.loss == "cross_entropy" and self.targets.shape[1] > 1
        self.activation = "softmax" if exclusive else "sigmoid"
        self.weights = sample_weights(self.targets, parameters.protocol, exclusive) if parameters.oversample else None
        self.augment = None
        if parameters.augment != "none":
            self.augment = augmentation(parameters.augment, parameters.shifted_on)
        self.feed = Feed(splits["train"], parameters.workers, accelerator.device)
        self.feeds = {name: Feed(part, parameters.workers, accelerator.device) for name, part in self.splits.items()}
        self.card = {
            "precision": precision,
            "selection": self.decider,
            "criterion": parameters.criterion,
            "loss": parameters.loss,
        }
        if self.augment is not None:
            shift = f"shift up to {self.augment.translate:.1%} of the side ({parameters.shifted_on})"
            self.card["augmentation"] = f"{parameters.augment}, {shift}"
        optimizer = optimizer_for(model.to(accelerator.device), parameters)
        has_extra = bool(getattr(model, "card", {}).get("auxiliary"))
        network = _Network(torch.compile(model) if parameters.compiled else model, has_extra)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        rate = LearningRate(optimizer, parameters, len(self._plan(1)))
        self.state = State(model, optimizer, rate, accelerator.scaler)
        self.checkpoints = None
        if folder is not None:
            self.checkpoints = Checkpoints(folder, parameters.checkpoint_seconds, parameters.identity())

    def run(self, report: Callable[[dict], None] | None) -> Fit:
        state, parameters = self.state, self.parameters
        self._resume()
        self.first_epoch = state.epoch
        while state.epoch <= parameters.epochs and not self._patience_is_over():
            self._train_epoch()
            row = self._close_epoch()
            if report is not None and self.accelerator.is_main_process:
                report(row)
        trained = state.model
        trained.load_state_dict(state.best)
        self.card["epoch"] = state.best_epoch
        cutoffs = self._cutoffs()
        self.card["cutoffs"] = {
            row.label: row.cutoff if row.cutoff == row.cutoff else None for row in cutoffs.itertuples()
        }
        if isinstance(trained, cxrkit.models.Classifier):
            trained.card |= {"training": self.card, "activation": self.activation}
        history, exclusive = pd.DataFrame(state.history), self.activation == "softmax"
        return Fit(trained.eval(), history, state.best_epoch, self.card, exclusive, cutoffs)

    def _train_epoch(self) -> None:
        state, start, waited = self.state, time.perf_counter(), self.feed.waited
        plan = self._plan(state.epoch)
        parts = self.feed.batches([part for step in plan[state.step :] for part in step.parts])
        unread = []
        self.network.train()
        while state.step < len(plan):
            number = (state.epoch - 1) * len(plan) + state.step
            state.rate.before(number)
            unread.append((state.epoch, state.step + 1, state.rate.value, self._step(plan[state.step], parts)))
            state.step += 1
            due = self.checkpoints is not None and self.accelerator.is_main_process and self.checkpoints.due()
            done = due or state.step == len(plan)
            while len(unread) > self.lag or (done and unread):
                self._read(*unread.pop(0))
            if due:
                self._clock(start, waited)
                self.checkpoints.write(state)
                start, waited = time.perf_counter(), self.feed.waited
        self._clock(start, waited)

    def _step(self, step: Step, parts) -> torch.Tensor:
        """One step of the weights, its images computed in parts; returns the mean loss over them."""
        state, parameters, world = self.state, self.parameters, self.accelerator.num_processes
        weight = self.loss.weight(self.targets[step.rows]).clamp(min=1e-12).item()
        total = torch.zeros((), device=self.accelerator.device)
        for number in range(len(step.parts)):
            images, targets = next(parts)
            place = (parameters.seed, state.epoch, state.step, number, self.accelerator.process_index)
            seed_global(seed_of(*place, 0), self.accelerator.device)  # for what the network itself draws
            if self.augment is not None:
                images = self.augment(images, torch.Generator().manual_seed(seed_of(*place, 1)))
            last = number == len(step.parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.network):
                logits, extra = self.network(images)
                share = self.loss.total(logits.float(), targets)
                for factor, other in extra:
                    share = share + factor * self.loss.total(other.float(), targets)
                # Gradients are averaged over processes: `world` makes a sum of it.
                self.accelerator.backward(share * (world / weight))
            total += share.detach() / weight
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        if not self.lag and not torch.isfinite(total):
            return total  # the weights stay good
        if parameters.clip_norm:
            self.accelerator.clip_grad_norm_(self.network.parameters(), parameters.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.feed.working()
        return total

    def _read(self, epoch: int, step: int, rate: float, loss: torch.Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value} in epoch {epoch}, step {step}", rate)
        self.state.losses.append(value)

    def _diverged(self, what: str, rate: float) -> ModelError:
        advice = "lower learning_rate, or name clip_norm or warmup_epochs"
        return ModelError(f"{what}, at learning rate {rate:g}; {advice}{self._keep_last_good()}")

    def _keep_last_good(self) -> str:
        """Write the best weights so far beside the checkpoints; says where, and which checkpoint is the newest."""
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return ""
        model, newest = self.state.model, self.checkpoints.newest()
        said = f". The newest checkpoint is {newest}" if newest is not None else ""
        if self.state.best is None or not isinstance(model, cxrkit.models.Classifier):
            return said
        model.load_state_dict(self.state.best)
        path = cxrkit.models.save(model, self.checkpoints.folder / "last_good.safetensors")
        return f". The last good weights, of epoch {self.state.best_epoch}, are in {path}{said}"

    def _close_epoch(self) -> dict:
        """Validate, let the rate and the choice of the epoch follow, and say how it went."""
        state, parameters = self.state, self.parameters
        row = {"epoch": state.epoch, "train_loss": float(np.mean(state.losses))}
        if self.accelerator.num_processes > 1:
            # Each process has met its own images; a checkpoint holds the buffers too.
            for buffer in state.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        for name, part in self.splits.items():
            logits = logits_of(state.model, self.feeds[name], 2 * parameters.batch_size, self.accelerator)
            if not logits.isfinite().all():
                raise self._diverged(
                    f"logits of the {name} split are no numbers in epoch {state.epoch}", state.rate.value
                )
            healthy = part.labels[-1] == parameters.healthy_class
            found = scores(logits, target_table(part), self.loss, self.activation, healthy)
            row |= {f"{name}_{key}": value for key, value in found.items()}
        row["learning_rate"] = state.rate.value
        row |= self._speed()
        state.history.append(row)
        state.rate.after_epoch(row[f"{self.decider}_loss"])
        value = value_of(row, self.decider, parameters.criterion)
        if value > state.best_value:  # never for nan
            state.best_value, state.best_epoch = value, state.epoch
            state.best = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
        state.epoch, state.step, state.losses, state.seconds, state.waited = state.epoch + 1, 0, [], 0.0, 0.0
        if self.checkpoints is not None and self.accelerator.is_main_process and self.checkpoints.due():
            self.checkpoints.write(state)
        return row

    def _cutoffs(self) -> pd.DataFrame:
        """Of the chosen weights; the images of the validation split are still at hand."""
        batch_size, criterion = 2 * self.parameters.batch_size, self.parameters.criterion
        logits = logits_of(self.state.model, self.feeds["validation"], batch_size, self.accelerator)
        rule = "f1" if criterion == "f1" else "youden"
        return cutoffs_of(logits, self.splits["validation"], self.activation, rule)

    def _plan(self, epoch: int) -> list[Step]:
        here, accelerator = self.parameters, self.accelerator
        place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        return plan_epoch(self.count, here.batch_size, here.seed, epoch, self.weights, here.accumulate, **place)

    def _resume(self) -> None:
        if self.checkpoints is None:
            return
        self.accelerator.wait_for_everyone()
        found, values = self.checkpoints.read_newest()
        check_same(gather_object([found]), self.checkpoints.folder)  # nobody writes before all have read
        if values is not None:
            self.state.load_state_dict(values)

    def _patience_is_over(self) -> bool:
        state, patience = self.state, self.parameters.stop_patience
        return bool(patience) and state.best is not None and state.epoch - 1 - state.best_epoch >= patience

    def _clock(self, start: float, waited: float) -> None:
        self.state.seconds += time.perf_counter() - start
        self.state.waited += self.feed.waited - waited

    def _speed(self) -> dict[str, float]:
        seconds, waited = self.state.seconds, self.state.waited
        share = min(waited / seconds, 1.0)
        # What is kept in memory is drawn in the first epoch, and anew in the first after a restart.
        first = self.state.epoch == self.first_epoch and self.feed.keeps
        if share > _WAITING and seconds > _PATIENT_SECONDS and (self.lag or self.parameters.workers or not first):
            once = "they are drawn in this epoch and then kept; name a cache for all runs, or " if first else ""
            warnings.warn(
                f"epoch {self.state.epoch}: the device waited {share:.0%} of the time for images; {once}raise workers "
                f"(now {self.parameters.workers})",
                stacklevel=2,
            )
        return {"seconds": seconds, "images_per_second": self.count / seconds, "waiting_share": share}
