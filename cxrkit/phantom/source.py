"""The ``phantom`` source: synthetic frontal chest radiographs as a :class:`~cxrkit.data.dataset.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from cxrkit.data.dataset import BOX_COLUMNS, Dataset, Rendered
from cxrkit.errors import ParameterError
from cxrkit.phantom.case import Case, Planted, draw, make_case, patient_images
from cxrkit.phantom.findings import FRAME
from cxrkit.phantom.views import VIEWS, View

__all__ = ["PhantomRenderer", "load_phantom"]

_SWITCHES = {
    "marker": {"label", "rate", "rate_without"},
    "dark_borders": {"label", "share", "share_without"},
    "crop": {"label", "rate", "rate_without"},
}


class PhantomRenderer:
    """Draws the rows of a phantom; every row is drawn from its own seed, when it is asked for."""

    def __init__(self, view: View, cases: list[tuple[int, int]], settings: Mapping):
        self.view = view
        self.rows = cases
        self.settings = dict(settings)

    def case(self, row: int) -> Case:
        """The patient, the camera and the findings of one row."""
        patient, image = self.rows[row]
        return make_case(self.view, patient=patient, image=image, **self.settings)

    def render(self, row: int, size: int) -> Rendered:
        """Draw one row: image ``[size, size]``, truth ``[L, size, size]``, shortcut ``[size, size]``."""
        drawing = draw(self.case(row), size)
        truth = np.zeros((len(self.view.labels), size, size), dtype=bool)
        for label, mask in drawing.truth:
            for name in self.view.ancestors(label):
                if name in self.view.labels:
                    truth[self.view.labels.index(name)] |= mask
        return Rendered(torch.from_numpy(drawing.image), torch.from_numpy(truth), torch.from_numpy(drawing.shortcut))


def load_phantom(
    *,
    view: str = "multilabel",
    images: int = 1000,
    seed: int = 0,
    size: int = 224,
    conspicuity: float = 1.0,
    prevalence: float | Mapping[str, float] | None = None,
    marker: Mapping | None = None,
    dark_borders: Mapping | None = None,
    crop: Mapping | None = None,
    images_per_patient: tuple[int, int] = (1, 3),
) -> Dataset:
    """Synthetic frontal chest radiographs: every image is drawn by a program, none shows a person.

    ``view``: "multilabel" (the 14 labels of VinBigData), "binary" (Pneumonia, like RSNA), "covid" (the 14 labels of the
    combined COVID-19 set with their hierarchy), "diagnosis" (one of COVID-19, Lung Opacity and No Finding, like the
    COVID-19 Radiography Database), "quality" (a small artefact near the centre in half of the images, in place of the
    private LVOT set) or "objects" (coins, buttons, a necklace, a safety pin or a zip on half of the images, in place of
    Object-CXR). ``images``: how many; image i is the same however many there are.
    ``conspicuity``: factor on what the findings change, 0 makes them invisible.
    ``prevalence``: {label: share of the images}, or a number in a view of one label. ``images_per_patient``:
    fewest and most; a patient's images share the anatomy and the chronic findings.

    Planted shortcuts, each returned as ``shortcut`` (a crop leaves no trace there): ``marker={"label", "rate",
    "rate_without"}``, a lead letter in so many images with and without the label; ``dark_borders={"label",
    "share", "share_without"}``, blank bands; ``crop={"label", "rate", "rate_without"}``, a tight crop. The
    rate without defaults to 0; without "label" the rate is that of all images.

    Boxes lie in a nominal frame of 1024 x 1024 pixels. Raises ParameterError for a parameter out of range.
    """
    if view not in VIEWS:
        raise ParameterError(f"view={view!r} is unknown; use one of {sorted(VIEWS)}")
    spec = VIEWS[view]
    fewest, most = _check(images, images_per_patient, conspicuity)
    given = {"marker": marker, "dark_borders": dark_borders, "crop": crop}
    settings = {
        "seed": int(seed),
        "conspicuity": float(conspicuity),
        "prevalence": spec.with_prevalence(prevalence),
        "planted": Planted(**{name: _switch(name, switch, spec) for name, switch in given.items()}),
    }
    rows: list[tuple[int, int]] = []
    patient = 0
    while len(rows) < images:
        rows += [(patient, image) for image in range(patient_images(int(seed), patient, fewest, most))]
        patient += 1
    renderer = PhantomRenderer(spec, rows[:images], settings)
    table, boxes = _tables(renderer, spec)
    return Dataset("phantom", spec.labels, table, boxes, renderer, size, spec.hierarchy)


def _check(images: int, images_per_patient: tuple[int, int], conspicuity: float) -> tuple[int, int]:
    if int(images) != images or images < 1:
        raise ParameterError(f"images={images!r} must be a whole number of at least 1")
    try:
        fewest, most = images_per_patient
    except (TypeError, ValueError):
        fewest, most = 0, 0
    if not 1 <= fewest <= most:
        raise ParameterError(f"images_per_patient={images_per_patient!r}; give (fewest, most) with 1 <= fewest <= most")
    if not 0 <= conspicuity <= 2:
        raise ParameterError(f"conspicuity={conspicuity!r} must lie in 0 .. 2")
    return int(fewest), int(most)


def _switch(name: str, given: Mapping | None, view: View) -> tuple[str | None, float, float] | None:
    """Label, rate with it and rate without it."""
    if given is None:
        return None
    unknown = set(given) - _SWITCHES[name]
    if unknown:
        raise ParameterError(f"{name}: {sorted(unknown)} unknown; use some of {sorted(_SWITCHES[name])}")
    word = "share" if name == "dark_borders" else "rate"
    label = given.get("label")
    if label is not None and label not in view.labels:
        raise ParameterError(f"{name}: label {label!r} is not in this view; use one of {list(view.labels)}")
    rate = given.get(word, 0.9)
    without = given.get(f"{word}_without", 0.0)
    for value in (rate, without):
        if not 0 <= value <= 1:
            raise ParameterError(f"{name}: {word} {value!r} must lie in 0 .. 1")
    return label, float(rate), float(without)


def _tables(renderer: PhantomRenderer, view: View) -> tuple[pd.DataFrame, pd.DataFrame]:
    table, boxes = [], []
    seed = renderer.settings["seed"]
    for row, (patient, image) in enumerate(renderer.rows):
        case = renderer.case(row)
        patient_id = f"phantom-{seed}-{patient:05d}"
        image_id = f"{patient_id}-{image}"
        table.append((image_id, patient_id, None, *(float(label in case.positive) for label in view.labels)))
        for label, box in case.boxes():
            boxes += [(image_id, name, *box, "phantom") for name in view.ancestors(label) if name in view.labels]
    table = pd.DataFrame(table, columns=["image_id", "patient_id", "path", *view.labels])
    table["orig_width"] = table["orig_height"] = FRAME
    return table, pd.DataFrame(boxes, columns=list(BOX_COLUMNS))
