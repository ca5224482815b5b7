"""Static neural graphs: acyclic, evaluated level by level (Wortsman et al., 2019, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw.graphs._levels import Levels
from dnw.graphs._node import Node
from dnw.graphs._static_kernels import run_static_graph
from dnw.graphs._way import is_node, norm_kind, why_not
from dnw.kernels._graph import out_size


class StaticGraph(nn.Module):
    """An acyclic neural graph on channels: I_v = sum of w_uv Z_u over the edges into v, Z_v = f_v(I_v).

    Inputs and inner nodes pass the node function; outputs are bare sums. The weight is one matrix
    ``[targets, sources]`` whose candidate entries :meth:`edge_candidates` gives; entries that are no candidates are never
    read. On its own the graph is complete (every candidate is used); :func:`dnw.wire` makes it sparse and learns which
    edges it has.

    Args:
        levels: number of nodes of each level, inputs first. One node per level makes a plain acyclic graph in its
            topological order.
        num_outputs: number of outputs, each of which may read every node.
        norm: makes the normalisation of the node function from a number of channels; None for none.
        stride: of the inputs' convolution; all other nodes work on the resulting size.
        shared_outputs: whether output j uses the weights of the j-th of the last nodes (:class:`Levels`).
        rank_all_entries: whether every entry of the matrix counts as a candidate, also those that are never read. The
            authors' code ranks so; it is needed only to follow its trajectory.

    Shape:
        ``[batch, levels[0], height, width]`` to ``[batch, num_outputs, ceil(height / stride), ceil(width / stride)]``.
    """

    def __init__(
        self,
        levels: Sequence[int],
        num_outputs: int,
        *,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        stride: int = 1,
        shared_outputs: bool = False,
        rank_all_entries: bool = False,
    ) -> None:
        super().__init__()
        self.levels = Levels(tuple(levels), num_outputs, shared_outputs)
        self.rank_all_entries = rank_all_entries
        self.weight = nn.Parameter(torch.empty(self.levels.shape))
        self.nodes = nn.ModuleList(
            Node(size, norm, stride if level == 0 else 1) for level, size in enumerate(self.levels.sizes)
        )
        self._num_candidates = int(self.edge_candidates()["weight"].sum())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the edges uniformly from +-1 / sqrt(number of sources)."""
        bound = 1 / math.sqrt(self.levels.num_sources)
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def num_nodes(self) -> int:
        """All nodes: inputs, inner nodes, outputs."""
        return self.levels.num_nodes

    @property
    def num_inputs(self) -> int:
        """The first nodes."""
        return self.levels.num_inputs

    @property
    def num_outputs(self) -> int:
        """The last nodes."""
        return self.levels.num_outputs

    def edge_candidates(self) -> dict[str, Tensor]:
        mask = (
            torch.ones(self.levels.shape, dtype=torch.bool, device="cpu") if self.rank_all_entries else self.levels.candidates()
        )
        return {"weight": mask}

    def node_matrix(self, weight: Tensor) -> Tensor:
        """A weight or mask ``[targets, sources]`` as a matrix between the nodes ``[nodes, nodes]``."""
        return self.levels.node_matrix(weight)

    def node_levels(self) -> tuple[int, ...]:
        """How many nodes each level has, the outputs last."""
        return (*self.levels.sizes, self.levels.num_outputs)

    def node_functions(self) -> list[tuple[nn.Module, range]]:
        """The node functions, level by level, and whose they are."""
        bounds = pairwise(accumulate(self.levels.sizes, initial=0))
        return [(node, range(*nodes)) for node, nodes in zip(self.nodes, bounds, strict=True)]

    def extra_repr(self) -> str:
        sizes = ", ".join(map(str, self.levels.sizes))
        return f"levels=({sizes}), num_outputs={self.levels.num_outputs}, candidates={int(self.levels.candidates().sum()):,}"

    def why_layers(self, x: Tensor) -> str:
        """Why the graph would run as layers of PyTorch; empty where it would run on kernels that skip absent edges.

        Args:
            x: what it would be given.
        """
        if x.ndim != 4 or x.shape[1] != self.levels.num_inputs:
            raise ValueError(
                f"expected maps [batch, {self.levels.num_inputs}, height, width], got a tensor of shape {tuple(x.shape)}"
            )
        nodes: list[Any] = list(self.nodes)
        parts = [*nodes, *(part for node in nodes for part in node.children())]
        if not all(map(is_node, nodes)):
            return "a node function is not of the kind that kernels know: ReLU, 3x3 convolution of stride 1 or 2, norm"
        if any(node.conv.stride != (1, 1) for node in nodes[1:]):
            return "a node function beyond the first level has a stride"
        stride = nodes[0].conv.stride[0]
        pixels = out_size(x.shape[2], stride) * out_size(x.shape[3], stride)
        if norm_kind([node.norm for node in nodes], pixels, x.shape[0]) is None:
            return f"kernels do not know the norm {type(nodes[0].norm).__name__} as it is here"
        return why_not(x, self.weight, self._num_candidates, parts)

    def forward(self, x: Tensor) -> Tensor:
        if not self.why_layers(x):
            return run_static_graph(self.levels, list(self.nodes), self.weight, x)
        # `incoming` holds what has reached the rows from `row` on so far; each level adds what it sends to all later rows.
        sizes, outputs = self.levels.sizes, self.levels.num_outputs
        columns = self.weight.split(sizes, dim=1)
        row = self.levels.first_row
        incoming = _along(columns[0][row:], self.nodes[0](x))
        for level in range(1, len(sizes)):
            sent = self.nodes[level](incoming[:, : sizes[level]])
            row += sizes[level]
            if self.levels.shared_outputs and level == len(sizes) - 1:
                row -= outputs
                later = incoming[:, sizes[level] - outputs :]
            else:
                later = incoming[:, sizes[level] :]
            incoming = later + _along(columns[level][row:], sent)
        return incoming


def _along(weight: Tensor, sent: Tensor) -> Tensor:
    """What arrives along edges of what nodes send: ``[batch, sources, h, w]`` to ``[batch, targets, h, w]``."""
    return F.conv2d(sent, weight[:, :, None, None])
