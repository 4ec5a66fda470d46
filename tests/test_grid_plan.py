"""Keys and states: what makes a run another run, and what has become of each."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from grid_project import PARAMETERS, RESULT, SQUARE, Instant, Project, notebook
from typer.testing import CliRunner

from cxrkit import DataError, ParameterError, grid
from cxrkit.cli import app
from cxrkit.grid.execute import Outcome
from cxrkit.grid.store import Runner, Store
from cxrkit.study import index, run_key, runs
from cxrkit.study.parameters import ExplainParameters
from cxrkit.train.parameters import TrainParameters


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.delenv("CXRKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def names(path):
    return grid.status(path)["state"].tolist()


def details(path):
    return grid.status(path)["detail"].tolist()


def failing(*seeds):
    return lambda job: Outcome("failed", "error", "it broke", "trace") if job.values["seed"] in seeds else True


def test_a_key_follows_parameters_notebook_code_version_and_data(project, monkeypatch):
    def key(**parameters):
        return grid.plan(project.grid(one={"parameters": parameters}))[0].key

    first = key()
    assert key() == first
    assert key(results="elsewhere") == first
    assert run_key.identity_of(key(seed=1)) != run_key.identity_of(first)
    notebook(project.square, PARAMETERS, "# a remark\n" + SQUARE, RESULT)
    changed = key()
    assert changed != first
    assert run_key.identity_of(changed) == run_key.identity_of(first)
    notebook(project.square, PARAMETERS.replace("0.01", "0.02"), SQUARE, RESULT)
    assert run_key.identity_of(key(nap=0.01)) == run_key.identity_of(first)  # the default took part, not the cell
    notebook(project.square, PARAMETERS, SQUARE, RESULT)
    assert key() == first
    monkeypatch.setattr(run_key, "fingerprint", lambda notebook: "other")
    assert key() not in (first, changed)
    monkeypatch.undo()
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr("cxrkit.__version__", "9.9")
    assert key() != first


def test_a_key_follows_the_manifest_of_a_source(monkeypatch, tmp_path):
    manifest = run_key.origin(TrainParameters())["data"]
    assert manifest
    package = tmp_path / "cxrkit" / "__init__.py"
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests" / "phantom.yaml").write_text("title: other")
    monkeypatch.setattr("cxrkit.__file__", str(package))
    monkeypatch.setattr(run_key, "fingerprint", lambda notebook: "same")
    assert run_key.origin(TrainParameters())["data"] != manifest


def test_explanations_of_a_network_made_anew_are_the_same_explanations_made_anew():
    old, new = (f"train-resnet18-fold0-seed0-0123456789ab-{end}" for end in ("00000000", "11111111"))
    first, second = (runs.key(ExplainParameters(run=run)) for run in (old, new))
    assert first != second
    assert run_key.identity_of(first) == run_key.identity_of(second)


def test_a_name_may_hold_the_profile(project):
    path = project.grid(one={"parameters": {"seed": 1}}, profiles={"large": {"one": {"parameters": {"seed": 7}}}})
    assert grid.plan(f"{path}:large") == grid.plan(path, "large") != grid.plan(path)
    with pytest.raises(ParameterError, match="unknown profile 'huge'; known: large"):
        grid.plan(f"{path}:huge")


def test_runs_that_two_grids_share_are_planned_once(project):
    first = project.grid(one={"parameters": {}, "product": {"seed": [0, 1]}})
    second = first.with_name("second.yaml")
    second.write_text(first.read_text().replace("- 0\n", ""))
    assert [task.parameters.seed for task in grid.plan(second)] == [1]
    assert grid.plan((str(first), str(second))) == grid.plan(first)


def test_notebooks_of_the_same_name_make_different_runs(project):
    other = notebook(project.folder / "more" / "square.ipynb", PARAMETERS, SQUARE, RESULT)
    tasks = grid.plan(project.grid(one={}, two={"notebook": f"../../{other.relative_to(project.folder)}"}))
    assert run_key.identity_of(tasks[0].key) != run_key.identity_of(tasks[1].key)


def test_states_of_runs(project):
    path = project.grid(one={"seeds": 4}, two={"after": "one", "parameters": {"seed": 9}})
    assert names(path) == ["open"] * 5
    grid.run(path, engine=Instant(failing(1)))
    assert names(path) == ["done", "failed", "done", "done", "blocked"]
    assert "it broke" in details(path)[1]
    assert details(path)[4] == f"needs {grid.plan(path)[1].key}, which failed"


def test_a_run_that_is_not_whole_is_not_done(project):
    path = project.grid(one={"seeds": 3})
    grid.run(path, engine=Instant())
    tasks = grid.plan(path)
    (tasks[0].place / "number.txt").unlink()
    (tasks[1].place / "run.json").unlink()
    assert names(path) == ["open", "open", "done"]
    (tasks[2].place / "stranger.txt").write_text("beside it")  # the folder has changed, but all of the run is there
    assert names(path) == ["open", "open", "done"]
    engine = Instant()
    grid.run(path, engine=engine)
    assert engine.made == [task.key for task in tasks[:2]]
    runs.Run(tasks[0].place).verify()


def test_runs_of_other_code_are_stale(project, monkeypatch):
    path = project.grid(one={"seeds": 2})
    grid.run(path, engine=Instant())
    old = grid.plan(path)[0].key
    notebook(project.square, PARAMETERS, SQUARE + "2", RESULT)
    assert names(path) == ["stale", "stale"]
    assert details(path)[0] == f"`cxrkit grid why {old}` tells what has changed"
    monkeypatch.setattr("cxrkit.__version__", "9.9")
    monkeypatch.setattr(run_key, "fingerprint", lambda notebook: "other")
    assert names(path) == ["stale", "stale"]
    engine = Instant()
    grid.run(path, engine=engine)
    assert len(engine.made) == 2
    assert names(path) == ["done", "done"]
    assert (project.results / old).is_dir()


def test_data_that_changed_make_a_run_stale(project):
    notebook(project.square, "root = ''\nseed = 0\n", RESULT)
    (project.folder / "data").mkdir()
    (project.folder / "data" / "images.csv").write_text("a")
    path = project.grid(one={"parameters": {"root": "data"}})
    grid.run(path, engine=Instant())
    (project.folder / "data" / "images.csv").write_text("b")
    assert names(path) == ["stale"]


def test_a_run_that_someone_makes_is_running(project):
    path = project.grid(one={"seeds": 2})
    store = Store(project.results)
    store.prepare()
    with Runner([store]) as runner:
        claim = store.claim(grid.plan(path)[0].key, runner)
        state = grid.status(path).iloc[0]
        assert state["state"] == "running"
        assert f"process {os.getpid()}) since 20" in state["detail"]
        claim.release()
    assert names(path) == ["open", "open"]


def test_estimates_come_from_earlier_runs(project):
    path = project.grid(one={"seeds": 2}, two={"parameters": {"seed": 7}})
    assert grid.estimate(grid.plan(path)) == [None, None, None]
    store = Store(project.results)
    store.prepare()
    for seconds in (1.0, 5.0, 3.0):
        store.journal(event="done", kind="square", step="one", seconds=seconds)
    store.journal(event="failed", kind="square", step="one", seconds=100.0)
    with (store.base / "journal.jsonl").open("a") as file:
        file.write('{"event": "done", "cut off')
    assert grid.estimate(grid.plan(path)) == [3.0, 3.0, 3.0]
    told = CliRunner().invoke(app, ["grid", "run", str(path), "--dry-run", "--workers", "3"]).output
    assert "3 runs would start; estimated time, 3 at a time: 0:00:03" in told
    assert not list(project.results.glob("square*"))


def test_a_dry_run_counts_by_step_and_state(project):
    path = project.grid(one={"seeds": 3}, two={"after": "one", "parameters": {"seed": 9}})
    grid.run(path, engine=Instant(failing(1)))
    told = CliRunner().invoke(app, ["grid", "run", str(path), "--dry-run"]).output.splitlines()
    assert [line.split() for line in told[:3]] == [
        ["step", "runs", "done", "failed", "blocked"],
        ["one", "3", "2", "1", "0"],
        ["two", "1", "0", "0", "1"],
    ]


def test_show_tells_of_one_run(project):
    path = project.grid(one={"seeds": 2})
    grid.run(path, engine=Instant(failing(1)))
    done, failed = (task.key for task in grid.plan(path))
    assert grid.show(done)["state"] == "done"
    assert grid.show(done)["parameters"]["seed"] == 0
    told = grid.show("square-seed1")
    assert told["key"] == failed
    expected = {"state": "failed", "why": "error", "message": "it broke", "attempts": 1, "traceback": "trace"}
    assert expected.items() <= told.items()
    assert told["log"] == "what the kernel printed\n"
    assert told["parameters"]["seed"] == 1
    printed = CliRunner().invoke(app, ["grid", "show", "square-seed1"]).output
    assert "what the kernel printed" in printed
    assert "trace" in printed
    with pytest.raises(DataError, match="2 runs called 'square'"):
        grid.show("square")
    with pytest.raises(DataError, match=f"no runs called 'x'.*{done}"):
        grid.show("x")


def test_clean_takes_what_is_left_over_and_nothing_else(project):
    path = project.grid(one={"seeds": 3})
    grid.run(path, engine=Instant())
    kept = [task.key for task in grid.plan(path)]
    notebook(project.square, PARAMETERS, SQUARE + "2", RESULT)
    grid.run(path, engine=Instant(failing(2)))
    new = [task.key for task in grid.plan(path)]
    store = Store(project.results)
    (store.work / f"{new[0]}.01234567").mkdir()
    (store.claims / f"{new[0]}.1").write_text("")
    os.utime(store.claims / f"{new[0]}.1", (0, 0))
    for folder, age in ((f".{new[1]}.aaaaaaaa", 1e9), (f".{new[1]}.bbbbbbbb", 0)):
        (project.results / folder).mkdir()
        if age:
            os.utime(project.results / folder, (0, 0))
    shutil.copytree(project.results / kept[0], project.results / "square-of-others")
    told = grid.leftovers(path)
    assert sorted(left.path.name for left in told) == sorted(
        [*kept, new[2], f"{new[0]}.01234567", f"{new[0]}.1", f".{new[1]}.aaaaaaaa"]
    )
    answer = CliRunner().invoke(app, ["grid", "clean", str(path)], input="n\n")
    assert grid.leftovers(path) == told, answer.output
    assert "7 deleted" in CliRunner().invoke(app, ["grid", "clean", str(path), "--yes"]).output
    assert {name for name in os.listdir(project.results) if name.startswith("square")} == {*new[:2], "square-of-others"}
    assert names(path) == ["done", "done", "open"]
    assert len(grid.clean(path, done=True)) == 2
    assert names(path) == ["open"] * 3


def test_clean_leaves_alone_what_someone_works_on(project):
    path = project.grid(one={})
    key = grid.plan(path)[0].key
    store = Store(project.results)
    store.prepare()
    with Runner([store]) as runner:
        store.claim(key, runner)
        (store.work / f"{key}.01234567").mkdir()
        assert grid.leftovers(path) == []


def test_a_generic_run_reads_like_any_other(project):
    path = project.grid(one={"parameters": {"seed": 3, "name": "x"}})
    grid.run(path, engine=Instant())
    task = grid.plan(path)[0]
    run = runs.Run(task.place)
    assert (run.kind, run.key) == ("square", task.key)
    assert run.parameters.model_dump() == task.parameters.model_dump()
    assert run.parameters.seed == 3
    assert runs.key(run.parameters) == task.key
    assert not run.stale
    row = index.table().iloc[0]
    assert (row["key"], row["seed"], row["name"]) == (task.key, 3, "x")
    assert index.newest("square").key == task.key
    card = json.loads((task.place / "run.json").read_text())
    assert card["notebook"] == "notebooks/square.ipynb"
    assert set(card["origin"]) == {"version", "code", "notebook"}
    assert set(card["made_from"]) == {"notebooks/square.ipynb"}


def test_tasks_can_be_told_apart_and_copied(project):
    task = grid.plan(project.grid(one={"seeds": 2}))[0]
    assert replace(task, time_limit=3.0).key == task.key
    assert not task.done
    assert task.place == project.results / task.key


def test_why_names_what_made_a_run_stale(project, monkeypatch):
    module = project.folder / "notebooks" / "helper.py"
    module.write_text("power = 2")
    (project.folder / "data").mkdir()
    (project.folder / "data" / "images.csv").write_text("a")
    notebook(project.square, PARAMETERS + "root = 'data'\n", "import helper", RESULT)
    look = notebook(project.folder / "notebooks" / "look.ipynb", "run = ''\n", RESULT.replace("seed", "1"))
    path = project.grid(one={}, two={"notebook": f"../{look.name}", "after": "one"})
    grid.run(path, engine=Instant())
    old, about = (task.key for task in grid.plan(path))
    assert grid.why(old) == grid.why(about) == []
    assert "isn't stale" in CliRunner().invoke(app, ["grid", "why", old]).output

    project.grid(one={"parameters": {"seed": 3}, "product": {"nap": [0.01, 0.5]}})
    assert grid.why(old, file=path) == ["parameter seed: 0 then, 3 in the grid"]
    project.grid(one={}, two={"notebook": f"../{look.name}", "after": "one"})

    module.write_text("power = 3  # now")
    (project.folder / "data" / "images.csv").write_text("b")
    monkeypatch.setattr("cxrkit.__version__", "9.9")
    expected = ["cxrkit: 0.1.0 then, 9.9 now", "data/images.csv: changed", "helper: changed"]
    assert grid.why(old) == grid.why(old[:-4]) == expected
    new = grid.plan(path)[0].key
    assert grid.status(path)["state"].tolist() == ["stale", "stale"]
    assert grid.why(new) == expected, "the key of the run that takes its place"
    assert f"run {old}, which it needs: helper: changed" in grid.why(about)
    assert CliRunner().invoke(app, ["grid", "why", old]).output.splitlines() == expected

    notebook(project.square, PARAMETERS.replace("name", "title"), "import helper, os", RESULT)
    told = grid.why(old)
    assert {"parameter name: gone", "parameter root: gone", "parameter title: new"} <= set(told)
    assert "notebooks/square.ipynb: changed" in told
    with pytest.raises(DataError, match="no runs called 'x'"):
        grid.why("x")
