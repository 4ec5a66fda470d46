"""A grid loaded once: its finished runs, in the grid's order, and what they say together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cxrkit.markdown import escaped
from cxrkit.study.runs import Run

__all__ = ["Study", "origin"]


@dataclass(frozen=True)
class Study:
    """The finished runs of a grid; ``cxrkit.grid.load(name)`` plans the grid and reads them once.

    ``name``: the grid's, with its profile, such as "bcos" or "bcos:full". ``open``: keys of the runs that aren't done.
    """

    name: str
    runs: tuple[Run, ...]
    open: tuple[str, ...] = ()

    def of(self, kind: str) -> list[Run]:
        """Runs of a kind: the name of their notebook."""
        return [run for run in self.runs if run.kind == kind]

    @cached_property
    def trained(self) -> list[Run]:
        """The training runs."""
        return self.of("train")

    def pairs(self, kind: str = "explain") -> list[tuple[Run, Run]]:
        """Pairs of a training run and a run of that kind about it."""
        trained = {run.key: run for run in self.trained}
        return [(trained[run.parameters.run], run) for run in self.of(kind) if run.parameters.run in trained]

    @cached_property
    def synthetic(self) -> bool:
        """Whether every network was trained on the phantom: then only the direction of a claim can be judged."""
        return all(run.parameters.dataset == "phantom" for run in self.trained)

    @property
    def notice(self) -> str:
        """A sentence of Markdown: where a page's numbers come from, and how far they may be used."""
        size, epochs = self.trained[0].parameters.size, sorted({run.parameters.epochs for run in self.trained})
        finished = max(run.card["finished"] for run in self.trained)
        text = (
            f"From the grid '{escaped(self.name)}': {len(self.trained)} networks, {size} x {size} pixels, "
            f"{' or '.join(map(str, epochs))} epochs, {_listed(map(origin, self.trained))}; finished {finished}."
        )
        if self.name == "smoke":
            warning = "NOT A RESULT. These networks are barely trained: `make book` runs the grid 'quick' first. "
            text = warning + text
        return text


def _listed(origins: Iterable[str]) -> str:
    return escaped(", ".join(sorted(set(origins))))


def origin(run: Run) -> str:
    """The images of a run, in words for captions."""
    if run.parameters.dataset == "phantom":
        return "synthetic radiographs"
    return f"images of the source {run.parameters.dataset!r}"
