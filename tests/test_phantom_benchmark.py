"""The phantom as judge: twins differ only where they should; a network with known reasons gets the right verdict."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cxrkit import study, train
from cxrkit.errors import ParameterError
from cxrkit.study import explanation, method_pages, phantom_benchmark

LABELS = ("Cardiomegaly", "Nodule/Mass")


class Reads(nn.Module):
    """The brightness inside a fixed region, and nothing else: once for Cardiomegaly, twice for Nodule/Mass."""

    def __init__(self, labels, region):
        super().__init__()
        self.labels = labels
        self.register_buffer("region", region.float())
        self.register_buffer(
            "weights", torch.tensor([float(sum(i + 1 for i, n in enumerate(LABELS) if n == name)) for name in labels])
        )

    def forward(self, x):
        seen = (x * self.region).sum((1, 2, 3))
        return seen[:, None] * self.weights


def bench_of(model, labels=LABELS, methods=("saliency",), images=2, **changes):
    from cxrkit.phantom.views import VIEWS

    names = list(VIEWS["multilabel"].prevalence)
    options = {"view": "multilabel", "prevalence": {name: 0.4 if name in labels else 0.0 for name in names}}
    run = SimpleNamespace(parameters=train.TrainParameters(size=64, dataset_options=options), key="made up")
    parameters = study.JudgeParameters(images=images, shortcuts={"marker": labels[0]}, **changes)
    return explanation.Subject(run, parameters, model, list(methods), list(labels))


@pytest.fixture(scope="module")
def labels():
    from cxrkit.phantom.views import VIEWS

    return VIEWS["multilabel"].labels


@pytest.fixture
def scene(labels):
    return phantom_benchmark._scene(bench_of(Reads(labels, torch.zeros(64, 64))), "marker", "Cardiomegaly")


def test_twins_differ_only_where_they_should(scene):
    marker = (scene.images - scene.without["shortcut"]).abs()[:, 0]
    finding = (scene.images - scene.without["finding"]).abs()[:, 0]
    for row in range(len(scene.images)):
        inside, outside = scene.regions["shortcut"][row], ~scene.regions["shortcut"][row]
        assert marker[row][inside].mean() > 20 * marker[row][outside].mean()
        inside, outside = scene.regions["finding"][row], ~scene.regions["finding"][row]
        assert finding[row][inside].mean() > 3 * finding[row][outside].mean()
    assert not (scene.regions["shortcut"] & scene.regions["finding"]).any()


def test_a_network_that_reads_the_marker_is_found_out(labels, scene):
    model = Reads(labels, scene.regions["shortcut"][0])
    bench = bench_of(model, images=1)
    scores = phantom_benchmark.score(bench)
    shown = scores[(scores["world"] == "marker") & (scores["region"] == "shortcut")].iloc[0]
    assert shown["share"] == pytest.approx(1)  # the gradient is the region itself
    assert shown["chance"] == pytest.approx(float(scene.regions["shortcut"][0].float().mean()))
    assert shown["effect"] == pytest.approx(
        float(model(scene.images[:1])[0, labels.index("Cardiomegaly")])
        - float(model(scene.without["shortcut"][:1])[0, labels.index("Cardiomegaly")]),
        abs=1e-4,
    )
    assert (scores[scores["region"] == "finding"]["share"] == 0).all()
    assert set(scores["world"]) == {"none", "marker"}
    assert set(scores[scores["world"] == "marker"]["label"]) == {"Cardiomegaly"}


def test_a_map_without_positive_mass_is_counted_not_averaged(labels):
    scores = phantom_benchmark.score(bench_of(Reads(labels, torch.zeros(64, 64)), images=2))
    table = phantom_benchmark.verdicts(scores)
    assert table["share"].isna().all()
    assert (table["degenerate"] == table["maps"]).all()


def test_effects_and_verdicts_on_hand_made_scores():
    scores = pd.DataFrame(
        {
            "network": ["a"] * 4 + ["b"] * 2,
            "planted": [False] * 4 + [True] * 2,
            "world": ["none", "none", "marker", "marker", "marker", "dark_borders"],
            "region": ["finding", "finding", "shortcut", "shortcut", "shortcut", "shortcut"],
            "label": "x",
            "method": ["m", "n", "m", "n", "m", "m"],
            "patient_id": ["1", "1", "1", "1", "2", "2"],
            "share": [0.5, 0.1, 0.0, 0.2, 0.3, 0.4],
            "chance": [0.1, 0.1, 0.1, 0.1, 0.1, 0.2],
            "effect": [3.0, 3.0, 0.0, 0.0, 2.0, 5.0],
        }
    )
    by = ("network", "world", "method")
    assert phantom_benchmark.verdicts(scores[:2], by)["times_chance"].tolist() == pytest.approx([5, 1])
    beside = phantom_benchmark.side_by_side(phantom_benchmark.verdicts(scores[scores["planted"]], by))
    assert list(beside.columns) == [
        "b; marker (chance 10.0%, effect 2.0)",
        "b; dark borders (chance 20.0%, effect 5.0)",
    ]
    assert beside.loc["m"].tolist() == ["30.0%", "40.0%"]  # one patient has no interval
    used = phantom_benchmark.effects(scores, by=("planted", "world", "region"))
    assert used["effect"].tolist() == [3.0, 0.0, 2.0, 5.0]
    assert used["images"].tolist() == [1, 1, 1, 1]


def test_what_the_network_was_trained_on_is_refused_as_evidence(monkeypatch):
    run = SimpleNamespace(parameters=train.TrainParameters(dataset_options={"seed": 1}), key="k", folder=None)
    monkeypatch.setattr(phantom_benchmark.runs, "find", lambda name, results: run)
    with pytest.raises(ParameterError, match="seed 1 draws the patients that run k was trained on"):
        phantom_benchmark.bench(study.JudgeParameters(run="k", seed=1))
    run.parameters = train.TrainParameters(dataset="folder", root="somewhere")
    with pytest.raises(ParameterError, match="run k saw folder; only the phantom knows"):
        phantom_benchmark.bench(study.JudgeParameters(run="k"))


def test_the_example_leans_most_and_comes_ready_to_draw(labels, scene):
    bench = bench_of(Reads(labels, scene.regions["shortcut"][1]), images=2)
    case = phantom_benchmark.case(bench, "marker")
    effect = (bench.model(scene.images) - bench.model(scene.without["shortcut"]))[:, labels.index("Cardiomegaly")]
    assert case.image_ids == [scene.image_ids[int(effect.argmax())]]
    drawn = phantom_benchmark.panel(bench, case)
    assert drawn["maps"].shape == (1, 64, 64)
    assert "gone without the shortcut" in drawn["caption"]


def test_tables_of_the_chapters(labels, scene):
    bench = bench_of(Reads(labels, torch.ones(64, 64)), methods=("saliency", "input_x_gradient"), images=1)
    case = phantom_benchmark.case(bench)
    similar = method_pages.label_similarity(bench, case, ["input_x_gradient"])
    assert similar.iloc[0, 0] == pytest.approx(1)  # both labels read the same
    maps = method_pages.variants(bench, case, "integrated_gradients", "baseline", ["black", "white"])
    assert list(maps) == ["baseline black", "baseline white"]
    starts = {"baseline black": torch.zeros(1, 1, 64, 64), "baseline white": torch.ones(1, 1, 64, 64)}
    sums = method_pages.map_sums(bench, case, maps, starts)
    np.testing.assert_allclose(sums["sum"], sums["promised"], rtol=1e-4)  # exact for a linear network
    assert (sums["relative"] < 1e-4).all()
    maps = {"input_x_gradient": phantom_benchmark.maps_of(bench, "input_x_gradient", case.images, case.label)[0]}
    assert method_pages.map_sums(bench, case, maps)["difference"].abs().iloc[0] < 1e-2
    assert "| saliency |" in method_pages.as_markdown(method_pages.method_table("gradient")).data
    assert len(method_pages.method_table()) == 20


def test_the_support_table_covers_every_method():
    table = method_pages.support_table()
    assert [name.replace(" ", "_") for name in table] == list(method_pages.method_table().index)
    assert len(table) >= 45
    assert set(table.to_numpy().ravel()) == {"✓", "–"}
    assert len(method_pages.refusals()) > 5
