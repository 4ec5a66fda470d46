"""The lab bench: images dropped in, files written, regions changed."""

from __future__ import annotations

import datetime
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

import cxrkit
from cxrkit.view import export, figures, lab, widget

HOSTILE = "<img src=x onerror=alert(1)>"
SIZE = 32


class Mean(torch.nn.Module):
    labels = ("Mass", HOSTILE)

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * torch.tensor([[10.0, -10.0]])


@pytest.fixture
def explorer():
    def explain(model, image, method, label):
        return image[0] * (1 if label == "Mass" else -1)

    made = widget.Explorer({"mean": Mean()}, None, ["saliency"], explain=explain, background=False)
    made.send = lambda content, buffers=None: None
    return made


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def dropped(explorer, *files, negative=False, bench=False, **options):
    """What is said after files (name, content) were dropped in; with ``bench`` the widgets too."""
    box = lab.drop_in(explorer, SIZE, **options)
    (field, invert), said = box.children[0].children, box.children[1]
    invert.value = negative
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    about = {"type": "", "last_modified": when}
    field.value = tuple(
        {"name": name, "size": len(content), "content": memoryview(content), **about} for name, content in files
    )
    assert field.value == ()
    return (said.value, box) if bench else said.value


def test_a_dicom_and_a_png_are_dropped_in(explorer):
    content = Path(get_testdata_file("RG1_UNCR.dcm", download=False)).read_bytes()
    said = dropped(explorer, ("chest.dcm", content), ("picture.png", png(np.full((40, 20), 51))))
    assert said == f"chest.dcm: shown, {SIZE} x {SIZE} pixels.<br>picture.png: shown, {SIZE} x {SIZE} pixels."
    assert [image["id"] for image in explorer.bundle["images"]] == ["chest.dcm", "picture.png"]
    assert explorer._sample(1)["image"].unique().tolist() == pytest.approx([0.2])
    assert 0 <= explorer._sample(0)["image"].min() < 0.3 < 0.7 < explorer._sample(0)["image"].max() <= 1


def test_a_negative_is_turned_round(explorer):
    dropped(explorer, ("negative.png", png(np.full((40, 40), 51))), negative=True)
    assert explorer._sample(0)["image"].unique().tolist() == pytest.approx([0.8])


def test_a_negative_is_told_and_the_tick_turns_what_is_shown(explorer):
    radiograph = cxrkit.data.load("phantom", size=64, images=3)[0].image[0].numpy()
    said, box = dropped(explorer, ("right.png", png(255 * radiograph)), bench=True)
    assert "inverted" not in said
    said, box = dropped(explorer, ("negative.png", png(255 * (1 - radiograph))), bench=True)
    assert said.endswith("It looks inverted: tick the box.")
    tick, words = box.children[0].children[1], box.children[1]
    tick.value = True
    assert words.value == "negative.png: shown inverted."
    assert explorer.bundle["images"][-1]["id"] == "negative.png, inverted"
    assert not lab.looks_inverted(explorer._sample(2)["image"])
    assert explorer.bundle["start"] == {"image": 2}
    explorer.selection = {"image": 2, "label": 0, "series": [0]}
    tick.value = False
    assert explorer.bundle["images"][-1]["id"] == "negative.png"
    assert torch.equal(explorer._sample(3)["image"], explorer._sample(1)["image"])


def test_no_radiograph_of_the_phantom_looks_inverted():
    images = [sample.image for sample in cxrkit.data.load("phantom", size=64, images=40)]
    assert not any(map(lab.looks_inverted, images))
    assert sum(lab.looks_inverted(1 - image) for image in images) >= 38


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"not an image", "neither DICOM, PNG nor JPEG", id="unknown"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(png(np.zeros((64, 64)))[:60], "truncated or damaged", id="cut"),
        pytest.param(b"\x00" * 2000, "more than any radiograph", id="huge"),
    ],
)
def test_what_cannot_be_read_is_said_and_the_rest_goes_on(explorer, content, words):
    said = dropped(explorer, (HOSTILE, content), ("good.png", png(np.zeros((9, 9)))), most=1999)
    assert words in said
    assert "good.png: shown" in said
    assert "<img" not in said
    assert "file:" not in said.replace("file: ", "")
    assert len(explorer.bundle["images"]) == 1


def show(explorer, label=0):
    explorer.add_image(torch.rand(1, SIZE, SIZE), "one", masks=np.eye(SIZE, dtype=bool)[None].repeat(2, 0))
    explorer._handle_custom_msg({"type": "map", "image": 0, "label": label, "series": 0, "key": "k"}, [])
    explorer.selection = {"image": 0, "label": label, "series": [0]}


def test_what_is_shown_is_written_with_its_parameters(explorer, tmp_path):
    bench = lab.exports(explorer, tmp_path / "out", {"run": "train-1"})
    buttons, said = bench.children[0].children, bench.children[1]
    buttons[0].click()
    assert "nothing is shown yet" in said.value
    show(explorer, label=1)
    for button in buttons:
        button.click()
    name = "one--img-src-x-onerror-alert-1--saliency"
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {".png", ".svg", ".pdf", ".npz"}
    assert {path.stem for path in files.values()} == {name}
    expected = {"run": "train-1", "image": "one", "label": HOSTILE}
    told = json.loads(Image.open(files[".png"]).info["Description"])
    assert told | expected == told
    assert "Not a medical device" in told["notice"]
    assert b"train-1" in files[".svg"].read_bytes()
    assert b"<img" not in files[".svg"].read_bytes()
    assert files[".pdf"].read_bytes().startswith(b"%PDF")
    with np.load(files[".npz"], allow_pickle=False) as held:
        assert held["names"].tolist() == ["mean: saliency"]
        assert held["maps"].dtype == np.float32
        np.testing.assert_array_equal(held["maps"][0], -held["image"])
        assert json.loads(str(held["parameters"]))["label"] == HOSTILE


LOOK = {
    "overlay": 0.4,
    "threshold": 0.5,
    "colours": "viridis",
    "scale": "shared",
    "smooth": False,
    "boxes": False,
    "true_mask": False,
    "zoom": 2,
    "left": 0.5,
    "top": 0.25,
}


def test_a_written_picture_is_the_shown_one_and_tells_how(explorer, tmp_path, monkeypatch):
    show(explorer)
    shown = {"panels": [{"colours": "viridis", "full_colour": 2.0}]}
    explorer.selection = {**explorer.selection, **LOOK, **shown}
    drawn, write = [], lab.export_figure
    monkeypatch.setattr(lab, "export_figure", lambda figure, *rest: drawn.append(figure) or write(figure, *rest))
    lab.exports(explorer, tmp_path).children[0].children[0].click()
    (file,) = tmp_path.iterdir()
    told = json.loads(Image.open(file).info["Description"])
    assert {name: told[name] for name in LOOK} == LOOK
    assert told["panels"] == [{"model": "mean", "method": "saliency", "colours": "viridis", "full_colour": 2.0}]
    (ax,) = (ax for ax in drawn[0].axes if ax.get_visible())
    radiograph, layer = (picture.get_array() for picture in ax.images)
    values = explorer._sample(0)["image"][0].numpy()
    np.testing.assert_allclose(radiograph, values)
    np.testing.assert_allclose(layer, export.coloured(values.astype(float), 2.0, "viridis", 0.5, 0.4))
    assert ((layer[..., 3] > 0) == (values >= 0.5 * values.max())).all()
    assert layer[..., 3].max() <= 0.4
    assert (ax.get_xlim(), ax.get_ylim()) == ((15.5, 31.5), (23.5, 7.5))
    assert len(ax.collections) == 0
    assert ax.get_xlabel() == "viridis: 0 … 2"
    explorer.selection = {**explorer.selection, "boxes": True}
    lab.exports(explorer, tmp_path).children[0].children[0].click()
    assert len(drawn[1].axes[0].collections) > 0


def test_a_written_file_is_never_written_over(explorer, tmp_path):
    show(explorer)
    save, *_, maps = lab.exports(explorer, tmp_path).children[0].children
    for button in (save, maps, save, save):
        button.click()
    series = [*explorer.bundle["series"], {"model": "mean", "method": "gradcam"}]
    explorer.bundle = {**explorer.bundle, "series": series}
    explorer._handle_custom_msg({"type": "map", "image": 0, "label": 0, "series": 1, "key": "k"}, [])
    explorer.selection = {**explorer.selection, "series": [1]}
    maps.click()
    names = ["gradcam.npz", "saliency-2.png", "saliency-3.png", "saliency.npz", "saliency.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one-Mass-{name}" for name in names]
    with np.load(tmp_path / "one-Mass-gradcam.npz", allow_pickle=False) as held:
        assert held["names"].tolist() == ["mean: gradcam"]


def test_colours_are_those_of_the_viewer():
    values = np.array([[0.0, 1.0, -2.0, 4.0]])
    painted = export.coloured(values, 4.0, "signed", threshold=0.5, strength=0.5)[0]
    assert (painted[:, 3] > 0).tolist() == [False, False, True, True]
    np.testing.assert_allclose(painted[3], [*np.array([240, 78, 16]) / 255, 0.5])
    assert painted[2, 2] > painted[2, 0]
    assert (export.coloured(values, 4.0, "heat")[0, :, 3] > 0).tolist() == [False, True, False, True]
    assert not export.coloured(np.zeros((2, 2)), 0.0, "heat").any()
    many = np.arange(1.0, 201.0)
    assert export.full_colour(many, False) == 200
    assert export.full_colour(many, False, "clip") == 198
    assert export.full_colour(-many, True) == 200


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    written = []
    for folder in ("a", "b"):
        figure = figures.show_maps(np.eye(8), np.eye(8)[None], ["map"])
        kinds = [export.export_figure(figure, tmp_path / folder / "x", {"seed": 0}, kind) for kind in export.FORMATS]
        written.append([file.read_bytes() for file in kinds])
    assert written[0] == written[1]


def test_wrong_exports_are_refused_and_leave_nothing(tmp_path):
    figure = figures.show_maps(np.eye(8), np.eye(8)[None], ["map"])
    with pytest.raises(cxrkit.ParameterError, match="gif"):
        export.export_figure(figure, tmp_path / "x", {}, "gif")
    with pytest.raises(cxrkit.ParameterError, match="one shape"):
        export.export_maps(tmp_path / "x", np.eye(8), {"a": np.eye(8), "b": np.eye(9)}, {})
    broken = SimpleNamespace(savefig=lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export.export_figure(broken, tmp_path / "x", {}, "png")
    assert list(tmp_path.iterdir()) == []
    assert [export.file_name(text) for text in ("../../etc", "", ".x", "a b/c")] == ["etc", "image", "x", "a-b-c"]


def test_a_region_is_filled():
    image = torch.arange(36.0).reshape(1, 6, 6) / 36
    box = (1, 2, 4, 5)
    outside = torch.ones(6, 6, dtype=torch.bool)
    outside[2:5, 1:4] = False
    for fill in lab.FILLS:
        changed = lab.change_region(image, box, fill)
        assert torch.equal(changed[0][outside], image[0][outside])
        assert not torch.equal(changed, image)
    assert lab.change_region(image, box, "black")[0, 2:5, 1:4].eq(0).all()
    assert lab.change_region(image, box, "white")[0, 2:5, 1:4].eq(1).all()
    rim = torch.cat([image[0, 1, 0:5], image[0, 5, 0:5], image[0, 2:5, 0], image[0, 2:5, 4]]).mean()
    assert lab.change_region(image, box, "mean")[0, 3, 2].item() == pytest.approx(rim.item(), abs=1e-6)
    for wrong in ((3, 3, 3, 5), (0, 0, 7, 2), (-1, 0, 2, 2)):
        with pytest.raises(cxrkit.ParameterError, match="does not fit"):
            lab.change_region(image, wrong)
    with pytest.raises(cxrkit.ParameterError, match="known: black"):
        lab.change_region(image, box, "red")


def test_what_if_changes_the_image_and_tells_the_logits(explorer):
    image, masks = torch.ones(1, 10, 10), torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, :5] = True
    bench = lab.what_if(explorer, image, "one", masks=masks, truth=masks, targets=torch.tensor([1.0, 0.0]))
    across, down, (fill, button), said = (
        each.children if hasattr(each, "children") else each for each in bench.children
    )
    across.value, down.value, fill.value = (0, 10), (0, 5), "black"
    button.click()
    assert explorer.bundle["images"][0]["id"] == "one, change 1: black"
    assert torch.equal(explorer._sample(0)["masks"], masks)  # what scores and outlines need
    assert explorer.answer({"type": "image", "image": 0})["record"]["targets"] == [1, 0]
    assert re.findall(r"<td>([-+.\d]+)</td>", said.value)[:3] == ["10.00", "5.00", "-5.00"]
    assert "<img" not in said.value
    across.value = (5, 5)
    button.click()
    assert "does not fit" in said.value
    assert len(explorer.bundle["images"]) == 1
