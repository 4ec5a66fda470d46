"""What a grid costs to run: networks, images seen, arithmetic, hours on a stated device, disk."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import numpy as np
import pandas as pd
import yaml

import cxrkit.data
from cxrkit import grid
from cxrkit.study.published import papers
from cxrkit.study.run_key import project_folder
from cxrkit.yaml_files import read_yaml

__all__ = ["commands", "measured", "profiles", "table"]

_TRAINED = 0.64  # of the images: four folds of five, less an eighth of them for validation
_BACKWARD = 3  # a training step costs about three forward passes
_PARTS = {"covid": ("covid_cohen", "kermany")}  # sets that are put together from others in one folder


def profiles(paper: str) -> list[str]:
    """The profiles of a paper's grid; "quick" is the file as it stands."""
    content = read_yaml(grid.find_grid(paper))
    return ["quick", *content.get("profiles", {})]


def _plan(paper: str, profile: str) -> list[grid.Task]:
    return grid.plan(paper, None if profile == "quick" else profile)


def _images(parameters) -> float:
    """Images of a training run's data set, from its options or its manifest; nan where neither says."""
    if parameters.dataset == "phantom":
        return float(parameters.dataset_options.get("images", 1000))
    counts = cxrkit.data.sources()[parameters.dataset].get("counts", {})
    return float(counts.get("images", counts.get("paper", {}).get("images", np.nan)))


def table(devices: Mapping[str, float], chosen: tuple[str, ...] = ()) -> pd.DataFrame:
    """A row per paper, profile and data set: trainings, other runs, arithmetic (10^15 operations), hours by device, GB.

    `devices`: name and the operations per second that it keeps up (sustained, not its data sheet's peak). The
    arithmetic is three times the forward pass of each image seen in training; explaining comes on top. GB: kept
    weights and prepared images. nan: how many images there are isn't known beforehand.
    """
    costs = pd.read_csv(project_folder() / "book" / "foundations" / "networks.csv").set_index("network")
    rows = []
    for paper in chosen or papers():
        for profile in profiles(paper):
            for data, (trained, others) in _by_data(_plan(paper, profile)).items():
                row = {
                    "paper": paper,
                    "profile": profile,
                    "data": data,
                    "trainings": len(trained),
                    "other runs": others,
                }
                work = sum(_work(parameters, costs) for parameters in trained)
                row |= {"10^15 operations": work / 1e15}
                row |= {f"hours, {device}": work / rate / 3600 for device, rate in devices.items()}
                weights = sum(costs["parameters"].get(parameters.model, np.nan) * 4e6 for parameters in trained)
                sets = {(p.root, str(p.dataset_options), p.size, _images(p)) for p in trained}
                rows.append(row | {"GB": (weights + sum(count * size**2 for *_, size, count in sets)) / 1e9})
    return pd.DataFrame(rows)


def _by_data(tasks: list[grid.Task]) -> dict[str, tuple[list, int]]:
    """By data set: the parameters of its trainings, and how many other runs are about them."""
    sets = {task.key: task.parameters.dataset for task in tasks if task.parameters.kind == "train"}
    about = [sets[task.needs] for task in tasks if task.needs in sets]
    found = {}
    for name in dict.fromkeys(sets.values()):
        trained = [task.parameters for task in tasks if sets.get(task.key) == name]
        found[name] = (trained, about.count(name))
    return found


def _work(parameters, costs: pd.DataFrame) -> float:
    """Operations of one training run; a network's cost grows with the area of its input."""
    cost = costs.loc[parameters.model]
    scale = (parameters.size / cost["input_size"]) ** 2
    return _BACKWARD * cost["gflops"] * 1e9 * scale * _TRAINED * _images(parameters) * parameters.epochs


def commands(paper: str) -> str:
    """The commands that repeat a paper's study on a laptop, a GPU and a cluster, as a block of Markdown.

    Read from the profiles of its grid: which data sets they take, from which folder, at which size. The profile
    `sample` is left out, whose images are anybody's own.
    """
    lines = ["# a laptop, the phantom", f"cxrkit grid run {paper}"]
    large = [name for name in profiles(paper) if name not in ("quick", "sample")]
    there: set[str] = set()
    for profile in large:
        trained = [task.parameters for task in _plan(paper, profile) if task.parameters.kind == "train"]
        own = {p.dataset: p for p in trained if p.root}
        lines += ["", f"# a GPU, {' and '.join(own) or 'the phantom at the size of the paper'}"]
        lines += [line for name in own if name not in there for line in _fetching(own[name])]
        lines.append(f"cxrkit grid run {paper} --profile {profile} --workers 1")
        there |= set(own)
    lines += ["", "# a cluster"]
    lines += [f"cxrkit grid run {paper} --profile {profile} --slurm cluster.yaml" for profile in large]
    return "\n".join(["```bash", *lines, "```"])


def _fetching(parameters) -> list[str]:
    """Getting, checking and decoding the data set of a training run."""
    name, root = parameters.dataset, parameters.root
    options = dict(parameters.dataset_options)
    flags = f" --preprocessing {options.pop('preprocessing')}" if "preprocessing" in options else ""
    given = "".join(f" --option {shlex.quote(f'{key}={_flow(value)}')}" for key, value in options.items())
    return [
        *(f"cxrkit data get {part} --to {root}" for part in (*_PARTS.get(name, ()), name)),
        f"cxrkit data check {name} --root {root}{given}",
        f"cxrkit data prepare {name} --root {root} --size {parameters.size}{flags}{given}",
    ]


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def measured(paper: str) -> pd.DataFrame:
    """What the runs of the quick grid took where they were made: kind, runs, seconds in all (as far as is known)."""
    tasks = [task for task in grid.plan(paper) if task.done]
    took = {"kind": [task.notebook.stem for task in tasks], "seconds": grid.estimate(tasks)}
    return pd.DataFrame(took).groupby("kind", sort=False)["seconds"].agg(["count", "sum"]).reset_index()
