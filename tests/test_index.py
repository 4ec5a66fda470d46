"""The table of all runs: always what the runs' own files say."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from cxrkit.study import index, runs
from cxrkit.study.parameters import ExplainParameters, JudgeParameters
from cxrkit.train.parameters import TrainParameters


@pytest.fixture
def store(tmp_path) -> Path:
    """Six runs of three kinds, whose cells are texts, numbers, truth values, lists, mappings and None."""
    folder = tmp_path / "store"
    for seed, root in enumerate([None, "data", None, "data"]):
        options = {"images": 40, "nested": {"a": [1, None, "é"]}} if seed else {}
        write(TrainParameters(results=str(folder), seed=seed, root=root, dataset_options=options))
    write(ExplainParameters(results=str(folder), run="train-1", methods=["saliency"], thresholds=[0.0, 0.5]))
    write(JudgeParameters(results=str(folder), shortcuts={"marker": "Nodule/Mass"}))
    return folder


def write(parameters) -> Path:
    with runs.writing(parameters) as writer:
        writer.frame("history", pd.DataFrame({"epoch": [1, 2]}))
    return Path(parameters.results) / runs.key(parameters)


def plain(folder: Path) -> pd.DataFrame:
    """The same table, the slow way: every run is read."""
    rows = []
    for card in sorted(folder.glob("*/run.json")):
        try:
            run = runs.Run(card.parent)
        except Exception:
            continue
        own = {"key": run.key, "kind": run.kind, "finished": run.card["finished"], "stale": run.stale}
        rows.append(own | run.parameters.identity())
    return pd.DataFrame(rows)


def test_the_table_is_what_the_runs_say(store):
    expected = plain(store)
    assert set(expected["kind"]) == {"train", "explain", "judge"}
    pd.testing.assert_frame_equal(index.table(store), expected)


def test_every_kind_of_cell_survives(store):
    frame = index.table(store).set_index("key")
    for run in map(runs.Run, (path.parent for path in store.glob("*/run.json"))):
        for name, value in run.parameters.identity().items():
            cell = frame.loc[run.key, name]
            assert cell == value or (value is None and pd.isna(cell)), name
        absent = set(frame.columns) - set(run.parameters.identity()) - {"key", "kind", "finished", "stale"}
        assert frame.loc[run.key, list(absent)].isna().all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "history.csv").unlink(),
        lambda folder: os.truncate(folder / "history.csv", 3),
        lambda folder: (folder / "run.json").unlink(),
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "parameters.json").unlink(),
    ],
)
def test_a_damaged_run_leaves_and_comes_back_when_mended(store, tmp_path, damage):
    expected = index.table(store)
    folder = store / expected["key"][0]
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    damage(folder)
    assert expected["key"][0] not in index.table(store)["key"].tolist()
    assert index.table(store)["key"].tolist() == plain(store)["key"].tolist()
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    pd.testing.assert_frame_equal(index.table(store), expected)


def test_stale_follows_the_code_of_now(store, monkeypatch):
    monkeypatch.setattr(runs, "fingerprint", lambda name: "changed" if name == "notebooks/train.ipynb" else "same")
    frame = index.table(store)
    assert frame.loc[frame["kind"] == "train", "stale"].all()


def test_a_folder_that_is_not_there_or_empty_has_an_empty_table(tmp_path):
    assert index.table(tmp_path / "nothing").empty
    assert index.table(tmp_path).empty
    assert list(tmp_path.iterdir()) == []


def test_hidden_and_foreign_folders_are_no_runs(store):
    shutil.copytree(store / index.table(store)["key"][0], store / ".half-written")
    (store / "other").mkdir()
    (store / "other" / "run.json").write_text(json.dumps({"kind": "other"}))
    (store / "run.json").write_text("{}")
    assert len(index.table(store)) == 6


def test_the_newest_run_is_the_one_that_finished_last(store):
    for path in store.glob("train-*/run.json"):
        card = json.loads(path.read_text())
        card["finished"] = f"2001-01-0{1 + int('seed2' in path.parent.name)}T00:00:00Z"
        path.write_text(json.dumps(card))
    assert "seed2" in index.newest("train", store).key


def test_looking_at_the_table_needs_no_torch(store):
    code = f"import sys; from cxrkit.study import index; index.table({str(store)!r}); sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
