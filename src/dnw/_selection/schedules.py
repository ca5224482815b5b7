"""How the number of active edges changes over training.

Contract: a schedule is a pure function of the number of completed steps, so that a resumed run continues it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dnw._checks import check_density
from dnw._selection.budgets import num_edges


@dataclass(frozen=True)
class DensitySchedule:
    """From many edges to the budget's: ``initial`` until step ``begin``, then fewer and fewer, the budget from step ``end`` on.

    The share of the edges to go that remains after a share t of the way is (1 - t) ** power. Source of the cubic: Zhu, Gupta,
    "To prune, or not to prune", 2017, equation 1, in which sparsity is 1 - density.

    Args:
        end: completed steps at which the budget is reached.
        begin: completed steps at which the number of edges begins to fall.
        every: steps between two changes.
        initial: density before ``begin``, in (0, 1]; a layer whose budget is larger has its budget all along.
        power: 3 for the cubic schedule, 1 for a linear one.
    """

    end: int
    begin: int = 0
    every: int = 1
    initial: float = 1.0
    power: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("end", 1), ("begin", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"DensitySchedule: {name}={value!r}: a whole number of steps from {least} on")
        if self.begin >= self.end:
            raise ValueError(f"DensitySchedule: begin={self.begin} is not before end={self.end}")
        if not self.power > 0:
            raise ValueError(f"DensitySchedule: power={self.power!r}: allowed is a number above 0")
        check_density(self.initial, "DensitySchedule: initial")

    def num_edges(self, step: int, k: int, candidates: int) -> int:
        """The number of active edges after ``step`` steps, of a budget of ``k`` out of ``candidates``."""
        if step >= self.end:
            return k
        first = max(k, num_edges(self.initial, candidates))
        done = max(0, step - self.begin) // self.every * self.every
        return k + math.floor((first - k) * (1 - done / (self.end - self.begin)) ** self.power + 0.5)
