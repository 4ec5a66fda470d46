"""From a model and images to maps: `attribute`, `explain` (maps with what made them), and the cards of the methods.

One module per family: `gradient` (with `guided` and `deeplift`), `cam`, `path`, `xrai`, `perturbation`, `relevance`,
`normgrad`, and `inherent` (B-cos). A new method is one function under the decorator `registry.method`, in the module of
its family.
"""

from __future__ import annotations

# Importing a family registers its methods.
from cxrkit.attribution import (  # noqa: F401
    cam,
    deeplift,
    gradient,
    guided,
    inherent,
    normgrad,
    path,
    perturbation,
    relevance,
    xrai,
)
from cxrkit.attribution.api import Refusal, attribute
from cxrkit.attribution.inherent import bcos_rgba, bcos_shares
from cxrkit.attribution.registry import Card, card, methods
from cxrkit.attribution.result import Attribution, explain
from cxrkit.attribution.xrai import top_fraction

__all__ = [
    "Attribution",
    "Card",
    "Refusal",
    "attribute",
    "bcos_rgba",
    "bcos_shares",
    "card",
    "explain",
    "methods",
    "top_fraction",
]
