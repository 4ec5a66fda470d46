"""The parameters of an experiment: named, typed, bounded, and checked before anything runs."""

from __future__ import annotations

import ast
import contextlib
import difflib
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from cxrkit.errors import ParameterError, meant

__all__ = [
    "DeviceParameters",
    "Parameters",
    "SearchParameters",
    "TrainParameters",
    "check_dataset_options",
]

# What a notebook's namespace holds besides its parameters.
_NOTEBOOK_NAMES = {"In", "Out"}
# Parameters that go with the data set, and so with a notebook's own only.
OF_DATASET = ("dataset_options", "root")
_LITERALS = (str, int, float, bool, list, tuple, dict, types.NoneType)


class Parameters(BaseModel):
    """Parameters of a notebook. Unknown names are refused; the message lists near misses.

    `placement`: parameters that say where an experiment runs, not what it is; they take no part in a run's key.
    `notebook`: path in the project of a notebook for which the package has no class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), serialize_by_alias=True)
    kind: ClassVar[str]
    notebook: ClassVar[str] = ""
    placement: ClassVar[frozenset[str]] = frozenset({"results", "device", "threads"})

    results: str = Field("results", min_length=1, description="folder that holds the runs")

    def __init__(self, **values: Any):
        fields = {name: field for name, field in self.fields().items() if name in ("dataset", *OF_DATASET)}
        own = {name: field.default_factory or field.default for name, field in fields.items()}
        if values.get("dataset", own.get("dataset")) != own.get("dataset"):
            # Options and folder that are the defaults of a notebook's own data set don't go with another.
            values = {name: type(own[name])() for name in OF_DATASET if isinstance(own.get(name), str | dict)} | values
        refuse_none_as_text(self.kind, values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ParameterError(self._explain(error)) from None

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """The fields by the names under which they are given."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters as a notebook's namespace holds them.

        In a fresh kernel everything public that is plain data must be a parameter, so that a misspelt name given from
        outside stops the notebook in its first cells. In a kernel that has run for a while a reader's own variables
        are let be, unless one looks like a misspelt parameter. Options and folder that an earlier cell set for another
        data set are left out with a warning. Raises ParameterError.
        """
        known, cells = cls.fields(), namespace.get("In", [])  # IPython keeps one entry per executed cell
        values = {name: value for name, value in namespace.items() if name in known}
        for name, value in namespace.items():
            hidden = name.startswith("_") or name in _NOTEBOOK_NAMES or not isinstance(value, _LITERALS)
            if not hidden and (len(cells) <= 4 or difflib.get_close_matches(name, known, 1, 0.85)):
                values[name] = value
        for name, other in _left_over(cells).items():
            if values.pop(name, None):
                text = f"{name} was set for data set {other!r} and is left out for {values.get('dataset')!r}"
                warnings.warn(text, stacklevel=2)
        parameters = cls(**values)
        check_dataset_options(parameters, "this notebook, or what was given to it from outside")
        return parameters

    def identity(self) -> dict[str, Any]:
        """The parameters that decide the result, JSON-able, in a fixed order."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in sorted(values) if name not in self.placement}

    def _explain(self, error: ValidationError) -> str:
        lines = []
        for problem in error.errors():
            name, said = str(next(iter(problem["loc"]), "")), problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown parameter {name!r} for {self.kind}; {meant(name, sorted(self.fields()))}")
            elif not name:  # several parameters together
                lines.append(f"{self.kind}: {said}")
            else:
                lines.append(f"parameter {name!r} for {self.kind}: {said} (got {problem.get('input')!r})")
        return "; ".join(dict.fromkeys(lines))


class DeviceParameters(Parameters):
    """Parameters of a notebook that computes."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="where to compute")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 leaves torch's own choice")


def refuse_none_as_text(kind: str, values: Mapping[str, Any]) -> None:
    """Raise ParameterError where a value, also one within a mapping, is the word None, which YAML doesn't know."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_none_as_text(f"{name} of {kind}", value)
    if names := [name for name, value in values.items() if isinstance(value, str) and value == "None"]:
        raise ParameterError(f"parameters {names} for {kind}: None is text in YAML; write null")


def _left_over(cells: Sequence[str]) -> dict[str, str]:
    """Which of `OF_DATASET` the executed cells set before they named another data set, and for which one that was."""
    dataset, owner = None, {}
    for cell in cells:
        assigned = {}
        with contextlib.suppress(SyntaxError, ValueError):  # magics are no Python
            for node in ast.parse(cell).body:
                target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name):
                    assigned[target.id] = node.value
        if isinstance(named := assigned.get("dataset"), ast.Constant):
            dataset = named.value
        owner |= {name: dataset for name in OF_DATASET if name in assigned}
    return {name: other for name, other in owner.items() if other not in (None, dataset)}


def check_dataset_options(parameters: Parameters, origin: str | Mapping[str, str]) -> None:
    """Refuse `dataset_options` that the data set named beside them lacks: ParameterError, which says their `origin`.

    `origin`: where parameters come from, all of them or by name; what isn't listed comes from the preset or default.
    """
    from cxrkit.data.sources import SOURCES, check_options

    if isinstance(parameters, SearchParameters):
        parameters = parameters.trial({})
    name, options = getattr(parameters, "dataset", None), getattr(parameters, "dataset_options", {})
    if name in SOURCES:
        known = (*SOURCES[name].options(), "preprocessing", "seed", "cache_bits")
        try:
            check_options(name, known, options)
        except ParameterError as error:
            of = dict.fromkeys(("dataset_options", "dataset"), origin) if isinstance(origin, str) else origin
            told = [f"{name} from {of.get(name, 'the preset or default')}" for name in ("dataset_options", "dataset")]
            raise ParameterError(f"{error}. Origin: {', '.join(told)}") from None


class TrainParameters(DeviceParameters):
    """Parameters of `train.ipynb`: data, network, and how it learns. `preset` gives those of the papers."""

    kind: ClassVar[str] = "train"
    placement: ClassVar[frozenset[str]] = Parameters.placement | {"workers", "checkpoint_seconds"}

    dataset: str = Field("phantom", min_length=1, description="a source name of cxrkit.data")
    root: str | None = Field(None, description="folder of a downloaded source; none for the phantom")
    dataset_options: dict[str, Any] = Field(default_factory=dict, description="options of the source")
    healthy_class: str = Field("", description="name of an added class: images without any finding; empty: none")
    size: int = Field(64, ge=32, le=2048, description="side of the square input, pixels")
    cache: str = Field(
        "none",
        min_length=1,
        description="images drawn once for all runs, at 8 bits: none, auto, or a folder",
    )
    model: str = Field("bcos_resnet18", min_length=1, description="a network name of cxrkit.models")
    antialias: Literal["none", "flc", "flc_authors", "blur"] = "none"
    antialias_stem: bool = Field(False, description="the first layers too, which the papers left aliased")
    auxiliary: bool = Field(False, description="train with the auxiliary head, where the network has one")
    protocol: Literal["corrected", "paper", "authors"] = "corrected"
    weights: str | None = Field(None, description="'imagenet', a file, or none for a random start")
    copy_weights: bool = Field(False, description="copy weights into the convolutions that anti-aliasing replaces")
    augment: Literal["none", "light", "heavy"] = "none"
    oversample: bool = False
    fold: int = Field(0, ge=0, le=4)
    seed: int = Field(0, ge=0, le=2**31 - 1)
    epochs: int = Field(2, ge=1, le=10_000)
    batch_size: int = Field(16, ge=1, le=65_536, description="images per step, over all processes and parts")
    accumulate: int = Field(1, ge=1, le=4096, description="parts in which a step's images are computed (memory)")
    loss: Literal["bce", "cross_entropy"] = "bce"
    class_weights: Literal["none", "balanced"] = "none"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, lt=1, description="L2 in the gradient (adam, sgd) or decoupled (adamw)")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    schedule: Literal["plateau", "constant", "step", "cosine", "inverse_time"] = "plateau"
    patience: int = Field(3, ge=0, description="epochs without a lower loss before the rate falls (plateau)")
    schedule_factor: float = Field(0.1, gt=0, lt=1, description="of each fall (plateau, step)")
    schedule_epochs: int = Field(5, ge=1, description="epochs between two falls (step)")
    schedule_decay: float = Field(0.0, ge=0, lt=1, description="d of rate / (1 + d t) after t steps (inverse_time)")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the rate rises from 0")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient; 0: any")
    selection: Literal["auto", "validation", "test"] = Field(
        "auto", description="split that chooses the epoch and the rate; auto: test with protocol 'authors'"
    )
    criterion: Literal["auc", "f1", "accuracy", "loss"] = Field("auc", description="by which the epoch is chosen")
    stop_patience: int = Field(0, ge=0, description="epochs without a better criterion before training ends; 0: never")
    workers: int = Field(0, ge=0, le=256, description="processes that load images, kept in memory where they fit")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compiled: bool = Field(False, description="torch.compile: a slow first step, then faster ones")
    checkpoint_seconds: float = Field(60.0, ge=0, description="between two checkpoints; 0: after every step")

    def identity(self) -> dict[str, Any]:
        """As of all parameters; of the cache counts that it rounds, not where it lies."""
        return super().identity() | {"cache": "none" if self.cache == "none" else "8 bits"}

    @property
    def shifted_on(self) -> str:
        """The `reference` of the augmentation: "original" as in the papers' code for B-cos networks, else not."""
        theirs = self.protocol == "authors" and self.model.startswith("bcos_")
        return "original" if theirs else "after_resize"

    @property
    def selected_on(self) -> str:
        """The split that chooses: "validation", or "test" as the code of paper `bcos` did."""
        if self.selection != "auto":
            return self.selection
        return "test" if self.protocol == "authors" else "validation"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainParameters:
        """The parameters of a paper's experiment, such as "bcos/rsna/bcos_resnet50", with `changes` on top.

        `train.presets.table()` lists them with their sources. Raises ParameterError for an unknown name.
        """
        from cxrkit.train import presets

        return cls(**presets.values(name, protocol=changes.get("protocol", "corrected")) | changes)


class SearchParameters(DeviceParameters):
    """Parameters of `search.ipynb`: which training parameters are tried, and how many times (paper `bcos`, 1.7)."""

    kind: ClassVar[str] = "search"
    placement: ClassVar[frozenset[str]] = Parameters.placement | {"workers"}

    training: dict[str, Any] = Field(default_factory=dict, description="fixed training parameters, by name")
    space: dict[str, list[Any]] = Field(
        default_factory=lambda: {
            "learning_rate": [1e-7, 1e-6, 1e-5, 1e-4],
            "weight_decay": [0.0, 1e-6, 1e-5, 1e-4, 1e-3],
            "patience": [3, 5, 10],
        },
        min_length=1,
        description="training parameter: the values to try",
    )
    folds: list[int] = Field([0], min_length=1, description="folds whose scores are averaged")
    evaluations: int = Field(10, ge=1, le=10_000, description="settings that are tried in all")
    min_epochs: int = Field(1, ge=1, description="epochs of the cheapest trial")
    max_epochs: int = Field(30, ge=2, description="epochs of the dearest trial")
    eta: int = Field(3, ge=2, le=10, description="one in so many settings goes on to so many times the epochs")
    criterion: Literal["auc", "f1", "accuracy", "loss"] = "f1"
    seed: int = Field(0, ge=0, le=2**31 - 1)
    workers: int = Field(0, ge=0, le=256, description="processes that load images; 0 keeps the images in memory")

    @model_validator(mode="after")
    def _trainable(self) -> SearchParameters:
        own = {"epochs", "fold", "criterion", *DeviceParameters.model_fields, "workers"}
        if wrong := own & (set(self.training) | set(self.space)):
            raise ValueError(f"{sorted(wrong)} can't stand in training or space: the search sets them itself")
        if self.max_epochs <= self.min_epochs:
            raise ValueError(f"max_epochs {self.max_epochs} must exceed min_epochs {self.min_epochs}")
        for name, choices in self.space.items():
            if not choices:
                raise ValueError(f"space names no value for {name!r}")
            for choice in choices:
                self.trial({name: choice})
        for fold in self.folds:
            self.trial({}, fold=fold)
        return self

    def trial(self, choices: dict[str, Any], epochs: int = 1, fold: int = 0) -> TrainParameters:
        """The training parameters of one trial. Raises ParameterError for names or values that don't fit."""
        shared = {"criterion": self.criterion, "results": self.results, "device": self.device}
        own = {"epochs": epochs, "fold": fold, "workers": self.workers, "threads": self.threads}
        return TrainParameters(**self.training | choices | shared | own)
