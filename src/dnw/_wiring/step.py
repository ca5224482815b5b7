"""Around one call of ``optimizer.step``: what is known of it while it is open, its closure, and calls made from within it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dnw._wiring.layer import WiredLayer


@dataclass(eq=False)
class OpenStep:
    """A step between its two hooks, and while it is taken over.

    Attributes:
        optimizer: whose step it is.
        number: how many steps are completed when it is.
        thread: that it runs in.
        depth: how many calls of a base class's ``step`` it has made that have not come back.
        stepping: by id, the layers that have got a gradient.
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
    stepping: dict[int, WiredLayer] = field(default_factory=dict)
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
