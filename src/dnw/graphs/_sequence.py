"""A dynamic graph over a sequence: its state is kept from one element to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnw.graphs._dynamic import DynamicGraph


class SequenceGraph(nn.Module):
    """A recurrent network whose wiring can be learned: each element is added to the inputs' state, then the graph evolves.

    With a :class:`DiscreteTimeGraph` this is a recurrent network, with a :class:`ContinuousTimeGraph` a neural differential
    equation that is driven by the sequence.

    Args:
        graph: the dynamic graph; its nodes may be numbers or maps.

    Shape:
        ``[batch, length, inputs, ...]`` to outputs ``[batch, length, outputs, ...]`` and the last state
        ``[batch, nodes, ...]``, from which a call with ``state`` goes on.
    """

    def __init__(self, graph: DynamicGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.ndim != (5 if self.graph.maps else 3) or x.shape[1] < 1:
            kind = "maps [batch, length, inputs, height, width]" if self.graph.maps else "numbers [batch, length, inputs]"
            raise ValueError(f"expected a sequence of {kind}, got a tensor of shape {tuple(x.shape)}")
        wanted = (len(x), self.graph.num_nodes, *x.shape[3:])
        if state is not None and state.shape != wanted:
            raise ValueError(f"expected a state of shape {wanted}, got one of {tuple(state.shape)}")
        outputs = []
        for element in x.unbind(1):
            state = self.graph.start(element) if state is None else self.graph.feed(state, element)
            state = self.graph.advance(state)
            outputs.append(self.graph.read(state))
        assert state is not None
        return torch.stack(outputs, dim=1), state
