"""Boxes and arrows: the idea of a paper in one drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cxrkit.errors import ParameterError
from cxrkit.view.style import INK, RULE, SOFT, WIDTH, describe, new_figure, style

__all__ = ["Node", "diagram"]


@dataclass(frozen=True)
class Node:
    """A box at column and row (0, 0 is the upper left; fractions are fine): text, and a picture ``[H, W]`` if there is
    one. ``accent``: a colour that sets the box apart.
    """

    column: float
    row: float
    text: str
    picture: Any = None
    accent: str = ""


def diagram(
    nodes: Mapping[str, Node], arrows: Sequence[tuple[str, str] | tuple[str, str, str]], caption: str
) -> Figure:
    """A drawing of boxes and the arrows between them: (from, to) or (from, to, text), by the boxes' names.

    ``caption`` says what the drawing shows, and becomes its alternative text. Raises ParameterError for an arrow from
    or to a box that isn't there.
    """
    if unknown := {name for arrow in arrows for name in arrow[:2]} - set(nodes):
        raise ParameterError(f"arrows name the boxes {sorted(unknown)}; there are {sorted(nodes)}")
    across = 1 + max(node.column for node in nodes.values())
    down = 1 + max(node.row for node in nodes.values())
    tall = 1.5 if any(node.picture is not None for node in nodes.values()) else 0.8
    with style():
        figure = new_figure(WIDTH, tall * down + 0.1)
        figure.set_layout_engine("none")  # everything is placed by hand
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-0.5, across - 0.5), ylim=(down - 0.5, -0.5))
        ax.axis("off")
        for start, end, *text in arrows:
            _arrow(ax, nodes[start], nodes[end], "".join(text))
        for node in nodes.values():
            _box(figure, ax, node, across, down)
    return describe(figure, caption, {})


_WIDE, _HIGH = 0.78, 0.72  # of a column and a row


def _box(figure: Figure, ax: Any, node: Node, across: float, down: float) -> None:
    corner = (node.column - _WIDE / 2, node.row - _HIGH / 2)
    shape = FancyBboxPatch(
        corner, _WIDE, _HIGH, boxstyle="round,pad=0,rounding_size=0.06", fc="white", ec=node.accent or SOFT, lw=1.2
    )
    ax.add_patch(shape)
    if node.picture is None:
        ax.text(node.column, node.row, node.text, ha="center", va="center", fontsize=8, color=INK)
        return
    ax.text(node.column, node.row + _HIGH / 2 - 0.03, node.text, ha="center", va="bottom", fontsize=7.5, color=INK)
    left, bottom = (node.column + 0.5 - _WIDE / 2) / across, 1 - (node.row + 0.5 + _HIGH * 0.22) / down
    inset = figure.add_axes((left, bottom, _WIDE / across, _HIGH * 0.68 / down))
    picture = np.asarray(node.picture, dtype=float)
    inset.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
    inset.axis("off")


def _arrow(ax: Any, start: Node, end: Node, text: str) -> None:
    gap = np.array([end.column - start.column, end.row - start.row], dtype=float)
    level = abs(gap[0]) >= abs(gap[1])
    reach = np.sign(gap) * ((_WIDE / 2, 0) if level else (0, _HIGH / 2))
    a, b = np.array([start.column, start.row]) + reach, np.array([end.column, end.row]) - reach
    ax.add_patch(FancyArrowPatch(tuple(a), tuple(b), arrowstyle="-|>", mutation_scale=9, color=SOFT, lw=1.2, zorder=0))
    box = {"fc": "white", "ec": RULE, "lw": 0, "pad": 0.5}
    ax.text(*(a + b) / 2, text, ha="center", va="bottom" if level else "center", fontsize=7, color=SOFT, bbox=box)
