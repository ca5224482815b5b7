"""Where edges are grown: at random, where the gradient or the momentum is largest, or where a step from 0 leads furthest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw._rules.dormant import Dormant
from dnw._rules.layer import Layer, momentum_of, only
from dnw._rules.pool import Pool
from dnw._rules.prune_and_grow import PruneAndGrow
from dnw._rules.pruning import by_magnitude, clear_pruned
from dnw._rules.rule import Rule
from dnw._selection.budgets import apportion
from dnw._selection.patterns import Pattern


@dataclass(frozen=True)
class IHT(Rule):
    """Iterative hard thresholding: after each step the k weights of largest magnitude stay, and all others are 0.

    DNW without latent weights: a dormant edge begins each step at 0, so that it comes in only where a single step (and the
    momentum behind it) leads further than the smallest active weight. Dormant edges get their gradient, as in DNW.
    Source: Blumensath, Davies, "Iterative hard thresholding for compressed sensing", 2009, equation 9; of transformers, with
    Adam and a falling density, Gao et al., "Weight-sparse transformers have interpretable circuits", 2025.
    """

    has_latent_weights = False

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        masks = by_magnitude(pools)
        clear_pruned(pools, masks)
        return masks


@dataclass(frozen=True)
class SET(PruneAndGrow):
    """Sparse evolutionary training: edges are grown at random.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", 2018, algorithm 1; there once an epoch, without decay of the share, and ``by_sign``.

    Args:
        by_sign: whether positive and negative edges are pruned apart, each losing the same share: the smallest positive and
            the largest negative ones, as in the paper. Otherwise the smallest magnitudes of both together go.
    """

    by_sign: bool = False

    @property
    def fits_floors(self) -> bool:  # type: ignore[override]
        return not self.by_sign

    def fits(self, pattern: Pattern) -> bool:
        return super().fits(pattern) and not self.by_sign

    def growth(self, layer: Layer) -> Tensor:
        return 1 + layer.uniform(torch.float64)

    def pruned_apart(self, layers: Sequence[Layer], stay: int) -> list[tuple[int, list[Tensor]]]:
        if not self.by_sign:
            return super().pruned_apart(layers, stay)
        active = [x.active for x in layers if x.active is not None]
        negative = [mask & (x.latent < 0) for x, mask in zip(layers, active, strict=True)]
        other = [mask & ~below for mask, below in zip(active, negative, strict=True)]  # zeros are the smallest of the positive
        counts = torch.stack([torch.stack([mask.count_nonzero() for mask in masks]).sum() for masks in (negative, other)])
        shard = layers[0].shard
        sizes = [int(n) for n in (counts if shard is None else shard.sum(counts)).tolist()]
        return list(zip(apportion(stay, sizes, sizes), (negative, other), strict=True))


@dataclass(frozen=True)
class RigL(PruneAndGrow):
    """The rigged lottery: edges are grown where the gradient is largest.

    Source: Evci et al., "Rigging the lottery", 2020, section 3 and algorithm 1; there ``until`` is three quarters of training.
    """

    selects_by_gradient = True

    def growth(self, layer: Layer) -> Tensor:
        return torch.zeros_like(layer.latent) if layer.grad is None else layer.grad


@dataclass(frozen=True)
class SparseMomentum(PruneAndGrow):
    """Sparse networks from scratch: edges are grown where the momentum is largest, and in the layers where it is.

    Every layer loses the same share of its edges; what is grown is shared out in proportion to the mean magnitude of the
    momentum of the layers' active edges. Needs an optimizer with momentum, which here sees the gradient of all edges; of Adam
    and its kin it is the first moment divided by the root of the second, as in the authors' code.
    Source: Dettmers, Zettlemoyer, "Sparse networks from scratch", 2019, section 3 and algorithm 1; there once an epoch. Their
    code sets the momentum of dormant edges to the mean of the active ones' after each exchange; here it goes on as it is.
    """

    fraction: float = 0.5

    dormant = Dormant()

    needs_momentum = True

    needs_dormant_gradient = True

    redistributes = True

    def growth(self, layer: Layer) -> Tensor:
        momentum, second = next(iter(momentum_of(layer).values()), None), layer.state.get("exp_avg_sq")
        if momentum is None:
            return torch.zeros_like(layer.latent)
        return momentum / (second.sqrt() + 1e-8) if isinstance(second, Tensor) else momentum

    def groups(self, pool: Pool, fraction: float) -> list[tuple[list[Layer], int, int]]:
        unit = pool.unit
        sums = []
        for x in pool.layers:
            assert x.active is not None
            momentum = only(x.active, self.growth(x).double().abs()).sum()
            both = torch.stack([momentum, x.active.count_nonzero()])
            sums.append(both if x.shard is None else x.shard.sum(both))
        momenta, active = (part.tolist() for part in torch.stack(sums).double().unbind(1))
        active = [int(n) // unit for n in active]
        least = [-(-max(x.least, x.num_edges_of_nodes()) // unit) for x in pool.layers]
        kept = max(sum(least), (pool.k - int(fraction * pool.k)) // unit)
        more = [n - at_least for n, at_least in zip(active, least, strict=True)]
        stay = [a + b for a, b in zip(least, apportion(kept - sum(least), more, more), strict=True)]
        means = [m / n if n and math.isfinite(m) else 0.0 for m, n in zip(momenta, active, strict=True)]
        room = [x.num_candidates // unit - n for x, n in zip(pool.layers, stay, strict=True)]
        grown = apportion(pool.k // unit - sum(stay), means, room)
        return [([x], n * unit, new * unit) for x, n, new in zip(pool.layers, stay, grown, strict=True)]
