"""The store of runs: one folder per experiment, written whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import cxrkit
from cxrkit.errors import DataError, ParameterError
from cxrkit.study.experiment import ExplainParameters, JudgeParameters, Parameters, TrainParameters

__all__ = ["Run", "find", "fingerprint", "key", "newest", "project_folder", "results_folder", "table", "writing"]

_KINDS: dict[str, type[Parameters]] = {
    "train": TrainParameters,
    "explain": ExplainParameters,
    "judge": JudgeParameters,
}
# The parts of the package that decide what a run of a kind contains.
_SOURCES = {
    "train": ("data", "models", "metrics/classification.py", "study/training.py"),
    "explain": ("data", "models", "attribution", "metrics", "study/training.py", "study/explaining.py"),
    "judge": ("data", "models", "attribution", "metrics", "study/training.py", "study/judge.py"),
}
_PACKAGES = ("torch", "torchvision", "bcos", "numpy", "pandas", "scikit-learn", "accelerate")


def project_folder() -> Path:
    """The checkout one works in: the nearest folder, upwards from here, that holds `notebooks/grids`; else this one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks" / "grids").is_dir()), here)


def results_folder(name: str | Path = "results") -> Path:
    """Where runs are kept: relative names count from the project, so that notebooks and commands share one store.

    The environment variable CXRKIT_RESULTS moves the default folder elsewhere (a shared disk, a test's folder).
    """
    if str(name) == "results":
        name = os.environ.get("CXRKIT_RESULTS", name)
    return project_folder() / name


@functools.cache  # the package doesn't change under a running program
def fingerprint(kind: str) -> str:
    """Hash of the code that decides a run's content; comments, docstrings and layout don't count.

    A run made by other code is stale: it is made again rather than shown.
    """
    root = Path(cxrkit.__file__).parent
    digest = hashlib.sha256()
    for part in _SOURCES[kind]:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(root).as_posix()).encode())
            digest.update(_meaning(file).encode())
    return digest.hexdigest()[:12]


def _meaning(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.dump(tree)


def key(parameters: Parameters) -> str:
    """Name of the run that these parameters make: readable first, then a hash of all that decides its content.

    That is: the parameters, the package's code, the notebook's cells, the tables of a data folder, and a weights file.
    """
    identity = {"kind": parameters.kind, **parameters.identity(), **_inputs(parameters)}
    text = json.dumps(identity, sort_keys=True) + fingerprint(parameters.kind) + _cells(parameters.kind)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    if isinstance(parameters, TrainParameters):
        alias = "" if parameters.antialias == "none" else f"-{parameters.antialias}"
        return f"train-{parameters.model}{alias}-fold{parameters.fold}-seed{parameters.seed}-{digest}"
    return f"{parameters.kind}-{digest}"


def in_project(path: str | Path) -> Path:
    """A path as parameters name it: relative ones count from the project, whichever folder a notebook runs in."""
    return project_folder() / Path(path).expanduser()


def _inputs(parameters: Parameters) -> dict[str, str]:
    # Data that lies in a folder may change under the same name; its tables are small enough to hash each time.
    root, weights = getattr(parameters, "root", None), getattr(parameters, "weights", None)
    files = sorted(in_project(root).glob("*.csv")) if root else []
    if weights and in_project(weights).is_file():
        files.append(in_project(weights))
    return {f"file {path.name}": _sha256(path) for path in files}


def _cells(kind: str) -> str:
    """Hash of the code cells of a kind's notebook, without its parameters cell; empty where there is no notebook."""
    path = project_folder() / "notebooks" / f"{kind}.ipynb"
    if not path.is_file():
        return ""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        c["source"] for c in cells if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])
    ]
    return hashlib.sha256(json.dumps(["".join(source) for source in code]).encode()).hexdigest()[:10]


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
            self.parameters = _KINDS[self.kind](**self.json("parameters.json"))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.folder / 'parameters.json'}: not a run's parameters ({error}); {_REMEDY}") from None

    def __repr__(self) -> str:
        return f"Run({self.key})"

    def verify(self) -> None:
        """Compare every file with the checksum in `run.json`. Raises DataError naming the first that differs."""
        for name, entry in self.card["files"].items():
            if _sha256(self.folder / name) != entry["sha256"]:
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

    @property
    def stale(self) -> bool:
        """Whether the package's code has changed since the run was made."""
        return self.card["fingerprint"] != fingerprint(self.kind)


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
    if kind not in _KINDS:
        raise DataError(f"{path}: unknown kind of run {kind!r}; known: {', '.join(_KINDS)}")
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
    results = results_folder(parameters.results)
    results.mkdir(parents=True, exist_ok=True)
    name = key(parameters)
    place, hidden = results / name, results / f".{name}.{uuid.uuid4().hex[:8]}"
    hidden.mkdir()
    started = time.time()
    try:
        writer = Writer(hidden)
        yield writer
        writer.json("parameters.json", parameters.model_dump(mode="json"))
        writer.json("environment.json", environment())
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(hidden.iterdir())
        }
        card = {
            "key": name,
            "kind": parameters.kind,
            "fingerprint": fingerprint(parameters.kind),
            "files": files,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds_writing": round(time.time() - started, 1),
        }
        writer.json("run.json", card)
        _replace(hidden, place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _replace(hidden: Path, place: Path) -> None:
    old = hidden.with_name(hidden.name + ".old")
    if place.exists():
        os.replace(place, old)
    os.replace(hidden, place)
    shutil.rmtree(old, ignore_errors=True)


def environment() -> dict[str, Any]:
    """Versions and hardware class that a result depends on; no host name, user name or path."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cxrkit": cxrkit.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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


def newest(kind: str, results: str | Path = "results") -> Run:
    """The run of a kind that finished last. Raises DataError when there is none."""
    results = results_folder(results)
    cards = table(results)
    cards = cards[cards["kind"] == kind] if len(cards) else cards
    if not len(cards):
        raise DataError(f"no {kind} run in {results}; run notebooks/{kind}.ipynb first")
    return Run(results / cards.sort_values("finished")["key"].iloc[-1])


def table(results: str | Path = "results") -> pd.DataFrame:
    """All whole runs, a row each: key, kind, when finished, stale, and every parameter as a column."""
    rows = []
    for folder in sorted(results_folder(results).glob("*/run.json")):
        if folder.parent.name.startswith("."):
            continue
        try:
            run = Run(folder.parent)
        except (DataError, ParameterError):
            continue  # a cut-off or foreign folder is not a result; the grid makes the run again
        rows.append(
            {"key": run.key, "kind": run.kind, "finished": run.card["finished"], "stale": run.stale}
            | run.parameters.identity()
        )
    return pd.DataFrame(rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
