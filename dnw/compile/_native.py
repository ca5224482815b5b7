"""Compacted networks on kernels of our own.

Contract: a program is laid out once: every instruction with the places of its input and output in one arena of floats. A
run gets an arena of its own, so one runtime may be used by many threads at once; the global lock of Python is not held while
it runs.
Where the kernels are not built (no compiler was at hand when the package was installed), PyTorch runs the program, and ``kind``
says so.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
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
    Size,
)

_VERSION = 3
_KINDS = (
    "edges",
    "affine",
    "instance_norm",
    "rectify",
    "depthwise",
    "convolution",
    "node",
    "mean",
    "linear",
    "restore",
    "pick",
)
_NUMBERS = [
    "kind",
    "sources",
    "targets",
    "height",
    "width",
    "out_height",
    "out_width",
    "kernel_height",
    "kernel_width",
    "stride_y",
    "stride_x",
    "pad_y",
    "pad_x",
    "start",
    "stop",
    "maps",
]
_FLOATS, _INTEGERS = ("weight", "scale", "shift", "core"), ("starts", "indices", "channels", "rows", "columns")


class _Record(ctypes.Structure):
    """``instruction`` of _kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("from_", ctypes.c_int64),
        ("to", ctypes.c_int64),
        ("scratch", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*_FLOATS, *_INTEGERS)),
    )


@cache
def kernels() -> ctypes.CDLL | None:
    """The built kernels; None where there are none, or none that fit."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.dnw_size.restype = ctypes.c_int64
            if library.dnw_version() == _VERSION and library.dnw_size() == ctypes.sizeof(_Record):
                library.dnw_run.restype = None
                return library
        except (OSError, AttributeError):  # of another machine, or no library of ours
            continue
    return None


class Runtime:
    """Runs a compacted network. Give it images, get its outputs.

    Args:
        program: the network.
        threads: how many images are worked on at once.
        native: whether to use the kernels of the package: by default where they are built.

    Attributes:
        kind: "native" or "torch".

    Raises:
        ValueError: kernels are asked for that are not built, or no whole number of threads.
    """

    def __init__(self, program: Program, *, threads: int = 1, native: bool | None = None) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads={threads!r}: a whole number from 1 on")
        if native and kernels() is None:
            raise ValueError("native=True: the kernels are not built; install the package again where there is a C compiler")
        self.program, self.threads = program, threads
        self.kind = "native" if native or (native is None and kernels() is not None) else "torch"
        self.output_size = program.output_size
        if self.kind == "native":
            self._layout = _Layout(program)

    def __call__(self, images: Any) -> Any:
        """Images ``[batch, channels, height, width]`` to outputs ``[batch, ...]`` in float32, as a tensor or as a NumPy array.

        Raises:
            ValueError: another shape than the network was compiled for, or no floating-point numbers.
        """
        given = images if isinstance(images, Tensor) else torch.as_tensor(images)
        self.program.check_images(given)
        if self.kind == "torch":
            outputs = self.program(given)
        else:
            outputs = self._run(given.detach().to("cpu", torch.float32).contiguous())
        return outputs if isinstance(images, Tensor) else outputs.numpy()

    def _run(self, images: Tensor) -> Tensor:
        outputs = torch.empty(len(images), *self.output_size)
        workers = min(self.threads, len(images))
        if workers < 2:
            self._layout.run(images, outputs)
            return outputs
        parts = zip(images.tensor_split(workers), outputs.tensor_split(workers), strict=True)
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(self._layout.run, *part) for part in parts]:
                done.result()
        return outputs


class _Layout:
    """A program as records in memory, with their places in the arena."""

    def __init__(self, program: Program) -> None:
        self._records: list[_Record] = []
        self._held: list[Tensor] = []  # what the records point to
        self._space, self._scratch = _Space(), 0
        self._input, size = program.input_size, tuple(program.input_size)
        at = self._space.take(_floats(size))
        assert at == 0
        for instruction in program.instructions:
            at, size = self._add(instruction, at, size)
        self._output, self._output_at = size, at
        scratch = self._space.size
        for record in self._records:
            record.scratch = scratch
        self._array = (_Record * len(self._records))(*self._records)

    def run(self, images: Tensor, outputs: Tensor) -> None:
        """Runs images, float32 in one piece, into outputs in one piece; in the calling thread."""
        library = kernels()
        assert library is not None
        arena = torch.empty(self._space.size + self._scratch + 64)
        library.dnw_run(
            self._array,
            ctypes.c_int32(len(self._array)),
            ctypes.c_void_p(images.data_ptr()),
            ctypes.c_void_p(outputs.data_ptr()),
            ctypes.c_void_p(arena.data_ptr()),
            ctypes.c_int64(len(images)),
            (ctypes.c_int32 * 3)(*self._input),
            (ctypes.c_int32 * 3)(*(*self._output, 1, 1)[:3]),
            ctypes.c_int64(self._output_at),
        )

    def _add(self, instruction: Instruction, at: int, size: Size) -> tuple[int, Size]:
        """Appends an instruction whose input lies at a place; returns where its output lies, and its size. Frees the input."""
        if isinstance(instruction, Graph):
            return self._add_graph(instruction, at, size)
        given = instruction.check(size)
        if isinstance(instruction, (Affine, InstanceNorm, Rectify)):
            self._append(instruction, at, at, size, given)
            return at, given
        to = self._space.take(_floats(given))
        self._append(instruction, at, to, size, given)
        self._space.free(at, _floats(size))
        return to, given

    def _add_graph(self, graph: Graph, at: int, size: Size) -> tuple[int, Size]:
        """States of all levels lie one after the other, so that edges read them as one input."""
        first = size
        for instruction in graph.inputs:
            first = instruction.check(first)
        place = _floats((1, *first[1:]))
        total = first[0] + sum(edges.num_targets for edges, _ in graph.levels)
        states = self._space.take(total * place)
        self._add_nodes(graph.inputs, at, states, size)
        self._space.free(at, _floats(size))
        known = first[0]
        for edges, node in graph.levels:
            here = (known, *first[1:])
            sums = self._space.take(edges.num_targets * place)
            self._append(edges, states, sums, here, edges.check(here))
            self._add_nodes(node, sums, states + known * place, edges.check(here))
            self._space.free(sums, edges.num_targets * place)
            known += edges.num_targets
        here = (known, *first[1:])
        given = graph.outputs.check(here)
        to = self._space.take(_floats(given))
        self._append(graph.outputs, states, to, here, given)
        self._space.free(states, total * place)
        return to, given

    def _add_nodes(self, node: Sequence[Instruction], at: int, to: int, size: Size) -> None:
        """A node function whose last instruction writes to a place; the others work where their input lies."""
        if _is_node(node) and size[1:] != (1, 1):
            self._append_node(node, at, to, size)
            return
        for i, instruction in enumerate(node):
            given = instruction.check(size)
            self._append(instruction, at, to if i == len(node) - 1 else at, size, given)
            size = given

    def _append(self, instruction: Instruction, at: int, to: int, size: Size, given: Size) -> None:
        record = _Record(from_=at, to=to, sources=size[0], targets=given[0])
        record.height, record.width = (*size[1:], 1, 1)[:2]
        record.out_height, record.out_width = (*given[1:], 1, 1)[:2]
        if isinstance(instruction, Edges):
            self._fill(record, "edges", weight=instruction.weight, starts=instruction.starts, indices=instruction.sources)
            self._fill_constant(record, instruction.constant)
        elif isinstance(instruction, (Affine, InstanceNorm)):
            kind = "affine" if isinstance(instruction, Affine) else "instance_norm"
            self._fill(record, kind, scale=instruction.scale, shift=instruction.shift)
            record.eps = getattr(instruction, "eps", 0.0)
        elif isinstance(instruction, Rectify):
            self._fill(record, "rectify")
        elif isinstance(instruction, Convolution):
            kind = "depthwise" if instruction.groups > 1 or instruction.weight.shape[:2] == (1, 1) else "convolution"
            self._fill(record, kind, weight=instruction.weight)
            record.kernel_height, record.kernel_width = instruction.weight.shape[2:]
            (record.stride_y, record.stride_x), (record.pad_y, record.pad_x) = instruction.stride, instruction.padding
            reads = math.prod(instruction.weight.shape[1:])
            self._scratch = max(self._scratch, reads * (given[2] + 16) + 64)
            self._fill_constant(record, instruction.constant)
        elif isinstance(instruction, Mean):
            self._fill(record, "mean")
            record.start, record.stop = instruction.start, instruction.stop
        elif isinstance(instruction, Linear):
            self._fill(record, "linear", weight=instruction.weight, shift=instruction.bias)
        elif isinstance(instruction, Restore):
            self._fill(record, "restore", core=instruction.constant, channels=instruction.channels)
            record.maps = len(instruction.channels)
        elif isinstance(instruction, Pick):
            self._fill(record, "pick", channels=instruction.channels)
            record.maps = len(instruction.channels)
        else:
            raise TypeError(f"no kernel for {type(instruction).__name__}")
        self._records.append(record)

    def _append_node(self, node: Sequence[Any], at: int, to: int, size: Size) -> None:
        affine, _, convolution = node
        given = convolution.check(size)
        record = _Record(from_=at, to=to, sources=size[0], targets=given[0], height=size[1], width=size[2])
        record.out_height, record.out_width = given[1:]
        record.stride_y, record.stride_x = convolution.stride
        inside = torch.zeros(_floats((1, *size[1:])))
        inside[: size[1] * (size[2] + 1)].view(size[1], size[2] + 1)[:, : size[2]] = 1.0
        self._fill(record, "node", scale=affine.scale, shift=affine.shift, weight=convolution.weight, core=inside)
        self._scratch = max(self._scratch, len(inside) + 2 * size[2] + 64)
        self._records.append(record)

    def _fill(self, record: _Record, kind: str, **arrays: Tensor) -> None:
        record.kind = _KINDS.index(kind)
        for name, array in arrays.items():
            held = array.to("cpu", torch.float32 if name in _FLOATS else torch.int32).contiguous()
            self._held.append(held)
            setattr(record, name, held.data_ptr())

    def _fill_constant(self, record: _Record, constant: Constant | None) -> None:
        if constant is None:
            return
        names = {"shift": constant.base, "core": constant.core, "channels": constant.channels}
        self._fill(record, _KINDS[record.kind], **names, rows=constant.rows, columns=constant.columns)
        record.maps = len(constant.channels)


def _is_node(node: Sequence[Instruction]) -> bool:
    """Whether instructions are a scale and shift, a ReLU and a 3x3 convolution per channel: what the fused kernel does."""
    if len(node) != 3 or not isinstance(node[0], Affine) or not isinstance(node[1], Rectify):
        return False
    last = node[2]
    if not isinstance(last, Convolution) or last.constant is not None or last.padding != (1, 1):
        return False
    return last.weight.shape[1:] == (1, 3, 3) and last.groups == last.weight.shape[0]


def _floats(size: Size) -> int:
    """What maps take in the arena: rows with one float between them, and a multiple of 16 floats a map."""
    if math.prod(size[1:]) == 1:
        return size[0]
    return size[0] * -(-size[1] * (size[2] + 1) // 16) * 16


class _Space:
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
