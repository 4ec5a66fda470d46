"""The papers' settings: against their tables, and as plain parameters."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import cxrkit.models
from cxrkit import ParameterError
from cxrkit.data.sources import SOURCES
from cxrkit.train import presets
from cxrkit.train.parameters import TrainParameters

PAPERS = Path(__file__).resolve().parents[1] / "notebooks" / "papers"


def cell(paper: str, source: str, parameter: str) -> str:
    """The text that a source "table.csv, row[, column]" of a paper points at."""
    table, row, *column = [part.strip() for part in source.split(",")]
    with (PAPERS / paper / "published" / table).open(encoding="utf-8", newline="") as file:
        rows = {next(iter(line.values())): line for line in csv.DictReader(file)}
    return rows[row][column[0] if column else parameter]


def test_every_preset_is_a_training_with_a_known_network_and_data_set():
    assert len(presets.names()) == 35
    for name in presets.names():
        chosen = TrainParameters.preset(name)
        assert chosen.dataset in SOURCES
        assert re.fullmatch(r"\w+/\w+/" + chosen.model, name)
        assert chosen.identity() == TrainParameters(**presets.values(name)).identity()
    known = {TrainParameters.preset(name).model for name in presets.names()}
    assert known <= set(cxrkit.models.NETWORKS)


def test_values_stand_in_the_tables_that_they_name():
    compared = 0
    for row in presets.table().to_dict("records"):
        assert re.match(r"\w+\.csv, |text$|code$|choice", row["source"]), row
        if ".csv" not in row["source"]:
            continue
        text = cell(row["preset"].split("/")[0], row["source"], row["parameter"])
        if isinstance(row["value"], str):
            assert row["value"].split("_")[-1] in text.lower(), row
        else:
            numbers = [float(number) for number in re.findall(r"\d+\.?\d*(?:e-?\d+)?", text)]
            assert row["value"] in numbers, (row, text)
        compared += 1
    assert compared > 100


def test_the_code_of_paper_bcos_differs_from_its_table():
    name = "bcos/vinbigdata/bcos_resnet50"
    assert TrainParameters.preset(name).learning_rate == 1e-5
    coded = TrainParameters.preset(name, protocol="authors")
    assert (coded.learning_rate, coded.weight_decay, coded.selected_on) == (1e-4, 1e-4, "test")
    table = presets.table(name).set_index("parameter")
    assert table.loc["learning_rate", "authors"] == 1e-4
    assert table.loc["epochs", "authors"] == ""


def test_the_code_of_paper_path_has_its_momentum_in_full():
    note = cell("path", "tab4_hparams.csv, momentum, note", "momentum")
    for data in ("brain_mri", "covid_radiography"):
        name = f"path/{data}/xception"
        assert TrainParameters.preset(name).momentum == 0.939
        assert note == f"code {TrainParameters.preset(name, protocol='authors').momentum}"
    assert TrainParameters.preset("covid/covid/resnet18", protocol="authors").momentum == 0.9


def test_changes_win_and_unknown_names_are_refused_with_near_ones():
    assert TrainParameters.preset("covid/covid/resnet18", epochs=3, size=64).epochs == 3
    with pytest.raises(ParameterError, match=r"'bcos/rsna/bcos_resnet5'; did you mean 'bcos/rsna/bcos_resnet50'"):
        TrainParameters.preset("bcos/rsna/bcos_resnet5")
    with pytest.raises(ParameterError, match="unknown parameter 'epoch'"):
        TrainParameters.preset("covid/covid/resnet18", epoch=3)
