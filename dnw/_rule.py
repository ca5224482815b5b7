"""What a rule is: how the active edges are chosen, and what dormant edges get.

Contract: a rule sees :class:`Layer` objects and never a model or an optimizer; where a parameter is sharded it sees the part
that this process holds. The wiring calls, around each optimizer step, ``gradient`` (before), ``updated``, ``select`` and
``prepare`` (after, on the updated latent weights) and ``project`` (what the model gets).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dnw._budgets import Shape
from dnw._checks import nearest
from dnw._dormant import Dormant
from dnw._layout import TARGETS_FIRST, Layout
from dnw._patterns import Pattern
from dnw._select import Ranking, top_k_each
from dnw._shards import Shard


@dataclass(eq=False)
class Layer:
    """One wired parameter, as a rule sees it.

    Attributes:
        name: the parameter's name in its model, without the prefixes of wrappers.
        latent: the dense weights that selection ranks, of the parameter's shape; a rule may write to them in ``select``
            (growing an edge from zero, say).
        candidates: mask of the edges that may exist, of the same shape, or None where every entry may.
        active: mask of the active edges; None before the first selection.
        grad: the unscaled gradient of this step; None outside a step, where the parameter got none, and in ``select``
            unless the rule ``selects_by_gradient``.
        state: what the optimizer keeps for this parameter (momentum and the like).
        shard: which part of a sharded parameter all these tensors are; None where they are the whole.
        pattern: which edges stand or fall together; None where each stands for itself.
        least: active edges that it keeps at least, where it shares a budget with others.
        least_per_target: active edges that each of its targets keeps at least.
        layout: which dimensions of all these tensors are targets, and which are sources.
        notes: what the rule noted in ``prepare``. It is made anew where a run is resumed, so it need not be stored.
        step: number of completed optimizer steps when this layer was last projected; 0 before the first.
        seed: the wiring's seed.
    """

    name: str
    latent: Tensor
    candidates: Tensor | None
    seed: int
    active: Tensor | None = None
    grad: Tensor | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    shard: Shard | None = None
    pattern: Pattern | None = None
    least: int = 0
    least_per_target: int = 0
    layout: Layout = TARGETS_FIRST
    notes: dict[str, Tensor] = field(default_factory=dict)

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1), one per entry: a function of seed, name and step alone.

        Asking twice in a step gives the same draws, so a gradient rule can repeat what the projection drew. They are
        drawn on the CPU, so that they do not depend on the device or on the rank.
        """
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{self.name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        shape = self.latent.shape if self.shard is None else self.shard.shape
        return self.cut(torch.rand(shape, generator=generator, dtype=dtype)).to(self.latent.device)

    def cut(self, whole: Tensor) -> Tensor:
        """Of a tensor of the whole parameter's shape the part that this process holds."""
        return whole if self.shard is None else self.shard.cut(whole)

    def sum_by_target(self, values: Tensor) -> Tensor:
        """Sums over the edges of each target, in a shape that broadcasts over the layer's tensors.

        Args:
            values: of the layer's shape. Of a sharded parameter the sums are over all processes that hold a part of it, so ask
                on all of them.
        """
        sums = self.layout.partial_sums(values)
        if self.shard is None:
            return self.layout.join(sums)
        for dim in self.layout.target_dims:
            size = [self.shard.shape[dim] if i == dim else n for i, n in enumerate(sums.shape)]
            sums = sums.new_zeros(size).index_copy_(dim, self.shard.places[dim], sums)
        sums = self.layout.join(self.shard.sum(sums))
        for dim in self.layout.target_dims:
            sums = sums.index_select(dim, self.shard.places[dim])
        return sums

    @property
    def num_candidates(self) -> int:
        """How many edges may exist."""
        return self.latent.numel() if self.candidates is None else int(self.candidates.count_nonzero())

    def num_edges_of_targets(self) -> int:
        """Active edges that the targets keep at least, all together."""
        if not self.least_per_target:
            return 0
        if self.candidates is None:
            shape = self.layout.shape(tuple(self.latent.shape if self.shard is None else self.shard.shape))
            return shape[0] * min(self.least_per_target, math.prod(shape[1:]))
        kept = self.layout.by_target(self.candidates).flatten(1).sum(1).clamp(max=self.least_per_target).sum()
        return int(kept if self.shard is None else self.shard.sum(kept))


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
        """Edges that its layers, and their targets, keep at least, all together."""
        return sum(max(x.least, x.num_edges_of_targets()) for x in self.layers)

    @property
    def unit(self) -> int:
        """How many edges stand or fall together by the layers' pattern."""
        first = self.layers[0]
        return 1 if first.pattern is None else first.pattern.unit(first.layout.shape(tuple(first.latent.shape)))

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
        layouts = [x.layout for x in layers]
        return Ranking(
            scores,
            k,
            among,
            shards if shards[0] is not None else (),
            least=least,
            least_per_target=per_target,
            layouts=layouts,
        )
    shapes = [x.layout.shape(tuple(x.latent.shape)) for x in layers]
    unit = pattern.unit(shapes[0])

    def edges(units: Tensor, layer: Layer, shape: tuple[int, ...]) -> Tensor:
        return layer.layout.from_targets(pattern.edges(units, shape))

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


def checked_score(rule: Rule, hook: str, layer: Layer, score: Tensor) -> Tensor:
    """What a hook of a rule gave for ranking; raises where that cannot be ranked.

    Raises:
        TypeError: it is no floating-point tensor of the layer's shape, on its device.
        ValueError: the first time, where every weight is finite, some of it is not a number.
    """
    shape, device = tuple(layer.latent.shape), layer.latent.device
    is_tensor = isinstance(score, Tensor)
    if not is_tensor or not score.is_floating_point() or tuple(score.shape) != shape or score.device != device:
        given = f"{score.dtype} of shape {tuple(score.shape)} on {score.device}" if is_tensor else repr(score)
        raise TypeError(
            f"{type(rule).__name__}.{hook} gave {given} for {layer.name!r}; expected a floating-point tensor of shape {shape} "
            f"on {device}"
        )
    if layer.active is None:
        bad = score.isnan().count_nonzero()
        if int(bad if layer.shard is None else layer.shard.sum(bad)):
            raise ValueError(
                f"{type(rule).__name__}.{hook} gave NaN for {layer.name!r}, and magnitudes cannot be ranked with NaN; give "
                "such edges a number, 0 to rank them last"
            )
    return score


@dataclass(frozen=True)
class Rule:
    """How active edges are chosen. Subclass it, override what differs, and add the class to ``RULES``.

    A rule of the common kind overrides :meth:`score` alone.

    Raises:
        TypeError: when a subclass is defined one of whose methods is nearly, but not quite, named as a hook.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherited = {name: value for base in reversed(cls.__mro__[1:]) for name, value in vars(base).items()}
        hooks = [n for n, v in inherited.items() if isinstance(v, (FunctionType, property)) and not n.startswith("_")]
        for name, value in vars(cls).items():
            if name in inherited or name.startswith("_") or not isinstance(value, (FunctionType, property)):
                continue
            if meant := nearest(name, hooks, cutoff=0.8):
                raise TypeError(
                    f"{cls.__name__}.{name} is no hook of a rule, so nothing would call it; for the hook {meant!r} name it so, "
                    f"and a helper of your own _{name}"
                )

    @property
    def fixed(self) -> bool:
        """Whether the edges are chosen once, when the model is wired, and never again."""
        return False

    @property
    def has_latent_weights(self) -> bool:
        """Whether dormant edges keep weights of their own. Where they do not, the parameter itself is stepped, in place."""
        return True

    @property
    def needs_dormant_gradient(self) -> bool:
        """Whether dormant edges get a gradient. If not, it is set to 0 there, whatever ``gradient`` says."""
        return True

    def is_due(self, step: int) -> bool:
        """Whether edges may change after so many steps. Where not, ``select`` is called only if the number of edges changes."""
        return True

    @property
    def dormant(self) -> Dormant:
        """What weight decay and momentum do to dormant edges, unless the user says otherwise."""
        return Dormant()

    @property
    def redistributes(self) -> bool:
        """Whether edges move between layers: then all layers are one pool, and begin with what the budget gives each."""
        return False

    @property
    def needs_momentum(self) -> bool:
        """Whether the rule reads the optimizer's momentum."""
        return False

    def fits(self, pattern: Pattern) -> bool:
        """Whether the rule's edges may have a pattern."""
        return True

    @property
    def fits_floors(self) -> bool:
        """Whether each target may keep a least number of edges (``dnw.Floor``)."""
        return True

    @property
    def settles(self) -> bool:
        """Whether ``settle`` differs from ``project``, so that a model is evaluated inside ``wiring.settled()`` only."""
        return type(self).settle is not Rule.settle

    @property
    def is_plain(self) -> bool:
        """Whether it takes the largest latent weights, as they are, and nothing else: then one pass over them does all."""
        hooks = ("score", "updated", "select", "prepare", "project")
        return not self.fixed and all(getattr(type(self), hook) is getattr(Rule, hook) for hook in hooks)

    @property
    def selects_by_gradient(self) -> bool:
        """Whether ``select`` or ``score`` reads ``layer.grad``, which is kept for them only then."""
        return False

    def num_edges(self, shape: Shape) -> int | None:
        """The number of edges of a layer where the rule itself fixes it; None where the budget decides."""
        return None

    def score(self, layer: Layer) -> Tensor:
        """The quantity whose largest magnitudes become active, of the shape of the layer. Default: the latent weights."""
        return layer.latent

    def select(self, pools: Sequence[Pool]) -> list[list[Tensor]]:
        """The active edges of each layer of each pool, as boolean masks; exactly ``pool.k`` are true in each pool."""
        return chosen(pools, [[checked_score(self, "score", x, self.score(x)) for x in pool.layers] for pool in pools])

    def prepare(self, pools: Sequence[Pool]) -> None:
        """Notes in ``layer.notes`` what ``gradient`` and ``project`` need to know of a whole pool; after every selection."""

    def gradient(self, layer: Layer) -> Tensor | None:
        """The gradient that the latent weights get in this step; None leaves it as autograd computed it."""
        return None

    def updated(self, layer: Layer, stepped: Tensor) -> Tensor:
        """The latent weights after a step, from what the optimizer made of ``layer.latent``; as it made them by default.

        It may also change ``layer.state`` in place. Called between ``gradient`` and ``select``.
        """
        return stepped

    def project(self, layer: Layer) -> Tensor:
        """The effective weight that the model trains with. Default: the latent weight on active edges, 0 elsewhere."""
        assert layer.active is not None
        return torch.where(layer.active, layer.latent, torch.zeros((), dtype=layer.latent.dtype, device=layer.latent.device))

    def latent_of(self, layer: Layer, effective: Tensor) -> Tensor:
        """The latent weights that ``project`` makes these effective weights of; for values that others write to the model."""
        return effective

    def remade(self, layer: Layer, written: Tensor) -> Tensor:
        """The entries to which ``latent_of`` gives new latent weights after a write to some; those alone by default."""
        return written

    def settle(self, layer: Layer) -> Tensor:
        """The effective weight that the model is evaluated with, where it differs from the one it trains with."""
        return self.project(layer)
