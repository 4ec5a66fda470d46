"""Sphinx extension of the book: every page ends with how it was made, and how to run it yourself."""

from __future__ import annotations

import ast
import html
import json
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import cxrkit

__all__ = ["foot", "parameters_of", "setup"]

_SHOWN = ("torch", "torchvision", "numpy", "bcos")
_STYLE = "margin-top:2rem;padding-top:.6rem;border-top:1px solid var(--pst-color-border,#ccc);font-size:13px"


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this when the book's configuration names the extension."""
    app.connect("html-page-context", _add_foot)
    return {"version": cxrkit.__version__, "parallel_read_safe": True, "parallel_write_safe": True}


def _add_foot(app: Any, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    source = next((path for path in Path(app.srcdir).glob(f"{page}.*") if path.suffix in (".ipynb", ".md")), None)
    if source is None or "body" not in context:
        return
    ran = getattr(app.env, "nb_metadata", {}).get(page, {}).get("exec_data") or {}
    context["body"] += foot(source, Path(app.srcdir), ran.get("runtime"))


def foot(source: Path, project: Path, seconds: float | None = None) -> str:
    """The foot of a page: its source, parameters, run time, versions, commit, and commands to run it; HTML, escaped."""
    name = source.relative_to(project).as_posix()
    facts = {"source": name}
    if parameters := parameters_of(source):
        facts["parameters"] = ", ".join(f"{key} = {value!r}" for key, value in parameters.items())
    if seconds is not None:
        facts["executed"] = f"in {seconds:.0f} s when the book was built"
    facts["built"] = time.strftime("%Y-%m-%d, %H:%M UTC", time.gmtime())
    facts["versions"] = _versions()
    if commit := _commit(project):
        facts["commit"] = commit
    if parameters:
        facts["run it"] = f"jupyter lab {name}"
        facts["run it with other values"] = f"papermill {name} out.ipynb -p {next(iter(parameters))} VALUE"
    rows = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return (
        f'<details class="cxr-foot" style="{_STYLE}"><summary>How this page was made</summary><dl>{rows}</dl></details>'
    )


def parameters_of(source: Path) -> dict[str, Any]:
    """The values of a notebook's parameters cell, in its order; empty for a page without one."""
    if source.suffix != ".ipynb":
        return {}
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if not tagged:
        return {}
    body = ast.parse("".join(tagged[0]["source"])).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in body if isinstance(line, ast.Assign)}


@cache
def _versions() -> str:
    known = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return ", ".join([f"cxrkit {cxrkit.__version__}", *(f"{name} {known[name]}" for name in _SHOWN if name in known)])


@cache
def _commit(project: Path) -> str:
    """The commit that the sources stand at, with a word where they were changed since; empty outside a checkout."""
    try:
        said = [
            subprocess.run(["git", *command], cwd=project, capture_output=True, text=True, timeout=20)
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    if any(one.returncode for one in said):
        return ""
    return said[0].stdout.strip() + (", with changes" if said[1].stdout.strip() else "")
