"""From tasks to calls of kernels: where maps lie, and which rows are made when.

Contract: pure planning, nothing is run. Maps that are too large for a processor's cache never exist as a whole: a network is
cut into segments, and in a segment every task makes a few rows at a time, as soon as the rows that it reads are
there. Of the maps inside a segment only the rows that are still needed are kept; they slide to the front when more room is
wanted. Nothing is computed twice. Where the maps of a segment fit into the cache as a whole, it is run as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dnw.compile._program import Constant, Edges, Pick, Program, Restore
from dnw.compile._tasks import Maps, Part, Task, tasks

CACHE = 640 << 10
"""Bytes that the maps of a segment may take: what fits into a second-level cache of 1 MiB beside weights."""
_SLACK = 64
"""Floats behind all maps in the arena that belong to nobody: kernels that are marked OVER_READS (_kernels.c) work in whole
vectors, wherever their rows end, and so reach up to OVER_READ floats behind. That it is enough is checked there, by dnw_check.
"""


@dataclass(frozen=True, eq=False)
class Record:
    """A task as its kernel takes it: ``struct task`` of _kernels.c, numbers and arrays by their names."""

    kind: str
    numbers: dict[str, float]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """``struct call`` of _kernels.c: rows ``first`` to ``first + rows`` of what a task makes.

    Attributes:
        task: the number of its record.
        in_offset, second_offset, out_offset: where row 0 of the maps lies in the arena, or would lie.
    """

    task: int
    first: int
    rows: int
    in_offset: int
    second_offset: int
    out_offset: int


@dataclass
class Lowered:
    """A program as calls of kernels on an arena.

    Attributes:
        records: of all tasks.
        calls: in order.
        arena, scratch: how many floats are needed for one image, and besides for each thread.
    """

    program: Program
    cache: int = CACHE
    records: list[Record] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    arena: int = 0
    scratch: int = 0

    def __post_init__(self) -> None:
        self._space = Space()
        self._numbers: dict[Task, int] = {}
        found = list(tasks(self.program))
        for task in found:
            if task.kind == "node":
                task.reads[0].maps.halo = True
        segments = list(_segments(found))
        readers = {part.maps: i for i, segment in enumerate(segments) for task in segment for part in task.reads}
        allocated: set[Maps] = set()
        for i, segment in enumerate(segments):
            inside = {task.writes.maps for task in segment if readers.get(task.writes.maps, -1) == i}
            inside -= allocated
            schedule = _scheduled(segment, inside, self.cache)
            if schedule is None:
                self._run_whole(segment, readers, i, allocated)
            else:
                self._run_by_rows(segment, inside, schedule, readers, i, allocated)
        self.arena = self._space.size + _SLACK

    # --- where things lie ---

    def _allocate(self, maps: Maps, allocated: set[Maps]) -> None:
        if maps in allocated or maps.outside:
            return
        maps.held = maps.held or maps.rows
        maps.first_row = -1 if maps.halo else 0
        maps.offset = self._space.take(maps.floats + _SLACK)
        allocated.add(maps)

    def _free(self, maps: Maps) -> None:
        if not maps.outside:
            self._space.free(maps.offset, maps.floats + _SLACK)

    def _run_whole(self, segment: list[Task], readers: dict[Maps, int], number: int, allocated: set[Maps]) -> None:
        last = {part.maps: i for i, task in enumerate(segment) for part in task.reads}
        for i, task in enumerate(segment):
            self._allocate(task.writes.maps, allocated)
            self._border(task, -1)
            self._border(task, task.writes.maps.height)
            self._call(task, 0, task.writes.maps.height)
            for maps in {part.maps for part in task.reads}:
                if last[maps] == i and readers[maps] == number and maps is not task.writes.maps:
                    self._free(maps)

    def _run_by_rows(
        self,
        segment: list[Task],
        inside: set[Maps],
        schedule: tuple[list[tuple[Task, int, int]], dict[Maps, int]],
        readers: dict[Maps, int],
        number: int,
        allocated: set[Maps],
    ) -> None:
        events, held = schedule
        for maps in inside:
            maps.held = held[maps]
        for task in segment:
            self._allocate(task.writes.maps, allocated)
        made = dict.fromkeys(segment, 0)
        for task, first, stop in events:
            maps = task.writes.maps
            if first == 0:
                self._border(task, -1)
            newest = stop + (maps.halo and stop == maps.height)
            if maps in inside and newest - maps.first_row > maps.held:
                self._slide(maps, _oldest(maps, segment, made), max(made[w] for w in segment if w.writes.maps is maps))
            self._call(task, first, stop - first)
            made[task] = stop
            if stop == maps.height:
                self._border(task, stop)
        for maps in {part.maps for task in segment for part in task.reads}:
            if readers[maps] == number:
                self._free(maps)

    # --- calls ---

    def _call(self, task: Task, first: int, rows: int) -> None:
        if task not in self._numbers:
            self._numbers[task] = len(self.records)
            self.records.append(_record(task))
            self.scratch = max(self.scratch, _scratch(task))
        parts = task.reads[0], task.reads[-1], task.writes
        offsets = (part.maps.row_0 + part.first * part.maps.plane for part in parts)
        self.calls.append(Call(self._numbers[task], first, rows, *offsets))

    def _border(self, task: Task, row: int) -> None:
        """Zeros in a row above or below, unless an earlier task on the same maps has put them there."""
        if task.writes.maps.halo and task.reads[0].maps is not task.writes.maps:
            self._rows("zero", task.writes.maps, row, 1, task.writes.maps.row_0)

    def _slide(self, maps: Maps, first: int, stop: int) -> None:
        before = maps.row_0
        maps.first_row = first
        if stop > first:
            self._rows("slide", maps, first, stop - first, before)

    def _rows(self, kind: str, maps: Maps, first: int, rows: int, before: int) -> None:
        numbers: dict[str, float] = {"targets": maps.channels, "out_pitch": maps.pitch, "out_plane": maps.plane}
        self.records.append(Record(kind, numbers, {}))
        self.calls.append(Call(len(self.records) - 1, first, rows, before, before, maps.row_0))


# --- segments ---


def _segments(tasks: list[Task]) -> Iterator[list[Task]]:
    """Tasks that may run row by row together; cut where maps become smaller."""
    segment: list[Task] = []
    for task in tasks:
        if not task.by_rows:
            if segment:
                yield segment
            segment = []
            yield [task]
            continue
        segment.append(task)
        if task.kind in ("node", "depthwise") and task.instruction.stride[0] > 1:
            yield segment
            segment = []
    if segment:
        yield segment


def _scheduled(
    segment: list[Task], inside: set[Maps], cache: int
) -> tuple[list[tuple[Task, int, int]], dict[Maps, int]] | None:
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


def _simulated(segment: list[Task], inside: set[Maps], rows: int) -> tuple[list[tuple[Task, int, int]], dict[Maps, int]]:
    """The first task makes so many rows, the others as many as they can, and so on; and how many rows must be held."""
    made = dict.fromkeys(segment, 0)
    held = dict.fromkeys(inside, 1)
    events: list[tuple[Task, int, int]] = []
    while any(made[task] < task.writes.maps.height for task in segment):
        for task in segment:
            sources = [w for part in task.reads for w in segment if w is not task and _feeds(w, part)]
            available = [min(made[w], part.maps.height) for part in task.reads for w in sources if _feeds(w, part)]
            stop = task.possible(min(available)) if available else task.writes.maps.height
            if task is segment[0]:
                stop = min(stop, made[task] + rows)
            if stop <= made[task]:
                continue
            maps = task.writes.maps
            if maps in inside:
                newest = stop + (maps.halo and stop == maps.height)
                held[maps] = max(held[maps], newest - _oldest(maps, segment, made))
            events.append((task, made[task], stop))
            made[task] = stop
    return events, held


def _feeds(writer: Task, part: Part) -> bool:
    made = writer.writes
    return made.maps is part.maps and made.first < part.first + part.count and part.first < made.first + made.count


def _oldest(maps: Maps, segment: list[Task], made: dict[Task, int]) -> int:
    """The first row of maps that is still read, or not yet made."""
    oldest = [task.oldest(made[task]) for task in segment if any(part.maps is maps for part in task.reads)]
    unmade = [made[task] for task in segment if task.writes.maps is maps and made[task] < maps.height]
    return max(min([*oldest, *unmade]), -1 if maps.halo else 0)


# --- what kernels take ---


def _scratch(task: Task) -> int:
    if task.kind not in ("depthwise", "convolution"):
        return 0
    return math.prod(task.instruction.weight.shape[1:]) * -(-task.writes.maps.width // 16) * 16 + _SLACK


def _record(task: Task) -> Record:
    maps, out, instruction = task.reads[0].maps, task.writes.maps, task.instruction
    numbers: dict[str, float] = {
        "relu": task.relu or task.kind == "rectify",
        "outside": maps.outside,
        "sources": task.reads[0].count,
        "second_sources": sum(part.count for part in task.reads[1:]),
        "targets": task.writes.count,
        "height": maps.height,
        "width": maps.width,
        "pitch": maps.pitch,
        "plane": maps.plane,
        "second_plane": task.reads[-1].maps.plane,
        "out_height": out.height,
        "out_width": out.width,
        "out_pitch": out.pitch,
        "out_plane": out.plane,
    }
    arrays: dict[str, Tensor] = {}
    if out.halo and (out.pitch > out.width or out.pitch < 16):  # vectors are longer than rows
        arrays["mask"] = _mask(out, 0, out.height, 0, out.width)
    if task.kind == "edges":
        first, starts, sources = task.reads[0].count, instruction.starts, instruction.sources
        lies_first = sources < first
        offsets = torch.where(lies_first, sources * maps.plane, (sources - first) * task.reads[-1].maps.plane)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lies_first.long().cumsum(0)])
        middles = starts[:-1] + ends[starts[1:]] - ends[starts[:-1]]
        arrays |= {"weight": instruction.weight, "starts": starts, "middles": middles, "offsets": offsets}
    elif task.kind == "matrix":
        matrix = instruction.matrix() if isinstance(instruction, Edges) else instruction.weight.flatten(1)
        grouped = matrix.new_zeros(-(-len(matrix) // 4) * 4, matrix.shape[1])
        grouped[: len(matrix)] = matrix
        arrays["weight"] = grouped.view(-1, 4, matrix.shape[1]).transpose(1, 2)
    elif task.kind in ("affine", "instance_norm"):
        arrays |= {"scale": instruction.scale, "shift": instruction.shift}
        numbers["eps"] = getattr(instruction, "eps", 0.0)
    elif task.kind in ("depthwise", "convolution", "node"):
        arrays["weight"] = instruction.weight
        numbers["kernel_height"], numbers["kernel_width"] = instruction.weight.shape[2:]
        numbers["stride_y"], numbers["stride_x"] = instruction.stride
        numbers["pad_y"], numbers["pad_x"] = instruction.padding
    elif task.kind == "mean":
        start, bottom, right = instruction.start, min(instruction.stop, maps.height), min(instruction.stop, maps.width)
        arrays["mask"] = _mask(maps, start, bottom, start, right)
        numbers["reciprocal"] = 1 / ((bottom - start) * (right - start))
    elif task.kind == "linear":
        arrays |= {"weight": instruction.weight, "shift": instruction.bias}
    elif isinstance(instruction, Pick):
        arrays["source_channels"] = instruction.channels
    elif isinstance(instruction, Restore):
        added = instruction.constant.reshape(task.writes.count, -1)
        arrays |= {"source_channels": _positions(instruction.channels, task.writes.count), "added": added}
        numbers |= {"height": out.height, "width": out.width, "added_plane": added.shape[1]}
    if isinstance(constant := getattr(instruction, "constant", None), Constant):
        arrays["shift"] = constant.base
        if len(constant.channels):
            added = out.padded(constant.core[:, constant.rows][:, :, constant.columns])
            arrays |= {"added_maps": _positions(constant.channels, task.writes.count), "added": added}
            numbers["added_plane"] = added.shape[1]
    return Record(task.kind, numbers, arrays)


def _positions(channels: Tensor, count: int) -> Tensor:
    """Of each of so many channels its position among those that are listed, -1 where it is not."""
    found = torch.full((count,), -1)
    found[channels] = torch.arange(len(channels))
    return found


def _mask(maps: Maps, top: int, bottom: int, left: int, right: int) -> Tensor:
    """All bits of a pixel inside a window, none elsewhere, as pixels lie in memory."""
    inside = torch.zeros(1, maps.height, maps.width, dtype=torch.int32)
    inside[:, top:bottom, left:right] = -1
    return maps.padded(inside)[0]


class Space:
    """Room in the arena, given out first-fit and taken back."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []

    def take(self, count: int) -> int:
        """Where so many floats lie."""
        count = -(-count // 16) * 16
        for i, (offset, room) in enumerate(self._free):
            if room >= count:
                self._free[i] = (offset + count, room - count)
                return offset
        offset, self.size = self.size, self.size + count
        return offset

    def free(self, offset: int, count: int) -> None:
        count = -(-count // 16) * 16
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            elif room:
                merged.append((start, room))
        self._free = merged
