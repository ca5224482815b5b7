"""Layers that compete for one budget, and the choice of the largest among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dnw._rules.layer import Layer
from dnw._selection.schedules import DensitySchedule
from dnw._selection.top_k import Ranking, top_k_each


@dataclass(eq=False)
class Pool:
    """Layers that compete for one budget. Most pools hold one layer.

    Attributes:
        layers: that compete.
        k: active edges over all of them. A density schedule changes it.
        stepped: whether this selection follows a step of the optimizer. It does not where weights were written by hand.
        budget: active edges in the end, where a density schedule leads to them.
        num_active: how many the last selection gave; 0 before the first.
    """

    layers: list[Layer]
    k: int
    stepped: bool = False
    budget: int = 0
    num_active: int = 0

    @property
    def num_candidates(self) -> int:
        """How many edges may exist, over all layers."""
        return sum(x.num_candidates for x in self.layers)

    @property
    def least(self) -> int:
        """Edges that its layers, and their targets, keep at least, all together; in whole units of each layer."""
        unit = self.unit
        return sum(-(-max(x.least, x.num_edges_of_nodes()) // unit) * unit for x in self.layers)

    @property
    def unit(self) -> int:
        """How many edges stand or fall together by the layers' pattern."""
        first = self.layers[0]
        return 1 if first.pattern is None else first.pattern.unit(first.layout.shape(tuple(first.latent.shape)))

    def num_edges_at(self, step: int, schedule: DensitySchedule) -> int:
        """The number of active edges after some steps, in whole units."""
        unit = self.unit
        return schedule.num_edges(step, self.budget // unit, self.num_candidates // unit) * unit

    def ranking(self, scores: Sequence[Tensor], k: int | None = None, among: Sequence[Tensor | None] = ()) -> Ranking:
        """Scores of the layers, one tensor each, that compete for the budget; what :func:`dnw.top_k_each` takes.

        Args:
            scores: of the layers' shapes; the layers' patterns are applied to them.
            k: how many edges to choose; the pool's number by default.
            among: masks of the entries to choose from; all candidate edges by default.
        """
        return ranking(self.layers, scores, self.k if k is None else k, among or [x.candidates for x in self.layers])


def ranking(
    layers: Sequence[Layer], scores: Sequence[Tensor], k: int, among: Sequence[Tensor | None], *, floors: bool = True
) -> Ranking:
    """Scores of some layers that compete for ``k`` edges, as units of the layers' patterns; with or without their floors."""
    patterns = [x.pattern for x in layers]
    pattern = patterns[0]
    least = [x.least for x in layers] if floors and len(layers) > 1 else []
    if pattern is None:
        shards = [x.shard for x in layers]
        per_target = [x.least_per_target for x in layers] if floors else []
        per_source = [x.least_per_source for x in layers] if floors else []
        layouts = [x.layout for x in layers]
        return Ranking(
            scores,
            k,
            among,
            shards if shards[0] is not None else (),
            least=least,
            least_per_target=per_target,
            least_per_source=per_source,
            layouts=layouts,
        )
    shapes = [x.layout.shape(tuple(x.latent.shape)) for x in layers]
    unit = pattern.unit(shapes[0])

    def edges(units: Tensor, layer: Layer, shape: tuple[int, ...]) -> Tensor:
        return layer.layout.from_targets(pattern.expand(units, shape))

    return Ranking(
        [pattern.scores(x.layout.by_target(score)) for x, score in zip(layers, scores, strict=True)],
        k // unit,
        [None if mask is None else pattern.units(x.layout.by_target(mask)) for x, mask in zip(layers, among, strict=True)],
        spread=[partial(edges, layer=layer, shape=shape) for layer, shape in zip(layers, shapes, strict=True)],
        least=[-(-number // unit) for number in least],
    )


def chosen(pools: Sequence[Pool], scores: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The edges of largest score of each layer of each pool, exactly ``pool.k`` in each pool, as boolean masks."""
    fixed = [_by_pattern(pool, of_pool) for pool, of_pool in zip(pools, scores, strict=True)]
    open_ = [i for i, masks in enumerate(fixed) if masks is None]
    ranked = iter(top_k_each([pools[i].ranking(scores[i]) for i in open_]))
    return [next(ranked) if masks is None else masks for masks in fixed]


def _by_pattern(pool: Pool, scores: Sequence[Tensor]) -> list[Tensor] | None:
    """The edges of a pool's layers where their pattern fixes them without a ranking."""
    found = []
    for x, score in zip(pool.layers, scores, strict=True):
        mask = None if x.pattern is None else x.pattern.choose(x.layout.by_target(score))
        if mask is None:
            return None
        found.append(x.layout.from_targets(mask))
    return found
