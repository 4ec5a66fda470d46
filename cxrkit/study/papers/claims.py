"""A paper's claims beside our differences: a claim is a sign, ours is an interval, the verdict is a word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxrkit.metrics import Interval

__all__ = ["Claim", "table", "verdict"]


@dataclass(frozen=True)
class Claim:
    """``text``: what the paper says, in our words. ``published``: the difference that it rests on, in the unit of ours;
    a bare +1 or -1 where the paper prints no number (see ``printed``). ``ours``: our difference with its interval, or
    None, and then ``why`` says what is missing. ``printed``: the paper's numbers as a reader may look them up.
    """

    text: str
    published: float
    ours: Interval | None
    printed: str = ""
    why: str = ""
    synthetic: bool = True

    @property
    def verdict(self) -> str:
        if self.ours is None:
            return f"can't be tested here: {self.why}" if self.why else "can't be tested here"
        return verdict(self.ours, self.published, self.synthetic)


def verdict(interval: Interval, expected: float, synthetic: bool = True) -> str:
    """Whether an interval agrees with the sign of a published difference.

    On synthetic images only the direction can be compared, and the words say so: "same direction", "opposite
    direction"; on a paper's own data: "reproduced", "not reproduced". An interval that holds 0 decides nothing.
    """
    if not np.isfinite(interval.low) or interval.low <= 0 <= interval.high:
        return "undecided here"
    same = np.sign(interval.mean) == np.sign(expected)
    if synthetic:
        return "same direction" if same else "opposite direction"
    return "reproduced" if same else "not reproduced"


def table(claims: Iterable[Claim], scale: float = 100) -> pd.DataFrame:
    """A row per claim: claim, paper (as printed), ours, low, high (times ``scale``: percent), verdict."""
    rows = []
    for claim in claims:
        ours = claim.ours or Interval(np.nan, np.nan, np.nan)
        rows.append(
            {
                "claim": claim.text,
                "paper": claim.printed or f"{claim.published:+.1f}",
                "ours": scale * ours.mean,
                "low": scale * ours.low,
                "high": scale * ours.high,
                "verdict": claim.verdict,
            }
        )
    return pd.DataFrame(rows, columns=["claim", "paper", "ours", "low", "high", "verdict"])
