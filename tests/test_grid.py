"""Grids: planned whole, skipping what is done, going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cxrkit import ParameterError
from cxrkit.study import grid, runs

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TRAIN = {"notebook": str(NOTEBOOKS / "train.ipynb")}
EXPLAIN = {"notebook": str(NOTEBOOKS / "explain.ipynb"), "after": "train"}


@pytest.fixture
def make_grid(tmp_path):
    def make(**steps) -> Path:
        for step in steps.values():
            step.setdefault("parameters", {})["results"] = str(tmp_path / "results")
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(steps, sort_keys=False))
        return path

    return make


@pytest.fixture
def pretend(monkeypatch):
    """Replaces the execution of a notebook by writing its run; returns the keys executed, in order."""
    executed, failing = [], set()

    def execute(task, workers):
        executed.append(task.key)
        if task.key not in failing:
            with runs.writing(task.parameters) as writer:
                writer.frame("history", pd.DataFrame({"epoch": [1]}))

    monkeypatch.setattr(grid, "_execute", execute)
    return executed, failing


def test_products_cases_and_steps_multiply(make_grid):
    path = make_grid(
        train=TRAIN
        | {"product": {"seed": [0, 1], "fold": [0, 1, 2]}, "cases": [{"model": "resnet18"}, {"antialias": "blur"}]},
        explain=dict(EXPLAIN),
    )
    tasks = grid.plan(path)
    train = [task for task in tasks if task.notebook.stem == "train"]
    assert len(train) == 12
    assert len({task.key for task in train}) == 12
    assert [task.needs for task in tasks if task.notebook.stem == "explain"] == [task.key for task in train]
    assert all(task.parameters.run == task.needs for task in tasks[12:])


def test_every_problem_is_told_and_nothing_starts(make_grid, pretend):
    path = make_grid(
        train=TRAIN | {"cases": [{"epohcs": 3}, {"fold": 7}]},
        explain={"notebook": "nowhere.ipynb"},
        again=EXPLAIN | {"after": "nothing"},
    )
    with pytest.raises(ParameterError) as error:
        grid.run(path)
    for part in ("'epohcs'", "did you mean 'epochs'", "'fold'", "nowhere.ipynb", "'nothing'"):
        assert part in str(error.value)
    assert pretend[0] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "not YAML"), ("[]", "expected step names"), ("train: {}", "must name its notebook")],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ParameterError, match=message):
        grid.plan(path)


@pytest.mark.parametrize(
    ("step", "message"),
    [({"product": {"seed": []}}, "something in it"), ({"products": {"seed": [1]}}, r"unknown \['products'\]")],
)
def test_a_step_that_is_no_step_is_refused(make_grid, step, message):
    with pytest.raises(ParameterError, match=message):
        grid.plan(make_grid(train=TRAIN | step))


def test_an_unknown_grid_names_the_known():
    with pytest.raises(ParameterError, match="quick"):
        grid.plan("quik")


def test_what_is_done_is_skipped(make_grid, pretend):
    executed, _ = pretend
    path = make_grid(train=TRAIN | {"product": {"seed": [0, 1, 2]}}, explain=dict(EXPLAIN))
    assert set(grid.run(path, workers=2)["state"]) == {"done"}
    assert len(executed) == 6
    grid.run(path)
    assert len(executed) == 6
    (runs.Run(grid.plan(path)[1].place).folder / "history.csv").unlink()  # a run cut off
    assert sorted(grid.status(path)["state"]) == ["done"] * 5 + ["open"]
    grid.run(path)
    assert executed[6:] == [grid.plan(path)[1].key]


def test_a_failed_run_holds_up_only_those_that_need_it(make_grid, pretend):
    executed, failing = pretend
    path = make_grid(train=TRAIN | {"product": {"seed": [0, 1]}}, explain=dict(EXPLAIN))
    tasks = grid.plan(path)
    failing.add(tasks[0].key)
    events = []
    state = grid.run(path, report=lambda event, task, seconds: events.append((event, task.key)))
    assert state["state"].tolist() == ["open", "done", "open", "done"]
    assert ("failed", tasks[0].key) in events
    assert tasks[2].key not in executed


def test_an_explanation_never_starts_before_its_training(make_grid, pretend):
    executed, _ = pretend
    path = make_grid(train=TRAIN | {"product": {"seed": [0, 1, 2, 3]}}, explain=dict(EXPLAIN))
    grid.run(path, workers=3)
    for task in grid.plan(path):
        if task.needs:
            assert executed.index(task.needs) < executed.index(task.key)


def test_killed_for_real_it_goes_on(make_grid, tmp_path):
    """Runner, papermill and kernel are killed in the middle of a run; nothing half-written stays, the rest is made."""
    small = {"dataset_options": {"images": 60}, "size": 32, "epochs": 1, "model": "resnet18"}
    path = make_grid(train=TRAIN | {"product": {"seed": [0, 1]}})
    steps = yaml.safe_load(path.read_text())
    steps["train"]["parameters"] |= small
    path.write_text(yaml.safe_dump(steps))
    code = f"from cxrkit.study import grid; grid.run({str(path)!r})"
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=NOTEBOOKS.parent, start_new_session=True)
    results = tmp_path / "results"
    deadline = time.time() + 120
    while not list(results.glob("train-*/run.json")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    whole = list(runs.table(results)["key"])
    assert len(whole) >= 1
    kept = {key: (results / key / "run.json").stat().st_mtime_ns for key in whole}
    state = grid.run(path)
    assert set(state["state"]) == {"done"}
    assert {key: (results / key / "run.json").stat().st_mtime_ns for key in whole} == kept
    for key in state["key"]:
        runs.Run(results / key).verify()


def test_a_notebook_that_fails_leaves_its_traceback(make_grid, tmp_path):
    path = make_grid(train=TRAIN | {"cases": [{"dataset": "folder", "root": str(tmp_path / "empty")}]})
    (tmp_path / "empty").mkdir()
    state = grid.run(path)
    assert state["state"].tolist() == ["failed"]
    kept = list((tmp_path / "results" / "notebooks").glob("*.failed.ipynb"))
    assert len(kept) == 1
    assert "DataError" in kept[0].read_text()
    assert not list((tmp_path / "results").glob("train-*"))
