"""Grids of runs: a YAML file becomes a plan, checked whole, of notebook runs; done ones are skipped, the rest
executed."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock

from cxrkit.errors import CxrkitError, DataError, ParameterError
from cxrkit.study import runs
from cxrkit.study.experiment import Parameters, parameters_for

__all__ = ["Task", "plan", "run", "shown", "status"]


@dataclass(frozen=True)
class Task:
    """One run of one notebook: its key, validated parameters, and the key of the run that it needs first (or none)."""

    key: str
    notebook: Path
    parameters: Parameters
    needs: str | None = None

    @property
    def place(self) -> Path:
        return runs.results_folder(self.parameters.results) / self.key

    @property
    def done(self) -> bool:
        """Whether the run is there, whole. Its key holds the code's hash, so what is there is never stale."""
        try:
            runs.Run(self.place)
        except (CxrkitError, OSError):
            return False
        return True


def plan(file: str | Path) -> list[Task]:
    """Every run of a grid file, in an order that respects what needs what.

    The file maps step names to `notebook`, `parameters` (common to the step), `product` (lists, multiplied out),
    `cases` (a list of parameter sets) and `after` (a step, or several, for whose every run this one is repeated with
    `run` set). Nothing is executed. Raises ParameterError listing every problem of the file at once.
    """
    path = find_grid(file)
    steps = _read(path)
    tasks: dict[str, list[Task]] = {}
    problems = []
    for name, step in steps.items():
        notebook = (path.parent / step["notebook"]).resolve()
        if not notebook.is_file():
            problems.append(f"step {name!r}: there is no notebook {step['notebook']!r} beside {path.name}")
            continue
        after = _listed(step.get("after"))
        if unknown := [other for other in after if other not in tasks]:
            problems.append(f"step {name!r}: 'after' names {unknown}, which are no earlier steps")
            continue
        tasks[name] = []
        befores = [task for other in after for task in tasks[other]] if after else [None]
        for values, before in itertools.product(_combinations(step), befores):
            run_of = {"run": before.key} if before else {}
            try:
                parameters = parameters_for(notebook)(**(values | run_of))
                tasks[name].append(Task(runs.key(parameters), notebook, parameters, before.key if before else None))
            except CxrkitError as error:
                problems.append(f"step {name!r}: {error}")
    if problems:
        raise ParameterError(f"{path.name}: " + "\n  ".join(dict.fromkeys(problems)))
    ordered = list(itertools.chain.from_iterable(tasks.values()))
    return list({task.key: task for task in ordered}.values())


def find_grid(file: str | Path) -> Path:
    """A grid file by path, or by name (`quick`) among the project's grids. Raises ParameterError."""
    folder = runs.project_folder() / "notebooks" / "grids"
    for path in (Path(file), folder / f"{file}.yaml"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ParameterError(f"there is no grid {str(file)!r}; known: {known or 'none'}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParameterError(f"{path.name}: not YAML: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ParameterError(f"{path.name}: expected step names, each with a notebook")
    allowed = {"notebook", "parameters", "product", "cases", "after"}
    for name, step in content.items():
        if not isinstance(step, dict) or "notebook" not in step:
            raise ParameterError(f"{path.name}: step {name!r} must name its notebook")
        if unknown := set(step) - allowed:
            raise ParameterError(f"{path.name}: step {name!r} has unknown {sorted(unknown)}; known: {sorted(allowed)}")
        for part, shape in (("parameters", dict), ("product", dict), ("cases", list)):
            if part in step and not isinstance(step[part], shape):
                raise ParameterError(
                    f"{path.name}: step {name!r}: {part!r} must be a {shape.__name__}, not {step[part]!r}"
                )
        if any(not isinstance(case, dict) for case in step.get("cases", [])):
            raise ParameterError(f"{path.name}: step {name!r}: every entry of 'cases' must name parameters")
        if any(not isinstance(values, list) or not values for values in step.get("product", {}).values()):
            raise ParameterError(
                f"{path.name}: step {name!r}: every entry of 'product' must be a list with something in it"
            )
    return content


def _listed(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _combinations(step: dict[str, Any]) -> list[dict[str, Any]]:
    product = step.get("product", {})
    rows = [dict(zip(product, values, strict=True)) for values in itertools.product(*product.values())]
    return [step.get("parameters", {}) | row | case for row in rows for case in step.get("cases", [{}])]


def status(file: str | Path) -> pd.DataFrame:
    """The runs of a grid and their state: key, notebook, state (done, failed, open), and the parameters that differ."""
    rows = [{"key": task.key, "notebook": task.notebook.stem, "state": _state(task)} for task in plan(file)]
    return pd.DataFrame(rows)


def shown(name: str = "quick", otherwise: str = "smoke") -> str:
    """The grid whose results a page shows: `name` when all of it is done; else the tiny grid `otherwise`, run now."""
    if all(task.done for task in plan(name)):
        return name
    state = run(otherwise)
    if (failed := state[state["state"] != "done"]).size:
        raise DataError(f"runs of the grid {otherwise!r} failed: {', '.join(failed['key'])}; see results/notebooks")
    return otherwise


def _state(task: Task) -> str:
    return "done" if task.done else "failed" if _record(task, "failed").is_file() else "open"


def run(file: str | Path, workers: int = 1, report: Callable[[str, Task, float], None] | None = None) -> pd.DataFrame:
    """Execute what isn't done, `workers` notebooks at a time; returns `status` at the end.

    Every notebook runs in a process and kernel of its own through papermill, with the machine's cores shared out. A
    run that fails keeps its executed notebook with the traceback under `results/notebooks/`, and those that need it
    are left open; the others go on. Killed at any moment, the same call goes on where it was. A second runner on the
    same results waits for the first, so that no run is made twice. `report(event, task, seconds)` hears "start",
    "done", "failed".
    """
    folder = runs.results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".grid.lock"):  # the system lets go of it when its holder dies
        return _run(file, workers, report)


def _run(file: str | Path, workers: int, report: Callable[[str, Task, float], None] | None) -> pd.DataFrame:
    tasks = [task for task in plan(file) if not task.done]
    _check_names(tasks)
    waiting = {task.key: task for task in tasks}
    lost: set[str] = set()
    running: dict[Future, tuple[Task, float]] = {}
    problems: list[BaseException] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        while waiting or running:
            for task in _ready(waiting, running, lost)[: max(1, workers) - len(running)]:
                del waiting[task.key]
                running[pool.submit(_execute, task, workers)] = (task, time.monotonic())
                if report:
                    report("start", task, 0.0)
            if not running:
                break  # what is left waits for a run that failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, started = running.pop(future)
                if future.exception() is not None:
                    problems.append(future.exception())
                if not task.done:
                    lost.add(task.key)
                if report:
                    report("failed" if task.key in lost else "done", task, time.monotonic() - started)
    if problems:
        raise problems[0]
    return status(file)


def _check_names(tasks: list[Task]) -> None:
    """Refuse unknown networks, sources and methods before anything runs; the package that knows them loads only now."""
    from cxrkit import attribution, models
    from cxrkit.data.sources import sources

    known = {
        "model": list(models.NETWORKS),
        "dataset": list(sources()),
        "methods": [c.name for c in attribution.methods()],
    }
    wrong = []
    for task in tasks:
        for name, allowed in known.items():
            value = getattr(task.parameters, name, [])
            for item in value if isinstance(value, list) else [value]:
                if item not in allowed:
                    wrong.append(f"{task.notebook.stem}: {name} {item!r} is unknown; known: {', '.join(allowed)}")
    if wrong:
        raise ParameterError("\n  ".join(dict.fromkeys(wrong)))


def _ready(waiting: dict[str, Task], running: dict[Future, tuple[Task, float]], lost: set[str]) -> list[Task]:
    unfinished = set(waiting) | {task.key for task, _ in running.values()} | lost
    return [task for task in waiting.values() if task.needs not in unfinished]


def _record(task: Task, kind: str) -> Path:
    suffix = {"failed": ".failed.ipynb", "done": ".ipynb"}[kind]
    return runs.results_folder(task.parameters.results) / "notebooks" / f"{task.key}{suffix}"


def _execute(task: Task, workers: int) -> None:
    """Run one notebook with papermill in a process of its own; the executed notebook is kept, whole or not at all."""
    failed, done = _record(task, "failed"), _record(task, "done")
    done.parent.mkdir(parents=True, exist_ok=True)
    for left in task.place.parent.glob(f".{task.key}.*"):  # of a run that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    threads = str(max(1, (os.cpu_count() or 1) // max(1, workers)))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory(dir=done.parent, prefix=".") as folder:
        output, values = Path(folder, "run.ipynb"), Path(folder, "parameters.yaml")
        values.write_text(yaml.safe_dump(task.parameters.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "papermill", str(task.notebook), str(output), "-f", str(values)]
        outcome = subprocess.run(
            [*command, "--no-progress-bar", "--log-level", "ERROR"],
            env=environment,
            cwd=runs.project_folder(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if outcome.returncode == 0:
            os.replace(output, done)
            failed.unlink(missing_ok=True)
        elif output.is_file():
            os.replace(output, failed)
        else:
            raise DataError(f"{task.notebook.name} could not be started: {outcome.stderr.strip()[-500:]}")
