"""Print the test files that the changes since the last commit concern: `python tests/changed.py [COMMIT]`.

A test is concerned where it changed itself, or uses a changed module by name. Tests that only meet a change through
other modules are left to `make test`, and so are the book, which takes minutes, and all but the closest files where
many are concerned.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cxrkit
from cxrkit.study.import_closure import Code, Source

PROJECT = Path(__file__).resolve().parents[1]
LONG = {"tests/test_book.py"}
MOST = 12  # files: what two cores run in less than two minutes


def changed(commit: str = "HEAD") -> set[str]:
    """Paths in the project that differ from a commit, or are new."""
    commands = (["diff", "--name-only", commit], ["ls-files", "--others", "--exclude-standard"])
    told = [
        subprocess.run(["git", *command], cwd=PROJECT, capture_output=True, text=True).stdout for command in commands
    ]
    return set("".join(told).split("\n")) - {""}


def modules(paths: set[str]) -> set[str]:
    """The modules among some paths, as tests name them."""
    names = {path.removeprefix("notebooks/").removesuffix(".py") for path in paths if path.endswith(".py")}
    return {name.removesuffix("/__init__").replace("/", ".") for name in names if not name.startswith("tests/")}


def homes(code: Code, name: str) -> list[str]:
    """A dotted name, and where the package that it goes through takes it from."""
    package, _, last = name.rpartition(".")
    path = code.path(package) if package else None
    source = code.source(path, package) if path is not None else Source()
    return [name, *source.names.get(last, ()), *filter(None, [source.lazy.get(last)])]


def concerned(paths: set[str]) -> list[str]:
    """The test files that changed or that use one of the changed modules, the closest first: changed ones, then those
    that use little else. For a module that no test uses by name, those that use its package and speak of it."""
    code = Code(Path(cxrkit.__file__).parent, PROJECT)
    uses = {}
    for test in sorted((PROJECT / "tests").glob("test_*.py")):
        names = code.source(test, test.stem).uses
        uses[test.relative_to(PROJECT).as_posix()] = {home for name, _ in names for home in homes(code, name)}
    found = paths & uses.keys()
    for module in modules(paths):
        found |= _using(module, uses) or _speaking_of(module, uses)
    return sorted(found - LONG, key=lambda test: (test not in paths, len(uses[test]), test))


def _using(module: str, uses: dict[str, set[str]]) -> set[str]:
    return {test for test, names in uses.items() if any(f"{name}.".startswith(f"{module}.") for name in names)}


def _speaking_of(module: str, uses: dict[str, set[str]]) -> set[str]:
    package, _, name = module.rpartition(".")
    users = _using(package, uses) if package else set()
    return {test for test in users if re.search(rf"\b{name}\b", (PROJECT / test).read_text("utf-8"))}


if __name__ == "__main__":
    found = concerned(changed(*sys.argv[1:2]))
    print("\n".join(found[:MOST]))
    if len(found) > MOST:
        print(f"{len(found) - MOST} more test files use what changed; `make test` runs them", file=sys.stderr)
