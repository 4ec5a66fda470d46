"""The commands `cxrkit data …`: what there is, how to get it, whether it is whole, and the pixel cache."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from cxrkit.errors import ParameterError
from cxrkit.terminal import console, print_frame

data_app = typer.Typer(no_args_is_help=True, help="The sources of images.")

Root = Annotated[str | None, typer.Option(help="folder of a downloaded source")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the source, as NAME=VALUE (YAML)")]
Workers = Annotated[int | None, typer.Option(help="processes; by default one a core", min=0)]
Cache = Annotated[str, typer.Option(help="folder of the caches; auto: $CXRKIT_CACHE or the platform's")]
# A folder may hold thousands of problems; the file has them all.
_SHOWN = 20


@data_app.command("list")
def data_list(cache: Cache = "auto") -> None:
    """Name every source: what it is, its terms, its paper, how to get it, and the sizes that are prepared."""
    import pandas as pd

    from cxrkit import data
    from cxrkit.data.cache import prepared
    from cxrkit.data.download import entries
    from cxrkit.data.sources import SOURCES

    rows = []
    for name, card in data.sources().items():
        by_url = any(entry.url for entry in entries(name, card))
        sizes = sorted({size for size, _ in prepared(name, cache)})
        rows.append(
            {
                "name": name,
                "title": card["title"],
                "licence": _text(card.get("licence", "")),
                "paper": _text(card.get("paper", card.get("cite", ""))),
                "get": "cxrkit data get" if by_url else ("by hand" if SOURCES[name].needs_root else "nothing to get"),
                "prepared": ", ".join(map(str, sizes)),
            }
        )
    print_frame(pd.DataFrame(rows))


@data_app.command("describe")
def data_describe(name: str, root: Root = None, option: Options = None) -> None:
    """Print a source's card; with its folder, also the counts of what is there beside the published ones."""
    import pandas as pd

    from cxrkit import data
    from cxrkit.data.checking import counts
    from cxrkit.data.sources import SOURCES

    card = _card(name)
    for key in ("title", "description", "licence", "cite", "labels", "boxes", "splits", "traps"):
        if card.get(key):
            console.print(f"{key}: {_text(card[key])}", markup=False)
    if SOURCES[name].needs_root and root is None:
        console.print("With --root FOLDER the images and boxes of that folder are counted.")
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dataset = data.load(name, root=root, **_options(option))
    frame = counts(dataset, card)
    frame["published"] = ["" if number is pd.NA else str(number) for number in frame["published"]]
    console.print(f"{name}: {len(dataset)} images of {dataset.table['patient_id'].nunique()} patients", markup=False)
    print_frame(frame)
    others = [text for one in told if not any(notice in (text := str(one.message)) for notice in dataset.notices)]
    for text in [*dataset.notices, *others]:
        console.print(f"notice: {text}", markup=False)


@data_app.command("check")
def data_check(
    name: str,
    root: Root = None,
    option: Options = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="a kind of problem that is none here; may be repeated")
    ] = None,
    workers: Workers = None,
    format: Annotated[str, typer.Option(help="text, or csv for all problems as a table")] = "text",
    to: Annotated[Path | None, typer.Option(help="file for the table of problems; by default standard output")] = None,
) -> None:
    """List every problem of a folder: tables, files, sizes, duplicates. Exits with status 1 when there are any."""
    from cxrkit.data.checking import KINDS, check

    _card(name)
    ignored = set(ignore or ())
    if ignored - set(KINDS):
        raise ParameterError(f"--ignore {sorted(ignored - set(KINDS))}: unknown; the kinds are {list(KINDS)}")
    if format not in ("text", "csv"):
        raise ParameterError(f"--format {format!r} is unknown; use 'text' or 'csv'")
    found = check(name, root, workers=workers, **_options(option))
    found = found[~found["kind"].isin(ignored)]
    if to is not None:
        from cxrkit.files import replace_file

        replace_file(to, lambda temporary: found.to_csv(temporary, index=False))
    if format == "csv" and to is None:
        found.to_csv(sys.stdout, index=False)
    else:
        _print_problems(found)
    if len(found):
        raise SystemExit(1)


def _print_problems(found) -> None:
    import pandas as pd

    if not len(found):
        console.print("no problem found")
    for (kind, problem), rows in found.groupby(["kind", "problem"], sort=False):
        console.print(f"{kind}: {problem}", markup=False)
        for row in rows.head(_SHOWN).itertuples():
            line = "" if pd.isna(row.line) else f", line {row.line}"
            console.print(f"  {row.file}{line}" + (f": {row.value}" if row.value else ""), markup=False)
        if len(rows) > _SHOWN:
            console.print(f"  and {len(rows) - _SHOWN} more; --format csv lists all")
    if len(found):
        console.print(
            f"{len(found)} problems: " + ", ".join(f"{n} {k}" for k, n in found["kind"].value_counts().items())
        )


@data_app.command("prepare")
def data_prepare(
    name: str,
    root: Root = None,
    size: Annotated[int, typer.Option(help="images are size x size")] = 224,
    workers: Workers = None,
    cache: Cache = "auto",
    bits: Annotated[int, typer.Option(help="bits a pixel, 8 or 16")] = 8,
    preprocessing: Annotated[str | None, typer.Option(help="how images get to the square, by name")] = None,
    seed: int = 0,
    option: Options = None,
) -> None:
    """Draw every image once and keep it; killed at any moment, the same command goes on. Exits with 1 if some fail."""
    from cxrkit import data

    _card(name)
    done = data.prepare(
        name, root, size, seed, cache=cache, workers=workers, bits=bits, preprocessing=preprocessing, **_options(option)
    )
    console.print(
        f"{done.path}: {done.images} images at {size} x {size}, {bits} bits, {done.bytes / 1e6:.0f} MB; "
        f"{done.drawn} drawn now, in {done.seconds:.1f} s",
        markup=False,
    )
    for image_id, problem in list(done.problems.items())[:_SHOWN]:
        console.print(f"  {image_id}: {problem}", markup=False)
    if done.problems:
        console.print(f"{len(done.problems)} images can't be read; `cxrkit data check {name}` lists all problems")
        raise SystemExit(1)


@data_app.command("get")
def data_get(name: str, to: Annotated[Path, typer.Option(help="folder for the files")] = Path(".")) -> None:
    """Download what needs no account, checksums compared, and print the steps for the rest."""
    from cxrkit.data.download import get

    card = _card(name)
    console.print(f"{card['title']}. Terms: {_text(card.get('licence', 'not known'))}", markup=False)
    files = get(name, to)
    for path in files:
        console.print(f"  {path}: here, its checksum is right", markup=False)
    if not files:
        console.print("Nothing of it can be downloaded without an account, or nothing needs to be.")
    steps = card.get("get", [])
    for number, step in enumerate([steps] if isinstance(steps, str) else steps, 1):
        console.print(f"{number}. {_text(step)}", markup=False)


def _card(name: str) -> dict[str, Any]:
    from cxrkit import data

    cards = data.sources()
    if name not in cards:
        raise ParameterError(f"source {name!r} is unknown; the sources are {sorted(cards)}")
    return cards[name]


def _options(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments; values are read as YAML: numbers, lists, true."""
    from cxrkit.yaml_files import parse_yaml

    options = {}
    for pair in given or ():
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ParameterError(f"--option {pair!r}: give NAME=VALUE")
        options[key.strip()] = parse_yaml(value, f"--option {pair!r}")
    return options


def _text(value: Any) -> str:
    """A value of a manifest in one line."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return " ".join(str(value).split())
