"""Which labels an image gets: six views of the phantom, with plausible prevalences and correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from cxrkit.data import covid_labels
from cxrkit.errors import ParameterError
from cxrkit.yaml_files import read_yaml

__all__ = ["VIEWS", "View"]


@dataclass(frozen=True)
class View:
    """``labels``: in order. ``prevalence``: share of the images in which each look is drawn. ``hierarchy``: child
    to parent. ``healthy``: share of the patients of whom every image is without finding.

    ``chronic`` looks belong to the patient, the others to the image. ``loadings``: how looks lean on shared
    causes (a failing heart, an infection, a scarred lung), which makes them occur together.
    """

    labels: tuple[str, ...]
    prevalence: Mapping[str, float]
    hierarchy: Mapping[str, str] = field(default_factory=dict)
    healthy: float = 0.0
    chronic: frozenset[str] = frozenset()
    loadings: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    exclusive: bool = False

    def with_prevalence(self, changes: float | Mapping[str, float] | None) -> dict[str, float]:
        """The prevalences, some of them changed; a number stands for the first label. Raises ParameterError."""
        if changes is None:
            return dict(self.prevalence)
        if not isinstance(changes, Mapping):
            if len(self.labels) > 1:
                raise ParameterError(f"prevalence={changes!r}: this view has several labels; give {{label: share}}")
            changes = {self.labels[0]: changes}
        for label, share in changes.items():
            if label not in self.prevalence:
                raise ParameterError(f"prevalence: {label!r} is unknown; use some of {sorted(self.prevalence)}")
            if not 0 <= share <= 1:
                raise ParameterError(f"prevalence of {label!r} is {share!r}; it must lie in 0 .. 1")
        new = {**self.prevalence, **changes}
        if self.exclusive and sum(new.values()) > 1 + 1e-9:
            raise ParameterError(
                f"prevalence: these diagnoses exclude each other, their shares sum to {sum(new.values()):.3f}"
            )
        return new

    def ancestors(self, label: str) -> tuple[str, ...]:
        """The label and all above it."""
        chain = [label]
        while chain[-1] in self.hierarchy:
            chain.append(self.hierarchy[chain[-1]])
        return tuple(chain)

    def assign(
        self, prevalence: Mapping[str, float], patient: np.random.Generator, image: np.random.Generator
    ) -> tuple[tuple[str, ...], list[str]]:
        """Draw the positive labels of one image, and the looks to draw, which are keys of MAKERS.

        A look that is not among the view's labels has no box and no truth. The patient's generator must stand where it
        stood for the other images.
        """
        draw = self._one if self.exclusive else self._several
        looks = draw(prevalence, patient, image)
        positive = {name for look in looks for name in self.ancestors(look)} & set(self.labels)
        return tuple(label for label in self.labels if label in positive), looks

    def _several(self, prevalence, patient, image) -> list[str]:
        """A Gaussian copula: each look is there when its latent value passes the threshold of its prevalence."""
        well = patient.random() < self.healthy
        causes = patient.standard_normal(3)
        own = {"patient": patient.standard_normal(len(prevalence)), "image": image.standard_normal(len(prevalence))}
        looks = []
        for index, (look, share) in enumerate(prevalence.items()):
            loading = np.array(self.loadings.get(look, (0.0, 0.0, 0.0)))
            rest = np.sqrt(1 - loading @ loading)
            latent = causes @ loading + rest * own["patient" if look in self.chronic else "image"][index]
            sick = min(share / (1 - self.healthy), 1.0)
            if not well and sick > 0 and latent > -ndtri(sick):
                looks.append(look)
        return looks

    def _one(self, prevalence, patient, image) -> list[str]:
        """One diagnosis a patient; COVID-19 may go on to ARDS."""
        names = [*prevalence, "No Finding"]
        shares = np.array([*prevalence.values(), 0.0])
        shares[-1] = max(0.0, 1 - shares.sum())
        place = np.searchsorted(np.cumsum(shares), patient.random() * shares.sum(), side="right")
        name = names[min(int(place), len(names) - 1)]
        worse = image.random() < 0.1
        return [name, "ARDS"] if name == "COVID-19" and worse and "ARDS" in prevalence else [name]


def _view(labels: list[str], chronic: Sequence[str] = (), **facts) -> View:
    return View(labels=tuple(labels), chronic=frozenset(chronic), **facts)


VIEWS = {name: _view(**facts) for name, facts in read_yaml(Path(__file__).with_name("views.yaml")).items()}
VIEWS["covid"] = replace(VIEWS["covid"], labels=covid_labels.LABELS, hierarchy=covid_labels.HIERARCHY)
