"""A data set and a network so small that a test may train many times: which half of an image is bright?"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import accelerate  # noqa: F401  a process that starts others should have it at hand
import numpy as np
import pandas as pd
import torch
from torch import nn

from cxrkit import train
from cxrkit.data.dataset import Dataset, Rendered
from cxrkit.train.checkpoints import Checkpoints
from cxrkit.train.parameters import TrainParameters

LABELS = ("left", "right")
CLOCKS = ["seconds", "images_per_second", "waiting_share"]  # what differs from run to run


class Squares:
    """A bright square on the left or the right; remembers which rows were drawn."""

    def __init__(self, targets):
        self.targets = targets
        self.drawn: set[int] = set()

    def render(self, row: int, size: int) -> Rendered:
        self.drawn.add(row)
        image = torch.from_numpy(np.random.default_rng(row).random((size, size), dtype=np.float32)) * 0.3
        for column, present in enumerate(self.targets[row]):
            start = column * size // 2
            image[size // 4 : size // 2, start + 4 : start + size // 4] += 0.6 * float(present)
        return Rendered(image)


def dataset(count: int = 96, exclusive: bool = False) -> Dataset:
    """Two thirds to train, a sixth each to validate and to test."""
    targets = np.random.default_rng(0).integers(0, 2, (count, 2)).astype(float)
    if exclusive:
        targets[:, 1] = 1 - targets[:, 0]
    part = count // 6
    table = pd.DataFrame(targets, columns=LABELS).assign(
        image_id=[f"i{n}" for n in range(count)],
        patient_id=[f"p{n // 2}" for n in range(count)],
        path=None,
        orig_width=32,
        orig_height=32,
        split=["train"] * (count - 2 * part) + ["validation"] * part + ["test"] * part,
    )
    return Dataset("squares", LABELS, table, None, Squares(targets), size=32)


def tiny(norm: str = "batch", dropout: float = 0.3) -> nn.Module:
    """A network of two convolutions, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 2),
            nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(8, 16, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 2),
        )


def parameters(**changes) -> TrainParameters:
    values = {"model": "resnet18", "size": 32, "epochs": 3, "threads": 1, "learning_rate": 1e-2, "device": "cpu"}
    return TrainParameters(**values | changes)


def fit(data: Dataset | None = None, model: nn.Module | None = None, folder=None, **changes) -> train.Fit:
    return train.fit(tiny() if model is None else model, data or dataset(), parameters(**changes), folder=folder)


# Everything that has a state: checkpoints after every step, dropout, augmentation, draws with replacement, two parts
# per step, a rate that moves.
RICH = {
    "epochs": 4,
    "batch_size": 12,
    "accumulate": 2,
    "augment": "light",
    "oversample": True,
    "clip_norm": 1.0,
    "warmup_epochs": 0.5,
    "patience": 0,
    "checkpoint_seconds": 0.0,
}


def same(first: train.Fit, second: train.Fit) -> bool:
    """Whether two trainings gave the same weights to the last bit, the same choice and the same history."""
    weights = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    histories = [result.history.drop(columns=CLOCKS) for result in (first, second)]
    return (
        all(torch.equal(a, b) for a, b in weights)
        and first.best_epoch == second.best_epoch
        and histories[0].equals(histories[1])
    )


def train_in(folder: str, delay: float) -> None:
    """For a process of its own: the rich training with checkpoints, ended by SIGKILL so many seconds of computing
    after its first new checkpoint."""
    torch.set_num_threads(1)
    threading.Thread(target=_end, args=(Checkpoints(folder), delay), daemon=True).start()
    fit(folder=folder, **RICH)


def _end(checkpoints: Checkpoints, delay: float) -> None:
    before = checkpoints.newest()
    while checkpoints.newest() == before:
        time.sleep(1e-3)
    start = time.process_time()
    while time.process_time() - start < delay:
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGKILL)


def train_in_company(out: str) -> None:
    """For several processes at once: no batch norm, no dropout, so that the number of processes changes nothing."""
    from accelerate.state import PartialState
    from safetensors.torch import save_file

    plain = {"batch_size": 16, "accumulate": 2, "optimizer": "sgd"}
    result = fit(model=tiny("group", 0.0), folder=f"{out}.training", checkpoint_seconds=0.0, **plain)
    place = PartialState()
    sys.stdout.write(f"process {place.process_index} of {place.num_processes}\n")  # one piece: both write at once
    if place.is_main_process:
        save_file(result.model.state_dict(), out)
        result.history.drop(columns=CLOCKS).to_csv(f"{out}.csv", index=False)


if __name__ == "__main__":
    train_in_company(sys.argv[1])
