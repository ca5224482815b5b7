"""Paths along edges: what is reached, and which nodes are live. The one liveness of the project.

Contract: pure functions of boolean matrices ``[nodes, nodes]``, targets by sources; cycles and self-edges are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reached(adjacency: Tensor, start: Tensor) -> Tensor:
    """The nodes ``[nodes]`` that can be reached along the edges from the given ones, which are among them."""
    found, frontier = start.clone(), start
    while bool(frontier.any()):
        frontier = adjacency[:, frontier].any(dim=1) & ~found
        found |= frontier
    return found


def has_path(adjacency: Tensor, num_inputs: int, num_outputs: int) -> bool:
    """Whether an output, among the last nodes, can be reached from an input, among the first."""
    return bool(reached(adjacency, _inputs(adjacency, num_inputs))[len(adjacency) - num_outputs :].any())


def live_nodes(adjacency: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Which nodes of a graph lie on a path from an input to an output.

    Args:
        adjacency: boolean ``[nodes, nodes]``, targets by sources; cycles and self-edges are allowed.
        inputs: boolean mask ``[nodes]`` of the inputs.
        outputs: boolean mask ``[nodes]`` of the outputs.

    Returns:
        Boolean mask ``[nodes]``.
    """
    return reached(adjacency, inputs) & reached(adjacency.T, outputs)


def live_in_chain(adjacencies: Sequence[Tensor], num_inputs: Sequence[int], num_outputs: Sequence[int]) -> list[Tensor]:
    """Live nodes of graphs of which each one's outputs are the next one's inputs: a path leads through all of them.

    Args:
        adjacencies: of each graph.
        num_inputs, num_outputs: of each graph: how many of its first and of its last nodes.

    Returns:
        A boolean mask ``[nodes]`` for each graph.
    """
    forwards = _carried(adjacencies, num_inputs, num_outputs)
    turned = [adjacency.flip(0, 1).T for adjacency in reversed(adjacencies)]  # outputs first, edges the other way
    backwards = _carried(turned, num_outputs[::-1], num_inputs[::-1])
    return [forward & backward.flip(0) for forward, backward in zip(forwards, reversed(backwards), strict=True)]


def _carried(adjacencies: Sequence[Tensor], num_inputs: Sequence[int], num_outputs: Sequence[int]) -> list[Tensor]:
    """What is reached in each graph of a chain from the inputs of its first."""
    found: list[Tensor] = []
    for i, adjacency in enumerate(adjacencies):
        start = _inputs(adjacency, num_inputs[i])
        if found:
            start[: num_inputs[i]] = found[-1][-num_outputs[i - 1] :].to(start.device)
        found.append(reached(adjacency, start))
    return found


def _inputs(adjacency: Tensor, num_inputs: int) -> Tensor:
    start = torch.zeros(len(adjacency), dtype=torch.bool, device=adjacency.device)
    start[:num_inputs] = True
    return start
