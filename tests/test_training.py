"""The training loop: what it may look at, what it keeps, and that it gives the same twice."""

from __future__ import annotations

import copy
import functools
import warnings
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import squares
import torch
import torch.nn.functional as F
from squares import CLOCKS, RICH, Squares, fit, parameters, same, tiny
from test_cache import write_folder
from torch import nn

import cxrkit
from cxrkit import DataError, ModelError, ParameterError
from cxrkit.data.files import FileRenderer
from cxrkit.study import training
from cxrkit.train import devices, loader, loop, scoring, setup
from cxrkit.train.parameters import TrainParameters


@pytest.fixture
def data():
    return squares.dataset()


def test_it_learns_and_never_looks_at_the_test_split(data):
    chosen = parameters(learning_rate=1e-3)
    result = loop.fit(setup.make_model(chosen, data.labels), data, chosen)
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]
    assert result.history["validation_auc"].max() > 0.9
    assert max(data.renderer.drawn) < 80
    predictions = scoring.predict(result.model, data.split("test"))
    assert len(predictions) == 16 * 2
    assert predictions["split"].unique().tolist() == ["test"]
    assert result.model.card["training"]["epoch"] == result.best_epoch


@pytest.mark.parametrize("criterion", ["auc", "f1", "accuracy", "loss"])
def test_the_best_epoch_on_the_validation_split_is_kept(data, criterion):
    result = fit(data, criterion=criterion, epochs=4)
    column = result.history[f"validation_{criterion}"] * (-1 if criterion == "loss" else 1)
    assert result.best_epoch == result.history["epoch"][column.idxmax()]
    part = data.split("validation")
    logits = scoring.logits_of(result.model, loader.Feed(part), 7)
    again = scoring.scores(logits, loader.target_table(part), loop.Loss())
    assert again[criterion] == pytest.approx(column.abs()[column.idxmax()], abs=1e-6)
    assert not result.model.training


def test_a_choice_on_the_test_split_is_told_beside_that_on_the_validation_split(data):
    result = fit(data, protocol="authors", criterion="loss", epochs=6, learning_rate=0.05)
    assert result.card["selection"] == "test"
    chosen = scoring.selections(result.history, "loss").set_index("chosen_on")
    assert chosen.loc["test", "epoch"] == result.best_epoch
    assert chosen.loc["test", "test_loss"] == result.history["test_loss"].min()
    assert chosen.loc["validation", "validation_loss"] == result.history["validation_loss"].min()
    assert chosen.loc["test", "test_loss"] <= chosen.loc["validation", "test_loss"]
    assert not any(name.startswith("test_") for name in fit(data, epochs=1).history)


@pytest.mark.parametrize("options", [{}, {**RICH, "epochs": 1}, {"workers": 1}, {"optimizer": "sgd"}])
def test_same_seed_same_weights_other_seed_others(data, options):
    first, second, other = (fit(data, **{"epochs": 1, **options, "seed": seed}) for seed in (1, 1, 2))
    assert same(first, second)
    assert not same(first, other)


def test_loading_processes_change_nothing_but_speed(data):
    assert same(fit(data, epochs=2, workers=0), fit(data, epochs=2, workers=2))


def test_the_global_random_state_is_left_alone(data):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(data, epochs=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_step_in_parts_is_the_same_step():
    """Without batch norm: sums over parts, divided by what the whole batch weighs, unknown targets included."""
    data = squares.dataset()
    data.table.loc[::3, "left"] = np.nan
    results = [
        fit(data, tiny("group", 0.0), batch_size=16, accumulate=parts, optimizer="sgd", learning_rate=0.1)
        for parts in (1, 4)
    ]
    for whole, parted in zip(*(result.model.parameters() for result in results), strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-5, atol=1e-6)
    losses = [result.history["train_loss"] for result in results]
    assert losses[0].to_numpy() == pytest.approx(losses[1].to_numpy(), rel=1e-5)


def test_one_step_is_one_step_of_the_optimiser_by_hand(data):
    model = tiny("group", 0.0)
    twin = tiny("group", 0.0)
    fit(data, model, epochs=1, batch_size=64, optimizer="sgd", momentum=0.0, weight_decay=0.1, clip_norm=0.05)
    train = data.split("train").batch(range(64))
    torch.nn.functional.binary_cross_entropy_with_logits(twin(train.images), train.targets).backward()
    norm = torch.cat([weight.grad.flatten() for weight in twin.parameters()]).norm()
    assert norm > 0.05
    for weight, expected in zip(model.parameters(), twin.parameters(), strict=True):
        step = expected.grad * 0.05 / norm + 0.1 * expected
        torch.testing.assert_close(weight, expected - 1e-2 * step, rtol=1e-4, atol=1e-6)


def test_training_stops_when_nothing_gets_better(data):
    result = fit(data, epochs=50, learning_rate=1e-9, stop_patience=2, batch_size=64)
    assert len(result.history) == result.best_epoch + 2


def test_a_loss_that_is_no_number_ends_with_what_to_do(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Loss, "total", lambda self, logits, targets: logits.sum() * float("nan"))
    with pytest.raises(ModelError, match=r"epoch 1, step 1, at learning rate 0.01; lower learning_rate"):
        fit(data)


def test_divergence_keeps_the_last_good_weights(data, tmp_path, monkeypatch):
    chosen = parameters(batch_size=32, learning_rate=1e-3, checkpoint_seconds=0.0)
    total, calls = loop.Loss.total, []

    def spoilt(self, logits, targets):
        calls.append(len(logits))
        return total(self, logits, targets) * (float("nan") if calls.count(32) == 4 else 1.0)

    monkeypatch.setattr(loop.Loss, "total", spoilt)
    model = setup.make_model(chosen, data.labels)
    with pytest.raises(ModelError, match=r"epoch 2, step 2.*last good weights, of epoch 1, are in .*last_good"):
        loop.fit(model, data, chosen, folder=tmp_path)
    kept = cxrkit.models.load(tmp_path / "last_good.safetensors")
    assert all(weight.isfinite().all() for weight in kept.parameters())
    assert len(list(tmp_path.glob("epoch*"))) == 2  # and the checkpoints stay


def test_divergence_first_seen_in_validation_ends_the_same_way(data, tmp_path, monkeypatch):
    chosen = parameters(batch_size=32, learning_rate=1e-3, checkpoint_seconds=0.0)
    logits_of, calls = loop.logits_of, []

    def spoilt(*values):
        calls.append(values)
        return logits_of(*values) * (float("inf") if len(calls) in (2, 3) else 1.0)

    monkeypatch.setattr(loop, "logits_of", spoilt)
    told = "logits of the validation split are no numbers in epoch {}, at learning rate 0.001; lower learning_rate"
    with pytest.raises(ModelError, match=told.format(2) + r".*of epoch 1, are in .*last_good.*epoch00002-step00000002"):
        loop.fit(setup.make_model(chosen, data.labels), data, chosen, folder=tmp_path / "second")
    with pytest.raises(ModelError, match=told.format(1) + r".*newest checkpoint is .*epoch00001-step00000002"):
        loop.fit(setup.make_model(chosen, data.labels), data, chosen, folder=tmp_path / "first")


def test_an_epoch_whose_value_is_no_number_is_never_the_best(data, monkeypatch):
    value = loop.value_of
    monkeypatch.setattr(loop, "value_of", lambda row, *names: float("nan") if row["epoch"] == 1 else value(row, *names))
    assert fit(data, epochs=3, stop_patience=1, learning_rate=1e-3).best_epoch >= 2


def test_exclusive_classes_are_trained_by_a_softmax():
    data = squares.dataset(exclusive=True)
    chosen = parameters(loss="cross_entropy", epochs=2, learning_rate=1e-3)
    result = loop.fit(setup.make_model(chosen, data.labels), data, chosen)
    predictions = scoring.predict(result.model, data.split("test"))
    assert predictions.groupby("image_id")["probability"].sum().to_numpy() == pytest.approx(1, abs=1e-6)
    with pytest.raises(DataError, match="exactly one class per image"):
        fit(loss="cross_entropy")


def test_an_added_class_is_for_images_without_finding():
    data = squares.dataset()
    data.table.loc[0, ["left", "right"]] = [np.nan, 0]
    data.table.loc[1, ["left", "right"]] = [np.nan, 1]
    more = setup.with_healthy_class(data, "none")
    assert more.labels == ("left", "right", "none")
    expected = (data.table[["left", "right"]] == 0).all(axis=1).astype(float)
    assert np.isnan(more.table["none"][0])
    assert more.table["none"][1:].tolist() == expected[1:].tolist()
    assert torch.equal(more[5].image, data[5].image)
    assert more.split("test")[0].target.shape == (3,)
    for taken in ("left", "patient_id"):
        with pytest.raises(ParameterError, match="already a label"):
            setup.with_healthy_class(data, taken)
    binary = TrainParameters(dataset_options={"view": "binary", "images": 30}, healthy_class="Healthy", size=32)
    loaded = setup.load_data(binary)
    assert loaded[0].truth.shape == (2, 32, 32)
    assert (loaded.table[list(loaded.labels)].sum(axis=1) == 1).all()


def test_an_added_class_leaves_boxes_where_the_preprocessing_puts_them(tmp_path):
    root = write_folder(tmp_path / "set", 6)
    (root / "boxes.csv").write_text("image_id,label,x_min,y_min,x_max,y_max\ni0,A,0,0,30,30\ni0,Z,0,0,9,9\n")
    with pytest.warns(UserWarning, match="1 of 2 boxes make no mask"):
        data = cxrkit.data.load("folder", root, size=32, preprocessing="bcos/rsna")
    more = setup.with_healthy_class(data, "none")
    assert torch.equal(more[0].mask[0], data[0].mask[0])
    assert more.notices == data.notices


def test_the_shift_refers_to_the_width_at_which_the_papers_code_augments(data):
    shifts = {}
    for protocol in ("corrected", "authors"):
        for model in ("resnet18", "bcos_resnet18"):
            chosen = parameters(epochs=1, augment="light", protocol=protocol, model=model)
            shifts[protocol, model] = loop.fit(tiny(), data, chosen).card["augmentation"]
    assert shifts.pop(("authors", "bcos_resnet18")) == "light, shift up to 3.1% of the side (original)"
    assert set(shifts.values()) == {"light, shift up to 14.3% of the side (after_resize)"}
    assert "augmentation" not in fit(data, epochs=1).card


def test_auxiliary_heads_weigh_in_and_plain_networks_are_called_plainly(data, monkeypatch):
    class Headed(torch.nn.Module):
        card = {"auxiliary": True}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.body, self.side = tiny("group", 0.0), torch.nn.Linear(32 * 32, 2)

        def forward(self, images, auxiliary=False):
            logits = self.body(images)
            if not auxiliary:
                return logits
            return logits, ((0.4, self.side(images.flatten(1))),) if self.training else ()

    model = Headed()
    before = model.side.weight.detach().clone()
    first = torch.nn.functional.binary_cross_entropy_with_logits
    batch = data.split("train").batch(range(64))
    expected = first(model.body(batch.images), batch.targets) + 0.4 * first(
        model.side(batch.images.flatten(1)), batch.targets
    )
    result = fit(data, model, epochs=1, batch_size=64)
    assert result.history["train_loss"][0] == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(before, model.side.weight)


def test_half_precision_only_where_maps_stay_complete(data, monkeypatch):
    chosen = parameters(model="bcos_resnet18", epochs=1, mixed_precision="bf16")
    model = setup.make_model(chosen, data.labels)
    images = data.batch(range(4)).images
    full, half, _ = devices.half_precision_errors(model, images, torch.bfloat16, "cpu")
    assert full < 1e-4 < half < 1e-2
    assert devices.precision_for(model, images, chosen)[0] == "bf16"
    monkeypatch.setattr(devices, "half_precision_errors", lambda *_: (1e-6, 0.5, 0.1))
    assert devices.precision_for(model, images, chosen) == (
        "no",
        "float32, because maps in bf16 add up to their logits only within 5.0e-01",
    )
    with pytest.raises(ParameterError, match="needs a GPU"):
        devices.precision_for(model, images, parameters(mixed_precision="fp16"))


def test_float32_on_a_gpu_says_which_products_are_in_tf32(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert devices._float32(gpu) == "float32 (convolutions in TF32)"
    assert devices._float32(torch.device("cpu")) == "float32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert devices._float32(gpu) == "float32"


def test_half_precision_trains_and_leaves_a_model_in_full_precision(data):
    result = fit(data, mixed_precision="bf16", learning_rate=1e-2, epochs=3)
    assert result.card["precision"].startswith("bf16; logits at the start differ")
    assert {weight.dtype for weight in result.model.parameters()} == {torch.float32}
    assert result.model(data.batch([0]).images).dtype == torch.float32
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]


class TwoHeads(nn.Module):
    """A network with a second head for training, as InceptionV3 has one, weighted 0.4."""

    labels, card = squares.LABELS, {"auxiliary": True}

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32 * 32, 2), nn.Linear(32 * 32, 2)

    def forward(self, images, auxiliary=False):
        flat = images.flatten(1)
        return (self.first(flat), ((0.4, self.second(flat)),)) if auxiliary else self.first(flat)


def test_a_second_head_is_trained_by_its_share_of_the_loss(data):
    model = TwoHeads()
    before = copy.deepcopy(model)
    train = data.split("train")
    options = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.1, "schedule": "constant"}
    trained = fit(data, model, epochs=1, batch_size=len(train), **options).model
    batch = train.batch(range(len(train)))
    logits, ((share, other),) = before(batch.images, auxiliary=True)
    (
        F.binary_cross_entropy_with_logits(logits, batch.targets)
        + share * F.binary_cross_entropy_with_logits(other, batch.targets)
    ).backward()
    for name, weight in before.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight - 0.1 * weight.grad, rtol=1e-4, atol=1e-6)


def test_compiling_is_asked_for_and_undone(data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = tiny()
    assert fit(data, model, epochs=1, compiled=True).model is model
    assert compiled == [model]


def test_a_compiled_network_learns_the_same(data, monkeypatch):
    # Traced for real; the last stage, which turns the graph into machine code for minutes, is left out.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = {"model": "bcos_resnet18", "epochs": 1, "batch_size": 64}
    losses = []
    for compiled in (True, False):
        chosen = parameters(**options, mixed_precision="bf16", compiled=compiled)
        found = loop.fit(setup.make_model(chosen, data.labels), data, chosen)
        losses.append(found.history[["train_loss", "validation_loss"]].iloc[0])
    torch._dynamo.reset()
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-3)


def test_images_in_memory_are_drawn_once_by_the_loading_processes(data, monkeypatch):
    plan = [[1, 2, 1], [2, 0], [3, 3]], [[0, 1], [5, 2, 6, 4, 7, 3]], [[7, 6, 5], [4]]
    part = data.select(range(8))
    expected = [[loader.Feed(part, keep=False)._images.batch(rows) for rows in order] for order in plan]
    draw = loader.Feed._loaded
    for workers in (0, 2):
        feed, drawn = loader.Feed(part, workers), []
        monkeypatch.setattr(loader.Feed, "_loaded", lambda self, o, drawn=drawn: drawn.append(o) or draw(self, o))
        next(feed.batches([[3]]))  # cut off
        for order, batches in zip(plan, expected, strict=True):
            for batch, other in zip(feed.batches(order), batches, strict=True):
                assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))
        monkeypatch.undo()
        assert drawn == [[[3]], [[1, 2], [0]], [[5, 6, 4, 7]]]
        assert feed.keeps
        assert feed._loader is None


def test_images_too_many_for_memory_are_drawn_anew(data, monkeypatch):
    monkeypatch.setattr(loader, "_SHARE", 0.0)
    assert not loader.Feed(data, workers=1).keeps
    assert loader.Feed(data, workers=0).keeps
    assert same(fit(data, epochs=2, workers=0), fit(data, epochs=2, workers=1))


def test_a_run_with_a_prepared_cache_draws_nothing_again(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", 20)
    cxrkit.data.prepare("folder", root, size=32, cache=tmp_path / "cache", workers=0, progress=False)
    chosen = parameters(dataset="folder", root=str(root), healthy_class="Healthy", epochs=1, loss="cross_entropy")
    kept = chosen.model_copy(update={"cache": str(tmp_path / "cache")})
    plain = setup.load_data(chosen).batch(range(20))
    monkeypatch.setattr(FileRenderer, "render", None)
    data = setup.load_data(kept)
    torch.testing.assert_close(data.batch(range(20)).images, plain.images, atol=0.501 / 255, rtol=0)
    fit(data, epochs=1, loss="cross_entropy")
    with pytest.raises(TypeError):
        setup.load_data(chosen)[0]


def test_a_device_that_waits_is_told_of(data, monkeypatch):
    monkeypatch.setattr(loop, "_PATIENT_SECONDS", 0.0)
    read = loader._Images.__getitem__

    def slow(self, row):
        torch.linalg.eigvalsh(torch.eye(200))
        return read(self, row)

    monkeypatch.setattr(loader._Images, "__getitem__", slow)
    told = r"epoch 1: the device waited \d+% of the time for images; they are drawn in this epoch and then kept; .*"
    with pytest.warns(UserWarning, match=told + r"raise workers \(now 1\)"):
        result = fit(data, epochs=1, workers=1)
    assert result.history["waiting_share"][0] > 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = fit(data, epochs=1, workers=0)  # the first epoch draws what stays in memory
    assert 0 < kept.history["waiting_share"][0] <= 1
    assert (kept.history["images_per_second"] * kept.history["seconds"]).tolist() == pytest.approx([64])


def test_a_device_that_is_not_there_is_refused(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="no CUDA device"):
        fit(data, device="cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="no MPS device"):
        fit(data, device="mps")


@pytest.mark.parametrize(("asked", "rank", "found"), [("cuda", 0, 0), ("cuda", 1, 1), ("auto", 1, 1), ("cuda:1", 0, 1)])
def test_a_process_takes_the_gpu_of_its_rank(monkeypatch, asked, rank, found):
    chosen = graphics_cards(monkeypatch, 2, rank)
    device = devices.chosen_device(parameters(device=asked))
    assert device == torch.device("cuda", found)
    assert chosen == [device]


@pytest.mark.parametrize(("asked", "rank"), [("cuda", 2), ("auto", 2), ("cuda:2", 0)])
def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch, asked, rank):
    chosen = graphics_cards(monkeypatch, 2, rank)
    with pytest.raises(ParameterError, match=f"device '{asked}': there are only 2 of them"):
        devices.chosen_device(parameters(device=asked))
    assert chosen == []


def graphics_cards(monkeypatch, count: int, rank: int) -> list[torch.device]:
    """As if there were so many; returns which are then chosen. torch refuses a device without a number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device("cuda", device.index)))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    return chosen


def test_an_empty_split_is_refused(data):
    data.table["split"] = "train"
    with pytest.raises(DataError, match="no image is in the split validation or test"):
        fit(data)


def test_every_image_once_per_epoch_whatever_the_parts_and_processes():
    steps = loader.plan_epoch(50, 16, seed=3, epoch=1)
    assert sorted(chain(*(step.rows for step in steps))) == list(range(50))
    assert [step.parts for step in steps] == [[step.rows] for step in steps]
    shares = [
        loader.plan_epoch(50, 16, seed=3, epoch=1, accumulate=3, process=process, processes=2) for process in (0, 1)
    ]
    for step, *parted in zip(steps, *shares, strict=False):
        assert [one.rows for one in parted] == [step.rows] * 2
        assert sorted(chain(*(part for one in parted for part in one.parts))) == sorted(step.rows)
        assert all(len(part) >= 2 for one in parted for part in one.parts)
    assert len(shares[0]) == 3  # the last two images are too few for two processes
    assert loader.plan_epoch(50, 16, seed=3, epoch=2)[0].rows != steps[0].rows
    with pytest.raises(ParameterError, match="3 training images in steps of 16"):
        loader.plan_epoch(3, 16, seed=0, epoch=1, processes=2)


def test_images_are_drawn_by_their_weights():
    weights = torch.tensor([0.0, 1.0, 3.0])
    rows = list(chain(*(step.rows for e in range(300) for step in loader.plan_epoch(3, 3, 0, e, weights))))
    assert rows.count(0) == 0
    assert rows.count(2) / len(rows) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(("count", "world"), [(1, 3), (2, 5), (7, 3), (6, 2)])
def test_every_process_has_equally_many_images_to_score_however_few_there_are(data, count, world):
    part = data.select(range(count))
    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 2))
    expected = scoring.logits_of(model, loader.Feed(part), 4)

    def accelerator(rank, gather):
        return SimpleNamespace(process_index=rank, num_processes=world, gather=gather)

    def alone(rank):
        kept = []
        one = accelerator(rank, lambda own: kept.append(own) or own.repeat(world, 1))
        scoring.logits_of(model, loader.Feed(part), 4, one)
        return kept[0]

    gathered = torch.cat([alone(rank) for rank in range(world)])
    found = scoring.logits_of(model, loader.Feed(part), 4, accelerator(0, lambda own: gathered))
    torch.testing.assert_close(found, expected)


def test_scores_against_scikit_learn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    logits, targets = torch.tensor(rng.normal(size=(60, 3))).float(), torch.tensor(rng.integers(0, 2, (60, 3))).float()
    found = scoring.scores(logits, targets, loop.Loss())
    assert found["f1"] == pytest.approx(metrics.f1_score(targets, logits > 0, average="macro"))
    assert found["accuracy"] == pytest.approx((targets.bool() == (logits > 0)).float().mean().item())
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(targets, logits, average="macro"))
    classes = torch.eye(3)[torch.tensor(rng.integers(0, 3, 60))]
    found = scoring.scores(logits, classes, loop.Loss("cross_entropy"), "softmax")
    assert found["f1"] == pytest.approx(metrics.f1_score(classes.argmax(1), logits.argmax(1), average="macro"))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(classes.argmax(1), logits.argmax(1)))
    chances = logits.double().softmax(1)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(classes.argmax(1), chances, multi_class="ovr"))


@pytest.mark.parametrize("criterion", ["auc", "f1"])
def test_cutoffs_are_those_of_the_validation_split(data, criterion):
    from cxrkit.metrics import operating_cutoffs

    chosen = parameters(epochs=2, criterion=criterion)
    result = loop.fit(setup.make_model(chosen, data.labels), data, chosen)
    part = scoring.predict(result.model, data.split("validation"))
    targets, chances = (part[name].to_numpy().reshape(-1, 2) for name in ("target", "probability"))
    rule = "f1" if criterion == "f1" else "youden"
    expected = operating_cutoffs(targets, chances, data.labels, rule)
    assert result.cutoffs["cutoff"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert result.cutoffs["criterion"].unique().tolist() == [rule]
    assert list(result.model.card["training"]["cutoffs"]) == list(data.labels)
    data.table.loc[data.table["split"] == "validation", "left"] = 0.0
    unknown = fit(data, epochs=1)
    assert unknown.card["cutoffs"]["left"] is None
    assert np.isnan(unknown.cutoffs["cutoff"][0])


def test_the_f1_of_an_added_class_is_that_of_the_finding(monkeypatch):
    from sklearn import metrics

    rng = np.random.default_rng(0)
    logits, sick = torch.tensor(rng.normal(size=(60, 2))).float(), torch.tensor(rng.integers(0, 2, 60))
    targets = torch.stack([sick, 1 - sick], 1).float()
    found = scoring.scores(logits, targets, loop.Loss("cross_entropy"), "softmax", healthy=True)
    assert found["f1"] == pytest.approx(metrics.f1_score(sick, logits[:, 0] > logits[:, 1]))
    data, asked, plain = squares.dataset(exclusive=True), [], scoring.scores
    monkeypatch.setattr(loop, "scores", lambda *values: asked.append(values[4]) or plain(*values))
    fit(data, epochs=1, loss="cross_entropy", healthy_class="right")
    fit(data, epochs=1, loss="cross_entropy")
    assert asked == [True, False]


def test_macro_auc_leaves_out_labels_of_one_class():
    targets = np.array([[0, 1, 0], [1, 1, 0], [1, 1, np.nan], [0, 1, 1]], dtype=float)
    scores = np.array([[0.1, 0, 0.2], [0.9, 0, 0.3], [0.8, 0, 0.9], [0.3, 0, 0.4]])
    assert scoring.macro_auc(targets, scores) == 1.0
    assert np.isnan(scoring.macro_auc(targets[:, 1:2], scores[:, 1:2]))


def test_the_command_makes_the_run_of_the_notebook(tmp_path, capsys):
    from cxrkit.study import runs

    file = tmp_path / "parameters.yaml"
    file.write_text("dataset_options: {view: binary, images: 40}\nsize: 32\nmodel: resnet18\nthreads: 1\nepochs: 3\n")
    arguments = [str(file), "epochs=1", f"results={tmp_path}", "checkpoint_seconds=0"]
    training.main(arguments)
    wanted = TrainParameters(
        dataset_options={"view": "binary", "images": 40}, size=32, model="resnet18", epochs=1, results=str(tmp_path)
    )
    assert f"run {runs.key(wanted)}" in capsys.readouterr().out
    run = runs.find(runs.key(wanted), tmp_path)
    assert len(run.frame("history")) == 1
    assert run.frame("selection")["chosen_on"].tolist() == ["validation"]
    assert run.frame("cutoffs")["label"].tolist() == ["Pneumonia"]
    assert {"predictions.csv", "classification.csv", "model.safetensors", "model.json"} <= set(run.card["files"])
    assert not list(tmp_path.glob(".*training*"))
    for arguments, problem in [
        ([str(tmp_path / "none.yaml")], "no such file"),
        ([str(file), "epochs"], "NAME=VALUE"),
        ([str(file), "epoch=2"], "did you mean 'epochs'"),
        ([str(file), "preset=bcos/rsna/resnet5"], "did you mean 'bcos/rsna/resnet50'"),
        (
            [str(file), "dataset=folder", "root=x"],
            "'view' is unknown.*dataset_options from parameters.yaml, dataset from the command line",
        ),
    ]:
        with pytest.raises(ParameterError, match=problem):
            training.main(arguments)


def test_history_names():
    result = fit(epochs=1)
    scores = [f"validation_{name}" for name in ("loss", "auc", "f1", "accuracy")]
    assert list(result.history) == ["epoch", "train_loss", *scores, "learning_rate", *CLOCKS]
    assert isinstance(result.history, pd.DataFrame)
    assert isinstance(squares.dataset().renderer, Squares)
