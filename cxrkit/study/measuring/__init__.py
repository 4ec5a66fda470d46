"""From a trained network and images to the scores that a paper's pages show: what the notebooks `*_scores` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cxrkit import grid
from cxrkit.study.notebook import NotebookParameters, parameters_for

__all__ = ["parameters_of"]


def parameters_of(paper: str, namespace: Mapping[str, Any]) -> NotebookParameters:
    """The parameters of `PAPER_scores.ipynb` as its namespace holds them; an empty run stands for the first network of
    the paper's grid. Raises ParameterError, also for a name that is none of them."""
    check = parameters_for(f"notebooks/{paper}_scores.ipynb")
    parameters = check.from_notebook(namespace)
    if parameters.run:
        return parameters
    first = grid.load(paper).trained[0]
    return check(**parameters.values | {"run": first.key})
