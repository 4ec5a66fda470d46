"""Which methods there are: one card per method, registered by decorator under the name that notebooks use."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from cxrkit.errors import ParameterError
from cxrkit.yaml_files import read_yaml

__all__ = ["FAMILIES", "Card", "card", "check_choice", "entry", "method", "methods", "unknown"]

# One module each, named like the family; cards are listed in this order.
FAMILIES = ("gradient", "cam", "path", "xrai", "perturbation", "relevance", "normgrad", "inherent")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method is and costs.

    `papers` are keys of the book's papers; `signed` says whether maps may be negative; `outputs` are the
    quantities it can explain; `forwards` and `backwards` are passes per image, with L labels; `formula` is
    TeX; `options` are its own keywords; `presets` are the settings of a paper by its key, as options and `output`.
    """

    name: str
    family: str
    papers: tuple[str, ...]
    meaning: str
    formula: str
    signed: bool
    needs: str = "any differentiable network"
    forwards: str
    backwards: str
    outputs: tuple[str, ...] = ("logit", "probability")
    options: tuple[str, ...]
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A card with its function `(explained, images, **options) -> maps [B, L, H, W]` and its tests of a network's
    layers.
    """

    card: Card
    function: Callable[..., Tensor]
    fits: Callable[[nn.Module], bool]
    unfit: frozenset[str] = frozenset()


_CARDS = read_yaml(Path(__file__).with_name("cards.yaml"))
_entries: dict[str, Entry] = {}


def method(
    family: str, *, unfit: Collection[str] = (), fits: Callable[[nn.Module], bool] = lambda model: True, **facts
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the method of its own name, with its card in `cards.yaml` or these `facts`.

    The function gets an `Explained`, one chunk of images [B, C, H, W] and its options, which are its
    keyword-only parameters (an option that is a tensor with one row per image is cut along with the
    images). It returns raw maps [B, L, H, W]. `unfit`: classes of layers for which it is never right, in lower
    case without underscores; "bcos" are those with an explanation mode. `fits` tells more from a network's layers.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(function).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in (facts or _CARDS[function.__name__]).items()}
        card = Card(name=function.__name__, family=family, options=options, **told)
        _entries[card.name] = Entry(card, function, fits, frozenset(unfit))
        return function

    return register


def entry(name: str) -> Entry:
    """The registered method of that name; ParameterError with near misses otherwise."""
    if name not in _entries:
        raise unknown("method", name, _entries)
    return _entries[name]


def card(name: str) -> Card:
    """The card of one method; ParameterError with near misses for an unknown name."""
    return entry(name).card


def methods(model: nn.Module | None = None) -> tuple[Card, ...]:
    """Cards of all methods, or of those that can be right for `model`, judged by its layers without running
    it.
    """
    listed = sorted(_entries.values(), key=lambda e: FAMILIES.index(e.card.family))
    if model is None:
        return tuple(e.card for e in listed)
    kinds = {kind.__name__.replace("_", "").lower() for module in model.modules() for kind in type(module).__mro__}
    if any(hasattr(module, "set_explanation_mode") for module in model.modules()):
        kinds.add("bcos")
    return tuple(e.card for e in listed if not kinds & e.unfit and e.fits(model))


def check_choice(kind: str, value: object, known: Collection[str]) -> None:
    """ParameterError, with what was probably meant, unless the value is one of the known names."""
    if value not in known:
        raise unknown(kind, value, known)


def unknown(kind: str, name: object, known: Iterable[str]) -> ParameterError:
    """The error for a name that isn't known, with what was probably meant, or everything if nothing is
    near.
    """
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return ParameterError(f"unknown {kind} {name!r}; did you mean {' or '.join(map(repr, near))}?")
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return ParameterError(f"unknown {kind} {name!r}; known: {listed or 'none'}")
