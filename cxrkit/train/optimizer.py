"""Steps of the weights: the papers' optimisers, and how the learning rate moves."""

from __future__ import annotations

import math

import torch
from torch import nn

from cxrkit.train.parameters import TrainParameters

__all__ = ["LearningRate", "optimizer_for"]


def optimizer_for(model: nn.Module, parameters: TrainParameters) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over the weights that are to be trained."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    shared = {"lr": parameters.learning_rate, "weight_decay": parameters.weight_decay}
    if parameters.optimizer == "sgd":
        return torch.optim.SGD(weights, momentum=parameters.momentum, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[parameters.optimizer](weights, **shared)


class LearningRate:
    """The learning rate as a function of the step, so that a resumed training needs to know nothing but the step.

    It rises linearly over `warmup_epochs`, then follows `schedule`: "constant"; "step" (times `schedule_factor` every
    `schedule_epochs`, paper `normgrad`); "cosine" (half a wave down to 0); "inverse_time" (rate / (1 + d t) after t
    steps, paper `path`). "plateau" (paper `bcos`) alone looks at the loss: times `schedule_factor` when it has
    not fallen for more than `patience` epochs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: TrainParameters, steps_per_epoch: int):
        self.optimizer = optimizer
        self.parameters = parameters
        self.steps_per_epoch = steps_per_epoch
        self.warmup = round(parameters.warmup_epochs * steps_per_epoch)
        self.total = max(parameters.epochs * steps_per_epoch - self.warmup, 1)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=parameters.schedule_factor, patience=parameters.patience
        )

    @property
    def value(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def before(self, step: int) -> None:
        """Set the rate of a step, counted from 0 over all epochs."""
        if step < self.warmup:
            self._set((step + 1) / self.warmup)
        elif self.parameters.schedule != "plateau":
            self._set(self.factor(step - self.warmup))
        elif self.warmup and step == self.warmup:
            self._set(1.0)

    def after_epoch(self, loss: float) -> None:
        """Tell the loss of the split that decides."""
        if self.parameters.schedule == "plateau":
            self.plateau.step(loss)

    def factor(self, step: int) -> float:
        """Share of the full rate in a step after the warm-up."""
        chosen, total = self.parameters, self.total
        if chosen.schedule == "step":
            return chosen.schedule_factor ** (step // (chosen.schedule_epochs * self.steps_per_epoch))
        if chosen.schedule == "cosine":
            return (1 + math.cos(math.pi * step / total)) / 2
        if chosen.schedule == "inverse_time":
            return 1 / (1 + chosen.schedule_decay * step)
        return 1.0

    def _set(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.parameters.learning_rate * factor
