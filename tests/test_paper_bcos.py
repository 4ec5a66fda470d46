"""Paper `bcos`, cells of its pages: coarse grid, the map of which logit, thresholds, where the answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import run_cell
from torch import nn

import cxrkit
from cxrkit import metrics

FIGURES, FINDINGS = "papers/bcos/maps", "papers/bcos/findings"


def tile(period: int, size: int = 64) -> torch.Tensor:
    """A bright row and column every `period` pixels."""
    line = torch.arange(size) % period == 0
    return (line[:, None] & line[None]).float()


@pytest.fixture
def coarse_grid():
    return run_cell(FIGURES, "cell-7", metrics=metrics)["coarse_grid"]


def test_a_grid_of_the_stem_is_no_coarse_grid(coarse_grid):
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, fine, coarse = (float(coarse_grid(noise + grid)) for grid in (0, 4 * tile(4), 16 * tile(16)))
    assert fine < 1.5 * plain
    assert coarse > 3 * plain


def test_the_coarse_grid_of_many_maps_has_an_interval(positives, coarse_grid, monkeypatch):
    noise = torch.randn(10, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cxrkit, "attribute", lambda model, images, method, labels: noise + 16 * tile(16))
    names = {"ORDER": ["B-cos"], "cxrkit": cxrkit, "metrics": metrics, "coarse_grid": coarse_grid}
    cell = run_cell(FIGURES, "cell-10-many", **names)
    (row,) = cell["coarse_grids"](SimpleNamespace(networks={"B-cos": Two()}, data=positives))
    assert (row["network"], row["images"]) == ("B-cos", 10)
    assert 1.2 < row["low"] < row["coarse grid"] < row["high"]


class Two(nn.Module):
    """Finds the finding in every second image."""

    labels = ("Pneumonia", "No pneumonia")

    def forward(self, images):
        sign = torch.where(torch.arange(len(images)) % 2 == 0, 1.0, -1.0)
        return torch.stack([sign, -sign], 1)


@pytest.fixture
def positives():
    data = cxrkit.data.load("phantom", view="binary", images=60, size=64, prevalence=0.5, seed=3)
    ill = data.table["image_id"].isin(data.boxes["image_id"]).to_numpy().nonzero()[0][:10]
    return data.select(ill.tolist())


def test_a_missed_positive_is_scored_by_the_map_of_the_other_class(positives, monkeypatch):
    batch = positives.batch(range(10))
    masks = batch.masks[:, 0]
    maps = torch.stack([torch.ones(10, 64, 64), masks.float()], 1)  # the map of "no pneumonia" is all in the box
    monkeypatch.setattr(cxrkit, "attribute", lambda model, images, method: maps)
    names = {"cxrkit": cxrkit, "np": np, "torch": torch, "seed": 0}
    scored = run_cell(FINDINGS, "cell-17-maps", **names)["which_map"](Two(), batch, positives.labels)
    compared = run_cell(FINDINGS, "cell-17-compared", **names)["compared"]
    found = pd.DataFrame(compared(*scored, batch.patient_ids)).set_index("positives")
    assert found["images"].tolist() == [5, 5]
    assert found.loc["found", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    missed = found.loc["missed"]
    assert missed["own map"] == pytest.approx(missed["chance"])
    assert missed["map of the higher"] == 1
    assert missed["difference"] == pytest.approx(1 - missed["chance"])
    assert missed["low"] <= missed["difference"] <= missed["high"]


def test_thresholds_take_the_maximum_of_the_whole_map_and_leave_the_denominator():
    maps = torch.tensor([[[4.0, 2.0, 1.0, -1.0]]])
    masks = torch.tensor([[[False, True, True, True]]])
    recalls = run_cell(FINDINGS, "cell-18-recalls")["other_recalls"]
    thresholds = run_cell(FINDINGS, "cell-18-thresholds", cxrkit=cxrkit, other_recalls=recalls)["thresholds"]
    found = pd.DataFrame(thresholds(maps, masks, (0.0, 0.5, 0.75))).set_index("threshold")
    assert found["precision"].tolist() == pytest.approx([3 / 7, 2 / 6, 0])
    assert found["recall"].tolist() == pytest.approx([3 / 4, 2 / 4, 0])
    assert found["recall, box's maximum"].tolist() == pytest.approx([3 / 4, 3 / 4, 2 / 4])
    assert found["recall, cut below too"].tolist() == pytest.approx([3 / 4, 1, float("nan")], nan_ok=True)
