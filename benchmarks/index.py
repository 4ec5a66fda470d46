"""How fast the table of all runs comes: from the runs' own files, from the index, and after one more run.

Beside it stands the least that any table costs which notices a change: looking at the time of every file. Usage:
`python benchmarks/index.py [--runs 10000]`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from cxrkit.study import index, runs
from cxrkit.study.parameters import ExplainParameters, JudgeParameters
from cxrkit.train.parameters import Parameters, TrainParameters


def parameters_of(number: int) -> Parameters:
    """Parameters of three kinds, with texts, numbers, lists, mappings and None in their cells."""
    if number % 3 == 0:
        return TrainParameters(
            seed=number, dataset_options={"images": number}, root=None if number % 2 else "data", learning_rate=1e-3
        )
    if number % 3 == 1:
        return ExplainParameters(run=f"train-{number}", methods=["saliency", "layercam"], seed=number)
    return JudgeParameters(run=f"train-{number}", shortcuts={"marker": "Nodule/Mass"}, seed=number)


def write_run(results: Path, number: int) -> None:
    """A run as the store keeps it, without the cost of the store's own checks: four small files and the card."""
    parameters = parameters_of(number)
    name = f"{parameters.kind}-{hashlib.sha256(str(number).encode()).hexdigest()[:10]}"
    folder = results / name
    folder.mkdir()
    texts = {
        "parameters.json": json.dumps(parameters.model_dump(mode="json")),
        "environment.json": json.dumps({"python": "3"}),
        "history.csv": "epoch,loss\n1,0.5\n",
        "scores.csv": "image_id,value\n1,0.5\n",
    }
    for file, text in texts.items():
        (folder / file).write_text(text)
    files = {file: {"bytes": len(text), "sha256": ""} for file, text in texts.items()}
    code = runs.fingerprint(f"notebooks/{parameters.kind}.ipynb")
    card = {"key": name, "kind": parameters.kind, "fingerprint": code, "files": files}
    (folder / "run.json").write_text(json.dumps(card | {"finished": "2026-01-01T00:00:00Z"}))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def look(results: Path) -> None:
    for folder in os.scandir(results):
        if folder.is_dir():
            for file in os.scandir(folder.path):
                file.stat()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    count = parser.parse_args().runs
    results = Path(tempfile.mkdtemp(prefix="cxrkit-"))
    try:
        for number in range(count):
            write_run(results, number)
        print(f"{count} runs")
        print(f"  from the runs' files, index written  {seconds(lambda: index.table(results)):7.2f} s")
        assert len(index.table(results)) == count
        rounds = [(seconds(lambda: index.table(results)), seconds(lambda: look(results))) for _ in range(5)]
        print(f"  from the index                       {min(ours for ours, _ in rounds):7.2f} s")
        print(f"  bound: the time of every file        {min(bound for _, bound in rounds):7.2f} s")
        write_run(results, count)
        print(f"  one more run                         {seconds(lambda: index.table(results)):7.2f} s")
        print(f"  index: {(results / index.FILE).stat().st_size / 2**20:.1f} MiB")
    finally:
        shutil.rmtree(results)


if __name__ == "__main__":
    main()
