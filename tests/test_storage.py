"""Models on disk: what is written comes back, and nothing damaged or mismatched is loaded."""

from __future__ import annotations

import json
import os

import pytest
import torch

from cxrkit.errors import ModelError
from cxrkit.files import checksum
from cxrkit.models import Classifier, create, load, save, storage

LABELS = ("effusion", "ødem")


@pytest.fixture
def saved(tmp_path):
    model = create("bcos_resnet18", LABELS, antialias="blur", protocol="authors", seed=2).eval()
    return model, save(model, tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"antialias": "flc", "protocol": "authors"}),
        ("bcos_resnet18", {"antialias": "flc_authors"}),
        ("bcos_resnet18", {"logit_bias": -1.5}),
        ("bcos_resnet18", {"antialias": "flc", "antialias_stem": True}),
    ],
)
def test_a_model_comes_back_as_it_was(tmp_path, name, options):
    model = create(name, LABELS, seed=3, **options).train()
    images = torch.rand(4, 1, 32, 32)
    model(images)  # moves the running statistics away from their start
    model.card["training"] = {"epochs": 3}
    path = save(model, tmp_path / "model.safetensors")
    again = load(path)
    assert not again.training
    assert torch.equal(again(images), model.eval()(images))
    assert again.labels == LABELS
    assert again.logit_bias == model.logit_bias
    assert again.card == model.card
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), model.buffers(), strict=True))
    assert load(save(again, tmp_path / "twice")).card == model.card


def test_the_card_tells_what_the_model_is(saved):
    _, path = saved
    assert path.name == "model.safetensors"
    assert sorted(os.listdir(path.parent)) == ["model.json", "model.safetensors"]
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert "Not a medical device" in card["notice"]
    assert "not for clinical use" in card["notice"]
    assert card["labels"] == list(LABELS)
    assert card["antialias"] == "blur"
    assert len(card["file"]["sha256"]) == 64
    assert str(path.parent) not in json.dumps(card)


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_damaged_weights_are_refused_by_name(saved, damage):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "garbled": b"x" * 4000 + content[4000:], "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(path)
    card = path.with_suffix(".json")
    described = json.loads(card.read_text(encoding="utf-8"))
    described["file"]["sha256"] = checksum(path)
    card.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.safetensors can't be read"):
        load(path)


def test_weights_of_another_model_are_refused(saved, tmp_path):
    _, path = saved
    other = save(create("bcos_resnet18", LABELS), tmp_path / "other")
    os.replace(other, path)
    with pytest.raises(ModelError, match="checksums differ"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet19"}, "unknown network 'resnet19'"),
        ({"antialias": "none"}, r"model\.safetensors doesn't fit .* Missing .*layer2"),
        ({"labels": ["a", "b", "c"]}, r"fc\.linear\.weight"),
        ({"labels": ["a", "a"]}, "distinct"),
        ({"logit_bias": "none"}, "can't be built"),
        ({"format": 99}, "format 99"),
        ({"file": None}, "sha256"),
    ],
)
def test_a_card_that_doesnt_fit_is_refused(saved, change, message):
    _, path = saved
    card = path.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load(path)


def test_missing_and_broken_cards_are_refused(saved):
    _, path = saved
    card = path.with_suffix(".json")
    card.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.json is not readable"):
        load(path)
    card.write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="no model card"):
        load(path)
    card.unlink()
    with pytest.raises(ModelError, match=r"model\.json is missing"):
        load(path)
    with pytest.raises(ModelError, match=r"nowhere\.safetensors is missing"):
        load(path.parent / "nowhere")


def test_an_interrupted_save_leaves_the_old_model(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(tensors, target):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["model.json", "model.safetensors"]
    assert torch.equal(load(path)(torch.ones(1, 1, 64, 64)), model(torch.ones(1, 1, 64, 64)))


def test_only_models_with_a_card_and_safetensors_are_saved(tmp_path):
    with pytest.raises(ModelError, match=r"cxrkit\.models\.create"):
        save(Classifier(torch.nn.Identity(), LABELS), tmp_path / "model")
    with pytest.raises(ModelError, match=r"\.safetensors, not \.pth"):
        save(create("resnet18", LABELS), tmp_path / "model.pth")


def test_a_saved_backbone_starts_another_label_set(saved):
    model, path = saved
    fresh = create("bcos_resnet18", ("nodule", "mass"), weights=path, antialias="blur")
    assert fresh.card["weights"]["random_layers"] == ["fc.linear"]
    assert torch.equal(fresh.network.layer2[0].conv1[0].linear.weight, model.network.layer2[0].conv1[0].linear.weight)
    same = create("bcos_resnet18", LABELS, weights=path, antialias="blur")
    assert same.card["weights"]["random_layers"] == []
    assert torch.equal(same.network.fc.linear.weight, model.network.fc.linear.weight)
