"""The table of networks: recomputed in part, and checked against closed forms.

The book shows it (`networks.csv` and `networks_weights.csv` in `book/foundations`).
`python tests/test_models_inventory.py` writes both afresh.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import cxrkit
from cxrkit.errors import ModelError
from cxrkit.models import NETWORKS, Classifier, inventory

FOLDER = Path(__file__).resolve().parents[1] / "book" / "foundations"
SIZES, WEIGHTS = FOLDER / "networks.csv", FOLDER / "networks_weights.csv"


def read(path: Path, **options) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, **options)


@pytest.mark.parametrize("name", ["resnet18", "bcos_resnet18", "efficientnet_lite0"])
def test_the_table_that_the_book_shows_is_the_one_computed(name):
    shown = read(SIZES, index_col="network").loc[[name]]
    pd.testing.assert_frame_equal(inventory.table([name]), shown, rtol=0.02, check_dtype=False)  # torch versions differ


def test_the_book_shows_every_network_and_every_weight():
    assert list(read(SIZES)["network"]) == list(NETWORKS)
    shown = read(WEIGHTS)
    assert [(r.network, r.name) for r in shown.itertuples(index=False)] == [
        (network, name) for network, row in NETWORKS.items() for name in row.weights
    ]
    assert shown["url"].str.startswith("https://").sum() == len(shown) - 1  # one comes with a package
    assert (shown["licence"] != "").all()
    computed = cxrkit.models.weights_table()
    pd.testing.assert_frame_equal(computed, shown)


def test_costs_in_closed_form():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.Flatten(), torch.nn.Linear(4 * 64, 2)
    )
    model = Classifier(network, ("a", "b")).to("meta")
    flops, kept = inventory._costs(model, 8)
    assert flops == 2 * (64 * 4 * 27) + 2 * (256 * 2)
    assert kept == 4 * (3 * 64 + 4 * 64)  # the inputs of both layers; the outputs are nobody's to keep


def test_published_numbers_of_known_networks():
    shown = read(SIZES, index_col="network")
    # Multiply-accumulates as torchvision publishes them, in thousand millions; the heads here have 14 outputs.
    for name, published in {"resnet18": 1.814, "resnet50": 4.089, "vgg16": 15.470, "convnext_tiny": 4.456}.items():
        assert shown.loc[name, "gflops"] / 2 == pytest.approx(published, rel=0.01)


def test_an_unknown_network_is_named():
    with pytest.raises(ModelError, match="unknown network 'resnet19'; did you mean 'resnet18'"):
        inventory.table(["resnet19"])


def write() -> None:
    for path, frame in ((SIZES, cxrkit.models.table()), (WEIGHTS, cxrkit.models.weights_table())):
        frame.to_csv(path, index=path is SIZES, lineterminator="\n")


if __name__ == "__main__":
    write()
