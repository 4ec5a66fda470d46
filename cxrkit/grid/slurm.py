"""A cluster of SLURM jobs for the dask engine, from a small YAML file of resources, through dask-jobqueue.

    queue: gpu              # partition
    account: chest
    time: 8 h               # of one job; also as SLURM writes it, '08:00:00'
    memory: 32 GB           # of one job
    cores: 8                # of one job
    gpus: 1                 # of one job; or TYPE:COUNT
    jobs: 4                 # jobs at a time
    runs: 1                 # runs at a time in one job, which share its cores, memory and cards
    extra: ["--constraint=avx2"]
    environment: ["module load cuda", "source venv/bin/activate"]
    python: python          # of a job; by default the one that runs the grid
    interface: ib0          # network that nodes and this machine share

A job that ends early, at its time or with its node, is asked for anew; its runs come again elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, ValidationError, model_validator

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.grid import spec
from cxrkit.grid.engines_dask import DaskEngine
from cxrkit.grid.execute import Settings
from cxrkit.study import run_key
from cxrkit.train.parameters import refuse_none_as_text
from cxrkit.yaml_files import read_yaml

__all__ = ["Resources", "SlurmEngine", "job_script", "read", "start"]

_OURS = {
    "queue": ("-p", "--partition"),
    "account": ("-A", "--account"),
    "time": ("-t", "--time"),
    "memory": ("--mem", "--mem-per-cpu"),
    "cores": ("-c", "--cpus-per-task"),
    "gpus": ("-G", "--gpus", "--gres"),
    "the grid": ("-n", "--ntasks", "-N", "--nodes", "-J", "--job-name", "-o", "--output", "-e", "--error", "--array"),
}
_TIME = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+))"
)
_GRACE = 60.0  # seconds in which a submitted job must be seen in SLURM's queue


def _time(value: Any) -> str:
    """A time as SLURM takes it, from that or from text such as `8 h`."""
    if not isinstance(value, str):
        raise ValueError("write it as '8 h' or '08:00:00'")
    if match := _TIME.fullmatch(value.strip()):
        d, dh, dm, ds, h, m, s = (int(part or 0) for part in match.group("d", "dh", "dm", "ds", "h", "m", "s"))
        seconds = ((d * 24 + dh + h) * 60 + dm + m) * 60 + ds + s
    elif value.strip().replace(".", "").isdigit():
        raise ValueError("a unit is missing; write '8 h', '30 min' or '08:00:00'")
    else:
        seconds = math.ceil(spec.duration(value))
    if seconds < 60:
        raise ValueError("a job needs at least a minute")
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


def _memory(value: Any) -> int:
    """Memory in MiB, from text such as `32 GB`, or `32G` as SLURM takes it."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*([KMGT])\s*", value)):
        value = f"{match[1]}{match[2]}iB"
    if (found := math.ceil(spec.memory(value) / 2**20)) < 256:
        raise ValueError("a job needs at least 256 MiB")
    return found


def _line(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("one line of text is expected")
    return value.strip()


def _shell(value: Any) -> str:
    value = _line(value)
    try:
        shlex.split(value, comments=True)
    except ValueError as error:
        raise ValueError(f"no whole shell command: {error}") from None
    return value


def _directive(value: Any) -> str:
    value = _line(value)
    if not re.match(r"--?[A-Za-z]", value):
        raise ValueError("an option of sbatch starts with - or --")
    name = re.match(r"--[A-Za-z-]+|-[A-Za-z]", value)[0]
    for field, names in _OURS.items():
        if name in names:
            raise ValueError(f"{name} is set by {field}")
    return value


_Word = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.,:@+-]+$")]
_Place = Annotated[str, BeforeValidator(_line)]


class Resources(BaseModel):
    """What one job asks SLURM for, and how many jobs there are. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: Annotated[str, BeforeValidator(_time)]
    memory: Annotated[int, BeforeValidator(_memory)] = Field(description="MiB")
    cores: int = Field(ge=1, le=4096, strict=True)
    jobs: int = Field(1, ge=1, le=10_000, strict=True)
    runs: int = Field(1, ge=1, le=1024, strict=True)
    queue: _Word | None = None
    account: _Word | None = None
    gpus: Annotated[int, Field(ge=0, le=64, strict=True)] | Annotated[str, Field(pattern=r"^[\w.-]+:[1-9]\d?$")] = 0
    extra: list[Annotated[str, BeforeValidator(_directive)]] = []
    environment: list[Annotated[str, BeforeValidator(_shell)]] = []
    python: _Place | None = None
    interface: _Word | None = None
    scratch: _Place | None = Field(None, description="folder on the node for dask's own files")

    @model_validator(mode="after")
    def _fits(self) -> Resources:
        if self.runs > self.cores:
            raise ValueError(f"{self.runs} runs at a time need as many cores; there are {self.cores}")
        return self


def read(file: str | Path) -> Resources:
    """The resources of a file. Raises ParameterError with every problem at once."""
    path = Path(file)
    if not path.exists():
        raise ParameterError(f"{file}: there is no such file of SLURM resources")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ParameterError(f"{path.name}: expected names such as time, memory and cores, each with a value")
    refuse_none_as_text(path.name, content)
    try:
        return Resources(**{str(name): value for name, value in content.items()})
    except ValidationError as error:
        told = [_told(problem) for problem in error.errors()]
        raise ParameterError(f"{path.name}: " + "\n  ".join(dict.fromkeys(told))) from None


def _told(problem: dict[str, Any]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "runs"
    if problem["type"] == "extra_forbidden":
        return f"unknown {name!r}; known: {', '.join(Resources.model_fields)}"
    if problem["type"] == "missing":
        return f"{name!r} is missing"
    return f"{name!r}: {problem['msg'].removeprefix('Value error, ')} (got {problem.get('input')!r})"


def _options(resources: Resources, folder: Path) -> dict[str, Any]:
    """The resources as dask-jobqueue takes them; everything is said, so that no file of the user's changes it."""
    gpus = [f"--gres=gpu:{resources.gpus}"] if resources.gpus else []
    return {
        "queue": resources.queue,
        "account": resources.account,
        "walltime": resources.time,
        # One dask worker with a thread per run at a time; the job's cores are those of its runs.
        "cores": resources.runs,
        "processes": 1,
        "job_cpu": resources.cores,
        "memory": f"{resources.memory}MiB",
        "job_mem": f"{resources.memory}M",
        "job_extra_directives": [*gpus, *resources.extra],
        "job_script_prologue": [f"cd {shlex.quote(str(run_key.project_folder()))} || exit 1", *resources.environment],
        "job_directives_skip": (),
        "job_name": "cxrkit-grid",
        "python": shlex.quote(resources.python or sys.executable),
        "interface": resources.interface,
        "local_directory": shlex.quote(resources.scratch or str(folder)),
        "log_directory": str(folder),
        "death_timeout": 60,  # a job whose runner is gone ends by itself
        "worker_command": "distributed.cli.dask_worker",
        "worker_extra_args": ["--no-dashboard"],
        "shebang": "#!/usr/bin/env bash",
    }


def _folder() -> Path:
    folder = run_key.results_folder() / ".grid" / "slurm"
    if any(not c.isprintable() or c in " %\\" for c in str(folder)):
        raise ParameterError(f"SLURM can't write its logs to {str(folder)!r}: spaces, % and \\ mean something to it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def job_script(resources: Resources, scheduler: str = "tcp://SCHEDULER:8786") -> str:
    """The script of one job, as sbatch takes it; no SLURM is needed to write it."""
    jobqueue = _jobqueue()
    return jobqueue.slurm.SLURMJob(scheduler, name="grid", **_options(resources, _folder())).job_script()


def start(file: str | Path, settings: Settings) -> SlurmEngine:
    """The engine for the resources of a file; jobs are asked for when it is entered. Raises ParameterError."""
    return SlurmEngine(read(file), settings)


def _jobqueue():
    try:
        import dask_jobqueue
    except ImportError:
        raise CxrkitError("--slurm needs the package dask-jobqueue; pip install 'cxrkit[cluster]'") from None
    return dask_jobqueue


class SlurmEngine(DaskEngine):
    """A dask engine whose workers are SLURM jobs: asked for at the start, replaced when they end, given back at the
    end. Runs wait while jobs do. Raises CxrkitError when no job ever came to life."""

    def __init__(self, resources: Resources, settings: Settings):
        _jobqueue()
        if missing := [tool for tool in ("sbatch", "squeue", "scancel") if shutil.which(tool) is None]:
            raise ParameterError(
                f"there is no {' and no '.join(missing)} here; --slurm works where SLURM's jobs are submitted. "
                "Without SLURM use --workers, or --scheduler"
            )
        self.resources = resources
        super().__init__(client=False, settings=settings)
        self.client = self._cluster = None

    def __enter__(self) -> SlurmEngine:
        from distributed import Client

        self._refuse_what_slurm_refuses()
        options = _options(self.resources, _folder())
        try:
            self._cluster = _jobqueue().SLURMCluster(
                scheduler_options={"dashboard": False, "dashboard_address": ":0"}, **options
            )
            self._cluster.adapt(minimum_jobs=self.resources.jobs, maximum_jobs=self.resources.jobs, interval="2s")
            self.client = Client(self._cluster, set_as_default=False, name="cxrkit-grid")
            self._asked = time.monotonic()
            return super().__enter__()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for part in (self.client, self._cluster):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close(timeout=10)
        self.client = self._cluster = None

    def _look(self) -> None:
        super()._look()
        if self._workers:
            self._asked = time.monotonic()
        elif time.monotonic() - self._asked > _GRACE:
            self._asked = time.monotonic()
            if not self._queued():
                raise CxrkitError(
                    f"no SLURM job of this grid is waiting or running any more; what they said is in {_folder()}"
                )

    def _queued(self) -> bool:
        """Whether one of this engine's jobs is in SLURM's queue."""
        names = [worker.job_id for worker in self._cluster.workers.values() if getattr(worker, "job_id", None)]
        told = subprocess.run(["squeue", "-h", "-o", "%i", "-t", "all"], capture_output=True, text=True, timeout=60)
        return told.returncode != 0 or bool(set(names) & set(told.stdout.split()))

    def _refuse_what_slurm_refuses(self) -> None:
        """Have SLURM check a job that it doesn't start: partition, account, limits. Raises ParameterError."""
        script = job_script(self.resources)
        told = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60)
        if told.returncode:
            reason = " ".join(told.stderr.split()) or f"status {told.returncode}"
            raise ParameterError(f"SLURM refuses such a job: {reason}")
