"""Training: images per second, time lost to loading, what checkpoints cost, and 20 kills.

    python benchmarks/train.py [--threads 1] [--size 64] [--images 200] [--model bcos_resnet18] [--kills 20]

Two claims are measured. The loader doesn't starve the device: the share of the time that an epoch waits for images is
printed for images kept in memory and for images read by other processes. A training that is killed goes on to the
same result: a process is killed (SIGKILL) at random moments until it comes through, and its weights are compared, bit
by bit, with those of an undisturbed one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import torch

from cxrkit import train
from cxrkit.train.checkpoints import Checkpoints
from cxrkit.train.parameters import TrainParameters

CLOCKS = ["seconds", "images_per_second", "waiting_share"]


def chosen(options: argparse.Namespace, **changes) -> TrainParameters:
    values = {
        "dataset_options": {"view": "multilabel", "images": options.images},
        "size": options.size,
        "model": options.model,
        "epochs": 3,
        "threads": options.threads,
    }
    return TrainParameters(**values | changes)


def run(parameters: TrainParameters, folder: str | None = None) -> train.Fit:
    data = train.load_data(parameters)
    return train.fit(train.make_model(parameters, data.labels), data, parameters, folder=folder)


def speed(options: argparse.Namespace) -> None:
    print("images per second and share of the time spent waiting, by epoch (the first draws what stays in memory)")
    for name, changes in {
        "in memory": {},
        "2 loading processes": {"workers": 2},
        "in memory, light augmentation": {"augment": "light"},
        "in memory, steps in 2 parts": {"accumulate": 2},
    }.items():
        history = run(chosen(options, **changes)).history
        epochs = "   ".join(f"{r.images_per_second:6.1f} ({r.waiting_share:4.0%})" for r in history.itertuples())
        print(f"  {name:36} {epochs}")


def checkpoint_cost(options: argparse.Namespace) -> None:
    print("seconds for an epoch of training (best of three)")
    for name, seconds in {"none": None, "every 60 s": 60.0, "after every step": 0.0}.items():
        with tempfile.TemporaryDirectory() as folder:
            where = None if seconds is None else folder
            history = run(chosen(options, checkpoint_seconds=seconds or 0.0), where).history
            newest = Checkpoints(folder).newest()
            size = f", {newest.stat().st_size / 2**20:.0f} MiB each" if newest else ""
        print(f"  checkpoints {name:18} {history['seconds'].min():6.2f}{size}")


def victim(parameters: TrainParameters, folder: str, delay: float) -> None:
    """Train until SIGKILL, so many seconds of computing after the first new checkpoint."""
    torch.set_num_threads(parameters.threads)
    threading.Thread(target=_end, args=(Checkpoints(folder), delay), daemon=True).start()
    run(parameters, folder)


def _end(checkpoints: Checkpoints, delay: float) -> None:
    before = checkpoints.newest()
    while checkpoints.newest() == before:
        time.sleep(1e-3)
    start = time.process_time()
    while time.process_time() - start < delay:
        time.sleep(1e-3)
    os.kill(os.getpid(), signal.SIGKILL)


def kills(options: argparse.Namespace) -> None:
    """Kill, again and again, a training that writes a checkpoint after every step."""
    parameters = chosen(options, checkpoint_seconds=0.0, augment="light", threads=1, device="cpu")
    start, computed = time.perf_counter(), time.process_time()
    undisturbed = run(parameters)
    whole, computed = time.perf_counter() - start, time.process_time() - computed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "cxrkit.train.loop"])
    chance, done, inside = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(folder)
        start = time.perf_counter()
        while done < options.kills:
            child = context.Process(target=victim, args=(parameters, folder, chance.uniform(0.0, 0.2) * computed))
            child.start()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                done += 1
                inside += not kept.newest().stem.endswith("step00000000")
                print(f"  kill {done}: next would have been {kept.newest().stem}", flush=True)
            elif child.exitcode != 0:
                raise SystemExit(f"a training failed by itself, exit code {child.exitcode}")
            else:
                print(f"  came through after {done} kills; begins again")
                kept.remove()
        result = run(parameters, folder)
        spent = time.perf_counter() - start
        left = sorted(path.name for path in Path(folder).iterdir())
    same = all(
        torch.equal(a, b)
        for a, b in zip(undisturbed.model.state_dict().values(), result.model.state_dict().values(), strict=True)
    )
    histories = [fit.history.drop(columns=CLOCKS) for fit in (undisturbed, result)]
    print(f"{done} kills ({inside} with a newest checkpoint inside an epoch), {options.model} at {options.size} pixels")
    print(f"  weights equal to the last bit: {same}; history equal: {histories[0].equals(histories[1])}")
    print(f"  {whole:.0f} s undisturbed, {spent:.0f} s with all kills and starts; left in the folder: {left}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--model", default="bcos_resnet18")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, {options.images} images of {options.size} pixels, {options.threads} thread(s)")
    speed(options)
    checkpoint_cost(options)
    kills(options)


if __name__ == "__main__":
    main()
