"""Generators of randomly wired networks, drawn over the levels of a static graph.

Source: Xie, Kirillov, Girshick, He, "Exploring randomly wired neural networks for image recognition", 2019, section 3.2. Theirs
draw undirected graphs and direct every edge from the earlier node to the later; here the candidate edges of a graph say what
may be drawn, and the budget how much. The third of their kinds, Erdos-Renyi, takes every candidate with the same chance: that
is ``dnw.RandomGraph``.

Contract: exactly as many edges as were asked for, shared out evenly over the targets; the same ones for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnw._checks import check_num_edges
from dnw._selection.budgets import apportion
from dnw.graphs._static import StaticGraph


def watts_strogatz(graph: StaticGraph, num_edges: int, *, rewire: float = 0.75, seed: int = 0) -> Tensor:
    """Small worlds: every target reads the sources nearest to it; then each edge moves, with a probability, to a random source.

    The nodes of a level stand on a ring. Sources of the level before are nearest, those beside the target first; then those
    of the level before that one.

    Args:
        graph: whose candidates; its weights do not matter.
        num_edges: how many.
        rewire: probability with which an edge moves, in [0, 1]; 0.75 was best in the paper.
        seed: of the draw.

    Returns:
        Boolean mask ``[targets, sources]``, as ``dnw.Frozen`` takes it.

    Raises:
        ValueError: no such probability, or not as many candidates.
    """
    if not 0 <= rewire <= 1:
        raise ValueError(f"rewire={rewire}: allowed is a probability from 0 to 1")
    candidates, quotas, generator = _begin(graph, num_edges, seed)
    lattice = _first(quotas, _distances(graph).masked_fill(~candidates, torch.inf))
    moved = lattice & (torch.rand(lattice.shape, generator=generator) < rewire)
    free = candidates & ~lattice
    arrivals = torch.minimum(moved.sum(1), free.sum(1))  # where all is taken, an edge stays
    keys = torch.rand(lattice.shape, generator=generator)
    left = _first(arrivals, keys.masked_fill(~moved, torch.inf))
    return (lattice & ~left) | _first(arrivals, keys.masked_fill(~free, torch.inf))


def barabasi_albert(graph: StaticGraph, num_edges: int, *, seed: int = 0) -> Tensor:
    """Preferential attachment: target after target draws its sources, each in proportion to the edges that it has by then.

    A source counts as many edges of its own as a target draws on average, and those that were drawn from it.

    Args:
        graph, num_edges, seed: as for :func:`watts_strogatz`.

    Returns:
        Boolean mask ``[targets, sources]``, as ``dnw.Frozen`` takes it.

    Raises:
        ValueError: not as many candidates.
    """
    candidates, quotas, generator = _begin(graph, num_edges, seed)
    edges = torch.zeros_like(candidates)
    degree = torch.full(candidates.shape[1:], num_edges / int(candidates.any(1).sum()))
    for target, quota in enumerate(quotas.tolist()):
        if quota:
            waits = torch.empty(degree.shape).exponential_(generator=generator) / degree
            edges[target, waits.masked_fill(~candidates[target], torch.inf).topk(quota, largest=False).indices] = True
            degree += edges[target]
    return edges


def _begin(graph: StaticGraph, num_edges: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Candidates ``[targets, sources]``, how many edges each target gets, and what draws."""
    candidates = graph.levels.candidates()  # of what is read, also where everything is ranked
    check_num_edges(num_edges, int(candidates.sum()), "graph.weight")
    room = candidates.sum(1).tolist()
    quotas = torch.tensor(apportion(num_edges, [float(n > 0) for n in room], room))
    return candidates, quotas, torch.Generator().manual_seed(seed)


def _distances(graph: StaticGraph) -> Tensor:
    """How far each source is from each target: levels between them, and less than one more around the ring."""
    levels = graph.levels
    level = levels.level_of_node()
    within = torch.cat([(torch.arange(size) + 0.5) / size for size in graph.node_levels()])
    rows = torch.arange(levels.shape[0]) + levels.num_inputs - levels.first_row
    gap = (level[rows][:, None] - level[None, : levels.num_sources]).clamp(min=1)  # 0 where a row serves an output as well
    apart = (within[rows][:, None] - within[None, : levels.num_sources]).abs()
    return gap + torch.minimum(apart, 1 - apart)


def _first(numbers: Tensor, keys: Tensor) -> Tensor:
    """In each row as many entries as wanted ``[rows]``, those of the smallest keys ``[rows, columns]``, as a mask."""
    places = keys.argsort(dim=1, stable=True).argsort(dim=1)
    return places < numbers[:, None]
