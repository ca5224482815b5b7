"""Paths along edges.

Contract: pure functions of a boolean matrix ``[nodes, nodes]``, targets by sources; cycles are allowed.
"""

from __future__ import annotations

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
    start = torch.zeros(len(adjacency), dtype=torch.bool, device=adjacency.device)
    start[:num_inputs] = True
    return bool(reached(adjacency, start)[len(adjacency) - num_outputs :].any())
