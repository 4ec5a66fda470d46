"""Operations of torch that are linear (or affine) in what depends on the image: a closed list, shared by methods."""

from __future__ import annotations

from cxrkit.attribution.operations import OPERATIONS, Call, tensors

__all__ = ["NORMS", "nonlinearity"]

_LINEAR = OPERATIONS["linear"]
NORMS = _LINEAR["norms"]


def nonlinearity(call: Call, args: tuple, kwargs: dict) -> str | None:
    """Why a call isn't known to be linear in what depends on the image, as words behind its name; None where it is."""
    if call.name in _LINEAR["jointly"]:
        return None
    if call.name not in _LINEAR["factors"] or kwargs.get("rounding_mode"):
        return ""
    added = call.name in _LINEAR["added"]
    factors = [t for t in tensors((*args[added:], *kwargs.values())) if t.requires_grad]
    if len(factors) > 1:
        return "of two tensors that both depend on the image, as in squeeze-and-excitation"
    if call.name in _LINEAR["only_in_first"] and factors and factors[0] is not args[0]:
        return "of a constant by a tensor that depends on the image"
    if call.name == "batch_norm" and kwargs.get("training", args[5] if len(args) > 5 else False):
        return "by the statistics of the images themselves"
    return None
