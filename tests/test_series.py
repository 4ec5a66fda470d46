"""Charts in a page: SVG that prints and needs no script, and with one answers to the pointer."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from book.tools import pages
from cxrkit.view import charts, figures, series
from cxrkit.view.style import new_figure, style, to_html

HOSTILE = "<img src=x onerror=alert(1)>"
TABLE = pd.DataFrame({"x": list("aabb"), "by": list("pqpq"), "y": [0.1, 0.2, 0.3, 0.4], "low": 0.05, "high": 0.5})


def read(figure) -> dict[str, list[str]]:
    """By series: the values that the pointer reads."""
    text = re.search(r'<script type="application/json">(.*?)</script>', to_html(figure)).group(1)
    return {one["name"]: [point[2] for point in one["points"] if point] for one in json.loads(text)}


def svg(figure) -> str:
    return base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', to_html(figure)).group(1)).decode()


def test_bars_and_their_intervals_are_read_by_category():
    found = read(charts.grouped_bars(TABLE, "x", "y", "by", title="T", level=0.25))
    assert found["p"] == ["a: 0.1", "b: 0.3", "a: 0.05", "a: 0.5", "b: 0.05", "b: 0.5"]
    assert found["q"][:2] == ["a: 0.2", "b: 0.4"]
    assert found[""] == []  # the level isn't data


def test_lying_bars_are_read_with_chance():
    frame = pd.DataFrame({"name": ["A", "B", "C"], "EPG": [0.2, 0.4, np.nan], "chance": [0.1, 0.15, 0.1]})
    found = read(figures.score_bars(frame))
    assert found["EPG"] == ["A: 20.0%", "B: 40.0%"]
    assert found["chance"] == ["A: 10.0%"] * 2 + ["B: 15.0%"] * 2 + ["C: 10.0%"] * 2


def test_lines_of_all_panels_are_one_series():
    frame = pd.DataFrame({"t": [1, 0] * 4, "v": np.arange(8) / 8, "by": ["p"] * 4 + ["q"] * 4, "c": list("mmnn") * 2})
    found = read(charts.lines(frame, "t", "v", "by", columns="c"))
    assert found["q"] == ["0, 0.625", "1, 0.5", "0, 0.875", "1, 0.75"]


def test_points_are_where_they_are_drawn():
    """The place of a point is that of its marker in the SVG."""
    with style():
        figure = new_figure(4, 3)
        ax = figure.subplots()
        ax.plot([1, 10, 100], [3, 4, 5], "o", label="a")
        ax.set(xscale="log", ylim=(3.5, 6))
        content, text = series.svg_chart(figure)
    width, height = (float(value) for value in re.search(r'viewBox="0 0 (\S+) (\S+)"', content).groups())
    marks = content.split('id="mark-1-0"')[1]  # all three are drawn, the first one clipped
    drawn = re.findall(r'<use xlink:href="#\S+" x="([\d.]+)" y="([\d.]+)"', marks)[1:3]
    points = next(one for one in json.loads(text) if one["name"] == "a")["points"]
    assert points[0] is None  # below the panel
    assert np.allclose([(x * width, y * height) for x, y, _ in points[1:]], np.array(drawn, dtype=float), atol=0.1)
    assert [point[2] for point in points[1:]] == ["10, 4", "100, 5"]


def test_clouds_tell_the_group_and_no_values():
    found = read(charts.clouds(np.array([[0, 0], [1, 1], [2, 0.0]]), ["p", "q", "p"]))
    assert found == {"": [], "p": ["", ""], "q": [""]}


def test_figures_with_images_or_many_points_are_pictures():
    for figure in (figures.montage(np.zeros((1, 8, 8))), charts.clouds(np.eye(4000)[:, :2], ["a"] * 4000)):
        assert "data:image/png" in to_html(figure)
        assert "application/json" not in to_html(figure)


def test_a_chart_is_the_same_each_time_and_its_colours_can_be_the_pages():
    first, second = (svg(charts.grouped_bars(TABLE, "x", "y", "by")) for _ in range(2))
    assert first == second
    assert "var(--cxr-ink, #1d2530)" in first
    assert "var(--cxr-paper, #ffffff)" in first


def test_names_stay_text():
    frame = TABLE.replace({"a": HOSTILE, "p": "</script>" + HOSTILE})
    figure = charts.grouped_bars(frame, "x", "y", "by", title=HOSTILE)
    assert read(figure)["</script>" + HOSTILE][0] == f"{HOSTILE}: 0.1"
    assert HOSTILE not in to_html(figure)
    assert HOSTILE not in svg(figure)


def with_chart(tmp_path, browser, figure):
    """A page with one chart far below the first screen, as the book would hold it."""
    (tmp_path / "index.html").write_text(
        f'<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f"{pages._LOOK}<script>{series.script()}</script></head>"
        f'<body style="max-width:760px"><div style="height:3000px"></div>{to_html(figure)}</body></html>',
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
    figure = charts.grouped_bars(TABLE.replace({"b": HOSTILE}), "x", "y", "by", title="T")
    page = with_chart(tmp_path, browser, figure)
    page.locator("figure img").scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live svg")
    yield page
    page.close()


@pytest.mark.browser
def test_the_drawing_takes_the_pictures_place_when_it_comes_into_view(tmp_path, browser):
    page = with_chart(tmp_path, browser, charts.grouped_bars(TABLE, "x", "y", "by"))
    picture = page.locator("figure img")
    assert page.locator(".cxr-interactive").count() == 0
    picture.scroll_into_view_if_needed()
    page.wait_for_selector("figure.cxr-live svg")
    assert not picture.is_visible()
    assert page.locator(".cxr-interactive").get_attribute("aria-label") == picture.get_attribute("alt")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # the chart scrolls in its own box
    assert page.locator(".cxr-wide").evaluate("box => box.scrollWidth") == 570
    assert page.errors == []
    assert {url.split(":")[0] for url in page.requested} <= {"file", "data", "blob"}
    page.close()


@pytest.mark.browser
def test_the_pointer_reads_values_and_the_legend_hides_bars(chart_page):
    page = chart_page
    page.set_viewport_size({"width": 800, "height": 800})
    page.locator("[id^=bar-2-1]").hover(force=True)
    page.wait_for_selector("output:not([hidden])")
    assert page.locator("output").text_content() == f"q\n{HOSTILE}: 0.4"
    page.locator("[role=button]").first.click()
    assert [page.locator(f"[id^=bar-{place}-0]").is_visible() for place in (1, 2)] == [False, True]
    page.locator("[role=button]").first.press("Enter")
    assert page.locator("[id^=bar-1-0]").is_visible()
    assert page.errors == []


@pytest.mark.browser
def test_a_part_is_drawn_larger_and_a_double_click_shows_the_whole(chart_page):
    page = chart_page
    whole = page.locator("svg").get_attribute("viewBox")
    box = page.locator("svg").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90)
    page.mouse.up()
    assert float(page.locator("svg").get_attribute("viewBox").split()[2]) < float(whole.split()[2]) / 2
    page.mouse.dblclick(box["x"] + 60, box["y"] + 60)
    assert page.locator("svg").get_attribute("viewBox") == whole


@pytest.mark.browser
def test_ink_follows_the_theme_and_print_shows_the_picture(chart_page):
    page = chart_page
    page.add_style_tag(content='html[data-theme="dark"] body { color: rgb(200, 210, 220); background: #111 }')
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    ink = "each => [getComputedStyle(each).fill, getComputedStyle(each).stroke]"
    assert "rgb(200, 210, 220)" in page.locator("[id^=legend-] > g").first.evaluate(ink)
    assert "rgb(200, 210, 220)" in page.locator("[id^=mark-] path").last.evaluate(ink)  # the intervals' too
    page.emulate_media(media="print")
    assert page.locator("figure img").is_visible()
    assert not page.locator(".cxr-interactive").is_visible()


@pytest.mark.browser
def test_a_chart_is_saved_as_png(chart_page):
    page = chart_page
    with page.expect_download() as saved:
        page.get_by_text("Picture").click()
    assert saved.value.suggested_filename.endswith(".png")
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")


@pytest.mark.browser
def test_without_a_script_the_picture_stays(tmp_path, browser):
    context = browser.new_context(java_script_enabled=False)
    figure = charts.grouped_bars(TABLE, "x", "y", "by")
    (tmp_path / "index.html").write_text(f"<!doctype html>{pages._LOOK}{to_html(figure)}", encoding="utf-8")
    page = context.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert page.locator("figure img").is_visible()
    context.close()
