"""How much of a map is a grid: energy at the frequencies at which a network samples its input.

A network that keeps every s-th sample writes patterns of period s pixels into its explanations. On an axis of N
pixels they can only have frequencies k N / s (k = 0, 1, ..., s - 1), so the *grid bins* of stride s are the
pairs of such frequencies, one per axis, other than the zero frequency; the bins of several strides are united.
They include the horizontal and vertical stripes (one frequency 0). Low frequencies are left to the map's
content: a stride counts only where its bins lie at least four bins apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxrkit.errors import ParameterError
from cxrkit.metrics.inputs import entries, flag, real_maps, whole

__all__ = ["grid_energy", "isotropic_grid_energy", "power_spectrum"]

STRIDES = (2, 4, 8, 16, 32)
SPACING = 4


def power_spectrum(maps: Tensor, window: bool = False) -> Tensor:
    """Power of a map's frequencies: ``[..., H, W]`` -> float64 ``[..., H, W]``, frequency 0 at ``[H // 2, W // 2]``.

    The map's mean is removed first. The transform is orthonormal: the powers add up to the sum of the squared
    values. ``window``: a Hann window, which keeps a jump between opposite borders from showing as a cross, and
    widens every peak to three bins. nan for a map with a value that is not finite. Source: power spectra as
    used against aliasing by Grabinski et al., ECCV 2022.
    """
    maps = real_maps(maps).double()
    centred = maps - maps.mean((-2, -1), keepdim=True)
    if flag("window", window):
        for axis in (-2, -1):
            taper = torch.hann_window(maps.shape[axis], dtype=maps.dtype, device=maps.device)
            centred = centred * (taper[:, None] if axis == -2 else taper)
    power = torch.fft.fft2(centred, norm="ortho").abs().square()
    power = torch.fft.fftshift(power, dim=(-2, -1))
    return power.where(maps.isfinite().all(-1).all(-1)[..., None, None], torch.nan)


def grid_energy(maps: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """Share of a map's energy (without its mean) at the strides' grid bins: ``[..., H, W]`` -> ``[...]`` in [0, 1].

    ``strides``: periods in pixels; by default those of 2, 4, 8, 16, 32 that the map is large enough for. A pattern
    that repeats with one of the strides scores 1, white noise the bins' share of the spectrum; a smooth map scores near
    0. Set it beside :func:`isotropic_grid_energy`.

    nan: a constant map, a value that is not finite. Raises ParameterError for a stride whose bins would lie
    closer than four bins (N / s < 4), where grid and content cannot be told apart. Source: own measure,
    for the grid artefacts that paper `bcos` describes and does not quantify.
    """
    maps = real_maps(maps).double()
    bins = _grid_bins(tuple(maps.shape[-2:]), strides).to(maps.device)
    power = _without_zero(power_spectrum(maps))
    return _share((power * bins).sum((-2, -1)), power, maps)


def isotropic_grid_energy(maps: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """The grid energy that a map would have if each ring of its spectrum were evenly filled: the level to compare with.

    Same arguments and nan as :func:`grid_energy`. Smooth maps and noise have about this much without any grid;
    what exceeds it is a grid (or edges that run exactly along the axes).
    """
    maps = real_maps(maps).double()
    shape = tuple(maps.shape[-2:])
    bins = _grid_bins(shape, strides).to(maps.device)
    power = _without_zero(power_spectrum(maps))
    even = _even(power)
    return _share((_without_zero(even) * bins).sum((-2, -1)), power, maps)


def _grid_bins(shape: tuple[int, int], strides: Sequence[int] | None) -> Tensor:
    """Bool ``[H, W]``, centred, the zero frequency never among them."""
    largest = min(shape) // SPACING
    chosen = [s for s in STRIDES if s <= largest] if strides is None else entries("strides", strides)
    chosen = [whole("stride", stride, 1) for stride in chosen]
    if not chosen or any(stride < 2 or stride > largest for stride in chosen):
        raise ParameterError(
            f"strides {chosen or list(STRIDES)} don't suit maps of {shape[0]} x {shape[1]}: a stride is at least 2 and "
            f"at most {largest} there"
        )
    bins = torch.zeros(shape, dtype=torch.bool)
    for stride in chosen:
        harmonics = torch.arange(stride, dtype=torch.float64)
        rows, columns = ((harmonics * length / stride).round().long() for length in shape)
        bins[rows[:, None], columns] = True
    bins[0, 0] = False
    return torch.fft.fftshift(bins)


def _even(power: Tensor) -> Tensor:
    """The mean power of its ring, one ring per bin of the longer side, at each frequency ``[..., H, W]``."""
    rings = _rings(tuple(power.shape[-2:])).to(power.device)
    count = int(rings.max()) + 1
    size = torch.bincount(rings.flatten(), minlength=count)
    sums = power.new_zeros((*power.shape[:-2], count)).index_add(-1, rings.flatten(), power.flatten(-2))
    return (sums / size)[..., rings]


def _rings(shape: tuple[int, int]) -> Tensor:
    """Long ``[H, W]``, centred: each bin's distance from the zero frequency, in bins of the longer side."""
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(length, dtype=torch.float64)) for length in shape)
    return (torch.hypot(rows[:, None], columns[None, :]) * max(shape)).round().long()


def _without_zero(power: Tensor) -> Tensor:
    power = power.clone()
    power[..., power.shape[-2] // 2, power.shape[-1] // 2] = 0
    return power


def _share(part: Tensor, power: Tensor, maps: Tensor) -> Tensor:
    # Rounding leaves a constant map a trace of energy, so the values decide what is constant.
    varies = maps.amax((-2, -1)) > maps.amin((-2, -1))
    return (part / power.sum((-2, -1))).where(varies, torch.nan).clamp(0, 1).float()
