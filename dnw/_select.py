"""Which edges are active: budgets, and the k largest magnitudes, exactly.

Contract: ``num_edges`` is the only place where a density becomes a number of edges; ``top_k`` is the only place where
scores become an edge set. Both are exact: k active edges are k, with ties, with all-equal and with all-zero scores.
Among equal magnitudes the lowest flat index wins, on every device and in every dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from dnw._checks import check_density, check_num_edges, listing

# --- budgets ---------------------------------------------------------------------------------------------------------


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
class Shape:
    """What a budget needs to know of a layer: its names, its shape and how many candidate edges it has."""

    name: str
    module: str
    shape: tuple[int, ...]
    candidates: int


Shares = list[tuple[list[int], int]]
"""Pools of layers that compete for one budget: (indices of the layers, number of active edges)."""


class Budget(ABC):
    """How many edges each layer may keep."""

    @abstractmethod
    def shares(self, layers: Sequence[Shape]) -> Shares:
        """Returns the pools of layers and the number of active edges of each; every layer is in exactly one pool."""


@dataclass(frozen=True)
class Uniform(Budget):
    """One density for every layer."""

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def shares(self, layers: Sequence[Shape]) -> Shares:
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

    def shares(self, layers: Sequence[Shape]) -> Shares:
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
        result: Shares = []
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
class Global(Budget):
    """One budget over all layers: the largest magnitudes of the whole model are active.

    A layer may end with no active edge at all.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def shares(self, layers: Sequence[Shape]) -> Shares:
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

    def shares(self, layers: Sequence[Shape]) -> Shares:
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


def matches(name: str, module: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a parameter's name or the name of the module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)


# --- the k largest magnitudes ----------------------------------------------------------------------------------------


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values| as integers, which are ordered as the magnitudes are.

    Integers compare exactly whatever the floating-point mode, and denormals stay apart. Half precision is widened to
    float32 first, which is exact. NaN ranks above infinity: callers refuse non-finite values.
    """
    if values.dtype == torch.float64:
        return values.contiguous().view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF
    return values.to(torch.float32).contiguous().view(torch.int32) & 0x7FFF_FFFF


def top_k(scores: Sequence[Tensor], k: int, candidates: Sequence[Tensor | None]) -> list[Tensor]:
    """The edge sets of the k candidates of largest |score|, over all the given tensors together.

    Args:
        scores: one tensor per layer, of any shape; ranked by magnitude.
        k: number of active edges over all layers, from 1 to the number of candidates.
        candidates: one boolean mask per layer, of the shape of its scores, or None where every entry is a candidate.

    Returns:
        One boolean mask per layer, k of whose entries are true in all. Among equal magnitudes the lowest flat index of
        the earliest layer wins.
    """
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    flat = []
    for score, candidate in zip(scores, candidates, strict=True):
        bits = magnitude_bits(score.detach().to(dtype))
        flat.append((bits if candidate is None else bits.masked_fill_(~candidate, -1)).reshape(-1))
    bits = flat[0] if len(flat) == 1 else torch.cat(flat)
    threshold = _kth_largest(bits, k)
    mask = bits >= threshold
    surplus = int(mask.count_nonzero()) - k
    if surplus:  # ties at the k-th magnitude: those of highest index go
        ties = (bits == threshold).nonzero().squeeze(1)
        mask[ties[-surplus:]] = False
    sizes = [s.numel() for s in scores]
    return [m.view(s.shape) for m, s in zip(mask.split(sizes), scores, strict=True)]


_SAMPLE = 1 << 16


def _kth_largest(bits: Tensor, k: int) -> Tensor:
    """The k-th largest entry of a flat integer tensor, without sorting it.

    A strided sample of 65,536 entries gives a bracket that holds the k-th largest with near certainty; only the few per
    cent of entries inside the bracket are then ranked. Where the bracket misses, everything is ranked: the result is
    exact either way.
    """
    n = bits.numel()
    if n > 4 * _SAMPLE and bits.device.type == "cpu":
        stride = (n // _SAMPLE) | 1
        sample = bits[::stride].sort(descending=True).values
        m, share = sample.numel(), k / n
        middle, margin = round(share * m), math.ceil(5 * math.sqrt(m * share * (1 - share))) + 5
        high = sample[middle - margin] if middle > margin else None
        low = sample[middle + margin] if middle + margin < m else None
        above = int((bits > high).count_nonzero()) if high is not None else 0
        inside = bits
        if low is not None:
            inside = bits[(bits >= low) & (bits <= high)] if high is not None else bits[bits >= low]
        elif high is not None:
            inside = bits[bits <= high]
        if above < k <= above + inside.numel():
            return _rank(inside, k - above)
    return _rank(bits, k)


def _rank(bits: Tensor, k: int) -> Tensor:
    """The k-th largest of all entries: a partial selection on CPU, a radix selection elsewhere."""
    if bits.device.type == "cpu":
        return bits.kthvalue(bits.numel() - k + 1).values
    return bits.topk(k).values[-1]
