"""Which labels an image gets: six views of the phantom, with plausible prevalences and correlations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import ndtri

from cxrkit.data import covid_labels
from cxrkit.errors import ParameterError

__all__ = ["VIEWS", "Assignment", "View"]


@dataclass(frozen=True)
class Assignment:
    """The labels that are positive, and the looks to draw, which are keys of MAKERS.

    A look that is not among the view's labels has no box and no truth.
    """

    positive: tuple[str, ...]
    looks: tuple[str, ...]


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
    ) -> Assignment:
        """Draw the labels of one image; the patient's generator must stand where it stood for the other images."""
        draw = self._one if self.exclusive else self._several
        looks = draw(prevalence, patient, image)
        positive = {name for look in looks for name in self.ancestors(look)} & set(self.labels)
        return Assignment(tuple(label for label in self.labels if label in positive), tuple(looks))

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


_VINBIG = {
    "Aortic enlargement": 0.17,
    "Atelectasis": 0.14,
    "Calcification": 0.14,
    "Cardiomegaly": 0.18,
    "Consolidation": 0.14,
    "ILD": 0.13,
    "Infiltration": 0.14,
    "Lung Opacity": 0.08,
    "Nodule/Mass": 0.16,
    "Other lesion": 0.16,
    "Pleural effusion": 0.17,
    "Pleural thickening": 0.15,
    "Pneumothorax": 0.13,
    "Pulmonary fibrosis": 0.13,
}
_CHRONIC = ("Aortic enlargement", "Calcification", "Cardiomegaly", "ILD", "Pleural thickening", "Pulmonary fibrosis")
# Shared causes: a failing heart, an infection, a scarred lung.
_LOADINGS = {
    "Cardiomegaly": (0.6, 0.0, 0.0),
    "Aortic enlargement": (0.55, 0.0, 0.1),
    "Pleural effusion": (0.35, 0.35, 0.0),
    "Atelectasis": (0.15, 0.35, 0.1),
    "Consolidation": (0.0, 0.55, 0.0),
    "Infiltration": (0.1, 0.5, 0.0),
    "Lung Opacity": (0.0, 0.4, 0.0),
    "ILD": (0.0, 0.0, 0.4),
    "Pulmonary fibrosis": (0.0, 0.0, 0.55),
    "Pleural thickening": (0.0, 0.0, 0.45),
    "Calcification": (0.1, 0.0, 0.35),
    "Other lesion": (0.3, 0.1, 0.0),
}

_MULTILABEL = View(
    labels=tuple(_VINBIG),
    prevalence=_VINBIG,
    hierarchy={"Consolidation": "Lung Opacity", "Infiltration": "Lung Opacity"},
    healthy=0.26,
    chronic=frozenset(_CHRONIC),
    loadings=_LOADINGS,
)

# Negatives of RSNA are often not healthy either; what they show is drawn, but not labelled.
_BINARY = View(
    labels=("Pneumonia",),
    prevalence={
        "Pneumonia": 0.22,
        "Cardiomegaly": 0.15,
        "Aortic enlargement": 0.1,
        "Pleural effusion": 0.08,
        "Nodule/Mass": 0.06,
        "Calcification": 0.06,
        "Other lesion": 0.15,
        "Pneumothorax": 0.03,
    },
    chronic=frozenset(("Cardiomegaly", "Aortic enlargement", "Calcification")),
    loadings={**_LOADINGS, "Pneumonia": (0.1, 0.4, 0.0)},
)

_COVID = View(
    labels=covid_labels.LABELS,
    prevalence={
        "COVID-19": 0.2,
        "SARS": 0.04,
        "Viral Pneumonia": 0.13,
        "Bacterial Pneumonia": 0.14,
        "Streptococcus": 0.04,
        "Klebsiella": 0.02,
        "Legionella": 0.02,
        "Chlamydophila": 0.02,
        "Pneumocystis": 0.03,
        "ARDS": 0.02,
    },
    hierarchy=covid_labels.HIERARCHY,
    exclusive=True,
)

# Half of the images are spoilt near the centre, as in the private set of cardiac MR, whatever else they show.
_QUALITY = View(
    labels=("Local artefact",),
    prevalence={
        "Local artefact": 0.5,
        "Cardiomegaly": 0.15,
        "Aortic enlargement": 0.1,
        "Pleural effusion": 0.08,
        "Nodule/Mass": 0.06,
    },
    chronic=frozenset(("Cardiomegaly", "Aortic enlargement")),
    loadings={name: _LOADINGS[name] for name in ("Cardiomegaly", "Aortic enlargement", "Pleural effusion")},
)

# Objects on half of the images, as in Object-CXR.
_OBJECTS = replace(
    _QUALITY,
    labels=("Foreign object",),
    prevalence={"Foreign object": 0.5, **{name: share for name, share in _QUALITY.prevalence.items() if share < 0.5}},
)

# One of three, as in the COVID-19 Radiography Database.
_DIAGNOSIS = View(
    labels=("COVID-19", "Lung Opacity", "No Finding"),
    prevalence={"COVID-19": 0.3, "Lung Opacity": 0.3},
    exclusive=True,
)

VIEWS = {
    "multilabel": _MULTILABEL,
    "binary": _BINARY,
    "covid": _COVID,
    "quality": _QUALITY,
    "objects": _OBJECTS,
    "diagnosis": _DIAGNOSIS,
}
