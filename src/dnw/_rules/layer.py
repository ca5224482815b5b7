"""One wired parameter, as a rule sees it.

Contract: a rule sees :class:`Layer` objects and never a model or an optimizer; where a parameter is sharded it sees the part
that this process holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnw._selection.layout import TARGETS_FIRST, Layout
from dnw._selection.patterns import Pattern
from dnw._selection.shards import Shard

MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
"""Under which names optimizers keep their momentum."""


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
        least_per_target, least_per_source: active edges that each of its targets, and each of its sources, keeps at least.
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
    least_per_source: int = 0
    layout: Layout = TARGETS_FIRST
    notes: dict[str, Tensor] = field(default_factory=dict)

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1), one per entry: a function of seed, name and step alone.

        Asking twice in a step gives the same draws, so a gradient rule can repeat what the projection drew. They are
        drawn on the CPU, so that they do not depend on the device or on the rank.
        """
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{self.name}".encode(), digest_size=7).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "big"))
        shape = self.latent.shape if self.shard is None else self.shard.shape
        return self.cut(torch.rand(shape, generator=generator, dtype=dtype, device="cpu")).to(self.latent.device)

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
            sums = sums.new_zeros(size).index_copy_(dim, self.shard.indices[dim], sums)
        sums = self.layout.join(self.shard.sum(sums))
        for dim in self.layout.target_dims:
            sums = sums.index_select(dim, self.shard.indices[dim])
        return sums

    @property
    def num_candidates(self) -> int:
        """How many edges may exist."""
        return self.latent.numel() if self.candidates is None else int(self.candidates.count_nonzero())

    def num_edges_of_nodes(self) -> int:
        """Active edges that the targets and the sources keep at least, all together; none counts for both ends of an edge."""
        found = 0
        if self.least_per_target:
            found += self._num_kept(self.layout.by_target, self.least_per_target)
        if self.least_per_source:
            found += self._num_kept(self.layout.by_source, self.least_per_source)
        return min(found, self.num_candidates) if self.least_per_source else found

    def _num_kept(self, by_node: Callable[[Tensor], Tensor], least: int) -> int:
        if self.candidates is None:
            shape = by_node(torch.empty(self.latent.shape if self.shard is None else self.shard.shape, device="meta")).shape
            return shape[0] * min(least, math.prod(shape[1:]))
        kept = by_node(self.candidates).flatten(1).sum(1).clamp(max=least).sum()
        return int(kept if self.shard is None else self.shard.sum(kept))


def only(mask: Tensor | None, values: Tensor | None) -> Tensor:
    """Values where a mask holds, 0 elsewhere."""
    assert mask is not None
    assert values is not None
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def clear_others(values: Tensor, mask: Tensor | None) -> None:
    """Sets the values outside a mask to 0, in place."""
    assert mask is not None
    torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device), out=values)


def momentum_of(layer: Layer) -> dict[str, Tensor]:
    """The momentum that the optimizer keeps for a layer, by the name that it has there; none where it keeps none."""
    found = {key: layer.state.get(key) for key in MOMENTUM_KEYS}
    return {k: v for k, v in found.items() if isinstance(v, Tensor) and v.shape == layer.latent.shape}
