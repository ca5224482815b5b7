"""One step of the optimizer, from the exchange of latent weights into its parameters to the selection on what came of them.

Contract: the latent weights of a layer are touched only once the optimizer has finished. A step that is interrupted before is
undone; one that is interrupted while it is taken over is taken over again.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._wiring import one_pass
from dnw._wiring.gradients import gradients
from dnw._wiring.weights import Weights
from dnw._wiring.wired_layer import WiredLayer
from dnw.kernels._team import each


class OpenStep:
    """A step between its two hooks, and while it is taken over.

    Args:
        weights: that it steps.
        number: how many steps are completed when it is.
        check_finite: whether gradients are looked at; see :func:`gradients`.

    Attributes:
        thread: that it runs in.
        depth: how many calls of a base class's ``step`` it has made that have not come back.
        stepping: by id, the layers that have got a gradient.
        results: what the optimizer has made of the latent weights, once it has.
        is_template: whether learning rate and gradients are 0: how torch.distributed.checkpoint makes optimizer state.
    """

    def __init__(self, weights: Weights, number: int, check_finite: bool | None = None) -> None:
        self.number, self.thread, self.depth = number, threading.get_ident(), 0
        self.stepping: dict[int, WiredLayer] = {}
        self.results: list[tuple[WiredLayer, Tensor]] = []
        self._weights, self._check_finite = weights, check_finite
        self._kept: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}  # edges and momentum before it, where that is held
        self._selecting = False  # whether edges may have been chosen already
        self._exchanged = False  # whether the rule was asked for edges
        self.is_template = self._has_no_rate() and not any(
            x.total(x.local_grad()) for x in weights.layers if x.parameter.grad is not None
        )

    @property
    def is_mine(self) -> bool:
        """Whether it runs in this thread."""
        return self.thread == threading.get_ident()

    def is_running(self) -> bool:
        """Whether the optimizer is still in it; not so where it was interrupted."""
        return steps_on_the_stack(self._weights.optimizer, self.thread) > 0

    # --- before the optimizer ---

    def lend(self, layers: Sequence[WiredLayer]) -> None:
        """Puts the latent weights of some layers in place of the effective ones."""
        weights = self._weights
        for layer in layers:
            weights.leave_state(layer)
            shown = layer.latent if layer.in_place else weights.dormant.shown(layer)
            layer.lend(shown if layer.aside is None else layer.aside)
            if weights.dormant.momentum == "hold":
                assert layer.active is not None
                weights.see_state(layer)
                self._kept[layer.name] = layer.active.clone(), weights.dormant.kept(layer)

    def lend_gradients(self, layers: Sequence[WiredLayer], gradients: Sequence[Tensor | None]) -> None:
        """Gives the base optimizer the gradients that :func:`gradients` has made; these layers are stepped."""
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.lend_gradient(gradient)
            self.stepping[id(layer)] = layer

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Evaluates a closure on the effective weights of what the parameters hold at this moment; the edges stay."""
        lent = [layer for layer in self._weights.layers if layer.exchanged]
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
            self.lend_gradients(stepping, gradients(self._weights, stepping, self.number, self._check_finite))
        return loss

    @torch.no_grad()
    def _show_effective(self, layers: Sequence[WiredLayer]) -> list[Tensor]:
        """Puts effective weights in the place of dense ones that parameters hold; returns the latter."""
        present = []
        for layer in layers:
            if layer.latent.dtype != layer.parameter_dtype:
                raise RuntimeError(
                    f"{type(self._weights.optimizer).__name__} evaluates its closure within a step, when {layer.name!r} is in "
                    f"the dtype of its latent weights, {layer.latent.dtype}; wire without latent_dtype"
                )
            layer.give_gradient_back()
            present.append(layer.held.detach().clone())
            layer.held.copy_(self._weights.effective_of(layer, present[-1]))
        return present

    # --- after it ---

    def put_aside(self) -> None:
        """Ends a part of a step that is not its last: the model holds what is perturbed, with the edges that it has."""
        for layer in self._weights.layers:
            if layer.exchanged:
                layer.aside = layer.held.detach().clone()
                effective = self._weights.effective_of(layer, layer.aside)
                layer.take_back()
                layer.write(effective)
                self._weights.enter_state(layer)

    def give_back_what_has_no_gradient(self) -> None:
        """Layers that were lent for a closure which gave them no gradient are as they were before."""
        for layer in self._weights.layers:
            if layer.exchanged and id(layer) not in self.stepping:
                layer.take_back()
                self._weights.write(layer)

    def _has_no_rate(self) -> bool:
        """Whether all learning rates are 0, as far as that can be told without waiting for a device."""
        rates = [group.get("lr") for group in self._weights.chain[-1].param_groups]
        known = [float(lr) for lr in rates if lr is not None and (not isinstance(lr, Tensor) or lr.device.type == "cpu")]
        return len(known) == len(rates) and not any(known)

    def take_results(self) -> None:
        """Notes what the base optimizer and the rule have made; from here on the step counts."""
        weights, stepped = self._weights, list(self.stepping.values())
        for layer in weights.pools.competing(stepped):
            weights.see_state(layer)
        dormant = weights.dormant
        if weights.step == 0 and stepped and dormant != weights.rule.dormant and not dormant.has_effect(stepped):
            warnings.warn(
                f"{dormant!r}: momentum={dormant.momentum!r} has no effect, because {type(weights.optimizer).__name__} keeps "
                "no momentum",
                stacklevel=3,
            )
        self.results = [(x, x.held if x.in_place else self._updated(x)) for x in stepped]

    def _updated(self, layer: WiredLayer) -> Tensor:
        """The latent weights that the base optimizer and the rule make of a step."""
        return self._weights.rule.updated(layer, self._weights.dormant.updated(layer, layer.held))

    def finish(self) -> None:
        """Takes over the results, selects and projects. If it is interrupted, it is called again."""
        weights, again = self._weights, self._selecting
        stepped = [layer for layer, _ in self.results]
        for pool in weights.pools.of(stepped):
            weights.pools.follow_schedule(pool, self.number)
            pool.num_active = 0 if again else pool.num_active  # whatever came of the first time is not to be believed
        for layer in weights.layers:
            if again:  # the same selection once more, from the same edges
                layer.activate(layer.previous)
            else:
                layer.remember()
        self._selecting = True
        done = [] if again else self._take_in_one_pass(stepped)
        for layer, result in self.results:
            layer.take(result)  # the parameters are written from here on
        self._exchanged |= weights.select([layer for layer in stepped if layer not in done], step=self.number)
        for layer in done:
            layer.step = self.number
            layer.take_back()
            layer.accept()
        self._treat_momentum(stepped)
        weights.statistics.see(weights.layers)
        weights.step = self.number
        for layer in weights.layers:
            weights.enter_state(layer, even_alone=layer in stepped)
            layer.aside = None

    def _take_in_one_pass(self, layers: Sequence[WiredLayer]) -> list[WiredLayer]:
        """Takes over, selects and projects at once the layers that this is possible for; returns those for which it is done."""
        weights = self._weights
        if not weights.rule.is_plain or not weights.dormant.weight_decay:
            return []
        due = [(layer, pool) for layer in layers if weights.pools.is_due(pool := weights.pools[layer], self.number)]
        alone = [(layer, pool) for layer, pool in due if len(pool.layers) == 1]
        fitting = [(layer, pool) for layer, pool in alone if one_pass.fits(layer)]
        done = each([(layer.latent.numel(), partial(one_pass.take_over, layer, pool.k)) for layer, pool in fitting])
        for (_, pool), is_done in zip(fitting, done, strict=True):
            pool.num_active = pool.k if is_done else pool.num_active
        return [layer for (layer, _), is_done in zip(fitting, done, strict=True) if is_done]

    def _treat_momentum(self, stepped: Sequence[WiredLayer]) -> None:
        """Does to the momentum of dormant edges what is to be done, also in layers that traded edges without stepping."""
        weights, momentum = self._weights, self._weights.dormant.momentum
        if momentum == "update" or (weights.zeros_stay and not self._exchanged):
            return
        for layer in weights.pools.competing(stepped) if momentum == "zero" else stepped:
            assert layer.active is not None
            weights.dormant.apply(layer, *self._kept.get(layer.name, (None, {})))


def steps_on_the_stack(optimizer: Optimizer, thread: int | None = None) -> int:
    """How many calls of ``optimizer.step`` a thread is in: 0 outside a step, more than 1 in a nested one.

    Args:
        optimizer: whose step is looked for. What :func:`run_exchanged` runs counts as one.
        thread: identifier of the thread; by default this one. Of a thread that has ended: 0.
    """
    count = 0
    frame = sys._getframe(1) if thread in (None, threading.get_ident()) else sys._current_frames().get(thread or 0)
    while frame is not None:
        if frame.f_code in (_STEP_WRAPPER, run_exchanged.__code__) and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count


_STEP_WRAPPER = Optimizer.profile_hook_step(lambda *_: None).__code__
"""The code that PyTorch wraps around the ``step`` of every optimizer class, and that runs the hooks."""


def run_exchanged(
    self: Optimizer, begin: Callable[[], None], method: Callable[..., Any], end: Callable[[], None], args: tuple, kwargs: dict
) -> Any:
    """Runs a method of an optimizer that writes to parameters as ``step`` does, between what its hooks would do."""
    begin()
    result = method(*args, **kwargs)
    end()
    return result


def closure_of(args: tuple, kwargs: dict) -> Callable[[], Any] | None:
    """The closure given to ``step``; the optimizer itself is the first of its arguments."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def with_closure(args: tuple, kwargs: dict, closure: Callable[[], Any]) -> tuple[tuple, dict]:
    """The same arguments with another closure."""
    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})
