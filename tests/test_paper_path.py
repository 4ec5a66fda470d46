"""Paper `path`: its measures in closed form, its tables from runs whose numbers are known, its arithmetic."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import second_device
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_cells import run_cells

import cxrkit
from cxrkit import ParameterError, grid
from cxrkit.attribution.xrai import top_fraction
from cxrkit.study import published, report, runs, training
from cxrkit.study.notebook import parameters_for
from cxrkit.study.study import Study
from cxrkit.train import TrainParameters, devices, load_data, make_model
from cxrkit.train.scoring import predict
from papers.path import measure as measuring
from papers.path import tables as path

SMALL = {"images": 2, "stable_images": 1, "n_steps": 2, "n_samples": 2, "blur_steps": 2, "xrai_steps": 2}
LABELS = ("COVID-19", "Lung Opacity", "No Finding")


class Linear(torch.nn.Module):
    """Logits that are sums over parts of the image; a Classifier's face."""

    def __init__(self, classes: int = 3, activation: str = "softmax"):
        super().__init__()
        self.labels, self.card = tuple("abcd"[:classes]), {"activation": activation}
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(classes, 64, generator=generator))

    def encode(self, images):
        return images

    def classify(self, encoded):
        return encoded.flatten(1) @ self.weight.T

    def forward(self, images):
        return self.classify(self.encode(images))


# Measuring


def test_the_sigmoid_of_the_odds_is_the_softmax_and_so_is_its_gradient():
    model = Linear()
    images = torch.rand(3, 1, 8, 8)
    odds = measuring.SoftmaxOdds(model)
    assert torch.allclose(odds(images).sigmoid(), model(images).softmax(1), atol=1e-6)
    inputs = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(inputs).softmax(1)[:, 1].sum(), inputs)
    found = cxrkit.attribute(odds, images, "saliency", labels=["b"], output="probability")
    assert torch.allclose(found[:, 0], wanted[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "output"),
    [(Linear(), "logit"), (Linear(activation="sigmoid"), "probability"), (Linear(1), "probability")],
)
def test_without_exclusive_classes_or_for_the_logit_the_network_stays_as_it_is(model, output):
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(measuring.SoftmaxOdds(model, output)(images), model(images))


def test_smoothing_without_noise_squares_the_map():
    even = torch.full((2, 1, 4, 4), 0.5)  # its range is 0, so is the noise
    found = measuring.smoothed(lambda images: -4 * images[:, 0], even, n_samples=3)
    assert torch.equal(found, torch.full((2, 4, 4), 4.0))
    assert torch.equal(
        measuring.smoothed(lambda images: -4 * images[:, 0], even, 3, squared=False), torch.full((2, 4, 4), -2.0)
    )


def test_the_noise_of_an_image_has_a_fixed_share_of_its_range_and_follows_from_the_seed():
    images = torch.zeros(2, 1, 64, 64)
    images[:, :, 0, 0] = torch.tensor([1.0, 2.0])[:, None]
    seen = []
    measuring.smoothed(lambda noisy: seen.append(noisy) or noisy[:, 0], images, n_samples=1, seed=5)
    deviation = (seen[0] - images).flatten(1).std(1)
    assert deviation.tolist() == pytest.approx([0.15, 0.3], rel=0.05)
    measuring.smoothed(lambda noisy: seen.append(noisy) or noisy[:, 0], images, n_samples=1, seed=5)
    measuring.smoothed(lambda noisy: seen.append(noisy) or noisy[:, 0], images, n_samples=1, seed=6)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_overlap_in_closed_form():
    kept, regions = torch.zeros(3, 10, 10, dtype=torch.bool), torch.zeros(3, 10, 10, dtype=torch.bool)
    kept[0, :3], regions[0, 2:4] = True, True  # 30 kept, 20 in the region, 10 in both
    regions[1, :5] = True  # nothing kept
    kept[2, :3] = True  # nothing to be found
    found = measuring.overlap_scores(kept, regions)
    assert found["kept"].tolist() == pytest.approx([0.3, 0, 0.3])
    assert found["precision"][0] == pytest.approx(1 / 3)
    assert found["iou"][0] == pytest.approx(10 / 40)
    assert found["best_iou"][0] == pytest.approx(20 / 30)
    assert found["chance_iou"][0] == pytest.approx(0.06 / (0.3 + 0.2 - 0.06))
    for name in ("precision", "iou"):
        assert np.isnan(found[name][1:]).all(), name
    assert np.isnan(found["best_iou"][2])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(0, 2**31))
def test_no_region_beats_the_bound_on_its_overlap(area, share, seed):
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    region = (torch.arange(100) < area)[order].view(1, 10, 10)
    kept = (torch.arange(100) < share).view(1, 10, 10)
    found = measuring.overlap_scores(kept, region)
    assert found["iou"][0] <= found["best_iou"][0] + 1e-6


def test_neighbours_of_the_same_patient_do_not_count():
    of = pd.DataFrame({"patient_id": list("aabb"), "label": ["x", "x", "x", "y"]})
    features = torch.tensor([[0.0], [0.1], [0.3], [5.0]])
    # Nearest of another patient: c of a, c of b, b of c, b of d.
    assert measuring.same_neighbour(features, of).tolist() == [1, 1, 1, 0]
    alone = measuring.same_neighbour(features[:2], of[:2])
    assert np.isnan(alone).all()


def kept_run(results, parameters, data=None):
    """A run of a network with random weights and the probabilities of a softmax."""
    data = load_data(parameters) if data is None else data
    model = make_model(parameters, data.labels)
    model.card["activation"] = "softmax"
    with runs.writing(parameters) as store:
        store.frame("predictions", predict(model, data.split("test")))
        cxrkit.models.save(model, store.folder / "model.safetensors")
    return {"run": runs.key(parameters), "results": str(results)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """On a few images of three exclusive classes."""
    results = tmp_path_factory.mktemp("results")
    options = {"view": "diagnosis", "images": 60, "conspicuity": 2.0}
    where = {"dataset_options": options, "size": 32, "results": str(results)}
    return kept_run(results, TrainParameters(**where, model="resnet18", loss="cross_entropy"))


@pytest.fixture(scope="module")
def cells(run):
    """The names of `measure.ipynb`."""
    return run_cells("papers/path/measure", **run, device="cpu", **SMALL)


def test_images_with_a_finding_are_explained_by_their_predicted_class(cells):
    assert cells["regions"].flatten(1).any(1).all()
    logits = cells["model"](cells["batch"].images)
    assert cells["predicted"].tolist() == logits.argmax(1).tolist()
    frame = cells["who"]
    assert list(frame) == ["image_id", "patient_id", "predicted", "right", "probability"]
    assert frame["probability"].to_numpy() == pytest.approx(logits.softmax(1).amax(1).detach().numpy(), abs=1e-5)
    targets = cells["batch"].targets
    assert frame["right"].tolist() == [targets[row, at].item() == 1 for row, at in enumerate(cells["predicted"])]
    assert cells["parameters"].run == cells["run"].key


def test_each_image_is_explained_by_its_own_class():
    images, predicted = torch.rand(4, 1, 8, 8), torch.tensor([0, 2, 1, 2])
    model = Linear()
    make = lambda label, part: part[:, 0] * model.weight[label].view(8, 8)  # noqa: E731
    found = measuring.by_class(images[:3], predicted, make)
    for row in range(3):
        assert torch.equal(found[row], make(predicted[row], images[row : row + 1])[0])


def test_every_method_explains_the_probability(cells):
    maps, images = cells["maps"], cells["batch"].images
    assert list(maps) == list(measuring.METHODS) == cells["cost"]["method"].tolist()
    inputs = images.clone().requires_grad_()
    chances = cells["model"].classify(cells["model"].encode(inputs)).softmax(1)
    (gradient,) = torch.autograd.grad(chances[torch.arange(len(inputs)), cells["predicted"]].sum(), inputs)
    gap = (maps["vanilla"] - gradient[:, 0]).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    assert (gap < 0.05).all()  # a batch of another size rounds otherwise, which turns a few ReLUs
    for name, own in maps.items():
        assert own.shape == (len(inputs), 32, 32), name
        assert own.isfinite().all(), name
    for name in ("smoothgrad", "smoothgrad_ig", "smooth_blur_ig"):
        assert (maps[name] >= 0).all(), f"{name} is squared"
    again = cells["explain"](["smoothgrad_ig"])["smoothgrad_ig"]
    assert torch.equal(again, maps["smoothgrad_ig"])


def test_what_is_high_is_at_most_what_was_asked_for(cells):
    overlap = cells["overlap"].query("output == 'probability' and fraction == 0.3")
    assert set(overlap["method"]) == {*measuring.METHODS, "both"}
    assert overlap["kept"].max() <= 0.3 + 1e-3
    both = overlap[overlap["method"] == "both"]["kept"].to_numpy()
    assert (both <= overlap[overlap["method"] == "xrai"]["kept"].to_numpy() + 1e-9).all()
    assert cells["variants"]["correlation"].between(-1, 1).all()
    assert len(cells["stability"]) == SMALL["stable_images"] * len(cells["parameters"].stable_methods)
    assert len(cells["kept"]["predicted"]) == SMALL["images"]


def test_from_black_the_start_is_what_the_network_says_of_black(cells):
    found, predicted = cells["baselines"], cells["predicted"]
    black = found[found["baseline"] == "black"]
    assert black["similarity"].to_numpy() == pytest.approx(1)
    chances = cells["model"](torch.zeros_like(cells["batch"].images)).softmax(1).detach()
    wanted = [chances[row, place].item() for row, place in enumerate(predicted)]
    assert black["start"].tolist() == pytest.approx(wanted, abs=1e-5)
    way = cells["saturation"]
    assert way.groupby("alpha")["p"].mean().iloc[0] == pytest.approx(np.mean(wanted), abs=1e-5)
    assert (way["gradient_probability"] <= way["gradient_logit"]).all()  # here p (1 - p) and the other logits lower it


def test_embeddings_hold_every_test_image_at_every_stage(cells):
    found = cells["embedding"]
    stages = dict.fromkeys(("pixels", "untrained", "trained"), len(cells["data"]))
    assert found.groupby("stage").size().to_dict() == stages
    wide = found.pivot(index="image_id", columns="stage", values="x")
    assert np.allclose(wide["untrained"], wide["trained"], atol=1e-3)  # the weights are those of the start
    assert set(found["same"].dropna()) <= {0, 1}


def test_on_another_device_everything_is_measured_alike(cells, run, monkeypatch):
    monkeypatch.setattr(devices, "chosen_device", lambda parameters: second_device.DEVICE)
    with second_device.SecondDevice():
        other = run_cells("papers/path/measure", **run, device="cpu", **SMALL)
        with pytest.raises(RuntimeError, match="on the CPU"):
            other["model"](other["batch"].images)
    for name in ("who", "embedding", "saturation", "baselines"):
        pd.testing.assert_frame_equal(other[name], cells[name], atol=1e-4)


def test_where_it_computes_is_no_part_of_a_measurement():
    check = parameters_for("notebooks/papers/path/measure.ipynb")
    assert check(run="a", device="cpu", threads=1).identity() == check(run="a", device="cuda").identity()
    assert not {"device", "threads"} & set(check(run="a").identity())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images must be 1 or more"),
        ({"n_steps": 1}, "n_steps must be 2"),
        ({"fraction": 1.0}, "fraction must lie between 0 and 1"),
        ({"logit_methods": ["gradcam"]}, "unknown; known: vanilla"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ParameterError, match=message):
        measuring.checked(parameters_for("notebooks/papers/path/measure.ipynb")(**change))


def test_a_network_of_exclusive_classes_trains_and_says_probabilities_that_sum_to_one(tmp_path):
    options = {"view": "diagnosis", "images": 60, "conspicuity": 2.0}
    parameters = TrainParameters(
        dataset_options=options, size=32, model="resnet18", loss="cross_entropy", class_weights="balanced", epochs=1,
        criterion="loss", results=str(tmp_path), device="cpu",
    )  # fmt: skip
    run = runs.find(training.train(parameters), tmp_path)
    assert cxrkit.models.load(run.folder / "model.safetensors").card["activation"] == "softmax"
    predictions = run.frame("predictions")
    assert predictions.groupby("image_id")["probability"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert predictions.groupby("image_id")["target"].sum().eq(1).all()
    accuracy = path.decided(predictions)["right"].mean()
    assert run.frame("classification").set_index("label").loc["micro", "f1"] == pytest.approx(accuracy)


# Tables


def predictions(rows: list[tuple[int, list[float]]], labels=LABELS) -> pd.DataFrame:
    """(true class, probabilities) of images of as many patients."""
    return pd.DataFrame(
        [
            {
                "image_id": f"i{number}",
                "patient_id": f"p{number}",
                "label": label,
                "target": float(place == truth),
                "probability": chances[place],
            }
            for number, (truth, chances) in enumerate(rows)
            for place, label in enumerate(labels)
        ]
    )


ROWS = [(0, [0.4, 0.3, 0.3]), (0, [0.2, 0.5, 0.3]), (1, [0.1, 0.8, 0.1]), (2, [0.3, 0.3, 0.4])]


def test_each_image_gets_the_class_of_highest_probability_even_below_one_half():
    one = path.decided(predictions(ROWS))
    assert one["predicted"].tolist() == [LABELS[place] for place in (0, 1, 1, 2)]
    assert one["right"].tolist() == [True, False, True, True]
    by_class = report.classification_of(predictions(ROWS), exclusive=True)
    assert by_class.set_index("label").loc["micro", "f1"] == pytest.approx(0.75)


def test_an_image_without_a_label_has_no_truth():
    frame = predictions(ROWS)
    frame.loc[frame["image_id"] == "i0", "target"] = 0.0
    assert path.decided(frame)["truth"].tolist()[0] == "none"


PRECISION = {"vanilla": 0.1, "ig": 0.3, "guided_ig": 0.2, "xrai": 0.4, "blur_ig": 0.05, "both": 0.5}


def rows_of(count: int, **columns) -> pd.DataFrame:
    known = {"image_id": [f"i{n}" for n in range(count)], "patient_id": [f"p{n // 2}" for n in range(count)]}
    return pd.DataFrame(known).assign(predicted="a", right=[n > 0 for n in range(count)], probability=0.9, **columns)


class MadeRun:
    """A run that holds frames alone."""

    def __init__(self, kind, frames, model="", run="", dataset="phantom"):
        self.kind, self.frames, self.key = kind, frames, f"{kind}-{dataset}-{model}{run}"
        names = {"model": model, "run": run, "seed": 0, "dataset": dataset}
        self.parameters = SimpleNamespace(**names)

    def frame(self, name):
        return self.frames[name].copy()


def scores_of(steady: float) -> dict[str, pd.DataFrame]:
    jitter = np.linspace(-0.01, 0.01, 12)
    parts = [
        rows_of(12, method=method, fraction=share, output="probability", precision=value + jitter)
        for method, value in PRECISION.items()
        for share in (0.3, 0.35)
    ]
    parts.append(rows_of(12, method="ig", fraction=0.3, output="logit", precision=0.9))
    overlap = pd.concat(parts).assign(kept=0.3, iou=0.1, area=0.05, chance_iou=0.04, best_iou=0.15)
    stable = [rows_of(12, method=m, noise=0.02, similarity=steady + jitter) for m in ("vanilla", "guided_ig", "ig")]
    starts = [rows_of(12, baseline=n, similarity=v + jitter) for n, v in {"black": 1.0, "white": 0.4}.items()]
    stages = {"pixels": 0, "untrained": 0, "trained": 1}
    space = [rows_of(12, stage=s, label="a", x=0.0, y=1.0, same=v, same_plane=v) for s, v in stages.items()]
    variants = rows_of(12, correlation=0.8, iou=0.6, kept_full=0.25, kept_fast=0.3, values=9)
    cost = pd.DataFrame({"method": ["xrai", "xrai_fast"], "seconds": [2.0, 1.5]})
    tables = {"overlap": overlap, "variants": variants, "cost": cost}
    return tables | {"stability": pd.concat(stable), "baselines": pd.concat(starts), "embedding": pd.concat(space)}


@pytest.fixture
def made() -> Study:
    """A grid of DenseNet121 and Xception on the phantom whose scores are known: Xception is less stable."""
    found = []
    for model, steady in {"densenet121": 0.9, "xception": 0.5}.items():
        trained = MadeRun("train", {"predictions": predictions(ROWS * 3)}, model=model)
        found += [trained, MadeRun("path_measure", scores_of(steady), run=trained.key)]
    return Study("path", tuple(found))


def test_the_table_of_networks_holds_every_published_row_and_our_accuracy(made):
    table = path.models(made).set_index("network")
    assert len(table) == 9
    assert table.loc["DenseNet121", "ours"] == pytest.approx(75)
    assert table.loc["DenseNet121", "paper"] == pytest.approx(88.4458)
    assert set(table["set"]) == {"radiographs"}
    assert table.loc["DenseNet121", "low"] <= 75 <= table.loc["DenseNet121", "high"]
    assert table.loc["DenseNet121", "largest class"] == pytest.approx(50)
    assert table.loc["VGG16", ["ours", "low"]].isna().all()


def test_two_sets_stay_apart():
    """A network that is right on MRI and wrong on radiographs, under the same name, shows 100 and 0."""
    found = []
    for dataset, right in {"brain_mri": True, "covid_radiography": False}.items():
        frame = predictions(ROWS * 3)
        wanted = frame["target"] if right else 1 - frame["target"]
        trained = MadeRun("train", {"predictions": frame.assign(probability=wanted)}, "densenet121", dataset=dataset)
        found += [trained, MadeRun("path_measure", scores_of(0.9), run=trained.key, dataset=dataset)]
    both = Study("path", tuple(found))
    table = path.models(both).set_index(["set", "network"])
    assert table.loc[("MRI", "DenseNet121"), ["ours", "paper"]].tolist() == pytest.approx([100, 98.1013])
    assert table.loc[("radiographs", "DenseNet121"), ["ours", "paper"]].tolist() == pytest.approx([0, 88.4458])
    assert np.isnan(table.loc[("MRI", "InceptionResNetV2"), "paper"])
    scores = path.per_method(both, "overlap", "precision", fraction=0.3, right=True, output="probability")
    assert scores.groupby("set")["n"].unique().map(list).to_dict() == {"MRI": [11], "radiographs": [11]}
    assert path.agreement(both)["set"].tolist() == ["MRI", "radiographs"]
    claims = path.verdicts(both)["claim"]
    for of in ("MRI", "radiographs"):
        assert f"XRAI lies on the finding more than the vanilla gradient ({of})" in set(claims)


def test_scores_by_method_leave_wrong_images_out_where_asked(made):
    table = path.per_method(made, "overlap", "precision", fraction=0.3, right=True)
    assert len(table) == 2 * len(PRECISION)
    xrai = table[table["method"] == "XRAI, full"].iloc[0]
    assert xrai["n"] == 11
    assert xrai["precision"] == pytest.approx(0.4 + np.linspace(-0.01, 0.01, 12)[1:].mean())
    assert xrai["low"] <= xrai["precision"] <= xrai["high"]
    assert xrai["best_iou"] == pytest.approx(0.15)
    every = path.per_method(made, "overlap", "precision", fraction=0.3, output="probability")
    assert every["n"].unique().tolist() == [12]
    assert every[["degenerate", "patients"]].drop_duplicates().to_numpy().tolist() == [[0, 6]]


def test_what_is_kept_counts_maps_of_the_probability_where_the_class_is_right(made):
    table = path.STORED["Precision of the strongest 30 %"](made)
    assert table["n"].unique().tolist() == [11]
    assert table.set_index("method").loc["Integrated gradients", "precision"].max() < 0.31


def test_claims_have_the_direction_that_was_put_in(made):
    table = path.verdicts(made).set_index("claim")
    verdicts = {claim: row["verdict"] for claim, row in table.iterrows()}
    assert verdicts["XRAI lies on the finding more than the vanilla gradient (radiographs)"] == "same direction"
    assert verdicts["Xception's maps are the least stable (radiographs)"] == "same direction"
    assert table.loc["Xception's maps are the least stable (radiographs)", "ours"] == pytest.approx(-40)
    assert verdicts["Training parts the classes: right neighbours (radiographs)"] == "same direction"
    assert verdicts["Guided IG withstands noise better than the vanilla gradient (radiographs)"] == "undecided here"
    assert verdicts["DenseNet121 classifies MRI best, before Xception"] == "can't be tested here: the grid has no MRI"
    assert verdicts["Xception classifies radiographs better than DenseNet121"] == "undecided here"
    missing = verdicts["InceptionResNetV2 classifies radiographs best, before VGG16"]
    assert missing == "can't be tested here: the shown grid has no such networks or images"
    assert table.loc["Xception classifies radiographs better than DenseNet121", "paper"] == "+0.5"
    assert table.loc[
        "XRAI with Blur IG (35 %) finds the outline: IoU above chance (radiographs)", "ours"
    ] == pytest.approx(6)
    moved = table.loc["Another baseline moves the maps of integrated gradients more than faint noise (radiographs)"]
    assert moved["ours"] == pytest.approx(60 - 30)  # noise moves them by 0.1 on one network, by 0.5 on the other
    assert table.loc["DenseNet121 classifies MRI best, before Xception", "paper"] == "+1.4"


def test_full_and_fast_xrai_agree_as_was_put_in(made):
    alike = path.agreement(made).set_index("network")
    assert alike.loc["Xception", "kept, %"] == pytest.approx(25)
    assert alike.loc["DenseNet121", "full, s"] == 2.0


def test_a_claim_about_networks_that_are_not_there_says_so(made):
    one = Study("path", tuple(run for run in made.runs if "xception" not in run.key))
    verdict = path.verdicts(one).set_index("claim").loc["Xception's maps are the least stable", "verdict"]
    assert verdict == "can't be tested here: the shown grid has no such networks or images"


def test_a_grid_without_scores_is_refused(made):
    with pytest.raises(ParameterError, match=r"no finished run of measure\.ipynb"):
        path.pairs(Study("path", tuple(made.trained)))


# What the code really did


@pytest.mark.parametrize(("column", "smallest", "count"), [("top1_brain", 632, 8), ("top1_covid", 978, 9)])
def test_every_printed_accuracy_is_a_multiple_of_one_fraction(column, smallest, count):
    values = published.table("path/tab3_models")[column].dropna()
    assert len(values) == count
    found = path.denominators(values)
    assert found[0] == smallest
    assert all(n % smallest == 0 for n in found)
    slow = next(n for n in range(1, 2000) if all(any(round(k / n, 6) == v for k in range(n + 1)) for v in values[:1]))
    assert smallest >= slow


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 400), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_true_denominator_always_fits(n, shares):
    values = [round(round(share * n) / n, 6) for share in shares]
    assert n in path.denominators(values, most=400)


def test_a_split_of_images_finds_what_is_not_there_and_a_split_of_patients_does_not():
    page = run_cells("papers/path/findings", "leak-rows")
    rows = page["leak"](*page["patients_of"](0.0, images=150))
    found = pd.DataFrame(rows).set_index(["split", "classifier"])["accuracy"]
    assert (found["by image"] > found["by patient"] + 0.05).all()


def test_a_mask_of_30_percent_keeps_less_where_values_tie():
    smooth = torch.rand(100, 100)
    assert top_fraction(smooth, 0.3).double().mean() == pytest.approx(0.3, abs=1e-4)
    assert not top_fraction(torch.ones(10, 10), 0.3).any()


# Pages


def test_the_grid_and_its_profile_are_valid():
    quick, full = grid.plan("path"), grid.plan("path", "full")
    assert {task.parameters.model for task in quick if task.needs is None} <= {*path.NETWORKS.values()}
    trained = [task.parameters for task in full if task.needs is None]
    assert {p.model for p in trained} == {*path.NETWORKS.values()}
    own = TrainParameters.preset("path/covid_radiography/densenet121")
    for name in ("size", "epochs", "batch_size", "optimizer", "learning_rate", "schedule", "schedule_decay"):
        assert {getattr(p, name) for p in trained} == {getattr(own, name)}, name
    assert [p.momentum for p in trained] == pytest.approx([own.momentum] * len(trained), abs=1e-3)


def test_real_slices_are_measured(shared_data, tmp_path):
    root = tmp_path / "brain"
    shutil.copytree(shared_data / "brain_mri", root)
    table = pd.read_csv(root / "images.csv")
    table["labels"] = np.where(table["view"].str.contains("flair"), "FLAIR", "T1Gd")
    table["patient_id"] = table["image_id"].str.replace(r"_z.*", "", regex=True)  # parts of the two patients
    table.to_csv(root / "images.csv", index=False)
    boxes = pd.read_csv(root / "boxes.csv")
    boxes["label"] = boxes["image_id"].map(table.set_index("image_id")["labels"])
    boxes.to_csv(root / "boxes.csv", index=False)
    where = {"dataset": "folder", "root": str(root), "results": str(tmp_path / "results")}
    parameters = TrainParameters(**where, size=32, model="resnet18", loss="cross_entropy")
    found = run_cells("papers/path/measure", **kept_run(tmp_path / "results", parameters), **SMALL)
    overlap = found["overlap"].query("output == 'probability'")
    assert overlap["area"].between(0.001, 0.5).all()
    assert overlap.groupby("method")["precision"].mean().dropna().between(0, 1).all()
