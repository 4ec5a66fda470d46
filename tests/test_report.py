"""Tables from runs whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from notebook_cells import run_cell

from cxrkit import ParameterError, grid
from cxrkit.study import claims, comparison, published, report, runs
from cxrkit.study.study import Study
from cxrkit.view import figures
from papers.bcos import tables as bcos

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PRECISION = {"resnet18": 0.2, "none": 0.3, "flc": 0.5, "blur": 0.3}


def scores(precision: float, method: str) -> pd.DataFrame:
    """20 maps of label A at the given precision, 5 of label B at precision + 0.1 (one degenerate), thresholds 0,
    0.5 and 0.7."""
    rows = []
    for number in range(25):
        label = "A" if number < 20 else "B"
        value = np.nan if number == 24 else precision + (0.1 if label == "B" else 0.0)
        for threshold in (0.0, 0.5, 0.7):
            rows.append(
                {
                    "image_id": f"i{number}",
                    "patient_id": f"p{number // 2}",
                    "label": label,
                    "method": method,
                    "probability": 0.9 if number % 2 else 0.1,
                    "chance": 0.1,
                    "signed": value,
                    "grid": 0.25,
                    "smooth": 0.125,
                    "threshold": threshold,
                    "precision": value + threshold / 10,
                    "recall": 1 - threshold,
                    "chance_recall": 0.6 - threshold,
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture
def made(tmp_path) -> Study:
    """A grid of four networks on the binary view with explanations of known scores."""
    common = {"results": str(tmp_path / "results")}
    cases = [
        {"model": "resnet18"},
        *({"model": "bcos_resnet18", "antialias": kind} for kind in ("none", "flc", "blur")),
    ]
    steps = {
        "train": {
            "notebook": str(NOTEBOOKS / "train.ipynb"),
            "parameters": common | {"dataset_options": {"view": "binary"}},
            "cases": cases,
        },
        "explain": {"notebook": str(NOTEBOOKS / "explain.ipynb"), "after": "train", "parameters": common},
    }
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(steps, sort_keys=False))
    predictions = pd.DataFrame({"label": ["A", "B"] * 4, "target": [0.0, 1, 0, 0, 1, 0, 1, 1]})
    predictions["probability"] = [0.1, 0.9, 0.2, 0.1, 0.7, 0.3, 0.8, 0.9]
    predictions = pd.concat([predictions] * 6, ignore_index=True)
    predictions["patient_id"] = [f"p{row // 2}" for row in range(48)]
    tasks = grid.plan(path)
    trained = {task.key: task.parameters for task in tasks if task.needs is None}
    for task in tasks:
        with runs.writing(task.parameters) as writer:
            if task.needs is None:
                writer.frame("predictions", predictions)
            else:
                network = trained[task.needs]
                bcos = network.model != "resnet18"
                name = network.antialias if bcos else network.model
                writer.frame("scores", scores(PRECISION[name], "bcos" if bcos else "layercam"))
    return grid.finished(path)


def test_overview_holds_macro_means_intervals_chance_and_counts(made):
    table = bcos.overview(made)
    assert table["network"].tolist() == ["Baseline", "B-cos", "B-cos + FLC", "B-cos + BlurPool"]
    assert table["view"].unique().tolist() == ["binary"]
    assert (table["AUC"] == 1.0).all()
    assert table["EPG"].tolist() == pytest.approx([0.25, 0.35, 0.55, 0.35])  # mean over labels, not over maps
    assert (table["low"] <= table["EPG"] + 1e-9).all()
    assert (table["high"] >= table["EPG"] - 1e-9).all()
    assert table["chance"].tolist() == pytest.approx([0.1] * 4)
    assert table["degenerate"].tolist() == [1] * 4


def test_positives_split_into_found_and_missed():
    table = report.pointing_table(scores(0.3, "bcos")).set_index("subset")
    assert table.loc["all", "maps"] == 24
    assert table.loc["all", "degenerate"] == 1
    assert table.loc["TP", "maps"] + table.loc["FN", "maps"] == 24
    with pytest.raises(ParameterError, match=r"threshold 0\.3"):
        report.pointing_table(scores(0.3, "bcos"), threshold=0.3)


def test_found_is_above_the_cutoff_of_the_run_and_label():
    frame = scores(0.3, "bcos").assign(cutoff=lambda f: np.where(f["label"] == "A", 0.05, np.nan))
    table = report.pointing_table(frame).set_index("subset")
    assert table["maps"].to_dict() == {"all": 24, "TP": 20, "FN": 0}
    assert table["labels"].to_dict() == {"all": 2, "TP": 1, "FN": 0}, "a label without a cutoff is in neither"
    assert report.pointing_table(frame, cutoff=0.5).set_index("subset").loc["FN", "maps"] == 12
    assert report.pointing_table(frame.drop(columns="cutoff")).set_index("subset").loc["FN", "maps"] == 12


def test_methods_are_averaged_over_the_maps_that_all_of_them_define():
    good, poor, dead = (scores(precision, name) for precision, name in ((0.4, "good"), (0.2, "poor"), (0.1, "dead")))
    poor.loc[poor["image_id"].isin([f"i{n}" for n in range(8)]), ["precision", "recall"]] = np.nan
    dead["precision"] = np.nan
    good["precision"] += good["image_id"].str[1:].astype(int) / 100
    table = (
        report.pointing_table(pd.concat([good, poor, dead]), cutoff=0.5).query("subset == 'all'").set_index("method")
    )
    counts = ["maps", "images", "patients", "labels", "recall maps", "degenerate", "left out"]
    assert table.loc["good", counts].tolist() == [16, 16, 8, 2, 17, 1, 8]
    assert table.loc["poor", counts].tolist() == [16, 16, 8, 2, 17, 9, 0]
    assert table.loc["dead", counts].tolist() == [0, 0, 0, 0, 17, 25, 0]
    kept = good[(good["threshold"] == 0) & (good["image_id"].str[1:].astype(int) >= 8)]
    assert table.loc["good", "EPG"] == pytest.approx(kept.groupby("label")["precision"].mean().mean())
    assert table.loc["good", "chance"] == table.loc["poor", "chance"]
    lines = report.curves(pd.concat([good, poor, dead])).query("threshold == 0").set_index("method")
    assert lines["precision"].dropna().to_dict() == pytest.approx(table["EPG"].dropna().to_dict())


def test_maps_of_two_runs_are_told_apart():
    good, poor = scores(0.4, "good").query("label == 'A'"), scores(0.2, "poor").query("label == 'A'")
    both = [pd.concat([good, poor]).assign(run="one"), pd.concat([good, poor.head(0)]).assign(run="two")]
    table = report.pointing_table(pd.concat(both)).query("subset == 'all'").set_index("method")
    assert table["maps"].tolist() == [20, 20], "the second run has no map of the poor method"
    assert table["left out"].tolist() == [20, 0]


def test_tables_for_readers_hold_intervals_and_plain_titles():
    frame = pd.concat([scores(0.4, "good"), scores(0.2, "poor").assign(precision=np.nan)])
    shown = report.readable(report.pointing_table(frame))
    assert shown["findings"].unique().tolist() == ["all positives", "found (TP)", "missed (FN)"]
    assert shown["EPG (95 % CI)"].tolist()[0].startswith("0.45 (0.40 to 0.45)")
    assert shown["EPG (95 % CI)"].tolist()[3] == "–"
    assert shown["maps"].tolist()[0] == 24
    assert not any(name.endswith((" low", " high")) for name in shown)
    predictions = pd.DataFrame({"label": ["A", "B"] * 6, "target": [0.0, 1] * 6, "patient_id": np.arange(12) // 4})
    table = report.classification_of(predictions.assign(probability=0.4), n=20)
    shown = report.readable(table).set_index("label")
    assert shown.loc["A", "auc (95 % CI)"] == "–"
    assert shown.loc["A", "accuracy (95 % CI)"] == "1.00 (1.00 to 1.00)"
    assert shown.loc["A", "undefined"] == 1
    assert {"images", "average precision (95 % CI)"} <= set(shown)


def test_macro_interval_agrees_with_resampling_patients_one_by_one():
    frame = scores(0.3, "bcos").query("threshold == 0")
    rng = np.random.default_rng(1)
    frame = frame.assign(precision=rng.random(len(frame)), patient_id=[f"p{n}" for n in range(len(frame))])
    found = report.pointing_table(frame).iloc[0]
    means = []
    for _ in range(4000):
        drawn = frame.iloc[rng.integers(0, len(frame), len(frame))]
        means.append(drawn.groupby("label")["precision"].mean().mean())
    low, high = np.nanpercentile(means, [2.5, 97.5])
    assert found["low"] == pytest.approx(low, abs=0.05)
    assert found["high"] == pytest.approx(high, abs=0.05)


def test_curves_follow_the_threshold():
    table = report.curves(scores(0.3, "bcos")).set_index("threshold")
    assert table.loc[0.5, "precision"] - table.loc[0.0, "precision"] == pytest.approx(0.05)
    assert table.loc[0.5, "recall"] == pytest.approx(0.5)


def test_published_cells_stand_beside_ours(made):
    table = bcos.beside(bcos.overview(made), "bcos/tab3_rsna_epg_antialiasing", "binary")
    table = table.set_index(["network", "regime", "explanation"])
    assert table.loc[("B-cos + FLC", "plain", "Inherent"), "paper"] == 28.25
    assert table.loc[("B-cos + FLC", "plain", "Inherent"), "ours"] == pytest.approx(55.0)
    assert np.isnan(table.loc[("B-cos", "plain", "LayerCAM"), "ours"])
    assert table.loc[("B-cos + FLC", "both", "Inherent"), "paper"] == 21.14
    assert np.isnan(table.loc[("B-cos + FLC", "both", "Inherent"), "ours"])


def test_claims_are_judged_by_their_intervals(made):
    table = bcos.verdicts(made).set_index("claim")
    flc = table.loc["FLC raises the EPG of B-cos explanations"]
    assert flc["paper"] == "+17.1"
    assert flc["ours"] == pytest.approx(20.0)
    assert flc["verdict"] == "same direction"
    assert table.loc["BlurPool raises the EPG of B-cos explanations", "verdict"] == "undecided here"
    plain = table.loc["Plain B-cos falls behind LayerCAM on the baseline"]
    assert plain["ours"] == pytest.approx(10.0)
    assert plain["verdict"] == "opposite direction"
    assert plain["n"] == 12  # the thirteenth has a degenerate map only
    threshold = table.filter(like="grows with the threshold", axis=0)
    assert threshold.index.str.contains("EPG of B-cos").all()
    assert threshold["ours"].tolist() == pytest.approx([7.0] * 3)  # one of each network
    grid_ = table.loc["Maps of plain B-cos show a grid"]
    assert grid_["ours"] == pytest.approx(12.5)
    assert grid_["verdict"] == "same direction"
    assert table.loc["B-cos + FLC takes the grid away", "verdict"] == "undecided here"


def test_a_network_that_found_nothing_is_not_judged(made, monkeypatch):
    def missing(run):
        found = predictions(run)
        return found.assign(probability=0.4 * found["probability"]) if run.parameters.antialias == "flc" else found

    predictions, judged = bcos.predictions, []
    too_little = claims.too_little
    monkeypatch.setattr(claims, "too_little", lambda frame: judged.append(frame) or too_little(frame))
    monkeypatch.setattr(bcos, "predictions", missing)
    table = bcos.verdicts(made).set_index("claim")
    barred = table.loc["FLC raises the EPG of B-cos explanations"]
    assert barred["verdict"] == "can't be tested here: B-cos + FLC (plain) learnt too little: it missed every positive"
    assert barred["ours"] == pytest.approx(20.0)
    assert table.loc["BlurPool raises the EPG of B-cos explanations", "verdict"] == "undecided here"
    assert len(judged) == 4, "each network is judged once for all claims about it"


def test_what_learning_too_little_is():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"label": "A", "target": np.arange(60) % 2, "patient_id": np.arange(60) // 2})
    known = frame.assign(probability=0.3 + 0.4 * frame["target"] + 0.1 * rng.random(60))
    assert claims.too_little(known) == ""
    assert claims.too_little(known.assign(probability=0.5 * known["probability"])) == "it missed every positive"
    assert claims.too_little(frame.assign(probability=rng.random(60))) == "its AUC may be that of chance"
    area = comparison.area(known)
    assert area == (1, 1, 1)
    assert comparison.area(frame.assign(probability=rng.random(60))).mean == pytest.approx(0.5, abs=0.2)


def test_recall_stands_beside_its_own_chance_and_interval(made):
    table = bcos.beside(bcos.overview(made), "bcos/tab5_rsna_epg_recall", "binary", metric="recall")
    row = table.set_index(["network", "regime"]).loc[("B-cos + FLC", "plain")]
    assert row[["ours", "low", "high", "chance"]].astype(float).tolist() == pytest.approx([100, 100, 100, 60])
    assert row[["maps", "left out"]].tolist() == [25, 0]  # of the degenerate map's EPG is undefined, not its recall
    table = bcos.beside(bcos.overview(made), "bcos/tab3_rsna_epg_antialiasing", "binary")
    row = table.set_index(["network", "regime", "explanation"]).loc[("B-cos + FLC", "plain", "Inherent")]
    assert row[["maps", "left out"]].tolist() == [24, 1]
    older = scores(0.3, "bcos").drop(columns="chance_recall")
    assert report.pointing_table(older)["recall chance"].isna().all()


def test_an_unknown_table_names_the_known():
    with pytest.raises(ParameterError, match="bcos/tab3"):
        published.table("bcos/tab99")


def test_enlarged_maps_keep_every_value():
    maps = np.arange(8.0).reshape(2, 2, 2)
    big = report.enlarge(maps, 6)
    assert big.shape == (2, 6, 6)
    assert big[:, ::3, ::3].tolist() == maps.tolist()
    assert np.allclose(big.mean((1, 2)), maps.mean((1, 2)))
    with pytest.raises(ParameterError, match="no multiple"):
        report.enlarge(maps, 5)


def test_grid_energy_stands_beside_that_of_a_smooth_map(made):
    maps = bcos.maps(made).query("regime == 'plain'")
    table = run_cell("papers/bcos/study", "cell-35", maps=maps, report=report, figures=figures)["energy"]
    assert table["network"].tolist() == ["B-cos", "B-cos + FLC", "B-cos + BlurPool"]
    assert table["grid"].tolist() == pytest.approx([0.25] * 3)
    assert table["ratio"].tolist() == pytest.approx([2.0] * 3)
