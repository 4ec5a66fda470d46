"""Which processes are alive, which belong together, and how they end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from pathlib import Path
from typing import Any

import psutil

__all__ = ["end_group", "identity", "is_alive", "machine", "memory_of"]


@functools.cache
def machine() -> str:
    """Name of the set of processes that this one can see: host, boot, and on Linux the process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "|".join(parts)


def identity(pid: int | None = None) -> dict[str, Any]:
    """What tells a process from every other: machine, number, and when it started."""
    pid = pid or os.getpid()
    return {"machine": machine(), "host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether the process of an `identity` still runs; None where this machine can't know."""
    if process.get("machine") != machine():
        return None
    return process["started"] is not None and _started(int(process["pid"])) == process["started"]


def _started(pid: int) -> str | None:
    """When a process started, exactly as the system counts; None where it has ended."""
    try:
        if not psutil.LINUX:
            return f"{psutil.Process(pid).create_time():.0f}"
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, psutil.Error):
        return None
    return None if fields[0] in "ZX" else fields[19]


def end_group(leader: dict[str, Any]) -> None:
    """Kill a process that leads a group of its own, with all its children; nothing where it isn't on this machine."""
    if leader.get("machine") != machine() or not hasattr(os, "killpg"):
        return
    # A number isn't given away while a group bears it: in the group of a leader that is gone are its children.
    if _started(int(leader["pid"])) in (leader["started"], None):
        with contextlib.suppress(OSError):
            os.killpg(int(leader["pid"]), signal.SIGKILL)


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold in memory; what children share counts once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        total = leader.memory_info().rss
        for child in leader.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                used = child.memory_info()
                total += used.rss - getattr(used, "shared", 0)
    return total
