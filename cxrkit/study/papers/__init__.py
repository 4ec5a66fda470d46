"""Papers beside our runs: published tables, claims with verdicts, checklists, and one module per paper."""

from __future__ import annotations

from cxrkit.lazy import lazily

PAPERS = {
    "bcos": "kleinmann2025",
    "normgrad": "ozer2023",
    "covid": "chatterjee2024",
    "path": "brima2023",
    "relevance": "nam2021",
}  # the key of each paper here, and in the book's bibliography
_MODULES = f"{' '.join(PAPERS)} bcos_claims bcos_maps checklist claims kept published synthesis"
__getattr__, __dir__, __all__ = lazily(__name__, _MODULES)
__all__ += ["PAPERS"]
