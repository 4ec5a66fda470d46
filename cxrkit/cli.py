"""The command line: `cxrkit data …`, `cxrkit grid …`, `cxrkit book`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cxrkit.errors import CxrkitError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Explain chest X-ray classifiers. Not a medical device."
)
data_app = typer.Typer(no_args_is_help=True, help="The sources of images.")
grid_app = typer.Typer(no_args_is_help=True, help="Grids of notebook runs.")
app.add_typer(data_app, name="data")
app.add_typer(grid_app, name="grid")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)

Workers = Annotated[int, typer.Option(help="notebooks at a time; 0: one per core, at most 2", min=0)]
GridName = Annotated[str, typer.Argument(help="a grid file, or the name of one in notebooks/grids")]


def main() -> None:
    """Entry point: errors that cxrkit raises on purpose end as one line, not as a traceback."""
    try:
        app()
    except CxrkitError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False)
        raise SystemExit(2) from None


@data_app.command("list")
def data_list() -> None:
    """Name every source and what it is."""
    import pandas as pd

    from cxrkit import data

    rows = [
        {"name": name, "title": card["title"], "licence": card.get("licence", "")}
        for name, card in data.sources().items()
    ]
    _print_frame(pd.DataFrame(rows))


@data_app.command("describe")
def data_describe(
    name: str,
    root: Annotated[str | None, typer.Option(help="folder of a downloaded source")] = None,
) -> None:
    """Load a source and print its labels, counts and splits."""
    from cxrkit import data

    dataset = data.load(name, root=root)
    labels = list(dataset.labels)
    console.print(f"{name}: {len(dataset)} images of {dataset.table['patient_id'].nunique()} patients", markup=False)
    frame = dataset.table[labels].sum().astype(int).rename("positive images").rename_axis("label").reset_index()
    frame["boxes"] = frame["label"].map(dataset.boxes["label"].value_counts()).fillna(0).astype(int)
    _print_frame(frame)


@grid_app.command("run")
def grid_run(
    file: GridName = "quick",
    workers: Workers = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would run")] = False,
) -> None:
    """Run what isn't done of a grid; killed at any moment, the same command goes on."""
    if dry_run:
        return grid_status(file)
    run_grid(file, workers)


@grid_app.command("status")
def grid_status(file: GridName = "quick") -> None:
    """Print every run of a grid and whether it is done."""
    from cxrkit.study import grid

    _print_frame(grid.status(file))


@app.command("book")
def build_book(workers: Workers = 0) -> None:
    """Run the grids that the pages show where they aren't done, then build the book where anything changed."""
    from cxrkit import book

    for name in book.GRIDS:
        run_grid(name, workers)
    index = book.build()
    console.print(f"The book: {index}", markup=False)


def run_grid(file: str, workers: int = 0) -> None:
    """Run a grid with progress; ends with the table of results. Exits with status 1 when runs failed."""
    from cxrkit.study import grid, report

    workers = workers or min(2, os.cpu_count() or 1)
    open_runs = sum(not task.done for task in grid.plan(file))
    if open_runs:
        with _progress() as progress:
            bar = progress.add_task(f"grid {file}", total=open_runs)

            def hear(event: str, task: grid.Task, seconds: float) -> None:
                if event == "start":
                    progress.update(bar, description=task.key)
                else:
                    progress.console.print(f"  {event:6} {seconds:6.0f} s  {task.key}", markup=False)
                    progress.advance(bar)

            state = grid.run(file, workers=workers, report=hear)
    else:
        state = grid.status(file)
    failed = state[state["state"] != "done"]
    _print_frame(report.summary(file, digits=3).dropna(axis=1, how="all"))
    if len(failed):
        console.print(
            f"{len(failed)} runs are not done; their notebooks with the traceback: results/notebooks/*.failed.ipynb"
        )
        raise SystemExit(1)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _print_frame(frame) -> None:
    table = Table(box=None, pad_edge=False)
    for name in frame.columns:
        table.add_column(str(name), justify="right" if frame[name].dtype.kind in "fi" else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(str(value) for value in row))
    console.print(table, markup=False)
