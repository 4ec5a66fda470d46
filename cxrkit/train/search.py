"""Search for training parameters by DEHB: differential evolution whose cheap trials have few epochs."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxrkit.errors import DataError, ModelError
from cxrkit.files import replace_file
from cxrkit.train.loop import fit
from cxrkit.train.parameters import SearchParameters, TrainParameters
from cxrkit.train.scoring import selections
from cxrkit.train.setup import load_data, make_model

__all__ = ["best_of", "score_of", "search"]

_COLUMNS = ("evaluation", "epochs", "score", "seconds")


def search(
    parameters: SearchParameters,
    report: Callable[[dict], None] | None = None,
    folder: str | Path | None = None,
    score: Callable[[TrainParameters], float] | None = None,
) -> pd.DataFrame:
    """Try `evaluations` settings of the space; returns the trajectory, a row per trial in order.

    Each trial trains on every fold for as many epochs as DEHB grants it; its score is the mean over folds of the best
    validation criterion. Columns: evaluation, one per parameter of the space, epochs, score, seconds, best (the highest
    score so far). The trials follow from the seed and the scores. With a `folder` each is written down there, and a
    search that was cut off goes on after the last. `score` replaces the training of one fold. Source: paper `bcos`,
    1.7 (fitness 1 - F1, fidelity 1 to 30 epochs, 10 evaluations). Raises DataError for a record of another search.
    """
    names = list(parameters.space)
    record = Path(folder) / "trials.json" if folder is not None else None
    done = _read(record, parameters)
    rows = []
    with _optimizer(parameters) as optimizer:
        for number in range(parameters.evaluations):
            trial = optimizer.ask()
            setting = _setting(trial["config"], parameters)
            epochs = round(float(trial["fidelity"]))
            if number < len(done):
                row = done[number]
                if any(row[name] != setting[name] for name in names) or row["epochs"] != epochs:
                    raise DataError(f"{record}: trial {number} is not what this search asks for; delete the file")
            else:
                start = time.perf_counter()
                scores = [
                    (score or score_of)(parameters.trial(setting, epochs=epochs, fold=fold))
                    for fold in parameters.folds
                ]
                seconds = time.perf_counter() - start
                row = {"evaluation": number, **setting, "epochs": epochs, "score": float(np.mean(scores))}
                row["seconds"] = seconds
            rows.append(row)
            # DEHB makes the fitness as low as it can; a trial without a score is never chosen.
            fitness = 1 - row["score"] if np.isfinite(row["score"]) else 1e9
            optimizer.tell(trial, {"fitness": fitness, "cost": row["seconds"]})
            if number >= len(done):
                _write(record, parameters, rows)
                if report is not None:
                    report(row)
    table = pd.DataFrame(rows, columns=["evaluation", *names, *_COLUMNS[1:]])
    return table.assign(best=table["score"].cummax())


def score_of(parameters: TrainParameters) -> float:
    """Train once; the best criterion on the validation split over the epochs (a loss as its negative).

    A training that diverges has no score: nan.
    """
    data = load_data(parameters)
    try:
        history = fit(make_model(parameters, data.labels), data, parameters).history
    except ModelError:
        return float("nan")
    chosen = selections(history, parameters.criterion)
    value = float(chosen.loc[chosen["chosen_on"] == "validation", f"validation_{parameters.criterion}"].iloc[0])
    return -value if parameters.criterion == "loss" else value


def best_of(trajectory: pd.DataFrame, parameters: SearchParameters) -> dict[str, Any]:
    """The setting with the highest score among the trials with the most epochs: few epochs flatter high rates."""
    rows = trajectory[trajectory["epochs"] == trajectory["epochs"].max()]
    best = rows["score"].fillna(-np.inf).idxmax()
    return {name: _plain(rows.loc[best, name]) for name in parameters.space}


def _setting(vector: np.ndarray, parameters: SearchParameters) -> dict[str, Any]:
    """The point of the unit cube that DEHB asks for, as one choice per parameter."""
    pairs = zip(parameters.space.items(), vector, strict=True)
    return {name: choices[min(int(share * len(choices)), len(choices) - 1)] for (name, choices), share in pairs}


@contextmanager
def _optimizer(parameters: SearchParameters) -> Iterator[Any]:
    """DEHB, to be asked and told step by step: nothing runs in the background, nothing of its own is written or read.

    Its own records are pickles; here the trials are told again instead, which leads to the same state.
    """
    from dehb import DEHB
    from loguru import logger

    class Quiet(DEHB):
        def _setup_logger(self, kwargs):
            self.output_path = Path(kwargs["output_path"])
            self.logger = logger

    logger.disable("dehb")
    with tempfile.TemporaryDirectory() as folder:
        yield Quiet(
            dimensions=len(parameters.space),
            min_fidelity=parameters.min_epochs,
            max_fidelity=parameters.max_epochs,
            eta=parameters.eta,
            seed=parameters.seed,
            n_workers=1,
            save_freq="end",  # of `run`, which is never called
            output_path=folder,
        )


def _identity(parameters: SearchParameters) -> dict[str, Any]:
    # More evaluations of the same search go on where fewer stopped.
    return {name: value for name, value in parameters.identity().items() if name != "evaluations"}


def _read(record: Path | None, parameters: SearchParameters) -> list[dict[str, Any]]:
    if record is None or not record.is_file():
        return []
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        trials, owner = kept["trials"], kept["parameters"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{record}: not a record of trials; delete it") from None
    if owner != json.loads(json.dumps(_identity(parameters))):
        raise DataError(f"{record} is the record of a search with other parameters; take another folder")
    return trials


def _write(record: Path | None, parameters: SearchParameters, rows: list[dict[str, Any]]) -> None:
    if record is None:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"parameters": _identity(parameters), "trials": rows}, indent=1)
    replace_file(record, text)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
