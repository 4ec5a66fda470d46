"""DCMTK, an independent viewer of DICOM files: what it shows, for the readers to be compared with."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LUMA = (0.299, 0.587, 0.114)


def require() -> None:
    """Skip the tests of a module where DCMTK is missing, except in CI, where they fail."""
    if shutil.which("dcmj2pnm") is None:
        message = "there is no DCMTK here; install the package 'dcmtk' to compare with it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def shows(path: Path, *options: str, tool: str = "dcmj2pnm") -> np.ndarray | None:
    """The grey that DCMTK shows, ``[H, W]`` in [0, 1], without overlays; None where it refuses the file."""
    command = [tool, "--quiet", "-O", "+Ma", *options, "+on2", "-il", str(path)]
    said = subprocess.run(command, capture_output=True)
    if not said.stdout:
        return None
    with Image.open(io.BytesIO(said.stdout)) as picture:
        pixels = np.asarray(picture)
        if pixels.ndim == 3:
            return pixels @ np.array(LUMA) / 255
        return pixels / (65535 if picture.mode.startswith("I") else 255)


def between(low: float, high: float) -> tuple[str, str, str]:
    """The option for a linear window that begins at ``low`` and ends at ``high``."""
    return "+Ww", str((low + high + 1) / 2), str(high - low + 1)
