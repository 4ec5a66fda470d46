"""cxrkit: explain chest X-ray classifiers and measure the explanations. Not a medical device."""

from __future__ import annotations

from cxrkit import _torchvision
from cxrkit.errors import AttributionError, CxrkitError, DataError, ModelError, ParameterError
from cxrkit.lazy import lazily

__version__ = "0.1.0"
_torchvision.install()

# Subpackages load on first use: `import cxrkit` needs neither torch nor anything that only the book needs.
_PACKAGES = "attribution data grid metrics models phantom study train view"
__getattr__, __dir__, __all__ = lazily(__name__, _PACKAGES, attribution="attribute")
__all__ += ["AttributionError", "CxrkitError", "DataError", "ModelError", "ParameterError"]
