"""Compacted networks on kernels of our own.

Contract: a program is laid out once (_lower.py). A run takes an arena of its own, so one runtime may be used by many threads
at once; the global lock of Python is not held while it runs.
Where the kernels are not built (no compiler was at hand when the package was installed), PyTorch runs the program, and ``kind``
says so.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnw.compile._lower import CACHE, Lowered, Record
from dnw.compile._pieces import Piece, flattened, pieces, unflattened
from dnw.compile._program import Program, in_memory, require_program
from dnw.kernels._library import INT32, INT64, POINTER, address, load

_VERSION = 9
_FUNCTIONS = {
    "lanes": (),
    "check": (POINTER, INT32, INT64, POINTER, INT32, INT64, INT64, INT64, INT64, INT64),
    "run": (POINTER, POINTER, INT32, *(POINTER,) * 4, *(INT64,) * 3, INT32, INT32, POINTER, INT32),
}
"""The functions of _kernels.c that are called here."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The built kernels; None where there are none, or none that fit."""
    return load(Path(__file__).parent, "_kernels", _VERSION, _FUNCTIONS)


class _Tables(NamedTuple):
    """What the library says of its kernels and of the records that it takes, so that it is written once.

    Attributes:
        kinds: the number of each kind of kernel.
        float_arrays: fields of a task that point to floats; all other arrays hold whole numbers.
        task, call: the records ``struct task`` and ``struct call``.
    """

    kinds: dict[str, int]
    float_arrays: tuple[str, ...]
    task: type[ctypes.Structure]
    call: type[ctypes.Structure]


@cache
def tables() -> _Tables:
    """Those of the library that is loaded."""
    library = kernels()
    assert library is not None
    library.dnw_names.argtypes, library.dnw_names.restype = [INT32], ctypes.c_char_p
    names = [tuple(library.dnw_names(table).decode().split()) for table in range(7)]
    kinds, integers, floats, float_arrays, integer_arrays, call_integers, call_offsets = names

    def structure(name: str, *fields: tuple[tuple[str, ...], Any]) -> type[ctypes.Structure]:
        return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for names, kind in fields for field in names]})

    task = structure("Task", (integers, INT32), (floats, ctypes.c_float), ((*float_arrays, *integer_arrays), POINTER))
    call = structure("Call", (call_integers, INT32), (call_offsets, INT64))
    return _Tables({kind: number for number, kind in enumerate(kinds)}, float_arrays, task, call)


def lanes() -> int:
    """Floats of a vector on this machine, where the kernels are built: 16 (AVX-512), 8 (AVX2) or 4."""
    library = kernels()
    assert library is not None
    return int(library.dnw_lanes())


class Runtime:
    """Runs a compacted network. Give it images, get its outputs.

    Args:
        program: the network.
        threads: how many work at once: on an image each, or together on one where there are fewer images.
        native: whether to use the kernels of the package: by default where they are built.

    Attributes:
        kind: "native" or "torch".

    Raises:
        ValueError: no compacted network, kernels that are not built, or no whole number of threads.
    """

    def __init__(self, program: Program, *, threads: int = 1, native: bool | None = None) -> None:
        require_program(program)
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads={threads!r}: a whole number from 1 on")
        if native and kernels() is None:
            raise ValueError("native=True: the kernels are not built; install the package again where there is a C compiler")
        self.program, self.threads = program, threads
        self.kind = "native" if native or (native is None and kernels() is not None) else "torch"
        if self.kind == "native":
            with torch.device("cpu"):
                self._pieces = pieces(program)
                self._layouts = [_Layout(piece.program) if piece.native else None for piece in self._pieces]
            self._hire()

    @property
    def _layout(self) -> _Layout:
        """Of a program that is one piece."""
        (layout,) = self._layouts
        assert layout is not None
        return layout

    def _hire(self) -> None:
        """Threads of this process: a process that is forked from one has none."""
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._crew = ThreadPoolExecutor(max(1, self.threads - 1))  # of one image
        self._leader = ThreadPoolExecutor(1)  # one of them, for one caller at a time

    def __reduce__(self) -> tuple[Any, ...]:
        return _runtime, (self.program, self.threads, self.kind)

    def __call__(self, *images: Any) -> Any:
        """Inputs ``[batch, *size]`` to outputs ``[batch, ...]`` in float32, as tensors or as NumPy arrays; several as a tuple.

        Raises:
            ValueError: other shapes than the network was compiled for, no floating-point numbers, or no dense tensor.
        """
        given = [x if isinstance(x, Tensor) else self._from_numpy(x, i) for i, x in enumerate(images)]
        self.program.check_images(*given)
        if self.kind == "torch":
            found = self.program(*given)
            outputs = list(found) if isinstance(found, tuple) else [found]
        else:
            outputs = self._run_pieces([in_memory(x, torch.float32) for x in given])
        if not isinstance(images[0], Tensor):
            outputs = [output.numpy() for output in outputs]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _run_pieces(self, values: list[Tensor]) -> list[Tensor]:
        known = dict(enumerate(values))
        for piece, layout in zip(self._pieces, self._layouts, strict=True):
            known.update(zip(piece.writes, self._run_piece(piece, layout, [known[i] for i in piece.reads]), strict=True))
        return [known[i] for i in self.program.outputs]

    def _run_piece(self, piece: Piece, layout: _Layout | None, reads: list[Tensor]) -> list[Tensor]:
        if layout is None:
            return piece.program.run(*reads)
        flat = self._run(layout, in_memory(flattened(reads, piece.program.input_sizes), torch.float32))
        return list(unflattened(flat, piece.sizes))

    def timed(self, images: list[Tensor]) -> Iterator[tuple[bool, float]]:
        """Of each piece whether kernels run it, and the seconds that it takes on some inputs."""
        known = dict(enumerate(images))
        for piece, layout in zip(self._pieces, self._layouts, strict=True):
            started = time.perf_counter()
            found = self._run_piece(piece, layout, [known[i] for i in piece.reads])
            yield piece.native, time.perf_counter() - started
            known.update(zip(piece.writes, found, strict=True))

    def _from_numpy(self, images: Any, number: int) -> Tensor:
        """An array of whatever strides, byte order and precision, as float32."""
        import numpy as np

        array = np.asarray(images)
        if array.dtype.kind != "f":
            size = self.program.input_sizes[min(number, len(self.program.input_sizes) - 1)]
            raise ValueError(self.program.refusal(array.dtype, array.shape, size))
        return torch.from_numpy(np.require(array, np.float32, ["C_CONTIGUOUS", "WRITEABLE"]))

    def _run(self, layout: _Layout, images: Tensor) -> Tensor:
        if self._process != os.getpid():
            self._hire()
        outputs = _floats(len(images), layout.num_outputs)
        if self._pool is None or not len(images):
            layout.run(images, outputs)
        elif len(images) < self.threads:
            self._leader.submit(self._together, layout, images, outputs).result()
        else:
            parts = zip(images.tensor_split(self.threads), outputs.tensor_split(self.threads), strict=True)
            for done in [self._pool.submit(layout.run, *part) for part in parts]:
                done.result()
        return outputs

    def _together(self, layout: _Layout, images: Tensor, outputs: Tensor) -> None:
        """All threads on one image after the other, for the leader.

        They wait for each other, so each of them has to come: an interrupt, which the caller may get at any moment, must not
        keep one away.
        """
        meeting = torch.zeros(2, dtype=torch.int32, device="cpu")
        arena = layout.take_arena()
        work = images, outputs, arena
        others = [self._crew.submit(layout.run, *work, thread, self.threads, meeting) for thread in range(1, self.threads)]
        layout.run(*work, 0, self.threads, meeting)
        for done in others:
            done.result()
        layout.give_arena(arena)


def _runtime(program: Program, threads: int, kind: str) -> Runtime:
    """One like a pickled one, on PyTorch where the kernels are not built here."""
    return Runtime(program, threads=threads, native=None if kind == "native" else False)


def _floats(*shape: int) -> Tensor:
    """Memory as the kernels take it, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Layout:
    """A program as records in memory."""

    def __init__(self, program: Program, cache: int = CACHE) -> None:
        library, found = kernels(), tables()
        assert library is not None
        self.lowered = lowered = Lowered(program, cache)
        self._arrays: list[Tensor] = []  # what the records point to
        self._tasks = (found.task * len(lowered.records))(*map(self._task, lowered.records))
        self._calls = (found.call * len(lowered.calls))(*(_filled(found.call, vars(call)) for call in lowered.calls))
        self._sizes = sum(map(math.prod, program.input_sizes)), sum(map(math.prod, program.output_sizes))
        self._arenas: list[Tensor] = []  # of runs that are over
        tasks = self._tasks, len(self._tasks), ctypes.sizeof(found.task)
        calls = self._calls, len(self._calls), ctypes.sizeof(found.call)
        library.dnw_check(*tasks, *calls, *self._sizes, lowered.arena, lowered.scratch)

    @property
    def num_outputs(self) -> int:
        """Numbers that come out of one image."""
        return self._sizes[1]

    def take_arena(self) -> Tensor:
        try:
            return self._arenas.pop()
        except IndexError:
            return _floats(self.lowered.arena).zero_()  # vectors reach beyond rows, and subnormal numbers there would be slow

    def give_arena(self, arena: Tensor) -> None:
        self._arenas.append(arena)

    def run(
        self,
        images: Tensor,
        outputs: Tensor,
        shared: Tensor | None = None,
        thread: int = 0,
        threads: int = 1,
        meeting: Tensor | None = None,
    ) -> None:
        """Runs images, float32 in one piece, into outputs in one piece, in the calling thread.

        It does all the work on them, in an arena of its own, or that of one of several threads in one that they share.
        """
        arena = self.take_arena() if shared is None else shared
        scratch = _floats(self.lowered.scratch)
        self._run(0, len(self._calls), images, outputs, arena, scratch, thread, threads, meeting)
        if shared is None:
            self.give_arena(arena)

    def profile(self, image: Tensor, rounds: int = 20) -> list[tuple[Record, float]]:
        """Each call's record and the least seconds that it took on one image, in the calling thread."""
        outputs, arena, scratch = _floats(1, self._sizes[1]), self.take_arena(), _floats(self.lowered.scratch)
        seconds = [math.inf] * len(self._calls)
        for _ in range(rounds):
            for i in range(len(self._calls)):
                started = time.perf_counter()
                self._run(i, 1, image, outputs, arena, scratch)
                seconds[i] = min(seconds[i], time.perf_counter() - started)
        self.give_arena(arena)
        return [(self.lowered.records[call.task], t) for call, t in zip(self.lowered.calls, seconds, strict=True)]

    def _run(
        self,
        first: int,
        count: int,
        images: Tensor,
        outputs: Tensor,
        arena: Tensor,
        scratch: Tensor,
        thread: int = 0,
        threads: int = 1,
        meeting: Tensor | None = None,
    ) -> None:
        library = kernels()
        assert library is not None
        library.dnw_run(
            self._tasks,
            ctypes.byref(self._calls, first * ctypes.sizeof(tables().call)),
            count,
            *map(address, (images, outputs, arena, scratch)),
            len(images),
            *self._sizes,
            thread,
            threads,
            address(meeting),
            lanes(),
        )

    def _task(self, record: Record) -> ctypes.Structure:
        found = tables()
        values: dict[str, float | int | None] = {"kind": found.kinds[record.kind], **record.numbers}
        for name, array in record.arrays.items():
            floats = name in found.float_arrays
            if not floats and array.numel() and int(array.abs().max()) >= 1 << 31:
                raise ValueError("maps that lie beyond 2^31 numbers; kernels reach no further")
            held = in_memory(array, torch.float32 if floats else torch.int32)
            self._arrays.append(held)
            values[name] = address(held)
        return _filled(found.task, values)


def _filled(structure: type[ctypes.Structure], values: Mapping[str, float | int | None]) -> ctypes.Structure:
    """A record with some values in its fields, 0 in all others; ctypes would take other names in silence."""
    unknown = values.keys() - {name for name, *_ in structure._fields_}
    assert not unknown, f"struct {structure.__name__.lower()} of _kernels.c has no {', '.join(sorted(unknown))}"
    return structure(**values)
