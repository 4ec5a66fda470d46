"""What stays with the book of grids that it doesn't run: tables with what made them, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from book.tools import stored_results
from cxrkit import DataError, ParameterError, grid
from cxrkit.cli import app
from cxrkit.study import published, runs
from papers.bcos import tables as bcos

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SCORES = {
    "signed": 0.3,
    "grid": 0.25,
    "smooth": 0.125,
    "threshold": 0.0,
    "precision": 0.3,
    "recall": 1.0,
    "chance": 0.1,
}


def grid_file(folder: Path, **parameters) -> str:
    common = {"results": str(folder / "results")}
    steps = {
        "train": {
            "notebook": str(NOTEBOOKS / "train.ipynb"),
            "parameters": common | {"dataset_options": {"view": "binary"}} | parameters,
            "product": {"model": ["resnet18", "bcos_resnet18"]},
            "folds": 2,
        },
        "explain": {"notebook": str(NOTEBOOKS / "explain.ipynb"), "after": "train", "parameters": common},
    }
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(steps, sort_keys=False))
    return str(path)


def run(name: str) -> None:
    """As if the grid had run: four patients a fold, scores as above."""
    tasks = grid.plan(name)
    trained = {task.key: task.parameters for task in tasks if task.needs is None}
    for task in tasks:
        fold = trained[task.needs or task.key].fold
        patients = [f"{fold}-{number}" for number in range(4)]
        images = pd.DataFrame({"image_id": patients, "patient_id": patients, "label": "A"})
        with runs.writing(task.parameters) as writer:
            if task.needs is None:
                writer.frame("predictions", images.assign(target=[0.0, 1, 0, 1], probability=[0.1, 0.9, 0.2, 0.7]))
            else:
                method = "bcos" if trained[task.needs].model.startswith("bcos") else "layercam"
                writer.frame("scores", images.assign(**SCORES, method=method, probability=0.9))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "project_folder", lambda: tmp_path)
    return tmp_path


def test_tables_and_their_card_come_back_as_they_were(project):
    name = grid_file(project)
    run(name)
    place = stored_results.keep("bcos", name)
    assert place == project / "book" / "results" / "bcos-made"
    (found,) = stored_results.of("bcos")
    pd.testing.assert_frame_equal(
        found.tables["Networks and methods"], bcos.overview(grid.finished(name)), check_dtype=False
    )
    assert set(found.tables) == {"Networks and methods", "Claims"}
    card = found.card
    assert (card["folds"], card["seeds"], card["runs"]) == ([0, 1], [0], 8)
    assert (card["test_images"], card["test_patients"]) == (8, 8)
    assert card["networks"] == ["resnet18", "bcos_resnet18"]
    assert "Not a medical device" in card["notice"]
    assert "Synthetic radiographs" in found.caption
    assert "2 folds, 1 seed; tested on 8 images of 8 patients" in found.caption
    assert "not a claim" in found.caption
    assert str(project) not in (place / "card.json").read_text().replace(card["command"], "")


def test_what_was_kept_before_is_replaced_and_nothing_else_is_left(project):
    name = grid_file(project)
    run(name)
    place = stored_results.keep("bcos", name)
    (place / "old.csv").write_text("x\n1\n")
    stored_results.keep("bcos", name)
    assert {file.name for file in place.iterdir()} == {"card.json", "networks_and_methods.csv", "claims.csv"}
    assert [folder.name for folder in place.parent.iterdir()] == [place.name]


def test_images_of_a_folder_need_their_source_and_get_no_verdicts(project):
    (project / "images").mkdir()
    (project / "images" / "images.csv").write_text("image_id,file,patient_id,labels\n")
    name = grid_file(project, dataset="folder", root=str(project / "images"), dataset_options={})
    run(name)
    with pytest.raises(ParameterError, match="--source"):
        stored_results.keep("bcos", name)
    assert not (project / "book").exists()
    stored_results.keep("bcos", name, "Images of <b>a friend</b>, CC BY 4.0")
    (found,) = stored_results.of("bcos")
    assert set(found.tables) == {"Networks and methods"}
    assert found.caption.startswith(r"Images of \<b\>a friend\</b\>, CC BY 4.0. Networks: ")


def test_runs_that_are_not_done_are_told_of(project):
    with pytest.raises(DataError, match=r"8 runs of the grid .* aren't done, first train-.*cxrkit grid run"):
        stored_results.keep("bcos", grid_file(project))
    with pytest.raises(ParameterError, match="no paper 'nobody'; known: bcos"):
        stored_results.keep("nobody", "quick")
    with pytest.raises(ParameterError, match="no paper 'nobody'; known: bcos"):
        stored_results.of("nobody")


def test_a_folder_that_is_not_whole_is_named(project):
    place = project / "book" / "results" / "path-full"
    place.mkdir(parents=True)
    with pytest.raises(DataError, match="path-full: not whole"):
        stored_results.of("path")
    (place / "card.json").write_text(json.dumps({"tables": {"Networks": "networks.csv"}}))
    with pytest.raises(DataError, match=r"networks\.csv"):
        stored_results.of("path")


def test_the_command_keeps_a_profile(monkeypatch, tmp_path):
    asked = []
    place = tmp_path / "book" / "results" / "bcos-full"
    monkeypatch.setattr(stored_results, "keep", lambda *given: asked.append(given) or place)
    found = CliRunner().invoke(app, ["grid", "keep", "bcos", "--profile", "full"])
    assert asked == [("bcos", "bcos:full", "")]
    assert "book/results/bcos-full" in found.output.replace("\n", "")


@pytest.mark.parametrize("paper", published.papers())
def test_what_the_project_keeps_is_whole_and_small(paper):
    for found in stored_results.of(paper):
        assert all(len(frame) for frame in found.tables.values())
        assert found.card["commit"]
        assert "/" not in found.card["images"].replace("nihcc.app.box.com/v/", "")
        assert found.caption
    for file in (NOTEBOOKS.parent / "book" / "results").rglob("*"):
        assert file.is_dir() or file.stat().st_size < 200_000
