"""Which edges stand or fall together: N of every M, blocks, whole channels. Without a pattern each edge stands for itself.

Contract: a pattern turns the scores of a parameter into the scores of its units, whose largest are chosen, and a mask of
units into a mask of edges. ``top_k_each`` does not know of patterns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def units(self, mask: Tensor) -> Tensor:
        """A mask of the units all of whose edges are in a mask of edges."""
        return mask

    def edges(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A mask of edges from a mask of units."""
        return units


@dataclass(frozen=True)
class NOfM(Pattern):
    """``n`` of every ``m`` consecutive sources of a target are active: 2:4 and the like. It fixes the budget.

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021, section 2; for other n and m Zhou et al.,
    "Learning N:M fine-grained structured sparse neural networks from scratch", 2021. In a convolution the sources are the
    input channels, at each place of the kernel by itself.
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
        rows = score.detach().abs().movedim(1, -1)
        groups = rows.reshape(*rows.shape[:-1], -1, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(self.m, 0, -1, device=score.device, dtype=torch.float32).expand_as(order)
        return torch.zeros_like(place).scatter(-1, order, place).reshape(rows.shape).movedim(-1, 1)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of ``targets`` times ``sources`` edges, at each place of a kernel by itself; ranked by their mean magnitude."""

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

    def edges(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
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

    def edges(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        return units.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _wide(score: Tensor) -> Tensor:
    score = score.detach()
    return score if score.dtype == torch.float64 else score.float()
