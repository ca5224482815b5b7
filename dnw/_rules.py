"""The rules: every way of finding a wiring, one short frozen class each.

Contract: a rule overrides the hooks of :class:`dnw.Rule` and nothing else. The rules of this file are listed in ``RULES``; the
parametrized tests run on every rule of that list. ``NoUpdate``, ``MagnitudePruning``, ``SET``, ``RigL`` and ``SparseMomentum``
keep the gradient from dormant edges; all others let them learn, in one way or another.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dnw._budgets import Shape, num_edges, share_out
from dnw._checks import did_you_mean
from dnw._dormant import Dormant, clear_others, momentum_of
from dnw._patterns import NOfM, Pattern
from dnw._rule import Layer, Pool, Rule, checked_score, chosen, ranking
from dnw._select import top_k_each


def _only(mask: Tensor | None, values: Tensor | None) -> Tensor:
    """Values where a mask holds, 0 elsewhere."""
    assert mask is not None
    assert values is not None
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _check(rule: Rule, **allowed: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless the named settings are numbers between two bounds; whole ones where the lower bound is."""
    for name, (low, high) in allowed.items():
        value = getattr(rule, name)
        kind = int if isinstance(low, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            bound = f"from {low:g} on" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{type(rule).__name__}: {name}={value!r}: allowed is {what} {bound}")


# --- the paper's rule, and what it is compared with ------------------------------------------------------------------


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
    def needs_dormant_gradient(self) -> bool:
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
        _check(self, rate=(0.0, 1.0))

    def prepare(self, pools: Sequence[Pool]) -> None:
        for layer in (x for pool in pools for x in pool.layers):
            assert layer.active is not None
            kept = layer.active | (layer.uniform() >= self.rate)
            layer.notes["kept"] = kept if layer.candidates is None else kept & layer.candidates

    def gradient(self, layer: Layer) -> Tensor | None:
        return _only(layer.notes["kept"], layer.grad)

    def project(self, layer: Layer) -> Tensor:
        return _only(layer.notes["kept"], layer.latent)

    def settle(self, layer: Layer) -> Tensor:
        return _only(layer.active, layer.latent)


@dataclass(frozen=True)
class MagnitudePruning(NoUpdate):
    """The smallest active edges are pruned, for good: with a density schedule gradual magnitude pruning, without one-shot.

    Source: Zhu, Gupta, "To prune, or not to prune", 2017, section 3, with ``schedule=dnw.DensitySchedule(...)``. There pruned
    weights are masked and not updated, so that one could come back where active ones shrink below it; here they become 0.
    """

    @property
    def has_latent_weights(self) -> bool:
        return False

    def is_due(self, step: int) -> bool:
        return False

    @property
    def dormant(self) -> Dormant:
        return Dormant(momentum="zero")

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        _clear_dormant(pools)
        masks = _by_magnitude(pools)
        _clear_pruned(pools, masks)
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
        _check(self, penalty=(0.0, math.inf))

    @property
    def needs_dormant_gradient(self) -> bool:
        return False

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        return layer.grad + self.penalty * layer.latent.sign()


def _clear_dormant(pools: Sequence[Pool]) -> None:
    """After a step, sets dormant weights back to 0: whatever the optimizer made of them is not meant."""
    for layer in (x for pool in pools if pool.stepped for x in pool.layers):
        if layer.active is not None:
            clear_others(layer.latent, layer.active)


def _clear_pruned(pools: Sequence[Pool], masks: Sequence[Sequence[Tensor]]) -> None:
    """Sets the weights of all but the selected edges to 0."""
    for pool, of_pool in zip(pools, masks, strict=True):
        for layer, mask in zip(pool.layers, of_pool, strict=True):
            clear_others(layer.latent, mask)


def _by_magnitude(pools: Sequence[Pool]) -> list[list[Tensor]]:
    """The edges of largest magnitude, active ones first among equals."""
    return chosen(pools, [[_active_first(x) for x in p.layers] for p in pools])


def _active_first(layer: Layer) -> Tensor:
    """Magnitudes, in which of equal ones (zeros, say) the active edges come first."""
    size = layer.latent.abs()
    size = size if size.dtype == torch.float64 else size.float()
    if layer.active is None:
        return size
    return torch.where(layer.active, torch.nextafter(size, torch.full_like(size, math.inf)), size)


# --- edges that never change -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(NoUpdate):
    """A rule whose edges never change. Dormant edges get no gradient and have no weights."""

    @property
    def has_latent_weights(self) -> bool:
        return False

    @property
    def fixed(self) -> bool:
        return True


@dataclass(frozen=True)
class RandomGraph(Fixed):
    """k candidates drawn once, uniformly, and never changed: the paper's random graph (section 4.1)."""

    def score(self, layer: Layer) -> Tensor:
        return 1.0 + layer.uniform(torch.float64)


@dataclass(frozen=True)
class Complete(Fixed):
    """Every candidate edge is active: dense training, with the wiring's book-keeping. It needs no budget."""

    @property
    def fits_floors(self) -> bool:
        return False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def num_edges(self, shape: Shape) -> int | None:
        return shape.candidates


@dataclass(frozen=True, eq=False)
class Frozen(Fixed):
    """A given edge set, never changed: one boolean mask, of the parameter's shape, per parameter name. It needs no budget."""

    edges: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fits_floors(self) -> bool:
        return False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def num_edges(self, shape: Shape) -> int | None:
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


# --- prune and grow --------------------------------------------------------------------------------------------------


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
        _check(self, every=(1, math.inf), fraction=(0.0, 1.0))
        if self.until is not None:
            _check(self, until=(1, math.inf))

    @property
    def dormant(self) -> Dormant:
        return Dormant(momentum="zero")

    def fits(self, pattern: Pattern) -> bool:
        return not isinstance(pattern, NOfM)

    @abstractmethod
    def growth(self, layer: Layer) -> Tensor:
        """The quantity of whose largest magnitudes edges are grown, of the shape of the layer."""

    @property
    def has_latent_weights(self) -> bool:
        return False

    def is_due(self, step: int) -> bool:
        return self.fraction_at(step) > 0

    def fraction_at(self, step: int) -> float:
        """The share of the active edges that is exchanged after ``step`` steps."""
        if step % self.every or (self.until is not None and step >= self.until):
            return 0.0
        return self.fraction if self.until is None else self.fraction / 2 * (1 + math.cos(math.pi * step / self.until))

    def shares(self, pool: Pool, fraction: float) -> list[tuple[list[Layer], int, int]]:
        """Groups of layers within which edges compete, and of each how many edges stay and how many are grown."""
        grown = min(int(fraction * pool.k), pool.k - max(1, pool.least)) // pool.unit * pool.unit
        return [(pool.layers, pool.k - grown, grown)]

    def pruned_apart(self, layers: Sequence[Layer], stay: int) -> list[tuple[int, list[Tensor]]]:
        """Parts of the active edges of some layers, each of which loses its smallest: how many stay, and masks of them."""
        return [(stay, [x.active for x in layers if x.active is not None])]

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        _clear_dormant(pools)
        new = [pool for pool in pools if any(x.active is None for x in pool.layers)]
        due = {id(pool): self.fraction_at(max(x.step for x in pool.layers)) if pool.stepped else 0.0 for pool in pools}
        found = dict(zip(map(id, new), self._at_random(new), strict=True))
        changing = [pool for pool in pools if id(pool) not in found and due[id(pool)]]
        found |= zip(map(id, changing), self._exchange(changing, due), strict=True)
        rest = [pool for pool in pools if id(pool) not in found]
        found |= zip(map(id, rest), _by_magnitude(rest), strict=True)
        masks = [found[id(pool)] for pool in pools]
        _clear_pruned(pools, masks)
        return masks

    def _at_random(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        return chosen(pools, [[1 + x.uniform(torch.float64) for x in pool.layers] for pool in pools])

    def _exchange(self, pools: Sequence[Pool], fraction: Mapping[int, float]) -> list[list[Tensor]]:
        groups = [group for pool in pools for group in self.shares(pool, fraction[id(pool)])]
        parts = [(x, *part) for x, stay, _ in groups for part in self.pruned_apart(x, stay)]
        staying = [(x, k, [_active_first(y) for y in x], among) for x, k, among in parts]
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
    def fits_floors(self) -> bool:
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
        return list(zip(share_out(stay, sizes, sizes), (negative, other), strict=True))


@dataclass(frozen=True)
class RigL(PruneAndGrow):
    """The rigged lottery: edges are grown where the gradient is largest.

    Source: Evci et al., "Rigging the lottery", 2020, section 3 and algorithm 1; there ``until`` is three quarters of training.
    """

    @property
    def selects_by_gradient(self) -> bool:
        return True

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

    @property
    def dormant(self) -> Dormant:
        return Dormant()

    @property
    def needs_momentum(self) -> bool:
        return True

    @property
    def needs_dormant_gradient(self) -> bool:
        return True

    @property
    def redistributes(self) -> bool:
        return True

    def growth(self, layer: Layer) -> Tensor:
        momentum, second = next(iter(momentum_of(layer).values()), None), layer.state.get("exp_avg_sq")
        if momentum is None:
            return torch.zeros_like(layer.latent)
        return momentum / (second.sqrt() + 1e-8) if isinstance(second, Tensor) else momentum

    def shares(self, pool: Pool, fraction: float) -> list[tuple[list[Layer], int, int]]:
        unit = pool.unit
        sums = []
        for x in pool.layers:
            assert x.active is not None
            momentum = _only(x.active, self.growth(x).double().abs()).sum()
            both = torch.stack([momentum, x.active.count_nonzero()])
            sums.append(both if x.shard is None else x.shard.sum(both))
        momenta, active = (part.tolist() for part in torch.stack(sums).double().unbind(1))
        active = [int(n) // unit for n in active]
        least = [-(-max(x.least, x.num_edges_of_targets()) // unit) for x in pool.layers]
        kept = max(sum(least), (pool.k - int(fraction * pool.k)) // unit)
        more = [n - at_least for n, at_least in zip(active, least, strict=True)]
        stay = [a + b for a, b in zip(least, share_out(kept - sum(least), more, more), strict=True)]
        means = [m / n if n and math.isfinite(m) else 0.0 for m, n in zip(momenta, active, strict=True)]
        room = [x.num_candidates // unit - n for x, n in zip(pool.layers, stay, strict=True)]
        grown = share_out(pool.k // unit - sum(stay), means, room)
        return [([x], n * unit, new * unit) for x, n, new in zip(pool.layers, stay, grown, strict=True)]


# --- straight-through estimators beside DNW --------------------------------------------------------------------------


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
        _check(self, decay=(0.0, math.inf))

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        assert layer.active is not None
        return torch.where(layer.active, layer.grad, layer.grad + self.decay * layer.latent)


@dataclass(frozen=True)
class Thresholded(Rule):
    """A rule whose active weights come down to 0 at the threshold, the largest dormant magnitude of their pool.

    In a layer that has edges below it, because it keeps some at least, it is the largest dormant magnitude of that layer.
    """

    @property
    def fits_floors(self) -> bool:
        return False

    def fits(self, pattern: Pattern) -> bool:
        return False

    def prepare(self, pools: Sequence[Pool]) -> None:
        for pool in pools:
            bounds = []
            for x in pool.layers:
                assert x.active is not None
                dormant, size = ~x.active if x.candidates is None else ~x.active & x.candidates, x.latent.abs()
                smallest = torch.where(x.active, size, math.inf)
                both = [_only(dormant, size), -smallest]
                bounds.append(torch.stack([part.amax() if part.numel() else part.new_full((), -math.inf) for part in both]))
            largest, shard = torch.stack(bounds), pool.layers[0].shard
            largest = largest if shard is None else shard.max(largest)
            threshold = largest[:, 0].amax().clamp(min=0)
            for x, (of_layer, smallest) in zip(pool.layers, largest, strict=True):
                x.notes["threshold"] = torch.where(-smallest < threshold, of_layer.clamp(min=0), threshold)


@dataclass(frozen=True)
class ST3(Thresholded):
    """Straight-through with soft thresholding: active weights are shrunk by the threshold, and targets scaled up again.

    Source: Vanderschueren, De Vleeschouwer, "Are straight-through gradients and soft-thresholding all you need for sparse
    training?", 2023, section 3; there with ``density=dnw.Global(...)`` and a cubic ``schedule=dnw.DensitySchedule(...)``. In
    the authors' code the threshold lies between the largest dormant and the smallest active magnitude.

    A target's scale depends on all of its weights. So that what somebody writes to the model stays as it was written, a write
    to some active weights of a target gives new latent weights to all of them, which belong to the scale that comes of it.

    Args:
        rescale: whether the weights of each target are divided by the share of their magnitude that is active (1.01 / (share
            + 0.01), as the authors have it).
    """

    rescale: bool = True

    def prepare(self, pools: Sequence[Pool]) -> None:
        super().prepare(pools)
        for layer in (x for pool in pools for x in pool.layers if self.rescale):
            size = layer.latent.abs() if layer.candidates is None else _only(layer.candidates, layer.latent.abs())
            active, whole = layer.sum_by_target(_only(layer.active, size)), layer.sum_by_target(size)
            layer.notes["scale"] = 1.01 / ((active / whole).nan_to_num(1.0) + 0.01)

    def project(self, layer: Layer) -> Tensor:
        shrunk = layer.latent.sign() * (layer.latent.abs() - layer.notes["threshold"])
        return _only(layer.active, shrunk * layer.notes["scale"] if self.rescale else shrunk)

    def remade(self, layer: Layer, written: Tensor) -> Tensor:
        if not self.rescale:
            return written
        assert layer.active is not None
        touched = layer.sum_by_target(written.to(layer.latent.dtype)) > 0
        return written | layer.active & (self.project(layer) != 0) & touched

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        shrunk = effective * self._inverse_scale(layer, effective) if self.rescale else effective
        return shrunk + effective.sign() * layer.notes["threshold"]

    def _inverse_scale(self, layer: Layer, effective: Tensor) -> Tensor:
        """1 / scale, of each target, at the latent weights that have these effective ones.

        With a magnitude E of effective weights in a target, latent weights are threshold + |effective| x, where x = 1 / scale
        is (share + 0.01) / 1.01. The share being linear in x over linear in x, x is the positive root of a parabola.
        """
        threshold, zero = layer.notes["threshold"].float(), effective == 0
        stays = _only(zero & (self.project(layer) == 0), layer.latent.abs())
        dormant = stays if layer.active is None else _only(~layer.active, stays)
        if layer.candidates is not None:
            dormant = _only(layer.candidates, dormant)
        parts = [effective.abs(), (~zero) * threshold + _only(layer.active, stays), dormant]
        e, a, d = (layer.sum_by_target(part.float()).double() for part in parts)
        b, c = a + d - e, a + d * (0.01 / 1.01)
        root = (b.square() + 4 * e * c).sqrt()
        x = torch.where(b > 0, 2 * c / (b + root), (root - b) / (2 * e)).nan_to_num(1.0)
        return x.to(layer.latent.dtype)


@dataclass(frozen=True)
class Feather(Thresholded):
    """Straight-through between hard and soft thresholding, with a smaller gradient for dormant edges.

    The effective weight is sign(w) (|w|^p - T^p)^(1/p). Source: Glentis Georgoulakis et al., "Feather: an elegant solution to
    effective DNN sparsification", 2023, section 3; there with ``density=dnw.Global(...)`` and a cubic schedule that ends at
    half of training.

    Args:
        power: p; 1 is soft thresholding, and a large one comes near hard thresholding.
        dormant_gradient: factor of dormant edges' gradient, from 0 to 1. By default the authors', which depends on the final
            density: 1 up to 95 % of zeros, 0.5 beyond; of each budget by itself, where theirs is one for the whole network.
    """

    power: float = 3.0
    dormant_gradient: float | None = None

    def __post_init__(self) -> None:
        _check(self, power=(1.0, math.inf))
        if self.dormant_gradient is not None:
            _check(self, dormant_gradient=(0.0, 1.0))

    def prepare(self, pools: Sequence[Pool]) -> None:
        super().prepare(pools)
        for pool in pools:
            factor = self.dormant_gradient
            if factor is None:
                factor = 0.5 if (pool.budget or pool.k) < num_edges(0.05, pool.num_candidates) else 1.0
            for layer in pool.layers:
                layer.notes["dormant_gradient"] = torch.full_like(layer.notes["threshold"], factor)

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.active is not None
        assert layer.grad is not None
        return torch.where(layer.active, layer.grad, layer.notes["dormant_gradient"] * layer.grad)

    def project(self, layer: Layer) -> Tensor:
        # |w| (1 - (T / |w|)^p)^(1/p), in which no power of a small weight vanishes
        share = (layer.notes["threshold"] / layer.latent.abs()).nan_to_num(1.0).clamp(max=1)
        return _only(layer.active, layer.latent * (1 - share**self.power) ** (1 / self.power))

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        share = (layer.notes["threshold"] / effective.abs()).nan_to_num(0.0, posinf=0.0)
        return effective * (1 + share**self.power) ** (1 / self.power)


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
        _check(self, backward=(1.0, math.inf), penalty=(0.0, math.inf))

    @property
    def dormant(self) -> Dormant:
        return Dormant(weight_decay=False)

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
        return _only(layer.notes["backward"], layer.grad + factor * layer.latent)

    def updated(self, layer: Layer, stepped: Tensor) -> Tensor:
        for momentum in momentum_of(layer).values():
            clear_others(momentum, layer.notes["backward"])
        return torch.where(layer.notes["backward"], stepped, layer.latent)


RULES: dict[str, type[Rule]] = {
    "dnw": DNW,
    "no_update": NoUpdate,
    "targeted_dropout": TargetedDropout,
    "magnitude_pruning": MagnitudePruning,
    "l1_anneal": L1Anneal,
    "random": RandomGraph,
    "complete": Complete,
    "frozen": Frozen,
    "set": SET,
    "rigl": RigL,
    "sparse_momentum": SparseMomentum,
    "sr_ste": SRSTE,
    "st3": ST3,
    "feather": Feather,
    "top_kast": TopKAST,
}
"""Every rule, by the name that recipes and the command line use."""
