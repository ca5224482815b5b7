"""The operators of graphs: a static one, and the ends of one in discrete time, which is unrolled between them.

Contract: as in _operators.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dnw.compile._operators import Depthwise, Interface, Norm, Operator, Relu, double
from dnw.compile._program import Constant, Edges, Graph, Instruction
from dnw.graphs import DiscreteTimeGraph, StaticGraph


class Begin(Operator):
    """The first states of a graph in discrete time: the inputs, and 0 for all other nodes."""

    def __init__(self, graph: DiscreteTimeGraph) -> None:
        self.more = graph.num_nodes - graph.num_inputs

    def forward(self, x: Interface) -> Interface:
        self.source = x
        x.require_maps("a graph")
        varies = torch.cat([x.varies, x.varies.new_zeros(self.more)])
        return Interface(varies, torch.cat([x.value, x.value.new_zeros(self.more, *x.value.shape[1:])]))

    def backward(self, wanted: Tensor) -> Tensor:
        return wanted[: len(self.source.varies)] & self.source.varies

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        yield from ()


class Last(Operator):
    """The states of the last nodes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def forward(self, x: Interface) -> Interface:
        self.source = x
        return Interface(x.varies[-self.count :], x.value[-self.count :])

    def backward(self, wanted: Tensor) -> Tensor:
        whole = torch.zeros_like(self.source.varies)
        whole[-self.count :] = wanted
        return whole & self.source.varies

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        yield from ()


class GraphOperator(Operator):
    """A static graph. What its nodes receive and emit is analysed node by node, level by level."""

    def __init__(self, graph: StaticGraph, name: str, nodes: list[list[Operator]]) -> None:
        self.name, self.nodes = name, nodes
        self.sizes, self.num_outputs = graph.levels.sizes, graph.levels.num_outputs
        self.matrix = graph.levels.node_matrix(double(graph.weight))
        if not all(isinstance(operator, (Norm, Relu, Depthwise)) for node in self.nodes for operator in node):
            raise ValueError(f"{name}: nodes that do more than normalise, rectify and convolve by themselves are not compiled")

    def forward(self, x: Interface) -> Interface:
        self.source = x
        x.require_maps("a graph")
        states = _through(self.nodes[0], x)
        self.received, start = [x], self.sizes[0]
        for size, node in zip(self.sizes[1:], self.nodes[1:], strict=True):
            self.received.append(self._sums(start, start + size, states))
            new = _through(node, self._of_constants(self.received[-1]))
            states = Interface(torch.cat([states.varies, new.varies]), torch.cat([states.value, new.value]))
            start += size
        self.states = states
        self.received.append(self._sums(start, start + self.num_outputs, states))
        return self._of_constants(self.received[-1])

    def _sums(self, start: int, stop: int, states: Interface) -> Interface:
        """What reaches some nodes from earlier ones. The value is what constant ones send, also where others vary."""
        weight = self.matrix[start:stop, : len(states.varies)]
        value = torch.einsum("ts,shw->thw", weight, states.value)
        return Interface((weight != 0)[:, states.varies].any(1), value)

    @staticmethod
    def _of_constants(received: Interface) -> Interface:
        return Interface.of(received.varies, received.value)

    def backward(self, wanted: Tensor) -> Tensor:
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        reads = self.matrix != 0
        self.kept_outputs = wanted & self.received[-1].varies
        self.kept: list[Tensor] = []  # nodes, from the last level to the first
        readers = torch.zeros(reads.shape[0], dtype=torch.bool)
        readers[starts[-1] :] = self.kept_outputs
        for level in reversed(range(len(self.sizes))):
            columns = slice(starts[level], starts[level + 1])
            kept = reads[readers][:, columns].any(0) & self.states.varies[columns]
            for operator in reversed(self.nodes[level]):
                kept = operator.backward(kept)
            if level:
                readers[columns] = kept
            self.kept.insert(0, kept)
        return self.kept[0] & self.source.varies

    def emit(self, taken: Tensor, sent: Tensor) -> Iterator[Instruction]:
        kept = [taken, *self.kept[1:]]
        levels, sources = [], kept[0]
        start = self.sizes[0]
        for size, node, mask, received in zip(self.sizes[1:], self.nodes[1:], kept[1:], self.received[1:-1], strict=True):
            if mask.any():
                matrix = self.matrix[start : start + size, : len(sources)][mask][:, sources]
                levels.append((Edges.of(matrix, Constant.of(received.value[mask])), tuple(_emitted(node, mask))))
            sources = torch.cat([sources, mask])
            start += size
        matrix = self.matrix[start:, : len(sources)][sent][:, sources]
        outputs = Edges.of(matrix, Constant.of(self.received[-1].value[sent]))
        yield Graph(tuple(_emitted(self.nodes[0], taken)), tuple(levels), outputs)

    @property
    def constants(self) -> int:
        """How many nodes do not depend on the image, although something that does reads them."""
        varying = torch.cat([*self.kept[1:], self.kept_outputs])
        readers = torch.cat([torch.zeros(self.sizes[0], dtype=torch.bool), varying])
        silent = ~self.states.varies & self.states.value.flatten(1).any(1)
        return int(((self.matrix != 0)[readers][:, : len(silent)].any(0) & silent).count_nonzero())


def _through(operators: list[Operator], x: Interface) -> Interface:
    for operator in operators:
        x = operator.forward(x)
    return x


def _emitted(operators: list[Operator], kept: Tensor) -> Iterator[Instruction]:
    """The instructions of operators that work channel by channel."""
    for operator in operators:
        yield from operator.emit(kept, kept)
