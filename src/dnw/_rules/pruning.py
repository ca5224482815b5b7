"""Edges that are pruned for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw._rules.dormant import Dormant
from dnw._rules.estimators import NoUpdate
from dnw._rules.layer import Layer, clear_others
from dnw._rules.pool import Pool, chosen
from dnw._rules.rule import check_settings


@dataclass(frozen=True)
class MagnitudePruning(NoUpdate):
    """The smallest active edges are pruned, for good: with a density schedule gradual magnitude pruning, without one-shot.

    Source: Zhu, Gupta, "To prune, or not to prune", 2017, section 3, with ``schedule=dnw.DensitySchedule(...)``. There pruned
    weights are masked and not updated, so that one could come back where active ones shrink below it; here they become 0.
    """

    has_latent_weights = False

    def is_due(self, step: int) -> bool:
        return False

    dormant = Dormant(momentum="zero")

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        clear_dormant(pools)
        masks = by_magnitude(pools)
        clear_pruned(pools, masks)
        return masks


@dataclass(frozen=True)
class L1Anneal(MagnitudePruning):
    """An L1 penalty on the active edges, the smallest of which are pruned on a schedule until k remain.

    Source: Wortsman et al., 2019, section 4.2, "L1 + anneal", of which no settings are published: the penalty and the
    schedule are ours. Give it ``schedule=dnw.DensitySchedule(...)``.

    Args:
        penalty: factor of the sum of the active edges' magnitudes in the loss.
    """

    penalty: float = 1e-4

    def __post_init__(self) -> None:
        check_settings(self, penalty=(0.0, math.inf))

    needs_dormant_gradient = False

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        return layer.grad + self.penalty * layer.latent.sign()


def clear_dormant(pools: Sequence[Pool]) -> None:
    """After a step, sets dormant weights back to 0: whatever the optimizer made of them is not meant."""
    for layer in (x for pool in pools if pool.stepped for x in pool.layers):
        if layer.active is not None:
            clear_others(layer.latent, layer.active)


def clear_pruned(pools: Sequence[Pool], masks: Sequence[Sequence[Tensor]]) -> None:
    """Sets the weights of all but the selected edges to 0."""
    for pool, of_pool in zip(pools, masks, strict=True):
        for layer, mask in zip(pool.layers, of_pool, strict=True):
            clear_others(layer.latent, mask)


def by_magnitude(pools: Sequence[Pool]) -> list[list[Tensor]]:
    """The edges of largest magnitude, active ones first among equals."""
    return chosen(pools, [[active_first(x) for x in p.layers] for p in pools])


def active_first(layer: Layer) -> Tensor:
    """Magnitudes, in which of equal ones (zeros, say) the active edges come first."""
    size = layer.latent.abs()
    size = size if size.dtype == torch.float64 else size.float()
    if layer.active is None:
        return size
    return torch.where(layer.active, torch.nextafter(size, torch.full_like(size, math.inf)), size)
