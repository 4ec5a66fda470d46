"""What the book's chapters on methods compute: one image of the phantom, one network, and small tables about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from scipy.ndimage import gaussian_filter
from torch import Tensor

import cxrkit.attribution
from cxrkit.attribution.baselines import baseline_images
from cxrkit.study.judge import Bench, Scene, settings_of
from cxrkit.study.runs import project_folder

__all__ = [
    "as_markdown",
    "completeness",
    "conservation",
    "empty_maps",
    "gaps",
    "label_similarity",
    "method_table",
    "refusals",
    "sensitivity",
    "settings",
    "support_table",
    "variants",
]


def method_table(family: str | None = None) -> pd.DataFrame:
    """The cards of a family's methods, or of all: meaning, formula, passes, sign, what is needed."""
    rows = [
        {
            "method": card.name,
            "the map shows": card.meaning,
            "formula": f"${card.formula}$",
            "forwards": card.forwards,
            "backwards": card.backwards,
            "signed": "yes" if card.signed else "no",
            "needs": card.needs,
        }
        for card in cxrkit.attribution.methods()
        if family in (None, card.family)
    ]
    return pd.DataFrame(rows).set_index("method")


def as_markdown(frame: pd.DataFrame) -> Markdown:
    """A table that the book shows whole, with its formulas set."""
    frame = frame.reset_index()
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells = (str(value).replace(r"\|", r"\Vert ").replace("|", r"\vert ") for value in row)
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def settings(bench: Bench, scene: Scene, method: str, options: Mapping[str, dict]) -> dict[str, Tensor]:
    """Maps [H, W] of the scene's first image and label by one method, for each named set of options."""
    size = scene.images.shape[-1]
    return {
        title: _maps(
            bench, scene, method, [scene.label], **(settings_of(method, bench.parameters.n_steps, size) | one)
        )[0]
        for title, one in options.items()
    }


def variants(bench: Bench, scene: Scene, method: str, option: str, values: Iterable, **fixed) -> dict[str, Tensor]:
    """Maps [H, W] of the scene's first image and label by one method, for each value of one option."""
    return settings(bench, scene, method, {f"{option} {value}": {option: value, **fixed} for value in values})


def completeness(bench: Bench, scene: Scene, maps: Mapping[str, Tensor]) -> pd.DataFrame:
    """Sum of each map of integrated gradients beside what it should be; titles end with the baseline's name."""
    image = scene.images[:1]
    score = _logits(bench, image, [scene.label])[0, 0]
    rows = []
    for title, values in maps.items():
        start = _logits(bench, baseline_images(image, title.split()[-1]), [scene.label])[0, 0]
        rows.append(
            {"map": title, "sum of the map": float(values.sum()), "logit less baseline's": float(score - start)}
        )
    return pd.DataFrame(rows).set_index("map")


def conservation(bench: Bench, scene: Scene, methods: Sequence[str] = ("lrp", "rap")) -> pd.DataFrame:
    """Sum of each method's map beside the logit less the constant that the network adds last."""
    logit = float(_logits(bench, scene.images[:1], [scene.label])[0, 0]) - float(getattr(bench.model, "logit_bias", 0))
    rows = []
    for method in methods:
        total = float(_maps(bench, scene, method, [scene.label]).double().sum())
        rows.append({"method": method, "sum of the map": total, "logit": logit, "difference": total - logit})
    return pd.DataFrame(rows).set_index("method")


def label_similarity(bench: Bench, scene: Scene, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """How alike the maps of different labels of one image are: mean size of the correlation over all pairs, by method.

    Its size, because relevance of a negative logit is the same map with the sign reversed.
    """
    rows = []
    for method in methods or bench.methods:
        size = scene.images.shape[-1]
        maps = _maps(bench, scene, method, bench.labels, **settings_of(method, bench.parameters.n_steps, size))
        flat = maps.flatten(1).double().numpy()
        flat = flat[flat.std(1) > 0]  # a constant map correlates with nothing
        pairs = np.corrcoef(flat)[np.triu_indices(len(flat), 1)] if len(flat) > 1 else np.array([np.nan])
        rows.append({"method": method, "mean |correlation| between labels": np.abs(pairs).mean(), "labels": len(flat)})
    return pd.DataFrame(rows).set_index("method")


def empty_maps(bench: Bench, methods: Sequence[str]) -> pd.DataFrame:
    """Share of maps without any positive value, over all labels of a few images, by method."""
    from cxrkit.study.judge import scenes

    images = next(scenes(bench)).images
    rows = []
    for method in methods:
        maps = cxrkit.attribute(bench.model, images, method, bench.labels)
        empty = (maps.flatten(2).amax(2) <= 0).float()
        rows.append({"method": method, "maps": empty.numel(), "share without positive value": float(empty.mean())})
    return pd.DataFrame(rows).set_index("method")


def gaps(bench: Bench, scene: Scene, methods: Sequence[str], steps: Sequence[int]) -> pd.DataFrame:
    """What is missing from the sum of a path method's map, as a share of what it should be, by number of steps."""
    image, labels = scene.images[:1], [scene.label]
    score = _logits(bench, image, labels)[0, 0]
    rows = {}
    for method in methods:
        start = _logits(bench, _path_start(method, image), labels)[0, 0]
        sums = [_maps(bench, scene, method, labels, n_steps=count).sum() for count in steps]
        rows[method] = [float((score - start - total).abs() / (score - start).abs()) for total in sums]
    return pd.DataFrame(rows, index=pd.Index(steps, name="steps")).T


def sensitivity(bench: Bench, scene: Scene, methods: Sequence[str], change: float, seed: int = 0) -> pd.DataFrame:
    """How far a map moves when every pixel changes by at most `change`: relative distance, correlation, by method."""
    noise = torch.rand(scene.images[:1].shape, generator=torch.Generator().manual_seed(seed))
    moved = (scene.images[:1] + change * (2 * noise - 1)).clamp(0, 1)
    rows = []
    for method in methods:
        options = settings_of(method, bench.parameters.n_steps, moved.shape[-1])
        before = _maps(bench, scene, method, [scene.label], **options)[0].double()
        after = cxrkit.attribute(bench.model, moved, method, [scene.label], **options)[0, 0].double()
        distance = float((after - before).norm() / before.norm())
        correlation = float(np.corrcoef(before.flatten(), after.flatten())[0, 1])
        rows.append({"method": method, "relative distance": distance, "correlation": correlation})
    return pd.DataFrame(rows).set_index("method")


def _maps(bench: Bench, scene: Scene, method: str, labels: Sequence[str], **options) -> Tensor:
    """Maps [L, H, W] of the scene's first image."""
    return cxrkit.attribute(bench.model, scene.images[:1], method, list(labels), **options)[0].float().cpu()


def _logits(bench: Bench, images: Tensor, labels: Sequence[str]) -> Tensor:
    columns = [list(bench.model.labels).index(label) for label in labels]
    with torch.no_grad():
        return bench.model(images)[:, columns].cpu()


def _path_start(method: str, image: Tensor) -> Tensor:
    if method != "blur_ig":
        return baseline_images(image, "black")
    return torch.from_numpy(gaussian_filter(image[0, 0].numpy(), 50, mode="constant"))[None, None]  # Blur IG's start


def _support() -> pd.DataFrame:
    return pd.read_csv(project_folder() / "book" / "attribution" / "support.csv", keep_default_na=False)


def support_table() -> pd.DataFrame:
    """Networks x methods as the tests found them: a tick where the map is right, a dash where the method refuses."""
    verdicts = _support().pivot_table("verdict", "method", "network", aggfunc="first", sort=False)
    return verdicts.replace({"right": "✓", "refused": "–"})


def refusals() -> pd.DataFrame:
    """The reason of each refusal, shortened to its first clause; networks with the same reason share a row."""
    refused = _support().query("verdict == 'refused'").copy()
    refused["reason"] = (
        refused["reason"].str.split(";").str[0].str.replace(r" \(.*?\)|layer network[\w.]* ?", "", regex=True)
    )
    grouped = refused.groupby(["method", "reason"], sort=False)["network"].agg(", ".join)
    return grouped.reset_index()[["method", "network", "reason"]].set_index("method")
