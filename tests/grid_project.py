"""A project of its own with tiny notebooks, and an engine that pretends: what the tests of grids share."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import yaml

from cxrkit.grid.execute import Job, Outcome
from cxrkit.study import runs

SQUARE = """\
import os, pathlib, time
time.sleep(nap)
if wrong:
    print("about to fail")
    raise ValueError("this one fails")
"""
RESULT = "pathlib.Path(os.environ['CXRKIT_OUTPUT'], 'number.txt').write_text(str(seed * seed))"
PARAMETERS = "seed = 0\nnap = 0.01  # seconds\nwrong = False\nname = None\n"


def notebook(path: Path, parameters: str | None, *cells: str, language: str = "python") -> Path:
    sources = [(parameters, ["parameters"])] if parameters is not None else []
    sources += [(cell, []) for cell in cells]
    content = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": language},
            "language_info": {"name": language},
        },
        "cells": [
            {
                "id": f"cell{i}",
                "cell_type": "code",
                "metadata": {"tags": tags},
                "source": text,
                "outputs": [],
                "execution_count": None,
            }
            for i, (text, tags) in enumerate(sources)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class Project:
    """A folder with `notebooks/square.ipynb` and `notebooks/grids`."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "notebooks" / "grids").mkdir(parents=True)
        self.square = notebook(folder / "notebooks" / "square.ipynb", PARAMETERS, SQUARE, RESULT)

    def grid(self, text: str | None = None, **steps) -> Path:
        """Writes a grid; steps without a notebook run `square.ipynb`."""
        path = self.folder / "notebooks" / "grids" / "mine.yaml"
        for name, step in steps.items():
            if name != "profiles":
                step.setdefault("notebook", "../square.ipynb")
        path.write_text(text if text is not None else yaml.safe_dump(steps, sort_keys=False), encoding="utf-8")
        return path

    @property
    def results(self) -> Path:
        return self.folder / "results"


def write_run(job: Job) -> None:
    with runs.writing_card(Path(job.results), job.card, job.values) as writer:
        writer.text("number.txt", str(job.values.get("seed", 0) ** 2))


class Instant:
    """An engine that makes runs without kernels: `react(job)` gives an outcome, None for a lost worker, or True for
    done."""

    def __init__(self, react=lambda job: True, capacity: int = 1, work: bool = True):
        self.react, self.capacity, self.work = react, capacity, work
        self.jobs: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.most, self.closed = 0, False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.waiting.clear()
        self.closed = True

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.waiting.append(job)
        self.most = max(self.most, len(self.waiting))

    def finished(self, timeout: float):
        if not self.waiting:
            return []
        job = self.waiting.popleft()
        if self.work:
            Path(job.work, "log.txt").write_text("what the kernel printed\n")
        outcome = self.react(job)
        if outcome is True:
            write_run(job)
            outcome = Outcome("done", seconds=1.0)
        return [(job.id, outcome)]

    @property
    def made(self) -> list[str]:
        return [job.key for job in self.jobs]
