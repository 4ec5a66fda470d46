"""What a grid costs, and what it survives: `python benchmarks/grid.py overhead | many | kills --help`.

`overhead`: seconds per run beside papermill in a process that is already warm, and beside a bare kernel. `many`:
planning and status of a grid whose runs are all done. `kills`: a grid of small runs while its kernels, workers and
runners are killed at random, compared with the same grid undisturbed. Needs no data; everything is written to a
temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import papermill
import psutil
from jupyter_client.manager import start_new_kernel

from cxrkit import grid
from cxrkit.study import runs as store

CELLS = (
    "import os, pathlib, random, time",
    "time.sleep(nap)",
    "value = sum(random.Random(seed).random() for _ in range(1000))\n"
    "pathlib.Path(os.environ['CXRKIT_OUTPUT'], 'value.txt').write_text(repr(value))",
)
RUNNER = "import sys; from cxrkit import grid; grid.run('small', int(sys.argv[1]), retry=True)"


def project(folder: Path, runs: int, nap: float) -> None:
    """A project with one notebook and one grid of it."""
    sources = [(f"seed = 0\nnap = {nap}", ["parameters"]), *((text, []) for text in CELLS)]
    cells = [
        {"id": f"c{i}", "cell_type": "code", "metadata": {"tags": tags}, "source": text, "outputs": []}
        | {"execution_count": None}
        for i, (text, tags) in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}
    (folder / "notebooks" / "grids").mkdir(parents=True)
    (folder / "notebooks" / "small.ipynb").write_text(json.dumps(content))
    (folder / "notebooks" / "grids" / "small.yaml").write_text(f"small: {{notebook: ../small.ipynb, seeds: {runs}}}\n")


def overhead(runs: int) -> None:
    """The same notebook by papermill alone and by the grid, one after the other, in turns."""
    folder = Path.cwd()
    project(folder, runs, 0.0)
    alone, ours, kernels = [], [], []
    notebook = str(folder / "notebooks" / "small.ipynb")
    os.environ["CXRKIT_OUTPUT"] = str(folder)
    ticks: list[float] = []

    def hear(event: grid.Event) -> None:
        if event.kind == "done":
            now = time.perf_counter()
            ours.append(now - ticks[-1])
            alone.append(_papermill(notebook, folder))
            kernels.append(_kernel())
        if event.kind in ("begin", "done"):
            ticks.append(time.perf_counter())

    grid.run("small", 1, hear)
    ours.pop(0), alone.pop(0), kernels.pop(0)  # the first starts the worker
    print(f"{len(ours)} runs, one at a time{'':13} seconds: median  smallest")
    for name, values in (("bare kernel, the same cells", kernels), ("papermill alone", alone), ("grid", ours)):
        print(f"  {name:32} {_middle(values):14.3f} {min(values):9.3f}")
    for name, values in (("grid beyond a bare kernel", kernels), ("grid beyond papermill alone", alone)):
        print(f"  {name:32} {_middle(ours) - _middle(values):14.3f} {min(ours) - min(values):9.3f}")


def _papermill(notebook: str, folder: Path) -> float:
    started = time.perf_counter()
    output = str(folder / "alone.ipynb")
    papermill.execute_notebook(notebook, output, {"seed": 1}, progress_bar=False)
    return time.perf_counter() - started


def _kernel() -> float:
    """A bare kernel that executes the notebook's cells."""
    started = time.perf_counter()
    manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)
    for cell in ("seed = 0; nap = 0.0", *CELLS):
        client.execute_interactive(cell, timeout=60, output_hook=lambda message: None)
    client.stop_channels()
    manager.shutdown_kernel()
    return time.perf_counter() - started


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def many(runs: int) -> None:
    """Planning and status in processes of their own, as a command meets them."""
    project(Path.cwd(), runs, 0.0)
    (Path.cwd() / "results" / ".grid").mkdir(parents=True)
    card: dict = {}
    started = time.perf_counter()
    for task in grid.plan("small"):
        task.place.mkdir(parents=True)
        (task.place / "value.txt").write_text("0.5")
        (task.place / "parameters.json").write_text(json.dumps(task.parameters.model_dump()))
        card = card or store.card_of(task.parameters)
        text = json.dumps(card | {"key": task.key, "finished": "", "files": {"value.txt": {"bytes": 3, "sha256": ""}}})
        (task.place / "run.json").write_text(text)
    print(f"{runs} finished runs, written in {time.perf_counter() - started:.1f} s")
    code = (
        "import time; from cxrkit import grid; grid.states; a = time.perf_counter()\n"
        "tasks = grid.plan('small'); b = time.perf_counter(); states = grid.states(tasks); c = time.perf_counter()\n"
        "assert {state.name for state in states} == {'done'}; print(b - a, c - b)"
    )
    for _ in range(3):
        told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        started = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).with_name("cxrkit"), "grid", "status", "small"], stdout=subprocess.DEVNULL, check=True
        )
        whole = time.perf_counter() - started
        print(
            f"  plan {float(told[0]):.2f} s, status of the plan {float(told[1]):.2f} s, the whole command {whole:.2f} s"
        )


def kills(runs: int, count: int, workers: int, seed: int, limit: float) -> int:
    """Kill until `count` is reached, then let a runner come to its end. Returns the number of wrong runs."""
    base = Path.cwd()
    for name in ("calm", "killed"):
        project(base / name, runs, 0.3)
    calm = _runner(base / "calm", workers)
    if calm.wait(limit):
        sys.exit("the undisturbed grid failed")
    rng, done = random.Random(seed), Counter()
    pause = _middle([event["seconds"] for event in _events(base / "calm")])  # about one kill for each run
    folder, over = base / "killed", time.monotonic() + limit
    runners = [_runner(folder, workers) for _ in range(2)]
    started = time.monotonic()
    anew = 0
    try:
        while sum(done.values()) < count and time.monotonic() < over:
            time.sleep(rng.uniform(0.0, pause))
            if len(list((folder / "results").glob("small-*"))) >= runs:
                anew += _forget_some(folder, rng)  # the grid would end before the kills do
            runners = [runner if runner.poll() is None else _runner(folder, workers) for runner in runners]
            if not _victim(runners, "kernel", rng):
                continue  # nothing is being made yet
            kind = rng.choices(("kernel", "worker", "runner"), (4, 3, 2))[0]
            if victim := _victim(runners, kind, rng):
                victim.kill()
                done[kind] += 1
        killing = time.monotonic() - started
        while any(runner.poll() is None for runner in runners) and time.monotonic() < over:
            time.sleep(0.2)
    finally:
        for runner in runners:
            runner.kill()
    _runner(folder, workers).wait()  # goes on with what is left, unhurt
    print(
        f"{sum(done.values())} kills in {killing:.0f} s: {dict(done)}; {anew} finished runs were taken away meanwhile"
    )
    return _compare(base / "calm", folder, runs, anew)


def _forget_some(folder: Path, rng: random.Random) -> int:
    """Take finished runs away, so that there is something left to kill."""
    found = sorted((folder / "results").glob("small-*"))
    taken = rng.sample(found, len(found) // 2)
    for place in taken:
        hidden = place.with_name(f".{place.name}.gone")
        os.replace(place, hidden)
        shutil.rmtree(hidden)
    return len(taken)


def _runner(folder: Path, workers: int) -> subprocess.Popen:
    log = open(folder / "runners.log", "a")  # noqa: SIM115  it lives as long as the process
    return subprocess.Popen([sys.executable, "-c", RUNNER, str(workers)], cwd=folder, stdout=log, stderr=log)


def _victim(runners: list[subprocess.Popen], kind: str, rng: random.Random) -> psutil.Process | None:
    found = []
    for runner in runners:
        try:
            tree = [psutil.Process(runner.pid), *psutil.Process(runner.pid).children(recursive=True)]
            for process in tree:
                line = " ".join(process.cmdline())
                role = "kernel" if "grid.kernel" in line else "worker" if "grid.worker" in line else "runner"
                found += [process] if role == kind else []
        except psutil.Error:
            continue
    return rng.choice(found) if found else None


def _compare(calm: Path, killed: Path, runs: int, anew: int) -> int:
    wrong = 0
    values = {}
    for folder in (calm, killed):
        os.chdir(folder)
        tasks = grid.plan("small")
        values[folder] = {}
        for task in tasks:
            try:
                run = store.Run(task.place)
                run.verify()
                values[folder][task.key] = (run.folder / "value.txt").read_text()
            except Exception as error:
                print(f"  {folder.name}: {task.key}: {error}")
                wrong += 1
        results = folder / "results"
        strange = [path.name for path in results.iterdir() if path.name not in {task.key for task in tasks}]
        own = [str(path) for name in ("claims", "work", "runners") for path in (results / ".grid" / name).iterdir()]
        failed = list((results / "failed").glob("*"))
        print(
            f"  {folder.name}: {len(values[folder])} of {runs} runs whole; beside them {strange}; left {own}, {failed}"
        )
        wrong += len(own)
        events = _events(folder)
        well = sum(event["event"] == "done" for event in events)
        due = runs + (anew if folder == killed else 0)
        print(f"  {folder.name}: {len(events)} attempts came to an end, {well} of them well; {due} runs were due")
        wrong += well > due
    wrong += values[calm] != values[killed]
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(killed) in " ".join(p.info["cmdline"] or [])]
    print(f"  results equal: {values[calm] == values[killed]}; processes left: {left}")
    return wrong + len(left)


def _events(folder: Path) -> list[dict]:
    lines = (folder / "results" / ".grid" / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("overhead", "many", "kills", "all"), default="all")
    parser.add_argument("--runs", type=int, help="of the grid; 12 for overhead, 10 000 for many, 60 for kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2, help="per runner; two runners work at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds after which the killing stops")
    told = parser.parse_args()
    os.environ.pop("CXRKIT_RESULTS", None)
    wrong = 0
    for name, default in (("overhead", 12), ("many", 10_000), ("kills", 60)):
        if told.what in (name, "all"):
            with tempfile.TemporaryDirectory(prefix="cxrkit-grid-") as folder:
                os.chdir(folder)
                count = told.runs or default
                if name == "kills":
                    wrong = kills(count, told.kills, told.workers, told.seed, told.limit)
                else:
                    {"overhead": overhead, "many": many}[name](count)
                os.chdir("/")
    return int(wrong > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
