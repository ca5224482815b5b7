"""Where a wiring is tied to its optimizer: around ``step``, the state dict, and whatever else writes to weights."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch.optim import Optimizer

from dnw._wiring.exchange import Exchange
from dnw._wiring.foreign import averaging_methods, has_state_hooks, loads_in_its_own_way, parts, step_with_hooks
from dnw._wiring.guard import EvaluationGuard
from dnw._wiring.known import KnownLayer
from dnw._wiring.membership import WIRED, watch_other_optimizers
from dnw._wiring.step import run_exchanged
from dnw._wiring.travel import Travel
from dnw.kernels._wired import forget, make_known


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


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, once there is a compiler: it imports it, which takes as long as torch itself."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def hook(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments)

    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


class Hooks:
    """Everything that was put around an optimizer and its model's modules, until it is removed."""

    def __init__(self, exchange: Exchange, travel: Travel) -> None:
        weights = exchange.weights
        optimizer = weights.optimizer
        self._exchange, self._travel, self._optimizer = exchange, travel, optimizer
        self._handles: list[Any] = []
        if (step := step_with_hooks(optimizer)) is not None:
            self._put(optimizer, "step", step)
        self._handles += [
            optimizer.register_step_pre_hook(uncompiled(exchange.before_step)),
            optimizer.register_step_post_hook(uncompiled(exchange.after_step)),
        ]
        hooks = optimizer._optimizer_step_post_hooks
        if isinstance(hooks, OrderedDict):  # hooks that were there before see what the step has made, as later ones do
            hooks.move_to_end(self._handles[-1].id, last=False)
        for keeper in filter(has_state_hooks, weights.chain):
            self._handles += [
                keeper.register_state_dict_pre_hook(lambda _: exchange.catch_up()),
                keeper.register_state_dict_post_hook(travel.add_to_state_dict),
                keeper.register_load_state_dict_pre_hook(travel.take_from_state_dict),
                keeper.register_load_state_dict_post_hook(travel.loaded),
            ]
        self._surround()
        if weights.rule.settles:
            guard = EvaluationGuard(weights)
            modules = {id(layer.module): layer.module for layer in weights.layers}.values()
            self._handles += [module.register_forward_pre_hook(guard) for module in modules]
        watch_other_optimizers()
        for layer in weights.layers:
            WIRED[layer.parameter] = weakref.ref(exchange)
        weights.known = [KnownLayer(weights, layer) for layer in weights.layers if layer.shard is None]
        for known in weights.known:
            make_known(known.layer.parameter, known)

    def remove(self) -> None:
        """Takes everything off again."""
        for layer in self._exchange.weights.layers:
            del WIRED[layer.parameter]
            forget(layer.parameter)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _surround(self) -> None:
        """Puts the exchange around the methods of the optimizer, beside its step, that write to parameters."""
        exchange, optimizer = self._exchange, self._optimizer
        names = parts(optimizer)
        for name in names:
            begin = partial(exchange.begin_part, name == names[0])
            self._put_around(name, begin, exchange.end_step if name == names[-1] else exchange.end_part)
        for name in averaging_methods(optimizer):
            self._put_around(name, exchange.begin_averaging, exchange.end_averaging)
        for keeper in exchange.weights.chain:
            if loads_in_its_own_way(keeper):
                self._put(keeper, "load_state_dict", partial(self._load, keeper, keeper.load_state_dict))

    def _put_around(self, name: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
        optimizer, method = self._optimizer, getattr(self._optimizer, name)

        def surrounded(*args: Any, **kwargs: Any) -> Any:
            if not self._handles or self._exchange.steps_here():
                return method(*args, **kwargs)  # the wiring is off, or it is a part of what is open already
            return run_exchanged(optimizer, begin, method, end, args, kwargs)

        self._put(optimizer, name, surrounded)

    def _load(self, keeper: Optimizer, load: Callable[[Any], Any], state_dict: dict[str, Any]) -> Any:
        return self._travel.load_around(keeper, load, state_dict) if self._handles else load(state_dict)

    def _put(self, optimizer: Optimizer, name: str, function: Callable[..., Any]) -> None:
        """Puts a function in the place of a method of one optimizer."""
        self._handles.append(_Replaced(optimizer, name, function, vars(optimizer).get(name)))
        setattr(optimizer, name, function)
