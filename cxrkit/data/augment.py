"""The papers' augmentation, on batches and on whatever device holds them: images, masks and boxes together.

All geometric steps of an image become one homography and one interpolation, so nothing is blurred twice. That, and a
draw for each image of a batch, is why this is not a chain of torchvision's transforms: those interpolate at each step
and draw once a call. On one image they agree, as the tests show.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from cxrkit.data.dataset import Batch
from cxrkit.errors import ParameterError

__all__ = ["Augmentation", "augmentation", "augmentation_seeds", "warp", "warp_boxes", "warp_masks"]


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the random changes, in the order in which they act; all zero changes nothing.

    ``flip``: probability of mirroring left and right. ``translate``: largest shift of either axis, as a
    fraction of the side, uniform. ``scale``: standard deviation of g in the factor 2^-g. ``rotate``,
    ``shear``: standard deviations in degrees. ``perspective``: largest inward move of a corner, as a fraction
    of half the side, applied with ``perspective_probability``. ``gamma``: standard deviation of g in the
    exponent 2^g. ``pepper``: probability of coarse salt and pepper, which replaces ``pepper_share`` of the
    cells of a coarse grid. ``blur``: largest sigma in pixels, uniform, with probability one half. ``noise``:
    largest standard deviation of Gaussian noise, uniform, with probability one half. Source: paper `bcos`,
    light and heavy augmentation.
    """

    flip: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    perspective_probability: float = 0.5
    gamma: float = 0.0
    pepper: float = 0.0
    pepper_share: float = 0.01
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError(f"{name}={value} is out of range; a strength is finite and not negative")
        for name in ("flip", "perspective_probability", "pepper", "pepper_share"):
            if getattr(self, name) > 1:
                raise ParameterError(f"{name}={getattr(self, name)} is out of range; a probability is at most 1")
        if self.perspective >= 1:
            raise ParameterError(f"perspective={self.perspective} is out of range; it must be below 1")

    @overload
    def __call__(self, given: Tensor, generator: torch.Generator | None = None, *, seeds=None) -> Tensor: ...
    @overload
    def __call__(self, given: Batch, generator: torch.Generator | None = None, *, seeds=None) -> Batch: ...
    def __call__(self, given, generator=None, *, seeds=None):
        """``given``, float images ``[B, C, H, W]`` in [0, 1] or a Batch, each image changed by a draw of its own.

        Give a ``generator``, whose draws go through the batch as it comes, or ``seeds``, one for each image (see
        :func:`augmentation_seeds`): then nothing but its seed decides what happens to an image. Drawn on the
        generator's device, or with seeds on the CPU, and used on the images' own. What comes in from outside is 0.

        Of a Batch, masks, truth and shortcut move with the images (:func:`warp_masks`); its targets stay, also where a
        finding has left the image: then its mask is empty.
        """
        images = given.images if isinstance(given, Batch) else given
        draw = _drawing(images, generator, seeds)
        homographies = self.homographies(images, draw)
        images = self._grey_values(warp(images, homographies), draw)
        if not isinstance(given, Batch):
            return images
        moved = {name: getattr(given, name) for name in ("masks", "truth", "shortcut")}
        moved = {name: None if mask is None else warp_masks(mask, homographies) for name, mask in moved.items()}
        return replace(given, images=images, **moved)

    def boxes(self, boxes: Tensor, of_image: Sequence[int], images: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """Where the boxes ``[M, 4]`` of these images go under these seeds; ``of_image`` says whose each box is.

        In pixels of the images. Each is the upright box around the four moved corners, clipped to the image; a box that
        has left it ends with no area, and is kept in its place. Rotated boxes grow: masks do not, and are exact.
        """
        homographies = self.homographies(images, _drawing(images, None, seeds))
        return warp_boxes(boxes, homographies[torch.as_tensor(of_image, dtype=torch.long)], images.shape[-2:])

    def _grey_values(self, images: Tensor, draw: _Draw) -> Tensor:
        if self.gamma:
            images = images.clamp(0, 1) ** draw.normal(images).mul(self.gamma).exp2().view(-1, 1, 1, 1)
        if self.pepper:
            images = _salt_and_pepper(images, self.pepper, self.pepper_share, draw)
        if self.blur:
            sigma = draw.uniform(images) * self.blur * (draw.uniform(images) < 0.5)
            images = _gaussian_blur(images, sigma, self.blur)
        if self.noise:
            strength = draw.uniform(images) * self.noise * (draw.uniform(images) < 0.5)
            noise = draw.normal(images, images.shape[1:])
            images = (images + noise * strength.view(-1, 1, 1, 1)).clamp(0, 1)
        return images

    def homographies(self, images: Tensor, draw: _Draw) -> Tensor:
        """One 3 x 3 matrix per image from old to new coordinates; the image spans -1 to 1 on either axis."""
        total = torch.eye(3, dtype=images.dtype, device=images.device).expand(len(images), 3, 3)
        if self.flip:
            mirror = 1 - 2 * (draw.uniform(images) < self.flip).to(images.dtype)
            total = _matrix(images, [[mirror, 0, 0], [0, 1, 0], [0, 0, 1]]) @ total
        if self.translate:
            # A shift by a fraction t of the side is 2 t in coordinates that run from -1 to 1.
            shift = 2 * self.translate * (2 * draw.uniform(images, (2,)) - 1)
            total = _matrix(images, [[1, 0, shift[:, 0]], [0, 1, shift[:, 1]], [0, 0, 1]]) @ total
        if self.scale:
            factor = torch.exp2(-self.scale * draw.normal(images))
            total = _matrix(images, [[factor, 0, 0], [0, factor, 0], [0, 0, 1]]) @ total
        if self.rotate or self.shear:
            angle = torch.deg2rad(self.rotate * draw.normal(images))
            shear = torch.deg2rad(self.shear * draw.normal(images))
            height, width = images.shape[-2:]
            total = _rotation_and_shear(images, angle, shear, width / height) @ total
        if self.perspective:
            inward = self.perspective * draw.uniform(images, (4, 2))
            applied = draw.uniform(images) < self.perspective_probability
            total = _perspective(inward * applied.view(-1, 1, 1)) @ total
        return total


LIGHT = Augmentation(scale=0.1, rotate=5.0, shear=2.5, perspective=0.1, gamma=0.2)
HEAVY = Augmentation(
    flip=0.5,
    scale=0.15,
    rotate=6.0,
    shear=4.0,
    perspective=0.15,
    gamma=0.25,
    pepper=0.1,
    blur=2.0,
    noise=0.04,
)
# 32 pixels of the image as it is when the shift acts: resized to 224, or still 1024 wide.
_TRANSLATE = {"after_resize": 32 / 224, "original": 32 / 1024}


def augmentation(name: str = "light", reference: str = "after_resize") -> Augmentation:
    """The papers' augmentation by name: ``"none"`` (changes nothing), ``"light"`` or ``"heavy"``.

    ``reference`` says what the shift of 32 pixels refers to: the image of 224 pixels (``"after_resize"``, 14
    %, as the baselines) or of 1024 (``"original"``, 3 %, as the B-cos networks). Call the result with images
    and a ``torch.Generator``. Raises ParameterError for other names. Source: paper `bcos`, text and published
    code.
    """
    if reference not in _TRANSLATE:
        raise ParameterError(f"reference={reference!r} is unknown; use one of {sorted(_TRANSLATE)}")
    strengths = {"none": Augmentation(), "light": LIGHT, "heavy": HEAVY}
    if name not in strengths:
        raise ParameterError(f"augment={name!r} is unknown; use one of {sorted(strengths)}")
    if name == "none":
        return strengths[name]
    return replace(strengths[name], translate=_TRANSLATE[reference])


def augmentation_seeds(seed: int, epoch: int, keys: Iterable[object]) -> Tensor:
    """A seed for each image of an epoch, int64 ``[B]``, told by ``seed``, ``epoch`` and the image's key alone.

    ``keys``: image ids, or positions in the order of the epoch where an image may be drawn twice. A resumed run,
    another number of workers or processes and another batch size then give the same augmentations.
    """
    digests = (hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest() for key in keys)
    # One bit less than eight bytes: torch keeps signed numbers.
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def warp(images: Tensor, homographies: Tensor, mode: str = "bilinear") -> Tensor:
    """Move each image by its 3 x 3 matrix: ``mode`` "bilinear" or "nearest", zero outside.

    ``images``: ``[B, C, H, W]``; ``homographies``: ``[B, 3, 3]`` from old to new coordinates, which run from
    -1 to 1 over the image (pixel centres inside, as ``align_corners=False``). Identity returns the images
    unchanged.
    """
    identity = torch.eye(3, dtype=homographies.dtype, device=homographies.device)
    if (homographies == identity).all():
        return images
    height, width = images.shape[-2:]
    rows, columns = (
        (2 * torch.arange(n, device=images.device, dtype=images.dtype) + 1) / n - 1 for n in (height, width)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    target = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(1, -1, 3)
    source = target @ torch.linalg.inv(homographies).transpose(1, 2)
    grid = (source[..., :2] / source[..., 2:]).reshape(-1, height, width, 2)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def warp_masks(masks: Tensor, homographies: Tensor) -> Tensor:
    """Move the masks of each image by its matrix (see :func:`warp`); bool ``[B, H, W]`` or ``[B, L, H, W]``.

    A pixel is in when its centre comes from a pixel that was in. A thin mask that no centre hits keeps the pixel under
    its middle, so that no finding vanishes unless it leaves the image.
    """
    layers = masks if masks.ndim == 4 else masks[:, None]
    moved = torch.zeros_like(layers)
    # Most labels of most images have no finding: their empty masks are left alone.
    image, label = layers.flatten(2).any(-1).nonzero(as_tuple=True)
    if len(image):
        held = layers[image, label][:, None].to(homographies.dtype)
        moved[image, label] = warp(held, homographies[image], "nearest")[:, 0] > 0.5
    lost = layers.flatten(2).any(-1) & ~moved.flatten(2).any(-1)
    height, width = masks.shape[-2:]
    for image, label in lost.nonzero().tolist():
        middle = layers[image, label].nonzero().to(homographies).mean(0).flip(0) + 0.5
        column, row = _moved_points(middle[None], homographies[image], (height, width))[0].floor().long().tolist()
        if 0 <= row < height and 0 <= column < width:
            moved[image, label, row, column] = True
    return moved.reshape(masks.shape)


def warp_boxes(boxes: Tensor, homographies: Tensor, shape: Sequence[int]) -> Tensor:
    """The upright boxes around moved boxes, clipped; a box that has left the image ends with no area.

    ``boxes``: ``[M, 4]`` as x_min, y_min, x_max, y_max in pixels of images of ``shape`` (height, width);
    ``homographies``: ``[M, 3, 3]``, each box's own (see :func:`warp`). Returns ``[M, 4]`` of their type.
    """
    boxes = torch.as_tensor(boxes).to(homographies).reshape(-1, 4)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    moved = _moved_points(corners, homographies, shape)
    limit = moved.new_tensor([shape[1], shape[0]])
    return torch.cat([end.clamp(min=0).minimum(limit) for end in (moved.amin(1), moved.amax(1))], dim=1)


def _moved_points(points: Tensor, homographies: Tensor, shape: Sequence[int]) -> Tensor:
    """Points ``[..., P, 2]`` as x, y in pixels, after matrices ``[..., 3, 3]``."""
    side = points.new_tensor([shape[1], shape[0]])
    inside = 2 * points / side - 1
    moved = torch.cat([inside, torch.ones_like(inside[..., :1])], dim=-1) @ homographies.transpose(-1, -2)
    return (moved[..., :2] / moved[..., 2:] + 1) / 2 * side


def _drawing(images: Tensor, generator: torch.Generator | None, seeds: Sequence[int] | Tensor | None) -> _Draw:
    if images.ndim != 4 or not images.is_floating_point():
        raise ParameterError(f"images must be float [B, C, H, W], got {images.dtype} {tuple(images.shape)}")
    if (generator is None) == (seeds is None):
        raise ParameterError("give either a generator or seeds, one for each image")
    if seeds is None:
        return _Draw(len(images), generator)
    if len(seeds) != len(images):
        raise ParameterError(f"{len(seeds)} seeds were given for {len(images)} images; one for each is needed")
    return _SeededDraw(seeds)


class _Draw:
    """Random numbers, one row per image, made where the generator lives."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count = count
        self.generator = generator

    def uniform(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        drawn = torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device)
        return drawn.to(like)

    def normal(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        drawn = torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device)
        return drawn.to(like)


class _SeededDraw(_Draw):
    """Each image draws from a stream of its own, so that its neighbours in the batch do not matter."""

    def __init__(self, seeds: Sequence[int] | Tensor):
        self.streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def uniform(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.stack([torch.rand(shape, generator=stream) for stream in self.streams]).to(like)

    def normal(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.stack([torch.randn(shape, generator=stream) for stream in self.streams]).to(like)


def _matrix(like: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    def entry(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else like.new_full((len(like),), float(value))

    return torch.stack([torch.stack([entry(value) for value in row], dim=-1) for row in rows], dim=-2)


def _rotation_and_shear(like: Tensor, angle: Tensor, shear: Tensor, aspect: float) -> Tensor:
    """Rotation after a horizontal shear, about the centre, in pixels: the aspect is undone around it."""
    cos, sin, slant = angle.cos(), angle.sin(), shear.tan()
    return _matrix(
        like,
        [
            [cos, (cos * slant - sin) / aspect, 0],
            [sin * aspect, sin * slant + cos, 0],
            [0, 0, 1],
        ],
    )


def _perspective(inward: Tensor) -> Tensor:
    """The homography that moves the corners inward by ``[B, 4, 2]``, as fractions of half the side."""
    corners = inward.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    moved = corners * (1 - inward)
    x, y = corners[:, 0].expand(len(inward), 4), corners[:, 1].expand(len(inward), 4)
    u, v = moved[..., 0], moved[..., 1]
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # Eight linear equations for the eight free entries: u (g x + h y + 1) = a x + b y + c, and the same for
    # v.
    upper = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=-1)
    lower = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=-1)
    entries = torch.linalg.solve(torch.cat([upper, lower], dim=1), torch.cat([u, v], dim=1))
    return torch.cat([entries, torch.ones_like(entries[:, :1])], dim=1).reshape(-1, 3, 3)


def _salt_and_pepper(images: Tensor, probability: float, share: float, draw: _Draw) -> Tensor:
    """Black and white cells of a grid with 10 to 20 % as many rows and columns as the image has pixels."""
    height, width = images.shape[-2:]
    size = 0.1 + 0.1 * draw.uniform(images)
    chosen = draw.uniform(images) < probability
    cells = draw.uniform(images, (2, math.ceil(0.2 * height), math.ceil(0.2 * width)))
    out = images.clone()
    for index in chosen.nonzero().flatten().tolist():
        shape = max(1, round(height * float(size[index]))), max(1, round(width * float(size[index])))
        coarse = cells[index, :, : shape[0], : shape[1]]
        fine = F.interpolate(coarse[None], size=(height, width), mode="nearest")[0]
        out[index] = torch.where(fine[0] < share, (fine[1] < 0.5).to(images.dtype), images[index])
    return out


def _gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur each image with its own ``sigma`` (pixels, 0 for none); borders are repeated."""
    radius = math.ceil(3 * largest)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3).view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    count, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, dim=0)
    flat = images.reshape(1, count * channels, height, width)
    flat = F.pad(flat, (radius,) * 4, mode="replicate")
    for shape in ((-1, 1, 1, 2 * radius + 1), (-1, 1, 2 * radius + 1, 1)):
        flat = F.conv2d(flat, kernel.view(shape), groups=count * channels)
    return flat.reshape(images.shape)
