"""Compacted networks as plain C99: one file and its header, with weights and edges inside, for machines without Python.

Contract: no dependency but the mathematics of the standard library, no allocation: maps live in one static array whose size
is known. The functions are in _standalone.h; only those that a network needs are written.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from dnw._checks import listing
from dnw._files import write_whole
from dnw.compile._layers import Activation, Concat, Crop, PlaceMean, Pool, Product, Rearrange, Shift, Sum
from dnw.compile._program import (
    Affine,
    Constant,
    Convolution,
    InstanceNorm,
    Instruction,
    Linear,
    Pick,
    Program,
    Restore,
    Size,
    require_program,
)
from dnw.compile._tasks import constant_of, edges_of, homes


@dataclass(frozen=True)
class Needs:
    """What a network in C needs of its machine, in bytes.

    Attributes:
        flash: weights, edges and other constant numbers; :func:`code_size` measures the code, 2 to 30 KB.
        ram: the array in which maps live; image and outputs, which the caller has, not counted.
    """

    flash: int
    ram: int


def save_c(
    program: Program, path: str | Path, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Needs:
    """Writes a compacted network as ``path`` (``net.c``) and its header beside it (``net.h``).

    The header declares ``void net_run(const float *image, float *outputs)``. It is compiled with any C99 compiler:
    ``cc -Os`` where flash is short, ``cc -O3`` where time is.

    Args:
        program: the network.
        path: of the C file; its name without the ending becomes the prefix of what is declared.
        mean, std: of each channel of the images, in units of their full range; the header then says how pixels become inputs.

    Raises:
        ValueError: no compacted network, the name of the file is no name in C, or a weight is no finite number.
    """
    require_program(program)
    path = Path(path)
    if path.suffix != ".c":
        raise ValueError(f"{path.name}: its name must end with .c; the header is written beside it")
    name = path.stem
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{path.name}: its stem becomes the prefix of names in C; take letters, digits and _, such as net.c")
    channels = program.input_sizes[0][0]
    given = [values for values in (mean, std) if values is not None]
    fits = len(given) != 1 and all(len(values) == channels and all(map(math.isfinite, values)) for values in given)
    if not fits or (std is not None and min(std) <= 0):
        raise ValueError(
            f"mean={mean}, std={std}: give both, finite, std above 0, one for every channel of the images, {channels}"
        )
    writer = _Writer(program, name)
    source, header = writer.source(), writer.header(*(() if mean is None or std is None else (mean, std)))
    write_whole(path.with_suffix(".h"), header.encode())
    write_whole(path, source.encode())
    return writer.needs


def code_size(path: str | Path) -> dict[str, int]:
    """How many bytes of code a network in C becomes, by optimization: compiled by this machine's compiler, for this machine.

    Args:
        path: what :func:`save_c` has written.

    Returns:
        Bytes by flag, ``{"-Os": ..., "-O3": ...}``; empty where there is no C compiler or no ``size``
        beside it, or they fail.

    Raises:
        OSError: there is no such file.
    """
    path, found = Path(path), dict[str, int]()
    path.read_bytes()
    compiler, measure = shlex.split(os.environ.get("CC", "cc")), shutil.which("size")
    if not compiler or shutil.which(compiler[0]) is None or measure is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "net.o"
        for flag in ("-Os", "-O3"):
            try:
                subprocess.run([*compiler, "-std=c99", flag, "-c", path, "-o", compiled], check=True, capture_output=True)
                sections = subprocess.run([measure, "-A", compiled], check=True, capture_output=True, text=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return {}
            sizes = [line.split() for line in sections.splitlines()]
            found[flag] = sum(int(words[1]) for words in sizes if words[:1] and words[0].startswith((".text", ".rodata.cst")))
    return found


@dataclass(eq=False)
class _Buffer:
    """Floats of one image that live while something reads them.

    Attributes:
        count: how many.
        place: where they are, as C.
    """

    count: int
    place: str = ""


@dataclass(frozen=True)
class _At:
    """Floats from some offset of a buffer on."""

    buffer: _Buffer
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.buffer.place} + {self.offset}" if self.offset else self.buffer.place


Source = tuple[_At, Size, int]
"""What an instruction reads: where it is, its size, and the number of the value."""


class _Writer:
    """Writes the text of a network: each instruction becomes calls of functions in _standalone.h."""

    def __init__(self, program: Program, name: str) -> None:
        self.name, self.program = name, program
        self._arrays: list[str] = []
        self._calls: list[tuple[str, tuple[object, ...]]] = []
        self._names: dict[tuple[str, str], str] = {}  # of arrays, by type and text
        self._bytes = 0
        self._wide = 2 if max([1, *map(_largest, program.instructions)]) < 1 << 16 else 4
        self._values: list[_At] = []
        self._homes, self._wholes = homes(program, _WRITES), dict[int, _At]()
        start, image = 0, _Buffer(0, "image")
        for size in program.input_sizes:
            self._values.append(_At(image, start))
            start += math.prod(size)
        self._sizes = sizes = program.sizes()
        first = len(program.input_sizes)
        for number, (node, over) in enumerate(zip(program.nodes, program.last_reads(), strict=True)):
            emitter = EMITTERS.get(type(node.instruction))
            if emitter is None:
                kind = getattr(node.instruction, "name", type(node.instruction).__name__)
                raise ValueError(
                    f"{kind} is not written as C; compiled for it are {listing(sorted(k.__name__ for k in EMITTERS))}"
                )
            self._made, self._size, self._over = first + number, sizes[first + number], over
            reads = [(self._values[i], sizes[i], i) for i in node.reads]
            self._values.append(emitter(self, node.instruction, *reads))
        start = 0
        for i in program.outputs:
            count, value = math.prod(sizes[i]), self._values[i]
            if value.buffer.place or value.buffer.count != count:
                value = self._new(count)
                self._call("copy", self._values[i], value, count)
            value.buffer.place = f"outputs + {start}" if start else "outputs"
            start += count
        self._arena = self._laid_out()
        self._lines = [f"{function}({', '.join(map(str, arguments))});" for function, arguments in self._calls]
        self.needs = Needs(self._bytes, 4 * self._arena)

    def _laid_out(self) -> int:
        """Gives every buffer its place, the largest first, apart from those that live at the same time; returns their size."""
        lives = dict[_Buffer, tuple[int, int]]()
        for number, (_, arguments) in enumerate(self._calls):
            for at in arguments:
                if isinstance(at, _At) and not at.buffer.place:
                    lives[at.buffer] = (lives.get(at.buffer, (number,))[0], number)
        placed = list[tuple[int, int, _Buffer]]()
        for buffer in sorted(lives, key=lambda buffer: -buffer.count):
            first, last = lives[buffer]
            offset = 0
            for start, stop, other in sorted(placed, key=lambda place: place[:2]):
                if lives[other][0] <= last and first <= lives[other][1] and offset < stop and start < offset + buffer.count:
                    offset = stop
            buffer.place = f"arena + {offset}"
            placed.append((offset, offset + buffer.count, buffer))
        return max((stop for _, stop, _ in placed), default=0)

    def header(self, mean: Sequence[float] = (), std: Sequence[float] = ()) -> str:
        upper, sizes = self.name.upper(), " and ".join("x".join(map(str, size)) for size in self.program.input_sizes)
        inputs, outputs = (sum(map(math.prod, sizes)) for sizes in (self.program.input_sizes, self.program.output_sizes))
        lines = [
            f"/* A network compiled by dnw. Images are {sizes} floats, row by row; outputs are {outputs}.",
            f" * Constant numbers take {self.needs.flash} bytes, maps {self.needs.ram} bytes of static",
            " * memory, which all calls share; the code is small with -Os, and fast with -O3. */",
            f"#ifndef {upper}_H",
            f"#define {upper}_H",
            "",
            f"#define {upper}_INPUTS {inputs}",
            f"#define {upper}_OUTPUTS {outputs}",
            f"#define {upper}_ARENA {max(1, self._arena)}",
            "",
        ]
        if mean:
            means, stds = (", ".join(map(_number, values)) for values in (mean, std))
            lines += [
                "/* What goes in of a pixel p from 0 to 255 is (p / 255 - mean) / std of its channel. */",
                f"#define {upper}_MEAN {{{means}}}",
                f"#define {upper}_STD {{{stds}}}",
                "",
            ]
        return "\n".join([*lines, f"void {self.name}_run(const float *image, float *outputs);", "", "#endif", ""])

    def source(self) -> str:
        functions = [text for name, text in _functions() if name in {function for function, _ in self._calls}]
        parts = [
            f'#include "{self.name}.h"\n\n#include <math.h>\n#include <stdint.h>\n\ntypedef uint{8 * self._wide}_t index_t;\n',
            *functions,
            *self._arrays,
            *([f"static float arena[{self.name.upper()}_ARENA];\n"] if any("arena" in line for line in self._lines) else []),
            f"void {self.name}_run(const float *image, float *outputs) {{",
            *(f"  {line}" for line in self._lines),
            "}\n",
        ]
        return "\n".join(parts)

    # --- instructions ---

    def _new(self, count: int) -> _At:
        return _At(_Buffer(count))

    def _to(self) -> _At:
        """Room for what the present node makes: of its own, or its place among values that it is joined with."""
        return self._place(self._made) if self._made in self._homes else self._new(math.prod(self._size))

    def _place(self, value: int) -> _At:
        """Where a value lies that others are joined in, or that is itself joined with others."""
        size = self._sizes[value]
        if value in self._homes:
            whole, channel = self._homes[value]
            inside = self._place(whole)
            return _At(inside.buffer, inside.offset + channel * math.prod(size[1:]))
        if value not in self._wholes:
            self._wholes[value] = self._new(math.prod(size))
        return self._wholes[value]

    def _own(self, given: Source) -> _At:
        """Where what is made of each number by itself goes: to the same place, where nobody reads it any more."""
        at, size, number = given
        alone = number in self._over and number not in self._wholes and at.buffer.count == math.prod(size)
        alone = alone and not at.buffer.place
        return at if alone else self._new(math.prod(size))

    def _call(self, function: str, *arguments: object) -> None:
        self._calls.append((function, arguments))

    def _convolution(self, convolution: Convolution, given: Source) -> _At:
        x, size, _ = given
        out, to = self._size, self._to()
        sides = (*size[1:], *out[1:], *convolution.weight.shape[2:], *convolution.stride, *convolution.padding)
        weight, base = convolution.weight, self._base(convolution.constant)
        if 3 * int(weight.count_nonzero()) < 2 * weight.numel():  # a weight, where it comes from and which it is: less in all
            target, source, tap, values = edges_of(convolution)
            numbers, counts = self._floats(values), target.bincount(minlength=out[0])
            if convolution.pointwise:
                lists = [self._integers(source), self._integers(counts)]
                self._call("edges", x, to, out[0], math.prod(size[1:]), numbers, *lists, base)
            else:
                lists = [self._integers(source), self._integers(tap), self._integers(counts)]
                self._call("sparse_convolution", x, to, out[0], *sides, *convolution.dilation, numbers, *lists, base)
        else:
            weights = self._floats(weight)
            self._call("convolution", x, to, size[0], out[0], convolution.groups, *sides, *convolution.dilation, weights, base)
        self._constants(convolution.constant, to, out[1:])
        return to

    def _constants(self, constant: Constant | None, to: _At, sides: Size) -> None:
        if constant is not None and len(constant.channels):
            arrays = self._integers(constant.channels), self._floats(constant.core)
            lines = self._integers(constant.rows), self._integers(constant.columns)
            count, *core = constant.core.shape
            self._call("add_constants", to, *sides, count, *arrays, *core, *lines)

    def _linear(self, linear: Linear, given: Source) -> _At:
        x, size, _ = given
        to, places, (targets, sources) = self._to(), math.prod(size[1:]), linear.weight.shape
        if places > 1 or 3 * int(linear.weight.count_nonzero()) < 2 * linear.weight.numel():
            target, source = linear.weight.nonzero(as_tuple=True)
            lists = self._integers(source), self._integers(target.bincount(minlength=targets)), self._floats(linear.bias)
            self._call("edges", x, to, targets, places, self._floats(linear.weight[target, source]), *lists)
        else:
            self._call("linear", x, to, sources, targets, self._floats(linear.weight), self._floats(linear.bias))
        return to

    def _norm(self, norm: Affine | InstanceNorm, given: Source) -> _At:
        x, size, _ = given
        to, arrays = self._own(given), (self._floats(norm.scale), self._floats(norm.shift))
        if isinstance(norm, InstanceNorm):
            eps = _number(max(norm.eps, torch.finfo(torch.float32).tiny))
            self._call("instance_norm", x, to, size[0], math.prod(size[1:]), *arrays, eps)
        else:
            self._call("affine", x, to, size[0], math.prod(size[1:]), *arrays)
        return to

    def _activation(self, activation: Activation, given: Source) -> _At:
        to = self._own(given)
        numbers = (_number(max(-3.4e38, min(3.4e38, x))) for x in activation.numbers)
        name = {"relu": "rectify", "tanh": "hyperbolic_tangent"}.get(activation.kind, activation.kind)
        self._call(name, given[0], to, math.prod(given[1]), *numbers)
        return to

    def _joined(self, kind: str, one: Source, other: Source) -> _At:
        if len(one[1]) < len(other[1]):
            one, other = other, one
        to, numbers = self._own(one), int(len(one[1]) > len(other[1]))
        self._call(kind, one[0], other[0], to, one[1][0], math.prod(one[1][1:]), numbers)
        return to

    def _shift(self, shift: Shift, given: Source) -> _At:
        to = self._own(given)
        self._call("sum", given[0], self._floats(shift.constant), to, given[1][0], math.prod(given[1][1:]), 0)
        return to

    def _pool(self, pool: Pool, given: Source) -> _At:
        x, size, _ = given
        to, sides = self._to(), (*size[1:], *self._size[1:], *pool.kernel, *pool.stride, *pool.padding)
        if pool.largest:
            self._call("max_pool", x, to, size[0], *sides, *pool.dilation)
        else:
            self._call("mean_pool", x, to, size[0], *sides, int(pool.padded))
        return to

    def _mean(self, _: PlaceMean, given: Source) -> _At:
        to = self._to()
        self._call("mean", given[0], to, given[1][0], math.prod(given[1][1:]))
        return to

    def _pick(self, pick: Pick, given: Source) -> _At:
        to = self._to()
        self._call("pick", given[0], to, self._size[0], math.prod(self._size[1:]), self._integers(pick.channels))
        return to

    def _restore(self, restore: Restore, given: Source) -> _At:
        to, arrays = self._to(), (self._integers(restore.channels), self._floats(restore.constant))
        self._call("restore", given[0], to, self._size[0], math.prod(self._size[1:]), len(restore.channels), *arrays)
        return to

    def _concat(self, concat: Concat, *given: Source) -> _At:
        """Values along an axis, each of them a few stretches of numbers, where they are not there already."""
        axis = concat.axis
        to, start, whole = self._to() if axis else self._place(self._made), 0, math.prod(self._size[axis:])
        for x, size, _ in given:
            count, there = math.prod(size[axis:]), _At(to.buffer, to.offset + start)
            if x != there:
                self._call("stretches", x, there, math.prod(size[:axis]), count, count, whole)
            start += count
        return to

    def _rearrange(self, rearrange: Rearrange, given: Source) -> _At:
        x, size, _ = given
        to, count = self._to(), math.prod(size)
        if rearrange.order == tuple(range(len(rearrange.order))):
            self._call("copy", x, to, count)
        else:
            index = rearrange(torch.arange(count).view(1, *size)).flatten()
            self._call("pick", x, to, count, 1, self._integers(index))
        return to

    def _crop(self, crop: Crop, given: Source) -> _At:
        x, size, _ = given
        to, axis = self._to(), crop.axis
        if crop.step == 1:
            each, side = math.prod(size[axis + 1 :]), math.prod(size[axis:])
            count = (crop.stop - crop.start) * each
            self._call("stretches", _At(x.buffer, x.offset + crop.start * each), to, math.prod(size[:axis]), count, side, count)
        else:
            index = crop(torch.arange(math.prod(size)).view(1, *size)).flatten()
            self._call("pick", x, to, len(index), 1, self._integers(index))
        return to

    # --- numbers ---

    def _base(self, constant: Constant | None) -> str:
        return "0" if constant is None else self._floats(constant.base)

    def _floats(self, values: Tensor) -> str:
        if not bool(torch.isfinite(values).all()):
            raise ValueError("a weight of the network is not a finite number; it cannot be written as C")
        return self._array("float", [_number(x) for x in values.float().flatten().tolist()])

    def _integers(self, values: Tensor) -> str:
        return self._array("index_t", [str(x) for x in values.flatten().tolist()])

    def _array(self, kind: str, values: list[str]) -> str:
        text = textwrap.fill(", ".join(values) or "0", 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        name = self._names.get((kind, text))
        if name is None:  # a graph in discrete time has the same numbers again and again
            name = self._names[kind, text] = f"numbers_{len(self._names)}"
            self._arrays.append(f"static const {kind} {name}[] = {{\n{text}}};\n")
            self._bytes += len(values) * (4 if kind == "float" else self._wide)
        return name


def _number(value: float) -> str:
    """A float32 as C writes it, with as many digits as tell it from its neighbours."""
    exact = struct.pack("f", value)
    text = next(text for digits in range(1, 10) if struct.pack("f", float(text := f"{value:.{digits}g}")) == exact)
    return f"{text}f" if {".", "e"} & set(text) else f"{text}.0f"


def _largest(instruction: Instruction) -> int:
    """The largest of the whole numbers that an instruction needs in lists."""
    lists, most = [getattr(instruction, "channels", None)], [1]
    if isinstance(instruction, (Convolution, Linear)):
        most += [instruction.weight[0].numel(), getattr(instruction, "groups", 1) * instruction.weight.shape[1]]
    if isinstance(instruction, Rearrange):
        most.append(math.prod(instruction.size))
    if isinstance(instruction, Crop) and instruction.step > 1:
        most.append(1 << 16)
    if (constant := constant_of(instruction)) is not None:
        lists += [constant.channels, constant.rows, constant.columns]
    return max(most + [int(found.max()) for found in lists if isinstance(found, Tensor) and found.numel()])


def _functions() -> Iterable[tuple[str, str]]:
    """Name and text of each function there is."""
    text = resources.files("dnw.compile").joinpath("_standalone.h").read_text()
    for part in text.split("\n/* FUNCTION ")[1:]:
        name, body = part.split(" */\n", 1)
        yield name, body.strip() + "\n"


EMITTERS: dict[type[Instruction], Callable[..., _At]] = {
    Convolution: _Writer._convolution,
    Linear: _Writer._linear,
    Affine: _Writer._norm,
    InstanceNorm: _Writer._norm,
    Activation: _Writer._activation,
    Sum: lambda writer, _, one, other: writer._joined("sum", one, other),
    Product: lambda writer, _, one, other: writer._joined("product", one, other),
    Shift: _Writer._shift,
    Pool: _Writer._pool,
    PlaceMean: _Writer._mean,
    Concat: _Writer._concat,
    Crop: _Writer._crop,
    Rearrange: _Writer._rearrange,
    Pick: _Writer._pick,
    Restore: _Writer._restore,
}
"""What each instruction becomes: the table of C. Norms of whole vectors and attention are not written."""
_WRITES = (Convolution, Linear, Pool, PlaceMean, Pick, Restore, Crop, Rearrange)
"""Instructions that write where they are told to."""
