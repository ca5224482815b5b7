"""What a run is: one frozen, validated value. What is printed is what is stored with the run.

Contract: needs neither torch nor files. Unknown keys, wrong types and values out of range are errors that name the key,
what was given and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dnw._checks import did_you_mean

RuleName = Literal["dnw", "random", "random_original", "complete"]
ModelName = Literal[
    "tiny_digits",
    "tiny_mnist",
    "tiny_cifar10",
    "tiny_cifar10_discrete",
    "tiny_cifar10_continuous",
    "mobilenet_v1_graphs",
    "mobilenet_v1_graphs_small",
    "mobilenet_v1",
]
MODEL_NAMES: tuple[str, ...] = get_args(ModelName)
SolverName = Literal["euler", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Frozen):
    """Which images, and what is done to them."""

    name: Literal["digits", "mnist", "cifar10", "folder"] = Field(description="data set")
    image_size: int = Field(gt=0, description="side in pixels of the square images that the network gets")
    mean: tuple[float, ...] = Field(description="per colour, in units of the full range")
    std: tuple[float, ...] = Field(description="per colour, in units of the full range")
    crop_padding: int = Field(default=0, ge=0, description="pixels of padding for random crops; 0 for none")
    flip: bool = Field(default=False, description="mirror half of the training images")

    @model_validator(mode="after")
    def _per_colour(self) -> DataConfig:
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(f"mean={self.mean} and std={self.std}: give one of each per colour, the std above 0")
        return self

    workers: int = Field(default=2, ge=0, description="processes that decode, for data that does not fit in memory")


class OptimConfig(_Frozen):
    """Stochastic gradient descent and its learning rate over the run."""

    lr: float = Field(default=0.1, gt=0, description="learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
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
        import math

        done = epoch / epochs
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * self.factor ** sum(done >= m for m in self.milestones)


class Config(_Frozen):
    """Everything that a run depends on, apart from where the data lies and where the run is written."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="name of the recipe it came from")
    data: DataConfig
    model: ModelName
    width: float | None = Field(
        default=None,
        gt=0,
        description="mobilenet_v1: its channels; a chain of graphs: as many edges as MobileNetV1 of that width",
    )
    solver: SolverName = Field(default="dopri5", description="of a graph in continuous time")
    solver_steps: int = Field(default=8, ge=1, description="of the solvers with equal steps: euler, midpoint and rk4")
    adjoint: bool = Field(default=False, description="gradients of a graph in continuous time by the adjoint equation")
    rectify_in_place: bool = Field(default=False, description="ReLU on the solver's own states, as in the authors' code")
    rank_all_entries: bool = Field(
        default=False, description="entries that a graph never reads compete, as in the authors' code"
    )
    rule: RuleName = Field(default="dnw", description="how active edges are chosen")
    num_edges: int | None = Field(default=None, ge=1, description="active edges of each graph")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the candidate edges that is active")
    baseline: RuleName | None = Field(default=None, description="a second rule that runs beside, on the same budget")
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="images per step, over all processes")
    seeds: tuple[int, ...] = Field(default=(0,), description="one run each")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    processes: int = Field(default=1, ge=1, description="processes that train together")
    first_epoch_snapshots: int = Field(default=8, ge=0, description="snapshots of the wiring within the first epoch")

    @field_validator("seeds", mode="before")
    @classmethod
    def _one_seed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ValueError("seeds are one or more different whole numbers from 0 on")
        return value

    @model_validator(mode="after")
    def _budget(self) -> Config:
        rules = {self.rule, self.baseline} - {None, "complete"}
        is_chain = self.model.startswith("mobilenet_v1_graphs")
        budgets = [self.num_edges, self.density, *([self.width] if is_chain else [])]
        if rules and sum(b is not None for b in budgets) != 1:
            raise ValueError(
                "a budget is needed: give width, num_edges or density, one of the three"
                if is_chain
                else "a budget is needed: give num_edges or density, one of the two"
            )
        if self.width is not None and not self.model.startswith("mobilenet_v1"):
            raise ValueError(f"width={self.width}: model={self.model} has no width")
        if is_chain and self.width is not None and self.width > 1:
            raise ValueError(f"width={self.width}: the budget of a chain of graphs is that of a width from 0 to 1")
        if "random_original" in rules and not (self.model == "tiny_cifar10" and self.rank_all_entries and self.num_edges):
            raise ValueError("rule random_original is for model=tiny_cifar10 with rank_all_entries=true and num_edges")
        if self.batch_size < self.processes:
            raise ValueError(f"batch_size={self.batch_size}: {self.processes} processes need at least one image each per step")
        if self.baseline == self.rule:
            raise ValueError(f"baseline={self.baseline}: is the rule of the run itself; name another, or null for none")
        return self

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def config_of_model(model: str, colours: int, size: int) -> Config:
    """A config around one of the networks alone, complete, for images of some number of colours and side in pixels."""
    data = DataConfig(name="folder", image_size=size, mean=(0.5,) * colours, std=(0.5,) * colours)
    return _validate(
        {"recipe": model, "data": data.model_dump(), "model": model, "rule": "complete", "epochs": 1, "batch_size": 1}, model
    )


def config_from_json(text: str, source: str) -> Config:
    """A stored config.

    Args:
        text: JSON.
        source: where it came from, for messages.

    Raises:
        ValueError: no JSON, or not a valid config; every problem is named.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON (line {error.lineno}: {error.msg})") from None
    return _validate(values, source)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A config with some values changed, each given as ``key=value`` such as ``optim.lr=0.05`` or ``seeds=0,1,2``.

    Raises:
        ValueError: no such key, or a value that is not allowed.
    """
    values = config.model_dump(mode="json")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r}: an override is written key=value, such as optim.lr=0.05")
        place, path = values, key.split(".")
        for part in path[:-1]:
            if not isinstance(place.get(part), dict):
                raise ValueError(f"{key}: no such setting{did_you_mean(key, _flat(values))}")
            place = place[part]
        if path[-1] not in place or isinstance(place[path[-1]], dict):
            raise ValueError(f"{key}: no such setting{did_you_mean(key, _flat(values))}")
        place[path[-1]] = _value(text, place[path[-1]])
    return _validate(values, "override")


def changes(config: Config, base: Config) -> list[str]:
    """What has to be overridden of a base to get a config: the inverse of :func:`override`."""
    values, present = _flat(config.model_dump(mode="json")), _flat(base.model_dump(mode="json"))
    return [f"{key}={_text(value)}" for key, value in values.items() if value != present[key]]


def _value(text: str, present: Any) -> Any:
    if text in ("null", "none", "None"):
        return None
    if isinstance(present, list):
        return [_scalar(part) for part in text.split(",") if part]
    return _scalar(text)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (int, float, bool)) else text


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _validate(values: Any, source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "config"
            given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
            hint = ""
            if problem["type"] == "extra_forbidden":
                hint = did_you_mean(key.rsplit(".", 1)[-1], [*Config.model_fields, *OptimConfig.model_fields])
            problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{given}{hint}")
        raise ValueError(f"{source}: " + "; ".join(problems)) from None
