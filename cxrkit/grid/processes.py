"""Which processes are alive, which belong together, and how they end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

__all__ = ["end_group", "identity", "is_alive", "machine", "memory_of"]


@functools.cache
def machine() -> str:
    """Name of the set of processes that this one can see: host, boot, and on Linux the process namespace."""
    parts = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", _text), ("/proc/self/ns/pid", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(read(path).strip())
    return "|".join(parts)


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def identity(pid: int | None = None) -> dict[str, Any]:
    """What tells a process from every other: machine, number, and when it started."""
    pid = pid or os.getpid()
    return {"machine": machine(), "host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether a process that `identity` told of still runs; None where this machine can't know."""
    if process.get("machine") != machine():
        return None
    return _started(int(process["pid"])) == process["started"] != None  # noqa: E711


def _started(pid: int) -> str | None:
    """When a process started, exactly as the system counts; None where it has ended."""
    if sys.platform == "linux":
        try:
            fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None


def end_group(leader: dict[str, Any]) -> None:
    """Kill a process that leads a group of its own, with all its children; nothing where it isn't on this machine."""
    if leader.get("machine") != machine() or not hasattr(os, "killpg"):
        return
    pid = int(leader["pid"])
    if _started(pid) not in (leader["started"], None):
        return  # the number belongs to another process now
    # A number isn't given away while a group bears it, so what is in that group are the leader's children.
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold in memory; what children share counts once."""
    import psutil

    try:
        leader = psutil.Process(pid)
        total = leader.memory_info().rss
        children = leader.children(recursive=True)
    except psutil.Error:
        return 0
    for child in children:
        with contextlib.suppress(psutil.Error):
            used = child.memory_info()
            total += used.rss - getattr(used, "shared", 0)
    return total
