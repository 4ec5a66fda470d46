"""Paper `relevance`: scores of boxed positives, its tables from runs made by hand, verdicts, and the checklist."""

from __future__ import annotations

import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import run_cell

import cxrkit
from book.tools import checklist
from cxrkit.errors import DataError, ParameterError
from cxrkit.grid import studies
from cxrkit.grid.planning import plan
from cxrkit.study import claims
from cxrkit.study.published import table
from cxrkit.study.runs import Run
from cxrkit.study.study import Study
from cxrkit.train.parameters import TrainParameters
from papers.relevance import measure as measuring
from papers.relevance import tables as relevance

OPTIONS = {"view": "multilabel", "images": 60, "conspicuity": 2.0}
LABELS = ["Cardiomegaly", "Pleural effusion"]


@pytest.fixture(scope="module")
def images():
    return cxrkit.data.load("phantom", size=32, fold=0, **OPTIONS).split("test").cached()


@pytest.fixture(scope="module")
def model(images):
    # The stage before the last one keeps more than one cell at this size.
    return cxrkit.models.create("resnet18", images.labels).eval()


def test_relevance_that_starts_from_one_is_the_quotient():
    maps = torch.tensor([[[[2.0, -4.0]], [[3.0, 0.0]], [[1.0, 1.0]]]])
    found = measuring.unit_start(maps, torch.tensor([[-2.0, 3.0, 0.0]]))
    assert found[0, :, 0].tolist() == [[-1.0, 2.0], [1.0, 0.0], [0.0, 0.0]]


def test_a_negative_logit_leaves_lrp_nothing_unless_it_starts_from_one(model, images):
    label, column = LABELS[0], list(model.labels).index(LABELS[0])
    pixels = images.batch(measuring.positives(images, label, 1)).images
    with torch.no_grad():
        model.network.fc.bias[column] -= 100
        maps = {start: measuring.maps_of(model, pixels, [label], "lrp", start) for start in ("logit", "one_hot")}
        model.network.fc.bias[column] += 100
    assert maps["logit"].max() <= 0
    assert maps["one_hot"].max() > 0
    with pytest.raises(ParameterError, match="start 'zero' is unknown"):
        measuring.maps_of(model, pixels, [label], "lrp", "zero")


def test_boxed_positives_show_the_label_in_a_box(model, images):
    label = LABELS[0]
    found = list(measuring.boxed(model, images, label, 3))
    assert sum(len(pixels) for pixels, _, _ in found) == 2  # there are no more
    for pixels, masks, facts in found:
        assert masks.flatten(1).any(1).all()
        assert facts["area"] == pytest.approx(masks.float().mean((1, 2)).numpy())
        column = list(model.labels).index(label)
        assert facts["logit"] == pytest.approx(model(pixels)[:, column].detach().numpy(), abs=1e-5)


def test_other_labels_and_random_weights_change_cam_and_hardly_lrp(model, images):
    label = LABELS[0]
    [(pixels, masks, _)] = measuring.boxed(model, images, label, 3)
    alike = {}
    for method in ("cam", "lrp"):
        maps = measuring.maps_of(model, pixels, LABELS, method)
        found = measuring.similarity(maps[:, 0], maps[:, 1:], masks)
        alike[method] = np.nanmean(found["correlation"])
        assert np.abs(found["rank_correlation"][np.isfinite(found["rank_correlation"])]).max() <= 1
    assert alike["lrp"] > 0.9 > abs(alike["cam"])
    drawn = measuring.random_networks(model, pixels)
    assert set(drawn) == {"random head", "random network"}
    same = [torch.equal(one.network.conv1.weight, model.network.conv1.weight) for one in drawn.values()]
    assert same == [True, False]


def test_similarity_leaves_out_what_has_no_score(images):
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    own = masks.float()
    others = torch.stack([own, torch.zeros(1, 4, 4)], 1)  # the second is degenerate
    assert measuring.similarity(own, others, masks)["two_class_check"].tolist() == [1.0]


def test_intention_explains_positives_for_the_label_and_normal_images_for_the_highest_score(model):
    trained = TrainParameters(dataset_options=OPTIONS, size=32, model="resnet18")
    of = {"dataset_options": {"view": "binary", "images": 60, "prevalence": {"Pneumonia": 0.5}}}
    ask = (model, trained, "Pneumonia", 2, measuring.METHODS)
    kept, predictions = measuring.intention(*ask, stand_in="Lung Opacity", of=of)
    assert list(kept["groups"]) == ["positive"] * 2 + ["normal"] * 2
    assert set(kept["explained"][:2]) == {"Lung Opacity"}
    assert kept["masks"][:2].any((1, 2)).all()
    assert not kept["masks"][2:].any()
    assert kept["maps"].shape == (3, 4, 32, 32)
    assert predictions["target"].isin([0, 1]).all()
    with pytest.raises(ParameterError, match="knows neither 'Pneumonia' nor 'Cough'"):
        measuring.intention(*ask, stand_in="Cough")
    with pytest.raises(ParameterError, match="have no label 'Lung Opacity'"):
        measuring.intention(model, trained, "Lung Opacity", 2, measuring.METHODS, of=of)


def test_labels_and_methods_that_cannot_be_scored_are_named(model, images):
    assert measuring.fitting(model) == ["cam", "lrp", "rap"]
    with pytest.raises(ParameterError, match=r"methods \['bcos'\] can't explain"):
        measuring.fitting(model, ["bcos"])
    assert measuring.boxed_labels(model, images, LABELS) == LABELS
    with pytest.raises(ParameterError, match=r"labels \['Cough'\] are unknown"):
        measuring.boxed_labels(model, images, ["Cough"])
    nothing = {"view": "multilabel", "images": 60, "prevalence": dict.fromkeys(images.labels, 0.0)}
    with pytest.raises(DataError, match="has a box"):
        measuring.boxed_labels(model, cxrkit.data.load("phantom", size=32, **nothing))


# Tables, from runs made by hand


class Made:
    """What the tables ask of a run."""

    arrays = Run.arrays

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
    facts = {
        "image_id": list("abcd"),
        "patient_id": list("abcd"),
        "label": "Cardiomegaly",
        "target": [0, 1, 0, 1],
        "logit": [0.0, 1, 2, 3],
    }
    facts |= {"probability": [0.5, 0.73, 0.88, 0.95]}
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
    monkeypatch.setattr(relevance, "seen_by_all", lambda study, least=0: SimpleNamespace(name="nih"))
    return Study("made", tuple(run for pair in pairs for run in pair))


def test_overlap_by_method_and_threshold(grid):
    table = relevance.overlap(relevance.first_scores(grid)).set_index(["method", "T"])
    assert len(table) == 15
    cam = table.loc["CAM", 0.1]
    assert cam["two classes"] == pytest.approx(0.335)
    assert cam["empty"] == pytest.approx(0.45)
    assert cam["low"] < cam["two classes"] < cam["high"]
    assert cam["finding alone"] == pytest.approx(0.3)


def test_scores_are_those_of_the_first_network_of_a_kind(grid):
    for two, name, label in ((False, "findings", "Cardiomegaly"), (True, "two classes", "Pneumonia")):
        found = relevance.first_scores(grid, two)
        assert set(found["network"]) == {f"DenseNet-121, {name}"}
        assert set(found["label"]) == {label}
    alone = Study("one kind", grid.runs[:2])
    assert relevance.first_scores(alone, two=True).empty


def test_aucs_beside_the_paper(grid):
    found = relevance.aurocs(grid).set_index("class")
    assert found.loc["Cardiomegaly", "ours"] == pytest.approx(0.75)
    assert np.isnan(found.loc["Mass", "ours"])
    assert found.loc["mean of 14", "paper"] == 0.843


def test_verdicts(grid):
    table = relevance.verdicts(grid).set_index("claim")
    assert table.loc["LRP overlaps the boxes better than CAM at a low threshold", "verdict"] == "same direction"
    assert table.loc["LRP gains from 0.1 to 0.2", "verdict"] == "opposite direction"
    assert table.loc["CAM gains when the threshold rises from 0.1 to 0.5", "verdict"] == "same direction"
    boxes = table.loc["With two classes, LRP lies less in the box than with many findings"]
    assert boxes["ours"] == pytest.approx(-100)
    for method in ("LRP", "RAP"):
        lungs = table.loc[f"With two classes, {method} lies in the lungs of normal images, beyond their area"]
        assert lungs["verdict"] == "can't be tested here: only the phantom knows its lungs"


def test_what_networks_share_and_where_it_lies(grid):
    names = {"study": grid, "relevance": relevance, "np": np, "pd": pd, "combinations": combinations}
    page = run_cell("papers/relevance/study", "shared-mass", **names)
    found = run_cell("papers/relevance/study", "shared-rows", **page)["shared"]
    assert (found["same image"] == 0).all()
    assert list(found["images"].unique()) == ["positive", "normal"]
    inside = relevance.intention(grid).query("images == 'positive'")
    assert inside.groupby("network", sort=False)["inside"].mean().tolist() == [1.0, 0.0]
    assert inside["area"].tolist() == pytest.approx([0.25] * 4)


def test_images_are_joined_by_id(grid):
    """A network that stored the same images in another order tells the same; one that saw others is refused."""
    (name, *_), (other, _, second) = relevance.intentions(grid)
    place = grid.runs[3].folder / "intention.npz"
    turned = {key: values[:, ::-1] if key == "maps" else values[::-1] for key, values in made_maps(1).items()}
    np.savez(place, **turned | {"methods": second["methods"]})
    again = relevance.intentions(grid)[1][2]
    assert all(np.array_equal(again[key], second[key]) for key in second)
    np.savez(place, **made_maps(1) | {"image_ids": np.array(["a", "b", "c", "e"])})
    with pytest.raises(DataError, match=rf"{other!r} was shown other images than {name!r}: 2 are of .* such as 'd'"):
        relevance.intentions(grid)
    grid.runs[3].frames["predictions"] = grid.runs[3].frames["predictions"].assign(image_id=list("abce"))
    with pytest.raises(DataError, match="was shown other images"):
        relevance.predictions(grid)


def test_every_network_of_a_profile_is_shown_the_same_images():
    for profile in (None, "full", "data"):
        shown = set()
        for task in plan("relevance", profile):
            values = task.parameters.model_dump()
            if values.get("intention"):
                trained = next(one.parameters for one in plan("relevance", profile) if one.key == task.needs)
                seen = trained.model_copy(update=values["other_images"])
                shown.add((seen.dataset, seen.root, json.dumps(seen.dataset_options, sort_keys=True)))
        assert len(shown) == 1, profile


def test_a_grid_without_scores_says_so():
    with pytest.raises(ParameterError, match=r"grid 'quick' has no finished run of measure.ipynb"):
        relevance.scored(Study("quick", ()))


def test_shared_mass():
    a, b = np.array([[1.0, 1, 0, -5]]), np.array([[0.0, 2, 2, 0]])
    assert relevance.shared_mass(a, b) == pytest.approx(0.5)
    assert relevance.shared_mass(a, 7 * a) == pytest.approx(1)
    assert np.isnan(relevance.shared_mass(a, -np.abs(b)))


# The published table and its claims


def test_claims_repeat_the_published_table():
    means = table("relevance/tab2_miou").groupby(["method", "threshold"])["mean_iou"].mean()
    found = claims.read("relevance").query("table == 'overlap'")
    assert len(found) == 7
    for row in found.itertuples():
        a, b = (
            means[relevance.METHODS[side.split("'")[1]], float(side.split()[-1])] for side in (row.side_a, row.side_b)
        )
        assert row.published == pytest.approx(100 * (a - b), abs=1e-2)
        assert row.printed == f"{100 * a:.1f} against {100 * b:.1f}"


def test_the_claims_of_a_grid_plan_it_once(monkeypatch):
    planned = []
    monkeypatch.setattr(studies, "plan", lambda *names: planned.append(names) or plan(*names))
    found = relevance.verdicts(studies.finished("relevance"))
    assert planned == [("relevance", None)]
    assert found["verdict"].str.startswith("can't be tested here: grid 'relevance' has no finished run").all()


def test_every_item_of_the_checklist_is_made():
    assert checklist.problems("relevance") == []
    assert checklist.table("relevance")[""].isin(["✓", "◐"]).all()


def test_lungs_are_dark_on_the_phantom():
    data = cxrkit.data.load("phantom", size=64, view="binary", images=6, conspicuity=0.0)
    image, lungs = data[0].image[0].numpy(), relevance.lung_mask(data, 0)
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
    column, areas = some.labels.index("Effusion"), {}
    for _, _, facts in measuring.boxed(model, some, "Effusion"):
        areas |= dict(zip(facts["image_id"], facts["area"], strict=True))
    assert areas
    for image_id, area in areas.items():
        assert area == pytest.approx(some[some.image_ids.index(image_id)].mask[column].float().mean())
