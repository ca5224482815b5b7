"""What a run is: one frozen, validated value. What is printed is what is stored with the run.

Contract: needs neither torch nor files. Unknown keys, wrong types and values out of range are errors that name the key,
what was given and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, field_validator, model_validator

from dnw._checks import did_you_mean, listing
from dnw.recipes._settings import (
    FIXED_RULES,
    MOST_EPOCHS,
    RANDWIRE,
    RULE_SETTINGS,
    STATIC_GRAPHS,
    WITH_WIDTH,
    WITHOUT_DORMANT_GRADIENT,
    DataConfig,
    DensityConfig,
    DormantConfig,
    EdgesName,
    FloorConfig,
    ModelName,
    OptimConfig,
    RuleConfig,
    RuleName,
    Settings,
    SolverName,
    TicketConfig,
    validated,
)

_NULL = ("null", "none", "None")
BUDGETS = ("width", "num_edges", "density")
"""Settings that say how many edges there are; a run has one of them."""
MOST_BYTES = 2**20
"""Of the file of a config."""
MAY_CHANGE = ("device", "data.workers", "first_epoch_snapshots")
"""Settings that may be changed in the config.json of a run: they say where and how it is computed and shown."""


class Config(Settings):
    """Everything that a run depends on, apart from where the data lies and where the run is written."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="name of the recipe it came from")
    data: DataConfig
    model: ModelName
    width: float | None = Field(
        default=None,
        gt=0,
        le=8,
        description="of peers: their channels; a chain of graphs: as many edges as MobileNetV1 of that width",
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
    dormant: DormantConfig = DormantConfig()
    edges: EdgesName | None = Field(
        default=None, description="of rule frozen: those of a ticket, or drawn at random in one way or another"
    )
    ticket: TicketConfig = TicketConfig()
    density_schedule: DensityConfig = DensityConfig()
    floor: FloorConfig = FloorConfig()
    pattern: str | None = Field(
        default=None,
        pattern=r"^([1-9]\d{0,5}[:x][1-9]\d{0,5}|channels)$",
        description="which edges stand or fall together: 2:4, blocks such as 4x4, or channels",
    )
    dense: tuple[str, ...] = Field(default=(), description="name patterns of parameters that stay dense")
    shared_budget: bool = Field(default=False, description="all layers compete for one budget")
    num_edges: int | None = Field(default=None, ge=1, le=10**12, description="active edges of each graph")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the candidate edges that is active")
    baseline: RuleName | None = Field(default=None, description="a second rule that runs beside, on the same budget")
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(ge=1, le=MOST_EPOCHS)
    extended_from: tuple[Annotated[int, Field(ge=1, le=MOST_EPOCHS)], ...] = Field(
        default=(), max_length=100, description="how many epochs the run had before it was extended, each time"
    )
    batch_size: int = Field(ge=1, le=10**6, description="images per step, over all processes")
    seeds: tuple[Annotated[int, Field(lt=2**63)], ...] = Field(default=(0,), max_length=1000, description="one run each")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    processes: int = Field(default=1, ge=1, le=1024, description="processes that train together")
    first_epoch_snapshots: int = Field(default=8, ge=0, le=1000, description="snapshots of the wiring within the first epoch")

    @property
    def method(self) -> str:
        """How a single run comes to its edges, in a word: where they are given, their name, else the rule's."""
        return self.edges or self.rule

    @property
    def seed(self) -> int:
        """Of a single run."""
        (seed,) = self.seeds
        return seed

    @property
    def first_epochs(self) -> int:
        """How many epochs the run had at first: schedules of edges are shares of those."""
        return (*self.extended_from, self.epochs)[0]

    def lr_at(self, epoch: float) -> float:
        """The learning rate after ``epoch`` (a fraction counts), on the schedule of the length that the run has then."""
        length = next((length for length in self.extended_from if epoch < length), self.epochs)
        return self.optim.lr_at(epoch, length)

    def extended(self, epochs: int) -> Config:
        """The same, to be trained on to more epochs after its last.

        Raises:
            ValueError: not more than it has.
        """
        if epochs <= self.epochs:
            raise ValueError(f"epochs={epochs}: the run has {self.epochs} epochs; give more to extend it")
        return self.model_copy(update={"epochs": epochs, "extended_from": (*self.extended_from, self.epochs)})

    def singles(self) -> dict[str, Config]:
        """The single runs, by their folders within the run's: one per seed, each with its baseline after it."""
        found: dict[str, Config] = {}
        for seed in self.seeds:
            folder = f"seed-{seed}" if len(self.seeds) > 1 else "."
            found[folder] = one = self.model_copy(update={"seeds": (seed,), "baseline": None})
            if self.baseline is not None:
                found[f"{folder}/baseline"] = one._with_rule(self.baseline)
        return found

    def _with_rule(self, rule: RuleName) -> Config:
        """The same with another rule, at that rule's own settings."""
        changes: dict[str, Any] = {"rule": rule, "edges": None, "ticket": TicketConfig(), "rule_settings": RuleConfig()}
        changes["dormant"] = DormantConfig()
        if rule in FIXED_RULES:
            changes["density_schedule"] = DensityConfig()
        if rule == "complete":
            changes |= {"pattern": None, "floor": FloorConfig()}
        return self.model_copy(update=changes)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

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

    @field_validator("rule", "baseline", mode="before")
    @classmethod
    def _a_rule(cls, value: Any) -> Any:
        if isinstance(value, str) and value in get_args(EdgesName):
            raise ValueError(f"{value} is no rule, but says where given edges come from: write rule=frozen edges={value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self._check_rule()
        self._check_budget()
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"optim.warmup_epochs={self.optim.warmup_epochs}: the run has {self.epochs} epochs; give fewer")
        if list(self.extended_from) != sorted({e for e in self.extended_from if 0 < e < self.epochs}):
            raise ValueError(
                f"extended_from={_text(list(self.extended_from))}: expected increasing numbers below epochs={self.epochs}"
            )
        if self.batch_size < self.processes:
            raise ValueError(f"batch_size={self.batch_size}: {self.processes} processes need at least one image each per step")
        return self

    def _check_rule(self) -> None:
        allowed = RULE_SETTINGS.get(self.rule, ())
        for name, value in self.rule_settings.given().items():
            if name not in allowed:
                has = ", ".join(allowed) or "none"
                raise ValueError(f"rule_settings.{name}={value}: rule={self.rule} has no such setting; it has {has}")
        if self.rule in FIXED_RULES and (given := self.dormant.given()):
            name, value = next(iter(given.items()))
            raise ValueError(f"dormant.{name}={value}: rule={self.rule} never changes its edges, so dormant ones get nothing")
        if self.rule in WITHOUT_DORMANT_GRADIENT and self.dormant.gradient:
            why = f"rule={self.rule} needs no gradient of dormant edges, so it is never made"
            raise ValueError(f"dormant.gradient={self.dormant.gradient}: {why}")
        if self.rule == "frozen" and self.edges is None:
            raise ValueError(f"rule=frozen: give its edges, one of {listing(get_args(EdgesName))}, as in edges=ticket")
        if self.rule != "frozen" and self.edges is not None:
            raise ValueError(f"edges={self.edges}: rule={self.rule} finds its own edges; rule=frozen takes given ones")
        if self.edges != "ticket" and self.ticket.run is not None:
            raise ValueError(f"ticket.run={self.ticket.run}: rule={self.rule} takes no ticket; rule=frozen edges=ticket does")
        if self.edges == "random_original" and not (self.model == "tiny_cifar10" and self.rank_all_entries and self.num_edges):
            raise ValueError("edges=random_original is for model=tiny_cifar10 with rank_all_entries=true and num_edges")
        if self.edges == "expander" and self.density is None:
            raise ValueError("edges=expander: give density, the fraction of its sources that a target reads")
        if self.edges in RANDWIRE and self.model not in STATIC_GRAPHS:
            raise ValueError(f"edges={self.edges}: drawn over the levels of static graphs: model={listing(STATIC_GRAPHS)}")
        if self.edges in RANDWIRE and self.rank_all_entries:
            raise ValueError(f"edges={self.edges}: drawn among the candidates; leave rank_all_entries out")
        if self.density_schedule.end is not None and self.rule in FIXED_RULES:
            raise ValueError(f"density_schedule: rule={self.rule} never changes its edges, so it has no schedule")
        if self.floor != FloorConfig() and self.rule in ("complete", "frozen"):
            raise ValueError(f"floor: the edges of rule={self.rule} are given, so it has no floor")
        for end in ("per_target", "per_source"):
            if (number := getattr(self.floor, end)) and self.pattern is not None:
                raise ValueError(f"floor.{end}={number}: pattern={self.pattern} has groups of its own")
        if "l1_anneal" in (self.rule, self.baseline) and self.density_schedule.end is None:
            raise ValueError("rule=l1_anneal prunes on a schedule: give density_schedule.end, a share of the run")
        if self.baseline == "frozen":
            raise ValueError("baseline=frozen: edges that are given make a run of their own; train it by itself")
        if self.baseline == self.rule:
            raise ValueError(f"baseline={self.baseline}: is the rule of the run itself; name another, or null for none")

    def _check_budget(self) -> None:
        is_chain = self.model.startswith("mobilenet_v1_graphs")
        names = ("width", "num_edges", "density") if is_chain else ("num_edges", "density")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        if self.pattern is not None and (self.rule == "complete" or self.edges in ("random_original", "expander", *RANDWIRE)):
            raise ValueError(f"pattern={self.pattern}: rule={self.rule} chooses no edges; leave the pattern out")
        if self.pattern is not None and ":" in self.pattern:
            if self.num_edges is not None or self.density is not None:
                raise ValueError(
                    f"pattern={self.pattern} fixes the number of edges; leave num_edges and density out (num_edges=null)"
                )
        elif {self.rule, self.baseline} - {None, "complete"} and len(given) != 1:
            how = f"given are {', '.join(given)}; take one off, as in {given[0].partition('=')[0]}=null" if given else None
            raise ValueError(f"a budget is one of {listing(names)}; {how or 'none is given'}")
        if self.width is not None and not (is_chain or self.model in WITH_WIDTH):
            raise ValueError(f"width={self.width}: model={self.model} has no width")
        if is_chain and self.width is not None and self.width > 1:
            raise ValueError(f"width={self.width}: the budget of a chain of graphs is that of a width from 0 to 1")
        if self.shared_budget and (self.density is None or is_chain):
            raise ValueError("shared_budget=true: needs density, and no chain of graphs")


def config_from_json(text: str, source: str) -> Config:
    """A stored config, of an earlier version of dnw as well.

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
    return _stored(values, source)


def check_unchanged(config: Config, earlier: object, when: str, source: Path) -> None:
    """Raises ``ValueError`` where a config is another than an earlier one, apart from where and how a run is computed.

    Settings that the earlier version of dnw did not have count as their defaults, in both.

    Args:
        config: as it is now.
        earlier: the values of the earlier one, as stored.
        when: what was done with the earlier one, for messages.
        source: the file that holds one of the two.
    """
    then = _stored(earlier, f"{source}: the config in it")
    lengths = (*config.extended_from, config.epochs)
    if then.epochs < config.epochs and lengths[: len(then.extended_from) + 1] == (*then.extended_from, then.epochs):
        then = then.model_copy(update={"epochs": config.epochs, "extended_from": config.extended_from})  # of before
    before, now = (_flat(one.model_dump(mode="json")) for one in (then, config))
    differ = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if differ:
        listed = ", ".join(f"{key}={_text(before[key])}, not {_text(now[key])}" for key in differ[:4])
        raise ValueError(
            f"{source}: {when} with {listed}, as config.json says now; put that back, or train a new run with the new config"
        )


def _stored(values: Any, source: str) -> Config:
    """A config from stored values. Given edges stood among the rules before they had a setting of their own."""
    if isinstance(values, dict) and "edges" not in values:
        rule = values.get("rule")
        if isinstance(rule, str) and rule in get_args(EdgesName):
            values = {**values, "rule": "frozen", "edges": rule}
    return validated(Config, values, source)


def override(config: Config, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """A config with some settings changed.

    Args:
        config: to change.
        overrides: as the command takes them, each ``key=value`` such as ``optim.lr=0.05`` or ``seeds=0,1,2``; or values by
            key, ``{"optim.lr": 0.05}`` or ``{"optim": {"lr": 0.05}}``.

    Raises:
        ValueError: no such key, or a value that is not allowed.
    """
    values = config.model_dump(mode="json")
    if isinstance(overrides, str):
        raise TypeError(f"overrides={overrides!r}: expected a list of texts key=value, or a mapping")
    changes = _flat(_plain(overrides)) if isinstance(overrides, Mapping) else _parsed(overrides, values)
    given = [name for name in BUDGETS if changes.get(name) is not None]
    if len(given) == 1 and (given[0] != "width" or config.model.startswith("mobilenet_v1_graphs")):
        # a budget takes the place of the recipe's; the width of other models is none
        others = BUDGETS if config.model.startswith("mobilenet_v1_graphs") else ("num_edges", "density")
        values |= {name: None for name in others if name not in given}
    for key, value in changes.items():
        part, name = _place(values, key)
        part[name] = value
    return validated(Config, values, "")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: paths as texts, parts of the settings as dictionaries."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        plain[str(key)] = _plain(value) if isinstance(value, Mapping) else str(value) if isinstance(value, Path) else value
    return plain


def _parsed(overrides: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Values by key, of texts ``key=value``."""
    found: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r}: an override is written key=value, such as optim.lr=0.05")
        part, name = _place(values, key)
        found[key] = _value(text, part[name])
    return found


def _place(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Where a setting stands among nested ones.

    Raises:
        ValueError: there is none of that name.
    """
    *outer, name = key.split(".")
    part: Any = values
    for group in outer:
        part = part.get(group) if isinstance(part, dict) else None
    if not isinstance(part, dict) or name not in part or isinstance(part[name], dict):
        if isinstance(part, dict) and isinstance(inner := part.get(name), dict):
            raise ValueError(f"{key}: is a part of the settings; give what is in it, {listing(f'{key}.{x}' for x in inner)}")
        inside = [known for known in _flat(values) if known.endswith(f".{key}")]
        hint = f"; did you mean {inside[0]!r}?" if inside else did_you_mean(key, _flat(values))
        raise ValueError(f"{key}: no such setting{hint}")
    return part, name


def alike(config: Config) -> Config:
    """The same, but for what may be changed at any time (``MAY_CHANGE``), which is as by default."""
    plain = DataConfig.model_fields["workers"].default
    usual = {name: Config.model_fields[name].default for name in MAY_CHANGE if "." not in name}
    return config.model_copy(update={**usual, "data": config.data.model_copy(update={"workers": plain})})


def changes(config: Config, base: Config) -> list[str]:
    """What has to be overridden of a base to get a config: the inverse of :func:`override`."""
    values, present = _flat(config.model_dump(mode="json")), _flat(base.model_dump(mode="json"))
    return [f"{key}={_text(value)}" for key, value in values.items() if value != present[key]]


def _value(text: str, present: Any) -> Any:
    if text in _NULL:
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
