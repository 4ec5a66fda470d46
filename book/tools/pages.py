"""Sphinx extension of the book: every page fits a phone and a screen reader, and ends with how it was made."""

from __future__ import annotations

import ast
import html
import json
import os
import time
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import sphinx.builders

import cxrkit
from book.tools.checkout import commit
from cxrkit.grid.execute import ALLOCATOR
from cxrkit.view import series

__all__ = ["foot", "parameters_of", "setup"]

_AT_ONCE = 4  # pages; a kernel with a network takes about a gigabyte
_IN_A_ROW = 2  # pages that a process takes on before others get their turn; some take a second, some a minute
# They work when all pages have been read, and don't say that this is safe.
_SAFE = {"sphinx-mathjax-offline", "sphinx_multitoc_numbering", "sphinx_jupyterbook_latex"}
_SHOWN = ("torch", "torchvision", "numpy", "bcos")
_STYLE = "margin-top:2rem;padding-top:.6rem;border-top:1px solid var(--pst-color-border,#ccc);font-size:13px"

# Long addresses may break anywhere, numbers in tables nowhere; links stay readable on the grey of striped tables, and
# so does the button back to the top, which narrow screens show. In the dark, what cells put out lies on the page and
# not on the theme's pale grey; pictures stay white.
_LOOK = """<style>
.bd-article p, .bd-article li, .bd-article dd, .bd-article td a, .bd-article code { overflow-wrap: anywhere; }
.bd-article :is(td, th) p { overflow-wrap: break-word; }
.bd-article td:has(a) { min-width: 6em; }
.bd-article .cxr-scroll, .bd-article .pst-scrollable-table-container { overflow-x: auto; max-width: 100%; }
html[data-theme="light"] body { --pst-color-link: #0b5ed7; }
html[data-theme="dark"] body { --pst-color-link: #86b4f6; }
html[data-theme="dark"] body .bd-content div.cell_output .text_html:not(:has(table.dataframe)) {
  background: none; color: inherit; padding: 0;
}
html[data-theme="dark"] body .bd-content div.cell_output figure img { background: #fff; padding: 0; }
.bd-article table caption { color: inherit; }
html[data-theme="light"] body #pst-back-to-top { background-color: #955300; }
body #pst-back-to-top:hover { background-color: #7a3fdc; color: #fff; }
@media screen { .cxr-live img { display: none; } }
@media print { .cxr-interactive { display: none; } }
</style>"""
# What the theme leaves undone: wide tables scroll in a box of their own, which the keyboard reaches; the menu's
# switches say what they open; the list of references holds anchors, so it is no list to a screen reader. Files that
# figures save are named by their page and place in it.
_MEND = """document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) {
    if (table.closest(".cxr, .cxr-scroll, .pst-scrollable-table-container")) continue;
    const box = document.createElement("div");
    box.className = "cxr-scroll";
    table.replaceWith(box);
    box.append(table);
  }
  for (const box of document.querySelectorAll(".cxr-scroll, .pst-scrollable-table-container")) {
    Object.assign(box, { tabIndex: 0, role: "region", ariaLabel: "table" });
  }
  for (const summary of document.querySelectorAll(".bd-sidenav summary")) {
    const link = summary.parentElement.parentElement.querySelector("a");
    summary.ariaLabel = "Pages below: " + (link ? link.textContent.trim() : "");
  }
  for (const list of document.querySelectorAll(".citation-list[role=list]")) list.removeAttribute("role");
  const page = location.pathname.split("/").pop().replace(/\\.html$/, "");
  for (const [place, figure] of document.querySelectorAll("figure:has(.cxr-save)").entries()) {
    for (const link of figure.querySelectorAll(".cxr-save")) link.download = `${page}-${place + 1}-${link.download}`;
  }
});"""


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this when the book's configuration names the extension."""
    # Pages are executed several at a time; each gets its share of the cores.
    app.parallel = max(app.parallel, min(os.cpu_count() or 1, _AT_ONCE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // app.parallel)))
    for name, value in ALLOCATOR.items():  # for the kernels
        os.environ.setdefault(name, value)
    # Sphinx hands out few large parts, of which the last keeps one core busy and the others waiting.
    sphinx.builders.make_chunks = _shares
    app.connect("builder-inited", _allow_parallel)
    app.connect("builder-inited", _share_handlers)
    app.connect("html-page-context", _add_look)
    app.connect("html-page-context", _add_foot)
    app.add_js_file(None, body=_MEND)
    app.add_js_file(None, body=series.script())
    return {"version": cxrkit.__version__, "parallel_read_safe": True, "parallel_write_safe": True}


def _shares(pages: Sequence[Any], _processes: int) -> list[Sequence[Any]]:
    return [pages[start : start + _IN_A_ROW] for start in range(0, len(pages), _IN_A_ROW)]


def _allow_parallel(app: Any) -> None:
    for name in _SAFE & set(app.extensions):
        app.extensions[name].parallel_read_safe = True


def _share_handlers(app: Any) -> None:
    """One page holds what many hold: an extension that names the single page would hide the others' elements there."""
    known = app.registry.translation_handlers
    if app.builder.name == "singlehtml":
        known["singlehtml"] = known.get("html", {}) | known.get("singlehtml", {})


def _add_look(_app: Any, _page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    context["metatags"] = context.get("metatags", "") + _LOOK


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
    if built_from := commit(project):
        facts["commit"] = built_from
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
