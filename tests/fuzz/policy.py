"""What may be refused, what has to be, and what a refusal must say."""

from __future__ import annotations

import re

from fuzz.algebra import ACTIVATIONS, Kinds
from fuzz.handing import Case

BY_RULES = {"deeplift", "lrp", "rap"}
GUIDED = {"guided_backprop", "guided_gradcam"}
BY_LAYER = {"cam", "gradcam", "gradcam_plus_plus", "layercam", "scorecam", "normgrad", "guided_gradcam"}
WITHOUT_GRADIENTS = {"occlusion", "scorecam", "cam"}

# Activation functions that relevance rules are known for; others may be refused.
_RELEVANT = {"relu", "relu6", "capped", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh", "silu"}
_RELEVANT |= {"mish", "hardswish", "tanh"}
_SECANT = _RELEVANT | {"prelu", "softplus", "sigmoid"}

# Features that let any method refuse: the network isn't a function of one image, or not one from images to logits.
_ANYTHING = ("random", "batch norm", "outputs", "unfit images", "hook: needs gradients", "scripted", "traced")
_ANYTHING += ("quantized", "compiled")
# Features that let methods with rules of their own refuse.
_OPAQUE = ("odd", "hook: backward", "fx", "Conv: adapter", "Linear: adapter")
# Layers behind these don't follow the image's grid, or can't be told from such.
_MOVED = ("flip", "roll", "shuffle", "unshuffle", "odd flatten", "odd round_trip", "odd Conv")


def must_refuse_everything(case: Case) -> str | None:
    """The feature for which every method must refuse, if there is one."""
    return next((f for f in case.features if f.startswith(("random", "unfit images"))), None)


def may_refuse(case: Case, kinds: Kinds, method: str, is_authors: bool) -> str | None:
    """The feature that allows this method to refuse, or None."""
    for prefix in _ANYTHING:
        found = next((f for f in case.features if f.startswith(prefix)), None)
        if found:
            return found
    rules = (method in BY_RULES or method in GUIDED) and not (is_authors and method == "guided_backprop")
    if rules:
        found = next((f for f in case.features if f.startswith(_OPAQUE)), None)
        if found:
            return found
        if kinds.others & {"detached"}:
            return "detached"
        if method in GUIDED and "power" in kinds.opaque:
            return "a pool by powers"
    if method == "bcos" and case.features & {"hook: backward", "fx"}:
        return "layers that can't be told as B-cos layers"
    if method in ("lrp", "rap"):
        odd = (kinds.activations - _RELEVANT) or (kinds.others & {"interpolated"})
        if odd:
            return f"no rule for {sorted(odd)[0]}"
    if method == "deeplift" and kinds.activations - _SECANT:
        return f"no rule for {sorted(kinds.activations - _SECANT)[0]}"
    if method in BY_LAYER:
        found = next((f for f in case.features if f.startswith(_MOVED)), None)
        if found:
            return found
        if kinds.opaque & {"attention"}:
            return "attention"
    return None


# Spellings by operations for which the method has another, equally literal reading: every ReLU is guided, also two that
# make a leaky one; a mean of means shares twice by size; an adapter beside a layer is a sum.
_READ_TWICE = {
    "guided_backprop": ("two rectifiers", "minus relu of minus", "clamps"),
    "lrp": ("mean of means", "sum: stacked", "adapter"),
}
_READ_TWICE |= {"guided_gradcam": _READ_TWICE["guided_backprop"], "rap": _READ_TWICE["lrp"]}
# By some rules or protocols only: where a shift takes its share, epsilon moves the difference x - mean, or the quotient
# by the deviation; a batch norm that is written out is one of the published code's batch norms, or a product and a sum.
_READ_TWICE_BY = {
    ("lrp", "epsilon"): ("mean and deviation", "BatchNorm: formula"),
    ("lrp", "authors"): ("BatchNorm: frozen", "BatchNorm: formula"),
    ("rap", "authors"): ("BatchNorm: frozen", "BatchNorm: formula"),
}


def is_ambiguous(case: Case, method: str, settings: dict) -> bool:
    """Whether the network's spelling leaves open which map is right."""
    spellings = _READ_TWICE.get(method, ())
    for choice in ("rule", "protocol"):
        spellings += _READ_TWICE_BY.get((method, settings.get(choice)), ())
    return any(f.endswith(spellings) for f in case.features)


def complaint(text: str) -> str | None:
    """What is wrong with the words of a refusal."""
    if len(text.strip()) < 20:
        return "the refusal names no cause"
    if re.search(r"0x[0-9a-f]{6,}|Traceback", text):
        return "the refusal shows an address or a traceback"
    return None


def cause(text: str) -> str:
    """A refusal without names and numbers, for grouping."""
    text = re.sub(r"^[a-z_]+: ", "", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"^\w+ (has|returns)", r"it \1", text)
    text = re.sub(r"layer [\w.]+|\[[^\]]*\]|\([^)]*\)", "…", text)
    text = re.sub(r"-?\b\d[\d.e+-]*", "#", text)
    first, *rest = re.split(r"[;:] ", re.sub(r"\s+", " ", text))
    return (first if len(first.strip("… ,#")) > 20 or not rest else f"{first}: {rest[0]}")[:90]


assert ACTIVATIONS.keys() >= _RELEVANT
