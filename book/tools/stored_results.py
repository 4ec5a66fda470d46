"""Tables that the book shows without running their grid: made on a GPU, or on images that are no part of the project.

They are small, lie in `book/results/PAPER-NAME`, and tell in `card.json` what they were made of, by what, and when.
"""

from __future__ import annotations

import importlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import cxrkit
from book.tools.checkout import commit
from cxrkit import grid
from cxrkit.errors import DataError, ParameterError
from cxrkit.markdown import escaped
from cxrkit.study import runs
from cxrkit.study.published import papers
from cxrkit.study.study import Study

__all__ = ["Kept", "keep", "of"]

NOTICE = "Not a medical device; not for clinical use."
_FEW = 1000  # test patients below which the caption warns


@dataclass(frozen=True)
class Kept:
    """Tables of one grid by title, and their card: command, images, networks, sizes, epochs, folds, seeds, device,
    version, commit, date."""

    tables: dict[str, pd.DataFrame]
    card: dict[str, Any]

    @property
    def caption(self) -> str:
        """The card in a few sentences: Markdown in which what people wrote is plain text."""
        said = [escaped(self.card[name]) for name in ("images", "device")]
        card = self.card | {"images": said[0], "device": said[1], "networks": map(escaped, self.card["networks"])}
        folds, seeds = (_counted(len(card[name]), name[:-1]) for name in ("folds", "seeds"))
        text = (
            f"{card['images']} Networks: {', '.join(card['networks'])}; {_listed(card['sizes'])} pixels, "
            f"{_listed(card['epochs'])} epochs, {folds}, {seeds}; tested on {card['test_images']} images of "
            f"{card['test_patients']} patients. Made on {card['device']} by `{card['command']}`, "
            f"cxrkit {card['version']} ({card['commit']}), {card['date']}."
        )
        few = card["test_patients"] < _FEW
        return text + (" A demonstration with intervals, not a claim: the images are few." if few else "")


def keep(paper: str, name: str, source: str = "") -> Path:
    """Keep the tables of a finished grid, such as "bcos:full", with the book; returns their folder.

    `source`: whose images they are and on what terms, in a sentence; needed for a folder of one's own. What was kept of
    the grid before is replaced. Raises ParameterError for an unknown paper or a missing source, DataError while runs of
    the grid aren't done.
    """
    stored = _tables_of(paper)
    waiting = [state.task.key for state in grid.states(grid.plan(name)) if state.name != "done"]
    if waiting:
        raise DataError(
            f"{len(waiting)} runs of the grid {name!r} aren't done, first {waiting[0]}; run `{_command(name)}`"
        )
    study = grid.finished(name)
    card = _card(study, source)
    tables = {}
    own = any(run.parameters.dataset == "folder" for run in study.trained)
    for title, make in stored.items():
        if title == "Claims" and own:
            continue  # a verdict needs the paper's images, or the phantom's, of which only directions are said
        try:
            tables[title] = make(study)
        except ParameterError as error:  # the grid holds no such networks
            card.setdefault("left_out", {})[title] = str(error)
    return _write(runs.project_folder() / "book" / "results" / f"{paper}-{_called(name)}", tables, card)


def of(paper: str) -> list[Kept]:
    """Everything kept of a paper, by name. Raises DataError for a folder that isn't whole."""
    _known(paper)
    return [_read(place) for place in sorted((runs.project_folder() / "book" / "results").glob(f"{paper}-*"))]


def _known(paper: str) -> None:
    if paper not in papers():
        raise ParameterError(f"there is no paper {paper!r}; known: {', '.join(papers())}")


def _tables_of(paper: str) -> Mapping[str, Callable[[Study], pd.DataFrame]]:
    """The tables that are stored of a paper's grid, by title; one that a grid can't give is left out."""
    _known(paper)
    return importlib.import_module(f"papers.{paper}.tables").STORED


def _read(place: Path) -> Kept:
    try:
        card = json.loads((place / "card.json").read_text(encoding="utf-8"))
        return Kept({title: pd.read_csv(place / file) for title, file in card["tables"].items()}, card)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place}: not whole ({error}); take it from the project again") from None


def _write(place: Path, tables: Mapping[str, pd.DataFrame], card: dict[str, Any]) -> Path:
    hidden = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    hidden.mkdir(parents=True)
    try:
        card = card | {"tables": {title: f"{_slug(title)}.csv" for title in tables}}
        for title, frame in tables.items():
            frame.to_csv(hidden / card["tables"][title], index=False, float_format="%.6g")
        text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
        (hidden / "card.json").write_text(text + "\n", encoding="utf-8")
        runs.replace_folder(hidden, place)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return place


def _card(study: Study, source: str) -> dict[str, Any]:
    name, trained, found = study.name, study.trained, study.runs
    parameters = [run.parameters for run in trained]
    tested = pd.concat([run.frame("predictions")[["image_id", "patient_id"]] for run in trained])
    return {
        "command": _command(name),
        "images": _images(parameters, source),
        "networks": list(dict.fromkeys(map(_network, parameters))),
        "sizes": sorted({one.size for one in parameters}),
        "epochs": sorted({one.epochs for one in parameters}),
        "folds": sorted({one.fold for one in parameters}),
        "seeds": sorted({one.seed for one in parameters}),
        "runs": len(found),
        "test_images": int(tested["image_id"].nunique()),
        "test_patients": int(tested["patient_id"].nunique()),
        "device": " and ".join(dict.fromkeys(_device(run) for run in trained)),
        "version": cxrkit.__version__,
        "commit": commit(runs.project_folder()) or "no checkout",
        "date": max(run.card["finished"] for run in found)[:10],
        "notice": NOTICE,
    }


def _images(parameters: Sequence[Any], source: str) -> str:
    """What the images are, in sentences."""
    told = []
    for name in dict.fromkeys(one.dataset for one in parameters):
        manifest = cxrkit.data.sources().get(name, {})
        if name == "phantom":
            told.append("Synthetic radiographs of the phantom.")
        elif source:
            told.append(source.strip().rstrip(".") + ".")
        elif name == "folder":
            raise ParameterError(
                "these images come from a folder: say in `source` (--source) whose they are, and on what terms"
            )
        else:
            told.append(f"{manifest.get('title', name)} ({manifest.get('licence', 'terms: see its page')}).")
    return " ".join(told)


def _network(parameters: Any) -> str:
    pool = "" if parameters.antialias == "none" else f" with {parameters.antialias}"
    return f"{parameters.model}{pool}" + (f" from {parameters.weights} weights" if parameters.weights else "")


def _device(run: runs.Run) -> str:
    told = run.json("environment.json")
    return told.get("cuda") or f"{told.get('cpu_count')} CPU cores"


def _command(name: str) -> str:
    file, _, profile = name.partition(":")
    return f"cxrkit grid run {file}" + (f" --profile {profile}" if profile else "")


def _called(name: str) -> str:
    """The profile of a grid; of one without, its file's name."""
    return Path(name.rsplit(":", 1)[-1]).stem


def _slug(title: str) -> str:
    return "_".join("".join(sign if sign.isalnum() else " " for sign in title.lower()).split())


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
