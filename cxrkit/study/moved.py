"""Names that pages took from `cxrkit.study` before `cxrkit.train` had them: they give a warning, for one release."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_HOMES = dict.fromkeys(("TrainParameters", "SearchParameters"), "parameters")
_HOMES |= {"fit": "loop", "print_epoch": "loop", "load_data": "setup", "make_model": "setup"}
_HOMES |= {"predict": "scoring", "selections": "scoring", "presets": "presets", "search": "search"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"cxrkit.study.{name} is cxrkit.train.{name} now", FutureWarning, stacklevel=3)
    module = importlib.import_module(f"cxrkit.train.{_HOMES[name]}")
    return module if _HOMES[name] == name else getattr(module, name)
