"""The exchange around ``optimizer.step()``: latent weights go into the parameters, and effective ones come back.

Contract: between steps every wired parameter holds its effective weight. The base optimizer updates latent weights with the
gradient of the effective ones: the straight-through estimator, bit for bit (Wortsman et al., 2019, section 2.2). A step that
raises is rolled back by whatever comes next: the next step, a saved state, or any question.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._wiring.foreign import evaluates_first
from dnw._wiring.gradients import gradients
from dnw._wiring.membership import Members, gone
from dnw._wiring.ranks import check_ranks
from dnw._wiring.state import check_finite as require_finite
from dnw._wiring.step import OpenStep, closure_of, steps_on_the_stack, with_closure
from dnw._wiring.weights import Weights
from dnw._wiring.wired_layer import WiredLayer

_Method = TypeVar("_Method", bound=Callable[..., Any])


def exclusive(method: _Method) -> _Method:
    """A method, of an exchange or of what has one, that changes weights: other threads' questions and changes wait for it."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(self, "_exchange", self).lock:
            return method(self, *args, **kwargs)

    return cast(_Method, run)


class Exchange:
    """What happens to the weights around the methods of their optimizer.

    Args:
        weights: that are exchanged.
        members: where they are in their model.
        check_ranks: whether the first step compares processes.
        check_finite: whether gradients are looked at; see :func:`dnw._wiring.gradients.gradients`.

    Attributes:
        lock: held by whatever changes the weights.
    """

    def __init__(self, weights: Weights, members: Members, check_ranks: bool, check_finite: bool | None) -> None:
        self.weights, self.members = weights, members
        self.ranks_to_check, self.check_finite = check_ranks, check_finite
        self.lock = threading.RLock()
        self._open: OpenStep | None = None

    # --- between steps ---

    @contextmanager
    def question(self) -> Iterator[None]:
        """Answers inside it are those after the last step, or, in the middle of one, those before it."""
        with self.lock:
            if not self.is_in_a_step():
                self.catch_up()
            yield

    def is_in_a_step(self) -> bool:
        """Whether a step is in progress, in whatever thread; not so where it was interrupted."""
        return self._open is not None and self._open.is_running()

    def steps_here(self) -> bool:
        """Whether a step is in progress in this thread."""
        return self._open is not None and self._open.is_mine and self._open.is_running()

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether a step of an optimizer is a step of this wiring's own, or a part of one."""
        return optimizer in self.weights.chain or self.steps_here()

    def undo_open_step(self) -> None:
        """Undoes a step that was interrupted; raises ``RuntimeError`` where one is in progress."""
        if self.is_in_a_step():
            raise RuntimeError(
                "the wiring cannot be changed or saved in the middle of optimizer.step(); a step hook, or another thread, that "
                "does so must wait until after the step"
            )
        self._roll_back()

    @exclusive
    def catch_up(self) -> None:
        """Brings model and wiring together: undoes an unfinished step, takes over writes, selects where there were any."""
        self.undo_open_step()
        weights = self.weights
        written = [layer for layer in weights.layers if weights.take_over_writes(layer)]
        if written:
            weights.select(written)

    @exclusive
    def write_latent(self, layer: WiredLayer, value: Tensor) -> None:
        """Puts other latent weights in place, and selects."""
        self.catch_up()
        part = layer.part(value).to(layer.latent.dtype)
        require_finite(layer.name, part, layer.shard)
        layer.latent.copy_(part)
        self.weights.select([layer])

    @exclusive
    @torch.no_grad()
    def write_all(self) -> None:
        """Puts all effective weights into the model."""
        for layer in self.weights.layers:
            self.weights.write(layer)

    @exclusive
    @torch.no_grad()
    def _roll_back(self) -> None:
        """Undoes an unfinished step: parameters get their effective weights back, latents were never touched.

        A step that the base optimizer has finished is finished here, too.
        """
        if self._open and self._open.results:
            self._open.finish()
        self._open = None
        for layer in self.weights.layers:
            layer.grad = None
            if layer.exchanged:
                layer.take_back()
                self.weights.write(layer)
                self.weights.enter_state(layer)

    # --- around a step ---

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The optimizer's hook before a step."""
        if self._open and self._open.is_mine and steps_on_the_stack(optimizer) > 1:
            self._open.depth += 1  # a subclass's step has called that of its base class
            return args, kwargs
        self._begin()
        closure = closure_of(args, kwargs)
        if closure is None:
            self._lend()
            return args, kwargs
        if evaluates_first(optimizer):
            with torch.enable_grad():
                loss = closure()
            self._lend()
            return with_closure(args, kwargs, lambda: loss)
        step = self._lend(all_of_them=True)
        return with_closure(args, kwargs, partial(step.evaluate, closure))

    @exclusive
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: tuple = (), kwargs: dict | None = None) -> None:
        """The optimizer's hook after a step."""
        step, weights = self._open, self.weights
        if step is None:
            return
        if step.depth:
            step.depth -= 1
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._roll_back()  # a fused optimizer skipped this step
            return
        step.give_back_what_has_no_gradient()
        if step.is_template:
            self._roll_back()
            for layer in step.stepping.values():
                weights.enter_state(layer, even_alone=True)
            return
        step.take_results()
        step.finish()
        self._open = None
        for layer in weights.layers:  # not earlier: it takes gradients to select once more
            layer.grad = None

    def _begin(self) -> None:
        """Before an exchange: what may not go on meanwhile, and what is left of the last one."""
        if self.weights.is_settled:
            raise RuntimeError("optimizer.step() inside `with wiring.settled():`; train outside it")
        if self._open and not self._open.is_mine and self._open.is_running():
            raise RuntimeError("optimizer.step() in two threads at once; an optimizer and its wiring take one after the other")
        self._roll_back()

    @exclusive
    def _lend(self, all_of_them: bool = False) -> OpenStep:
        """Opens a step: latent weights of the parameters that have a gradient, or of all, in place of the effective ones."""
        weights = self.weights
        weights.check_held()
        if missing := self.members.missing(weights.layers):
            raise RuntimeError(gone(missing))
        if self.ranks_to_check:
            check_ranks(weights.layers, {x.name: weights.pools[x].k for x in weights.layers})
            self.ranks_to_check = False
        stepping = [layer for layer in weights.layers if layer.parameter.grad is not None]
        looked_at = weights.layers if all_of_them else weights.pools.competing(stepping)
        if written := [layer for layer in looked_at if weights.take_over_writes(layer)]:
            weights.select(written)
        step = OpenStep(weights, weights.step + 1, self.check_finite)
        if all_of_them:  # gradients that are there are of the last step, or of one that was refused
            step.is_template = False
            made = gradients(weights, stepping, step.number, check_finite=False)
        elif step.is_template:
            made = [None] * len(stepping)
        else:
            made = gradients(weights, stepping, step.number, self.check_finite)
        self._open = step
        step.lend(weights.layers if all_of_them else stepping)
        step.lend_gradients(stepping, made)
        return step

    # --- around other methods of the optimizer ---

    @torch.no_grad()
    def begin_part(self, is_first: bool) -> None:
        """Before a part of a step: its perturbation, or the step from where that has led."""
        self._begin()
        if is_first:
            for layer in self.weights.layers:
                layer.aside = None
        self._lend()

    @exclusive
    @torch.no_grad()
    def end_part(self) -> None:
        """After a part of a step that is not its last."""
        assert self._open is not None
        self._open.put_aside()
        self._open = None

    def end_step(self) -> None:
        """After the last part of a step."""
        self.after_step(self.weights.optimizer)

    @exclusive
    @torch.no_grad()
    def begin_averaging(self) -> None:
        """Before an optimizer exchanges its weights and their average."""
        self._begin()
        self.catch_up()
        self._open = OpenStep(self.weights, self.weights.step)
        for layer in self.weights.layers:
            layer.lend(layer.latent)

    @exclusive
    @torch.no_grad()
    def end_averaging(self) -> None:
        """The average, or what comes in its place again, are the latent weights from here on."""
        weights = self.weights
        for layer in weights.layers:
            layer.take(layer.held.detach())
        self._open = None
        if weights.rule.has_latent_weights:
            weights.select(weights.layers)
        for layer in weights.layers:
            if not weights.rule.has_latent_weights:  # edges that came in with weight 0 are not to lose for it
                layer.take_back()
                layer.clear_dormant()
                weights.write(layer)
            weights.enter_state(layer)
