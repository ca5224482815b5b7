"""What tests share: the rules, small models, slow references, the places of the recorded fixtures."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnw
from dnw.graphs import StaticGraph

SHARED = Path(os.environ.get("DNW_SHARED", Path(__file__).parents[2] / "shared"))
"""Recorded outputs of the authors' code and real data sets, where they are at hand; never part of the repository."""


def reference(name: str) -> Path:
    """A recorded fixture; the test is skipped where it is not at hand."""
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"the recorded fixture {name} is not at hand (set DNW_SHARED)")
    return path


def pairs(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor, few of them, in which any two values of two factors meet.

    As many as the two largest factors have, or a few more: what goes wrong goes wrong for a value or for two together, and
    hardly ever for three alone.
    """
    factors = [list(each) for each in values]
    if len(factors) == 1:
        return [(value,) for value in factors[0]]
    places = [[(factor, value) for value in range(len(each))] for factor, each in enumerate(factors)]
    missing = {frozenset(two) for a, b in itertools.combinations(places, 2) for two in itertools.product(a, b)}
    order, found = sorted(missing, key=sorted), []
    for first in order:
        if first not in missing:
            continue
        chosen = set(first)
        for place in places:
            if not chosen & set(place):
                chosen.add(max(place, key=lambda value: sum(frozenset((value, other)) in missing for other in chosen)))
        missing -= {frozenset(two) for two in itertools.combinations(chosen, 2)}
        found.append(tuple(factors[factor][value] for factor, value in sorted(chosen)))
    return found


_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "maximize": ("SGD", {"lr": 1e-3, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd_fused": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "fused": True}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 1e-2}),
    "adam_amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam_fused": ("Adam", {"lr": 0.01, "fused": True}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw_foreach": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adamw_fused": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adafactor": ("Adafactor", {"lr": 0.02}),
    "nadam": ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {"lr": 0.01}),
    "adamax": ("Adamax", {"lr": 0.01}),
    "adagrad": ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adagrad_fused": ("Adagrad", {"lr": 0.05, "fused": True}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "asgd": ("ASGD", {"lr": 0.1, "t0": 5}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "muon": ("Muon", {"lr": 0.02}),
}
OPTIMIZERS = {
    name: partial(getattr(torch.optim, kind), **settings)
    for name, (kind, settings) in _OPTIMIZERS.items()
    if hasattr(torch.optim, kind)
}
"""Every optimizer of torch.optim that takes dense gradients and steps once: call one with parameters, and other settings."""


@dataclass(frozen=True)
class RuleCase:
    """A rule for the parametrized suite, with the other arguments that ``dnw.wire`` gets."""

    rule: dnw.Rule
    budget: dict[str, Any]


@dataclass(frozen=True)
class Dropping(dnw.Rule):
    """Uses every hook of a rule: draws per step, gradient, optimizer state, another projection, another evaluation."""

    @property
    def selects_by_gradient(self) -> bool:
        return True

    def score(self, layer: dnw.Layer) -> Tensor:
        momentum = layer.state.get("momentum_buffer", layer.state.get("exp_avg"))
        score = layer.latent if momentum is None else layer.latent + 0.1 * momentum
        return score if layer.grad is None else score + 0.01 * layer.grad

    def dropped(self, layer: dnw.Layer) -> Tensor:
        return layer.active & (layer.uniform() < 0.3)

    def gradient(self, layer: dnw.Layer) -> Tensor:
        return layer.grad.masked_fill(self.dropped(layer), 0)

    def project(self, layer: dnw.Layer) -> Tensor:
        return self.settle(layer).masked_fill(self.dropped(layer), 0)

    def settle(self, layer: dnw.Layer) -> Tensor:
        return layer.latent.masked_fill(~layer.active, 0)


def rule_cases(model: nn.Module) -> dict[str, RuleCase]:
    """Every listed rule, schedules and patterns, and a rule with every hook, ready to wire a model of :func:`small_net`."""
    wirable = [(name, p.shape) for name, p in model.named_parameters() if p.ndim > 1]
    half = {name: torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5 for name, shape in wirable}
    fifth, falling = {"density": 0.2}, {"density": 0.2, "schedule": dnw.DensitySchedule(end=5, every=2, initial=0.8)}
    special = {
        "frozen": RuleCase(dnw.Frozen(half), {}),
        "complete": RuleCase(dnw.Complete(), {}),
        "iht": RuleCase(dnw.IHT(), falling),
        "magnitude_pruning": RuleCase(dnw.MagnitudePruning(), falling),
        "l1_anneal": RuleCase(dnw.L1Anneal(penalty=0.01), falling),
        "set": RuleCase(dnw.SET(every=2), fifth),
        "rigl": RuleCase(dnw.RigL(every=2, until=6), fifth),
        "sparse_momentum": RuleCase(dnw.SparseMomentum(every=2), fifth),
        "st3": RuleCase(dnw.ST3(), {"density": dnw.Global(0.2)}),
    }
    cases = {name: special.get(name) or RuleCase(rule(), fifth) for name, rule in dnw.RULES.items()}
    linear = {"exclude": nn.Conv2d}
    return {
        **cases,
        "dropping": RuleCase(Dropping(), fifth),
        "dnw_falling": RuleCase(dnw.DNW(), falling),
        "rigl_falling": RuleCase(dnw.RigL(every=2), falling),
        "sparse_momentum_falling": RuleCase(dnw.SparseMomentum(every=2), falling),
        "feather_falling": RuleCase(dnw.Feather(), {**falling, "density": dnw.Global(0.1)}),
        "dnw_2_of_4": RuleCase(dnw.DNW(), {**linear, "pattern": dnw.NOfM(2, 4)}),
        "sr_ste_1_of_8": RuleCase(dnw.SRSTE(), {**linear, "pattern": dnw.NOfM(1, 8)}),
        "rigl_blocks": RuleCase(dnw.RigL(every=2), {**linear, **falling, "pattern": dnw.Blocks(2, 4)}),
        "top_kast_channels": RuleCase(dnw.TopKAST(), {**fifth, "pattern": dnw.Channels()}),
    }


def small_net(seed: int = 0) -> nn.Sequential:
    """A convolution, a norm and two linear layers on 8x8 images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """A fixed random batch for :func:`small_net`."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Plain training; returns the losses."""
    losses = []
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RULES = list(rule_cases(small_net()))


def case(rule: str) -> RuleCase:
    """A rule by its name, and its budget."""
    return rule_cases(small_net())[rule]


def wired(
    rule: str = "dnw", optimizer: str = "momentum", seed: int = 0
) -> tuple[nn.Sequential, torch.optim.Optimizer, dnw.Wiring]:
    """A network of :func:`small_net`, its optimizer (one with momentum where the rule needs it), and its wiring."""
    model, chosen = small_net(seed), case(rule)
    base = OPTIMIZERS["momentum" if chosen.rule.needs_momentum and optimizer == "sgd" else optimizer](model.parameters())
    return model, base, dnw.wire(model, base, rule=chosen.rule, **chosen.budget)


def saved(*things: Any) -> list[dict[str, Any]]:
    """State dicts after a trip through a file."""
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: dnw.Wiring, b: dnw.Wiring) -> bool:
    """Whether two wirings hold the same edges and weights, bit for bit."""
    return all(
        torch.equal(a[n].latent, b[n].latent)
        and torch.equal(a[n].active, b[n].active)
        and torch.equal(a[n].weight, b[n].weight)
        for n in a
    )


def slow_top_k(magnitudes: list[float], k: int, candidates: list[bool]) -> list[bool]:
    """The k largest by sorting, the lowest index first among equals."""
    order = sorted((i for i, c in enumerate(candidates) if c), key=lambda i: (-abs(magnitudes[i]), i))
    chosen = set(order[:k])
    return [i in chosen for i in range(len(magnitudes))]


class _Masked(torch.autograd.Function):
    """Straight-through in the forward pass, as the paper writes it: mask * weight forward, identity backward."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class MaskInForward(nn.Module):
    """The textbook form of DNW on :func:`small_net`: dense parameters, the top k chosen anew in every forward pass."""

    def __init__(self, net: nn.Sequential, k: dict[str, int]) -> None:
        super().__init__()
        self.net, self.k = net, k

    def mask(self, name: str) -> Tensor:
        weight = self.net.get_parameter(name)
        flat = slow_top_k(weight.detach().flatten().tolist(), self.k[name], [True] * weight.numel())
        return torch.tensor(flat).view(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        effective = {n: _Masked.apply(self.net.get_parameter(n), self.mask(n)) for n in self.k}
        return torch.func.functional_call(self.net, effective, (x,))


def slow_static_graph(graph: StaticGraph, mask: Tensor, x: Tensor) -> Tensor:
    """A static graph evaluated node by node and edge by edge, from the definition."""
    levels = graph.levels
    starts = [sum(levels.sizes[:i]) for i in range(len(levels.sizes) + 1)]
    level_of = [next(i for i in range(len(levels.sizes)) if v < starts[i + 1]) for v in range(levels.num_sources)]

    def function(node: int, value: Tensor) -> Tensor:
        level = level_of[node]
        module, inside = graph.nodes[level], node - starts[level]
        whole = torch.zeros(value.shape[0], levels.sizes[level], *value.shape[1:])
        whole[:, inside] = value
        return module(whole)[:, inside]

    states: dict[int, Tensor] = {v: function(v, x[:, v]) for v in range(levels.num_inputs)}
    shape = next(iter(states.values())).shape

    def total(row: int, below: int) -> Tensor:
        value = torch.zeros(shape)
        for u in range(levels.num_sources):
            if level_of[u] < below and mask[row, u]:
                value = value + graph.weight[row, u] * states[u]
        return value

    for v in range(levels.num_inputs, levels.num_sources):
        row = v if levels.shared_outputs else v - levels.num_inputs
        states[v] = function(v, total(row, level_of[v]))
    rows = levels.shape[0]
    return torch.stack([total(row, len(levels.sizes)) for row in range(rows - levels.num_outputs, rows)], dim=1)
