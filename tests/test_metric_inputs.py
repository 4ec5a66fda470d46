"""Every public metric, whatever is passed to it: the number of the float64 input, or a ParameterError.

Metrics and their parameters are read from the package, so a new one is tried as soon as it is exported; a parameter
whose name has no example here fails the test until it gets one.
"""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cxrkit import metrics
from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.metrics import inputs

# Not functions of arrays: a copy of a network, and texts.
OTHERS = {"randomised", "metric_card"}
FUNCTIONS = sorted(n for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n)) and n not in OTHERS)
N, L, SIDE = 3, 2, 16
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float32",
]
FEW = {"steps": 3, "n": 10}  # instead of the defaults, which take longer


@cache
def _numbers() -> torch.Tensor:
    return torch.rand(4, N, L, SIDE, SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cache
def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, L)).eval()


def _examples() -> dict:
    """A sound value for every parameter, by its name, or by (function, name) where the name has two meanings."""
    maps, masks = _numbers()[0] * 60, (_numbers()[1] > 0.7).double()
    rates = _numbers()[2, :, :, 0, 0]
    targets = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    return {
        "maps": maps,
        "others": _numbers()[3] * 60,
        "masks": masks,
        "predictions": (_numbers()[2] > 0.5).double(),
        "box_masks": masks[:, :, None],
        "logits": rates,
        "scores": rates,
        "targets": targets,
        "probabilities": rates,
        ("soft_vote", "probabilities"): rates[None],
        ("hard_vote", "probabilities"): rates[None],
        "labels": ["a", "b"],
        "values": rates[:, 0],
        ("over_seeds", "values"): rates,
        "patients": ["p", "q", "r"],
        ("compare", "scores"): {"one": rates[:, 0], "two": rates[:, 1]},
        "scores_a": rates[:, 0],
        "scores_b": rates[:, 1],
        "p_values": rates[:, 0],
        "model": _network(),
        "images": _numbers()[3, :, :1].float(),
        "groups": {"odd": [True, False, True], "even": [False, True, False]},
        "layers": ["0"],
        "profiles": {"layer": {"odd": maps, "even": -maps}},
        ("rank_feature_maps", "profiles"): {"layer": {"odd": maps[0], "even": -maps[0]}},
        "thresholds": [0.0, 0.3],
        ("insertion", "labels"): [0, 1],
        ("deletion", "labels"): [0, 1],
        ("completeness_gap", "labels"): [0, 1],
    }


def _arguments(name: str) -> dict:
    examples = _examples()
    needed = [p.name for p in _parameters(name) if p.default is p.empty]
    unknown = [p for p in needed if p not in examples and (name, p) not in examples]
    assert not unknown, f"{name}: give an example for {unknown} above"
    given = {p: examples.get((name, p), examples.get(p)) for p in needed}
    patients = {"patients": examples["patients"]} if any(p.name == "patients" for p in _parameters(name)) else {}
    return patients | given | {p.name: FEW[p.name] for p in _parameters(name) if p.name in FEW}


def _parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(metrics, name)).parameters.values())


def _called(name: str, **changes):
    return getattr(metrics, name)(**(_arguments(name) | changes))


def _flat(result) -> np.ndarray:
    """All numbers of a result in a row."""
    if isinstance(result, pd.DataFrame):
        return result.select_dtypes(["number", "bool"]).to_numpy(dtype=float).ravel()
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        return np.concatenate([_flat(part) for part in result])
    return np.asarray(result, dtype=np.float64).ravel()


ARRAYS = [(n, p) for n in FUNCTIONS for p, v in _arguments(n).items() if isinstance(v, torch.Tensor)]
NESTED = [(n, p) for n in FUNCTIONS for p, v in _arguments(n).items() if isinstance(v, dict)]
# The network's own input follows the network's precision.
CAST = [(n, p) for n, p in ARRAYS if p != "images"]


def test_no_metric_is_missing():
    exported = {n for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n))}
    assert exported == {*FUNCTIONS, *OTHERS}
    for name in FUNCTIONS:
        _flat(_called(name))


@pytest.mark.parametrize(("name", "parameter"), CAST)
def test_every_dtype_gives_the_number_of_the_same_values_in_float64(name, parameter):
    sound = _arguments(name)[parameter]
    for dtype in (getattr(torch, kind) for kind in DTYPES):
        cast = sound.round().to(dtype) if not dtype.is_floating_point else sound.to(dtype)
        right = _flat(_called(name, **{parameter: cast.double()}))
        for given in _forms(cast):
            got = _flat(_called(name, **{parameter: given}))
            np.testing.assert_allclose(got, right, rtol=2e-5, atol=2e-6, err_msg=f"{dtype}, {type(given)}")


def _forms(cast: torch.Tensor) -> list:
    """The same values as a plain and a strided tensor, with a graph, as an array, and in the other byte order."""
    strided = torch.stack([cast, cast], -1)[..., 0] if cast.dtype != torch.float8_e4m3fn else cast
    forms = [cast, strided]
    if cast.is_floating_point():
        forms.append(cast.clone().requires_grad_())
    if cast.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        array = cast.numpy()
        forms += [array, array.astype(array.dtype.newbyteorder(">")), np.flip(np.flip(array, 0).copy(), 0)]
    return forms


@pytest.mark.parametrize(("name", "parameter"), NESTED)
def test_dtypes_inside_mappings(name, parameter):
    mapping = _arguments(name)[parameter]
    if parameter == "groups":
        mapping = {key: torch.tensor(value) for key, value in mapping.items()}
        np.testing.assert_allclose(_flat(_called(name, groups=mapping)), _flat(_called(name)))
        return
    for dtype in (torch.float16, torch.bfloat16, torch.uint8, torch.bool):
        cast = _deep(mapping, lambda values, dtype=dtype: values.abs().to(dtype))
        right = _flat(_called(name, **{parameter: _deep(cast, torch.Tensor.double)}))
        np.testing.assert_allclose(_flat(_called(name, **{parameter: cast})), right, rtol=2e-5)
    for junk in (None, "text", {"one": "text"}, {"one": None, "two": None}, [1, 2]):
        with pytest.raises(ParameterError):
            _called(name, **{parameter: junk})


def _deep(mapping, change):
    if not isinstance(mapping, dict):
        return change(mapping)
    return {key: _deep(value, change) for key, value in mapping.items()}


def _junk(sound: torch.Tensor) -> dict:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return {
        "text": "text",
        "texts": np.full(sound.shape, "0.5"),
        "none": None,
        "object": object(),
        "mapping": {},
        "dates": np.full(sound.shape, np.datetime64("2020-01-01")),
        "ragged": [[1.0, 2.0], [3.0]],
        "mixed tensors": [torch.ones(2), torch.ones(3)],
        "complex": sound.to(torch.complex64),
        "complex array": sound.to(torch.complex64).numpy(),
        "sparse": sound.to_sparse(),
        "quantized": torch.quantize_per_tensor(sound.float(), 0.1, 0, torch.quint8),
        "nested": nested,
        "meta": sound.to("meta"),
        "masked": np.ma.masked_array(sound.numpy(), np.ones(sound.shape, dtype=bool)),
        "one number": 0.5,
        "another axis": sound[None].expand(2, *sound.shape)[None].expand(7, *([-1] * (sound.ndim + 1))),
        "another length": sound.new_zeros((5, *sound.shape[1:])),
        "nothing": sound.new_zeros((*sound.shape[:-1], 0)),
    }


BROADCAST = {"another axis", "another length"}  # sound for maps of any leading shape
FREE = {("difference_of_means", p) for p in ("scores_a", "scores_b")}
EMPTY = {*FREE, ("holm", "p_values")}  # nan, or no p-value at all


@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*quantiz.*")
@pytest.mark.parametrize(("name", "parameter"), ARRAYS)
def test_what_is_no_array_of_real_numbers_is_refused(name, parameter):
    for kind, junk in _junk(_arguments(name)[parameter]).items():
        alone = parameter == "images" and kind in BROADCAST
        allowed = kind in BROADCAST or (kind == "nothing" and (name, parameter) in EMPTY)
        allowed |= (name, parameter) in FREE and kind in ("one number", "ragged", "mixed tensors")
        try:
            _flat(_called(name, **{parameter: junk}))
        except CxrkitError as error:
            refused = isinstance(error, ParameterError) or parameter == "images"
        else:
            refused = allowed or alone
        assert refused, f"{name}, {parameter}: {kind}"


SINGLE = [
    (n, p.name, p.default)
    for n in FUNCTIONS
    for p in _parameters(n)
    if isinstance(p.default, (int, float, str)) and not isinstance(p.default, bool)
]
MISSING_IS_SOUND = {"cutoff", "zero_division"}  # nan has a meaning there


@pytest.mark.parametrize(("name", "parameter", "default"), SINGLE)
def test_settings_out_of_range_are_refused(name, parameter, default):
    odd = [
        None,
        [],
        {},
        object(),
        np.timedelta64(1, "D"),
        "nonsense",
        b"bytes",
        1j,
        math.nan,
        math.inf,
        -math.inf,
        -1,
        -0.5,
        2**70,
    ]
    odd += [torch.tensor([0.5, 0.5]), torch.tensor(0.5).to_sparse(), np.array(["0.5"]), "0.5"]
    for value in odd:
        if isinstance(value, float) and math.isnan(value) and parameter in MISSING_IS_SOUND:
            _called(name, **{parameter: value})
        elif parameter == "sigma" and value is None and name == "localisation_scores":
            _called(name, sigma=None)  # unsmoothed
        elif parameter in ("cutoff", "predicted") and isinstance(value, torch.Tensor) and not value.is_sparse:
            _called(name, **{parameter: value})  # one for each label
        elif parameter == "baseline" or (parameter == "promise" and value is not None):
            _right_or_refused(name, parameter, value)
        elif parameter in ("sigma", "tolerance") and isinstance(value, int) and value == 2**70:
            _called(name, **{parameter: value})
        else:
            with pytest.raises(ParameterError):
                _called(name, **{parameter: value})


FLAGS = [(n, p.name) for n in FUNCTIONS for p in _parameters(n) if isinstance(p.default, bool)]


@pytest.mark.parametrize(("name", "parameter"), FLAGS)
def test_flags_are_true_or_false(name, parameter):
    for sound in (True, np.bool_(False), torch.tensor(True)):
        _called(name, **{parameter: sound})
    for odd in ("no", 1, None, [], np.array([True, False]), pd.NA):
        with pytest.raises(ParameterError, match="True or False"):
            _called(name, **{parameter: odd})


def test_labels_are_names():
    targets = [[1, 0], [0, 1]]
    for labels in (["a", "a"], ["a", None], [["a"], ["b"]], "ab", None, np.eye(2), torch.eye(2), ["a"]):
        with pytest.raises(ParameterError, match="labels"):
            metrics.classification_report(targets, targets, labels)


def test_any_distance_is_near_enough_for_a_huge_tolerance():
    maps, masks = _numbers()[0], (_numbers()[1] > 0.7).double()
    for huge in ({"tolerance": 1e308}, {"tolerance_fraction": 1e308}, {"tolerance": 10 * SIDE}):
        assert (metrics.pointing_game(maps, masks, **huge) == 1).all()


def _right_or_refused(name, parameter, value) -> None:
    with suppress(ParameterError):
        _called(name, **{parameter: value})


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if any(p.name == "patients" for p in _parameters(n))])
def test_patients_are_known_and_of_one_kind(name):
    right = _flat(_called(name, patients=["p", "q", "r"]))
    for sound in (
        np.array(["p", "q", "r"]),
        pd.Series(["p", "q", "r"]),
        ["p", np.str_("q"), "r"],
        [1, 2.0, np.int8(3)],
        torch.tensor([1, 2, 3]),
    ):
        np.testing.assert_array_equal(_flat(_called(name, patients=sound)), right)
    gaps = [["p", None, "r"], ["p", math.nan, "r"], [1.0, math.nan, 3.0], ["p", "", "r"], ["p", pd.NA, "r"]]
    gaps += [np.array(["p", math.nan, "r"]), torch.tensor([1.0, math.nan, 3.0]), pd.Series(["p", None, "r"])]
    for gap in gaps:
        with pytest.raises(ParameterError, match="row 1 has no id"):
            _called(name, patients=gap)
    for mixed in (["p", 1, "r"], [1, "1", 2], [b"p", "q", "r"]):
        with pytest.raises(ParameterError, match="mix"):
            _called(name, patients=mixed)
    optional = inspect.signature(getattr(metrics, name)).parameters["patients"].default is None
    for junk in (
        *[None][optional:],
        [[1], [1, 2], [3]],
        "pqr",
        3,
        {"p": 1},
        [["p"], ["q"], ["r"]],
        ["p", "q"],
        object(),
    ):
        with pytest.raises(ParameterError):
            _called(name, patients=junk)


def test_patients_of_all_batches_are_of_one_kind():
    gathered = metrics.Accumulator()
    gathered.add({"score": [1.0, 2.0]}, [1, 2])
    gathered.add({"score": [1.0, 2.0]}, ["1", "2"])
    with pytest.raises(ParameterError, match="mix"):
        gathered.table(n=5)
    for patients in (None, ["a", None], "ab", ["a"]):
        with pytest.raises(ParameterError):
            metrics.Accumulator().add({"score": [1.0, 2.0]}, patients)
    for scores in (None, [1.0], {"score": ["a", "b"]}, {"score": None}, {"score": torch.ones(2).to_sparse()}):
        with pytest.raises(ParameterError):
            metrics.Accumulator().add(scores, ["a", "b"])
    half = torch.tensor([0.5, 1.5], dtype=torch.bfloat16, requires_grad=True)
    gathered = metrics.Accumulator()
    gathered.add({"score": half}, ["a", "b"], label=["x", "y"])
    assert gathered.table(n=5).query("label == 'macro'")["mean"].item() == 1


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, p in ARRAYS if "mask" in p or p == "predictions"])
def test_masks_hold_0_and_1_only(name, parameter):
    sound = _arguments(name)[parameter]
    for scale in (255, 0.5, -1, math.nan):
        with pytest.raises(ParameterError, match="only 0 and 1"):
            _called(name, **{parameter: sound * scale})
    with pytest.raises(ParameterError, match=rf"pass {parameter} > 0"):
        _called(name, **{parameter: (sound * 255).to(torch.uint8)})


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, p in ARRAYS if p in ("maps", "others")])
def test_a_map_that_is_not_finite_has_no_score_and_spoils_no_other(name, parameter):
    maps = _arguments(name)[parameter]
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = maps.clone()
        spoilt[1, 1, 2, 3] = bad
        try:
            found = getattr(metrics, name)(**(_arguments(name) | {parameter: spoilt}))
        except ParameterError:
            continue
        right = _called(name)
        found, right = (r.values["epg_signed"] if name == "localisation_scores" else r for r in (found, right))
        found, right = (getattr(r, "area", getattr(r, "gap", r)) for r in (found, right))
        if found.shape[:2] == (N, L):
            assert not found[1, 1].isfinite().all(), name
        torch.testing.assert_close(found[0], right[0], equal_nan=True)


def test_smoothing_of_8_bit_maps():
    maps = torch.tensor([[0, 255, 0], [255, 0, 255], [0, 255, 0]], dtype=torch.uint8)
    found = metrics.gaussian_smoothing(maps, sigma=1.0, size=3)
    near, far = 1 / (1 + 2 * math.exp(-0.5)), math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    assert found.dtype == torch.float32
    # The middle: four neighbors at the side, each near * far, twice reflected corners are 0.
    assert found[1, 1].item() == pytest.approx(255 * 4 * near * far, rel=1e-5)
    tiny = metrics.gaussian_smoothing(maps, sigma=1e-300, size=3)
    torch.testing.assert_close(tiny, maps.float())


def test_sums_of_large_maps_do_not_overflow():
    maps = torch.linspace(-0.5, 1, SIDE * SIDE).view(SIDE, SIDE)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[9:, 3:9] = True
    right, found = (metrics.localisation_scores(m, mask).values for m in (maps, maps * 3e38))
    for name in right:
        torch.testing.assert_close(found[name], right[name], equal_nan=True, msg=name)
    batch = torch.stack([maps * 3e38, maps * 1e-30, torch.full_like(maps, torch.nan)])
    signed = metrics.energy_pointing_game(batch, mask, "signed")
    torch.testing.assert_close(signed[:2], right["epg_signed"].expand(2), rtol=1e-3, atol=0)
    assert signed[2].isnan()
    large = metrics.energy_pointing_game((maps * 3e38).bfloat16(), mask)
    torch.testing.assert_close(large, metrics.energy_pointing_game(maps.bfloat16(), mask), rtol=1e-2, atol=0)


def test_gaps_in_a_column_of_objects_are_nan():
    column = pd.Series([0.25, None, True], dtype=object)
    np.testing.assert_array_equal(inputs.numbers("scores", column), [0.25, math.nan, 1.0])
    assert metrics.bootstrap(column, ["a", "b", "c"]).mean == 0.625
    with pytest.raises(ParameterError, match="finite"):
        metrics.bootstrap([1.0, math.inf], ["a", "b"])


def test_a_label_without_a_cutoff_has_no_votes():
    assert np.isnan(metrics.hard_vote(np.full((3, 1, 2), 0.6), [0.5, math.nan])[0, 1])


def test_exclusive_classes_need_every_probability():
    with pytest.raises(ParameterError, match="all of them"):
        metrics.classification_report([[1, math.nan]], [[0.4, math.nan]], ["a", "b"], exclusive=True)
