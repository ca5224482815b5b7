"""How the active edges are chosen, and what dormant edges get: one short frozen class a rule.

Contract: a rule sees :class:`Layer` objects and never a model or an optimizer; where a parameter is sharded it sees the part
that this process holds. The wiring calls, around each optimizer
step, ``gradient`` (before), ``select`` (after, on the updated latent weights) and ``project`` (what the model gets).
The rules of this file are listed in ``RULES``; the parametrized tests run on every rule of that list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnw._budgets import Shape
from dnw._checks import did_you_mean
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

    @property
    def num_candidates(self) -> int:
        """How many edges may exist."""
        return self.latent.numel() if self.candidates is None else int(self.candidates.count_nonzero())


@dataclass(eq=False)
class Pool:
    """Layers that compete for one budget: ``k`` active edges over all of them. Most pools hold one layer."""

    layers: list[Layer]
    k: int

    def ranking(self, scores: Sequence[Tensor]) -> Ranking:
        """Scores of the layers, one tensor each, that compete for the budget; what :func:`dnw.top_k_each` takes."""
        shards = [x.shard for x in self.layers]
        return Ranking(scores, self.k, [x.candidates for x in self.layers], shards if shards[0] is not None else ())


@dataclass(frozen=True)
class Rule:
    """How active edges are chosen. Subclass it, override what differs, and add the class to ``RULES``.

    A rule of the common kind overrides :meth:`score` alone. ``fixed`` says that the edges are chosen once, when the
    model is wired, and never again.
    """

    @property
    def fixed(self) -> bool:
        """Whether the edges stay as first chosen."""
        return False

    @property
    def settles(self) -> bool:
        """Whether ``settle`` differs from ``project``, so that a model is evaluated inside ``wiring.settled()`` only."""
        return type(self).settle is not Rule.settle

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
        return top_k_each([pool.ranking([self.score(x) for x in pool.layers]) for pool in pools])

    def gradient(self, layer: Layer) -> Tensor | None:
        """The gradient that the latent weights get in this step; None leaves it as autograd computed it."""
        return None

    def project(self, layer: Layer) -> Tensor:
        """The effective weight that the model trains with. Default: the latent weight on active edges, 0 elsewhere."""
        assert layer.active is not None
        return torch.where(layer.active, layer.latent, torch.zeros((), dtype=layer.latent.dtype, device=layer.latent.device))

    def settle(self, layer: Layer) -> Tensor:
        """The effective weight that the model is evaluated with, where it differs from the one it trains with."""
        return self.project(layer)


@dataclass(frozen=True)
class DNW(Rule):
    """Discovering Neural Wirings: the k candidates of largest magnitude are active, and every candidate is updated.

    Source: Wortsman, Farhadi, Rastegari, 2019, section 2.2, equation 4 and algorithm 1. Dormant edges get the
    straight-through gradient <Z_u, dL/dI_v>, which is what autograd gives a parameter that holds the effective weight.
    """


@dataclass(frozen=True)
class Fixed(Rule):
    """A rule whose edges never change. Dormant edges get no gradient (weight decay, which they do feel, is harmless)."""

    @property
    def fixed(self) -> bool:
        return True

    def gradient(self, layer: Layer) -> Tensor | None:
        assert layer.grad is not None
        assert layer.active is not None
        return torch.where(layer.active, layer.grad, torch.zeros((), dtype=layer.grad.dtype, device=layer.grad.device))


@dataclass(frozen=True)
class RandomGraph(Fixed):
    """k candidates drawn once, uniformly, and never changed: the paper's random graph (section 4.1)."""

    def score(self, layer: Layer) -> Tensor:
        return 1.0 + layer.uniform(torch.float64)


@dataclass(frozen=True)
class Complete(Fixed):
    """Every candidate edge is active: dense training, with the wiring's book-keeping. It needs no budget."""

    def num_edges(self, shape: Shape) -> int | None:
        return shape.candidates


@dataclass(frozen=True, eq=False)
class Frozen(Fixed):
    """A given edge set, never changed: one boolean mask, of the parameter's shape, per parameter name. It needs no budget."""

    edges: Mapping[str, Tensor] = field(default_factory=dict)

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


RULES: dict[str, type[Rule]] = {"dnw": DNW, "random": RandomGraph, "complete": Complete, "frozen": Frozen}
"""Every rule, by the name that recipes and the command line use."""
