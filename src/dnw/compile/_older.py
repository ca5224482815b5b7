"""What files hold that were written when a static graph was one instruction, and what that is now.

Contract: only read. Each becomes nodes of today's instructions, which compute the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dnw.compile._layers import Activation, Concat, Crop, PlaceMean
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    Indices,
    InstanceNorm,
    Instruction,
    Node,
    Program,
    Size,
    _require,
)

Emit = Callable[..., int]
"""Appends an instruction that reads some values; returns the number of the value that it makes."""


@dataclass(frozen=True, eq=False)
class Older(ABC):
    """An instruction of its day; ``unrolled`` appends what it is now."""

    @abstractmethod
    def unrolled(self, emit: Emit, x: int, size: Size) -> int:
        """The number of the value that is made of value ``x``."""


@dataclass(frozen=True, eq=False)
class Edges(Older):
    """Sums along edges: those of target t are from ``starts[t]`` to ``starts[t + 1]``. Now a convolution of one pixel."""

    starts: Indices
    sources: Indices
    weight: Tensor
    num_sources: int
    constant: Constant | None
    dense: bool = False

    def unrolled(self, emit: Emit, x: int, size: Size) -> int:
        starts, sources, counts = self.starts, self.sources, self.starts.diff()
        _require(len(size) == 3 and size[0] == self.num_sources, f"edges from {self.num_sources} maps, given {size}")
        _require(starts.ndim == sources.ndim == self.weight.ndim == 1 and len(starts) > 1, "edges in lists of another form")
        _require(int(starts[0]) == 0 and int(counts.min()) >= 0, "edges that begin or end where they must not")
        _require(int(starts[-1]) == len(sources) == len(self.weight), "edges that begin or end where they must not")
        _require(len(counts) * size[0] < 1 << 28, f"edges from {size[0]} maps to {len(counts)}")
        _require(not len(sources) or 0 <= int(sources.min()) <= int(sources.max()) < size[0], "edges from no node")
        matrix = torch.zeros(len(counts), size[0])
        matrix[torch.arange(len(counts)).repeat_interleave(counts), sources] = self.weight
        whole = Convolution(matrix[:, :, None, None], self.constant, (1, 1), (0, 0), 1, sparse=not self.dense)
        return emit(whole, x)


@dataclass(frozen=True, eq=False)
class Rectify(Older):
    """Now an activation."""

    def unrolled(self, emit: Emit, x: int, size: Size) -> int:
        return emit(Activation("relu"), x)


@dataclass(frozen=True, eq=False)
class Mean(Older):
    """The mean of rows and columns ``start`` to ``stop``. Now a mean over all places of what is cut out."""

    start: int
    stop: int

    def unrolled(self, emit: Emit, x: int, size: Size) -> int:
        _require(len(size) == 3 and 0 <= self.start < min(self.stop, *size[1:]), f"a mean from {self.start} of maps {size}")
        for axis in (1, 2):
            if self.start or self.stop < size[axis]:
                x = emit(Crop(axis, self.start, min(self.stop, size[axis])), x)
        return emit(PlaceMean(), x)


@dataclass(frozen=True, eq=False)
class Graph(Older):
    """A static graph, level by level. Now its sums and node functions, with the states of all levels side by side."""

    inputs: tuple[Instruction | Older, ...]
    levels: tuple[tuple[Edges, tuple[Instruction | Older, ...]], ...]
    outputs: Edges

    def unrolled(self, emit: Emit, x: int, size: Size) -> int:
        states, size = self._node(self.inputs, emit, x, size)
        for edges, node in self.levels:
            sums = edges.unrolled(emit, states, size)
            new, made = self._node(node, emit, sums, (len(edges.starts) - 1, *size[1:]))
            states = emit(Concat(), states, new)
            size = (size[0] + made[0], *size[1:])
        return self.outputs.unrolled(emit, states, size)

    @staticmethod
    def _node(node: tuple[Instruction | Older, ...], emit: Emit, x: int, size: Size) -> tuple[int, Size]:
        _require(bool(node) and isinstance(node[-1], Convolution), "nodes that do not end with a convolution")
        for instruction in node:
            known = isinstance(instruction, (Affine, InstanceNorm, Rectify))
            apart = isinstance(instruction, Convolution) and instruction.apart
            _require(known or apart, f"nodes with {type(instruction).__name__}")
            if isinstance(instruction, Older):
                x = instruction.unrolled(emit, x, size)
            else:
                x, size = emit(instruction, x), instruction.check(size)
        return x, size


Read = tuple[Instruction | Older, tuple[int, ...]]
"""What a file says of a node: an instruction, and the numbers of the values that it reads."""


def flat(nodes: list[Read], input_sizes: tuple[Size, ...], outputs: tuple[int, ...]) -> Program:
    """A program of instructions, older ones among them, with the values that they read.

    Raises:
        ValueError: instructions that do not fit together.
    """
    found, sizes, at = list[Node](), list(input_sizes), list(range(len(input_sizes)))

    def emit(instruction: Instruction, *reads: int) -> int:
        sizes.append(instruction.check(*(sizes[i] for i in reads)))
        found.append(Node(instruction, reads))
        return len(sizes) - 1

    for instruction, reads in nodes:
        _require(bool(reads) and 0 <= min(reads) <= max(reads) < len(at), f"reads {reads}")
        given = [at[i] for i in reads]
        if isinstance(instruction, Older):
            _require(len(given) == 1, f"a {type(instruction).__name__} of {len(given)} values")
            at.append(instruction.unrolled(emit, given[0], sizes[given[0]]))
        else:
            at.append(emit(instruction, *given))
    _require(bool(outputs) and 0 <= min(outputs) <= max(outputs) < len(at), f"outputs {outputs}")
    return Program(tuple(found), input_sizes, tuple(at[i] for i in outputs))
