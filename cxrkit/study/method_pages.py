"""Tables and maps of the book's pages on methods: one image of the phantom and one network, by every method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from torch import Tensor

import cxrkit.attribution
from cxrkit.markdown import escaped
from cxrkit.metrics import completeness_gap, map_correlation
from cxrkit.study.explanation import Subject
from cxrkit.study.phantom_benchmark import Scene, settings_of
from cxrkit.study.runs import project_folder

__all__ = [
    "as_markdown",
    "label_similarity",
    "map_sums",
    "method_table",
    "refusals",
    "settings",
    "support_table",
    "variants",
]


def method_table(family: str | None = None) -> pd.DataFrame:
    """The cards of a family's methods, or of all: meaning, formula, passes, sign, what is needed."""
    rows = [
        {
            "method": card.name,
            "the map shows": card.meaning,
            "formula": f"${card.formula}$",
            "forwards": card.forwards,
            "backwards": card.backwards,
            "signed": "yes" if card.signed else "no",
            "needs": card.needs,
        }
        for card in cxrkit.attribution.methods()
        if family in (None, card.family)
    ]
    return pd.DataFrame(rows).set_index("method")


def as_markdown(frame: pd.DataFrame) -> Markdown:
    """A table that the book shows whole, with its formulas set and its `code`; what else it holds is plain text."""
    frame = frame.reset_index()
    lines = ["| " + " | ".join(map(_cell, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells = map(_cell, row)
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def _cell(value: object) -> str:
    """One cell of a table in Markdown, in which names from data are text, not markup."""
    pieces = re.split(r"(\$[^$]+\$|`[^`]+`)", " ".join(str(value).split()))
    for place, piece in enumerate(pieces):
        # A bar would end the cell, also inside a formula.
        if piece.startswith("$") and place % 2:
            pieces[place] = piece.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
        else:
            pieces[place] = (piece if place % 2 else escaped(piece)).replace("|", r"\|")
    return "".join(pieces)


def settings(bench: Subject, scene: Scene, method: str, options: Mapping[str, dict]) -> dict[str, Tensor]:
    """Maps [H, W] of the scene's first image and label by one method, for each named set of options."""
    usual = settings_of(method, bench.parameters.n_steps, scene.images.shape[-1])
    image = scene.images[:1]
    return {title: bench.maps(image, method, [scene.label], **usual | one)[0, 0] for title, one in options.items()}


def variants(bench: Subject, scene: Scene, method: str, option: str, values: Iterable, **fixed) -> dict[str, Tensor]:
    """Maps [H, W] of the scene's first image and label by one method, for each value of one option."""
    return settings(bench, scene, method, {f"{option} {value}": {option: value, **fixed} for value in values})


def label_similarity(bench: Subject, scene: Scene, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """Similarity of the maps of different labels of one image: mean |correlation| over all pairs, by method.

    Its size, because relevance of a negative logit is the same map with the sign reversed.
    """
    rows = []
    for method in methods or bench.methods:
        size = scene.images.shape[-1]
        maps = bench.maps(
            scene.images[:1], method, bench.labels, **settings_of(method, bench.parameters.n_steps, size)
        )[0]
        alike = [map_correlation(a, b).abs() for a, b in combinations(maps, 2)]
        title = "mean |correlation| between labels"
        rows.append({"method": method, title: float(torch.stack(alike).nanmean()) if alike else np.nan})
        rows[-1]["labels"] = int((maps.flatten(1).std(1) > 0).sum())  # a constant map correlates with nothing
    return pd.DataFrame(rows).set_index("method")


def map_sums(
    bench: Subject, scene: Scene, maps: Mapping[str, Tensor], baselines: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Sum of each map [H, W] of the scene's first image and label beside the sum that its method promises.

    That is the logit less the constant that the network adds last, or with ``baselines``, images by the maps' titles,
    the logit less that of the baseline. Columns: sum, promised, difference, and relative: its size as a share of what
    was promised; see :func:`cxrkit.metrics.completeness_gap`.
    """
    rows = {}
    for title, values in maps.items():
        if baselines is not None:
            promise = {"promise": "difference", "baseline": baselines[title]}
        else:
            promise = {"promise": "without_bias" if getattr(bench.model, "logit_bias", 0) else "score"}
        found = completeness_gap(bench.model, scene.images[:1], values[None, None], [scene.label], **promise)
        total, gap = float(values.double().sum()), float(found.gap)
        rows[title] = {"sum": total, "promised": total - gap, "difference": gap, "relative": float(found.relative)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("map")


def _support() -> pd.DataFrame:
    return pd.read_csv(project_folder() / "book" / "attribution" / "support.csv", keep_default_na=False)


def support_table() -> pd.DataFrame:
    """Networks x methods as the tests found them: a tick where the map is right, a dash where the method refuses."""
    verdicts = _support().pivot_table("verdict", "network", "method", aggfunc="first", sort=False)
    return verdicts.replace({"right": "✓", "refused": "–"}).rename(columns=lambda method: method.replace("_", " "))


# Names of layers and classes, which differ between networks with one reason, and what is said instead.
_NAMES = {
    r"layer [\w.]+ \(or of its ReLU\)": "the last map",
    r"^(?:cam|lrp|rap): |[Ll]ayer [\w.]+(?: \([^)]*\))?:? ?|image \d+, label \S+: | ?\([^)]*\)": "",
    r"^\w+ (?=has no B-cos)": "the network ",
    r"relevance sums to \S+, the logit is \S+(?=[.] )": "relevance doesn't sum to the logit",
}


def refusals() -> pd.DataFrame:
    """The reasons of the refusals, shortened to their first clause, with the methods and networks of each."""
    refused = _support().query("verdict == 'refused'").copy()
    refused["reason"] = refused["reason"].replace(_NAMES, regex=True).str.split("; ?|: |[.] ", regex=True).str[0]
    for merged in ("network", "method"):
        others = [column for column in ("reason", "network", "method") if column != merged]
        refused = refused.groupby(others, sort=False)[merged].agg(", ".join).reset_index()
    return refused.set_index("reason")[["method", "network"]]
