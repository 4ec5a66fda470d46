"""Results of attribution as one file: the round trip, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import cxrkit
import cxrkit.attribution.normgrad  # registers the method
from cxrkit import AttributionError, DataError, ParameterError
from cxrkit.attribution import result
from cxrkit.attribution.result import Attribution, explain

WHEN = "2026-01-02T03:04:05+00:00"


class Tiny(nn.Module):
    def __init__(self, labels=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 3)
        self.norm.running_mean.normal_()
        if labels is not None:
            self.labels = labels

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def named():
    return Tiny(("Mass", "Nodule", "Effusion")).eval()


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 6)


@pytest.fixture
def made(named, images):
    return explain(named, images, "gradcam", ["Effusion", "Mass"], image_ids=["a", "b", "c", "d"], created=WHEN)


def same(a, b):
    assert torch.equal(a.maps, b.maps)
    assert torch.equal(a.logits, b.logits)
    assert (a.maps.dtype, a.logits.dtype) == (b.maps.dtype, b.logits.dtype)
    for field in dataclasses.fields(a):
        if field.name not in ("maps", "logits"):
            assert getattr(a, field.name) == getattr(b, field.name)


# What is told


def test_maps_are_those_of_attribute_and_logits_those_of_the_model_in_evaluation_mode(named, images):
    named.train()
    found = explain(named, images, "gradcam", ["Effusion", "Mass"], chunk=3, progress=False)
    assert named.training
    assert all(p.requires_grad for p in named.parameters())
    torch.testing.assert_close(found.maps, cxrkit.attribute(named, images, "gradcam", ["Effusion", "Mass"]))
    named.eval()
    torch.testing.assert_close(found.logits, named(images)[:, [2, 0]].detach())
    assert not found.maps.requires_grad
    assert not found.logits.requires_grad
    assert found.labels == ("Effusion", "Mass")
    assert torch.equal(found.of("Mass"), found.maps[:, 1])
    assert found.image_ids is None


def test_labels_of_networks_without_names_are_their_indices(images):
    found = explain(Tiny().eval(), images, "saliency", iter([2, 0]))
    assert found.labels == ("2", "0")
    assert found.of(0).shape == (4, 8, 6)
    assert explain(Tiny().eval(), images, "saliency").labels == ("0", "1", "2")
    with pytest.raises(ParameterError, match="label '1'"):
        found.of(1)


def test_a_label_by_index_is_told_by_its_name(named, images):
    found = explain(named, images, "saliency", np.int64(1))
    assert found.labels == ("Nodule",)
    with pytest.raises(ParameterError, match="Nodule"):
        found.of("Nodul")


def test_options_are_told_whole_with_defaults_and_presets(named, images):
    found = explain(named, images, "normgrad", virtual_layer="bias", chunk=2)
    assert found.options == {"virtual_layer": "bias", "layer": "norm", "layers": None, "protocol": "corrected"}
    assert found.output == "logit"
    baseline = torch.rand(4, 1, 8, 6, dtype=torch.float64)
    told = explain(named, images, "integrated_gradients", baseline=baseline, n_steps=2).options["baseline"]
    assert told["shape"] == [4, 1, 8, 6]
    assert told["dtype"] == "float64"
    assert len(told["sha256"]) == 64
    other = explain(named, images, "integrated_gradients", baseline=baseline.roll(1), n_steps=2).options["baseline"]
    assert other["sha256"] != told["sha256"]
    assert explain(named, images, "gradcam", layer=named.conv).options["layer"] == "conv"
    several = explain(named, images, "normgrad", output="probability", layers=(named.conv, "norm"))
    assert several.options["layers"] == ["conv", "norm"]
    assert several.output == "probability"


def test_a_preset_is_told_by_its_settings(images):
    @cxrkit.attribution.registry.method(
        "gradient",
        papers=(),
        meaning="-",
        formula="-",
        signed=True,
        forwards="0",
        backwards="0",
        presets={"covid": {"window": 50, "output": "probability"}},
    )
    def flat(explained, images, *, window: int = 3, stride: float = float("inf"), fill=torch.relu):
        return images.new_ones(len(images), explained.scores(explained.logits(images)).shape[1], *images.shape[-2:])

    try:
        found = explain(Tiny(), images, "flat", preset="covid")
        assert found.output == "probability"
        assert found.options == {"window": 50, "stride": "Infinity", "fill": "relu"}
        given = explain(
            Tiny(), images, "flat", preset="covid", window=np.int64(4), output="logit", fill=Path("folder", "fill.png")
        )
        assert given.output == "logit"
        assert given.options == {"window": 4, "stride": "Infinity", "fill": "fill.png"}
    finally:
        del cxrkit.attribution.registry._entries["flat"]


def test_model_versions_and_time_are_told(named, images, made):
    assert made.model_card == {"class": "Tiny"}
    assert made.created == WHEN
    assert made.versions["cxrkit"] == cxrkit.__version__
    assert set(made.versions) == {"cxrkit", "torch", "numpy", "python"}
    assert explain(named, images, "saliency").created.endswith("+00:00")
    assert repr(made) == "Attribution(gradcam of the logit of Effusion, Mass; 4 images, 8 x 6)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.maps = made.logits


def test_the_card_of_a_classifier_is_told_without_the_place_of_its_weights(tmp_path):
    from cxrkit.models import create, save

    labels = tuple(f"label {i}" for i in range(5))
    weights = save(create("resnet18", labels), tmp_path / "weights")
    model = create("resnet18", labels, weights=str(weights))
    found = explain(model, torch.rand(1, 1, 32, 32), "saliency", chunk=1)
    assert found.model_card["architecture"] == "resnet18"
    assert found.model_card["weights"]["file"] == "weights.safetensors"
    assert (
        repr(found) == "Attribution(saliency of the logit of label 0, label 1, label 2 and 2 more; 1 images, 32 x 32)"
    )
    path = found.save(tmp_path / "maps")
    same(Attribution.load(path), found)
    assert str(tmp_path).encode() not in path.read_bytes()


# The file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_round_trip_is_exact(dtype, tmp_path, named, images):
    options = {"baseline": torch.rand(1, 1, 8, 6), "n_steps": 2}
    found = explain(
        named.to(dtype),
        images.to(dtype),
        "integrated_gradients",
        **options,
        image_ids=(1, "ß", "c/d", ""),
        created=WHEN,
    )
    assert found.image_ids == ("1", "ß", "c/d", "")
    path = found.save(tmp_path / "new" / "maps")
    assert path == tmp_path / "new" / "maps.safetensors"
    back = Attribution.load(tmp_path / "new" / "maps")
    same(back, found)
    assert back.maps.dtype == dtype
    assert list(path.parent.iterdir()) == [path]
    same(Attribution.load(back.save(path)), found)


def test_maps_that_are_views_are_written_whole(tmp_path, made):
    turned = dataclasses.replace(made, maps=made.maps.transpose(2, 3), image_ids=None)
    same(Attribution.load(turned.save(tmp_path / "maps.safetensors")), turned)


def test_a_failing_write_leaves_the_old_file(tmp_path, made, monkeypatch):
    path = made.save(tmp_path / "maps")
    before = path.read_bytes()

    def broken(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(result, "save_file", broken)
    other = dataclasses.replace(made, maps=made.maps + 1)
    with pytest.raises(OSError, match="disk full"):
        other.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# What is refused


def rewritten(path, tensors=None, **told):
    """The file with some of its content changed; None takes a field away."""
    with safe_open(path, framework="pt") as file:
        old = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | told
    old |= tensors or {}
    save_file(
        {name: value for name, value in old.items() if value is not None},
        path,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "cxrkit.attribution 2"}, "is no attribution in the format"),
        ({"method": None}, "'method'"),
        ({"tensors": {"logits": None}}, "'logits'"),
        ({"colour": "1"}, "'colour'"),
        ({"tensors": {"masks": torch.ones(1)}}, "'masks'"),
        ({"labels": "[1"}, "labels is no JSON"),
        ({"labels": '["Mass"]'}, "labels must be a tuple of 2 names"),
        ({"labels": '"ab"'}, "labels must be a tuple of 2 names; got 'ab'"),
        ({"image_ids": '["a"]'}, "image_ids must be a tuple of 4 names"),
        ({"method": "3"}, "method must be a name; got 3"),
        ({"output": '"logits"'}, "output must be 'logit' or 'probability'; got 'logits'"),
        ({"created": '"yesterday"'}, "created must be a time in ISO 8601; got 'yesterday'"),
        ({"options": "[]"}, "options must be a dict"),
        ({"refused": "[[1]]"}, "Refusal"),
        ({"tensors": {"maps": torch.ones(4, 8, 6)}}, r"maps must be a tensor \[B, L, H, W\].*got .*\[4, 8, 6\]"),
        ({"tensors": {"maps": torch.ones(4, 2, 8, 6).half()}}, "maps must be .*float32 or float64; got .*float16"),
        ({"tensors": {"maps": torch.full((4, 2, 8, 6), torch.nan)}}, "maps must be finite"),
        ({"tensors": {"logits": torch.ones(4, 3)}}, r"logits must be a tensor \[4, 2\] like maps.*got .*\[4, 3\]"),
    ],
)
def test_files_that_do_not_hold_an_attribution_are_refused(change, message, tmp_path, made):
    path = made.save(tmp_path / "maps")
    rewritten(path, **change)
    with pytest.raises(DataError, match=message) as error:
        Attribution.load(path)
    assert "maps.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not tensors at all", "short"])
def test_files_that_are_damaged_or_something_else_are_refused(content, tmp_path, made):
    path = made.save(tmp_path / "maps")
    path.write_bytes(path.read_bytes()[:-5] if content == "short" else content)
    with pytest.raises(DataError, match=r"maps\.safetensors is damaged or no safetensors file"):
        Attribution.load(path)


def test_missing_files_folders_and_other_suffixes_are_refused(tmp_path, made):
    with pytest.raises(DataError, match=r"none\.safetensors: there is no such file"):
        Attribution.load(tmp_path / "none")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DataError, match="no such file"):
        Attribution.load(tmp_path / "folder")
    for call in (made.save, Attribution.load):
        with pytest.raises(DataError, match=r"stored as \.safetensors, not \.npz"):
            call(tmp_path / "maps.npz")
    weights = tmp_path / "weights.safetensors"
    save_file({"maps": torch.ones(1)}, weights)
    with pytest.raises(DataError, match="is no attribution"):
        Attribution.load(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_ids": ["a"]}, "image_ids must be 4 names"),
        ({"method": "gradcan"}, "'gradcam'"),
        ({"n_steps": 3}, "n_steps"),
        ({"labels": ["Mas"]}, "'Mass'"),
        ({"created": "today"}, "ISO 8601"),
    ],
)
def test_arguments_are_checked(arguments, message, named, images):
    with pytest.raises(ParameterError, match=message):
        explain(named, images, **{"method": "gradcam", **arguments})


def test_image_ids_are_checked_before_the_work(named, images, monkeypatch):
    monkeypatch.setattr(result, "attributed", lambda *args, **kwargs: pytest.fail("worked already"))
    with pytest.raises(ParameterError, match="image_ids"):
        explain(named, images, "gradcam", image_ids=["a"])
    with pytest.raises(AttributionError, match="images must be a tensor"):
        explain(named, images.numpy(), "gradcam", image_ids=["a"])


def test_the_file_can_be_read_with_safetensors_alone(tmp_path, made):
    with safe_open(made.save(tmp_path / "maps"), framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("maps"), made.maps.numpy())
        told = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
    assert told["labels"] == ["Effusion", "Mass"]
    assert told["options"]["layer"] == "norm"
