"""The viewer in headless Chromium: how long a change takes, how soon the first picture is there, how large a page is.

    python benchmarks/viewer.py [--book FOLDER]

Changes are timed inside the page: from the event to the end of the drawing that it causes, six panels with maps of
512 x 512 values; labels are those that were shown once. `--book` also opens pages of a built book. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import cxrkit
from cxrkit.view import viewer

SIZE, PANELS, REPEATS = 512, 6, 15
CHANGE = """([name, values]) => {
  const sliders = [...document.querySelectorAll("input[type=range]")], times = [];
  const slider = sliders.find((each) => each.ariaLabel === name);
  for (const value of values) {
    const start = performance.now();
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    times.push(performance.now() - start);
  }
  return times;
}"""
LABEL = """async (labels) => {
  const select = [...document.querySelectorAll(".cxr-shared select")][1], times = [];
  const panels = [...document.querySelectorAll(".cxr-canvas")];
  const soon = () => new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(0);
  });
  for (const [value, name] of labels) {
    const start = performance.now();
    select.value = value;
    select.dispatchEvent(new Event("change"));
    while (!panels.every((each) => each.ariaLabel.includes(`for ${name},`))) await soon();
    times.push(performance.now() - start);
  }
  return times;
}"""
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
LARGEST = """() => new Promise((resolve) =>
  new PerformanceObserver((list) => resolve(list.getEntries().at(-1).startTime))
    .observe({ type: "largest-contentful-paint", buffered: true }))"""


def make_page(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = ["one", "two", "three"]
    bundle = viewer.Bundle(labels, map_size=SIZE, image_size=SIZE)
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    masks = np.zeros((3, SIZE, SIZE), bool)
    masks[:, 100:300, 120:320] = True
    bundle.add_image(rng.random((SIZE, SIZE)), "image", masks, targets=[1, 1, 1])
    for panel in range(PANELS):
        waves = np.stack([np.sin(9 * (label + 1) * rows + panel) * np.cos(7 * columns) for label in range(3)])
        bundle.add_series("model", f"method {panel}", waves[None], np.zeros((1, 3)), keep="all")
    bundle.start(0, "one", [("model", f"method {panel}") for panel in range(PANELS)])
    path = folder / "page.html"
    html = viewer.static_html(bundle, limit=30_000_000)
    path.write_text(f"<!doctype html><meta charset='utf-8'><body style='width:1240px'>{html}", encoding="utf-8")
    return path


def told(name: str, milliseconds: list[float], limit: float) -> None:
    worst, middle = max(milliseconds), statistics.median(milliseconds)
    print(f"{name:34} median {middle:6.1f} ms, slowest {worst:6.1f} ms   (limit {limit:.0f} ms)")


def changes(page) -> None:
    drawn = "[...document.querySelectorAll('.cxr-canvas')].filter((each) => each.ariaLabel.startsWith('Radiograph'))"
    page.wait_for_function(f"{drawn}.length === {PANELS}")
    for name, values in (("Overlay", np.linspace(0.2, 1, REPEATS)), ("Threshold", np.linspace(0, 0.95, REPEATS))):
        told(f"{name}, {PANELS} panels at {SIZE}", page.evaluate(CHANGE, [name, values.tolist()]), 50)
    names = [("1", "two"), ("2", "three"), ("0", "one")] * 4
    told(f"label, {PANELS} panels at {SIZE}", page.evaluate(LABEL, names)[3:], 50)


def live() -> None:
    model = cxrkit.models.create("resnet50", labels=["a", "b"]).eval()
    image = torch.rand(1, 224, 224)
    from cxrkit.view import widget

    explorer = widget.Explorer({"net": model}, None, ["layercam"], background=False)
    times = []
    for number in range(4):
        explorer.add_image(image, f"image {number}")
        start = time.perf_counter()
        explorer.answer({"type": "map", "image": number, "label": 0, "series": 0})
        times.append(1000 * (time.perf_counter() - start))
    told("live LayerCAM, ResNet-50 at 224", times, 1000)


def pages(browser, book: Path) -> None:
    for name in ("book/index", "notebooks/compare", "notebooks/gallery"):
        path = book / f"{name}.html"
        if not path.is_file():
            continue
        first, largest = [], []
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.as_uri())
            page.wait_for_timeout(1500)
            first.append(page.evaluate(PAINT))
            largest.append(page.evaluate(LARGEST))
            page.close()
        size = path.stat().st_size / 1e6
        print(f"{name}: {size:.2f} MB; first paint {min(first):.0f} ms, largest picture {min(largest):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--book", type=Path, default=Path("_build/html"))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium here; nothing measured")
        return
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
        page = browser.new_page(viewport={"width": 1280, "height": 1200})
        page.goto(make_page(Path(folder)).as_uri())
        changes(page)
        pages(browser, arguments.book)
        browser.close()
    live()


if __name__ == "__main__":
    main()
