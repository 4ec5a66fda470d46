"""From parameters to results: validated parameters, training, explaining, the store of runs, grids, and reports."""

from __future__ import annotations

from cxrkit.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    "chapter comparing ensembles experiment explaining grid judge papers presets report runs search training",
    experiment="ExplainParameters JudgeParameters SearchParameters TrainParameters",
    checkpoints="checkpoint_folder",
    ensembles="ensemble",
    training="fit keep selections load_data make_model predict print_epoch",
    explaining="kept_maps score subject",
    runs="Run find newest writing",
)
