"""The state of a training on disk: whatever happens to the machine, it goes on from there to the same result."""

from __future__ import annotations

import hashlib
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
from cxrkit.files import replace_file

__all__ = ["Checkpoints", "State", "agree", "described"]

_KEPT = 2
_SHARE = 20  # writing may take one in so many parts of the time
_FACTS = "facts"


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

    _NUMBERS = ("epoch", "step", "losses", "seconds", "waited", "history", "best_value", "best_epoch")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a name of its own."""
        parts = {"model": self.model.state_dict(), "best": self.best or {}}
        for number, entries in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer/{number}"] = {name: value for name, value in entries.items() if torch.is_tensor(value)}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def facts(self) -> dict[str, Any]:
        """Everything else, JSON-able."""
        facts = {name: getattr(self, name) for name in self._NUMBERS}
        facts["rate"] = self.rate.state_dict()
        facts["groups"] = self.optimizer.state_dict()["param_groups"]
        facts["scaler"] = self.scaler.state_dict() if self.scaler is not None else None
        return facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Become the state that was written."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            head, rest = name.split("/", 1)
            if head == "optimizer":
                number, rest = rest.split("/", 1)
                head = f"optimizer/{number}"
            parts.setdefault(head, {})[rest] = value
        self.model.load_state_dict(parts["model"])
        self.best = parts.get("best")
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = {}
        for number, weight in enumerate(weights):
            if entries := parts.get(f"optimizer/{number}"):
                moments[number] = {name: _laid_out_as(weight, value) for name, value in entries.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": facts["groups"]})
        self.rate.load_state_dict(facts["rate"])
        if self.scaler is not None and facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        for name in self._NUMBERS:
            setattr(self, name, facts[name])


def _laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    # Another order in memory may take another kernel, and that another last digit.
    return torch.empty_like(weight, device=value.device).copy_(value) if value.shape == weight.shape else value


def _spoilt(model: nn.Module) -> str | None:
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
        """Keep the state, and drop all checkpoints but the last two."""
        start = time.monotonic()
        place = self.folder / f"epoch{state.epoch:05d}-step{state.step:08d}.safetensors"
        # A copy of each: safetensors refuses tensors that share memory.
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.tensors().items()}
        text = json.dumps(state.facts() | {"owner": self.owner})
        if name := _spoilt(state.model):
            warnings.warn(f"{place}: not written, as {name} is not finite; the one before stays", stacklevel=2)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(place, lambda target: save_file(tensors, target, metadata={_FACTS: text}))
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{place}: the checkpoint can't be written ({error}); the one before stays", stacklevel=2)
        else:
            for old in self._files()[:-_KEPT]:
                old.unlink(missing_ok=True)
        self._last, self._took = time.monotonic(), time.monotonic() - start

    def read_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the newest checkpoint that can be read; None when there is none.

        What a killed process left half-written is deleted. Raises ParameterError for one of another training.
        """
        for rest in self.folder.glob(".epoch*"):
            rest.unlink(missing_ok=True)
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    facts = json.loads(file.metadata()[_FACTS])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"{path}: not a whole checkpoint ({error}); the one before is taken", stacklevel=2)
                continue
            if facts["owner"] != json.loads(json.dumps(self.owner)):
                raise ParameterError(f"{path} belongs to a training with other parameters; take another folder")
            return tensors, facts
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint's file."""
        return (self._files() or [None])[-1]

    def remove(self) -> None:
        """Delete all of them, with their folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch*-step*.safetensors"))


def described(found: tuple[dict[str, Tensor], dict[str, Any]] | None) -> str:
    """What `Checkpoints.read_newest` found, in words that differ where the states differ."""
    if found is None:
        return "no checkpoint"
    tensors, facts = found
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"epoch {facts['epoch']}, step {facts['step']}, content {digest.hexdigest()}"


def agree(states: list[str], folder: Path) -> None:
    """Raises ParameterError when processes, by their rank, found different states in what should be one folder."""
    if len(set(states)) > 1:
        ranks = {state: [str(rank) for rank, other in enumerate(states) if other == state] for state in states}
        told = "; ".join(f"process {', '.join(which)}: {state}" for state, which in ranks.items())
        raise ParameterError(
            f"{folder}: the processes found different states of the training there ({told}); "
            "on several machines `results` must be a folder that all of them share"
        )
