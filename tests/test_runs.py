"""The store of runs: whole or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest

from cxrkit import DataError
from cxrkit.study import index, runs
from cxrkit.study.parameters import ExplainParameters
from cxrkit.train.parameters import TrainParameters


@pytest.fixture
def parameters(tmp_path) -> TrainParameters:
    return TrainParameters(results=str(tmp_path / "store"))


def write(parameters) -> runs.Run:
    with runs.writing(parameters) as writer:
        writer.frame("history", pd.DataFrame({"epoch": [1, 2], "train_loss": [0.5, 0.25]}))
        writer.frame("predictions", pd.DataFrame({"image_id": ["001"], "patient_id": ["7"], "label": ["NA"]}))
        writer.arrays("maps", maps=np.arange(6, dtype=np.float32))
    return runs.find(runs.key(parameters), parameters.results)


def test_a_run_comes_back_as_it_was_written(parameters):
    run = write(parameters)
    run.verify()
    assert run.parameters == parameters
    assert run.frame("history")["train_loss"].tolist() == [0.5, 0.25]
    assert run.frame("predictions")["image_id"].tolist() == ["001"]
    with np.load(run.folder / "maps.npz", allow_pickle=False) as arrays:
        assert arrays["maps"].tolist() == list(range(6))
    assert not run.stale
    assert index.newest("train", parameters.results).key == run.key
    assert index.table(parameters.results)["key"].tolist() == [run.key]


def test_a_label_called_na_stays_a_label(parameters):
    assert write(parameters).frame("predictions")["label"].tolist() == ["NA"]


def test_nothing_is_left_of_a_run_that_fails(parameters):
    def fail_half_way():
        with runs.writing(parameters) as writer:
            writer.json("half.json", {"a": 1})
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"):
        fail_half_way()
    assert os.listdir(parameters.results) == []


def test_a_run_is_replaced_whole(parameters):
    first = write(parameters)
    with runs.writing(parameters) as writer:
        writer.json("other.json", {})
    assert {path.name for path in first.folder.iterdir()} == {
        "other.json",
        "parameters.json",
        "environment.json",
        "run.json",
    }
    assert len(os.listdir(parameters.results)) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run.folder / "run.json").unlink(), r"run\.json is missing, so the run was cut off"),
        (lambda run: (run.folder / "run.json").write_text('{"key": "x", "ki'), r"run\.json: not a whole run card"),
        (lambda run: (run.folder / "history.csv").unlink(), r"history\.csv: missing"),
        (lambda run: os.truncate(run.folder / "history.csv", 5), r"history\.csv: 5 bytes where"),
    ],
)
def test_a_run_cut_off_half_way_is_named(parameters, damage, message):
    run = write(parameters)
    damage(run)
    with pytest.raises(DataError, match=message):
        runs.Run(run.folder)
    assert len(index.table(parameters.results)) == 0


def test_a_run_with_a_parameter_that_is_gone_can_still_be_opened(parameters):
    run = write(parameters)
    path, card = run.folder / "parameters.json", run.json("run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gone": 0.9}))
    card["files"]["parameters.json"]["bytes"] = path.stat().st_size
    (run.folder / "run.json").write_text(json.dumps(card))
    assert runs.Run(run.folder).parameters == parameters


def test_changed_content_fails_verification(parameters):
    run = write(parameters)
    path = run.folder / "history.csv"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    with pytest.raises(DataError, match=r"history\.csv: content differs"):
        runs.Run(run.folder).verify()


def test_an_unknown_run_is_refused_naming_those_there(parameters):
    run = write(parameters)
    with pytest.raises(DataError, match=run.key):
        runs.find("nothing", parameters.results)


def test_keys_depend_on_what_is_run_not_where(tmp_path):
    key = runs.key(TrainParameters(results="a"))
    assert key == runs.key(TrainParameters(results="b", device="cpu"))
    assert len({key, runs.key(TrainParameters(seed=1)), runs.key(TrainParameters(antialias="flc"))}) == 3
    assert key.startswith("train-bcos_resnet18-fold0-seed0-")
    assert runs.key(ExplainParameters(run=key)) != runs.key(ExplainParameters(run="other"))


def test_keys_follow_the_tables_of_a_folder(tmp_path):
    (tmp_path / "images.csv").write_text("image_id\n1\n")
    parameters = TrainParameters(dataset="folder", root=str(tmp_path))
    before = runs.key(parameters)
    (tmp_path / "images.csv").write_text("image_id\n2\n")
    assert runs.key(parameters) != before


def test_no_machine_is_named_in_a_run(parameters):
    run = write(parameters)
    text = (run.folder / "environment.json").read_text() + (run.folder / "run.json").read_text()
    assert os.uname().nodename not in text
    assert str(run.folder.parent) not in json.dumps(run.json("environment.json"))
