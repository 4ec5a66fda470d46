"""The name of a run: a hash of what it is (notebook and parameters) and one of what it was made from (code, data)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cxrkit
from cxrkit.files import checksum
from cxrkit.project import in_project, project_folder, results_folder
from cxrkit.study.import_closure import fingerprint, sources
from cxrkit.train.parameters import Parameters, TrainParameters

__all__ = [
    "Names",
    "fingerprint",
    "identity_of",
    "in_project",
    "key",
    "made_from",
    "needed",
    "notebook_of",
    "origin",
    "project_folder",
    "results_folder",
]

_KEY = re.compile(r"^(?P<identity>.+-[0-9a-f]{12})-(?P<origin>[0-9a-f]{8})$")


def key(parameters: Parameters) -> str:
    """Name of the run that these parameters make, `KIND-…-IDENTITY-ORIGIN`: readable first, then two hashes.

    The first is of the notebook's name and the parameters, so runs that differ only in what they were made from share
    everything before the last dash. The second is of `origin`.
    """
    return Names().key(parameters)


class Names:
    """Keys of many runs at one moment: what they are made from is looked at once."""

    def __init__(self) -> None:
        self._origins: dict[tuple, str] = {}

    def key(self, parameters: Parameters) -> str:
        values = parameters.identity()
        inputs = (str(values.get(name)) for name in ("dataset", "root", "weights", "run", "runs"))
        same = (notebook_of(parameters), *inputs)
        if same not in self._origins:
            self._origins[same] = _digest(origin(parameters), 8)
        return f"{_readable(parameters, values)}-{_digest(_identity(parameters, values), 12)}-{self._origins[same]}"


def identity_of(key: str) -> str | None:
    """A key without the hash of what the run was made from; None for a name that is no key."""
    match = _KEY.match(key)
    return match["identity"] if match else None


def origin(parameters: Parameters) -> dict[str, str]:
    """What a run is made from, as short hashes: `version` and `code` of the package, `notebook` (its code cells),
    `data` (manifest, tables of a data folder, weights file) and `runs` (the runs that it needs), where there are any.
    """
    notebook = notebook_of(parameters)
    found = {
        "version": cxrkit.__version__,
        "code": fingerprint(notebook),
        "notebook": _cells(project_folder() / notebook),
        "data": _digest(data, 10) if (data := _inputs(parameters)) else "",
        "runs": ",".join(match["origin"] for name in needed(parameters) if (match := _KEY.match(name))),
    }
    return {name: value for name, value in found.items() if value}


def made_from(parameters: Parameters) -> dict[str, str]:
    """Short hash of each module and file that `origin` sums up: of code, notebook and data."""
    notebook = notebook_of(parameters)
    cells = _cells(project_folder() / notebook)
    data = {name: value[:8] for name, value in _inputs(parameters).items()}
    return sources(notebook) | ({notebook: cells[:8]} if cells else {}) | data


def notebook_of(parameters: Parameters) -> str:
    """Path in the project of the notebook that these parameters belong to."""
    return parameters.notebook or f"notebooks/{parameters.kind}.ipynb"


def _readable(parameters: Parameters, values: dict[str, Any]) -> str:
    parts = [re.sub(r"[^A-Za-z0-9_.]+", "_", parameters.kind).lstrip(".") or "notebook"]
    if isinstance(parameters, TrainParameters):
        parts += [parameters.model] + ([] if parameters.antialias == "none" else [parameters.antialias])
    if parameters.kind not in ("explain", "judge"):
        parts += [f"{name}{values[name]}" for name in ("fold", "seed") if isinstance(values.get(name), int)]
    return "-".join(parts)


def _identity(parameters: Parameters, values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for name in ("run", "runs"):
        if name in values:
            value = values[name]
            short = [(isinstance(one, str) and identity_of(one)) or one for one in _listed(value)]
            values[name] = short if isinstance(value, list) else short[0]
    where = {"notebook": parameters.notebook} if parameters.notebook else {}
    return {"kind": parameters.kind, **where, "parameters": values}


def needed(parameters: Parameters) -> list[str]:
    """Keys or folders of the runs that these parameters name."""
    values = [one for name in ("run", "runs") for one in _listed(getattr(parameters, name, []))]
    return [value for value in values if isinstance(value, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _inputs(parameters: Parameters) -> dict[str, str]:
    # Data that lies in a folder may change under the same name; its tables are small enough to hash.
    found = {name: getattr(parameters, name, None) for name in ("dataset", "root", "weights")}
    dataset, root, weights = (value if isinstance(value, str) and value else None for value in found.values())
    files = sorted(in_project(root).glob("*.csv")) if root else []
    if weights and in_project(weights).is_file():
        files.append(in_project(weights))
    hashes = {f"{path.parent.name}/{path.name}": _of_file(path, checksum) for path in files}
    manifest = Path(cxrkit.__file__).parents[1] / "data_manifests" / f"{dataset}.yaml"
    if dataset and manifest.is_file():
        hashes[f"data_manifests/{manifest.name}"] = _of_file(manifest, checksum)
    return hashes


def _cells(path: Path) -> str:
    """Hash of a notebook's code cells, without its parameters cell; empty where there is no notebook."""
    return _of_file(path, _code_of) if path.is_file() else ""


def _code_of(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    return _digest(["".join(cell["source"]) for cell in code], 10)


def _of_file(path: Path, compute: Callable[[Path], str]) -> str:
    """The hash that `compute` gives, once per state of a file: a plan of thousands of runs asks for the same few."""
    found = path.stat()
    return _of_state(path, compute, (found.st_mtime_ns, found.st_size, found.st_ino))


@functools.lru_cache(maxsize=1000)
def _of_state(path: Path, compute: Callable[[Path], str], state: tuple[int, int, int]) -> str:
    return compute(path)
