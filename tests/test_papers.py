"""Papers beside our runs: claims, checklists, effort, and the synthesis, from tables whose numbers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import second_device
import torch

import cxrkit.models
from book.tools import checklist, effort
from cxrkit import ParameterError, data
from cxrkit.study import published
from cxrkit.study.claims import FEWEST, Claim, Measured, measured, table, verdict
from cxrkit.study.notebook import parameters_of
from synthesis import measure as scoring
from synthesis import tables as synthesis


@pytest.mark.parametrize(
    ("interval", "synthetic", "word"),
    [
        (Measured(0.06, 0.04, 0.08, 9), False, "reproduced"),
        (Measured(0.02, 0.01, 0.03, 9), False, "same direction"),  # the published 5 points lie outside
        (Measured(-2, -3, -1, 9), False, "opposite direction"),
        (Measured(2, 0, 3, 9), False, "undecided here"),
        (Measured(np.nan, np.nan, np.nan, 9), False, "undecided here"),
        (Measured(2, 1, 3, 9), True, "same direction"),
        (Measured(-2, -3, -1, 9), True, "opposite direction"),
        (Measured(2, 1, 3, FEWEST), True, "same direction"),
        (Measured(2, 1, 3, FEWEST - 1), True, "undecided here: too few patients"),
    ],
)
def test_the_words_of_a_verdict_say_whose_images_they_rest_on(interval, synthetic, word):
    assert verdict(interval, 5.0, synthetic) == word


def test_a_sign_alone_is_never_reproduced():
    assert verdict(Measured(0.02, 0.005, 0.03, 9), 1.0, False) == "same direction"


def test_a_claim_that_cannot_be_tested_says_why():
    claims = [
        Claim("a", 2.5, Measured(0.01, 0.005, 0.02, 30)),
        Claim("b", -1, None, printed="in prose", why="the data are private"),
    ]
    found = table(claims)
    assert list(found["verdict"]) == ["same direction", "can't be tested here: the data are private"]
    assert list(found["paper"]) == ["+2.5", "in prose"]
    assert found["ours"][0] == pytest.approx(1.0)
    assert np.isnan(found["ours"][1])
    assert found["n"].fillna(-1).tolist() == [30, -1]


def test_a_number_that_tests_nothing_is_shown_and_not_judged():
    claim = Claim("a", 2.5, Measured(0.01, 0.005, 0.02, 30), barred="FLC learnt too little")
    found = table([claim]).iloc[0]
    assert found["ours"] == pytest.approx(1.0)
    assert found["verdict"] == "can't be tested here: FLC learnt too little"


@pytest.mark.parametrize("patients", [3, FEWEST - 1, FEWEST, 12])
def test_a_verdict_needs_patients_enough(patients):
    """Coins: every patient falls on one side of 0 or the other. A verdict is a false alarm."""
    sides = np.random.default_rng(0).choice([-1.0, 1.0], size=(300, patients))
    found = [verdict(measured(values, np.arange(patients), n=200), 1) for values in sides]
    alarms = np.mean([word in ("same direction", "opposite direction") for word in found])
    assert alarms < 0.08
    if patients < FEWEST:
        assert set(found) == {"undecided here: too few patients"}


def test_patients_without_a_value_do_not_count():
    assert measured([1.0, 2.0, np.nan, 4.0], ["p", "p", "q", "r"]).n == 2


def test_single_numbers_of_a_paper_are_read_by_key():
    assert float(published.scalars("covid")["threshold"]) == 0.51
    with pytest.raises(ParameterError, match="there is no published table 'nobody/scalars'"):
        published.scalars("nobody")


@pytest.mark.parametrize("paper", ["normgrad", "covid", "path", "relevance", "synthesis"])
def test_parameters_of_scores_are_those_of_the_notebook_and_no_others(paper):
    fresh = {"In": ["", "parameters", "this"], "run": "some-key", "images": 7, "_hidden": 1}
    notebook = f"{'' if paper == 'synthesis' else 'papers/'}{paper}/measure.ipynb"
    found = parameters_of(notebook, fresh)
    kind = "measure" if paper == "synthesis" else f"{paper}_measure"
    assert (found.run, found.images, found.kind) == ("some-key", 7, kind)
    with pytest.raises(ParameterError, match=rf"unknown parameter 'imagess' for {kind}; did you mean 'images'"):
        parameters_of(notebook, fresh | {"imagess": 3})


@pytest.mark.parametrize("paper", published.papers())
def test_every_item_of_a_checklist_is_made_or_explained(paper):
    assert len(checklist.items(paper)) >= 8
    assert checklist.problems(paper) == []


def write(folder, text, cells):
    (folder / "notebooks" / "grids").mkdir(parents=True)
    (folder / "book").mkdir(parents=True)
    (folder / "notebooks" / "papers" / "bcos").mkdir(parents=True)
    (folder / "notebooks" / "papers" / "bcos" / "checklist.yaml").write_text(text)
    (folder / "book" / "page.md").write_text("".join(f"```{{code-cell}}\n:tags: [{cell}]\n1\n```\n" for cell in cells))


def test_a_checklist_and_its_cells_must_agree(tmp_path, monkeypatch):
    rows = ("{id: one, item: A}", "{id: two, item: B, why: no data}", "{id: three, item: C, why: it can't}")
    more = ("{id: four, item: D}", "{id: six, item: E, full: a large network, note: slow}")
    text = "".join(f"- {row}\n" for row in (*rows, *more))
    write(tmp_path, text, ["item-bcos-one, hide-input", "item-bcos-three", "item-bcos-five", "item-bcos-six"])
    monkeypatch.chdir(tmp_path)
    found = " | ".join(checklist.problems("bcos"))
    assert "'three' is made by ['book/page.md'], yet" in found
    assert "'four' is made by no cell tagged item-bcos-four" in found
    assert "tagged 'five', which is not in the list" in found
    assert found.count("|") == 2
    shown = checklist.page("bcos")
    assert "2 of 5 items are made; 1 (◐) are whole in the profile `full` of the grid only; of the others" in shown
    assert "| ◐ | E | [page](../../../book/page.md) | a large network; slow |" in shown
    assert "| ✓ | A | [page](../../../book/page.md) |  |" in shown
    assert "| – | B |  | no data |" in shown


def test_an_item_without_a_text_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "- {id: one}\n", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=r"notebooks/papers/bcos/checklist.yaml, item 1: has \['id'\]"):
        checklist.items("bcos")
    with pytest.raises(ParameterError, match="'nobody' has no checklist"):
        checklist.items("nobody")


def test_hours_follow_from_images_epochs_and_the_area_of_the_input():
    found = effort.table({"one": 1e12, "two": 2e12}, ("bcos",)).set_index("profile")
    assert list(found.index[:2]) == ["quick", "full"]
    quick = found.loc["quick"]
    costs = {"resnet18": 3.63, "bcos_resnet18": None}
    assert quick["hours, one"] == pytest.approx(2 * quick["hours, two"])
    assert quick["hours, one"] == pytest.approx(quick["10^15 operations"] * 1e15 / 1e12 / 3600)
    work = 3 * costs["resnet18"] * 1e9 * (64 / 224) ** 2 * 0.64 * (4 * 600 * 3 + 1000 * 4)
    assert quick["10^15 operations"] * 1e15 > work  # the baseline's part of it
    assert found.loc["full", "10^15 operations"] > 1000 * quick["10^15 operations"]


def test_a_set_of_unknown_size_leaves_the_others_of_its_profile_their_costs():
    found = effort.table({"one": 1e12}, ("normgrad", "covid", "synthesis"))
    found = found.set_index(["paper", "profile", "data"]).sort_index()
    costs = found[["10^15 operations", "hours, one", "GB"]].notna()
    assert costs.loc[("normgrad", "full", "object_cxr")].all()
    assert not costs.loc[("normgrad", "full", "lvot")].any()  # private: its manifest counts no images
    assert costs.loc[("covid", "data", "covid")].all()  # the paper's count, where the source has none of its own
    assert costs.loc[("synthesis", "full", "phantom")].all()
    both = found.loc[("normgrad", "full")]
    assert both["trainings"].tolist() == both["other runs"].tolist() == [6, 6]


@pytest.mark.parametrize("paper", [*published.papers(), "synthesis"])
def test_the_commands_of_a_paper_name_profiles_and_sources_that_exist(paper):
    shown = effort.commands(paper).splitlines()
    assert shown[0] == "```bash"
    assert f"cxrkit grid run {paper}" in shown
    runs = [line.split("--profile ")[1].split()[0] for line in shown if "--profile" in line]
    assert set(runs) == set(effort.profiles(paper)) - {"quick", "sample"}
    got = [line.split()[3] for line in shown if line.startswith("cxrkit data get")]
    assert len(got) == len(set(got))
    assert set(got) <= set(data.sources())
    assert any("--slurm" in line for line in shown)


def test_the_commands_repeat_what_the_grid_asks_of_a_source():
    shown = effort.commands("path")
    assert "data prepare brain_mri --root data/brain_mri --size 225\n" in shown
    assert (
        "data check covid_radiography --root data/covid_radiography --option 'classes=[COVID, Lung_Opacity, Normal]'"
        in shown
    )
    assert "--size 512 --preprocessing covid/authors --option protocol=authors" in effort.commands("covid")
    assert "cxrkit data get nih --to data/nih" in effort.commands("relevance")


def frame() -> pd.DataFrame:
    """Two methods on ten images of five patients: b scores 0.2 more than a in EPG, and less in IoU."""
    rows = []
    for number in range(10):
        for method, shift in (("a", 0.0), ("b", 0.2)):
            for score, value in {"EPG precision": 0.3 + shift, "IoU": 0.5 - shift, "deletion": 0.4 + shift}.items():
                row = {"network": "n", "image_id": f"i{number}", "patient_id": f"p{number // 2}", "label": "A"}
                row |= {"method": method, "score": score, "value": value + number / 100, "chance": 0.1}
                rows.append(row)
    return pd.DataFrame(rows)


def test_scored_positives_are_of_as_many_patients_as_there_are(monkeypatch):
    images = {
        "image_id": [f"i{n}" for n in range(9)],
        "patient_id": ["p0"] * 3 + ["p1"] * 2 + ["p2"] * 2 + ["p3", "p4"],
    }
    boxes = pd.DataFrame([{"image_id": f"i{n}", "label": label} for n in range(8) for label in "AB"])
    data = SimpleNamespace(table=pd.DataFrame(images), boxes=boxes, labels=("A", "B"))
    data.name = "toy"
    monkeypatch.setattr(scoring, "target_table", lambda of: torch.ones(9, 2))
    assert scoring.positives(data, ["A", "B"], 2) == {"A": [0, 3], "B": [5, 7]}  # four boxed patients, four rows
    assert scoring.positives(data, ["A"], 6)["A"] == [0, 1, 2, 3, 5, 7]
    with pytest.raises(ParameterError, match=r"labels \['C'\] are unknown to toy"):
        scoring.positives(data, ["C"], 2)


def test_metrics_that_rank_methods_in_opposite_order_disagree():
    found = synthesis.agreement(frame())
    assert found.loc["EPG precision", "IoU"] == pytest.approx(-1)
    assert found.loc["IoU", "deletion"] == pytest.approx(1)  # the lower deletion, the better


def test_methods_are_compared_on_the_same_images():
    row = synthesis.against(frame(), "EPG precision", "a").iloc[0]
    assert row["method"] == "b"
    assert row[["difference", "low", "high"]].astype(float).tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(ParameterError, match="metric 'beauty' is unknown"):
        synthesis.against(frame(), "beauty", "a")
    with pytest.raises(ParameterError, match="reference 'c' explains no image of n"):
        synthesis.against(frame(), "IoU", "c")


def test_p_values_of_few_patients_stay_above_what_they_allow():
    few = frame()[lambda one: one["patient_id"].isin(["p0", "p1", "p2"])]
    row = synthesis.against(few, "EPG precision", "a").iloc[0]
    assert (row["maps"], row["left out"], row["patients"]) == (6, 0, 3)
    assert row["p (Holm)"] == 2 / 2**3


def degenerate() -> pd.DataFrame:
    """As `frame`, but b draws nothing on the second image of each patient, so that EPG and IoU have no score."""
    one = frame()
    second = one["image_id"].isin([f"i{n}" for n in range(1, 10, 2)])
    empty = (one["method"] == "b") & (one["score"] != "deletion") & second
    return one.assign(value=one["value"].mask(empty))


def test_a_mean_over_fewer_maps_does_not_stand_beside_the_others():
    shown = synthesis.overview(degenerate())["n"]
    assert shown["rows"] == ["a", "b (5 of 10)", "chance"]
    assert np.isnan(shown["values"][1][:2]).all()
    assert shown["values"][1][2] == pytest.approx(0.645)
    row = synthesis.means(degenerate(), "EPG precision").set_index("method").loc["b"]
    assert (row["maps"], row["degenerate"], row["patients"]) == (5, 5, 5)
    assert row["EPG precision"] == pytest.approx(0.54)
    assert row["low"] <= row["EPG precision"] <= row["high"]
    assert synthesis.against(degenerate(), "IoU", "a").iloc[0]["left out"] == 5


def test_metrics_are_compared_over_methods_that_all_of_them_score():
    both = degenerate()
    more = [both[both["method"] == "a"].assign(method=name, value=lambda one, by=by: one["value"] + by)
            for name, by in (("c", 0.1), ("d", 0.3))]  # fmt: skip
    found = synthesis.agreement(pd.concat([both, *more]))
    assert found.loc["EPG precision", "deletion"] == pytest.approx(-1)
    assert found.loc["IoU", "deletion"] == pytest.approx(-1)  # with b's five maps: another order


def test_the_overview_ends_with_chance():
    shown = synthesis.overview(frame())["n"]
    assert shown["rows"] == ["b", "a", "chance"]
    assert shown["columns"] == ["EPG precision", "IoU", "deletion"]
    assert shown["values"][0] == pytest.approx([0.545, 0.345, 0.645])
    assert shown["values"][2] == pytest.approx([0.1, 0.1, 0.1])


def test_reasons_count_as_one_verdict():
    claims = pd.DataFrame({"paper": ["bcos", "bcos", "path"], "claim": list("xyz")})
    claims["verdict"] = ["same direction", "can't be tested here: private", "can't be tested here: no number"]
    claims.loc[3] = ["path", "w", "undecided here: too few patients"]
    found = synthesis.counted(claims).set_index("paper")
    assert found.loc["path", "too few patients"] == 1
    assert found.loc["bcos", "can't be tested here"] == found.loc["bcos", "same direction"] == 1
    assert found.loc["path", "claims"] == 2


def test_a_network_on_another_device_gets_the_same_maps():
    images = torch.rand(2, 1, 32, 32)
    model = cxrkit.models.create("resnet18", ("a", "b")).eval()
    here = scoring.maps_of(model, images, "a", "integrated_gradients", 4)
    with second_device.SecondDevice():
        model.to(second_device.DEVICE)
        there = scoring.maps_of(model, images, "a", "integrated_gradients", 4)
    assert here.shape == (2, 32, 32)
    np.testing.assert_allclose(there, here, atol=1e-4)


def test_methods_that_do_not_fit_are_named():
    model = cxrkit.models.create("resnet18", ("a", "b")).eval()
    assert "scorecam" in set(scoring.fitting(model, slow=True)) - set(scoring.fitting(model))
    with pytest.raises(ParameterError, match=r"methods \['bcos'\] can't explain"):
        scoring.fitting(model, ["bcos", "lrp"])
