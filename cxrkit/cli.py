"""The command line: `cxrkit data …`, `cxrkit grid …`, `cxrkit book`."""

from __future__ import annotations

import typer

from cxrkit.cli_data import data_app
from cxrkit.cli_grid import Workers, grid_app, run_grid
from cxrkit.errors import CxrkitError
from cxrkit.terminal import console, print_frame

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Explain chest X-ray classifiers. Not a medical device."
)
app.add_typer(data_app, name="data")
app.add_typer(grid_app, name="grid")


def main() -> None:
    """Entry point: errors that cxrkit raises on purpose end as one line, not as a traceback."""
    try:
        app()
    except CxrkitError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False)
        raise SystemExit(2) from None


@app.command("book")
def build_book(workers: Workers = 0) -> None:
    """Run the grids that the pages show where they aren't done, then build the book where anything changed."""
    from cxrkit import book
    from cxrkit.study import report

    for name in book.GRIDS:
        run_grid(name, workers, again=True)
        print_frame(report.summary(name, digits=3).dropna(axis=1, how="all"))
    index = book.build()
    console.print(f"The book: {index}", markup=False)
