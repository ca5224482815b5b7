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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dnw.compile._lower import CACHE, Kernel, Lowered
from dnw.compile._program import Program, in_memory, require_program

_VERSION = 6
_KINDS = (
    "spread",
    "edges",
    "matrix",
    "affine",
    "instance_norm",
    "rectify",
    "depthwise",
    "convolution",
    "node",
    "mean",
    "linear",
    "copy",
    "zero",
    "slide",
    "gather",
)
_NUMBERS = (
    "kind",
    "relu",
    "outside",
    "targets",
    "sources",
    "others",
    "maps",
    "height",
    "width",
    "pitch",
    "plane",
    "second_plane",
    "out_height",
    "out_width",
    "out_pitch",
    "out_plane",
    "kernel_height",
    "kernel_width",
    "stride_y",
    "stride_x",
    "pad_y",
    "pad_x",
)
_FLOATS = ("weight", "scale", "shift", "added")
_INTEGERS = ("starts", "middles", "offsets", "channels", "mask")


class _Instruction(ctypes.Structure):
    """``instruction`` of _kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*_FLOATS, *_INTEGERS)),
    )


class _Call(ctypes.Structure):
    """``call`` of _kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kernel", "first", "rows", "spare")),
        *((name, ctypes.c_int64) for name in ("from_", "second", "to")),
    )


@cache
def kernels() -> ctypes.CDLL | None:
    """The built kernels; None where there are none, or none that fit."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.dnw_size.restype = ctypes.c_int64
            sizes = library.dnw_size(0), library.dnw_size(1)
            if library.dnw_version() == _VERSION and sizes == (ctypes.sizeof(_Instruction), ctypes.sizeof(_Call)):
                library.dnw_run.restype = None
                return library
        except (OSError, AttributeError):  # of another machine, or no library of ours
            continue
    return None


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
        self.output_size = program.output_size
        if self.kind == "native":
            with torch.device("cpu"):
                self._layout = _Layout(program)
            self._hire()

    def _hire(self) -> None:
        """Threads of this process: a process that is forked from one has none."""
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._crew = ThreadPoolExecutor(max(1, self.threads - 1))  # of one image; the calling thread is one of them
        self._crew_is_busy = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _runtime, (self.program, self.threads, self.kind)

    def __call__(self, images: Any) -> Any:
        """Images ``[batch, channels, height, width]`` to outputs ``[batch, ...]`` in float32, as a tensor or as a NumPy array.

        Raises:
            ValueError: another shape than the network was compiled for, no floating-point numbers, or no dense tensor.
        """
        given = images if isinstance(images, Tensor) else self._from_numpy(images)
        self.program.check_images(given)
        if self.kind == "torch":
            outputs = self.program(given)
        else:
            outputs = self._run(in_memory(given, torch.float32))
        return outputs if isinstance(images, Tensor) else outputs.numpy()

    def _from_numpy(self, images: Any) -> Tensor:
        """An array of whatever strides, byte order and precision, as float32."""
        import numpy as np

        array = np.asarray(images)
        if array.dtype.kind != "f":
            raise ValueError(self.program.refusal(array.dtype, array.shape))
        return torch.from_numpy(np.require(array, np.float32, ["C_CONTIGUOUS", "WRITEABLE"]))

    def _run(self, images: Tensor) -> Tensor:
        if self._process != os.getpid():
            self._hire()
        outputs = _floats(len(images), *self.output_size)
        if self._pool is None or not len(images):
            self._layout.run(images, outputs)
        elif len(images) < self.threads:
            self._together(images, outputs)
        else:
            parts = zip(images.tensor_split(self.threads), outputs.tensor_split(self.threads), strict=True)
            for done in [self._pool.submit(self._layout.run, *part) for part in parts]:
                done.result()
        return outputs

    def _together(self, images: Tensor, outputs: Tensor) -> None:
        """All threads on one image after the other. They wait for each other, so the crew serves one caller at a time."""
        meeting = torch.zeros(2, dtype=torch.int32, device="cpu")
        arena = self._layout.take_arena()
        with self._crew_is_busy:
            work = images, outputs, arena
            others = [
                self._crew.submit(self._layout.run, *work, part, self.threads, meeting) for part in range(1, self.threads)
            ]
            self._layout.run(*work, 0, self.threads, meeting)
            for done in others:
                done.result()
        self._layout.give_arena(arena)


def _runtime(program: Program, threads: int, kind: str) -> Runtime:
    """One like a pickled one, on PyTorch where the kernels are not built here."""
    return Runtime(program, threads=threads, native=None if kind == "native" else False)


def _floats(*shape: int) -> Tensor:
    """Memory as the kernels take it, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Layout:
    """A program as records in memory."""

    def __init__(self, program: Program, cache: int = CACHE) -> None:
        self.lowered = Lowered(program, cache)
        self._held: list[Tensor] = []  # what the records point to
        records = [self._record(kernel.kind, kernel.numbers, kernel.arrays) for kernel in self.lowered.kernels]
        self._kernels = (_Instruction * len(records))(*records)
        calls = self.lowered.calls
        self._calls = (_Call * len(calls))(*(_Call(c.kernel, c.first, c.rows, 0, c.from_, c.second, c.to) for c in calls))
        self._sizes = math.prod(program.input_size), math.prod(program.output_size)
        self._arenas: list[Tensor] = []  # of runs that are over

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
        part: int = 0,
        parts: int = 1,
        meeting: Tensor | None = None,
    ) -> None:
        """Runs images, float32 in one piece, into outputs in one piece, in the calling thread.

        It does all the work on them, in an arena of its own, or a part of the work on each in one that is shared.
        """
        arena = self.take_arena() if shared is None else shared
        scratch = _floats(self.lowered.scratch)
        self._run(0, len(self._calls), images, outputs, arena, scratch, part, parts, meeting)
        if shared is None:
            self.give_arena(arena)

    def profile(self, image: Tensor, rounds: int = 20) -> list[tuple[Kernel, float]]:
        """Each call's kernel and the least seconds that it took on one image, in the calling thread."""
        outputs, arena, scratch = _floats(1, self._sizes[1]), self.take_arena(), _floats(self.lowered.scratch)
        seconds = [math.inf] * len(self._calls)
        for _ in range(rounds):
            for i in range(len(self._calls)):
                started = time.perf_counter()
                self._run(i, 1, image, outputs, arena, scratch)
                seconds[i] = min(seconds[i], time.perf_counter() - started)
        self.give_arena(arena)
        return [(self.lowered.kernels[call.kernel], t) for call, t in zip(self.lowered.calls, seconds, strict=True)]

    def _run(
        self,
        first: int,
        count: int,
        images: Tensor,
        outputs: Tensor,
        arena: Tensor,
        scratch: Tensor,
        part: int = 0,
        parts: int = 1,
        meeting: Tensor | None = None,
    ) -> None:
        library = kernels()
        assert library is not None
        library.dnw_run(
            self._kernels,
            ctypes.byref(self._calls, first * ctypes.sizeof(_Call)),
            ctypes.c_int32(count),
            *(ctypes.c_void_p(t.data_ptr()) for t in (images, outputs, arena, scratch)),
            *(ctypes.c_int64(n) for n in (len(images), *self._sizes)),
            ctypes.c_int32(part),
            ctypes.c_int32(parts),
            ctypes.c_void_p(0 if meeting is None else meeting.data_ptr()),
            ctypes.c_int32(lanes()),
        )

    def _record(self, kind: str, numbers: dict[str, float], arrays: dict[str, Tensor]) -> _Instruction:
        record = _Instruction(kind=_KINDS.index(kind))
        for name, number in numbers.items():
            setattr(record, name, number if name == "eps" else int(number))
        for name, array in arrays.items():
            held = in_memory(array, torch.float32 if name in _FLOATS else torch.int32)
            self._held.append(held)
            setattr(record, name, held.data_ptr())
        return record
