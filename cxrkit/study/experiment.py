"""The parameters of an experiment: named, typed, bounded, and checked before anything runs."""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cxrkit.errors import ParameterError

__all__ = ["ExplainParameters", "JudgeParameters", "Parameters", "TrainParameters", "parameters_for"]

# What a notebook's namespace holds besides its parameters.
_NOTEBOOK_NAMES = {"In", "Out"}
_LITERALS = (str, int, float, bool, list, tuple, dict, types.NoneType)


class Parameters(BaseModel):
    """What both kinds of experiment share. Unknown names are refused; the message lists near misses.

    `results` (where runs are kept) and `device` say where an experiment runs, not what it is: they take no part in a
    run's key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    kind: ClassVar[str]
    placement: ClassVar[frozenset[str]] = frozenset({"results", "device", "threads"})

    results: str = Field("results", min_length=1, description="folder that holds the runs")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="where to compute")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 leaves torch's own choice")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ParameterError(_explain(error, type(self))) from None

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Parameters:
        """The parameters as a notebook's namespace holds them.

        In a fresh kernel everything public that is plain data must be a parameter, so that a misspelt name given from
        outside stops the notebook in its first cells. In a kernel that has run for a while a reader's own variables
        are let be, unless one looks like a misspelt parameter. Raises ParameterError.
        """
        fresh = len(namespace.get("In", [])) <= 4  # IPython keeps one entry per executed cell
        values = {}
        for name, value in namespace.items():
            if name in cls.model_fields:
                values[name] = value  # whatever it is: pydantic judges it
                continue
            hidden = name.startswith("_") or name in _NOTEBOOK_NAMES or not isinstance(value, _LITERALS)
            if not hidden and (fresh or difflib.get_close_matches(name, cls.model_fields, 1, 0.85)):
                values[name] = value
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The parameters that decide the result, JSON-able, in a fixed order."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in sorted(values) if name not in self.placement}


class TrainParameters(Parameters):
    """Parameters of `train.ipynb` (paper `bcos`, section 1.7 of its training protocol, scaled by the reader)."""

    kind: ClassVar[str] = "train"

    dataset: str = Field("phantom", min_length=1, description="a source name of cxrkit.data")
    root: str | None = Field(None, description="folder of a downloaded source; none for the phantom")
    dataset_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")
    size: int = Field(64, ge=32, le=2048, description="side of the square input, pixels")
    model: str = Field("bcos_resnet18", min_length=1, description="a network name of cxrkit.models")
    antialias: Literal["none", "flc", "flc_authors", "blur"] = "none"
    protocol: Literal["corrected", "paper", "authors"] = "corrected"
    weights: str | None = Field(None, description="'imagenet', a file, or none for a random start")
    copy_weights: bool = Field(False, description="copy weights into the convolutions that anti-aliasing replaces")
    augment: Literal["none", "light", "heavy"] = "none"
    oversample: bool = False
    fold: int = Field(0, ge=0, le=4)
    seed: int = Field(0, ge=0, le=2**31 - 1)
    epochs: int = Field(2, ge=1, le=10_000)
    batch_size: int = Field(16, ge=1, le=65_536)
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, lt=1)
    patience: int = Field(3, ge=0, description="epochs without a lower validation loss before the rate falls tenfold")
    workers: int = Field(0, ge=0, le=256, description="processes that load images; 0 keeps the images in memory")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"

    placement: ClassVar[frozenset[str]] = Parameters.placement | {"workers"}


class ExplainParameters(Parameters):
    """Parameters of `explain.ipynb`: which run, which methods, which labels and thresholds (paper `bcos`, Eqs. 1-3)."""

    kind: ClassVar[str] = "explain"

    run: str = Field("", description="key or folder of a training run; empty: the first B-cos run of the study")
    methods: list[str] = Field(default_factory=list, description="method names; empty: all that can be right")
    labels: list[str] = Field(default_factory=list, description="labels to explain; empty: all")
    thresholds: list[float] = Field([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1)
    images: int = Field(0, ge=0, description="boxed test images to score, spread over the split; 0: all")
    maps: int = Field(8, ge=1, le=1000, description="images whose maps are kept")
    n_steps: int = Field(16, ge=2, le=1000, description="steps of the path methods")
    seed: int = Field(0, ge=0, le=2**31 - 1)

    @field_validator("thresholds")
    @classmethod
    def _thresholds_in_range(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value <= 1 for value in values) or len(set(values)) != len(values):
            raise ValueError("must be distinct shares of the map's maximum, between 0 and 1")
        return values


class JudgeParameters(Parameters):
    """Parameters of `judge.ipynb`: which network, and how it is judged on the phantom, where what is true is known."""

    kind: ClassVar[str] = "judge"

    run: str = Field("", description="key or folder of a training run on the phantom")
    methods: list[str] = Field(default_factory=list, description="method names; empty: all that can be right")
    labels: list[str] = Field(default_factory=list, description="labels to judge; empty: all that were drawn")
    shortcuts: dict[Literal["marker", "dark_borders"], str] = Field(
        default_factory=dict, description="planted shortcut: the label it goes with"
    )
    images: int = Field(8, ge=1, le=1000, description="positives per label and world")
    slow_images: int = Field(2, ge=1, le=1000, description="positives per label and world for Score-CAM")
    n_steps: int = Field(8, ge=2, le=1000, description="steps of path methods, samples of SmoothGrad")
    seed: int = Field(1, ge=0, le=2**31 - 1, description="seed of the judged patients; not that of the training images")


def parameters_for(notebook: str | Path) -> type[Parameters]:
    """The parameter class that belongs to a notebook, by its file name. Raises ParameterError for one that has none."""
    classes = {cls.kind: cls for cls in (TrainParameters, ExplainParameters, JudgeParameters)}
    stem = Path(notebook).stem
    if stem not in classes:
        raise ParameterError(
            f"notebook {stem!r} has no known parameters; those that run in a grid: {', '.join(classes)}"
        )
    return classes[stem]


def _explain(error: ValidationError, cls: type[Parameters]) -> str:
    known = sorted(cls.model_fields)
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            lines.append(f"unknown parameter {name!r} for {cls.kind}; {hint}")
        else:
            lines.append(f"parameter {name!r} for {cls.kind}: {problem['msg']} (got {problem.get('input')!r})")
    return "; ".join(lines)
