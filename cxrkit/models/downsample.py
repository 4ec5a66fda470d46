"""Anti-aliased down-sampling: FLC pooling and blur pooling (paper `bcos`, section on anti-aliasing).

FLC pooling is linear along each axis, so a map [H, W] becomes A_H @ map @ A_W.T with one small complex matrix
per axis. The matrices are built once from the Fourier transforms of the definition; the two products then
cost several times less than a two-dimensional transform.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxrkit.errors import ModelError, ParameterError

__all__ = ["POOLS", "BlurPool", "FLCPool", "antialias"]


class _Pool(nn.Module):
    """Halves height and width without parameters or state; `problem(size)` says why a size is unfit, or None."""

    def __init__(self, layer: str = ""):
        super().__init__()
        self.layer = layer  # the convolution it follows, for messages

    def forward(self, x: Tensor) -> Tensor:
        if problem := self.problem(x.shape[-2]) or self.problem(x.shape[-1]):
            where = f" after {self.layer}" if self.layer else ""
            raise ModelError(f"{type(self).__name__}{where} got a map of {x.shape[-2]}x{x.shape[-1]}: {problem}")
        with torch.autocast(x.device.type, enabled=False):  # half precision would undo the exact filter
            dtype = torch.promote_types(x.dtype, torch.float32)
            return self.pool(x.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}" if self.layer else ""


class FLCPool(_Pool):
    """Frequency low cut pooling: keeps the lower half of the spectrum, so that nothing can alias.

    Maps [B, C, H, W] to [B, C, H/2, W/2].
    `protocol="corrected"` (or "paper"): the canonical layer, with a crop centred on the zero frequency at
    every even size (H/2 bins from H//2 - H//4) and the real part. A constant stays constant, cosines below
    H/4 stay exact, those above vanish.
    `protocol="authors"`: what produced the published numbers: zero padding by one, a Hamming window over the
    spectrum, the complex modulus (the sign is lost), first row and column dropped.
    Raises ModelError for odd sizes: a ResNet has even maps for images whose sides are multiples of 32.
    Source: paper `bcos`, FLC variant; Grabinski et al. 2022.
    """

    def __init__(self, protocol: str = "corrected", layer: str = ""):
        super().__init__(layer)
        if protocol not in ("paper", "corrected", "authors"):
            raise ParameterError(f"protocol must be 'paper', 'corrected' or 'authors'; got {protocol!r}")
        self.protocol = protocol

    def problem(self, size: int) -> str | None:
        if size % 2 or size == 0:
            return "it needs an even height and width, so images with sides that are multiples of 32"
        return None

    def pool(self, x: Tensor) -> Tensor:
        authors = self.protocol == "authors"
        matrices = [_axis_matrix(size, authors, x.dtype, x.device) for size in x.shape[-2:]]
        return (_modulus if authors else _real_part)(x, *matrices)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"protocol={self.protocol!r}", super().extra_repr()]))


class BlurPool(_Pool):
    """Blur pooling: binomial filter [1, 3, 3, 1]/8 along each axis, reflected borders, stride 2.

    Maps [B, C, H, W] to [B, C, ceil(H/2), ceil(W/2)]; the gain per axis is |cos(w/2)|^3.
    Raises ModelError for maps below 3 pixels, which reflection can't fill.
    Source: paper `bcos`, BlurPool variant; Zhang 2019.
    """

    def problem(self, size: int) -> str | None:
        return "it needs at least 3 pixels per side" if size < 3 else None

    def pool(self, x: Tensor) -> Tensor:
        taps = x.new_tensor([1, 3, 3, 1]) / 8
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (1, 2, 1, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


POOLS = {
    "flc": FLCPool,
    "flc_authors": functools.partial(FLCPool, "authors"),
    "blur": BlurPool,
}


def antialias(network: nn.Module, kind: str, layers: Sequence[str]) -> None:
    """Replace the named layers of stride 2 or 4, in place, by anti-aliased ones: `kind` is a key of POOLS, `layers` are
    dotted names.

    A convolution becomes itself at stride 1, on a map that keeps its size, followed by a pool of stride 2 (two of them
    for stride 4): the pool sees the finished output of the convolution (for B-cos after its scaling) and comes before
    the norm. Its parameters gain a ".0" in their names. So does a max-pool. An average pool is replaced by the pool
    itself.
    Source: paper `bcos`, recipe for anti-aliased B-cos layers (ResNets); Zhang 2019 for max-pools.
    """
    for name in layers:
        layer = network.get_submodule(name)
        plain = getattr(layer, "linear", layer)  # a B-cos layer wraps the convolution
        pools = {2: 1, (2, 2): 1, (4, 4): 2}.get(plain.stride)
        if pools is None:
            raise ModelError(f"layer {name} has stride {plain.stride}, neither 2 nor 4: nothing to anti-alias there")
        pools = [POOLS[kind](layer=name) for _ in range(pools)]
        network.set_submodule(name, pools[0] if isinstance(layer, nn.AvgPool2d) else _unstrided(layer, plain, pools))


def _unstrided(layer: nn.Module, plain: nn.Module, pools: Sequence[nn.Module]) -> nn.Sequential:
    """A convolution or a max-pool at stride 1, then the pools."""
    one = 1 if isinstance(plain.stride, int) else (1, 1)
    plain.stride = one
    layer.stride = 1 if plain is not layer else one
    steps = [("0", layer), *((str(i), pool) for i, pool in enumerate(pools, 1))]
    kernel, padding = ((v, v) if isinstance(v, int) else v for v in (plain.kernel_size, plain.padding))
    height, width = (k - 1 - 2 * p for k, p in zip(kernel, padding, strict=True))
    if height or width:  # an even kernel without padding
        steps.insert(0, ("pad", nn.ZeroPad2d((0, width, 0, height))))
    return nn.Sequential(OrderedDict(steps))


def _real_part(x: Tensor, rows: tuple, columns: tuple) -> Tensor:
    y = _apply(rows[0], x, columns[0])
    if rows[1] is None or columns[1] is None:
        return y
    # Only the bin -H/4 lacks a partner: the imaginary matrix is (-1)^i times its first row, one number per map.
    signal = _apply(rows[1][:1], x, columns[1][:1])
    signs = torch.outer(*(1 - 2 * (torch.arange(n, device=x.device) % 2) for n in y.shape[-2:]))
    return torch.addcmul(y, signs.to(y.dtype), signal, value=-1)


def _modulus(x: Tensor, rows: tuple, columns: tuple) -> Tensor:
    real = _apply(rows[0], x, columns[0])
    if rows[1] is None and columns[1] is None:
        return real.abs()
    imaginary = torch.zeros_like(real)
    if rows[1] is not None:
        imaginary = imaginary + _apply(rows[1], x, columns[0])
    if columns[1] is not None:
        imaginary = imaginary + _apply(rows[0], x, columns[1])
    if rows[1] is not None and columns[1] is not None:
        real = real - _apply(rows[1], x, columns[1])
    return torch.complex(real, imaginary).abs()  # its gradient at 0 is 0, that of hypot would be NaN


def _apply(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns.T for every map of [B, C, H, W], computed and returned channels last."""
    x = x.movedim(1, -1)
    batch, height, width, channels = x.shape
    y = torch.bmm(rows.expand(batch, -1, -1), x.reshape(batch, height, width * channels))
    y = y.view(batch * rows.shape[0], width, channels)
    y = torch.bmm(columns.expand(y.shape[0], -1, -1), y)
    return y.view(batch, rows.shape[0], columns.shape[0], channels).movedim(-1, 1)


@functools.lru_cache(maxsize=64)
def _axis_matrix(size: int, authors: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Matrix [size/2, size] of one axis, real and imaginary part; None where the latter is only rounding."""
    with torch.inference_mode(False), torch.no_grad():  # the cached tensors also serve later training
        # Authors: the signal gains a zero, the spectrum a window; the first output is dropped.
        signal = torch.eye(size + authors, size, dtype=torch.float64)
        spectrum = torch.fft.fftshift(torch.fft.fft(signal, dim=0, norm="forward"), dim=0)
        if authors:
            window = torch.hamming_window(size + 1, periodic=False, dtype=torch.float64)
            spectrum = spectrum * window.sqrt()[:, None]
            start, stop = (size + 2) // 4, 3 * (size + 2) // 4
        else:  # centred on the zero frequency also where the size is no multiple of 4
            start = size // 2 - size // 4
            stop = start + size // 2
        kept = torch.fft.ifftshift(spectrum[start:stop], dim=0)
        matrix = torch.fft.ifft(kept, dim=0, norm="forward")[int(authors) :]
        real, imaginary = (part.to(device, dtype).contiguous() for part in (matrix.real, matrix.imag))
        return real, imaginary if matrix.imag.abs().max() > 1e-12 else None
