"""The store of runs: one folder per experiment, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import cxrkit
from cxrkit.errors import DataError
from cxrkit.files import checksum
from cxrkit.study.notebook import CLASSES, stored_parameters
from cxrkit.study.run_key import (
    fingerprint,
    in_project,
    key,
    made_from,
    notebook_of,
    origin,
    project_folder,
    results_folder,
)
from cxrkit.train.parameters import Parameters

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Run",
    "card_of",
    "find",
    "fingerprint",
    "in_project",
    "key",
    "project_folder",
    "results_folder",
    "writing",
    "writing_card",
]

_PACKAGES = ("torch", "torchvision", "bcos", "numpy", "pandas", "scikit-learn", "accelerate")


class Run:
    """A finished run: its folder, parameters and tables.

    `Run(folder)` checks that the folder is complete: every file that `run.json` lists is there with its size. Raises
    DataError naming the file that is missing, short or unreadable, and what to do about it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.card = _read_card(self.folder)
        self.kind: str = self.card["kind"]
        self.key: str = self.card["key"]
        try:
            self.parameters = _parameters(self.card, self.json("parameters.json"))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.folder / 'parameters.json'}: not a run's parameters ({error}); {_REMEDY}") from None

    def __repr__(self) -> str:
        return f"Run({self.key})"

    def verify(self) -> None:
        """Compare every file with the checksum in `run.json`. Raises DataError naming the first that differs."""
        for name, entry in self.card["files"].items():
            if checksum(self.folder / name) != entry["sha256"]:
                raise DataError(f"{self.folder / name}: content differs from its checksum in run.json; {_REMEDY}")

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def frame(self, name: str) -> pd.DataFrame:
        """A table of the run: `history`, `predictions` or `scores`; identifiers stay text."""
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            raise DataError(f"{self.folder}: a {self.kind} run has no table {name!r}")
        text = {"image_id": str, "patient_id": str, "label": str, "method": str}
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])  # "NA" may be a label

    def arrays(self, name: str = "maps") -> dict[str, np.ndarray]:
        """Arrays that the run stored, by default its maps (see `explanation.kept_maps`)."""
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    def network(self, device: Any = "cpu") -> nn.Module:
        """The network that a training run kept, in evaluation mode."""
        import cxrkit.models  # torch isn't needed to look at runs

        return cxrkit.models.load(self.folder / "model.safetensors").to(device).eval()

    @property
    def stale(self) -> bool:
        """Whether the code that its notebook imports has changed since the run was made."""
        return self.card["fingerprint"] != fingerprint(notebook_of(self.parameters))


def _parameters(card: dict[str, Any], values: dict[str, Any]) -> Parameters:
    if "notebook" in card:  # checked against its parameters cell when it was planned
        return stored_parameters(card["kind"], str(card["notebook"]), values)
    known = CLASSES[card["kind"]]
    # A run of an older version may have parameters that are gone; it is stale, and can be looked at still.
    return known(**{name: value for name, value in values.items() if name in known.model_fields})


_REMEDY = "delete the folder and run it again"


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such run")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        files, kind = card["files"], card["kind"]
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        if not {"key", "fingerprint", "finished"} <= set(card):
            raise KeyError("key")
    except FileNotFoundError:
        raise DataError(f"{folder}: run.json is missing, so the run was cut off; {_REMEDY}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a whole run card; {_REMEDY}") from None
    if kind not in CLASSES and "notebook" not in card:
        raise DataError(f"{path}: unknown kind of run {kind!r}; known: {', '.join(CLASSES)}")
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: missing, so the run is not whole; {_REMEDY}")
        if file.stat().st_size != size:
            raise DataError(f"{file}: {file.stat().st_size} bytes where {size} were written; {_REMEDY}")
    return card


class Writer:
    """Collects a run's files in a hidden folder beside its place; see `writing`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")

    def frame(self, name: str, frame: pd.DataFrame) -> None:
        buffer = io.StringIO()
        frame.to_csv(buffer, index=False)
        self.text(f"{name}.csv", buffer.getvalue())

    def arrays(self, name: str, **arrays: np.ndarray) -> None:
        with (self.folder / f"{name}.npz").open("wb") as file:
            np.savez_compressed(file, **arrays)

    def text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def writing(parameters: Parameters) -> Iterator[Writer]:
    """Write a run: yields a Writer; when the block ends well, the whole folder appears under its key at once.

    When the block fails, nothing is left. A run that is already there is replaced.
    """
    with writing_card(results_folder(parameters.results), card_of(parameters), parameters.model_dump(mode="json")) as w:
        yield w


def card_of(parameters: Parameters) -> dict[str, Any]:
    """Card of a run before it is made: key, kind, hash of the code that it needs, and of all that it is made from."""
    card = {
        "key": key(parameters),
        "kind": parameters.kind,
        "fingerprint": fingerprint(notebook_of(parameters)),
        "origin": origin(parameters),
        "made_from": made_from(parameters),
    }
    return card | ({"notebook": parameters.notebook} if parameters.notebook else {})


@contextlib.contextmanager
def writing_card(results: Path, card: dict[str, Any], values: dict[str, Any]) -> Iterator[Writer]:
    """`writing` for a run that was named elsewhere: `card` as `card_of` gives it, `values` its parameters."""
    results.mkdir(parents=True, exist_ok=True)
    name = card["key"]
    place, hidden = results / name, results / f".{name}.{uuid.uuid4().hex[:8]}"
    hidden.mkdir()
    started = time.time()
    try:
        writer = Writer(hidden)
        yield writer
        writer.json("parameters.json", values)
        writer.json("environment.json", environment())
        files = {
            file.relative_to(hidden).as_posix(): {"bytes": file.stat().st_size, "sha256": checksum(file)}
            for file in sorted(hidden.rglob("*"))
            if file.is_file()
        }
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writer.json(
            "run.json",
            card | {"files": files, "finished": finished, "seconds_writing": round(time.time() - started, 1)},
        )
        for file in (*hidden.rglob("*"), hidden):
            _settle(file)
        replace_folder(hidden, place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _settle(path: Path) -> None:
    """Have the system write it out before it gets its name, so that a power cut can't leave a short file under it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(hidden: Path, place: Path) -> None:
    """Move a folder that was written beside its place there; one that is there already goes."""
    old = hidden.with_name(hidden.name + ".old")
    for _ in range(10):
        if place.exists():
            os.replace(place, old)
        try:
            os.replace(hidden, place)
            break
        except OSError as error:  # another process put the same run there in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def environment() -> dict[str, Any]:
    """Versions and hardware class that a result depends on; no host name, user name or path."""
    torch, versions = sys.modules.get("torch"), {}  # it isn't loaded only to learn of a graphics card
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cxrkit": cxrkit.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cuda": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }


def find(name: str | Path, results: str | Path = "results") -> Run:
    """A run by its key or folder. Raises DataError when there is none, naming some that are there."""
    results = results_folder(results)
    for folder in (results / name, Path(name)):
        if folder.is_dir():
            return Run(folder)
    known = ", ".join(sorted(path.parent.name for path in results.glob("*-*/run.json"))[:8])
    raise DataError(f"no run {str(name)!r} in {results}; there: {known or 'none'}")
