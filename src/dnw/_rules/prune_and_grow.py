"""What rules have in common that exchange edges now and then: the smallest are pruned, as many others grown."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw._rules.dormant import Dormant
from dnw._rules.estimators import NoUpdate
from dnw._rules.layer import Layer
from dnw._rules.pool import Pool, chosen, ranking
from dnw._rules.pruning import active_first, by_magnitude, clear_dormant, clear_pruned
from dnw._rules.rule import check_settings, checked_score
from dnw._selection.patterns import NOfM, Pattern
from dnw._selection.top_k import top_k_each


@dataclass(frozen=True)
class PruneAndGrow(NoUpdate):
    """Now and then, the smallest active edges are pruned and as many others grown, from weight 0; they start at random.

    What rules of this kind have in common. Unlike in the papers the optimizer also steps where edges are exchanged. A pruned
    edge may be grown again at once; then it keeps its weight. The number exchanged is rounded down, so a layer with very few
    edges keeps them.

    Args:
        every: steps between two exchanges.
        fraction: share of the active edges that is exchanged, from 0 to 1.
        until: steps after which nothing is exchanged any more. The share falls to 0 by then, as a cosine does; without it,
            the share stays.
    """

    every: int = 100
    fraction: float = 0.3
    until: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, every=(1, math.inf), fraction=(0.0, 1.0))
        if self.until is not None:
            check_settings(self, until=(1, math.inf))

    dormant = Dormant(momentum="zero")

    def fits(self, pattern: Pattern) -> bool:
        return not isinstance(pattern, NOfM)

    @abstractmethod
    def growth(self, layer: Layer) -> Tensor:
        """The quantity of whose largest magnitudes edges are grown, of the shape of the layer."""

    has_latent_weights = False

    def is_due(self, step: int) -> bool:
        return self.fraction_at(step) > 0

    def fraction_at(self, step: int) -> float:
        """The share of the active edges that is exchanged after ``step`` steps."""
        if step % self.every or (self.until is not None and step >= self.until):
            return 0.0
        return self.fraction if self.until is None else self.fraction / 2 * (1 + math.cos(math.pi * step / self.until))

    def groups(self, pool: Pool, fraction: float) -> list[tuple[list[Layer], int, int]]:
        """Groups of layers within which edges compete, and of each how many edges stay and how many are grown."""
        grown = min(int(fraction * pool.k), pool.k - max(1, pool.least)) // pool.unit * pool.unit
        return [(pool.layers, pool.k - grown, grown)]

    def pruned_apart(self, layers: Sequence[Layer], stay: int) -> list[tuple[int, list[Tensor]]]:
        """Parts of the active edges of some layers, each of which loses its smallest: how many stay, and masks of them."""
        return [(stay, [x.active for x in layers if x.active is not None])]

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        clear_dormant(pools)
        new = [pool for pool in pools if any(x.active is None for x in pool.layers)]
        due = {id(pool): self.fraction_at(max(x.step for x in pool.layers)) if pool.stepped else 0.0 for pool in pools}
        found = dict(zip(map(id, new), self._at_random(new), strict=True))
        changing = [pool for pool in pools if id(pool) not in found and due[id(pool)]]
        found |= zip(map(id, changing), self._exchange(changing, due), strict=True)
        rest = [pool for pool in pools if id(pool) not in found]
        found |= zip(map(id, rest), by_magnitude(rest), strict=True)
        masks = [found[id(pool)] for pool in pools]
        clear_pruned(pools, masks)
        return masks

    def _at_random(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        return chosen(pools, [[1 + x.uniform(torch.float64) for x in pool.layers] for pool in pools])

    def _exchange(self, pools: Sequence[Pool], fraction: Mapping[int, float]) -> list[list[Tensor]]:
        groups = [group for pool in pools for group in self.groups(pool, fraction[id(pool)])]
        parts = [(x, *part) for x, stay, _ in groups for part in self.pruned_apart(x, stay)]
        staying = [(x, k, [active_first(y) for y in x], among) for x, k, among in parts]
        left = iter(_top_k_each(staying, floors=len(parts) == len(groups)))
        edges = {id(y): torch.zeros_like(y.latent, dtype=torch.bool) for x, _, _ in groups for y in x}
        for x, _, _ in parts:
            for y, mask in zip(x, next(left), strict=True):
                edges[id(y)] |= mask
        free = [[~edges[id(y)] if y.candidates is None else ~edges[id(y)] & y.candidates for y in x] for x, _, _ in groups]
        scores = [[checked_score(self, "growth", y, self.growth(y)) for y in x] for x, _, _ in groups]
        growing = _top_k_each([(x, k, s, among) for (x, _, k), s, among in zip(groups, scores, free, strict=True)])
        for (x, _, _), masks in zip(groups, growing, strict=True):
            for y, mask in zip(x, masks, strict=True):
                edges[id(y)] |= mask
        return [[edges[id(y)] for y in pool.layers] for pool in pools]


def _top_k_each(
    groups: Sequence[tuple[list[Layer], int, list[Tensor], Sequence[Tensor | None]]], *, floors: bool = False
) -> list[list[Tensor]]:
    """:func:`top_k_each` where k may be 0."""
    ranked = iter(top_k_each([ranking(layers, scores, k, among, floors=floors) for layers, k, scores, among in groups if k]))
    return [next(ranked) if k else [torch.zeros_like(x.latent, dtype=torch.bool) for x in layers] for layers, k, _, _ in groups]
