"""Lets torchvision import on a CPU-only torch.

torchvision's wheels on the package index are linked against CUDA. Beside a CPU build of torch their operators don't
load, and `import torchvision` dies on the missing operator `torchvision::nms`. Declaring the two operator schemas it
registers fakes for is enough for models, transforms, feature extraction and box arithmetic. Where the real operators
load, nothing is declared.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # a dropped Library object would take its schemas along


class _BeforeTorchvision:
    """Import hook that runs once, just before torchvision is first imported, so that `import cxrkit` stays light."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def install() -> None:
    """Arrange for the schemas to be declared before the first import of torchvision; idempotent."""
    if "torchvision" in sys.modules or any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _BeforeTorchvision())


def declare_missing_operators() -> bool:
    """Declare torchvision's operator schemas if its own library can't be loaded; returns whether it had to."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return False
    import torch

    if torch.version.cuda is not None or sys.platform == "win32":
        return False  # a CUDA torch loads the operators; Windows wheels on the index are CPU builds
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return False
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True
