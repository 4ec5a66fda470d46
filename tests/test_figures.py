"""Figures: what they show, what they say about it, and that they leave matplotlib and the screen alone."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from cxrkit.errors import ParameterError
from cxrkit.view import charts, figure_data, figures
from cxrkit.view.panels import broken, limits, region_of
from cxrkit.view.style import COLOURS, describe, new_figure, style, to_html


@pytest.fixture
def scene():
    generator = np.random.default_rng(0)
    mask = np.zeros((32, 32), bool)
    mask[8:16, 4:20] = True
    maps = generator.normal(size=(3, 32, 32)) * np.array([1, 1e-3, 50])[:, None, None]
    return {"image": generator.random((1, 32, 32)), "maps": maps, "titles": ["a", "b", "c"], "mask": mask}


def shown(figure: Figure) -> list:
    """Axes with a picture in them, colour bars left out."""
    return [ax for ax in figure.axes if ax.images]


def drawn(figure: Figure) -> np.ndarray:
    with style():
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("RGB"))


HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "train_loss": [0.7, 0.5, 0.4],
        "validation_loss": [0.6, 0.5, 0.55],
        "validation_auc": [0.6, 0.8, 0.7],
    }
)
CURVES = pd.DataFrame(
    {
        "method": ["x", "x", "y", "y"],
        "threshold": [0, 0.5, 0, 0.5],
        "precision": [0.2, 0.4, 0.3, np.nan],
        "recall": [1, 0.2, 0.9, 0],
    }
)
SCORES = pd.DataFrame(
    {"name": ["p", "q"], "EPG": [0.24, np.nan], "low": [0.2, np.nan], "high": [0.3, np.nan], "chance": [0.12, 0.12]}
)


def every_figure(scene) -> dict[str, Figure]:
    maps, image = scene["maps"], scene["image"]
    return {
        "maps": figures.show_maps(**scene, truth=scene["mask"], caption="one"),
        "labels": figures.show_labels([image[0]] * 2, np.stack([maps, maps]), ["r", "s"], scene["titles"]),
        "spectrum": figures.show_spectrum(maps, scene["titles"]),
        "montage": figures.montage(torch.rand(7, 1, 16, 16), [f"image {n}" for n in range(7)]),
        "training": figures.training_curves(HISTORY),
        "thresholds": figures.threshold_curves(CURVES),
        "bars": figures.score_bars(SCORES),
    }


def test_every_figure_draws_speaks_and_leaves_the_settings_alone(scene):
    before = dict(matplotlib.rcParams)
    for name, figure in every_figure(scene).items():
        assert isinstance(figure, Figure), name
        assert len(figure.alt_text) > 10, name
        assert "nan" not in figure.alt_text, name
        assert figure.get_figwidth() <= 7.6 + 1e-9, name
        pixels = drawn(figure)
        assert (pixels[0, 0] == 255).all(), name  # opaque white, also on a dark page
        assert pixels.std() > 5, name
    assert dict(matplotlib.rcParams) == before


def test_no_window_system_is_touched():
    code = "import sys; import cxrkit.view.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys; import cxrkit.view; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_signed_colours_are_centred_at_zero(scene):
    for ax in shown(figures.show_maps(**scene))[1:]:
        low, high = ax.images[0].get_clim()
        assert low == -high < 0
    for ax in shown(figures.show_maps(**scene | {"signed": False}))[1:]:
        assert ax.images[0].get_clim()[0] == 0


def test_scale_of_a_row_and_of_a_map(scene):
    row = [ax.images[0].get_clim() for ax in shown(figures.show_maps(**scene, scale="row"))[1:]]
    assert len(set(row)) == 1
    single = [ax.images[0].get_clim()[1] for ax in shown(figures.show_maps(**scene))[1:]]
    assert single == pytest.approx([np.percentile(np.abs(values), 99.5) for values in scene["maps"]])
    rows = figures.show_labels([scene["image"][0]] * 2, np.stack([scene["maps"], 2 * scene["maps"]]), "rs", "abc")
    highs = [ax.images[0].get_clim()[1] for ax in shown(rows)]
    assert highs[5] == pytest.approx(2 * highs[1])
    assert highs[1] == highs[2] == highs[3]


def test_colours_of_empty_sparse_and_spoilt_maps():
    empty, sparse, spoilt = np.zeros((3, 10, 40, 40))[:, 0]
    sparse[0, 0], spoilt[0, 0] = 3.0, np.nan
    assert limits(np.stack([empty, sparse, spoilt]), "map", True).tolist() == [1, 3, 1]
    figure = figures.show_maps(np.zeros((40, 40)), [empty, sparse, spoilt], "abc", mask=np.eye(40) > 0)
    assert "c no score" in figure.alt_text
    assert any(text.get_text() == "no map" for ax in figure.axes for text in ax.texts)
    drawn(figure)


def test_the_alternative_text_holds_the_scores():
    values = np.zeros((1, 8, 8))
    values[0, :2] = 1.0
    figure = figures.show_maps(values[0], values, ["m"], boxes=[(0, 0, 4, 8)])
    assert "m 50.0 %" in figure.alt_text
    assert "box covers 50.0 %" in figure.alt_text


def test_boxes_follow_pixel_edges():
    assert region_of([(1, 0, 3, 2)], None, (4, 4)).astype(int).tolist() == [[0, 1, 1, 0]] * 2 + [[0] * 4] * 2
    figure = figures.show_maps(np.zeros((4, 4)), np.ones((1, 4, 4)), ["m"], boxes=[(1, 0, 3, 2)])
    for ax in shown(figure):
        rim, line = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
        points = np.concatenate(line.get_segments())
        assert points.min(0).tolist() == [0.5, -0.5]
        assert points.max(0).tolist() == [2.5, 1.5]
        assert rim.get_linewidth()[0] > line.get_linewidth()[0]


def test_columns_of_several_units_keep_three_significant_digits():
    table = pd.DataFrame({"label": ["A"], "ours": [0.12345], "percent": [98.7654], "n": [1302], "gap": [np.nan]})
    html = figures.paper_beside_ours(table, digits=None).to_html()
    assert all(f">{text}<" in html for text in ("A", "0.123", "98.8", "1302", "–"))


def test_text_from_data_stays_text(scene):
    name = "<script>alert('x')</script> $\\frac{\" & $"
    figure = figures.show_maps(**scene | {"titles": [name, "b", "c"], "caption": name})
    html = figure._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<img") == 1
    alt = re.search(r'alt="([^"]*)"', html).group(1)
    assert alt.endswith("%).")  # the quotation mark in the name didn't end the attribute
    table = figures.paper_beside_ours(pd.DataFrame({name: [name], "paper": [1.0], "ours": [np.nan]}), name).to_html()
    assert "<script" not in table
    assert "–" in table


def test_marked_epoch_and_its_sentence():
    figure = figures.training_curves(HISTORY)
    assert "0.800, in epoch 2" in figure.alt_text
    assert any(line.get_xydata().tolist() == [[2, 0.8]] for line in figure.axes[1].lines)
    assert len(figures.training_curves(HISTORY[["epoch", "train_loss"]]).axes) == 1
    drawn(figures.training_curves(HISTORY.head(1).assign(validation_auc=np.nan)))


def test_bars_say_interval_chance_and_missing_scores():
    figure = figures.score_bars(SCORES)
    assert figure.alt_text == "p 24.0 % (20.0 % to 30.0 %), chance 12.0 %; q no score."
    coloured = figures.score_bars(pd.concat([SCORES.assign(part="TP"), SCORES.assign(part="FN")]), hue="part")
    assert "p, TP 24.0 %" in coloured.alt_text
    drawn(coloured)


def test_lines_differ_in_colour_and_marker():
    lines = figures.threshold_curves(CURVES).axes[0].lines
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 2
    assert lines[0].get_color() == COLOURS[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.show_maps(np.zeros((4, 4)), np.zeros((2, 4, 4)), ["one"]),
        lambda: figures.show_maps(np.zeros((4, 4)), np.zeros((1, 4, 4)), ["one"], scale="column"),
        lambda: figures.show_maps(np.zeros((4, 4)), np.zeros((4, 4)), ["one"]),
        lambda: figures.show_labels(np.zeros((2, 4, 4)), np.zeros((3, 1, 4, 4)), "ab", "c"),
        lambda: figures.montage(np.zeros((0, 4, 4))),
        lambda: figures.training_curves(pd.DataFrame({"loss": [1]})),
        lambda: figures.score_bars(SCORES, value="mean"),
        lambda: figures.threshold_curves(SCORES),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ParameterError):
        call()


def saved(figure: Figure) -> tuple[str, str, bytes]:
    """Name, link text and content of the file that a figure's data link saves."""
    link = r'download="([^"]+)" href="data:[^,]+,([^"]+)">(Data[^<]*)<'
    name, content, text = re.search(link, to_html(figure)).groups()
    return name, text, base64.b64decode(content)


def test_a_figure_is_saved_with_its_data(scene):
    assert 'download="as-the-threshold-rises-from-0-to.png"' in to_html(figures.threshold_curves(CURVES))
    name, text, table = saved(figures.threshold_curves(CURVES))
    assert (name, text) == ("as-the-threshold-rises-from-0-to.csv", "Data (CSV)")
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(table)), CURVES, check_dtype=False)
    name, text, archive = saved(figures.show_maps(**scene))
    assert (name[-4:], text) == (".npz", "Data (NPZ)")
    with np.load(io.BytesIO(archive), allow_pickle=False) as held:
        np.testing.assert_array_equal(held["maps"], scene["maps"].astype(np.float32))
        assert held["image"].shape == (32, 32)


def test_names_of_files_hold_no_markup(scene):
    name = saved(figures.show_maps(**scene, caption='<b>"../a_b</b> ü'))[0]
    assert name == "b-a-b-b-ü-image-and.npz"
    assert saved(figures.montage(np.zeros((1, 8, 8))))[0] == "1-images.npz"


@pytest.mark.parametrize(("size", "text"), [(200, "rounded"), (400, "rounded, 1/2 as wide")])
def test_data_too_large_for_a_page_are_kept_coarser(size, text):
    maps = np.random.default_rng(0).normal(size=(3, size, size)) * 1e-6
    figure = figures.show_maps(maps[0] > 0, maps, list("abc"))
    _, said, archive = saved(figure)
    assert said == f"Data (NPZ, {text})"
    assert len(archive) <= figure_data.LARGEST_DATA
    with np.load(io.BytesIO(archive), allow_pickle=False) as held:
        factor = size // held["maps"].shape[-1]
        wanted = maps.reshape(3, size // factor, factor, size // factor, factor).mean((2, 4))
        np.testing.assert_allclose(held["maps"], wanted, rtol=0.005, atol=1e-9)


def test_a_table_too_large_for_a_page_is_rounded_and_compressed():
    points = np.random.default_rng(0).random((30_000, 2))
    figure = charts.clouds(points, ["a"] * len(points))
    name, text, table = saved(figure)
    assert (name[-7:], text) == (".csv.gz", "Data (CSV.GZ, rounded)")
    held = pd.read_csv(io.BytesIO(table), compression="gzip")
    np.testing.assert_allclose(held[["x", "y"]], points, rtol=1e-3)


def test_what_was_drawn_by_hand_is_read_off_the_panels():
    with style():
        figure = new_figure(4, 3)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1, 2], [3, 4, 5], label="a line")
        left.axhline(4)
        left.fill_between([0, 1], [0, 0], [1, 2], label="a band")
        right.hist([0.1, 0.2, 0.9], bins=[0, 0.5, 1], label="bars")
        right.scatter([7], [8], label="points")
        right.set_title("right")
    table = describe(figure, "by hand").data
    assert table["series"].unique().tolist() == ["a line", "a band", "bars", "points"]
    assert table["panel"].unique().tolist() == [0, "right"]
    assert table.loc[table["series"] == "a line", ["x", "y"]].to_numpy().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert table.loc[table["series"] == "bars", ["x", "y"]].to_numpy().tolist() == [[0.25, 2], [0.75, 1]]
    assert table.loc[table["series"] == "points", ["x", "y"]].to_numpy().tolist() == [[7, 8]]
    with style():
        figure = new_figure(4, 3)
        for ax, title in zip(figure.subplots(1, 2), "ab", strict=True):
            ax.imshow(np.eye(3))
            ax.set_title(title)
    held = describe(figure, "by hand").data
    assert held["titles"].tolist() == ["a", "b"]
    assert held["images"].shape == (2, 3, 3)
    assert describe(new_figure(1, 1), "nothing").data is None


def test_every_figure_has_its_data(scene):
    image = scene["image"][0]
    more = {
        "colours": figures.show_colours(image, np.ones((4, 32, 32)), caption="c"),
    }
    for name, figure in (every_figure(scene) | more).items():
        assert saved(figure)[1].startswith("Data ("), name


def test_long_titles_keep_to_their_panel():
    names = ["Pulmonary fibrosis (present)", "Consolidation (present)", "Pneumothorax", "Lung Opacity (present)"] * 2
    figure = figures.show_maps(np.zeros((8, 8)), np.ones((8, 8, 8)), names)
    table = figures.show_labels(np.zeros((1, 8, 8)), np.ones((1, 4, 8, 8)), names[:1], names[:4])
    for one in (figure, table):
        with style():
            one.draw_without_rendering()
        boxes = [ax.title.get_window_extent() for ax in shown(one)]
        assert not any(a.overlaps(b) for place, a in enumerate(boxes) for b in boxes[:place] if a.width * b.width)
        assert all(box.x0 >= 0 and box.x1 <= one.bbox.width for box in boxes if box.width)
    assert "Pulmonary fibrosis (present)" in figure.alt_text


@pytest.mark.browser
def test_a_wide_figure_scrolls_on_a_phone_instead_of_shrinking(browser, tmp_path):
    wide = figures.show_labels(np.zeros((2, 8, 8)), np.ones((2, 7, 8, 8)), "ab", "cdefghi")
    slim = figures.montage(np.zeros((2, 8, 8)), "ab", columns=2)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    (tmp_path / "page.html").write_text(f"<!doctype html>{head}{to_html(wide)}{to_html(slim)}", encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((tmp_path / "page.html").as_uri())
    widths = page.locator("img").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert widths[0] == 720
    assert widths[1] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_titles_break_where_they_are_broken_and_where_they_are_long():
    fitted, deep = broken(["ResNet-18\np = 0.78", "", "Pleural thickening (present)"], 8)
    assert fitted[0] == "ResNet-18\np = 0.78"
    assert fitted[1] == ""
    assert deep == fitted[2].count("\n") + 1 == 3
