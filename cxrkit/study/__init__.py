"""From parameters to stored results: parameters, runs, explanations, the phantom benchmark, and reports."""

from __future__ import annotations

from cxrkit.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    "comparison ensembles explanation method_pages parameters phantom_benchmark report runs training",
    parameters="ExplainParameters JudgeParameters",
    ensembles="ensemble",
    training="checkpoint_folder keep",
    explanation="kept_maps score subject",
    index="newest table",
    runs="Run find writing",
    moved="SearchParameters TrainParameters fit load_data make_model predict presets print_epoch search selections",
)
