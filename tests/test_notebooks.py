"""Notebooks as files: parameters first, plain and known; nothing left of anybody's last run. nbval runs them."""

from __future__ import annotations

import ast
import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import notebook_outputs
import numpy as np
import pytest
from PIL import Image

from cxrkit.study.parameters import ExplainParameters, JudgeParameters
from cxrkit.train.parameters import SearchParameters, TrainParameters
from cxrkit.view.viewer import Bundle

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
CHECKED = "nbval-check-output"


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def literals(source: str) -> dict:
    values = {}
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), f"not a plain assignment: {ast.unparse(statement)}"
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    return values


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"train", "explain", "compare", "explore", "study"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_first_code_cell_holds_plain_parameters(path):
    first = code_cells(read(path))[0]
    assert "parameters" in first.metadata.get("tags", [])
    assert literals(first.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_outputs_are_stripped_but_for_checked_text(path):
    for cell in code_cells(read(path)):
        if CHECKED in cell.metadata.get("tags", []):
            assert cell.outputs, "a checked cell needs an output to check"
            assert cell.execution_count == 1, "nbval compares nothing with a cell that was never run"
            assert all(output.output_type == "stream" for output in cell.outputs)
        else:
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_notebook_checks_something_and_says_what_it_is_not(path):
    notebook = read(path)
    assert any(CHECKED in cell.metadata.get("tags", []) for cell in code_cells(notebook))
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "In this notebook" in prose
    assert "> **Not a medical device.** Nothing here is for clinical use." in prose


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_prose_reads_in_jupyterlab_too(path):
    """It knows no directives: it shows their options as text, and takes the name in the first line away."""
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert re.findall(r"^(?:`{3,}|:{3,}|~{3,})\{.*", prose, re.M) == []


@pytest.mark.parametrize(
    "cls", [TrainParameters, ExplainParameters, JudgeParameters, SearchParameters], ids=lambda cls: cls.kind
)
def test_parameters_cells_name_every_parameter_in_range(cls):
    values = literals(code_cells(read(FOLDER / f"{cls.kind}.ipynb"))[0].source)
    assert set(values) == set(cls.model_fields)
    cls(**values)


def checked(path: Path) -> int:
    return sum(CHECKED in cell.metadata.get("tags", []) for cell in code_cells(read(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_checked_cell_is_lost(path):
    """The count of checked cells is written down; `NOTEBOOK::contents` compares it with what nbval collects."""
    wanted, found = notebook_outputs.expected().get(notebook_outputs.name_of(path), {}), checked(path)
    assert wanted.get("texts") == found, (
        f"{path.name}: {found} cells are tagged {CHECKED}, tests/{notebook_outputs.TABLE.name} says "
        f"{wanted.get('texts')}; {notebook_outputs.remedy(notebook_outputs.name_of(path), wanted | {'texts': found})}"
    )


def test_the_table_names_no_notebook_that_is_gone():
    table = notebook_outputs.expected()
    assert set(table) == {notebook_outputs.name_of(path) for path in NOTEBOOKS}
    for name, entry in table.items():
        assert set(entry) <= {*notebook_outputs.KINDS, "shows"}, name


def picture(size=(40, 30), colours=2, kind="PNG") -> bytes:
    image = Image.new("RGB", size, (10, 20, 30))
    if colours > 1:
        image.putpixel((3, 3), (200, 0, 0))
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("image/png", picture(), None),
        ("image/jpeg", picture(kind="JPEG"), None),
        ("image/svg+xml", b"<svg><path d='M0 0'/></svg>", None),
        ("image/png", picture(colours=1), "one colour"),
        ("image/png", picture(size=(15, 400)), "only 15 x 400"),
        ("image/png", picture()[:60], "can't be read"),
        ("image/svg+xml", b"<svg></svg>", "draws nothing"),
    ],
)
def test_pictures_are_judged_by_their_content(kind, content, problem):
    told = notebook_outputs.wrong_picture(kind, content)
    assert told is None if problem is None else problem in told


def page(html: str) -> dict:
    return {"output_type": "execute_result", "data": {"text/html": html, "text/plain": "<it>"}}


def test_pictures_are_found_wherever_they_are():
    text = base64.b64encode(picture()).decode()
    inside = (
        f'<style>a {{ background: url("data:image/png;base64,AAAA") }}</style><img src="data:image/png;base64,{text}">'
    )
    outputs = [page(inside), {"output_type": "display_data", "data": {"image/png": text + "\n"}}, {"name": "stdout"}]
    counts, _, problems = notebook_outputs.look(outputs, {})
    assert counts == {"pictures": 2, "viewers": 0, "widgets": 0}
    assert problems == []
    grey = base64.b64encode(picture(colours=1)).decode()
    assert (
        "picture 1 has one colour"
        in notebook_outputs.look([page(f'<img src="data:image/png;base64,{grey}">')], {})[2][0]
    )


def bundle() -> Bundle:
    made = Bundle(["a", "b"])
    made.add_image(np.linspace(0, 1, 32 * 32).reshape(1, 32, 32), "one")
    return made.add_series("net", "method", np.full((1, 2, 32, 32), 0.5), np.ones((1, 2)), signed=True) or made


def test_viewers_are_judged_by_their_data():
    made = bundle()
    counts, _, problems = notebook_outputs.look([page(made._repr_html_())], {})
    assert (counts["viewers"], problems) == (1, [])
    empty = made.data | {"series": [made.data["series"][0] | {"maps": {"0/0": {"z": "", "scale": [0, 0]}}}]}
    assert "all zero" in notebook_outputs.wrong_viewer(empty)
    assert "no labels, images or series" in notebook_outputs.wrong_viewer(made.data | {"images": []})


def test_widgets_are_judged_by_their_state():
    models: dict = {}

    def say(kind: str, name: str, state: dict) -> None:
        notebook_outputs.heard({"msg_type": kind, "content": {"comm_id": name, "data": {"state": state}}}, models)

    say("comm_open", "ab1", {"children": ["IPY_MODEL_cd2"], "value": 1})
    view = {"output_type": "display_data", "data": {notebook_outputs.WIDGET: {"model_id": "ab1"}}}
    assert notebook_outputs.look([view], models)[2] == ["widget 1 has no state"], "one inside it was never made"
    say("comm_open", "cd2", {"options": ["Nodule/Mass"]})
    say("comm_msg", "cd2", {"value": "chosen"})
    counts, text, problems = notebook_outputs.look([view], models)
    assert (counts["widgets"], problems) == (1, [])
    assert "Nodule/Mass" in text
    assert "chosen" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("done 2026-01-31T12:00:01Z", "done TIME"),
        ("train-resnet18-fold0-seed0-0123456789ab-01234567 is there", "train-resnet18-fold0-seed0-HASH is there"),
        ("in /home/someone/cxrkit/results now", "in PATH now"),
        ("took 12.5 s, then 3 min", "took DURATION, then DURATION"),
        ("torch 2.13.0+cpu", "torch VERSION"),
        ("12 labels, 0.75 to 1.25, 64 x 64, 5 %", "12 labels, 0.75 to 1.25, 64 x 64, 5 %"),
        ("x/y and 1/2", "x/y and 1/2"),
    ],
)
def test_texts_are_compared_without_what_differs_from_run_to_run(text, expected):
    plugin = pytest.importorskip("nbval.plugin")
    for pattern, replacement in plugin.get_sanitize_patterns(notebook_outputs.SANITISED.read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    assert text == expected


SMALL = [
    ("print('a')", ["nbval-check-output"], "a\n"),
    ("print('took 1.25 s')", ["nbval-check-output"], "took 7 s\n"),
    ("from PIL import Image\nImage.linear_gradient('L')", [], None),
    ("import ipywidgets\nipywidgets.VBox([ipywidgets.Dropdown(options=['Nodule/Mass'])])", [], None),
]


@pytest.fixture(scope="module")
def run_nbval(tmp_path_factory):
    """Runs nbval with the hooks on a small notebook, beside a table of its own; returns what pytest said."""

    def run(cells=SMALL, table: str = "small: {texts: 2, pictures: 1, widgets: 1, shows: [Nodule/Mass]}") -> str:
        root = tmp_path_factory.mktemp("project")
        for folder in ("tests", "notebooks"):
            (root / folder).mkdir()
        for name in ("notebook_outputs.py", "sanitised.cfg"):
            shutil.copy(Path(__file__).with_name(name), root / "tests")
        shutil.copy(FOLDER / "conftest.py", root / "notebooks")
        (root / "tests" / "checked_cells.yaml").write_text(table)
        made = []
        for source, tags, text in cells:
            cell = nbformat.v4.new_code_cell(source, metadata={"tags": tags})
            if text is not None:
                cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
                cell.execution_count = 1
            made.append(cell)
        nbformat.write(nbformat.v4.new_notebook(cells=made), root / "notebooks" / "small.ipynb")
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-rA", "--nbval-lax"]
        told = subprocess.run([*command, "notebooks"], cwd=root, capture_output=True, text=True)
        return told.stdout + told.stderr

    return run


def test_nbval_and_the_table_agree_on_a_small_notebook(run_nbval):
    told = run_nbval()
    assert "5 passed" in told, told


def test_nbval_notices_lost_tags_and_empty_pictures_and_widgets(run_nbval):
    lost = [
        ("print('a')", [], None),
        SMALL[1],
        ("from PIL import Image\nImage.new('L', (64, 64))", [], None),
        ("import ipywidgets\nipywidgets.Dropdown(options=['Other'])", [], None),
    ]
    told = run_nbval(lost)
    assert "1 texts, expected 2" in told, told
    assert "picture 1 has one colour only" in told
    assert "doesn't hold 'Nodule/Mass'" in told
    assert "small: {texts: 1, pictures: 1, widgets: 1}" in told, "the remedy is a line to copy"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_text_from_data_becomes_markup(path):
    """A book page holds what Markdown and HTML objects say as it is: only functions that escape may fill them."""
    calls = re.findall(r"\b(?:Markdown|HTML|Latex)\(\s*(.*)", "\n".join(cell.source for cell in code_cells(read(path))))
    safe = r"(?:study|loaded)\.notice\)|effort\.commands\(.\w+.\)\)|\w+\.caption\)\)"
    assert [call for call in calls if not re.match(safe, call)] == []
