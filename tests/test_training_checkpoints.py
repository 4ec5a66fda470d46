"""A training that is killed goes on to the same result; checkpoints are whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import squares
import torch
from safetensors.torch import load_file
from squares import RICH, fit, parameters, same

from cxrkit import ParameterError
from cxrkit.train import checkpoints, loop, optimizer, setup


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed():
    return fit(**RICH)


def interrupted(monkeypatch, after: int, **options):
    """Train until an exception in the step after so many."""
    count, step = [0], loop._Training._step

    def until(self, *values):
        count[0] += 1
        if count[0] > after:
            raise Killed
        return step(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_step", until)
        with pytest.raises(Killed):
            fit(**options)


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_anywhere_it_ends_the_same(seed, tmp_path, monkeypatch, undisturbed):
    chance = random.Random(seed)
    for _ in range(4):
        interrupted(monkeypatch, chance.randrange(1, 6), folder=tmp_path, **RICH)
    result = fit(folder=tmp_path, **RICH)
    assert same(result, undisturbed)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_optimiser_and_schedule_goes_on(optimizer, tmp_path, monkeypatch):
    options = {**RICH, "optimizer": optimizer, "schedule": "cosine", "stop_patience": 2}
    interrupted(monkeypatch, 8, folder=tmp_path, **options)
    assert same(fit(folder=tmp_path, **options), fit(**options))


def test_killed_anywhere_it_ends_the_same(tmp_path, undisturbed, monkeypatch):
    """SIGKILL at random moments. The server that starts the processes has all modules loaded, if it finds them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["squares"])
    chance, kills, kept = random.Random(0), 0, checkpoints.Checkpoints(tmp_path)
    while kills < 4:
        before = kept.newest()
        child = context.Process(target=squares.train_in, args=(str(tmp_path), chance.uniform(0.0, 0.15)))
        child.start()
        child.join()
        assert child.exitcode in (0, -9)
        if child.exitcode == 0:  # came through: from the start again
            kept.remove()
        else:
            kills += 1
            assert kept.newest() != before
    assert same(fit(folder=tmp_path, **RICH), undisturbed)


def test_a_network_of_the_zoo_goes_on_in_the_same_order_in_memory(tmp_path, monkeypatch):
    """Its kernels lie channels-last; the moments of Adam must too, or another kernel rounds another way."""
    data = squares.dataset(24)
    options = {"epochs": 2, "batch_size": 8, "checkpoint_seconds": 0.0, "learning_rate": 1e-3}

    def model():
        return setup.make_model(parameters(), data.labels)

    whole = fit(data, model(), **options)
    interrupted(monkeypatch, 3, data=data, model=model(), folder=tmp_path, **options)
    assert same(fit(data, model(), tmp_path, **options), whole)


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch, undisturbed):
    fit(folder=tmp_path, **RICH)
    monkeypatch.setattr(loop._Training, "_step", None)
    assert same(fit(folder=tmp_path, **RICH), undisturbed)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch, undisturbed):
    interrupted(monkeypatch, 7, folder=tmp_path, **RICH)
    newest = checkpoints.Checkpoints(tmp_path).newest()
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / ".epoch00009-step00000000.safetensors.0").write_bytes(b"half")
    with pytest.warns(UserWarning, match="not a whole checkpoint"):
        assert same(fit(folder=tmp_path, **RICH), undisturbed)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, undisturbed):
    interrupted(monkeypatch, 4, folder=tmp_path, **RICH)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.warns(UserWarning, match="No space left on device"):
            assert same(fit(folder=tmp_path, **RICH), undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert same(fit(folder=tmp_path, **RICH), undisturbed)


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_not_kept(tmp_path, name):
    model = squares.tiny()
    chosen = parameters()
    chosen_optimizer = optimizer.optimizer_for(model, chosen)
    state = checkpoints.State(model, chosen_optimizer, optimizer.LearningRate(chosen_optimizer, chosen, 4))
    kept = checkpoints.Checkpoints(tmp_path)
    kept.write(state)
    model.state_dict()[name][0] = float("nan")
    state.step = 1
    with pytest.warns(UserWarning, match=f"not written, as {name} is not finite"):
        kept.write(state)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch00001-step00000000.safetensors"]


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(folder=tmp_path, epochs=1, checkpoint_seconds=0.0)
    with pytest.raises(ParameterError, match="belongs to a training with other parameters"):
        fit(folder=tmp_path, epochs=1, seed=5)
    fit(folder=tmp_path, epochs=1, checkpoint_seconds=9.0)  # how often they are written is no matter


def test_checkpoints_come_as_often_as_wanted_and_hold_no_pickle(tmp_path, monkeypatch):
    fit(folder=tmp_path / "none", epochs=2, checkpoint_seconds=1000.0)
    assert not (tmp_path / "none").exists()
    fit(folder=tmp_path / "all", epochs=2, checkpoint_seconds=0.0)
    files = sorted((tmp_path / "all").iterdir())
    assert [file.name for file in files] == [
        f"epoch0000{at}.safetensors" for at in ("2-step00000004", "3-step00000000")
    ]
    assert all(isinstance(value, torch.Tensor) for value in load_file(files[0]).values())
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    writer = checkpoints.Checkpoints(tmp_path, seconds=10)
    assert not writer.due()
    now[0] += 10
    assert writer.due()
    writer._took = 1.0  # writing takes long: less often
    assert not writer.due()
    now[0] += 9
    assert writer.due()


def test_the_folder_is_hidden_beside_the_run(tmp_path):
    from cxrkit.study import runs, training

    chosen = parameters(results=str(tmp_path))
    assert training.checkpoint_folder(chosen) == tmp_path / f".{runs.key(chosen)}.training"


@pytest.mark.parametrize("spoil", [lambda own: "none", lambda own: own[:-1] + "x"])
def test_processes_that_find_different_states_are_refused(tmp_path, monkeypatch, spoil):
    fit(folder=tmp_path, epochs=1, checkpoint_seconds=0.0)
    monkeypatch.setattr(loop, "gather_object", lambda found: [*found, spoil(found[0]), *found])
    told = f"{tmp_path}: .*process 0, 2: epoch00002-step0.*, content .*; process 1: .*folder that all of them share"
    with pytest.raises(ParameterError, match=told):
        fit(folder=tmp_path, epochs=1)
    monkeypatch.setattr(loop, "gather_object", lambda found: found * 3)
    fit(folder=tmp_path, epochs=1)


# It starts its processes through torchrun.
LAUNCHER = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
]


def test_two_processes_give_what_one_gives(tmp_path):
    """Without batch norm, which each process would take over its own images."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, out = Path(squares.__file__), tmp_path / "two.safetensors"
    command = [sys.executable, "-m", *LAUNCHER, str(port)]
    path = os.pathsep.join([str(script.parent), str(script.parents[1])])
    run = subprocess.run(
        [*command, str(script), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert {f"process {place} of 2" for place in (0, 1)} <= set(run.stdout.splitlines())
    squares.train_in_company(str(tmp_path / "one.safetensors"))
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    histories = [pd.read_csv(tmp_path / f"{name}.safetensors.csv") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*histories, rtol=1e-5)
