"""The lab bench of JupyterLab: drop in an image, export what is shown, change a region and see what follows."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from cxrkit.errors import CxrkitError, ParameterError
from cxrkit.view.export import FORMATS, export_figure, export_maps, file_name, show_overlays
from cxrkit.view.widget import Explorer

__all__ = ["FILLS", "change_region", "drop_in", "exports", "looks_inverted", "what_if"]

LARGEST_FILE = 256 * 2**20  # bytes: several times the largest radiograph
_INVERTED = 0.1  # none of fifty public radiographs and a hundred phantoms exceeds it, nearly all their negatives do
_LARGER = (
    "<small>Nothing happens with a file above 10 MB? Then this server takes no larger messages; <code>make lab</code> "
    "does. Or read it in a cell: <code>explorer.add_image(cxrkit.data.image_tensor(&quot;FILE&quot;, {size}), "
    "&quot;NAME&quot;)</code></small>"
)
FILLS = ("black", "mean", "blur", "white")


def drop_in(explorer: Explorer, size: int, most: int = LARGEST_FILE) -> widgets.VBox:
    """A field that takes image files (DICOM, PNG, JPEG) and gives them to the explorer, ``size`` x ``size`` pixels.

    What can't be read is said in a sentence; the rest goes on. Of a DICOM header nothing is shown. ``most``: bytes
    beyond which a file is not looked at. The tick inverts what is dropped next, and the dropped image that is shown.
    """
    files = widgets.FileUpload(accept=".dcm,.png,.jpg,.jpeg,application/dicom", multiple=True, description="Own images")
    negative = widgets.Checkbox(description="air is white: invert", indent=False)
    said, hint = widgets.HTML(), widgets.HTML(_LARGER.format(size=size))
    shown: dict[int, tuple[Tensor, str]] = {}  # by position in the explorer: the image as it came, its file's name

    def show(image: Tensor, name: str) -> None:
        called = f"{name}, inverted" if negative.value else name
        shown[explorer.add_image(1 - image if negative.value else image, called)] = (image, name)

    def take(change: Mapping[str, Any]) -> None:
        if not change["new"]:
            return
        lines = []
        for upload in change["new"]:
            try:
                image = _read(bytes(upload["content"]), size, most)
                show(image, Path(upload["name"]).name)
                lines.append(f"{upload['name']}: shown, {size} x {size} pixels.")
                if looks_inverted(1 - image if negative.value else image):
                    lines[-1] += f" It looks inverted: {'untick' if negative.value else 'tick'} the box."
            except CxrkitError as error:
                lines.append(f"{upload['name']}: {error}")
            except (OSError, ValueError, MemoryError) as error:
                lines.append(f"{upload['name']}: can't be read ({type(error).__name__})")
        said.value = "<br>".join(html.escape(line) for line in lines)
        files.value = ()  # so that the same file can come again

    def turn(_change: Any) -> None:
        if shown:
            image, name = shown.get(explorer.selection.get("image"), shown[max(shown)])
            show(image, name)
            said.value = html.escape(f"{name}: shown {'inverted' if negative.value else 'as it came'}.")

    files.observe(take, "value")
    negative.observe(turn, "value")
    return widgets.VBox([widgets.HBox([files, negative]), said, hint])


def looks_inverted(image: Tensor) -> bool:
    """Whether an image ``[1, H, W]`` in [0, 1] is brighter in its upper corners, where air is, than along the spine."""
    pixels, (height, width) = image[0], image.shape[-2:]
    corner = (slice(0, max(1, height // 8)), max(1, width // 8))
    air = (pixels[corner[0], : corner[1]].mean() + pixels[corner[0], -corner[1] :].mean()) / 2
    spine = pixels[:, 7 * width // 16 : max(9 * width // 16, 7 * width // 16 + 1)].mean()
    return bool(air - spine > _INVERTED)


def _read(content: bytes, size: int, most: int) -> Tensor:
    from cxrkit.data import image_tensor

    if len(content) > most:
        raise ParameterError(f"{len(content) / 2**20:.0f} MB are more than any radiograph has; at most {most >> 20}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        try:
            return image_tensor(path, size)
        except CxrkitError as error:
            # The reader hears of his file, not of where we put it for a moment.
            raise type(error)(str(error).replace(f"{path}: ", "").replace(str(path), "the file")) from None


def exports(
    explorer: Explorer, folder: str | Path = "exports", parameters: Mapping[str, Any] | None = None
) -> widgets.VBox:
    """Buttons that write what the explorer shows into ``folder``: its panels as PNG, SVG or PDF, its raw maps.

    ``parameters`` go into every file beside image, label, models, methods and all that makes the picture. A file's
    name tells image, label and methods; one that is there is never written over.
    """
    said = widgets.HTML()

    def write(kind: str) -> Callable[[Any], None]:
        def act(_button: Any) -> None:
            try:
                shown = explorer.shown()
                told = {**(parameters or {}), **shown["parameters"]}
                path = _free(folder, told, "npz" if kind == "maps" else kind)
                if kind == "maps":
                    written = export_maps(path, shown["image"], shown["maps"], told)
                else:
                    figure = show_overlays(
                        shown["image"],
                        torch.stack(list(shown["maps"].values())),
                        list(shown["maps"]),
                        {**told, "caption": f"{told['image']}: {told['label']}"},
                        shown["region"] if told["boxes"] else None,
                        shown["truth"] if told["true_mask"] else None,
                    )
                    written = export_figure(figure, path, told, kind)
                said.value = html.escape(f"Written: {written}")
            except (CxrkitError, OSError) as error:
                said.value = html.escape(str(error))

        return act

    buttons = [
        widgets.Button(description=f"Save {kind.upper() if kind in FORMATS else kind}") for kind in (*FORMATS, "maps")
    ]
    for button, kind in zip(buttons, (*FORMATS, "maps"), strict=True):
        button.on_click(write(kind))
    return widgets.VBox([widgets.HBox(buttons), said])


def _free(folder: str | Path, told: Mapping[str, Any], suffix: str) -> Path:
    """A path without suffix at which no such file is: image, label, methods, and a number from the second on."""
    methods = "-".join(dict.fromkeys(panel["method"] for panel in told["panels"]))
    path = start = Path(folder, file_name(f"{told['image']}-{told['label']}-{methods}"))
    number = 1
    while path.with_name(f"{path.name}.{suffix}").exists():
        number += 1
        path = start.with_name(f"{start.name}-{number}")
    return path


def change_region(image: Tensor, box: tuple[int, int, int, int], fill: str = "mean") -> Tensor:
    """The image ``[1, H, W]`` with a region filled: x_min, y_min, x_max, y_max in pixels, half-open.

    ``fill``: "black", "white", "mean" (of the region's rim, so that no edge is drawn where there was none) or "blur"
    (what a wide Gaussian leaves). Raises ParameterError for an empty region or another fill.
    """
    x_min, y_min, x_max, y_max = (int(value) for value in box)
    height, width = image.shape[-2:]
    if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
        raise ParameterError(f"box {box} does not fit an image of {width} x {height} pixels")
    if fill not in FILLS:
        raise ParameterError(f"fill {fill!r} is unknown; known: {', '.join(FILLS)}")
    changed = image.clone()
    region = (..., slice(y_min, y_max), slice(x_min, x_max))
    if fill == "mean":
        around = (..., slice(max(0, y_min - 1), y_max + 1), slice(max(0, x_min - 1), x_max + 1))
        rim, inner = image[around], image[region]
        count = rim.numel() - inner.numel()
        changed[region] = (rim.sum() - inner.sum()) / count if count else inner.mean()
    elif fill == "blur":
        from torchvision.transforms.v2.functional import gaussian_blur

        sigma = max(min(x_max - x_min, y_max - y_min) / 2, 1.0)
        changed[region] = gaussian_blur(image, [2 * int(2 * sigma) + 1] * 2, [sigma, sigma])[region]
    else:
        changed[region] = float(fill == "white")
    return changed


def what_if(explorer: Explorer, image: Tensor, image_id: str, **regions: Any) -> widgets.VBox:
    """Controls that erase or paint a region of an image ``[1, H, W]``; the explorer shows the changed image.

    ``regions``: the image's ``masks``, ``truth`` and ``targets`` as in :meth:`Explorer.add_image`; the
    changed image keeps them, so that its maps get the same scores as those before. A table tells every label's
    logit before and after, for each model of the explorer.
    """
    height, width = image.shape[-2:]
    across = widgets.IntRangeSlider(value=(width // 3, width // 2), max=width, description="x, pixels")
    down = widgets.IntRangeSlider(value=(height // 3, height // 2), max=height, description="y, pixels")
    fill = widgets.Dropdown(options=FILLS, value="mean", description="fill with")
    button, said = widgets.Button(description="Change it", button_style="primary"), widgets.HTML()
    tried = []

    def act(_button: Any = None) -> None:
        try:
            box = (across.value[0], down.value[0], across.value[1], down.value[1])
            changed = change_region(image, box, fill.value)
            tried.append(box)
            explorer.add_image(changed, f"{image_id}, change {len(tried)}: {fill.value}", **regions)
            said.value = _logits_table(explorer, image, changed)
        except CxrkitError as error:
            said.value = html.escape(str(error))

    button.on_click(act)
    return widgets.VBox([across, down, widgets.HBox([fill, button]), said])


def _logits_table(explorer: Explorer, before: Tensor, after: Tensor) -> str:
    rows = [
        (name, label, logit, then[label], then[label] - logit)
        for name in explorer.models
        for then in [explorer.logits(name, after)]
        for label, logit in explorer.logits(name, before).items()
    ]
    frame = pd.DataFrame(rows, columns=["model", "label", "logit before", "after", "change"])
    return frame.to_html(index=False, float_format="{:.2f}".format, formatters={"change": "{:+.2f}".format})
