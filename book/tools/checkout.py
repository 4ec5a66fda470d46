"""The state of the checkout that the book is built from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

__all__ = ["commit"]


@functools.cache
def commit(project: Path) -> str:
    """The commit that the sources stand at, with a word where they were changed since; empty outside a checkout."""
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!book/results"]  # these are no sources
    try:
        said = [
            subprocess.run(["git", *command], cwd=project, capture_output=True, text=True, timeout=20)
            for command in (["rev-parse", "--short=12", "HEAD"], changed)
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    if any(one.returncode for one in said):
        return ""
    return said[0].stdout.strip() + (", with changes" if said[1].stdout.strip() else "")
