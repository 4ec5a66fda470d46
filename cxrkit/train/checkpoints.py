"""The state of a training on disk: whatever happens to the machine, it goes on from there to the same result."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cxrkit.errors import ParameterError
from cxrkit.files import checksum, replace_file

__all__ = ["Checkpoints", "State", "check_same"]

_SHARE = 20  # writing may take one in so many parts of the time
_NUMBERS = ("epoch", "step", "losses", "seconds", "waited", "history", "best_value", "best_epoch")


@dataclass
class State:
    """All that a training's future depends on, given its parameters.

    `epoch` (from 1) and `step` (from 0) are the next to be done; they stand for the order of images and for every
    random choice, which are functions of seed, epoch and step (`loader.seed_of`). `best` holds the weights of the
    best epoch so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Any
    scaler: Any = None
    epoch: int = 1
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_value: float = float("-inf")
    best_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and JSON-able values in nested mappings."""
        optimizer = self.optimizer.state_dict()
        return {name: getattr(self, name) for name in _NUMBERS} | {
            "model": self.model.state_dict(),
            "best": self.best,
            "moments": {str(number): entries for number, entries in optimizer["state"].items()},
            "groups": optimizer["param_groups"],
            "rate": self.rate.plateau.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Become the state that was written."""
        for name in (*_NUMBERS, "best"):
            setattr(self, name, values[name])
        self.model.load_state_dict(values["model"])
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = {
            int(number): {name: _laid_out_as(weights[int(number)], value) for name, value in entries.items()}
            for number, entries in values["moments"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": values["groups"]})
        self.rate.plateau.load_state_dict(values["rate"])
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])


def _laid_out_as(weight: Tensor, value: Any) -> Any:
    # Another order in memory may take another kernel, and that another last digit.
    same = torch.is_tensor(value) and value.shape == weight.shape
    return torch.empty_like(weight, device=value.device).copy_(value) if same else value


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with each tensor put into `tensors` under its path, {"tensor": path} in its place."""
    if torch.is_tensor(value):
        # A copy of each: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _split(part, f"{name}/{key}", tensors) for key, part in value.items()}
    return value


def _joined(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        own = tensors[value["tensor"]] if value.keys() == {"tensor"} else None
        return {key: _joined(part, tensors) for key, part in value.items()} if own is None else own
    return value


def _not_finite(model: nn.Module) -> str | None:
    """The first of the weights that training can't go on from; buffers may hold infinities on purpose."""
    weights = ((name, value.isfinite()) for name, value in model.named_parameters())
    buffers = ((name, ~value.isnan()) for name, value in model.named_buffers())
    return next((name for name, good in (*weights, *buffers) if not good.all()), None)


class Checkpoints:
    """Checkpoints of one training in a folder: one file each, whole or not there, the last two kept.

    `seconds`: least time between two; longer where writing would take more than a twentieth of the time. `owner`: what
    the training is, JSON-able; a checkpoint of another is refused. A disk that is full costs a warning: training goes
    on, and the earlier checkpoints stay.
    """

    def __init__(self, folder: str | Path, seconds: float = 60.0, owner: Any = None):
        self.folder = Path(folder)
        self.seconds = seconds
        self.owner = owner
        self._last, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() - self._last >= max(self.seconds, (_SHARE - 1) * self._took * (self.seconds > 0))

    def write(self, state: State) -> None:
        """Write the state, and drop all checkpoints but the last two."""
        start = time.monotonic()
        path = self.folder / f"epoch{state.epoch:05d}-step{state.step:08d}.safetensors"
        if name := _not_finite(state.model):
            warnings.warn(f"{path}: not written, as {name} is not finite; the one before stays", stacklevel=2)
            return
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_split(state.state_dict(), "", tensors) | {"owner": self.owner})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda target: save_file(tensors, target, metadata={"state": text}))
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path}: the checkpoint can't be written ({error}); the one before stays", stacklevel=2)
        else:
            for old in self._files()[:-2]:
                old.unlink(missing_ok=True)
        self._last, self._took = time.monotonic(), time.monotonic() - start

    def read_newest(self) -> tuple[str, dict[str, Any] | None]:
        """The newest checkpoint that can be read, in words that differ where its content does, and its state; "none"
        and None where there is none.

        What a killed process left half-written is deleted. Raises ParameterError for one of another training.
        """
        for rest in self.folder.glob(".epoch*"):
            rest.unlink(missing_ok=True)
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    values = _joined(json.loads(file.metadata()["state"]), tensors)
                content = checksum(path)[:12]
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{path}: not a whole checkpoint ({error}); the one before is taken", stacklevel=2)
                continue
            if values["owner"] != json.loads(json.dumps(self.owner)):
                raise ParameterError(f"{path} belongs to a training with other parameters; take another folder")
            return f"{path.stem}, content {content}", values
        return "none", None

    def newest(self) -> Path | None:
        """The newest checkpoint's file."""
        return (self._files() or [None])[-1]

    def remove(self) -> None:
        """Delete all of them, with their folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch*-step*.safetensors"))


def check_same(states: list[str], folder: Path) -> None:
    """Raises ParameterError when processes, by their rank, found different states in what should be one folder."""
    if len(set(states)) > 1:
        ranks = {state: [str(rank) for rank, other in enumerate(states) if other == state] for state in states}
        found = "; ".join(f"process {', '.join(which)}: {state}" for state, which in ranks.items())
        raise ParameterError(
            f"{folder}: the processes found different checkpoints there ({found}); "
            "on several machines `results` must be a folder that all of them share"
        )
