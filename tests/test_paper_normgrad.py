"""Paper `normgrad`: what is measured on a network, the tables and claims made of it, and its checklist."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import cxrkit
from book.tools import checklist
from cxrkit import study, train
from cxrkit.errors import DataError, ParameterError
from cxrkit.metrics import pointing_game
from cxrkit.phantom.source import load_phantom
from cxrkit.study import published, report, runs
from cxrkit.study.notebook import parameters_for
from cxrkit.study.study import Study
from papers.normgrad import code as normgrad_code
from papers.normgrad import maps as normgrad_maps
from papers.normgrad import measure as measuring
from papers.normgrad import tables as normgrad

SIZE = 48


def parameters(**values):
    return parameters_for("notebooks/papers/normgrad/measure.ipynb")(**values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as training keeps it, of a network that has learnt nothing: no training is needed to measure."""
    results = str(tmp_path_factory.mktemp("results"))
    options = {"view": "quality", "images": 40, "conspicuity": 2.0}
    settings = train.TrainParameters(
        dataset_options=options,
        healthy_class="fine",
        loss="cross_entropy",
        size=SIZE,
        model="resnet18",
        results=results,
    )
    data = train.load_data(settings)
    model = train.make_model(settings, data.labels).eval()
    model.card["activation"] = "softmax"
    with study.writing(settings) as store:
        cxrkit.models.save(model, store.folder / "model.safetensors")
    return runs.Run(runs.results_folder(results) / runs.key(settings)), results


@pytest.fixture(scope="module")
def measured(trained):
    run, results = trained
    given = parameters(run=run.key, results=results, images=4, maps=2, paper_size=224)
    subject = measuring.subject(given)
    return subject, measuring.measure(subject)


def test_a_run_gives_a_row_per_image_method_state_and_smoothing(measured):
    subject, tables = measured
    scores = tables["scores"]
    assert list(dict.fromkeys(scores["state"])) == ["FR", "trained"]  # no pre-trained weights: no SR
    assert set(scores["method"]) == set(measuring.METHODS)
    assert len(scores) == 4 * 2 * 10 * 2
    known = scores.dropna(subset=["hit"])  # Grad-CAM may be empty
    assert len(known) > 0.8 * len(scores)
    assert known["hit"].isin([0, 1]).all()
    assert (known["hit"] >= known["hit_share"]).all()  # 15 of 48 pixels reach further than the share
    assert subject.share == pytest.approx(15 / 224)
    assert set(tables["similarity"]["state"]) == {"FR"}
    assert tables["chance"]["hit_share"].between(0, 1).all()


def test_hits_are_those_of_a_slow_search(measured):
    subject, tables = measured
    shown = measuring.positives(subject, subject.rows)
    targets = measuring.predicted(subject, subject.model, shown.images)
    maps = measuring.all_maps(subject.model, shown.images, targets, ["NormGrad Scaling single"])
    for place, values in enumerate(maps["NormGrad Scaling single"]):
        row, column = divmod(int(values.argmax()), SIZE)
        inside = np.argwhere(shown.boxes[place].numpy())
        nearest = np.sqrt(((inside - [row, column]) ** 2).sum(1)).min()
        found = tables["scores"].query(
            "method == 'NormGrad Scaling single' and state == 'trained' and not smoothed and image_id == @image",
            local_dict={"image": shown.image_ids[place]},
        )
        assert found["hit"].item() == float(nearest < 15)
        assert found["hit_share"].item() == float(nearest < SIZE * 15 / 224)


def test_a_map_explains_the_predicted_class_and_is_absolute(measured):
    subject, _ = measured
    shown = measuring.positives(subject, subject.rows)
    targets = torch.tensor([0, 1, 0, 1])
    maps = measuring.maps_of(subject.model, shown.images, "InputXGrad", targets)
    for place, target in enumerate(targets.tolist()):
        image = shown.images[place : place + 1]
        own = cxrkit.attribute(subject.model, image, "input_x_gradient", [target])[0, 0].abs()
        torch.testing.assert_close(maps[place], own, atol=1e-5, rtol=1e-4)
    guided = measuring.maps_of(subject.model, shown.images, "GuidedGradCAM", targets)
    parts = [measuring.maps_of(subject.model, shown.images, name, targets) for name in ("GuidedBackprop", "GradCAM")]
    torch.testing.assert_close(guided, parts[0] * parts[1])
    assert (maps >= 0).all()


def test_variants_differ_where_they_should(measured):
    _, tables = measured
    table = tables["quirks"].pivot_table(values="hit_share", index=["image_id", "method"], columns="variant")
    assert (table["tolerance 25"] >= table["text"])[table["text"].notna()].all()
    assert {"transposed disc", "outline", "label", "clipped", "clipped, raw", "all logits", "raw"} <= set(table)
    assert table["clipped"].dropna().index.get_level_values("method").isin(measuring.PIXEL_METHODS).all()


def test_clipping_leaves_one_pixel_in_a_hundred_at_the_maximum():
    maps = torch.rand(3, 100, 100)
    cut = measuring.clipped(maps)
    share = (cut == cut.amax((1, 2), keepdim=True)).float().mean((1, 2))
    assert ((share - 0.01).abs() < 2e-3).all()
    assert torch.equal(cut[maps < 0.5], maps[maps < 0.5])


def test_chance_and_centre(measured):
    subject, tables = measured
    shown = measuring.positives(subject, subject.rows)
    middle = torch.zeros(SIZE, SIZE)
    middle[SIZE // 2, SIZE // 2] = 1
    assert tables["chance"]["centre"].tolist() == [float(pointing_game(middle, box, 15)) for box in shown.boxes]


def test_methods_that_are_not_defined_leave_no_score():
    model = cxrkit.models.create("efficientnet_b0", ["a", "b"]).eval()
    maps = measuring.all_maps(model, torch.rand(1, 1, 32, 32), torch.tensor([0]), ["GuidedBackprop", "GradCAM"])
    assert maps["GuidedBackprop"].isnan().all()
    assert maps["GradCAM"].isfinite().all()


def test_the_layers_of_an_efficientnet_of_timm_are_those_of_the_paper():
    lite = measuring.layers_of(cxrkit.models.create("efficientnet_lite0", ["a"]))
    assert len(lite) == int(published.scalars("normgrad")["J_efficientnet"])
    assert measuring.layers_of(cxrkit.models.create("resnet18", ["a"])) == "paper"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"methods": ["Gradcam"]}, "Gradcam"),
        ({"states": ["half"]}, "half"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"label": "Fracture"}, "Fracture"),
    ],
)
def test_wrong_parameters_are_named(trained, values, word):
    run, results = trained
    with pytest.raises(ParameterError, match=word):
        measuring.subject(parameters(run=run.key, results=results, **values))


def test_a_label_without_boxes_is_refused(trained):
    run, results = trained
    with pytest.raises(DataError, match="fine"):
        measuring.subject(parameters(run=run.key, results=results, label="fine"))


@pytest.fixture
def grid(monkeypatch):
    """Hand-made scores: two networks, two seeds, two sets; each method hits in a share of twenty images."""

    def scores(seed, base):
        rows = []
        for state, factor in (("FR", 0.25), ("SR", 0.5), ("trained", 1.0)):
            for place, method in enumerate(measuring.METHODS):
                for smoothed in (False, True):
                    share = factor * base * (0.3 + 0.05 * place + (0.1 if smoothed and place < 3 else 0))
                    hits = (np.arange(20) < round(20 * share)).astype(float)
                    ids = [f"i{n}" for n in range(20)]
                    facts = {"state": state, "method": method, "smoothed": smoothed, "hit": hits, "hit_share": hits}
                    rows.append(pd.DataFrame({"image_id": ids, "patient_id": ids, "found": True} | facts))
        return pd.concat(rows, ignore_index=True)

    class Train:
        def __init__(self, view, model, weights, seed):
            self.parameters = train.TrainParameters(
                dataset_options={"view": view}, model=model, weights=weights, seed=seed
            )

    class Scores:
        def __init__(self, tables):
            self.tables, self.folder = tables, _Everywhere()

        def frame(self, name):
            return self.tables[name]

    made = []
    for view in ("quality", "objects"):
        for model, weights, base in (("resnet18", None, 1.0), ("efficientnet_lite0", "imagenet", 0.9)):
            for seed in (0, 1):
                table = scores(seed, base)
                if weights is None:
                    table = table[table["state"] != "SR"]
                level = pd.DataFrame({"hit": [0.3], "hit_share": [0.1], "centre": [1.0], "centre_share": [0.9],
                                      "boxes": [0.05], "image_id": ["i0"], "patient_id": ["i0"]})  # fmt: skip
                made.append((Train(view, model, weights, seed), Scores({"scores": table, "chance": level})))
    monkeypatch.setattr(normgrad, "pairs", lambda name: made)
    monkeypatch.setattr(report, "synthetic", lambda name: True)
    return "hand-made"


class _Everywhere:
    """A folder in which every file is."""

    def __truediv__(self, name):
        return self

    def is_file(self):
        return True


def test_tables_hold_every_method_and_the_printed_cells(grid):
    assert normgrad.sets(grid) == ["LVOT", "Object-CXR"]
    table = normgrad.randomisation(grid, "LVOT", "resnet18").set_index("method")
    assert table.loc["Grad-CAM", "paper, trained"] == 0.547
    assert table.loc["Grad-CAM", "ours, trained"] == "0.450 ± 0.000"
    assert table.loc["Grad-CAM", "ours, SR"] == "–"
    assert table.loc["centre of the image", "ours, trained"] == "0.900"
    objects = normgrad.randomisation(grid, "Object-CXR", "efficientnet_lite0, pre-trained").set_index("method")
    assert objects.loc["Conv3 × 3 single", "paper, trained"] == 0.853
    assert objects["ours, SR"].iloc[0] == "0.200 ± 0.000"  # 4 of 20
    with pytest.raises(ParameterError, match="vgg16"):
        normgrad.randomisation(grid, "LVOT", "vgg16")


def test_difference_of_means_and_its_interval(grid):
    table = normgrad.architectures(grid, "LVOT").set_index("method")
    row = table.loc["Conv3 × 3 multi"]
    assert row["DoM, ours"] == pytest.approx(abs(15 / 20 - round(20 * 0.9 * 0.75) / 20))
    assert row["low"] <= row["DoM, ours"] <= row["high"]


def test_smoothing_and_claims_find_what_was_put_in(grid):
    smoothing = normgrad.smoothing(grid, "LVOT").set_index("method")
    assert smoothing.loc["Input × gradient", "change"] > 0.05
    assert smoothing.loc["Grad-CAM", "change"] == 0
    claims = normgrad.claims(grid).set_index("claim")
    assert claims.loc["Training raises the hits (LVOT)", "verdict"] == "same direction"
    assert claims.loc["Conv3 × 3 gains by several layers (LVOT)", "verdict"] == "undecided here" or (
        claims.loc["Conv3 × 3 gains by several layers (LVOT)", "ours"] > 0
    )
    assert claims.loc["Conv3 × 3 gains by several layers (LVOT)", "paper"] == "0.602 against 0.43"
    assert claims.loc["Smoothing helps pixel maps more than the others (LVOT)", "verdict"] == "same direction"
    assert claims.loc["Grad-CAM hits least often (Object-CXR)", "verdict"] in ("same direction", "undecided here")
    assert "can't be tested here" not in " ".join(claims["verdict"])


def test_a_grid_without_scores_says_how_to_make_them(monkeypatch):
    with pytest.raises(ParameterError, match="grid run normgrad"):
        normgrad.pairs(Study("empty", ()))


def test_mean_over_seeds_in_closed_form():
    frame = pd.DataFrame(
        {"image_id": list("abab"), "patient_id": list("abab"), "seed": [0, 0, 1, 1], "m": 1, "hit": [1.0, 0, 1, 1]}
    )
    row = normgrad.cells(frame, ["m"], "hit").iloc[0]
    assert (row["mean"], row["std"]) == (0.75, 0.25)
    assert (row["seeds"], row["images"]) == (2, 2)


def test_positions_per_side():
    table = normgrad.positions([66]).set_index("input")
    assert table.loc[600, "layer4"] == 19
    assert table.loc[66, "layer4"] == 3


def test_panels_stack_kept_maps(grid, monkeypatch):
    rng = np.random.default_rng(0)
    kept = {
        "image_ids": np.array(["a", "b"]),
        "images": rng.random((2, 16, 16)),
        "boxes": rng.random((2, 16, 16)) > 0.9,
        "states": np.array(["FR", "trained"]),
        "methods": np.array(measuring.METHODS),
        "maps": rng.random((2, 10, 2, 16, 16)).astype(np.float32),
    }
    monkeypatch.setattr(normgrad_maps, "pairs", normgrad.pairs)
    monkeypatch.setattr(report, "kept_of", lambda run: kept)
    for rows, count in (("state", 2), ("smoothing", 2), ("seed", 2), ("network", 2)):
        shown = normgrad_maps.panel(grid, "LVOT", rows, image=1)
        assert shown["maps"].shape == (count, 5, 16, 16)
        assert len(shown["rows"]) == count
    table = normgrad_maps.agreement(grid, "LVOT")
    assert table["between seeds"].tolist() == pytest.approx([1.0] * 10)
    with pytest.raises(ParameterError, match="'fold'"):
        normgrad_maps.panel(grid, "LVOT", "fold")


def test_the_disc_and_what_mirroring_does():
    assert normgrad_code.disc(15) == 697
    data = load_phantom(view="objects", images=20, size=64)
    found = normgrad_code.perfect_maps(data, 224)
    assert (found["right"] == 1).all()
    assert found["transposed"].mean() < 0.6
    near = found["off"] < 1
    assert (found.loc[near, "transposed"] == 1).all()


def test_a_block_without_its_skip():
    """Second, slow implementation: the last block written out by hand."""
    model = cxrkit.models.create("resnet18", ["a", "b"], seed=1).eval()
    images = torch.rand(2, 1, 64, 64)
    bare, layer = normgrad_code.without_skip(model)
    assert layer == "network.layer4.1.conv2"
    network = model.network
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(model.encode(images)))))
        x = network.layer4[0](network.layer3(network.layer2(network.layer1(x))))
        block = network.layer4[1]
        inner = block.conv2(block.relu(block.bn1(block.conv1(x))))
        expected = network.fc(block.bn2(inner).mean((2, 3)))
        torch.testing.assert_close(bare(images), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(images), expected, atol=1e-3)
    maps, said = normgrad_code.gradcam_of_code(model, images, torch.tensor([0, 1]))
    assert torch.equal(said, expected.argmax(1))
    weights = torch.autograd.functional.jacobian(
        lambda values: network.fc(block.bn2(values).mean((2, 3)))[0, 0], inner[:1]
    )
    small = (1 + (weights.mean((2, 3), keepdim=True) * inner[:1]).sum(1)).relu()
    large = torch.nn.functional.interpolate(small[None], size=64, mode="bilinear")[0, 0]
    torch.testing.assert_close(maps[0], large, atol=1e-5, rtol=1e-4)
    with pytest.raises(ParameterError, match="layer4"):
        normgrad_code.without_skip(cxrkit.models.create("efficientnet_lite0", ["a"]))


def test_the_checklist_is_complete():
    assert checklist.problems("normgrad") == []
    listed = checklist.items("normgrad")
    assert len(listed) == 14
    assert listed.set_index("id").loc["tab1", "why"]


def test_the_grid_is_right_in_all_profiles():
    from cxrkit import grid as grids

    for profile, trainings in ((None, 8), ("full", 12), ("object_cxr", 6)):
        tasks = grids.plan("normgrad", profile=profile)
        kinds = [task.notebook.stem for task in tasks]
        assert kinds.count("train") == kinds.count("normgrad_measure") == trainings


def test_ties_and_the_middle_in_closed_form(grid, monkeypatch):
    ids = [f"i{n}" for n in range(4)]
    rows = [
        pd.DataFrame({"image_id": ids, "patient_id": ids, "method": "InputXGrad", "variant": variant, "hit_share": hit})
        for variant, hit in (("raw", 1.0), ("text", 1.0), ("clipped, raw", 0.0), ("clipped", 1.0))
    ]
    monkeypatch.setattr(normgrad, "frames", lambda name, which: pd.concat(rows).assign(set="LVOT", seed=0))
    table = normgrad.ties(grid).set_index("maps")
    assert table["change"].to_dict() == {"whole": 0.0, "cut": 1.0}
    maps = np.zeros((1, 1, 2, 9, 9), np.float32)
    maps[0, 0, 0, 4, 4] = maps[0, 0, 1, 0, 8] = 1
    kept = {"states": np.array(["trained"]), "methods": np.array(["GradCAM"]), "maps": maps}
    monkeypatch.setattr(normgrad_maps, "pairs", normgrad.pairs)
    monkeypatch.setattr(report, "kept_of", lambda run: kept)
    assert (normgrad_maps.central(grid)[["resnet18", "efficientnet_lite0"]] == 0.5).all(axis=None)


def test_the_middle_is_asked_for_where_there_is_one(monkeypatch):
    def attribute(model, images, method, virtual_layer, **options):
        maps = torch.zeros(len(images), 1, 66, 66)
        maps[:, 0, *((33, 33) if virtual_layer == "conv3x3" else (1, 1))] = 1
        return maps

    monkeypatch.setattr(cxrkit, "attribute", attribute)
    row = normgrad_code.centred((66,), networks=3, images=2).iloc[0]
    assert row[["cells", "conv1x1", "conv3x3", "difference", "low", "high", "maps"]].tolist() == [3, 0, 1, 1, 1, 1, 6]
    with pytest.raises(ParameterError, match="64 pixels make 2 cells, none in the middle; take 96"):
        normgrad_code.centred((64,))
