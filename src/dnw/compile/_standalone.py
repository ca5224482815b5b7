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
from dnw.compile._lower import Maps, Operation, Part, Space, operations
from dnw.compile._program import Constant, Convolution, Edges, Pick, Program, require_program


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
        self._names: dict[str, str] = {}  # of arrays, by their text
        self._bytes = 0
        found = list(operations(program))[:-1]  # what the last one does, the last but one can do here
        self._largest = max([1, *(index for op in found for index in _largest(op))])
        self._wide = 2 if self._largest < 1 << 16 else 4
        self._space, self._at = Space(), dict[Maps, int]()
        self._end = found[-1].writes.maps
        last = {part.maps: i for i, op in enumerate(found) for part in op.reads}
        for i, op in enumerate(found):
            if op.writes.maps not in self._at and op.writes.maps is not self._end:
                self._at[op.writes.maps] = self._space.take(_floats(op.writes.maps))
            self._add(op)
            for maps in {part.maps for part in op.reads}:
                if last[maps] == i and maps in self._at and maps is not op.writes.maps:
                    self._space.free(self._at[maps], _floats(maps))
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

    # --- operations ---

    def _add(self, op: Operation) -> None:
        maps, given, source = op.reads[0].maps, op.writes.maps, op.source
        there, to = self._place(op.reads[0]), self._place(op.writes)
        places, channels = given.height * given.width, op.writes.count
        rectified = op.relu or op.kind == "rectify"
        if isinstance(source, Edges):
            others = self._place(op.reads[1]) if len(op.reads) > 1 else there
            arrays = [self._floats(source.weight), self._integers(source.sources), self._integers(source.starts.diff())]
            base = self._base(source.constant)
            self._call("edges", there, others, op.reads[0].count, to, channels, places, *arrays, base)
        elif isinstance(source, Convolution):
            sides = maps.height, maps.width, given.height, given.width, *source.weight.shape[2:]
            steps = *source.stride, *source.padding
            depthwise = int(op.kind in ("depthwise", "node"))
            arrays = [self._floats(source.weight), self._base(source.constant)]
            self._call("convolution", there, to, op.reads[0].count, channels, depthwise, *sides, *steps, *arrays)
        elif op.kind == "affine":
            self._call("affine", there, to, channels, places, self._floats(source.scale), self._floats(source.shift))
        elif op.kind == "instance_norm":
            arrays = [self._floats(source.scale), self._floats(source.shift)]
            self._call(
                "instance_norm", there, to, channels, places, *arrays, _number(max(source.eps, torch.finfo(torch.float32).tiny))
            )
        elif op.kind == "mean":
            self._call("mean", there, to, channels, maps.height, maps.width, source.start, source.stop)
        elif op.kind == "linear":
            arrays = [self._floats(source.weight), self._floats(source.bias)]
            self._call("linear", there, to, op.reads[0].count, channels, *arrays)
        elif isinstance(source, Pick):
            self._call("pick", there, to, channels, places, self._integers(source.channels))
        elif op.kind == "copy" and source is not None:
            arrays = [self._integers(source.channels), self._floats(source.constant)]
            self._call("restore", there, to, channels, places, len(source.channels), *arrays)
        elif op.kind != "rectify":  # images, or the states of nodes that do nothing
            self._call("copy", there, to, channels * places)
        constant = getattr(source, "constant", None)
        if isinstance(constant, Constant) and len(constant.channels):
            arrays = [self._integers(constant.channels), self._floats(constant.core)]
            lines = [self._integers(constant.rows), self._integers(constant.columns)]
            shape = constant.core.shape
            self._call("add_constants", to, given.height, given.width, shape[0], *arrays, *shape[1:], *lines)
        if rectified:
            self._call("rectify", there if op.kind == "rectify" else to, to, channels * places)

    def _call(self, function: str, *arguments: object) -> None:
        self._used.add(function)
        self._lines.append(f"{function}({', '.join(map(str, arguments))});")

    def _place(self, part: Part) -> str:
        if part.maps.outside:
            return "image"
        if part.maps is self._end:
            return "outputs"
        return f"arena + {self._at[part.maps] + part.first * part.maps.height * part.maps.width}"

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
        if text not in self._names:  # a step in discrete time has the numbers of the one before
            self._names[text] = f"numbers_{len(self._names)}"
            self._arrays.append(f"static const {kind} {self._names[text]}[] = {{\n{text}}};\n")
            self._bytes += len(values) * (4 if kind == "float" else self._wide)
        return self._names[text]


def _number(value: float) -> str:
    """A float32 as C writes it, with as many digits as tell it from its neighbours."""
    exact = struct.pack("f", value)
    text = next(text for digits in range(1, 10) if struct.pack("f", float(text := f"{value:.{digits}g}")) == exact)
    return f"{text}f" if {".", "e"} & set(text) else f"{text}.0f"


def _floats(maps: Maps) -> int:
    return maps.channels * maps.height * maps.width


def _largest(op: Operation) -> Iterable[int]:
    """The largest of each list of whole numbers that an operation needs."""
    constant = getattr(op.source, "constant", None)
    lists = [getattr(op.source, name, None) for name in ("sources", "channels")]
    if isinstance(op.source, Edges):
        lists.append(op.source.starts.diff())
    if isinstance(constant, Constant):
        lists += [constant.channels, constant.rows, constant.columns]
    for found in lists:
        if isinstance(found, Tensor) and found.numel():
            yield int(found.max())


def _functions() -> Iterable[tuple[str, str]]:
    """Name and text of each function there is."""
    text = resources.files("dnw.compile").joinpath("_standalone.h").read_text()
    for part in text.split("\nFUNCTION ")[1:]:
        name, body = part.split("\n", 1)
        yield name, body.rstrip() + "\n"
