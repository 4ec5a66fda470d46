"""A training run: train the network that the parameters name, and store it.

`python -m cxrkit.study.training PARAMETERS.yaml` makes the same run as `train.ipynb`; with `accelerate launch` or
`torchrun` in place of `python` it does so on many devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from accelerate.state import PartialState

import cxrkit.models
from cxrkit.errors import ParameterError
from cxrkit.study import report as tables
from cxrkit.study import runs
from cxrkit.train.checkpoints import Checkpoints
from cxrkit.train.loop import Fit, fit, print_epoch
from cxrkit.train.parameters import Parameters, TrainParameters, check_dataset_options
from cxrkit.train.scoring import predict, selections
from cxrkit.train.setup import load_data, make_model
from cxrkit.yaml_files import parse_yaml, read_yaml

__all__ = ["checkpoint_folder", "keep", "train"]


def checkpoint_folder(parameters: Parameters) -> Path:
    """Folder of an unfinished run's checkpoints: hidden, beside the run's place, named by its key."""
    return runs.results_folder(parameters.results) / f".{runs.key(parameters)}.training"


def keep(parameters: TrainParameters, result: Fit, **tables: pd.DataFrame) -> str:
    """Write the run: history, selection, cutoffs, the tables given, and the weights; then drop its checkpoints. Returns
    its key."""
    with runs.writing(parameters) as store:
        store.frame("history", result.history)
        store.frame("selection", selections(result.history, parameters.criterion))
        store.frame("cutoffs", result.cutoffs)
        for name, table in tables.items():
            store.frame(name, table)
        cxrkit.models.save(result.model, store.folder / "model.safetensors")
    Checkpoints(checkpoint_folder(parameters)).remove()
    return runs.key(parameters)


def train(parameters: TrainParameters, report: Callable[[dict], None] | None = None) -> str:
    """All of `train.ipynb` without the pictures: load, train, predict the test split, keep the run. Returns its key."""
    data = load_data(parameters)
    result = fit(make_model(parameters, data.labels), data, parameters, report, checkpoint_folder(parameters))
    if not PartialState().is_main_process:
        return runs.key(parameters)
    predictions = predict(result.model, data.split("test"))
    classification = tables.classification_of(predictions, exclusive=result.exclusive, n=1000)
    return keep(parameters, result, predictions=predictions, classification=classification)


def main(arguments: list[str] | None = None) -> None:
    """Command line: a YAML file of parameters (`preset: NAME` starts from a paper's), then NAME=VALUE for others."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit("usage: python -m cxrkit.study.training PARAMETERS.yaml [NAME=VALUE ...]")
    if not (path := Path(arguments[0])).is_file():
        raise ParameterError(f"{path}: there is no such file of parameters")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: expected parameters as NAME: VALUE, found a {type(values).__name__}")
    origin = dict.fromkeys(values, path.name)
    for word in arguments[1:]:
        name, mark, value = word.partition("=")
        if not mark:
            raise ParameterError(f"{word!r}: expected NAME=VALUE")
        values[name], origin[name] = parse_yaml(value, word), "the command line"
    preset = values.pop("preset", None)
    parameters = TrainParameters.preset(preset, **values) if preset else TrainParameters(**values)
    check_dataset_options(parameters, origin)
    print("run", train(parameters, print_epoch))


if __name__ == "__main__":
    main()
