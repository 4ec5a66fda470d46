"""A grid through SLURM: resources checked whole, job scripts that a shell reads, and a stand-in for SLURM itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from cxrkit import CxrkitError, ParameterError, grid
from cxrkit.grid import cluster, slurm
from cxrkit.grid.cluster import DaskEngine

dask_jobqueue = pytest.importorskip("dask_jobqueue")
dask = pytest.importorskip("dask")
psutil = pytest.importorskip("psutil")

NEEDED = {"time": "8 h", "memory": "32 GB", "cores": 8}
FULL = NEEDED | {
    "queue": "gpu,long",
    "account": "chest-x",
    "gpus": "a100:2",
    "jobs": 4,
    "runs": 2,
    "extra": ["--constraint=avx2", "--mail-type=FAIL"],
    "environment": ["module load cuda/12.4", "source 'my venv/bin/activate'  # it's there"],
    "python": "my venv/bin/python",
    "interface": "ib0",
    "scratch": "/scratch/$USER",
}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CXRKIT_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def write(tmp_path):
    def write(content) -> Path:
        path = tmp_path / "resources.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def job_script(resources: slurm.Resources) -> str:
    job = dask_jobqueue.slurm.SLURMJob("tcp://SCHEDULER:8786", name="grid", **slurm.options(resources))
    return job.job_script()


def start(file: Path) -> DaskEngine:
    return DaskEngine(jobs=slurm.SlurmJobs(slurm.read(file)))


def check_syntax(script: str) -> None:
    told = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_a_job_asks_for_what_the_file_says(write, results):
    script = job_script(slurm.read(write(FULL)))
    check_syntax(script)
    logs = f"{results}/.grid/slurm/cxrkit-grid-%J"
    assert directives(script) == [
        "-J cxrkit-grid",
        f"-e {logs}.err",
        f"-o {logs}.out",
        "-p gpu,long",
        "-A chest-x",
        "-n 1",
        "--cpus-per-task=8",
        "--mem=30518M",
        "-t 08:00:00",
        "--gres=gpu:a100:2",
        "--constraint=avx2",
        "--mail-type=FAIL",
    ]
    lines = script.splitlines()
    assert lines[0].startswith("#!")
    assert lines[-3:-1] == FULL["environment"]
    command = lines[-1]
    assert command.startswith("'my venv/bin/python' -m distributed.cli.dask_worker tcp://SCHEDULER:8786 ")
    for part in ("--nthreads 2", "--interface ib0", "--death-timeout 60", "--no-dashboard", "'/scratch/$USER'"):
        assert part in command
    assert all(line.startswith("#SBATCH") for line in lines[2 : lines.index(next(x for x in lines if x[:3] == "cd "))])


def test_the_least_that_must_be_said(write):
    script = job_script(slurm.read(write(NEEDED)))
    check_syntax(script)
    told = directives(script)
    assert not any(one.startswith(("-p", "-A", "--gres")) for one in told)
    assert "--nthreads 1 " in script
    assert sys.executable in script


@pytest.mark.parametrize("name", ["a b", "a'b", 'a"b$HOME', "a;b"])
def test_a_projects_folder_stays_one_word(write, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    script = job_script(slurm.read(write(NEEDED)))
    check_syntax(script)
    line = next(line for line in script.splitlines() if line.startswith("cd "))
    told = subprocess.run(["bash", "-c", f"{line}; pwd"], capture_output=True, text=True)
    assert told.stdout.rstrip("\n") == str(tmp_path / name)


def test_logs_that_slurm_would_misread_are_refused(write, monkeypatch, tmp_path):
    monkeypatch.setenv("CXRKIT_RESULTS", str(tmp_path / "my results"))
    with pytest.raises(ParameterError, match="SLURM can't write its logs"):
        job_script(slurm.read(write(NEEDED)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8 h", "08:00:00"), ("90 min", "01:30:00"), ("2 d", "48:00:00"), ("08:00:00", "08:00:00"), ("1-12", "1-12")],
)
def test_times(write, text, expected):
    assert slurm.read(write(NEEDED | {"time": text})).time == expected
    assert slurm.read(write(f"time: {text}\nmemory: 32 GB\ncores: 8\n")).time == expected  # in no quotes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("time: 90", "a unit is missing"),
        ("time: '90'", "a unit is missing"),
        ("time: soon", "a time is"),
        ("memory: 32", "a memory limit is text"),
        ("memory: 32 apples", "a memory limit is text"),
        ("cores: 0", "greater than or equal to 1"),
        ("cores: '8'", "valid integer"),
        ("jobs: 0", "greater than or equal to 1"),
        ("gpus: -1", "greater than or equal to 0"),
        ("extra: --exclusive", "valid list"),
        ('extra: ["--x\\n#SBATCH --y"]', "pattern"),
        ('environment: ["a\\nb"]', "pattern"),
        ("python: ''", "pattern"),
        ("walltime: 8 h", "unknown part 'walltime'; did you mean 'time'?"),
        ("queue: None", "None is text in YAML; write null"),
    ],
)
def test_what_is_wrong_is_named(write, change, message):
    lines = {name: f"{name}: {value}" for name, value in NEEDED.items()} | {change.split(":")[0]: change}
    with pytest.raises(ParameterError) as error:
        slurm.read(write("\n".join(lines.values())))
    assert message in str(error.value)
    assert f"'{change.split(':')[0]}" in str(error.value)
    assert "resources.yaml" in str(error.value)


def test_all_problems_come_at_once(write):
    with pytest.raises(ParameterError) as error:
        slurm.read(write({"memory": "much", "cores": 0, "nodes": 2, "extra": ["x\n"]}))
    for part in ("'time': Field required", "'memory'", "'cores'", "unknown part 'nodes'", "'extra'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not YAML"), ("- a", "expected names"), ("", "expected names"), ("cores: 1\ncores: 2", "there twice")],
)
def test_a_file_that_says_nothing_is_refused(write, content, message):
    with pytest.raises(ParameterError, match=message):
        slurm.read(write(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"nowhere\.yaml: can't be read"):
        slurm.read(tmp_path / "nowhere.yaml")


def test_a_users_own_dask_settings_change_nothing(write):
    wanted = job_script(slurm.read(write(NEEDED)))
    settings = {"jobqueue.slurm.job-extra-directives": ["--evil"], "jobqueue.slurm.job-script-prologue": ["evil"]}
    settings |= {"jobqueue.slurm.worker-extra-args": ["--evil"], "jobqueue.slurm.walltime": "1"}
    with dask.config.set(settings):
        assert job_script(slurm.read(write(NEEDED))) == wanted


def test_without_slurm_one_is_told_what_to_do(write, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ParameterError, match=r"there is no sbatch and no squeue.*--workers, or --scheduler"):
        start(write(NEEDED)).__enter__()


# What the tests below take for SLURM: jobs are processes of this machine.
SBATCH = """
#!/usr/bin/env bash
if [ "$1" = --test-only ]; then
  script=$(cat)
  case $script in *"-p nowhere"*) echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1;; esac
  exit 0
fi
cp "$1" "$STANDIN/job.sh"
setsid bash "$STANDIN/job.sh" >> "$STANDIN/out.txt" 2>&1 < /dev/null &
echo $! >> "$STANDIN/jobs.txt"
echo "Submitted batch job $!"
"""
SQUEUE = """
#!/usr/bin/env bash
while read -r job; do ps -o stat= -p "$job" | grep -q '^[^Z]' && echo "$job"; done < "$STANDIN/jobs.txt"
exit 0
"""
SCANCEL = """
#!/usr/bin/env bash
kill -9 -- "-$1" 2>/dev/null
exit 0
"""


@pytest.fixture
def standin(tmp_path, monkeypatch):
    folder = tmp_path / "standin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        path = folder / name
        path.write_text(text.lstrip())
        path.chmod(0o755)
    monkeypatch.setenv("STANDIN", str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    yield folder
    running = [process for process in psutil.process_iter() if in_groups(process, jobs(folder))]
    _, left = psutil.wait_procs(running, timeout=15)  # a job that was told to end may need a moment on a busy machine
    for process in left:
        process.kill()
    assert not left, "a job was left running"


def in_groups(process: psutil.Process, groups: list[int]) -> bool:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        return os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE
    return False


def jobs(folder: Path) -> list[int]:
    path = folder / "jobs.txt"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


@pytest.fixture
def tiny_grid(tmp_path, monkeypatch) -> Path:
    (tmp_path / "notebooks" / "grids").mkdir(parents=True)
    cells = [
        nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import time; time.sleep(1); print(seed)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "tiny.ipynb")
    path = tmp_path / "notebooks" / "grids" / "mine.yaml"
    path.write_text(yaml.safe_dump({"tiny": {"notebook": "../tiny.ipynb", "product": {"seed": [0, 1, 2]}}}))
    monkeypatch.chdir(tmp_path)
    return path


SMALL = {"time": "10 min", "memory": "1 GB", "cores": 1, "interface": "lo"}


def test_a_grid_through_slurm_with_a_job_lost_on_the_way(write, standin, tiny_grid, tmp_path):
    """A job is killed with its run: another is asked for, and the run comes again; at the end no job is left."""
    events = []

    def hear(event) -> None:
        events.append(event.kind)
        if events.count("start") == 2 and event.kind == "start":
            os.killpg(jobs(standin)[0], signal.SIGKILL)

    engine = start(write(SMALL))
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        state = grid.run(tiny_grid, engine=engine, report=hear)
    assert set(state["state"]) == {"done"}
    assert events.count("repeat") == 1
    assert len(jobs(standin)) == 2


def test_what_slurm_refuses_is_told_before_anything_starts(write, standin, tiny_grid, tmp_path):
    engine = start(write(SMALL | {"queue": "nowhere"}))
    with pytest.raises(ParameterError, match=r"SLURM refuses such a job: .*invalid partition specified"):
        grid.run(tiny_grid, engine=engine)
    assert jobs(standin) == []


def test_jobs_that_die_at_once_end_the_wait(write, standin, tiny_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_GRACE", 0.5)
    engine = start(write(SMALL | {"environment": ["exit 3"]}))
    started = time.monotonic()
    with pytest.raises(CxrkitError, match="no SLURM job of this grid is waiting or running"):
        grid.run(tiny_grid, engine=engine)
    assert time.monotonic() - started < 30


def test_the_example_in_the_documentation_is_right(write):
    text = textwrap.dedent(slurm.__doc__.split("asks for.\n")[1].split("\nA job that")[0])
    resources = slurm.read(write(text))
    assert (resources.time, resources.cores, resources.jobs) == ("08:00:00", 8, 4)
    check_syntax(job_script(resources))
