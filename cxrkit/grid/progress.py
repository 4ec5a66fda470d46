"""Progress of a grid: a bar in a terminal or in JupyterLab, plain lines in a log."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cxrkit.grid.loop import Event, Report

__all__ = ["plain", "reporter"]

_ENDS = ("done", "failed", "blocked")


@contextlib.contextmanager
def reporter(console: Console | None = None, title: str = "grid") -> Iterator[Report]:
    """The `report` to hand to `run`; `console`: where to.

    A bar with the time left stays at the bottom of a terminal or under a cell, and what ended is printed above it;
    elsewhere each event is one line that begins with the time of day.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console, title, began = console or Console(), plain(title), time.monotonic()
    live = "JPY_SESSION_NAME" in os.environ if console.is_jupyter else console.is_terminal
    live = live and not console.is_dumb_terminal
    running: dict[str, None] = {}
    ended, total = Counter(), 0

    def counts() -> str:
        parts = [f"{ended.total()} of {total}", *(f"{ended[kind]} {kind}" for kind in _ENDS[1:] if ended[kind])]
        return ", ".join(parts)

    def show(line: str) -> None:
        if live:
            display.console.print(f"  {line}", markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(time.strftime("%H:%M:%S"), line, file=console.file, flush=True)

    def report(event: Event) -> None:
        nonlocal total
        if event.kind == "begin":
            total = len(event.tasks)
        elif event.kind == "start":
            running[event.task.key] = None
        elif event.task:
            running.pop(event.task.key, None)
            ended.update({event.kind} & set(_ENDS))
        if event.task and not (live and event.kind == "start"):
            show(f"{_line(event)}  ({counts()})")
        elif event.kind == "begin" and not live:
            show(f"{title}: {total} runs to do")
        first = next(iter(running), title)
        about = f"{plain(first)} and {len(running) - 1} more" if len(running) > 1 else plain(first)
        display.update(bar, description=f"{about}: {counts()}", completed=ended.total(), total=total, refresh=True)

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20))
    display = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not live)
    bar, how = display.add_task(title, total=None), "stopped"
    try:
        with display:
            yield report
        how = "ended"
    finally:
        if total and not live:
            show(f"{title}: {counts()}; {how} after {timedelta(seconds=round(time.monotonic() - began))}")


def plain(text: object) -> str:
    """Text on one line without control characters, whatever a name or an error message holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _line(event: Event) -> str:
    took = f"{event.seconds:6.0f} s" if event.seconds else " " * 8
    return plain(f"{event.kind:9} {took}  {event.task.key}  {event.message}").rstrip()
