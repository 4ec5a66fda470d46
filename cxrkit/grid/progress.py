"""How far a grid is, told as it goes: live in a terminal, as a widget in JupyterLab, as plain lines in a log."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, Protocol

import pandas as pd

if TYPE_CHECKING:
    from rich.console import Console

    from cxrkit.grid.loop import Event, Report

__all__ = ["Display", "Lines", "StateTable", "Tally", "Terminal", "Widget", "choose", "duration", "plain", "reporter"]

_ENDS = ("done", "failed", "blocked")


class Display(Protocol):
    """What a runner tells its events to; a context manager, so that it is always closed."""

    def heard(self, event: Event) -> None: ...

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...


@contextlib.contextmanager
def reporter(console: Console | None = None, capacity: int = 1, title: str = "grid") -> Iterator[Report]:
    """The `report` to hand to `run`, with the display that fits; `capacity`: runs at a time, `console`: where to."""
    with choose(console, capacity, title) as display:
        yield display.heard


def choose(console: Console | None = None, capacity: int = 1, title: str = "grid") -> Display:
    """The display that fits where one is: JupyterLab, a terminal, or anything else, such as a log file."""
    tally = Tally(capacity)
    if _in_jupyter():
        with contextlib.suppress(ImportError):
            return Widget(tally, title)
    stream = console.file if console else sys.stdout
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Terminal(tally, title, console)
    return Lines(tally, title, stream)


def _in_jupyter() -> bool:
    """Whether somebody looks at this kernel: one that papermill or the book started has no front end for widgets."""
    if "IPython" not in sys.modules or "JPY_SESSION_NAME" not in os.environ:
        return False
    return hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class Tally:
    """Counts, rate and time left, from the events of a runner.

    A run to come takes as long as the finished ones of its step on average. Before there are any it takes what was
    expected of it, scaled by how the finished runs compare with what was expected of them.
    """

    def __init__(self, capacity: int = 1, clock: Callable[[], float] = time.monotonic):
        self.capacity, self.clock = max(1, capacity), clock
        self.started = clock()
        self.peak = 0
        self.waiting: dict[str, tuple[str, str]] = {}  # key -> step
        self.running: dict[str, tuple[tuple[str, str], float]] = {}  # key -> step, since when
        self.ended: dict[str, tuple[tuple[str, str], str, float]] = {}  # key -> step, event, seconds
        self.expected: dict[str, float] = {}

    def heard(self, event: Event) -> None:
        """Count one event. Kinds that are not known change nothing."""
        if event.kind == "begin":
            self._begin(event.tasks)
        if event.task is None:
            return
        key, step = event.task.key, _step(event.task)
        if event.kind in ("start", "repeat", *_ENDS):
            for place in (self.waiting, self.running, self.ended):
                place.pop(key, None)
        if event.kind == "start":
            self.running[key] = (step, self.clock())
            self.peak = max(self.peak, len(self.running))
        elif event.kind == "repeat":
            self.waiting[key] = step
        elif event.kind in _ENDS:
            self.ended[key] = (step, event.kind, event.seconds)

    def _begin(self, tasks: tuple[Any, ...]) -> None:
        from cxrkit.grid.state import estimate

        self.started = self.clock()
        self.waiting = {task.key: _step(task) for task in tasks}
        with contextlib.suppress(OSError):
            known = zip(tasks, estimate(tasks), strict=True)
            self.expected = {task.key: seconds for task, seconds in known if seconds is not None}

    @property
    def total(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.ended)

    def count(self, kind: str) -> int:
        return sum(event == kind for _, event, _ in list(self.ended.values()))

    @property
    def rate(self) -> float | None:
        """Runs that ended per minute; None before the first."""
        elapsed, made = self.clock() - self.started, self.count("done") + self.count("failed")
        return 60 * made / elapsed if made and elapsed > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds until the last run ends, as far as can be told; None while nothing is known of some run to come."""
        now = self.clock()
        coming = [self._guess(key, step) for key, step in list(self.waiting.items())]
        under_way = [(self._guess(key, step), now - since) for key, (step, since) in list(self.running.items())]
        if None in coming or any(guess is None for guess, _ in under_way):
            return None
        rests = [max(0.0, guess - spent) for guess, spent in under_way]
        return max([(sum(coming) + sum(rests)) / (self.peak or self.capacity), *rests])

    def _guess(self, key: str, step: tuple[str, str]) -> float | None:
        made = {k: (s, seconds) for k, (s, kind, seconds) in list(self.ended.items()) if kind == "done" and seconds}
        same = [seconds for other, seconds in made.values() if other == step]
        if same:
            return sum(same) / len(same)
        if key not in self.expected:
            return None
        hoped = sum(self.expected.get(k, 0.0) for k in made)
        real = sum(seconds for k, (_, seconds) in made.items() if k in self.expected)
        return self.expected[key] * (real / hoped if hoped else 1.0)

    def sentence(self) -> str:
        """`3 of 8, 1 failed, 2.4 a minute, about 2 min left`: what is known of it."""
        parts = [f"{len(self.ended)} of {self.total}"]
        parts += [f"{self.count(kind)} {kind}" for kind in ("failed", "blocked") if self.count(kind)]
        parts += [f"{self.rate:.1f} a minute"] if self.rate is not None else []
        more = self.waiting or self.running
        parts += [f"about {duration(self.left)} left"] if more and self.left is not None else []
        return ", ".join(parts)


def _step(task: Any) -> tuple[str, str]:
    return (task.notebook.stem, task.step)


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
    told = f"  {plain(event.message)}" if event.message else ""
    return f"{plain(event.kind):9} {took}  {plain(event.task.key)}{told}"


class Lines:
    """One line per event, without control characters: for logs and pipes."""

    def __init__(self, tally: Tally, title: str = "grid", stream: IO[str] | None = None):
        self.tally, self.title, self.stream = tally, plain(title), stream or sys.stdout

    def heard(self, event: Event) -> None:
        self.tally.heard(event)
        if event.task is not None:
            self._print(f"{_line(event)}  ({self.tally.sentence()})")
        elif event.kind == "begin":
            left = f", about {duration(self.tally.left)}" if self.tally.left is not None else ""
            self._print(f"{self.title}: {self.tally.total} runs to do{left}")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self.tally.total:
            took = duration(self.tally.clock() - self.tally.started)
            how = "stopped" if error and error[0] else "ended"
            self._print(f"{self.title}: {self.tally.sentence()}; {how} after {took}")

    def _print(self, line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=self.stream, flush=True)


class Terminal:
    """A bar that stays at the bottom, with rate and time left; what ended stands above it."""

    def __init__(self, tally: Tally, title: str = "grid", console: Console | None = None):
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class State(ProgressColumn):
            max_refresh = 0.5

            def render(self, task: Any) -> Text:
                return Text(tally.sentence())

        self.tally, self.title = tally, plain(title)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
        self.display = Progress(*columns, State(), console=console)
        self.bar = self.display.add_task(self.title, total=None)

    def heard(self, event: Event) -> None:
        self.tally.heard(event)
        if event.kind == "begin":
            self.display.start()
        if event.task is not None and event.kind != "start":
            self.display.console.print(f"  {_line(event)}", markup=False, emoji=False, highlight=False, soft_wrap=True)
        names = ", ".join(plain(key) for key in list(self.tally.running)[:1]) or self.title
        rest = len(self.tally.running) - 1
        description = names + (f" and {rest} more" if rest > 0 else "")
        self.display.update(
            self.bar, completed=len(self.tally.ended), total=self.tally.total, description=description, refresh=True
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.display.stop()


class Widget:
    """A bar, a sentence, and the last events, in JupyterLab."""

    shown = 8

    def __init__(self, tally: Tally, title: str = "grid"):
        import ipywidgets

        self.tally, self.title = tally, plain(title)
        self.bar = ipywidgets.IntProgress(0, 0, 1, layout={"width": "100%"})
        self.text, self.log = ipywidgets.HTML(), ipywidgets.HTML()
        self.box = ipywidgets.VBox([self.text, self.bar, self.log])
        self.events: list[str] = []

    def heard(self, event: Event) -> None:
        from IPython.display import display

        self.tally.heard(event)
        if event.kind == "begin":
            display(self.box)
        if event.task is not None:
            self.events = [*self.events, _line(event)][-self.shown :]
        self.bar.max, self.bar.value = max(1, self.tally.total), len(self.tally.ended)
        self.text.value = html.escape(f"{self.title}: {self.tally.sentence()}")
        self.log.value = f"<pre>{html.escape(chr(10).join(self.events))}</pre>"
        if self.tally.count("failed"):
            self.bar.bar_style = "danger"

    def __enter__(self) -> Widget:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.tally.count("failed"):
            self.bar.bar_style = "warning" if error and error[0] else "success"


class StateTable:
    """A grid's state as a table, for JupyterLab and the book: how many runs are in which state, then a row per run.

    `state`: as `cxrkit.grid.status` gives it, with a column `state`. Whatever a cell holds is shown as text.
    """

    def __init__(self, state: pd.DataFrame):
        self.state = state

    def counts(self) -> str:
        """`8 runs: 3 done, 5 open`."""
        found = self.state["state"].value_counts(sort=False) if len(self.state) else pd.Series(dtype=int)
        told = ", ".join(f"{count} {plain(name)}" for name, count in found.items())
        return f"{len(self.state)} runs" + (f": {told}" if told else "")

    def __repr__(self) -> str:
        return f"{self.counts()}\n{self.state.map(plain).to_string(index=False)}"

    def _repr_html_(self) -> str:
        cells = self.state.map(plain)
        return f"<p>{html.escape(self.counts())}</p>{cells.to_html(index=False, escape=True, border=0)}"
