"""The registry of data sources, and the one door to them: :func:`load`."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from cxrkit.data.cache import Prepared, cache_identity, cached, prepare_dataset
from cxrkit.data.dataset import SPLITS, Dataset
from cxrkit.data.preprocessing import Preprocessing
from cxrkit.data.preprocessing import preprocessing as named_preprocessing
from cxrkit.data.splits import FOLDS, fold_split, patient_overlap, refuse_shared_patients
from cxrkit.errors import CxrkitError, DataError, ParameterError, meant
from cxrkit.yaml_files import read_yaml

__all__ = ["load", "prepare", "sources"]

MANIFESTS = Path(__file__).resolve().parents[2] / "data_manifests"
SMALLEST_SIZE = 32
_COMMON = ("root", "size", "seed", "fold", "preprocessing")


@dataclass(frozen=True)
class Source:
    """Where a source's loader lives. The loader takes keyword arguments and returns a Dataset.

    ``needs_root``: whether the images are in a folder that the user names.
    """

    module: str
    function: str
    needs_root: bool = True

    def loader(self) -> Callable[..., Dataset]:
        """The loader itself; its module is imported only now."""
        return getattr(importlib.import_module(self.module), self.function)

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The loader's parameters.

        One that takes ``fold`` returns that fold of a split of its own, or no split; one whose ``root`` may be None
        says itself what to do without a folder (a set that nobody can download).
        """
        return inspect.signature(self.loader()).parameters

    def options(self) -> tuple[str, ...]:
        """Names of the options that the loader knows besides those of :func:`load`."""
        return tuple(name for name in self.parameters() if name not in _COMMON)


_PUBLIC = (
    "rsna vinbigdata nih chestx_det chexpert object_cxr covid_cohen kermany covid covid_radiography brain_mri lvot"
)
SOURCES = {
    "phantom": Source("cxrkit.phantom.source", "load_phantom", needs_root=False),
    "folder": Source("cxrkit.data.folder", "load_folder"),
} | {name: Source(f"cxrkit.data.public.{name}", f"load_{name}") for name in _PUBLIC.split()}


def sources() -> dict[str, dict[str, Any]]:
    """Every source by name, with its manifest: title, licence, how to get it, options.

    The manifests are the files of ``data_manifests/``; where that folder is not at hand, the title is the name.
    """
    return {name: {"title": name, **manifest(name)} for name in SOURCES}


def manifest(name: str) -> dict[str, Any]:
    """The manifest of one source; empty where the folder of manifests is not at hand."""
    path = MANIFESTS / f"{name}.yaml"
    return read_yaml(path) if path.is_file() else {}


def load(
    name: str,
    root: str | Path | None = None,
    split: str | None = None,
    fold: int = 0,
    size: int = 224,
    seed: int = 0,
    preprocessing: str | Preprocessing | None = None,
    cache: str | os.PathLike | None = None,
    cache_bits: int = 8,
    **options: Any,
) -> Dataset:
    """Load a source as a :class:`~cxrkit.data.dataset.Dataset`.

    ``name``: one of :func:`sources`. ``root``: the folder of a downloaded source. ``split``: ``"train"``,
    ``"validation"``, ``"test"``, or None for all images. ``fold``: 0 to 4, the part that is tested; folds
    keep patients together and follow ``seed``. ``size``: images are ``size`` x ``size``, at least 32.
    ``preprocessing``: how pixels, masks and boxes get to that square: a name of
    :func:`cxrkit.data.preprocessing.preprocessing`, such as "bcos/rsna", or an object; by default they are squashed.
    ``cache``: "auto" or a folder: images come from the cache that :func:`cxrkit.data.prepare` makes, which is made now
    where it is missing; they differ from freshly read ones by the rounding to ``cache_bits``, 8 or 16.
    ``options``: the source's own. A source that brings a split keeps it, and then has fold 0 only, unless it
    brings folds as well.
    Raises ParameterError for an unknown source or option or a value out of range, DataError for data that
    can't be read as they stand, or whose split shares patients (a UserWarning where such a split was asked for).
    """
    dataset = read(name, root, fold, size, seed, preprocessing, split, **options)
    if cache is not None:
        dataset = cached(dataset, identity_of(name, root, options, seed, dataset, cache_bits), cache)
    dataset = _assign_split(dataset, split, fold, seed, "fold" in SOURCES[name].parameters())
    _refuse_shared_patients(dataset)
    if split is None:
        return dataset
    part = dataset.split(split)
    if not len(part):
        held = sorted(set(dataset.table["split"]))
        raise DataError(f"{dataset.name}: no image is in split {split!r}; there are {held}")
    part.notices = (*dataset.notices, f"split={split!r} leaves out {len(dataset) - len(part)} of {len(dataset)} images")
    return part


def prepare(
    name: str,
    root: str | os.PathLike | None = None,
    size: int = 224,
    seed: int = 0,
    *,
    cache: str | os.PathLike = "auto",
    workers: int | None = None,
    bits: int = 8,
    progress: bool = True,
    preprocessing: str | Preprocessing | None = None,
    **options: Any,
) -> Prepared:
    """Draw every image of a source once and keep it, for ``cxrkit.data.load(..., cache=...)``.

    Killed at any moment, the same call goes on where it was: nothing is drawn twice. Of two processes that call it at
    once, one draws and the other waits. A finished cache is verified; what is damaged, or whose file has changed
    since, is drawn anew. Images that can't be drawn are named in ``problems``, and refused when they are asked for.
    ``preprocessing``, ``options``: as for ``load``.
    ``cache``: "auto" or a folder (:func:`cxrkit.data.cache.cache_folder`). ``workers``: processes; None: one a core.
    ``bits``: 8 or 16.
    Raises ParameterError as ``load`` does, DataError for a source that can't be read or a disk that is full.
    """
    dataset = read(name, root, size=size, seed=seed, preprocessing=preprocessing, **options)
    identity = identity_of(name, root, options, seed, dataset, bits)
    return prepare_dataset(dataset, identity, cache, workers, progress)


def identity_of(
    name: str, root: str | os.PathLike | None, options: Mapping[str, Any], seed: int, dataset: Dataset, bits: int
) -> dict[str, Any]:
    """Everything that decides on the pixels of a source's cache: see :func:`cxrkit.data.cache.cache_identity`."""
    source = SOURCES[name]
    return cache_identity(name, root, options, None if source.needs_root else seed, source.module, dataset, bits)


def read(
    name: str,
    root: str | Path | None = None,
    fold: int = 0,
    size: int = 224,
    seed: int = 0,
    preprocessing: str | Preprocessing | None = None,
    split: str | None = None,
    **options: Any,
) -> Dataset:
    """All images of a source as its loader gives them, without folds; parameters are checked as by :func:`load`."""
    source = _check(name, root, split, fold, size, seed)
    check_options(name, source.options(), options)
    own = {"root": root} if source.needs_root else {}
    if "fold" in source.parameters():
        own["fold"] = fold
    if preprocessing is not None:
        if "preprocessing" not in source.parameters():
            raise ParameterError(f"source {name!r} takes no preprocessing: it draws its images at the size wanted")
        chosen = named_preprocessing(preprocessing) if isinstance(preprocessing, str) else preprocessing
        own["preprocessing"] = chosen
    try:
        return source.loader()(**own, size=size, seed=seed, **options)
    except CxrkitError:
        raise
    except Exception as error:
        # What a loader does not foresee in a damaged folder; the cause is chained, should it be a mistake of ours.
        if not source.needs_root:
            raise
        raise DataError(f"{root}: can't be read as source {name!r} ({type(error).__name__}: {error})") from error


def _assign_split(dataset: Dataset, split: str | None, fold: int, seed: int, brings_folds: bool) -> Dataset:
    if "split" in dataset.table.columns:
        if fold != 0 and not brings_folds:
            raise ParameterError(f"fold={fold}: {dataset.name} brings its own split, which is fold 0")
        return dataset
    targets = dataset.table[list(dataset.labels)].to_numpy()
    try:
        return dataset.with_split(fold_split(dataset.table["patient_id"], targets, fold, seed=seed))
    except DataError as error:
        # A handful of patients may still be looked at as a whole.
        if split is None and fold == 0:
            return dataset
        raise DataError(f"{dataset.name}: {error}; load it with split=None") from None


def _refuse_shared_patients(dataset: Dataset) -> None:
    """Refuse a split that shares patients; warn where the source was asked for a split that is known to."""
    if "split" not in dataset.table.columns:
        return
    counts = patient_overlap(dataset.table["patient_id"], dataset.table["split"])
    if not dataset.leak:
        refuse_shared_patients(dataset.name, dataset.table)
    elif counts["images"]:
        warnings.warn(
            f"{dataset.name}: {dataset.leak} Of the test images, {counts['images']} ({counts['share']:.0%}) are of "
            "patients in the training part.",
            stacklevel=3,
        )


def _check(name: str, root: str | Path | None, split: str | None, fold: int, size: int, seed: int) -> Source:
    if name not in SOURCES:
        raise ParameterError(f"source {name!r} is unknown; the sources are {sorted(SOURCES)}")
    source = SOURCES[name]
    if source.needs_root and root is None and source.parameters()["root"].default is not None:
        raise ParameterError(f"source {name!r} needs root=, the folder that holds its images")
    if not source.needs_root and root is not None:
        raise ParameterError(f"source {name!r} takes no root: nothing is read from disk")
    if split is not None and split not in SPLITS:
        raise ParameterError(f"split={split!r} is unknown; use one of {list(SPLITS)}, or None for all")
    limits = {"fold": (fold, 0, FOLDS - 1), "size": (size, SMALLEST_SIZE, None), "seed": (seed, 0, None)}
    for option, (value, low, high) in limits.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            wanted = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise ParameterError(f"{option}={value!r} is out of range; use an integer {wanted}")
    return source


def check_options(name: str, known: Collection[str], options: Mapping[str, Any]) -> None:
    """Raise ParameterError for an option that isn't among those known to source ``name``, or no true or false."""
    signature = SOURCES[name].parameters()
    for option, value in options.items():
        if option not in known:
            raise ParameterError(f"option {option!r} is unknown to source {name!r}; {meant(option, sorted(known))}")
        # "no" and "off" are text in YAML, and text counts as true.
        if option in signature and isinstance(signature[option].default, bool) and not isinstance(value, bool):
            raise ParameterError(f"option {option}={value!r} of source {name!r}: use true or false")
