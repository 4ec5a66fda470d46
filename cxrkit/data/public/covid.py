"""The combined COVID-19 set: Cohen's adults and a sample of Kermany's children, 14 labels in a hierarchy."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel

from cxrkit.data.covid_labels import HIERARCHY, LABELS
from cxrkit.data.public.covid_cohen import PATHS, VIEWS, radiographs
from cxrkit.data.public.kermany import kermany_table
from cxrkit.data.public.layout import find_folder, images_in
from cxrkit.data.public.loader import Missing, public_loader, read_json, with_labels
from cxrkit.data.splits import FOLDS, with_validation
from cxrkit.errors import DataError, ParameterError

__all__ = ["HIERARCHY", "LABELS", "SAMPLE", "SEEDS", "finding_labels", "load_covid", "published_parts"]

SAMPLE = {"No Finding": 500, "Viral Pneumonia": 250, "Bacterial Pneumonia": 250}
SEEDS = (1701, 1801, 806, 18011993, 8061994)
# Steps of a label path, in the words of the labels.
_WORDS = {"Viral": "Viral Pneumonia", "Bacterial": "Bacterial Pneumonia", "Fungal": "Fungal Pneumonia"}
_UNMATCHED = "E.Coli"  # in the authors' table, on four images, under no label
_AUTHORS = "metadataV2.csv"


class _Draw(BaseModel):
    """The authors' list of patients; numbers and texts are mixed in it."""

    train: list[int | str]
    test: list[int | str]


@public_loader
def load_covid(
    root: str | Path,
    *,
    seed: int = 0,
    fold: int = 0,
    protocol: Literal["corrected", "authors", "paper"] = "corrected",
    split_by: Literal["patients", "published"] = "patients",
    sample: Mapping[str, int] = SAMPLE,
    missing: Missing = "refuse",
) -> dict[str, Any]:
    """The combined set from a folder that holds both downloads, covid-chestxray-dataset and chest_xray.

    14 labels in alphabetical order; a label is positive where the finding holds its name or that of any label below.
    Of Kermany's images ``sample`` are drawn from ``seed``, by class; those of Cohen are the views PA, AP, AP Supine.
    E.Coli, which no label names, goes by ``protocol``; others that no label names (the collection grew after the paper)
    are left out with a warning. Where the authors' files metadataV2.csv and V2_60_40_00fold0.txt ... are in the
    folder, split_by="published" takes their images and their patients; an eighth of the training patients validates,
    where the authors chose the best epoch on the test part. Options: see data_manifests/covid.yaml. Raises DataError
    naming file and line. Source: paper `covid`, sections on labels and data, and its published code.
    """
    cohen, kermany = find_folder(root, ("metadata.csv", "images")), kermany_table(root)
    authors = None
    if split_by == "published":
        with contextlib.suppress(DataError):  # without them, their code draws again
            authors = find_folder(root, _AUTHORS)
    if authors is None:
        children = _sampled(kermany, sample, seed, missing)[["image_id", "patient_id", "path", "finding"]]
        table = pd.concat([radiographs(cohen / "metadata.csv", VIEWS, missing), children], keys=["Cohen", "Kermany"])
        table["source"] = table.index.get_level_values(0)
        table["patient_id"] = table["source"].str.lower() + "-" + table["patient_id"]
    else:
        files = {Path(path).name: path for path in kermany["path"]} | images_in(cohen / "images")
        table = radiographs(authors / _AUTHORS, VIEWS, missing, files)
        table["source"] = np.where(table["path"].isin(kermany["path"]), "Kermany", "Cohen")
    table = _labelled(table, protocol)
    if split_by == "published":
        table["split"] = _published(table, fold, seed, authors)
    return {"labels": LABELS, "table": table, "hierarchy": HIERARCHY}


# Labels


def finding_labels(finding: str, protocol: str = "corrected") -> tuple[str, ...]:
    """The labels that a finding makes positive, in order.

    ``finding``: names joined by commas, or a path of Cohen's later table ("Pneumonia/Viral/COVID-19"). The names are
    looked for as parts of the text, so "SARS" does not make ARDS positive, and "Mycoplasma Bacterial Pneumonia" makes
    Bacterial Pneumonia and Pneumonia so. ``protocol``: as for :func:`load_covid`.
    """
    names = [name.strip() for name in finding.split(",")]
    if protocol != "corrected":
        names = [name for name in names if name.split("/")[-1] != _UNMATCHED]
    steps = [step for name in names for step in (name, *PATHS.get(name, name).split("/"))]
    text = ", ".join(_WORDS.get(step, step) for step in steps)
    return tuple(label for label in LABELS if any(name in text for name in (label, *_below(label))))


def _below(label: str) -> list[str]:
    children = [child for child, parent in HIERARCHY.items() if parent == label]
    return children + [name for child in children for name in _below(child)]


def _labelled(table: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The rows that stay, with their labels: those with a label and, as the authors have it, E.Coli without any."""
    of_finding = {finding: finding_labels(finding, protocol) for finding in table["finding"].unique()}
    table = with_labels(table, LABELS, [np.isin(LABELS, of_finding[finding]) for finding in table["finding"]])
    matched = table["finding"].map(of_finding).astype(bool)
    unmatched = table["finding"].str.split("/").str[-1] == _UNMATCHED
    other = table["finding"][~matched & ~unmatched]
    if len(other):
        names = ", ".join(sorted(set(map(repr, other))))
        text = f"covid: {len(other)} images are left out because no label names {names}"
        warnings.warn(text, UserWarning, stacklevel=4)
    return table[matched | (unmatched & (protocol == "authors"))].reset_index(drop=True)


# Images


def _sampled(kermany: pd.DataFrame, sample: Mapping[str, int], seed: int, missing: str) -> pd.DataFrame:
    """Kermany's images, as many of each class as ``sample`` says."""
    if unknown := [finding for finding in sample if finding not in SAMPLE]:
        raise ParameterError(f"sample: {unknown} are no classes of Kermany; use some of {list(SAMPLE)}")
    chosen = []
    for position, (finding, wanted) in enumerate(sorted(sample.items())):
        rows = np.flatnonzero(kermany["finding"] == finding)
        if wanted < 0 or wanted > len(rows):
            text = f"sample: {wanted} images of {finding!r} are wanted, {len(rows)} are there"
            if missing == "refuse" or wanted < 0:
                raise ParameterError(text)
            warnings.warn(f"covid: {text}; all are taken", UserWarning, stacklevel=4)
        # The table is in order of name: the sample depends on the seed, not on the disk.
        chosen.extend(np.random.default_rng((seed, position)).permutation(rows)[:wanted])
    return kermany.iloc[np.sort(np.array(chosen, dtype=int))]


# The published draws


def _published(table: pd.DataFrame, fold: int, seed: int, authors: Path | None) -> np.ndarray:
    """The split column of one of the five draws; patients that were not drawn are "unused"."""
    patients = table["patient_id"]
    if authors is None:
        train, test = published_parts(table["finding"], patients, SEEDS[fold])
    else:
        draw = read_json(authors / f"V2_60_40_00fold{fold}.txt", _Draw, "the authors' list of patients (train, test)")
        train, test = set(map(str, draw.train)), set(map(str, draw.test))
    both = len(train & test & set(patients))
    warnings.warn(
        "covid: the published splits are five random 60/40 draws, not folds: their test parts overlap; in draw "
        f"{fold} {both} patients are drawn for training and test, and stay in the test part here",
        stacklevel=4,
    )
    is_test = patients.isin(test).to_numpy()
    used = is_test | patients.isin(train).to_numpy()
    split = np.full(len(table), "unused", dtype=object)
    targets = table[list(LABELS)].to_numpy()[used]
    split[used] = with_validation(is_test[used], patients[used], targets, seed * FOLDS + fold)
    return split


def published_parts(finding: pd.Series, patients: pd.Series, seed: int) -> tuple[set[str], set[str]]:
    """Patients for training and for test as the authors' code draws them, finding by finding.

    Of the images of a finding with n patients, int(0.6 n) are drawn, and their patients train; of the images of its
    other patients int(0.4 n) are drawn, and their patients test. Images are drawn, not patients, so a patient with
    many images is drawn several times and others never; a patient with two findings may land on both sides.
    """
    train: set[str] = set()
    test: set[str] = set()
    for name in finding.unique():
        images = patients[finding == name]
        count = images.nunique()
        drawn = set(images.sample(int(0.6 * count), random_state=seed))
        others = images[~images.isin(drawn)]
        train |= drawn
        test |= set(others.sample(min(int(0.4 * count), len(others)), random_state=seed))
    return train, test
