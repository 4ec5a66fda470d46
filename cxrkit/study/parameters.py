"""The parameters of the notebooks that explain a trained network, and of the phantom benchmark."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from cxrkit.train.parameters import DeviceParameters, SearchParameters, TrainParameters

__all__ = ["ExplainParameters", "JudgeParameters", "SearchParameters", "TrainParameters"]


class ExplainParameters(DeviceParameters):
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


class JudgeParameters(DeviceParameters):
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
