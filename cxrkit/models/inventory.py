"""The table of networks that the book shows: sizes, costs, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cxrkit.errors import ModelError
from cxrkit.models import sources
from cxrkit.models.classifier import Classifier
from cxrkit.models.networks import NETWORKS
from cxrkit.models.zoo import create

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["table", "weights_table"]


def table(names: Sequence[str] | None = None, labels: int = 14) -> pd.DataFrame:
    """One row per network (all, or those of `names`), indexed by name; nothing is trained, loaded or downloaded.

    Columns: `parameters` in millions, `gflops` of one forward pass of one image at `input_size` (a multiplication and
    an addition count as two; products of matrices and convolutions only, as PyTorch's counter has it), `activations` in
    MiB of float32 per image at `input_size` (what a training step keeps for its backward pass; weights and gradients
    come on top, inference needs far less), `input_size` and `min_size` in pixels per side, `explained_layer` (the CAM
    family's default), `encoding`, `antialias` (what can be replaced), `weights` (names). Networks have that many
    labels. Computed on shapes alone, without numbers, in about 10 s for all. Raises ModelError for an unknown network.
    """
    import pandas as pd

    rows = {name: _row(name, labels) for name in (NETWORKS if names is None else names)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def weights_table() -> pd.DataFrame:
    """Published weights by network and name: origin, address, file, what of its SHA-256 is known, licence.

    An empty address: the file comes with a package of the package index. An empty hash: the publisher tells none, so
    that of the first use is kept and compared (see `sources.locate`). Rows of packages that aren't installed say so
    under `licence`.
    """
    import pandas as pd

    rows = []
    for network, row in NETWORKS.items():
        for name, origin in row.weights.items():
            try:
                found = sources.published(origin)
            except ModelError as error:
                found = sources.Published(origin, Path(), licence=str(error))
            rows.append((network, name, found.origin, found.url, found.path.name, found.sha256, found.licence))
    return pd.DataFrame(rows, columns=["network", "name", "origin", "url", "file", "sha256", "licence"])


def _row(name: str, labels: int) -> dict:
    with torch.device("meta"):
        model = create(name, [f"label {i}" for i in range(labels)]).eval()
    row = NETWORKS[name]
    flops, activations = _costs(model, row.input_size)
    return {
        "parameters": round(model.card["parameters"] / 1e6, 2),
        "gflops": round(flops / 1e9, 2),
        "activations": round(activations / 2**20, 1),
        "input_size": row.input_size,
        "min_size": row.min_size,
        "explained_layer": model.explained_layer,
        "encoding": row.encoding,
        "antialias": ", ".join(part for part, layers in (("stages", row.strided), ("stem", row.stem)) if layers),
        "weights": ", ".join(row.weights),
    }


def _costs(model: Classifier, size: int) -> tuple[int, int]:
    """FLOPs of a forward pass of one image, and the bytes that a training step keeps of it for the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor  # kept alive, so that no storage takes its place
        return tensor

    encoded = model.encode(torch.empty(1, 1, size, size, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval().classify(encoded)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.train().classify(encoded)
    del logits
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
