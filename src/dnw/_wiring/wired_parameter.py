"""One wired parameter as its user sees it.

Contract: whatever is asked is answered as of the end of the last step; whatever is written takes effect at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnw._wiring.edges import Edges
from dnw._wiring.exchange import Exchange
from dnw._wiring.wired_layer import WiredLayer
from dnw.graphs._protocol import NodeMatrix


class WiredParameter:
    """One wired parameter by name: its edges and its latent weights."""

    def __init__(self, exchange: Exchange, layer: WiredLayer) -> None:
        self._exchange, self._layer = exchange, layer

    def __repr__(self) -> str:
        return f"<{self.name}: {self.num_active:,} of {self.num_candidates:,} candidate edges active>"

    @property
    def name(self) -> str:
        return self._layer.name

    @property
    def candidates(self) -> Tensor:
        """Boolean mask of the edges that may exist, of the parameter's shape."""
        mask, latent = self._layer.candidates, self._layer.latent
        return self._layer.whole(torch.ones_like(latent, dtype=torch.bool) if mask is None else mask.clone())

    @property
    def active(self) -> Tensor:
        """Boolean mask of the active edges. An active edge may have weight 0; a dormant one always has."""
        with self._exchange.question():
            assert self._layer.active is not None
            return self._layer.whole(self._layer.active.clone())

    @property
    def entered(self) -> Tensor:
        """Boolean mask of the edges that became active at the last step."""
        with self._exchange.question():
            assert self._layer.active is not None
            return self._layer.whole(self._layer.active & ~self._layer.previous)

    @property
    def latent(self) -> Tensor:
        """The dense weights that selection ranks. Assign to write; what was written is projected at once.

        What is read is a copy. It is an inference tensor, so that writing to it in place, which would change nothing, is an
        error of PyTorch's: ``clone()`` it, change the clone, and assign that. Autograd wants a clone as well, where it saves
        it for a product, say.

        Raises:
            ValueError: an assigned tensor has another shape or is not finite.
        """
        with self._exchange.question(), torch.inference_mode():
            return self._layer.whole(self._layer.latent.clone())

    @latent.setter
    def latent(self, value: Tensor) -> None:
        layer = self._layer
        if layer not in self._exchange.weights.layers:
            raise ValueError(f"{self.name!r} is not wired any more; write to the model's parameter instead")
        if tuple(value.shape) != layer.shape:
            raise ValueError(f"latent weights of {self.name!r}: expected shape {layer.shape}, got {tuple(value.shape)}")
        self._exchange.write_latent(layer, value.detach())

    @property
    def weight(self) -> Tensor:
        """The effective weight: what the model holds."""
        layer = self._layer
        with self._exchange.question():
            if not layer.exchanged:
                return layer.parameter.detach().clone()
            return layer.whole(self._exchange.weights.rule.project(layer).to(layer.parameter_dtype))

    @property
    def num_candidates(self) -> int:
        """How many edges may exist."""
        return self._layer.num_candidates

    @property
    def num_active(self) -> int:
        """How many edges are active."""
        if self._layer.shard is not None:
            return self._layer.count()
        with self._exchange.question():
            return self._layer.count()

    @property
    def density(self) -> float:
        """Share of the candidate edges that is active."""
        return self.num_active / self.num_candidates

    def edges(self) -> Edges:
        """The active edges as data: an edge list that also gives SciPy CSR, networkx and JSON.

        The edges of a sharded parameter are gathered: ask on every process.
        """
        weight, active = self.weight, self.active
        if self._layer.shard is not None:
            weight, active = weight.full_tensor(), active.full_tensor()  # type: ignore[attr-defined]
        graph = self._layer.module
        if self._layer.is_graph and isinstance(graph, NodeMatrix):
            return Edges.from_matrix(self.name, graph.node_matrix(weight), graph.node_matrix(active), is_graph=True)
        return Edges.from_weight(self.name, weight, active, self._layer.layout)
