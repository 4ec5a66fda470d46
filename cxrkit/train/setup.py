"""What a training starts from: the data set and the network that its parameters name."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

import cxrkit.data
import cxrkit.models
from cxrkit.data import Dataset
from cxrkit.data.dataset import Rendered
from cxrkit.errors import ParameterError
from cxrkit.project import in_project
from cxrkit.train.parameters import TrainParameters

__all__ = ["load_data", "make_model", "with_healthy_class"]


def load_data(parameters: TrainParameters) -> Dataset:
    """The data set that the parameters name, every image, with its fold's split column.

    With a `cache` its images are read from there; where it is missing it is made first, by all cores, for every run.
    """
    cache = parameters.cache
    data = cxrkit.data.load(
        parameters.dataset,
        root=in_project(parameters.root) if parameters.root else None,
        size=parameters.size,
        fold=parameters.fold,
        cache={"none": None, "auto": "auto"}.get(cache, in_project(cache)),
        **parameters.dataset_options,
    )
    return with_healthy_class(data, parameters.healthy_class) if parameters.healthy_class else data


def make_model(parameters: TrainParameters, labels: tuple[str, ...]) -> nn.Module:
    """The untrained network that the parameters name, with one logit per label."""
    options = {name: True for name in ("antialias_stem", "auxiliary") if getattr(parameters, name)}
    return cxrkit.models.create(
        parameters.model,
        labels=labels,
        weights=str(local) if (local := in_project(parameters.weights or ".")).is_file() else parameters.weights,
        antialias=parameters.antialias,
        protocol=parameters.protocol,
        seed=parameters.seed,
        copy_weights=parameters.copy_weights,
        **options,
    )


def with_healthy_class(data: Dataset, name: str) -> Dataset:
    """The same images with one label more, last: 1 where no finding is, 0 where one is, NaN where neither is sure.

    It makes two exclusive classes of a set with one label (paper `bcos`, RSNA: two logits and a softmax). Raises
    ParameterError when the name is taken.
    """
    if name in data.table.columns:
        raise ParameterError(f"healthy_class {name!r} is already a label or column of {data.name}")
    findings = data.table[list(data.labels)]
    healthy = (findings == 0).all(axis=1).astype(float).mask(findings.isna().any(axis=1) & ~(findings > 0).any(axis=1))
    more = copy.copy(data)
    more.labels, more.table = (*data.labels, name), data.table.assign(**{name: healthy})
    more.renderer = _OneTruthMore(data.renderer)
    more._index()
    return more


class _OneTruthMore:
    """Another renderer's drawings; the added label has no region."""

    def __init__(self, renderer):
        self.renderer = renderer

    def render(self, row: int, size: int) -> Rendered:
        drawn = self.renderer.render(row, size)
        if drawn.truth is None:
            return drawn
        return replace(drawn, truth=torch.cat([drawn.truth, torch.zeros_like(drawn.truth[:1])]))
