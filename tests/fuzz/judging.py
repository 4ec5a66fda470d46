"""Is a map right, was a refusal due? Compared with the oracles, allowing for what rounding leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cxrkit
from fuzz import maps, oracles, policy
from fuzz.algebra import NoRule
from fuzz.building import has_no_map
from fuzz.drawing import Draw
from fuzz.grid import Grid
from fuzz.handing import Case, make_case
from fuzz.known import Known, fresh, logits_of
from fuzz.oracles import Subject

# Of float32 against float64, as a share of a map's largest value, and of the largest value of all maps.
_RELATIVE, _FLOOR = 3e-4, 1e-6
# How far the cells of a map may lie from where up-sampling puts them, as a share of the image. A map that shows a
# finding a tenth of the image beside itself may be refused; the package draws its own line beyond that.
_OFF = 0.1
_NUDGE = 3e-7  # how far values move where it is asked how well a map is determined at all


@dataclass
class Verdict:
    """What became of one network and method. `kind`: "right", "refused", "wrong", "foreign"."""

    method: str
    kind: str
    told: str = ""
    changed: list[str] = field(default_factory=list)
    is_checked: bool = True  # False: no oracle for this combination
    options: dict = field(default_factory=dict)
    layer: str | None = None  # that the result of `explain` says was used


class Judge:
    def __init__(self, case: Case, known: Known, method: str, settings: dict, output: str, labels):
        self.case, self.known, self.method, self.settings = case, known, method, settings
        labels = list(range(case.plan.outputs)) if labels is None else [labels] if isinstance(labels, int) else labels
        self.subject = Subject(case.plan, labels, output, known.forward)
        self.partly = False  # whether images or labels were left out, as on_error="nan" does
        self.has_oracle = hasattr(oracles, method) or method in policy.BY_LAYER
        self.is_authors = settings.get("protocol") == "authors"

    def refusal(self, verdict: Verdict) -> None:
        excuse = policy.complaint(verdict.told)
        if excuse:
            verdict.kind, verdict.told = "wrong", f"{excuse}: {verdict.told}"
            return
        if policy.must_refuse_everything(self.case) or self.known.failure or self.known.misled:
            return
        if policy.may_refuse(self.case, self.known.kinds, self.method, self.is_authors):
            return
        try:
            reason = None if self._fails_rightly(verdict.told) else "refused a network that the method is right for"
        except NoRule:
            reason = None
        if reason:
            verdict.kind, verdict.told = "wrong", f"{reason}: {verdict.told}"

    def _fails_rightly(self, told: str) -> bool:
        """Whether the formula itself says no. Raises NoRule where it isn't defined."""
        if not self.has_oracle:
            return True
        if self.method in policy.BY_LAYER:
            candidates = self._candidates()
            if not candidates or self._is_off_grid(candidates):
                return True
            if self.method != "scorecam" and self._is_dead(candidates):
                return True
            if self.method == "gradcam_plus_plus":
                return any(maps.at_pole(layer) for layer in candidates)
            if self.method == "cam":
                return not self._has_plain_cam(candidates)
            if self.method == "guided_gradcam":
                oracles.guided_backprop(self.subject)
            return False
        right = self._right()
        if not right.isfinite().all():
            return True
        if self.method in ("lrp", "rap") and self.settings.get("check", True) and "sums to" in told:
            wanted = self.known.logits[:, self.subject.labels]
            gap = (right.sum((2, 3)) - wanted).abs() / wanted.abs()
            return bool((gap > 0.005).any()) or self._spread(right) > 0.01
        return False

    def _is_dead(self, candidates: list[maps.LayerMap]) -> bool:
        """Whether a label doesn't depend on the layer that is meant, as behind units that are all 0."""
        meant = candidates if self.settings.get("layers") is not None else candidates[:1]
        return any(not layer.gradients[:, self.subject.labels].flatten(2).any(2).all() for layer in meant)

    def _is_off_grid(self, candidates: list[maps.LayerMap]) -> bool:
        """Whether the layer that is meant, or the last one, has cells that up-sampling doesn't put in their place."""
        grid = Grid(self.case.plan)
        meant = candidates if self.settings.get("layers") is not None else candidates[:1]
        return any(grid.distance(layer.map) > _OFF for layer in meant)

    def _has_plain_cam(self, candidates: list[maps.LayerMap]) -> bool:
        try:
            if maps.cam(candidates[0], self.subject).isinf().any():
                return False
        except NoRule:
            return False
        return "Linear: module" in self.case.features and not any(
            f.startswith(("Linear:", "odd Linear")) and f != "Linear: module" for f in self.case.features
        )

    def maps(self, verdict: Verdict, found: Tensor) -> None:
        feature = policy.must_refuse_everything(self.case)
        if feature and not self.partly:
            verdict.kind, verdict.told = "wrong", f"a map in spite of {feature}"
            return
        if self.known.is_unknown or not self.has_oracle:
            verdict.is_checked = False
            return
        shape = (len(self.case.images), len(self.subject.labels), *self.case.images.shape[2:])
        wanted = torch.float64 if self.case.images.dtype == torch.float64 else torch.float32
        is_finite = self.partly or bool(found.isfinite().all())
        if tuple(found.shape) != shape or found.dtype != wanted or not is_finite or found.requires_grad:
            got = f"{found.dtype} {list(found.shape)}"
            verdict.kind, verdict.told = "wrong", f"{got} instead of finite {wanted} {list(shape)}"
            return
        try:
            verdict.told = self._compare(verdict, found.double()) or ""
        except NoRule as error:
            verdict.told = f"a map where there is no rule ({error})"
        if verdict.told:
            verdict.kind = "wrong"

    def _compare(self, verdict: Verdict, found: Tensor) -> str | None:
        """How the map differs from the right one, or None."""
        if self.method == "guided_ig":
            return self._compare_guided_path(verdict, found)
        if policy.is_ambiguous(self.case, self.method, self.settings):
            verdict.is_checked = False
            return None
        if self.method in policy.BY_LAYER:
            return self._compare_layers(verdict, found)
        right = self._right()
        # A window's drop is a difference of two scores.
        rounding = (3e-6 if self.method == "occlusion" else 1e-7) * float(self.known.logits.abs().max())
        told = _difference(found, right, rounding)
        if told is None:
            return None
        rounding += self._saturation()
        # How far is the right map itself determined, when everything the network sees moves in its last digits?
        for draws in (4, 16):
            others = torch.stack(self._nudged(draws))
            spread = torch.maximum(others.amax(0), right) - torch.minimum(others.amin(0), right)
            if float(spread.max()) > 0.01 * float(right.abs().max()):
                verdict.is_checked = False  # ties decide
                return None
            told = _difference(found, right, rounding + 30 * spread)
            told = told and self._only_rounded(verdict, found, right, told)
            if told is None:
                return None
        return told

    def _saturation(self) -> float:
        """What single precision leaves of the slope of a sigmoid whose value is next to 0 or 1."""
        if self.subject.output == "logit":
            return 0.0
        self.subject.output = "logit"
        size = float(self._right().abs().max())
        self.subject.output = "probability"
        return 3e-7 * size

    def _only_rounded(self, verdict: Verdict, found: Tensor, right: Tensor, told: str) -> str | None:
        """None where the map is right in double precision and in single precision off by no more than a twentieth, or
        a half where a norm divides by what may be next to nothing, as of an image of one gray."""
        allowed = 0.5 if "norm" in self.known.kinds.opaque else 0.05
        if float((found - right).abs().max()) > allowed * float(right.abs().max()):
            return told
        try:
            precise = self._in_double(verdict)
        except Exception:  # such as of a network that names its precision
            return told
        return _difference(precise, right) and told

    def _in_double(self, verdict: Verdict) -> Tensor:
        network = make_case(self.case.plan.seed).network.double()
        options = {k: v for k, v in verdict.options.items() if k != "preset"} | self.settings
        options["output"] = self.subject.output
        return cxrkit.attribute(network, self.subject.images, self.method, **options)

    def _nudged(self, count: int = 4) -> list[Tensor]:
        draw, found = Draw(self.case.plan.seed, 4, count), []
        self.subject.nudge = lambda values: _NUDGE * values.abs().max().clamp(0.1, 1) * draw.normal(*values.shape)
        for _ in range(count):
            found.append(self._right())
        self.subject.nudge = None
        return found

    def _spread(self, right: Tensor) -> float:
        return max(float((other - right).abs().max() / right.abs().max().clamp(min=1e-30)) for other in self._nudged())

    def _right(self) -> Tensor:
        return getattr(oracles, self.method)(self.subject, **self.settings).detach()

    def _compare_guided_path(self, verdict: Verdict, found: Tensor) -> str | None:
        """In double precision, where the order of the moves is determined."""
        try:
            found = self._in_double(verdict)
        except Exception as error:
            return f"in double precision {type(error).__name__}: {error}"
        right = self._right()
        if _difference(found, right) is None:
            return None
        others = self._nudged(8)
        if max(float((o - right).abs().max()) for o in others) > _RELATIVE * float(right.abs().max()):
            verdict.is_checked = False  # moves in another order: ties decide
            return None
        return _difference(found, right)

    # Methods that look at layers

    def _candidates(self) -> list[maps.LayerMap]:
        usable = list(maps.spatial(self.known.layers))
        name = self.settings.get("layer")
        if name is not None:
            return [layer for layer in usable if layer.name == name]
        if self.settings.get("layers") is not None:
            return [layer for layer in usable if layer.name in self.settings["layers"]]
        return usable

    def _compare_layers(self, verdict: Verdict, found: Tensor) -> str | None:
        """The difference from the map of every layer that could have been meant, the last first."""
        if self.known.forward is not None:
            return None
        told = "there is no layer with a map"
        if self.method == "normgrad" and self.settings.get("layers") is not None:
            right = self._several()
            verdict.is_checked = right is not None
            told = None if right is None else _difference(found, right, 1e-3)
            if told is not None and not all(self._is_determined(layer) for layer in self._candidates()):
                verdict.is_checked, told = False, None
            return told
        first = None
        candidates = self._candidates()
        if verdict.layer is not None:
            module = self.known.names.get(verdict.layer) or self.known.names.get(f"module.{verdict.layer}")
            module = module or self.known.names.get(f"_orig_mod.{verdict.layer}")
            candidates = [layer for layer in candidates if layer.module is module]
            told = f"the result names layer {verdict.layer}, which has no map"
        for layer in candidates:
            try:
                right = self._of_layer(layer)
            except NoRule as error:
                if self.method == "guided_gradcam":
                    raise
                told = first = first or f"a map where there is no rule ({error})"
                continue
            told = _difference(found, right, self._layer_rounding(layer))
            told = told and self._only_rounded(verdict, found, right, told)
            if told is not None and (self._underflows(layer) or not self._is_determined(layer)):
                verdict.is_checked, told = False, None
            if told is None:
                return None
            first = first or f"{told} at {layer.name}"
        return first or told

    def _underflows(self, layer: maps.LayerMap) -> bool:
        """Whether a channel that varies is constant in single precision: Score-CAM scales what varies to [0, 1]."""
        small = layer.map.amax((2, 3)) - layer.map.amin((2, 3))
        return self.method == "scorecam" and bool(((small > 0) & (small < torch.finfo(torch.float32).tiny)).any())

    def _is_determined(self, layer: maps.LayerMap) -> bool:
        """Whether the layer's map and gradients stay what they are when the images move in their last digits."""
        draw = Draw(self.case.plan.seed, 5)
        for _ in range(6):
            network, images = fresh(self.case).double(), self.case.plan.images
            found = maps.layer_maps(
                network, images, logits_of, has_no_map(network), lambda t: t + _NUDGE * draw.normal(*t.shape)
            )
            for other in found:
                if other.name == layer.name and other.map.shape == layer.map.shape and other.gradients is not None:
                    change = (other.gradients - layer.gradients).abs().max()
                    if float(change) > 0.01 * float(layer.gradients.abs().max()):
                        return False
        return True

    def _layer_rounding(self, layer: maps.LayerMap) -> float:
        """What rounding leaves of sums that all but cancel, as of the gradients in front of an instance norm."""
        size = float(layer.gradients.abs().max() * layer.map.abs().max())
        if self.method in ("cam", "scorecam"):
            return 0.0
        return 1e-6 * layer.map.shape[1] * size + 1e-7 * float(self.known.logits.abs().max())

    def _of_layer(self, layer: maps.LayerMap) -> Tensor:
        chosen = self._chosen(layer)
        if self.method == "normgrad":
            virtual = self.settings.get("virtual_layer", "scaling")
            return maps.upsampled(maps.normgrad(chosen, self.subject, virtual), self.subject.images)
        if self.method == "guided_gradcam":
            return maps.gradcam(chosen, self.subject) * oracles.guided_backprop(self.subject).detach()
        return getattr(maps, self.method)(chosen, self.subject).detach()

    def _chosen(self, layer: maps.LayerMap) -> maps.LayerMap:
        """The layer with the gradients of what is explained, for the labels asked for."""
        gradients = layer.gradients[:, self.subject.labels]
        if self.subject.output == "probability":
            p = self.known.logits[:, self.subject.labels].sigmoid()
            gradients = gradients * (p * (1 - p))[:, :, None, None, None]
        return maps.LayerMap(layer.name, layer.module, layer.map, gradients, layer.runs)

    def _several(self) -> Tensor | None:
        named = {layer.name: layer for layer in self.known.layers}
        virtual = self.settings.get("virtual_layer", "scaling")
        chosen = [self._chosen(named[name]) for name in self.settings["layers"]]
        norms = [maps.normgrad(layer, self.subject, virtual) for layer in chosen]
        if self.is_authors:
            flat = [(n.amax((2, 3)) - n.amin((2, 3)) <= 1e-5 * n.amax((2, 3))).any() for n in norms]
            if any(flat):  # the published code asks whether a map is constant to the last digit
                return None
        return maps.multiplied(norms, self.subject.images, self.settings.get("protocol", "corrected"))


def _difference(found: Tensor, right: Tensor, allowed: Tensor | float = 0.0) -> str | None:
    """None where all is equal up to rounding; maps of NaN are those that were left out."""
    left_out = found.isnan().flatten(2).all(2)[:, :, None, None]
    found = torch.where(left_out, right.nan_to_num(posinf=0.0), found)
    if bool((right.isinf() & ~left_out).any()):
        return "a map where there is no rule"
    right = right.nan_to_num(posinf=0.0)
    size = right.abs().amax((2, 3), keepdim=True)
    tolerance = _RELATIVE * size + _FLOOR * right.abs().max() + 1e-12 + allowed
    off = (found - right).abs() - tolerance
    if bool((off <= 0).all()):
        return None
    worst = (found - right).abs().amax() / size.max().clamp(min=1e-30)
    return f"off by {float(worst):.2g} of the largest value ({float((off > 0).double().mean()):.0%} of the pixels)"
