"""The comparison viewer alive in JupyterLab: maps are computed when they are first looked at."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anywidget
import torch
import traitlets
from torch import Tensor, nn

from cxrkit.attribution.api import device_of
from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.models.bcos import mode_restored
from cxrkit.view import viewer
from cxrkit.view.codec import area_resize, pack_map
from cxrkit.view.export import full_colour

__all__ = ["Explorer", "explain"]

logger = logging.getLogger(__name__)


def explain(
    model: nn.Module, image: Tensor, method: str, label: str, progress: Callable[[float], None] | None = None
) -> Tensor:
    """The map ``[H, W]`` of one label of one image ``[1, H, W]``, by :func:`cxrkit.attribute` with its defaults."""
    from cxrkit.attribution import attribute

    return attribute(model, image[None], method, labels=[label], progress=progress or False)[0, 0]


class _Stopped(Exception):
    """The reader no longer waits for this map."""


class Explorer(anywidget.AnyWidget):
    """Viewer that asks Python for the images and maps it hasn't got; what was computed is kept.

    Maps are computed one after the other in a thread, so that the notebook stays free; the reader sees how far one is,
    and can stop it.

    ``models``: name -> classifier (logits ``[B, L]``, its labels in ``.labels``); ``dataset``: has a length and gives
    samples, may be None when images come by :meth:`add_image`; ``methods``: names; ``labels``: by default the
    dataset's, else the first model's; ``images``: the dataset's positions to offer, by default the first 100;
    ``explain``: ``(model, image [1, H, W], method, label) -> map [H, W]``; one that also takes ``progress`` is given a
    function to tell the share that is done; ``map_size``: as in :class:`cxrkit.view.viewer.Bundle`;
    ``background=False`` computes where the question is heard. A method that refuses a model leaves a sentence in its
    panel. The trait ``selection`` tells what is shown: image, label, one position in ``bundle["series"]`` per panel,
    and how it is drawn.
    """

    _esm = viewer.script()
    _css = viewer.styles()
    bundle = traitlets.Dict().tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        dataset: Any = None,
        methods: Sequence[str] = ("gradcam", "layercam"),
        *,
        labels: Sequence[str] | None = None,
        images: Sequence[int] | None = None,
        note: str = viewer.NOTE,
        explain: Callable[[nn.Module, Tensor, str, str], Tensor] = explain,
        map_size: int = 224,
        background: bool = True,
        **traits: Any,
    ):
        if not models or not methods:
            raise ParameterError("an Explorer needs at least one model and one method")
        self.models = dict(models)
        self.explain = explain
        self.map_size = map_size
        self._dataset = dataset
        self._answers: dict[str, dict[str, Any]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain") if background else None
        self._waited: dict[str, threading.Event] = {}  # of every map asked for: set when nobody waits any more
        self._tells = "progress" in inspect.signature(explain).parameters
        self._logits: dict[tuple[str, int], dict[str, float]] = {}
        self._raw: dict[tuple[int, int, int], Tensor] = {}  # the maps behind the answers, for files
        labels = labels or getattr(dataset, "labels", None) or getattr(next(iter(models.values())), "labels", ())
        data = viewer.new_bundle(labels, note)
        count = 0 if dataset is None else len(dataset)
        # Each entry gives a sample: from the dataset's row, or an image that was added.
        self._images: list[int | dict[str, Any]] = list(range(min(count, 100)) if images is None else images)
        data["images"] = [{"id": self._name(row)} for row in self._images]
        data["series"] = [{"model": m, "method": k, "signed": None} for m in self.models for k in methods]
        super().__init__(bundle=data, **traits)
        self.on_msg(self._receive)

    def add_image(self, image: Tensor, image_id: str = "own image", **regions: Any) -> int:
        """Offer one more image and show it; returns its position.

        ``image``: ``[1, H, W]`` in [0, 1]; ``regions``: ``masks``, ``truth`` and ``targets`` as in
        :func:`cxrkit.view.viewer.image_record`, which raises ParameterError when they don't fit.
        """
        image = torch.as_tensor(image, dtype=torch.float32)
        own = {"image": image if image.ndim == 3 else image[None], "image_id": image_id, **regions}
        viewer.image_record(own["image"], image_id, self.bundle["labels"], **regions)
        self._images.append(own)
        images = [*self.bundle["images"], {"id": str(image_id)}]
        self.bundle = {**self.bundle, "images": images, "start": {"image": len(images) - 1}}
        return len(images) - 1

    def _name(self, row: int) -> str:
        table = getattr(self._dataset, "table", None)
        return f"image {row}" if table is None else str(table["image_id"].iloc[row])

    def _sample(self, position: int) -> dict[str, Any]:
        entry = self._images[position]
        if isinstance(entry, dict):
            return entry
        sample = self._dataset[entry]
        regions = {"masks": sample.mask, "truth": sample.truth, "targets": sample.target}
        return {"image": sample.image, "image_id": sample.image_id, **regions}

    def _receive(self, _widget: Any, question: Any, _buffers: Any = None) -> None:
        """Take one question of the front end; images and known maps are answered at once, new maps in their turn."""
        question = question if isinstance(question, dict) else {}
        key = question.get("key")
        if question.get("type") == "cancel":
            if key in self._waited:
                self._waited[key].set()
        elif question.get("type") != "map" or self._thread is None:
            self._reply(question)
        else:
            self._waited[key] = threading.Event()
            self._thread.submit(self._reply, question)

    def _reply(self, question: Mapping[str, Any]) -> None:
        """Answer one question; whatever goes wrong becomes a sentence in the panel."""
        key = question.get("key")
        try:
            if key in self._waited and self._waited[key].is_set():
                raise _Stopped
            answer = self.answer(question, self._teller(key))
        except _Stopped:
            answer = {"error": "Stopped."}
        except CxrkitError as error:
            answer = {"error": str(error)}
        except Exception as error:
            # A panel that waits forever says less than any error; the traceback goes to the log.
            logger.exception("the viewer's question %r failed", key)
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._waited.pop(key, None)
        self.send({"key": key, "type": question.get("type") if key else None, **answer})

    def _teller(self, key: str | None) -> Callable[[float], None]:
        """Progress of a method: shown in the panel four times a second; raises _Stopped when nobody waits any more."""
        stopped, told = self._waited.get(key, threading.Event()), [time.monotonic()]

        def tell(share: float) -> None:
            if stopped.is_set():
                raise _Stopped
            if time.monotonic() - told[0] > 0.25:
                told[0] = time.monotonic()
                self.send({"key": key, "type": "progress", "share": float(share)})

        return tell

    def answer(self, question: Mapping[str, Any], tell: Callable[[float], None] | None = None) -> dict[str, Any]:
        """The answer to ``{"type": "image", "image": i}`` or ``{"type": "map", "image", "label", "series"}``.

        An image gives ``record``; a map gives ``record``, ``logit`` and ``probability``; ``tell`` hears how far it
        is. Raises ParameterError for a question that isn't one of these, and whatever the dataset, the model or the
        method raises.
        """
        kind = question.get("type")
        if kind not in ("image", "map"):
            raise ParameterError(f"type={kind!r}: 'image' or 'map' expected")
        sizes = {"image": len(self._images)}
        if kind == "map":
            sizes |= {"label": len(self.bundle["labels"]), "series": len(self.bundle["series"])}
        place = {name: question.get(name) for name in sizes}
        for name, value in place.items():
            if type(value) is not int or not 0 <= value < sizes[name]:
                raise ParameterError(f"{name}={value!r}: a whole number from 0 to {sizes[name] - 1} expected")
        key = f"{kind} {'/'.join(map(str, place.values()))}"
        if key not in self._answers:
            self._answers[key] = self._image(**place) if kind == "image" else self._map(**place, tell=tell)
        return self._answers[key]

    def _image(self, image: int) -> dict[str, Any]:
        sample = self._sample(image)
        own = self.bundle["labels"]
        return {"record": viewer.image_record(**sample, labels=own, map_size=self.map_size)}

    def _map(self, image: int, label: int, series: int, tell: Callable[[float], None] | None) -> dict[str, Any]:
        name, entry = self.bundle["labels"][label], self.bundle["series"][series]
        model = self.models[entry["model"]]
        pixels = self._sample(image)["image"]
        if (entry["model"], image) not in self._logits:
            self._logits[entry["model"], image] = self.logits(entry["model"], pixels)
        logits = self._logits[entry["model"], image]
        if name not in logits:
            raise ParameterError(f"{entry['model']} does not know the label {name!r}; it knows {list(logits)}")
        told = {"progress": tell} if self._tells and tell else {}
        with mode_restored(model):
            values = self.explain(model.eval(), pixels.to(device_of(model, pixels)), entry["method"], name, **told)
        grid = self.answer({"type": "image", "image": image})["record"]["grid"]
        values = torch.as_tensor(values).detach().cpu()
        if values.shape != pixels.shape[-2:]:
            raise ParameterError(f"the map is {tuple(values.shape)}, the image {tuple(pixels.shape[-2:])}")
        self._raw[image, label, series] = values
        logit = logits[name]
        return {
            "record": pack_map(area_resize(values.numpy(), *grid)),
            "logit": logit,
            "probability": torch.tensor(logit).sigmoid().item(),
        }

    def logits(self, name: str, image: Tensor) -> dict[str, float]:
        """The logit of every label that the model ``name`` knows, for one image ``[1, H, W]``."""
        model = self.models[name]
        with mode_restored(model), torch.no_grad():
            values = model.eval()(image[None].to(device_of(model, image)))[0].float().cpu().tolist()
        return dict(zip(getattr(model, "labels", self.bundle["labels"]), values, strict=True))

    def shown(self) -> dict[str, Any]:
        """State of the front end: image [1, H, W], region and truth bool [H, W], raw maps by panel, parameters.

        ``region`` and ``truth`` may be None. The parameters hold all that makes the picture, and per panel model,
        method, ``colours`` and ``full_colour``, the magnitude of the strongest one. Maps that a method refused, or that
        are being computed, are left out. Raises ParameterError before anything is shown.
        """
        if not self.selection:
            raise ParameterError("nothing is shown yet; open the explorer first")
        look = {**_LOOK, **self.selection}
        image, label = look.pop("image"), look.pop("label")
        sample, maps, panels = self._sample(image), {}, []
        told = look.pop("panels") or [{}] * len(look["series"])
        for series, panel in zip(look.pop("series"), told, strict=True):
            entry, values = self.bundle["series"][series], self._raw.get((image, label, series))
            name = f"{entry['model']}: {entry['method']}"
            if values is not None and name not in maps:
                maps[name] = values
                about = {"model": entry["model"], "method": entry["method"]}
                panels.append(about | _colours(values.numpy(), panel, look))
        if not maps:
            raise ParameterError("no map of this image and label has been computed yet")
        region, truth = (None if sample.get(name) is None else sample[name][label] for name in ("masks", "truth"))
        own = {"image": sample["image_id"], "label": self.bundle["labels"][label]}
        told = {"region": region, "truth": truth, "maps": maps, "parameters": {**own, **look, "panels": panels}}
        return {"image": sample["image"], **told}


# What a front end shows that has told no more than its image, label and panels.
_LOOK = {"overlay": 0.75, "threshold": 0.0, "colours": "auto", "scale": "map", "smooth": True}
_LOOK |= {"boxes": True, "true_mask": False, "zoom": 1.0, "left": 0.0, "top": 0.0, "panels": []}


def _colours(values: Any, panel: Mapping[str, Any], look: Mapping[str, Any]) -> dict[str, Any]:
    """A panel's ramp and its magnitude of full colour: those it told, else (not yet drawn) those of its own map."""
    if panel.get("full_colour") is not None:
        return {"colours": panel["colours"], "full_colour": panel["full_colour"]}
    colours = look["colours"]
    if colours == "auto":
        colours = "signed" if values.min() < 0 else "heat"
    return {"colours": colours, "full_colour": full_colour(values, colours == "signed", look["scale"])}
