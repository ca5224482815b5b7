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

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from dnw._checks import did_you_mean, listing
from dnw._dormant import Dormant
from dnw._edges import Summary, SummaryRow
from dnw._guard import EvaluationGuard
from dnw._layer import WiredLayer
from dnw._parameters import LeftOut, Wirable, parameters_named
from dnw._patterns import Pattern
from dnw._ranks import check_ranks, gathered, local_optimizer
from dnw._rule import Layer, Pool, Rule
from dnw._schedules import DensitySchedule
from dnw._shards import local
from dnw._state import FORMAT, STATE_KEYS, check_entry
from dnw._step import evaluate_closure, steps_on_the_stack
from dnw._wired_parameter import WiredParameter

WIRED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weak references to the wirings, by wired parameter, so that none is wired twice."""


class Wiring(Mapping[str, WiredParameter]):
    """The wiring of a model: a mapping from the names of the wired parameters to their edges.

    Made by :func:`wire`. ``wiring["conv1.weight"].active`` is a mask, ``.latent`` the dense weights, ``.entered`` the
    edges that the last step brought in; ``print(wiring.summary())`` shows every layer and what was left out.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        layers: list[WiredLayer],
        pools: list[Pool],
        left: list[LeftOut],
        dormant: Dormant,
        schedule: DensitySchedule | None,
        check_ranks: bool,
    ) -> None:
        self.rule = rule
        self.dormant = dormant
        self.schedule = schedule
        self.is_settled = False
        self._optimizer = optimizer
        self._layers = layers
        first = pools
        if rule.redistributes:
            pools = [Pool(list(layers), sum(pool.k for pool in pools), budget=sum(pool.budget for pool in pools))]
        self._pool_of = {id(layer): pool for pool in pools for layer in pool.layers}
        self._left = left
        self._step = 0
        self._open = False
        self._nested = 0
        self._finishing: list[tuple[WiredLayer, Tensor]] = []
        self._finished_step = 0
        self._selecting = False
        self._kept: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        self._incoming: dict[str, dict[str, Tensor]] | None = None
        self._ranks_to_check = check_ranks
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
        self._register()

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
        found = [Wirable(x.name, "", x.module, x.parameter, x.candidates, x.is_graph) for x in self._layers]
        entries, patterns = [self._entry(layer) for layer in self._layers], [layer.pattern for layer in self._layers]
        rest = (self._left, self.dormant, self.schedule, self._ranks_to_check)
        return _copied, (self._optimizer, self.rule, found, entries, patterns, members, *rest)

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
        return local_optimizer(self._optimizer).state

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
        if not any(x.shard is not None for x in self._layers):  # of sharded layers the number is known without messages
            self._look()
        rows = [SummaryRow(x.name, x.shape, x.num_candidates, x.count()) for x in self._layers]
        return Summary(tuple(rows), tuple(self._left))

    def to_json(self) -> str:
        """The whole wiring as JSON: for every wired parameter its shape, sizes and edges (target, source, weight)."""
        import json

        return json.dumps({"format": 1, "layers": [p.edges().to_dict() for p in self.values()]})

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
                self._pool_of[id(layer)].num_active = 0
                layer.seed, layer.step, self._step, self._pool_of[id(layer)].k = counters.tolist()
                layer.remember()
        self._prepare(self._layers)
        for layer in self._layers:
            layer.write(self._effective(layer))
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

    @torch.no_grad()
    def _write_all(self) -> None:
        for layer in self._layers:
            layer.write(self._effective(layer))

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
        self._handles = [
            optimizer.register_step_pre_hook(uncompiled(self._before_step)),
            optimizer.register_step_post_hook(uncompiled(self._after_step)),
            optimizer.register_state_dict_pre_hook(lambda _: self._catch_up()),
            optimizer.register_state_dict_post_hook(self._add_to_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._take_from_state_dict),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        if self.rule.settles:
            guard = EvaluationGuard(self)
            modules = {id(layer.module): layer.module for layer in self._layers}.values()
            self._handles += [module.register_forward_pre_hook(guard) for module in modules]
        for layer in self._layers:
            WIRED[layer.parameter] = weakref.ref(self)
            self._enter_state(layer)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._open and steps_on_the_stack(optimizer) > 1:  # a subclass's step has called that of its base class
            self._nested += 1
            return args, kwargs
        if self.is_settled:
            raise RuntimeError("optimizer.step() inside `with wiring.settled():`; train outside it")
        self._roll_back()
        args, kwargs = evaluate_closure(args, kwargs)
        self._check_held()
        if self._ranks_to_check:
            check_ranks(self._layers, {x.name: self._pool_of[id(x)].k for x in self._layers})
            self._ranks_to_check = False
        stepping = [layer for layer in self._layers if layer.parameter.grad is not None]
        competing = [layer for pool in self._pools_of(stepping) for layer in pool.layers]
        if written := [x for x in competing if isinstance(x, WiredLayer) and self._take_over_writes(x)]:
            self._select(written)
        scale = getattr(optimizer, "grad_scale", None)
        self._open = True
        self._kept = {}
        for layer in stepping:
            given = layer.local_grad()
            layer.see_state(self._state.get(layer.parameter, {}))
            layer.grad = given if scale is None else given / scale
            grad = self.rule.gradient(layer)
            if not self.rule.selects_by_gradient:
                layer.grad = None
            elif scale is None and (grad is None or grad.data_ptr() == given.data_ptr()):
                layer.grad = given.clone()  # some optimizers change the gradient in place
            if grad is not None and scale is not None:
                grad = grad * scale
            self._leave_state(layer)
            layer.lend(self.dormant.shown(layer), grad)
            if self.dormant.momentum == "hold":
                assert layer.active is not None
                self._kept[layer.name] = layer.active.clone(), self.dormant.kept(layer)
        return args, kwargs

    def _check_held(self) -> None:
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for layer in self._layers:
            if id(layer.parameter) not in held:
                raise RuntimeError(
                    f"the wired parameter {layer.name!r} is no longer in its optimizer; take the wiring off with "
                    "wiring.remove() before exchanging parameters, and wire again"
                )

    def _pools_of(self, layers: Sequence[WiredLayer]) -> list[Pool]:
        """The pools that hold one of the layers."""
        return list({id(pool): pool for pool in (self._pool_of[id(layer)] for layer in layers)}.values())

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self._nested:
            self._nested -= 1
            return
        if not self._open:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._roll_back()  # a fused optimizer skipped this step
            return
        stepped = [layer for layer in self._layers if layer.exchanged]
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
        self._finished_step = self._step + 1
        self._finishing = [(layer, self.rule.updated(layer, self.dormant.updated(layer, layer.held))) for layer in stepped]
        self._finish_step()

    def _finish_step(self) -> None:
        """Takes over what the base optimizer made. If it is interrupted, whatever comes next does it again."""
        stepped = [layer for layer, _ in self._finishing]
        for layer, latent in self._finishing:
            layer.latent.copy_(latent)
        self._finishing = [(layer, layer.latent) for layer in stepped]  # the parameters are written from here on
        for layer in self._layers:
            if self._selecting:  # interrupted before: the same selection again, from the same edges
                layer.activate(layer.previous)
                self._pool_of[id(layer)].num_active = 0
            else:
                layer.remember()
        self._selecting = True
        self._select(stepped, step=self._finished_step)
        self._close(stepped)
        self._step = self._finished_step
        for layer in self._layers:
            layer.grad = None
            self._enter_state(layer, even_alone=layer in stepped)
        self._open, self._selecting, self._finishing = False, False, []

    def _is_template_step(self) -> bool:
        """Whether a step had learning rate 0 and zero gradients: how torch.distributed.checkpoint makes optimizer state."""
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        if any(lr is None or (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0 for lr in rates):
            return False
        return not any(x.total(x.local_grad()) for x in self._layers if x.parameter.grad is not None)

    def _close(self, stepped: Sequence[WiredLayer]) -> None:
        """Does to the momentum of dormant edges what is to be done, also in layers that traded edges without stepping."""
        traded = [x for pool in self._pools_of(stepped) for x in pool.layers] if self.dormant.momentum == "zero" else stepped
        for layer in traded:
            assert layer.active is not None
            self.dormant.apply(layer, *self._kept.get(layer.name, (layer.active, {})))

    @torch.no_grad()
    def _roll_back(self) -> None:
        """Undoes an unfinished step: parameters get their effective weights back, latents were never touched.

        A step that the base optimizer has finished is finished here, too.
        """
        if self._finishing:
            self._finish_step()
        self._open, self._nested, self._kept = False, 0, {}
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
        for pool in pools if step is not None else []:
            self._schedule_pool(pool, step)  # type: ignore[arg-type]
        changed = self._choose(pools, stepped=step is not None) if not self.rule.fixed else []
        changed += self._prepare(layers)
        projected = {id(layer): layer for layer in [*layers, *changed]}.values()
        for layer in projected:
            if layer.exchanged:
                layer.take_back()
            layer.write(self._effective(layer))

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
            self._count(pool)
            pool.num_active = pool.k
        return changed

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

    def _look(self) -> None:
        """Before a question: catches up, or, in the middle of a step, leaves everything as it was before that step."""
        if not (self._open and steps_on_the_stack(self._optimizer)):
            self._catch_up()

    def _undo_open_step(self) -> None:
        if self._open and steps_on_the_stack(self._optimizer):
            raise RuntimeError(
                "the wiring cannot be changed or saved in the middle of optimizer.step(); a step hook that does so belongs "
                "after the step"
            )
        self._roll_back()

    def _catch_up(self) -> None:
        """Brings model and wiring together: undoes an unfinished step, takes over writes, selects where there were any."""
        self._undo_open_step()
        written = [layer for layer in self._layers if self._take_over_writes(layer)]
        if written:
            self._select(written)

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
        even_alone = even_alone and local_optimizer(self._optimizer) is self._optimizer
        if even_alone or self._state.get(layer.parameter):
            self._state[layer.parameter].update(self._entry(layer))

    def _leave_state(self, layer: WiredLayer) -> None:
        if layer.parameter in self._state:
            for key in STATE_KEYS:
                self._state[layer.parameter].pop(key, None)

    def _packed_ids(self, state_dict: dict[str, Any]) -> dict[str, int]:
        """The key under which each wired parameter stands in an optimizer state dict of the same parameter groups."""
        ids = {}
        for group, packed in zip(self._optimizer.param_groups, state_dict["param_groups"], strict=False):
            ids.update({id(p): key for p, key in zip(group["params"], packed["params"], strict=False)})
        return {layer.name: ids[id(layer.parameter)] for layer in self._layers if id(layer.parameter) in ids}

    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._check_held()
        ids = self._packed_ids(state_dict)
        for layer in self._layers:
            state_dict["state"][ids[layer.name]] = {
                **state_dict["state"].get(ids[layer.name], {}),
                **self._entry(layer),
            }
        if self._state and all(set(entry) == set(STATE_KEYS) for entry in self._state.values()):
            # It has stepped and made no state. torch.distributed.checkpoint wants entries of all parameters or of none.
            for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
                for parameter, key in zip(group["params"], packed["params"], strict=True):
                    if parameter.requires_grad:
                        state_dict["state"].setdefault(key, {})

    def _take_from_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes what is ours out of an incoming state dict, checked, before the base class casts or rejects it."""
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
        for group, packed in zip(self._optimizer.param_groups, state_dict["param_groups"], strict=False):
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
        self._pool_of[id(layer)].num_active = 0
        if layer.active is None:
            layer.active = active
        else:
            layer.activate(active)
            layer.remember()
        _, step, layer.step, layer.seed, self._pool_of[id(layer)].k = entry["wiring"].tolist()
        self._step = max(self._step, step)

    @torch.no_grad()
    def _loaded(self, optimizer: Optimizer) -> None:
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
            layer.write(self._effective(layer))
            self._enter_state(layer)
        for pool in self._pools_of(self._layers):
            self._count(pool)
        self._select([layer for layer in self._layers if layer.name not in incoming])


def _copied(
    optimizer: Optimizer,
    rule: Rule,
    found: list[Wirable],
    entries: list[dict[str, Tensor]],
    patterns: list[Pattern | None],
    members: list[tuple[list[int], int, int]],
    left: list[LeftOut],
    dormant: Dormant,
    schedule: DensitySchedule | None,
    check_ranks: bool,
) -> Wiring:
    """Rebuilds a wiring from copied parts."""
    layers = [WiredLayer(f, 0, e["latent"].dtype, p) for f, e, p in zip(found, entries, patterns, strict=True)]
    shown = [bool(optimizer.state.get(layer.parameter)) for layer in layers]
    for layer, entry in zip(layers, entries, strict=True):
        optimizer.state[layer.parameter].update(entry)  # to be adopted
    pools = [Pool([layers[i] for i in indices], k, budget=budget) for indices, k, budget in members]
    wiring = Wiring(optimizer, rule, layers, pools, left, dormant, schedule, check_ranks)
    for layer, beside in zip(layers, shown, strict=True):
        if not beside:
            del optimizer.state[layer.parameter]
    return wiring
