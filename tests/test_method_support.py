"""Networks x methods: each cell is right, as far as the method promises something that can be checked, or refused.

The book shows the table (`book/attribution/support.csv`). `python tests/test_method_support.py` writes it afresh.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch

import cxrkit
from cxrkit import AttributionError
from cxrkit.models import calibrate, create

FILE = Path(__file__).resolve().parents[1] / "book" / "attribution" / "support.csv"
LABELS = ("one", "two", "three")
NETWORKS = {  # name: side of the image
    "resnet18": 64,
    "resnet50_v2": 72,
    "vgg16": 64,
    "densenet121": 64,
    "inception_v3": 96,
    "inception_resnet_v2": 107,
    "xception": 64,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "convnext_tiny": 64,
    "vit_c_b": 32,
    "bcos_resnet18": 64,
    "bcos_densenet121": 64,
    "bcos_convnext_tiny": 64,
    "bcos_vit_c_b": 64,
}
FEWER = {
    "smoothgrad": {"n_samples": 2, "noise": 0.0},
    "integrated_gradients": {"n_steps": 24},
    "guided_ig": {"n_steps": 4},
    "blur_ig": {"n_steps": 4},
    "xrai": {"n_steps": 2},
    "lrp": {"first_layer": "zb"},  # as paper `relevance`: inputs have both signs
}
RIGHT, REFUSED = "right", "refused"
LARGE = ("inception_resnet_v2", "vit_c_b")  # a test looks at one method of each family; the table was made with all
ONE_OF_EACH = (
    "input_x_gradient",
    "guided_backprop",
    "deeplift",
    "cam",
    "gradcam",
    "occlusion",
    "lrp",
    "normgrad",
    "bcos",
)


def pictures(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth pictures [count, 1, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def network(name: str) -> cxrkit.models.Classifier:
    return calibrate(create(name, LABELS, seed=1).eval(), pictures(8, NETWORKS[name], seed=0))


def logits(model, images):
    with torch.no_grad():
        return model.classify(model.encode(images))


def explained(model, image, method):
    options = dict(FEWER.get(method, {}))
    if method == "occlusion":  # one square over everything: the fall of the logit, everywhere
        options = {"window": image.shape[-1], "stride": image.shape[-1]}
    if method == "scorecam":  # a layer with few channels
        options = {
            "layer": next(name for name, m in model.named_modules() if type(m).__name__.lower().endswith("conv2d"))
        }
    return cxrkit.attribute(model, image, method, ["three", "one"], **options)[0]


def keeps_its_promise(model, image, method, maps) -> bool:
    """Whether the maps [2, H, W] of labels three and one are what the method says they are."""
    score, black = (logits(model, x)[0, [2, 0]] for x in (image, torch.zeros_like(image)))
    sums, size = maps.double().sum((1, 2)), maps.double().abs().sum((1, 2))
    if method in ("saliency", "smoothgrad"):  # in double precision: a step so small that no ReLU switches
        exact, direction, step = copy.deepcopy(model).double(), (image - image.mean()).double(), 1e-8
        change = (logits(exact, image + step * direction) - logits(exact, image - step * direction))[0, [2, 0]]
        told = (maps * direction[0]).sum((1, 2))
        return torch.allclose(told, change / (2 * step), rtol=0.01, atol=0.01 * float(told.abs().max()))
    if method == "input_x_gradient":
        return torch.allclose(maps, image[0] * cxrkit.attribute(model, image, "saliency", ["three", "one"])[0])
    if method == "occlusion":
        return torch.allclose(maps, (score - black)[:, None, None].expand_as(maps), atol=1e-5)
    if method == "deeplift":
        return bool(((sums - (score - black)).abs() <= 1e-3 * size).all())
    if method == "integrated_gradients":
        return bool(((sums - (score - black)).abs() <= 0.05 * size).all())
    if method in ("lrp", "rap"):
        return bool(((sums - score).abs() <= 1e-3 * size.maximum(score.abs())).all())
    signed = cxrkit.attribution.card(method).signed
    # The positive part of a class activation may be empty: that is an answer too.
    return bool(maps.isfinite().all()) and (bool(maps.any()) if signed else float(maps.min()) >= 0)


def row(name: str, methods: tuple[str, ...] | None = None) -> dict[str, tuple[str, str]]:
    """Verdict and reason for every method, or for those named."""
    model, image = network(name), pictures(1, NETWORKS[name], seed=3)
    cells = {}
    for card in cxrkit.attribution.methods():
        if methods and card.name not in methods:
            continue
        try:
            maps = explained(model, image, card.name)
        except AttributionError as error:
            cells[card.name] = (REFUSED, " ".join(str(error).split()))
        else:
            kept = keeps_its_promise(model, image, card.name, maps)
            cells[card.name] = (RIGHT if kept else "wrong", "")
    return cells


def table() -> dict[str, dict[str, str]]:
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: {r["method"]: r["verdict"] for r in rows if r["network"] == name} for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_cell_is_right_or_refused_as_the_book_says(name):
    cells = row(name, ONE_OF_EACH if name in LARGE else None)
    shown = table()[name]
    assert {method: verdict for method, (verdict, _) in cells.items()} == {method: shown[method] for method in cells}
    assert set(shown) == {card.name for card in cxrkit.attribution.methods()}
    assert all(verdict in (RIGHT, REFUSED) for verdict, _ in cells.values())
    listed = {card.name for card in cxrkit.attribution.methods(create(name, LABELS))}
    # What is listed as fit from the layers alone may still be refused when it runs, but nothing right is left out.
    assert {method for method, (verdict, _) in cells.items() if verdict == RIGHT} <= listed


def write() -> None:
    rows = [(name, method, *cell) for name in NETWORKS for method, cell in row(name).items()]
    with FILE.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["network", "method", "verdict", "reason"])
        out.writerows(rows)


if __name__ == "__main__":
    write()
