"""From a model and images to maps: `attribute`, and the cards of its methods.

One module per family: `gradient` (saliency, input x gradient, integrated gradients), `cam` (class
activation maps) and `inherent` (B-cos). A new method is one function under the decorator `registry.method`,
in the module of its family.
"""

from __future__ import annotations

from cxrkit.attribution import cam, gradient, inherent  # noqa: F401  (importing a family registers its methods)
from cxrkit.attribution.api import attribute
from cxrkit.attribution.inherent import bcos_rgba
from cxrkit.attribution.registry import Card, card, methods

__all__ = ["Card", "attribute", "bcos_rgba", "card", "methods"]
