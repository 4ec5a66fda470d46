"""The commands `cxrkit grid …`: run the combinations of a grid file, and see what has become of them."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxrkit.errors import ParameterError
from cxrkit.project import importable
from cxrkit.terminal import console, print_frame, print_rows

if TYPE_CHECKING:
    from cxrkit.grid.engines import Engine
    from cxrkit.grid.state import State

__all__ = ["Workers", "grid_app", "run_grid"]

grid_app = typer.Typer(no_args_is_help=True, help="Grids of notebook runs.")

GridName = Annotated[str, typer.Argument(help="a grid file, or the name of one in notebooks/grids")]
Workers = Annotated[int, typer.Option(help="notebooks at a time; 0: one per core, at most 2", min=0)]
Profile = Annotated[str | None, typer.Option(help="a named variant of the grid, as its file defines it")]
Scheduler = Annotated[str | None, typer.Option(help="address of a dask scheduler whose workers make the runs")]
Slurm = Annotated[Path | None, typer.Option(help="YAML file of the resources to ask SLURM for")]
Serial = Annotated[bool, typer.Option("--serial", help="one after the other, in this process")]
TimeLimit = Annotated[str | None, typer.Option(help="longest time of a run, such as '30 min'")]
MemoryLimit = Annotated[str | None, typer.Option(help="most memory of a run, such as '4 GB'")]
_LONG = 200


@grid_app.command("run")
def grid_run(
    file: GridName = "quick",
    workers: Workers = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would run, and how long")] = False,
    profile: Profile = None,
    scheduler: Scheduler = None,
    slurm: Slurm = None,
    serial: Serial = False,
    time_limit: TimeLimit = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Run what isn't done of a grid; killed at any moment, the same command goes on."""
    if dry_run:
        return _foretell(file, profile, 1 if serial else workers or _few())
    limits = _limits(time_limit=time_limit, memory_limit=memory_limit)
    run_grid(file, workers, profile=profile, scheduler=scheduler, slurm=slurm, serial=serial, **limits)


@grid_app.command("retry")
def grid_retry(
    file: GridName = "quick",
    workers: Workers = 0,
    profile: Profile = None,
    scheduler: Scheduler = None,
    slurm: Slurm = None,
    serial: Serial = False,
    time_limit: TimeLimit = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Run what isn't done of a grid, and what failed once more."""
    limits = _limits(time_limit=time_limit, memory_limit=memory_limit)
    run_grid(file, workers, True, profile=profile, scheduler=scheduler, slurm=slurm, serial=serial, **limits)


@grid_app.command("status")
def grid_status(file: GridName = "quick", profile: Profile = None) -> None:
    """Print the runs of a grid and what has become of them; of a large grid those that are not done."""
    from cxrkit import grid

    states = grid.states(grid.plan(file, profile))
    listed = states if len(states) <= _LONG else [state for state in states if state.name != "done"]
    print_rows(("state", "run", ""), [(state.name, state.task.key, state.detail) for state in listed[:_LONG]])
    if len(listed) > _LONG:
        console.print(f"and {len(listed) - _LONG} more that are not done")
    console.print(", ".join(f"{count} {name}" for name, count in _counts(states).items()), markup=False)


@grid_app.command("show")
def grid_show(
    key: Annotated[str, typer.Argument(help="a run's key, or how it begins")],
    results: Annotated[str, typer.Option(help="folder that holds the runs")] = "results",
    lines: Annotated[int, typer.Option(help="lines of the log to print", min=0)] = 40,
) -> None:
    """Print what is known of one run: state, place, parameters, log, traceback."""
    from cxrkit import grid

    told = grid.show(key, results)
    for name, value in told.items():
        if name not in ("log", "traceback"):
            console.print(f"{name:10} {value}", markup=False)
    for name, kept in (("log", lines), ("traceback", None)):
        if told.get(name) and kept != 0:
            console.rule(name)
            console.print("\n".join(told[name].splitlines()[-kept if kept else None :]), markup=False)


@grid_app.command("why")
def grid_why(
    key: Annotated[str, typer.Argument(help="a run's key, or how it begins")],
    file: Annotated[str | None, typer.Option(help="a grid that may hold the run with other parameters")] = None,
    results: Annotated[str, typer.Option(help="folder that holds the runs")] = "results",
) -> None:
    """Print which parameter, module, file or version made a run stale."""
    from cxrkit import grid

    reasons = grid.why(key, results, file)
    for reason in reasons or ["It isn't stale: made again today, it would be the same run."]:
        console.print(reason, markup=False)


@grid_app.command("clean")
def grid_clean(
    file: GridName = "quick",
    profile: Profile = None,
    everything: Annotated[bool, typer.Option("--all", help="the done runs of the grid too")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="don't ask")] = False,
) -> None:
    """Delete stale and failed runs of a grid, and what killed runners left; done runs stay."""
    from cxrkit import grid

    found = grid.leftovers(file, profile, everything)
    if not found:
        console.print("Nothing to delete.")
        return
    print_rows(("why", "what is deleted"), [(left.why, str(left.path)) for left in found])
    if yes or typer.confirm(f"Delete these {len(found)}?"):
        grid.remove(found)
        console.print(f"{len(found)} deleted.")


@grid_app.command("keep")
def grid_keep(
    paper: Annotated[str, typer.Argument(help="a paper, whose tables are kept, from the grid of its name")],
    profile: Profile = None,
    source: Annotated[str, typer.Option(help="whose images they are and on what terms, in a sentence")] = "",
) -> None:
    """Keep the tables of a finished grid in book/results, for a book that is built without it."""
    importable()
    from book.tools import stored_results

    place = stored_results.keep(paper, f"{paper}:{profile}" if profile else paper, source)
    console.print(f"Kept in {place.relative_to(place.parents[2])}; the page of the paper's study shows it.")


def run_grid(
    file: str | tuple[str, ...],
    workers: int = 0,
    again: bool = False,
    *,
    profile: str | None = None,
    scheduler: str | None = None,
    slurm: Path | None = None,
    serial: bool = False,
    **limits: float,
) -> None:
    """Run a grid with progress, the failed runs as well where `again`. Exits with status 1 when runs aren't done."""
    from cxrkit import grid
    from cxrkit.grid import progress

    if sum(map(bool, (scheduler, slurm, serial))) > 1:
        raise ParameterError("choose one of --scheduler, --slurm and --serial")
    workers = workers or _few()
    for name in ("SIGTERM", "SIGHUP"):  # what a queue or a closing terminal sends: ends as Ctrl-C does
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    title = f"grids {', '.join(file)}" if isinstance(file, tuple) else f"grid {file}"
    try:
        engine = _engine(scheduler, slurm, serial)
        with progress.reporter(console, title) as report:
            state = grid.run(file, workers, report, profile=profile, engine=engine, retry=again, **limits)
    except KeyboardInterrupt:
        console.print("Stopped. Nothing is left running; the same command goes on.")
        raise SystemExit(130) from None
    missing = state[state["state"] != "done"]
    if not len(missing):
        console.print(f"{len(state)} runs are done.")
        return
    print_frame(missing[["state", "key", "detail"]])
    told = f"{len(missing)} of {len(state)} runs are not done. `cxrkit grid show KEY` prints the log and the traceback"
    command = "the same command" if isinstance(file, tuple) else f"`cxrkit grid retry {file}`"
    console.print(f"{told} of one, {command} tries the failed ones again.", markup=False)
    raise SystemExit(1)


def _engine(scheduler: str | None, slurm: Path | None, serial: bool) -> Engine | str:
    if not scheduler and not slurm:
        return "serial" if serial else "local"
    from cxrkit.grid import cluster
    from cxrkit.grid import slurm as queue

    if slurm:
        return cluster.DaskEngine(jobs=queue.SlurmJobs(queue.read(slurm)))
    return cluster.DaskEngine(cluster.address_of(scheduler))


def _few() -> int:
    return min(2, os.cpu_count() or 1)


def _limits(**given: str | None) -> dict[str, float]:
    """Seconds and bytes of the limits that are given. Raises ParameterError."""
    from cxrkit.grid import planning

    limits = {}
    for name, text in given.items():
        try:
            read = {"time_limit": planning.duration, "memory_limit": planning.memory}[name]
            limits |= {} if text is None else {name: read(text)}
        except ValueError as error:
            raise ParameterError(f"--{name.replace('_', '-')} {text!r}: {error}") from None
    return limits


def _foretell(file: str, profile: str | None, workers: int) -> None:
    """What a run of the grid would do: counts by step and state, and the time that it would take."""
    from cxrkit import grid

    states = grid.states(grid.plan(file, profile))
    grid.check_names([state.task for state in states if state.name != "done"])
    shown = _counts(states)
    rows = []
    for step in dict.fromkeys(state.task.step for state in states):
        own = [state for state in states if state.task.step == step]
        rows.append((step, len(own), *(_counts(own).get(name, 0) for name in shown)))
    print_rows(("step", "runs", *shown), rows)
    named = [state for state in states if state.name in ("failed", "stale")]
    for state in named[:_LONG]:
        console.print(f"{state.name}: {state.task.key}: {state.detail}", markup=False)
    if len(named) > _LONG:
        console.print(f"and {len(named) - _LONG} more failed or stale")
    expected = grid.estimate([state.task for state in states if state.name in ("open", "stale")])
    known = [seconds for seconds in expected if seconds is not None]
    told = str(timedelta(seconds=round(sum(known)) // workers)) if known or not expected else "unknown"
    told += f", and {len(expected) - len(known)} runs of unknown length" if 0 < len(known) < len(expected) else ""
    console.print(f"{len(expected)} runs would start; estimated time, {workers} at a time: {told}", markup=False)


def _counts(states: list[State]) -> dict[str, int]:
    """Number of runs by state, for those states that there are."""
    from cxrkit import grid

    names = [state.name for state in states]
    return {name: names.count(name) for name in grid.STATES if name in names}
