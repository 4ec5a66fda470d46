"""One tidy table of all runs in a folder."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pandas as pd

from cxrkit.errors import CxrkitError, DataError
from cxrkit.study import run_key, runs

__all__ = ["newest", "table"]

_OWN = ("key", "kind", "finished", "stale")


def table(results: str | Path = "results") -> pd.DataFrame:
    """All whole runs of a folder, a row each: key, kind, when finished, stale, and every parameter as a column.

    A run that has no such parameter has NaN in its column. A notebook of one's own may call a parameter what the table
    calls a column: that one is named "parameter NAME".
    """
    fingerprint = functools.cache(runs.fingerprint)
    rows: list[dict[str, Any]] = []
    for card in sorted(runs.results_folder(results).glob("[!.]*/run.json")):
        with contextlib.suppress(CxrkitError, OSError):  # a cut-off or foreign folder is no run
            run = runs.Run(card.parent)
            stale = run.card["fingerprint"] != fingerprint(run_key.notebook_of(run.parameters))
            own = dict(zip(_OWN, (run.key, run.kind, run.card["finished"], stale), strict=True))
            values = run.parameters.identity().items()
            rows.append(own | {f"parameter {name}" if name in _OWN else name: value for name, value in values})
    return pd.DataFrame(rows)


def newest(kind: str, results: str | Path = "results") -> runs.Run:
    """The run of a kind that finished last. Raises DataError when there is none."""
    results = runs.results_folder(results)
    cards = table(results)
    cards = cards[cards["kind"] == kind] if len(cards) else cards
    if not len(cards):
        raise DataError(f"no {kind} run in {results}; run notebooks/{kind}.ipynb first")
    return runs.Run(results / cards.sort_values("finished")["key"].iloc[-1])
