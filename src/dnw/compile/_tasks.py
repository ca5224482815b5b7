"""From the instructions of a program to tasks of kernels on maps: what is read, what is written, with which numbers.

Contract: pure planning, nothing is run; where maps lie, and which rows are made when, is decided later (_lower.py). A value of
a program lies as maps: of images, of tokens (one row of them) or of single numbers (one pixel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnw.compile._layers import (
    Activation,
    AdaptiveMean,
    Attention,
    Concat,
    Crop,
    LayerNorm,
    Pad,
    PlaceMean,
    Pool,
    Product,
    Rearrange,
    Shift,
    Sum,
)
from dnw.compile._program import (
    Affine,
    Beside,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Node,
    Pick,
    Program,
    Restore,
    Size,
)


@dataclass(eq=False)
class Maps:
    """Maps in the arena. Rows are padded to ``pitch`` floats.

    Attributes:
        outside: whether they are the images or the outputs of a user, not in the arena.
        top, bottom: rows of zeros above and below.
        margin: columns of zeros beside, at least.
        wide: the pitch, where it is that of other maps.
        held: how many rows are there at a time.
        first_row: the row that lies first.
        offset: where that is, in floats.
    """

    channels: int
    height: int
    width: int
    outside: bool = False
    top: int = 0
    bottom: int = 0
    margin: int = 0
    wide: int = 0
    held: int = 0
    first_row: int = 0
    offset: int = 0

    @property
    def halo(self) -> bool:
        """Whether there are zeros around them, which kernels read."""
        return self.top > 0 or self.bottom > 0 or self.margin > 0

    @property
    def pitch(self) -> int:
        if self.outside:
            return self.width
        if self.wide:
            return self.wide
        if self.height == self.width == 1 and not self.halo:
            return 1
        width = self.width + self.margin
        if width > 8:
            return width if self.margin and self.height * width <= 128 else -(-width // 16) * 16
        return max(2, 1 << (width - 1).bit_length())

    @property
    def even(self) -> bool:
        """Whether rows begin where vectors do, or whole numbers of them are in one."""
        return self.pitch % 16 == 0 or 16 % self.pitch == 0

    @property
    def rows(self) -> int:
        """All of them."""
        return self.top + self.height + self.bottom

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

    def surround(self, top: int, bottom: int, margin: int = 0) -> None:
        """Gives them at least so many rows and columns of zeros."""
        self.top, self.bottom, self.margin = max(self.top, top), max(self.bottom, bottom), max(self.margin, margin)

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

    @property
    def is_whole(self) -> bool:
        return self.count == self.maps.channels


@dataclass(eq=False)
class Task:
    """What one kernel does.

    Attributes:
        kind: of kernel.
        reads: where from.
        writes: where to.
        instruction: the one of the program that has its numbers; None where there are none.
        relu: whether what comes out is rectified.
        activation: what else it becomes, of the kinds that know how.
        window: rows that a row reads, how far apart those of neighbours begin, and how many lie above the first row.
    """

    kind: str
    reads: tuple[Part, ...]
    writes: Part
    instruction: Any = None
    relu: bool = False
    activation: Activation | None = None
    window: tuple[int, int, int] = (1, 1, 0)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def by_rows(self) -> bool:
        """Whether it can make a few rows of its maps at a time."""
        if self.kind in ("phases", "pool"):
            return True
        return self.kind in ("node", "sparse", "dense", "sum") and self.reads[0].maps.pitch % 16 == 0

    @property
    def halves(self) -> bool:
        """Whether its maps are smaller than those of the arena that it reads."""
        smaller = self.kind in ("node", "phases", "pool") and self.window[1] > 1
        return smaller and not self.reads[0].maps.outside

    def possible(self, available: int) -> int:
        """How many rows can be made when so many of what it reads are there."""
        kernel, stride, padding = self.window
        height = self.writes.maps.height
        if available >= self.reads[0].maps.height:
            return height
        return min(height, max(0, (available - kernel + padding) // stride + 1))

    def oldest(self, made: int) -> int:
        """The first row that it still reads when so many are made."""
        kernel, stride, padding = self.window
        if made >= self.writes.maps.height:
            return self.reads[0].maps.height + kernel
        return made * stride - padding - (self.kind in ("sparse", "dense"))


def tasks(program: Program) -> list[Task]:
    """The tasks of a program, from the images of a user to where outputs go."""
    return _Tasks(program).found


FUSED = ("sparse", "dense", "node", "sum", "product")
"""Kinds of tasks that take any activation with them."""
RECTIFY = ("affine", "instance_norm", "linear", *FUSED)
"""Kinds of tasks that can rectify what they make."""


def maps_of(size: Size, **settings: Any) -> Maps:
    """How a value of some size lies."""
    if len(size) > 3 or not size:
        raise ValueError(f"a value of {size} does not lie as maps")
    channels, height, width = (size[0], 1, size[1]) if len(size) == 2 else (*size, 1, 1)[:3]
    return Maps(channels, height, width, **settings)


class _Tasks:
    def __init__(self, program: Program) -> None:
        self.found: list[Task] = []
        self._sizes = program.sizes()
        self._first = len(program.input_sizes)
        self._number = -1
        self._readers = program.readers()
        self._margins = dict[tuple[int, int], int]()
        for node in program.nodes:
            self._widen(node)
        self._homes = homes(program, _WRITES)
        self._joined = dict[int, Maps]()  # of values that others are written into
        self.values: list[Part] = []
        offset = 0
        for size in program.input_sizes:
            self.values.append(Part.whole(maps_of(size, outside=True, offset=offset)))
            offset += math.prod(size)
        for number, node in enumerate(program.nodes):
            self._number = number
            self.values.append(EMITTERS[type(node.instruction)](self, node.instruction, *self._read(node)))
        self._number = -1
        offset = 0
        for i in program.outputs:
            x = self.inside(self.values[i])
            self.add("gather", (x,), maps_of(self._sizes[i], outside=True, offset=offset))
            offset += math.prod(self._sizes[i])

    def _read(self, node: Node) -> list[Part]:
        return [self.values[i] for i in node.reads]

    # --- where things go ---

    def _widen(self, node: Node) -> None:
        """Notes how many columns of zeros maps of some size need, so that those of one size have one pitch."""
        size = self._sizes[node.reads[0]]
        instruction = node.instruction
        if isinstance(instruction, Convolution) and form_of(instruction, size) in ("sparse", "dense"):
            _, *sides = instruction.check(size)
            margin = Geometry.of(instruction, size).margin
            self._margins[sides[0], sides[1]] = max(self._margins.get((sides[0], sides[1]), 0), margin)

    def maps(self, size: Size) -> Maps:
        """New maps for a value of some size."""
        found = maps_of(size)
        found.margin = self._margins.get((found.height, found.width), 0)
        return found

    def home(self, size: Size) -> Part:
        """Where what the present node makes goes: maps of its own, or its place among those that it is joined with."""
        made = self._first + self._number
        return self.place(made) if made in self._homes else Part.whole(self.maps(size))

    def place(self, value: int) -> Part:
        """Where a value lies that others are joined in, or that is itself joined with others."""
        count = self._sizes[value][0]
        if value in self._homes:
            joined, first = self._homes[value]
            whole = self.place(joined)
            return Part(whole.maps, whole.first + first, count)
        if value not in self._joined:
            self._joined[value] = self.maps(self._sizes[value])
        return Part(self._joined[value], 0, count)

    @property
    def size(self) -> Size:
        """Of what the present node makes."""
        return self._sizes[self._first + self._number]

    def single(self, x: Part) -> bool:
        """Whether only the present node reads a value, and all that lies in it."""
        return any(self._is_single(i) for i in [i for i, part in enumerate(self.values) if part is x][-1:])

    def _is_single(self, value: int) -> bool:
        inside = (i for i, (joined, _) in self._homes.items() if joined == value)
        return self._readers[value] == 1 and all(self._is_single(i) for i in inside)

    def add(self, kind: str, reads: Sequence[Part], to: Maps | Part, instruction: object = None, **settings: Any) -> Part:
        """Appends a task; returns where it writes."""
        part = to if isinstance(to, Part) else Part.whole(to)
        self.found.append(Task(kind, tuple(reads), part, instruction, **settings))
        return part

    def inside(self, x: Part) -> Part:
        """A value in the arena, not in what a user gives."""
        if not x.maps.outside:
            return x
        maps = Maps(x.count, x.maps.height, x.maps.width, margin=self._margins.get((x.maps.height, x.maps.width), 0))
        found = self.add("spread", (x,), maps)
        self.values[:] = [found if part is x else part for part in self.values]
        return found

    def absorbs(self, x: Part, kinds: Sequence[str]) -> bool:
        """Whether the last task made just these maps for nobody else, and can do more to them on the way."""
        if not self.found or self.found[-1].writes is not x or self.found[-1].kind not in kinds:
            return False
        last = self.found[-1]
        return not last.relu and last.activation is None and self.single(x) and not self._at_home()

    def _at_home(self) -> bool:
        return self._first + self._number in self._homes


def homes(program: Program, writes: tuple[type[Instruction], ...]) -> dict[int, tuple[int, int]]:
    """Values that can be made where they are joined: in which value, from which channel on.

    Args:
        program: of which.
        writes: instructions that write where they are told to.
    """
    sizes, first, found = program.sizes(), len(program.input_sizes), dict[int, tuple[int, int]]()
    for number, node in enumerate(program.nodes):
        if isinstance(node.instruction, Concat) and node.instruction.axis == 0:
            at = 0
            for i in node.reads:
                inner = program.nodes[i - first].instruction if i >= first else None
                joined = isinstance(inner, Concat) and inner.axis == 0
                if i not in found and (joined or isinstance(inner, writes)):
                    found[i] = (first + number, at)
                at += sizes[i][0]
    return found


# --- convolutions ---


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads: pixels of phases of padded maps, side by side, without stride.

    Attributes:
        direct: whether it reads its maps as they are, with zeros around them.
        phases: rows and columns that phases begin with.
        taps: of each row and column of the kernel: its phase, and the row and column there.
        rows, columns: of the phases.
        margin: columns of zeros that its maps need.
    """

    direct: bool
    phases: tuple[tuple[int, int], ...]
    taps: tuple[tuple[int, int, int], ...]
    rows: int
    columns: int
    margin: int

    @classmethod
    def of(cls, convolution: Convolution, size: Size) -> Geometry:
        _, height, width = convolution.check(size)
        kernel, (dy, dx), (sy, sx) = convolution.weight.shape[2:], convolution.dilation, convolution.stride
        py, px = convolution.padding
        points = [(y * dy, x * dx) for y in range(kernel[0]) for x in range(kernel[1])]
        if (sy, sx) == (1, 1) and (height, width) == tuple(size[1:]):
            taps = tuple((0, y - py, x - px) for y, x in points)
            return cls(True, ((0, 0),), taps, height, width, max(abs(x) for _, _, x in taps))
        phases = tuple(dict.fromkeys((y % sy, x % sx) for y, x in points))
        taps = tuple((phases.index((y % sy, x % sx)), y // sy, x // sx) for y, x in points)
        below, beside = max(y for _, y, _ in taps), max(x for _, _, x in taps)
        return cls(False, phases, taps, height + below, width + beside, beside)


def form_of(convolution: Convolution, size: Size) -> str:
    """Which kernel runs a convolution."""
    if _is_node(convolution, size):
        return "node"
    if tuple(convolution.check(size)[1:]) == (1, 1):
        return "point"
    return "sparse" if convolution.sparse or convolution.groups > 1 or convolution.apart else "dense"


def edges_of(convolution: Convolution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each weight that is not 0: target, source, the number of the tap, and the weight; by targets."""
    targets, sources, *_ = convolution.weight.shape
    target, source, row, column = convolution.weight.nonzero(as_tuple=True)
    tap = row * convolution.weight.shape[3] + column
    return (
        target,
        source + target // (targets // convolution.groups) * sources,
        tap,
        convolution.weight[target, source, row, column],
    )


def _convolution(found: _Tasks, convolution: Convolution, x: Part) -> Part:
    size = (x.count, x.maps.height, x.maps.width)
    to, form = found.home(convolution.check(size)), form_of(convolution, size)
    kernel, stride, padding = convolution.weight.shape[2], convolution.stride[0], convolution.padding[0]
    if form == "node":
        x = found.inside(x)
        x.maps.surround(1 if x.maps.even else 2, 1)
        return found.add(form, (x,), to, convolution, window=(kernel, stride, padding))
    if form == "point":
        return found.add("sparse", (found.inside(x),), to, convolution, settings={"point": True})
    geometry = Geometry.of(convolution, size)
    if geometry.direct:
        x = found.inside(x)
        above, below = -min(y for _, y, _ in geometry.taps), max(y for _, y, _ in geometry.taps)
        beside = any(column for _, _, column in geometry.taps)
        x.maps.surround(max(0, above) + beside, max(0, below) + beside, geometry.margin)
        window = (above + below + 1, 1, above)
    else:
        maps = Maps(x.count * len(geometry.phases), geometry.rows, geometry.columns, wide=to.maps.pitch)
        last = max(y for y, _ in geometry.phases)
        settings = {"geometry": geometry}
        x = found.add("phases", (x,), maps, convolution, window=(last + 1, stride, padding), settings=settings)
        window = (geometry.rows - to.maps.height + 1, 1, 0)
    return found.add(form, (x,), to, convolution, window=window, settings={"geometry": geometry})


def _is_node(convolution: Convolution, size: Size) -> bool:
    """Whether a convolution is one per channel that the kernel for nodes does."""
    if convolution.weight.shape[1:] != (1, 3, 3) or convolution.padding != (1, 1) or tuple(size[1:]) == (1, 1):
        return False
    if not convolution.apart or convolution.dilation != (1, 1):
        return False
    constant = convolution.constant
    return convolution.stride in ((1, 1), (2, 2)) and (constant is None or not len(constant.channels))


def _linear(found: _Tasks, linear: Linear, x: Part) -> Part:
    x, to = found.inside(x), found.home(found.size)
    if x.maps.pitch == 1:
        return found.add("sparse" if linear.sparse else "linear", (x,), to, linear)
    return found.add("sparse" if linear.sparse else "dense", (x,), to, linear)


def _beside(found: _Tasks, beside: Beside, x: Part) -> Part:
    to = found.add("sparse" if beside.linear.sparse else "dense", (found.inside(x),), found.maps(found.size), beside.linear)
    return found.add("sum", (to,), found.home(found.size), Shift(beside.constant))


# --- what works pixel by pixel ---


def _in_place(found: _Tasks, x: Part) -> Part:
    """Where what is made of each number of some maps goes: to the same place, where nobody else reads it."""
    if found._at_home() or not found.single(x) or not x.is_whole:
        return found.home(found.size)
    return x


def _elementwise(kind: str) -> Callable[..., Part]:
    def emit(found: _Tasks, instruction: Instruction, x: Part) -> Part:
        x = found.inside(x)
        return found.add(kind, (x,), _in_place(found, x), instruction)

    return emit


def _activation(found: _Tasks, instruction: Activation, x: Part) -> Part:
    if instruction.kind == "relu":
        if found.absorbs(x, RECTIFY):
            found.found[-1].relu = True
            return x
        return _elementwise("rectify")(found, instruction, x)
    if found.absorbs(x, FUSED):
        found.found[-1].activation = instruction
        return x
    x = found.inside(x)
    return found.add("sum", (x,), _in_place(found, x), None, activation=instruction)


def _pair(kind: str) -> Callable[..., Part]:
    def emit(found: _Tasks, instruction: Instruction, one: Part, other: Part) -> Part:
        one, other = found.inside(one), found.inside(other)
        if one.maps.pitch < other.maps.pitch:
            one, other = other, one
        last = found.found[-1] if found.found else None
        if kind == "sum" and last and one is not other and one.maps.pitch == other.maps.pitch > 1:
            mine, beside = (one, other) if last.writes is one else (other, one)
            if last.writes is mine and found.absorbs(mine, ("sparse", "dense")) and len(last.reads) == 1:
                last.reads = (*last.reads, beside)  # sums begin with what is added to them
                return mine
        return found.add(kind, (one, other), found.home(found.size), instruction)

    return emit


def _shift(found: _Tasks, instruction: Shift, x: Part) -> Part:
    x = found.inside(x)
    return found.add("sum", (x,), _in_place(found, x), instruction)


# --- windows, norms, attention ---


def _pad(found: _Tasks, pad: Pad, x: Part) -> Part:
    _, height, width = found.size
    geometry = Geometry(False, ((0, 0),), (), height, width, 0)
    return found.add("phases", (x,), found.home(found.size), pad, window=(1, 1, pad.top), settings={"geometry": geometry})


def _pool(found: _Tasks, pool: Pool, x: Part) -> Part:
    rows = pool.dilation[0] * (pool.kernel[0] - 1) + 1
    return found.add("pool", (found.inside(x),), found.home(found.size), pool, window=(rows, pool.stride[0], pool.padding[0]))


def _plain(kind: str) -> Callable[..., Part]:
    def emit(found: _Tasks, instruction: Instruction, *reads: Part) -> Part:
        return found.add(kind, [found.inside(x) for x in reads], found.home(found.size), instruction)

    return emit


def _norm(found: _Tasks, norm: LayerNorm, x: Part) -> Part:
    kind = "group_norm" if norm.over_places else "layer_norm"
    return found.add(kind, (found.inside(x),), found.home(found.size), norm)


# --- what moves numbers ---


def _concat(found: _Tasks, concat: Concat, *reads: Part) -> Part:
    if concat.axis:
        to, start = found.home(found.size), 0
        for i, x in enumerate(reads):
            x = found.inside(x)
            found.add("rearrange", (x,), to, concat, settings={"start": start, "clear": not i})
            start += x.maps.width if len(found.size) == 2 or concat.axis == 2 else x.maps.height
        return to
    to = found.place(found._first + found._number)
    at = to.first
    for x in reads:
        if x.maps is not to.maps or x.first != at:
            found.add("copy", (found.inside(x),), Part(to.maps, at, x.count))
        at += x.count
    return to


def _rearrange(found: _Tasks, instruction: Instruction, x: Part) -> Part:
    return found.add("rearrange", (found.inside(x),), found.home(found.size), instruction, settings={"clear": True, "start": 0})


EMITTERS: dict[type[Instruction], Callable[..., Part]] = {
    Convolution: _convolution,
    Linear: _linear,
    Beside: _beside,
    Affine: _elementwise("affine"),
    InstanceNorm: _elementwise("instance_norm"),
    Activation: _activation,
    Sum: _pair("sum"),
    Product: _pair("product"),
    Shift: _shift,
    Pad: _pad,
    Pool: _pool,
    AdaptiveMean: _plain("adaptive_mean"),
    PlaceMean: _plain("mean"),
    LayerNorm: _norm,
    Attention: _plain("attention"),
    Concat: _concat,
    Crop: _rearrange,
    Rearrange: _rearrange,
    Pick: _plain("copy"),
    Restore: _plain("copy"),
}
"""What each instruction becomes: the kernels' table."""
_WRITES = (Convolution, Linear, Sum, Product, Pool, Pick, AdaptiveMean, LayerNorm, Attention)
"""Instructions that write to part of some maps as well as to maps of their own."""


def constant_of(instruction: object) -> Constant | None:
    """What an instruction adds to sums."""
    found = getattr(instruction, "constant", None)
    return found if isinstance(found, Constant) else None


def moved(task: Task) -> tuple[Tensor, Tensor]:
    """Of a task that rearranges: where each number lies in what it reads, and where it goes."""
    source, target, instruction = task.reads[0].maps, task.writes.maps, task.instruction
    sides = source.height, source.width
    size = (task.reads[0].count, *sides)
    index = torch.arange(math.prod(size)).view(1, *size)
    lies = _lies(source, task.reads[0].count)
    if isinstance(instruction, Concat):
        made = _lies(target, task.writes.count).view(task.writes.count, target.height, target.width)
        start = task.settings["start"]
        if target.height == source.height:
            made = made[:, :, start : start + source.width]
        else:
            made = made[:, start : start + source.height]
        return lies, made.flatten()
    given = index.flatten(2) if isinstance(instruction, Crop) and source.height == 1 and instruction.axis == 1 else index
    return lies[instruction(given).flatten()], _lies(target, task.writes.count)


def _lies(maps: Maps, channels: int) -> Tensor:
    """Where each number of some channels lies, counted from row 0 of the first."""
    planes = torch.arange(channels).view(-1, 1, 1) * maps.plane
    rows = torch.arange(maps.height).view(-1, 1) * maps.pitch
    return (planes + rows + torch.arange(maps.width)).flatten()
