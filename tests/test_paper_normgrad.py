"""Paper `normgrad`: the protocol of its notebook on a small network, its tables and claims, and its checklist."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import run_cell, run_cells

import cxrkit
from book.tools import checklist
from cxrkit import study, train
from cxrkit.errors import DataError, ParameterError
from cxrkit.metrics import pointing_game
from cxrkit.phantom.source import load_phantom
from cxrkit.study import claims, published, runs
from cxrkit.study.study import Study
from cxrkit.view import figures
from papers.normgrad import measure
from papers.normgrad import tables as normgrad

SIZE = 48
PROTOCOL = "papers/normgrad/measure"


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
    """The names that the notebook's cells leave."""
    run, results = trained
    return run_cells(PROTOCOL, last="few", run=run.key, results=results, images=4, maps=2, paper_size=224)


def test_a_run_gives_a_row_per_image_method_state_and_smoothing(measured):
    tables = measured["tables"]
    scores = tables["scores"]
    assert list(dict.fromkeys(scores["state"])) == ["FR", "trained"]  # no pre-trained weights: no SR
    assert set(scores["method"]) == set(measure.METHODS)
    assert len(scores) == 4 * 2 * 10 * 2
    known = scores.dropna(subset=["hit"])  # Grad-CAM may be empty
    assert len(known) > 0.8 * len(scores)
    assert known["hit"].isin([0, 1]).all()
    assert (known["hit"] >= known["hit_share"]).all()  # 15 of 48 pixels reach further than the share
    assert set(tables["similarity"]["state"]) == {"FR"}
    assert tables["chance"]["hit_share"].between(0, 1).all()
    assert measured["kept"].shape == (2, 10, 2, SIZE, SIZE)
    assert measured["kept"].nan_to_num().amax() == 1


def test_hits_are_those_of_a_slow_search(measured):
    method, shown = "NormGrad Scaling single", measured["positives"].batch(range(4))
    targets = measured["predicted"](measured["model"], shown.images)
    for place, values in enumerate(measured["all_maps"](measured["model"], shown.images, targets)[method]):
        row, column = divmod(int(values.argmax()), SIZE)
        inside = np.argwhere(shown.masks[place, measured["output"]].numpy())
        nearest = np.sqrt(((inside - [row, column]) ** 2).sum(1)).min()
        found = measured["tables"]["scores"].query(
            "method == @method and state == 'trained' and not smoothed and image_id == @image",
            local_dict={"method": method, "image": shown.image_ids[place]},
        )
        assert found["hit"].item() == float(nearest < 15)
        assert found["hit_share"].item() == float(nearest < SIZE * 15 / 224)


def test_a_map_explains_the_predicted_class_and_is_absolute(measured):
    model, images = measured["model"], measured["positives"].batch(range(4)).images
    targets = torch.tensor([0, 1, 0, 1])
    plain = {name: method for name, (method, options) in measured["recipes"].items() if not options}
    maps = {name: measured["absolute_maps"](model, images, targets, method) for name, method in plain.items()}
    for place, target in enumerate(targets.tolist()):
        own = cxrkit.attribute(model, images[place : place + 1], "input_x_gradient", [target])[0, 0].abs()
        torch.testing.assert_close(maps["InputXGrad"][place], own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps["GuidedGradCAM"], maps["GuidedBackprop"] * maps["GradCAM"])
    assert all((one >= 0).all() for one in maps.values())


def test_variants_differ_where_they_should(measured):
    table = measured["tables"]["quirks"].pivot_table(
        values="hit_share", index=["image_id", "method"], columns="variant"
    )
    assert (table["tolerance 25"] >= table["text"])[table["text"].notna()].all()
    assert {"transposed disc", "outline", "label", "clipped", "clipped, raw", "all logits", "raw"} <= set(table)
    assert table["clipped"].dropna().index.get_level_values("method").isin([*measure.PIXEL_METHODS]).all()


def test_clipping_leaves_one_pixel_in_a_hundred_at_the_maximum():
    maps = torch.rand(3, 100, 100)
    cut = measure.clipped(maps)
    share = (cut == cut.amax((1, 2), keepdim=True)).float().mean((1, 2))
    assert ((share - 0.01).abs() < 2e-3).all()
    assert torch.equal(cut[maps < 0.5], maps[maps < 0.5])


def test_chance_and_centre(measured):
    boxes = measured["positives"].batch(range(4)).masks[:, measured["output"]]
    middle = torch.zeros(SIZE, SIZE)
    middle[SIZE // 2, SIZE // 2] = 1
    assert measured["tables"]["chance"]["centre"].tolist() == [float(pointing_game(middle, box, 15)) for box in boxes]


def test_methods_that_are_not_defined_leave_no_score(measured):
    model = cxrkit.models.create("efficientnet_b0", ["a", "b"]).eval()
    maps = measured["all_maps"](model, torch.rand(1, 1, 32, 32), torch.tensor([0]))
    assert maps["GuidedBackprop"].isnan().all()
    assert maps["GuidedGradCAM"].isnan().all()
    assert maps["GradCAM"].isfinite().all()


def test_the_layers_of_an_efficientnet_of_timm_are_those_of_the_paper():
    lite = measure.layers_of(cxrkit.models.create("efficientnet_lite0", ["a"]))
    assert len(lite) == int(published.scalars("normgrad")["J_efficientnet"])
    assert measure.layers_of(cxrkit.models.create("resnet18", ["a"])) == "paper"


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
        run_cells(PROTOCOL, last="images", run=run.key, results=results, **values)


def test_a_label_without_boxes_is_refused(trained):
    run, results = trained
    with pytest.raises(DataError, match="fine"):
        run_cells(PROTOCOL, last="images", run=run.key, results=results, label="fine")


@pytest.fixture
def grid(monkeypatch):
    """Hand-made scores: two networks, two seeds, two sets; each method hits in a share of twenty images."""

    def scores(seed, base):
        rows = []
        for state, factor in (("FR", 0.25), ("SR", 0.5), ("trained", 1.0)):
            for place, method in enumerate(measure.METHODS):
                for smoothed in (False, True):
                    share = factor * base * (0.3 + 0.05 * place + (0.1 if smoothed and place < 3 else 0))
                    hits = (np.arange(20) < round(20 * share)).astype(float)
                    ids = [f"i{n}" for n in range(20)]
                    facts = {"state": state, "method": method, "smoothed": smoothed, "hit": hits, "hit_share": hits}
                    rows.append(pd.DataFrame({"image_id": ids, "patient_id": ids, "found": True} | facts))
        return pd.concat(rows, ignore_index=True)

    class Train:
        kind = "train"

        def __init__(self, view, model, weights, seed):
            self.parameters = train.TrainParameters(
                dataset_options={"view": view}, model=model, weights=weights, seed=seed
            )

    class Scores:
        def __init__(self, tables):
            self.tables, self.folder = tables, _Everywhere()

        def frame(self, name):
            return self.tables[name]

        def arrays(self):
            return runs.Run.arrays(self)

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
    monkeypatch.setattr(Study, "pairs", lambda study, kind: made)
    return Study("hand-made", tuple(run for run, _ in made))


class _Everywhere:
    """A folder in which every file is."""

    def __truediv__(self, name):
        return self

    def is_file(self):
        return True


@pytest.fixture
def page(grid, monkeypatch):
    """What a page of the paper displays up to a cell: tables by caption."""
    monkeypatch.setattr(cxrkit.grid, "load", lambda name: grid)
    monkeypatch.setattr(Study, "notice", "")

    def displayed(name, last, **parameters):
        shown = run_cells(f"papers/normgrad/{name}", last, **parameters)["_displayed"]
        return {one.caption: one.data.set_index(one.data.columns[0]) for one in shown}

    return displayed


def test_tables_hold_every_method_and_the_printed_cells(page):
    shown = page("study", "cell-11")
    table = shown["the phantom, in place of LVOT: resnet18"]
    assert table.loc["Grad-CAM", "paper, trained"] == 0.547
    assert table.loc["Grad-CAM", "ours, trained"] == "0.450 ± 0.000"
    assert table.loc["Grad-CAM", "ours, SR"] == "–"
    assert table.loc["centre of the image", ["ours, SR", "ours, trained"]].tolist() == ["–", "0.900"]
    objects = shown["the phantom, in place of Object-CXR: efficientnet_lite0, pre-trained"]
    assert objects["paper, trained"].dropna().empty  # the printed numbers are of a ResNet
    assert shown["the phantom, in place of Object-CXR: resnet18"].loc["Conv3 × 3 single", "paper, trained"] == 0.853
    assert objects["ours, SR"].iloc[0] == "0.200 ± 0.000"  # 4 of 20
    smoothing = shown["the phantom, in place of LVOT"]
    assert smoothing.loc["Input × gradient", "change"] > 0.05
    assert smoothing.loc["Grad-CAM", "change"] == 0


def test_difference_of_means_and_its_interval(page):
    row = page("study", "cell-13")["the phantom, in place of LVOT"].loc["Conv3 × 3 multi"]
    assert row["DoM, ours"] == pytest.approx(abs(15 / 20 - round(20 * 0.9 * 0.75) / 20))
    assert row["low"] <= row["DoM, ours"] <= row["high"]


def test_claims_find_what_was_put_in(grid):
    found = normgrad.verdicts(grid).set_index("claim")
    assert found.loc["Training raises the hits (LVOT)", "verdict"] == "same direction"
    layers = found.loc["Conv3 × 3 gains by several layers of a ResNet (LVOT)"]
    assert layers["paper"] == "0.602 against 0.43"
    assert layers["verdict"] == "undecided here" or layers["ours"] > 0
    assert found.loc["Smoothing helps pixel maps more than the others (LVOT)", "verdict"] == "same direction"
    assert found.loc["Grad-CAM hits least often (Object-CXR)", "verdict"] in ("same direction", "undecided here")
    assert "can't be tested here" not in " ".join(found["verdict"])


def test_claims_state_the_printed_numbers():
    stated, rows = published.scalars("normgrad"), claims.read("normgrad").set_index("id")
    hits = {name: float(stated[f"lvot_R50_{name}_trained_PG"]) for name in
            ("gradcam", "ng_conv1x1_multi", "ng_conv3x3_single", "ng_conv3x3_multi")}  # fmt: skip
    assert rows.loc["multi_gradcam", "published"] == pytest.approx(100 * (hits["ng_conv1x1_multi"] - hits["gradcam"]))
    layers = hits["ng_conv3x3_multi"] - hits["ng_conv3x3_single"]
    assert rows.loc["multi_single", "published"] == pytest.approx(100 * layers)


def test_a_grid_without_scores_says_how_to_make_them():
    with pytest.raises(ParameterError, match="grid run normgrad"):
        normgrad.pairs(Study("empty", ()))


def test_mean_over_seeds_in_closed_form():
    frame = pd.DataFrame(
        {"image_id": list("abab"), "patient_id": list("abab"), "seed": [0, 0, 1, 1], "m": 1, "hit": [1.0, 0, 1, 1]}
    )
    row = normgrad.means(frame, ["m"], "hit").iloc[0]
    assert row[["mean", "std", "text", "seeds", "images"]].tolist() == [0.75, 0.25, "0.750 ± 0.250", 2, 2]


def test_maps_of_two_runs_are_alike_and_the_middle_is_found(page, monkeypatch):
    maps = np.zeros((2, 10, 2, 9, 9), np.float32)
    maps[..., 0, 4, 4] = maps[..., 1, 0, 8] = 1
    kept = {
        "image_ids": np.array(["a", "b"]),
        "images": np.zeros((2, 9, 9)),
        "boxes": maps[0, 0] > 0,
        "states": np.array(["FR", "trained"]),
        "methods": np.array(measure.METHODS),
        "maps": maps,
    }
    monkeypatch.setattr(runs.Run, "arrays", lambda run: kept)
    monkeypatch.setattr(normgrad, "frames", lambda study, which: pd.DataFrame({"set": []}))
    shown = page("maps", "agreement")
    assert shown["the phantom, in place of LVOT"].eq(1).all(axis=None)
    monkeypatch.setattr(figures, "paper_beside_ours", lambda table, *caption, **options: table)
    names = run_cells("papers/normgrad/maps", "cell-17", image=1)
    assert names["central"][["resnet18", "efficientnet_lite0"]].eq(0.5).all(axis=None)


def test_the_mirrored_disc_misses_off_the_diagonal(page):
    cells = run_cells("papers/normgrad/findings", "cell-4")
    rows = pd.DataFrame(cells["perfect_maps"](load_phantom(view="objects", images=20, size=64)))
    assert (rows["right"] == 100).all()
    assert rows["transposed"].mean() < 60
    assert (rows.loc[rows["pixels off"] < 1, "transposed"] == 100).all()


def test_a_block_without_its_skip():
    """Second, slow implementation: the last block written out by hand."""
    model = cxrkit.models.create("resnet18", ["a", "b"], seed=1).eval()
    images = torch.rand(2, 1, 64, 64)
    bare, layer = measure.without_skip(model)
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
    maps, said = measure.gradcam_of_code(model, images, torch.tensor([0, 1]))
    assert torch.equal(said, expected.argmax(1))
    weights = torch.autograd.functional.jacobian(
        lambda values: network.fc(block.bn2(values).mean((2, 3)))[0, 0], inner[:1]
    )
    small = (1 + (weights.mean((2, 3), keepdim=True) * inner[:1]).sum(1)).relu()
    large = torch.nn.functional.interpolate(small[None], size=64, mode="bilinear")[0, 0]
    torch.testing.assert_close(maps[0], large, atol=1e-5, rtol=1e-4)
    with pytest.raises(ParameterError, match="layer4"):
        measure.without_skip(cxrkit.models.create("efficientnet_lite0", ["a"]))


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
        assert kinds.count("train") == kinds.count("measure") == trainings


def test_what_cutting_a_map_does_in_closed_form():
    ids = [f"i{n}" for n in range(4)]
    rows = [
        pd.DataFrame({"image_id": ids, "patient_id": ids, "method": "InputXGrad", "variant": variant, "hit_share": hit})
        for variant, hit in (("raw", 1.0), ("text", 1.0), ("clipped, raw", 0.0), ("clipped", 1.0))
    ]
    quirks = pd.concat(rows).assign(set="LVOT", seed=0)
    ways = run_cell("papers/normgrad/findings", "ways", normgrad=normgrad)["ways"]
    found = {variant: rest for variant, *rest in ways(quirks)}  # methods, by the text, variant's hits, difference
    assert found["clipped"][:4] == [1, 1, 1, 0]
    assert found["clipped, raw"][:4] == [1, 1, 0, -1]
