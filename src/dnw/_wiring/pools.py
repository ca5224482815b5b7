"""The pools of a wiring: which layers share a budget, and the choice of their edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch

from dnw._checks import listing
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule
from dnw._selection.schedules import DensitySchedule
from dnw._wiring.wired_layer import WiredLayer


class Pools:
    """Every layer is in exactly one pool.

    Args:
        pools: whose layers are wired ones.
        rule: that chooses edges.
        schedule: of the number of edges; None where it is constant.
    """

    def __init__(self, pools: Sequence[Pool], rule: Rule, schedule: DensitySchedule | None) -> None:
        self.rule, self.schedule = rule, schedule
        self._pools = list(pools)
        self._of = {id(layer): pool for pool in pools for layer in pool.layers}
        self._known_empty: set[str] = set()

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools)

    def __getitem__(self, layer: WiredLayer) -> Pool:
        return self._of[id(layer)]

    def of(self, layers: Sequence[WiredLayer]) -> list[Pool]:
        """The pools that hold one of the layers."""
        return list({id(pool): pool for pool in (self[layer] for layer in layers)}.values())

    def competing(self, layers: Sequence[WiredLayer]) -> list[WiredLayer]:
        """All layers of the pools that hold one of the layers."""
        return [x for pool in self.of(layers) for x in members(pool)]

    def is_full(self, layer: WiredLayer) -> bool:
        """Whether every entry of a layer is an active edge."""
        pool = self[layer]
        return len(pool.layers) == 1 and pool.k == math.prod(layer.shape)

    def is_due(self, pool: Pool, step: int | None) -> bool:
        """Whether a selection can change the edges of a pool: after a step, or after a write to its weights."""
        if self.rule.fixed:
            return False
        return step is None or pool.k != pool.num_active or self.rule.is_due(step)

    def follow_schedule(self, pool: Pool, step: int) -> None:
        """Gives a pool the number of active edges that it has after some steps."""
        if self.schedule is not None:
            pool.k = pool.num_edges_at(step, self.schedule)

    def choose(self, pools: Sequence[Pool], stepped: bool = False) -> list[WiredLayer]:
        """Gives the layers of some pools the edges that the rule chooses.

        Args:
            pools: some of these.
            stepped: whether this follows a step of the optimizer.

        Returns:
            The layers that may have traded edges with others of their pool.

        Raises:
            TypeError: the rule gave something else than masks of the layers' shapes.
        """
        traded = []
        for pool in pools:
            pool.stepped = stepped
        for pool, masks in zip(pools, self.rule.select(pools) if pools else [], strict=True):
            for layer, mask in zip(members(pool), masks, strict=True):
                if mask.dtype != torch.bool or mask.shape != layer.latent.shape:
                    raise TypeError(
                        f"{type(self.rule).__name__}.select gave edges of {layer.name!r} as {mask.dtype} of shape "
                        f"{tuple(mask.shape)}; expected a boolean mask of shape {tuple(layer.latent.shape)}"
                    )
                if len(pool.layers) > 1 and (layer.active is None or not torch.equal(mask, layer.active)):
                    traded.append(layer)
                layer.activate(mask)
            pool.num_active = pool.k
            self.count(pool)
            if stepped and len(pool.layers) > 1:
                self.warn_of_empty(members(pool))
        return traded

    def prepare(self, layers: Sequence[WiredLayer]) -> list[WiredLayer]:
        """Lets the rule note what it needs to know of whole pools; returns the layers that this may change."""
        if not layers or type(self.rule).prepare is Rule.prepare:
            return []
        self.rule.prepare(self.of(layers))
        return self.competing(layers)

    def count(self, pool: Pool) -> None:
        """Notes how many edges each sharded layer of a pool has, so that asking needs no messages."""
        layers = [x for x in members(pool) if x.shard is not None]
        if len(layers) < 2:
            counts = [pool.k] * len(layers)
        else:
            assert layers[0].shard is not None
            local_counts = torch.stack([x.active.count_nonzero() for x in layers if x.active is not None])
            counts = layers[0].shard.sum(local_counts).tolist()
        for layer, count in zip(layers, counts, strict=True):
            layer.num_active = count

    def warn_of_empty(self, layers: Sequence[WiredLayer]) -> None:
        """Warns, once for each, of layers without active edges: nothing passes them but biases."""
        empty = [x.name for x in layers if x.name not in self._known_empty and not x.count()]
        if empty:
            self._known_empty.update(empty)
            warnings.warn(
                f"{listing(empty)} has no active edge left, so nothing passes it; give it a budget of its own, or a floor "
                "(wire(..., floor=dnw.Floor(edges=1)))",
                stacklevel=2,
            )


def members(pool: Pool) -> list[WiredLayer]:
    """The layers of a pool of a wiring."""
    return [layer for layer in pool.layers if isinstance(layer, WiredLayer)]
