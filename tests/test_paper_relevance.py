"""Paper `relevance`: scores of boxed positives, its tables from runs made by hand, verdicts, and the checklist."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import cxrkit
from book.tools import checklist
from cxrkit.errors import DataError, ParameterError
from cxrkit.train.parameters import TrainParameters
from papers.relevance import maps as relevance_maps
from papers.relevance import measure as measuring
from papers.relevance import tables as relevance

OPTIONS = {"view": "multilabel", "images": 60, "conspicuity": 2.0}
LABELS = ["Cardiomegaly", "Pleural effusion"]


@pytest.fixture(scope="module")
def bench():
    trained = TrainParameters(dataset_options=OPTIONS, size=32, model="resnet18")
    data = cxrkit.data.load("phantom", size=32, fold=0, **OPTIONS)
    # The stage before the last one keeps more than one cell at this size.
    model = cxrkit.models.create("resnet18", data.labels).eval()
    return measuring.Bench(trained, model, data.split("test").cached(), LABELS, list(measuring.METHODS))


@pytest.fixture(scope="module")
def scores(bench):
    return measuring.scores(bench, images=2)


def slow_iou(values: np.ndarray, mask: np.ndarray, threshold: float) -> tuple[float, float]:
    """Foreground and two-class IoU straight from their definitions."""
    values = np.maximum(values, 0)
    found = [[value >= threshold * values.max() and value > 0 for value in row] for row in values]
    counts = {"both": 0, "either": 0, "neither": 0}
    for row_found, row_mask in zip(found, mask, strict=True):
        for one, inside in zip(row_found, row_mask, strict=True):
            counts["both"] += one and inside
            counts["either"] += one or inside
            counts["neither"] += not one and not inside
    foreground = counts["both"] / counts["either"]
    background = counts["neither"] / (mask.size - counts["both"])
    return foreground, (foreground + background) / 2


def test_scores_are_those_of_the_definition(bench, scores):
    label = LABELS[0]
    row = bench.rows(label, 2)[0]
    batch = bench.images.batch([row])
    mask = batch.masks[0, bench.images.labels.index(label)].numpy()
    for method in measuring.METHODS:
        values = measuring.maps_of(bench, batch.images, label, method)[0].numpy()
        found = scores[(scores["image_id"] == batch.image_ids[0]) & (scores["label"] == label)]
        found = found[(found["method"] == method) & (found["percentile"] == 100) & (found["threshold"] == 0.3)].iloc[0]
        if values.max() <= 0:
            assert np.isnan(found["two_class"])
            continue
        assert slow_iou(values, mask, 0.3) == pytest.approx((found["foreground"], found["two_class"]), abs=1e-4)
        assert found["area"] == pytest.approx(mask.mean())


def test_scores_hold_every_combination_and_their_limits(bench, scores):
    pairs = scores.groupby(["image_id", "label"]).ngroups
    assert len(scores) == pairs * 3 * 2 * 5
    known = scores.dropna(subset=["two_class"])
    assert (known["two_class"] >= known["foreground"] / 2 - 1e-6).all()
    assert known["covered"].between(0, 1).all()
    falling = known.sort_values("threshold").groupby(["image_id", "label", "method", "percentile"])["covered"]
    assert falling.apply(lambda shares: shares.is_monotonic_decreasing).all()


def test_relevance_that_starts_from_one_is_the_quotient():
    maps = torch.tensor([[[[2.0, -4.0]], [[3.0, 0.0]], [[1.0, 1.0]]]])
    found = measuring.unit_start(maps, torch.tensor([[-2.0, 3.0, 0.0]]))
    assert found[0, :, 0].tolist() == [[-1.0, 2.0], [1.0, 0.0], [0.0, 0.0]]


def test_a_negative_logit_leaves_lrp_nothing_unless_it_starts_from_one(bench):
    label, column = LABELS[0], list(bench.model.labels).index(LABELS[0])
    images = bench.images.batch(bench.rows(label, 1)).images
    with torch.no_grad():
        bench.model.network.fc.bias[column] -= 100
        maps = {}
        for bench.start in ("logit", "one_hot"):
            maps[bench.start] = measuring.maps_of(bench, images, label, "lrp")
        bench.model.network.fc.bias[column] += 100
    assert maps["logit"].max() <= 0
    assert maps["one_hot"].max() > 0


def test_sanity_compares_with_other_labels_and_random_weights(bench):
    found = measuring.sanity(bench, images=1)
    assert set(found["check"]) == {"another label", "random head", "random network"}
    alike = found.groupby(["method", "check"])["correlation"].mean()
    assert alike["lrp", "another label"] > 0.9 > abs(alike["cam", "another label"])
    assert found["rank_correlation"].dropna().between(-1, 1).all()


def test_the_other_label_of_a_network_with_one_scored_label_is_any_of_its_labels(bench):
    alone = measuring.Bench(bench.trained, bench.model, bench.images, LABELS[:1], ["cam"])
    assert "another label" in set(measuring.sanity(alone, images=1)["check"])


def test_kept_maps(bench):
    kept = measuring.gallery(bench, 2)
    assert kept["maps"].shape == (3, len(kept["labels"]), 32, 32)
    assert list(kept["methods"]) == ["cam", "lrp", "rap"]
    first = kept["logits"][kept["labels"] == LABELS[0]]
    assert list(first) == sorted(first, reverse=True)


def test_intention_explains_positives_for_the_label_and_normal_images_for_the_highest_score(bench):
    of = {"dataset_options": {"view": "binary", "images": 60, "prevalence": {"Pneumonia": 0.5}}}
    kept, predictions = measuring.intention(bench, "Pneumonia", 2, stand_in="Lung Opacity", of=of)
    assert list(kept["groups"]) == ["positive"] * 2 + ["normal"] * 2
    assert set(kept["explained"][:2]) == {"Lung Opacity"}
    assert kept["masks"][:2].any((1, 2)).all()
    assert not kept["masks"][2:].any()
    assert kept["maps"].shape == (3, 4, 32, 32)
    assert predictions["target"].isin([0, 1]).all()
    with pytest.raises(ParameterError, match="knows neither 'Pneumonia' nor 'Cough'"):
        measuring.intention(bench, "Pneumonia", 2, stand_in="Cough")
    with pytest.raises(ParameterError, match="have no label 'Lung Opacity'"):
        measuring.intention(bench, "Lung Opacity", 2, of=of)


def test_bench_says_what_it_lacks(tmp_path, bench):
    cxrkit.models.save(bench.model, tmp_path / "model.safetensors")
    trained = bench.trained
    assert set(measuring.bench(trained, tmp_path).methods) == {"cam", "lrp", "rap"}
    for changes, message in (
        ({"start": "zero"}, "start 'zero' is unknown"),
        ({"methods": ["bcos"]}, r"methods \['bcos'\] can't explain resnet18"),
        ({"labels": ["Cough"]}, r"labels \['Cough'\] are unknown"),
    ):
        with pytest.raises(ParameterError, match=message):
            measuring.bench(trained, tmp_path, **changes)
    nothing = {"view": "multilabel", "images": 60, "prevalence": dict.fromkeys(bench.images.labels, 0.0)}
    without = trained.model_copy(update={"dataset_options": nothing})
    with pytest.raises(DataError, match="has a box"):
        measuring.bench(without, tmp_path)


# Tables, from runs made by hand


class Made:
    """What the tables ask of a run."""

    def __init__(self, folder, key, kind, parameters, frames):
        self.folder, self.key, self.kind, self.parameters, self.frames = folder, key, kind, parameters, frames

    def frame(self, name):
        return self.frames[name]


def made_scores(label: str, patients: int = 6, gap: float = 0.2) -> pd.DataFrame:
    """LRP and RAP are better than CAM by `gap` for two classes, and worse by it for the finding alone."""
    rows = []
    for patient in range(patients):
        for method in ("cam", "lrp", "rap"):
            for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
                better = gap * (method != "cam")
                row = {"image_id": f"i{patient}", "patient_id": f"p{patient}", "label": label, "logit": 1.0}
                row |= {"area": 0.1, "method": method, "inside": 0.2, "threshold": threshold, "percentile": 100.0}
                row |= {"two_class": 0.3 + better + 0.01 * patient, "foreground": 0.3 - better, "covered": 0.2}
                row["two_class"] += 0.1 * threshold * (1 if method == "cam" else -1)
                rows.append(row | {"foreground_chance": 0.1, "two_class_chance": 0.4})
    return pd.DataFrame(rows)


def made_maps(shift: int) -> dict[str, np.ndarray]:
    maps = np.zeros((1, 4, 4, 4), np.float32)
    maps[0, :, shift, :] = 1
    masks = np.zeros((4, 4, 4), bool)
    masks[:2, 0] = True
    return {
        "image_ids": np.array(["a", "b", "c", "d"]),
        "patient_ids": np.array(["a", "b", "c", "d"]),
        "groups": np.array(["positive", "positive", "normal", "normal"]),
        "explained": np.array(["Pneumonia", "Pneumonia", "Normal", "Normal"]),
        "logits": np.ones(4),
        "methods": np.array(["lrp"]),
        "maps": maps,
        "masks": masks,
    }


class Samples:
    image_ids, size = list("abcd"), 4

    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, place):
        return self.sample


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Two networks, one with many findings and one with two classes, and their scores."""
    facts = {"patient_id": list("abcd"), "label": "Cardiomegaly", "target": [0, 1, 0, 1], "logit": [0.0, 1, 2, 3]}
    predictions = pd.DataFrame(facts)
    alike = {"patient_id": ["a", "b"], "method": "lrp", "check": "another label", "correlation": [0.9, 1.0]}
    checks = pd.DataFrame(alike | {"two_class": 0.5, "two_class_check": 0.4})
    pairs = []
    for place, (healthy, label) in enumerate((("", "Cardiomegaly"), ("Normal", "Pneumonia"))):
        trained = TrainParameters(model="densenet121", healthy_class=healthy)
        folder = tmp_path / str(place)
        folder.mkdir()
        np.savez(folder / "intention.npz", **made_maps(place))
        (folder / "predictions.csv").touch()
        train = Made(folder, str(place), "train", trained, {"predictions": predictions})
        frames = {"scores": made_scores(label), "sanity": checks, "predictions": predictions}
        parameters = SimpleNamespace(run=str(place), other_images={})
        pairs.append((train, Made(folder, f"s{place}", "relevance_measure", parameters, frames)))
    monkeypatch.setattr(relevance.report, "runs_of", lambda name: [run for pair in pairs for run in pair])
    monkeypatch.setattr(relevance_maps, "seen_by_all", lambda name: SimpleNamespace(name="nih"))
    return "made"


def test_table_2_beside_ours(grid):
    table = relevance.table2(grid).set_index(["method", "T"])
    assert len(table) == 15
    cam = table.loc["CAM", 0.1]
    assert cam["ours"] == pytest.approx(0.335)
    assert cam["empty"] == pytest.approx(0.45)
    assert cam["paper"] == pytest.approx(np.mean([0.243, 0.336, 0.311, 0.309, 0.225, 0.182, 0.295, 0.259]))
    assert cam["low"] < cam["ours"] < cam["high"]
    assert cam["finding alone"] == pytest.approx(0.3)


def test_cells_take_pneumonia_from_the_network_that_knows_it(grid):
    found = relevance.cells(grid)
    assert len(found) == 120
    known = found.dropna(subset=["ours"])
    assert dict(known.groupby("class")["network"].first()) == {
        "Cardiomegaly": "DenseNet-121, findings",
        "Pneumonia": "DenseNet-121, two classes",
    }
    wide = relevance.side_by_side(found)
    assert list(wide.columns) == ["class", "T", "CAM", "CAM ours", "LRP", "LRP ours", "RAP", "RAP ours"]
    assert len(wide) == 40


def test_aucs_of_both_kinds_of_network(grid):
    found = relevance.aurocs(grid).set_index("class")
    assert found.loc["Cardiomegaly", "ours"] == pytest.approx(0.75)
    assert np.isnan(found.loc["Mass", "ours"])
    assert found.loc["mean of 14", "paper"] == 0.843
    two = relevance.aurocs_of_two(grid)
    assert list(two["paper's network"]) == ["CheXNet", "DenseNet-121", "ResNet-50", "VGG-16"]
    assert two["ours"].tolist()[:2] == pytest.approx([0.75, 0.75])


def test_auc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    target, value = rng.integers(0, 2, 40).astype(float), rng.integers(0, 9, 40)
    found = relevance._auc(target, value, np.arange(40) // 2)
    assert found.mean == pytest.approx(roc_auc_score(target, value))
    assert found.low < found.mean < found.high
    assert np.isnan(relevance._auc(np.ones(4), value[:4], np.arange(4)).mean)


def test_what_each_network_explains_is_a_table(grid, monkeypatch):
    sample = SimpleNamespace(image=torch.zeros(1, 4, 4), mask=torch.zeros(2, 4, 4, dtype=torch.bool))
    monkeypatch.setattr(relevance_maps, "seen_by_all", lambda name, least: Samples(sample))
    found = relevance_maps.networks_side_by_side(grid)
    assert found.pop("explained").to_dict("list") == {
        "image": ["positive 1", "normal 1", "normal 2"],
        "DenseNet-121, findings": ["Pneumonia", "Normal", "Normal"],
        "DenseNet-121, two classes": ["Pneumonia", "Normal", "Normal"],
    }
    assert found["maps"].shape == (3, 2, 4, 4)


def test_a_claim_holds_for_two_classes_and_not_for_the_finding_alone(grid):
    found = relevance_maps.surviving(grid)
    assert (found.loc[found["IoU of"] == "two classes", "ours"] > 0).all()
    assert (found.loc[found["IoU of"] == "the finding alone", "ours"] < 0).all()


def test_verdicts(grid):
    table = relevance_maps.claims(grid).set_index("claim")
    assert table.loc["LRP overlaps the boxes better than CAM at a low threshold", "verdict"] == "same direction"
    assert table.loc["LRP gains from 0.1 to 0.2", "verdict"] == "opposite direction"
    assert table.loc["CAM gains when the threshold rises from 0.1 to 0.5", "verdict"] == "same direction"
    boxes = table.loc["With two classes, LRP lies less in the box than with many findings"]
    assert boxes["ours"] == pytest.approx(-100)
    for method in ("LRP", "RAP"):
        lungs = table.loc[f"With two classes, {method} lies in the lungs of normal images, beyond their area"]
        assert lungs["verdict"] == "can't be tested here: only the phantom knows its lungs"


def test_sanity_and_agreement_tables(grid):
    assert relevance_maps.sanity(grid)["correlation"].tolist() == pytest.approx([0.95, 0.95])
    found = relevance_maps.agreement(grid)
    assert (found["same image"] == 0).all()
    assert list(found["images"]) == ["positive", "normal"]
    inside = relevance_maps.inside_boxes(grid)
    assert inside["share"].tolist() == [1.0, 0.0]
    assert inside["chance"].tolist() == pytest.approx([0.25, 0.25])


def test_a_grid_without_scores_says_so(monkeypatch):
    monkeypatch.setattr(relevance.report, "runs_of", lambda name: [])
    with pytest.raises(ParameterError, match="no scores of notebook relevance_scores"):
        relevance.scored("quick")


def test_shared_mass():
    a, b = np.array([[1.0, 1, 0, -5]]), np.array([[0.0, 2, 2, 0]])
    assert relevance_maps.shared_mass(a, b) == pytest.approx(0.5)
    assert relevance_maps.shared_mass(a, 7 * a) == pytest.approx(1)
    assert np.isnan(relevance_maps.shared_mass(a, -np.abs(b)))


# The published table


def test_limits_count_the_cells_above_the_empty_map():
    areas = pd.DataFrame({"class": list(relevance.CLASSES), "boxes": 1, "area": 0.15})
    areas = areas.assign(empty=(1 - areas["area"]) / 2, full=areas["area"] / 2)
    found = relevance.limits(areas)
    assert len(found) == 120
    assert found["above"].sum() == (found["mean_iou"] > 0.425).sum()
    assert list(found["method"].unique()) == ["CAM", "LRP", "RAP"]


def test_areas_are_those_of_the_published_boxes():
    pytest.importorskip("torchxrayvision")
    areas = relevance.box_areas().set_index("class")
    assert areas["boxes"].sum() == 984
    assert areas.loc["Cardiomegaly", "boxes"] == 146
    assert areas["area"].idxmin() == "Nodule"
    assert areas["area"].idxmax() == "Cardiomegaly"
    assert relevance.foreground_bound(1e-9).tolist() == [1.0] * 8
    assert relevance.foreground_bound(1.0)["Nodule"] == pytest.approx(areas.loc["Nodule", "area"])


def test_a_cam_of_one_cell_covers_the_image_and_more_cells_cover_less():
    assert relevance.least_cover(0.1, cells=1, size=32) == 1
    covers = [relevance.least_cover(threshold, size=56) for threshold in (0.1, 0.3, 0.5)]
    assert covers == sorted(covers, reverse=True)
    # One cell is 1/49; a corner's cell reaches half a cell beyond itself before it has fallen to one half.
    assert 1 / 49 / 4 < covers[-1] < covers[0] < 4 / 49


def test_every_item_of_the_checklist_is_made():
    assert checklist.problems("relevance") == []
    assert checklist.table("relevance")[""].isin(["✓", "◐"]).all()


def test_lungs_are_dark_on_the_phantom():
    data = cxrkit.data.load("phantom", size=64, view="binary", images=6, conspicuity=0.0)
    image, lungs = data[0].image[0].numpy(), relevance_maps.lung_mask(data, 0)
    assert 0.1 < lungs.mean() < 0.6
    around = image[8:-8, 8:-8][~lungs[8:-8, 8:-8]]
    assert image[lungs].mean() < around.mean()


# Real radiographs


def test_real_boxes_are_scored_with_the_union_of_their_readers(shared_data):
    data = cxrkit.data.load("folder", root=shared_data / "nih", size=64)
    boxed = data.boxes.merge(data.table[["image_id"]])
    several = boxed[boxed["label"] == "Effusion"].groupby("image_id").size()
    ids = several[several > 1].index[:4].tolist() + several[several == 1].index[:2].tolist()
    some = data.select([data.image_ids.index(one) for one in ids])
    model = cxrkit.models.create("resnet18", data.labels).eval()
    trained = SimpleNamespace(model="resnet18", healthy_class="")
    bench = measuring.Bench(trained, model, some, ["Effusion"], ["lrp"])
    assert bench.rows("Effusion")
    found = measuring.scores(bench)
    column = some.labels.index("Effusion")
    areas = {some.image_ids[row]: some[row].mask[column].float().mean().item() for row in bench.rows("Effusion")}
    assert dict(found.groupby("image_id")["area"].first()) == pytest.approx(areas)
    assert found["two_class"].between(0, 1).all()
