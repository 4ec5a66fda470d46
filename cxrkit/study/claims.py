"""A paper's claims beside our differences: a claim is a sign, ours is an interval, the verdict is a word.

The claims of a paper are rows of its ``claims.csv``:

========= ==============================================================================================================
id        a name, once in the file
text      what the paper says, in our words
published the difference that it rests on, in percent points; a bare 1 or -1 where the paper prints no number
printed   the paper's numbers as a reader may look them up; empty: ``published``
table     the table of scores that ours is taken from, by the name under which the paper's ``tables.py`` hands it over
score     a column of that table, or a measure by the name under which ``tables.py`` hands it over
side_a    a query (pandas) that selects rows of the table
side_b    the rows that are subtracted; empty: ours is the mean of ``side_a``
by        columns in which two rows must agree to be subtracted, such as "image_id label"
each      a column for whose values the claim is made one by one; empty: once
absent    why it can't be tested where a side has no rows; empty: the claim is then left out
========= ==============================================================================================================

Words in braces in the text and the sides are filled in. A table has a column ``patient_id``, and may have ``barred``:
why the row's network tests nothing, empty where it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cxrkit.errors import DataError, ParameterError, meant
from cxrkit.metrics import bootstrap
from cxrkit.project import project_folder
from cxrkit.study import comparison
from cxrkit.study.study import Study

__all__ = [
    "COLUMNS",
    "FEWEST",
    "TOO_FEW",
    "Claim",
    "Measured",
    "difference",
    "measured",
    "read",
    "table",
    "too_little",
    "verdict",
    "verdicts",
]

COLUMNS = ("id", "text", "published", "printed", "table", "score", "side_a", "side_b", "by", "each", "absent")
Measure = Callable[[pd.DataFrame, pd.DataFrame], "Measured | None"]

# Patients below which no verdict is given: 2^(1 - 6) = 0.03 is the first chance of a false one below 0.05.
FEWEST = 6
TOO_FEW = "undecided here: too few patients"


class Measured(NamedTuple):
    """A mean, the bounds of its interval, and how many patients it rests on (or whatever else was resampled)."""

    mean: float
    low: float
    high: float
    n: int


def measured(values: ArrayLike, patients: Sequence, n: int = 2000) -> Measured:
    """:func:`cxrkit.metrics.bootstrap` of values ``[N]``, with the number of patients that have one."""
    values, patients = np.asarray(values, dtype=np.float64), np.asarray(patients)
    return Measured(*bootstrap(values, patients, n=n), len(np.unique(patients[~np.isnan(values)])))


@dataclass(frozen=True)
class Claim:
    """``text``: what the paper says, in our words. ``published``: the difference that it rests on, in percent points; a
    bare +1 or -1 where the paper prints no number (see ``printed``). ``ours``: our difference with its interval, or
    None, and then ``why`` says what is missing. ``printed``: the paper's numbers as a reader may look them up.
    ``barred``: why ours, though measured, tests nothing (a network that learnt too little).
    """

    text: str
    published: float
    ours: Measured | None
    printed: str = ""
    why: str = ""
    synthetic: bool = True
    barred: str = ""

    @property
    def verdict(self) -> str:
        if self.ours is None or self.barred:
            why = self.barred or self.why
            return f"can't be tested here: {why}" if why else "can't be tested here"
        return verdict(self.ours, self.published, self.synthetic)


def verdict(found: Measured, expected: float, synthetic: bool = True) -> str:
    """Whether an interval agrees with a published difference (percent points; a bare 1 or -1 tells the sign alone).

    "same direction", "opposite direction"; "reproduced" where moreover the interval of the paper's own kind of images
    holds the published number: on synthetic images only the direction can be compared. An interval that holds 0 decides
    nothing. Nor does one of fewer than FEWEST patients: where each of P patients falls on either side of 0 by chance,
    all fall on the same one with probability 2^(1 - P), and then every resample lies there too, and the interval leaves
    0 out.
    """
    if found.n < FEWEST:
        return TOO_FEW
    if not np.isfinite(found.low) or found.low <= 0 <= found.high:
        return "undecided here"
    if np.sign(found.mean) != np.sign(expected):
        return "opposite direction"
    held = abs(expected) != 1 and found.low <= expected / 100 <= found.high
    return "reproduced" if held and not synthetic else "same direction"


def too_little(predictions: pd.DataFrame, cutoff: float = 0.5) -> str:
    """Why a network learnt too little for its maps to be judged, in words; empty where it learnt.

    `predictions` as `training.predict` gives them. Too little: no positive is found at the cutoff, or the interval of
    the macro AUC (patients resampled) holds 0.5.
    """
    positive = predictions["target"] > 0.5
    if positive.any() and not (predictions.loc[positive, "probability"] > cutoff).any():
        return "it missed every positive"
    low, high = comparison.area(predictions)[1:]
    return "its AUC may be that of chance" if low <= 0.5 <= high else ""


def table(claims: Iterable[Claim], scale: float = 100) -> pd.DataFrame:
    """A row per claim: claim, paper (as printed), ours, low, high (times ``scale``: percent), n (patients), verdict."""
    rows = []
    for claim in claims:
        ours = claim.ours or Measured(np.nan, np.nan, np.nan, pd.NA)
        rows.append(
            {
                "claim": claim.text,
                "paper": claim.printed or f"{claim.published:+.1f}",
                "ours": scale * ours.mean,
                "low": scale * ours.low,
                "high": scale * ours.high,
                "n": ours.n,
                "verdict": claim.verdict,
            }
        )
    frame = pd.DataFrame(rows, columns=["claim", "paper", "ours", "low", "high", "n", "verdict"])
    return frame.astype({"n": "Int64"})


def read(paper: str) -> pd.DataFrame:
    """The rows of a paper's `claims.csv`: text in all columns but `published`. Raises DataError for a file that isn't
    one."""
    path = _path(paper)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file of claims")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != COLUMNS:
        raise DataError(f"{path}: the columns are {list(rows.columns)}, not {list(COLUMNS)}")
    if rows["id"].duplicated().any():
        raise DataError(f"{path}: several claims have the id {rows['id'][rows['id'].duplicated()].iloc[0]!r}")
    try:
        return rows.astype({"published": float})
    except ValueError as error:
        raise DataError(f"{path}, column 'published': {error}") from None


def verdicts(
    paper: str,
    study: Study,
    tables: Mapping[str, Callable[[Study], pd.DataFrame]],
    measures: Mapping[str, Measure] | None = None,
    **words: str,
) -> pd.DataFrame:
    """The claims of a paper tested on a study: :func:`table` of its `claims.csv`, in the file's order.

    ``tables``: by name, a function that makes a table of scores; each is called at most once, and a ParameterError that
    it raises is the reason why its claims can't be tested. ``measures``: by name, a function of the rows of both sides.
    ``words``: values for the words in braces. Raises DataError naming the row at fault.
    """

    @functools.cache
    def scores(name: str) -> pd.DataFrame | str:
        try:
            return tables[name](study)
        except ParameterError as error:
            return str(error)

    found: list[Claim] = []
    for row in read(paper).itertuples():
        try:
            if row.table not in tables:
                raise ParameterError(f"table {row.table!r} is unknown; {meant(row.table, list(tables))}")
            filled = row._replace(**{name: getattr(row, name).format(**words) for name in ("text", "side_a", "side_b")})
            found += _claims(filled, scores(row.table), measures or {}, study.synthetic)
        except (KeyError, ValueError, SyntaxError, pd.errors.UndefinedVariableError) as error:
            raise DataError(f"{_path(paper)}, claim {row.id!r}: {error}") from None
    return table(found)


def _path(paper: str) -> Path:
    return project_folder() / "notebooks" / "papers" / paper / "claims.csv"


def _claims(row: Any, scores: pd.DataFrame | str, measures: Mapping[str, Measure], synthetic: bool) -> Iterator[Claim]:
    """The claim of one row, or one for each value of a column; none where it is to be left out."""
    facts = {"published": row.published, "printed": row.printed, "synthetic": synthetic}
    if isinstance(scores, str):
        if row.absent:
            yield Claim(row.text, ours=None, why=scores, **facts)
        return
    a, b = scores.query(row.side_a), scores.query(row.side_b) if row.side_b else scores.iloc[:0]
    parts = {f"{row.text} ({value})": part for value, part in a.groupby(row.each, sort=False)} if row.each else {}
    for text, part in (parts or {row.text: a}).items():
        ours = _ours(row, part, b, measures)
        barred = [one for side in (part, b) for one in side.get("barred", pd.Series(dtype=str)).unique() if one]
        if ours is not None or row.absent:
            yield Claim(text, ours=ours, why=row.absent, barred=barred[0] if ours and barred else "", **facts)


def _ours(row: Any, a: pd.DataFrame, b: pd.DataFrame, measures: Mapping[str, Measure]) -> Measured | None:
    if a.empty or (row.side_b and b.empty):
        return None
    if row.score in measures:
        return measures[row.score](a, b)
    if row.side_b:
        return difference(a, b, row.score, row.by.split())
    known = a[a[row.score].notna()]
    return measured(known[row.score], known["patient_id"]) if len(known) else None


def difference(a: pd.DataFrame, b: pd.DataFrame, score: str, by: Sequence[str]) -> Measured | None:
    """Mean of a score in `a` less that in `b`, over pairs of rows of one patient that agree in the columns `by`.

    Several rows of a side that agree are averaged first. None without a pair that has both scores.
    """
    sides = [side.groupby(["patient_id", *by], sort=False)[score].mean() for side in (a, b)]
    both = pd.concat(sides, axis=1, join="inner", keys=["a", "b"]).dropna()
    return measured(both["a"] - both["b"], both.index.get_level_values("patient_id")) if len(both) else None
