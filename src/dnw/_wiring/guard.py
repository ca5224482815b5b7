"""Notices evaluation on weights that a rule only trains with."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn


class Settling(Protocol):
    """What the guard needs to know of a wiring."""

    is_settled: bool


class EvaluationGuard:
    """A forward pre-hook that refuses to evaluate an unsettled model: in eval mode, without gradients.

    Only rules that evaluate with other weights than they train with put it into a model. A copy of the model gets one that
    guards nothing, because a copy is not wired.
    """

    def __init__(self, wiring: Settling | None = None) -> None:
        self._wiring = None if wiring is None else weakref.ref(wiring)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not (module.training or torch.is_grad_enabled()):
            self.check()

    def check(self) -> None:
        """Raises ``RuntimeError`` where the model holds weights that its rule only trains with."""
        wiring = None if self._wiring is None else self._wiring()
        if wiring is not None and not wiring.is_settled:
            raise RuntimeError(
                "this model holds the weights that its rule trains with, which are not those it evaluates with; "
                "evaluate inside `with wiring.settled():`, and compile there"
            )

    def __reduce__(self) -> tuple[type[EvaluationGuard], tuple[()]]:
        return EvaluationGuard, ()
