"""From tasks to calls of kernels: where maps lie, and which rows are made when.

Contract: pure planning, nothing is run. Maps that are too large for a processor's cache never exist as a whole: a network is
cut into segments, and in a segment every task makes a few rows at a time, as soon as the rows that it reads are
there. Of the maps inside a segment only the rows that are still needed are kept; they slide to the front when more room is
wanted. Nothing is computed twice. Where the maps of a segment fit into the cache as a whole, it is run as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dnw.compile._layers import ACTIVATIONS, Shift
from dnw.compile._program import Pick, Program, Restore
from dnw.compile._tasks import Maps, Part, Task, constant_of, edges_of, moved, tasks

CACHE = 640 << 10
"""Bytes that the maps of a segment may take: what fits into a second-level cache of 1 MiB beside weights."""
NEAREST = 28 << 10
"""Bytes of the nearest cache that sources may take."""
MOST_TILE = 14
"""Vectors of sums that the sparse kernel holds in registers (_kernels_layers.h)."""
ACTIVATION_NUMBERS = {kind: number for number, kind in enumerate(("none", *ACTIVATIONS))}
"""As in _kernels.c."""
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
        in_offset, second_offset, third_offset, out_offset: where row 0 of the maps lies in the arena, or would lie.
    """

    task: int
    first: int
    rows: int
    in_offset: int
    second_offset: int
    third_offset: int
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
        found = tasks(self.program)
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
        maps.first_row = -maps.top
        maps.offset = self._space.take(maps.floats + _SLACK)
        allocated.add(maps)

    def _free(self, maps: Maps) -> None:
        if not maps.outside:
            self._space.free(maps.offset, maps.floats + _SLACK)

    def _run_whole(self, segment: list[Task], readers: dict[Maps, int], number: int, allocated: set[Maps]) -> None:
        last = {part.maps: i for i, task in enumerate(segment) for part in task.reads}
        for i, task in enumerate(segment):
            self._allocate(task.writes.maps, allocated)
            self._above(task)
            self._below(task)
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
                self._above(task)
            newest = stop + (maps.bottom if stop == maps.height else 0)
            if maps in inside and newest - maps.first_row > maps.held:
                self._slide(maps, _oldest(maps, segment, made), max(made[w] for w in segment if w.writes.maps is maps))
            self._call(task, first, stop - first)
            made[task] = stop
            if stop == maps.height:
                self._below(task)
        for maps in {part.maps for task in segment for part in task.reads}:
            if readers[maps] == number:
                self._free(maps)

    # --- calls ---

    def _call(self, task: Task, first: int, rows: int) -> None:
        if task not in self._numbers:
            self._numbers[task] = len(self.records)
            self.records.append(_record(task))
            self.scratch = max(self.scratch, _scratch(task))
        _require_held(task.writes.maps, first, rows)
        second = task.reads[min(1, len(task.reads) - 1)]
        parts = task.reads[0], second, task.reads[-1], task.writes
        offsets = (part.maps.row_0 + part.first * part.maps.plane for part in parts)
        self.calls.append(Call(self._numbers[task], first, rows, *offsets))

    def _above(self, task: Task) -> None:
        """Zeros in the rows above, unless an earlier task on the same maps has put them there."""
        maps = task.writes.maps
        if maps.top and task.reads[0].maps is not maps:
            self._rows("zero", maps, -maps.top, maps.top, maps.row_0)

    def _below(self, task: Task) -> None:
        """Zeros in the rows below."""
        maps = task.writes.maps
        if maps.bottom and task.reads[0].maps is not maps:
            self._rows("zero", maps, maps.height, maps.bottom, maps.row_0)

    def _slide(self, maps: Maps, first: int, stop: int) -> None:
        before = maps.row_0
        maps.first_row = first
        if stop > first:
            self._rows("slide", maps, first, stop - first, before)

    def _rows(self, kind: str, maps: Maps, first: int, rows: int, before: int) -> None:
        _require_held(maps, first, rows)
        numbers: dict[str, float] = {"targets": maps.channels, "out_pitch": maps.pitch, "out_plane": maps.plane}
        self.records.append(Record(kind, numbers, {}))
        self.calls.append(Call(len(self.records) - 1, first, rows, before, before, before, maps.row_0))


def _require_held(maps: Maps, first: int, rows: int) -> None:
    """Rows are written where they are held, nowhere beside."""
    held = maps.first_row, maps.first_row + (maps.held or maps.rows)
    assert maps.outside or held[0] <= first <= first + rows <= held[1], f"rows {first} to {first + rows} of {held}"


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
        if task.halves:
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
                newest = stop + (maps.bottom if stop == maps.height else 0)
                held[maps] = max(held[maps], newest - _oldest(maps, segment, made))
            events.append((task, made[task], stop))
            made[task] = stop
    return events, held


def _feeds(writer: Task, part: Part) -> bool:
    made = writer.writes
    return made.maps is part.maps and made.first < part.first + part.count and part.first < made.first + made.count


def _oldest(maps: Maps, segment: list[Task], made: dict[Task, int]) -> int:
    """The first row of maps that is still read, or not yet made; who has not begun puts zeros above as well."""
    oldest = [task.oldest(made[task]) for task in segment if any(part.maps is maps for part in task.reads)]
    unmade = [made[task] or -maps.top for task in segment if task.writes.maps is maps and made[task] < maps.height]
    return max(min([*oldest, *unmade]), -maps.top)


# --- what kernels take ---


def _scratch(task: Task) -> int:
    if task.kind == "pool":
        pool, width = task.instruction, task.writes.maps.width
        line = (width + 16) * pool.stride[1] + pool.kernel[1] * pool.dilation[1]
        return max(line, task.reads[0].maps.width + pool.padding[1]) + _SLACK
    if task.kind == "attention":
        return task.reads[1].maps.width + _SLACK
    return 0


Numbers = dict[str, float]
Arrays = dict[str, Tensor]


def _record(task: Task) -> Record:
    maps, out, last = task.reads[0].maps, task.writes.maps, task.reads[-1].maps
    second = task.reads[min(1, len(task.reads) - 1)].maps
    numbers: Numbers = {
        "relu": task.relu or task.kind == "rectify",
        "outside": maps.outside,
        "sources": task.reads[0].count,
        "second_sources": sum(part.count for part in task.reads[1:2]),
        "targets": task.writes.count,
        "height": maps.height,
        "width": maps.width,
        "pitch": maps.pitch,
        "plane": maps.plane,
        "second_plane": second.plane,
        "third_plane": last.plane,
        "out_height": out.height,
        "out_width": out.width,
        "out_pitch": out.pitch,
        "out_plane": out.plane,
    }
    arrays: Arrays = {}
    if out.halo and (out.pitch > out.width or out.pitch < 16):  # vectors are longer than rows
        arrays["mask"] = _mask(out)
    if task.relu or task.activation:
        numbers["activation"] = ACTIVATION_NUMBERS[task.activation.kind if task.activation else "relu"]
        numbers |= {"first": task.activation.first, "second": task.activation.second} if task.activation else {}
    if task.kind in _RECORDS:
        _RECORDS[task.kind](task, numbers, arrays)
    if task.kind != "phases" and (constant := constant_of(task.instruction)) is not None:
        arrays["shift"] = constant.base
        if len(constant.channels):
            added = out.padded(constant.core[:, constant.rows][:, :, constant.columns])
            arrays |= {"added_maps": _positions(constant.channels, task.writes.count), "added": added}
            numbers["added_plane"] = added.shape[1]
    return Record(task.kind, numbers, arrays)


def _pairs(numbers: Numbers, **pairs: tuple[int, int]) -> None:
    for name, (y, x) in pairs.items():
        numbers |= {f"{name}_y": y, f"{name}_x": x}


def _record_phases(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    phases = task.settings["geometry"].phases
    numbers["blocks"] = len(phases)
    _pairs(numbers, stride=task.instruction.stride, pad=task.instruction.padding)
    arrays |= {"starts": torch.tensor([y for y, _ in phases]), "middles": torch.tensor([x for _, x in phases])}


def _record_norm(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    arrays |= {"scale": task.instruction.scale, "shift": task.instruction.shift}
    numbers |= {"eps": getattr(task.instruction, "eps", 0.0), "groups": getattr(task.instruction, "groups", 1)}


def _record_node(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    arrays["weight"] = task.instruction.weight
    numbers["kernel_height"], numbers["kernel_width"] = task.instruction.weight.shape[2:]
    _pairs(numbers, stride=task.instruction.stride, pad=task.instruction.padding)


def _record_pool(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    pool = task.instruction
    numbers["kernel_height"], numbers["kernel_width"] = pool.kernel
    _pairs(numbers, stride=pool.stride, pad=pool.padding, dilation=pool.dilation)
    numbers |= {"largest": pool.largest, "padded": pool.padded}


def _record_mean(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    maps = task.reads[0].maps
    arrays["mask"] = _mask(maps)
    numbers["reciprocal"] = 1 / (maps.height * maps.width)


def _record_linear(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    arrays |= {"weight": task.instruction.weight, "shift": task.instruction.bias}


def _record_rearrange(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    arrays["offsets"], arrays["middles"] = moved(task)
    numbers |= {"taps": len(arrays["offsets"]), "clear": task.settings["clear"]}


def _record_attention(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    attention, keys = task.instruction, task.reads[1].maps
    numbers |= {"groups": attention.heads, "reciprocal": attention.scale, "width": keys.width, "pitch": keys.pitch}
    if attention.mask is not None:
        arrays["added"] = keys.padded(attention.mask[:, None])
        numbers["added_plane"] = arrays["added"].shape[1]


def _record_sum(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    if isinstance(task.instruction, Shift):
        maps, constant = task.reads[0].maps, task.instruction.constant
        arrays["added"] = maps.padded(constant.view(len(constant), maps.height, maps.width))
        numbers["added_plane"] = arrays["added"].shape[1]


def _record_copy(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    instruction, out = task.instruction, task.writes
    if isinstance(instruction, Pick):
        arrays["source_channels"] = instruction.channels
    elif isinstance(instruction, Restore):
        added = instruction.constant.reshape(out.count, -1)
        arrays |= {"source_channels": _positions(instruction.channels, out.count), "added": added}
        numbers |= {"height": out.maps.height, "width": out.maps.width, "added_plane": added.shape[1]}


def _grouped(matrix: Tensor) -> Tensor:
    """A matrix ``[targets, taps]`` as four targets side by side: ``[groups, taps, 4]``."""
    grouped = matrix.new_zeros(-(-len(matrix) // 4) * 4, matrix.shape[1])
    grouped[: len(matrix)] = matrix
    return grouped.view(-1, 4, matrix.shape[1]).transpose(1, 2)


def _record_taps(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    """Weights of a convolution or matrix, and where what they are multiplied with lies."""
    maps, count, instruction = task.reads[0].maps, task.reads[0].count, task.instruction
    geometry = task.settings.get("geometry")
    if "point" in task.settings:
        _record_point(task, numbers, arrays)
        return
    if geometry is None:
        weight, places = instruction.weight, torch.arange(count) * maps.plane
        arrays["shift"] = instruction.bias
        taps, phases = 1, 1
    else:
        weight = instruction.weight if task.kind == "sparse" else instruction.whole()
        taps, phases = len(geometry.taps), len(geometry.phases)
        at = torch.tensor([phase * maps.plane + row * maps.pitch + column for phase, row, column in geometry.taps])
        places = (torch.arange(count // phases).view(-1, 1) * phases * maps.plane + at).flatten()
    if task.kind == "dense":
        arrays |= {"weight": _grouped(weight.flatten(1)), "offsets": places}
        numbers["taps"] = len(places)
        return
    if geometry is None:
        target, source = weight.nonzero(as_tuple=True)
        place, values = source, weight[target, source]
    else:
        target, source, tap, values = edges_of(instruction)
        place = source * taps + tap
    tile, each = (1, count) if maps.pitch == 1 else _tiled(task, count // phases, len(source))
    block, blocks = source // each, -(-(count // phases) // each)
    order = (block * task.writes.count + target).argsort(stable=True)
    starts = torch.zeros(blocks, task.writes.count + 1, dtype=torch.int64)
    ends = torch.zeros(blocks * task.writes.count + 1, dtype=torch.int64)
    ends[1:] = (block * task.writes.count + target).bincount(minlength=blocks * task.writes.count).cumsum(0)
    starts[:, :-1] = ends[:-1].view(blocks, -1)
    starts[:, -1] = ends[task.writes.count :: task.writes.count]
    arrays |= {"starts": starts.flatten(), "offsets": places[place[order]], "weight": values[order]}
    numbers |= {"taps": len(order), "blocks": blocks, "tile": tile}


def _record_point(task: Task, numbers: Numbers, arrays: Arrays) -> None:
    """Weights of a convolution that makes one pixel, and where what they are multiplied with lies."""
    maps, convolution = task.reads[0].maps, task.instruction
    target, source, tap, values = edges_of(convolution)
    columns = convolution.weight.shape[3]
    row = tap // columns * convolution.dilation[0] - convolution.padding[0]
    column = tap % columns * convolution.dilation[1] - convolution.padding[1]
    inside = (row >= 0) & (row < maps.height) & (column >= 0) & (column < maps.width)
    ends = target[inside].bincount(minlength=task.writes.count).cumsum(0)
    arrays["starts"] = torch.cat([ends.new_zeros(1), ends])
    arrays["offsets"] = (source * maps.plane + row * maps.pitch + column)[inside]
    arrays["weight"] = values[inside]
    numbers |= {"taps": int(inside.count_nonzero()), "blocks": 1, "tile": 1}


def _tiled(task: Task, sources: int, edges: int) -> tuple[int, int]:
    """Of a sparse task: how many times 16 pixels at a time, and how many sources at a time, by what that is likely to cost.

    Counted are cycles of one target: a vector of a product costs one where its source lies in the nearest cache, and two where
    it does not; weights, beginning with another block, and sums that wait in memory cost besides.
    """
    maps, out, geometry = task.reads[0].maps, task.writes.maps, task.settings.get("geometry")
    vectors, rows = -(-out.height * out.pitch // 16), task.window[0] - 1
    phases = 1 if geometry is None else len(geometry.phases)
    degree = edges / max(1, task.writes.count)
    if getattr(task.instruction, "groups", 1) == sources:  # nothing is read twice
        tiles = -(-vectors // MOST_TILE)
        return -(-vectors // tiles), sources
    best = (math.inf, 1, sources)
    for tiles in range(-(-vectors // MOST_TILE), -(-vectors // 3) + 1):
        tile = -(-vectors // tiles)
        bytes_each = 4 * phases * min(16 * tile + rows * maps.pitch, maps.plane)
        for blocks in sorted({1, *(max(1, sources * bytes_each // (kib << 10)) for kib in (16, 20, 24, 28, 32, 48))}):
            held = -(-sources // blocks) * bytes_each
            near = min(1.0, NEAREST / held)
            cost = degree * (tile * (2.1 - 1.05 * near) + 1.5) + blocks * (2 * tile + 14)
            best = min(best, (cost * tiles, tile, -(-sources // blocks)))
    return best[1], best[2]


def _positions(channels: Tensor, count: int) -> Tensor:
    """Of each of so many channels its position among those that are listed, -1 where it is not."""
    found = torch.full((count,), -1)
    found[channels] = torch.arange(len(channels))
    return found


def _mask(maps: Maps) -> Tensor:
    """All bits of each pixel, none of what lies beside them, as they lie in memory."""
    return maps.padded(torch.full((1, maps.height, maps.width), -1, dtype=torch.int32))[0]


_RECORDS: dict[str, Callable[[Task, Numbers, Arrays], None]] = {
    **dict.fromkeys(("sparse", "dense"), _record_taps),
    **dict.fromkeys(("affine", "instance_norm", "layer_norm", "group_norm"), _record_norm),
    "attention": _record_attention,
    "copy": _record_copy,
    "linear": _record_linear,
    "mean": _record_mean,
    "node": _record_node,
    "phases": _record_phases,
    "pool": _record_pool,
    "rearrange": _record_rearrange,
    "sum": _record_sum,
}
"""What a kernel of each kind takes besides the sizes of its maps."""


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
