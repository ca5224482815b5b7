"""From the instructions of a program to tasks of kernels on maps: what is read, what is written, with which numbers.

Contract: pure planning, nothing is run; where maps lie, and which rows are made when, is decided later (_lower.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dnw.compile._program import (
    Affine,
    Convolution,
    Edges,
    Graph,
    InstanceNorm,
    Instruction,
    Linear,
    Mean,
    Pick,
    Program,
    Rectify,
    Restore,
)


@dataclass(eq=False)
class Maps:
    """Maps in the arena. Rows are padded to ``pitch`` floats; with a halo there is a row of zeros above and below.

    Attributes:
        outside: whether they are the images or the outputs of a user, not in the arena.
        held: how many rows are there at a time.
        first_row: the row that lies first.
        offset: where that is, in floats.
    """

    channels: int
    height: int
    width: int
    outside: bool = False
    halo: bool = False
    held: int = 0
    first_row: int = 0
    offset: int = 0

    @property
    def pitch(self) -> int:
        if self.outside:
            return self.width
        if self.height == self.width == 1:
            return 1
        return -(-self.width // 16) * 16 if self.width > 8 else max(2, 1 << (self.width - 1).bit_length())

    @property
    def rows(self) -> int:
        """All of them."""
        return self.height + 2 * self.halo

    @property
    def plane(self) -> int:
        """Floats of one map."""
        if self.outside or self.pitch == 1:
            return self.height * self.width
        return -(-(self.held or self.rows) * self.pitch // 16) * 16

    @property
    def floats(self) -> int:
        return self.channels * self.plane

    @property
    def row_0(self) -> int:
        """Where row 0 of the first map lies, or would lie."""
        return self.offset - self.first_row * self.pitch

    def padded(self, maps: Tensor) -> Tensor:
        """Maps ``[n, h, w]`` as they lie in memory, all rows and no halo, in whole vectors: ``[n, floats]``."""
        whole = maps.new_zeros(len(maps), max(16, -(-self.height * self.pitch // 16) * 16))
        whole[:, : self.height * self.pitch].view(len(maps), self.height, self.pitch)[:, :, : self.width] = maps
        return whole


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the channels of maps."""

    maps: Maps
    first: int
    count: int

    @classmethod
    def whole(cls, maps: Maps) -> Part:
        return cls(maps, 0, maps.channels)


@dataclass(eq=False)
class Task:
    """What one kernel does.

    Attributes:
        kind: of kernel.
        reads: where from; edges may read two.
        writes: where to.
        instruction: the one of the program that has its numbers; None where there are none.
        relu: whether what comes out is rectified.
    """

    kind: str
    reads: tuple[Part, ...]
    writes: Part
    instruction: Any = None
    relu: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether it can make a few rows of its maps at a time."""
        pitch = self.reads[0].maps.pitch
        return self.kind in ("depthwise", "convolution") or (self.kind in ("edges", "matrix", "node") and pitch % 16 == 0)

    def _window(self) -> tuple[int, int, int]:
        """Rows of the kernel, stride and padding."""
        if self.kind in ("depthwise", "convolution", "node"):
            return self.instruction.weight.shape[2], self.instruction.stride[0], self.instruction.padding[0]
        return 1, 1, 0

    def possible(self, available: int) -> int:
        """How many rows can be made when so many of what it reads are there."""
        kernel, stride, padding = self._window()
        height = self.writes.maps.height
        if available >= self.reads[0].maps.height:
            return height
        return min(height, max(0, (available - kernel + padding) // stride + 1))

    def oldest(self, made: int) -> int:
        """The first row that it still reads when so many are made."""
        kernel, stride, padding = self._window()
        if made >= self.writes.maps.height:
            return self.reads[0].maps.height + kernel
        return made * stride - padding


def tasks(program: Program) -> Iterator[Task]:
    """The tasks of a program, from the images of a user to where outputs go."""
    found: list[Task] = []
    x = Part.whole(Maps(*program.input_size, outside=True))
    for instruction in program.instructions:
        x = _add(found, instruction, x)
    if x.maps.outside:  # a program that does nothing
        x = _added(found, "spread", x, _like(x))
    outside = Maps(x.maps.channels, x.maps.height, x.maps.width, outside=True)
    _added(found, "gather", x, outside)
    yield from found


def _like(x: Part) -> Maps:
    return Maps(x.count, x.maps.height, x.maps.width)


def _added(found: list[Task], kind: str, x: Part, to: Maps | Part, instruction: object = None) -> Part:
    part = to if isinstance(to, Part) else Part.whole(to)
    found.append(Task(kind, (x,), part, instruction))
    return part


def _add(found: list[Task], instruction: Instruction, x: Part, to: Part | None = None) -> Part:
    """Appends the tasks of an instruction; returns what it makes, where it is told to if it is."""
    if isinstance(instruction, Graph):
        return _add_graph(found, instruction, x)
    if isinstance(instruction, Rectify) and to is None and _absorbs(found, x):
        found[-1].relu = True
        return x
    if x.maps.outside and not isinstance(instruction, Convolution):
        x = _added(found, "spread", x, _like(x))
    if isinstance(instruction, (Affine, InstanceNorm, Rectify)):
        kind = {Affine: "affine", InstanceNorm: "instance_norm", Rectify: "rectify"}[type(instruction)]
        own = bool(found) and found[-1].writes is x and x.count == x.maps.channels
        return _added(found, kind, x, to or (x if own else _like(x)), instruction)
    size = instruction.check((x.count, x.maps.height, x.maps.width) if _on_maps(instruction) else (x.count,))
    channels, height, width = (*size, 1, 1)[:3]
    kind = {Edges: _edges_kind(instruction), Mean: "mean", Linear: "linear", Pick: "copy", Restore: "copy"}.get(
        type(instruction), ""
    )
    if isinstance(instruction, Convolution):
        kind = "convolution"
        if instruction.groups > 1 or instruction.weight.shape[:2] == (1, 1):
            kind = "node" if _is_node(instruction, x) else "depthwise"
        elif not x.maps.outside and instruction.pointwise:
            kind = "matrix"
        if kind == "node" and x.maps.outside:
            x = _added(found, "spread", x, _like(x))
    return _added(found, kind, x, to or Maps(channels, height, width), instruction)


def _on_maps(instruction: Instruction) -> bool:
    """Whether it takes maps, not numbers."""
    if isinstance(instruction, Restore):
        return instruction.constant.ndim == 3
    return not isinstance(instruction, Linear)


def _absorbs(found: list[Task], x: Part) -> bool:
    """Whether the last task made just these maps, and can rectify them on the way."""
    kinds = ("edges", "matrix", "affine", "instance_norm", "depthwise", "convolution", "node", "linear")
    return bool(found) and found[-1].writes is x and found[-1].kind in kinds


def _is_node(convolution: Convolution, x: Part) -> bool:
    """Whether a convolution per channel is one that the kernel for nodes does."""
    if convolution.weight.shape[1:] != (1, 3, 3) or convolution.padding != (1, 1) or x.maps.pitch == 1:
        return False
    constant = convolution.constant
    return convolution.stride in ((1, 1), (2, 2)) and (constant is None or not len(constant.channels))


def _add_graph(found: list[Task], graph: Graph, x: Part) -> Part:
    """States of the first level lie by themselves, those of all others one after the other."""
    x = _add_nodes(found, graph.inputs, x, None)
    total = sum(edges.num_targets for edges, _ in graph.levels)
    states = Maps(total, x.maps.height, x.maps.width)
    known = 0
    for edges, node in graph.levels:
        sums = _add_edges(found, edges, x, Part(states, 0, known))
        _add_nodes(found, node, sums, Part(states, known, edges.num_targets))
        known += edges.num_targets
    return _add_edges(found, graph.outputs, x, Part(states, 0, known))


def _add_edges(found: list[Task], edges: Edges, x: Part, states: Part) -> Part:
    to = Part.whole(Maps(edges.num_targets, x.maps.height, x.maps.width))
    found.append(Task(_edges_kind(edges), (x, states) if states.count else (x,), to, edges))
    return to


def _edges_kind(edges: Instruction) -> str:
    return "matrix" if isinstance(edges, Edges) and edges.dense else "edges"


def _add_nodes(found: list[Task], node: Sequence[Instruction], x: Part, to: Part | None) -> Part:
    """A node function whose last instruction writes to ``to``."""
    for i, instruction in enumerate(node):
        x = _add(found, instruction, x, to if i == len(node) - 1 else None)
    if not node and to is not None:
        x = _added(found, "copy", x, to)
    return x
