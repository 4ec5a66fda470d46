"""What a grid costs to run: networks, images seen, arithmetic, hours on a stated device, disk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import yaml

import cxrkit.data
from cxrkit.study import grid
from cxrkit.study.keys import project_folder
from cxrkit.study.papers import PAPERS

__all__ = ["measured", "profiles", "table"]

_TRAINED = 0.64  # of the images: four folds of five, less an eighth of them for validation
_BACKWARD = 3  # a training step costs about three forward passes


def profiles(paper: str) -> list[str]:
    """The profiles of a paper's grid; "quick" is the file as it stands."""
    content = yaml.safe_load(grid.find_grid(paper).read_text(encoding="utf-8"))
    return ["quick", *content.get("profiles", {})]


def _plan(paper: str, profile: str) -> list[grid.Task]:
    return grid.plan(paper, None if profile == "quick" else profile)


def _images(parameters) -> float:
    """Images of a training run's data set, from its options or its manifest."""
    if parameters.dataset == "phantom":
        return float(parameters.dataset_options.get("images", 1000))
    return float(cxrkit.data.sources()[parameters.dataset].get("counts", {}).get("images", np.nan))


def table(devices: Mapping[str, float], papers: tuple[str, ...] = tuple(PAPERS)) -> pd.DataFrame:
    """A row per paper and profile: trainings, other runs, arithmetic (10^15 operations), hours by device, GB.

    `devices`: name and the operations per second that it keeps up (sustained, not its data sheet's peak). The
    arithmetic is three times the forward pass of each image seen in training; explaining comes on top. GB: kept
    weights and prepared images.
    """
    costs = pd.read_csv(project_folder() / "book" / "foundations" / "networks.csv").set_index("network")
    rows = []
    for paper in papers:
        for profile in profiles(paper):
            tasks = _plan(paper, profile)
            trained = [task.parameters for task in tasks if task.parameters.kind == "train"]
            work = sum(_work(parameters, costs) for parameters in trained)
            row = {
                "paper": paper,
                "profile": profile,
                "trainings": len(trained),
                "other runs": len(tasks) - len(trained),
            }
            row |= {"10^15 operations": work / 1e15}
            row |= {f"hours, {device}": work / rate / 3600 for device, rate in devices.items()}
            weights = sum(costs["parameters"].get(parameters.model, np.nan) * 4e6 for parameters in trained)
            sets = {(p.dataset, p.root, p.size, _images(p)) for p in trained}
            rows.append(row | {"GB": (weights + sum(count * size**2 for *_, size, count in sets)) / 1e9})
    return pd.DataFrame(rows)


def _work(parameters, costs: pd.DataFrame) -> float:
    """Operations of one training run; a network's cost grows with the area of its input."""
    cost = costs.loc[parameters.model]
    scale = (parameters.size / cost["input_size"]) ** 2
    return _BACKWARD * cost["gflops"] * 1e9 * scale * _TRAINED * _images(parameters) * parameters.epochs


def measured(paper: str) -> pd.DataFrame:
    """What the runs of the quick grid took where they were made: kind, runs, seconds in all (as far as is known)."""
    tasks = [task for task in grid.plan(paper) if task.done]
    took = {"kind": [task.notebook.stem for task in tasks], "seconds": grid.estimate(tasks)}
    return pd.DataFrame(took).groupby("kind", sort=False)["seconds"].agg(["count", "sum"]).reset_index()
