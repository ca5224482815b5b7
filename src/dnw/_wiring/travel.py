"""What travels with the optimizer: its state dict holds the latent weights and edges beside state of its own.

Contract: what comes in is checked whole before anything takes it over, and none of it reaches the base optimizer, which would
cast or reject it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._checks import listing
from dnw._wiring.exchange import Exchange, exclusive
from dnw._wiring.membership import WIRED, gone
from dnw._wiring.ranks import gathered, local_optimizer
from dnw._wiring.state import STATE_KEYS, check_entry
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.wired_layer import WiredLayer


class Travel:
    """The entries of the wired parameters, on their way out of an optimizer and into it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._weights = exchange, exchange.weights
        self._incoming: dict[str, dict[str, Tensor]] | None = None
        self._loads_around = False  # whether a load is in progress that what is ours has been taken out of already

    def adopt(self, layers: Sequence[WiredLayer]) -> None:
        """Continues what a copied or unpickled optimizer carries for its parameters."""
        for layer in layers:
            carried = self._weights.state.get(layer.parameter, {})
            ours = {key: carried[key] for key in STATE_KEYS if key in carried}
            if not ours:
                continue
            if not isinstance(ours.get("wiring"), Tensor) or ours["wiring"].dtype != torch.int64:
                raise ValueError(
                    f"the optimizer was given a wired state for {layer.name!r} before it was wired, and has rounded it; wire "
                    "first, then load the state"
                )
            self._check(layer, ours)
            self._take(layer, ours)

    def _check(self, layer: WiredLayer, entry: dict[str, Any]) -> None:
        weights = self._weights
        check_entry(layer, entry, weights.pools[layer], weights.rule, weights.pools.schedule)

    def _packed_ids(self, state_dict: dict[str, Any]) -> dict[str, int]:
        """The key under which each wired parameter stands in an optimizer state dict of the same parameter groups."""
        ids = {}
        for group, packed in zip(self._weights.chain[-1].param_groups, state_dict["param_groups"], strict=False):
            ids.update({id(p): key for p, key in zip(group["params"], packed["params"], strict=False)})
        return {layer.name: ids[id(layer.parameter)] for layer in self._weights.layers if id(layer.parameter) in ids}

    @exclusive
    def add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """The optimizer's hook after it has made a state dict."""
        weights = self._weights
        weights.check_held()
        self.warn_of_missing()
        ids = self._packed_ids(state_dict)
        for layer in weights.layers:
            require_finite(f"{layer.name} (latent)", layer.latent, layer.shard)  # it could not be loaded again
            of_optimizer = state_dict["state"].get(ids[layer.name], {})
            state_dict["state"][ids[layer.name]] = {**of_optimizer, **weights.entry(layer)}
        if weights.state and all(isinstance(x, dict) and set(x) == set(STATE_KEYS) for x in weights.state.values()):
            # It has stepped and made no state. torch.distributed.checkpoint wants entries of all parameters or of none.
            for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
                for parameter, key in zip(group["params"], packed["params"], strict=True):
                    if parameter.requires_grad:
                        state_dict["state"].setdefault(key, {})

    def warn_of_missing(self) -> None:
        """Warns of wired parameters that are no longer in the model."""
        if missing := self._exchange.members.missing(self._weights.layers):
            warnings.warn(gone(missing), stacklevel=3)

    @exclusive
    def take_from_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's hook before it loads: takes out what is ours, checked, before the base class casts or rejects it."""
        if self._loads_around:
            return state_dict
        self._exchange.undo_open_step()
        self._incoming = None
        ids = self._packed_ids(state_dict)
        state = {key: entry for key, entry in state_dict["state"].items() if entry or entry is None}
        incoming: dict[str, dict[str, Tensor]] = {}
        for layer in self._weights.layers:
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
                self._check(layer, ours)
                incoming[layer.name] = {k: v.detach().clone() for k, v in ours.items()}
        self._drop_unwired(state, state_dict)
        self._incoming = incoming
        groups = self._weights.chain[-1].param_groups, state_dict["param_groups"]
        present, given = ([len(group["params"]) for group in of_one] for of_one in groups)
        for layer in self._weights.layers if present == given else []:  # otherwise the base class refuses it
            if layer.latent.dtype != layer.parameter_dtype:  # the base class casts its state to the parameter's dtype
                layer.lend(layer.latent)
        return {**state_dict, "state": state}

    def _drop_unwired(self, state: dict[Any, Any], state_dict: dict[str, Any]) -> None:
        """Takes the latent weights of parameters that no wiring holds out of an incoming state, with a warning."""
        dropped = []
        for group, packed in zip(self._weights.chain[-1].param_groups, state_dict["param_groups"], strict=False):
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
        pool = self._weights.pools[layer]
        _, step, layer.step, layer.seed, pool.k = entry["wiring"].tolist()
        pool.num_active = pool.k
        self._weights.step = max(self._weights.step, step)

    @exclusive
    @torch.no_grad()
    def loaded(self, optimizer: Optimizer) -> None:
        """The optimizer's hook after it has loaded: takes over what was taken out."""
        if self._loads_around:
            return
        weights, layers = self._weights, self._weights.layers
        incoming, self._incoming = self._incoming or {}, None
        if local_optimizer(optimizer) is not optimizer:
            incoming = gathered(incoming)
        for layer in layers:
            if layer.exchanged:
                layer.take_back()
        without = [layer for layer in layers if layer.name not in incoming]
        if without:
            warnings.warn(
                f"the loaded optimizer state holds no latent weights for {listing(x.name for x in without)}; they stay as they "
                "are, but for what has been written to the model since",
                stacklevel=3,
            )
        weights.step = 0 if incoming else weights.step
        for layer in layers:
            if layer.name in incoming:
                self._take(layer, incoming[layer.name])
            else:
                weights.take_over_writes(layer)
        weights.pools.prepare(layers)
        for layer in layers:
            if layer.name in incoming:
                weights.write(layer)
                weights.clear_momentum(layer)
        for pool in weights.pools.of(layers):
            weights.pools.count(pool)
        weights.select(without)
        for layer in layers:
            weights.enter_state(layer)

    def load_around(self, keeper: Optimizer, load: Callable[[Any], Any], state_dict: dict[str, Any]) -> Any:
        """Loads a state for an optimizer that does so in its own way, perhaps without running hooks."""
        if not {"state", "param_groups"} <= set(state_dict):
            return load(state_dict)  # it holds that of the optimizer inside, which is loaded by itself
        rest = self.take_from_state_dict(keeper, state_dict)
        self._loads_around = True
        try:
            result = load(rest)
        finally:
            self._loads_around = False
        self.loaded(keeper)
        return result
