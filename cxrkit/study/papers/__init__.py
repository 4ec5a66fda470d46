"""Papers beside our runs: published tables, claims with verdicts, checklists, and one module per paper."""

from __future__ import annotations

import importlib

PAPERS = {
    "bcos": "kleinmann2025",
    "normgrad": "ozer2023",
    "covid": "chatterjee2024",
    "path": "brima2023",
    "relevance": "nam2021",
}  # the key of each paper here, and in the book's bibliography
_MODULES = (*PAPERS, "bcos_claims", "bcos_maps", "checklist", "claims", "kept", "published", "synthesis")
__all__ = ["PAPERS", *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
