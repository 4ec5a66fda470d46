"""A paper is one folder: nothing else has to change when another one is added."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from book.tools import build, checklist, effort, pages, stored_results
from cxrkit import grid
from cxrkit.study import published, runs
from synthesis import tables as synthesis

PROJECT = Path(__file__).resolve().parents[1]

PAPER = """# A toy

```{admonition} In short
{cite:t}`kleinmann2025` would not know it.
```
"""
CHECKLIST = "- {id: tab1, item: Table 1}\n- {id: tab2, item: Table 2, why: the images are private}\n"
GRID = {
    "train": {"notebook": "../../train.ipynb", "parameters": {"dataset_options": {"images": 40}, "epochs": 1}},
    "scores": {"notebook": "measure.ipynb", "after": "train"},
    "profiles": {"full": {"train": {"parameters": {"epochs": 9}}}},
}
CLAIMS = """id,text,published,printed,table,score,side_a,side_b,by,each,absent
better,A beats B,12.0,,scores,value,method == 'a',method == 'b',image_id,,no such method
private,C beats B,1,in prose,scores,value,method == 'c',method == 'b',image_id,,no such method
"""
TABLES = '''"""Paper `toy` beside our runs."""

import pandas as pd

from cxrkit.study import claims


def scores(study):
    """Scores of all runs."""
    return pd.concat([run.frame("scores") for _, run in study.pairs("toy_measure")])


def verdicts(study):
    """The paper's claims tested on a study."""
    return claims.verdicts("toy", study, {"scores": scores})


STORED = {"Scores": scores, "Claims": verdicts}
'''
NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "execution_count": None, "id": "one", "metadata": {"tags": ["parameters"]}, "outputs": [],
         "source": ['run = ""\n', 'results = "results"']},
        {"cell_type": "code", "execution_count": None, "id": "two", "metadata": {"tags": ["item-toy-tab1"]},
         "outputs": [], "source": ["run"]},
    ],
    "metadata": {}, "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with one paper, whose folder is all that was added to it."""
    (tmp_path / "notebooks" / "grids").mkdir(parents=True)
    shutil.copy(PROJECT / "notebooks" / "train.ipynb", tmp_path / "notebooks")
    shutil.copytree(PROJECT / "book" / "foundations", tmp_path / "book" / "foundations")
    folder = tmp_path / "notebooks" / "papers" / "toy"
    folder.mkdir(parents=True)
    (folder / "published").mkdir()
    (folder / "published" / "tab1.csv").write_text("method,value\na,62\nb,50\n")
    for name, text in {"paper.md": PAPER, "checklist.yaml": CHECKLIST, "claims.csv": CLAIMS}.items():
        (folder / name).write_text(text)
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (folder / "tables.py").write_text(TABLES)
    (folder / "measure.ipynb").write_text(json.dumps(NOTEBOOK))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CXRKIT_RESULTS", str(tmp_path / "results"))
    (folder.parent / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "papers"]:
        monkeypatch.delitem(sys.modules, name)  # those of this checkout
    monkeypatch.syspath_prepend(str(tmp_path / "notebooks"))
    return tmp_path


def run_grid():
    """As if the grid had run: eight patients, on whom method a scores 0.1 more than b."""
    for task in grid.plan("toy"):
        patients = [f"p{number}" for number in range(8)]
        images = pd.DataFrame({"image_id": patients, "patient_id": patients, "label": "A"})
        with runs.writing(task.parameters) as writer:
            if task.parameters.kind == "train":
                writer.frame("predictions", images.assign(target=[0.0, 1] * 4, probability=0.5))
            else:
                scores = [images.assign(method=name, value=value) for name, value in (("a", 0.5), ("b", 0.4))]
                writer.frame("scores", pd.concat(scores))


def test_a_sixth_paper_is_one_folder(project):
    run_grid()
    assert published.papers() == ("toy",)
    assert published.citation("toy") == "kleinmann2025"
    assert published.table("toy/tab1")["value"].tolist() == [62, 50]
    assert "toy" in build.grids()
    place = stored_results.keep("toy", "toy")
    assert place == project / "book" / "results" / "toy-toy"
    (stored,) = stored_results.of("toy")
    assert len(stored.tables["Scores"]) == 16
    assert dict(stored.tables["Claims"][["claim", "verdict"]].to_numpy()) == {
        "A beats B": "same direction",
        "C beats B": "can't be tested here: no such method",
    }
    assert checklist.problems("toy") == []
    assert "| ✓ | Table 1 | [measure](../../../notebooks/papers/toy/measure.ipynb) |  |" in checklist.page("toy")
    assert "cxrkit grid run toy --profile full" in effort.commands("toy")
    assert effort.table({"laptop": 1e11}, ("toy",))["trainings"].tolist() == [1, 1]
    assert effort.measured("toy")["kind"].tolist() == ["train", "measure"]
    assert synthesis.counted(synthesis.claims())["claims"].tolist() == [2]
    assert "papermill notebooks/papers/toy/measure.ipynb" in pages.foot(Path.cwd() / "measure.ipynb", project)


def test_commands_find_the_project_from_any_folder_of_it(project):
    run_grid()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (PROJECT, project / "notebooks")))}
    command = [sys.executable, "-c", "from cxrkit.cli import main; main()", "grid", "keep", "toy"]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project / "book")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert (project / "book" / "results" / "toy-toy" / "card.json").is_file()
