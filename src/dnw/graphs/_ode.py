"""Solvers of ordinary differential equations: three with equal steps here, adaptive ones from torchdiffeq.

Contract: a solver takes a rate and a state at time 0 and returns the state at a later time, differentiably.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dnw._checks import listing, one_of

Rate = Callable[[float, Tensor], Tensor]

EQUAL_STEPS = ("euler", "midpoint", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


class Solver(Protocol):
    """Solves an initial value problem.

    Attributes:
        num_evaluations: of the rate in one solution, or 0 where that depends on the problem.
    """

    @property
    def num_evaluations(self) -> int: ...

    def solve(self, rate: Rate, state: Tensor, duration: float, parameters: tuple[nn.Parameter, ...]) -> Tensor:
        """The state after ``duration``; ``parameters`` are those that the rate depends on."""
        ...


def solver_named(name: str, steps: int, rtol: float, atol: float, adjoint: bool) -> Solver:
    """The solver of a name.

    Raises:
        ValueError: no such solver, or a setting out of range.
    """
    if name not in (*EQUAL_STEPS, *ADAPTIVE):
        raise ValueError(f"solver={name!r}: no such solver{one_of(name, EQUAL_STEPS + ADAPTIVE)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"solver_steps={steps!r}: a whole number from 1 on")
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol={rtol}, atol={atol}: tolerances are above 0 and finite")
    if adjoint or name in ADAPTIVE:
        return _Torchdiffeq(name, steps, rtol, atol, adjoint)
    return _EqualSteps(name, steps)


@dataclass(frozen=True)
class _EqualSteps:
    """Runge-Kutta methods of order 1, 2 and 4 with equal steps (rk4: the classical one)."""

    name: str
    steps: int

    @property
    def num_evaluations(self) -> int:
        return self.steps * {"euler": 1, "midpoint": 2, "rk4": 4}[self.name]

    def solve(self, rate: Rate, state: Tensor, duration: float, parameters: tuple[nn.Parameter, ...]) -> Tensor:
        h = duration / self.steps
        for i in range(self.steps):
            t = i * h
            first = rate(t, state)
            if self.name == "euler":
                state = state + h * first
                continue
            second = rate(t + h / 2, state + h / 2 * first)
            if self.name == "midpoint":
                state = state + h * second
                continue
            third = rate(t + h / 2, state + h / 2 * second)
            fourth = rate(t + h, state + h * third)
            state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
        return state


@dataclass(frozen=True)
class _Torchdiffeq:
    """The solvers of torchdiffeq, imported when first used."""

    name: str
    steps: int
    rtol: float
    atol: float
    adjoint: bool

    @property
    def num_evaluations(self) -> int:
        return self.steps * {"euler": 1, "midpoint": 2, "rk4": 4}[self.name] if self.name in EQUAL_STEPS else 0

    def solve(self, rate: Rate, state: Tensor, duration: float, parameters: tuple[nn.Parameter, ...]) -> Tensor:
        try:
            from torchdiffeq import odeint, odeint_adjoint
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"solver={self.name!r} comes from torchdiffeq, which is not installed: pip install 'dnw[ode]', or choose "
                f"{listing(EQUAL_STEPS)}, without the adjoint",
                name="torchdiffeq",
            ) from error
        times = torch.tensor([0.0, duration], device=state.device, dtype=state.dtype)
        options = {"step_size": duration / self.steps} if self.name in EQUAL_STEPS else None
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.name, "options": options}
        try:
            if self.adjoint:
                wanted = tuple(p for p in parameters if p.requires_grad)
                return odeint_adjoint(rate, state, times, adjoint_params=wanted, **settings)[-1]
            return odeint(rate, state, times, **settings)[-1]
        except AssertionError as error:
            raise FloatingPointError(
                f"the solver {self.name} could not go on ({error}): the states grow without bound or change too fast for "
                f"rtol={self.rtol:g}, atol={self.atol:g}; use a smaller learning rate, a leak, a norm or equal steps"
            ) from None
