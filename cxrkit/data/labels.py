"""Labels of a table of images as people write them: several in a cell, in many spellings, with words for none."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.tables import places, refuse
from cxrkit.errors import ParameterError

__all__ = [
    *("ImageLabels", "as_label_map", "check_known", "clean", "doubtful", "is_blank", "is_none", "nearest"),
    *("read_labels", "spelling"),
]

NO_FINDING = "No Finding"
_NONE = re.compile(r"no ?findings?\.?")
# A missing value, as pandas, R, JSON and spreadsheets write it.
_BLANK = {"nan", "none", "null", "<na>", "na", "n/a", "#n/a", "nat", "-", "--", ".", "?"}
# A label of its own in some sets, no finding in others.
_PERHAPS_NONE = re.compile(r"normal|healthy|negative|unremarkable|unknown|(no|without|not|nothing)\b.*")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")


@dataclass(frozen=True)
class ImageLabels:
    """``cell``: int ``[N]``, which of the combinations in ``found`` each image has; ``parents``: child -> parent.

    ``found`` holds all ancestors and new names; ``written`` all names as the table has them. ``notices``: readings
    that may not be the intended ones.
    """

    cell: np.ndarray
    found: list[set[str]] = field(default_factory=list)
    parents: dict[str, str] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """How many images have each label."""
        counts: Counter[str] = Counter()
        for names, images in zip(self.found, np.bincount(self.cell, minlength=len(self.found)).tolist(), strict=True):
            counts.update(dict.fromkeys(names, images))
        return counts


def clean(name: str) -> str:
    """A name without quotes, commas and white space around it; inside, single spaces, and composed letters."""
    name = " ".join(unicodedata.normalize("NFC", name).split()).strip(" ,\ufeff")
    return name[1:-1].strip() if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name


def spelling(name: str) -> str:
    """A name in lower case with single spaces between its words: equal for names that differ in typing alone."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def is_none(name: str) -> bool:
    """Whether a name says that there is no finding."""
    return _NONE.fullmatch(spelling(name)) is not None


def is_blank(name: str) -> bool:
    """Whether a name is a missing value, written as text."""
    return not name or name.casefold() in _BLANK


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name whose spelling is closest to that of another, or None."""
    spelt = {one: spelling(one) for one in sorted(known)}
    close = difflib.get_close_matches(spelling(name), spelt.values(), n=1, cutoff=0.75)
    same = [one for one, how in spelt.items() if close and how == close[0]]
    return difflib.get_close_matches(name, same, n=1, cutoff=0)[0] if same else None


def as_label_map(label_map: object) -> dict[str, str]:
    """``label_map`` as a dictionary. Raises ParameterError for what doesn't map text to text."""
    rename = {} if label_map is None else label_map
    names = [name for pair in rename.items() for name in pair] if isinstance(rename, Mapping) else [None]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ParameterError(
            f"label_map={label_map!r}: give old names and new ones, such as {{'mass': 'Mass', 'clear': {NO_FINDING!r}}}"
        )
    return dict(rename)


def check_known(option: str, names: Iterable[str], known: Collection[str], boxes: str = "boxes.csv") -> None:
    """Raise ParameterError for labels that an option names and neither images.csv nor ``boxes`` holds."""
    if unknown := [name for name in names if name not in known]:
        close = nearest(str(unknown[0]), known)
        raise ParameterError(
            f"{option} {unknown} occur neither in images.csv nor in {boxes}; "
            f"{f'did you mean {close!r}? ' if close else ''}known: {sorted(known)}"
        )


def read_labels(
    path: Path,
    column: pd.Series,
    boxed: Collection[str],
    rename: Mapping[str, str],
    hierarchy_separator: str | None,
    label_separator: str | None,
) -> ImageLabels:
    """The labels of each image; ``column``: the cells, with lines as index; ``boxed``: labels of boxes.

    Raises DataError for cells that contradict themselves, for one label in several spellings, and for a comma that may
    or may not separate two labels; ParameterError for a separator that isn't text.
    """
    if not isinstance(hierarchy_separator, str | None):
        raise ParameterError(f"hierarchy_separator={hierarchy_separator!r}: give the sign, such as '/', or None")
    if not isinstance(label_separator, str | None) or label_separator == "":
        raise ParameterError(f"label_separator={label_separator!r}: give the sign, such as ',', or None")
    # Few combinations of labels make up many rows.
    cell_of, cells = pd.factorize(column)
    labels = ImageLabels(cell_of)
    names = _split(path, column, labels, list(cells), set(boxed), label_separator)
    both, blank = set(), set()
    for number, of_cell in enumerate(names):
        labels.written.update(of_cell)
        blank |= {number for name in of_cell if name not in rename and is_blank(name)}
        held = {name for name in of_cell if name in rename or not is_blank(name)}
        chains = [_chain(name, hierarchy_separator, rename) for name in sorted(held)]
        for chain, old in chains:
            labels.written.update(old)
            labels.parents.update((child, parent) for parent, child in pairwise(chain) if child != parent)
        labels.found.append({step for chain, _ in chains for step in chain})
        if labels.found[-1] and any(not chain for chain, _ in chains):
            both.add(number)
    refuse(path, f"labels holds {NO_FINDING!r} beside a finding", _rows(column, labels, both))
    if where := _rows(column, labels, blank):
        values = ", ".join(sorted({value for _, value in where})[:3])
        labels.notices.append(
            f"labels {values} ({len(where)} rows, the first on line {where[0][0]}) hold a missing value, read as no "
            "finding; label_map gives it a name if it is a label"
        )
    _refuse_two_spellings(path, column, labels)
    return labels


def _rows(column: pd.Series, labels: ImageLabels, cells: Iterable[int]) -> list[tuple[int, str]]:
    return places(column, np.isin(labels.cell, list(cells)))


def _chain(name: str, separator: str | None, rename: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """A label path from its root (a, a/b, a/b/c), by new names and without "No Finding"; and all as written."""
    steps = [step.strip() for step in name.split(separator)] if separator and not is_none(name) else [name]
    steps = [step for step in steps if step] or [name]
    old = [separator.join(steps[: depth + 1]) if separator else name for depth in range(len(steps))]
    return [new for step in old if not is_none(new := rename.get(step, step))], old


# Several labels in a cell


def _split(
    path: Path, column: pd.Series, labels: ImageLabels, cells: list[str], boxed: set[str], separator: str | None
) -> list[list[str]]:
    """The names in each cell. A comma separates names that also occur alone; others belong to a name or are refused."""
    listed = [_listed(cell) for cell in cells]
    pattern = r"[;|\n\t]" if separator is None else re.escape(separator)
    parts = [_clean(re.split(pattern, cell)) if of is None else of for cell, of in zip(cells, listed, strict=True)]
    if separator is not None:
        return parts
    alone = boxed | {name for names in parts for name in names if "," not in name}
    several = any(len(names) > 1 for names, of_list in zip(parts, listed, strict=True) if of_list is None)
    unclear, whole, found = set(), set(), []
    for number, names in enumerate(parts):
        found.append([])
        for name in names:
            pieces = _clean(name.split(",")) if listed[number] is None else [name]
            if len(pieces) > 1 and not alone.issuperset(pieces):
                prose = re.fullmatch(r"[^,]+(, [^,A-Z\d][^,]*)+", name) and not alone.intersection(pieces[1:])
                (whole if prose or several else unclear).add(number)
                pieces = [name]
            found[-1] += pieces
    refuse(
        path,
        "a comma may separate two labels or belong to one; give label_separator=',' or label_separator=';'",
        _rows(column, labels, unclear),
    )
    if where := _rows(column, labels, whole):
        labels.notices.append(
            f"the comma in labels {where[0][1]} ({len(where)} rows, the first on line {where[0][0]}) is read as part "
            "of the name; label_separator=',' separates labels there"
        )
    return found


def _clean(names: Iterable[str]) -> list[str]:
    return [name for name in map(clean, names) if name]


def _listed(cell: str) -> list[str] | None:
    """The names in a list that was written as text, such as ``['Mass', 'Edema']``; None for other cells."""
    if not re.fullmatch(r"\[.*\]|\(.*\)|\{.*\}", cell, re.DOTALL):
        return [] if cell == "set()" else None
    inside = cell[1:-1]
    if quoted := _QUOTED.findall(inside):
        return _clean(one or other for one, other in quoted) if not _QUOTED.sub("", inside).strip(" ,;\n\t") else None
    return _clean(re.split(r"[,;|]", inside)) if cell[0] == "[" or not inside.strip() else None


# Doubtful labels


def _refuse_two_spellings(path: Path, column: pd.Series, labels: ImageLabels) -> None:
    counts, spelt = labels.counts(), {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        spelt.setdefault(spelling(name), []).append(name)
    for first, *others in spelt.values():
        if others:
            rows = {number for number, names in enumerate(labels.found) if names.intersection(others)}
            problem = f"labels has {first!r} ({counts[first]} images) in another spelling, too; label_map="
            refuse(path, problem + repr(dict.fromkeys(others, first)) + " merges them", _rows(column, labels, rows))


def doubtful(labels: ImageLabels, rename: Mapping[str, str]) -> Iterator[str]:
    """Notices about labels that may mean none, several, or numbers."""
    counts = labels.counts()
    for name in sorted(set(counts).difference(rename.values())):
        # A name with a slash, such as RSNA's "No Lung Opacity / Not Normal", is read as a parent and its child.
        family = {name, labels.parents.get(name), *(one for one, parent in labels.parents.items() if parent == name)}
        if _PERHAPS_NONE.fullmatch(spelling(name)) and all(names <= family for names in labels.found if name in names):
            yield (
                f"{name!r} ({counts[name]} images) is read as a label of its own; if it means no finding, give "
                f"label_map={{{name!r}: {NO_FINDING!r}}}"
            )
        parts = [part.strip() for part in re.split(r"[+&/]|\band\b", name)]
        if len(parts) > 1 and all(part in counts for part in parts):
            yield f"{name!r} ({counts[name]} images) is read as one label, though its parts are labels; ';' separates"
    if some := sorted(name for name in counts if re.fullmatch(r"-?\d+(\.0+)?|true|false|yes|no", name, re.IGNORECASE)):
        how_many = "all" if len(some) == len(counts) else "some"
        yield f"{how_many} labels are numbers or yes and no: {', '.join(some[:5])}; label_map gives them names"
