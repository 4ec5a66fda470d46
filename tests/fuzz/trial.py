"""One network under every method: right, refused, wrong, foreign exception; and whether it was left as it was."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from zlib import crc32

import torch

import cxrkit
from cxrkit.attribution import explain, methods
from fuzz.drawing import Draw
from fuzz.handing import Case, make_case
from fuzz.judging import Judge, Verdict
from fuzz.known import Known
from fuzz.options import draw_options
from fuzz.state import Before

NAMES = tuple(card.name for card in methods())
OUTPUTS = {card.name: card.outputs for card in methods()}
PRESETS = {card.name: card.presets for card in methods()}


@dataclass
class Trial:
    seed: int
    features: set[str]
    verdicts: list[Verdict]

    @property
    def is_changed(self) -> bool:
        return any(verdict.changed for verdict in self.verdicts)


def try_network(seed: int, only: set[str] | None = None) -> Trial:
    """All methods (or `only` some) on the network of that seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = make_case(seed)
        known = Known(case)
        draw = Draw(seed, 2)
        verdicts = []
        for method in NAMES:
            verdict = _try_method(case, known, Draw(seed, 3, crc32(method.encode())), method)
            if only is None or method in only:
                verdicts.append(verdict)
        if draw.chance(0.15):
            verdicts.append(_interrupt(case, draw))
    return Trial(seed, case.features, verdicts)


def _try_method(case: Case, known: Known, draw: Draw, method: str) -> Verdict:
    options = draw_options(draw, method, case.plan.images, known.layers)
    call = {
        "labels": _labels(draw, case),
        "output": draw.pick((None, *OUTPUTS[method])),
        "chunk": draw.pick((None, 1, 2)),
    }
    if PRESETS[method] and draw.chance(0.12):
        call["preset"] = draw.pick(list(PRESETS[method]))
        if "layers" in PRESETS[method][call["preset"]] and "layers" not in options:
            del call["preset"]  # its layers are those of other networks
    if draw.chance(0.15):
        call["on_error"] = "nan"
    verdict = Verdict(method, "right", options={**call, **options})
    before, found = Before(case.network, case.images, *options.values()), None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if draw.chance(0.3):
                result = explain(case.network, case.images, method, **call, **options)
                found, verdict.layer = result.maps, _layer_of(result)
                for refusal in result.refused:
                    warnings.warn(refusal.reason, stacklevel=1)
            else:
                found = cxrkit.attribute(case.network, case.images, method, **call, **options)
        except cxrkit.AttributionError as error:
            verdict.kind, verdict.told = "refused", str(error)
        except cxrkit.ParameterError as error:
            verdict.kind, verdict.told = "wrong", f"refused options that are right: {error}"
        except Exception as error:
            verdict.kind, verdict.told = "foreign", f"{type(error).__name__}: {error}"
    verdict.changed = before.changes()
    if verdict.kind in ("wrong", "foreign"):
        return verdict
    settings = {**PRESETS[method].get(call.get("preset"), {}), **options}
    output = call["output"] or settings.pop("output", "logit")
    settings.pop("output", None)
    judge = Judge(case, known, method, settings, output, call["labels"])
    if verdict.kind == "refused":
        judge.refusal(verdict)
    elif "on_error" in call and found.isnan().any():
        _partly(judge, verdict, found, " ".join(str(w.message) for w in told))
    else:
        judge.maps(verdict, found)
    return verdict


def _layer_of(result) -> str | None:
    """The layer that a result says was used; "" where it says none."""
    if "layer" not in result.options or result.options.get("layers") is not None:
        return None
    return result.options["layer"] or ""


def _partly(judge: Judge, verdict: Verdict, found: torch.Tensor, told: str) -> None:
    """Some maps are NaN: their refusal must be due, and told in a warning; the others must be right."""
    unfit = {"unfit images: NaN", "unfit images: infinite"} & judge.case.features
    if unfit and not found[-1].isnan().all():
        verdict.kind, verdict.told = "wrong", "a map of an image that isn't finite"
        return
    if not told:
        verdict.kind, verdict.told = "wrong", "maps of NaN without a warning"
        return
    verdict.kind, verdict.told = "refused", told
    if not (unfit and found[:-1].isfinite().all()):
        judge.refusal(verdict)
    if verdict.kind == "refused":
        verdict.kind, judge.partly = "right", True
        judge.maps(verdict, found)


def _labels(draw: Draw, case: Case):
    count = case.plan.outputs
    picked = [int(i) for i in draw.rng.permutation(count)[: draw.between(1, count)]]
    return draw.pick((None, None, picked, picked[0]))


class _Stop(BaseException):
    """What somebody who ends the work from outside raises."""


def _interrupt(case: Case, draw: Draw) -> Verdict:
    """A call that is ended from outside, from the progress callback or in the n-th pass through the network."""
    method = draw.pick(NAMES)
    options = draw_options(draw, method, case.plan.images, [])
    kind = draw.pick((KeyboardInterrupt, _Stop, MemoryError))
    count = [draw.between(0, 4)]

    def stop(*args) -> None:
        count[0] -= 1
        if count[0] < 0:
            raise kind

    verdict = Verdict(f"interrupted {method}", "right", options=options)
    modules = [m for m in case.network.modules() if not isinstance(m, torch.jit.ScriptModule)]
    by_hook = draw.chance(0.5) and bool(modules)
    handle = draw.pick(modules).register_forward_pre_hook(stop) if by_hook else None
    before = Before(case.network, case.images)
    try:
        cxrkit.attribute(case.network, case.images, method, progress=None if by_hook else stop, **options)
    except (cxrkit.CxrkitError, KeyboardInterrupt, _Stop, MemoryError):
        pass
    except Exception as error:
        verdict.kind, verdict.told = "foreign", f"{type(error).__name__}: {error}"
    verdict.changed = before.changes()
    if handle is not None:
        handle.remove()
    return verdict
