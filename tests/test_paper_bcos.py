"""Paper `bcos`, its maps: the coarse grid, the map of which logit, and thresholds, on maps whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cxrkit
from papers.bcos import maps as bcos_maps


def tile(period: int, size: int = 64) -> torch.Tensor:
    """A bright row and column every `period` pixels."""
    line = torch.arange(size) % period == 0
    return (line[:, None] & line[None]).float()


def test_a_grid_of_the_stem_is_no_coarse_grid():
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, fine, coarse = (float(bcos_maps.coarse_grid(noise + grid)) for grid in (0, 4 * tile(4), 16 * tile(16)))
    assert fine < 1.5 * plain
    assert coarse > 3 * plain


def test_the_coarse_grid_of_many_maps_has_an_interval(positives, monkeypatch):
    noise = torch.randn(10, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cxrkit, "attribute", lambda model, images, method, labels: noise + 16 * tile(16))
    row = bcos_maps.coarse_grids(positives).iloc[0]
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
    return bcos_maps.Gallery({"B-cos": Two()}, data.select(ill.tolist()))


def test_a_missed_positive_is_scored_by_the_map_of_the_other_class(positives, monkeypatch):
    masks = positives.data.batch(range(10)).masks[:, 0]
    maps = torch.stack([torch.ones(10, 64, 64), masks.float()], 1)  # the map of "no pneumonia" is all in the box
    monkeypatch.setattr(cxrkit, "attribute", lambda model, images, method: maps)
    found = bcos_maps.which_map(positives).set_index("positives")
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
    found = bcos_maps.thresholds(maps, masks, (0.0, 0.5, 0.75)).set_index("threshold")
    assert found["precision"].tolist() == pytest.approx([3 / 7, 2 / 6, 0])
    assert found["recall"].tolist() == pytest.approx([3 / 4, 2 / 4, 0])
    assert found["recall, box's maximum"].tolist() == pytest.approx([3 / 4, 3 / 4, 2 / 4])
    assert found["recall, cut below too"].tolist() == pytest.approx([3 / 4, 1, float("nan")], nan_ok=True)
