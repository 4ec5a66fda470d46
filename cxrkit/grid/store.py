"""What runners of one results folder share: who makes which run, what failed, how long runs took.

All of it is stored in `results/.grid`, the failed runs in `results/failed`; a finished run is only ever the folder with
its key. A claim is a file that one runner alone can create. Whether its holder still lives, a runner on the same
machine asks the system (process number and start time), so a killed runner's work is taken up at once; on another
machine the holder counts as dead when the file that it touches every few seconds has been still for `LEASE` seconds by
the clock of the shared folder. Its runs watch the same file and give up earlier than that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrkit.grid import processes

__all__ = ["BEAT", "KERNEL_FOLDER", "LEASE", "Claim", "Runner", "Store", "disk_full", "end_kernel", "visible"]

BEAT, LEASE = 5.0, 60.0
KERNEL_FOLDER = "cxrkit-kernel-"  # begins the name of the folder with a kernel's sockets


def disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Claim:
    """A run that a runner makes: its file, and who holds it since when (as `processes.identity` gives it)."""

    path: Path
    key: str
    holder: dict[str, Any]

    def release(self) -> None:
        """Give the run free. Older claims of dead holders go first, so that none of them becomes the newest again."""
        for path in _claims(self.path.parent, self.key):
            if _number(path) < _number(self.path):
                path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Store:
    """The grid's own files beside the runs of a results folder."""

    def __init__(self, results: Path):
        self.results, self.base = results, results / ".grid"
        self.claims, self.runners, self.work = self.base / "claims", self.base / "runners", self.base / "work"
        self.failed, self.notebooks = results / "failed", results / "notebooks"

    def prepare(self) -> None:
        for folder in (self.claims, self.runners, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def failure(self, key: str) -> dict[str, Any] | None:
        """The record of a failed run: why, message, attempts, seconds, when; None where it hasn't failed."""
        try:
            return json.loads((self.failed / key / "failure.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"why": "error", "message": "", "attempts": 1} if (self.failed / key).is_dir() else None

    def held(self) -> dict[str, Claim]:
        """Every run that a living runner makes now."""
        names = {name.rpartition(".")[0] for name in visible(self.claims)}
        return {name: claim for name in names if (claim := self.holder(name))}

    def holder(self, key: str) -> Claim | None:
        """The living runner's claim of a run, if there is one."""
        for path in reversed(_claims(self.claims, key)):
            if (holder := self._alive(path)) is not None:
                return Claim(path, key, holder)
        return None

    def claim(self, key: str, runner: Runner) -> Claim | None:
        """Take a run; None where another runner has it. Never are two holders of one run alive at a time.

        A claim's file bears a number. A dead holder's claim isn't removed but followed by the next number, which, as
        the first, only one runner can create. Raises OSError when the disk is full.
        """
        known = _claims(self.claims, key)
        if known and self._alive(known[-1]) is not None:
            return None
        path = self.claims / f"{key}.{_number(known[-1]) + 1 if known else 1}"
        claim = Claim(path, key, runner.identity | {"since": _now()})
        try:
            file = open(path, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            return None
        try:
            with file:
                file.write(json.dumps(claim.holder))
            # Numbers begin anew after a release: one that was taken since the look above counts, whatever its number.
            taken = any(other != path and self._alive(other) is not None for other in _claims(self.claims, key))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if taken:
            path.unlink(missing_ok=True)
            return None
        for left in (*self.work.glob(f"{key}.*"), *self.results.glob(f".{key}.*")):  # a dead attempt's
            end_kernel(left)
            shutil.rmtree(left, ignore_errors=True)
        return claim

    def _alive(self, path: Path) -> dict[str, Any] | None:
        """The holder of a claim while it lives; one that isn't written yet, or never will be, lives for a moment."""
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            alive = processes.is_alive(holder)
            lives = self._age(self.runners / holder["runner"]) < LEASE if alive is None else alive
        except FileNotFoundError:
            return None
        except (ValueError, KeyError):
            holder, lives = {"host": "?", "pid": 0, "since": "?"}, self._age(path) < 2 * BEAT
        return holder if lives else None

    def forget_runners(self) -> None:
        """Remove the files of runners that are dead for certain, or long since."""
        for path in self.runners.iterdir():
            with contextlib.suppress(OSError, ValueError):
                alive = processes.is_alive(json.loads(path.read_text(encoding="utf-8")))
                if alive is False or (alive is None and self._age(path) > 60 * LEASE):
                    path.unlink(missing_ok=True)

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the folder that it is in; infinite where it is gone."""
        now = time.time()
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self.base) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        try:
            return now - path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def record_failure(self, key: str, work: Path, record: dict[str, Any], traceback: str) -> None:
        """Store a failed attempt, in place of earlier ones: notebook, log, traceback, and its record."""
        record |= {"attempts": (self.failure(key) or {}).get("attempts", 0) + 1, "when": _now()}
        work.mkdir(parents=True, exist_ok=True)
        (work / "failure.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if traceback:
            (work / "traceback.txt").write_text(traceback, encoding="utf-8")
        (work / "kernel.json").unlink(missing_ok=True)
        shutil.rmtree(work / "output", ignore_errors=True)
        self.failed.mkdir(exist_ok=True)
        self.forget_failure(key)
        os.replace(work, self.failed / key)

    def forget_failure(self, key: str) -> None:
        old = self.work / f"{key}.{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.failed / key, old)
        shutil.rmtree(old, ignore_errors=True)

    def journal(self, **event: Any) -> None:
        """Note how an attempt ended. Only estimates are drawn from it, so what can't be written is left out."""
        with contextlib.suppress(OSError), open(self.base / "journal.jsonl", "ab", buffering=0) as file:
            file.write((json.dumps(event | {"when": _now()}) + "\n").encode())

    def events(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            for line in (self.base / "journal.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a line cut off by a full disk
                    if isinstance(event := json.loads(line), dict):
                        yield event


class Runner:
    """A runner's sign of life in every results folder that it works on: a file that it touches every few seconds."""

    def __init__(self, stores: list[Store], beat: float = BEAT):
        self.name, self.stores, self._beat = uuid.uuid4().hex[:12], stores, beat
        self.identity = processes.identity() | {"runner": self.name}
        self.files = [store.runners / self.name for store in stores]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="cxrkit grid heartbeat", daemon=True)

    def __enter__(self) -> Runner:
        try:
            for store, file in zip(self.stores, self.files, strict=True):
                store.prepare()
                file.write_text(json.dumps(self.identity), encoding="utf-8")
        except BaseException:
            self._forget()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self._forget()

    def _forget(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._over.wait(self._beat):
            for file in self.files:
                with contextlib.suppress(OSError):
                    os.utime(file)


def end_kernel(work: Path) -> None:
    """Kill the kernel of an attempt, where it still runs on this machine."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kernel = json.loads((work / "kernel.json").read_text(encoding="utf-8"))
        processes.end_group(kernel)
        if (folder := Path(kernel["folder"])).name.startswith(KERNEL_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)


def visible(folder: Path) -> set[str]:
    """Names in a folder that don't begin with a dot; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    return set()


def _claims(folder: Path, key: str) -> list[Path]:
    """The claims of a run, the newest last."""
    names = [name for name in visible(folder) if name.rpartition(".")[0] == key and name.rpartition(".")[2].isdigit()]
    return sorted((folder / name for name in names), key=_number)


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
