"""What a graph module offers: all that wiring, counting and viewing know of a graph.

Contract: a graph module is any ``nn.Module`` with these members; nothing has to be derived from. Candidates alone are enough to
be wired, the rest of :class:`Graph` to have live nodes and to be drawn, and what is beyond that is optional. What a graph does
not say is not known of it: nothing is guessed from classes or from the names of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class GraphModule(Protocol):
    """A module that says itself which entries of its parameters are candidate edges. It can be wired."""

    def edge_candidates(self) -> dict[str, Tensor]:
        """Boolean masks ``[targets, sources]`` of the candidate edges, by the name of this module's own parameter."""
        ...


@runtime_checkable
class NodeMatrix(Protocol):
    """What knows between which nodes the entries of a weight are edges. A module's edges are exported as those of a graph."""

    def node_matrix(self, weight: Tensor) -> Tensor:
        """A weight or mask as a matrix ``[nodes, nodes]``, targets by sources, 0 where there is no edge.

        An entry may stand in it several times: one weight may serve several edges.
        """
        ...


@runtime_checkable
class Graph(GraphModule, NodeMatrix, Protocol):
    """A graph module with numbered nodes: inputs are the first, outputs the last. Its live nodes are known, and it is drawn.

    All its edges are entries of one parameter, the first of its candidates.
    """

    @property
    def num_nodes(self) -> int:
        """All nodes, inputs and outputs included."""
        ...

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...


@runtime_checkable
class _InLevels(Protocol):
    """Optional: a graph without cycles, whose nodes stand in levels. They are drawn so; else as a ring."""

    def node_levels(self) -> tuple[int, ...]:
        """How many nodes each level has, the inputs' first and the outputs' last. Edges run to later levels alone."""
        ...


@runtime_checkable
class _WithNodeFunctions(Protocol):
    """Optional: a graph whose nodes have functions. They are counted by node, and what they hold and send is drawn."""

    def node_functions(self) -> Sequence[tuple[nn.Module, range]]:
        """The modules that compute what nodes send, and which nodes those are.

        Such a module returns ``[batch, nodes, ...]``. Of its parameters those with as many rows as it has nodes have one for
        each. Outputs without a function are what the graph returns.
        """
        ...


def edges_of(graph: Graph) -> tuple[str, Tensor]:
    """The name of the graph's own parameter that holds its edges, and which of its entries are candidates.

    Raises:
        ValueError: the graph names no parameter.
    """
    for name, candidates in graph.edge_candidates().items():
        return name, candidates
    raise ValueError(f"{type(graph).__name__}.edge_candidates() names no parameter; a graph has one that holds its edges")


def levels_of(graph: Graph) -> tuple[int, ...] | None:
    """How many nodes each level of a graph has, the outputs last; None where it may have cycles, as far as it says."""
    return graph.node_levels() if isinstance(graph, _InLevels) else None


def node_functions_of(graph: Graph) -> Sequence[tuple[nn.Module, range]]:
    """The modules that compute what nodes send, and which nodes those are, as far as the graph says."""
    return graph.node_functions() if isinstance(graph, _WithNodeFunctions) else ()


def edge_entries(graph: NodeMatrix, shape: Sequence[int]) -> Tensor:
    """The entry of a weight of a shape that each edge has: 1 + its flat index, 0 for no edge; int64 ``[nodes, nodes]``."""
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device="cpu")
    return graph.node_matrix(numbers.view(*shape)).long()


def num_entries_between(graph: NodeMatrix, mask: Tensor, nodes: Tensor) -> int:
    """How many entries of a mask are edges between the given nodes, boolean ``[nodes]``; one that is several counts once."""
    nodes = nodes.cpu()
    between = torch.zeros(1 + mask.numel(), dtype=torch.bool, device="cpu")
    between[edge_entries(graph, mask.shape)[nodes][:, nodes]] = True
    return int((mask.cpu().flatten() & between[1:]).count_nonzero())
