"""Progress: a bar or plain lines; nothing from data is ever markup or control."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from cxrkit.grid import progress
from cxrkit.grid.loop import Event

EVIL = "[red]x[/red]\x1b[2J\r\n<script>alert(1)</script>"


def tasks(count: int, prefix: str = "run") -> tuple[SimpleNamespace, ...]:
    return tuple(SimpleNamespace(key=f"{prefix}-{n}") for n in range(count))


def tell(console: Console, error: type[BaseException] | None = None) -> None:
    made = tasks(2, EVIL)
    with progress.reporter(console, EVIL) as report:
        report(Event("begin", tasks=made))
        report(Event("start", made[0]))
        report(Event("failed", made[0], 2.0, EVIL))
        if error:
            raise error
        report(Event("done", made[1], 3.0))
        report(Event("end"))


def test_a_log_gets_one_plain_line_per_event():
    stream = io.StringIO()
    tell(Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d .*", line) and line.isprintable() for line in lines)
    assert lines[0].endswith("2 runs to do")
    assert "failed         2 s" in lines[2]
    assert lines[2].endswith("(1 of 2, 1 failed)")
    assert "2 of 2, 1 failed; ended after" in lines[4]


def test_a_log_says_when_it_was_stopped_and_nothing_where_nothing_is_to_do():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        tell(Console(file=stream), KeyboardInterrupt)
    assert "stopped after" in stream.getvalue().splitlines()[-1]
    stream = io.StringIO()
    with progress.reporter(Console(file=stream)):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_a_dumb_one_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    tell(Console(file=stream, force_terminal=True, width=200))
    told = stream.getvalue()
    assert "━" in told
    assert "2 of 2, 1 failed" in told
    assert "[red]x[/red]\\x1b[2J" in re.sub(r"\x1b\[[0-9;]*m", "", told)
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    tell(Console(file=stream, force_terminal=True))
    assert "\x1b" not in stream.getvalue()


def test_a_kernel_that_nobody_looks_at_gets_lines(monkeypatch):
    console = Console(file=(stream := io.StringIO()), force_jupyter=True)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    tell(console)
    assert "2 runs to do" in stream.getvalue()
