"""How far a grid is, told as it goes: a bar in a terminal or in JupyterLab, plain lines in a log."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cxrkit.grid.loop import Event, Report

__all__ = ["Tally", "duration", "plain", "reporter"]

_ENDS = ("done", "failed", "blocked")


@contextlib.contextmanager
def reporter(console: Console | None = None, capacity: int = 1, title: str = "grid") -> Iterator[Report]:
    """The `report` to hand to `run`; `capacity`: runs at a time, `console`: where to."""
    if console is None:
        from rich.console import Console

        console = Console()
    live = "JPY_SESSION_NAME" in os.environ if console.is_jupyter else console.is_terminal
    tell = _bar if live and not console.is_dumb_terminal else _lines
    with tell(Tally(capacity), console, plain(title)) as report:
        yield report


class Tally:
    """Counts and time left, from a runner's events; a run to come takes as long as the finished ones on average."""

    def __init__(self, capacity: int = 1, clock: Callable[[], float] = time.monotonic):
        self.capacity, self.clock = max(1, capacity), clock
        self.started = clock()
        self.open: set[str] = set()
        self.running: dict[str, float] = {}  # key: since when
        self.ended: dict[str, tuple[str, float]] = {}  # key: kind of event, seconds

    def heard(self, event: Event) -> None:
        """Count one event."""
        if event.kind == "begin":
            self.started, self.open = self.clock(), {task.key for task in event.tasks}
        elif event.kind == "start":
            self.running[event.task.key] = self.clock()
        elif event.kind in (*_ENDS, "repeat"):
            self.running.pop(event.task.key, None)
        if event.kind in _ENDS:
            self.ended[event.task.key] = (event.kind, event.seconds)

    def count(self, kind: str) -> int:
        return sum(one == kind for one, _ in self.ended.values())

    @property
    def left(self) -> float | None:
        """Seconds until the last run ends; None before the first has."""
        made = [seconds for kind, seconds in self.ended.values() if kind == "done" and seconds]
        if not made:
            return None
        mean, now = sum(made) / len(made), self.clock()
        spent = sum(min(mean, now - since) for since in self.running.values())
        return (mean * len(self.open - self.ended.keys()) - spent) / self.capacity

    def sentence(self) -> str:
        """`3 of 8, 1 failed, about 2 min left`."""
        parts = [f"{len(self.ended)} of {len(self.open | self.ended.keys())}"]
        parts += [f"{self.count(kind)} {kind}" for kind in ("failed", "blocked") if self.count(kind)]
        if self.left is not None and self.open - self.ended.keys():
            parts.append(f"about {duration(self.left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A length of time in at most two units: `12 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(text: object) -> str:
    """Text on one line without control characters, whatever a name or an error message holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _line(event: Event) -> str:
    took = f"{event.seconds:6.0f} s" if event.kind in ("done", "failed", "repeat") else " " * 8
    return plain(f"{event.kind:9} {took}  {event.task.key}  {event.message}").rstrip()


@contextlib.contextmanager
def _lines(tally: Tally, console: Console, title: str) -> Iterator[Report]:
    def show(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=console.file, flush=True)

    def report(event: Event) -> None:
        tally.heard(event)
        if event.task is not None:
            show(f"{_line(event)}  ({tally.sentence()})")
        elif event.kind == "begin":
            show(f"{title}: {len(tally.open)} runs to do")

    how = "stopped"
    try:
        yield report
        how = "ended"
    finally:
        if tally.open:
            show(f"{title}: {tally.sentence()}; {how} after {duration(tally.clock() - tally.started)}")


@contextlib.contextmanager
def _bar(tally: Tally, console: Console, title: str) -> Iterator[Report]:
    """A bar that stays at the bottom; what ended stands above it."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[told]}", markup=False), console=console) as display:
        bar = display.add_task(title, total=None, told="")

        def report(event: Event) -> None:
            tally.heard(event)
            if event.task is not None and event.kind != "start":
                display.console.print(f"  {_line(event)}", markup=False, emoji=False, highlight=False, soft_wrap=True)
            first, *others = [plain(key) for key in tally.running] or [title]
            about = f"{first} and {len(others)} more" if others else first
            counts = {"completed": len(tally.ended), "total": len(tally.open)}
            display.update(bar, description=about, told=tally.sentence(), refresh=True, **counts)

        yield report
