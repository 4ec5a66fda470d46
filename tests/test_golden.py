"""Claims of every paper on small stored runs: whatever is rebuilt, the numbers on the pages stay what they were."""

from __future__ import annotations

import importlib
from pathlib import Path

import pandas as pd
import pytest

from cxrkit.study import published
from cxrkit.study.runs import Run
from cxrkit.study.study import Study

GOLDEN = Path(__file__).resolve().parent / "golden"


def claims_of(paper: str) -> pd.DataFrame:
    tables = importlib.import_module(f"papers.{paper}.tables")
    study = Study(paper, tuple(Run(folder) for folder in sorted((GOLDEN / paper).iterdir())))
    return tables.verdicts(study)


def test_every_paper_has_golden_numbers():
    assert set(published.papers()) == {path.stem for path in GOLDEN.glob("*.csv")}


@pytest.mark.parametrize("paper", sorted(path.stem for path in GOLDEN.glob("*.csv")))
def test_claims_are_the_golden_ones(paper):
    golden = pd.read_csv(GOLDEN / f"{paper}.csv", dtype={"n": "Int64"})
    pd.testing.assert_frame_equal(claims_of(paper), golden, check_dtype=False, rtol=1e-5, atol=1e-6)
