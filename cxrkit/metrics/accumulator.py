"""Scores of many images, gathered batch by batch, and the table that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import numbers, patient_ids
from cxrkit.metrics.scores import LocalisationScores
from cxrkit.metrics.statistics import by_patient, intervals, resampled_ratios

__all__ = ["Accumulator"]


class Accumulator:
    """Image-level scores, batch by batch; degenerate ones (nan) are counted, never averaged."""

    def __init__(self):
        self._batches: list[pd.DataFrame] = []
        self._keys: list[str] = []
        self._scores: list[str] = []

    def add(
        self,
        scores: LocalisationScores | Mapping[str, Tensor],
        patients: Sequence,
        **columns: object,
    ) -> None:
        """Take in a batch: scores by name, ``[n]`` each, of ``patients`` ``[n]``.

        ``columns`` say what else a row is of (``label="Mass"``, ``method=[...]``): one text or number, or ``[n]`` of
        them; the table groups by them.
        Raises ParameterError for lengths that differ, a patient without an id, and names other than those of the
        batches before.
        """
        values, chance = scores if isinstance(scores, LocalisationScores) else (scores, {})
        if not isinstance(values, Mapping):
            raise ParameterError(f"scores must be a mapping from names to numbers [n]; got {type(values).__name__}")
        patients = patient_ids(patients)
        of = {"patient": patients, **columns}
        found = dict(values) | {f"chance {name}": chance.get(name, np.nan) for name in values}
        found = {name: numbers(name, column) for name, column in found.items()}
        batch = pd.DataFrame({name: _column(name, column, len(patients)) for name, column in (of | found).items()})
        if self._batches and list(batch.columns) != list(self._batches[0].columns):
            odd = sorted(set(batch.columns) ^ set(self._batches[0].columns)) or "their order"
            raise ParameterError(f"this batch differs from those before in {odd}: all batches have the same columns")
        self._keys, self._scores = list(columns), list(values)
        self._batches.append(batch)

    def frame(self) -> pd.DataFrame:
        """A row per image: patient, the columns given, every score, and "chance ..." for every score."""
        if not self._batches:
            raise ParameterError("nothing was added yet: add(scores, patients) takes a batch in")
        frame = pd.concat(self._batches, ignore_index=True)
        patient_ids(frame["patient"])  # each batch may be sound, and all of them mix text and numbers
        return frame

    def table(self, n: int = 1000, seed: int = 0, confidence: float = 0.95) -> pd.DataFrame:
        """A row per group and score: mean, its interval, the chance level, and what it is of.

        Columns: those given to :meth:`add`, score, mean, low, high (patients resampled ``n`` times, see
        :func:`cxrkit.metrics.bootstrap`), chance (mean over the same images; nan where none was given), n
        (images averaged), degenerate (images left out because their score is nan), patients. Where a column is
        called label, every further group gets the label "macro": the mean over the labels that have a score,
        with all labels of a patient drawn together. Source: the macro means of paper `bcos`.
        """
        frame = self.frame()
        table = pd.concat(
            [self._summary(part, n, seed, confidence).assign(**key) for key, part in _groups(frame, self._keys)]
        )
        if "label" in self._keys:
            others = [key for key in self._keys if key != "label"]
            macros = [
                self._macro(part, of_labels, n, seed, confidence).assign(**key, label="macro")
                for (key, part), (_, of_labels) in zip(_groups(frame, others), _groups(table, others), strict=True)
            ]
            table = pd.concat([table, *macros])
        return table[[*self._keys, *(name for name in table if name not in self._keys)]].reset_index(drop=True)

    def _summary(self, part: pd.DataFrame, n: int, seed: int, confidence: float) -> pd.DataFrame:
        values, patients = part[self._scores].to_numpy(), part["patient"].to_numpy()
        rows = []
        for name, found in zip(self._scores, intervals(values, patients, n, seed, confidence), strict=True):
            known = part[name].notna()
            counts = {"n": known.sum(), "degenerate": (~known).sum(), "patients": part["patient"][known].nunique()}
            rows.append({"score": name, **found._asdict(), "chance": part[f"chance {name}"][known].mean(), **counts})
        return pd.DataFrame(rows)

    def _macro(self, part: pd.DataFrame, by_label: pd.DataFrame, n: int, seed: int, confidence: float) -> pd.DataFrame:
        everyone = np.unique(part["patient"].to_numpy())
        of_labels = [
            by_patient(rows[self._scores].to_numpy(), rows["patient"].to_numpy(), everyone)
            for _, rows in _groups(part, ["label"])
        ]
        bounds = np.full((2, len(self._scores)), np.nan)
        if len(everyone) > 1:
            sums, counts = (np.concatenate(pieces, axis=1) for pieces in zip(*of_labels, strict=True))
            drawn = resampled_ratios(sums, counts, n, seed).reshape(n, len(of_labels), len(self._scores))
            # A label that a resample lacks stays out of its macro mean, as a label without cases does.
            drawn = np.ma.masked_invalid(drawn).mean(1).filled(np.nan)
            some = ~np.isnan(drawn).all(0)
            bounds[:, some] = np.nanquantile(drawn[:, some], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        groups = by_label.groupby("score", sort=False)
        macro = groups[["mean", "chance"]].mean().join(groups[["n", "degenerate"]].sum())
        return macro.assign(low=bounds[0], high=bounds[1], patients=len(everyone)).reset_index()


def _groups(frame: pd.DataFrame, keys: list[str]) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """Rows by their values of ``keys``, in order of appearance."""
    if not keys:
        return [({}, frame)]
    groups = frame.groupby(keys, sort=False, dropna=False)
    return [(dict(zip(keys, values, strict=True)), part) for values, part in groups]


def _column(name: str, values: object, size: int) -> object:
    values = numbers(name, values) if isinstance(values, Tensor) else values
    if values is None or np.ndim(values) == 0:
        return [values.item() if isinstance(values, np.ndarray) else values] * size
    if np.shape(values) != (size,):
        raise ParameterError(f"{name} has shape {np.shape(values)}; expected one for each of {size} patients")
    return values if isinstance(values, np.ndarray) else list(values)
