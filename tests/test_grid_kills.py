"""Kernels, workers and runners are killed for real; what is there afterwards is whole, and nothing keeps running."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from grid_project import PARAMETERS, RESULT, SQUARE, Project, notebook

from cxrkit import grid
from cxrkit.study import runs

RUNNER = "import sys; from cxrkit import grid; grid.run('mine', 2, retry=True)"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Iterator[Project]:
    monkeypatch.delenv("CXRKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield (made := Project(tmp_path))
    for pid in here(made):  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def start(project, *command) -> subprocess.Popen:
    log = (project.folder / "log.txt").open("a")
    return subprocess.Popen(
        command or [sys.executable, "-c", RUNNER], cwd=project.folder, stdout=log, stderr=log, start_new_session=True
    )


def here(project) -> dict[int, str]:
    """The processes that work in the project: number and role."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != "zombie" and process.cwd() == str(project.folder):
                line = " ".join(process.cmdline())
                found[process.pid] = next((role for role in ("kernel", "worker") if f"grid.{role}" in line), "runner")
        except psutil.Error:
            continue
    return found


def until(condition, seconds=60.0) -> None:
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over, "waited in vain"
        time.sleep(0.02)


def left_behind(project) -> list[Path]:
    own = project.results / ".grid"
    return [path for name in ("claims", "work", "runners") for path in (own / name).iterdir()]


def check_whole(project, path) -> None:
    tasks = grid.plan(path)
    for task in tasks:
        run = runs.Run(task.place)
        run.verify()
        assert (run.folder / "number.txt").read_text() == str(task.parameters.seed**2)
    names = {name for name in os.listdir(project.results) if name not in (".grid", "failed")}
    assert names == {task.key for task in tasks}
    assert left_behind(project) == []
    assert list((project.results / "failed").glob("*")) == []


def test_kernels_workers_and_runners_are_killed_and_every_run_is_made(project):
    path = project.grid(one={"seeds": 8, "parameters": {"nap": 0.3}})
    rng, runner, killed = random.Random(7), start(project), []
    try:
        for role in ("kernel", "worker", "runner", "kernel", "runner", "worker", "kernel", "runner"):
            if runner.poll() is not None:
                runner = start(project)
            until(lambda: "kernel" in (roles := here(project).values()) or not roles)
            time.sleep(rng.uniform(0, 0.5))
            victims = [pid for pid, found in here(project).items() if found == role]
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed.append(role)
            if role == "runner":
                runner.wait()
    finally:
        runner.kill()
        runner.wait()
    assert {"kernel", "worker", "runner"} == set(killed)
    until(lambda: not here(project), 10)  # what the last runner started ends without it
    assert set(grid.run(path, 2, retry=True)["state"]) == {"done"}
    check_whole(project, path)


def test_all_at_once_are_killed_and_no_kernel_survives(project):
    path = project.grid(one={"seeds": 2, "parameters": {"nap": 30.0}})
    runner = start(project)
    until(lambda: list(here(project).values()).count("kernel") == 2)
    for pid, role in here(project).items():
        if role != "kernel":
            os.kill(pid, signal.SIGKILL)
    runner.wait()
    until(lambda: not here(project), 10)
    assert grid.status(path)["state"].tolist() == ["open", "open"]
    assert grid.leftovers(path) != []
    grid.clean(path)
    assert left_behind(project)[1:] == []  # the dead runner's own file goes with the next run


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_kernels_and_workers_and_leaves_nothing(project, sent):
    notebook(project.square, PARAMETERS, "import subprocess\nsubprocess.Popen(['sleep', '60'])", SQUARE, RESULT)
    path = project.grid(one={"seeds": 2, "parameters": {"nap": 30.0}})
    command = str(Path(sys.executable).with_name("cxrkit"))
    runner = start(project, command, "grid", "run", "mine", "--workers", "2")
    until(lambda: list(here(project).values()).count("kernel") == 2)
    until(lambda: len(here(project)) >= 6)  # the commands that the notebooks started
    assert grid.status(path)["state"].tolist() == ["running", "running"]
    assert grid.show("square-seed1")["by"].endswith(f"process {runner.pid}")
    runner.send_signal(sent)
    assert runner.wait(20) == 130
    until(lambda: not here(project), 5)
    assert left_behind(project) == []
    assert "Nothing is left running" in (project.folder / "log.txt").read_text()
    assert grid.status(path)["state"].tolist() == ["open", "open"]
