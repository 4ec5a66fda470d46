"""A model on disk: its weights as safetensors, and a JSON card beside them that says how to rebuild it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from cxrkit.errors import CxrkitError, ModelError
from cxrkit.files import checksum, replace_file
from cxrkit.models.classifier import Classifier
from cxrkit.models.weights import fill, read_state
from cxrkit.models.zoo import NOTICE, create

__all__ = ["load", "save"]

_FORMAT = 1
_OPTIONS = ("antialias", "protocol", "seed", "logit_bias", "encoding", "antialias_stem", "auxiliary")  # of create
_NEEDED = ("architecture", "labels", *_OPTIONS[:5], "file")


def save(model: Classifier, path: str | os.PathLike) -> Path:
    """Write the weights to `path` (.safetensors, added when missing) and the card beside it (.json); returns
    the weights' path.

    Each file is complete or not there at all. The card holds the weights' SHA-256, the training that
    `model.card` tells of, and that the model is not for clinical use. Raises ModelError for another suffix or
    a model without a card from `create`.
    """
    path = _weights_path(path)
    if not isinstance(model, Classifier) or "architecture" not in model.card:
        raise ModelError(
            "only a classifier made by cxrkit.models.create can be saved: its card tells how to rebuild it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    replace_file(path, lambda target: save_file(tensors, target))
    card = {"format": _FORMAT} | model.card
    card |= {"labels": list(model.labels), "logit_bias": model.logit_bias, "notice": NOTICE}
    card["file"] = {"name": path.name, "sha256": checksum(path)}
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    replace_file(path.with_suffix(".json"), text)
    return path


def load(path: str | os.PathLike) -> Classifier:
    """The classifier that `save` wrote, on the CPU and in evaluation mode.

    Raises ModelError naming the file when the weights or the card are missing or damaged, or don't belong
    together.
    """
    path = _weights_path(path)
    card_path = path.with_suffix(".json")
    for file in (path, card_path):
        if not file.is_file():
            raise ModelError(f"{file} is missing; a model is two files, {path.name} and {card_path.name}")
    card = _read_card(card_path)
    if card["file"]["sha256"] != checksum(path):
        raise ModelError(f"{path} isn't the file that {card_path.name} describes: the checksums differ")
    state = read_state(path)
    options = {key: card[key] for key in _OPTIONS if key in card}  # cards from before some options lack them
    if card["encoding"] != "add_inverse":
        del options["logit_bias"]
    try:
        model = create(card["architecture"], card["labels"], **options)
    except (CxrkitError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{card_path} describes a model that can't be built: {error}") from error
    fill(model.network, state, path)
    model.card = {key: value for key, value in card.items() if key not in ("format", "file")}
    return model.eval()


def _weights_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in ("", ".safetensors"):
        raise ModelError(f"{path}: models are stored as .safetensors, not {path.suffix}")
    return path.with_suffix(".safetensors")


def _read_card(path: Path) -> dict:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as a model card: {error}") from error
    absent = [key for key in _NEEDED if not isinstance(card, dict) or key not in card]
    if absent or not isinstance(card["file"], dict) or "sha256" not in card["file"]:
        raise ModelError(f"{path} is no model card: it lacks {', '.join(absent) or 'file.sha256'}")
    if card.get("format") != _FORMAT:
        raise ModelError(f"{path} has format {card.get('format')!r}; this version reads format {_FORMAT}")
    return card
