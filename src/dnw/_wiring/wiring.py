"""The wiring as its user sees it: a mapping from the names of the wired parameters to their edges.

Contract: whatever is asked is answered as of the end of the last step, or, in the middle of one, as of its beginning. With
sharded parameters (DTensor) every process works on its own part; selecting takes messages, questions do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from dnw._checks import one_of
from dnw._rules.dormant import Dormant
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.average import project_average
from dnw._wiring.edges import Summary, SummaryRow
from dnw._wiring.exchange import Exchange, exclusive
from dnw._wiring.hooks import Hooks
from dnw._wiring.membership import Members
from dnw._wiring.parameters import LeftOut
from dnw._wiring.pools import Pools
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.travel import Travel
from dnw._wiring.weights import Weights
from dnw._wiring.wired_layer import WiredLayer
from dnw._wiring.wired_parameter import WiredParameter


class Wiring(Mapping[str, WiredParameter]):
    """The wiring of a model: a mapping from the names of the wired parameters to their edges.

    Made by :func:`wire`. ``wiring["conv1.weight"].active`` is a mask, ``.latent`` the dense weights, ``.entered`` the
    edges that the last step brought in; ``print(wiring.summary())`` shows every layer and what was left out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: Rule,
        layers: list[WiredLayer],
        pools: list[Pool],
        left: list[LeftOut],
        dormant: Dormant,
        schedule: DensitySchedule | None,
        check_ranks: bool,
        check_finite: bool | None,
        step: int = 0,
    ) -> None:
        first = pools
        if rule.redistributes:
            pools = [Pool(list(layers), sum(pool.k for pool in pools), budget=sum(pool.budget for pool in pools))]
        self._weights = weights = Weights(optimizer, rule, layers, Pools(pools, rule, schedule), dormant)
        self._exchange = Exchange(weights, Members(model, layers), check_ranks, check_finite)
        self._travel = Travel(self._exchange)
        self._left = left
        weights.step = step
        with torch.no_grad():
            self._travel.adopt([layer for layer in layers if layer.active is None])
            weights.pools.choose([pool for pool in first if any(x.active is None for x in pool.layers)])
            rule.prepare(pools)
            for layer in layers:
                layer.begin(rule)
        for pool in pools:
            pool.num_active = pool.k
        self._hooks = Hooks(self._exchange, self._travel)
        for layer in layers:
            weights.clear_momentum(layer)
            weights.enter_state(layer)

    @exclusive
    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or deep, is a wiring of the copied parameters that steps with the copied optimizer.

        The hooks of an optimizer do not travel with it: copy the model, the optimizer and the wiring together.

        Raises:
            TypeError: parameters are sharded; such a wiring is saved with torch.distributed.checkpoint.
        """
        weights, exchange = self._weights, self._exchange
        if any(x.shard is not None for x in weights.layers):
            raise TypeError("a wiring of sharded parameters cannot be copied; save it with torch.distributed.checkpoint")
        exchange.catch_up()
        layers, pools = weights.layers, list(weights.pools)
        model = exchange.members.model
        model = nn.ModuleList([layer.module for layer in layers]) if model is None else model
        choices = (self._left, weights.dormant, weights.pools.schedule, exchange.ranks_to_check, exchange.check_finite)
        return Wiring, (model, weights.optimizer, weights.rule, layers, pools, *choices, weights.step)

    # --- a mapping ---

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> WiredParameter:
        for layer in self._weights.layers:
            if layer.name == name:
                return WiredParameter(self._exchange, layer)
        raise KeyError(f"no wired parameter {name!r}{one_of(name, self)}")

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self._weights.layers)

    def __len__(self) -> int:
        return len(self._weights.layers)

    def __repr__(self) -> str:
        return f"<Wiring of {len(self)} parameter{'s' * (len(self) != 1)} by {self.rule!r}, {self.step} steps>"

    # --- what may be asked of all of it ---

    @property
    def rule(self) -> Rule:
        """How active edges are chosen."""
        return self._weights.rule

    @property
    def dormant(self) -> Dormant:
        """What weight decay and momentum do to dormant edges."""
        return self._weights.dormant

    @property
    def schedule(self) -> DensitySchedule | None:
        """How the number of active edges falls during training; None where it is constant."""
        return self._weights.pools.schedule

    @property
    def is_settled(self) -> bool:
        """Whether the model holds the weights that the rule evaluates with; see :meth:`settled`."""
        return self._weights.is_settled

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return self._weights.step

    @property
    def num_active(self) -> int:
        """Active edges over all wired parameters."""
        return self.summary().active

    @property
    def num_candidates(self) -> int:
        """Candidate edges over all wired parameters."""
        return sum(p.num_candidates for p in self.values())

    def summary(self) -> Summary:
        """A table per layer: candidates, active, density; what was left out and why; the totals."""
        self._travel.warn_of_missing()
        layers = self._weights.layers
        sharded = any(x.shard is not None for x in layers)  # then the numbers are known without messages
        with nullcontext() if sharded else self._exchange.question():
            rows = [SummaryRow(x.name, x.shape, x.num_candidates, x.count()) for x in layers]
        return Summary(tuple(rows), tuple(self._left))

    def stats(self, since: int | None = None) -> dict[str, Any]:
        """What a log wants to know, as plain numbers: of each layer and in all.

        Args:
            since: a step at which this was asked before, one of the last eight times, from which entered and left edges are
                counted; by default the last time.

        Returns:
            ``step``; ``layers``, by name; ``total``. Each holds ``candidates``, ``active``, ``density``; ``entered`` and
            ``left``, 0 the first time; ``ever_active``, the share of candidates that has been active since the first time;
            and, of parameters that are not sharded, ``dead_targets`` and ``dead_sources``: rows and columns of the weight
            that have candidates and no active edge.

        Raises:
            ValueError: nobody has asked at that step.
        """
        with self._exchange.question():
            return self._weights.statistics.ask(self._weights.layers, self.step, since)

    def to_json(self) -> str:
        """The whole wiring as JSON: for every wired parameter its shape, sizes and edges (target, source, weight)."""
        return json.dumps({"format": 1, "layers": [p.edges().to_dict() for p in self.values()]})

    # --- what changes it ---

    @exclusive
    @torch.no_grad()
    def project(self, averaged: nn.Module | None = None) -> None:
        """Puts the effective weights in place now: takes over values written to the model, selects, projects.

        Args:
            averaged: an average of the model's weights over time (EMA, SWA) to project instead. Its edges have been those
                of many steps, so it has more than k of them; after this it has the k of largest magnitude. Estimate the
                statistics of its norms again then (``torch.optim.swa_utils.update_bn``).

        Raises:
            ValueError: the average lacks a wired parameter, or has it in another shape.
        """
        self._exchange.catch_up()
        if averaged is None:
            self._weights.select(self._weights.layers)
        else:
            project_average(self._weights, averaged)

    @exclusive
    @torch.no_grad()
    def restart(self) -> None:
        """Starts from what the model holds now: its weights, zeros included, become the latent weights.

        For a sparse network that was loaded into a wired model. What a write meant cannot always be told from the values (a
        network with the same edges looks like a rescaled one), so without this the latent weights of dormant edges may stay.
        """
        self._exchange.undo_open_step()
        for layer in self._weights.layers:
            layer.follow()
            require_finite(layer.name, layer.held.detach(), layer.shard)
        for layer in self._weights.layers:
            layer.latent.copy_(layer.held)
        self._weights.select(self._weights.layers)

    @exclusive
    @torch.no_grad()
    def synchronize(self) -> None:
        """Gives every process the latent weights and edges of rank 0, as DistributedDataParallel does with parameters.

        For training scripts in which the optimizer is made, and wired, before the model is wrapped: call it on every
        process once the model is. Sharded parameters are left alone.

        Raises:
            RuntimeError: there is no process group.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError("synchronize: there is no process group; without one there is nothing to make equal")
        self._exchange.catch_up()
        weights = self._weights
        for layer in weights.layers:
            if layer.shard is None:
                layer.follow()
                assert layer.active is not None
                pool, bits = weights.pools[layer], layer.active.to(torch.uint8)
                counters = torch.tensor([layer.seed, layer.step, weights.step, pool.k], device=layer.latent.device)
                for tensor in (layer.latent, bits, counters):
                    torch.distributed.broadcast(tensor, src=0)
                layer.activate(bits.bool())
                layer.seed, layer.step, weights.step, pool.k = counters.tolist()
                pool.num_active = pool.k
                layer.remember()
        weights.pools.prepare(weights.layers)
        for layer in weights.layers:
            weights.write(layer)
            weights.clear_momentum(layer)
            weights.enter_state(layer)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The weights that the rule evaluates with, inside the ``with``; the same as in training for most rules.

        ``optimizer.step()`` is refused inside.
        """
        weights, exchange = self._weights, self._exchange
        exchange.catch_up()
        before = weights.is_settled
        try:
            weights.is_settled = True
            exchange.write_all()
            yield
            exchange.catch_up()
        finally:
            weights.is_settled = before
            exchange.write_all()

    @exclusive
    @torch.no_grad()
    def remove(self, keep: Literal["sparse", "latent"] = "sparse") -> None:
        """Takes the wiring off again: the optimizer goes on as a plain one, on dense parameters.

        What has been written to the model since the last step is taken over first, as before a step.

        Args:
            keep: what stays in the model: the effective weights that it is evaluated with ("sparse") or the dense latent ones
                ("latent").

        Raises:
            ValueError: ``keep`` is neither, or NaN or infinity was written to the model.
        """
        if keep not in ("sparse", "latent"):
            raise ValueError(f"keep={keep!r}: allowed are 'sparse' and 'latent'")
        weights = self._weights
        self._exchange.undo_open_step()
        if all(layer.is_alike for layer in weights.layers):  # or the model was converted, and what it holds stays
            self._exchange.catch_up()
        for layer in weights.layers:
            if keep == "latent":
                layer.write(layer.latent)
            elif weights.rule.settles:
                layer.write(weights.rule.settle(layer))
            weights.leave_state(layer)
        self._hooks.remove()
        weights.layers, weights.pools = [], Pools([], weights.rule, weights.pools.schedule)
