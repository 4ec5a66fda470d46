"""Parameters: what is allowed, and how wrong ones are refused."""

from __future__ import annotations

import pytest

from cxrkit import ParameterError
from cxrkit.study.parameters import ExplainParameters
from cxrkit.train.parameters import TrainParameters


def test_unknown_name_is_refused_with_the_near_one():
    with pytest.raises(ParameterError, match=r"unknown parameter 'learning_rat'.*did you mean 'learning_rate'"):
        TrainParameters(learning_rat=0.1)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"fold": 5}, "fold"),
        ({"size": 16}, "size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"antialias": "gauss"}, "antialias"),
        ({"device": "gpu"}, "device"),
        ({"epochs": "many"}, "epochs"),
    ],
)
def test_values_out_of_range_are_named(values, name):
    with pytest.raises(ParameterError, match=f"parameter '{name}'"):
        TrainParameters(**values)


@pytest.mark.parametrize("thresholds", [[0.5, 1.5], [0.1, 0.1], []])
def test_thresholds_are_distinct_shares(thresholds):
    with pytest.raises(ParameterError, match="thresholds"):
        ExplainParameters(thresholds=thresholds)


def test_every_problem_is_told_at_once():
    with pytest.raises(ParameterError) as error:
        TrainParameters(fold=9, epoch=3)
    assert "'fold'" in str(error.value)
    assert "'epoch'" in str(error.value)


def test_a_fresh_notebook_may_hold_parameters_only():
    assert TrainParameters.from_notebook({"In": ["", "a"], "fold": 3, "_hidden": 1}).fold == 3
    with pytest.raises(ParameterError, match="unknown parameter 'modle'"):
        TrainParameters.from_notebook({"In": ["", "a", "b"], "modle": "resnet18"})


def test_a_used_kernel_may_hold_a_readers_variables_but_no_misspelt_parameter():
    used = {"In": [""] * 20, "fold": 1, "mine": 3, "table": [1]}
    assert TrainParameters.from_notebook(used).fold == 1
    with pytest.raises(ParameterError, match="unknown parameter 'epochss'"):
        TrainParameters.from_notebook(used | {"epochss": 3})


def test_where_it_runs_is_not_what_it_is():
    here = TrainParameters(results="a", device="cpu", threads=1, workers=2)
    assert here.identity() == TrainParameters(results="b").identity()
    assert here.identity() != TrainParameters(seed=1).identity()


def test_who_selects_follows_the_protocol_unless_named():
    assert TrainParameters().selected_on == "validation"
    assert TrainParameters(protocol="authors").selected_on == "test"
    assert TrainParameters(protocol="authors", selection="validation").selected_on == "validation"
    assert TrainParameters(selection="test").selected_on == "test"


def test_how_often_a_training_is_saved_is_not_what_it_is():
    assert TrainParameters(checkpoint_seconds=1).identity() == TrainParameters().identity()
    assert TrainParameters(cache="auto").identity() == TrainParameters(cache="data/cache").identity()
    assert TrainParameters(cache="auto").identity() != TrainParameters().identity()  # its 8 bits change pixels
    assert TrainParameters(accumulate=2).identity() != TrainParameters().identity()
