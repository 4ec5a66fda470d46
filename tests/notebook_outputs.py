"""What nbval leaves out: pictures and widgets by their content, and how much of each notebook is checked at all.

The hooks below watch nbval while it runs a notebook, so nothing is executed twice; `notebooks/conftest.py` brings them
in. With `--executed FOLDER`, nbval compares what a build of the book has kept in FOLDER and runs only the rest.
`checked_cells.yaml` says how many cells of each notebook have their text compared, and how many pictures, viewers
and widgets it shows. A lost tag, or a figure that isn't drawn any more, then fails as `NOTEBOOK::contents`.
"""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

TABLE = Path(__file__).with_name("checked_cells.yaml")
SANITISED = Path(__file__).with_name("sanitised.cfg")
KINDS = ("texts", "pictures", "viewers", "widgets")
WIDGET = "application/vnd.jupyter.widget-view+json"
SMALLEST = 16  # pixels
_PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
_EMBEDDED = re.compile(r"data:(image/[\w+.-]+);base64,([A-Za-z0-9+/=]+)")
_VIEWER = re.compile(r'data-cxr\b.*?<script type="application/json">(.*?)</script>', re.DOTALL)
_STYLE = re.compile(r"<style\b.*?</style>", re.DOTALL)  # an image in a style sheet is no picture
_MODEL = re.compile(r"IPY_MODEL_([0-9a-f]+)")


def expected() -> dict[str, dict[str, Any]]:
    """By notebook: how many `texts` are compared, and where it is said how many `pictures`, `viewers` and `widgets`
    there are, and the words that its widgets' state must hold (`shows`)."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def name_of(notebook: Path) -> str:
    """The path of a notebook below `notebooks`, without its ending."""
    return notebook.relative_to(TABLE.parents[1] / "notebooks").with_suffix("").as_posix()


def remedy(name: str, found: dict[str, Any]) -> str:
    line = ", ".join(f"{kind}: {found[kind]}" for kind in KINDS if found.get(kind))
    return f"if that is meant, the line in tests/{TABLE.name} is\n  {name}: {{{line}}}"


def embedded(outputs: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Media type and bytes of every picture in a cell's outputs, those inside HTML included."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        kind = next((kind for kind in _PICTURES if kind in data), None)  # the same picture may come in several forms
        if kind is not None:
            text = "".join(data[kind])
            found.append((kind, text.encode() if kind == "image/svg+xml" else base64.b64decode(text)))
        page = _STYLE.sub("", "".join(data.get("text/html", "")))
        found += [(kind, base64.b64decode(text)) for kind, text in _EMBEDDED.findall(page)]
    return found


def viewers(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data of every comparison viewer in a cell's outputs."""
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    return [json.loads(text) for page in pages for text in _VIEWER.findall(page)]


def wrong_picture(kind: str, content: bytes) -> str | None:
    """What is wrong with a picture: unreadable, hardly there, or of one colour; None for nothing."""
    if kind == "image/svg+xml":
        return None if re.search(rb"<(path|rect|circle|line|poly\w+|text|image|use)\b", content) else "draws nothing"
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.convert("RGB")
    except OSError as error:
        return f"can't be read: {error}"
    if min(pixels.size) < SMALLEST:
        return f"is only {pixels.size[0]} x {pixels.size[1]} pixels"
    return "has one colour only" if all(low == high for low, high in pixels.getextrema()) else None


def wrong_viewer(data: dict[str, Any]) -> str | None:
    """What is wrong with a viewer's data: nothing to choose, a picture that shows nothing, maps that are all zero."""
    if not data.get("labels") or not data.get("images") or not data.get("series"):
        return "holds no labels, images or series"
    for record in data["images"]:
        if problem := wrong_picture("image/png", base64.b64decode(record["png"])):
            return f"image {record['id']} {problem}"
    for entry in data["series"]:
        if entry["maps"] and not any(max(one["scale"]) > 0 for one in entry["maps"].values()):
            return f"maps of {entry['model']}, {entry['method']} are all zero"
    return None


def widget_state(model: str, models: dict[str, dict[str, Any]]) -> str | None:
    """The state of a widget and of those inside it as JSON text; None where one of them was never made."""
    texts, todo, seen = [], [model], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        if not models.get(name):
            return None
        seen.add(name)
        texts.append(json.dumps(models[name], default=str))
        todo += _MODEL.findall(texts[-1])
    return "\n".join(texts)


def heard(message: dict[str, Any], models: dict[str, dict[str, Any]]) -> None:
    """Keep the state of widgets up to date with a message of the kernel."""
    if message["msg_type"] in ("comm_open", "comm_msg"):
        content = message["content"]
        state = content.get("data", {}).get("state")
        if isinstance(state, dict):
            models.setdefault(content["comm_id"], {}).update(state)


def look(outputs: list[dict[str, Any]], models: dict[str, dict[str, Any]]) -> tuple[dict[str, int], str, list[str]]:
    """Of one cell: how many pictures, viewers and widgets; the widgets' state; and what is wrong with them."""
    pictures, shown = embedded(outputs), viewers(outputs)
    views = [output["data"][WIDGET]["model_id"] for output in outputs if WIDGET in output.get("data", {})]
    states = [widget_state(view, models) for view in views]
    problems = [f"picture {n} {p}" for n, one in enumerate(pictures, 1) if (p := wrong_picture(*one))]
    problems += [f"viewer {n} {p}" for n, one in enumerate(shown, 1) if (p := wrong_viewer(one))]
    problems += [f"widget {n} has no state" for n, state in enumerate(states, 1) if state is None]
    counts = {"pictures": len(pictures), "viewers": len(shown), "widgets": len(views)}
    return counts, "\n".join(filter(None, states)), problems


class Contents(pytest.Item):
    """The last item of a notebook: what was checked and shown, against the table."""

    def runtest(self) -> None:
        file, name = self.parent, name_of(self.parent.path)
        if file.cells_run < file.cells_collected:
            pytest.skip("not all cells of this notebook were run")
        wanted, found = expected().get(name, {}), file.found
        if self.config.getoption("write_checked"):
            return write(name, found)
        differing = [
            f"{found[kind]} {kind}, expected {wanted.get(kind, 'no number')}"
            for kind in KINDS
            if (kind == "texts" or kind in wanted) and found[kind] != wanted.get(kind)
        ]
        lost = [word for word in wanted.get("shows", []) if json.dumps(word)[1:-1] not in file.widget_text]
        differing += [f"its widgets' state doesn't hold {word!r}" for word in lost]
        if differing:
            raise AssertionError(f"{name}: {'; '.join(differing)}; {remedy(name, found)}")
        return None

    def repr_failure(self, excinfo, style=None) -> str:
        return str(excinfo.value)

    def reportinfo(self):
        return self.path, None, f"contents of {self.path.name}"


def write(name: str, found: dict[str, int]) -> None:
    """Put what was found into the table, keeping its comments' place at the top and what a notebook `shows`."""
    table = expected()
    kept = {"shows": table[name]["shows"]} if "shows" in table.get(name, {}) else {}
    table[name] = {kind: found[kind] for kind in KINDS if found[kind]} | kept
    head = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [f"{key}: {yaml.safe_dump(table[key], default_flow_style=True, sort_keys=False, width=1000).strip()}"
             for key in sorted(table)]  # fmt: skip
    TABLE.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def is_notebook(node: Any) -> bool:
    return type(node).__name__ == "IPyNbFile"


def pytest_addoption(parser) -> None:
    parser.addoption("--write-checked", action="store_true", help="write what the notebooks show into the table")
    parser.addoption("--executed", type=Path, help="folder of notebooks as a build of the book executed them")


def executed(notebook: Path, folder: Path | None) -> nbformat.NotebookNode | None:
    """A notebook as a build of the book executed it; None where the build left it out, or its code was another."""
    path = folder / notebook.relative_to(TABLE.parents[1]) if folder else None
    if path is None or not path.is_file():
        return None
    kept, asked = (nbformat.read(one, as_version=4) for one in (path, notebook))
    same = [cell.source for cell in kept.cells] == [cell.source for cell in asked.cells]
    return kept if same and all(cell.execution_count for cell in code_of(kept)) else None


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def compare(item: Any, outputs: list[nbformat.NotebookNode]) -> None:
    """Compare a cell as nbval does, with outputs that a build of the book has kept instead of a kernel's."""
    from nbval.plugin import coalesce_streams

    item.test_outputs = coalesce_streams(told_once(outputs))
    checked = item.options["check"] and item.cell.execution_count is not None
    if checked and not item.compare_outputs(item.test_outputs, coalesce_streams(item.cell.outputs)):
        item.raise_cell_error("Cell outputs differ", "\n".join(item.comparison_traceback))


def told_once(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without the later parts of a stream that MyST-NB has added to the first while it drew the page."""
    left = list(outputs)
    for name in ("stdout", "stderr"):
        first, *later = [one for one in outputs if one.get("name") == name] or [None]
        if later and first.text.endswith("".join(one.text for one in later)):
            left = [one for one in left if not any(one is other for other in later)]
    return left


def replay(collector: Any, cells: list[Any], kept: nbformat.NotebookNode) -> None:
    """Let a notebook's items compare what was kept; no kernel starts."""
    collector.setup = collector.setup_sanitize_files
    widgets = kept.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    collector.models = {name: entry["state"] for name, entry in widgets.get("state", {}).items()}
    for item, cell in zip(cells, code_of(kept), strict=True):
        item.runtest = partial(compare, item, cell.outputs)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if is_notebook(collector) and report.passed:
        cells = [item for item in report.result if hasattr(item, "cell")]
        collector.cells_collected, collector.cells_run = len(cells), 0
        collector.found = dict.fromkeys(KINDS, 0)
        collector.found["texts"] = sum(
            bool(item.options["check"]) and item.cell.execution_count is not None for item in cells
        )
        collector.widget_text, collector.models = "", {}
        collector.get_sanitize_files = lambda: [SANITISED]
        receive = collector.get_kernel_message

        def listen(*arguments, **options):
            message = receive(*arguments, **options)
            heard(message, collector.models)
            return message

        collector.get_kernel_message = listen
        if (kept := executed(collector.path, collector.config.getoption("executed"))) is not None:
            replay(collector, cells, kept)
        report.result.append(Contents.from_parent(collector, name="contents"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if is_notebook(item.parent) and hasattr(item, "cell"):
        file = item.parent
        counts, text, problems = look(item.test_outputs or [], file.models)
        file.cells_run += 1
        for kind, count in counts.items():
            file.found[kind] += count
        file.widget_text += text
        if problems:
            item.raise_cell_error("; ".join(problems))
    return result
