"""Everything that is wrong with a downloaded folder, found in one go: tables, files, duplicates, what nobody asked for.

Also the counts of what was loaded beside those that were published.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cxrkit.data.dataset import Dataset
from cxrkit.data.download import Entry, entries
from cxrkit.data.files import FileRenderer
from cxrkit.data.parallel import spread
from cxrkit.data.public.layout import PICTURES
from cxrkit.data.readers import noticing, read_image
from cxrkit.data.size_limits import MOST_BYTES
from cxrkit.data.sources import SOURCES, manifest, read
from cxrkit.data.tables import collecting
from cxrkit.errors import CxrkitError
from cxrkit.files import checksum

__all__ = ["KINDS", "check", "counts"]

KINDS = {
    "table": "what the tables say can't be right",
    "notice": "a part of a table is left out, or a table or file may not mean what was read",
    "missing": "a file that a table names is not there",
    "image": "a file can't be read, or is not of the size that a table says",
    "checksum": "a file differs from its published checksum or size",
    "duplicate": "two images are the same file, byte for byte",
    "unexpected": "a picture that no image of the source uses",
}
_COLUMNS = ["kind", "file", "line", "problem", "value"]
# Files are opened whole, but nobody looks at the pixels.
_SIZE = 32


def check(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """All problems of a source's folder: columns kind (one of ``KINDS``), file, line, problem, value; empty for none.

    Tables are read with every problem noted instead of the first; then every image is opened and decoded, in parallel
    (``workers`` processes; None: one a core). Where the tables can't be read at all, every picture in the folder is.
    ``options``: as for ``cxrkit.data.load``. Raises ParameterError for an unknown source or option.
    """
    found: list[tuple] = []
    dataset = _tables(name, root, options, found)
    if dataset is not None and isinstance(dataset.renderer, FileRenderer):
        paths = [str(dataset.renderer.paths[row]) for row in dataset.rows]
        patients = dataset.table["patient_id"].astype(str).tolist()
    else:
        paths = sorted(_pictures(root)) if root is not None else []
        patients = [""] * len(paths)
        dataset = None
    look = _Look(paths, dataset)
    digests: dict[str, int] = {}
    results = dict(spread(look, range(len(paths)), workers, progress))
    for index in range(len(paths)):
        kind, problem, digest = results[index] if isinstance(results[index], tuple) else ("image", results[index], "")
        if problem:
            found.append((kind, paths[index], None, problem, ""))
        first = digests.setdefault(digest, index) if digest else index
        if first != index and paths[first] != paths[index]:
            whose = "the same patient" if patients[first] == patients[index] else "another patient"
            found.append(
                ("duplicate", paths[index], None, f"holds the same bytes as the image of {whose}", paths[first])
            )
    if root is not None and Path(root).is_dir():
        listed = entries(name, manifest(name))
        found += _published(listed, Path(root))
        found += _unexpected(listed, Path(root), dataset, paths)
    return pd.DataFrame(found, columns=_COLUMNS).astype({"line": "Int64"})


def _tables(
    name: str, root: str | os.PathLike | None, options: Mapping[str, Any], found: list[tuple]
) -> Dataset | None:
    """The dataset as far as it can be read; problems of the tables are added to ``found``."""
    # Files that are not there are told; the others are worth a look all the same.
    lenient = name in SOURCES and "missing" in SOURCES[name].options() and "missing" not in options
    for more in ({}, {"missing": "leave_out"})[: 1 + lenient]:
        dataset = None
        with warnings.catch_warnings(), collecting() as problems:
            warnings.simplefilter("ignore", UserWarning)
            dataset = read(name, root, size=_SIZE, **options, **more)
        if not more:
            found += [(p.kind, p.file, p.line, p.problem, p.value) for p in problems]
        if dataset is not None:
            break
    return dataset


class _Look:
    """Opens one image; returns the kind of problem, the problem and the checksum of the file."""

    def __init__(self, paths: list[str], dataset: Dataset | None):
        self.paths, self.dataset = paths, dataset

    def __call__(self, index: int) -> tuple[str, str, str]:
        path = self.paths[index]
        try:
            with noticing() as notices:
                if self.dataset is None:
                    read_image(path)
                else:
                    self.dataset.draw(index)
            kind, problem = "notice", "; ".join(notices)
        except CxrkitError as error:
            kind, problem = "image", str(error.__cause__ or error).removeprefix(f"{path}: ")
        return kind if os.path.exists(path) else "missing", problem, _digest(path)


def _digest(path: str) -> str:
    try:
        return checksum(path) if os.path.isfile(path) and os.path.getsize(path) <= MOST_BYTES else ""
    except (OSError, ValueError):
        return ""


def _pictures(root: str | os.PathLike) -> Iterator[str]:
    """Every picture below a folder; hidden folders, where caches and others' notes lie, are left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        yield from (os.path.join(folder, name) for name in sorted(names) if name.lower().endswith(PICTURES))


def _published(listed: list[Entry], root: Path) -> Iterator[tuple]:
    for entry in (one for one in listed if not one.pattern):
        # Unzipped one level deeper, they are no less the published ones.
        for path in (root / entry.path, *root.glob(f"*/{entry.path}")):
            if not path.is_file():
                if os.path.lexists(path):
                    yield "table", str(path), None, "is a folder or no ordinary file, expected a file", ""
            elif entry.bytes is not None and path.stat().st_size != entry.bytes:
                yield "checksum", str(path), None, f"has {path.stat().st_size} bytes, published are {entry.bytes}", ""
            elif entry.algorithm and not entry.matches(path):
                yield "checksum", str(path), None, f"the {entry.algorithm} differs from the published one", ""


def _unexpected(listed: list[Entry], root: Path, dataset: Dataset | None, paths: list[str]) -> Iterator[tuple]:
    if dataset is None:
        return
    used = set(paths)
    for column in dataset.table.select_dtypes(exclude="number").columns:
        # Some sources name masks in further columns, relative to the folder or not.
        names = {value for value in dataset.table[column] if isinstance(value, str)}
        used |= {os.path.join(root, value) for value in names if value.lower().endswith(PICTURES)}
    used = set(map(os.path.abspath, used))
    known = [entry for entry in listed if entry.optional or not entry.pattern]
    for path in _pictures(root):
        inside = Path(path).relative_to(root)
        if os.path.abspath(path) not in used and not any(entry.covers(inside) for entry in known):
            yield "unexpected", path, None, "no image of the source uses this picture", ""


def counts(dataset: Dataset, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Loaded and published counts: columns what, loaded, published (None where none is)."""
    published = manifest.get("counts") or {}
    loaded = {
        "images": len(dataset),
        "patients": dataset.table["patient_id"].nunique(),
        "boxes": len(dataset.boxes),
        "boxed_images": dataset.boxes["image_id"].nunique(),
        "boxes_without_mask": len(dataset.maskless_boxes),
        "boxes_of_labels_that_their_image_lacks": len(dataset.denied_boxes),
    }
    rows = [(what.replace("_", " "), number, published.get(what)) for what, number in loaded.items()]
    of_label = published.get("labels")
    of_label = of_label if isinstance(of_label, Mapping) else {}
    positive = dataset.table[list(dataset.labels)].sum().astype(int)
    rows += [(f"positive: {label}", int(positive[label]), of_label.get(label)) for label in dataset.labels]
    return pd.DataFrame(rows, columns=["what", "loaded", "published"]).astype({"loaded": "Int64", "published": "Int64"})
