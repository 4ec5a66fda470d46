"""Every method: labels select and order, chunks and surroundings change no map, and a call leaves all as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz.state import Before
from test_attribution import EVERY, Tiny
from torch import nn

import cxrkit
from cxrkit import AttributionError

BASELINE = torch.rand(5, 1, 16, 12, generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.arange(3).repeat_interleave(64).view(1, 16, 12)
OPTIONS = {
    "smoothgrad": {"n_samples": 2},
    "integrated_gradients": {"n_steps": 3, "baseline": BASELINE},
    "deeplift": {"n_baselines": 2, "baseline": BASELINE},
    "guided_ig": {"n_steps": 2, "max_distance": 0.2, "baseline": BASELINE},
    "blur_ig": {"n_steps": 2, "max_sigma": 2},
    "xrai": {"n_steps": 2, "segments": SEGMENTS.expand(5, 1, 16, 12)},
    "occlusion": {"window": 8, "stride": 4, "fill": BASELINE},
}
CASES = [(method, OPTIONS.get(method, {})) for method in EVERY if method != "bcos"]
CASES += [
    ("normgrad", {"layers": ["conv1", "last"], "virtual_layer": "conv3x3"}),
    ("xrai", OPTIONS["xrai"] | {"algorithm": "fast"}),
]
every_case = pytest.mark.parametrize(("method", "options"), CASES)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def images():
    return torch.rand(5, 1, 16, 12, generator=torch.Generator().manual_seed(1))


def same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance * expected.abs().max().item(), rtol=1e-4)


@every_case
def test_labels_select_and_order(method, options, tiny, images):
    everything = cxrkit.attribute(tiny, images, method, **options)
    assert everything.shape == (5, 3, 16, 12)
    assert everything.dtype == torch.float32
    for labels in ([2, 0], torch.tensor([2, 0]), iter([2, 0])):
        same(cxrkit.attribute(tiny, images, method, labels=labels, **options), everything[:, [2, 0]])
    same(cxrkit.attribute(tiny, images, method, labels=np.int64(1), **options), everything[:, [1]])
    tiny.labels = ("Mass", "Nodule", "Effusion")
    same(cxrkit.attribute(tiny, images, method, labels=["Effusion", "Mass"], **options), everything[:, [2, 0]])
    same(cxrkit.attribute(tiny, images, method, labels="Nodule", **options), everything[:, [1]])


@every_case
def test_maps_do_not_depend_on_the_chunk(method, options, tiny, images):
    whole = cxrkit.attribute(tiny, images, method, **options)
    for chunk in (1, 2, 4):
        same(cxrkit.attribute(tiny, images, method, chunk=chunk, **options), whole)


@every_case
def test_surroundings_do_not_change_maps(method, options, tiny, images):
    expected = cxrkit.attribute(tiny, images, method, **options)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        same(cxrkit.attribute(tiny, images, method, **options), expected)
    with torch.inference_mode():
        same(cxrkit.attribute(tiny, images.clone(), method, **options), expected)
    assert not cxrkit.attribute(tiny, images.clone().requires_grad_(), method, **options).requires_grad
    assert cxrkit.attribute(tiny.double(), images.double(), method, **options).dtype == torch.float64


@pytest.mark.parametrize("failing", [False, True])
@every_case
def test_the_network_and_the_images_are_left_as_they_were(method, options, failing, tiny, images, monkeypatch):
    tiny.train()
    tiny.last.eval()
    tiny.conv2.weight.requires_grad_(False)
    before = Before(tiny, images)
    if failing:

        def broken(self, x):
            assert not tiny.training
            raise RuntimeError("out of memory")

        monkeypatch.setattr(nn.Linear, "forward", broken)
        with pytest.raises(AttributionError, match="out of memory"):
            cxrkit.attribute(tiny, images, method, **options)
    else:
        first = cxrkit.attribute(tiny, images, method, **options)
        assert torch.equal(cxrkit.attribute(tiny, images, method, **options), first)
    assert before.changes() == []


@pytest.mark.parametrize(
    "method", ["gradcam", "gradcam_plus_plus", "layercam", "scorecam", "normgrad", "guided_gradcam"]
)
def test_the_last_map_is_explained_unless_the_network_or_the_caller_names_another(method, tiny, images):
    default = cxrkit.attribute(tiny, images, method)
    same(cxrkit.attribute(tiny, images, method, layer="last"), default)
    tiny.explained_layer = "conv2"
    own = cxrkit.attribute(tiny, images, method)
    same(cxrkit.attribute(tiny, images, method, layer=tiny.conv2), own)
    assert not torch.allclose(own, default)
