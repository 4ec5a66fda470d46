"""The claims of paper `covid` as differences of our runs, with verdicts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from cxrkit.metrics import bootstrap
from cxrkit.study import published
from cxrkit.study.claims import Claim, Measured
from cxrkit.study.claims import measured as from_patients
from cxrkit.study.claims import table as claim_table
from cxrkit.study.study import Study
from papers.covid.tables import HARD, SOFT, difference, measured, predictions, rate

__all__ = ["claims"]


def claims(study: Study) -> pd.DataFrame:
    """The paper's claims beside ours, in points (percent): verdicts on single sentences of its text."""
    printed = published.table("covid/tab2_micro_metrics").set_index("model")["micro_f1_mean"]
    synthetic, tables = study.synthetic, predictions(study)
    dense = next(
        (network for network in ("densenet161", "densenet121") if network in tables),
        "densenet161",
    )
    singles = [network for network in tables if network not in (SOFT, HARD)]
    best = max(singles, key=lambda network: rate(tables[network], "F1").mean)

    def votes(a: str, b: str, measure: str = "F1") -> Measured | None:
        return difference(tables[a], tables[b], measure) if {a, b} <= set(tables) else None

    def claim(
        text: str,
        gap: float,
        ours: Measured | None,
        told: str = "",
        why: str = _ABSENT,
    ) -> Claim:
        return Claim(text, gap, ours, told, "" if ours else why, synthetic)

    def gap(a: str, b: str) -> float:
        return 100 * (printed[a] - printed[b])

    found = [
        claim(
            "DenseNet beats ResNet18 in micro F1",
            gap("DenseNet161", "ResNet18"),
            votes(dense, "resnet18"),
        ),
        claim(
            "ResNet18 beats ResNet34 in micro F1",
            gap("ResNet18", "ResNet34"),
            votes("resnet18", "resnet34"),
        ),
        claim(
            "The ensemble beats the best network",
            gap("Ensemble", "DenseNet161"),
            votes(SOFT, best),
        ),
        claim(
            "InceptionResNetV2 has a higher specificity than ResNet18",
            1,
            votes("inception_resnet_v2", "resnet18", "specificity"),
            "0.975, the highest",
        ),
    ]
    found.append(_both(tables, claim))
    return claim_table([*found, *_map_claims(study, dense, claim)])


_ABSENT = "the grid lacks one of the networks"
_TEXT = "in words"


def _both(
    tables: dict[str, pd.DataFrame],
    claim: Callable[..., Claim],
    pair=("COVID-19", "ARDS"),
) -> Claim:
    """Of the images that have both labels, the share of networks and votes that found both, less one half."""
    text = f"{' and '.join(pair)} are found together where an image has both: share beyond one half"
    keys, parts = ["image_id", "patient_id", "fold", "seed"], []
    for table in tables.values():
        wide = table.pivot_table(index=keys, columns="label", values=["target", "found"], aggfunc="first")
        if set(pair) <= set(wide["target"]):
            have = (wide["target"][list(pair)] > 0.5).all(axis=1)
            parts.append(wide["found"][list(pair)].astype(bool).all(axis=1)[have])
    if not parts or not len(parts[0]):
        return claim(text, 1, None, "all", "no test image has both")
    by_image = pd.concat(parts).astype(float).groupby(["image_id", "patient_id"]).mean()
    return claim(text, 1, _mean(by_image - 0.5), "all")


def _map_claims(study: Study, dense: str, claim: Callable[..., Claim]) -> list[Claim]:
    methods, nested, bands = (measured(study, frame) for frame in ("methods", "nested", "bands"))
    inner = methods["label"].iloc[0]
    of_inner = methods[methods["label"] == inner]
    wide = of_inner.pivot_table(
        index=["image_id", "patient_id", "network"],
        columns="method",
        values="share",
    )
    others = wide.drop(columns=["occlusion"], errors="ignore").mean(axis=1)
    occlusion = wide["occlusion"] - others if "occlusion" in wide else pd.Series(dtype=float)
    pair = nested[(nested["inner"] == inner)].drop_duplicates(["image_id", "network", "inner"])
    moved = (bands["with_bands"] - bands["without_bands"]).abs()
    bands = bands.assign(moved=moved.astype(float))[bands["label"] == inner]
    drawn_again = "only the phantom can be drawn again without bands"
    dead_maps = _dead_difference(study, dense)
    return [
        claim(
            "DenseNet has more dead maps in the middle than ResNet18",
            50.8,
            dead_maps,
            "99.22 against 48.44",
        ),
        claim(
            "Occlusion finds the place better than the other methods (mean)",
            1,
            _mean(occlusion),
            _TEXT,
            "no regions",
        ),
        claim(
            "Occlusion on ResNet18 finds the place better than on DenseNet",
            1,
            _paired(
                of_inner[of_inner["method"] == "occlusion"],
                "share",
                "resnet18",
                dense,
            ),
            _TEXT,
        ),
        claim(
            f"ResNet18 looks alike for {inner} and the label above, DenseNet elsewhere",
            1,
            _paired(pair, "correlation", "resnet18", dense),
            _TEXT,
        ),
        claim(
            "Dark bands move DenseNet more than ResNet18",
            1,
            _paired(bands, "moved", dense, "resnet18") if len(bands) else None,
            _TEXT,
            drawn_again if not len(bands) else _ABSENT,
        ),
        claim(
            "Profiles of groups differ at the border, where the bands are",
            1,
            _at_border(study),
            _TEXT,
            "no profiles",
        ),
    ]


def _mean(values: pd.Series) -> Measured | None:
    values = values.dropna()
    return from_patients(values, values.index.get_level_values("patient_id")) if len(values) else None


def _paired(table: pd.DataFrame, column: str, a: str, b: str) -> Measured | None:
    """Mean of a less b over the images that both have; None where one network is missing."""
    wide = table.pivot_table(index=["image_id", "patient_id"], columns="network", values=column)
    return _mean(wide[a] - wide[b]) if {a, b} <= set(wide) else None


def _at_border(study: Study) -> Measured | None:
    """Strength of the profiles at the border beyond that everywhere; the strongest feature maps are the sample."""
    beyond = measured(study, "profiles")["border"].astype(float).to_numpy() - 1
    return from_patients(beyond, np.arange(len(beyond))) if np.isfinite(beyond).any() else None


def _dead_difference(study: Study, dense: str) -> Measured | None:
    """Share of dead maps of the two middle layers; the interval takes the feature maps as the sample."""
    table = measured(study, "inactive").query("middle").set_index("network")
    if not {dense, "resnet18"} <= set(table.index):
        return None
    a, b = (
        bootstrap(np.arange(row.maps) < row.constant, np.arange(row.maps))
        for row in (table.loc[network] for network in (dense, "resnet18"))
    )
    low = a.mean - b.mean - np.hypot(a.mean - a.low, b.high - b.mean)
    high = a.mean - b.mean + np.hypot(a.high - a.mean, b.mean - b.low)
    return Measured(
        a.mean - b.mean,
        low,
        high,
        int(table["maps"].loc[[dense, "resnet18"]].min()),
    )
