"""A hierarchy of labels as a tree."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from cxrkit.view.style import COLOURS, INK, RULE, SOFT, WIDTH, describe, new_figure, style

__all__ = ["label_tree"]


def label_tree(
    labels: tuple[str, ...], parents: Mapping[str, str], counts: Mapping[str, int], caption: str = ""
) -> Figure:
    """Each label left of those that lie inside it, with its number of images; paler ones have none.

    ``parents``: label -> the label above it; ``counts``: images by label.
    """
    below = {label: [child for child in labels if parents.get(child) == label] for label in labels}
    rows: dict[str, float] = {}
    depth: dict[str, int] = {}
    free = [0.0]

    def place(label: str, column: int) -> float:
        depth[label] = column
        middle = [place(child, column + 1) for child in sorted(below[label], key=lambda child: len(below[child]))]
        if not middle:
            middle = [free[0]]
            free[0] += 1.0
        rows[label] = sum(middle) / len(middle)
        return rows[label]

    for label in (label for label in labels if label not in parents):
        place(label, 0)
    with style():
        figure = new_figure(WIDTH, 0.34 * free[0] + 0.3)
        ax = figure.subplots()
        ax.set(xlim=(-0.02, 1 + max(depth.values())), ylim=(free[0] - 0.4, -0.6))
        ax.axis("off")
        for label in labels:
            x, y = depth[label], rows[label]
            if label in parents:
                above = rows[parents[label]]
                ax.plot([x - 1, x - 0.12, x - 0.12, x], [above, above, y, y], color=RULE, lw=1.4, zorder=0)
            count = counts.get(label, 0)
            told = f"{label}  {count}" if count else f"{label}  none"
            box = {"fc": "white", "ec": COLOURS[0] if count else RULE, "boxstyle": "round,pad=0.35"}
            ax.text(x, y, told, va="center", ha="left", fontsize=8.5, color=INK if count else SOFT, bbox=box)
    told = "; ".join(f"{label} ({counts.get(label, 0)}) inside {parents.get(label, 'nothing')}" for label in labels)
    rows = [{"label": label, "inside": parents.get(label, ""), "images": counts.get(label, 0)} for label in labels]
    text = f"{caption or 'Hierarchy of labels, with their numbers of images'}: {told}."
    return describe(figure, text, pd.DataFrame(rows))
