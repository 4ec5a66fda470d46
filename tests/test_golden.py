"""Claims of every paper on small stored runs: whatever is rebuilt, the numbers on the pages stay what they were.

To write a paper's numbers anew after a change that is meant: python tests/test_golden.py PAPER
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pandas as pd
import pytest

from cxrkit.study import published, report
from cxrkit.study.runs import Run
from cxrkit.study.study import Study
from papers.bcos import tables as bcos

GOLDEN = Path(__file__).resolve().parent / "golden"


def study_of(paper: str) -> Study:
    return Study(paper, tuple(Run(folder) for folder in sorted((GOLDEN / paper).iterdir())))


def claims_of(paper: str) -> pd.DataFrame:
    return importlib.import_module(f"papers.{paper}.tables").verdicts(study_of(paper))


def test_every_paper_has_golden_numbers():
    assert set(published.papers()) == {path.stem for path in GOLDEN.glob("*.csv")}


@pytest.mark.parametrize("paper", sorted(path.stem for path in GOLDEN.glob("*.csv")))
def test_claims_are_the_golden_ones(paper):
    golden = pd.read_csv(GOLDEN / f"{paper}.csv", dtype={"n": "Int64"})
    pd.testing.assert_frame_equal(claims_of(paper), golden, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_published_numbers_meet_ours_of_the_same_set_alone():
    whole = study_of("bcos")
    pairs = [pair for pair in whole.pairs() if report.view(pair[0].parameters) == "multilabel"]
    many = Study("bcos", tuple(run for pair in pairs for run in pair))
    assert (bcos.view_of(many, "RSNA"), bcos.view_of(many, "VinBigData")) == ("", "multilabel")
    overview = bcos.overview(many)
    assert "ours" not in bcos.beside(overview, "bcos/tab2_rsna_epg", bcos.view_of(many, "RSNA"))
    assert bcos.beside(overview, "bcos/tab7_vinbig_epg", "multilabel")["ours"].notna().any()
    assert bcos.verdicts(many)["claim"].str.startswith("With fourteen labels").all()


if __name__ == "__main__":
    claims_of(sys.argv[1]).to_csv(GOLDEN / f"{sys.argv[1]}.csv", index=False, float_format="%.8g")
