"""Charts and diagrams: what is drawn is what the table holds, and the alternative text says it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from cxrkit import ParameterError
from cxrkit.view import charts, diagrams
from cxrkit.view.style import COLOURS, to_html

TABLE = pd.DataFrame({"x": list("aabb"), "by": list("pqpq"), "y": [0.1, 0.2, 0.3, 0.4], "low": 0.05, "high": 0.5})


def test_bars_stand_beside_each_other_in_groups():
    figure = charts.grouped_bars(TABLE, "x", "y", "by", title="T", level=0.25)
    bars = figure.axes[0].patches
    heights = {round(bar.get_height(), 2): to_hex(bar.get_facecolor()).upper() for bar in bars}
    assert heights == {0.1: COLOURS[0], 0.3: COLOURS[0], 0.2: COLOURS[1], 0.4: COLOURS[1]}
    assert sorted(bar.get_x() for bar in bars)[1] < 0.5 < sorted(bar.get_x() for bar in bars)[2]
    assert "a, p 0.1" in figure.alt_text
    assert "<img" in to_html(figure)


def test_lines_have_a_panel_per_column():
    frame = pd.DataFrame({"t": [0, 1] * 4, "v": np.arange(8) / 8, "by": ["p"] * 4 + ["q"] * 4, "c": list("mmnn") * 2})
    figure = charts.lines(frame, "t", "v", "by", columns="c")
    drawn = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in drawn] == ["m", "n"]
    assert list(drawn[1].lines[1].get_ydata()) == [0.75, 0.875]


def test_clouds_keep_points_and_groups_together():
    points = np.array([[0, 0], [1, 1], [2, 0.0]])
    figure = charts.clouds([points, -points], ["p", "q", "p"], ["before", "after"])
    assert len(figure.axes[0].collections[0].get_offsets()) == 2
    assert list(figure.data["group"]) == ["p", "q", "p"] * 2
    with pytest.raises(ParameterError, match=r"needs \[2, 2\] points"):
        charts.clouds(points, ["p", "q"])


def test_a_matrix_writes_its_numbers_and_dashes():
    figure = charts.matrix([[5, np.nan], [1, 7]], ["A", "B"], ["A", "B"], "confusion")
    assert [text.get_text() for text in figure.axes[0].texts] == ["5", "–", "1", "7"]
    assert "B, A: 1" in figure.alt_text
    with pytest.raises(ParameterError, match="do not fit 1 rows and 2 columns"):
        charts.matrix([[1, 2], [3, 4]], ["A"], ["A", "B"])


@pytest.mark.parametrize("draw", [charts.grouped_bars, charts.lines])
def test_a_missing_column_is_named(draw):
    with pytest.raises(ParameterError, match=r"needs the columns \['z'\]"):
        draw(TABLE, "x", "z", by="by")


def test_a_diagram_has_its_boxes_and_arrows():
    node = diagrams.Node
    figure = diagrams.diagram(
        {"a": node(0, 0, "in", np.zeros((4, 4))), "b": node(1, 0, "out")}, [("a", "b", "through")], "In and out."
    )
    assert {text.get_text() for text in figure.axes[0].texts} == {"in", "out", "through"}
    assert figure.alt_text == "In and out."
    with pytest.raises(ParameterError, match=r"arrows name the boxes \['c'\]; there are \['a'\]"):
        diagrams.diagram({"a": node(0, 0, "in")}, [("a", "c")], "")
