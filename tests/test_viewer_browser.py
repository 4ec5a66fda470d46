"""The viewer in headless Chromium: as a page from disk, and alive with Python behind it."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cxrkit
from cxrkit.view import codec, viewer

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
LABELS = ["Effusion", "Mass", HOSTILE]
SIZE = 60


@pytest.fixture
def open_page(browser, tmp_path):
    """Open HTML as a file; after the test no request may have left it and nothing may be on the console."""
    requests, complaints, contexts = [], [], []

    def opened(body, width=1280, attributes="", prepare=None, **options):
        file = tmp_path / "page.html"
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>ours</title>'
        file.write_text(f"<!doctype html><html {attributes}><head>{head}</head><body>{body}</body></html>", "utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if prepare:
            prepare(page)
        page.goto(file.as_uri())
        return page

    yield opened
    titles = [page.title() for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert set(titles) <= {"ours"}


def make_bundle():
    """Two images; maps with a bright spot in the box and signed noise; the third label stored on image 0 only."""
    rng = np.random.default_rng(0)
    bundle = viewer.Bundle(LABELS, note="Synthetic <b>images</b>. Not for clinical use.")
    rows, columns = np.mgrid[:SIZE, :SIZE]
    image = 0.3 + 0.4 * np.exp(-((columns - 30) ** 2 + (rows - 25) ** 2) / 300)
    keep = np.array([[True, True, True], [True, True, False]])
    for number in range(2):
        masks = np.zeros((3, SIZE, SIZE), dtype=bool)
        masks[0, 10:30, 15:35] = masks[1, 40:50, 5:20] = True
        truth = np.zeros_like(masks)
        truth[0] = (rows - 20) ** 2 + (columns - 25) ** 2 < 70
        bundle.add_image(image * (1 - 0.3 * number), f"image-{number}", masks, truth=truth, targets=[1, 0, np.nan])
    spot = np.exp(-((rows - 22) ** 2 + (columns - 28) ** 2) / 120)
    for method, signed in (("layercam", False), ("bcos", True)):
        noise = rng.normal(size=(2, 3, SIZE, SIZE)) * 0.2 * signed
        maps = spot * np.array([1.0, 0.8, 0.6])[:, None, None] + noise
        maps[:, 1] = maps[:, 1, ::-1]
        bundle.add_series("ResNet", method, maps, [[2.0, -1.0, 0.5]] * 2, signed=signed, keep=keep)
    return bundle


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


def corners(record, label):
    """Upper left and lower right corner of a label's one box."""
    ends = np.array(record["outlines"][label]).reshape(-1, 2)
    return ends.min(0).tolist(), ends.max(0).tolist()


def expected_scores(bundle, image, label, series, threshold):
    record = bundle.data["images"][image]
    values = codec.unpack_map(bundle.data["series"][series]["maps"][f"{image}/{label}"], record["grid"])
    (x0, y0), (x1, y1) = corners(record, label)
    box = values[y0:y1, x0:x1]
    kept = np.where(values >= threshold * values.max(), values.clip(min=0), 0)
    inside = kept[y0:y1, x0:x1].sum()
    area = box.size / values.size
    shares = (inside / kept.sum(), inside / np.abs(box).sum(), area)
    return [f"{100 * share:.1f} %" for share in shares]


def panel(page, number):
    return page.locator(".cxr-panel").nth(number)


def picture(page, number=0):
    return panel(page, number).locator("canvas").evaluate("canvas => canvas.toDataURL()")


def ready(page, method="layercam", number=0):
    """Wait until the panel has drawn the map of a method."""
    panel(page, number).locator(f"canvas[aria-label*=' with the {method} map']").wait_for()


def scores(page, number=0):
    """The scores under a panel, read at one moment."""
    parts = "all => all.map(each => ['span', 'b'].map(part => each.querySelector(part).textContent))"
    return dict(panel(page, number).locator(".cxr-stat").evaluate_all(parts))


def test_page_compares_two_methods_and_scores_them(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    assert page.locator(".cxr-panel").count() == 2
    assert picture(page, 0) != picture(page, 1)
    for number in (0, 1):
        told = scores(page, number)
        names = ("EPG precision", "EPG recall", "Chance (EPG)")
        assert [told[name] for name in names] == expected_scores(bundle, 0, 0, number, 0.0)
        assert (told["Logit"], told["Probability"]) == ("2.00", "0.881")
    assert page.locator(".cxr-fact").text_content() == "Truth: present, boxes cover 11.1 % of the image"
    assert page.locator(".cxr-note").text_content() == "Synthetic <b>images</b>. Not for clinical use."


@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.9, 1.0])
def test_threshold_acts_on_scores_and_picture(open_page, bundle, threshold):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    before = picture(page)
    page.get_by_role("slider", name="Threshold").fill(str(threshold))
    assert picture(page) != before
    for number in (0, 1):
        told = scores(page, number)
        shown = [told[name] for name in ("EPG precision", "EPG recall", "Chance (EPG)")]
        assert shown == expected_scores(bundle, 0, 0, number, threshold)


def test_every_control_changes_the_picture(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)

    def changes(act, number=0):
        before = picture(page, number)
        act()
        page.wait_for_function(
            "([n, old]) => document.querySelectorAll('.cxr-panel canvas')[n].toDataURL() !== old",
            arg=[number, before],
        )

    changes(lambda: page.get_by_role("slider", name="Overlay").fill("0.3"))
    changes(lambda: page.get_by_label("Boxes").uncheck())
    changes(lambda: page.get_by_label("True mask").check())
    changes(lambda: page.get_by_label("Smooth").uncheck())
    changes(lambda: page.get_by_role("combobox", name="Colours").select_option("signed"))
    changes(lambda: page.get_by_role("combobox", name="Scale").select_option("shared"))
    changes(lambda: page.get_by_role("combobox", name="Scale").select_option("clip"))
    changes(lambda: page.get_by_role("combobox", name="Label").select_option("1"))
    changes(lambda: page.get_by_role("combobox", name="Image").select_option("1"))
    changes(lambda: panel(page, 0).get_by_role("combobox", name="Method").select_option(label="bcos"))
    assert scores(page, 0)["EPG precision"] == expected_scores(bundle, 1, 1, 1, 0.0)[0]
    changes(lambda: panel(page, 1).locator("canvas").hover(position={"x": 50, "y": 40}))


def test_the_picture_shows_the_map_where_it_is(open_page):
    bundle = viewer.Bundle(["Mass"], map_size=20)
    bundle.add_image(np.zeros((20, 20)), "dark")
    values = np.zeros((1, 1, 20, 20))
    values[0, 0, 4, 15], values[0, 0, 12, 3] = 2.0, -2.0
    bundle.add_series("m", "bcos", values, [[0.0]])
    page = open_page(viewer.static_html(bundle, height=200), device_scale_factor=2)
    ready(page, "bcos")
    page.get_by_label("Smooth").uncheck()
    page.get_by_role("slider", name="Overlay").fill("1")
    pixel = """(canvas, [x, y]) => {
      const at = part => Math.floor(part / 20 * canvas.width + canvas.width / 40);
      const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
      const pen = copy.getContext("2d", { willReadFrequently: true });
      pen.drawImage(canvas, 0, 0);
      return [canvas.width, ...pen.getImageData(at(x), at(y), 1, 1).data];
    }"""
    canvas = page.locator("canvas")
    width, red, _, blue, _ = canvas.evaluate(pixel, [15, 4])
    assert width == 400
    assert red > 200 > 60 > blue
    _, red, _, blue, _ = canvas.evaluate(pixel, [3, 12])
    assert blue > 200 > 60 > red
    assert canvas.evaluate(pixel, [10, 10])[1:] == [0, 0, 0, 255]
    canvas.hover(position={"x": 155, "y": 45})
    page.get_by_text("x 15, y 4: 2.00").wait_for()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("x 16, y 4: 0.00").wait_for()


def test_hostile_label_is_text_and_missing_maps_are_said(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    page.get_by_role("combobox", name="Label").select_option(label=HOSTILE)
    page.wait_for_function("document.querySelector('.cxr canvas').ariaLabel.includes('<img')")
    assert page.locator("img").count() == 0
    assert scores(page)["EPG"] == "no box for this label"
    page.get_by_role("combobox", name="Image").select_option("1")  # where that label isn't stored: back to one that is
    page.wait_for_function("document.querySelector('.cxr canvas').ariaLabel.includes('for Effusion')")
    page.get_by_role("combobox", name="Label").select_option("2")
    page.get_by_text("not stored in this page").first.wait_for()
    assert scores(page) == {"Logit": "0.500", "Probability": "0.622"}


def test_several_viewers_share_a_page(open_page, bundle):
    page = open_page(viewer.static_html(bundle) + "<p>text</p>" + viewer.static_html(bundle))
    ready(page)
    ready(page, "layercam", 2)
    before = picture(page, 0)
    page.get_by_role("slider", name="Threshold").nth(1).fill("0.8")
    assert picture(page, 0) == before != picture(page, 2)


@pytest.mark.parametrize("width", [390, 1280])
def test_layout_fits(open_page, bundle, width):
    page = open_page(viewer.static_html(bundle), width=width)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overflowing = """[...document.querySelectorAll('.cxr *')].filter(node => node.getClientRects().length &&
      node.getBoundingClientRect().right > document.querySelector('.cxr').getBoundingClientRect().right)
      .map(node => node.className || node.tagName)"""
    assert page.evaluate(overflowing) == []
    left = [panel(page, number).bounding_box()["x"] for number in (0, 1)]
    assert (left[0] == left[1]) == (width == 390)


@pytest.mark.parametrize(
    ("attributes", "scheme", "dark"),
    [
        ("", "light", False),
        ("", "dark", True),
        ('data-theme="dark"', "light", True),
        ('data-theme="light"', "dark", False),
        ('data-jp-theme-light="false"', "light", True),
        ('data-jp-theme-light="true"', "dark", False),
    ],
)
def test_colours_follow_the_page(open_page, bundle, attributes, scheme, dark):
    page = open_page(viewer.static_html(bundle), attributes=attributes, color_scheme=scheme)
    ready(page)
    style = "node => [getComputedStyle(node).backgroundColor, getComputedStyle(node).color]"
    ground, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in page.locator(".cxr").evaluate(style))
    assert (ground < text) == dark


def test_controls_are_reached_by_keyboard_and_named(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for name in ("Image", "Label", "Colours", "Scale", "Method"):
        assert page.get_by_role("combobox", name=name).count() >= 1
    assert page.locator("[aria-live=polite]").count() == 3


def test_pointing_and_overlap_are_those_of_the_metrics(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    record = bundle.data["images"][0]
    masks = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    (x0, y0), (x1, y1) = corners(record, 0)
    masks[y0:y1, x0:x1] = True
    for threshold in (0.0, 0.6):
        page.get_by_role("slider", name="Threshold").fill(str(threshold))
        for number in (0, 1):
            packed = bundle.data["series"][number]["maps"]["0/0"]
            maps = torch.from_numpy(codec.unpack_map(packed, record["grid"]))
            iou = cxrkit.metrics.mask_iou(maps, masks, threshold=threshold)
            hit = cxrkit.metrics.pointing_game(maps, masks, tolerance_fraction=15 / 224)
            chance = cxrkit.metrics.pointing_chance(masks, tolerance_fraction=15 / 224)
            told = scores(page, number)
            assert told["IoU"] == f"{100 * iou:.1f} %"
            assert told["Pointing"] == ("hit" if hit else "miss")
            assert told["Chance (pointing)"] == f"{100 * chance:.1f} %"
            kept = (maps >= threshold * maps.max()) & (maps > 0)
            share, part = masks.double().mean(), kept.double().mean()
            assert told["Chance (IoU)"] == f"{100 * share * part / (share + part - share * part):.1f} %"


def test_zoom_and_pan_are_linked(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    before = [picture(page, number) for number in (0, 1)]
    page.get_by_role("button", name="Zoom in").click()
    moved = "old => [...document.querySelectorAll('.cxr-panel canvas')].every((each, i) => each.toDataURL() !== old[i])"
    page.wait_for_function(moved, arg=before)
    page.get_by_text("150 %", exact=True).wait_for()
    canvas = panel(page, 0).locator("canvas")
    canvas.focus()
    canvas.hover(position={"x": 100, "y": 100})
    page.mouse.wheel(0, -400)
    page.wait_for_function("parseInt(document.querySelector('.cxr-zoom').textContent.match(/\\d+/)[0]) > 250")
    here = [picture(page, number) for number in (0, 1)]
    page.mouse.down()
    page.mouse.move(260, 480, steps=4)
    page.mouse.up()
    page.wait_for_function(moved, arg=here)
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("0")
    page.get_by_text("100 %", exact=True).wait_for()
    page.keyboard.press("Escape")
    back = "old => [...document.querySelectorAll('.cxr-panel canvas')].every((each, i) => each.toDataURL() === old[i])"
    page.wait_for_function(back, arg=before)


def test_fingers_zoom(open_page, bundle):
    page = open_page(viewer.static_html(bundle), width=390, has_touch=True)
    ready(page)
    page.evaluate(
        """() => {
          const canvas = document.querySelector(".cxr canvas"), { left, top } = canvas.getBoundingClientRect();
          const finger = (type, pointerId, x) => canvas.dispatchEvent(new PointerEvent(type,
            { pointerId, pointerType: "touch", clientX: left + x, clientY: top + 60, bubbles: true }));
          canvas.setPointerCapture = () => {};
          const moves = [["pointerdown", 1, 100], ["pointerdown", 2, 140], ["pointermove", 2, 220]];
          for (const [type, id, x] of moves) finger(type, id, x);
          for (const id of [1, 2]) finger("pointerup", id, 0);
        }"""
    )
    page.get_by_text("300 %", exact=True).wait_for()


def test_what_a_finger_pointed_at_stays_when_it_is_lifted(open_page, bundle):
    page = open_page(viewer.static_html(bundle), width=390, has_touch=True)
    ready(page)
    page.locator("canvas").first.tap(position={"x": 100, "y": 80})
    page.get_by_text(re.compile(r"x \d+, y \d+: ")).first.wait_for()
    page.wait_for_timeout(100)  # for what follows the finger's leaving
    assert page.locator(".cxr-readout").first.text_content() != ""


def test_the_wheel_scrolls_the_page_where_there_is_nothing_to_zoom(open_page, bundle):
    page = open_page(viewer.static_html(bundle) + "<div style='height:3000px'></div>")
    ready(page)
    page.locator("canvas").first.click(position={"x": 100, "y": 20})
    page.mouse.wheel(0, -200)
    page.get_by_text("149 %", exact=True).wait_for()
    page.mouse.wheel(0, 300)
    page.get_by_text("100 %", exact=True).wait_for()
    assert page.evaluate("scrollY") == 0
    page.mouse.wheel(0, 300)
    page.wait_for_function("scrollY > 0")


def test_one_to_six_panels(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    count = page.get_by_role("combobox", name="Panels")
    count.select_option("1")
    assert page.locator(".cxr-panel").count() == 1
    count.select_option("2")
    ready(page, "bcos", 1)
    assert page.locator(".cxr-panel").count() == 2


def test_numbers_and_picture_are_saved(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    page.get_by_role("combobox", name="Label").select_option(label=HOSTILE)
    page.wait_for_function("document.querySelector('.cxr canvas').ariaLabel.includes('<img')")
    page.get_by_text("Numbers as a table").click()
    rows = page.locator(".cxr-numbers tbody tr")
    rows.nth(1).wait_for()
    assert rows.count() == 2
    assert HOSTILE in rows.first.text_content()
    with page.expect_download() as caught:
        page.get_by_role("button", name="CSV").click()
    lines = caught.value.path().read_text("utf-8-sig").splitlines()
    assert lines[0].startswith('"Image","Label","Model","Method","Threshold","Logit"')
    assert len(lines) == 3
    with page.expect_download() as caught:
        page.get_by_role("button", name="PNG").click()
    saved = Image.open(caught.value.path()).convert("L")
    canvas = panel(page, 0).locator("canvas").bounding_box()
    assert saved.width > 2 * canvas["width"]
    assert len(set(np.asarray(saved).ravel().tolist())) > 20


def saved_numbers(page):
    with page.expect_download() as caught:
        page.get_by_role("button", name="CSV").click()
    return list(csv.DictReader(caught.value.path().read_text("utf-8-sig").splitlines()))


def saved_picture(page):
    with page.expect_download() as caught:
        page.get_by_role("button", name="PNG").click()
    return Image.open(caught.value.path()).convert("RGB")


def test_saved_numbers_are_plain(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page, "bcos", 1)
    page.get_by_role("combobox", name="Label").select_option("1")
    page.locator("canvas[aria-label*='bcos map of ResNet for Mass']").wait_for()
    told, row = scores(page, 1), saved_numbers(page)[1]
    assert row["Logit"] == "-1"
    for name in ("EPG precision", "EPG recall", "Chance (EPG)", "IoU", "Chance (IoU)", "Chance (pointing)"):
        assert f"{100 * float(row[name]):.1f} %" == told[name]
    assert float(row["Lowest"]) < 0 < float(row["Highest"])
    assert row["Pointing"] in ("hit", "miss")


# What is written on a canvas: text, its place and width, the canvas; and where pictures come to lie.
WRITTEN = """() => {
  const pens = CanvasRenderingContext2D.prototype, { fillText, drawImage } = pens;
  window.written = [], window.drawn = [];
  pens.fillText = function (text, x, y) {
    window.written.push([text, x, y, this.measureText(text).width, this.canvas.width, this.canvas.height]);
    return fillText.call(this, text, x, y);
  };
  pens.drawImage = function (...given) {
    if (given.length === 3) window.drawn.push([given[1], given[2], given[0].width, given[0].height]);
    return drawImage.apply(this, given);
  };
}"""


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_saved_picture_of_six_panels_tells_all_and_nothing_overlaps(open_page, ratio):
    bundle, name = make_bundle(), "A network with a name that is longer than any panel is wide, and then some"
    for method in ("layercam", "bcos", "saliency", "unbroken_" * 9):
        bundle.add_series(name, method, np.ones((2, 3, 1, 1)) * np.eye(SIZE), [[2.0, -1.0, 0.5]] * 2, keep="all")
    page = open_page(viewer.static_html(bundle), device_scale_factor=ratio)
    page.get_by_role("combobox", name="Panels").select_option("6")
    ready(page, "unbroken_" * 9, 5)
    page.get_by_role("slider", name="Overlay").fill("0.4")
    page.get_by_role("slider", name="Threshold").fill("0.15")
    page.get_by_role("combobox", name="Scale").select_option("shared")
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_function("document.querySelector('.cxr-settings').textContent.includes('zoom 150 %')")
    page.evaluate(WRITTEN)
    saved_picture(page)
    written, drawn = page.evaluate("[written, drawn]")
    text = " ".join(line[0] for line in written)
    for part in (
        "image-0: Effusion",
        "Overlay 40 %",
        "threshold 0.15 × max",
        "scale: shared",
        "by method",
        "zoom 150 %",
    ):
        assert part in text
    for score in scores(page):
        assert sum(line[0].startswith(f"{score} ") for line in written) == 6
    assert sum("…" in line[0] for line in written) == 6  # what the colours mean
    assert all(word in text for word in name.split())
    assert len({round(top) for _, top, *_ in drawn}) == 2
    boxes = [(x, y - 8 * ratio, x + wide, y + 2 * ratio) for _, x, y, wide, *_ in written]
    boxes += [(x, y, x + wide, y + high) for x, y, wide, high in drawn]
    width, height = written[0][4:]
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height for box in boxes)
    apart = [
        a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for number, a in enumerate(boxes)
        for b in boxes[:number]
    ]
    assert all(apart)


@pytest.mark.parametrize("attributes", ['data-theme="dark"', 'data-jp-theme-light="false"', ""])
def test_paper_is_light_and_tells_the_settings(open_page, bundle, attributes):
    page = open_page(viewer.static_html(bundle), attributes=attributes, color_scheme="light")
    ready(page)
    settings = page.locator(".cxr-settings")
    assert not settings.is_visible()
    page.get_by_role("slider", name="Threshold").fill("0.3")
    page.emulate_media(media="print")
    assert page.locator(".cxr").evaluate("node => getComputedStyle(node).colorScheme") == "light"
    assert settings.is_visible()
    assert "threshold 0.30 × max" in settings.text_content()


def test_the_open_viewer_is_accessible(open_page, bundle):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(viewer.static_html(bundle), width=390, attributes='lang="en"')
    ready(page)
    page.get_by_text("Numbers as a table").click()
    page.locator(".cxr-numbers tbody tr").first.wait_for()
    violations = Axe().run(page).response["violations"]
    assert [found["id"] for found in violations if found["impact"] in ("serious", "critical")] == []


def test_keys_are_read_out_and_the_mouse_is_not(open_page, bundle):
    page = open_page(viewer.static_html(bundle))
    ready(page)
    ready(page, "bcos", 1)
    live = "all => all.map(each => each.ariaLive)"
    panel(page, 1).locator("canvas").hover()
    panel(page, 1).get_by_text("x 30, y").wait_for()
    assert page.locator(".cxr-readout").evaluate_all(live) == ["off", "off"]
    panel(page, 1).locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    panel(page, 1).get_by_text("x 31, y").wait_for()
    assert page.locator(".cxr-readout").evaluate_all(live) == ["off", "polite"]


def test_the_first_label_shown_is_one_that_is_there(open_page):
    bundle = viewer.Bundle(["Mass", "Nodule"])
    bundle.add_image(np.eye(20), "x", targets=[0, 1])
    bundle.add_series("m", "layercam", np.ones((1, 2, 20, 20)) * np.eye(20), [[0.0, 0.0]], keep="all")
    page = open_page(viewer.static_html(bundle))
    page.locator("canvas[aria-label*='for Nodule']").wait_for()


def test_overlapping_boxes_keep_their_corners(open_page):
    bundle = viewer.Bundle(["Mass"], map_size=16)
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[0, 5:20, 5:20] = mask[0, 13:31, 13:31] = True
    bundle.add_image(np.zeros((40, 40)), "dark", mask)
    bundle.add_series("m", "layercam", np.zeros((1, 1, 40, 40)), [[0.0]], keep="all")
    lines = """() => {
      window.lines = [];
      const { moveTo } = Path2D.prototype;
      Path2D.prototype.moveTo = function (x, y) { window.lines.push([x, y]); return moveTo.call(this, x, y); };
    }"""
    page = open_page(viewer.static_html(bundle, height=200))
    ready(page)
    width = page.locator("canvas").evaluate("canvas => canvas.width")
    page.evaluate(lines)
    page.get_by_label("Smooth").uncheck()
    starts = {(round(40 * x / width), round(40 * y / width)) for x, y in page.evaluate("lines")}
    assert starts == {(5, 5), (20, 5), (20, 13), (5, 20), (13, 20), (13, 31), (31, 13)}


def test_a_change_of_image_goes_to_a_label_that_every_panel_has(open_page):
    bundle = viewer.Bundle(["Mass", "Nodule", "Effusion"])
    for name in ("x", "y"):
        bundle.add_image(np.eye(20), name, targets=[1, 1, 0])
    for method, second in (("layercam", [False, True, False]), ("gradcam", [True, True, False])):
        keep = np.array([[True, True, False], second])
        bundle.add_series("m", method, np.ones((2, 3, 20, 20)) * np.eye(20), [[0.0] * 3] * 2, keep=keep)
    page = open_page(viewer.static_html(bundle))
    page.locator("canvas[aria-label*='Radiograph x with the gradcam map of m for Mass']").wait_for()
    listed = page.get_by_role("combobox", name="Label").locator("option").all_text_contents()
    assert listed == ["Mass (present)", "Nodule (present)", "Effusion (not stored)"]
    page.get_by_role("combobox", name="Image").select_option("1")
    page.locator("canvas[aria-label*='Radiograph y with the layercam map of m for Nodule']").wait_for()


# ---- Alive: the same module, with the real widget answering through a bridge in place of Jupyter's comm ----

BRIDGE = """
const listeners = {}, state = JSON.parse(document.getElementById("state").textContent);
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; },
  save_changes: () => {},
  on: (name, listener) => { (listeners[name] ??= []).push(listener); },
  off: (name, listener) => { listeners[name] = listeners[name].filter((each) => each !== listener); },
  send: (message) => window.python(JSON.stringify(message)),
};
setInterval(async () => { // what Python sent meanwhile
  for (const reply of JSON.parse(await window.replies())) {
    for (const listener of listeners["msg:custom"] ?? []) listener(reply, []);
  }
}, 20);
window.renewed = (bundle) => { state.bundle = bundle; listeners["change:bundle"].forEach((listener) => listener()); };
window.state = state;
window.stop = viewer.render({ model, el: document.getElementById("here") });
"""


class Linear(torch.nn.Module):
    labels = LABELS

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * torch.tensor([[1.0, 2.0, -3.0]])


def explain(model, image, method, label):
    if method == "gradcam":
        raise cxrkit.AttributionError("gradcam: <i>no convolution</i> to look at")
    explain.calls.append((method, label))
    return image[0] * (1 + LABELS.index(label)) * (image[0] > 0.5 if label == "Mass" else 1)


@pytest.fixture
def alive(open_page, monkeypatch):
    widget = pytest.importorskip("cxrkit.view.widget")
    explain.calls = []
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 32, 32, dtype=torch.bool)
    mask[0, 4:12, 6:20] = True
    samples = [
        SimpleNamespace(
            image=torch.rand(1, 32, 32, generator=generator),
            image_id=f"row-{number}",
            mask=mask,
            target=torch.tensor([1.0, 0.0, torch.nan]),
            truth=None,
        )
        for number in range(2)
    ]
    explorer = widget.Explorer({"linear": Linear()}, samples, ["saliency", "gradcam"], explain=explain, labels=LABELS)
    replies = []
    monkeypatch.setattr(explorer, "send", lambda content, buffers=None: replies.append(content))

    def python(message):
        explorer._handle_custom_msg(json.loads(message), [])

    def told():
        return json.dumps([replies.pop(0) for _ in range(len(replies))])

    def prepare(page):
        page.expose_function("python", python)
        page.expose_function("replies", told)

    state = json.dumps({"bundle": explorer.bundle, "selection": {}}).replace("<", "\\u003c")
    module = explorer._esm.replace("export default {", "const viewer = {")
    body = (
        f"<style>{explorer._css}</style><div id='here'></div><script type='application/json' id='state'>{state}"
        f"</script><script type='module'>{module}\n{BRIDGE}</script>"
    )
    return explorer, open_page(body, prepare=prepare)


def test_live_widget_computes_what_is_asked_for_and_says_what_fails(alive):
    explorer, page = alive
    ready(page, "saliency")
    page.get_by_text("gradcam: <i>no convolution</i> to look at").wait_for()
    image = explorer._sample(0)["image"][0].numpy()
    share = f"{100 * image[4:12, 6:20].sum() / image.sum():.1f} %"
    assert scores(page)["EPG precision"] == share
    selected = page.evaluate("state.selection")
    assert {name: selected[name] for name in ("image", "label", "series")} == {"image": 0, "label": 0, "series": [0, 1]}
    before = picture(page)
    page.get_by_role("combobox", name="Label").select_option("1")
    page.wait_for_function("old => document.querySelector('.cxr canvas').toDataURL() !== old", arg=before)
    page.wait_for_function("document.querySelector('.cxr canvas').ariaLabel.includes('for Mass')")
    page.get_by_role("combobox", name="Label").select_option("0")
    page.wait_for_function("document.querySelector('.cxr canvas').ariaLabel.includes('for Effusion')")
    assert explain.calls == [("saliency", "Effusion"), ("saliency", "Mass")]


def test_live_widget_tells_python_all_that_makes_the_picture(alive):
    _, page = alive
    ready(page, "saliency")
    page.get_by_role("slider", name="Threshold").fill("0.25")
    page.get_by_role("slider", name="Overlay").fill("0.4")
    page.get_by_role("combobox", name="Colours").select_option("viridis")
    page.get_by_role("combobox", name="Scale").select_option("shared")
    page.get_by_label("Boxes").uncheck()
    page.get_by_label("True mask").check()
    page.get_by_label("Smooth").uncheck()
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_function("state.selection.zoom === 1.5 && state.selection.panels[0].full_colour !== null")
    told = page.evaluate("state.selection")
    expected = {"threshold": 0.25, "overlay": 0.4, "colours": "viridis", "scale": "shared"}
    expected |= {"boxes": False, "true_mask": True, "smooth": False}
    assert {name: told[name] for name in expected} == expected
    assert told["left"] == told["top"] == pytest.approx(1 / 6)
    assert told["panels"][0]["colours"] == "viridis"
    assert told["panels"][0]["full_colour"] == pytest.approx(1, abs=0.05)


def test_live_widget_tells_how_far_it_is_and_stops(alive):
    explorer, page = alive
    ready(page, "saliency")
    reached = []

    def slow(model, image, method, label, progress):
        for step in range(400):
            reached.append(step)
            progress(step / 400)
            time.sleep(0.05)
        return image[0]

    explorer.explain, explorer._tells = slow, True
    page.get_by_role("combobox", name="Label").select_option("2")
    page.get_by_text(re.compile(r"Computing … \d+ %")).first.wait_for()
    panel(page, 0).get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").first.wait_for()
    assert 0 < max(reached) < 399


def test_live_widget_shows_an_own_image(alive):
    explorer, page = alive
    ready(page, "saliency")
    explorer.add_image(torch.linspace(0, 1, 20 * 30).reshape(1, 20, 30), "<b>mine</b>")
    page.evaluate("bundle => renewed(bundle)", explorer.bundle)
    page.locator("canvas[aria-label*='<b>mine</b> with the saliency']").wait_for()
    assert page.get_by_role("combobox", name="Image").input_value() == "2"
    box = page.locator("canvas").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(1.5, rel=0.01)
    page.evaluate("stop()")


def test_live_widget_says_which_image_fails_and_goes_on(alive):
    explorer, page = alive
    ready(page, "saliency")
    kept, explorer._dataset[1] = explorer._dataset[1], None
    page.get_by_role("combobox", name="Image").select_option("1")
    page.get_by_text("AttributeError").first.wait_for()
    assert scores(page) == {}
    assert page.locator("canvas[aria-label*='map of']").count() == 0
    page.get_by_role("combobox", name="Image").select_option("0")
    ready(page, "saliency")
    explorer._dataset[1] = kept
    page.get_by_role("combobox", name="Image").select_option("1")
    page.locator("canvas[aria-label*='row-1 with the saliency']").wait_for()


@pytest.fixture
def slow(alive):
    """The live viewer where every map of "Mass" by gradcam takes until the event is set; which maps were begun."""
    explorer, page = alive
    ready(page, "saliency")
    page.get_by_text("no convolution").wait_for()
    go, begun = threading.Event(), []

    def explain(model, image, method, label, progress):
        begun.append((method, label))
        while method == "gradcam" and label == "Mass" and not go.wait(0.02):
            progress(0.5)
        return image[0] * (1 + LABELS.index(label))

    explorer.explain, explorer._tells = explain, True
    yield page, go, begun
    go.set()


def test_a_map_that_is_being_computed_has_no_numbers_and_no_picture(slow):
    page, go, _ = slow
    page.get_by_text("Numbers as a table").click()
    page.get_by_role("combobox", name="Label").select_option("1")
    page.locator("canvas[aria-label*='saliency map of linear for Mass']").wait_for()
    panel(page, 1).get_by_text("Computing").wait_for()
    ours, pending = saved_numbers(page)
    assert (ours["Label"], pending["Label"]) == ("Mass", "Mass")
    assert ours["Logit"] != ""
    assert pending["Note"] == "computing"
    assert {pending[name] for name in ("Logit", "Probability", "Highest", "Strongest cell")} == {""}
    assert page.locator(".cxr-numbers tbody tr").nth(1).locator("td").last.text_content() == "computing"
    width = page.locator("canvas").first.bounding_box()["width"]
    one = saved_picture(page)
    go.set()
    ready(page, "gradcam", 1)
    assert one.width < 2 * width < saved_picture(page).width
    assert saved_numbers(page)[1]["Logit"] == ours["Logit"]


def test_a_label_that_was_left_and_chosen_again_is_computed(slow):
    page, go, begun = slow
    choose = page.get_by_role("combobox", name="Label").select_option
    choose("1")
    panel(page, 1).get_by_text("Computing … 50 %").wait_for()
    choose("0")
    choose("1")
    for _ in range(200):  # until it is asked anew, and the first question's late reply has come
        if begun.count(("gradcam", "Mass")) == 2:
            break
        page.wait_for_timeout(25)
    page.wait_for_timeout(100)
    assert page.get_by_text("Stopped").count() == 0
    go.set()
    page.locator("canvas[aria-label*='gradcam map of linear for Mass']").wait_for()


def test_what_was_stopped_is_computed_at_a_button(slow):
    page, go, _ = slow
    page.get_by_role("combobox", name="Label").select_option("1")
    panel(page, 1).get_by_text("Computing … 50 %").wait_for()
    panel(page, 1).get_by_role("button", name="Stop").click()
    panel(page, 1).get_by_text("Stopped.").wait_for()
    go.set()
    panel(page, 1).get_by_role("button", name="Compute").click()
    page.locator("canvas[aria-label*='gradcam map of linear for Mass']").wait_for()
    assert page.get_by_text("Stopped").count() == 0
    assert page.get_by_role("button", name="Compute").count() == 0


def test_the_table_opens_where_an_image_failed(alive):
    explorer, page = alive
    ready(page, "saliency")
    explorer._dataset[1] = None
    page.get_by_role("combobox", name="Image").select_option("1")
    page.get_by_text("AttributeError").first.wait_for()
    page.get_by_text("Numbers as a table").click()
    page.wait_for_function("document.querySelector('.cxr-numbers table thead')")
    assert page.locator(".cxr-numbers tbody tr").count() == 0
