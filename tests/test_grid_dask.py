"""A grid on a dask cluster of this machine: the same outcome as without one, whoever dies on the way."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

from cxrkit import CxrkitError, ParameterError, grid
from cxrkit.grid import cluster as clusters
from cxrkit.grid import engines
from cxrkit.grid import execute as executing
from cxrkit.grid.cluster import DaskEngine, address_of
from cxrkit.grid.execute import Job, Outcome
from cxrkit.study import runs

Client = pytest.importorskip("distributed").Client

# What a worker does instead of starting a kernel: it takes a moment and writes the run.
FAKE = """
import os, time
from pathlib import Path
from cxrkit.study import runs
from cxrkit.grid import execute
from cxrkit.grid.execute import Outcome

def fake(job):
    with open(Path(job.results) / "begun.txt", "a") as file:
        file.write(f"{job.id} {job.threads} {os.getpid()}\\n")
    time.sleep(job.values["wait"])
    if job.values["seed"] in (3, 13):
        return Outcome("failed", "error", "as it should")
    with runs.writing_card(Path(job.results), job.card, job.values) as writer:
        writer.text("result.txt", str(job.values["seed"] ** 2))
    return Outcome("done", seconds=job.values["wait"])

execute.execute = fake
"""
WORKER = "from distributed.cli.dask_worker import main; main()"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one tiny notebook and no grid yet; the current folder is its root."""
    (tmp_path / "notebooks" / "grids").mkdir(parents=True)
    cells = [
        nbformat.v4.new_code_cell("seed = 0\nwait = 0.0\n", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import os\nfrom pathlib import Path\nimport time\ntime.sleep(wait)\n"
            "Path(os.environ['CXRKIT_OUTPUT'], 'result.txt').write_text(str(seed ** 2))"
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "tiny.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXRKIT_RESULTS", str(tmp_path / "results"))
    return tmp_path


def make_grid(project: Path, **step) -> Path:
    path = project / "notebooks" / "grids" / "mine.yaml"
    path.write_text(yaml.safe_dump({"tiny": {"notebook": "../tiny.ipynb", **step}}))
    return path


class Cluster:
    """A scheduler and workers, each a process of its own, on the loopback interface."""

    def __init__(self, folder: Path):
        self.folder, self.workers = folder, []
        self.logs = 0
        file = folder / "scheduler.json"
        code = "from distributed.cli.dask_scheduler import main; main()"
        self.scheduler = self._start(
            code, "--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0", "--no-dashboard"
        )
        try:
            until(lambda: file.is_file() and file.read_text().rstrip().endswith("}"), 60)
        except BaseException:
            self.close()
            raise
        self.address = address_of(str(file))

    def _start(self, code: str, *arguments: str) -> subprocess.Popen:
        self.logs += 1
        with open(self.folder / f"log{self.logs}.txt", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, *arguments], stdout=log, stderr=log, start_new_session=True
            )

    def worker(self, before: str = "", threads: int = 1) -> subprocess.Popen:
        process = self._start(
            f"{before}\n{WORKER}", self.address, "--nthreads", str(threads), "--no-nanny", "--no-dashboard", "--host",
            "127.0.0.1", "--local-directory", str(self.folder / "scratch"),
        )  # fmt: skip
        self.workers.append(process)
        return process

    def wait(self, count: int) -> None:
        """Until the scheduler knows of this many workers."""
        with Client(self.address, timeout=30, set_as_default=False) as client:
            until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == count, 60)

    def clear(self) -> None:
        for process in self.workers:
            process.kill()
            process.wait()
        self.workers = []

    def close(self) -> None:
        self.clear()
        self.scheduler.kill()
        self.scheduler.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(scheduler):
    """A cluster without workers."""
    yield scheduler
    scheduler.clear()
    scheduler.wait(0)


def until(told, seconds: float = 20) -> None:
    over = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < over, "it took too long"
        time.sleep(0.02)


def engine(cluster: Cluster) -> DaskEngine:
    return DaskEngine(cluster.address)


def outcome(state) -> dict[str, str | None]:
    """Of every run its state and its result."""
    told = {}
    for key, name in zip(state["key"], state["state"], strict=True):
        place = runs.results_folder() / key
        if name == "done":
            runs.Run(place).verify()
        told[key] = (name, (place / "result.txt").read_text() if name == "done" else None)
    return told


def job(project: Path, name: str = "job", **values) -> Job:
    results = project / "results"
    (results / ".grid" / "work" / name).mkdir(parents=True)
    card = {"key": "tiny-1", "kind": "tiny", "fingerprint": "x", "notebook": "notebooks/tiny.ipynb"}
    return Job(
        id=name,
        key="tiny-1",
        notebook=str(project / "notebooks" / "tiny.ipynb"),
        values={"seed": 7, "wait": 0.0} | values,
        card=card,
        results=str(results),
        work=str(results / ".grid" / "work" / name),
        project=str(project),
    )


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tls://node-7.cluster:1", "tcp://[::1]:8786"])
def test_addresses_are_taken_as_dask_writes_them(address):
    assert address_of(address) == address


def test_a_host_and_port_are_enough(tmp_path):
    assert address_of("localhost:8786") == "tcp://localhost:8786"
    path = tmp_path / "scheduler.json"
    path.write_text('{"address": "tcp://10.0.0.1:8786", "id": "x"}')
    assert address_of(str(path)) == "tcp://10.0.0.1:8786"


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "http://localhost:8787", "inproc://1/2", "tcp://a b:1", "tcp://a:999999", "a:1;ls"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ParameterError, match="expected tcp://HOST:PORT"):
        address_of(address)


def test_a_scheduler_file_that_is_none_is_refused(tmp_path):
    for content in (None, "{", "[]", '{"other": 1}'):
        path = tmp_path / "scheduler.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ParameterError, match="not a file that `dask scheduler` has written"):
            address_of(str(path))


def test_a_scheduler_that_is_not_there_is_told_within_seconds(project):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(CxrkitError, match=rf"no scheduler answers at {address}.*dask scheduler"):
        grid.run(make_grid(project), engine=DaskEngine(address))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2p1\r\n"])
def test_something_else_on_that_port_is_told_within_seconds(project, monkeypatch, greeting):
    monkeypatch.setattr(clusters, "_ANSWER", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def greet() -> None:
            link, _ = other.accept()
            with link, contextlib.suppress(OSError):
                link.sendall(greeting)
                link.recv(1)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(CxrkitError, match="no scheduler answers"):
            DaskEngine(f"tcp://127.0.0.1:{other.getsockname()[1]}").__enter__()


def test_two_of_four_workers_killed_and_the_outcome_is_the_same(project, cluster, monkeypatch):
    """Twenty runs, two of which fail; two workers die with their runs in the middle, a third comes later."""
    path = make_grid(project, parameters={"wait": 0.15}, product={"seed": list(range(20))})
    for _ in range(4):
        cluster.worker(FAKE)
    cluster.wait(4)
    events = []

    def hear(event) -> None:
        events.append(event)
        done = sum(one.kind == "done" for one in events)
        if event.kind == "done" and done in (4, 8):
            cluster.workers[done // 4].kill()

    state = grid.run(path, engine=engine(cluster), report=hear)
    disturbed = outcome(state)
    kinds = [event.kind for event in events]
    assert state["state"].value_counts().to_dict() == {"done": 18, "failed": 2}
    assert 1 <= kinds.count("repeat") <= 2
    assert all("died" in event.message for event in events if event.kind == "repeat")
    # A run whose worker died before it began has no start.
    assert 20 <= kinds.count("start") <= 20 + kinds.count("repeat")
    begun = [
        line.split()[0].rpartition(".")[0] for line in (project / "results" / "begun.txt").read_text().splitlines()
    ]
    assert len(begun) <= 20 + kinds.count("repeat"), "nothing is made more often than the runner asked for"
    assert set(begun) == set(state["key"])

    (project / "results").rename(project / "disturbed")
    monkeypatch.setattr(executing, "execute", executing.execute)  # put back afterwards
    exec(FAKE, {})
    monkeypatch.setattr(engines, "execute", executing.execute)
    undisturbed = outcome(grid.run(path, engine="serial"))
    assert disturbed == undisturbed
    assert not list((project / "disturbed").glob(".*.*")), "nothing half-written"


def test_with_a_real_kernel(project, cluster):
    """One worker with two threads: kernels start in threads that aren't main, in two runs at once."""
    path = make_grid(project, product={"seed": [0, 1, 2]}, parameters={"wait": 0.5})
    cluster.worker(threads=2)
    cluster.wait(1)
    state = grid.run(path, engine=engine(cluster))
    assert set(outcome(state).values()) == {("done", str(seed**2)) for seed in range(3)}


def test_cancelling_ends_the_kernels_of_ones_own_runs_only(project, cluster):
    cluster.worker(threads=2)
    cluster.wait(1)
    mine, other = engine(cluster), engine(cluster)
    with mine, other:
        mine.submit(job(project, "mine", wait=60.0))
        other.submit(job(project, "other"))
        work = project / "results" / ".grid" / "work"
        until((work / "mine" / "kernel.json").is_file)
        kernel = json.loads((work / "mine" / "kernel.json").read_text())
        mine.__exit__()
        assert executing.processes.is_alive(kernel) is False
        told: list = []
        until(lambda: told.extend(other.finished(0.2)) or told)
        assert [(name, result.state) for name, result in told] == [("other", "done")]


def test_ctrl_c_leaves_a_state_that_goes_on(project, cluster, monkeypatch):
    path = make_grid(project, product={"seed": [0, 1, 2]}, parameters={"wait": 0.5})
    cluster.worker(FAKE)
    cluster.wait(1)

    def hear(event) -> None:
        if event.kind == "start" and event.task.parameters.seed == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.run(path, engine=engine(cluster), report=hear)
    assert sorted(grid.status(path)["state"]) == ["done", "open", "open"]
    assert not list((project / "results" / ".grid" / "claims").iterdir())
    state = grid.run(path, engine=engine(cluster))
    assert set(state["state"]) == {"done"}
    monkeypatch.setattr(clusters, "project_folder", lambda: project / "elsewhere")
    with pytest.raises(CxrkitError, match=r"sees no project in .*shared folder"):
        engine(cluster).__enter__()


def test_workers_that_differ_are_refused_at_the_start_and_later(project, cluster):
    other = textwrap.dedent("""
        from importlib import metadata
        real = metadata.version
        metadata.version = lambda name: "0.0.1" if name == "numpy" else real(name)
    """)
    cluster.worker(other)
    cluster.wait(1)
    path = make_grid(project, product={"seed": [0, 1]})
    with pytest.raises(CxrkitError, match=r"numpy 0\.0\.1 where this machine has \d"):
        grid.run(path, engine=engine(cluster))
    cluster.clear()
    cluster.wait(0)

    cluster.worker(FAKE)
    cluster.wait(1)
    with engine(cluster) as at_work:
        cluster.worker("import sys; sys.modules['cxrkit'] = None")
        until(lambda: at_work.finished(0.1) == [] and at_work._refused)
        assert "can't load this version of cxrkit" in next(iter(at_work._refused.values()))
        assert at_work.capacity == 1, "it gets nothing to do"
        cluster.workers[0].kill()
        with pytest.raises(CxrkitError, match="no worker can be used"):
            until(lambda: at_work.finished(0.2))


def test_a_scheduler_that_dies_ends_the_runner_with_a_sentence(project, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "_GONE", 1.0)
    path = make_grid(project, product={"seed": [0, 1, 2]}, parameters={"wait": 0.3})
    cluster = Cluster(tmp_path)
    with contextlib.closing(cluster):
        cluster.worker(FAKE)
        cluster.wait(1)

        def hear(event) -> None:
            if event.kind == "done":
                cluster.scheduler.kill()

        with pytest.raises(CxrkitError, match=r"doesn't answer any more.*the same command goes on"):
            grid.run(path, engine=engine(cluster), report=hear)
    assert "done" in set(grid.status(path)["state"])
    assert not list((project / "results" / ".grid" / "claims").iterdir())


class Future:
    """A run as a stand-in for dask's client keeps it."""

    status = "pending"

    def __init__(self, job: Job, address: str):
        self.job, self.address, self.cancelled = job, address, False

    def end(self, status: str, value=None) -> None:
        self.status, self.value = status, value

    def result(self, timeout=None):
        if self.status == "error":
            raise self.value
        return self.value

    def cancel(self, **_) -> None:
        self.cancelled = True


class StandIn:
    """Workers by address: (id, threads, machine, cores, cards)."""

    status = "running"

    def __init__(self, **workers):
        self.workers, self.futures = workers, []

    def sync(self, call, *arguments, workers=(), **options):
        if call is self.scheduler.identity:
            assert options["n_workers"] == -1
            told = {
                address: {"id": one[0], "nthreads": one[1], "status": "running"}
                for address, one in self.workers.items()
            }
            return {"workers": told}
        if arguments[0] is not clusters._about:
            return {}
        about = {}
        for address in workers:
            _, _, place, cores, cards = self.workers[address]
            about[address] = {"place": place, "cores": cores, "cards": cards}
        return about

    scheduler = SimpleNamespace(identity=object())
    _run = object()

    def submit(self, function, job, key, pure, workers):
        assert (key, pure) == (job.id, False)
        self.futures.append(Future(job, *workers))
        return self.futures[-1]

    def cancel(self, futures, force) -> None:
        for future in futures:
            future.cancel()

    def close(self, timeout) -> None:
        self.status = "closed"


def test_cores_and_cards_of_a_machine_are_shared_out(project):
    client = StandIn(
        a=("1", 2, "node 1", 16, ["0", "1", "2"]),
        b=("2", 2, "node 1", 16, ["0", "1", "2"]),
        c=("3", 1, "node 2", 6, []),
    )
    with DaskEngine(client=client) as at_work:
        assert at_work.capacity == 5
        for number in range(5):
            at_work.submit(job(project, str(number)))
        given = sorted((one.address, one.job.threads, one.job.gpu or "") for one in client.futures)
        assert given == [("a", 4, "0"), ("a", 4, "1"), ("b", 4, "0"), ("b", 4, "2"), ("c", 6, "")]
        first = next(one for one in client.futures if one.address == "a")
        first.end("finished", Outcome("done"))
        assert at_work.finished(0.1) == [(first.job.id, Outcome("done"))]
        at_work.submit(job(project, "5"))
        assert client.futures[5].address == "a"
        assert client.futures[5].job.gpu == first.job.gpu, "the place that came free"


def test_lost_and_failed_futures_are_told_apart(project, monkeypatch):
    monkeypatch.setattr(clusters, "_LOOK", 0.0)
    client = StandIn(a=("1", 4, "node", 4, []))
    killed = type("KilledWorker", (Exception,), {})
    with DaskEngine(client=client) as at_work:
        for number in range(4):
            at_work.submit(job(project, str(number)))
        client.futures[0].end("error", killed("dead"))
        client.futures[1].end("cancelled")
        client.futures[2].end("error", TypeError("can't pickle"))
        told: dict = {}
        while len(told) < 3:
            told |= dict(at_work.finished(0.1))
        assert told["0"] is told["1"] is None
        assert (told["2"].state, told["2"].why) == ("failed", "start")
        assert "TypeError: can't pickle" in told["2"].message
        client.workers["a"] = ("another process on the same port", 4, "node", 4, [])
        assert at_work.finished(0.1) == [("3", None)]
        assert client.futures[3].cancelled, "dask doesn't repeat it there"
        assert at_work.finished(0.05) == []


def test_without_workers_a_run_waits_for_one(project, monkeypatch):
    monkeypatch.setattr(clusters, "_LOOK", 0.0)
    client = StandIn()
    with DaskEngine(client=client) as at_work:
        assert at_work.finished(0.05) == []
        assert at_work.capacity == 0
        client.workers["late"] = ("1", 1, "node", 2, [])
        assert at_work.finished(0.05) == []
        assert at_work.capacity == 1


def test_an_attempt_is_begun_once(project):
    one = job(project)
    Path(one.work, "output").mkdir()
    assert clusters._attempt(one) is None


def test_a_results_folder_that_is_not_shared_is_named(project):
    import dataclasses

    one = dataclasses.replace(job(project), work=str(project / "not here"))
    told = clusters._attempt(one)
    assert (told.state, told.why) == ("failed", "start")
    assert "shared folder" in told.message
    assert not Path(one.work).exists()


def test_a_result_that_went_with_its_worker_is_not_waited_for(monkeypatch):
    class Gone:
        status = "finished"

        def result(self, timeout=None):
            if timeout is None:
                pytest.fail("waits without end")
            raise TimeoutError

    engine = DaskEngine()
    engine._looked = time.monotonic()
    engine._placed = {"run": clusters._Placed(Gone(), clusters._Worker("a", 1, "node", 1, []), 0)}
    assert engine.finished(0) == [("run", None)]
