"""Builds the Jupyter Book, and only when something that it shows has changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from cxrkit import grid
from cxrkit.errors import CxrkitError
from cxrkit.files import replace_file
from cxrkit.study import runs
from cxrkit.study.published import papers

__all__ = ["as_one", "build", "build_single", "changed", "changes", "contents", "grids"]

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


def grids() -> tuple[str, ...]:
    """The grids whose results the pages show; a run that several of them hold is made once."""
    return ("quick", "benchmark", "training", *papers(), "synthesis")


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
    listed = html.parent / "pages.json"
    before = json.loads(listed.read_text()) if listed.is_file() else {}
    _make(project, "--warningiserror", "--keep-going", "--all")
    after = contents(html)
    listed.write_text(json.dumps(after, indent=1))
    (html.parent / "changed-pages.json").write_text(json.dumps(changes(before, after), indent=1))
    stamp.write_text(f"{state} {index.stat().st_mtime_ns}")  # another tool's build has another time
    return index


def build_single() -> Path:
    """The book as one HTML page, which a browser prints or saves as PDF; from the pages that `build` has executed.

    Builds the book first where it isn't up to date. Raises CxrkitError when a build fails.
    """
    build()
    project = runs.project_folder()
    _make(project, "--builder", "singlehtml")
    return as_one(project / "_build" / "singlehtml")


def as_one(folder: Path) -> Path:
    """Put the single page that Sphinx made where its styles and links expect it; returns it."""
    made, place = folder / "book" / "index.html", folder / "index.html"
    replace_file(place, made.read_text(encoding="utf-8").replace('href="book/index.html#', 'href="#'))
    made.unlink()
    return place


def _make(project: Path, *options: str) -> None:
    tool = Path(sys.executable).with_name("jupyter-book")
    # Pages run with the machine's cores and find their runs through the project, whatever the reader's shell says.
    searched = os.pathsep.join([str(project), str(project / "notebooks"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": searched.rstrip(os.pathsep)}
    outcome = subprocess.run([str(tool), "build", str(project), *options], cwd=project, env=environment)
    if outcome.returncode:
        raise CxrkitError("the book was not built; the messages above name the page")


def changed(index: Path) -> dict[str, list[str]]:
    """The pages that changed, are new or gone since the build before, as the last whole build of `index` noted them."""
    path = index.parent.parent / "changed-pages.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def contents(html: Path) -> dict[str, str]:
    """A hash of what each built page says, without menus, and without the foot, which tells the time."""
    found = {}
    for path in sorted(html.rglob("*.html")):
        if "_static" in path.parts:
            continue
        article = re.search(r"<article.*?</article>", path.read_text(encoding="utf-8"), re.DOTALL)
        text = re.sub(r'<details class="cxr-foot".*?</details>', "", article[0] if article else "", flags=re.DOTALL)
        found[path.relative_to(html).as_posix()] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> dict[str, list[str]]:
    """Pages that changed, are new or are gone between two builds (see `contents`), for whoever reviews the book."""
    return {
        "changed": sorted(page for page in before.keys() & after.keys() if before[page] != after[page]),
        "new": sorted(after.keys() - before.keys()),
        "gone": sorted(before.keys() - after.keys()),
    }


def _state(project: Path) -> str:
    digest = hashlib.sha256()
    for task in grid.plan(grids()):
        card = task.place / "run.json"
        digest.update(card.read_bytes() if card.is_file() else task.key.encode())
    for pattern in _SHOWN:
        for path in sorted(project.glob(pattern)):
            if path.is_file() and ".ipynb_checkpoints" not in path.parts and path.suffix != ".pyc":
                digest.update(path.relative_to(project).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
