"""Checks of the input of every metric: arrays of real numbers, masks, patients, single numbers; and shared sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cxrkit.errors import ParameterError

PROTOCOLS = ("corrected", "paper", "authors")
_WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)  # what float32 would round
_MISSING = ("", "nan", "none", "nat", "<na>")  # an absent id, once a table or NumPy has made text of it


def dense(name: str, values: ArrayLike | Tensor) -> Tensor:
    """Values as a dense tensor of real numbers without a graph, in their own dtype; ParameterError otherwise."""
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        parts = [dense(name, value) for value in values]
        if len(shapes := {tuple(part.shape) for part in parts}) > 1:
            raise ParameterError(f"{name} holds tensors of different shapes: {', '.join(map(str, sorted(shapes)))}")
        dtype = torch.float64 if len({part.dtype for part in parts}) > 1 else parts[0].dtype
        return torch.stack([part.to(parts[0].device, dtype) for part in parts])
    if not isinstance(values, Tensor):
        return torch.from_numpy(_array(name, values))
    kinds = {
        "a nested tensor; pad it with .to_padded_tensor(nan)": values.is_nested,
        "a quantized tensor; pass .dequantize()": values.is_quantized,
        "a sparse tensor; pass .to_dense()": values.layout != torch.strided,
        "a complex tensor; pass its .real part or .abs()": values.is_complex(),
        "a tensor without values, on the meta device": values.is_meta,
    }
    if found := [kind for kind, holds in kinds.items() if holds]:
        raise ParameterError(f"{name} must be a dense array of real numbers; got {found[0]}")
    return values.detach().resolve_neg()


def _array(name: str, values: ArrayLike) -> np.ndarray:
    if np.ma.is_masked(values):
        raise ParameterError(f"{name} has masked entries, which have no value; pass .filled(nan)")
    try:
        array = np.asarray(values)
        if array.dtype == object and array.ndim:  # a table's column of numbers and gaps
            array = np.where(pd.isna(array), np.nan, array)
            array = array.astype(np.float64) if all(isinstance(value, Real) for value in array.flat) else array
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ParameterError(f"{name} can't be read as an array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        got = f"{array.dtype} values" if array.ndim else repr(values)[:80]
        raise ParameterError(f"{name} must be a dense array of real numbers; got {got}")
    if min(array.strides, default=0) < 0:  # PyTorch has no negative strides
        array = array.copy()
    native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    return np.require(array, native, ["C", "W", "A"])


def real(name: str, values: ArrayLike | Tensor) -> Tensor:
    """Values as float32, or as float64 where float32 would round them; ParameterError as :func:`dense`."""
    values = dense(name, values)
    try:
        return values.to(torch.float64 if values.dtype in _WIDE else torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        raise ParameterError(f"{name} has the dtype {values.dtype}, which holds no plain numbers") from error


def numbers(name: str, values: ArrayLike | Tensor) -> np.ndarray:
    """Values as a NumPy array of float64 that are finite or nan; ParameterError for infinite ones."""
    array = real(name, values).double().cpu().numpy()
    if np.isinf(array).any():
        raise ParameterError(f"{name} must be finite (or nan: no value); got {array[np.isinf(array)][0]}")
    return array


def real_maps(maps: ArrayLike | Tensor, name: str = "maps", axes: str = "H, W") -> Tensor:
    """Maps that end in ``axes``, as :func:`real` gives them; ParameterError for other shapes."""
    return _with_pixels(name, real(name, maps), axes)


def _with_pixels(name: str, maps: Tensor, axes: str) -> Tensor:
    if maps.ndim < len(axes.split(",")) or 0 in maps.shape[-2:]:
        raise ParameterError(f"{name} have shape {tuple(maps.shape)}; expected [..., {axes}] with at least one pixel")
    return maps


def boolean(masks: ArrayLike | Tensor, name: str = "masks", axes: str = "H, W") -> Tensor:
    """Masks that end in ``axes``, as bool; ParameterError for values other than 0 and 1."""
    masks = _with_pixels(name, dense(name, masks), axes)
    if masks.dtype == torch.bool:
        return masks
    values = real(name, masks)
    if not ((values == 0) | (values == 1)).all():
        low, high = values.min().item(), values.max().item()
        raise ParameterError(
            f"{name} must be bool (or hold only 0 and 1): a pixel is in a box or it is not; these range from "
            f"{low:g} to {high:g}. For a mask of 0 and 255 pass {name} > 0"
        )
    return values.bool()


def pair(maps: ArrayLike | Tensor, masks: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Both on one device and checked against each other; maps float32 or float64, masks bool.

    Maps so large that sums over their pixels would overflow come back divided by a power of two.
    """
    maps, masks = _same_size(maps=real("maps", maps), masks=boolean(masks))
    bound = torch.finfo(maps.dtype).max / maps.shape[-2:].numel()
    if maps.numel() and not all(abs(end) < bound for end in maps.aminmax()):
        large = maps.abs().amax((-2, -1), keepdim=True) >= bound
        maps = maps * torch.where(large, 2.0**-40, 1.0).to(maps.dtype)
    return maps, masks


def pair_of_maps(maps: ArrayLike | Tensor, others: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of one size on one device, float64."""
    maps, others = _same_size(maps=real("maps", maps), others=real("others", others))
    return maps.double(), others.double()


def pair_of_regions(predictions: ArrayLike | Tensor, masks: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Two bool regions of one size on one device."""
    return _same_size(predictions=boolean(predictions, "predictions"), masks=boolean(masks))


def _same_size(**named: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors on the device of the first; ParameterError unless they end in the same [H, W]."""
    first, second = named.values()
    shapes = " and ".join(f"{name} {tuple(values.shape)}" for name, values in named.items())
    if first.ndim < 2 or first.shape[-2:] != second.shape[-2:] or 0 in first.shape[-2:]:
        raise ParameterError(f"{shapes} must end in the same [H, W]")
    fit_together(shapes, first.shape[:-2], second.shape[:-2])
    return first, second.to(first.device)


def fit_together(shapes: str, *leading: Sequence[int]) -> None:
    """ParameterError, naming the ``shapes``, unless the leading shapes broadcast."""
    try:
        torch.broadcast_shapes(*leading)
    except RuntimeError as error:
        raise ParameterError(f"{shapes} have leading shapes that don't fit together") from error


def number(name: str, value: float, rule: str, holds: Callable[[float], bool]) -> float:
    """One real number for which ``holds`` is true; else a ParameterError that states the ``rule``."""
    value = _scalar(value)
    if not isinstance(value, (int, float, np.integer, np.floating)) or _odd(value) or not holds(value):
        raise ParameterError(f"{name} {value!r} must be a number {rule}")
    return float(value)


def whole(name: str, value: int, least: int, most: int = 2**63 - 1) -> int:
    """One whole number from ``least`` to ``most``; ParameterError otherwise."""
    value = _scalar(value)
    if not isinstance(value, (int, np.integer)) or _odd(value) or not least <= value <= most:
        bounds = f"at least {least}" if most >= 2**63 - 1 else f"from {least} to {most}"
        raise ParameterError(f"{name} {value!r} must be a whole number, {bounds}")
    return int(value)


def flag(name: str, value: bool) -> bool:
    """True or False; ParameterError for anything else, such as "no", which Python takes for True."""
    value = _scalar(value)
    if not isinstance(value, (bool, np.bool_)):
        raise ParameterError(f"{name} {value!r} must be True or False")
    return bool(value)


def _odd(value: object) -> bool:
    return isinstance(value, (bool, np.timedelta64))  # Python and NumPy count them among the whole numbers


def _scalar(value: object) -> object:
    alone = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0
    return dense("value", value).item() if alone else value


def shares(name: str, values: Iterable[float] | Tensor) -> list[float]:
    """Thresholds as floats; ParameterError for one outside [0, 1]."""
    rule = "in [0, 1]: it is a share of the map's maximum"
    return [number(name, value, rule, lambda share: 0 <= share <= 1) for value in entries(f"{name}s", values)]


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """ParameterError unless ``value`` is allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ParameterError(f"{name} {value!r} is unknown; use {', '.join(map(repr, allowed))}")


def entries(name: str, values: Iterable) -> list:
    """A sequence as a list; ParameterError for text and for what holds no entries."""
    try:
        if isinstance(values, (str, bytes, Mapping)):
            raise TypeError
        return list(dense(name, values) if isinstance(values, Tensor) else values)
    except TypeError as error:
        raise ParameterError(f"{name} must be a sequence; got {values!r}") from error


def label_names(labels: Sequence[str], count: int) -> list[str]:
    """Names of ``count`` labels; ParameterError for another number of them and for a name that comes twice."""
    names = entries("labels", labels)
    if odd := [name for name in names if not isinstance(name, (str, Integral))]:
        raise ParameterError(f"labels hold {odd[0]!r}; a label's name is a text")
    if len(names) != count:
        raise ParameterError(f"{len(names)} labels and {count} columns of values must agree")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ParameterError(f"labels hold {twice[0]!r} twice")
    return names


def patient_ids(patients: Sequence) -> np.ndarray:
    """Patients' ids ``[N]``; ParameterError, naming the row, for one that is missing and for text among numbers."""
    if isinstance(patients, Tensor) or np.ma.is_masked(patients):
        patients = dense("patients", patients).cpu()
        patients = (patients.double() if patients.is_floating_point() else patients).numpy()
    rows = patients if isinstance(patients, (np.ndarray, pd.Series, pd.Index)) else entries("patients", patients)
    ids = _array_of_objects(rows)  # as they are: NumPy would make text of a number beside text, and of nan
    if ids.ndim != 1 or not all(map(pd.api.types.is_scalar, ids)):
        raise ParameterError(f"patients have shape {ids.shape}; expected one id per row, a text or a number")
    missing = pd.isna(ids) | np.array([isinstance(i, str) and i.strip().lower() in _MISSING for i in ids], dtype=bool)
    if missing.any():
        raise ParameterError(
            f"patients: row {int(missing.argmax())} has no id ({int(missing.sum())} of {len(ids)} rows). Images of one "
            "patient are drawn together, so each needs one: where every image is another patient, pass the image ids"
        )
    known = {"numbers": Real, "text": str}
    kinds = {next((k for k, of in known.items() if isinstance(i, of)), type(i).__name__): i for i in ids}
    if len(kinds) > 1:
        mixed = " and ".join(f"{kind} ({name!r})" for kind, name in kinds.items())
        raise ParameterError(f"patients mix {mixed}: 1 and '1' would be two patients; pass all of them as text")
    return np.asarray(rows)


def _array_of_objects(rows: Iterable) -> np.ndarray:
    try:
        return np.asarray(rows, dtype=object)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"patients can't be read as a list of ids: {error}") from error


def total(values: Tensor) -> Tensor:
    """Sum of values of one sign over the pixels: rows in the values' own dtype (fast), their sums in float64."""
    return values.sum(-1).sum(-1, dtype=torch.float64)


def finite(maps: Tensor) -> Tensor:
    """Which maps hold finite values only, bool ``[...]``."""
    # One nan or infinity spoils the sum, which is much faster than asking every pixel.
    return total(maps).isfinite()


def in_columns(sums: list[Tensor], maps: Tensor) -> Tensor:
    """Sums of the maps at each threshold ``[...]`` -> ``[..., T]``, also of no threshold at all."""
    return torch.stack(sums, -1) if sums else maps.new_empty((*maps.shape[:-2], 0), dtype=torch.float64)


def spares(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for one product of the maps, and for one of maps and masks: to fill it again beats asking for more."""
    shape = torch.broadcast_shapes(maps.shape, masks.shape)
    spare = torch.empty_like(maps)
    return spare, spare if maps.shape == shape else maps.new_empty(shape)


def at_least(positive: Tensor, bound: Tensor, out: Tensor | None = None) -> Tensor:
    """1 where a value is at least its map's ``bound`` ``[..., 1, 1]`` and above 0, else 0, in the values' own dtype."""
    smallest = torch.finfo(positive.dtype).smallest_normal * torch.finfo(positive.dtype).eps  # above 0, so 0 stays out
    # Numbers instead of bools: a comparison into the same dtype runs at full speed, and so do the products with it.
    return torch.ge(positive, bound.clamp(min=smallest), out=torch.empty_like(positive) if out is None else out)
