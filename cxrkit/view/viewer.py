"""Compare explanations in a page: images, boxes and maps packed into one self-contained HTML fragment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from cxrkit.errors import ParameterError
from cxrkit.view.codec import (
    LEVELS,
    RAMPS,
    THRESHOLD_STEP,
    area_resize,
    array,
    pack_image,
    pack_map,
    pack_mask,
)

__all__ = ["NOTE", "Bundle", "image_record", "new_bundle", "script", "static_html", "styles"]

NOTE = "Not for clinical use."
# How near a maximum must come to a box, as a share of the longer side: the 15 of 224 pixels of paper `normgrad`.
TOLERANCE = 15 / 224
MOST_PIECES = 48  # of an outline that is drawn as it is: the sides of a dozen boxes


@cache
def script() -> str:
    """The front end as one ES module: the colours, then the numbered files of the folder ``front``, joined."""
    parts = sorted((part for part in _front().iterdir() if part.name.endswith(".js")), key=lambda part: part.name)
    return "\n".join([f"const RAMPS = {json.dumps(RAMPS)};", *(part.read_text(encoding="utf-8") for part in parts)])


@cache
def styles() -> str:
    """The front end's style sheet."""
    return _front().joinpath("viewer.css").read_text(encoding="utf-8")


def _front():
    return files("cxrkit.view").joinpath("front")


def new_bundle(labels: Sequence[str], note: str) -> dict[str, Any]:
    """Data of a viewer, live or static, without images or series yet: labels, note, and how to decode maps."""
    labels = [str(label) for label in labels]
    if not labels or len(set(labels)) != len(labels):
        raise ParameterError(f"labels: at least one and each once, got {labels}")
    return {
        "version": 1,
        "note": note,
        "levels": LEVELS,
        "step": THRESHOLD_STEP,
        "tolerance": TOLERANCE,
        "labels": labels,
        "images": [],
        "series": [],
        "start": {},
    }


def image_record(
    image: Any,
    image_id: str,
    labels: Sequence[str],
    masks: Any = None,
    truth: Any = None,
    targets: Any = None,
    map_size: int = 96,
    image_size: int = 1024,
) -> dict[str, Any]:
    """One image as the viewer takes it, at most ``image_size`` pixels long, and its regions, at most ``map_size`` long.

    ``image``: ``[1, H, W]`` or ``[H, W]`` in [0, 1]; ``masks`` (the union of a label's boxes, outlined and scored) and
    ``truth``: bool ``[L, H, W]``; ``targets``: ``[L]`` of 0, 1 or NaN. Raises ParameterError when a shape doesn't fit.
    """
    pixels = array(image)
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    if pixels.ndim != 2 or not np.isfinite(pixels).all():
        raise ParameterError(f"image {image_id!r}: finite values [1, H, W] or [H, W] expected, got {pixels.shape}")
    shape, count = pixels.shape, len(labels)
    masks, truth = (
        {} if regions is None else _present(_expect(regions, (count, *shape), f"{name} of image {image_id!r}"))
        for name, regions in (("masks", masks), ("truth", truth))
    )
    targets = None if targets is None else _numbers(_expect(targets, (count,), f"targets of image {image_id!r}"))
    grid = _grid(shape, map_size)
    return {
        "id": str(image_id),
        "size": list(shape),
        "grid": list(grid),
        "png": pack_image(area_resize(pixels, *_grid(shape, image_size))),
        "targets": targets,
        "masks": {label: pack_mask(area_resize(mask, *grid)) for label, mask in masks.items()},
        "truth": {label: pack_mask(area_resize(mask, *grid)) for label, mask in truth.items()},
        "outlines": {label: edge for label, mask in masks.items() if (edge := _outline(mask)) is not None},
    }


class Bundle:
    """Images, labels and maps of several models and methods, to be compared in a page without a kernel.

    ``labels``: names of the L labels; ``note``: a sentence that stays visible, such as what the images are;
    ``image_size`` and ``map_size``: the most pixels that a stored image or map has along its longer side (area means).
    The scores that the page computes are those of the shown maps: for smooth ones the same as at full size, for
    noisy ones only at threshold 0. A bundle shows itself as the last value of a notebook cell.
    """

    def __init__(self, labels: Sequence[str], note: str = NOTE, map_size: int = 96, image_size: int = 256):
        for name, size in (("map_size", map_size), ("image_size", image_size)):
            if size < 1:
                raise ParameterError(f"{name}={size}: a positive number of pixels expected")
        self.data = new_bundle(labels, note)
        self.labels: list[str] = self.data["labels"]
        self._sizes = {"map_size": map_size, "image_size": image_size}
        self._chosen = np.zeros((0, len(labels)), dtype=bool)  # by the series so far

    def add_image(
        self,
        image: Any,
        image_id: str,
        masks: Any = None,
        truth: Any = None,
        targets: Any = None,
    ) -> None:
        """Add one image; arguments as in :func:`image_record`."""
        record = image_record(image, image_id, self.labels, masks, truth, targets, **self._sizes)
        self.data["images"].append(record)

    def add_sample(self, sample: Any) -> None:
        """Add the image, mask, truth and target of a ``cxrkit.data`` sample."""
        self.add_image(sample.image, sample.image_id, sample.mask, truth=sample.truth, targets=sample.target)

    def add_series(
        self,
        model: str,
        method: str,
        maps: Any,
        logits: Any,
        signed: bool = True,
        keep: Any = None,
    ) -> None:
        """Add the maps of one method for one model, for all images added so far and in their order.

        ``maps``: ``[B, L, H, W]``, raw; ``logits``: ``[B, L]``; ``signed``: whether negative values mean
        something, which sets the colours. ``keep``: bool ``[B, L]``, the maps to store; by default those of labels that
        are present, predicted (probability at least one half) or the image's highest logit; ``"all"`` stores every one.
        Raises ParameterError for shapes that don't fit and for maps that aren't finite, naming image and label.
        """
        images, labels = self.data["images"], self.labels
        if any((entry["model"], entry["method"]) == (model, method) for entry in self.data["series"]):
            raise ParameterError(f"series {model!r}, {method!r} was added before; give it another name")
        name = f"of series {model!r}, {method!r}"
        logits = _expect(logits, (len(images), len(labels)), f"logits {name}")
        odds = 1 / (1 + np.exp(-logits.clip(-80, 80)))
        maps = array(maps)
        if maps.shape[:2] != logits.shape or maps.ndim != 4:
            raise ParameterError(f"maps {name}: shape {maps.shape}, expected {(*logits.shape, 'H', 'W')}")
        keep = self._kept(logits, odds, keep, name)
        packed = {}
        for image, label in np.argwhere(keep).tolist():
            record, values = images[image], maps[image, label]
            try:
                if values.shape != tuple(record["size"]):
                    raise ParameterError(f"{values.shape} does not match the image, {tuple(record['size'])}")
                packed[f"{image}/{label}"] = pack_map(area_resize(values, *record["grid"]))
            except ParameterError as error:
                raise ParameterError(f"map {name}, image {record['id']!r}, {labels[label]!r}: {error}") from error
        entry = {"model": model, "method": method, "signed": bool(signed), "maps": packed}
        entry["logits"] = [_numbers(row) for row in logits]
        entry["probabilities"] = [_numbers(row) for row in odds]
        self.data["series"].append(entry)

    def _kept(self, logits: np.ndarray, odds: np.ndarray, keep: Any, name: str) -> np.ndarray:
        if isinstance(keep, str):
            if keep != "all":
                raise ParameterError(f"keep={keep!r}: 'all', None or a bool array {logits.shape} expected")
            return np.ones(logits.shape, dtype=bool)
        if keep is not None:
            return _expect(keep, logits.shape, f"keep {name}").astype(bool)
        present = [
            np.equal(record["targets"] or np.zeros(len(self.labels)), 1).astype(bool) for record in self.data["images"]
        ]
        best = logits == logits.max(axis=1, keepdims=True)
        chosen = np.reshape(present, logits.shape) | (odds >= 0.5) | best
        # What an earlier series kept is kept again, so that panels side by side are rarely one-sided.
        chosen[: len(self._chosen)] |= self._chosen
        self._chosen = chosen
        return chosen

    def start(self, image: int = 0, label: str | None = None, panels: Sequence[tuple[str, str]] = ()) -> Bundle:
        """Choose what is shown first: image position, label, and one (model, method) per panel; returns itself.

        Without it the viewer starts on the first image's first stored label with two panels. One to six panels.
        Raises ParameterError for what the bundle doesn't hold.
        """
        known = [(entry["model"], entry["method"]) for entry in self.data["series"]]
        lost = [panel for panel in panels if tuple(panel) not in known]
        if lost or len(panels) > 6:
            raise ParameterError(f"panels: at most six of {known}, got {list(panels)}")
        if not 0 <= image < len(self.data["images"]):
            raise ParameterError(f"image={image}: the bundle holds {len(self.data['images'])} images")
        if label is not None and label not in self.labels:
            raise ParameterError(f"label={label!r} is none of {self.labels}")
        start = {"image": image, "label": None if label is None else self.labels.index(label)}
        self.data["start"] = start | {"panels": [known.index(tuple(panel)) for panel in panels]}
        return self

    def _repr_html_(self) -> str:
        return static_html(self)


def static_html(bundle: Bundle, height: int = 480, limit: int = 3_000_000) -> str:
    """The viewer with its data as one HTML fragment: style, script and data inside, nothing is fetched.

    ``height``: the most pixels that an image takes up and down; ``limit``: the most bytes of the fragment. Several
    fragments may share a page. Raises ParameterError for a bundle without images or series, or above the limit.
    """
    if not bundle.data["images"] or not bundle.data["series"]:
        raise ParameterError("the bundle holds no image or no series; call add_image, then add_series")
    # A "<" in data could end the script element or open a comment in it; JSON may write it as an escape.
    data = json.dumps(bundle.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    html = (
        f"<style>{styles()}</style>\n"
        f'<div class="cxr" data-cxr style="--cxr-height:{int(height)}px">\n'
        '<p class="cxr-note">This comparison of explanations needs JavaScript.</p>\n'
        f'<script type="application/json">{data}</script>\n</div>\n'
        f'<script type="module">{script()}\nmountAll(document);</script>\n'
    )
    if (size := len(html.encode())) > limit:
        raise ParameterError(
            f"the viewer takes {size} bytes, the limit is {limit}: keep fewer maps, add fewer images or lower map_size"
        )
    return html


def _expect(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    values = array(values)
    if values.shape != shape:
        raise ParameterError(f"{name}: shape {values.shape}, expected {shape}")
    return values


def _numbers(values: np.ndarray) -> list[float | None]:
    """Values for JSON, which has no NaN."""
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


def _grid(shape: tuple[int, int], map_size: int) -> tuple[int, int]:
    shrink = min(1.0, map_size / max(shape))
    return max(1, round(shape[0] * shrink)), max(1, round(shape[1] * shrink))


def _present(masks: np.ndarray) -> dict[int, np.ndarray]:
    """The mask of every label that has a region."""
    return {label: mask for label, mask in enumerate(masks) if mask.any()}


def _outline(mask: np.ndarray) -> list[list[int]] | None:
    """The straight pieces of a region's edge as x0, y0, x1, y1; None where there are more than some boxes have.

    Boxes, also those that overlap, are drawn with this, corner by corner; a rounder shape is traced on the map's grid.
    """
    inside, pieces = np.pad(mask.astype(bool), 1), []
    for across, between in ((True, inside[1:] != inside[:-1]), (False, (inside[:, 1:] != inside[:, :-1]).T)):
        for place in np.flatnonzero(between.any(axis=1)).tolist():
            steps = np.diff(between[place].astype(int), prepend=0, append=0)
            # The padding put every cell one further.
            for start, stop in zip(*(np.flatnonzero(steps == sign).tolist() for sign in (1, -1)), strict=True):
                ends = [(start - 1, place), (stop - 1, place)]
                pieces.append([value for end in ends for value in (end if across else end[::-1])])
    return pieces if len(pieces) <= MOST_PIECES else None
