"""Grids of runs: a YAML file becomes a plan, checked whole, of notebook runs; done ones are skipped, the rest
executed, by one machine or many."""

from __future__ import annotations

from cxrkit.lazy import lazily

# A kernel that is started through this package needs none of them.
__getattr__, __dir__, __all__ = lazily(
    __name__,
    studies="finished load",
    loop="Event retry run",
    planning="Task check_names find_grid plan",
    state="STATES clean estimate leftovers remove show states status why",
)
