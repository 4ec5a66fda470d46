"""The phantom benchmark: the evidence a network used is known, because every image can be drawn again without it.

Three worlds hold the same patients: "none" (findings only), "marker" (every image carries a lead letter) and
"dark_borders" (every image has blank bands). The effect of a finding or a shortcut is how much the logit falls when the
same image is drawn without it. A method shows a region by the share of its map's positive mass inside; a map that is
the same everywhere scores the region's share of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cxrkit.attribution
import cxrkit.data
import cxrkit.metrics
from cxrkit.errors import ParameterError
from cxrkit.study import runs
from cxrkit.study.explanation import Subject, network_of
from cxrkit.study.parameters import JudgeParameters
from cxrkit.study.study import Study
from cxrkit.train.loader import target_table

__all__ = [
    "SHORTCUTS",
    "WORLDS",
    "Scene",
    "bench",
    "case",
    "effects",
    "maps_of",
    "panel",
    "scenes",
    "score",
    "settings_of",
    "side_by_side",
    "verdicts",
]

WORLDS = ("none", "marker", "dark_borders")
_EVERY = {
    "marker": {"marker": {"rate": 1.0, "rate_without": 1.0}},
    "dark_borders": {"dark_borders": {"share": 1.0, "share_without": 1.0}},
    "none": {},
}
SHORTCUTS = {"marker", "dark_borders"}
_SLOW = {"scorecam"}  # as many forward passes as the layer has channels
_CHUNK = 16


@dataclass
class Scene:
    """Positives of one label in one world, [B, ...]: as they are, without the finding, and without the shortcut."""

    world: str
    label: str
    images: Tensor
    without: dict[str, Tensor]  # region: the same images drawn without it
    regions: dict[str, Tensor]  # region: bool [B, H, W]
    image_ids: list[str]
    patient_ids: list[str]


def bench(parameters: JudgeParameters, load: Callable[[str], Study] | None = None) -> Subject:
    """Load the run that `parameters` name; an empty name stands for one of the study `load("benchmark")`.

    Raises ParameterError for a run on another data set, an unknown method or label, and for a seed whose images the
    network was trained on.
    """
    run = runs.find(parameters.run, parameters.results) if parameters.run else _of_study(parameters, load)
    options = run.parameters.dataset_options
    if run.parameters.dataset != "phantom":
        raise ParameterError(f"run {run.key} saw {run.parameters.dataset}; only the phantom knows what is true")
    if options.get("seed", 0) == parameters.seed:
        raise ParameterError(
            f"seed {parameters.seed} draws the patients that run {run.key} was trained on; take another"
        )
    model, methods, labels = network_of(run, parameters, list(parameters.shortcuts.values()))
    if not parameters.labels:
        labels = [label for label in labels if options.get("prevalence", {}).get(label, 1) > 0]
    return Subject(run, parameters.model_copy(update={"run": run.key}), model, methods, labels)


def _of_study(parameters: JudgeParameters, load: Callable[[str], Study] | None) -> runs.Run:
    """The first network with the largest images: without planted shortcuts, and a B-cos network only where methods
    ask for one.
    """
    bcos = any(cxrkit.attribution.card(name).family == "inherent" for name in parameters.methods)
    if load is None:
        raise ParameterError("run is empty; give the key or the folder of a training run on the phantom")
    trained = [run for run in load("benchmark").trained if run.parameters.dataset == "phantom"]
    fit = [run for run in trained if run.parameters.model.startswith("bcos_") == bcos]
    clean = [run for run in fit if not SHORTCUTS & set(run.parameters.dataset_options)]
    return max(clean or fit or trained, key=lambda run: run.parameters.size)


def scenes(bench: Subject) -> Iterator[Scene]:
    """Every label in the world without shortcut; in the others the label that the shortcut goes with."""
    for label in bench.labels:
        yield _scene(bench, "none", label)
    for world, label in bench.parameters.shortcuts.items():
        yield _scene(bench, world, label)


def _scene(bench: Subject, world: str, label: str) -> Scene:
    data = _drawn(bench, world)
    column = data.labels.index(label)
    positive = np.flatnonzero(target_table(data)[:, column].numpy() > 0.5)
    rows = positive[: bench.parameters.images].tolist()
    if not rows:
        raise ParameterError(f"no image of the phantom shows {label!r}; raise its prevalence in run {bench.run.key}")
    batch = data.batch(rows)
    regions = {"finding": batch.truth[:, column]}
    without = {"finding": _drawn(bench, world, conspicuity=0.0).batch(rows).images}
    if world != "none":
        regions["shortcut"] = batch.shortcut & ~regions["finding"]
        without["shortcut"] = _drawn(bench, "none").batch(rows).images
    return Scene(world, label, batch.images, without, regions, list(batch.image_ids), list(batch.patient_ids))


def _drawn(bench: Subject, world: str, **changes) -> cxrkit.data.Dataset:
    trained = bench.run.parameters
    shared = {k: v for k, v in trained.dataset_options.items() if k not in (*SHORTCUTS, "crop", "images")}
    many = 40 * bench.parameters.images  # only those that are looked at are drawn
    options = {**shared, "seed": bench.parameters.seed, "images": many, **_EVERY[world], **changes}
    return cxrkit.data.load("phantom", size=trained.size, **options)


def score(bench: Subject) -> pd.DataFrame:
    """A row per image, method and region: world, label, share of the map's positive mass, chance, effect, logit.

    `share` is nan for a map without positive mass; `effect` is by how much the logit falls without the region.
    """
    parts = []
    for scene in scenes(bench):
        logits, falls = _falls(bench, scene)
        for method in bench.methods:
            few = slice(bench.parameters.slow_images if method in _SLOW else len(scene.images))
            maps = maps_of(bench, method, scene.images[few], scene.label)
            for region, mask in scene.regions.items():
                columns = {
                    "world": scene.world,
                    "label": scene.label,
                    "image_id": scene.image_ids[few],
                    "patient_id": scene.patient_ids[few],
                    "region": region,
                    "logit": logits[few],
                    "effect": falls[region][few],
                    "method": method,
                    "share": cxrkit.metrics.energy_pointing_game(maps, mask[few], kind="precision").numpy(),
                    "chance": cxrkit.metrics.chance_level(mask[few]).numpy(),
                }
                parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _falls(bench: Subject, scene: Scene) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B] of a scene's images, and by region how much they fall without it."""
    logits = _logits(bench, scene.images, scene.label)
    return logits, {name: logits - _logits(bench, images, scene.label) for name, images in scene.without.items()}


def _logits(bench: Subject, images: Tensor, label: str) -> np.ndarray:
    column = list(bench.model.labels).index(label)
    return torch.cat([bench.logits(part)[:, column] for part in images.split(_CHUNK)]).numpy()


def maps_of(bench: Subject, method: str, images: Tensor, label: str) -> Tensor:
    """Maps [B, H, W] of one label, at the settings of the benchmark."""
    options = settings_of(method, bench.parameters.n_steps, images.shape[-1])
    return bench.maps(images, method, [label], **options)[:, 0]


def settings_of(method: str, n_steps: int, size: int) -> dict:
    """Options of a method at the size of the benchmark."""
    if "n_steps" in (names := cxrkit.attribution.card(method).options):
        return {"n_steps": n_steps}
    if "n_samples" in names:
        return {"n_samples": n_steps}
    if method == "occlusion":
        return {"window": max(size // 5, 2), "stride": max(size // 10, 1)}
    return {}


def effects(scores: pd.DataFrame, by: Sequence[str] = ("world", "label", "region")) -> pd.DataFrame:
    """Mean fall of the logit without a region, with its 95 % interval, for each group of `by`."""
    first = scores[scores["method"] == scores.groupby(list(by))["method"].transform("first")]
    rows = []
    for names, part in first.groupby(list(by), sort=False):
        mean, low, high = cxrkit.metrics.bootstrap(part["effect"], part["patient_id"])
        rows.append([*names, mean, low, high, len(part)])
    return pd.DataFrame(rows, columns=[*by, "effect", "low", "high", "images"])


def verdicts(scores: pd.DataFrame, by: Sequence[str] = ("world", "region", "method")) -> pd.DataFrame:
    """Mean share of positive mass with its 95 % interval beside chance, and the mean effect, for each group of `by`.

    `times_chance` is share / chance. Degenerate maps are counted, not averaged.
    """
    columns = [*by, "share", "low", "high", "chance", "times_chance", "effect", "maps", "degenerate"]
    if scores.empty:
        return pd.DataFrame(columns=columns)
    gathered = cxrkit.metrics.Accumulator()
    found = cxrkit.metrics.LocalisationScores(*({"share": scores[name].to_numpy()} for name in ("share", "chance")))
    gathered.add(found, scores["patient_id"].to_numpy(), **{name: scores[name] for name in by})
    table = gathered.table().rename(columns={"mean": "share"}).set_index(list(by))
    # Chance and effect are those of all images, also where a map has no positive mass.
    table[["chance", "effect"]] = scores.groupby(list(by), sort=False)[["chance", "effect"]].mean()
    table["times_chance"], table["maps"] = table["share"] / table["chance"], table["n"] + table["degenerate"]
    return table.reset_index()[columns]


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `verdicts` with a row per method and a column per network and world: share [interval] in percent."""

    def cell(row) -> str:
        if np.isnan(row["share"]):
            return "no map"
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:.1%}, {row['high']:.1%}]"  # of one patient: none
        return f"{row['share']:.1%}{interval}"

    columns = {}
    for (network, world), part in table.groupby(["network", "world"], sort=False):
        place = network if world == "none" else f"{network}; {world.replace('_', ' ')}"
        title = f"{place} (chance {part['chance'].iloc[0]:.1%}, effect {part['effect'].iloc[0]:.1f})"
        columns[title] = part.set_index("method").apply(cell, axis=1)
    return pd.DataFrame(columns).reindex(table["method"].unique()).fillna("–")


def case(bench: Subject, world: str = "none", label: str | None = None) -> Scene:
    """One image of a world: of the label's positives the one that leans most on its shortcut, or on its finding."""
    label = label or bench.parameters.shortcuts.get(world, bench.labels[0])
    scene = _scene(bench, world, label)
    falls = _falls(bench, scene)[1]["finding" if world == "none" else "shortcut"]
    row = slice(int(falls.argmax()), int(falls.argmax()) + 1)
    return replace(
        scene,
        images=scene.images[row],
        without={name: images[row] for name, images in scene.without.items()},
        regions={name: mask[row] for name, mask in scene.regions.items()},
        image_ids=scene.image_ids[row],
        patient_ids=scene.patient_ids[row],
    )


def panel(bench: Subject, scene: Scene, maps: Mapping[str, Tensor] | None = None) -> dict:
    """The first image of a scene with maps {title: [H, W]} (None: by each method), ready for `figures.show_maps`."""
    if maps is None:
        maps = {name: maps_of(bench, name, scene.images[:1], scene.label)[0] for name in bench.methods}
    region = "shortcut" if "shortcut" in scene.regions else "finding"
    logits, falls = _falls(bench, scene)
    return {
        "image": scene.images[0, 0],
        "maps": torch.stack(list(maps.values())),
        "titles": list(maps),
        "mask": scene.regions[region][0],
        "truth": scene.regions["finding"][0],
        "caption": f"{scene.label}: logit {logits[0]:.1f}, {falls[region][0]:.1f} of it gone without the {region}",
    }
