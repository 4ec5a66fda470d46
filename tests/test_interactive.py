"""Interactive charts: what plotly draws is what the table holds; in a page they replace the picture, and print it."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from book.tools import pages
from cxrkit.view import charts, figures, interactive
from cxrkit.view.style import COLOURS, to_html

HOSTILE = "<img src=x onerror=alert(1)>"
TABLE = pd.DataFrame({"x": list("aabb"), "by": list("pqpq"), "y": [0.1, 0.2, 0.3, 0.4], "low": 0.05, "high": 0.5})


def test_bars_hold_the_tables_values_and_intervals():
    live = charts.grouped_bars(TABLE, "x", "y", "by", title="T", level=0.25).interactive
    first, second = live.data
    assert (first.name, list(first.x), list(first.y)) == ("p", ["a", "b"], [0.1, 0.3])
    assert np.allclose(second.error_y.array, [0.3, 0.1])
    assert np.allclose(second.error_y.arrayminus, [0.15, 0.35])
    assert live.layout.shapes[0].y0 == 0.25


def test_lying_bars_keep_the_tables_order_and_mark_chance():
    frame = pd.DataFrame({"name": ["A", "B"], "EPG": [0.2, 0.4], "chance": [0.1, 0.15]})
    live = figures.score_bars(frame).interactive
    assert (list(live.data[0].y), list(live.data[0].x)) == (["A", "B"], [0.2, 0.4])
    assert list(live.data[1].x) == [0.1, 0.15]
    assert live.layout.yaxis.autorange == "reversed"


def test_curves_have_a_panel_per_column_and_one_entry_per_line():
    frame = pd.DataFrame({"t": [1, 0] * 4, "v": np.arange(8) / 8, "by": ["p"] * 4 + ["q"] * 4, "c": list("mmnn") * 2})
    live = charts.lines(frame, "t", "v", "by", columns="c").interactive
    assert [(trace.name, trace.xaxis) for trace in live.data] == [("p", "x"), ("q", "x"), ("p", "x2"), ("q", "x2")]
    assert [trace.showlegend for trace in live.data] == [True, True, False, False]
    assert (list(live.data[3].x), list(live.data[3].y)) == ([0, 1], [0.875, 0.75])  # in the order of x


def test_a_band_lies_between_low_and_high():
    frame = TABLE.assign(x=[0, 0, 1, 1])
    live = charts.lines(frame, "x", "y", "by").interactive
    low, high, line = live.data[:3]
    assert (list(low.y), list(high.y), list(line.y)) == ([0.05] * 2, [0.5] * 2, [0.1, 0.3])
    assert high.fill == "tonexty"


def test_a_line_keeps_its_colour_where_another_is_missing():
    frame = pd.DataFrame({"t": [0, 0, 0], "v": [1, 2, 3], "by": ["p", "q", "q"], "c": ["m", "m", "n"]})
    live = charts.lines(frame, "t", "v", "by", columns="c").interactive
    assert [trace.line.color for trace in live.data] == [COLOURS[0], COLOURS[1], COLOURS[1]]


def test_learning_curves_tell_what_their_picture_tells():
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1, 0.5], "validation_loss": [1, 0.6]})
    history = history.assign(validation_auc=[0.7, 0.6], learning_rate=[1e-3, 1e-4])
    live = figures.training_curves(history).interactive
    assert [(trace.name, list(trace.y)) for trace in live.data][2] == ("validation", [0.7, 0.6])
    assert live.data[2].line.color == live.data[1].line.color == COLOURS[1]
    assert [note.text for note in live.layout.annotations] == [
        *("loss", "AUC", "learning rate"),
        "best: 0.700 in epoch 1",
    ]
    assert (live.layout.shapes[0].x0, live.layout.yaxis3.type) == (1, "log")
    kept = figures.training_curves(history, best_epoch=2).interactive
    assert kept.layout.annotations[-1].text == "kept: 0.600 in epoch 2"


def test_trials_have_the_best_so_far_as_a_line():
    trials = pd.DataFrame({"evaluation": [0, 1, 2], "epochs": [1, 1, 3], "score": [0.6, 0.5, 0.8]})
    live = figures.search_trials(trials).interactive
    assert [trace.name for trace in live.data] == ["1 epoch", "3 epochs", "best so far"]
    assert list(live.data[2].y) == [0.6, 0.6, 0.8]


def test_a_missing_score_is_said():
    live = figures.score_bars(pd.DataFrame({"name": ["A", "B"], "EPG": [0.2, np.nan]})).interactive
    assert [(trace.text, list(trace.y)) for trace in live.data if trace.type == "scatter"] == [("no score", ["B"])]


def test_cells_and_clouds_hold_their_values():
    table = charts.matrix([[5, np.nan], [1, 7]], ["A", "B"], ["C", "D"]).interactive
    assert [list(row) for row in table.data[0].text] == [["5", "–"], ["1", "7"]]
    cloud = charts.clouds(np.array([[0, 0], [1, 1], [2, 0.0]]), ["p", "q", "p"]).interactive
    assert [(trace.name, list(trace.x)) for trace in cloud.data] == [("p", [0, 2]), ("q", [1])]


def test_a_chart_adds_little_to_a_page_and_names_stay_text():
    frame = TABLE.replace({"a": HOSTILE, "p": "</script>" + HOSTILE})
    text = to_html(charts.grouped_bars(frame, "x", "y", "by", title=HOSTILE))
    content = text.split('<script type="application/json" data-ink="#1d2530">')[1].split("</script>")[0]
    assert len(content) < 4_000
    assert json.loads(content)["data"][0]["name"] == "&lt;/script&gt;" + HOSTILE.replace("<", "&lt;").replace(
        ">", "&gt;"
    )
    assert HOSTILE not in text


def with_chart(tmp_path, browser, figure):
    """A page with one chart far below the first screen, as the book would hold it."""
    (tmp_path / "_vendor").mkdir()
    (tmp_path / "_vendor" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    chart = to_html(figure)
    (tmp_path / "index.html").write_text(
        f'<!doctype html><html lang="en" data-content_root="" data-theme="light"><head><meta charset="utf-8">'
        f"{pages._LOOK}<script>{interactive.script()}</script></head>"
        f'<body style="max-width:760px"><div style="height:3000px"></div>{chart}</body></html>',
        encoding="utf-8",
    )
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.requested, page.errors = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    page.goto((tmp_path / "index.html").as_uri())
    return page


@pytest.fixture
def chart_page(tmp_path, browser):
    page = with_chart(tmp_path, browser, charts.grouped_bars(TABLE.replace({"a": HOSTILE}), "x", "y", "by", title="T"))
    yield page
    page.close()


@pytest.mark.browser
def test_the_chart_takes_the_pictures_place_when_it_comes_into_view(chart_page):
    page, picture = chart_page, chart_page.locator("figure > img")
    assert not any("plotly" in url for url in page.requested)
    assert page.locator(".cxr-interactive").count() == 0
    picture.scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live .main-svg")
    assert not picture.is_visible()
    assert page.locator(".cxr-interactive").get_attribute("aria-label") == picture.get_attribute("alt")
    assert HOSTILE in page.locator(".xtick text").first.text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == []
    assert {url.split(":")[0] for url in page.requested} <= {"file", "data", "blob"}


@pytest.mark.browser
def test_the_pointer_reads_values_and_the_legend_hides_bars(chart_page):
    page = chart_page
    page.locator("figure > img").scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live .main-svg")
    page.locator(".cxr-interactive").scroll_into_view_if_needed()
    box = page.locator(".bars .point path").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "0.4" in page.locator(".hoverlayer").text_content()
    page.locator(".legendtoggle").first.click()
    page.wait_for_function("document.querySelectorAll('.bars .point').length === 2", timeout=5000)


@pytest.mark.browser
def test_ink_follows_the_theme_and_print_shows_the_picture(chart_page):
    page = chart_page
    page.locator("figure > img").scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live .main-svg")
    page.add_style_tag(content='html[data-theme="dark"] body { color: rgb(200, 210, 220); background: #111 }')
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function("getComputedStyle(document.querySelector('.xtick text')).fill === 'rgb(200, 210, 220)'")
    stroke = page.locator(".errorbar path, path.yerror").first.evaluate("path => getComputedStyle(path).stroke")
    assert stroke == "rgb(200, 210, 220)"  # the intervals' too
    page.emulate_media(media="print")
    assert page.locator("figure > img").is_visible()
    assert not page.locator(".cxr-interactive").is_visible()


@pytest.mark.browser
def test_without_the_library_the_picture_stays(chart_page, tmp_path):
    (tmp_path / "_vendor" / "plotly.min.js").unlink()
    chart_page.reload()
    chart_page.locator("figure > img").scroll_into_view_if_needed()
    chart_page.wait_for_timeout(500)
    assert chart_page.locator("figure > img").is_visible()
    assert chart_page.locator(".cxr-interactive").count() == 0


@pytest.mark.browser
def test_names_of_panels_and_axes_keep_apart_on_a_phone(tmp_path, browser):
    panels = ["paper, of two classes", "ours, of two classes", "ours, the finding alone"]
    rows = [{"share of the map's maximum": t, "v": t / 2, "by": "p", "c": panel} for panel in panels for t in (0, 1)]
    figure = charts.lines(pd.DataFrame(rows), "share of the map's maximum", "v", "by", columns="c")
    page = with_chart(tmp_path, browser, figure)
    page.locator("figure > img").scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live .main-svg")
    edges = "all => all.map((each) => each.getBoundingClientRect()).map(({ left, right }) => [left, right])"
    for names in (".annotation-text", ".xtitle, .x2title, .x3title"):
        places = sorted(page.locator(names).evaluate_all(edges))
        assert len(places) == 3
        assert all(right <= left for (_, right), (left, _) in pairwise(places))
        assert places[-1][1] <= 390
    page.close()
