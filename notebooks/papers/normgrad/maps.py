"""The maps of paper `normgrad`, as kept by our runs: side by side, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from cxrkit.errors import ParameterError
from cxrkit.metrics import gaussian_smoothing, rank_correlation
from cxrkit.study import report
from cxrkit.study.study import Study
from papers.normgrad.tables import SHORT, cells, frames, network_of, pairs, set_of

__all__ = ["agreement", "central", "panel", "similarity"]

FEW = (
    "InputXGrad",
    "GuidedGradCAM",
    "GradCAM",
    "NormGrad Conv3x3 single",
    "NormGrad Conv3x3 multi",
)


def similarity(study: Study, of: str) -> pd.DataFrame:
    """Rank correlation of the trained network's map with that of the same network fully random (FR) and before training
    (SR): mean with its 95 % interval, by state and method. 1: the map shows nothing that was learnt.
    """
    found = frames(study, "similarity")
    found = cells(found[found["set"] == of], ["state", "method"], "correlation")
    return found.rename(columns={"mean": "correlation"}).assign(method=found["method"].map(SHORT))


def agreement(study: Study, of: str) -> pd.DataFrame:
    """How alike the kept maps of trained networks are: mean rank correlation between seeds of a network, and between
    networks, by method. The paper shows it in its Figures 4 and 6 and gives no number.
    """
    kept = [(network_of(t), t.parameters.seed, report.kept_of(s)) for t, s in pairs(study) if set_of(t) == of]
    rows = []
    for place, (network, seed, one) in enumerate(kept):
        for other_network, other_seed, other in kept[place + 1 :]:
            kind = "seeds" if network == other_network else "networks" if seed == other_seed else ""
            if kind and np.array_equal(one["image_ids"], other["image_ids"]):
                rows += _alike(kind, one, other)
    if not rows:
        return pd.DataFrame(columns=["method", "between seeds", "between networks"])
    wide = pd.DataFrame(rows).pivot_table(values="correlation", index="method", columns="kind", sort=False)
    wide = wide.reindex(columns=["seeds", "networks"]).add_prefix("between ").reset_index()
    return wide.assign(method=wide["method"].map(SHORT)).rename_axis(None, axis=1)


def _alike(kind: str, one: dict, other: dict) -> list[dict]:
    rows = []
    for method in (name for name in one["methods"].tolist() if name in other["methods"]):
        found = rank_correlation(
            torch.from_numpy(_kept(one, method)),
            torch.from_numpy(_kept(other, method)),
        )
        rows.append({"kind": kind, "method": method, "correlation": float(found.nanmean())})
    return rows


def _kept(kept: dict, method: str, state: str = "trained") -> np.ndarray:
    """[n, H, W] of a kept file."""
    return kept["maps"][kept["states"].tolist().index(state), kept["methods"].tolist().index(method)]


def central(study: Study) -> pd.DataFrame:
    """How often a kept map of a trained network has its maximum in the central ninth of the image, by set and method: a
    column per network, all seeds. By chance: one in nine.
    """
    rows = []
    for trained, scored in pairs(study):
        kept = report.kept_of(scored)
        for method in kept["methods"].tolist():
            maps = _kept(kept, method)
            side = maps.shape[-1]
            place = np.stack(
                np.unravel_index(
                    np.nan_to_num(maps).reshape(len(maps), -1).argmax(1),
                    maps.shape[-2:],
                )
            )
            middle = ((place >= side // 3) & (place < side - side // 3)).all(0)
            shares = {
                "set": set_of(trained),
                "method": SHORT[method],
                "network": trained.parameters.model,
            }
            rows.append(shares | {"middle": float(middle.mean())})
    table = pd.DataFrame(rows).pivot_table(values="middle", index=["set", "method"], columns="network", sort=False)
    return table.reset_index().rename_axis(None, axis=1)


def panel(study: Study, of: str, rows: str, methods: Sequence[str] = FEW, image: int = 0) -> dict:
    """One image by several methods, ready for `figures.show_labels`: a row per "state", "seed" or "network", or the
    trained network's maps raw and smoothed ("smoothing"). Raises ParameterError for other rows.
    """
    lines = [(title, kept, maps[:, image]) for title, kept, maps in _lines(study, of, rows, methods)]
    return {
        "images": np.stack([kept["images"][image] for _, kept, _ in lines]),
        "maps": np.nan_to_num(np.stack([maps for *_, maps in lines])),
        "rows": [title for title, *_ in lines],
        "columns": [SHORT[method] for method in methods],
        "masks": np.stack([kept["boxes"][image] for _, kept, _ in lines]),
        "signed": False,
        "scale": "map",
    }


def _lines(study: Study, of: str, rows: str, methods: Sequence[str]) -> list[tuple[str, dict, np.ndarray]]:
    """Title, kept file and maps [M, n, H, W] of every row."""
    kept = [(trained, report.kept_of(scored)) for trained, scored in pairs(study) if set_of(trained) == of]
    first, file = kept[0]

    def of_state(file: dict, state: str = "trained") -> np.ndarray:
        return np.stack([_kept(file, method, state) for method in methods])

    if rows == "state":
        return [(state, file, of_state(file, state)) for state in ("FR", "SR", "trained") if state in file["states"]]
    if rows == "smoothing":
        smooth = gaussian_smoothing(torch.from_numpy(of_state(file))).numpy()
        return [("raw", file, of_state(file)), ("smoothed", file, smooth)]
    if rows == "seed":
        same = [(t, k) for t, k in kept if network_of(t) == network_of(first)]
        return [(f"seed {t.parameters.seed}", k, of_state(k)) for t, k in same]
    if rows == "network":
        same = [(t, k) for t, k in kept if t.parameters.seed == first.parameters.seed]
        return [(t.parameters.model, k, of_state(k)) for t, k in same]
    raise ParameterError(f"rows={rows!r} is unknown; use state, smoothing, seed or network")
