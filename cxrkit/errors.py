"""The errors that cxrkit raises: each message names what is at fault and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Collection

__all__ = ["AttributionError", "CxrkitError", "DataError", "ModelError", "ParameterError"]


class CxrkitError(Exception):
    """Root of every error that cxrkit raises on purpose."""


class DataError(CxrkitError):
    """A file, table or box that can't be read as it stands; the message names file and row."""


class ModelError(CxrkitError):
    """A network, weight file or label set that doesn't fit; the message names the part at fault."""


class AttributionError(CxrkitError):
    """A method that can't give a right map for this network; the message names layer and remedy."""


class ParameterError(CxrkitError, ValueError):
    """A parameter that is unknown or out of range; the message names it and what is allowed."""


def meant(name: str, known: Collection[str], most: int = 1) -> str:
    """What an unknown name was probably meant to be, as a question; all known ones where none is near."""
    near = difflib.get_close_matches(name, known, n=most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
