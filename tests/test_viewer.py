"""The viewer's Python side: packing, the page fragment, and the live widget without a browser."""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import cxrkit
from cxrkit.view import codec, viewer

LABELS = ["Effusion", "Mass", "Nodule"]
THRESHOLDS = np.arange(21) * codec.THRESHOLD_STEP


def energy_pointing_game(values, region, threshold):
    """Straight from paper `bcos`, Eq. 2 and 3, one cell at a time."""
    inside = total = held = 0.0
    for value, share in zip(values.ravel().tolist(), region.ravel().tolist(), strict=True):
        held += share * abs(value)
        if value > 0 and value >= threshold * values.max():
            inside, total = inside + share * value, total + value
    return inside / total, inside / held


def smooth(rng, size=96):
    coarse = torch.from_numpy(np.maximum(rng.normal(size=(1, 1, 7, 7)), 0))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0, 0].numpy()


MAPS = {
    "smooth": smooth,
    "heavy-tailed": lambda rng: np.abs(rng.standard_t(2, size=(96, 96))) * (0.1 + smooth(rng)),
    "signed": lambda rng: rng.laplace(size=(96, 96)) * smooth(rng) * 1e-6,
}


@pytest.mark.parametrize("kind", MAPS)
def test_packing_leaves_the_energy_pointing_game_as_it_was(kind):
    rng = np.random.default_rng(1)
    region = np.zeros((96, 96))
    region[20:50, 30:70] = 1
    for _ in range(3):
        raw = MAPS[kind](rng)
        shown = codec.unpack_map(codec.pack_map(raw), raw.shape)
        for threshold in (0.0, 0.05, 0.35, 0.7, 1.0):
            expected = energy_pointing_game(raw, region, threshold)
            assert energy_pointing_game(shown, region, threshold) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("kind", MAPS)
def test_shown_scores_agree_with_the_metric_of_the_tables(kind):
    raw = MAPS[kind](np.random.default_rng(2))
    shown = torch.from_numpy(codec.unpack_map(codec.pack_map(raw), raw.shape)).float()
    mask = torch.zeros(96, 96, dtype=torch.bool)
    mask[30:60, 40:90] = True
    for threshold in (0.0, 0.3, 0.85):
        for score in ("precision", "recall"):
            of = [
                cxrkit.metrics.energy_pointing_game(values, mask, kind=score, threshold=threshold).item()
                for values in (shown, torch.from_numpy(raw).float())
            ]
            assert of[0] == pytest.approx(of[1], abs=5e-3)


def test_smaller_smooth_maps_score_as_at_full_size():
    raw = smooth(np.random.default_rng(3), size=224)
    mask = np.zeros((224, 224))
    mask[61:130, 40:111] = 1
    shown = codec.unpack_map(codec.pack_map(codec.area_resize(raw, 96, 96)), (96, 96))
    region = codec.area_resize(mask, 96, 96)
    assert region.mean() == pytest.approx(mask.mean())
    for threshold in (0.0, 0.5):
        expected = energy_pointing_game(raw, mask, threshold)
        assert energy_pointing_game(shown, region, threshold) == pytest.approx(expected, abs=2e-2)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (9, 11), elements=st.floats(-1e3, 1e3, width=32)))
def test_packing_keeps_signs_extremes_and_the_side_of_every_threshold(raw):
    shown = codec.unpack_map(codec.pack_map(raw), raw.shape)
    assert raw.max() <= 0 or shown.max() == raw.max()
    assert raw.min() >= 0 or shown.min() == raw.min()
    assert (shown * raw >= 0).all()
    assert np.abs(shown - raw).max() <= 0.0051 * np.abs(raw).max()
    if raw.max() > 0:
        for threshold in THRESHOLDS[1:]:
            away = np.abs(raw - threshold * raw.max()) > 1e-9 * raw.max()  # equal up to rounding may fall either way
            assert ((shown >= threshold * shown.max()) == (raw >= threshold * raw.max()))[away].all()


@pytest.mark.parametrize("raw", [np.zeros((4, 4)), -np.ones((4, 4)), np.full((4, 4), 1e-30)])
def test_degenerate_maps_survive(raw):
    np.testing.assert_allclose(codec.unpack_map(codec.pack_map(raw), raw.shape), raw)


def test_packing_refuses_what_is_not_finite():
    with pytest.raises(cxrkit.ParameterError, match="NaN or infinite"):
        codec.pack_map(np.array([[0.0, np.nan]]))


def test_area_resize_keeps_mass_and_area():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 224, 200))
    small = codec.area_resize(values, 96, 86)
    np.testing.assert_allclose(small.mean((1, 2)), values.mean((1, 2)), atol=1e-12)
    np.testing.assert_allclose(codec.area_resize(values, 112, 100)[0, 0, 0], values[0, :2, :2].mean())
    np.testing.assert_allclose(codec.area_resize(values, 224, 200), values)


def filled(labels=LABELS, map_size=24, size=48, images=2, **series):
    rng = np.random.default_rng(0)
    bundle = viewer.Bundle(labels, note="Synthetic images. Not for clinical use.", map_size=map_size)
    for number in range(images):
        mask = np.zeros((len(labels), size, size), dtype=bool)
        mask[0, 8:20, 10:30] = True
        targets = torch.tensor([1.0, 0.0, torch.nan])
        bundle.add_image(torch.rand(1, size, size), f"image-{number}", masks=mask, targets=targets)
    maps = rng.normal(size=(images, len(labels), size, size))
    logits = torch.tensor([[-1.0, -3.0, 2.0]]).repeat(images, 1)
    bundle.add_series("ResNet", "bcos", maps, logits, **series)
    return bundle


def test_bundle_keeps_present_and_predicted_labels_only():
    assert sorted(filled().data["series"][0]["maps"]) == ["0/0", "0/2", "1/0", "1/2"]
    assert len(filled(keep="all").data["series"][0]["maps"]) == 6
    only = [[False, True, False], [False, False, False]]
    assert list(filled(keep=only).data["series"][0]["maps"]) == ["0/1"]


def test_bundle_records_what_the_page_shows():
    data = filled().data
    image, series = data["images"][0], data["series"][0]
    assert image["outlines"] == {0: [[10, 8, 30, 8], [10, 20, 30, 20], [10, 8, 10, 20], [30, 8, 30, 20]]}
    assert (image["size"], image["grid"], image["targets"]) == ([48, 48], [24, 24], [1, 0, None])
    assert series["logits"][0] == [-1, -3, 2]
    assert series["probabilities"][0] == pytest.approx([0.268941, 0.047426, 0.880797])


def test_boxes_that_overlap_have_one_outline():
    mask = np.zeros((3, 20, 20), dtype=bool)
    mask[0, 2:8, 2:8] = mask[0, 6:12, 6:12] = True
    record = viewer.image_record(np.zeros((20, 20)), "a", LABELS, masks=mask)
    assert sorted(record["masks"]) == [0]
    edge = [[2, 2, 8, 2], [8, 6, 12, 6], [2, 8, 6, 8], [6, 12, 12, 12]]
    edge += [[2, 2, 2, 8], [6, 8, 6, 12], [8, 2, 8, 6], [12, 6, 12, 12]]
    assert record["outlines"] == {0: edge}


def test_a_round_region_is_left_to_the_grid():
    rows, columns = np.mgrid[:64, :64]
    mask = np.zeros((3, 64, 64), dtype=bool)
    mask[0] = (rows - 32) ** 2 + (columns - 32) ** 2 < 700
    record = viewer.image_record(np.zeros((64, 64)), "a", LABELS, masks=mask)
    assert (record["outlines"], list(record["masks"])) == ({}, [0])


def test_large_images_are_shown_smaller_in_their_own_coordinates():
    image = np.zeros((400, 200))
    image[:, 100:] = 1
    mask = np.zeros((3, 400, 200), dtype=bool)
    mask[1, 40:80, 20:60] = True
    record = viewer.image_record(image, "a", LABELS, masks=mask, map_size=50, image_size=100)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(record["png"]))))
    assert (shown.shape, shown[:, :25].max(), shown[:, 25:].min()) == ((100, 50), 0, 255)
    assert (record["size"], record["grid"], record["outlines"][1][0]) == ([400, 200], [50, 25], [20, 40, 60, 40])


def test_add_sample_takes_a_dataset_row():
    sample = SimpleNamespace(
        image=torch.rand(1, 16, 16), image_id="p1", mask=torch.ones(3, 16, 16) > 0, truth=None, target=torch.ones(3)
    )
    bundle = viewer.Bundle(LABELS)
    bundle.add_sample(sample)
    assert bundle.data["images"][0]["outlines"][2][1] == [0, 16, 16, 16]


def test_hostile_text_stays_inside_the_data():
    hostile = ["</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>"]
    html = viewer.static_html(filled(labels=hostile))
    data = re.search(r'<script type="application/json">(.*?)</script>', html, re.S).group(1)
    assert "<" not in data
    assert json.loads(data)["labels"] == hostile
    assert html.count("<script") == 2


@pytest.mark.parametrize(("map_size", "fits"), [(80, True), (96, False)])
def test_page_stays_within_three_megabytes_or_is_refused(map_size, fits):
    # 12 images, 14 labels, 6 series, 4 labels of each image kept; nothing compresses worse than this noise.
    rng = np.random.default_rng(0)
    bundle = viewer.Bundle([f"label {i}" for i in range(14)], map_size=map_size, image_size=128)
    for number in range(12):
        bundle.add_image(rng.uniform(size=(160, 160)), f"image {number}", targets=np.arange(14) < 4)
    maps = rng.normal(size=(12, 14, 160, 160))
    for method in "abcdef":
        bundle.add_series("model", method, maps, np.full((12, 14), -2.0) + (np.arange(14) == 0))
    assert len(bundle.data["series"][0]["maps"]) == 48
    if fits:
        assert len(viewer.static_html(bundle)) < 3_000_000
    else:
        with pytest.raises(cxrkit.ParameterError, match="map_size"):
            viewer.static_html(bundle)


def test_nothing_in_the_page_points_outside():
    html = viewer.static_html(filled())
    assert set(re.findall(r"https?://[\w./]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|import)\s*\(|@import|url\((?!\"data:)", html)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda b: viewer.Bundle([]), "labels"),
        (lambda b: viewer.Bundle(["a", "a"]), "labels"),
        (lambda b: viewer.static_html(viewer.Bundle(["a"])), "no image"),
        (lambda b: b.add_image(np.zeros((3, 8, 8)), "rgb"), "'rgb'"),
        (lambda b: b.add_image(np.zeros((8, 8)), "x", masks=np.zeros((2, 8, 8))), "masks of image 'x'"),
        (lambda b: b.add_series("ResNet", "bcos", np.zeros((2, 3, 48, 48)), np.zeros((2, 3))), "added before"),
        (lambda b: b.add_series("m", "x", np.zeros((2, 3, 48, 48)), np.zeros((2, 2))), "logits of series 'm', 'x'"),
        (lambda b: b.add_series("m", "x", np.zeros((2, 3, 9, 9)), np.ones((2, 3))), "'image-0', 'Effusion'"),
        (lambda b: b.add_series("m", "x", np.full((2, 3, 48, 48), np.nan), np.ones((2, 3))), "NaN"),
        (lambda b: b.start(panels=[("ResNet", "xrai")]), "panels"),
        (lambda b: b.start(image=2), "image=2"),
        (lambda b: b.start(label="Fracture"), "Fracture"),
    ],
)
def test_wrong_input_is_named(act, message):
    with pytest.raises(cxrkit.ParameterError, match=re.escape(message)):
        act(filled())


def test_start_and_repr():
    bundle = filled().start(image=1, label="Mass", panels=[("ResNet", "bcos")])
    assert bundle.data["start"] == {"image": 1, "label": 1, "panels": [0]}
    assert bundle._repr_html_() == viewer.static_html(bundle)


# ---- The live widget ----


class Linear(torch.nn.Module):
    labels = ("Mass", "Effusion")  # another order than the dataset's, and one label fewer

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(16 * 16, 2)

    def forward(self, images):
        assert not self.training
        return self.dense(images.flatten(1))


def refuse(model, image, method, label):
    if method == "gradcam":
        raise cxrkit.AttributionError("gradcam: <b>no convolution</b> to look at")
    if method == "broken":
        raise ZeroDivisionError("by zero")
    refuse.calls += 1
    row = list(model.labels).index(label)
    return (model.dense.weight[row] * image.flatten()).reshape(16, 16)


@pytest.fixture
def explorer(monkeypatch):
    widget = pytest.importorskip("cxrkit.view.widget")
    refuse.calls = 0
    samples = [
        SimpleNamespace(
            image=torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(number)),
            image_id=f"row-{number}",
            mask=torch.zeros(3, 16, 16, dtype=torch.bool),
            target=torch.tensor([1.0, 0.0, torch.nan]),
            truth=None,
        )
        for number in range(3)
    ]
    methods = ["input_x_gradient", "gradcam", "broken"]
    made = widget.Explorer(
        {"linear": Linear().train()}, samples, methods, labels=LABELS, explain=refuse, background=False
    )
    made.sent = []
    monkeypatch.setattr(made, "send", lambda content, buffers=None: made.sent.append(content))
    return made


def ask(explorer, **question):
    explorer._handle_custom_msg({"key": "k", **question}, [])
    reply = explorer.sent[-1]
    assert reply["key"] == "k"
    json.dumps(reply, allow_nan=False)
    return reply


def test_explorer_answers_with_the_map_of_the_right_label(explorer):
    model = explorer.models["linear"]
    reply = ask(explorer, type="map", image=1, label=0, series=0)
    image = explorer._sample(1)["image"]
    expected = (model.dense.weight[1] * image.flatten()).reshape(16, 16).detach().numpy()
    shown = codec.unpack_map(reply["record"], (16, 16))
    np.testing.assert_allclose(shown, expected, atol=0.006 * np.abs(expected).max())
    logit = (expected.sum() + model.dense.bias[1]).item()
    assert reply["logit"] == pytest.approx(logit, abs=1e-5)
    assert reply["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    assert model.training
    ask(explorer, type="map", image=1, label=0, series=0)
    assert refuse.calls == 1


def test_explorer_sends_images_when_asked(explorer):
    assert [set(image) for image in explorer.bundle["images"]] == [{"id"}] * 3
    record = ask(explorer, type="image", image=2)["record"]
    assert (record["id"], record["size"], record["targets"]) == ("row-2", [16, 16], [1, 0, None])


def test_explorer_turns_errors_into_sentences(explorer):
    assert ask(explorer, type="map", image=0, label=1, series=1)["error"] == "gradcam: <b>no convolution</b> to look at"
    assert ask(explorer, type="map", image=0, label=1, series=2)["error"] == "ZeroDivisionError: by zero"
    assert "Nodule" in ask(explorer, type="map", image=0, label=2, series=0)["error"]
    assert "error" not in ask(explorer, type="map", image=0, label=1, series=0)


@pytest.mark.parametrize(
    "question",
    [
        {"type": "map", "image": 9, "label": 0, "series": 0},
        {"type": "map", "image": 0, "label": -1, "series": 0},
        {"type": "map", "image": 0, "label": "0", "series": 0},
        {"type": "map", "image": True, "label": 0, "series": 0},
        {"type": "map", "image": 0},
        {"type": "shell"},
        {},
    ],
)
def test_explorer_refuses_questions_it_does_not_know(explorer, question):
    assert "expected" in ask(explorer, **question)["error"]


def test_explorer_takes_an_own_image(explorer):
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[1, 1:5, 1:5] = True
    place = explorer.add_image(torch.ones(1, 16, 16), "<b>mine</b>", masks=masks)
    assert (place, explorer.bundle["images"][3], explorer.bundle["start"]) == (3, {"id": "<b>mine</b>"}, {"image": 3})
    assert ask(explorer, type="image", image=3)["record"]["outlines"][1][0] == [1, 1, 5, 1]
    assert "record" in ask(explorer, type="map", image=3, label=0, series=0)
    with pytest.raises(cxrkit.ParameterError, match="'wrong'"):
        explorer.add_image(torch.ones(3, 16, 16), "wrong")
    assert len(explorer.bundle["images"]) == 4


def test_explorer_computes_in_the_background_tells_how_far_and_stops(explorer, monkeypatch):
    widget = pytest.importorskip("cxrkit.view.widget")
    sent, go, begun = queue.Queue(), threading.Event(), threading.Event()

    def slow(model, image, method, label, progress):
        begun.set()
        monkeypatch.setattr(widget.time, "monotonic", lambda: 1e9)  # as if a while had passed
        progress(0.25)
        assert go.wait(20)
        progress(0.5)
        return image[0]

    made = widget.Explorer(explorer.models, explorer._dataset, ["slow"], labels=LABELS, explain=slow)
    monkeypatch.setattr(made, "send", lambda content, buffers=None: sent.put(content))
    for number, key in enumerate("abc"):
        made._handle_custom_msg({"type": "map", "image": number, "label": 0, "series": 0, "key": key}, [])
    assert begun.wait(20)
    assert sent.get(timeout=20) == {"key": "a", "type": "progress", "share": 0.25}
    made._handle_custom_msg({"type": "image", "image": 2, "key": "i"}, [])  # answered while a map is computed
    assert sent.get(timeout=20)["record"]["id"] == "row-2"
    for key in ("a", "b", "nobody"):
        made._handle_custom_msg({"type": "cancel", "key": key}, [])
    go.set()
    replies = {}
    while len(replies) < 3:
        reply = sent.get(timeout=20)
        if reply["type"] == "map":
            replies[reply["key"]] = reply
    assert "Stopped" in replies["a"]["error"]
    assert "Stopped" in replies["b"]["error"]
    assert "record" in replies["c"]
    assert made._waited == {}
