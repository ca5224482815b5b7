"""How many edges each layer may keep.

Contract: ``num_edges`` is the only place where a density becomes a number of edges.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fnmatch import fnmatchcase

from dnw._checks import check_density, check_num_edges, listing


def num_edges(density: float, candidates: int) -> int:
    """The budget k of a layer: ``max(1, density * candidates)`` rounded half up.

    The density counts as the decimal number it was written as, so ``num_edges(0.145, 100)`` is 15 although the nearest
    binary fraction to 0.145 lies below it.

    Args:
        density: share of the candidate edges that is active, in (0, 1].
        candidates: number of candidate edges, at least 1.
    """
    if candidates < 1:
        raise ValueError(f"candidates={candidates}: a layer needs at least one candidate edge")
    exact = Decimal(repr(check_density(density))) * candidates
    return max(1, int(exact.to_integral_value(ROUND_HALF_UP)))


@dataclass(frozen=True)
class LayerShape:
    """What a budget needs to know of a layer: its names, its shape and how many candidate edges it has."""

    name: str
    module: str
    shape: tuple[int, ...]
    candidates: int


Allotment = list[tuple[list[int], int]]
"""Pools of layers that compete for one budget: (indices of the layers, number of active edges)."""


class Budget(ABC):
    """How many edges each layer may keep."""

    @abstractmethod
    def allot(self, layers: Sequence[LayerShape]) -> Allotment:
        """Returns the pools of layers and the number of active edges of each; every layer is in exactly one pool."""


@dataclass(frozen=True)
class Uniform(Budget):
    """One density for every layer."""

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def allot(self, layers: Sequence[LayerShape]) -> Allotment:
        return [([i], num_edges(self.density, layer.candidates)) for i, layer in enumerate(layers)]


@dataclass(frozen=True)
class ByName(Budget):
    """Densities and exact numbers of edges by name pattern; the first pattern that fits a layer counts.

    A pattern is a shell-style glob on the name of the parameter or of the module that holds it. Patterns with a number
    of edges are tried before patterns with a density.
    """

    densities: Mapping[str, float]
    num_edges: Mapping[str, int]

    def __post_init__(self) -> None:
        for pattern, density in self.densities.items():
            check_density(density, f"density[{pattern!r}]")

    def allot(self, layers: Sequence[LayerShape]) -> Allotment:
        taken: list[str] = []
        for pattern in [*self.num_edges, *self.densities]:
            if not any(matches(layer.name, layer.module, pattern) for layer in layers):
                raise ValueError(
                    f"the budget pattern {pattern!r} fits no wired parameter; there are {listing(s.name for s in layers)}"
                )
            earlier = list(taken)
            taken.append(pattern)
            if all(any(matches(x.name, x.module, p) for p in earlier) for x in layers if matches(x.name, x.module, pattern)):
                raise ValueError(
                    f"the budget pattern {pattern!r} never counts: patterns before it ({listing(earlier)}) take every "
                    "parameter that it fits; put it before them"
                )
        result: Allotment = []
        for i, layer in enumerate(layers):
            edges = next((k for p, k in self.num_edges.items() if matches(layer.name, layer.module, p)), None)
            density = next((d for p, d in self.densities.items() if matches(layer.name, layer.module, p)), None)
            if edges is not None:
                result.append(([i], check_num_edges(edges, layer.candidates, layer.name)))
            elif density is not None:
                result.append(([i], num_edges(density, layer.candidates)))
            else:
                raise ValueError(
                    f"no budget pattern fits the wired parameter {layer.name!r}; add a pattern for it (or '*' as the last "
                    "one), or leave it dense with exclude"
                )
        return result


@dataclass(frozen=True)
class Floor:
    """What every layer keeps at least, whatever share of a common budget its magnitudes would give it.

    Args:
        edges: active edges of a layer.
        density: share of its candidate edges, in [0, 1]; the larger of both counts.
        per_target: active edges of each target (row of a weight, output channel), or all its candidates where it has fewer.
            It holds for layers with a budget of their own as well.
        per_source: the same of each source (column of a weight, input channel). An edge counts for both of its ends.
    """

    edges: int = 1
    density: float = 0.0
    per_target: int = 0
    per_source: int = 0

    def __post_init__(self) -> None:
        for name in ("edges", "per_target", "per_source"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Floor: {name}={value!r}: allowed is a whole number from 0 on")
        if self.density != 0:
            check_density(self.density, "Floor: density")

    def of(self, candidates: int) -> int:
        """How many edges a layer keeps of its candidates."""
        of_density = num_edges(self.density, candidates) if self.density else 0
        return min(candidates, max(self.edges, of_density))


@dataclass(frozen=True)
class Global(Budget):
    """One budget over all layers: the largest magnitudes of the whole model are active.

    Every layer keeps at least one edge, or what ``wire(..., floor=dnw.Floor(...))`` says.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def allot(self, layers: Sequence[LayerShape]) -> Allotment:
        return [(list(range(len(layers))), num_edges(self.density, sum(layer.candidates for layer in layers)))]


@dataclass(frozen=True)
class ErdosRenyiKernel(Budget):
    """Densities proportional to (sum of the dimensions) / (product of the dimensions), capped at 1, at one mean density.

    Source: Evci et al., "Rigging the Lottery", 2020, section 3 (1), after Mocanu et al., 2018. The total over all layers
    is exactly ``num_edges(density, all candidates)``; fractions of an edge go to the largest remainders.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def allot(self, layers: Sequence[LayerShape]) -> Allotment:
        total = num_edges(self.density, sum(layer.candidates for layer in layers))
        if total < len(layers):
            raise ValueError(
                f"ErdosRenyiKernel({self.density}): {total} edges cannot give each of {len(layers)} layers one; "
                "raise the density or exclude layers"
            )
        raw = [layer.candidates * sum(layer.shape) / math.prod(layer.shape) for layer in layers]
        capped: set[int] = set()
        while True:
            rest = total - sum(layers[i].candidates for i in capped)
            scale = rest / (sum(r for i, r in enumerate(raw) if i not in capped) or 1.0)
            over = {i for i, layer in enumerate(layers) if i not in capped and raw[i] * scale >= layer.candidates}
            if not over:
                break
            capped |= over
        wanted = [float(layer.candidates) if i in capped else raw[i] * scale for i, layer in enumerate(layers)]
        edges = [max(1, math.floor(w)) for w in wanted]
        by_remainder = sorted(range(len(layers)), key=lambda i: (math.floor(wanted[i]) - wanted[i], i))
        while (missing := total - sum(edges)) != 0:
            movable = [i for i in by_remainder if (edges[i] < layers[i].candidates if missing > 0 else edges[i] > 1)]
            for i in movable[: abs(missing)]:
                edges[i] += 1 if missing > 0 else -1
        return [([i], k) for i, k in enumerate(edges)]


def apportion(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to weights, none larger than its room, that add up to a total."""
    numbers = [0] * len(weights)
    while (left := total - sum(numbers)) > 0:
        open_ = [i for i in range(len(weights)) if numbers[i] < room[i]]
        if not open_:
            break
        of_open = sum(weights[i] for i in open_)
        wanted = {i: left * weights[i] / of_open if of_open else left / len(open_) for i in open_}
        for i in open_:
            numbers[i] = min(room[i], numbers[i] + math.floor(wanted[i]))
        by_remainder = sorted(open_, key=lambda i: (math.floor(wanted[i]) - wanted[i], i))
        for i in by_remainder[: max(0, total - sum(numbers))]:
            if numbers[i] < room[i] and sum(numbers) < total:
                numbers[i] += 1
    return numbers


def matches(name: str, module: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a parameter's name or the name of the module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)
