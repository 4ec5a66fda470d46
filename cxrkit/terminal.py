"""What all commands share: one console and its tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.table import Table

__all__ = ["console", "print_frame", "print_rows"]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


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
