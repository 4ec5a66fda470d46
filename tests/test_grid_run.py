"""The runner: order, failures, repeats, several runners, full disks, Ctrl-C. No kernels here but for the last tests."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import papermill
import pytest
from grid_project import PARAMETERS, RESULT, SQUARE, Instant, Project, notebook

from cxrkit import DataError, ParameterError, grid
from cxrkit.grid import engines, processes, state, store
from cxrkit.grid.execute import Job, Outcome, execute, gpus
from cxrkit.grid.store import Runner, Store
from cxrkit.study import runs


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.delenv("CXRKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def failed(why="error", message="it broke"):
    return Outcome("failed", why, message, "trace", 1.0)


def left_behind(project) -> list[str]:
    """Names of the grid's own files of runs that are over."""
    own = project.results / ".grid"
    return [str(path) for folder in ("claims", "work", "runners") for path in (own / folder).glob("*")]


def test_what_is_done_is_skipped(project):
    path = project.grid(one={"seeds": 3})
    engine = Instant()
    assert grid.run(path, engine=engine)["state"].tolist() == ["done"] * 3
    assert engine.made == [task.key for task in grid.plan(path)]
    again = Instant()
    grid.run(path, engine=again)
    assert again.made == []
    assert left_behind(project) == []
    assert not again.closed  # no worker is started where there is nothing to do


def test_no_run_starts_before_those_that_it_needs(project):
    notebook(project.folder / "notebooks" / "look.ipynb", "run = ''\n", "1")
    path = project.grid(
        two={"notebook": "../look.ipynb", "after": "one"},
        one={"seeds": 4},
        three={"after": "two", "parameters": {"seed": 9}},
    )
    needed = {task.key: task.after for task in grid.plan(path)}

    class Strict(Instant):
        def submit(self, job):
            assert all((project.results / key / "run.json").is_file() for key in needed[job.key])
            super().submit(job)

    engine = Strict(capacity=3)
    grid.run(path, engine=engine)
    assert engine.most == 3
    assert sorted(engine.made) == sorted(needed)


def test_a_failed_run_blocks_only_those_that_need_it(project):
    notebook(project.folder / "notebooks" / "look.ipynb", "run = ''\nseed = 0\n", "1")
    path = project.grid(
        one={"seeds": 2},
        two={"notebook": "../look.ipynb", "after": "one"},
        three={"after": "two", "parameters": {"seed": 5}},
    )
    tasks = grid.plan(path)
    events = []
    engine = Instant(lambda job: failed() if job.key == tasks[0].key else True)
    state = grid.run(path, engine=engine, report=events.append)
    assert state["state"].tolist() == ["failed", "done", "blocked", "done", "blocked"]
    assert engine.made == [tasks[0].key, tasks[1].key, tasks[3].key]
    told = [(event.kind, event.task.key if event.task else None) for event in events]
    assert told[0] == ("begin", None)
    assert told[-1] == ("end", None)
    assert ("failed", tasks[0].key) in told
    assert ("blocked", tasks[2].key) in told
    assert ("blocked", tasks[4].key) in told
    assert len(events[0].tasks) == 5


def test_failed_runs_wait_for_a_retry_and_attempts_are_counted(project):
    path = project.grid(one={"seeds": 2}, two={"after": "one", "parameters": {"seed": 9}})
    broken = lambda job: failed() if job.values["seed"] == 0 else True  # noqa: E731
    grid.run(path, engine=Instant(broken))
    engine = Instant()
    assert grid.run(path, engine=engine)["state"].tolist() == ["failed", "done", "blocked"]
    assert engine.made == []
    assert "(2 attempts)" in grid.retry(path, engine=Instant(broken))["detail"].tolist()[0]
    assert grid.retry(path, engine=engine)["state"].tolist() == ["done"] * 3
    assert not list((project.results / "failed").iterdir())


def test_lost_runs_are_repeated_a_few_times(project):
    path = project.grid(one={"seeds": 2})
    first = grid.plan(path)[0].key
    losses = [None, failed("killed"), failed("start")]
    engine = Instant(lambda job: losses.pop() if losses and job.key == first else True)
    events = []
    assert grid.run(path, engine=engine, report=events.append, tries=4)["state"].tolist() == ["done", "done"]
    assert engine.made.count(first) == 4
    assert len({job.id for job in engine.jobs}) == 5
    assert [event.kind for event in events].count("repeat") == 3
    path = project.grid(one={"parameters": {"seed": 7}})
    engine = Instant(lambda job: None)
    state = grid.run(path, engine=engine, tries=3)
    assert engine.made == [grid.plan(path)[0].key] * 3
    assert state["state"].tolist() == ["failed"]
    assert "the worker that made it died" in state["detail"][0]


def test_a_run_that_claims_to_be_done_must_be_there(project):
    path = project.grid(one={})
    state = grid.run(path, engine=Instant(lambda job: Outcome("done")))
    assert state["state"].tolist() == ["failed"]
    assert "isn't whole" in state["detail"][0]


def test_limits_come_from_the_step_or_the_call(project):
    path = project.grid(one={"time_limit": "5 s", "memory_limit": "1 GB"}, two={"parameters": {"seed": 1}})
    engine = Instant(lambda job: failed())
    grid.run(path, engine=engine)
    assert [(job.time_limit, job.memory_limit) for job in engine.jobs] == [(5.0, 10**9), (None, None)]
    grid.retry(path, engine=engine, time_limit=9.0)
    assert [(job.time_limit, job.memory_limit) for job in engine.jobs[2:]] == [(9.0, 10**9), (9.0, None)]


def test_nothing_starts_when_a_name_is_unknown(project):
    notebook(project.folder / "notebooks" / "train.ipynb", "seed = 0", "1")
    path = project.grid(one={}, two={"notebook": "../train.ipynb", "cases": [{"model": "resnet19"}]})
    engine = Instant()
    with pytest.raises(ParameterError, match="model 'resnet19' is unknown"):
        grid.run(path, engine=engine)
    assert engine.made == []


def test_ctrl_c_leaves_a_state_that_goes_on(project):
    path = project.grid(one={"seeds": 4})

    def react(job):
        if job.values["seed"] == 2:
            raise KeyboardInterrupt
        return True

    engine = Instant(react, capacity=2)
    with pytest.raises(KeyboardInterrupt):
        grid.run(path, engine=engine)
    assert engine.closed
    assert left_behind(project) == []
    assert grid.status(path)["state"].tolist() == ["done", "done", "open", "open"]
    assert set(grid.run(path, engine=Instant())["state"]) == {"done"}


def test_two_runners_on_one_folder_make_each_run_once(project):
    path = project.grid(one={"seeds": 30}, two={"after": "one", "parameters": {"seed": 99}})
    engines = [Instant(lambda job: time.sleep(0.002) or True, capacity=2) for _ in range(3)]
    ends: list = []

    def work(engine):
        ends.append(grid.run(path, engine=engine)["state"].tolist())

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [key for engine in engines for key in engine.made]
    assert sorted(made) == sorted(task.key for task in grid.plan(path))
    assert ends == [["done"] * 31] * 3
    assert left_behind(project) == []


def test_what_another_runner_fails_is_not_tried_here(project):
    path = project.grid(one={"seeds": 2})
    tasks = grid.plan(path)
    own = Store(project.results)
    own.prepare()
    with Runner([own]) as other:
        claim = own.claim(tasks[0].key, other)
        events = []

        def hear(event):
            events.append(event.kind)
            if event.kind == "done":  # the first here; the other runner ends now
                own.record_failure(tasks[0].key, Path("none"), {"message": "it broke there"}, "")
                claim.release()

        engine = Instant()
        state = grid.run(path, engine=engine, report=hear)
    assert engine.made == [tasks[1].key]
    assert "elsewhere" in events
    assert state["state"].tolist() == ["failed", "done"]
    assert "it broke there" in state["detail"][0]


def dead_process() -> dict:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    told = processes.identity(process.pid)
    process.kill()
    process.wait()
    return told


def test_the_work_of_a_dead_runner_is_taken_up_at_once(project):
    path = project.grid(one={})
    key = grid.plan(path)[0].key
    own = Store(project.results)
    own.prepare()
    holder = dead_process() | {"runner": "dead", "since": "then"}
    (own.claims / f"{key}.1").write_text(json.dumps(holder))
    (own.work / f"{key}.12345678").mkdir()
    (project.results / f".{key}.12345678").mkdir()
    (own.runners / "dead").write_text(json.dumps(holder))
    assert own.holder(key) is None
    assert grid.run(path, engine=Instant())["state"].tolist() == ["done"]
    assert left_behind(project) == []
    assert sorted(name for name in os.listdir(project.results) if name != ".grid") == [key]


def test_a_process_that_took_a_dead_ones_number_is_not_it():
    assert processes.is_alive(processes.identity())
    assert processes.is_alive(processes.identity() | {"started": "1"}) is False
    assert processes.is_alive(processes.identity() | {"machine": "elsewhere"}) is None
    assert processes.is_alive(dead_process()) is False
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    processes.end_group(processes.identity(child.pid) | {"started": "1"})
    assert child.poll() is None
    processes.end_group(processes.identity(child.pid))
    assert child.wait(10) != 0


def test_a_runner_elsewhere_lives_as_long_as_its_file_is_touched(project, monkeypatch):
    own = Store(project.results)
    own.prepare()
    monkeypatch.setattr(store.processes, "machine", lambda: "there")
    with Runner([own], beat=0.05) as there:
        claim = own.claim("some-key", there)
        monkeypatch.setattr(store.processes, "machine", lambda: "here")
        with Runner([own]) as here:
            old = time.time() - 2 * store.LEASE
            os.utime(own.runners / there.name, (old, old))
            deadline = time.time() + 10
            while own.holder("some-key") is None and time.time() < deadline:
                time.sleep(0.01)  # its next touch brings it back
            assert own.holder("some-key").holder["runner"] == there.name
            assert own.claim("some-key", here) is None
            there._over.set()
            there._thread.join()
            os.utime(own.runners / there.name, (old, old))
            assert own.holder("some-key") is None
            taken = own.claim("some-key", here)
            assert taken.path.name == "some-key.2"
            claim.release()  # the late one takes nothing from its successor
            assert own.holder("some-key").holder["runner"] == here.name
            taken.release()
    assert left_behind(project) == []


def test_a_claim_that_was_never_written_is_given_up_after_a_while(project):
    own = Store(project.results)
    own.prepare()
    (own.claims / "some-key.1").touch()
    with Runner([own]) as runner:
        assert own.claim("some-key", runner) is None
        os.utime(own.claims / "some-key.1", (0, 0))
        own.claim("some-key", runner).release()
    assert left_behind(project) == []


def test_a_claim_that_another_made_a_moment_ago_is_respected(project, monkeypatch):
    """Whoever looked before the other's file was there can't create it a second time, nor pass it by."""
    own = Store(project.results)
    own.prepare()
    with Runner([own]) as one, Runner([own]) as two:
        first, looks = own.claim("some-key", one), []
        real = store._claims

        def late(claims, key):
            looks.append(key)
            return real(claims, key) if len(looks) > 1 else seen

        monkeypatch.setattr(store, "_claims", late)
        seen = []
        assert own.claim("some-key", two) is None
        dead = own.claims / "some-key.5"
        dead.write_text(json.dumps(dead_process() | {"runner": "dead", "since": "then"}))
        seen, looks = [dead], []
        assert own.claim("some-key", two) is None
        assert own.holder("some-key").holder["runner"] == one.name
        assert first.path.is_file()


def test_many_claim_and_one_gets_it(project):
    own = Store(project.results)
    own.prepare()
    rounds, wins = 40, []

    def race(runner, barrier):
        for number in range(rounds):
            barrier.wait()
            if own.claim(f"key-{number}", runner):
                wins.append(number)

    with Runner([own]) as one, Runner([own]) as two, Runner([own]) as three:
        barrier = threading.Barrier(3)
        threads = [threading.Thread(target=race, args=(runner, barrier)) for runner in (one, two, three)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(wins) == list(range(rounds))


@contextlib.contextmanager
def no_kernel(kernel, log):
    yield kernel


def write_only(notebook, output, km, **ignored):
    """Executes nothing, but writes what a notebook writes."""
    Path(output).write_text("{}")
    Path(km.job.work, "output", "number.txt").write_text("1")


def test_a_full_disk_is_told_and_nothing_is_half_written(project, monkeypatch):
    """The disk becomes full at every write in turn, and stays full until the runner ends; then the grid goes on."""
    monkeypatch.setattr("cxrkit.grid.execute._Kernel.started", no_kernel)
    monkeypatch.setattr(papermill, "execute_notebook", write_only)
    path = project.grid(one={})
    tasks = grid.plan(path)
    count, limit, seen = [0], [0], set()

    def full(call):
        def checked(file, *args, **options):
            how = options.get("mode", args[0] if args else "r")
            writes = call is make or (how & (os.O_WRONLY | os.O_RDWR) if call is low else set("wax") & set(how))
            if limit[0] and writes and str(project.results) in str(file):
                count[0] += 1
                if count[0] >= limit[0]:
                    seen.add(os.path.basename(file))
                    raise OSError(errno.ENOSPC, "No space left on device", str(file))
            return call(file, *args, **options)

        return checked

    make, low = os.mkdir, os.open
    monkeypatch.setattr(os, "mkdir", full(make))
    monkeypatch.setattr(os, "open", full(low))
    monkeypatch.setattr(io, "open", full(io.open))
    monkeypatch.setattr("builtins.open", io.open)
    ends = set()
    for limit[0] in range(1, 80):
        count[0] = 0
        try:
            grid.run(path, engine=Instant(lambda job: execute(job), work=False))
            ends.add("ran")
        except DataError as error:
            ends.add(str(error)[:16])
        reached, stopped, limit[0] = count[0], limit[0], 0
        for folder in project.results.glob("square-*"):
            runs.Run(folder).verify()
        assert not list(project.results.glob(".square-*")), stopped
        assert not list(project.results.glob("failed/*")), stopped
        assert grid.run(path, engine=Instant())["state"].tolist() == ["done"], stopped
        assert left_behind(project) == [], stopped
        grid.remove([state.Leftover(task.place, "", task.key) for task in tasks])
        if reached < stopped:
            break
    else:
        pytest.fail("it never got through")
    assert ends == {"ran", "the disk is full"}
    assert {"log.txt", "notebook.ipynb", "number.txt", "run.json", "environment.json", "output"} <= seen


def test_cores_and_cards_are_shared_out(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    engine = engines.LocalEngine(3)
    assert [tuple(worker.share.values()) for worker in engine.workers] == [(2, "0"), (2, "2"), (2, "0")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert gpus() == []
    assert engines.LocalEngine(2).workers[0].share["gpu"] is None


# With kernels.


def job_of(project, **changes) -> Job:
    task = grid.plan(project.grid(one={"parameters": changes.pop("parameters", {})}))[0]
    card = runs.card_of(task.parameters)
    work = project.results / ".grid" / "work" / "attempt"
    work.mkdir(parents=True, exist_ok=True)
    job = Job(
        id="attempt",
        key=task.key,
        notebook=str(task.notebook),
        values=task.parameters.model_dump(),
        card=card,
        results=str(project.results),
        work=str(work),
        project=str(project.folder),
    )
    return replace(job, **changes)


def test_local_workers_make_runs_with_their_threads_and_tell_why_one_failed(project):
    (project.folder / "notebooks" / "own").mkdir()
    (project.folder / "notebooks" / "own" / "measure.py").write_text("value = 5")
    cell = "from own.measure import value\ntold = [os.getcwd(), os.environ['OMP_NUM_THREADS'], value]\n"
    cell += "import json\npathlib.Path(os.environ['CXRKIT_OUTPUT'], 'e.json').write_text(json.dumps(told))"
    notebook(project.square, PARAMETERS, SQUARE, RESULT, cell)
    path = project.grid(one={"seeds": 2}, two={"parameters": {"wrong": True}})
    with engines.LocalEngine(2) as engine:
        state = grid.run(path, engine=engine)
    assert all(worker.process.poll() is not None for worker in engine.workers)
    assert state["state"].tolist() == ["done", "done", "failed"]
    assert "ValueError: this one fails" in state["detail"][2]
    done, _, broken = grid.plan(path)
    run = runs.Run(done.place)
    run.verify()
    assert {"number.txt", "notebook.ipynb", "environment.json"} <= set(run.card["files"])
    assert run.json("e.json") == [str(project.folder), str(max(1, engines.cores() // 2)), 5]
    told = grid.show(broken.key)
    assert "about to fail" in told["log"]
    assert 'raise ValueError("this one fails")' in told["traceback"]
    assert "about to fail" in (project.results / "failed" / broken.key / "notebook.ipynb").read_text()
    assert left_behind(project) == []


def test_limits_end_a_run(project):
    notebook(project.square, PARAMETERS, "big = bytearray(int(seed))\nimport time\ntime.sleep(60)", RESULT)
    outcome = execute(job_of(project, time_limit=2.0))
    assert (outcome.state, outcome.why) == ("failed", "time")
    assert "time limit of 2 s" in outcome.message
    assert 2 <= outcome.seconds < 30
    (other := project.results / "b").mkdir()
    job = job_of(project, parameters={"seed": 600_000_000}, memory_limit=500_000_000, work=str(other))
    outcome = execute(job)
    assert (outcome.state, outcome.why) == ("failed", "memory")
    assert "its limit is 0.50 GB" in outcome.message
    assert not list(project.results.glob("square-*"))


def test_a_run_that_nobody_wants_any_more_ends(project):
    notebook(project.square, PARAMETERS, "import time\ntime.sleep(60)", RESULT)
    job = job_of(project)
    threading.Timer(3.0, os.rename, (job.work, job.work + ".gone")).start()
    outcome = execute(job)
    assert (outcome.why, outcome.message) == ("cancelled", "its runner is gone")


def test_a_disk_full_inside_the_notebook_is_told_as_such(project):
    notebook(project.square, PARAMETERS, "import errno, os\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")
    path = project.grid(one={})
    with pytest.raises(DataError, match=r"No space left on device.*what was finished is safe"):
        grid.run(path, engine="serial")
    assert grid.status(path)["state"].tolist() == ["open"]
    assert left_behind(project) == []


def test_papermill_alone_runs_the_same_notebook(project):
    output, written = project.folder / "out.ipynb", project.folder / "written"
    written.mkdir()
    command = [sys.executable, "-m", "papermill", str(project.square), str(output), "-p", "seed", "5"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CXRKIT_OUTPUT": str(written)})
    assert (written / "number.txt").read_text() == "25"
