"""Markdown: text that is shown as it is."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["escaped"]


def escaped(text: Any) -> str:
    """Text that Markdown and HTML leave alone: names of labels, files and columns may hold signs of either."""
    return re.sub(r"([\\*_\[\]<>{}$`])", r"\\\1", str(text))
