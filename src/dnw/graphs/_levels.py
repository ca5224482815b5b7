"""Levels of nodes and the candidate edges between them (Wortsman et al., 2019, section 2.3 and appendix).

Contract: the topology of a static graph as plain data. Every question about which edge may exist, which node stands on
which level and which entries of the weight feed which node is answered here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dnw.graphs._protocol import num_entries_between


@dataclass(frozen=True)
class Levels:
    """Nodes in levels; an edge may run from any level to any later one, so the graph is acyclic.

    Nodes are numbered level by level, the outputs last. Outputs are bare sums of what reaches them, without a node
    function.

    Attributes:
        sizes: number of nodes of each level; the first level holds the inputs.
        num_outputs: number of outputs; each may read every node.
        shared_outputs: whether output j uses the weights of the j-th of the last nodes, so that one weight serves both
            (the tiny classifiers of the paper as its authors ran them). Else outputs have rows of their own.
    """

    sizes: tuple[int, ...]
    num_outputs: int
    shared_outputs: bool = False

    def __post_init__(self) -> None:
        bad = [n for n in self.sizes if isinstance(n, bool) or not isinstance(n, int) or n < 1]
        if bad or not self.sizes:
            raise ValueError(f"levels={self.sizes}: every level needs at least one node, and there must be a level of inputs")
        if self.num_outputs < 1:
            raise ValueError(f"num_outputs={self.num_outputs}: a graph needs at least one output")
        if self.shared_outputs and (len(self.sizes) < 2 or self.num_outputs > self.sizes[-1]):
            raise ValueError(
                f"num_outputs={self.num_outputs}: shared outputs are among the {self.sizes[-1]} nodes of the last level, "
                "which may not be the level of inputs"
            )

    @property
    def num_inputs(self) -> int:
        return self.sizes[0]

    @property
    def num_inner(self) -> int:
        """Nodes that are neither inputs nor outputs."""
        return sum(self.sizes[1:])

    @property
    def num_sources(self) -> int:
        """Nodes that edges may start from: columns of the weight."""
        return sum(self.sizes)

    @property
    def num_nodes(self) -> int:
        """All nodes: inputs, inner nodes, outputs."""
        return self.num_sources + self.num_outputs

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``[targets, sources]`` of the weight.

        Rows are the inner nodes and then the outputs; with shared outputs the rows are all inputs and inner nodes (those
        of the inputs are never read), as in the authors' checkpoints.
        """
        rows = self.num_sources if self.shared_outputs else self.num_inner + self.num_outputs
        return rows, self.num_sources

    @property
    def first_row(self) -> int:
        """The row of the first inner node."""
        return self.num_inputs if self.shared_outputs else 0

    def level_of_node(self) -> Tensor:
        """The level of every node, int64 ``[nodes]``; outputs stand on a level after the last."""
        sizes = torch.tensor([*self.sizes, self.num_outputs], device="cpu")
        return torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)

    def node_matrix(self, weight: Tensor) -> Tensor:
        """The weight ``[targets, sources]`` as a matrix between nodes ``[nodes, nodes]``, 0 where the graph reads nothing.

        A shared row stands twice: for the inner node and for the output that it serves.
        """
        level = self.level_of_node().to(weight.device)
        full = weight.new_zeros(self.num_nodes, self.num_nodes)
        full[self.num_inputs : self.num_sources, : self.num_sources] = weight[self.first_row :][: self.num_inner]
        full[self.num_sources :, : self.num_sources] = weight[-self.num_outputs :]
        return full.masked_fill(level[:, None] <= level[None, :], 0)

    def num_edges_between(self, mask: Tensor, nodes: Tensor) -> int:
        """How many entries of a mask ``[targets, sources]`` the graph reads between the given nodes, boolean ``[nodes]``.

        An entry that serves an inner node and an output counts once.
        """
        return num_entries_between(self, mask, nodes)

    def candidates(self) -> Tensor:
        """Mask of the candidate edges, boolean ``[targets, sources]``: the entries of the weight that the graph reads."""
        full = self.node_matrix(torch.ones(self.shape, dtype=torch.bool, device="cpu"))
        mask = torch.zeros(self.shape, dtype=torch.bool, device="cpu")
        mask[self.first_row :][: self.num_inner] = full[self.num_inputs : self.num_sources, : self.num_sources]
        mask[-self.num_outputs :] |= full[self.num_sources :, : self.num_sources]
        return mask
