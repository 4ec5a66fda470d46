"""Networks x methods: each cell is right, as an independent oracle tells, or refused.

The book shows the table (`book/attribution/support.csv`). `python tests/test_method_support.py` writes it afresh, in
minutes; a test looks at two methods of each network.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, architecture
from fuzz.maps import NormsByFormula
from scipy import ndimage
from test_attribution_xrai import slow as slow_xrai
from torch import Tensor

import cxrkit
from cxrkit import AttributionError
from cxrkit.attribution.preparation import explanation_mode
from cxrkit.attribution.target import logit_bias
from cxrkit.models import Classifier, calibrate, create

FILE = Path(__file__).resolve().parents[1] / "book" / "attribution" / "support.csv"
LABELS = ("one", "two", "three")
OWN = {  # networks of the kit: side of the image
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
NETWORKS = (*OWN, *ARCHITECTURES)
METHODS = tuple(card.name for card in cxrkit.attribution.methods())
RIGHT, REFUSED = "right", "refused"
# Too slow for a test; the table was made with them.
LARGE = ("vgg16", "inception_resnet_v2", "vit_c_b", "bcos_vit_c_b", "bcos_convnext_tiny", "convnext_tiny")
LARGE += ("resnet50_v2", "densenet121", "efficientnet_b0")
LARGE += (
    "resnet50_v2",
    "densenet121",
    "efficientnet_b0",
    "timm DLA",
    "timm NFNet",
    "timm CSPNet",
    "timm HRNet",
    "torchxrayvision ResNet",
)
LARGE += ("torchvision VGG-11 with batch norm", "torchvision Swin", "torchvision ResNeXt", "xception", "inception_v3")
STEPS = 4
CHOSEN = [2, 0]  # labels three and one


def image_of(name: str, count: int = 1, seed: int = 3) -> Tensor:
    """Smooth images [count, C, size, size] in double precision: rounding at the kinks of ReLUs decides nothing."""
    size, channels = (OWN[name], 1) if name in OWN else ARCHITECTURES[name][:2]
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear").double()


def network(name: str) -> torch.nn.Module:
    built = create(name, LABELS, seed=1).eval() if name in OWN else architecture(name)
    return calibrate(built.double(), image_of(name, 8, seed=0))


def options_of(method: str, model, image: Tensor) -> dict:
    size = image.shape[-1]
    if method == "occlusion":  # one square over everything: the fall of the logit, everywhere
        return {"window": size, "stride": size}
    if method == "guided_ig":  # on the straight path, where it is a left Riemann sum
        return {"n_steps": STEPS, "max_distance": 0, "baseline": start_of(image)}
    if method == "xrai":
        return {"n_steps": STEPS, "segments": squares(size)}
    if method == "scorecam" and not isinstance(attempted(model, image, "gradcam"), str):  # a layer with few channels
        return {"layer": next(n for n, m in model.named_modules() if type(m).__name__.lower().endswith("conv2d"))}
    steps = {"n_steps": STEPS}
    known = {"smoothgrad": {"n_samples": 2, "noise": 0.0}, "integrated_gradients": steps, "blur_ig": steps}
    if isinstance(model, Classifier):  # as paper `relevance`: inputs have both signs
        known["lrp"] = {"first_layer": "zb"}
    return known.get(method, {})


def attempted(model, image: Tensor, method: str, **options) -> cxrkit.Attribution | str:
    """Maps of two labels, or why the method refuses the network."""
    try:
        return cxrkit.attribution.explain(model, image, method, CHOSEN, **options)
    except AttributionError as error:
        return " ".join(str(error).split())


def start_of(image: Tensor) -> Tensor:
    """A baseline without the ties of an even one, between which rounding decides in max pooling."""
    return image.flip(2) / 4


def squares(size: int) -> Tensor:
    """Label map of 16 squares, of 4 where they would be too small; [1, size, size]."""
    count = 4 if size > 30 else 2
    line = torch.arange(size) * count // size
    return (count * line[:, None] + line)[None]


# Oracles: maps [2, H, W] of labels three and one, written with torch alone.


def logits(model, images: Tensor) -> Tensor:
    with NormsByFormula():
        return model.classify(model.encode(images)) if isinstance(model, Classifier) else model(images)


def gradients(model, images: Tensor) -> Tensor:
    """Gradients of both logits, summed over channels where they are shown: [2, B, C, H, W]."""
    images = images.clone().requires_grad_()
    scores = logits(model, images)[:, CHOSEN].sum(0)
    return torch.stack([torch.autograd.grad(score, images, retain_graph=True)[0] for score in scores])


def layer_by_hand(model, image: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The last map [C, h, w] of the layer and the gradients of both logits, [2, C, h, w], by a hook."""
    kept = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, given, y: kept.append(y) or y.clone())
    scores = logits(model, image.clone().requires_grad_())[0, CHOSEN]
    hook.remove()
    found = [torch.autograd.grad(score, kept[-1], retain_graph=True)[0][0] for score in scores]
    return kept[-1][0].detach(), torch.stack(found)


def enlarged(maps: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(maps[None], size=image.shape[-2:], mode="bilinear", align_corners=False)[0]


def grad_cams(model, image: Tensor, method: str, layer: str) -> Tensor:
    a, g = layer_by_hand(model, image, layer)
    up = g.relu()
    if method == "normgrad":
        return enlarged((a * g).square().sum(1).sqrt(), image)
    weights = {
        "gradcam": lambda: g.mean((2, 3), keepdim=True),
        "layercam": lambda: up,
        "gradcam_plus_plus": lambda: (g.relu() / (2 + g.relu() * a.sum((1, 2), keepdim=True))).sum(
            (2, 3), keepdim=True
        ),
    }[method]()
    return enlarged((weights * a).sum(1).relu(), image)


def score_cam(model, image: Tensor, layer: str) -> Tensor:
    with torch.no_grad():
        kept = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, given, y: kept.append(y.clone()))
        logits(model, image)
        hook.remove()
        masks = []
        for channel in kept[0][0]:
            mask = enlarged(channel[None], image)
            spread = mask.max() - mask.min()
            masks.append((mask - mask.min()) / spread if channel.max() > channel.min() else torch.zeros_like(mask))
        scores = torch.cat([logits(model, image * part) for part in torch.stack(masks).split(16)])[:, CHOSEN].T
        weights = scores.softmax(1)
        return enlarged(torch.einsum("lk,khw->lhw", weights, kept[0][0]).relu(), image)


def guided(model, image: Tensor) -> Tensor:
    """Guided backpropagation by hooks on the nodes of the graph: what reaches the output of a ReLU is rectified."""
    image = image.clone().requires_grad_()
    scores = logits(model, image)[0, CHOSEN]
    waiting, seen = [scores.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ in ("ReluBackward0", "HardtanhBackward0"):
            node.register_prehook(lambda given: tuple(g.clamp(min=0) for g in given))
        waiting += [parent for parent, _ in node.next_functions]
    return torch.stack([torch.autograd.grad(s, image, retain_graph=True)[0][0].sum(0) for s in scores])


def dynamic_linear(model, image: Tensor) -> Tensor:
    """Share of each pixel in the logits of a B-cos network, whose scales are taken for constants."""
    with explanation_mode(model, True):
        encoded = model.encode(image).detach().requires_grad_()
        scores = model.classify(encoded)[0, CHOSEN]
        weights = [torch.autograd.grad(score, encoded, retain_graph=True)[0][0] for score in scores]
    return (torch.stack(weights) * encoded[0].detach()).sum(1)


def integrated(model, image: Tensor, start: Tensor) -> Tensor:
    """Gauss-Legendre on the straight path from `start`, per channel: [2, C, H, W]."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(STEPS))
    points = start + ((nodes + 1) / 2).view(-1, 1, 1, 1) * (image - start)
    return (gradients(model, points) * (weights / 2).view(-1, 1, 1, 1)).sum(1) * (image - start)[0]


def blurred(image: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), [0, 0, sigma, sigma], mode="constant"))


def blur_ig(model, image: Tensor) -> Tensor:
    total, width = 0, 50 / STEPS
    for step in range(STEPS):
        sharp, softer = blurred(image, step * width), blurred(image, step * width + 0.01)
        total = total - gradients(model, sharp)[:, 0] * (softer - sharp)[0] / 0.01 * width
    return total.sum(1)


def by_hand(model, image: Tensor, method: str, layer: str | None) -> Tensor | None:
    """The maps of a method by a second implementation; None for methods that are known by their sums."""
    black = torch.zeros_like(image)
    if method in ("saliency", "smoothgrad"):
        return gradients(model, image)[:, 0].sum(1)
    if method == "input_x_gradient":
        return (gradients(model, image)[:, 0] * image[0]).sum(1)
    if method == "guided_backprop":
        return guided(model, image)
    if method in ("gradcam", "layercam", "gradcam_plus_plus", "normgrad"):
        return grad_cams(model, image, method, layer)
    if method == "guided_gradcam":
        return guided(model, image) * grad_cams(model, image, "gradcam", layer)
    if method == "scorecam":
        return score_cam(model, image, layer)
    if method == "cam":
        return class_maps(model, image, layer)
    if method == "bcos":
        return dynamic_linear(model, image)
    if method == "integrated_gradients":
        return integrated(model, image, black).sum(1)
    if method == "guided_ig":
        way = image - start_of(image)
        points = torch.cat([start_of(image) + way * step / STEPS for step in range(STEPS)])
        return (gradients(model, points).mean(1) * way[0]).sum(1)
    if method == "blur_ig":
        return blur_ig(model, image)
    if method == "xrai":
        ends = (torch.full_like(image, float(image.amin())), torch.full_like(image, float(image.amax())))
        density = torch.stack([integrated(model, image, end) for end in ends]).mean(0).amax(1)
        segments = squares(image.shape[-1])[0]
        masks = torch.stack([segments == k for k in segments.unique()]).numpy()
        return torch.stack([torch.from_numpy(slow_xrai(d.numpy(), masks, "full")) for d in density])
    if method == "occlusion":
        with torch.no_grad():
            fall = (logits(model, image) - logits(model, black))[0, CHOSEN]
        return fall[:, None, None].expand(-1, *image.shape[-2:])
    return None


def class_maps(model, image: Tensor, layer: str) -> Tensor:
    """Maps whose mean is the logit but for the bias: the layer's own, or its maps (or their positive part) times the
    weights of the last layer; nan where none of them is.
    """
    a, _ = layer_by_hand(model, image, layer)
    with torch.no_grad():
        score, constant = logits(model, image)[0, CHOSEN], torch.as_tensor(logit_bias(model)).expand(3)[CHOSEN]
        weight, bias = (t.detach() for t in head_of(model))
    tried = [(a[CHOSEN], constant)] if len(a) == len(LABELS) else []
    if weight.shape[1] == len(a):
        tried += [(torch.einsum("lk,khw->lhw", weight[CHOSEN], maps), bias[CHOSEN]) for maps in (a, a.relu())]
    for maps, rest in tried:
        if torch.allclose(maps.mean((1, 2)) + rest, score, rtol=1e-6, atol=1e-6 * float(maps.abs().max())):
            return enlarged(maps, image)
    return torch.full((2, 1, 1), torch.nan)


def head_of(model) -> tuple[Tensor, Tensor]:
    """Weights [3, K] and bias [3] of the last layer with three outputs."""
    heads = [m for m in model.modules() if 3 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    head = next(m for m in reversed(heads) if isinstance(getattr(m, "weight", None), Tensor))
    return head.weight.flatten(1), head.weight.new_zeros(3) if head.bias is None else head.bias


def keeps_its_promise(model, image: Tensor, method: str, maps: Tensor, layer: str | None) -> bool:
    """Whether the maps [2, H, W] of labels three and one are those of the oracle, or sum to what they must."""
    expected = by_hand(model, image, method, layer)
    if expected is not None:
        return bool((maps - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-12)
    with torch.no_grad():
        score, black = (logits(model, x)[0, CHOSEN] for x in (image, torch.zeros_like(image)))
    sums, size = maps.sum((1, 2)), maps.abs().sum((1, 2))
    promised = score - black if method == "deeplift" else score
    return bool(((sums - promised).abs() <= 2e-3 * size.maximum(promised.abs())).all())


def cell(model, image: Tensor, method: str) -> tuple[str, str]:
    """Verdict and reason for one method."""
    found = attempted(model, image, method, **options_of(method, model, image))
    if isinstance(found, str):
        return REFUSED, found
    kept = keeps_its_promise(model, image, method, found.maps[0], found.options.get("layer"))
    return (RIGHT if kept else "wrong"), ""


def row(name: str, model, methods: tuple[str, ...] = METHODS) -> dict[str, tuple[str, str]]:
    """Verdict and reason for every method, or for those named."""
    return {method: cell(model, image_of(name), method) for method in methods}


def table() -> dict[str, dict[str, tuple[str, str]]]:
    with FILE.open(newline="", encoding="utf-8") as file:
        found: dict[str, dict[str, tuple[str, str]]] = {}
        for r in csv.DictReader(file):
            found.setdefault(r["network"], {})[r["method"]] = r["verdict"], r["reason"]
    return found


def test_no_cell_is_empty_or_wrong_and_every_refusal_has_its_cause():
    shown = table()
    assert list(shown) == list(NETWORKS)
    for cells in shown.values():
        assert tuple(cells) == METHODS
        assert all(verdict == RIGHT or (verdict == REFUSED and reason) for verdict, reason in cells.values())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in LARGE])
def test_two_cells_of_every_network_are_as_the_book_says(name):
    shown = {method: verdict for method, (verdict, _) in table()[name].items()}
    model, first = network(name), -2 * NETWORKS.index(name)
    some = tuple(METHODS[(first + i) % len(METHODS)] for i in range(2))
    assert {method: verdict for method, (verdict, _) in row(name, model, some).items()} == {m: shown[m] for m in some}
    listed = {card.name for card in cxrkit.attribution.methods(model)}
    # What is listed as fit from the layers alone may still be refused when it runs, but nothing right is left out.
    assert {method for method, verdict in shown.items() if verdict == RIGHT} <= listed


def write(names: list[str]) -> None:
    """Make the rows of the networks named, or of all, and put them into the table."""
    made = {}
    for i, name in enumerate(names or NETWORKS):
        start = time.monotonic()
        made[name] = row(name, network(name))
        verdicts = [verdict for verdict, _ in made[name].values()]
        counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts))
        wrong = [method for method, (verdict, _) in made[name].items() if verdict == "wrong"]
        shown = f"{i + 1}/{len(names or NETWORKS)} {name}: {counts} {wrong or ''} {time.monotonic() - start:.0f} s"
        print(shown, flush=True)
    rows = (table() if names else {}) | made
    with FILE.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["network", "method", "verdict", "reason"])
        out.writerows((name, method, *rows[name][method]) for name in NETWORKS for method in METHODS)


if __name__ == "__main__":
    write(sys.argv[1:])
