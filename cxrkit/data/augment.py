"""The papers' augmentation, on batches of images and on whatever device holds them.

All geometric steps of an image become one homography and one interpolation, so nothing is blurred twice. That, and a
draw for each image of a batch, is why this is not a chain of torchvision's transforms: those interpolate at each step
and draw once a call. On one image they agree, as the tests show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cxrkit.errors import ParameterError

__all__ = ["Augmentation", "augmentation", "warp"]


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

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Float images ``[B, C, H, W]`` in [0, 1], each changed by a draw of its own; what comes in from outside is 0.

        Drawn on the generator's device, used on the images' own.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ParameterError(f"images must be float [B, C, H, W], got {images.dtype} {tuple(images.shape)}")
        draw = _Draw(len(images), generator)
        return self._grey_values(warp(images, self.homographies(images, draw)), draw)

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


STRENGTHS = {
    "none": {},
    "light": {"scale": 0.1, "rotate": 5.0, "shear": 2.5, "perspective": 0.1, "gamma": 0.2},
    "heavy": {"flip": 0.5, "scale": 0.15, "rotate": 6.0, "shear": 4.0, "perspective": 0.15, "gamma": 0.25}
    | {"pepper": 0.1, "blur": 2.0, "noise": 0.04},
}
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
    if name not in STRENGTHS:
        raise ParameterError(f"augment={name!r} is unknown; use one of {sorted(STRENGTHS)}")
    if name == "none":
        return Augmentation()
    return Augmentation(**STRENGTHS[name], translate=_TRANSLATE[reference])


def warp(images: Tensor, homographies: Tensor) -> Tensor:
    """Move each image by its 3 x 3 matrix, bilinear, zero outside.

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
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Draw:
    """Random numbers, one row per image, made where the generator lives."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count = count
        self.generator = generator

    def uniform(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device).to(like)

    def normal(self, like: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device).to(like)


def _matrix(like: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    def entry(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else like.new_full((len(like),), float(value))

    return torch.stack([torch.stack([entry(value) for value in row], dim=-1) for row in rows], dim=-2)


def _rotation_and_shear(like: Tensor, angle: Tensor, shear: Tensor, aspect: float) -> Tensor:
    """Rotation after a horizontal shear, about the centre, in pixels: the aspect is undone around it."""
    cos, sin, slant = angle.cos(), angle.sin(), shear.tan()
    upper, lower = [cos, (cos * slant - sin) / aspect, 0], [sin * aspect, sin * slant + cos, 0]
    return _matrix(like, [upper, lower, [0, 0, 1]])


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
