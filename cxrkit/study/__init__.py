"""From parameters to results: validated parameters, training, explaining, the store of runs, grids, and reports."""

from __future__ import annotations

import importlib

# Names load on first use, so that looking at a grid's state doesn't import torch.
_HOMES = {
    "ExplainParameters": "experiment",
    "JudgeParameters": "experiment",
    "SearchParameters": "experiment",
    "TrainParameters": "experiment",
    "checkpoint_folder": "checkpoints",
    "ensemble": "ensembles",
    "fit": "training",
    "keep": "training",
    "selections": "training",
    "load_data": "training",
    "make_model": "training",
    "predict": "training",
    "print_epoch": "training",
    "kept_maps": "explaining",
    "score": "explaining",
    "subject": "explaining",
    "Run": "runs",
    "find": "runs",
    "newest": "runs",
    "writing": "runs",
}
_MODULES = (
    "chapter",
    "comparing",
    "ensembles",
    "experiment",
    "explaining",
    "grid",
    "judge",
    "papers",
    "presets",
    "report",
    "runs",
    "search",
    "training",
)
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
