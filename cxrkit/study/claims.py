"""A paper's claims beside our differences: a claim is a sign, ours is an interval, the verdict is a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cxrkit.metrics import bootstrap
from cxrkit.study import comparing

__all__ = ["FEWEST", "TOO_FEW", "Claim", "Measured", "measured", "table", "too_little", "verdict"]

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
    """``text``: what the paper says, in our words. ``published``: the difference that it rests on, in the unit of ours;
    a bare +1 or -1 where the paper prints no number (see ``printed``). ``ours``: our difference with its interval, or
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
    """Whether an interval agrees with the sign of a published difference.

    On synthetic images only the direction can be compared, and the words say so: "same direction", "opposite
    direction"; on a paper's own data: "reproduced", "not reproduced". An interval that holds 0 decides nothing. Nor
    does one of fewer than FEWEST patients: where each of P patients falls on either side of 0 by chance, all fall on
    the same one with probability 2^(1 - P), and then every resample lies there too, and the interval leaves 0 out.
    """
    if found.n < FEWEST:
        return TOO_FEW
    if not np.isfinite(found.low) or found.low <= 0 <= found.high:
        return "undecided here"
    same = np.sign(found.mean) == np.sign(expected)
    if synthetic:
        return "same direction" if same else "opposite direction"
    return "reproduced" if same else "not reproduced"


def too_little(predictions: pd.DataFrame, cutoff: float = 0.5) -> str:
    """Why a network learnt too little for its maps to be judged, in words; empty where it learnt.

    `predictions` as `training.predict` gives them. Too little: no positive is found at the cutoff, or the interval of
    the macro AUC (patients resampled) holds 0.5.
    """
    positive = predictions["target"] > 0.5
    if positive.any() and not (predictions.loc[positive, "probability"] > cutoff).any():
        return "it missed every positive"
    low, high = comparing.area(predictions)[1:]
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
