"""Packages whose modules and names load on first use, so that looking at a grid's state doesn't import torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, modules: str = "", **names: str) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package: its modules, and by module the names that it takes from it,
    each list separated by spaces."""
    homes = {name: home for home, listed in names.items() for name in listed.split()}
    public = sorted({*modules.split(), *homes})

    def get(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if name in public:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: public, public
