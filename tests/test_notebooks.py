"""Notebooks as files: parameters first, plain and known; nothing left of anybody's last run. nbval runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from cxrkit.study.experiment import ExplainParameters, JudgeParameters, TrainParameters

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
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
    assert {path.stem for path in NOTEBOOKS} >= {"train", "explain", "compare", "explore", "bcos_study"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_holds_plain_parameters(path):
    first = code_cells(read(path))[0]
    assert "parameters" in first.metadata.get("tags", [])
    assert literals(first.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_but_for_checked_text(path):
    for cell in code_cells(read(path)):
        if CHECKED in cell.metadata.get("tags", []):
            assert cell.outputs, "a checked cell needs an output to check"
            assert cell.execution_count == 1, "nbval compares nothing with a cell that was never run"
            assert all(output.output_type == "stream" for output in cell.outputs)
        else:
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_checks_something_and_says_what_it_is_not(path):
    notebook = read(path)
    assert any(CHECKED in cell.metadata.get("tags", []) for cell in code_cells(notebook))
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "In this notebook" in prose
    assert "Not a medical device" in prose


@pytest.mark.parametrize("cls", [TrainParameters, ExplainParameters, JudgeParameters], ids=lambda cls: cls.kind)
def test_parameters_cells_name_every_parameter_in_range(cls):
    values = literals(code_cells(read(FOLDER / f"{cls.kind}.ipynb"))[0].source)
    assert set(values) == set(cls.model_fields)
    cls(**values)
