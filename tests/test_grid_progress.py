"""Progress: counts, rates and time left by hand; the right display; nothing from data is ever markup or control."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from cxrkit.grid import progress
from cxrkit.grid.loop import Event

EVIL = "[red]x[/red]\x1b[2J\r\n<script>alert(1)</script>"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make_tasks(tmp_path):
    def make(count: int, step: str = "train", estimate: float | None = None, prefix: str = "run"):
        where = SimpleNamespace(results=str(tmp_path))
        return [
            SimpleNamespace(
                key=f"{prefix}-{n}", notebook=Path(f"{step}.ipynb"), step=step, estimate=estimate, parameters=where
            )
            for n in range(count)
        ]

    return make


def tally_of(tasks, capacity: int = 1) -> tuple[progress.Tally, Clock]:
    clock = Clock()
    tally = progress.Tally(capacity, clock)
    tally.heard(Event("begin", tasks=tuple(tasks)))
    return tally, clock


def test_nothing_is_said_of_the_time_before_anything_is_known(make_tasks):
    tasks = make_tasks(4)
    tally, clock = tally_of(tasks)
    assert tally.rate is None
    assert tally.left is None
    assert tally.sentence() == "0 of 4"
    tally.heard(Event("start", tasks[0]))
    clock.now += 30
    assert tally.left is None


def test_rate_and_time_left_follow_what_ended(make_tasks):
    tasks = make_tasks(4)
    tally, clock = tally_of(tasks)
    tally.heard(Event("start", tasks[0]))
    clock.now += 30
    tally.heard(Event("done", tasks[0], 30.0))
    assert tally.rate == pytest.approx(2.0)
    assert tally.left == pytest.approx(90.0)
    tally.heard(Event("start", tasks[1]))
    clock.now += 10
    assert tally.left == pytest.approx(20 + 60)
    tally.heard(Event("failed", tasks[1], 10.0))
    assert tally.left == pytest.approx(60.0), "a failed run says nothing of how long a whole one takes"
    assert tally.sentence() == "2 of 4, 1 failed, 3.0 a minute, about 60 s left"


def test_runs_at_a_time_share_the_work_but_none_is_cut(make_tasks):
    tasks = make_tasks(5)
    tally, clock = tally_of(tasks, 2)
    tally.heard(Event("start", tasks[0]))
    tally.heard(Event("start", tasks[1]))
    clock.now += 100
    tally.heard(Event("done", tasks[0], 100.0))
    tally.heard(Event("start", tasks[2]))
    clock.now += 20
    tally.heard(Event("done", tasks[1], 120.0))
    tally.heard(Event("start", tasks[3]))  # mean 110; under way: 20 and 0 spent; one to come
    assert tally.left == pytest.approx((90 + 110 + 110) / 2)
    tally.heard(Event("start", tasks[4]))
    tally.heard(Event("done", tasks[4], 110.0))
    assert tally.left == pytest.approx(110), "two are left, side by side: the longer one counts"


def test_steps_are_timed_apart_and_expectations_are_scaled(make_tasks):
    train = make_tasks(2, "train", estimate=100.0, prefix="t")
    explain = make_tasks(2, "explain", estimate=10.0, prefix="e")
    tally, clock = tally_of([*train, *explain])
    assert tally.left == pytest.approx(220)
    tally.heard(Event("start", train[0]))
    clock.now += 50
    tally.heard(Event("done", train[0], 50.0))  # twice as fast as was expected
    assert tally.left == pytest.approx(50 + 5 + 5)


def test_expectations_come_from_earlier_runs(make_tasks, tmp_path):
    (tmp_path / ".grid").mkdir()
    (tmp_path / ".grid" / "journal.jsonl").write_text(
        "".join(
            json.dumps({"event": "done", "kind": "train", "step": "train", "seconds": s}) + "\n" for s in (40, 60, 50)
        )
    )
    tally, _ = tally_of(make_tasks(3))
    assert tally.left == pytest.approx(150)


def test_a_repeated_run_is_counted_once_and_blocked_ones_end(make_tasks):
    tasks = make_tasks(3)
    tally, _ = tally_of(tasks)
    tally.heard(Event("start", tasks[0]))
    tally.heard(Event("repeat", tasks[0], 1.0, "the worker died"))
    assert (len(tally.waiting), len(tally.running), tally.total) == (3, 0, 3)
    tally.heard(Event("start", tasks[0]))
    tally.heard(Event("failed", tasks[0], 1.0))
    tally.heard(Event("blocked", tasks[1], message="needs run-0"))
    tally.heard(Event("elsewhere", tasks[2]))
    tally.heard(Event("something new", tasks[2]))
    assert tally.sentence().startswith("2 of 3, 1 failed, 1 blocked")
    tally.heard(Event("done", tasks[2], 0.0))  # another runner made it: no time of ours
    assert tally.sentence().startswith("3 of 3")
    assert tally.left == 0 or tally.left is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (12, "12 s"),
        (99.4, "99 s"),
        (180, "3 min"),
        (7500, "2 h 5 min"),
        (100 * 60, "1 h 40 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_read_well(seconds, text):
    assert progress.duration(seconds) == text


def drive(display, tasks) -> None:
    with display:
        display.heard(Event("begin", tasks=tuple(tasks)))
        display.heard(Event("start", tasks[0]))
        display.heard(Event("done", tasks[0], 12.0))
        display.heard(Event("start", tasks[1]))
        display.heard(Event("repeat", tasks[1], 3.0, "the worker died"))
        display.heard(Event("start", tasks[1]))
        display.heard(Event("failed", tasks[1], 4.0, EVIL))
        display.heard(Event("blocked", tasks[2], message="needs it"))
        display.heard(Event("end"))


def test_a_log_gets_one_plain_line_per_event(make_tasks):
    tasks = make_tasks(3)
    tasks[2].key = EVIL
    stream = io.StringIO()
    display = progress.choose(Console(file=stream), 1, "grid quick")
    assert isinstance(display, progress.Lines)
    drive(display, tasks)
    text = stream.getvalue()
    lines = text.splitlines()
    assert len(lines) == 1 + 7 + 1
    assert all(c == "\n" or c.isprintable() for c in text)
    assert re.fullmatch(r"\d\d:\d\d:\d\d grid quick: 3 runs to do", lines[0])
    assert re.search(r"done +12 s  run-0  \(1 of 3, [\d.]+ a minute, about \d+ s left\)$", lines[2])
    assert "[red]x[/red]" in lines[6]
    assert r"\x1b" in lines[6]
    assert re.search(r"3 of 3, 1 failed, 1 blocked, .* ended after \d+ s$", lines[-1])


def test_a_log_says_when_it_was_stopped(make_tasks):
    stream = io.StringIO()

    def stopped():
        with progress.reporter(Console(file=stream)) as report:
            report(Event("begin", tasks=tuple(make_tasks(2))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "0 of 2; stopped after" in stream.getvalue().splitlines()[-1]


def test_nothing_is_said_where_nothing_is_to_do():
    stream = io.StringIO()
    with progress.reporter(Console(file=stream)):
        pass
    assert stream.getvalue() == ""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(make_tasks, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    tasks = make_tasks(3)
    tasks[2].key = EVIL
    screen = Screen()
    display = progress.choose(Console(file=screen, width=160, force_terminal=True), 1, "grid [b]quick[/b]")
    assert isinstance(display, progress.Terminal)
    drive(display, tasks)
    text = screen.getvalue()
    assert "a minute" in text
    assert "grid [b]quick[/b]" in text
    assert "[red]x[/red]" in text, "names are shown as they are, not read as markup"
    assert "\x1b[2J" not in text, "a name can't clear the screen"
    assert "\x1b[?25h" in text, "the cursor is back"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.choose(Console(file=Screen())), progress.Lines)


class Shell:
    kernel = object()


def test_jupyterlab_gets_widgets_and_a_kernel_that_nobody_sees_gets_lines(monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: Shell()))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert isinstance(progress.choose(), progress.Lines)
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/mine.ipynb")
    assert isinstance(progress.choose(), progress.Widget)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert isinstance(progress.choose(), progress.Lines)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: Shell()))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(progress.choose(), progress.Lines)


def test_the_widget_shows_text_as_text(make_tasks, monkeypatch):
    pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    tasks = make_tasks(3)
    tasks[2].key = EVIL
    widget = progress.Widget(progress.Tally(), "<b>grid</b>")
    drive(widget, tasks)
    assert shown == [widget.box]
    assert (widget.bar.value, widget.bar.max, widget.bar.bar_style) == (3, 3, "danger")
    assert widget.text.value.startswith("&lt;b&gt;grid&lt;/b&gt;: 3 of 3, 1 failed")
    assert "<script" not in widget.log.value
    assert "&lt;script&gt;" in widget.log.value


def test_a_grid_that_went_well_ends_green(make_tasks, monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr("IPython.display.display", lambda _: None)
    (task,) = make_tasks(1)
    widget = progress.Widget(progress.Tally())
    with widget:
        for event in (Event("begin", tasks=(task,)), Event("start", task), Event("done", task, 1.0), Event("end")):
            widget.heard(event)
    assert widget.bar.bar_style == "success"


def test_the_state_table_counts_and_escapes():
    state = pd.DataFrame({"key": ["a", EVIL, "c"], "state": ["done", "open", "done"], "detail": ["", "<i>", None]})
    table = progress.StateTable(state)
    assert table.counts() == "3 runs: 2 done, 1 open"
    page = table._repr_html_()
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr") == 1 + 3
    assert "\x1b" not in repr(table)
    assert repr(table).startswith("3 runs: 2 done, 1 open\n")
    assert progress.StateTable(pd.DataFrame(columns=["key", "state"])).counts() == "0 runs"
