"""From a dataset and parameters to a trained network: loop, loader, losses, optimizer, checkpoints, search."""

from __future__ import annotations

from cxrkit.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    "checkpoints devices loader loop losses optimizer parameters presets scoring search setup",
    parameters="SearchParameters TrainParameters",
    loop="Fit fit print_epoch",
    scoring="predict selections",
    setup="load_data make_model",
)
