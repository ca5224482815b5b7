"""The parts of a config, and the names that it knows.

Contract: needs neither torch nor files, so the names of rules, models, solvers and data sets and the settings of rules stand
here once more. Whoever adds one is told by a test what is missing here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dnw._checks import did_you_mean

RuleName = Literal[
    "dnw",
    "no_update",
    "targeted_dropout",
    "magnitude_pruning",
    "l1_anneal",
    "random",
    "complete",
    "frozen",
    "iht",
    "set",
    "rigl",
    "sparse_momentum",
    "sr_ste",
    "norm_ste",
    "st3",
    "feather",
    "top_kast",
]
RULE_SETTINGS: dict[str, tuple[str, ...]] = {
    "targeted_dropout": ("rate",),
    "l1_anneal": ("penalty",),
    "set": ("every", "fraction", "until", "by_sign"),
    "rigl": ("every", "fraction", "until"),
    "sparse_momentum": ("every", "fraction", "until"),
    "sr_ste": ("decay",),
    "norm_ste": ("rate",),
    "st3": ("rescale",),
    "feather": ("power", "dormant_gradient"),
    "top_kast": ("backward", "penalty"),
}
"""What can be set of each rule; the others have no settings."""
SHARES_OF_THE_RUN = ("until",)
"""Settings that a config gives as a share of the run, and a rule as a number of steps."""
FIXED_RULES = ("random", "complete", "frozen")
"""Rules that never change their edges."""
WITHOUT_DORMANT_GRADIENT = (*FIXED_RULES, "no_update", "magnitude_pruning", "l1_anneal", "set")
"""Rules that never need the gradient of dormant edges."""
EdgesName = Literal["ticket", "random_original", "expander", "watts_strogatz", "barabasi_albert"]
RANDWIRE = ("watts_strogatz", "barabasi_albert")
"""Edges that the generators of randomly wired networks draw."""
ModelName = Literal[
    "tiny_digits",
    "tiny_mnist",
    "lenet_300_100",
    "tiny_cifar10",
    "tiny_cifar10_discrete",
    "tiny_cifar10_continuous",
    "mobilenet_v1_graphs",
    "mobilenet_v1_graphs_small",
    "mobilenet_v1",
    "mobilenet_v2",
    "shufflenet_v1",
    "shufflenet_v2",
    "mnasnet_small",
    "xception_small",
    "densenet_small",
    "resnet18_cifar",
    "resnet50",
]
STATIC_GRAPHS = ("tiny_digits", "tiny_mnist", "tiny_cifar10", "mobilenet_v1_graphs")
"""Models all of whose edges are those of static graphs."""
WITH_WIDTH = (
    "mobilenet_v1",
    "mobilenet_v2",
    "shufflenet_v1",
    "shufflenet_v2",
    "xception_small",
    "densenet_small",
    "resnet18_cifar",
)
"""Models of which a width multiplies the channels."""
SolverName = Literal["euler", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
DataName = Literal["digits", "mnist", "cifar10", "folder"]
MOST_EPOCHS = 100_000
_MOST_STEPS = 10**9
"""Between two changes of the wiring: longer than any run."""


class Settings(BaseModel):
    """Settings that are frozen and always valid, copies with changes too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The same with some settings changed.

        Raises:
            ValueError: a value that is not allowed. (Pydantic's own method checks nothing.)
        """
        return validated(type(self), {**dict(self), **(update or {})}, type(self).__name__)


_Valid = TypeVar("_Valid", bound=BaseModel)


def validated(kind: type[_Valid], values: Any, source: str) -> _Valid:
    """Settings of a kind.

    Args:
        kind: what they must be.
        values: by name.
        source: where they came from, for messages; empty where who gave them knows.

    Raises:
        ValueError: not valid; every problem is named.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "config"
            given = "" if isinstance(problem["input"], (dict, BaseModel)) else f" (given: {short(problem['input'])})"
            unknown = problem["type"] == "extra_forbidden"
            hint = did_you_mean(key.rsplit(".", 1)[-1], _names(kind)) if unknown else ""
            problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{given}{hint}")
        raise ValueError((f"{source}: " if source else "") + "; ".join(problems)) from None


def _names(kind: type[BaseModel]) -> Iterator[str]:
    """The names of all settings of a kind, those in parts of it as well."""
    for name, field in kind.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation)


def short(value: Any) -> str:
    """A value as a message shows it: in one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."


class DataConfig(Settings):
    """Which images, and what is done to them."""

    name: DataName = Field(description="data set")
    image_size: int = Field(gt=0, le=4096, description="side in pixels of the square images that the network gets")
    mean: tuple[Annotated[float, Field(ge=-10, le=10)], ...] = Field(description="per channel, in units of the full range")
    std: tuple[Annotated[float, Field(ge=1e-3, le=10)], ...] = Field(description="per channel, in units of the full range")
    crop_padding: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="pixels of padding for random crops; 0 for none; images streamed from files get random resized crops",
    )
    flip: bool = Field(
        default=False, description="mirror half of the training images; of those streamed from files half are in any case"
    )
    validation: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="training images held out, to measure on in place of the test images",
    )
    workers: int = Field(default=2, ge=0, le=256, description="processes that decode, for data that does not fit in memory")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as the network gets it."""
        return len(self.mean), self.image_size, self.image_size

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError(f"mean={self.mean} and std={self.std}: give one of each per channel")
        if self.crop_padding > self.image_size:
            raise ValueError(
                f"crop_padding={self.crop_padding}: allowed is a whole number from 0 to image_size, here {self.image_size}"
            )
        return self


class OptimConfig(Settings):
    """Stochastic gradient descent and its learning rate over the run."""

    lr: float = Field(default=0.1, gt=0, le=1e6, description="learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=100)
    decay_norms: bool = Field(default=True, description="weight decay on norms and biases, too")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    warmup_epochs: int = Field(default=0, ge=0, le=MOST_EPOCHS, description="epochs at the beginning over which the rate rises")
    per_epoch: bool = Field(default=False, description="set the rate once an epoch instead of at every step")
    schedule: Literal["constant", "steps", "cosine"] = "steps"
    milestones: tuple[float, ...] = Field(default=(0.5, 0.75), description="shares of the run at which 'steps' lowers the rate")
    factor: float = Field(default=0.1, gt=0, lt=1, description="what 'steps' multiplies the rate with")

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < m < 1 for m in value) or list(value) != sorted(set(value)):
            raise ValueError("milestones are increasing shares of the run, each between 0 and 1")
        return value

    def lr_at(self, epoch: float, epochs: int) -> float:
        """The learning rate after ``epoch`` (a fraction counts) of ``epochs`` epochs."""
        epoch = int(epoch) if self.per_epoch else epoch
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1 if self.per_epoch else epoch) / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * self.factor ** sum(done >= m for m in self.milestones)


class Choices(Settings):
    """Settings of which each is null unless it is set."""

    def given(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {name: value for name, value in self if value is not None}


class RuleConfig(Choices):
    """Settings of the run's rule; what is null is the rule's own default."""

    every: int | None = Field(default=None, ge=1, le=_MOST_STEPS, description="steps between two exchanges of edges")
    fraction: float | None = Field(default=None, ge=0, le=1, description="of the edges, what is exchanged")
    until: float | None = Field(default=None, gt=0, le=1, description="share of the run after which none are exchanged")
    rate: float | None = Field(
        default=None, ge=0, le=1, description="with which dormant edges are dropped, or at which they learn"
    )
    by_sign: bool | None = Field(default=None, description="prune positive and negative edges apart")
    penalty: float | None = Field(default=None, ge=0, le=1000, description="factor of the penalty on weights")
    decay: float | None = Field(default=None, ge=0, le=100, description="of dormant edges, beside weight decay")
    rescale: bool | None = Field(default=None, description="scale shrunk weights up")
    power: float | None = Field(default=None, ge=1, le=100, description="of the threshold")
    dormant_gradient: float | None = Field(default=None, ge=0, le=1, description="factor of dormant edges' gradient")
    backward: float | None = Field(
        default=None, ge=1, le=1e6, description="edges that get a gradient, as a multiple of the active"
    )


class DormantConfig(Choices):
    """What dormant edges get, beside the rule (:class:`dnw.Dormant`); what is null is the rule's own default."""

    gradient: Literal["exact", "bfloat16", "pooled", "pooled bfloat16"] | None = Field(
        default=None, description="how graphs on kernels make the gradient of dormant edges"
    )
    momentum: Literal["update", "hold", "zero"] | None = Field(default=None, description="what becomes of their momentum")
    weight_decay: bool | None = Field(default=None, description="weight decay on dormant edges, too")


class FloorConfig(Settings):
    """What every layer, or every target of a layer, keeps at least (:class:`dnw.Floor`)."""

    edges: int = Field(default=1, ge=0, le=10**12, description="active edges of a layer that shares a budget with others")
    density: float = Field(default=0.0, ge=0, le=1, description="share of such a layer's candidates; the larger of both counts")
    per_target: int = Field(default=0, ge=0, le=10**9, description="active edges of each target")
    per_source: int = Field(default=0, ge=0, le=10**9, description="active edges of each source")


class DensityConfig(Settings):
    """How the number of active edges falls to the budget over the run; it is constant where ``end`` is null."""

    end: float | None = Field(default=None, gt=0, description="share of the run after which the budget is reached")
    begin: float = Field(default=0.0, ge=0, lt=1, description="share of the run after which the number begins to fall")
    every: int = Field(default=1, ge=1, le=_MOST_STEPS, description="steps between two changes")
    initial: float = Field(default=1.0, gt=0, le=1, description="density before")
    power: float = Field(default=3.0, gt=0, le=100, description="3 for the cubic schedule, 1 for a linear one")

    @model_validator(mode="after")
    def _within(self) -> DensityConfig:
        if self.end is None and self != type(self).model_construct():
            raise ValueError("give end, too: without it the number of edges is constant")
        if self.end is not None and self.end > 1:
            raise ValueError(f"end={self.end:g}: the schedule ends after training does; give a share of the run from 0 to 1")
        if self.end is not None and self.begin >= self.end:
            raise ValueError(f"begin={self.begin:g} is not before end={self.end:g}")
        return self


class TicketConfig(Settings):
    """Which ticket: the largest weights at the end of a run of rule complete."""

    run: str | None = Field(default=None, description="run directory of the first stage")
    rewind: bool = Field(default=True, description="start from that run's first weights (lottery ticket), not its last")
