"""cxrkit: explain chest X-ray classifiers and measure the explanations. Not a medical device."""

from __future__ import annotations

import importlib

from cxrkit import _torchvision
from cxrkit.errors import AttributionError, CxrkitError, DataError, ModelError, ParameterError

__version__ = "0.1.0"
__all__ = [
    "AttributionError",
    "CxrkitError",
    "DataError",
    "ModelError",
    "ParameterError",
    "attribute",
    "attribution",
    "data",
    "metrics",
    "models",
    "study",
    "view",
]

_torchvision.install()


def __getattr__(name: str):
    # Subpackages load on first use: `import cxrkit` needs neither torch nor anything that only the book needs.
    if name == "attribute":
        return importlib.import_module("cxrkit.attribution").attribute
    if name in {"attribution", "data", "metrics", "models", "study", "view"}:
        return importlib.import_module(f"cxrkit.{name}")
    raise AttributeError(f"module 'cxrkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
