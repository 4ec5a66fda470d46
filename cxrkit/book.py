"""Builds the Jupyter Book, and only when something that it shows has changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from cxrkit.errors import CxrkitError
from cxrkit.study import grid, runs

__all__ = ["GRIDS", "build"]

GRIDS = ("quick", "benchmark")  # whose results the pages show
_SHOWN = (
    "_config.yml",
    "_toc.yml",
    "requirements.txt",
    "book/**/*",
    "notebooks/**/*",
    "cxrkit/**/*.py",
    "cxrkit/**/*.js",
    "cxrkit/**/*.css",
)


def build() -> Path:
    """Build the book of the project one stands in; returns its first page.

    Pages are executed afresh whenever text, notebooks, package or runs changed since the last whole build, and not at
    all otherwise: a page never shows stale results. Warnings are errors. Raises CxrkitError when the build fails.
    """
    project = runs.project_folder()
    html = project / "_build" / "html"
    index, stamp, state = html / "index.html", html / ".built-from", _state(project)
    if stamp.is_file() and index.is_file() and stamp.read_text() == f"{state} {index.stat().st_mtime_ns}":
        return index
    stamp.unlink(missing_ok=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", str(project), "--warningiserror", "--keep-going", "--all"]
    # Pages run with the machine's cores and find their runs through the project, whatever the reader's shell says.
    outcome = subprocess.run(command, cwd=project, env=os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    if outcome.returncode:
        raise CxrkitError("the book was not built; the messages above name the page")
    stamp.write_text(f"{state} {index.stat().st_mtime_ns}")  # another tool's build has another time
    return index


def _state(project: Path) -> str:
    digest = hashlib.sha256()
    for task in (task for name in GRIDS for task in grid.plan(name)):
        card = task.place / "run.json"
        digest.update(card.read_bytes() if card.is_file() else task.key.encode())
    for pattern in _SHOWN:
        for path in sorted(project.glob(pattern)):
            if path.is_file() and ".ipynb_checkpoints" not in path.parts and path.suffix != ".pyc":
                digest.update(path.relative_to(project).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
