"""What a run is: one frozen, validated value. What is printed is what is stored with the run.

Contract: needs neither torch nor files. Unknown keys, wrong types and values out of range are errors that name the key,
what was given and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dnw._checks import did_you_mean, listing

RuleName = Literal[
    "dnw",
    "no_update",
    "targeted_dropout",
    "magnitude_pruning",
    "l1_anneal",
    "ticket",
    "random",
    "random_original",
    "complete",
    "set",
    "rigl",
    "sparse_momentum",
    "sr_ste",
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
    "st3": ("rescale",),
    "feather": ("power", "dormant_gradient"),
    "top_kast": ("backward", "penalty"),
}
"""What can be set of each rule; the others have no settings."""
_FIXED = ("random", "random_original", "complete", "ticket")
"""Rules that never change their edges."""
ModelName = Literal[
    "tiny_digits",
    "tiny_mnist",
    "tiny_cifar10",
    "tiny_cifar10_discrete",
    "tiny_cifar10_continuous",
    "mobilenet_v1_graphs",
    "mobilenet_v1_graphs_small",
    "mobilenet_v1",
    "resnet18_cifar",
    "resnet50",
]
MODEL_NAMES: tuple[str, ...] = get_args(ModelName)
MOST_BYTES = 2**20
"""Of the file of a config."""
MOST_EPOCHS = 100_000
_MOST_STEPS = 10**9
"""Between two changes of the wiring: longer than any run."""
MAY_CHANGE = ("device", "data.workers", "first_epoch_snapshots")
"""Settings that may be changed in the config.json of a run: they say where and how it is computed and shown."""
SolverName = Literal["euler", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Frozen):
    """Which images, and what is done to them."""

    name: Literal["digits", "mnist", "cifar10", "folder"] = Field(description="data set")
    image_size: int = Field(gt=0, le=4096, description="side in pixels of the square images that the network gets")
    mean: tuple[Annotated[float, Field(ge=-10, le=10)], ...] = Field(description="per colour, in units of the full range")
    std: tuple[Annotated[float, Field(ge=1e-3, le=10)], ...] = Field(description="per colour, in units of the full range")
    crop_padding: int = Field(default=0, ge=0, le=4096, description="pixels of padding for random crops; 0 for none")
    flip: bool = Field(default=False, description="mirror half of the training images")

    workers: int = Field(default=2, ge=0, le=256, description="processes that decode, for data that does not fit in memory")

    @model_validator(mode="after")
    def _per_colour(self) -> DataConfig:
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError(f"mean={self.mean} and std={self.std}: give one of each per colour")
        if self.crop_padding > self.image_size:
            raise ValueError(
                f"crop_padding={self.crop_padding}: allowed is a whole number from 0 to image_size, here {self.image_size}"
            )
        return self


class OptimConfig(_Frozen):
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
        import math

        epoch = int(epoch) if self.per_epoch else epoch
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1 if self.per_epoch else epoch) / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * self.factor ** sum(done >= m for m in self.milestones)


class RuleConfig(_Frozen):
    """Settings of the run's rule; what is null is the rule's own default."""

    every: int | None = Field(default=None, ge=1, le=_MOST_STEPS, description="steps between two exchanges of edges")
    fraction: float | None = Field(default=None, ge=0, le=1, description="share of the edges that is exchanged")
    until: float | None = Field(default=None, gt=0, le=1, description="share of the run after which none are exchanged")
    rate: float | None = Field(default=None, ge=0, le=1, description="with which dormant edges are dropped")
    by_sign: bool | None = Field(default=None, description="prune positive and negative edges apart")
    penalty: float | None = Field(default=None, ge=0, le=1000, description="factor of the penalty on weights")
    decay: float | None = Field(default=None, ge=0, le=100, description="of dormant edges, beside weight decay")
    rescale: bool | None = Field(default=None, description="scale shrunk weights up")
    power: float | None = Field(default=None, ge=1, le=100, description="of the threshold")
    dormant_gradient: float | None = Field(default=None, ge=0, le=1, description="factor of dormant edges' gradient")
    backward: float | None = Field(
        default=None, ge=1, le=1e6, description="edges that get a gradient, as a multiple of the active"
    )


class DensityConfig(_Frozen):
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


class TicketConfig(_Frozen):
    """Where rule ticket takes its edges from: the largest weights at the end of a run of rule complete."""

    run: str | None = Field(default=None, description="run directory of the first stage")
    rewind: bool = Field(default=True, description="start from that run's first weights (lottery ticket), not its last")


class Config(_Frozen):
    """Everything that a run depends on, apart from where the data lies and where the run is written."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="name of the recipe it came from")
    data: DataConfig
    model: ModelName
    width: float | None = Field(
        default=None,
        gt=0,
        le=8,
        description="mobilenet_v1: its channels; a chain of graphs: as many edges as MobileNetV1 of that width",
    )
    solver: SolverName = Field(default="dopri5", description="of a graph in continuous time")
    solver_steps: int = Field(
        default=8, ge=1, le=10_000, description="of the solvers with equal steps: euler, midpoint and rk4"
    )
    adjoint: bool = Field(default=False, description="gradients of a graph in continuous time by the adjoint equation")
    rectify_in_place: bool = Field(default=False, description="ReLU on the solver's own states, as in the authors' code")
    rank_all_entries: bool = Field(
        default=False, description="entries that a graph never reads compete, as in the authors' code"
    )
    rule: RuleName = Field(default="dnw", description="how active edges are chosen")
    rule_settings: RuleConfig = RuleConfig()
    density_schedule: DensityConfig = DensityConfig()
    pattern: str | None = Field(
        default=None,
        pattern=r"^([1-9]\d{0,5}[:x][1-9]\d{0,5}|channels)$",
        description="which edges stand or fall together: 2:4, blocks such as 4x4, or channels",
    )
    ticket: TicketConfig = TicketConfig()
    dense: tuple[str, ...] = Field(default=(), description="name patterns of parameters that stay dense")
    shared_budget: bool = Field(default=False, description="all layers compete for one budget")
    num_edges: int | None = Field(default=None, ge=1, le=10**12, description="active edges of each graph")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the candidate edges that is active")
    baseline: RuleName | None = Field(default=None, description="a second rule that runs beside, on the same budget")
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(ge=1, le=MOST_EPOCHS)
    batch_size: int = Field(ge=1, le=10**6, description="images per step, over all processes")
    seeds: tuple[Annotated[int, Field(lt=2**63)], ...] = Field(default=(0,), max_length=1000, description="one run each")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    processes: int = Field(default=1, ge=1, le=1024, description="processes that train together")
    first_epoch_snapshots: int = Field(default=8, ge=0, le=1000, description="snapshots of the wiring within the first epoch")

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
        if self.pattern is not None and self.rule in ("complete", "random_original"):
            raise ValueError(f"pattern={self.pattern}: rule={self.rule} chooses no edges; leave the pattern out")
        if self.pattern is not None and ":" in self.pattern:
            if self.num_edges is not None or self.density is not None:
                raise ValueError(
                    f"pattern={self.pattern} fixes the number of edges; leave num_edges and density out (num_edges=null)"
                )
            rules = set()
        is_chain = self.model.startswith("mobilenet_v1_graphs")
        budgets = [self.num_edges, self.density, *([self.width] if is_chain else [])]
        if rules and sum(b is not None for b in budgets) != 1:
            names = ("width", "num_edges", "density")[not is_chain :]
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)
            much = f"given are {given}; take one off, as in {given.partition('=')[0]}=null" if given else "none is given"
            raise ValueError(f"a budget is one of {listing(names)}; {much}")
        if self.width is not None and not self.model.startswith("mobilenet_v1"):
            raise ValueError(f"width={self.width}: model={self.model} has no width")
        if is_chain and self.width is not None and self.width > 1:
            raise ValueError(f"width={self.width}: the budget of a chain of graphs is that of a width from 0 to 1")
        for key, value in self.rule_settings.model_dump().items():
            if value is not None and key not in RULE_SETTINGS.get(self.rule, ()):
                allowed = ", ".join(RULE_SETTINGS.get(self.rule, ())) or "none"
                raise ValueError(f"rule_settings.{key}={value}: rule={self.rule} has no such setting; it has {allowed}")
        if self.density_schedule.end is not None and self.rule in _FIXED:
            raise ValueError(f"density_schedule: rule={self.rule} never changes its edges, so it has no schedule")
        if self.rule == "l1_anneal" and self.density_schedule.end is None:
            raise ValueError("rule=l1_anneal prunes on a schedule: give density_schedule.end, a share of the run")
        if self.rule != "ticket" and self.ticket.run is not None:
            raise ValueError(f"ticket.run={self.ticket.run}: rule={self.rule} takes no ticket; rule=ticket does")
        if self.shared_budget and (self.density is None or is_chain):
            raise ValueError("shared_budget=true: needs density, and no chain of graphs")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"optim.warmup_epochs={self.optim.warmup_epochs}: the run has {self.epochs} epochs; give fewer")
        if "random_original" in rules and not (self.model == "tiny_cifar10" and self.rank_all_entries and self.num_edges):
            raise ValueError("rule random_original is for model=tiny_cifar10 with rank_all_entries=true and num_edges")
        if self.batch_size < self.processes:
            raise ValueError(f"batch_size={self.batch_size}: {self.processes} processes need at least one image each per step")
        if self.baseline == "ticket":
            raise ValueError("baseline=ticket: a ticket is drawn from another run; train it by itself")
        if self.baseline == self.rule:
            raise ValueError(f"baseline={self.baseline}: is the rule of the run itself; name another, or null for none")
        return self

    def of_rule(self, rule: RuleName) -> Config:
        """The config of a baseline: the same with another rule, at that rule's own settings."""
        changes: dict[str, Any] = {"rule": rule, "baseline": None, "rule_settings": RuleConfig(), "ticket": TicketConfig()}
        if rule in _FIXED:
            changes["density_schedule"] = DensityConfig()
        return self.model_copy(update=changes)

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
    except (RecursionError, ValueError) as error:  # brackets in brackets without end, a number of thousands of digits
        raise ValueError(f"{source}: not a config ({str(error).partition(';')[0]})") from None
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


def check_unchanged(config: Config, earlier: object, when: str, source: Path) -> None:
    """Raises ``ValueError`` where a config is another than an earlier one, apart from where and how a run is computed.

    Settings that the earlier version of dnw did not have count as their defaults, in both.

    Args:
        config: as it is now.
        earlier: the values of the earlier one, as stored.
        when: what was done with the earlier one, for messages.
        source: the file that holds one of the two.
    """
    before, now = (_flat(one.model_dump(mode="json")) for one in (_validate(earlier, f"{source}: the config in it"), config))
    differ = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if differ:
        listed = ", ".join(f"{key}={_text(before[key])}, not {_text(now[key])}" for key in differ[:4])
        raise ValueError(
            f"{source}: {when} with {listed}, as config.json says now; put that back, or train a new run with the new config"
        )


def _value(text: str, present: Any) -> Any:
    if text in ("null", "none", "None"):
        return None
    if isinstance(present, list):
        return [_scalar(part) for part in text.split(",") if part]
    return _scalar(text)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except (RecursionError, ValueError):
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


def short(value: Any) -> str:
    """A value as a message shows it: in one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _validate(values: Any, source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "config"
            given = "" if isinstance(problem["input"], dict) else f" (given: {short(problem['input'])})"
            hint = ""
            if problem["type"] == "extra_forbidden":
                hint = did_you_mean(key.rsplit(".", 1)[-1], [*Config.model_fields, *OptimConfig.model_fields])
            problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{given}{hint}")
        raise ValueError(f"{source}: " + "; ".join(problems)) from None
