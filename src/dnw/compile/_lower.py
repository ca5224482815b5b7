"""From a program to calls of kernels: where maps lie, and which rows are made when.

Contract: pure planning, nothing is run. Maps that are too large for a processor's cache never exist as a whole: a network is
cut into segments, and in a segment every instruction makes a few rows at a time, as soon as the rows that it reads are
there. Of the maps inside a segment only the rows that are still needed are kept; they slide to the front when more room is
wanted. Nothing is computed twice. Where the maps of a segment fit into the cache as a whole, it is run as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnw.compile._program import (
    Affine,
    Constant,
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

CACHE = 640 << 10
"""Bytes that the maps of a segment may take: what fits into a second-level cache of 1 MiB beside weights."""
_SLACK = 64  # floats behind everything in the arena, which vectors may read


@dataclass(eq=False)
class Maps:
    """Maps in the arena. Rows are padded to ``pitch`` floats; with a halo there is a row of zeros above and below.

    Attributes:
        held: how many rows are there at a time.
        base: the row that lies first.
        at: where that is, in floats.
    """

    channels: int
    height: int
    width: int
    outside: bool = False
    halo: bool = False
    held: int = 0
    base: int = 0
    at: int = 0

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
        return self.at - self.base * self.pitch

    def padded(self, maps: Tensor) -> Tensor:
        """Maps ``[n, h, w]`` as they lie in memory, all rows and no halo: ``[n, floats]``."""
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
class Operation:
    """What one kernel does.

    Attributes:
        kind: of kernel.
        reads: where from; edges may read two.
        writes: where to.
        source: the instruction of the program with its numbers; None where there are none.
        relu: whether what comes out is rectified.
    """

    kind: str
    reads: tuple[Part, ...]
    writes: Part
    source: Any = None
    relu: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether it can make a few rows of its maps at a time."""
        pitch = self.reads[0].maps.pitch
        return self.kind in ("depthwise", "convolution") or (self.kind in ("edges", "matrix", "node") and pitch % 16 == 0)

    def _window(self) -> tuple[int, int, int]:
        """Rows of the kernel, stride and padding."""
        if self.kind in ("depthwise", "convolution", "node"):
            return self.source.weight.shape[2], self.source.stride[0], self.source.padding[0]
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


@dataclass(frozen=True, eq=False)
class Kernel:
    """An instruction as the kernels take it: numbers by their names, and arrays."""

    kind: str
    numbers: dict[str, float]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Rows ``first`` to ``first + rows`` of what a kernel makes; from, second and to are where row 0 of the maps lies."""

    kernel: int
    first: int
    rows: int
    from_: int
    second: int
    to: int


@dataclass
class Lowered:
    """A program as calls of kernels on an arena.

    Attributes:
        kernels: each with its numbers.
        calls: in order.
        arena, scratch: how many floats are needed for one image, and besides for each thread.
    """

    program: Program
    cache: int = CACHE
    kernels: list[Kernel] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    arena: int = 0
    scratch: int = 0

    def __post_init__(self) -> None:
        self._space = Space()
        self._numbers: dict[Operation, int] = {}
        found = list(operations(self.program))
        for operation in found:
            if operation.kind == "node":
                operation.reads[0].maps.halo = True
        segments = list(_segments(found))
        readers = {op_read.maps: i for i, segment in enumerate(segments) for op in segment for op_read in op.reads}
        placed: set[Maps] = set()
        for i, segment in enumerate(segments):
            inside = {op.writes.maps for op in segment if readers.get(op.writes.maps, -1) == i}
            inside -= placed
            plan = _planned(segment, inside, self.cache)
            if plan is None:
                self._run_whole(segment, readers, i, placed)
            else:
                self._run_by_rows(segment, inside, plan, readers, i, placed)
        self.arena = self._space.size + _SLACK

    # --- where things lie ---

    def _place(self, maps: Maps, placed: set[Maps]) -> None:
        if maps in placed or maps.outside:
            return
        maps.held = maps.held or maps.rows
        maps.base = -1 if maps.halo else 0
        maps.at = self._space.take(maps.floats + _SLACK)
        placed.add(maps)

    def _free(self, maps: Maps) -> None:
        if not maps.outside:
            self._space.free(maps.at, maps.floats + _SLACK)

    def _run_whole(self, segment: list[Operation], readers: dict[Maps, int], number: int, placed: set[Maps]) -> None:
        last = {part.maps: i for i, op in enumerate(segment) for part in op.reads}
        for i, op in enumerate(segment):
            self._place(op.writes.maps, placed)
            self._border(op, -1)
            self._border(op, op.writes.maps.height)
            self._call(op, 0, op.writes.maps.height)
            for maps in {part.maps for part in op.reads}:
                if last[maps] == i and readers[maps] == number and maps is not op.writes.maps:
                    self._free(maps)

    def _run_by_rows(
        self,
        segment: list[Operation],
        inside: set[Maps],
        plan: tuple[list[tuple[Operation, int, int]], dict[Maps, int]],
        readers: dict[Maps, int],
        number: int,
        placed: set[Maps],
    ) -> None:
        events, held = plan
        for maps in inside:
            maps.held = held[maps]
        for op in segment:
            self._place(op.writes.maps, placed)
        made = dict.fromkeys(segment, 0)
        for op, first, stop in events:
            maps = op.writes.maps
            if first == 0:
                self._border(op, -1)
            newest = stop + (maps.halo and stop == maps.height)
            if maps in inside and newest - maps.base > maps.held:
                self._slide(maps, _oldest(maps, segment, made), max(made[w] for w in segment if w.writes.maps is maps))
            self._call(op, first, stop - first)
            made[op] = stop
            if stop == maps.height:
                self._border(op, stop)
        for maps in {part.maps for op in segment for part in op.reads}:
            if readers[maps] == number:
                self._free(maps)

    # --- calls ---

    def _call(self, op: Operation, first: int, rows: int) -> None:
        if op not in self._numbers:
            self._numbers[op] = len(self.kernels)
            self.kernels.append(_kernel(op))
            self.scratch = max(self.scratch, _scratch(op))
        places = [part.maps.row_0 + part.first * part.maps.plane for part in (*op.reads, op.reads[0])]
        to = op.writes.maps.row_0 + op.writes.first * op.writes.maps.plane
        self.calls.append(Call(self._numbers[op], first, rows, places[0], places[1], to))

    def _border(self, op: Operation, row: int) -> None:
        """Zeros in a row above or below, unless an earlier operation on the same maps has put them there."""
        if op.writes.maps.halo and op.reads[0].maps is not op.writes.maps:
            self._rows("zero", op.writes.maps, row, 1, op.writes.maps.row_0)

    def _slide(self, maps: Maps, base: int, stop: int) -> None:
        before = maps.row_0
        maps.base = base
        if stop > base:
            self._rows("slide", maps, base, stop - base, before)

    def _rows(self, kind: str, maps: Maps, first: int, rows: int, before: int) -> None:
        numbers: dict[str, float] = {"targets": maps.channels, "out_pitch": maps.pitch, "out_plane": maps.plane}
        self.kernels.append(Kernel(kind, numbers, {}))
        self.calls.append(Call(len(self.kernels) - 1, first, rows, before, before, maps.row_0))


# --- from instructions to operations ---


def operations(program: Program) -> Iterator[Operation]:
    """The operations of a program, from the images of a user to where outputs go."""
    found: list[Operation] = []
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


def _added(found: list[Operation], kind: str, x: Part, to: Maps | Part, source: object = None) -> Part:
    part = to if isinstance(to, Part) else Part.whole(to)
    found.append(Operation(kind, (x,), part, source))
    return part


def _add(found: list[Operation], instruction: Instruction, x: Part, to: Part | None = None) -> Part:
    """Appends the operations of an instruction; returns what it gives, at a place if one is given."""
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
    given = Maps(channels, height, width)
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
    return _added(found, kind, x, to or given, instruction)


def _on_maps(instruction: Instruction) -> bool:
    """Whether it takes maps, not numbers."""
    if isinstance(instruction, Restore):
        return instruction.constant.ndim == 3
    return not isinstance(instruction, Linear)


def _absorbs(found: list[Operation], x: Part) -> bool:
    """Whether the last operation made just these maps, and can rectify them on the way."""
    kinds = ("edges", "matrix", "affine", "instance_norm", "depthwise", "convolution", "node", "linear")
    return bool(found) and found[-1].writes is x and found[-1].kind in kinds


def _is_node(convolution: Convolution, x: Part) -> bool:
    """Whether a convolution per channel is one that the kernel for nodes does."""
    if convolution.weight.shape[1:] != (1, 3, 3) or convolution.padding != (1, 1) or x.maps.pitch == 1:
        return False
    constant = convolution.constant
    return convolution.stride in ((1, 1), (2, 2)) and (constant is None or not len(constant.channels))


def _add_graph(found: list[Operation], graph: Graph, x: Part) -> Part:
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


def _add_edges(found: list[Operation], edges: Edges, x: Part, states: Part) -> Part:
    to = Part.whole(Maps(edges.num_targets, x.maps.height, x.maps.width))
    found.append(Operation(_edges_kind(edges), (x, states) if states.count else (x,), to, edges))
    return to


def _edges_kind(edges: Instruction) -> str:
    return "matrix" if isinstance(edges, Edges) and edges.dense else "edges"


def _add_nodes(found: list[Operation], node: Sequence[Instruction], x: Part, to: Part | None) -> Part:
    """A node function whose last instruction writes to a place."""
    for i, instruction in enumerate(node):
        x = _add(found, instruction, x, to if i == len(node) - 1 else None)
    if not node and to is not None:
        x = _added(found, "copy", x, to)
    return x


# --- segments ---


def _segments(operations: list[Operation]) -> Iterator[list[Operation]]:
    """Operations that may run row by row together; cut where maps become smaller."""
    segment: list[Operation] = []
    for op in operations:
        if not op.by_rows:
            if segment:
                yield segment
            segment = []
            yield [op]
            continue
        segment.append(op)
        if op.kind in ("node", "depthwise") and op.source.stride[0] > 1:
            yield segment
            segment = []
    if segment:
        yield segment


def _planned(
    segment: list[Operation], inside: set[Maps], cache: int
) -> tuple[list[tuple[Operation, int, int]], dict[Maps, int]] | None:
    """What makes which rows when, with as many rows at a time as fit into the cache; None: everything as a whole."""
    rows = segment[0].writes.maps.height
    if 4 * sum(maps.floats for maps in inside) <= cache:
        return None
    while rows > 1:
        rows = -(-rows // 2)
        events, held = _simulated(segment, inside, rows)
        if 4 * sum(maps.channels * maps.pitch * held[maps] for maps in inside) <= cache:
            return events, held
    return None


def _simulated(
    segment: list[Operation], inside: set[Maps], step: int
) -> tuple[list[tuple[Operation, int, int]], dict[Maps, int]]:
    """The first operation makes some rows, the others as many as they can, and so on; and how many rows must be held."""
    made = dict.fromkeys(segment, 0)
    held = dict.fromkeys(inside, 1)
    events: list[tuple[Operation, int, int]] = []
    while any(made[op] < op.writes.maps.height for op in segment):
        for op in segment:
            sources = [w for part in op.reads for w in segment if w is not op and _feeds(w, part)]
            available = [min(made[w], part.maps.height) for part in op.reads for w in sources if _feeds(w, part)]
            stop = op.possible(min(available)) if available else op.writes.maps.height
            if op is segment[0]:
                stop = min(stop, made[op] + step)
            if stop <= made[op]:
                continue
            maps = op.writes.maps
            if maps in inside:
                newest = stop + (maps.halo and stop == maps.height)
                held[maps] = max(held[maps], newest - _oldest(maps, segment, made))
            events.append((op, made[op], stop))
            made[op] = stop
    return events, held


def _feeds(writer: Operation, part: Part) -> bool:
    here = writer.writes
    return here.maps is part.maps and here.first < part.first + part.count and part.first < here.first + here.count


def _oldest(maps: Maps, segment: list[Operation], made: dict[Operation, int]) -> int:
    """The first row of maps that is still read, or not yet made."""
    oldest = [op.oldest(made[op]) for op in segment if any(part.maps is maps for part in op.reads)]
    unmade = [made[op] for op in segment if op.writes.maps is maps and made[op] < maps.height]
    return max(min([*oldest, *unmade]), -1 if maps.halo else 0)


# --- what kernels take ---


def _scratch(op: Operation) -> int:
    if op.kind not in ("depthwise", "convolution"):
        return 0
    return math.prod(op.source.weight.shape[1:]) * -(-op.writes.maps.width // 16) * 16 + _SLACK


def _kernel(op: Operation) -> Kernel:
    maps, given, source = op.reads[0].maps, op.writes.maps, op.source
    numbers: dict[str, float] = {
        "relu": op.relu or op.kind == "rectify",
        "outside": maps.outside,
        "sources": op.reads[0].count,
        "targets": op.writes.count,
        "height": maps.height,
        "width": maps.width,
        "pitch": maps.pitch,
        "plane": maps.plane,
        "out_height": given.height,
        "out_width": given.width,
        "out_pitch": given.pitch,
        "out_plane": given.plane,
    }
    arrays: dict[str, Tensor] = {}
    if given.halo and (given.pitch > given.width or given.pitch < 16):  # vectors are longer than rows
        arrays["mask"] = _mask(given, 0, given.height, 0, given.width)
    if op.kind == "edges":
        first = op.reads[0].count
        lies_first = source.sources < first
        second = op.reads[-1].maps
        offsets = torch.where(lies_first, source.sources * maps.plane, (source.sources - first) * second.plane)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lies_first.long().cumsum(0)])
        middles = source.starts[:-1] + ends[source.starts[1:]] - ends[source.starts[:-1]]
        arrays |= {"weight": source.weight, "starts": source.starts, "middles": middles, "offsets": offsets}
    elif op.kind == "matrix":
        matrix = source.matrix() if isinstance(source, Edges) else source.weight.flatten(1)
        grouped = matrix.new_zeros(-(-len(matrix) // 4) * 4, matrix.shape[1])
        grouped[: len(matrix)] = matrix
        arrays["weight"] = grouped.view(-1, 4, matrix.shape[1]).transpose(1, 2)
        numbers["others"] = sum(part.count for part in op.reads[1:])
        numbers["second_plane"] = op.reads[-1].maps.plane
    elif op.kind in ("affine", "instance_norm"):
        arrays |= {"scale": source.scale, "shift": source.shift}
        numbers["eps"] = getattr(source, "eps", 0.0)
    elif op.kind in ("depthwise", "convolution", "node"):
        arrays["weight"] = source.weight
        numbers["kernel_height"], numbers["kernel_width"] = source.weight.shape[2:]
        (numbers["stride_y"], numbers["stride_x"]), (numbers["pad_y"], numbers["pad_x"]) = source.stride, source.padding
    elif op.kind == "mean":
        bottom, right = min(source.stop, maps.height), min(source.stop, maps.width)
        arrays["mask"] = _mask(maps, source.start, bottom, source.start, right)
        numbers["eps"] = 1 / ((bottom - source.start) * (right - source.start))
    elif op.kind == "linear":
        arrays |= {"weight": source.weight, "shift": source.bias}
    elif isinstance(source, Pick):
        arrays["channels"] = source.channels
    elif isinstance(source, Restore):
        channels = torch.full((op.writes.count,), -1)
        channels[source.channels] = torch.arange(len(source.channels))
        added = source.constant.reshape(op.writes.count, -1)
        arrays |= {"channels": channels, "added": added}
        numbers |= {"height": given.height, "width": given.width, "maps": added.shape[1]}
    if isinstance(constant := getattr(source, "constant", None), Constant):
        arrays["shift"] = constant.base
        if len(constant.channels):
            channels = torch.full((op.writes.count,), -1)
            channels[constant.channels] = torch.arange(len(constant.channels))
            added = given.padded(constant.core[:, constant.rows][:, :, constant.columns])
            arrays |= {"channels": channels, "added": added}
            numbers["maps"] = added.shape[1]
    return Kernel(op.kind, numbers, arrays)


def _mask(maps: Maps, top: int, bottom: int, left: int, right: int) -> Tensor:
    """All bits of a place inside a window, none elsewhere, as places lie in memory."""
    inside = torch.zeros(1, maps.height, maps.width, dtype=torch.int32)
    inside[:, top:bottom, left:right] = -1
    return maps.padded(inside)[0]


class Space:
    """Places in the arena, given out first-fit and taken back."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []

    def take(self, count: int) -> int:
        count = -(-count // 16) * 16
        for i, (at, room) in enumerate(self._free):
            if room >= count:
                self._free[i] = (at + count, room - count)
                return at
        at, self.size = self.size, self.size + count
        return at

    def free(self, at: int, count: int) -> None:
        count = -(-count // 16) * 16
        merged: list[tuple[int, int]] = []
        for place, room in sorted([*self._free, (at, count)]):
            if merged and sum(merged[-1]) == place:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            elif room:
                merged.append((place, room))
        self._free = merged
