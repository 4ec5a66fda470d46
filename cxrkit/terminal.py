"""What all commands share: one console, tables, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["console", "print_frame", "print_rows", "progress"]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def progress() -> Progress:
    """A bar with counts and time, on the console."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def print_rows(names: Iterable[str], rows: Iterable[Iterable[object]], right: Collection[str] = ()) -> None:
    """Print a plain table, the columns named in `right` flush right."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(str(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, markup=False)


def print_frame(frame) -> None:
    """Print a DataFrame as a plain table, numbers to the right."""
    numbers = [name for name in frame.columns if frame[name].dtype.kind in "fi"]
    print_rows(frame.columns, frame.itertuples(index=False), numbers)
