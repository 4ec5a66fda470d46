"""The name of a run: a hash of what it is (notebook and parameters) and one of what it was made from (code, data)."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cxrkit
from cxrkit.files import checksum, replace_file
from cxrkit.project import in_project, project_folder, results_folder
from cxrkit.train.parameters import Parameters, TrainParameters

if TYPE_CHECKING:
    from cxrkit.study.notebook import NotebookParameters

__all__ = [
    "KINDS",
    "Names",
    "fingerprint",
    "identity_of",
    "in_project",
    "key",
    "origin",
    "project_folder",
    "results_folder",
]

_TRAINED = ("data", "phantom", "models", "metrics/classification*.py", "train")
_EXPLAINED = (
    "data",
    "phantom",
    "models",
    "attribution",
    "metrics",
    "train/devices.py",
    "train/loader.py",
    "train/setup.py",
)
# The parts of the package that decide what a run of a kind contains.
_SOURCES = {
    "train": _TRAINED,
    "search": _TRAINED,
    "explain": (*_EXPLAINED, "study/explaining.py"),
    "judge": (*_EXPLAINED, "study/phantom_benchmark.py"),
}
KINDS = frozenset(_SOURCES)  # of runs that their notebooks write themselves
# What any other notebook can't depend on: these only start runs, name them, or draw.
_NEVER = ("cli", "terminal.py", "book.py", "view/", "grid/", "study/index.py", "study/run_key.py")
_KEY = re.compile(r"^(?P<identity>.+-[0-9a-f]{12})-(?P<origin>[0-9a-f]{8})$")


def key(parameters: Parameters | NotebookParameters) -> str:
    """Name of the run that these parameters make, `KIND-…-IDENTITY-ORIGIN`: readable first, then two hashes.

    The first is of the notebook's name and the parameters, so runs that differ only in what they were made from share
    everything before the last dash. The second is of `origin`.
    """
    return Names().key(parameters)


class Names:
    """Keys of many runs at one moment: what they are made from is looked at once."""

    def __init__(self) -> None:
        self._origins: dict[tuple, str] = {}

    def key(self, parameters: Parameters | NotebookParameters) -> str:
        values = parameters.identity()
        inputs = tuple(str(values.get(name)) for name in ("dataset", "root", "weights", "run", "runs"))
        same = (parameters.kind, getattr(parameters, "notebook", ""), *inputs)
        if same not in self._origins:
            self._origins[same] = _digest(origin(parameters), 8)
        return f"{_readable(parameters, values)}-{_digest(_identity(parameters, values), 12)}-{self._origins[same]}"


def identity_of(key: str) -> str | None:
    """A key without the hash of what the run was made from; None for a name that is no key."""
    match = _KEY.match(key)
    return match["identity"] if match else None


def origin(parameters: Parameters | NotebookParameters) -> dict[str, str]:
    """What a run is made from, as short hashes: `version` and `code` of the package, `notebook` (its code cells),
    `data` (manifest, tables of a data folder, weights file) and `runs` (the runs that it needs), where there are any.
    """
    path = getattr(parameters, "notebook", f"notebooks/{parameters.kind}.ipynb")
    made_from = {
        "version": cxrkit.__version__,
        "code": fingerprint(parameters.kind),
        "notebook": _cells(project_folder() / path),
        "data": _digest(data, 10) if (data := _inputs(parameters)) else "",
        "runs": ",".join(match["origin"] for name in _needed(parameters) if (match := _KEY.match(name))),
    }
    return {name: value for name, value in made_from.items() if value}


def _readable(parameters: Parameters | NotebookParameters, values: dict[str, Any]) -> str:
    parts = [re.sub(r"[^A-Za-z0-9_.]+", "_", parameters.kind).lstrip(".") or "notebook"]
    if isinstance(parameters, TrainParameters):
        parts += [parameters.model] + ([] if parameters.antialias == "none" else [parameters.antialias])
    if parameters.kind not in ("explain", "judge"):
        parts += [f"{name}{values[name]}" for name in ("fold", "seed") if isinstance(values.get(name), int)]
    return "-".join(parts)


def _identity(parameters: Parameters | NotebookParameters, values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for name in ("run", "runs"):
        if name in values:
            value = values[name]
            short = [(isinstance(one, str) and identity_of(one)) or one for one in _listed(value)]
            values[name] = short if isinstance(value, list) else short[0]
    where = {"notebook": parameters.notebook} if hasattr(parameters, "notebook") else {}
    return {"kind": parameters.kind, **where, "parameters": values}


def _needed(parameters: Parameters | NotebookParameters) -> list[str]:
    values = [one for name in ("run", "runs") for one in _listed(getattr(parameters, name, []))]
    return [value for value in values if isinstance(value, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


@functools.cache  # the package doesn't change under a running program
def fingerprint(kind: str) -> str:
    """Hash of the code that decides a run's content; comments, docstrings and layout don't count.

    A run made by other code is stale: it is made again rather than shown. For a notebook of which the package knows
    nothing, nearly all its code counts.
    """
    root = Path(cxrkit.__file__).parent
    files: list[Path] = []
    for part in _SOURCES.get(kind, ("**/*.py",)):
        for path in sorted(root.glob(part)):
            files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    digest = hashlib.sha256()
    with _remembered() as meanings:
        for file in files:
            name = file.relative_to(root).as_posix()
            if kind in _SOURCES or not name.startswith(_NEVER):
                digest.update(name.encode() + meanings(file).encode())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _remembered() -> Iterator[Callable[[Path], str]]:
    """What files of the package mean, as hashes. Reading them takes a second, so what was found is kept among the
    grid's own files, where there are any, until a file changes in size or time."""
    path = results_folder() / ".grid" / "code.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        before = len(known)
    except (OSError, ValueError, TypeError):
        known, before = {}, 0

    def meaning(file: Path) -> str:
        found = file.stat()
        name = _digest([str(file), found.st_mtime_ns, found.st_size], 20)
        if not isinstance(known.get(name), str):
            known[name] = _meaning(file)
        return known[name]

    yield meaning
    if len(known) > before and path.parent.is_dir():
        with contextlib.suppress(OSError):
            replace_file(path, json.dumps(dict(list(known.items())[-2000:])))


@functools.cache
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
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _inputs(parameters: Parameters | NotebookParameters) -> dict[str, str]:
    # Data that lies in a folder may change under the same name; its tables are small enough to hash.
    found = {name: getattr(parameters, name, None) for name in ("dataset", "root", "weights")}
    dataset, root, weights = (value if isinstance(value, str) and value else None for value in found.values())
    files = sorted(in_project(root).glob("*.csv")) if root else []
    if weights and in_project(weights).is_file():
        files.append(in_project(weights))
    hashes = {f"file {path.name}": _of_file(path, checksum) for path in files}
    manifest = Path(cxrkit.__file__).parents[1] / "data_manifests" / f"{dataset}.yaml"
    if dataset and manifest.is_file():
        hashes["manifest"] = _of_file(manifest, checksum)
    return hashes


def _cells(path: Path) -> str:
    """Hash of a notebook's code cells, without its parameters cell; empty where there is no notebook."""
    return _of_file(path, _code_of) if path.is_file() else ""


def _code_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        c["source"] for c in cells if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])
    ]
    return hashlib.sha256(json.dumps(["".join(source) for source in code]).encode()).hexdigest()[:10]


_known: dict[tuple[str, Any], tuple[tuple[int, int, int], str]] = {}


def _of_file(path: Path, compute) -> str:
    """What `compute` says of a file, once per state of it: a plan of thousands of runs asks for the same few files."""
    found = path.stat()
    state = (found.st_mtime_ns, found.st_size, found.st_ino)
    kept = _known.get((str(path), compute))
    if kept is None or kept[0] != state:
        kept = _known[str(path), compute] = (state, compute(path))
    return kept[1]
