"""Jobs of SLURM as the workers of a dask cluster, by dask-jobqueue, from a small YAML file of what one asks for.

    time: 8 h               # or as SLURM writes it, '08:00:00'
    memory: 32 GB
    cores: 8
    gpus: 1                 # or TYPE:COUNT
    jobs: 4                 # jobs at a time
    runs: 1                 # runs at a time in one job, which share its cores, memory and cards
    queue: gpu              # partition
    account: chest
    extra: ["--constraint=avx2"]
    environment: ["module load cuda", "source venv/bin/activate"]
    python: python          # of a job; by default the one that runs the grid
    interface: ib0          # network that nodes and this machine share
    scratch: /scratch       # folder on the node for dask's own files

A job that ends early, at its time or with its node, is asked for anew; its runs come again elsewhere.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.grid.planning import duration, explained
from cxrkit.grid.planning import memory as memory_size
from cxrkit.project import project_folder, results_folder
from cxrkit.train.parameters import refuse_none_as_text
from cxrkit.yaml_files import read_yaml

__all__ = ["Resources", "SlurmJobs", "options", "read"]


def _time(value: Any) -> str:
    if not isinstance(value, str) or value.strip().replace(".", "").isdigit():
        raise ValueError("a unit is missing; write '8 h', '30 min' or '08:00:00'")
    if re.fullmatch(r"(\d+-)?\d+(:\d+){1,2}|\d+-\d+", value):
        return value
    minutes, seconds = divmod(math.ceil(duration(value)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
_Count = Annotated[int, Field(ge=1, strict=True)]


class Resources(BaseModel):
    """What one SLURM job asks for, and how many jobs there are. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: Annotated[str, BeforeValidator(_time)]
    memory: Annotated[int, BeforeValidator(memory_size)] = Field(description="bytes")
    cores: _Count
    jobs: _Count = 1
    runs: _Count = 1
    gpus: Annotated[int, Field(ge=0)] | _Line = 0
    queue: _Line | None = None
    account: _Line | None = None
    extra: list[_Line] = []
    environment: list[_Line] = []
    python: _Line | None = None
    interface: _Line | None = None
    scratch: _Line | None = None


def read(file: str | Path) -> Resources:
    """The resources of a file. Raises ParameterError with every problem at once."""
    path = Path(file)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ParameterError(f"{path.name}: expected names such as time, memory and cores, each with a value")
    refuse_none_as_text(path.name, content)
    try:
        return Resources(**{str(name): value for name, value in content.items()})
    except ValidationError as error:
        raise ParameterError(f"{path.name}: " + "\n  ".join(explained(error, Resources))) from None


def _logs() -> Path:
    folder = results_folder() / ".grid" / "slurm"
    if any(not c.isprintable() or c in " %\\" for c in str(folder)):
        raise ParameterError(f"SLURM can't write its logs to {str(folder)!r}: spaces, % and \\ mean something to it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def options(resources: Resources) -> dict[str, Any]:
    """The resources as dask-jobqueue takes them; everything is named, so that no file of the user's changes it."""
    logs = str(_logs())
    return {
        "queue": resources.queue,
        "account": resources.account,
        "walltime": resources.time,
        # One dask worker with a thread per run at a time; the job's cores are those of its runs.
        "cores": resources.runs,
        "processes": 1,
        "job_cpu": resources.cores,
        "memory": f"{resources.memory}B",
        "job_mem": f"{math.ceil(resources.memory / 2**20)}M",
        "job_extra_directives": [*([f"--gres=gpu:{resources.gpus}"] if resources.gpus else []), *resources.extra],
        "job_script_prologue": [f"cd {shlex.quote(str(project_folder()))} || exit 1", *resources.environment],
        "job_directives_skip": (),
        "job_name": "cxrkit-grid",
        "python": shlex.quote(resources.python or sys.executable),
        "interface": resources.interface,
        "local_directory": shlex.quote(resources.scratch or logs),
        "log_directory": logs,
        "death_timeout": 60,  # a job whose runner is gone ends by itself
        "worker_command": "distributed.cli.dask_worker",
        "worker_extra_args": ["--no-dashboard"],
        "shebang": "#!/usr/bin/env bash",
    }


class SlurmJobs:
    """The jobs of a `cluster.DaskEngine`: asked for at the start, and anew when one ends early."""

    def __init__(self, resources: Resources):
        self.resources = resources

    def start(self) -> Any:
        """The dask cluster of these jobs. Raises ParameterError where SLURM is missing or refuses such a job."""
        try:
            from dask_jobqueue import SLURMCluster
        except ImportError:
            raise CxrkitError("--slurm needs the package dask-jobqueue; pip install 'cxrkit[cluster]'") from None
        if missing := [tool for tool in ("sbatch", "squeue", "scancel") if shutil.which(tool) is None]:
            raise ParameterError(
                f"there is no {' and no '.join(missing)} here; --slurm works where SLURM's jobs are submitted. "
                "Without SLURM use --workers, or --scheduler"
            )
        scheduler = {"scheduler_options": {"dashboard": False, "dashboard_address": ":0"}}
        cluster = SLURMCluster(**scheduler, **options(self.resources))
        try:
            command = ["sbatch", "--test-only"]  # partition, account and limits, before anything is started
            told = subprocess.run(command, input=cluster.job_script(), capture_output=True, text=True, timeout=60)
            if told.returncode:
                reason = " ".join(told.stderr.split()) or f"status {told.returncode}"
                raise ParameterError(f"SLURM refuses such a job: {reason}")
            cluster.adapt(minimum_jobs=self.resources.jobs, maximum_jobs=self.resources.jobs, interval="2s")
        except BaseException:
            cluster.close()
            raise
        return cluster

    def check(self, cluster: Any) -> None:
        """Raise CxrkitError where none of the cluster's jobs is in SLURM's queue."""
        own = {worker.job_id for worker in cluster.workers.values() if getattr(worker, "job_id", None)}
        told = subprocess.run(["squeue", "-h", "-o", "%i", "-t", "all"], capture_output=True, text=True, timeout=60)
        if told.returncode == 0 and not own & set(told.stdout.split()):
            raise CxrkitError(f"no SLURM job of this grid is waiting or running any more; their logs are in {_logs()}")
