"""Compacted networks as plain C99: one file and its header, with weights and edges inside, for machines without Python.

Contract: no dependency but the mathematics of the standard library, no allocation: maps live in one static array whose size
is known. The functions are in _standalone.h; only those that a network needs are written.
"""

from __future__ import annotations

import math
import re
import struct
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from dnw._files import write_whole
from dnw.compile._lower import Space
from dnw.compile._program import Constant, Convolution, Edges, Pick, Program, require_program
from dnw.compile._tasks import Maps, Part, Task, tasks


@dataclass(frozen=True)
class Needs:
    """What a network in C needs of its machine, in bytes.

    Attributes:
        flash: weights, edges and other constant numbers; code (a few KB) not counted.
        ram: the array in which maps live; image and outputs, which the caller has, not counted.
    """

    flash: int
    ram: int


def save_c(program: Program, path: str | Path) -> Needs:
    """Writes a compacted network as ``path`` (``net.c``) and its header beside it (``net.h``).

    The header declares ``void net_run(const float *image, float *outputs)``. It is compiled with any C99 compiler: ``cc -O3``.

    Args:
        program: the network.
        path: of the C file; its name without the ending becomes the prefix of what is declared.

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
    writer = _Writer(program, name)
    source, header = writer.source(), writer.header()
    write_whole(path.with_suffix(".h"), header.encode())
    write_whole(path, source.encode())
    return writer.needs


class _Writer:
    """Writes the text of a network."""

    def __init__(self, program: Program, name: str) -> None:
        self.name, self.program = name, program
        self._arrays: list[str] = []
        self._lines: list[str] = []
        self._used: set[str] = set()
        self._names: dict[tuple[str, str], str] = {}  # of arrays, by type and text
        self._bytes = 0
        found = list(tasks(program))[:-1]  # what the last one does, the last but one can do here
        self._largest = max([1, *(index for task in found for index in _largest(task))])
        self._wide = 2 if self._largest < 1 << 16 else 4
        self._space, self._offsets = Space(), dict[Maps, int]()
        self._end = found[-1].writes.maps
        last = {part.maps: i for i, task in enumerate(found) for part in task.reads}
        for i, task in enumerate(found):
            if task.writes.maps not in self._offsets and task.writes.maps is not self._end:
                self._offsets[task.writes.maps] = self._space.take(_floats(task.writes.maps))
            self._add(task)
            for maps in {part.maps for part in task.reads}:
                if last[maps] == i and maps in self._offsets and maps is not task.writes.maps:
                    self._space.free(self._offsets[maps], _floats(maps))
        self.needs = Needs(self._bytes, 4 * self._space.size)

    def header(self) -> str:
        upper, sizes = self.name.upper(), "x".join(map(str, self.program.input_size))
        outputs = math.prod(self.program.output_size)
        return textwrap.dedent(f"""\
            /* A network compiled by dnw. Images are {sizes} floats, row by row; outputs are {outputs}.
             * Constant numbers take {self.needs.flash} bytes, maps {self.needs.ram} bytes of static
             * memory, which all calls share. */
            #ifndef {upper}_H
            #define {upper}_H

            #define {upper}_INPUTS {math.prod(self.program.input_size)}
            #define {upper}_OUTPUTS {outputs}
            #define {upper}_ARENA {max(1, self._space.size)}

            void {self.name}_run(const float *image, float *outputs);

            #endif
            """)

    def source(self) -> str:
        functions = [text for name, text in _functions() if name in self._used]
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

    # --- tasks ---

    def _add(self, task: Task) -> None:
        maps, out, instruction = task.reads[0].maps, task.writes.maps, task.instruction
        from_, to = self._pointer(task.reads[0]), self._pointer(task.writes)
        sources, targets, pixels = task.reads[0].count, task.writes.count, out.height * out.width
        if isinstance(instruction, Edges):
            second = self._pointer(task.reads[-1])
            edges = self._integers(instruction.sources), self._integers(instruction.starts.diff())
            weight, base = self._floats(instruction.weight), self._base(instruction.constant)
            self._call("edges", from_, second, sources, to, targets, pixels, weight, *edges, base)
        elif isinstance(instruction, Convolution):
            sides = maps.height, maps.width, out.height, out.width, *instruction.weight.shape[2:]
            depthwise = int(task.kind in ("depthwise", "node"))
            arrays = self._floats(instruction.weight), self._base(instruction.constant)
            numbers = sources, targets, depthwise, *sides, *instruction.stride, *instruction.padding
            self._call("convolution", from_, to, *numbers, *arrays)
        elif task.kind in ("affine", "instance_norm"):
            arrays = self._floats(instruction.scale), self._floats(instruction.shift)
            least = torch.finfo(torch.float32).tiny
            eps = [_number(max(instruction.eps, least))] if task.kind == "instance_norm" else []
            self._call(task.kind, from_, to, targets, pixels, *arrays, *eps)
        elif task.kind == "mean":
            self._call("mean", from_, to, targets, maps.height, maps.width, instruction.start, instruction.stop)
        elif task.kind == "linear":
            arrays = self._floats(instruction.weight), self._floats(instruction.bias)
            self._call("linear", from_, to, sources, targets, *arrays)
        elif isinstance(instruction, Pick):
            self._call("pick", from_, to, targets, pixels, self._integers(instruction.channels))
        elif task.kind == "copy" and instruction is not None:
            arrays = self._integers(instruction.channels), self._floats(instruction.constant)
            self._call("restore", from_, to, targets, pixels, len(instruction.channels), *arrays)
        elif task.kind != "rectify":  # images, or the states of nodes that do nothing
            self._call("copy", from_, to, targets * pixels)
        constant = getattr(instruction, "constant", None)
        if isinstance(constant, Constant) and len(constant.channels):
            arrays = self._integers(constant.channels), self._floats(constant.core)
            lines = self._integers(constant.rows), self._integers(constant.columns)
            count, *core = constant.core.shape
            self._call("add_constants", to, out.height, out.width, count, *arrays, *core, *lines)
        if task.relu or task.kind == "rectify":
            self._call("rectify", from_ if task.kind == "rectify" else to, to, targets * pixels)

    def _call(self, function: str, *arguments: object) -> None:
        self._used.add(function)
        self._lines.append(f"{function}({', '.join(map(str, arguments))});")

    def _pointer(self, part: Part) -> str:
        if part.maps.outside:
            return "image"
        if part.maps is self._end:
            return "outputs"
        return f"arena + {self._offsets[part.maps] + part.first * part.maps.height * part.maps.width}"

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


def _floats(maps: Maps) -> int:
    return maps.channels * maps.height * maps.width


def _largest(task: Task) -> Iterable[int]:
    """The largest of each list of whole numbers that a task needs."""
    constant = getattr(task.instruction, "constant", None)
    lists = [getattr(task.instruction, name, None) for name in ("sources", "channels")]
    if isinstance(task.instruction, Edges):
        lists.append(task.instruction.starts.diff())
    if isinstance(constant, Constant):
        lists += [constant.channels, constant.rows, constant.columns]
    for found in lists:
        if isinstance(found, Tensor) and found.numel():
            yield int(found.max())


def _functions() -> Iterable[tuple[str, str]]:
    """Name and text of each function there is."""
    text = resources.files("dnw.compile").joinpath("_standalone.h").read_text()
    for part in text.split("\n/* FUNCTION ")[1:]:
        name, body = part.split(" */\n", 1)
        yield name, body.strip() + "\n"
