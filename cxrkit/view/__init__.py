"""From results to pictures: figures for a page, and a viewer that compares explanations, live or static."""

from __future__ import annotations

import importlib

# Modules and names load on first use: figures need matplotlib, the widget needs anywidget, a page may need neither.
_HOMES = {"Bundle": "viewer", "static_html": "viewer", "Explorer": "widget", "describe": "style", "to_html": "style"}
_MODULES = ("exporting", "figures", "lab", "style", "viewer", "widget")
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
