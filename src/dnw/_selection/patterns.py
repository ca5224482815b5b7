"""Which edges stand or fall together: N of every M, blocks, whole channels. Without a pattern each edge stands for itself.

Contract: a pattern turns the scores of a parameter into the scores of its units, whose largest are chosen, and a mask of
units into a mask of edges; or, where it fixes the number of edges in each of its groups, the scores into the edges themselves.
``top_k_each`` does not know of patterns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRWISE = 16
"""Up to so many members, comparing each with each is cheaper than sorting a group."""


class Pattern(ABC):
    """A structure that active edges have.

    Shapes and tensors are ``[targets, sources of a target, *kernel]``, whichever way round a parameter holds them.
    """

    @abstractmethod
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ``ValueError`` unless a parameter's shape divides into units of this pattern."""

    def unit(self, shape: tuple[int, ...]) -> int:
        """Number of edges that stand or fall together."""
        return 1

    def num_edges(self, shape: tuple[int, ...]) -> int | None:
        """Number of active edges where the pattern itself fixes it; None where the budget decides."""
        return None

    @abstractmethod
    def scores(self, score: Tensor) -> Tensor:
        """The scores of the units, from those of the edges."""

    def choose(self, score: Tensor) -> Tensor | None:
        """The mask of the edges of largest score where the pattern alone fixes them; None where they compete for the budget."""
        return None

    def units(self, mask: Tensor) -> Tensor:
        """A mask of the units all of whose edges are in a mask of edges."""
        return mask

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A mask of edges from a mask of units."""
        return units


@dataclass(frozen=True)
class NOfM(Pattern):
    """``n`` of every ``m`` consecutive sources of a target are active: 2:4 and the like. It fixes the budget.

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021, section 2; for other n and m Zhou et al.,
    "Learning N:M fine-grained structured sparse neural networks from scratch", 2021. In a convolution the sources are the
    input channels, at each position of the kernel by itself.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(f"NOfM({self.n!r}, {self.m!r}): whole numbers are needed, 1 <= n <= m")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or shape[1] % self.m:
            raise ValueError(
                f"{name!r} has shape {shape}: the pattern {self.n}:{self.m} needs a number of sources (second dimension) that "
                f"{self.m} divides; leave the parameter dense with exclude"
            )

    def num_edges(self, shape: tuple[int, ...]) -> int | None:
        return math.prod(shape) // self.m * self.n

    def scores(self, score: Tensor) -> Tensor:
        """m for the largest of its group, 1 for the smallest: the n largest of all groups are then the overall largest."""
        return self.m - self._ranks(score).float()

    def choose(self, score: Tensor) -> Tensor | None:
        return self._ranks(score) < self.n

    def _ranks(self, score: Tensor) -> Tensor:
        """The rank of each entry in its group: 0 for the largest magnitude, the lowest index first among equals."""
        groups = score.detach().unflatten(1, (-1, self.m))
        if self.m > _PAIRWISE:
            order = _ordered(groups.abs()).argsort(dim=2, descending=True, stable=True)
            rank = torch.arange(self.m, device=score.device).view(-1, *[1] * (score.ndim - 2)).expand_as(order)
            return torch.empty_like(order).scatter_(2, order, rank).flatten(1, 2)
        # Member by member, so that each comparison runs along memory.
        size = torch.empty((self.m, *groups.select(2, 0).shape), dtype=score.dtype, device=score.device)
        for i in range(self.m):
            torch.abs(groups.select(2, i), out=size[i])
        size = _ordered(size)
        ranks = torch.zeros(size.shape, dtype=torch.uint8, device=score.device)
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = size[i] >= size[j]
                ranks[j] += first_wins
                ranks[i] += ~first_wins
        return ranks.movedim(0, 2).flatten(1, 2)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``targets`` times ``sources`` edges, at each position of a kernel by itself; ranked by their mean magnitude."""

    targets: int = 4
    sources: int = 4

    def __post_init__(self) -> None:
        if not all(isinstance(x, int) and x >= 1 for x in (self.targets, self.sources)):
            raise ValueError(f"Blocks({self.targets!r}, {self.sources!r}): whole numbers from 1 on are needed")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or shape[0] % self.targets or shape[1] % self.sources:
            raise ValueError(
                f"{name!r} has shape {shape}: it does not divide into blocks of {self.targets} targets (first dimension) times "
                f"{self.sources} sources (second); leave the parameter dense with exclude"
            )

    def unit(self, shape: tuple[int, ...]) -> int:
        return self.targets * self.sources

    def _cut(self, tensor: Tensor) -> Tensor:
        targets, sources = tensor.shape[:2]
        return tensor.reshape(targets // self.targets, self.targets, sources // self.sources, self.sources, *tensor.shape[2:])

    def scores(self, score: Tensor) -> Tensor:
        return self._cut(_wide(score).abs()).mean((1, 3))

    def units(self, mask: Tensor) -> Tensor:
        return self._cut(mask).all(3).all(1)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        return units.repeat_interleave(self.targets, 0).repeat_interleave(self.sources, 1)


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole targets: all edges to an output channel or to a unit, or none; ranked by their mean magnitude."""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"{name!r} has shape {shape}: it has no channels; leave the parameter dense with exclude")

    def unit(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[1:])

    def scores(self, score: Tensor) -> Tensor:
        return _wide(score).abs().flatten(1).mean(1)

    def units(self, mask: Tensor) -> Tensor:
        return mask.flatten(1).all(1)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        return units.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _ordered(magnitudes: Tensor) -> Tensor:
    """Magnitudes as integers of the same order, in which NaN has a rank too: above infinity."""
    if not magnitudes.is_floating_point():
        return magnitudes
    return magnitudes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[magnitudes.element_size()])


def _wide(score: Tensor) -> Tensor:
    score = score.detach()
    return score if score.dtype == torch.float64 else score.float()
