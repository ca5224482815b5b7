"""The wiring: dense latent weights that live with the optimizer, sparse effective ones in the model.

Contract: between steps every wired parameter holds its effective weight. Around ``optimizer.step()`` the latent weight
is exchanged in and out by the optimizer's public hooks, so the base optimizer updates latent weights with the gradient of
the effective ones: the straight-through estimator, bit for bit (Wortsman et al., 2019, section 2.2). The wiring owns the
latent weights; the optimizer's state shows them only where the base optimizer has state of its own for the parameter,
because optimizers that initialise lazily take any state for their own.

With sharded parameters (DTensor) every process works on its own part; selecting takes messages, questions do not.

A latent is touched only when a step has ended. A step that raises is rolled back by whatever comes next: the next step, a
saved state, or any question to the wiring.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw._checks import did_you_mean, listing
from dnw._rules.dormant import Dormant, keeps_zeros
from dnw._rules.layer import Layer
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.patterns import Pattern
from dnw._selection.schedules import DensitySchedule
from dnw._selection.shards import local
from dnw._wiring import one_pass
from dnw._wiring.edges import Summary, SummaryRow
from dnw._wiring.foreign import (
    averaging_methods,
    chain,
    evaluates_first,
    has_state_hooks,
    loads_in_its_own_way,
    parts,
    step_with_hooks,
)
from dnw._wiring.guard import EvaluationGuard
from dnw._wiring.layer import WiredLayer, is_in_place
from dnw._wiring.membership import WIRED, Members, gone, watch_other_optimizers
from dnw._wiring.parameters import LeftOut, Wirable, parameters_named
from dnw._wiring.ranks import check_ranks, gathered, local_optimizer
from dnw._wiring.state import FORMAT, STATE_KEYS, check_entry
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.stats import Statistics
from dnw._wiring.step import OpenStep, closure_of, run_exchanged, steps_on_the_stack, with_closure
from dnw._wiring.wired_parameter import WiredParameter
from dnw.graphs._paths import has_path
from dnw.kernels._exchange import each, is_finite, masked

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _exclusive(method: _Method) -> _Method:
    """A method that changes a wiring: questions and changes of other threads wait for it."""

    @wraps(method)
    def run(self: Wiring, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, run)


@dataclass(frozen=True, eq=False)
class _Replaced:
    """A method of one optimizer that a function stands in the place of."""

    optimizer: Optimizer
    name: str
    function: Callable[..., Any]
    own: Callable[..., Any] | None

    def remove(self) -> None:
        if vars(self.optimizer).get(self.name) is not self.function:
            return  # another wiring has put its own around it, which passes the call on
        if self.own is None:
            vars(self.optimizer).pop(self.name, None)
        else:
            setattr(self.optimizer, self.name, self.own)


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
    ) -> None:
        self.rule = rule
        self.dormant = dormant
        self.schedule = schedule
        self.is_settled = False
        self._members = Members(model, layers)
        self._optimizer = optimizer
        self._chain = chain(optimizer)
        self._loads_around = False
        self._layers = layers
        first = pools
        if rule.redistributes:
            pools = [Pool(list(layers), sum(pool.k for pool in pools), budget=sum(pool.budget for pool in pools))]
        self._pool_of = {id(layer): pool for pool in pools for layer in pool.layers}
        self._left = left
        self._step = 0
        self._lock = threading.RLock()  # questions of other threads wait while a step is taken over
        self._open: OpenStep | None = None
        self._incoming: dict[str, dict[str, Tensor]] | None = None
        self._ranks_to_check = check_ranks
        self._finite = check_finite
        self._known_empty: set[str] = set()
        self._statistics = Statistics()
        self._handles: list[Any] = []
        with torch.no_grad():
            for layer in layers:
                self._adopt(layer)
            self._choose([pool for pool in first if any(x.active is None for x in pool.layers)])
            rule.prepare(pools)
            for layer in layers:
                assert layer.active is not None
                layer.previous = layer.active.clone()
                layer.write(rule.project(layer))
        for pool in self._pools_of(layers):
            pool.num_active = pool.k
        self._warn_of_empty(layers)
        self._warn_of_cut(layers)
        self._register()

    @_exclusive
    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or deep, is a wiring of the copied parameters that steps with the copied optimizer.

        The hooks of an optimizer do not travel with it: copy the model, the optimizer and the wiring together.

        Raises:
            TypeError: parameters are sharded; such a wiring is saved with torch.distributed.checkpoint.
        """
        if any(x.shard is not None for x in self._layers):
            raise TypeError("a wiring of sharded parameters cannot be copied; save it with torch.distributed.checkpoint")
        self._catch_up()
        pools = {id(pool): pool for pool in self._pool_of.values()}.values()
        members = [([self._layers.index(x) for x in p.layers], p.k, p.budget) for p in pools]  # type: ignore[arg-type]
        found = [Wirable(x.name, "", x.module, x.parameter, x.candidates, x.is_graph, x.layout) for x in self._layers]
        entries, patterns = [self._entry(layer) for layer in self._layers], [layer.pattern for layer in self._layers]
        floors = [(layer.least, layer.least_per_target) for layer in self._layers]
        rest = (self._left, self.dormant, self.schedule, self._ranks_to_check, self._finite)
        return _copied, (self._members.model, self._optimizer, self.rule, found, entries, patterns, floors, members, *rest)

    def _adopt(self, layer: WiredLayer) -> None:
        """Continues what a copied or unpickled optimizer carries for a parameter."""
        carried = self._state.get(layer.parameter, {})
        ours = {key: carried[key] for key in STATE_KEYS if key in carried}
        if not ours:
            return
        if not isinstance(ours.get("wiring"), Tensor) or ours["wiring"].dtype != torch.int64:
            raise ValueError(
                f"the optimizer was given a wired state for {layer.name!r} before it was wired, and has rounded it; wire "
                "first, then load the state"
            )
        check_entry(layer, ours, self._pool_of[id(layer)], self.rule, self.schedule)
        self._take(layer, ours)

    @property
    def _state(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's state on this process."""
        return local_optimizer(self._chain[-1]).state

    # --- what a user asks ---

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> WiredParameter:
        for layer in self._layers:
            if layer.name == name:
                return WiredParameter(self, layer)
        raise KeyError(f"no wired parameter {name!r}{did_you_mean(name, self)}; there are {listing(self)}")

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"<Wiring of {len(self)} parameters by {self.rule!r}, {self._step} steps>"

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return self._step

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
        self._warn_of_missing()
        sharded = any(x.shard is not None for x in self._layers)  # then the numbers are known without messages
        with nullcontext() if sharded else self._question():
            rows = [SummaryRow(x.name, x.shape, x.num_candidates, x.count()) for x in self._layers]
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
            without an active edge.

        Raises:
            ValueError: nobody has asked at that step.
        """
        with self._question():
            return self._statistics.ask(self._layers, self._step, since)

    def to_json(self) -> str:
        """The whole wiring as JSON: for every wired parameter its shape, sizes and edges (target, source, weight)."""
        import json

        return json.dumps({"format": 1, "layers": [p.edges().to_dict() for p in self.values()]})

    @_exclusive
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
        self._catch_up()
        if averaged is None:
            self._select(self._layers)
            return
        copies: dict[int, Layer] = {}
        targets: list[tuple[Tensor, Layer]] = []
        for layer, parameter in zip(self._layers, parameters_named(averaged, list(self)), strict=True):
            if parameter is layer.parameter:
                raise ValueError("this is the wired model itself, not an average of it; leave the argument out")
            if parameter.shape != layer.parameter.shape:
                raise ValueError(
                    f"{layer.name!r} has shape {tuple(parameter.shape)} in the average and {layer.shape} in the wired model"
                )
            latent = local(parameter).to(device=layer.latent.device, dtype=layer.latent.dtype, copy=True)
            assert layer.active is not None
            copy = Layer(
                layer.name,
                latent,
                layer.candidates,
                layer.seed,
                layer.active,
                step=layer.step,
                shard=layer.shard,
                pattern=layer.pattern,
                least=layer.least,
                least_per_target=layer.least_per_target,
                layout=layer.layout,
            )
            copies[id(layer)] = copy
            targets.append((local(parameter), copy))
        pools = [Pool([copies[id(x)] for x in pool.layers], pool.k) for pool in self._pools_of(self._layers)]
        if not self.rule.fixed:
            for pool, masks in zip(pools, self.rule.select(pools), strict=True):
                for copy, mask in zip(pool.layers, masks, strict=True):
                    copy.active = mask
        self.rule.prepare(pools)
        for target, copy in targets:
            target.copy_(self.rule.settle(copy))

    @_exclusive
    @torch.no_grad()
    def restart(self) -> None:
        """Starts from what the model holds now: its weights, zeros included, become the latent weights.

        For a sparse network that was loaded into a wired model. What a write meant cannot always be told from the values (a
        network with the same edges looks like a rescaled one), so without this the latent weights of dormant edges may stay.
        """
        self._undo_open_step()
        for layer in self._layers:
            layer.follow()
            layer.latent.copy_(layer.held)
        self._select(self._layers)

    @_exclusive
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
        self._catch_up()
        for layer in self._layers:
            if layer.shard is None:
                layer.follow()
                assert layer.active is not None
                bits = layer.active.to(torch.uint8)
                numbers = [layer.seed, layer.step, self._step, self._pool_of[id(layer)].k]
                counters = torch.tensor(numbers, device=layer.latent.device)
                for tensor in (layer.latent, bits, counters):
                    torch.distributed.broadcast(tensor, src=0)
                layer.activate(bits.bool())
                pool = self._pool_of[id(layer)]
                layer.seed, layer.step, self._step, pool.k = counters.tolist()
                pool.num_active = pool.k
                layer.remember()
        self._prepare(self._layers)
        for layer in self._layers:
            layer.write(self._effective(layer))
            self._clear_momentum(layer)
            self._enter_state(layer)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The weights that the rule evaluates with, inside the ``with``; the same as in training for most rules.

        ``optimizer.step()`` is refused inside.
        """
        self._catch_up()
        before = self.is_settled
        try:
            self.is_settled = True
            self._write_all()
            yield
            self._catch_up()
        finally:
            self.is_settled = before
            self._write_all()

    @_exclusive
    @torch.no_grad()
    def _write_all(self) -> None:
        for layer in self._layers:
            layer.write(self._effective(layer))

    @_exclusive
    @torch.no_grad()
    def remove(self, keep: Literal["sparse", "latent"] = "sparse") -> None:
        """Takes the wiring off again: the optimizer goes on as a plain one, on dense parameters.

        Args:
            keep: what stays in the model: the effective weights that it is evaluated with ("sparse") or the dense latent ones
                ("latent").
        """
        if keep not in ("sparse", "latent"):
            raise ValueError(f"keep={keep!r}: allowed are 'sparse' and 'latent'")
        self._undo_open_step()
        for layer in self._layers:
            if keep == "latent":
                if layer.parameter_dtype == layer.held.dtype:
                    self._take_over_writes(layer)
                with torch.no_grad():
                    layer.write(layer.latent)
            elif self.rule.settles:
                self._take_over_writes(layer)
                layer.write(self.rule.settle(layer))
            self._leave_state(layer)
            del WIRED[layer.parameter]
        for handle in self._handles:
            handle.remove()
        self._layers, self._pool_of, self._handles = [], {}, []

    # --- the exchange around optimizer.step() ---

    def _register(self) -> None:
        optimizer, uncompiled = self._optimizer, torch.compiler.disable
        self._handles = []
        if (step := step_with_hooks(optimizer)) is not None:
            self._put(optimizer, "step", step)
        self._handles += [
            optimizer.register_step_pre_hook(uncompiled(self._before_step)),
            optimizer.register_step_post_hook(uncompiled(self._after_step)),
        ]
        hooks = optimizer._optimizer_step_post_hooks
        if isinstance(hooks, OrderedDict):  # hooks that were there before see what the step has made, as later ones do
            hooks.move_to_end(self._handles[-1].id, last=False)
        for keeper in filter(has_state_hooks, self._chain):
            self._handles += [
                keeper.register_state_dict_pre_hook(lambda _: self._catch_up()),
                keeper.register_state_dict_post_hook(self._add_to_state_dict),
                keeper.register_load_state_dict_pre_hook(self._take_from_state_dict),
                keeper.register_load_state_dict_post_hook(self._loaded),
            ]
        self._surround(optimizer)
        if self.rule.settles:
            guard = EvaluationGuard(self)
            modules = {id(layer.module): layer.module for layer in self._layers}.values()
            self._handles += [module.register_forward_pre_hook(guard) for module in modules]
        watch_other_optimizers()
        for layer in self._layers:
            WIRED[layer.parameter] = weakref.ref(self)
            self._clear_momentum(layer)
            self._enter_state(layer)

    def _surround(self, optimizer: Optimizer) -> None:
        """Puts the exchange around the methods of an optimizer, beside its step, that write to parameters."""
        names = parts(optimizer)
        for name in names:
            begin = partial(self._begin_part, name == names[0])
            self._replace(name, begin, self._end_step if name == names[-1] else self._put_aside)
        for name in averaging_methods(optimizer):
            self._replace(name, self._begin_averaging, self._end_averaging)
        for keeper in self._chain:
            if loads_in_its_own_way(keeper):
                self._put(keeper, "load_state_dict", partial(self._load_around, keeper, keeper.load_state_dict))

    def _replace(self, name: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
        optimizer, method = self._optimizer, getattr(self._optimizer, name)

        def surrounded(*args: Any, **kwargs: Any) -> Any:
            if not self._handles or (self._open and self._open.is_mine and self._open.is_running()):
                return method(*args, **kwargs)  # the wiring is off, or it is a part of what is open already
            return run_exchanged(optimizer, begin, method, end, args, kwargs)

        self._put(optimizer, name, surrounded)

    def _put(self, optimizer: Optimizer, name: str, function: Callable[..., Any]) -> None:
        """Puts a function in the place of a method of one optimizer, until the wiring is taken off."""
        self._handles.append(_Replaced(optimizer, name, function, vars(optimizer).get(name)))
        setattr(optimizer, name, function)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._open and self._open.is_mine and steps_on_the_stack(optimizer) > 1:
            self._open.depth += 1  # a subclass's step has called that of its base class
            return args, kwargs
        self._begin()
        closure = closure_of(args, kwargs)
        if closure is None:
            self._exchange()
            return args, kwargs
        if evaluates_first(optimizer):
            with torch.enable_grad():
                loss = closure()
            self._exchange()
            return with_closure(args, kwargs, lambda: loss)
        self._exchange(all_of_them=True)
        return with_closure(args, kwargs, partial(self._evaluate, closure))

    def _begin(self) -> None:
        """Before an exchange: what may not go on meanwhile, and what is left of the last one."""
        if self.is_settled:
            raise RuntimeError("optimizer.step() inside `with wiring.settled():`; train outside it")
        if self._open and not self._open.is_mine and self._open.is_running():
            raise RuntimeError("optimizer.step() in two threads at once; an optimizer and its wiring take one after the other")
        self._roll_back()

    @_exclusive
    def _exchange(self, all_of_them: bool = False) -> None:
        """Puts the latent weights of the parameters that have a gradient, or of all, in place of the effective ones."""
        self._check_held()
        if missing := self._members.missing(self._layers):
            raise RuntimeError(gone(missing))
        if self._ranks_to_check:
            check_ranks(self._layers, {x.name: self._pool_of[id(x)].k for x in self._layers})
            self._ranks_to_check = False
        stepping = [layer for layer in self._layers if layer.parameter.grad is not None]
        competing = [layer for pool in self._pools_of(stepping) for layer in pool.layers]
        if written := [x for x in competing if isinstance(x, WiredLayer) and self._take_over_writes(x)]:
            self._select(written)
        gradients = self._gradients(stepping)
        self._open = step = OpenStep(self._optimizer, self._step + 1)
        for layer in self._layers if all_of_them else stepping:
            self._leave_state(layer)
            shown = layer.latent if layer.in_place else self.dormant.shown(layer)
            layer.lend(shown if layer.aside is None else layer.aside)
            if self.dormant.momentum == "hold":
                assert layer.active is not None
                step.kept[layer.name] = layer.active.clone(), self.dormant.kept(layer)
        self._lend_gradients(stepping, gradients)

    def _lend_gradients(self, layers: Sequence[WiredLayer], gradients: Sequence[Tensor | None]) -> None:
        assert self._open is not None
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.lend_gradient(gradient)
            self._open.stepping[id(layer)] = layer

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Evaluates a closure on the effective weights of what the parameters hold at this moment; the edges stay."""
        lent = [layer for layer in self._layers if layer.exchanged]
        present = self._show_effective(lent)
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            with torch.no_grad():
                for layer, value in zip(lent, present, strict=True):
                    layer.held.copy_(value)
        with torch.no_grad():
            stepping = [layer for layer in lent if layer.parameter.grad is not None]
            self._lend_gradients(stepping, self._gradients(stepping))
        return loss

    @torch.no_grad()
    def _show_effective(self, layers: Sequence[WiredLayer]) -> list[Tensor]:
        """Puts effective weights in the place of dense ones that parameters hold; returns the latter."""
        present = []
        for layer in layers:
            if layer.latent.dtype != layer.parameter_dtype:
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} evaluates its closure within a step, when {layer.name!r} is in "
                    f"the dtype of its latent weights, {layer.latent.dtype}; wire without latent_dtype"
                )
            layer.give_gradient_back()
            present.append(layer.held.detach().clone())
            layer.held.copy_(self._effective_of(layer, present[-1]))
        return present

    def _effective_of(self, layer: WiredLayer, dense: Tensor) -> Tensor:
        """What the model would hold if these were a layer's latent weights, with the edges that it has."""
        if layer.in_place:
            return self._effective(layer)
        kept, layer.latent = layer.latent, dense
        try:
            return self._effective(layer)
        finally:
            layer.latent = kept

    # --- around other methods of the optimizer ---

    @torch.no_grad()
    def _begin_part(self, is_first: bool) -> None:
        """Before a part of a step: its perturbation, or the step from where that has led."""
        self._begin()
        if is_first:
            for layer in self._layers:
                layer.aside = None
        self._exchange()

    @_exclusive
    @torch.no_grad()
    def _put_aside(self) -> None:
        """After a part of a step that is not its last: the model holds what is perturbed, with the edges that it has."""
        for layer in self._layers:
            if layer.exchanged:
                layer.aside = layer.held.detach().clone()
                effective = self._effective_of(layer, layer.aside)
                layer.take_back()
                layer.write(effective)
                self._enter_state(layer)
        self._open = None

    def _end_step(self) -> None:
        self._after_step(self._optimizer, (), {})

    @_exclusive
    @torch.no_grad()
    def _begin_averaging(self) -> None:
        self._begin()
        self._catch_up()
        self._open = OpenStep(self._optimizer, self._step)
        for layer in self._layers:
            layer.lend(layer.latent)

    @_exclusive
    @torch.no_grad()
    def _end_averaging(self) -> None:
        """The average, or what comes in its place again, are the latent weights from here on."""
        for layer in self._layers:
            layer.take(layer.held.detach())
        self._open = None
        if self.rule.has_latent_weights:
            self._select(self._layers)
        for layer in self._layers:
            if not self.rule.has_latent_weights:  # edges that came in with weight 0 are not to lose for it
                layer.take_back()
                layer.clear_dormant()
                layer.write(self._effective(layer))
            self._enter_state(layer)

    def _load_around(self, keeper: Optimizer, load: Callable[[Any], Any], state_dict: dict[str, Any]) -> Any:
        """Loads a state for an optimizer that does so in its own way, perhaps without running hooks."""
        if not self._handles or not {"state", "param_groups"} <= set(
            state_dict
        ):  # it holds that of the optimizer inside, which is loaded by itself
            return load(state_dict)
        rest = self._take_from_state_dict(keeper, state_dict)
        self._loads_around = True
        try:
            result = load(rest)
        finally:
            self._loads_around = False
        self._loaded(keeper)
        return result

    def _gradients(self, layers: Sequence[WiredLayer]) -> list[Tensor | None]:
        """The gradients that the base optimizer gets; None where it is the one that autograd gave. All layers have one.

        Raises:
            FloatingPointError: one is NaN or infinite. The latent weight would be so too, and rank first.
        """
        is_due = self.rule.is_due(self._step + 1)
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer finds them too large by this
        gradients: list[Tensor | None] = []
        jobs: list[tuple[int, Callable[[], bool]]] = []
        for layer in layers:
            given = layer.local_grad()
            layer.see_state(self._state.get(layer.parameter, {}))
            layer.grad = given if scale is None else given / scale
            gradient = self.rule.gradient(layer)
            selects = is_due and self.rule.selects_by_gradient
            if not selects:
                layer.grad = None
            elif scale is None and (gradient is None or gradient.data_ptr() == given.data_ptr()):
                layer.grad = given.clone()  # some optimizers change the gradient in place
            if gradient is not None and scale is not None:
                gradient = gradient * scale
            found, check = given if gradient is None else gradient, self._checks(layer)
            if self._is_masked(layer):
                assert layer.active is not None
                gradient = layer.buffer(found)
                work = partial(masked, found, layer.active, gradient, check=check, check_all=check and selects)
            else:
                work = partial(is_finite, found) if check else partial(bool, True)
            jobs.append((found.numel() if found.device.type == "cpu" else 0, work))
            gradients.append(gradient)
        for layer, finite in zip(layers, each(jobs), strict=True):
            if self._checks(layer):
                self._require_finite_gradient(layer, finite)
        return gradients

    def _is_masked(self, layer: WiredLayer) -> bool:
        """Whether the gradient of dormant edges, of which the layer has some, is kept from the base optimizer."""
        return not self.rule.needs_dormant_gradient and not self._is_full(layer)

    def _is_full(self, layer: WiredLayer) -> bool:
        """Whether every entry is an active edge."""
        pool = self._pool_of[id(layer)]
        return len(pool.layers) == 1 and pool.k == math.prod(layer.shape)

    def _checks(self, layer: WiredLayer) -> bool:
        """Whether gradients are looked at. A fused optimizer that takes part in gradient scaling skips such steps itself."""
        if getattr(self._optimizer, "found_inf", None) is not None:
            return False
        return layer.shard is None and layer.latent.device.type == "cpu" if self._finite is None else self._finite

    def _require_finite_gradient(self, layer: WiredLayer, finite: bool) -> None:
        if finite and layer.shard is None:
            return
        bad = layer.total(~layer.local_grad().isfinite())  # of a sharded one all processes must know
        if bad or layer.shard is None:
            raise FloatingPointError(
                f"the gradient of {layer.name!r} has {bad:,} entries that are NaN or infinite; the step is not taken and "
                "nothing has changed. Skip the step, lower the learning rate or clip gradients (wire(..., check_finite=False) "
                "takes such steps)"
            )

    def _check_held(self) -> None:
        held = {id(p) for group in self._chain[-1].param_groups for p in group["params"]}
        for layer in self._layers:
            if id(layer.parameter) not in held:
                raise RuntimeError(
                    f"the wired parameter {layer.name!r} is no longer in its optimizer; take the wiring off with "
                    "wiring.remove() before exchanging parameters, and wire again"
                )

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether a step of an optimizer is a step of this wiring's own, or a part of one."""
        return optimizer in self._chain or (self._in_a_step() and self._open is not None and self._open.is_mine)

    def _pools_of(self, layers: Sequence[WiredLayer]) -> list[Pool]:
        """The pools that hold one of the layers."""
        return list({id(pool): pool for pool in (self._pool_of[id(layer)] for layer in layers)}.values())

    @_exclusive
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        step = self._open
        if step is None:
            return
        if step.depth:
            step.depth -= 1
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._roll_back()  # a fused optimizer skipped this step
            return
        stepped = list(step.stepping.values())
        for layer in self._layers:
            if layer.exchanged and id(layer) not in step.stepping:  # it was lent for a closure that gave it no gradient
                layer.take_back()
                layer.write(self._effective(layer))
        if self._is_template_step():
            self._roll_back()
            for layer in stepped:
                self._enter_state(layer, even_alone=True)
            return
        for layer in (x for pool in self._pools_of(stepped) for x in pool.layers if isinstance(x, WiredLayer)):
            layer.see_state(self._state.get(layer.parameter, {}))
        if self._step == 0 and stepped and self.dormant != self.rule.dormant and not self.dormant.has_effect(stepped):
            warnings.warn(
                f"{self.dormant!r}: momentum={self.dormant.momentum!r} has no effect, because {type(optimizer).__name__} keeps "
                "no momentum",
                stacklevel=2,
            )
        step.results = [(x, x.held if x.in_place else self._updated(x)) for x in stepped]
        self._finish(step)

    def _updated(self, layer: WiredLayer) -> Tensor:
        """The latent weights that the base optimizer and the rule make of a step."""
        return self.rule.updated(layer, self.dormant.updated(layer, layer.held))

    def _finish(self, step: OpenStep) -> None:
        """Takes over what the base optimizer made. If it is interrupted, whatever comes next does it again."""
        stepped = [layer for layer, _ in step.results]
        again = step.selecting
        for pool in self._pools_of(stepped):
            self._schedule_pool(pool, step.number)
            pool.num_active = 0 if again else pool.num_active  # whatever came of the first time is not to be believed
        for layer in self._layers:
            if again:  # the same selection once more, from the same edges
                layer.activate(layer.previous)
            else:
                layer.remember()
        step.selecting = True
        done = [] if again else self._take_in_one_pass(stepped)
        for layer, result in step.results:
            layer.take(result)  # the parameters are written from here on
        self._select([layer for layer in stepped if layer not in done], step=step.number)
        for layer in done:
            layer.step = step.number
            layer.take_back()
            layer.accept()
        self._close(step, stepped)
        self._statistics.see(self._layers)
        self._step = step.number
        for layer in self._layers:
            self._enter_state(layer, even_alone=layer in stepped)
            layer.aside = None
        self._open = None
        for layer in self._layers:  # not earlier: it takes gradients to select once more
            layer.grad = None

    def _take_in_one_pass(self, layers: Sequence[WiredLayer]) -> list[WiredLayer]:
        """Takes over, selects and projects at once the layers that this is possible for; returns those for which it is done."""
        if not self.rule.is_plain or not self.dormant.weight_decay:
            return []
        alone = [(layer, pool) for layer in layers if len((pool := self._pool_of[id(layer)]).layers) == 1]
        fitting = [(layer, pool) for layer, pool in alone if one_pass.fits(layer)]
        done = each([(layer.latent.numel(), partial(one_pass.take_over, layer, pool.k)) for layer, pool in fitting])
        for (_, pool), is_done in zip(fitting, done, strict=True):
            pool.num_active = pool.k if is_done else pool.num_active
        return [layer for (layer, _), is_done in zip(fitting, done, strict=True) if is_done]

    def _is_template_step(self) -> bool:
        """Whether a step had learning rate 0 and zero gradients: how torch.distributed.checkpoint makes optimizer state."""
        rates = [group.get("lr") for group in self._chain[-1].param_groups]
        if any(lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0 for lr in rates):
            return False
        return not any(x.total(x.local_grad()) for x in self._layers if x.parameter.grad is not None)

    def _close(self, step: OpenStep, stepped: Sequence[WiredLayer]) -> None:
        """Does to the momentum of dormant edges what is to be done, also in layers that traded edges without stepping."""
        if self.dormant.momentum == "update" or (self._zeros_stay and not step.exchanged):
            return
        traded = [x for pool in self._pools_of(stepped) for x in pool.layers] if self.dormant.momentum == "zero" else stepped
        for layer in traded:
            assert layer.active is not None
            self.dormant.apply(layer, *step.kept.get(layer.name, (None, {})))

    @_exclusive
    @torch.no_grad()
    def _roll_back(self) -> None:
        """Undoes an unfinished step: parameters get their effective weights back, latents were never touched.

        A step that the base optimizer has finished is finished here, too.
        """
        if self._open and self._open.results:
            self._finish(self._open)
        self._open = None
        for layer in self._layers:
            layer.grad = None
            if layer.exchanged:
                layer.take_back()
                layer.write(self._effective(layer))
                self._enter_state(layer)

    @torch.no_grad()
    def _select(self, layers: Sequence[WiredLayer], step: int | None = None) -> None:
        """Selects anew in every pool that holds one of the layers, and projects what changed."""
        pools = self._pools_of(layers)
        for layer in layers if step is not None else []:
            layer.step = step  # type: ignore[assignment]
        due = [pool for pool in pools if self._is_due(pool, step)]
        if self._open and due:
            self._open.exchanged = True
        changed = self._choose(due, stepped=step is not None)
        changed += self._prepare(layers)
        due_layers = {id(layer) for pool in due for layer in pool.layers}
        for layer in {id(layer): layer for layer in [*layers, *changed]}.values():
            if layer.exchanged:
                layer.take_back()
            unchanged = not self.rule.has_latent_weights and step is not None and id(layer) not in due_layers
            if unchanged and layer.in_place and (self._zeros_stay or self._is_full(layer)):
                layer.accept()
                continue
            if unchanged:
                layer.clear_dormant()
            if not (unchanged and layer.in_place):
                layer.write(self._effective(layer))
            if step is None:
                self._clear_momentum(layer)

    def _is_due(self, pool: Pool, step: int | None) -> bool:
        """Whether a selection can change the edges of a pool: after a step, or after a write to its weights."""
        if self.rule.fixed:
            return False
        return step is None or pool.k != pool.num_active or self.rule.is_due(step)

    @property
    def _zeros_stay(self) -> bool:
        """Whether dormant edges are 0 after a step because they were before, so that nothing need be written to them.

        They have no weights, no gradient and no momentum then, and the base optimizer leaves such entries alone.
        """
        rule = self.rule
        without = not (rule.has_latent_weights or rule.needs_dormant_gradient)
        no_momentum = rule.fixed or self.dormant.momentum == "zero"
        return without and no_momentum and len(self._chain) == 1 and keeps_zeros(self._optimizer)

    def _clear_momentum(self, layer: WiredLayer) -> None:
        """Takes the momentum from dormant edges whose zeros are to stay; whatever chose them, or brought it."""
        if layer.in_place and self._zeros_stay:
            layer.see_state(self._state.get(layer.parameter, {}))
            Dormant(momentum="zero").apply(layer)

    def _choose(self, pools: Sequence[Pool], stepped: bool = False) -> list[WiredLayer]:
        """Gives the layers of some pools the edges that the rule chooses; returns those whose edges changed."""
        changed = []
        for pool in pools:
            pool.stepped = stepped
        for pool, masks in zip(pools, self.rule.select(pools) if pools else [], strict=True):
            for layer, mask in zip(pool.layers, masks, strict=True):
                assert isinstance(layer, WiredLayer)
                if mask.dtype != torch.bool or mask.shape != layer.latent.shape:
                    raise TypeError(
                        f"{type(self.rule).__name__}.select gave edges of {layer.name!r} as {mask.dtype} of shape "
                        f"{tuple(mask.shape)}; expected a boolean mask of shape {tuple(layer.latent.shape)}"
                    )
                if len(pool.layers) > 1 and (layer.active is None or not torch.equal(mask, layer.active)):
                    changed.append(layer)  # it may have traded edges with a layer of its pool
                layer.activate(mask)
            pool.num_active = pool.k
            self._count(pool)
            if stepped and len(pool.layers) > 1:
                self._warn_of_empty([x for x in pool.layers if isinstance(x, WiredLayer)])
        return changed

    def _warn_of_empty(self, layers: Sequence[WiredLayer]) -> None:
        """Warns, once for each, of layers without active edges: nothing passes them but biases."""
        empty = [x.name for x in layers if x.name not in self._known_empty and not x.count()]
        if empty:
            self._known_empty.update(empty)
            warnings.warn(
                f"{listing(empty)} has no active edge left, so nothing passes it; give it a budget of its own, or a floor "
                "(wire(..., floor=dnw.Floor(edges=1)))",
                stacklevel=2,
            )

    def _warn_of_cut(self, layers: Sequence[WiredLayer]) -> None:
        """Warns of graphs whose outputs no input reaches: they compute the same of every input."""
        cut = []
        for layer in layers:
            sizes = [getattr(layer.module, name, None) for name in ("num_inputs", "num_outputs")]
            if layer.is_graph and layer.shard is None and hasattr(layer.module, "node_matrix") and None not in sizes:
                adjacency: Tensor = layer.module.node_matrix(layer.active)  # type: ignore[operator]
                if not has_path(adjacency, *sizes):  # type: ignore[arg-type]
                    cut.append(layer.name)
        if cut:
            warnings.warn(
                f"no path of active edges leads from an input to an output of {listing(cut)}; with more edges, or another "
                "seed, there is one",
                stacklevel=3,
            )

    def _prepare(self, layers: Sequence[WiredLayer]) -> list[WiredLayer]:
        """Lets the rule note what it needs to know of whole pools; returns the layers that this may change."""
        pools = self._pools_of(layers)
        if not pools or type(self.rule).prepare is Rule.prepare:
            return []
        self.rule.prepare(pools)
        return [layer for pool in pools for layer in pool.layers if isinstance(layer, WiredLayer)]

    def _schedule_pool(self, pool: Pool, step: int) -> None:
        """Gives a pool the number of active edges that it has after some steps."""
        if self.schedule is not None:
            unit = pool.unit
            pool.k = self.schedule.num_edges(step, pool.budget // unit, pool.num_candidates // unit) * unit

    def _count(self, pool: Pool) -> None:
        """Notes how many edges each sharded layer of a pool has, so that asking needs no messages."""
        layers = [x for x in pool.layers if isinstance(x, WiredLayer) and x.shard is not None]
        if len(layers) < 2:
            counts = [pool.k] * len(layers)
        else:
            assert layers[0].shard is not None
            local_counts = torch.stack([x.active.count_nonzero() for x in layers if x.active is not None])
            counts = layers[0].shard.sum(local_counts).tolist()
        for layer, count in zip(layers, counts, strict=True):
            layer.num_active = count

    @torch.no_grad()
    def _take_over_writes(self, layer: WiredLayer) -> bool:
        """Takes over what somebody else wrote to a parameter; returns whether to select anew."""
        layer.follow()
        if not layer.is_written():
            return False
        written, replaced = layer.take_over_writes(self._effective(layer), self.rule)
        if replaced and self._step:
            warnings.warn(
                f"another sparse weight was put in place of {layer.name!r}: its dormant edges start from 0 again. To look at "
                "other weights for a while, such as an average, put them into a copy of the model",
                stacklevel=2,
            )
        return written

    def _effective(self, layer: Layer) -> Tensor:
        """What the model holds: the weights to train with, or inside ``settled()`` those to evaluate with."""
        return self.rule.settle(layer) if self.is_settled else self.rule.project(layer)

    def _warn_of_missing(self) -> None:
        if missing := self._members.missing(self._layers):
            warnings.warn(gone(missing), stacklevel=3)

    @contextmanager
    def _question(self) -> Iterator[None]:
        """Answers inside it are those after the last step, or, in the middle of one, those before it."""
        with self._lock:
            if not self._in_a_step():
                self._catch_up()
            yield

    def _in_a_step(self) -> bool:
        """Whether a step is in progress, in whatever thread; not so where it was interrupted."""
        return self._open is not None and self._open.is_running()

    def _undo_open_step(self) -> None:
        if self._in_a_step():
            raise RuntimeError(
                "the wiring cannot be changed or saved in the middle of optimizer.step(); a step hook, or another thread, that "
                "does so must wait until after the step"
            )
        self._roll_back()

    @_exclusive
    def _catch_up(self) -> None:
        """Brings model and wiring together: undoes an unfinished step, takes over writes, selects where there were any."""
        self._undo_open_step()
        written = [layer for layer in self._layers if self._take_over_writes(layer)]
        if written:
            self._select(written)

    @_exclusive
    def _write_latent(self, layer: WiredLayer, value: Tensor) -> None:
        """Puts other latent weights in place, and selects."""
        self._catch_up()
        part = layer.part(value)
        require_finite(layer.name, part, layer.shard)
        layer.latent.copy_(part)
        self._select([layer])

    # --- what travels with the optimizer ---

    def _entry(self, layer: WiredLayer) -> dict[str, Tensor]:
        assert layer.active is not None
        numbers = (FORMAT, self._step, layer.step, layer.seed, self._pool_of[id(layer)].k)
        return {
            "latent": layer.whole(layer.latent),
            "active": layer.whole(layer.active),
            "wiring": torch.tensor(numbers, dtype=torch.int64),
        }

    def _enter_state(self, layer: WiredLayer, even_alone: bool = False) -> None:
        """Shows a layer's entry in the optimizer's state, beside state of the optimizer's own.

        After a step an optimizer that has made no state never makes any, so ours may stand there alone.
        """
        even_alone = even_alone and local_optimizer(self._optimizer) is self._chain[-1]
        if even_alone or self._state.get(layer.parameter):
            self._state[layer.parameter].update(self._entry(layer))

    def _leave_state(self, layer: WiredLayer) -> None:
        if layer.parameter in self._state:
            for key in STATE_KEYS:
                self._state[layer.parameter].pop(key, None)

    def _packed_ids(self, state_dict: dict[str, Any]) -> dict[str, int]:
        """The key under which each wired parameter stands in an optimizer state dict of the same parameter groups."""
        ids = {}
        for group, packed in zip(self._chain[-1].param_groups, state_dict["param_groups"], strict=False):
            ids.update({id(p): key for p, key in zip(group["params"], packed["params"], strict=False)})
        return {layer.name: ids[id(layer.parameter)] for layer in self._layers if id(layer.parameter) in ids}

    @_exclusive
    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._check_held()
        self._warn_of_missing()
        ids = self._packed_ids(state_dict)
        for layer in self._layers:
            require_finite(f"{layer.name} (latent)", layer.latent, layer.shard)  # it could not be loaded again
            state_dict["state"][ids[layer.name]] = {
                **state_dict["state"].get(ids[layer.name], {}),
                **self._entry(layer),
            }
        if self._state and all(isinstance(x, dict) and set(x) == set(STATE_KEYS) for x in self._state.values()):
            # It has stepped and made no state. torch.distributed.checkpoint wants entries of all parameters or of none.
            for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
                for parameter, key in zip(group["params"], packed["params"], strict=True):
                    if parameter.requires_grad:
                        state_dict["state"].setdefault(key, {})

    @_exclusive
    def _take_from_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes what is ours out of an incoming state dict, checked, before the base class casts or rejects it."""
        if self._loads_around:
            return state_dict
        self._undo_open_step()
        self._incoming = None
        ids = self._packed_ids(state_dict)
        state = {key: entry for key, entry in state_dict["state"].items() if entry or entry is None}
        incoming: dict[str, dict[str, Tensor]] = {}
        for layer in self._layers:
            key = ids.get(layer.name)
            if key is None or not state.get(key):
                continue
            entry = dict(state[key] or {})
            ours = {k: entry.pop(k) for k in STATE_KEYS if k in entry}
            if entry:
                state[key] = entry
            else:
                del state[key]
            if ours:
                check_entry(layer, ours, self._pool_of[id(layer)], self.rule, self.schedule)
                incoming[layer.name] = {k: v.detach().clone() for k, v in ours.items()}
        self._drop_unwired(state, state_dict)
        self._incoming = incoming
        for layer in self._layers:
            if layer.latent.dtype != layer.parameter_dtype:  # the base class casts its state to the parameter's dtype
                layer.lend(layer.latent)
        return {**state_dict, "state": state}

    def _drop_unwired(self, state: dict[Any, Any], state_dict: dict[str, Any]) -> None:
        """Takes the latent weights of parameters that no wiring holds out of an incoming state, with a warning."""
        dropped = []
        for group, packed in zip(self._chain[-1].param_groups, state_dict["param_groups"], strict=False):
            for parameter, key in zip(group["params"], packed["params"], strict=False):
                if parameter not in WIRED and state.get(key) and STATE_KEYS[0] in state[key]:
                    state[key] = {k: v for k, v in state[key].items() if k not in STATE_KEYS}
                    dropped.append(f"{tuple(parameter.shape)}")
        if dropped:
            warnings.warn(
                f"the loaded optimizer state holds latent weights for {len(dropped)} parameters that are not wired here (of "
                f"shape {', '.join(dropped[:4])}); they are dropped, and the parameters train on dense",
                stacklevel=4,
            )

    @torch.no_grad()
    def _take(self, layer: WiredLayer, entry: Mapping[str, Tensor]) -> None:
        """Takes over a checked entry of a state dict."""
        layer.latent.copy_(layer.part(entry["latent"]))
        active = layer.part(entry["active"]).to(layer.latent.device, copy=True)
        if layer.active is None:
            layer.active = active
        else:
            layer.activate(active)
            layer.remember()
        pool = self._pool_of[id(layer)]
        _, step, layer.step, layer.seed, pool.k = entry["wiring"].tolist()
        pool.num_active = pool.k
        self._step = max(self._step, step)

    @_exclusive
    @torch.no_grad()
    def _loaded(self, optimizer: Optimizer) -> None:
        if self._loads_around:
            return
        incoming, self._incoming = self._incoming or {}, None
        if local_optimizer(optimizer) is not optimizer:
            incoming = gathered(incoming)
        for layer in self._layers:
            if layer.exchanged:
                layer.take_back()
        without = [layer.name for layer in self._layers if layer.name not in incoming]
        if without:
            warnings.warn(
                f"the loaded optimizer state holds no latent weights for {listing(without)}; they stay as they "
                "are, but for what has been written to the model since",
                stacklevel=3,
            )
        self._step = 0 if incoming else self._step
        for layer in self._layers:
            entry = incoming.get(layer.name)
            if entry is None:
                self._take_over_writes(layer)
                continue
            self._take(layer, entry)
        self._prepare(self._layers)
        for layer in self._layers:
            if layer.name in incoming:
                layer.write(self._effective(layer))
                self._clear_momentum(layer)
        for pool in self._pools_of(self._layers):
            self._count(pool)
        self._select([layer for layer in self._layers if layer.name not in incoming])
        for layer in self._layers:
            self._enter_state(layer)


def _copied(
    model: nn.Module | None,
    optimizer: Optimizer,
    rule: Rule,
    found: list[Wirable],
    entries: list[dict[str, Tensor]],
    patterns: list[Pattern | None],
    floors: list[tuple[int, int]],
    members: list[tuple[list[int], int, int]],
    left: list[LeftOut],
    dormant: Dormant,
    schedule: DensitySchedule | None,
    check_ranks: bool,
    check_finite: bool | None,
) -> Wiring:
    """Rebuilds a wiring from copied parts."""
    in_place = is_in_place(rule, dormant)
    layers = [
        WiredLayer(f, 0, e["latent"].dtype, p, in_place=in_place) for f, e, p in zip(found, entries, patterns, strict=True)
    ]
    for layer, (least, least_per_target) in zip(layers, floors, strict=True):
        layer.least, layer.least_per_target = least, least_per_target
    shown = [bool(optimizer.state.get(layer.parameter)) for layer in layers]
    for layer, entry in zip(layers, entries, strict=True):
        optimizer.state[layer.parameter].update(entry)  # to be adopted
    pools = [Pool([layers[i] for i in indices], k, budget=budget) for indices, k, budget in members]
    model = nn.ModuleList([layer.module for layer in layers]) if model is None else model
    wiring = Wiring(model, optimizer, rule, layers, pools, left, dormant, schedule, check_ranks, check_finite)
    for layer, beside in zip(layers, shown, strict=True):
        if not beside:
            del optimizer.state[layer.parameter]
    return wiring
