"""Paper `covid`: what is measured, the tables beside the paper, claims, and the real sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import NOTEBOOKS, run_cells
from sklearn.metrics import f1_score, precision_score, recall_score

import cxrkit
from cxrkit import metrics
from cxrkit.data.covid_labels import LABELS
from cxrkit.errors import ParameterError
from cxrkit.study import training
from cxrkit.study.study import Study
from cxrkit.train.parameters import TrainParameters
from cxrkit.yaml_files import read_yaml
from papers.covid import measure as measuring
from papers.covid import tables as covid

CHAIN = ("COVID-19", "Viral Pneumonia", "Pneumonia")


# Hand-made runs


class MadeRun:
    """A run that holds frames alone."""

    def __init__(self, kind, frames, **parameters):
        known = {"dataset": "phantom", "fold": 0, "seed": 0, "epochs": 1, "size": 64, "run": "", "loss": "bce"}
        self.kind, self.frames = kind, frames
        self.parameters = SimpleNamespace(**known | parameters)
        self.key = f"{kind}-{parameters.get('model', '')}-{self.parameters.fold}"

    def frame(self, name):
        return self.frames[name].copy()


def predicted(probabilities, targets, labels=("COVID-19", "ARDS")):
    probabilities, targets = np.asarray(probabilities, dtype=float), np.asarray(targets, dtype=float)
    count = len(targets)
    return pd.DataFrame(
        {
            "image_id": np.repeat([f"i{n}" for n in range(count)], len(labels)),
            "patient_id": np.repeat([f"p{n}" for n in range(count)], len(labels)),
            "split": "test",
            "label": list(labels) * count,
            "target": targets.ravel(),
            "probability": probabilities.ravel(),
        }
    )


TARGETS = np.array([[1, 1], [1, 0], [0, 0], [0, 1], [1, 0], [0, 0]])
SAID = {
    "resnet18": np.array([[0.9, 0.9], [0.9, 0.1], [0.1, 0.1], [0.1, 0.2], [0.52, 0.1], [0.505, 0.1]]),
    "resnet34": np.array([[0.9, 0.9], [0.05, 0.1], [0.6, 0.1], [0.1, 0.2], [0.52, 0.1], [0.1, 0.1]]),
    "densenet121": np.array([[0.9, 0.9], [0.05, 0.1], [0.9, 0.1], [0.1, 0.2], [0.1, 0.1], [0.1, 0.1]]),
}


@pytest.fixture
def made():
    """Three networks on one split, with what the step `scores` would have kept."""
    runs = []
    for place, (network, said) in enumerate(SAID.items()):
        trained = MadeRun("train", {"predictions": predicted(said, TARGETS)}, model=network)
        images = {"image_id": [f"i{n}" for n in range(5)], "patient_id": [f"p{n}" for n in range(5)]}
        rows = pd.DataFrame(images).assign(label="COVID-19", probability=0.9, chance=0.1, black=0.0, gap=0.0)
        shares = {"occlusion": 0.5 - 0.1 * place, "saliency": 0.2, "deeplift": 0.1}
        methods = pd.concat([rows.assign(method=name, share=share) for name, share in shares.items()])
        nested = pd.DataFrame(images).assign(inner="COVID-19", outer="Pneumonia", correlation=0.9 - 0.3 * place)
        bands = pd.DataFrame(images).assign(
            label="COVID-19", target=1.0, with_bands=0.5 - 0.2 * place, without_bands=0.5
        )
        inactive = pd.DataFrame(
            {
                "layer": ["network.layer2"],
                "maps": [100],
                "constant": [20 + 30 * place],
                "zero": [10],
                "percent": [20.0 + 30 * place],
                "middle": [True],
            }
        )
        profiles = pd.DataFrame({"layer": "image", "map": range(4), "strength": 1.0, "border": 1.4 + 0.1 * place})
        frames = {"methods": methods, "nested": nested, "bands": bands, "inactive": inactive, "profiles": profiles}
        runs += [trained, MadeRun("covid_measure", frames, run=trained.key)]
    return Study("covid", tuple(runs))


# Rates and votes


@pytest.mark.parametrize(
    ("measure", "slow"),
    [
        ("precision", precision_score),
        ("recall", recall_score),
        ("F1", f1_score),
        ("specificity", lambda truth, found: recall_score(truth, found, pos_label=0)),
    ],
)
@pytest.mark.parametrize("label", [None, "COVID-19"])
def test_rates_agree_with_scikit_learn(measure, slow, label):
    rng = np.random.default_rng(3)
    table = predicted(rng.random((40, 2)), rng.random((40, 2)) < 0.4)
    table["found"] = table["probability"] > 0.51
    rows = table if label is None else table[table["label"] == label]
    found = covid.rate(table, measure, label)
    assert found.mean == pytest.approx(slow(rows["target"] > 0.5, rows["found"]))
    assert found.low < found.mean < found.high


def test_the_interval_is_that_of_resampled_patients():
    """A second, slow implementation: every resample counted anew from its rows."""
    rng = np.random.default_rng(5)
    table = predicted(rng.random((30, 2)), rng.random((30, 2)) < 0.5)
    table["patient_id"] = np.repeat([f"p{n // 3}" for n in range(30)], 2)
    table["found"] = table["probability"] > 0.51
    of = [part for _, part in table.groupby("patient_id")]
    values = []
    for _ in range(300):
        drawn = pd.concat([of[n] for n in rng.integers(0, len(of), len(of))])
        found, truth = drawn["found"].to_numpy(), drawn["target"].to_numpy() > 0.5
        values.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    found = covid.rate(table, "F1")
    assert (found.low, found.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.04)


def test_a_network_does_not_differ_from_itself_and_one_patient_has_no_interval():
    table = predicted(SAID["resnet18"], TARGETS)
    table["found"] = table["probability"] > 0.51
    assert covid.difference(table, table, "F1") == (0, 0, 0, 6)
    alone = covid.rate(table[table["patient_id"] == "p0"], "F1")
    assert alone.mean == 1
    assert np.isnan(alone.low)


def test_votes_differ_where_a_few_are_very_sure(made):
    tables = covid.predictions(made)
    assert list(tables) == [*SAID, covid.SOFT, covid.HARD]
    # 0.1, 0.6, 0.9: the mean is 0.53, and two of three find it.
    at = "image_id == 'i2' and label == 'COVID-19'"
    assert all(tables[name].query(at)["found"].item() for name in (covid.SOFT, covid.HARD))
    # 0.9, 0.05, 0.05: one of three, mean 0.33. 0.52, 0.52, 0.1: two of three, mean 0.38.
    at = "image_id == 'i4' and label == 'COVID-19'"
    assert (tables[covid.SOFT].query(at)["found"].item(), tables[covid.HARD].query(at)["found"].item()) == (False, True)


def test_the_cutoff_is_that_of_the_code(made):
    at = covid.predictions(made)["resnet18"].query("image_id == 'i5' and label == 'COVID-19'")
    assert at["probability"].item() > 0.5
    assert not at["found"].item()


def test_table_2_stands_beside_ours(made):
    table = covid.micro_table(made).set_index(["network", "measure"])
    assert table.loc[("resnet18", "recall"), "paper"] == "82.4 ± 0.8"
    assert table.loc[("densenet121 (stands in)", "F1"), "paper"] == "85.4 ± 0.8"
    assert table.loc[(covid.SOFT, "precision"), "paper"] == "88.9 ± 1.0"
    assert table.loc[("resnet18", "recall"), "ours"] == pytest.approx(100 * 4 / 5)
    missing = table[table["paper's"].isin(["InceptionV3", "InceptionResNetV2"])]
    assert len(missing) == 6
    assert missing["ours"].isna().all()


# Claims


def test_claims_get_the_verdict_of_their_interval(made):
    table = covid.verdicts(made).set_index("claim")
    assert table.loc["DenseNet has more dead maps in the middle than ResNet18", "verdict"] == "same direction"
    assert table.loc["DenseNet has more dead maps in the middle than ResNet18", "ours"] == pytest.approx(60)
    place = table.loc["Occlusion finds the place better than the other methods (mean)"]
    assert (place["verdict"], place["n"]) == ("undecided here: too few patients", 5)
    shown = table.loc["Occlusion on ResNet18 finds the place better than on DenseNet"]
    assert (shown["ours"], shown["low"], shown["high"]) == pytest.approx((20, 20, 20))
    assert table.loc["Dark bands move DenseNet more than ResNet18", "ours"] == pytest.approx(40)
    border = table.loc["Profiles of groups differ at the border, where the bands are"]
    assert (border["ours"], border["n"], border["verdict"]) == (pytest.approx(50), 12, "same direction")
    both = table.loc["COVID-19 and ARDS are found together where an image has both: share beyond one half"]
    assert (both["ours"], both["n"], both["verdict"]) == (pytest.approx(50), 1, "undecided here: too few patients")
    assert "lacks" in table.loc["InceptionResNetV2 has a higher specificity than ResNet18", "verdict"]
    assert table.loc["DenseNet beats ResNet18 in micro F1", "paper"] == "+3.0"


def test_claims_of_a_grid_without_the_networks_say_so(made):
    one = Study("covid", tuple(run for run in made.runs if "resnet18" in (run.key + run.parameters.run)))
    verdicts = covid.verdicts(one)["verdict"]
    assert verdicts.str.contains("can't be tested here").sum() >= 6


def test_an_unmeasured_grid_is_refused_with_the_command():
    with pytest.raises(ParameterError, match="cxrkit grid run covid"):
        covid.measured(Study("covid", ()), "methods")


def test_the_paper_counts_0_for_a_quotient_without_denominator():
    found = np.zeros((4, 2))
    found[:, 0] = [0.9, 0.9, 0.1, 0.1]
    table = metrics.classification_report(found > 0.5, found, ["a", "b"], cutoff=covid.CUTOFF, zero_division=0.0)
    table = table.set_index("label")
    assert table.loc["b", ["precision", "recall", "f1"]].tolist() == [0, 0, 0]
    assert (table.loc["macro", "f1"], table.loc["micro", "f1"]) == (0.5, 1)


# What is measured


@pytest.mark.parametrize(
    ("view", "chain"),
    [("covid", CHAIN), ("binary", ("Pneumonia",)), ("multilabel", None)],
)
def test_the_chain_goes_from_the_most_frequent_inner_label_outwards(view, chain):
    frequent = {"prevalence": {"COVID-19": 0.4}} if view == "covid" else {}
    data = cxrkit.data.load("phantom", size=32, view=view, images=60, **frequent)
    found = measuring.chain_of(data)
    assert found == chain if chain else found[-1] == "Lung Opacity"
    groups = measuring.groups_of(data, found)
    inside, outside = groups[found[0]], groups.get("neither")
    assert not (inside & outside).any()
    assert (groups[found[-1]] | outside).all()


def test_occlusion_keeps_the_papers_share_of_the_image():
    assert measuring.occlusion_size(512) == (50, 4)
    assert measuring.occlusion_size(64) == (6, 1)
    assert measuring.occlusion_size(64, 12, 6) == (12, 6)


def test_the_shown_part_is_that_of_the_paper():
    maps = torch.tensor([[-1.0, 2.0]])
    for name, wanted in (
        ("occlusion", [0, 2]),
        ("saliency", [1, 2]),
        ("deeplift_shap", [-1, 2]),
        ("deeplift", [-1, 2]),
    ):
        assert measuring.shown_part(name, maps).tolist() == [wanted]
    assert measuring.shown_part("integrated_gradients_25", maps).tolist() == [[0, 2]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The names of `measure.ipynb` for a network trained for one epoch on the phantom, with bands on every image."""
    results = str(tmp_path_factory.mktemp("results"))
    options = {"view": "covid", "images": 40, "prevalence": {"COVID-19": 0.5}, "dark_borders": {"share": 1.0}}
    parameters = TrainParameters(
        dataset_options=options, size=32, model="resnet18", epochs=1, batch_size=8, results=results, threads=1
    )
    asked = {"images": 2, "shown": 1, "n_steps": [5, 20], "window": 8, "stride": 8, "top": 3, "device": "cpu"}
    return run_cells("papers/covid/measure", run=training.train(parameters), results=results, threads=1, **asked)


def test_what_is_explained_is_chosen_by_the_data(cells):
    assert cells["chain"] == CHAIN
    table, test = cells["test"].table, cells["test"]
    explained = table[table["image_id"].isin(cells["batch"].image_ids)]
    assert (explained["COVID-19"] == 1).all()
    assert explained["patient_id"].nunique() == 2
    assert cells["series"]["patient_id"].nunique() == 1
    with pytest.raises(ParameterError, match="no test image shows 'MERS'"):
        measuring.explained_rows(test, "MERS", 2)


def test_maps_of_all_methods_and_what_they_say_of_black(cells):
    names = ["occlusion", "saliency", "input_x_gradient", "guided_backprop"]
    names += ["integrated_gradients_5", "integrated_gradients_20", "deeplift", "deeplift_shap"]
    assert list(cells["maps"]) == names
    assert cells["maps"]["deeplift"].shape == (2, 3, 32, 32)
    table = cells["methods"]
    assert len(table) == 2 * 3 * len(names)
    assert (table["region"] == "finding").all()
    gaps = table.groupby("method")["gap"].agg(lambda values: values.abs().max())
    assert gaps["deeplift"] < 1e-4
    assert np.isnan(gaps["occlusion"])
    agreement = table.groupby("method")["agreement"].mean()
    assert agreement["integrated_gradients_20"] == pytest.approx(1)


def test_shares_are_those_of_the_region(cells):
    table = cells["methods"].query("method == 'saliency' and label == 'COVID-19'")
    maps = cells["maps"]["saliency"][:, 0].abs()
    for row, (of, where) in enumerate(zip(maps, cells["regions"][:, 0], strict=True)):
        assert table["share"].iloc[row] == pytest.approx(float(of[where].sum() / of.sum()), rel=1e-4)


def test_nested_labels_have_a_correlation_per_pair(cells):
    table = cells["nested"]
    pairs = {(CHAIN[0], CHAIN[1]), (CHAIN[0], CHAIN[2]), CHAIN[1:]}
    assert set(zip(table["inner"], table["outer"], strict=True)) == pairs
    assert table["correlation"].dropna().between(-1, 1).all()


def test_dead_maps_leave_out_layers_of_one_pixel(cells):
    table = cells["inactive"]
    assert "network.layer4" not in set(table["layer"])
    assert table["middle"].sum() == 1
    assert (table["zero"] <= table["constant"]).all()


def test_profiles_sum_to_nothing_over_the_groups(cells):
    arrays = cells["arrays"]
    assert arrays["average"].shape == (len(arrays["groups"]), 32, 32)
    assert np.abs(arrays["input"].sum(0)).max() < 1e-5
    assert np.abs(arrays["early"].sum(1)).max() < 1e-4
    assert cells["strongest"].groupby("layer").size().max() == 3


def test_bands_are_drawn_on_the_same_images(cells):
    table = cells["bands"]
    assert set(table["image_id"]) == set(cells["test"].image_ids)
    assert (table["with_bands"] - table["without_bands"]).abs().max() > 0
    real = TrainParameters(dataset="folder", root="data")
    assert measuring.redrawn(real) == {}


def test_a_black_band_is_nothing_to_methods_that_start_from_black(cells):
    table = cells["banded"]
    mean = table.groupby("method")[["black", "black_area"]].mean()
    for blind in ("input_x_gradient", "integrated_gradients_5", "deeplift"):
        assert mean.loc[blind, "black"] == 0
    assert mean.loc["saliency", "black"] > 0
    assert (mean["black_area"] > 0.1).all()
    assert set(table["label"]) == {"COVID-19"}


def test_what_is_kept_fits_together(cells):
    kept = cells["kept"]
    assert kept["maps"].shape == (len(kept["methods"]), 1, 3, 32, 32)
    assert kept["occlusion"].shape == (2, 3, 32, 32)
    assert len(kept["series_ids"]) == len(kept["series"])


def test_a_run_that_trained_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(measuring.runs, "find", lambda *_: SimpleNamespace(kind="explain", key="explain-1"))
    with pytest.raises(ParameterError, match="only a training run"):
        measuring.trained_run(SimpleNamespace(run="explain-1", results=""))


# The real sample


def test_the_real_sample_gets_the_papers_labels(shared_data, tmp_path):
    sources = {"cohen": shared_data / "covid_cohen", "kermany": shared_data / "kermany"}
    folder = tmp_path / "covid"
    covid.gather(sources, folder)
    grid = read_yaml(NOTEBOOKS / "papers" / "covid" / "grid.yaml")
    options = grid["profiles"]["sample"]["train"]["parameters"]["dataset_options"]
    data = cxrkit.data.load("folder", root=folder, size=64, **options)
    assert set(data.labels) <= set(LABELS)
    assert measuring.chain_of(data) == CHAIN
    both = data.table[(data.table["COVID-19"] == 1) & (data.table["ARDS"] == 1)]
    assert len(both) == 8
    assert (data.table.loc[data.table["COVID-19"] == 1, "Viral Pneumonia"] == 1).all()
    assert data.table["offset"].notna().any()
    boxed = data.boxes["image_id"].iloc[0]
    assert measuring._any_box(data, boxed).any()
    with pytest.raises(ParameterError, match="choose a new folder"):
        covid.gather(sources, folder)
