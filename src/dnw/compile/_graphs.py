"""Static graphs as torch.export is to see them: level by level, each reading all earlier states at once.

Contract: the model is as it was afterwards. As a layer a graph adds what each level sends to all later ones; where absent edges
cost nothing it is the other way round: the states of all earlier levels lie side by side, and a level is one sum over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.graphs import StaticGraph


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Within, static graphs gather what their nodes receive; those with a ``forward`` of their own stay as they are."""
    own = [graph for graph in model.modules() if isinstance(graph, StaticGraph) and is_plain(graph)]
    for graph in own:
        graph.forward = _gathered(graph)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for graph in own:
            del graph.forward


def is_plain(graph: StaticGraph) -> bool:
    """Whether a graph computes what its class says."""
    return type(graph).forward is StaticGraph.forward and "forward" not in vars(graph)


def _gathered(graph: StaticGraph) -> Callable[[Tensor], Tensor]:
    """What a graph computes: for each level but the first, and for the outputs, one sum."""
    matrix = graph.levels.node_matrix(graph.weight.detach())[:, :, None, None]
    sizes, rows = graph.levels.sizes, graph.levels.sizes[0]
    weights = []
    for size in (*sizes[1:], graph.levels.num_outputs):
        weights.append(matrix[rows : rows + size, : min(rows, sum(sizes))].clone())
        rows += size

    def forward(x: Tensor) -> Tensor:
        states = graph.nodes[0](x)
        for weight, node in zip(weights, list(graph.nodes)[1:], strict=False):
            states = torch.cat([states, node(F.conv2d(states, weight))], dim=1)
        return F.conv2d(states, weights[-1])

    return forward
