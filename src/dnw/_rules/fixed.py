"""Edges that never change: drawn at random, all of them, or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dnw._checks import did_you_mean
from dnw._rules.estimators import NoUpdate
from dnw._rules.layer import Layer
from dnw._rules.pool import Pool
from dnw._selection.budgets import LayerShape
from dnw._selection.patterns import Pattern


@dataclass(frozen=True)
class Fixed(NoUpdate):
    """A rule whose edges never change. Dormant edges get no gradient and have no weights."""

    has_latent_weights = False

    fixed = True


@dataclass(frozen=True)
class RandomGraph(Fixed):
    """k candidates drawn once, uniformly, and never changed: the paper's random graph (section 4.1)."""

    def score(self, layer: Layer) -> Tensor:
        return 1.0 + layer.uniform(torch.float64)


@dataclass(frozen=True)
class Complete(Fixed):
    """Every candidate edge is active: dense training, with the wiring's book-keeping. It needs no budget."""

    fits_floors = False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def num_edges(self, shape: LayerShape) -> int | None:
        return shape.candidates


@dataclass(frozen=True, eq=False)
class Frozen(Fixed):
    """A given edge set, never changed: one boolean mask, of the parameter's shape, per parameter name. It needs no budget."""

    edges: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    fits_floors = False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def num_edges(self, shape: LayerShape) -> int | None:
        mask = self.edges.get(shape.name)
        if mask is None:
            raise ValueError(
                f"Frozen has no edges for the wired parameter {shape.name!r}{did_you_mean(shape.name, self.edges)}; "
                "give a mask for it, or leave it dense with exclude"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != shape.shape:
            raise ValueError(
                f"Frozen edges for {shape.name!r}: expected a boolean mask of shape {shape.shape}, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}"
            )
        return int(mask.count_nonzero())

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        masks = []
        for pool in pools:
            (layer,) = pool.layers
            mask = layer.cut(self.edges[layer.name]).to(layer.latent.device)
            outside = (mask & ~layer.candidates).count_nonzero() if layer.candidates is not None else mask.new_zeros(())
            if int(outside if layer.shard is None else layer.shard.sum(outside)):
                raise ValueError(f"Frozen edges for {layer.name!r} include entries that are not candidate edges")
            masks.append([mask])
        return masks
