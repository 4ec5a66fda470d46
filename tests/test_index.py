"""The table of all runs: always what the runs' own files say, whatever has become of the index."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
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


def opened(monkeypatch) -> list[str]:
    """The names of the run folders that are read from now on."""
    names = []
    real = runs.Run.__init__

    def read(self, folder):
        names.append(Path(folder).name)
        real(self, folder)

    monkeypatch.setattr(runs.Run, "__init__", read)
    return names


def test_the_table_is_what_the_runs_say_read_or_remembered(store, monkeypatch):
    expected = plain(store)
    assert set(expected["kind"]) == {"train", "explain", "judge"}
    names = opened(monkeypatch)
    pd.testing.assert_frame_equal(index.table(store), expected)
    assert len(names) == 6
    pd.testing.assert_frame_equal(index.table(store), expected)
    assert len(names) == 6, "nothing is read twice"
    pd.testing.assert_frame_equal(index.table(store), expected)


def test_every_kind_of_cell_survives(store):
    index.table(store)
    frame = index.table(store).set_index("key")
    for run in map(runs.Run, (path.parent for path in store.glob("*/run.json"))):
        for name, value in run.parameters.identity().items():
            cell = frame.loc[run.key, name]
            assert cell == value or (value is None and pd.isna(cell)), name
        absent = set(frame.columns) - set(run.parameters.identity()) - {"key", "kind", "finished", "stale"}
        assert frame.loc[run.key, list(absent)].isna().all()


def test_cells_of_one_list_are_not_shared(store):
    index.table(store)
    frame = index.table(store)
    options = frame.loc[frame["kind"] == "train", "dataset_options"].tolist()
    options[1]["images"] = 0
    assert options[2]["images"] == options[3]["images"] == 40


def test_only_what_is_new_or_changed_is_read_and_what_is_gone_leaves(store, monkeypatch):
    first = index.table(store)
    names = opened(monkeypatch)
    added = write(TrainParameters(results=str(store), seed=77))
    names.clear()
    assert len(index.table(store)) == 7
    assert names == [added.name]
    shutil.rmtree(added)
    names.clear()
    pd.testing.assert_frame_equal(index.table(store), first)
    assert names == []
    again = write(TrainParameters(results=str(store), seed=0))  # replaced by a run of the same name
    names.clear()
    assert len(index.table(store)) == 6
    assert names == [again.name]


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
def test_a_run_damaged_after_it_was_indexed_leaves_and_comes_back_when_mended(store, tmp_path, damage):
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


def test_a_damaged_or_foreign_index_is_made_again(store):
    expected = index.table(store)
    path = store / index.FILE
    good = path.read_bytes()
    draw = random.Random(0)
    for number in range(120):
        content = bytearray(good)
        if number % 3 == 0:
            content = content[: draw.randrange(len(good))]
        else:
            for _ in range(draw.choice([1, 3, 30])):
                content[draw.randrange(len(good))] = draw.randrange(256)
        path.write_bytes(content)
        pd.testing.assert_frame_equal(index.table(store), expected)
    path.write_text("another program's")
    pd.testing.assert_frame_equal(index.table(store), expected)
    path.unlink()
    path.mkdir()
    pd.testing.assert_frame_equal(index.table(store), expected)


def test_an_index_of_other_code_is_made_again(store, monkeypatch):
    expected = index.table(store)
    names = opened(monkeypatch)
    monkeypatch.setattr(index, "_code", lambda: "other")
    pd.testing.assert_frame_equal(index.table(store), expected)
    assert len(names) == 6


def test_stale_follows_the_code_of_now(store, monkeypatch):
    index.table(store)
    monkeypatch.setattr(runs, "fingerprint", lambda name: "changed" if name == "notebooks/train.ipynb" else "same")
    frame = index.table(store)
    assert frame.loc[frame["kind"] == "train", "stale"].all()


def test_an_index_that_cannot_be_written_costs_time_only(store, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert len(index.table(store)) == 6
    assert list((store / index.FILE).parent.iterdir()) == []


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


def _ask(store: Path) -> list[str]:
    return index.table(store)["key"].tolist()


def test_two_processes_at_once_see_the_same(store):
    expected = plain(store)["key"].tolist()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for _ in range(8):
            (store / index.FILE).unlink(missing_ok=True)
            assert all(keys == expected for keys in pool.map(_ask, [store] * 4))
    assert list((store / index.FILE).parent.iterdir()) == [store / index.FILE]


def test_the_newest_run_is_the_one_that_finished_last(store):
    for path in store.glob("train-*/run.json"):
        card = json.loads(path.read_text())
        card["finished"] = f"2001-01-0{1 + int('seed2' in path.parent.name)}T00:00:00Z"
        path.write_text(json.dumps(card))
    assert "seed2" in index.newest("train", store).key


def test_looking_at_the_table_needs_no_torch(store):
    code = f"import sys; from cxrkit.study import index; index.table({str(store)!r}); sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
