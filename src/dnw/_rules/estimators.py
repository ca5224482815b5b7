"""Straight-through estimators: dormant edges have weights of their own, and learn in one way or another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw._rules.dormant import Dormant
from dnw._rules.layer import Layer, clear_others, momentum_of, only
from dnw._rules.pool import Pool
from dnw._rules.rule import Rule, check_settings
from dnw._selection.patterns import NOfM, Pattern
from dnw._selection.top_k import top_k_each


@dataclass(frozen=True)
class DNW(Rule):
    """Discovering Neural Wirings: the k candidates of largest magnitude are active, and every candidate is updated.

    Source: Wortsman, Farhadi, Rastegari, 2019, section 2.2, equation 4 and algorithm 1. Dormant edges get the
    straight-through gradient <Z_u, dL/dI_v>, which is what autograd gives a parameter that holds the effective weight.
    """


@dataclass(frozen=True)
class NoUpdate(Rule):
    """As DNW, but dormant edges get no gradient: one comes in only where active ones shrink below it.

    Source: Wortsman et al., 2019, section 4.2, "no update rule". Weight decay still acts on all.
    """

    @property
    def needs_dormant_gradient(self) -> bool:  # type: ignore[override]
        return type(self).gradient is not Rule.gradient  # a subclass's own says itself what dormant edges get


@dataclass(frozen=True)
class TargetedDropout(Rule):
    """In training each dormant edge is dropped with a probability at every step; in evaluation all of them are.

    Source: Gomez et al., "Learning sparse networks using targeted dropout", 2019, section 3 (unstructured weight dropout);
    as compared in Wortsman et al., 2019, section 4.2, with rate 0.95, and as there ranked over a whole layer, where Gomez et
    al. rank the weights of each output unit by themselves. Evaluate inside ``wiring.settled()``.

    Args:
        rate: probability with which a dormant edge is dropped; a dropped edge gets no gradient in that step.
    """

    rate: float = 0.95

    def __post_init__(self) -> None:
        check_settings(self, rate=(0.0, 1.0))

    def prepare(self, pools: Sequence[Pool]) -> None:
        for layer in (x for pool in pools for x in pool.layers):
            assert layer.active is not None
            kept = layer.active | (layer.uniform() >= self.rate)
            layer.notes["kept"] = kept if layer.candidates is None else kept & layer.candidates

    def gradient(self, layer: Layer) -> Tensor | None:
        return only(layer.notes["kept"], layer.grad)

    def project(self, layer: Layer) -> Tensor:
        return only(layer.notes["kept"], layer.latent)

    def settle(self, layer: Layer) -> Tensor:
        return only(layer.active, layer.latent)


@dataclass(frozen=True)
class SRSTE(Rule):
    """Sparse-refined straight-through estimator: dormant edges also decay, so that edges swap less often.

    Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", 2021, equation 9; there
    with ``pattern=dnw.NOfM(2, 4)``.

    Args:
        decay: what is added to a dormant edge's gradient, times its weight.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        check_settings(self, decay=(0.0, math.inf))

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        assert layer.active is not None
        return torch.where(layer.active, layer.grad, layer.grad + self.decay * layer.latent)


@dataclass(frozen=True)
class NormSTE(Rule):
    """Norm-scaled straight-through estimator: DNW whose dormant edges learn slowly, and by the same measure at every target.

    Where what reaches a target is normalised, its weights may be scaled at will, and their gradient is in inverse proportion to
    their norm. So the dormant edges of targets with small weights grow fastest, whatever they would be good for, and without
    bound where a target's last edge goes (docs/findings.md). Here the gradient of a dormant edge is multiplied by
    ``rate * min(1, n / m)``, where n is the norm of its target's active weights and m the mean of such norms over the layer.
    At a target without active edges there is none; ``floor=dnw.Floor(per_target=1)`` keeps one to each.

    Args:
        rate: at which dormant edges learn, as a fraction of the active ones' rate; the smaller, the longer a gradient has to
            point the same way until an edge comes in.
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self, rate=(0.0, 1.0))

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        assert layer.active is not None
        memory = only(layer.active, layer.latent)  # one for all: to fetch more costs more than the sums
        squares = memory.float().square() if memory.dtype == torch.float16 else memory.square_()  # 1e-4 ** 2 is 0 in float16
        norms = layer.sum_by_target(squares).sqrt().double()  # the same mean, however sharded
        sums = torch.stack([norms.sum(), norms.count_nonzero()])
        total, targets = sums if layer.shard is None else layer.shard.sum(sums)
        factor = self.rate * (norms * targets / total.clamp_min(1e-30)).clamp(max=1).to(layer.grad.dtype)
        return torch.where(layer.active, layer.grad, torch.mul(factor, layer.grad, out=memory), out=memory)


@dataclass(frozen=True)
class TopKAST(Rule):
    """Top-k always sparse training: only the k largest edges are used forward, and only some more get a gradient.

    Source: Jayakumar et al., "Top-KAST: top-k always sparse training", 2020, section 2. What lies outside the backward set of a
    step keeps its weight bit for bit in that step, whatever the optimizer, and loses its momentum: it comes back without one.
    Weight decay acts on no dormant edge; the penalty is the paper's exploration regularisation, w^2 / 2 on active edges and
    1 / density times that on the others of the backward set.

    Args:
        backward: number of edges in the backward set, as a multiple of the active ones.
        penalty: factor of the regularisation.
    """

    backward: float = 2.0
    penalty: float = 1e-4

    def __post_init__(self) -> None:
        check_settings(self, backward=(1.0, math.inf), penalty=(0.0, math.inf))

    dormant = Dormant(weight_decay=False)

    def fits(self, pattern: Pattern) -> bool:
        return not isinstance(pattern, NOfM)

    def prepare(self, pools: Sequence[Pool]) -> None:
        wanted = [min(pool.num_candidates, int(self.backward * pool.k) // pool.unit * pool.unit) for pool in pools]
        rankings = [p.ranking([x.latent for x in p.layers], k) for p, k in zip(pools, wanted, strict=True)]
        for pool, masks in zip(pools, top_k_each(rankings), strict=True):
            for layer, mask in zip(pool.layers, masks, strict=True):
                layer.notes["backward"] = mask
                layer.notes["penalty"] = torch.full_like(layer.latent[:0].sum(), self.penalty * pool.num_candidates / pool.k)

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        assert layer.active is not None
        factor = torch.where(layer.active, self.penalty, layer.notes["penalty"])
        return only(layer.notes["backward"], layer.grad + factor * layer.latent)

    def updated(self, layer: Layer, stepped: Tensor) -> Tensor:
        for momentum in momentum_of(layer).values():
            clear_others(momentum, layer.notes["backward"])
        return torch.where(layer.notes["backward"], stepped, layer.latent)
