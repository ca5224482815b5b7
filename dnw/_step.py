"""Around one call of ``optimizer.step``: what is known of it while it is open, its closure, and calls made from within it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnw._layer import WiredLayer


@dataclass(eq=False)
class OpenStep:
    """A step between its two hooks, and while it is taken over.

    Attributes:
        optimizer: whose step it is.
        number: how many steps are completed when it is.
        thread: that it runs in.
        depth: how many calls of a base class's ``step`` it has made that have not come back.
        kept: by name, the edges and the momentum of layers before it, where momentum is held.
        results: what the optimizer has made of the latent weights, once it has; then the step is taken over, and whatever
            interrupts that, the next to come does it again.
        selecting: whether edges may have been chosen already.
        exchanged: whether edges have been chosen anew.
    """

    optimizer: Optimizer
    number: int
    thread: int = field(default_factory=threading.get_ident)
    depth: int = 0
    kept: dict[str, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)
    results: list[tuple[WiredLayer, Tensor]] = field(default_factory=list)
    selecting: bool = False
    exchanged: bool = False

    @property
    def is_mine(self) -> bool:
        """Whether it runs in this thread."""
        return self.thread == threading.get_ident()

    def is_running(self) -> bool:
        """Whether the optimizer is still in it; not so where it was interrupted."""
        return steps_on_the_stack(self.optimizer, self.thread) > 0


def steps_on_the_stack(optimizer: Optimizer, thread: int | None = None) -> int:
    """How many calls of ``optimizer.step`` a thread is in: 0 outside a step, more than 1 in a nested one.

    Args:
        optimizer: whose step is looked for.
        thread: identifier of the thread; by default this one. Of a thread that has ended: 0.
    """
    count = 0
    frame = sys._getframe(1) if thread in (None, threading.get_ident()) else sys._current_frames().get(thread or 0)
    while frame is not None:
        if frame.f_code is _STEP_WRAPPER and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count


_STEP_WRAPPER = Optimizer.profile_hook_step(lambda *_: None).__code__
"""The code that PyTorch wraps around the ``step`` of every optimizer class, and that runs the hooks."""


def evaluate_closure(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Evaluates a closure given to ``step`` on the effective weights; the optimizer gets one that returns the known loss."""
    positional = len(args) > 1  # the optimizer itself comes first
    closure: Callable[[], Any] | None = args[1] if positional else kwargs.get("closure")
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    calls = 0

    def known_loss() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError(
                "this optimizer evaluates its closure several times a step, each time on other weights; a wiring needs "
                "one evaluation a step, so optimizers such as LBFGS cannot be wired"
            )
        return loss

    return ((args[0], known_loss, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": known_loss})
