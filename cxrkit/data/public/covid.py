"""The combined COVID-19 set: Cohen's adults and a sample of Kermany's children, 14 labels in a hierarchy."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cxrkit.data.covid_labels import HIERARCHY, LABELS
from cxrkit.data.dataset import Dataset
from cxrkit.data.files import file_dataset
from cxrkit.data.preprocessing import SQUASH, Preprocessing
from cxrkit.data.public.covid_cohen import PATHS, VIEWS, cohen_table, located, radiographs
from cxrkit.data.public.kermany import kermany_table
from cxrkit.data.public.layout import MISSING, choose, find_folder, images_in
from cxrkit.data.splits import FOLDS, with_validation
from cxrkit.errors import DataError, ParameterError

__all__ = ["HIERARCHY", "LABELS", "SAMPLE", "SEEDS", "finding_labels", "load_covid", "published_parts"]

SAMPLE = {"No Finding": 500, "Viral Pneumonia": 250, "Bacterial Pneumonia": 250}
SEEDS = (1701, 1801, 806, 18011993, 8061994)
# Steps of a label path, in the words of the labels.
_WORDS = {"Viral": "Viral Pneumonia", "Bacterial": "Bacterial Pneumonia", "Fungal": "Fungal Pneumonia"}
_UNMATCHED = "E.Coli"  # in the authors' table, on four images, under no label
_AUTHORS = "metadataV2.csv"


def load_covid(
    root: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    fold: int = 0,
    preprocessing: Preprocessing = SQUASH,
    protocol: str = "corrected",
    split_by: str = "patients",
    sample: Mapping[str, int] = SAMPLE,
    missing: str = "refuse",
) -> Dataset:
    """The combined set from a folder that holds both downloads, covid-chestxray-dataset and chest_xray.

    14 labels in alphabetical order; a label is positive where the finding holds its name or that of any label below.
    Of Kermany's images ``sample`` are drawn from ``seed``, by class; those of Cohen are the views PA, AP, AP Supine.
    ``protocol`` says what becomes of E.Coli, which no label names: "corrected" counts it as bacterial pneumonia,
    "authors" keeps it with no label at all, "paper", whose text does not count it, leaves it out. Other findings that
    no label names (the collection grew after the paper) are left out with a warning.

    ``split_by``: "patients" (five folds of our own, which partition the patients) or "published": five random 60/40
    draws of patients with the authors' seeds, which overlap and are warned of; ``fold`` says which; an eighth of the
    training patients validates, where the authors chose the best epoch on the test part. Where the authors' files
    metadataV2.csv and V2_60_40_00fold0.txt ... are in the folder, "published" takes their images and their patients.
    ``missing``: "refuse", or "leave_out" for partial downloads. Raises DataError naming file and line. Source: paper
    `covid`, sections on labels and data, and its published code.
    """
    choose("protocol", protocol, ("paper", "authors", "corrected"))
    choose("split_by", split_by, ("patients", "published"))
    choose("missing", missing, MISSING)
    root = Path(root)
    cohen, kermany = find_folder(root, ("metadata.csv", "images")), kermany_table(root)
    authors = None
    if split_by == "published":
        with contextlib.suppress(DataError):  # without them, their code draws again
            authors = find_folder(root, _AUTHORS)
    if authors is None:
        table = pd.concat([_from_cohen(cohen, missing), _sampled(kermany, sample, seed, missing)], ignore_index=True)
    else:
        table = _from_authors(authors, cohen, kermany, missing)
    of_finding = {finding: finding_labels(finding, protocol) for finding in table["finding"].unique()}
    found = [of_finding[finding] for finding in table["finding"]]
    keep = _matched(table["finding"], found, protocol)
    table = table[keep].reset_index(drop=True)
    targets = np.array([np.isin(LABELS, names) for names, kept in zip(found, keep, strict=True) if kept], dtype=float)
    table = pd.concat([table, pd.DataFrame(targets.reshape(-1, len(LABELS)), columns=list(LABELS))], axis=1)
    if split_by == "published":
        table["split"] = _published(table, targets, fold, seed, authors)
    return file_dataset("covid", LABELS, table, None, size, preprocessing, hierarchy=HIERARCHY)


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


def _matched(finding: pd.Series, found: list[tuple[str, ...]], protocol: str) -> np.ndarray:
    """Which rows stay: those with a label and, as the authors have it, E.Coli without any."""
    matched = np.array([bool(labels) for labels in found])
    known = finding.str.split("/").str[-1] == _UNMATCHED
    other = ~matched & ~known.to_numpy()
    if other.any():
        names = ", ".join(sorted({repr(name) for name in finding[other]}))
        text = f"covid: {int(other.sum())} images are left out because no label names {names}"
        warnings.warn(text, UserWarning, stacklevel=3)
    return matched | (known.to_numpy() & (protocol == "authors"))


# Images


def _from_cohen(cohen: Path, missing: str) -> pd.DataFrame:
    table = cohen_table(cohen, VIEWS, missing)
    return table.assign(patient_id="cohen-" + table["patient_id"], source="Cohen")


def _sampled(kermany: pd.DataFrame, sample: Mapping[str, int], seed: int, missing: str) -> pd.DataFrame:
    unknown = [finding for finding in sample if finding not in SAMPLE]
    if unknown:
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
        chosen.append(np.random.default_rng((seed, position)).permutation(rows)[:wanted])
    table = kermany.iloc[np.sort(np.concatenate(chosen))] if chosen else kermany.iloc[:0]
    return _as_kermany(table[["image_id", "patient_id", "path", "finding"]])


def _as_kermany(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(patient_id="kermany-" + table["patient_id"], source="Kermany")


# The authors' files


def _from_authors(authors: Path, cohen: Path, kermany: pd.DataFrame, missing: str) -> pd.DataFrame:
    """The images of the authors' table, wherever they lie; patients as it numbers them."""
    rows = radiographs(authors / _AUTHORS, VIEWS)
    files = {Path(path).name: path for path in kermany["path"]} | images_in(cohen / "images")
    paths = rows["filename"].map(files).astype(object)
    table = located("covid", authors / _AUTHORS, rows, paths.where(paths.notna(), None), missing)
    return table.assign(source=np.where(table["path"].isin(kermany["path"]), "Kermany", "Cohen"))


def _published(table: pd.DataFrame, targets: np.ndarray, fold: int, seed: int, authors: Path | None) -> np.ndarray:
    """The split column of one of the five draws; patients that were not drawn are "unused"."""
    if authors is None:
        train, test = published_parts(table["finding"], table["patient_id"], SEEDS[fold])
    else:
        train, test = _listed(authors / f"V2_60_40_00fold{fold}.txt")
    patients = table["patient_id"]
    both = len(train & test & set(patients))
    warnings.warn(
        "covid: the published splits are five random 60/40 draws, not folds: their test parts overlap; in draw "
        f"{fold} {both} patients are drawn for training and test, and stay in the test part here",
        stacklevel=4,
    )
    is_test = patients.isin(test).to_numpy()
    used = is_test | patients.isin(train).to_numpy()
    split = np.full(len(table), "unused", dtype=object)
    split[used] = with_validation(is_test[used], patients[used], targets[used], seed * FOLDS + fold)
    return split


def _listed(path: Path) -> tuple[set[str], set[str]]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        # Numbers and texts are mixed in these lists; compared as they stand, leaks would come and go.
        return {str(name) for name in listed["train"]}, {str(name) for name in listed["test"]}
    except OSError as error:
        raise DataError(f"{path}: can't be opened ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DataError(f"{path}: is not the authors' list of patients (train, test)") from None


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
