"""XRAI: integrated gradients shared out over regions of the image, best region first.

The segments overlap. Together they cut the image into atoms: sets of pixels that belong to the same segments. Areas
and sums of attribution are kept per atom, so that a step costs as much as there are atoms, not pixels.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from cxrkit.attribution.gradient import is_number, quadrature, summed_over_points
from cxrkit.attribution.registry import check_choice, method
from cxrkit.attribution.target import Explained
from cxrkit.errors import AttributionError, ParameterError

__all__ = ["top_fraction", "xrai"]

_SCALES = (50, 100, 150, 250, 500, 1200)  # of Felzenszwalb's segmentation
_SIGMA, _MIN_SIZE = 0.8, 150
_SEGMENTATION_SIZE = (224, 224)  # its parameters mean something at this size and from -1 to 1 only
_REACH = 5  # pixels by which segments are dilated
_FEWEST = 50  # new pixels that make a segment worth adding
_SMALLEST = 32  # pixels a side: below, the dilation makes one of nearly everything


@method("xrai")
def xrai(
    explained: Explained,
    images: Tensor,
    *,
    n_steps: int = 100,
    rule: str = "gauss_legendre",
    algorithm: str = "full",
    segments: Tensor | None = None,
    attribution: Tensor | None = None,
) -> Tensor:
    """XRAI: each pixel gets the mean attribution of its region. [B, L, H, W], in units of the score per pixel; the map
    sums to what the attribution sums to.

    The attribution is the mean of integrated gradients (`n_steps` points by `rule`, as there) from the image's own
    minimum and from its maximum, the largest over the channels; or `attribution` [B, L, H, W], which needs no pass
    through the network. `segments`: bool masks [S, H, W] or [B, S, H, W], or whole-number label maps [K, H, W] or
    [B, K, H, W], in which each value is a segment; None segments each image once for all labels (Felzenszwalb at six
    scales of 50 to 1200, dilated by 5 pixels). `algorithm`: "full" adds the segment whose new pixels have the
    highest mean, again and again; "fast" sorts the segments once by their mean. Of equals the first wins.
    A segment that adds fewer than 50 pixels is left out; pixels without a region get their own mean.

    Raises AttributionError for images smaller than 32 x 32 unless segments are given. Source: Kapishnikov et al.
    2019; sizes and scales as in paper `path`, whose code takes "uniform" points.
    """
    check_choice("algorithm of xrai:", algorithm, _ALGORITHMS)
    members = [_members(image) for image in images] if segments is None else _given(segments, images)
    cuts = [_atoms(*member) for member in members]
    for i, (_, areas, incidence) in enumerate(cuts):
        if (incidence @ areas).max() < _FEWEST:
            row = explained.first_row + i
            raise ParameterError(f"segments of image {row}: none has {_FEWEST} pixels, the fewest that count")
    if attribution is None:
        attribution = _from_black_and_white(explained, images, n_steps, rule)
    else:
        _check_attribution(explained, attribution, images)
    maps = np.empty(attribution.shape)
    for image_map, values, cut in zip(maps, attribution.detach().double().cpu().numpy(), cuts, strict=True):
        for j, value in enumerate(values):
            image_map[j] = _shared_out(_ALGORITHMS[algorithm], value, *cut)
    return torch.from_numpy(maps).to(images.device)


def top_fraction(maps: Tensor, fraction: float = 0.3) -> Tensor:
    """The highest values of each map [..., H, W], as bool: those above the (1 - `fraction`) quantile.

    `fraction` lies between 0 and 1. Ties at the quantile stay out, so that maps of a few flat regions keep less than
    the fraction, and constant maps nothing. With the map of full XRAI it is what figures of paper `path` call
    "Fast XRAI 30 %".
    """
    if not is_number(fraction) or not 0 < fraction < 1:
        raise ParameterError(f"fraction must be a number between 0 and 1; got {fraction!r}")
    values = maps.detach().double().flatten(-2)
    quantile = np.quantile(values.cpu().numpy(), 1 - fraction, axis=-1, keepdims=True)
    return (values > torch.from_numpy(quantile).to(values.device)).view(maps.shape)


def _from_black_and_white(explained: Explained, images: Tensor, n_steps: int, rule: str) -> Tensor:
    """Mean of integrated gradients from each image's minimum and maximum, largest channel. [B, L, H, W]."""
    nodes, weights = (torch.as_tensor(v).to(images) for v in quadrature(rule, n_steps))
    extremes = torch.stack([images.amin((1, 2, 3)), images.amax((1, 2, 3))])[:, :, None, None, None]

    def along(row: Tensor, step: Tensor):
        node, start = step // 2, extremes[step % 2, row]
        difference = images[row] - start
        displacement = weights[node].view(-1, 1, 1, 1) / 2 * difference
        return start + nodes[node].view(-1, 1, 1, 1) * difference, lambda gradient: gradient * displacement

    return summed_over_points(explained, images, 2 * n_steps, along).amax(2)


def _check_attribution(explained: Explained, attribution: object, images: Tensor) -> None:
    got = list(attribution.shape) if isinstance(attribution, Tensor) else type(attribution).__name__
    asked = explained.labels or explained.names
    wanted = [len(images), *([len(asked)] if asked else got[1:2]), *images.shape[-2:]]
    if got != wanted:
        raise ParameterError(f"attribution must be a tensor {wanted}, one map per label of each image; got {got}")
    if not attribution.isfinite().all():
        raise ParameterError("attribution holds NaN or infinite values")


# Segments: S of them as bits [S / 8, H, W], a byte for eight, which makes dilating hundreds of masks cheap.


def _given(segments: object, images: Tensor) -> list[tuple[np.ndarray, int]]:
    """The caller's segments of each image."""
    size = images.shape[-2:]
    kind = f"{segments.dtype} {list(segments.shape)}" if isinstance(segments, Tensor) else type(segments).__name__
    fits = (
        isinstance(segments, Tensor)
        and not segments.is_floating_point()
        and segments.ndim in (3, 4)
        and segments.shape[-2:] == size
        and segments.shape[-3] > 0
        and (segments.ndim == 3 or len(segments) == len(images))
    )
    if not fits:
        raise ParameterError(
            f"segments must be bool masks [S, {size[0]}, {size[1]}] or [B, S, {size[0]}, {size[1]}], or label maps "
            f"of whole numbers [K, {size[0]}, {size[1]}] or [B, K, {size[0]}, {size[1]}]; got {kind}"
        )
    sets = segments.cpu().numpy()
    read = _masks_as_bits if segments.dtype == torch.bool else _label_maps_as_bits
    return [read(each) for each in sets] if segments.ndim == 4 else [read(sets)] * len(images)


def _members(image: Tensor) -> tuple[np.ndarray, int]:
    """The dilated segments of one image [C, H, W] at six scales, from fine to coarse."""
    from skimage.segmentation import felzenszwalb
    from skimage.transform import resize

    if min(image.shape[-2:]) < _SMALLEST:
        raise AttributionError(
            f"images of {image.shape[-2]} x {image.shape[-1]} pixels are too small to segment; xrai needs "
            f"{_SMALLEST} x {_SMALLEST} or more, or segments="
        )
    pixels = image.permute(1, 2, 0).cpu().numpy()
    low, high = pixels.min(), pixels.max()
    scaled = (pixels - low) / (high - low if high > low else 1) * 2 - 1
    shown = resize(scaled, _SEGMENTATION_SIZE, order=3, mode="constant", preserve_range=True, anti_aliasing=True)
    maps = [felzenszwalb(shown, scale=scale, sigma=_SIGMA, min_size=_MIN_SIZE) for scale in _SCALES]
    kept = {"order": 0, "mode": "constant", "preserve_range": True, "anti_aliasing": False}
    bits, count = _label_maps_as_bits(np.stack([resize(m, pixels.shape[:2], **kept) for m in maps]).astype(int))
    return _dilated(bits), count


def _masks_as_bits(masks: np.ndarray) -> tuple[np.ndarray, int]:
    return np.packbits(masks, axis=0), len(masks)


def _label_maps_as_bits(label_maps: np.ndarray) -> tuple[np.ndarray, int]:
    """Label maps [K, H, W]: the segments of the first map in the order of their numbers, then those of the next."""
    numbers, count = [], 0
    for label_map in label_maps:
        found, number = np.unique(label_map, return_inverse=True)
        numbers.append(number.reshape(label_map.shape) + count)
        count += len(found)
    bits = np.zeros((-(-count // 8), *label_maps.shape[1:]), np.uint8)
    y, x = np.indices(label_maps.shape[1:], sparse=True)
    for number in numbers:
        bits[number // 8, y, x] |= np.uint8(128) >> (number % 8).astype(np.uint8)
    return bits, count


def _dilated(bits: np.ndarray) -> np.ndarray:
    """Every segment with all pixels at most 5 pixels away."""
    wide = [bits]  # by 0, 1, ... pixels to the left and right
    for by in range(1, _REACH + 1):
        grown = wide[-1].copy()
        grown[..., by:] |= bits[..., :-by]
        grown[..., :-by] |= bits[..., by:]
        wide.append(grown)
    result = wide[_REACH].copy()
    for by in range(1, _REACH + 1):
        row = wide[isqrt(_REACH**2 - by**2)]
        result[:, by:] |= row[:, :-by]
        result[:, :-by] |= row[:, by:]
    return result


# Regions


def _atoms(bits: np.ndarray, count: int):
    """Each pixel's atom [H W], each atom's area [A], and which segments hold which atoms (sparse [S, A])."""
    from scipy.sparse import csr_array

    patterns = np.ascontiguousarray(bits.reshape(len(bits), -1).T).view(f"V{len(bits)}").ravel()
    _, first, atom, areas = np.unique(patterns, return_index=True, return_inverse=True, return_counts=True)
    held = np.unpackbits(bits.reshape(len(bits), -1)[:, first], axis=0, count=count)
    return atom, areas, csr_array(held, dtype=np.float64)


def _full(incidence, areas: np.ndarray, sums: np.ndarray):
    """Regions [atoms], best first: what each segment would add is looked at afresh after every step."""
    area, gain = areas.astype(np.float64), sums.copy()  # of what no region covers yet
    while True:
        new = incidence @ area
        density = np.where(new >= _FEWEST, (incidence @ gain) / np.maximum(new, 1), -np.inf)
        best = int(density.argmax())
        if density[best] == -np.inf:
            return
        region = _of(incidence, best)
        region = region[area[region] > 0]
        area[region] = gain[region] = 0
        yield region


def _fast(incidence, areas: np.ndarray, sums: np.ndarray):
    """Regions [atoms] in the order of the segments' mean attribution, overlaps and all."""
    area = incidence @ areas
    mean = np.where(area > 0, (incidence @ sums) / np.maximum(area, 1), -np.inf)
    left = areas.copy()
    for segment in np.argsort(-mean, kind="stable"):
        region = _of(incidence, segment)
        region = region[left[region] > 0]
        if areas[region].sum() >= _FEWEST:
            left[region] = 0
            yield region


_ALGORITHMS = {"full": _full, "fast": _fast}


def _of(incidence, segment: int) -> np.ndarray:
    """The atoms of one segment."""
    return incidence.indices[incidence.indptr[segment] : incidence.indptr[segment + 1]]


def _shared_out(algorithm, attribution: np.ndarray, atom: np.ndarray, areas: np.ndarray, incidence) -> np.ndarray:
    """The map [H, W] of one label: each region's mean attribution, and that of all pixels without one."""
    sums = np.bincount(atom, weights=attribution.ravel())
    value = np.empty(len(areas))
    rest = np.ones(len(areas), bool)
    for region in algorithm(incidence, areas, sums):
        value[region] = sums[region].sum() / areas[region].sum()
        rest[region] = False
    if rest.any():
        value[rest] = sums[rest].sum() / areas[rest].sum()
    return value[atom].reshape(attribution.shape)
