"""What runners of one results folder tell each other: who makes which run, what failed, how long runs took.

All of it lies in `results/.grid`, the failed runs in `results/failed`; a finished run is only ever the folder with its
key. A claim is a file that one runner alone can create. Whether its holder still lives, a runner on the same machine
asks the system (process number and start time), so a killed runner's work is taken up at once; on another machine the
holder counts as dead when the file that it touches every few seconds has been still for `LEASE` seconds by the clock
of the shared folder. Its runs watch the same file and give up earlier than that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrkit.grid import processes

__all__ = ["BEAT", "LEASE", "Claim", "Runner", "Store", "disk_full"]

BEAT, LEASE = 5.0, 60.0
KERNEL_FOLDER = "cxrkit-kernel-"  # begins the name of the folder with a kernel's sockets
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


@dataclass(frozen=True)
class Claim:
    """A run that a runner makes: the file, and who, by `processes.identity`, since when."""

    path: Path
    key: str
    holder: dict[str, Any]

    def release(self) -> None:
        """Give the run free. What was left of dead holders goes first, so that nothing old comes to the fore."""
        number = int(self.path.suffix[1:])
        for other, path in _generations(self.path.parent, self.key):
            if other < number:
                path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class Store:
    """The grid's own files beside the runs of a results folder."""

    def __init__(self, results: Path):
        self.results = results
        self.base = results / ".grid"
        self.claims, self.runners, self.work = self.base / "claims", self.base / "runners", self.base / "work"
        self.failed, self.notebooks = results / "failed", results / "notebooks"

    def prepare(self) -> None:
        for folder in (self.claims, self.runners, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        """Names of the folders that may be runs."""
        return _visible(self.results)

    def failed_names(self) -> set[str]:
        return _visible(self.failed)

    def failure(self, key: str) -> dict[str, Any] | None:
        """The record of a failed run: why, message, attempts, seconds, when; None where it hasn't failed."""
        try:
            return json.loads((self.failed / key / "failure.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"why": "error", "message": "", "attempts": 1} if (self.failed / key).is_dir() else None

    def held(self) -> dict[str, Claim]:
        """Every run that a living runner makes now."""
        names = {name.rpartition(".")[0] for name in _visible(self.claims)}
        return {name: claim for name in names if (claim := self.holder(name))}

    def holder(self, key: str) -> Claim | None:
        """The living runner's claim of a run, if there is one."""
        for _, path in reversed(_generations(self.claims, key)):
            with contextlib.suppress(FileNotFoundError):
                holder = _read(path)
                if self._lives(path, holder):
                    return Claim(path, key, holder)
        return None

    def claim(self, key: str, runner: Runner) -> Claim | None:
        """Take a run; None where another runner has it. Never are two holders of one run alive at a time.

        A claim's file bears a number. A dead holder's claim isn't removed but followed by the next number, which, as
        the first, only one runner can create. Raises OSError when the disk is full.
        """
        known = _generations(self.claims, key)
        number = known[-1][0] + 1 if known else 1
        if known:
            try:
                if self._lives(known[-1][1], _read(known[-1][1])):
                    return None
            except FileNotFoundError:
                return None  # just given free: what it left behind is seen next time
        path = self.claims / f"{key}.{number}"
        holder = runner.identity | {"since": _now()}
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        claim = Claim(path, key, holder)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(holder))
            for _, other in _generations(self.claims, key):
                with contextlib.suppress(FileNotFoundError):
                    if other != path and self._lives(other, _read(other)):
                        path.unlink(missing_ok=True)
                        return None
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.sweep(key)
        return claim

    def sweep(self, key: str) -> None:
        """Remove what a dead attempt at a run left behind, its kernel included. Only for the holder of the claim."""
        for left in (*self.work.glob(f"{key}.*"), *self.results.glob(f".{key}.*")):
            end_kernel(left)
            shutil.rmtree(left, ignore_errors=True)

    def _lives(self, path: Path, holder: dict[str, Any] | None) -> bool:
        if holder is None:  # not written yet, or its writer was killed before it could
            return self.age(path) < 2 * BEAT
        alive = processes.is_alive(holder)
        if alive is None:
            beat = self.runners / holder["runner"]
            return beat.exists() and self.age(beat) < LEASE
        return alive

    def forget_runners(self) -> None:
        """Remove the signs of life of runners that are dead for certain, or long since."""
        for path in self.runners.iterdir():
            with contextlib.suppress(OSError):
                holder = _read(path)
                alive = processes.is_alive(holder) if holder else None
                if alive is False or (alive is None and self.age(path) > 60 * LEASE):
                    path.unlink(missing_ok=True)

    def age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the folder that it lies in; infinite where it is gone."""
        try:
            then = path.stat().st_mtime
            probe = self.runners / f".{uuid.uuid4().hex}"
            probe.touch()
        except FileNotFoundError:
            return float("inf")
        except OSError:
            return time.time() - then
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now - then

    def record_failure(self, key: str, work: Path, record: dict[str, Any], traceback: str) -> None:
        """Keep a failed attempt, in place of earlier ones: notebook, log, traceback, and what is known of it."""
        attempts = (self.failure(key) or {}).get("attempts", 0) + 1
        self.failed.mkdir(exist_ok=True)
        new = self.failed / f".{key}.{uuid.uuid4().hex[:8]}"
        try:
            if work.is_dir():
                os.replace(work, new)
            new.mkdir(exist_ok=True)
            _write(new / "failure.json", json.dumps(record | {"attempts": attempts, "when": _now()}, indent=1))
            if traceback:
                _write(new / "traceback.txt", traceback)
            for name in ("kernel.json", "parameters.json"):
                (new / name).unlink(missing_ok=True)
            shutil.rmtree(new / "output", ignore_errors=True)
            self.forget_failure(key)
            os.replace(new, self.failed / key)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def forget_failure(self, key: str) -> None:
        old = self.failed / f".{key}.{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.failed / key, old)
        shutil.rmtree(old, ignore_errors=True)

    def journal(self, **event: Any) -> None:
        """Note how an attempt ended. Only estimates are drawn from it, so what can't be written is left out."""
        line = (json.dumps(event | {"when": _now()}) + "\n").encode()
        with contextlib.suppress(OSError):
            handle = os.open(self.base / "journal.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)

    def events(self) -> Iterator[dict[str, Any]]:
        try:
            lines = (self.base / "journal.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            with contextlib.suppress(ValueError):  # a line cut off by a full disk
                if isinstance(event := json.loads(line), dict):
                    yield event


class Runner:
    """A runner's sign of life in every results folder that it works on: a file that it touches every few seconds."""

    def __init__(self, stores: list[Store], beat: float = BEAT):
        self.name, self.stores = uuid.uuid4().hex[:12], stores
        self.identity = processes.identity() | {"runner": self.name}
        self.files = [store.runners / self.name for store in stores]
        self._beat, self._over = beat, threading.Event()
        self._thread = threading.Thread(target=self._live, name="cxrkit grid heartbeat", daemon=True)

    def __enter__(self) -> Runner:
        try:
            for store, file in zip(self.stores, self.files, strict=True):
                store.prepare()
                _write(file, json.dumps(self.identity))
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


def _visible(folder: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    return set()


def _generations(claims: Path, key: str) -> list[tuple[int, Path]]:
    parts = [(*name.rpartition("."), name) for name in _visible(claims)]
    return sorted((int(number), claims / name) for stem, _, number, name in parts if stem == key and number.isdigit())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if {"machine", "pid", "started", "runner"} <= set(holder) else None
    except (ValueError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
