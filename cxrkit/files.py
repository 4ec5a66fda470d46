"""Files as wholes: their checksums, and writing them at once or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

__all__ = ["checksum", "replace_file"]


def checksum(path: str | Path, algorithm: str = "sha256") -> str:
    """Checksum of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def replace_file(path: Path, write: Callable[[str], object] | str) -> None:
    """Write a text, or what `write` puts into the file of a given name, to a temporary name in the same folder, with
    the permissions of any new file, then move it into place."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        temporary.touch(exist_ok=False)  # what the umask allows; others in a group may read results
        mode = temporary.stat().st_mode
        if isinstance(write, str):
            temporary.write_text(write, encoding="utf-8")
        else:
            write(str(temporary))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
