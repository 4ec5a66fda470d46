"""The search: what it tries follows from its seed and its scores, and it goes on where it stopped."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cxrkit import DataError, ParameterError
from cxrkit.train import search
from cxrkit.train.parameters import SearchParameters, TrainParameters


def score(parameters: TrainParameters) -> float:
    """Best at a rate of 1e-5, no decay, patience 3, fold 0, many epochs."""
    return 0.5 - 0.1 * abs(np.log10(parameters.learning_rate) + 5) + 0.01 * parameters.epochs - 0.2 * parameters.fold


def tried(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


def test_the_papers_space_is_the_default_and_its_ten_trials_never_leave_the_first_rung():
    """27 settings get one epoch each before the first gets three: ten trials compare settings after one epoch."""
    parameters = SearchParameters()
    assert {name: len(values) for name, values in parameters.space.items()} == {
        "learning_rate": 4,
        "weight_decay": 5,
        "patience": 3,
    }
    assert search.search(parameters, score=score)["epochs"].tolist() == [1] * 10
    more = search.search(SearchParameters(evaluations=40), score=score)
    assert more["epochs"].tolist() == [1] * 27 + [3] * 9 + [10] * 3 + [30]


def test_it_finds_the_best_and_the_same_seed_gives_the_same_trials():
    parameters = SearchParameters(evaluations=60, folds=[0, 1])
    table = search.search(parameters, score=score)
    assert tried(table).equals(tried(search.search(parameters, score=score)))
    assert not tried(table).equals(tried(search.search(SearchParameters(evaluations=60, seed=1), score=score)))
    assert search.best_of(table, parameters)["learning_rate"] == 1e-5
    assert table["best"].is_monotonic_increasing
    first = table.iloc[0]
    wanted = np.mean([score(parameters.trial({"learning_rate": first["learning_rate"]}, 1, fold)) for fold in (0, 1)])
    assert first["score"] == pytest.approx(wanted)
    for name, choices in parameters.space.items():
        assert set(table[name]) <= set(choices)


def test_a_search_that_was_cut_off_goes_on_after_its_last_trial(tmp_path):
    calls = []

    def counted(parameters):
        calls.append(parameters)
        if len(calls) == 35:
            raise KeyboardInterrupt
        return score(parameters)

    parameters = SearchParameters(evaluations=45)
    with pytest.raises(KeyboardInterrupt):
        search.search(parameters, score=counted, folder=tmp_path)
    resumed = search.search(parameters, score=counted, folder=tmp_path)
    assert len(calls) == 46  # one was lost
    assert tried(resumed).equals(tried(search.search(parameters, score=score)))
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]
    longer = search.search(SearchParameters(evaluations=50), score=counted, folder=tmp_path)
    assert len(calls) == 51
    assert tried(longer[:45]).equals(tried(resumed))


def test_records_that_do_not_belong_are_refused(tmp_path):
    search.search(SearchParameters(evaluations=3), score=score, folder=tmp_path)
    with pytest.raises(DataError, match="a search with other parameters"):
        search.search(SearchParameters(seed=2), score=score, folder=tmp_path)
    record = tmp_path / "trials.json"
    kept = json.loads(record.read_text())
    kept["trials"][1]["epochs"] = 7
    record.write_text(json.dumps(kept))
    with pytest.raises(DataError, match="trial 1 is not what this search asks for"):
        search.search(SearchParameters(), score=score, folder=tmp_path)
    record.write_text("{")
    with pytest.raises(DataError, match="not a record of trials"):
        search.search(SearchParameters(), score=score, folder=tmp_path)


def test_a_trial_without_a_score_is_never_the_best():
    def sometimes(parameters):
        return float("nan") if parameters.learning_rate == 1e-5 else score(parameters)

    parameters = SearchParameters(evaluations=30)
    table = search.search(parameters, score=sometimes)
    assert table["score"].isna().any()
    assert search.best_of(table, parameters)["learning_rate"] != 1e-5


def test_it_trains(tmp_path):
    parameters = SearchParameters(
        training={"dataset_options": {"view": "binary", "images": 40}, "size": 32, "model": "resnet18"},
        space={"learning_rate": [1e-5, 1e-3]},
        evaluations=2,
        max_epochs=2,
        eta=2,
        criterion="loss",
        device="cpu",
        threads=1,
    )
    rows = []
    table = search.search(parameters, report=rows.append, folder=tmp_path)
    assert [row["score"] for row in rows] == table["score"].tolist()
    assert (table["score"] < 0).all()
    assert np.isfinite(table["score"]).all()
    assert (table["seconds"] > 0).all()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"space": {"epochs": [1]}}, r"\['epochs'\] can't stand in training or space"),
        ({"training": {"fold": 1}}, r"\['fold'\] can't stand"),
        ({"space": {"learning_rate": [3]}}, "parameter 'learning_rate' for train"),
        ({"space": {"learning_rate": []}}, "no value for 'learning_rate'"),
        ({"space": {}}, "parameter 'space'"),
        ({"folds": [7]}, "parameter 'fold'"),
        ({"min_epochs": 5, "max_epochs": 3}, "max_epochs 3 must exceed min_epochs 5"),
        ({"training": {"sise": 3}}, "did you mean 'size'"),
    ],
)
def test_searches_that_cannot_be_are_refused(values, problem):
    with pytest.raises(ParameterError, match=problem):
        SearchParameters(**values)
