"""From a radiograph as it was read to the square that networks take: image, boxes and masks by one transform.

Every geometry says where it places an image; pixels, masks and boxes all follow from that one answer. All objects
are frozen, and their ``repr`` says everything about them, so that it may serve as a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from cxrkit.data.geometry import resize
from cxrkit.data.intensity import EightBit, Levels, Percentiles
from cxrkit.errors import ParameterError
from cxrkit.project import project_folder
from cxrkit.yaml_files import read_yaml

__all__ = [
    "SQUASH",
    "Chain",
    "ForgottenCrop",
    "PadToSquare",
    "Place",
    "Preprocessing",
    "ResizeAndCrop",
    "Squash",
    "Toned",
    "named",
    "preprocessing",
]

Frame = tuple[float, float]
PROTOCOLS = ("paper", "authors", "corrected")


class Preprocessing:
    """The steps from an image as read to the square that networks take: one geometry for pixels, masks and boxes.

    A subclass changes what it does otherwise than its ``geometry``.
    """

    geometry: Preprocessing

    def image(self, pixels: Tensor, size: int) -> Tensor:
        """Float32 ``[H, W]`` in [0, 1] to ``[size, size]`` in [0, 1]."""
        return self.geometry.image(pixels, size)

    def masks(self, masks: Tensor, size: int) -> Tensor:
        """Bool ``[L, H, W]`` to ``[L, size, size]``; a pixel stays in when at least half of it was."""
        return self.geometry.masks(masks, size)

    def boxes(self, boxes: np.ndarray, frame: Frame, size: int) -> np.ndarray:
        """``[M, 4]`` in pixels of ``frame`` (width, height) to float64 ``[M, 4]`` in target pixels, clipped."""
        return self.geometry.boxes(boxes, frame, size)


@dataclass(frozen=True)
class Place:
    """Where a whole image lands: resized to ``width`` x ``height``, its corner at ``left``, ``top`` of the square.

    Negative corners cut off, positive ones leave a black band.
    """

    width: int
    height: int
    left: int = 0
    top: int = 0


class _Placed(Preprocessing, ABC):
    """Pixels, masks and boxes by :meth:`place`, so that they can't disagree."""

    interpolation: str

    @abstractmethod
    def place(self, frame: Frame, size: int) -> Place:
        """Where an image of ``frame`` = (width, height) lands in a square of ``size``."""

    def image(self, pixels: Tensor, size: int) -> Tensor:
        # Bicubic and Lanczos overshoot; 8-bit images clip that too.
        return self._put(pixels, size, self.interpolation).clamp(0, 1)

    def masks(self, masks: Tensor, size: int) -> Tensor:
        return self._put(masks.float(), size, "bilinear") >= 0.5

    def boxes(self, boxes: np.ndarray, frame: Frame, size: int) -> np.ndarray:
        place = self.place(frame, size)
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        # Multiply before dividing: 512 * 224 / 1024 is exact where 512 * (224 / 1024) need not be.
        moved = boxes * np.array([place.width, place.height] * 2) / np.array([*frame] * 2, dtype=np.float64)
        return (moved + np.array([place.left, place.top] * 2)).clip(0, size)

    def _put(self, images: Tensor, size: int, interpolation: str) -> Tensor:
        height, width = images.shape[-2:]
        place = self.place((width, height), size)
        small = resize(images, (place.height, place.width), interpolation)
        # A negative pad cuts off.
        right, bottom = size - place.width - place.left, size - place.height - place.top
        return F.pad(small, (place.left, right, place.top, bottom))


@dataclass(frozen=True)
class Squash(_Placed):
    """Resize to a square; the aspect ratio is not kept, as in papers `bcos`, `normgrad` and `path`."""

    interpolation: str = "bilinear"

    def place(self, frame: Frame, size: int) -> Place:
        return Place(size, size)


@dataclass(frozen=True)
class ResizeAndCrop(_Placed):
    """Resize the shorter side to ``resized`` and cut out the central ``crop`` x ``crop``.

    At another target size both shrink or grow alike. Rounding as torchvision's Resize and CenterCrop. Source: the
    test transform of B-cos networks (paper `bcos`, code) and of CheXNet (paper `relevance`).
    """

    resized: int = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def place(self, frame: Frame, size: int) -> Place:
        width, height = frame
        short = size + 2 * round(size * (self.resized - self.crop) / self.crop / 2)
        wide, high = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        return Place(wide, high, -round((wide - size) / 2), -round((high - size) / 2))


@dataclass(frozen=True)
class PadToSquare(_Placed):
    """The longer side becomes the target size (512 in the paper), the rest is black bands, the odd row below or right.

    Source: paper `covid`, section 3.3 of its data, and its code: the shorter side is rounded down.
    """

    interpolation: str = "bicubic"

    def place(self, frame: Frame, size: int) -> Place:
        width, height = frame
        short = max(1, int(size * (min(frame) / max(frame))))
        wide, high = (size, short) if width > height else (short, size) if width < height else (size, size)
        return Place(wide, high, (size - wide) // 2, (size - high) // 2)


@dataclass(frozen=True)
class Chain(Preprocessing):
    """``first`` to a square of ``at`` pixels, then ``second`` to the target."""

    first: Preprocessing
    second: Preprocessing
    at: int

    def image(self, pixels: Tensor, size: int) -> Tensor:
        return self.second.image(self.first.image(pixels, self.at), size)

    def masks(self, masks: Tensor, size: int) -> Tensor:
        return self.second.masks(self.first.masks(masks, self.at), size)

    def boxes(self, boxes: np.ndarray, frame: Frame, size: int) -> np.ndarray:
        return self.second.boxes(self.first.boxes(boxes, frame, self.at), (self.at, self.at), size)


@dataclass(frozen=True)
class Toned(Preprocessing):
    """A geometry, with a change of grey values ``before`` or ``after`` it; see :mod:`cxrkit.data.intensity`."""

    geometry: Preprocessing
    before: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def image(self, pixels: Tensor, size: int) -> Tensor:
        if self.before is not None:
            pixels = self.before(pixels)
        pixels = self.geometry.image(pixels, size)
        return pixels if self.after is None else self.after(pixels)


@dataclass(frozen=True)
class ForgottenCrop(Preprocessing):
    """Images and masks by ``geometry``, but boxes as if it only squashed: they miss their findings near the border.

    With 256 pixels cut to 224 a box is off by up to 16 pixels. ``whole_pixels``: boxes are rounded and end at ``size -
    1``. For showing what it does to published numbers. Source: paper `bcos`, code (whole pixels for VinBigData).
    """

    geometry: Preprocessing
    whole_pixels: bool = False

    def boxes(self, boxes: np.ndarray, frame: Frame, size: int) -> np.ndarray:
        moved = SQUASH.boxes(boxes, frame, size)
        return moved.round().clip(0, size - 1) if self.whole_pixels else moved


SQUASH = Squash()
_STEPS = {
    step.__name__: step
    for step in (Squash, ResizeAndCrop, PadToSquare, Chain, Toned, ForgottenCrop, EightBit, Levels, Percentiles)
}


def named() -> dict[str, Mapping]:
    """All pre-processing by name: "squash", and PAPER/NAME of ``notebooks/papers/PAPER/settings.yaml``.

    There each has the key ``corrected`` and, where a paper's text or code differ, ``paper`` and ``authors``: a step as
    {step: CLASS, PARAMETER: VALUE}, of the classes in this module and in :mod:`cxrkit.data.intensity`.
    """
    found: dict[str, Mapping] = {"squash": {"corrected": {"step": "Squash"}}}
    for folder in (project_folder(), Path(__file__).parents[2]):
        for path in sorted(folder.glob("notebooks/papers/*/settings.yaml")):
            own = read_yaml(path).get("preprocessing") or {}
            found = {f"{path.parent.name}/{name}".removesuffix("/all"): given for name, given in own.items()} | found
    return found


def preprocessing(name: str, protocol: str | None = None) -> Preprocessing:
    """A pre-processing by name, such as ``"squash"`` or a paper's ``"bcos/rsna"``, ``"bcos/rsna/authors"``.

    Where text and code of a paper differ, ``protocol`` picks one: ``"paper"``, ``"authors"`` or ``"corrected"`` (the
    default). The papers' settings say what each does. Raises ParameterError for other names and protocols.
    """
    stem, _, last = name.rpartition("/")
    if protocol is None and last in PROTOCOLS:
        name, protocol = stem, last
    protocol = "corrected" if protocol is None else protocol
    known = named()
    if name not in known:
        raise ParameterError(f"preprocessing={name!r} is unknown; use one of {list(known)}")
    if protocol not in PROTOCOLS:
        raise ParameterError(f"protocol={protocol!r} is unknown; use one of {list(PROTOCOLS)}")
    return _built(known[name].get(protocol, known[name]["corrected"]))


def _built(given: object) -> Any:
    if not isinstance(given, Mapping):
        return given
    fields = {name: _built(value) for name, value in given.items() if name != "step"}
    return _STEPS[given["step"]](**fields)
