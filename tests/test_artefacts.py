"""The measure of grid artefacts: pure grids, noise, smooth maps, and a slow transform from the definition."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from cxrkit.errors import ParameterError
from cxrkit.metrics import grid_energy, isotropic_grid_energy, power_spectrum


def wave(size: int, rows: int, columns: int) -> torch.Tensor:
    """A cosine of so many cycles per image along either axis."""
    y, x = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    return torch.cos(2 * math.pi * (rows * y + columns * x) / size + 0.4)


def blob(size: int, sigma: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    return torch.exp(-((y - 0.45 * size) ** 2 + (x - 0.55 * size) ** 2) / (2 * sigma**2))


def slow_grid_energy(values: np.ndarray, strides) -> float:
    """Fourier sums written out, bins judged one by one."""
    height, length = values.shape
    values = values - values.mean()

    def distance(place: int, multiple: float, size: int) -> int:
        gap = abs(place - round(multiple)) % size
        return min(gap, size - gap)

    grid = total = 0.0
    for row in range(height):
        for column in range(length):
            if row == column == 0:
                continue
            coefficient = sum(
                values[y, x] * cmath.exp(-2j * math.pi * (row * y / height + column * x / length))
                for y in range(height)
                for x in range(length)
            )
            total += abs(coefficient) ** 2
            for stride in strides:
                hits = [
                    (k, m)
                    for k in range(stride)
                    for m in range(stride)
                    if distance(row, k * height / stride, height) == 0
                    and distance(column, m * length / stride, length) == 0
                ]
                if hits and hits != [(0, 0)]:
                    grid += abs(coefficient) ** 2
                    break
    return grid / total


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_a_pattern_that_repeats_with_the_stride_is_all_grid(stride):
    tile = torch.randn(stride, stride)
    assert grid_energy(tile.repeat(64 // stride, 64 // stride), strides=[stride]).item() == pytest.approx(1)
    assert grid_energy(tile.repeat(64 // stride, 64 // stride)).item() == pytest.approx(1)


@pytest.mark.parametrize(("rows", "columns"), [(8, 0), (0, 8), (8, 24), (32, 32)])
def test_stripes_and_checkerboards_count(rows, columns):
    assert grid_energy(wave(64, rows, columns), strides=[8]).item() == pytest.approx(1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (7, 8), (9, 0), (12, 8)])
def test_other_frequencies_do_not_count(rows, columns):
    assert grid_energy(wave(64, rows, columns), strides=[8]).item() == pytest.approx(0, abs=1e-12)


def test_white_noise_scores_the_share_of_the_bins():
    noise = torch.randn(64, 64, 64, dtype=torch.float64)
    share = 63 / 4095
    assert grid_energy(noise, strides=[8]).mean().item() == pytest.approx(share, rel=0.1)
    assert isotropic_grid_energy(noise, strides=[8]).mean().item() == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("sigma", [3.0, 5.0, 12.0])
def test_smooth_maps_score_their_isotropic_level(sigma):
    smooth = blob(96, sigma)
    score, level = grid_energy(smooth).item(), isotropic_grid_energy(smooth).item()
    assert score < 0.05
    assert score == pytest.approx(level, rel=0.1, abs=1e-4)


def test_a_grid_on_a_smooth_map_exceeds_its_isotropic_level():
    smooth = blob(96, 12.0)
    gridded = smooth + 0.1 * torch.randn(8, 8, dtype=torch.float64).repeat(12, 12)
    assert grid_energy(gridded).item() > 5 * isotropic_grid_energy(gridded).item()


@pytest.mark.parametrize(("shape", "strides"), [((12, 12), [2, 3]), ((13, 16), [2, 3]), ((12, 14), [2])])
def test_against_the_slow_transform(shape, strides):
    values = np.random.default_rng(1).normal(size=shape)
    expected = slow_grid_energy(values, strides)
    assert grid_energy(torch.tensor(values), strides).item() == pytest.approx(expected, rel=1e-5)


def test_constant_and_spoilt_maps_give_nan_and_spoil_no_neighbour():
    maps = torch.randn(3, 32, 32)
    maps[1], maps[2, 0, 0] = 0.1, torch.nan
    for measure in (grid_energy, isotropic_grid_energy):
        assert measure(maps).isnan().tolist() == [False, True, True]
    assert power_spectrum(maps)[2].isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-20, -1.0, 3.0, 1e20]), st.floats(-2, 2))
def test_scale_offset_and_shift_change_nothing(seed, factor, offset):
    values = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = grid_energy(values)
    assert ((score >= 0) & (score <= 1)).all()
    torch.testing.assert_close(grid_energy(factor * values), score)
    torch.testing.assert_close(grid_energy(values + offset), score)
    torch.testing.assert_close(grid_energy(values.roll((3, 5), (-2, -1))), score)


def test_powers_add_up_to_the_squares():
    values = torch.randn(2, 10, 15, dtype=torch.float64)
    power = power_spectrum(values)
    torch.testing.assert_close(power.sum((-2, -1)), values.var((-2, -1), correction=0) * 150)
    assert power[:, 5, 7] == pytest.approx(0, abs=1e-20)


def test_window_calms_a_jump_between_borders():
    ramp = torch.arange(64.0).expand(64, 64) / 64
    high = (slice(None), slice(48, None))
    plain, windowed = power_spectrum(ramp), power_spectrum(ramp, window=True)
    assert windowed[high].sum() / windowed.sum() < 0.01 * plain[high].sum() / plain.sum()


def test_the_isotropic_level_against_a_loop():
    maps = torch.rand(24, 24, dtype=torch.float64)
    power = power_spectrum(maps)
    rings: dict[int, list[float]] = {}
    for row in range(24):
        for column in range(24):
            rings.setdefault(round(math.hypot(row - 12, column - 12)), []).append(power[row, column].item())
    bins = [(row, column) for row in (0, 12) for column in (0, 12) if (row, column) != (12, 12)]  # of stride 2
    even = sum(np.mean(rings[round(math.hypot(row - 12, column - 12))]) for row, column in bins)
    assert isotropic_grid_energy(maps, strides=[2]).item() == pytest.approx(even / power.sum().item())


@pytest.mark.parametrize("strides", [[32], [1], []])
def test_strides_that_the_map_cannot_tell_are_refused(strides):
    with pytest.raises(ParameterError):
        grid_energy(torch.rand(64, 64), strides)
    with pytest.raises(ParameterError):
        grid_energy(torch.rand(7, 7))


def test_a_map_that_varies_along_one_axis_agrees_with_scipy():
    line = np.random.default_rng(0).normal(size=64)
    frequencies, power = signal.periodogram(line, detrend="constant", return_onesided=False)
    at_grid = np.isclose(np.abs(frequencies) * 8 % 1, 0) & (frequencies != 0)
    expected = power[at_grid].sum() / power.sum()
    assert grid_energy(torch.tensor(line).expand(64, 64), strides=[8]).item() == pytest.approx(expected, rel=1e-6)


def test_a_grid_on_a_smooth_map_lies_at_the_sampling_frequencies():
    smooth = blob(64, 8.0)
    sampled = torch.zeros(64, 64, dtype=torch.float64)
    sampled[::4, ::4] = smooth[::4, ::4]  # every fourth pixel of every fourth row
    assert grid_energy(sampled, strides=[4]).item() > 20 * grid_energy(smooth, strides=[4]).item()
