"""Live nodes: those on a path from an input to an output. The one liveness function of the project."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnw._wiring import Wiring
from dnw.graphs import StaticGraph


def live_nodes(adjacency: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Which nodes of a graph lie on a path from an input to an output.

    Args:
        adjacency: boolean ``[nodes, nodes]``, targets by sources; cycles and self-edges are allowed.
        inputs: boolean mask ``[nodes]`` of the inputs.
        outputs: boolean mask ``[nodes]`` of the outputs.

    Returns:
        Boolean mask ``[nodes]``.
    """
    return _reach(adjacency, inputs) & _reach(adjacency.T, outputs)


def _reach(adjacency: Tensor, start: Tensor) -> Tensor:
    """The nodes that can be reached along the edges from the given ones, which are among them."""
    reached, frontier = start.clone(), start
    while bool(frontier.any()):
        frontier = adjacency[:, frontier].any(dim=1) & ~reached
        reached |= frontier
    return reached


def num_live_nodes(model: nn.Module, wiring: Wiring) -> tuple[int, int]:
    """Live nodes and all nodes over the wired graphs of a model; (0, 0) where it has none."""
    live = total = 0
    weights = {id(wiring[name]._layer.parameter): name for name in wiring}
    for module in model.modules():
        if isinstance(module, StaticGraph) and id(module.weight) in weights:
            levels, active = module.levels, wiring[weights[id(module.weight)]].active
            node = torch.arange(levels.num_nodes, device=active.device)
            mask = live_nodes(levels.node_matrix(active), node < levels.num_inputs, node >= levels.num_sources)
            live, total = live + int(mask.count_nonzero()), total + levels.num_nodes
    return live, total
