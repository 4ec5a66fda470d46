"""The command line: `cxrkit data …`, `cxrkit grid …`, `cxrkit book`."""

from __future__ import annotations

from typing import Annotated

import typer

from cxrkit.cli_data import data_app
from cxrkit.cli_grid import Workers, grid_app, run_grid
from cxrkit.errors import CxrkitError
from cxrkit.project import importable
from cxrkit.terminal import console

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Explain chest X-ray classifiers. Not a medical device."
)
app.add_typer(data_app, name="data")
app.add_typer(grid_app, name="grid")

_LONG = 12  # pages that a line names


def main() -> None:
    """Entry point: errors that cxrkit raises on purpose end as one line, not as a traceback."""
    try:
        app()
    except CxrkitError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False)
        raise SystemExit(2) from None


@app.command("book")
def build_book(
    workers: Workers = 0,
    single: Annotated[
        bool, typer.Option("--single", help="Also make one page of it all, to print or save as PDF.")
    ] = False,
) -> None:
    """Run the grids that the pages show where they aren't done, then build the book where anything changed."""
    importable()
    from book.tools import build as book

    run_grid(book.grids(), workers, again=True)
    index = book.build()
    for kind, pages in book.changed(index).items():
        if pages:
            told = ", ".join(page.removesuffix(".html") for page in pages[:_LONG])
            more = f" and {len(pages) - _LONG} more" if len(pages) > _LONG else ""
            console.print(f"{kind}: {told}{more}", markup=False)
    console.print(f"The book: {index}", markup=False)
    if single:
        console.print(f"As one page: {book.build_single()}", markup=False)
