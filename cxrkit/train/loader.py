"""From a data set to batches on the device: the order of images as a function of seed and epoch, and time lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cxrkit.data import Dataset
from cxrkit.errors import ParameterError

__all__ = ["Feed", "Step", "plan_epoch", "seed_of", "target_table"]

_SHARE = 0.25  # of free memory, of a GPU or of the machine: images that fit there are kept there
_AHEAD = 4  # batches that each loading process prepares in advance


@dataclass(frozen=True)
class Step:
    """One step of the weights: the `rows` of all its images, and this process's `parts` of them, one after another."""

    rows: list[int]
    parts: list[list[int]]


def seed_of(*place: int) -> int:
    """A seed for a place in a training (seed, epoch, step, …); near places have unrelated seeds.

    Because every random choice is drawn from the seed of its place, a resumed training needs no generator's state.
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))


def plan_epoch(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    weights: Tensor | None = None,
    accumulate: int = 1,
    process: int = 0,
    processes: int = 1,
) -> list[Step]:
    """The steps of an epoch over `count` images, in an order drawn from seed and epoch.

    With `weights` [N] images are drawn with replacement. Every part of a step holds two images or more (batch norm has
    nothing to work with in one): a smaller rest is computed in fewer parts, or dropped. Raises ParameterError when no
    step is left.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    if weights is None:
        order = torch.randperm(count, generator=generator)
    else:
        order = torch.multinomial(weights, count, replacement=True, generator=generator)
    steps = []
    for batch in order.split(batch_size):
        rows, parts = batch.tolist(), min(accumulate, len(batch) // (2 * processes))
        if parts:
            shares = [rows[part * processes + process :: parts * processes] for part in range(parts)]
            steps.append(Step(rows, shares))
    if not steps:
        raise ParameterError(
            f"{count} training images in steps of {batch_size} (batch_size) are too few for {processes} process(es): "
            "each needs two images or more"
        )
    return steps


def target_table(dataset: Dataset) -> Tensor:
    """All targets, float32 [N, L], without reading an image."""
    return torch.tensor(dataset.table[list(dataset.labels)].to_numpy(dtype=np.float32))


class Feed:
    """Batches (images [B, 1, H, W], targets [B, L]) of a data set on a device, and the seconds `waited` for them.

    Each image is drawn once and kept: on a GPU where a quarter of the free memory holds all of them, else in main
    memory, 4 x size x size bytes an image. So many `workers`, processes of their own, draw ahead of the device; with
    them, images that would take more than a quarter of the free main memory are not kept, but drawn anew each time.
    `keep=False`: what is read once only need not be kept. A GPU that is still busy when a batch arrives has not waited
    for it.
    """

    def __init__(self, dataset: Dataset, workers: int = 0, device: torch.device | str = "cpu", keep: bool = True):
        self.device = torch.device(device)
        self.waited = 0.0
        self._images = _Images(dataset)
        self._busy: torch.cuda.Event | None = None
        self._order: list[list[int]] = []
        self._loader = self._kept = None
        if workers:
            self._loader = DataLoader(
                self._images,
                batch_sampler=self._order,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=True,
                prefetch_factor=_AHEAD,
                generator=torch.Generator(),  # of its own: else it draws from the global one
            )
        home = self._home(4 * dataset.size**2 * len(dataset), bool(workers)) if keep else None
        if home is not None:
            self._kept = torch.empty((len(dataset), 1, dataset.size, dataset.size), device=home)
            self._targets = self._images.targets.to(home)
            self._here = np.zeros(len(dataset), dtype=bool)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def keeps(self) -> bool:
        """Whether images, once drawn, stay in memory."""
        return self._kept is not None

    def batches(self, order: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each list of rows."""
        source = self._remembered(order) if self.keeps else self._loaded(order)
        if self.keeps and self._here.all():
            self._loader = None  # its processes end
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            if self._busy is None or self._busy.query():
                self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def _loaded(self, order: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches that are drawn now."""
        if self._loader is None:
            return map(self._images.batch, order)
        self._order[:] = order
        return iter(self._loader)

    def _remembered(self, order: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images in memory, of which those that aren't there yet are drawn first."""
        here, missing = self._here.copy(), []
        for rows in order:
            missing.append([row for row in dict.fromkeys(rows) if not here[row]])
            here[missing[-1]] = True
        wanted = [rows for rows in missing if rows]
        drawn = self._loaded(wanted) if wanted else iter(())
        for rows, new in zip(order, missing, strict=True):
            if new:
                self._kept[new] = next(drawn)[0].to(self._kept.device)
                self._here[new] = True
            index = torch.as_tensor(rows, device=self._kept.device)
            yield self._kept[index], self._targets[index]

    def _home(self, size: int, sparing: bool) -> torch.device | None:
        """Where so many bytes are kept."""
        if self.device.type == "cuda" and size < _SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return self.device
        return None if sparing and size > _SHARE * psutil.virtual_memory().available else torch.device("cpu")

    def working(self) -> None:
        """Tell that all work on the last batch has been handed to the device."""
        if self.device.type == "cuda":
            self._busy = self._busy or torch.cuda.Event()
            self._busy.record()


class _Images(TorchDataset):
    """Image and target alone: training needs no masks."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.targets = target_table(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.dataset[row].image, self.targets[row]

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self.dataset[row].image for row in rows]), self.targets[rows]
