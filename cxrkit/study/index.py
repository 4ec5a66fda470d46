"""One tidy table of all runs, kept beside them in a file that can be made again from them at any time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.errors import CxrkitError, DataError
from cxrkit.files import replace_file
from cxrkit.study import notebook, parameters, run_key, runs
from cxrkit.train import parameters as train_parameters

__all__ = ["FILE", "newest", "table"]

FILE = ".grid/index.json"

# A run's row: its columns of the table; names with an underscore are the index's own.
Row = dict[str, Any]


def table(results: str | Path = "results") -> pd.DataFrame:
    """All whole runs of a folder, a row each: key, kind, when finished, stale, and every parameter as a column.

    Only folders that are new, or whose files have changed in size or time since the last call, are read; the rest
    comes from the index. A missing, damaged or foreign index, or one made by other code, is made again; where it can't
    be written, every run is read each time. Several processes may ask at once: each checks what it was told
    against the folders, and the index is replaced whole. A run that has no such parameter has NaN in its column.
    """
    folder = runs.results_folder(results)
    stamps = dict(_stamps(folder))
    known = _read(folder / FILE)
    rows = [row for row in known if stamps.get(row["_folder"]) == row["_stamp"]]
    kept = {row["_folder"] for row in rows}
    fresh = [row for name, stamp in stamps.items() if name not in kept and (row := _row(folder, name, stamp))]
    if fresh or len(rows) != len(known):
        rows = sorted(rows + fresh, key=lambda row: row["_folder"])
        _write(folder / FILE, rows)
    return _frame(rows)


def newest(kind: str, results: str | Path = "results") -> runs.Run:
    """The run of a kind that finished last. Raises DataError when there is none."""
    results = runs.results_folder(results)
    cards = table(results)
    cards = cards[cards["kind"] == kind] if len(cards) else cards
    if not len(cards):
        raise DataError(f"no {kind} run in {results}; run notebooks/{kind}.ipynb first")
    return runs.Run(results / cards.sort_values("finished")["key"].iloc[-1])


def _frame(rows: list[Row]) -> pd.DataFrame:
    current = {notebook: runs.fingerprint(notebook) for notebook in {row["_notebook"] for row in rows}}
    columns: dict[str, list[Any]] = {}
    for name in _names(rows):
        if not name.startswith("_"):
            columns[name] = [row.get(name, np.nan) for row in rows]
        if name == "finished":
            columns["stale"] = [row["_fingerprint"] != current[row["_notebook"]] for row in rows]
    return pd.DataFrame(columns)


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _stamps(results: Path) -> Iterator[tuple[str, str]]:
    """Every folder with a run card, and what tells whether it has changed: the names, sizes and times of its files."""
    with contextlib.suppress(FileNotFoundError), os.scandir(results) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for name in names:
            with contextlib.suppress(OSError), os.scandir(os.path.join(results, name)) as files:
                found = {file.name: file.stat() for file in files}
                if "run.json" in found:
                    state = [(file, at.st_size, at.st_mtime_ns, at.st_ino) for file, at in sorted(found.items())]
                    yield name, hashlib.blake2b(repr(state).encode(), digest_size=12).hexdigest()


def _row(results: Path, name: str, stamp: str) -> Row | None:
    try:
        run = runs.Run(results / name)
    except (CxrkitError, OSError):
        return None  # a cut-off or foreign folder is not a result; it is looked at again next time
    own = {"_folder": name, "_stamp": stamp, "_fingerprint": run.card["fingerprint"]}
    own["_notebook"] = run_key.notebook_of(run.parameters)
    own |= {"key": run.key, "kind": run.kind, "finished": run.card["finished"]}
    # A notebook of one's own may call a parameter what the table calls a column.
    taken = {*own, "stale"}
    values = run.parameters.identity()
    return own | {f"parameter {n}" if n in taken or n.startswith("_") else n: value for n, value in values.items()}


@functools.cache
def _code() -> str:
    """Hash of the code that decides what a row holds: how runs are read, and what their parameters are."""
    files = (__file__, *(module.__file__ for module in (train_parameters, parameters, run_key, notebook, runs)))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def _read(path: Path) -> list[Row]:
    """The index's rows; none where there is no index, or none that this code has written and nothing has damaged."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
        return json.loads(content) if head == _head(content) else []
    except (OSError, ValueError):
        return []


def _write(path: Path, rows: list[Row]) -> None:
    content = json.dumps(rows, separators=(",", ":")).encode()
    with contextlib.suppress(OSError):  # the index only saves time: what can't be written is read again
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda temporary: Path(temporary).write_bytes(_head(content) + b"\n" + content))


def _head(content: bytes) -> bytes:
    return f"{_code()} {hashlib.blake2b(content, digest_size=16).hexdigest()}".encode()
