"""Grids of runs: a YAML file becomes a plan, checked whole, of notebook runs; done ones are skipped, the rest
executed, by one machine or many."""

from __future__ import annotations

import importlib

# Names load on first use: a kernel that is started through this package needs none of them.
_HOMES = {
    "Event": "loop",
    "STATES": "state",
    "Task": "planning",
    "check_names": "planning",
    "clean": "state",
    "estimate": "state",
    "find_grid": "planning",
    "leftovers": "state",
    "make_settings": "loop",
    "plan": "planning",
    "remove": "state",
    "retry": "loop",
    "run": "loop",
    "show": "state",
    "shown": "loop",
    "status": "state",
    "states": "state",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
